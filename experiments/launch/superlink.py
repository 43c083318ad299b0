"""The processes behind a launch: a SuperLink of its own, and Flower's command line."""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from experiments.launch import flower_shell, processes
from experiments.launch.app_lines import said_at_the_end
from fedkd.errors import FedkdError

_START_TIMEOUT = 180.0
_GRACE = 3.0
_LAST_BYTES = 2**16
_SIMULATION = "flwr-simulation"
_LEFT_OUT = (
    "PYTHONDONTWRITEBYTECODE",  # a dozen processes import the same modules: twice as long without stored bytecode
    "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE",  # Flower would colour its JSON; Jupyter sets the first
)  # fmt: skip
"""What of the user's environment is not passed on."""


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
    return {key: value for key, value in base.items() if key not in _LEFT_OUT} | own


class SuperLink:
    """A SuperLink in simulation mode on a port of its own, with its state in memory.

    Should this process be killed, a guard ends the SuperLink and all that belongs to it, and removes its home.

    Args:
        home: the launch's `FLWR_HOME`; gets a config.toml that makes this SuperLink the default.
        environment: of the SuperLink and all it starts.
        hurry: asked while its processes are given time to end; True ends them at once.
    """

    def __init__(self, home: Path, environment: Mapping[str, str], *, hurry: Callable[[], bool]) -> None:
        self.grace = _GRACE
        self._hurry, self._environment = hurry, environment
        self._home, self._port, self._cwd = home, free_port(), home / "empty"
        self._log, self._words = home / "superlink.log", home / "simulation.log"
        self._simulation: psutil.Process | None = None
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    def __enter__(self) -> Self:
        command = [
            "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
            "--host", "127.0.0.1", "--port", str(self._port),
        ]  # fmt: skip
        self._cwd.mkdir()  # Ray puts it first on its actors' path: nothing in an empty folder can be taken for the app
        environment = {**self._environment, "PATH": f"{self._listening()}{os.pathsep}{self._environment['PATH']}"}
        with self._log.open("w") as log:
            self._process = spawn(
                command, environment, self._cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        # Its environment is not the launch's: by that it would be taken for one of those that it is to end.
        guard = [sys.executable, "-P", str(Path(processes.__file__).resolve()), str(self._home)]
        self._guard = spawn(
            guard, os.environ, Path("/"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return self

    def __exit__(self, *exception: object) -> None:
        processes.end(self._family, grace=self.grace, hurry=self._hurry)
        self._process.wait()
        self._guard.kill()
        self._guard.communicate()

    def _family(self) -> set[psutil.Process]:
        return {*processes.at_home(self._home), *processes.below(self._process.pid)}

    def _listening(self) -> Path:
        """Return a folder whose `flwr-simulation` leaves a file of what the real one writes to standard error.

        Flower passes on what goes through Python's `sys.stderr` and throws the rest away: the last words of a process
        that Ray aborts.
        """
        folder = self._home / "bin"
        folder.mkdir()
        if real := shutil.which(_SIMULATION, path=self._environment["PATH"]):
            command = folder / _SIMULATION
            command.write_text(f'#!/bin/sh\nexec {shlex.quote(real)} "$@" 2>>{shlex.quote(str(self._words))}\n')
            command.chmod(0o700)
        return folder

    def simulation_has_gone(self) -> bool:
        """Tell whether the run's own process was seen before and has ended since."""
        if self._simulation is None:
            family = processes.below(self._process.pid)
            self._simulation = next((process for process in family if _named(process, _SIMULATION)), None)
        return self._simulation is not None and not processes.lives(self._simulation)

    def has_ended(self) -> bool:
        """Tell whether the SuperLink itself runs no more."""
        return self._process.poll() is not None

    def last_words(self) -> str:
        """Return what the processes of a run that broke off said at the end, without what they say in every run."""
        return "\n".join(filter(None, (said_at_the_end(_end_of(path)) for path in (self._words, self._log))))

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
    """The `flwr` command, served by one process of `experiments.launch.flower_shell`."""

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


def _end_of(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        return file.read().decode(errors="replace")


def _named(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return name in " ".join(process.cmdline()[:2])
    return False


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
