"""A real federation on the loopback interface: SuperLink and SuperNodes over gRPC, with TLS and node keys."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import pytest
from deployed import MODELS, SMALL, learned, new_deployment
from federation import federate, local_grid
from sites import make_sites
from tcp_link import TcpLink
from typer.testing import CliRunner

from experiments.cli import app as cli
from experiments.deploy import trial
from experiments.deploy.create import create
from experiments.deploy.keys import Authority, node_key, write_secret
from experiments.deploy.layout import CONNECTION, Deployment
from experiments.launch import Federation, launch
from experiments.superlink import LaunchError, free_port, process_environment
from fedkd.errors import FedkdError, SettingError
from fedkd.identity import Identity, read_trusted
from strategies.roster import RosterError


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
    from experiments.bench import bench

    bench("payload", tmp_path / "figures.json", quick=True)

    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["megabytes"] for row in rows] == [0.1, 1.0]
    for row in rows:
        assert row["megabytes"] * 1e6 <= row["bytes_up"] <= row["megabytes"] * 1e6 + 1000
        assert all(seconds > 0 for seconds in row["seconds"])
    assert "bytes up" in capsys.readouterr().out


def test_init_makes_what_the_readme_then_runs(tmp_path):
    folder = tmp_path / "d"

    said = CliRunner().invoke(cli, ["deploy", "init", str(folder), "--peers", "2", "--host", "fed.example.org"])

    assert said.exit_code == 0, said.output
    deployment = Deployment.read(folder)
    assert deployment.hosts == ("fed.example.org",)
    parts = {deployment.superlink: deployment.superlink_command()}
    parts |= {deployment.peer(name): deployment.supernode_command(name) for name in deployment.names}
    for part, command in parts.items():
        readme = (part / "README.md").read_text()
        assert shlex.join(command) in " ".join(readme.replace("\\\n", " ").split())
        assert str(tmp_path) not in readme  # it holds wherever the folder lies
    assert "--superlink fed.example.org:9092" in readme
    keys = {(folder / "peers" / name / "node.pub").read_text() for name in deployment.names}
    assert len(keys) == 2
    assert all(key.startswith("ecdsa-sha2-nistp384 ") for key in keys)
    own = tomllib.loads((folder / "peers" / "peer-1" / "peer.toml").read_text())
    assert (own["name"], own["partition-id"], own["num-partitions"]) == ("peer-1", 1, 2)
    trusted = read_trusted(folder / "peers" / "peer-1" / own["trusted-keys"])
    publics = {name: (folder / "peers" / name / "node.pub").read_text().strip() for name in deployment.names}
    assert trusted == publics
    assert Identity(folder / "peers" / "peer-1" / own["identity"]).public == publics["peer-1"]


def test_the_certificate_is_the_authoritys_and_names_its_hosts(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(deployment.authority)]
    server = str(deployment.superlink / "server.pem")
    assert subprocess.run([*verify, "-verify_ip", "127.0.0.1", server], check=False).returncode == 0
    assert subprocess.run([*verify, "-verify_hostname", "localhost", server], check=False).returncode == 0
    assert subprocess.run([*verify, "-verify_ip", "10.0.0.1", server], check=False).returncode != 0
    assert subprocess.run([*verify, "-verify_hostname", "example.org", server], check=False).returncode != 0


def secrets(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*.key")}


def test_a_partys_folder_holds_no_secret_of_another(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    parts = [deployment.superlink, *map(deployment.peer, deployment.names)]

    own = {part: secrets(part) for part in parts}

    assert all(len(found) == 1 for found in own.values())
    assert len(secrets(deployment.folder)) == 1 + len(parts)  # and the authority's
    for part, found in own.items():
        content = {path.read_bytes() for path in part.rglob("*") if path.is_file()}
        assert content & secrets(deployment.folder) == found


def test_the_superlinks_part_is_a_deployment_of_its_own_wherever_it_lies(tmp_path):
    made = new_deployment(tmp_path / "d")
    with trial.flower(made):
        pass
    made.superlink.rename(tmp_path / "other place")
    shutil.rmtree(made.folder)

    moved = Deployment.read(tmp_path / "other place")
    with trial.flower(moved):
        config = tomllib.loads((moved.operator / "config.toml").read_text())

    assert moved.superlink_command() == made.superlink_command()
    assert config["superlink"][CONNECTION]["root-certificates"] == str(tmp_path / "other place" / "ca.crt")
    for path in (moved.authority, *map(moved.public_key, moved.names)):
        assert path.is_relative_to(tmp_path / "other place") and path.exists()
    with pytest.raises(FedkdError, match="is the SuperLink's part"):
        trial.up(moved)


class FakeFlower:
    """Answers registrations: the SuperLink knows some keys already."""

    def __init__(self, *known: Path, refusal: str = "Public key already in use.") -> None:
        self._known, self._refusal = {*map(str, known)}, refusal

    def json(self, *words: str) -> dict:
        key = words[2]
        assert words == ("supernode", "register", key, CONNECTION)
        if key in self._known:
            return {"success": False, "error-message": self._refusal}
        self._known.add(key)
        return {"success": True, "node-id": 1}


def test_a_registration_that_broke_off_goes_on(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    flwr = FakeFlower(deployment.public_key("peer-0"))

    assert trial.register(deployment, flwr) == ["peer-1", "peer-2"]
    assert trial.register(deployment, flwr) == []


def test_a_key_that_flower_refuses_is_named_with_the_reason(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    flwr = FakeFlower(deployment.public_key("peer-1"), refusal="Not a NIST curve.")

    with pytest.raises(LaunchError, match=r"the key of peer-1: Not a NIST curve\."):
        trial.register(deployment, flwr)


@pytest.mark.parametrize(
    "host",
    [
        "fed.example.org:9092", "https://fed.example.org", "bad host", "", "bücher.example", "[::1]", "10.0.0.300",
        "fe80::1%eth0", "0.0.0.0", "-fed.example.org", "fed..org", f"{'x' * 64}.org",
    ],
)  # fmt: skip
def test_a_host_that_nobody_can_dial_is_refused_before_anything_is_written(tmp_path, host):
    said = CliRunner().invoke(cli, ["deploy", "init", str(tmp_path / "d"), "--host", "fed.example.org", "--host", host])

    assert isinstance(said.exception, SettingError)
    assert str(said.exception).startswith("Expected setting `--host` to be an address, or a host name")
    assert repr(host) in str(said.exception)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        (["--fleet-port", "0"], "--fleet-port"),
        (["--control-port", "9092"], "--control-port"),
        (["--node-port", "65535"], "--node-port"),
    ],
)
def test_ports_that_cannot_be_are_refused(tmp_path, wrong, flag):
    said = CliRunner().invoke(cli, ["deploy", "init", str(tmp_path / "d"), *wrong])

    assert isinstance(said.exception, SettingError) and said.exception.key == flag


def test_an_ipv6_address_is_written_as_flower_reads_it(tmp_path):
    deployment = Deployment(tmp_path / "d", ("2001:db8::7", "fed.example.org"), 1, 9092, 9093, 9400)
    create(deployment, demo=False)

    superlink, supernode = deployment.superlink_command(), deployment.supernode_command("peer-0")

    assert superlink[superlink.index("--fleet-api-address") + 1] == "[::]:9092"
    assert supernode[supernode.index("--superlink") + 1] == "[2001:db8::7]:9092"
    verify = ["openssl", "verify", "-CAfile", str(deployment.authority), "-verify_ip", "2001:db8::7"]
    assert subprocess.run([*verify, deployment.superlink / "server.pem"], check=False).returncode == 0


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    deployment = Deployment(tmp_path, ("127.0.0.1",), 1, 9092, 9093, 9400)
    with pytest.raises(SettingError, match="`DIR` to be a new or empty folder"):
        create(deployment, demo=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_where_nothing_listens_says_how_to_start_it(tmp_path):
    deployment = Deployment(tmp_path / "trial", ("127.0.0.1",), 2, free_port(), free_port(), 9400)
    create(deployment, demo=False)

    with pytest.raises(FedkdError, match=f"not up, .*: `fedkd deploy up {deployment.folder}`"):
        trial.require_up(deployment)


def test_no_key_of_a_deployment_is_committed_by_accident(tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    create(Deployment(tmp_path / "trial", ("127.0.0.1",), 2, 9092, 9093, 9400), demo=False)

    found = subprocess.run(["git", "status", "--short"], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert found.stdout == ""


def test_down_ends_only_what_up_started(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["sleep", "60"]) as own:
        entries = [
            {"name": "a", "pid": own.pid, "started": psutil.Process(own.pid).create_time()},
            {"name": "b", "pid": other.pid, "started": 0.0},  # the number of a process that ended long ago
        ]
        deployment.trial.mkdir()
        (deployment.trial / "processes.json").write_text(json.dumps(entries))

        assert trial.down(deployment) == ["a"]

        assert own.wait(10) != 0
        assert other.poll() is None
        other.kill()


def test_a_unit_runs_its_partys_command(tmp_path):
    deployment = new_deployment(tmp_path / "d")

    for unit in deployment.folder.rglob("*.service"):
        text = unit.read_text()
        assert "{" not in text and "\nExecStart=/opt/fedkd/bin/flower-super" in text


def compose(part: Path) -> dict:
    import yaml

    services = yaml.safe_load((part / "compose.yaml").read_text())["services"]
    (service,) = services.values()
    return service


def test_a_container_runs_its_partys_command_in_its_folder(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    parts = {deployment.superlink: deployment.superlink_command()}
    parts |= {deployment.peer(name): deployment.supernode_command(name) for name in deployment.names}

    found = {part: compose(part) for part in parts}

    for part, command in parts.items():
        assert found[part]["command"] == command
        assert found[part]["volumes"][0] == f".:{found[part]['working_dir']}"
        assert found[part]["environment"]["FLWR_HOME"].startswith(found[part]["working_dir"])
        assert "FEDKD_USER=" in (part / "README.md").read_text() and "${FEDKD_USER:?" in found[part]["user"]


def test_of_containers_the_superlinks_fleet_port_alone_can_be_reached_and_a_peers_code_not_be_written(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    port, peers = deployment.fleet_port, [compose(deployment.peer(name)) for name in deployment.names]

    assert compose(deployment.superlink)["ports"] == [f"{port}:{port}"]
    assert not any("ports" in peer for peer in peers)
    for peer in peers:
        (code,) = (volume for volume in peer["volumes"] if isinstance(volume, dict))
        assert code["target"] == "/site/home/apps" and code["read_only"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("party", ["superlink", "peers/peer-1"])
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path, party):
    deployment = new_deployment(tmp_path / "d")
    (unit,) = (deployment.folder / party).glob("*.service")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("flower-superlink", "flower-supernode"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    installed = tmp_path / unit.name
    installed.write_text(unit.read_text().replace("/opt/fedkd/bin/flower", f"{programs}/flower"))

    said = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True, check=False)

    assert said.returncode == 0
    assert [line for line in (said.stdout + said.stderr).splitlines() if unit.name in line] == []
