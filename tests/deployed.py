"""A real federation on the loopback interface that tests share, and runs on it that are followed in the background."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from cable import NEAR, Cable, cable
from federation import federate, local_grid
from processes import still_running
from tcp_link import TcpLink

from clients.worker import LOCK
from experiments.deploy import trial
from experiments.deploy.create import create
from experiments.deploy.layout import CONNECTION, Deployment
from experiments.deploy.run import run
from experiments.launch.superlink import free_port, process_environment
from fedkd.data.partition import partition
from fedkd.data.proxy import split_proxy
from fedkd.data.sources import load_source
from fedkd.errors import FedkdError
from fedkd.seeding import derive

ROOT = Path(__file__).parent.parent
SEED, PROXY_SIZE, MODELS = 3, 60, "mlp,cnn-small,resnet8"
SMALL = {
    "proxy-size": PROXY_SIZE, "pretrain-epochs": 1, "rounds": 2, "distill-epochs": 1, "controls": "", "seed": SEED,
}  # fmt: skip
SECONDS = 1500.0
"""How long to wait for what has to come, on a machine that does other things as well."""


def new_deployment(folder: Path) -> Deployment:
    deployment = Deployment(folder, ("127.0.0.1", NEAR), 3, free_port(), free_port(), free_port())
    create(deployment, demo=True)
    return deployment


def copy_app(folder: Path) -> Path:
    """Return a copy of the app: one that nobody edits between the pin and the runs."""
    for name in ("fedkd", "clients", "strategies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def deal_as_the_simulation_does(deployment: Deployment) -> None:
    """Give every peer the data that it has in a simulation of an iid partition of the digits."""
    source = load_source("digits", data_dir=deployment.folder)
    train, test = source.train, source.test
    proxy, pool = split_proxy(train, PROXY_SIZE, seed=derive(SEED, "proxy"))
    parts = partition(train.labels.numpy()[pool], deployment.peers, "iid", seed=derive(SEED, "partition"))
    # A peer draws its proxy samples from its copy in an order of the seed's: dealt so that they come as here.
    order = np.argsort(np.random.default_rng(derive(derive(SEED, "proxy"), "proxy")).permutation(PROXY_SIZE))
    common = {"x_test": _pixels(test.inputs), "y_test": test.labels.numpy(), "classes": np.array(source.classes)}
    for name, part in zip(deployment.names, parts, strict=True):
        mine, folder = pool[part], deployment.peer(name)
        np.savez(folder / "data.npz", x_train=_pixels(train.inputs[mine]), y_train=train.labels[mine].numpy(), **common)
        unlabelled = np.zeros(PROXY_SIZE, np.int64)
        np.savez(folder / "proxy.npz", x_train=_pixels(proxy.inputs[order]), y_train=unlabelled, **common)


def _pixels(inputs) -> np.ndarray:
    return inputs.permute(0, 2, 3, 1).numpy()


class Federated:
    """A deployment whose parties run: peer-0 behind a line that can be cut, peer-2 on code that its owner pinned.

    The line is a cable into a network namespace where this machine allows that, and else a TCP connection.
    """

    def __init__(self, deployment: Deployment, app: Path, link: TcpLink, wire: Cable | None) -> None:
        self.deployment, self.app, self._link, self._wire = deployment, app, link, wire
        self.line: Cable | TcpLink = wire or link
        self.start_seconds = 0.0  # what a start took: a measure of how busy this machine is

    def start_supernode(self, name: str) -> None:
        """Start a peer as its supervisor would."""
        deployment = self.deployment
        command = deployment.supernode_command(name, port=free_port())
        if name == "peer-0":
            command[command.index("--superlink") + 1] = f"{self._link.host}:{self._link.port}"
            command = self._wire.inside(command) if self._wire else command
        if name == "peer-2":
            command = self._protected(command)
        trial.start(deployment, name, command, deployment.peer(name))

    def pin(self, scratch: Path) -> None:
        """Install the code at peer-2."""
        home = self.deployment.peer("peer-2") / "home"
        home.mkdir(mode=0o700)
        environment = process_environment(os.environ, home, ray_address=None)
        for command in (lambda: ["build", "--app", self.app], lambda: ["install", next(scratch.glob("*.fab"))]):
            subprocess.run(["flwr", *command()], env=environment, cwd=scratch, check=True, capture_output=True)

    def _protected(self, command: list[str]) -> list[str]:
        """Let it write nothing where its code lies."""
        apps = self.deployment.peer("peer-2") / "home" / "apps"
        if os.geteuid() != 0:
            apps.chmod(0o500)
            return command
        mount = f'mount --bind {apps} {apps} && mount -o remount,bind,ro {apps} && exec "$@"'  # root: no mode stops it
        return ["unshare", "--mount", "sh", "-c", mount, "sh", *command]

    def process(self, name: str) -> trial.Started:
        (found,) = (p for p in trial.processes(self.deployment) if p.name == name)
        return found

    def worker(self, name: str) -> psutil.Process:
        """Return a peer's resident process."""
        return psutil.Process(int((self.state(name) / LOCK).read_text()))

    def state(self, name: str) -> Path:
        return self.deployment.peer(name) / "state" / name

    def wait_until_connected(self) -> None:
        with trial.flower(self.deployment) as flwr:
            trial.wait_until_connected(self.deployment, flwr, self.deployment.peers)

    def run(self, folder: Path, **settings) -> "Run":
        return Run(self, folder, **settings)

    def simulated(self, path: Path, **settings):
        """Run the same peers in this process."""
        peers = enumerate(self.deployment.names)
        own = {i: {"peer-config": str(self.deployment.peer(n) / "peer.toml"), "worker": False} for i, n in peers}
        grid = local_grid(path, self.deployment.peers, node_config=own)
        small = {key.replace("-", "_"): value for key, value in SMALL.items()}
        return federate(path, grid=grid, **{**small, **settings})


def share_federation(new_folder: Callable[[str], Path]) -> Iterator[Federated]:
    """Yield a federation that is up; afterwards see that all of it has ended."""
    deployment = new_deployment(new_folder("deploy") / "d")
    deal_as_the_simulation_does(deployment)
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(cable())
        # The SuperLink of a trial listens on the loopback interface alone: the link takes in what the cable brings.
        link = stack.enter_context(TcpLink((NEAR if wire else "127.0.0.1", 0), ("127.0.0.1", deployment.fleet_port)))
        federated = Federated(deployment, copy_app(new_folder("app")), link, wire)
        federated.pin(new_folder("bundle"))
        began = time.monotonic()
        try:
            trial.start_superlink(deployment)
            with trial.flower(deployment) as flwr:
                trial.register(deployment, flwr)
                for name in deployment.names:
                    federated.start_supernode(name)
                trial.wait_until_connected(deployment, flwr, deployment.peers)
            federated.start_seconds = time.monotonic() - began
            yield federated
        finally:
            pids = [int(lock.read_text()) for lock in deployment.folder.rglob(LOCK)]
            trial.down(deployment)
    assert still_running(pids, seconds=30) == []  # the workers ended with their SuperNodes


class Run(threading.Thread):
    """A run on a deployment, followed in the background."""

    def __init__(self, federated: Federated, folder: Path, **settings) -> None:
        super().__init__(daemon=True)
        self.federated, self.folder, self.said, self.reason = federated, folder, [], None
        changed = {name.replace("_", "-"): value for name, value in settings.items()}
        self._settings = {**SMALL, "out-dir": str(folder), **changed}
        self._news = threading.Condition()
        self.start()

    def run(self) -> None:
        try:
            self.reason = run(self.federated.deployment, self.federated.app, self._settings, out=self._hear)
        except FedkdError as error:
            self.reason = str(error)
        self._hear("")

    def end(self) -> str:
        """Return why it did not complete."""
        self.join(SECONDS)
        assert not self.is_alive(), self.said
        return self.reason

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: any(text in line for line in self.said))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for what a line of the run's brings about."""
        with self._news:
            assert self._news.wait_for(lambda: self.reason is not None or condition(), timeout=SECONDS), self.said
        assert condition(), (self.reason, self.said)

    def stop(self) -> None:
        deployment = self.federated.deployment
        with trial.flower(deployment) as flwr:
            (entry,) = (r for r in flwr.json("ls", CONNECTION)["runs"] if not r["status"].startswith("finished"))
            flwr.json("stop", str(entry["run-id"]), CONNECTION)
        assert "stopped" in self.end()

    def rows(self) -> list[dict]:
        path = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def row(self, name: str, status: str, *, since: int = 0) -> dict | None:
        """Return a peer's first row of a status from a round on."""
        return next(
            (r for r in self.rows() if (r["peer"], r["status"]) == (name, status) and r["round"] >= since), None
        )

    def closed(self) -> int:
        """Return the last round that has closed."""
        return max((row["round"] for row in self.rows()), default=-1)

    def _hear(self, line: str) -> None:
        with self._news:
            self.said.append(line)
            self._news.notify_all()


def learned(rows: list[dict]) -> list[tuple]:
    """Return what peers measured, by round and name."""
    return sorted((r["round"], r["peer"], r["test_accuracy"], r["own_accuracy"], str(r["kd_loss"])) for r in rows)
