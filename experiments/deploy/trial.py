"""`fedkd deploy up`, `down` and `status`: a whole federation on one machine, every party a process of its own."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from experiments.deploy.layout import CONNECTION, Deployment
from experiments.launch.processes import below, end
from experiments.launch.superlink import FlowerCommand, LaunchError, process_environment, spawn
from fedkd.errors import FedkdError

_READY_SECONDS, _CONNECT_SECONDS = 180.0, 240.0
_GRACE = 5.0
_KNOWN = "Public key already in use"


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
        FedkdError: it is up already, or the peers are elsewhere.
        LaunchError: a party does not start or does not connect in time; all that were started are ended.
    """
    if deployment.alone:
        raise FedkdError(f"{deployment.folder} is the SuperLink's part: `up` starts all parties, on one machine.")
    if any(process.lives() for process in processes(deployment)):
        command = shlex.join(["fedkd", "deploy", "down", str(deployment.folder)])
        raise FedkdError(f"{deployment.folder} is up already: `{command}` first.")
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
    started = processes(deployment)
    lines = [f"{p.name}: {'running' if p.lives() else 'ended'} (process {p.pid})" for p in started]
    if not deployment.alone and not started:
        return ["not up"]
    if deployment.alone or started[0].lives():
        with flower(deployment) as flwr:
            answer = flwr.json("supernode", "ls", CONNECTION)
        nodes = [node["status"] for node in answer.get("nodes", [])]
        known = f"{nodes.count('online')} of {len(nodes)} registered peers are online"
        lines.append(f"SuperLink: {known if 'nodes' in answer else 'no answer: ' + _problem(answer)}")
    return lines


def require_up(deployment: Deployment) -> None:
    """Refuse to go on where nothing listens at the SuperLink's control port.

    Raises:
        FedkdError: says how to start it.
    """
    if _listens(deployment.control_port):
        return
    command = shlex.join(["fedkd", "deploy", "up", str(deployment.folder)])
    how = f"{deployment.folder / 'README.md'} has its command" if deployment.alone else f"`{command}`"
    raise FedkdError(f"not up, nothing listens on 127.0.0.1:{deployment.control_port}: {how}")


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
    home, config = deployment.operator, deployment.flower_config()
    home.mkdir(mode=0o700, exist_ok=True)
    path = home / "config.toml"
    if not path.exists() or path.read_text(encoding="utf-8") != config:  # the folder may have moved
        path.write_text(config, encoding="utf-8")
    with FlowerCommand(home, process_environment(os.environ, home, ray_address=None)) as flwr:
        yield flwr


def register(deployment: Deployment, flwr: FlowerCommand) -> list[str]:
    """Make the peers' keys known to the SuperLink; return the names of those that it did not know.

    Raises:
        LaunchError: it is not there, or refused a key for another reason than that it knows it.
    """
    new = []
    for name in deployment.names:
        answer = flwr.json("supernode", "register", str(deployment.public_key(name)), CONNECTION)
        if answer.get("success"):
            new.append(name)
        elif _KNOWN not in str(answer):
            raise LaunchError(f"Flower refused the key of {name}: {_problem(answer)}")
    return new


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


def _problem(answer: Mapping[str, Any]) -> str:
    lines = str(answer.get("error-message", answer)).strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tail(deployment: Deployment, name: str) -> str:
    return "\n".join((deployment.trial / f"{name}.log").read_text(errors="replace").splitlines()[-8:])
