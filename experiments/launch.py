"""Run a Flower app on a SuperLink of its own: start it, submit, follow the log, read the verdict, take it all down.

`flwr run` by itself reuses whatever SuperLink listens on its fixed port, with the environment and the working
directory that one was started with, leaves it running, and exits 0 when the run failed. Here every run has its own
port, its own `FLWR_HOME` and an empty working directory, none of its processes outlives it, and its status is
Flower's own verdict.
"""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from experiments import flower_shell
from experiments.quiet import QuietLog
from fedkd.errors import FedkdError, SettingError

Setting = str | int | float | bool

COMPLETED = "finished:completed"
STOPPED = "finished:stopped"
_START_TIMEOUT = 60.0
_STOP_GRACE = 3.0
_TAIL = 200
_FAILURE_PREFIXES = ("Simulation failed with exception: ", "ServerApp failed with exception: ")


class LaunchError(FedkdError):
    """Flower could not be started, or refused the run."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """How many peers a simulation has and what each may use of the machine.

    Args:
        peers: number of simulated SuperNodes.
        cpus_per_peer: CPUs a peer's actor takes (Ray counts whole ones).
        gpus_per_peer: GPUs, or the fraction of one, that a peer's actor takes; 0 hides the GPUs from it.
        actors: peers that work at once; None: as many as the machine's CPUs and GPUs hold.
        gpus: GPUs that Ray may use; None: all it finds.
        ray_address: ``host:port`` of a running Ray cluster; None: a Ray of its own on this machine.
    """

    peers: int
    cpus_per_peer: int = 1
    gpus_per_peer: float = 0.0
    actors: int | None = None
    gpus: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for key in ("peers", "cpus_per_peer", "actors"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise SettingError(_flag(key), value, "a whole number >= 1")
        for key in ("gpus_per_peer", "gpus"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < float("inf"):
                raise SettingError(_flag(key), value, "a number >= 0")
        if self.ray_address:
            for key in ("actors", "gpus"):
                if getattr(self, key) is not None:
                    raise SettingError(_flag(key), getattr(self, key), "left out with --ray-address: the cluster decides")

    def config(self) -> str:
        """Return the value of `flwr run --federation-config`.

        >>> Federation(peers=6, actors=2).config()
        'num-supernodes=6 client-resources-num-cpus=1 client-resources-num-gpus=0.0 init-args-num-cpus=2'
        """
        parts: dict[str, int | float | None] = {
            "num-supernodes": self.peers,
            "client-resources-num-cpus": self.cpus_per_peer,
            "client-resources-num-gpus": self.gpus_per_peer,
            "init-args-num-cpus": self.actors and self.actors * self.cpus_per_peer,
            "init-args-num-gpus": self.gpus,
        }
        return " ".join(f"{key}={value}" for key, value in parts.items() if value is not None)


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        run_id: Flower's number of the run.
        status: Flower's verdict; only ``finished:completed`` is a success.
        reason: why it failed, in the app's own words; empty after a success.
        phases: wall time in seconds of ``superlink``, ``submit``, ``start`` (until the app's first line), ``app`` (until
            its last), ``end`` (until Flower's verdict) and ``teardown``, in this order.
        tail: the log's last lines, as the user saw them.
        signal: the signal that stopped the run, if one did.
    """

    run_id: str
    status: str
    reason: str
    phases: Mapping[str, float]
    tail: tuple[str, ...]
    signal: int | None = None

    @property
    def completed(self) -> bool:
        """Tell whether the run did all it had to do."""
        return self.status == COMPLETED

    @property
    def exit_code(self) -> int:
        """Return the status a shell should see: 0, 1, or 128 + the signal that stopped the run."""
        return 128 + self.signal if self.signal else int(not self.completed)

    @property
    def seconds(self) -> float:
        """Return the wall time of the whole launch."""
        return sum(self.phases.values())

    @property
    def flower_seconds(self) -> float:
        """Return the part of it that went by before the app's first line and after its last."""
        return self.seconds - self.phases["app"]


def launch(
    app: Path,
    settings: Mapping[str, Setting],
    federation: Federation,
    *,
    out: Callable[[str], None] = print,
    verbose: bool = False,
    scratch: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a Flower app in simulation and wait for its end. Ctrl-C (or SIGTERM) stops it, a second one at once.

    Args:
        app: the folder with the app's pyproject.toml.
        settings: the run config's keys that differ from the app's defaults.
        federation: the peers and their resources.
        out: takes every line meant for the user.
        verbose: pass Flower's and Ray's own lines on as they come.
        scratch: folder for Flower's temporary files; every machine of a Ray cluster must see it. None: the system's.
        env: environment of all processes; None: this process's.

    Raises:
        LaunchError: the SuperLink did not start, or Flower refused the app or its settings.
    """
    out(f"$ {command_line(app, settings, federation)}")
    log = _Log(out, verbose)
    clock = _Clock()
    with _signals_interrupt() as received, _home(scratch) as home:
        environment = _environment(os.environ if env is None else env, home, federation)
        with _SuperLink(home, environment) as superlink, _Flwr(home, environment) as flwr:
            superlink.wait_until_ready()
            clock.lap("superlink")
            run_id = _submit(flwr, app, settings, federation)
            clock.lap("submit")
            try:
                for line in flwr.stream("log", run_id, "--stream"):
                    log.add(line)
                verdict = flwr.json("ls", "--run-id", run_id)["runs"][0]
                superlink.grace = 0.0  # the run is over and on record: nothing is left to be saved
            except KeyboardInterrupt:
                out("stopping the run (once more: at once) ...")
                flwr.interrupt()
                verdict = {"status": STOPPED, "status-details": f"stopped by {_name(received)}"}
            clock.lap("start", until=log.first)
            clock.lap("app", until=log.last)
            clock.lap("end")
    clock.lap("teardown")
    status, stopped = str(verdict["status"]), verdict["status"] == STOPPED
    reason = "" if status == COMPLETED else _reason(str(verdict["status-details"]), log.tail)
    signum = received[0] if stopped and received else None
    return Outcome(run_id, status, reason, clock.laps, tuple(log.tail), signum)


def command_line(app: Path, settings: Mapping[str, Setting], federation: Federation) -> str:
    """Return the command that does the same on Flower's shared local SuperLink, ready to paste into a shell.

    The launcher itself runs it with ``--format json`` in the place of ``--stream`` and streams the log by run id.
    """
    variables = ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"]
    if federation.ray_address:
        variables.append(f"RAY_ADDRESS={shlex.quote(federation.ray_address)}")
    arguments = ["flwr", "run", str(app), *_overrides(settings, federation), "--stream"]
    return " ".join([*variables, shlex.join(arguments)])


def run_config(settings: Mapping[str, Setting]) -> str:
    r"""Return settings as the value of `flwr run --run-config`.

    Flower finds the pairs with a pattern that knows no escaped quotes, then reads each value as TOML: a quote inside a
    text is therefore written as its code point.

    >>> print(run_config({"rounds": 3, "download": True, "run-name": 'a "b" c'}))
    rounds=3 download=true run-name="a \u0022b\u0022 c"
    """
    return " ".join(f"{key}={_toml(value)}" for key, value in settings.items())


def _toml(value: Setting) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    special = {'"': r"\u0022", "\\": r"\\"}
    return '"' + "".join(special.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in value) + '"'


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _overrides(settings: Mapping[str, Setting], federation: Federation) -> list[str]:
    run = ["--run-config", run_config(settings)] if settings else []
    return ["--federation-config", federation.config(), *run]


def _submit(flwr: "_Flwr", app: Path, settings: Mapping[str, Setting], federation: Federation) -> str:
    answer = flwr.json("run", str(app), *_overrides(settings, federation))
    if not answer.get("success"):
        raise LaunchError("Flower refused the run: " + str(answer.get("error-message", "")).strip())
    return str(answer["run-id"])


def _reason(details: str, tail: "deque[str]") -> str:
    for prefix in _FAILURE_PREFIXES:
        details = details.removeprefix(prefix)
    if details != "An error was encountered. Ending simulation.":
        return details.strip()
    # Flower wraps what breaks Ray or the ClientApp's import into this phrase; the cause stands in the log alone.
    causes = [line for line in tail if line.split(":")[0].endswith(("Error", "Exception")) and "Ending simu" not in line]
    return causes[0] if causes else details


# --- processes --------------------------------------------------------------------------------------------------------


def _environment(base: Mapping[str, str], home: Path, federation: Federation) -> dict[str, str]:
    def extended(name: str, *first: str) -> str:
        return os.pathsep.join([*first, base[name]] if base.get(name) else first)

    ours = {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "RAY_USAGE_STATS_ENABLED": "0",
        # "local" keeps Ray from joining a cluster that happens to run on this machine.
        "RAY_ADDRESS": federation.ray_address or "local",
        # Flower starts its parts by name: they must come from the environment this process runs in.
        "PATH": extended("PATH", sysconfig.get_path("scripts")),
        "NO_PROXY": ",".join(filter(None, ["127.0.0.1,localhost", base.get("NO_PROXY", base.get("no_proxy", ""))])),
    }
    if base.get("PYTHONPATH"):  # relative entries mean the user's folder, not the SuperLink's
        ours["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in base["PYTHONPATH"].split(os.pathsep) if p)
    inherited = {key: value for key, value in base.items() if not key.startswith("FLWR_LOCAL_")}
    # A dozen processes import the same modules; without stored bytecode that takes twice as long in each.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    return inherited | ours


class _SuperLink:
    """A SuperLink in simulation mode on a port of its own, with its state in memory."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.grace = _STOP_GRACE
        self._port = _free_port()
        self._log = home / "superlink.log"
        self._command = [
            "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
            "--host", "127.0.0.1", "--port", str(self._port),
        ]  # fmt: skip
        # The empty folder is what Ray will put first on its actors' path: nothing in it can be taken for the app.
        self._cwd = home / "empty"
        self._environment = environment
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    def __enter__(self) -> Self:
        self._cwd.mkdir()
        with self._log.open("w") as log:
            self._process = _spawn(self._command, self._environment, cwd=self._cwd, stdout=log, stdin=subprocess.DEVNULL)
        return self

    def __exit__(self, *exception: object) -> None:
        _take_down(self._process.pid, grace=self.grace)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_GRACE)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1.0)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == http.client.OK:
                    return
            time.sleep(0.03)
        last = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
        raise LaunchError(f"Flower's SuperLink did not start within {_START_TIMEOUT:.0f} s. Its log ends with:\n{last}")


class _Flwr:
    """The `flwr` command, in the process of `experiments.flower_shell`."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self._home, self._environment = home, environment
        self._streams = False

    def __enter__(self) -> Self:
        # -P: the script's folder must not become an import root.
        command = [sys.executable, "-P", "-u", str(Path(flower_shell.__file__))]
        self._process = _spawn(
            command, self._environment, cwd=self._home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def stream(self, *arguments: str) -> Iterator[str]:
        """Yield the lines that a command prints, as it prints them."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101 - opened as pipes
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        self._streams = True
        for line in self._process.stdout:
            if line.startswith(flower_shell.END):
                self._streams = False
                return
            yield line.rstrip("\n")
        raise LaunchError(f"Flower's command line ended during `flwr {arguments[0]}`.")

    def json(self, *arguments: str) -> dict[str, Any]:
        """Return what a command answers with ``--format json``."""
        text = "\n".join(self.stream(*arguments, "--format", "json"))
        start, end = text.find("{"), text.rfind("}")
        try:
            answer: dict[str, Any] = json.loads(text[start : end + 1])
        except json.JSONDecodeError:
            raise LaunchError(f"`flwr {arguments[0]}` failed: {text.strip()}") from None
        return answer
