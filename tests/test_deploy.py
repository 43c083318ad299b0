"""A real federation on the loopback interface: SuperLink and SuperNodes over gRPC, with TLS and node keys."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from federation import federate, local_grid
from sites import make_sites
from tcp_link import TcpLink
from typer.testing import CliRunner

from clients.worker import LOCK
from experiments.cli import app as cli
from experiments.deploy import trial
from experiments.deploy.create import create
from experiments.deploy.keys import Authority, node_key, write_secret
from experiments.deploy.layout import CONNECTION, Deployment
from experiments.deploy.run import run
from experiments.superlink import free_port, process_environment, take_down
from fedkd.errors import FedkdError, SettingError
from strategies.roster import RosterError

ROOT = Path(__file__).parent.parent
SMALL = {"proxy-size": 60, "pretrain-epochs": 1, "rounds": 2, "distill-epochs": 1, "controls": "", "seed": 3}


def new_deployment(folder: Path) -> Deployment:
    deployment = Deployment(folder, ("127.0.0.1",), 3, free_port(), free_port(), free_port())
    create(deployment, demo=True)
    return deployment


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Path:
    """Return a copy of the app: one that nobody edits between the pin and the runs."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("fedkd", "clients", "strategies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory, app):
    """Yield a federation that is up; peer-2 runs the code that its owner installed."""
    deployment = new_deployment(tmp_path_factory.mktemp("deploy") / "d")
    trial.up(deployment)
    pin(deployment, "peer-2", app, tmp_path_factory.mktemp("bundle"))
    with trial.flower(deployment) as flwr:
        trial.wait_until_connected(deployment, flwr, 3)
    yield deployment
    pids = [int(lock.read_text()) for lock in deployment.folder.rglob(LOCK)]
    trial.down(deployment)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert [process.pid for process in alive] == []  # the workers ended with their SuperNodes


class Run(threading.Thread):
    """A run on a deployment, followed in the background."""

    def __init__(self, deployment: Deployment, app: Path, folder: Path, **settings) -> None:
        super().__init__(daemon=True)
        self.deployment, self.folder, self.said, self.reason = deployment, folder, [], None
        changed = {name.replace("_", "-"): value for name, value in settings.items()}
        self._arguments = (deployment, app, {**SMALL, "out-dir": str(folder), **changed})
        self._news = threading.Condition()
        self.start()

    def run(self) -> None:
        try:
            self.reason = run(*self._arguments, out=self._hear)
        except FedkdError as error:
            self.reason = str(error)
        self._hear("")

    def wait_for(self, text: str, *, seconds: float = 120) -> None:
        self.wait_until(lambda: any(text in line for line in self.said), seconds=seconds)

    def end(self, *, seconds: float = 120) -> str:
        self.join(seconds)
        assert not self.is_alive(), self.said
        return self.reason

    def wait_until(self, condition: Callable[[], object], *, seconds: float = 120) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self.reason is not None or condition(), timeout=seconds), self.said
        assert condition(), (self.reason, self.said)

    def stop(self) -> None:
        with trial.flower(self.deployment) as flwr:
            (entry,) = (r for r in flwr.json("ls", CONNECTION)["runs"] if not r["status"].startswith("finished"))
            flwr.json("stop", str(entry["run-id"]), CONNECTION)
        assert "stopped" in self.end()

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "rounds.jsonl").read_text().splitlines()]

    def _hear(self, line: str) -> None:
        with self._news:
            self.said.append(line)
            self._news.notify_all()


def simulated(deployment: Deployment, path: Path, **settings) -> list[dict]:
    """Run the same peers in this process."""
    peers = enumerate(deployment.names)
    own = {i: {"peer-config": str(deployment.peer(name) / "peer.toml"), "worker": False} for i, name in peers}
    grid = local_grid(path, deployment.peers, node_config=own)
    return federate(
        path, grid=grid, **{**{key.replace("-", "_"): value for key, value in SMALL.items()}, **settings}
    ).rows()


def learned(rows: list[dict]) -> list[tuple]:
    """Return what peers measured, by round and name."""
    return sorted((r["round"], r["peer"], r["test_accuracy"], r["own_accuracy"], str(r["kd_loss"])) for r in rows)


@pytest.mark.flower
def test_a_real_run_learns_what_the_simulation_learns(federation, app, tmp_path):
    settings = {"strategy": "gossip", "sealed": True, "codec": "fp16"}

    real = Run(federation, app, tmp_path / "real", **settings)

    assert real.end() == ""
    assert {row["model"] for row in real.rows()} == {"mlp", "cnn-small", "resnet8"}
    assert [row["error"] for row in real.rows() if row["error"]] == []
    assert any("peer-1: cnn-small, 13,706 parameters" in line for line in real.said)
    assert learned(real.rows()) == learned(simulated(federation, tmp_path / "sim", **settings))
    secrets = [
        path
        for pattern in ("*.key", "peer.toml", "key.json", "*.safetensors", "worker.sock", "worker.lock", "worker.log")
        for path in federation.folder.rglob(pattern)
    ]
    assert {"node.key", "server.key", "key.json", "round-000002.safetensors"} <= {path.name for path in secrets}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in secrets} == {0o700}


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


def pin(deployment: Deployment, name: str, app: Path, scratch: Path) -> None:
    """Restart a SuperNode on the code that its owner installed, in a folder that it cannot write."""
    folder = deployment.peer(name)
    apps = folder / "home" / "apps"
    take_down(process(deployment, name).pid, grace=5.0, hurry=lambda: False)
    shutil.rmtree(apps, ignore_errors=True)
    environment = process_environment(os.environ, folder / "home", ray_address=None)
    subprocess.run(["flwr", "build", "--app", app], env=environment, cwd=scratch, check=True, capture_output=True)
    (bundle,) = scratch.glob("*.fab")
    subprocess.run(["flwr", "install", bundle], env=environment, cwd=scratch, check=True, capture_output=True)
    command = deployment.supernode_command(name, port=free_port())
    if os.geteuid() == 0:  # whom no mode stops
        mount = f'mount --bind {apps} {apps} && mount -o remount,bind,ro {apps} && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
    else:
        apps.chmod(0o500)
    trial.start(deployment, name, command, folder)


@pytest.mark.flower
def test_a_peer_whose_code_is_pinned_runs_no_other(federation, tmp_path):
    """The code of a run comes from the SuperLink; a peer that installed its own runs that or nothing."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "pyproject.toml").write_text(_OTHER_PROJECT)
    (other / "other.py").write_text(_OTHER_APP)
    with trial.flower(federation) as flwr:
        submitted = flwr.json("run", str(other), CONNECTION)
        list(flwr.lines("log", str(submitted["run-id"]), CONNECTION, "--stream"))

    owned = [name for name in federation.names if (federation.peer(name) / "owned").exists()]

    assert owned == ["peer-0", "peer-1"]


@pytest.mark.flower
def test_a_run_that_fails_says_why(federation, app, tmp_path):
    reason = Run(federation, app, tmp_path / "run", strategy="fedavg").end()
    assert "`strategy`" in reason
    assert "`allowed-strategies`" in reason


def process(deployment: Deployment, name: str) -> trial.Started:
    (found,) = (p for p in trial.processes(deployment) if p.name == name)
    return found


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
            timeout=60, check=False,
        ).returncode  # fmt: skip
    return status, log.read_text()


@pytest.mark.flower
def test_a_supernode_with_an_unknown_key_is_refused(federation, tmp_path):
    write_secret(tmp_path / "node.key", node_key()[0])
    status, said = supernode(federation, tmp_path, "--auth-supernode-private-key", str(tmp_path / "node.key"))
    assert status != 0
    assert "Failed to activate SuperNode" in said


@pytest.mark.flower
def test_a_superlink_whose_certificate_names_another_host_is_refused(federation, tmp_path):
    with TcpLink(("127.0.0.2", 0), ("127.0.0.1", federation.fleet_port)) as link:
        status, said = supernode(federation, tmp_path, "--superlink", f"127.0.0.2:{link.port}")
    assert status != 0
    assert "Hostname Verification Check failed" in said, said


@pytest.mark.flower
def test_a_superlink_of_another_authority_is_refused(federation, tmp_path):
    from cryptography.hazmat.primitives.serialization import Encoding

    write_secret(tmp_path / "other.crt", Authority.new().certificate.public_bytes(Encoding.PEM))
    status, said = supernode(federation, tmp_path, "--root-certificates", str(tmp_path / "other.crt"))
    assert status != 0
    assert "CERTIFICATE_VERIFY_FAILED" in said, said


@pytest.mark.flower
def test_plaintext_to_the_superlink_is_refused(federation, tmp_path):
    """A channel without TLS gets no answer."""
    import grpc

    address = f"127.0.0.1:{federation.fleet_port}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/flwr.proto.Fleet/ActivateNode")(b"", timeout=10)
    assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_peer_with_another_proxy_set_is_refused_by_name(tmp_path):
    own = make_sites(tmp_path / "sites")
    other = make_sites(tmp_path / "others", proxy_size=61)
    own[1]["proxy"] = other[1]["proxy"]
    node_config = {i: {**site, "simulated": False, "worker": False} for i, site in enumerate(own)}
    grid = local_grid(tmp_path, 3, node_config=node_config)
    with pytest.raises(RosterError, match=r"site-1's proxy set [0-9a-f]+ differ from the others' [0-9a-f]+$"):
        federate(tmp_path, grid=grid)


def test_init_makes_what_the_readme_then_runs(tmp_path):
    folder = tmp_path / "d"

    said = CliRunner().invoke(cli, ["deploy", "init", str(folder), "--peers", "2", "--host", "fed.example.org"])

    assert said.exit_code == 0, said.output
    deployment = Deployment.read(folder)
    assert deployment.hosts == ("fed.example.org",)
    readme = (folder / "README.md").read_text()
    for command in (deployment.superlink_command(), deployment.supernode_command("peer-1")):
        assert shlex.join(command) in " ".join(readme.replace("\\\n", " ").split())
    assert "--superlink fed.example.org:9092" in readme
    keys = {(folder / "peers" / name / "node.pub").read_text() for name in deployment.names}
    assert len(keys) == 2
    assert all(key.startswith("ecdsa-sha2-nistp384 ") for key in keys)
    own = tomllib.loads((folder / "peers" / "peer-1" / "peer.toml").read_text())
    assert (own["name"], own["partition-id"], own["num-partitions"]) == ("peer-1", 1, 2)


def test_the_certificate_is_the_authoritys_and_names_its_hosts(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(deployment.authority)]
    server = str(deployment.superlink / "server.pem")
    assert subprocess.run([*verify, "-verify_ip", "127.0.0.1", server], check=False).returncode == 0
    assert subprocess.run([*verify, "-verify_hostname", "localhost", server], check=False).returncode == 0
    assert subprocess.run([*verify, "-verify_ip", "10.0.0.1", server], check=False).returncode != 0
    assert subprocess.run([*verify, "-verify_hostname", "example.org", server], check=False).returncode != 0


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    deployment = Deployment(tmp_path, ("127.0.0.1",), 1, 9092, 9093, 9400)
    with pytest.raises(SettingError, match="`DIR` to be a new or empty folder"):
        create(deployment, demo=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


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


def test_unit_and_compose_files_are_well_formed(tmp_path):
    import yaml

    deployment = new_deployment(tmp_path / "d")
    services = yaml.safe_load((deployment.folder / "compose.yaml").read_text())["services"]
    assert sorted(services) == ["peer-0", "peer-1", "peer-2", "superlink"]
    assert services["peer-0"]["command"] == deployment.supernode_command("peer-0", host="superlink")
    for unit in deployment.folder.rglob("*.service"):
        text = unit.read_text()
        assert "{" not in text and "\nExecStart=/opt/fedkd/bin/flower-super" in text


@pytest.mark.flower
def test_a_killed_supernode_costs_a_round_its_timeout_and_comes_back(federation, app, tmp_path):
    run = Run(federation, app, tmp_path / "run", rounds=40, round_timeout=15.0, strategy="gossip")
    state = federation.peer("peer-1") / "state" / "peer-1"
    run.wait_for("round   1/40")
    psutil.Process(process(federation, "peer-1").pid).kill()
    killed = time.monotonic()
    run.wait_for("round   3/40")
    assert time.monotonic() - killed < 15 + 20  # one timeout, and two rounds of the others
    assert (state / "round-000001.safetensors").exists()

    def back() -> bool:
        if not process(federation, "peer-1").lives():  # as its supervisor would
            trial.start_supernode(federation, "peer-1")
        return any(r["peer"] == "peer-1" and r["round"] > 3 and r["status"] == "ok" for r in run.rows())

    run.wait_until(back)
    run.stop()


@pytest.mark.flower
def test_a_killed_superlink_fails_the_run_which_resumes_where_it_stopped(federation, app, tmp_path):
    """A run that was resumed ends with what an uninterrupted one learns."""
    settings = {"strategy": "averaged", "rounds": 3}
    interrupted = Run(federation, app, tmp_path / "run", **settings)
    interrupted.wait_for("round   1/3")
    psutil.Process(process(federation, "superlink").pid).kill()
    assert interrupted.end() != ""
    closed = {row["round"] for row in interrupted.rows()}

    trial.start_superlink(federation)
    with trial.flower(federation) as flwr:
        trial.wait_until_connected(federation, flwr, 3)
    resumed = Run(federation, app, tmp_path / "run", resume=str(tmp_path / "run"), **settings)

    assert resumed.end() == ""
    assert closed < {0, 1, 2, 3}
    assert any(f"resumed after round {max(closed)}" in line for line in resumed.said)
    assert learned(resumed.rows()) == learned(simulated(federation, tmp_path / "sim", **settings))
