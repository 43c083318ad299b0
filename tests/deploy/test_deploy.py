"""A real federation on the loopback interface: SuperLink and SuperNodes over gRPC, with TLS and node keys."""

import json
import os
import re
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from deployed import MODELS, SMALL, learned
from federation import federate, local_grid
from sites import make_sites
from tcp_link import TcpLink

from experiments.deploy import trial
from experiments.deploy.keys import Authority, node_key, write_secret
from experiments.deploy.layout import CONNECTION, Deployment
from experiments.launch.runner import Federation, launch
from experiments.launch.superlink import free_port, process_environment
from fedkd.wire.identities import Identity
from strategies.relay.roster import RosterError


def real_peers(test):
    """Mark a test that waits for real processes."""
    return pytest.mark.flower(pytest.mark.timeout(1800)(test))


TRIALS = {
    "averaged": {},
    "averaged-sealed": {"sealed": True, "codec": "fp16"},
    "gossip": {"strategy": "gossip"},
    "gossip-sealed": {"strategy": "gossip", "sealed": True, "codec": "fp16", "rounds": 2},
}
REFUSED = {
    "weights": ({"strategy": "fedavg"}, "`strategy` to be one of .*`allowed-strategies`"),
    "epochs": ({"pretrain-epochs": 201}, "`pretrain-epochs` to be at most 200 epochs in a mail .*`max-epochs`"),
}
"""What the peers of the federation do not take part in."""


def write_trials(folder: Path, trials: dict[str, dict]) -> Path:
    folder.mkdir()
    lines = [
        {"name": name, "settings": {**settings, "out-dir": str(folder / name)}} for name, settings in trials.items()
    ]
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "trials.jsonl"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def real(federation, tmp_path_factory):
    """Return the folder of several runs on the federation, one after another, and what they said."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    trials = {**TRIALS, **{name: settings for name, (settings, _) in REFUSED.items()}}
    run = federation.run(folder, trials=str(write_trials(folder, trials)), rounds=1)
    assert run.end() == "", run.said
    return folder


@real_peers
def test_real_peers_learn_what_flowers_simulation_learns(real, federation, tmp_path):
    """Under averaged and gossip, sealed and plain; each real peer brings what its stand-in is dealt."""
    simulated = tmp_path / "simulated"
    settings = {**SMALL, "rounds": 1, "dataset": "digits", "partition": "iid", "models": MODELS}

    outcome = launch(
        federation.app, {**settings, "trials": str(write_trials(simulated, TRIALS))}, Federation(peers=3),
        out=lambda _: None,
    )  # fmt: skip

    assert outcome.completed, outcome.reason
    for name in TRIALS:
        found = rows(real / name)
        assert [row["error"] for row in found if row["error"]] == []
        assert {row["model"] for row in found} == {"mlp", "cnn-small", "resnet8"}
        assert learned(found) == learned(rows(simulated / name)), name


@real_peers
def test_who_came_with_what_is_said_at_the_start(real, federation):
    said = (real / "gossip-sealed" / "log.txt").read_text()
    identity = Identity(federation.deployment.peer("peer-1") / "node.key")
    key = identity.vouch(bytes(32), name="peer-1", run="").fingerprint
    assert f"peer-1: cnn-small, 13,706 parameters, 459 private samples, key {key}\n" in said


@real_peers
@pytest.mark.parametrize("name", REFUSED)
def test_a_peer_refuses_what_is_beyond_its_limits(real, name):
    assert re.search(REFUSED[name][1], (real / name / "error.txt").read_text())
    assert not (real / name / "rounds.jsonl").exists()


@real_peers
def test_secrets_are_readable_by_their_owner_alone(real, federation):
    patterns = (
        "*.key", "peer.toml", "key.json", "*.safetensors", "worker.sock", "worker.lock", "worker.log", "trusted-keys",
        "state.db",
    )  # fmt: skip
    secrets = [path for pattern in patterns for path in federation.deployment.folder.rglob(pattern)]
    names = {path.name for path in secrets}
    assert {"node.key", "server.key", "key.json", "round-000001.safetensors", "worker.sock", "state.db"} <= names
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in secrets} == {0o700}


@real_peers
def test_what_is_kept_of_sealed_mail_is_ciphertext(real, federation, tmp_path):
    """The relay's file holds the knowledge of the plain run; of the sealed one's, nobody has kept a sample."""

    def last_knowledge(name: str) -> list[bytes]:
        settings = {key.replace("-", "_"): value for key, value in TRIALS[name].items()}
        run = federation.simulated(tmp_path / name, **{**settings, "rounds": 1, "sealed": False})
        arrays = [reply.content["knowledge"]["logits"].numpy() for reply in run.grid.replies[6:]]
        return [row.tobytes() for array in arrays for row in array]

    def kept(paths: Iterable[Path]) -> bytes:
        return b"".join(path.read_bytes() for path in paths)

    plain, sealed = last_knowledge("averaged"), last_knowledge("averaged-sealed")

    assert len(plain) == len(sealed) == 3 * SMALL["proxy-size"]
    assert all(row in kept((real / "averaged").glob("*.safetensors")) for row in plain)
    relays, superlinks = (real / "averaged-sealed").glob("*"), federation.deployment.superlink.glob("state.db*")
    everything = kept([*relays, *superlinks])
    assert not any(row in everything for row in sealed)


_OTHER_APP = """
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ClientApp()
server = ServerApp()


@app.train("mail")
def own(message, context):
    Path("owned").touch()
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    waiting = set(grid.push_messages([Message(RecordDict(), n, "train.mail", ttl=60) for n in grid.get_node_ids()]))
    while waiting:
        waiting -= {m.metadata.reply_to_message_id for m in grid.pull_messages(list(waiting))}
        time.sleep(0.1)
"""
_OTHER_PROJECT = """
[project]
name = "other"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "mallory"
[tool.flwr.app.components]
serverapp = "other:server"
clientapp = "other:app"
"""


@real_peers
def test_a_peer_whose_code_is_pinned_runs_no_other(federation, tmp_path):
    """The code of a run comes from the SuperLink; a peer that installed its own runs that or nothing."""
    deployment = federation.deployment
    other = tmp_path / "other"
    other.mkdir()
    (other / "pyproject.toml").write_text(_OTHER_PROJECT)
    (other / "other.py").write_text(_OTHER_APP)
    with trial.flower(deployment) as flwr:
        submitted = flwr.json("run", str(other), CONNECTION)
        list(flwr.lines("log", str(submitted["run-id"]), CONNECTION, "--stream"))

    owned = [name for name in deployment.names if (deployment.peer(name) / "owned").exists()]

    assert owned == ["peer-0", "peer-1"]


@pytest.fixture
def misfits(federation, tmp_path):
    """Let peer-1 have another proxy set, and peer-2 other classes, for one test."""
    peers = {name: federation.deployment.peer(name) for name in ("peer-1", "peer-2")}
    before = {name: (folder / "peer.toml").read_text() for name, folder in peers.items()}
    for name, key, file in (("peer-1", "proxy", "proxy.npz"), ("peer-2", "dataset", "data.npz")):
        with np.load(peers[name] / file) as content:
            arrays = dict(content)
        if key == "proxy":
            arrays["x_train"] = arrays["x_train"][::-1]
        else:
            arrays["classes"] = np.array([f"glyph {c}" for c in arrays["classes"]])
        np.savez(tmp_path / f"other-{file}", **arrays)
        text = before[name].replace(f'{key} = "npz:{file}"', f'{key} = "npz:{tmp_path}/other-{file}"')
        assert text != before[name]
        (peers[name] / "peer.toml").write_text(text)
    yield
    for name, folder in peers.items():
        (folder / "peer.toml").write_text(before[name])


@real_peers
def test_real_peers_with_another_proxy_set_or_other_classes_are_refused_by_name(federation, misfits, tmp_path):
    run = federation.run(tmp_path / "run")

    reason = run.end()

    assert re.search(r"peer-1's proxy set [0-9a-f]{32} differ from the others' [0-9a-f]{32}", reason), reason
    assert re.search(r"peer-2's classes \('glyph 0', .* differ from the others' \('0', ", reason), reason
    assert "peer-0's" not in reason
    assert run.rows() == []


def supernode(deployment: Deployment, folder: Path, *options: str) -> tuple[int, str]:
    """Run a SuperNode until it gives up, with options in the place of peer-0's own; return its status and its log."""
    folder.mkdir(exist_ok=True)
    command = deployment.supernode_command("peer-0", port=free_port())
    for option, value in zip(options[::2], options[1::2], strict=True):
        command[command.index(option) + 1] = value
    environment = process_environment(os.environ, folder, ray_address=None)
    log = folder / "supernode.log"
    with log.open("w") as out:  # no pipe: its SuperExec would hold it open
        status = subprocess.run(
            [*command, "--max-retries", "0"], env=environment, cwd=deployment.peer("peer-0"), stdout=out, stderr=out,
            timeout=120, check=False,
        ).returncode  # fmt: skip
    return status, log.read_text()


@real_peers
def test_a_supernode_with_an_unknown_key_is_refused(federation, tmp_path):
    write_secret(tmp_path / "node.key", node_key()[0])
    options = ("--auth-supernode-private-key", str(tmp_path / "node.key"))
    status, said = supernode(federation.deployment, tmp_path, *options)
    assert status != 0
    assert "Failed to activate SuperNode" in said


@real_peers
def test_a_superlink_whose_certificate_names_another_host_is_refused(federation, tmp_path):
    with TcpLink(("127.0.0.2", 0), ("127.0.0.1", federation.deployment.fleet_port)) as link:
        status, said = supernode(federation.deployment, tmp_path, "--superlink", f"127.0.0.2:{link.port}")
    assert status != 0
    assert "Hostname Verification Check failed" in said, said


@real_peers
def test_a_superlink_of_another_authority_is_refused(federation, tmp_path):
    from cryptography.hazmat.primitives.serialization import Encoding

    write_secret(tmp_path / "other.crt", Authority.new().certificate.public_bytes(Encoding.PEM))
    status, said = supernode(federation.deployment, tmp_path, "--root-certificates", str(tmp_path / "other.crt"))
    assert status != 0
    assert "CERTIFICATE_VERIFY_FAILED" in said, said


@real_peers
def test_plaintext_to_the_superlink_is_refused(federation):
    """A channel without TLS gets no answer."""
    import grpc

    address = f"127.0.0.1:{federation.deployment.fleet_port}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/flwr.proto.Fleet/ActivateNode")(b"", timeout=10)
    assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.mark.parametrize(
    ("key", "complaint"),
    [("proxy", r"site-1's proxy set [0-9a-f]+ differ from the others' [0-9a-f]+$"), ("dataset", "site-1's classes")],
)
def test_a_peer_that_does_not_fit_the_others_is_refused_by_name(tmp_path, key, complaint):
    own = make_sites(tmp_path / "sites")
    other = make_sites(tmp_path / "others", proxy_size=61)
    if key == "proxy":
        own[1]["proxy"] = other[1]["proxy"]
    else:
        with np.load(tmp_path / "sites" / "site-1" / "data.npz") as content:
            np.savez(tmp_path / "renamed.npz", **{**content, "classes": content["classes"][::-1]})
        own[1]["dataset"] = f"npz:{tmp_path / 'renamed.npz'}"
    node_config = {i: {**site, "simulated": False, "worker": False} for i, site in enumerate(own)}
    grid = local_grid(tmp_path, 3, node_config=node_config)
    with pytest.raises(RosterError, match=complaint):
        federate(tmp_path, grid=grid)


@real_peers
@pytest.mark.slow
def test_the_payload_benchmark_sends_as_many_bytes_as_it_says(tmp_path, capsys):
    from experiments.bench.benchmarks import bench

    bench("payload", tmp_path / "figures.json", quick=True)

    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["megabytes"] for row in rows] == [0.1, 1.0]
    for row in rows:
        assert row["megabytes"] * 1e6 <= row["bytes_up"] <= row["megabytes"] * 1e6 + 1000
        assert all(seconds > 0 for seconds in row["seconds"])
    assert "bytes up" in capsys.readouterr().out
