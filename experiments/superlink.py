"""The processes behind a launch: a SuperLink of its own, and Flower's command line."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from experiments import flower_shell
from fedkd.errors import FedkdError

_START_TIMEOUT = 180.0
_GRACE = 3.0


class LaunchError(FedkdError):
    """Flower could not be started, or refused the run."""


def process_environment(base: Mapping[str, str], home: Path, *, ray_address: str | None) -> dict[str, str]:
    """Return the environment of every process of a launch.

    Args:
        base: the environment to start from.
        home: the launch's `FLWR_HOME`.
        ray_address: a running Ray cluster, or None for a Ray of its own.
    """
    own = {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # seconds; a fifth of that keeps an eighth of a core busy
        "RAY_USAGE_STATS_ENABLED": "0",
        # "local" keeps Ray from joining a cluster that happens to run on this machine.
        "RAY_ADDRESS": ray_address or "local",
        # Flower starts its parts by name: they must come from the environment that this process runs in.
        "PATH": os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), base.get("PATH")])),
        "NO_PROXY": ",".join(filter(None, ["127.0.0.1,localhost", base.get("NO_PROXY", base.get("no_proxy"))])),
    }
    if base.get("PYTHONPATH"):  # a relative entry means the user's folder, not the SuperLink's
        entries = filter(None, base["PYTHONPATH"].split(os.pathsep))
        own["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in entries)
    # A dozen processes import the same modules, which takes twice as long without stored bytecode.
    return {key: value for key, value in base.items() if key != "PYTHONDONTWRITEBYTECODE"} | own


class SuperLink:
    """A SuperLink in simulation mode on a port of its own, with its state in memory.

    Args:
        home: the launch's `FLWR_HOME`; gets a config.toml that makes this SuperLink the default.
        environment: of the SuperLink and all it starts.
        hurry: asked while its processes are given time to end; True ends them at once.
    """

    def __init__(self, home: Path, environment: Mapping[str, str], *, hurry: Callable[[], bool]) -> None:
        self.grace = _GRACE
        self._hurry, self._environment = hurry, environment
        self._port, self._log, self._cwd = free_port(), home / "superlink.log", home / "empty"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    def __enter__(self) -> Self:
        command = [
            "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
            "--host", "127.0.0.1", "--port", str(self._port),
        ]  # fmt: skip
        self._cwd.mkdir()  # Ray puts it first on its actors' path: nothing in an empty folder can be taken for the app
        with self._log.open("w") as log:
            self._process = spawn(
                command, self._environment, self._cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(self, *exception: object) -> None:
        take_down(self._process.pid, grace=self.grace, hurry=self._hurry)
        self._process.wait()

    def wait_until_ready(self) -> None:
        """Return as soon as the SuperLink answers.

        Raises:
            LaunchError: it ended, or took longer than three minutes, as on a machine with much else to do.
        """
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._healthy():
                return
            time.sleep(0.03)
        last = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
        raise LaunchError(f"Flower's SuperLink did not start. Its log ends with:\n{last}")

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1.0)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        return False


class FlowerCommand:
    """The `flwr` command, served by one process of `experiments.flower_shell`."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self._home, self._environment = home, environment

    def __enter__(self) -> Self:
        # -P: the script's folder is no place to import from.
        command = [sys.executable, "-P", "-u", str(Path(flower_shell.__file__).resolve())]
        self._process = spawn(
            command, self._environment, self._home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def lines(self, *arguments: str) -> Iterator[str]:
        """Yield the lines that a command prints, as it prints them.

        Raises:
            LaunchError: the command failed.
        """
        commands, answers = self._process.stdin, self._process.stdout
        assert commands is not None and answers is not None, "opened as pipes"
        commands.write(json.dumps(arguments) + "\n")
        commands.flush()
        last = ""
        for line in answers:
            text, end, status = line.rstrip("\n").partition(flower_shell.END)
            last = text.strip() or last
            if end and int(status):
                raise LaunchError(f"`flwr {arguments[0]}` failed: {last}")
            if text or not end:
                yield text
            if end:
                return
        raise LaunchError(f"`flwr {arguments[0]}` ended early: {last}")

    def json(self, *arguments: str) -> dict[str, Any]:
        """Return what a command answers with ``--format json``.

        Raises:
            LaunchError: the command failed, or answered something else.
        """
        text = "\n".join(self.lines(*arguments, "--format", "json"))
        try:
            answer: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
        except ValueError:
            raise LaunchError(f"`flwr {arguments[0]}` failed: {text.strip()}") from None
        return answer


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(command: list[str], environment: Mapping[str, str], cwd: Path, **pipes: Any) -> "subprocess.Popen[str]":
    """Start a process in a session of its own, so that Ctrl-C reaches this process alone."""
    try:
        return subprocess.Popen(
            command, env=environment, cwd=cwd, start_new_session=True, text=True, encoding="utf-8", errors="replace",
            **pipes,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LaunchError(f"{command[0]} is not installed beside {sys.executable}.") from error


def take_down(pid: int, *, grace: float, hurry: Callable[[], bool]) -> None:
    """End a process and all below it: SIGTERM, and after `grace` seconds SIGKILL.

    Flower and Ray start their parts in sessions of their own, so a process group does not reach them; the tree is
    recorded before the first signal, because a process whose parent has ended cannot be found by it any more.
    """
    try:
        root = psutil.Process(pid)
        alive = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    _signal(alive, psutil.Process.terminate if grace else psutil.Process.kill)
    _wait(alive, grace, hurry)
    _signal(alive, psutil.Process.kill)
    _wait(alive, _GRACE, lambda: False)


def _wait(processes: list[psutil.Process], seconds: float, hurry: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_lives, processes)) and time.monotonic() < deadline and not hurry():
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # in a container its reaping may take seconds
    except psutil.NoSuchProcess:
        return False


def _signal(processes: list[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            send(process)
