"""`fedkd deploy up`, `down` and `status`: a whole federation on one machine, every party a process of its own."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from experiments.deploy.layout import CONNECTION, Deployment
from experiments.processes import below, end
from experiments.superlink import FlowerCommand, LaunchError, process_environment, spawn
from fedkd.errors import FedkdError

_READY_SECONDS, _CONNECT_SECONDS = 180.0, 240.0
_GRACE = 5.0


@dataclass(frozen=True)
class Started:
    """A process of a trial; its start time tells it from a later process with the same number."""

    name: str
    pid: int
    started: float

    def lives(self) -> bool:
        """Tell whether it still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def up(deployment: Deployment, *, out: Callable[[str], None] = print) -> None:
    """Start the SuperLink and all SuperNodes, and wait until they are connected.

    Raises:
        FedkdError: it is up already.
        LaunchError: a party does not start or does not connect in time; all that were started are ended.
    """
    if any(process.lives() for process in processes(deployment)):
        raise FedkdError(f"{deployment.folder} is up already: `fedkd deploy down {deployment.folder}` first.")
    deployment.trial.mkdir(mode=0o700, exist_ok=True)
    try:
        start_superlink(deployment)
        out(f"SuperLink listens on 127.0.0.1:{deployment.fleet_port}")
        with flower(deployment) as flwr:
            register(deployment, flwr)
            for name in deployment.names:
                start_supernode(deployment, name)
            wait_until_connected(deployment, flwr, deployment.peers)
    except BaseException:
        down(deployment)
        raise
    out(f"{deployment.peers} peers are connected")


def down(deployment: Deployment) -> list[str]:
    """End the processes that :func:`up` started, and no others; return their names."""
    ended = []
    for process in reversed(processes(deployment)):
        if process.lives():
            end(partial(below, process.pid), grace=_GRACE)
            ended.append(process.name)
    (deployment.trial / "processes.json").unlink(missing_ok=True)
    return ended


def processes(deployment: Deployment) -> list[Started]:
    """Return the processes that were started for a trial, dead or alive; the last of each name."""
    try:
        found = json.loads((deployment.trial / "processes.json").read_text())
    except FileNotFoundError:
        return []
    return [Started(**entry) for entry in found]


def status(deployment: Deployment) -> list[str]:
    """Return a line per party: whether its process runs, and what the SuperLink knows of it."""
    lines = [f"{p.name}: {'running' if p.lives() else 'ended'} (process {p.pid})" for p in processes(deployment)]
    if not lines:
        return ["not up"]
    if processes(deployment)[0].lives():
        with flower(deployment) as flwr:
            nodes = supernodes(flwr)
        lines.append(f"SuperLink: {sum(s == 'online' for s in nodes)} of {len(nodes)} registered peers are online")
    return lines


def start_superlink(deployment: Deployment) -> Started:
    """Start the SuperLink of a trial and wait until it listens."""
    command = deployment.superlink_command(bind="127.0.0.1")
    process = start(deployment, "superlink", command, deployment.superlink)
    deadline = time.monotonic() + _READY_SECONDS
    while not all(map(_listens, (deployment.control_port, deployment.fleet_port))):
        if not process.lives() or time.monotonic() > deadline:
            raise LaunchError(f"The SuperLink did not start. Its log ends with:\n{_tail(deployment, 'superlink')}")
        time.sleep(0.05)
    return process


def start_supernode(deployment: Deployment, name: str) -> Started:
    """Start one SuperNode of a trial."""
    port = deployment.node_port + deployment.names.index(name)
    command = deployment.supernode_command(name, host="127.0.0.1", port=port)
    return start(deployment, name, command, deployment.peer(name))


def start(deployment: Deployment, name: str, command: list[str], folder: Path) -> Started:
    """Start a party of a trial, with its log and its `FLWR_HOME`, and record its process number."""
    home = folder / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    deployment.trial.mkdir(mode=0o700, exist_ok=True)
    with (deployment.trial / f"{name}.log").open("a") as log:
        process = spawn(
            command, process_environment(os.environ, home, ray_address=None), folder,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, umask=0o077,
        )  # fmt: skip
    started = Started(name, process.pid, psutil.Process(process.pid).create_time())
    others = [other for other in processes(deployment) if other.name != name]
    order = [started, *others] if name == "superlink" else [*others, started]
    content = [{"name": p.name, "pid": p.pid, "started": p.started} for p in order]
    partial = deployment.trial / "processes.partial"
    partial.write_text(json.dumps(content))
    partial.replace(deployment.trial / "processes.json")
    return started


@contextlib.contextmanager
def flower(deployment: Deployment) -> Iterator[FlowerCommand]:
    """Give Flower's command line, as the operator of this deployment."""
    environment = process_environment(os.environ, deployment.operator, ray_address=None)
    with FlowerCommand(deployment.operator, environment) as flwr:
        yield flwr


def register(deployment: Deployment, flwr: FlowerCommand) -> None:
    """Make the peers' keys known to the SuperLink, unless its database knows them already."""
    missing = deployment.peers - len(supernodes(flwr))
    for name in deployment.names if missing else []:
        answer = flwr.json("supernode", "register", str(deployment.peer(name) / "node.pub"), CONNECTION)
        if not answer.get("success"):
            raise LaunchError(f"Flower refused the key of {name}: {answer.get('error-message', answer)}")


def supernodes(flwr: FlowerCommand) -> list[str]:
    """Return the status of every registered SuperNode."""
    return [str(node["status"]) for node in flwr.json("supernode", "ls", CONNECTION).get("nodes", [])]


def wait_until_connected(deployment: Deployment, flwr: FlowerCommand, count: int) -> None:
    """Return once so many SuperNodes are online.

    Raises:
        LaunchError: one of them ended, or it takes too long.
    """
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        online = sum(status == "online" for status in supernodes(flwr))
        ended = [p.name for p in processes(deployment) if not p.lives()]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(_tail(deployment, name) for name in ended)
            raise LaunchError(f"{online} of {count} peers connected; ended: {', '.join(ended) or 'none'}\n{logs}")
        if online >= count:
            return
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tail(deployment: Deployment, name: str) -> str:
    return "\n".join((deployment.trial / f"{name}.log").read_text(errors="replace").splitlines()[-8:])
