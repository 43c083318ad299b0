"""A deployed peer: what it brings itself, what it refuses, and the process that keeps it warm between messages."""

import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from federation import SMALL, federate, local_grid
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from processes import has_ended, still_running
from sites import make_sites

from clients import frames
from clients.configuration import PeerConfig
from clients.limits import Limits
from clients.own_settings import own_settings
from clients.worker import LOCK, SOCKET
from clients.worker_client import WorkerError, ask
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import key, of
from fedkd.wire.messages import Mail, pack_mail, unpack_answer
from strategies.relay.rounds import RelayError

SETTINGS = RunConfig.from_mapping({**SMALL, "dataset": "digits", "proxy": "split"}).to_mapping()


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), peers=2)


def worker_pids(folder: Path) -> list[int]:
    """Return the workers that are alive below a folder."""
    pids = [int(lock.read_text()) for lock in folder.rglob(LOCK) if lock.read_text()]
    return [pid for pid in pids if not has_ended(pid)]


@pytest.fixture
def end_workers(tmp_path):
    yield
    for pid in worker_pids(tmp_path):
        os.kill(pid, signal.SIGKILL)


def deployed(own, **changes):
    """Return the peers' own configuration as deployed ones, with changes written with underscores."""
    changed = {key.replace("_", "-"): value for key, value in changes.items()}
    idle = {"idle-seconds": 60} if changes.get("worker", True) else {}
    return {i: {**site, "simulated": False, **idle, **changed} for i, site in enumerate(own)}


def place_of(own, root, **changes):
    made = PeerConfig.of_own(own_settings(own), name=own["name"], root=root, simulated=False)
    return replace(made, **changes)


def mail(kind="introduce", round=0, **settings):
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    return pack_mail(Mail(kind, round, {**SETTINGS, **changed}, "run-1"))


def gone(pid: int) -> bool:
    return not still_running([pid])


def knowledge(run):
    """Return the bytes of what peers sent the relay to pass on, without npy headers."""
    records = [reply.content["knowledge"] for reply in run.grid.replies if "knowledge" in reply.content]
    return [array.numpy().tobytes() for record in records for array in record.values()]


@pytest.mark.slow
def test_deployed_peers_in_their_workers_learn_what_simulated_ones_learn(tmp_path, sites, end_workers):
    simulated = federate(
        tmp_path / "a", grid=local_grid(tmp_path / "a", 2, node_config=dict(enumerate(sites))), strategy="gossip"
    )
    grid = local_grid(tmp_path / "b", 2, node_config=deployed(sites))

    resident = federate(tmp_path / "b", grid=grid, strategy="gossip", sealed=True)

    measured = [(row["peer"], row["test_accuracy"], row["kd_loss"]) for row in resident.rows()]
    assert measured == [(row["peer"], row["test_accuracy"], row["kd_loss"]) for row in simulated.rows()]
    plain, sealed = b"".join(knowledge(simulated)), b"".join(knowledge(resident))
    samples = [plain[at : at + 40] for at in range(0, len(plain), 40)]  # ten classes, fp32: one sample's logits
    assert len(sealed) > len(plain) > 0
    assert not any(sample in sealed for sample in samples)
    assert len(worker_pids(tmp_path / "b")) == 2
    assert worker_pids(tmp_path / "a") == []
    files = [path for path in (tmp_path / "b" / "state").rglob("*") if not path.is_dir()]
    assert {SOCKET, "key.json", "worker.log", "round-000002.safetensors"} <= {path.name for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
    assert {oct(path.parent.stat().st_mode & 0o777) for path in files if path.name == SOCKET} == {"0o700"}


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_answer_and_the_same_mail_again_gives_the_same_knowledge(
    tmp_path, sites, end_workers
):
    place, own = place_of(sites[0], tmp_path), own_settings({**sites[0], "idle-seconds": 60})
    started = mail("start", pretrain_epochs=1)
    ask(mail(), place, own, seconds=60)
    first = unpack_answer(ask(started, place, own, seconds=60))
    learn = mail("learn", 1, pretrain_epochs=1)
    learned = unpack_answer(ask(learn, place, own, seconds=60))
    (pid,) = worker_pids(tmp_path)
    os.kill(pid, signal.SIGSTOP)

    with pytest.raises(WorkerError, match=r"no answer within 0.5 s: the worker was ended"):
        ask(learn, place, own, seconds=0.5)
    again = unpack_answer(ask(learn, place, own, seconds=60))

    assert gone(pid)
    assert first.error == learned.error == ""
    assert again.metrics["test_accuracy"] == learned.metrics["test_accuracy"]
    np.testing.assert_array_equal(again.arrays["logits"], learned.arrays["logits"])


@pytest.mark.slow
def test_a_worker_that_crashes_says_why_to_its_owner_alone(tmp_path, sites, end_workers, monkeypatch, capsys):
    own = {**sites[0], "model": "crashing:model", "idle-seconds": 60}
    (tmp_path / "crashing.py").write_text(
        "import os, sys\n\ndef model(**shape):\n    os.write(2, b'out of luck')\n    os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WorkerError, match=r"ended while it worked; the peer's log says more$"):
        ask(mail(), place_of(own, tmp_path), own_settings(own), seconds=60)
    assert "site-0's worker ended with: out of luck" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_at_a_peer_is_an_error_that_leaves_its_state_as_it_was(tmp_path, sites, end_workers):
    place, own = place_of(sites[0], tmp_path), own_settings({**sites[0], "idle-seconds": 60})
    ask(mail("start", pretrain_epochs=1), place, own, seconds=60)
    (state,) = place.state_dir.rglob("round-*.safetensors")
    before = state.read_bytes()
    (pid,) = worker_pids(tmp_path)
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    refused = unpack_answer(ask(mail("learn", 1), place, own, seconds=60))
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = unpack_answer(ask(mail("learn", 1), place, own, seconds=60))

    assert refused.error.startswith("cannot write the state of round 1 to <state-dir>: ")
    assert str(tmp_path) not in refused.error
    assert state.read_bytes() == before
    assert not list(place.state_dir.rglob("*.partial"))
    assert again.error == ""
    assert worker_pids(tmp_path) == [pid]


def start_worker(folder, *options):
    command = [sys.executable, "-m", "clients.worker", str(folder), *options]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while not (folder / SOCKET).exists():
        assert process.poll() is None
    return process


def test_a_worker_ends_with_its_supernode(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as supernode:
        worker = start_worker(tmp_path, "--idle-seconds", "60", "--supernode", str(supernode.pid))
        supernode.kill()  # and not reaped yet, as in a container without an init process
        assert worker.wait(timeout=10) == 0


def test_an_idle_worker_ends_and_takes_its_socket_along(tmp_path):
    assert start_worker(tmp_path, "--idle-seconds", "0.2").wait(timeout=10) == 0
    assert not (tmp_path / SOCKET).exists()


def test_a_worker_of_other_code_makes_way(tmp_path):
    worker = start_worker(tmp_path, "--idle-seconds", "60")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / SOCKET))
        frames.send(connection, {"source": "other"}, RecordDict())
        note, _ = frames.receive(connection)
    assert note == {"stale": True}
    assert worker.wait(timeout=10) == 0


def test_the_process_of_a_message_imports_no_torch():
    code = "import sys, clients.client_app, clients.worker_client; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_frame_brings_a_content_as_it_was():
    content = RecordDict(
        {
            "a": ConfigRecord({"text": "ü", "number": 1, "list": [1.5, 2.0], "yes": True}),
            "b": MetricRecord({"nan": float("nan"), "series": [1.0]}),
            "c": ArrayRecord({"x": Array(np.arange(6.0).reshape(2, 3)), "y": Array(np.zeros(0, np.int8))}),
            "d": ArrayRecord({}),
        }
    )
    left, right = socket.socketpair()
    with left, right:
        frames.send(left, {"name": "site-0"}, content)
        note, received = frames.receive(right)
    assert note == {"name": "site-0"}
    assert repr(received.config_records) == repr(content.config_records)
    assert repr(received.metric_records) == repr(content.metric_records)
    np.testing.assert_array_equal(received["c"]["x"].numpy(), content["c"]["x"].numpy())
    assert received["c"]["y"].numpy().dtype == np.int8
    assert len(received["d"]) == 0


def test_half_a_frame_is_refused():
    left, right = socket.socketpair()
    with left, right:
        left.sendall(bytes(16)[:9])
        left.close()
        with pytest.raises(frames.BadFrame, match="closed after 9 of 16 bytes"):
            frames.receive(right)


@pytest.mark.parametrize("missing", ["model", "dataset", "proxy"])
def test_a_deployed_peer_opens_nothing_that_the_server_names(tmp_path, sites, missing):
    """The server names existing data and a known model; a peer that lacks its own refuses, and starts no worker."""
    own = [{key: value for key, value in site.items() if key != missing} for site in sites]
    with pytest.raises(RelayError, match=f"Expected setting `{missing}` to be set by peer site-0 itself"):
        federate(tmp_path, grid=local_grid(tmp_path, 2, node_config=deployed(own)), dataset=sites[0]["dataset"])
    assert list(tmp_path.rglob(LOCK)) == []


OURS = {
    "fedavg_model": "mlp", "divergence": "js", "weighing": "entropy", "augment": "none", "augment_proxy": "none",
}  # fmt: skip


def accepts(field, value):
    return of(field).rule.accepts(value)


def test_every_setting_that_could_name_a_path_or_code_is_the_peers_own(tmp_path, sites):
    """All texts that may name code or a file are either replaced by the peer's own, or nothing a peer opens."""
    evil_of = {f.name: f"evil.{f.name}:run" for f in dataclasses.fields(RunConfig) if isinstance(f.default, str)}
    texts = [f.name for f in dataclasses.fields(RunConfig) if f.name in evil_of and accepts(f, evil_of[f.name])]
    names_only = {"codec", "topology", "resume", "out_dir", "flow_layers", "trials", "pooled_model"}
    evil = replace(RunConfig(), **{name: evil_of[name] for name in texts}, download=True)
    place = place_of(sites[0], tmp_path)

    settled = place.settings(replace(evil, **OURS, strategy="averaged"))

    assert {name for name in texts if "evil" in str(getattr(settled, name))} <= names_only
    assert not settled.download
    assert place.model_spec(settled) == "mlp"
    assert place.checkpoint_path(settled) is None
    for name in OURS:
        with pytest.raises(SettingError, match=key(name)):
            place.settings(replace(evil, **{**OURS, name: getattr(evil, name)}))


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"strategy": "fedavg"}, {}, "`strategy` .*this peer's `allowed-strategies`.* 'fedavg'"),
        ({"strategy": "gossip"}, {"allowed-strategies": "averaged"}, "`strategy` .* averaged .*'gossip'"),
        ({}, {"require-sealed": True}, "`sealed` .*`require-sealed`"),
        ({}, {"trusted-keys": "keys"}, "`sealed` .*`trusted-keys`"),
        ({}, {"max-seconds": 5.0}, "`max-seconds` to be left out with `worker = false`"),
        ({}, {"idle-seconds": 5.0}, "`idle-seconds` to be left out with `worker = false`"),
        ({"pretrain-epochs": 5}, {"max-epochs": 4}, "`pretrain-epochs` .*at most 4 .* got 5"),
        ({"threads": 4096}, {}, "`threads` .*this peer's `max-threads`, by default its CPUs"),
    ],
)
def test_a_peer_keeps_its_own_limits(tmp_path, sites, settings, own, message):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites, worker=False, **own))

    with pytest.raises(RelayError, match=message):
        federate(tmp_path, grid=grid, **settings)

    assert not list(tmp_path.rglob("*.safetensors"))


def test_trusted_keys_are_asked_for_in_every_run_unless_their_owner_says_otherwise():
    def sealed(**own):
        return PeerConfig.of_own(own, name="north", root=Path("state"), simulated=False).limits.sealed

    assert not sealed()
    assert sealed(**{"trusted-keys": "keys"})
    assert sealed(**{"trusted-keys": "keys", "require-sealed": True})
    assert not sealed(**{"trusted-keys": "keys", "require-sealed": False})


def test_a_mail_larger_than_a_peer_allows_is_refused(tmp_path, sites):
    """60 samples of 10 classes in fp32 are more than 2000 bytes; a mail without knowledge is less."""
    with pytest.raises(FedkdError, match=r"at most 100 bytes in a mail .*max-payload.* got 101"):
        Limits(payload=100).check_payload(101)
    grid = local_grid(tmp_path, 2, node_config=deployed(sites, worker=False, max_payload=2000))

    with pytest.raises(RelayError, match=r"round 1: 0 of 2 .*at most 2000 bytes in a mail .*`max-payload`"):
        federate(tmp_path, grid=grid)

    assert not list(tmp_path.rglob("round-000001.safetensors"))


def test_a_peers_file_is_read_and_its_paths_are_its_own(tmp_path):
    file = tmp_path / "peer.toml"
    file.write_text('name = "north"\ncheckpoint = "m.pt"\ndataset = "npz:d.npz"\nproxy = "digits"\nmax-epochs = 3\n')

    own = own_settings({"peer-config": str(file), "max-epochs": 5})

    assert own == {
        "name": "north",
        "checkpoint": str(tmp_path / "m.pt"),
        "dataset": f"npz:{tmp_path / 'd.npz'}",
        "proxy": "digits",
        "max-epochs": 5,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('modle = "mlp"', "`modle` .*known key.*nearest: model"),
        ('max-epochs = "3"', "`max-epochs` to be a whole number"),
        ("max-payload = -1", "`max-payload` to be a number >= 0"),
        ("max-epsilon = 0.0", "`max-epsilon` to be a number > 0"),
        ("max-delta = 0.0", "`max-delta` to be a number between 0 and 1"),
        ("max-delta = 1", "`max-delta` to be a number between 0 and 1"),
        ("max-delta = nan", "`max-delta` to be a number between 0 and 1"),
        ("trusted-keys = 3", "`trusted-keys` to be text"),
        ('name = "../x"', "`name` to be letters"),
        ('allowed-strategies = "all"', "`allowed-strategies` .*averaged"),
        ("name =", "`peer-config` to be a readable TOML file"),
    ],
)
def test_a_mistake_in_a_peers_file_names_the_key(tmp_path, line, message):
    (tmp_path / "peer.toml").write_text(line)
    with pytest.raises(SettingError, match=message):
        own_settings({"peer-config": str(tmp_path / "peer.toml")})
