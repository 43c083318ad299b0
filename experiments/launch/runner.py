"""Run a Flower app on a SuperLink of its own: start it, submit, follow the log, read the verdict, take it all down.

`flwr run` by itself reuses whatever SuperLink listens on its fixed port, with the environment and the working
directory that one was started with, leaves it running, and exits 0 when the run failed. Here every run has its own
port, its own `FLWR_HOME` and an empty working directory, none of its processes outlives it, and its status is
Flower's own verdict.
"""

import contextlib
import os
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from experiments.launch.app_lines import QuietLog
from experiments.launch.bundle import bundled
from experiments.launch.preflight import with_own_code
from experiments.launch.superlink import FlowerCommand, LaunchError, SuperLink, process_environment
from fedkd.errors import SettingError
from fedkd.results.folder import git_commit

Setting = str | int | float | bool

COMPLETED, STOPPED = "finished:completed", "finished:stopped"
_TAIL = 200
_ENOUGH_NODES = 32  # for the actors of most machines; looking through so few takes Flower next to no time
_LOOK_SECONDS, _PATIENCE = 0.5, 3.0
_NO_REASON = ("", "No heartbeat received from the task")
_WRAPPED = "An error was encountered. Ending simulation."


@dataclass(frozen=True, kw_only=True)
class Federation:
    """How many peers a simulation has and what each may use of the machine.

    Args:
        peers: number of simulated peers.
        nodes: number of Flower's SuperNodes that they share, which takes the setting ``peers``; None: one for each.
        cpus_per_peer: CPUs a peer's actor takes (Ray counts whole ones).
        gpus_per_peer: GPUs, or the fraction of one, that a peer's actor takes; 0 hides the GPUs from it.
        actors: peers that work at once; None: as many as the machine's CPUs and GPUs hold.
        gpus: GPUs that Ray may use; None: all it finds.
        ray_address: ``host:port`` of a running Ray cluster; None: a Ray of its own on this machine.
    """

    peers: int
    nodes: int | None = None
    cpus_per_peer: int = 1
    gpus_per_peer: float = 0.0
    actors: int | None = None
    gpus: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("peers", 1),
            ("cpus_per_peer", 1),
            ("actors", 1),
            ("gpus_per_peer", 0),
            ("gpus", 0),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise SettingError(_flag(name), value, f"a number >= {least}")
        for name in ("actors", "gpus"):
            value = getattr(self, name)
            if self.ray_address and value is not None:
                raise SettingError(_flag(name), value, "left out with --ray-address: the cluster has its own size")

    def sharing(self) -> "Federation":
        """Return the same with no more nodes than keep the machine's actors busy: each node costs Flower time."""
        enough = max(_ENOUGH_NODES, 2 * (self.actors or os.cpu_count() or 1))
        return self if self.ray_address else replace(self, nodes=min(self.peers, enough))

    def config(self) -> str:
        """Return the value of `flwr run --federation-config`.

        >>> Federation(peers=6, actors=2).config()
        'num-supernodes=6 client-resources-num-cpus=1 client-resources-num-gpus=0.0 init-args-num-cpus=2'
        """
        parts: dict[str, int | float | None] = {
            "num-supernodes": self.nodes or self.peers,
            "client-resources-num-cpus": self.cpus_per_peer,
            "client-resources-num-gpus": float(self.gpus_per_peer),
            "init-args-num-cpus": self.actors and self.actors * self.cpus_per_peer,
            "init-args-num-gpus": self.gpus,
        }
        return " ".join(f"{key}={value}" for key, value in parts.items() if value is not None)


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        run_id: Flower's number of the run; empty if it was stopped before it had one.
        status: Flower's verdict; only ``finished:completed`` is a success.
        reason: why it did not complete, in the app's own words; empty after a success.
        phases: wall time in seconds of ``superlink``, ``submit``, ``start`` (until the app's first line), ``app``
            (until its last), ``end`` (until Flower's verdict) and ``teardown``.
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
        """Return what a shell should see: 0, 1, or 128 + the signal that stopped the run."""
        return 128 + self.signal if self.signal else int(not self.completed)

    @property
    def seconds(self) -> float:
        """Return the wall time of the whole launch."""
        return sum(self.phases.values())

    @property
    def flower_seconds(self) -> float:
        """Return the part of it before the app's first line and after its last; Ray starts up within the app's part."""
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
    """Run a Flower app in simulation and wait for its end. Ctrl-C or SIGTERM stops it; a second one does so at once.

    Args:
        app: the folder with the app's pyproject.toml.
        settings: the run config's keys that differ from the app's defaults.
        federation: the peers and their resources.
        out: takes every line meant for the user.
        verbose: pass on Flower's and Ray's own lines too, as they are.
        scratch: folder for Flower's temporary files; every machine of a Ray cluster must see it. None: the system's.
        env: environment of all processes; None: this process's.

    Raises:
        LaunchError: the SuperLink did not start, or Flower refused the app or its settings.
    """
    out(f"$ {command_line(app, settings, federation)}")
    out("starting Flower and Ray ...")
    log, clock = _Log(out, quiet=not verbose), _Clock()
    run_id, status, details, last_words = "", STOPPED, "", ""
    with _Interrupts() as interrupts, _temporary_home(scratch) as home:
        environment = process_environment(os.environ if env is None else env, home, ray_address=federation.ray_address)
        environment["PYTHONPATH"] = with_own_code(environment.get("PYTHONPATH", ""), app=app, cwd=Path.cwd())
        environment.setdefault("FEDKD_COMMIT", git_commit(app))  # Flower runs a copy of the app, outside of git
        with (
            SuperLink(home, environment, hurry=interrupts.repeated) as superlink,
            FlowerCommand(home, environment) as flwr,
        ):
            try:
                interrupts.arm()
                superlink.wait_until_ready()
                clock.mark("superlink")
                run_id = _submit(flwr, bundled(app, home / "bundle"), settings, federation)
                clock.mark("submit")
                with _stopped_if_gone(superlink, run_id, home, environment) as gone:
                    for line in flwr.lines("log", run_id, "--stream"):
                        log.add(line)
                verdict = flwr.json("ls", "--run-id", run_id)["runs"][0]
                status, details = str(verdict["status"]), str(verdict["status-details"])
                if status == STOPPED and gone.is_set():
                    details = ""  # Flower's are of our stopping it
                superlink.grace = 0.0  # the run is over: its processes have nothing left to say
            except LaunchError as error:
                if run_id and superlink.has_ended():
                    raise LaunchError(f"Flower's SuperLink {_broke_off(superlink.last_words())}") from error
                raise
            except KeyboardInterrupt:
                out("stopping the run (Ctrl-C once more: at once) ...")
            finally:
                interrupts.disarm()
            last_words = superlink.last_words() if status != COMPLETED else ""
            clock.mark("start", at=log.first)
            clock.mark("app", at=log.last)
            clock.mark("end")
    clock.mark("teardown")
    signum = interrupts.received[0] if status == STOPPED and interrupts.received else None
    reason = f"stopped by {signal.Signals(signum).name}" if signum else _reason(status, details, log.tail, last_words)
    log.end(f"error: {reason}")
    return Outcome(run_id, status, reason, clock.laps(), tuple(log.tail), signum)


def command_line(app: Path, settings: Mapping[str, Setting], federation: Federation) -> str:
    """Return the command that does the same on Flower's shared local SuperLink, ready to paste into a shell.

    The launcher itself hands over a copy of the app, with ``--format json`` in the place of ``--stream``, and streams
    the log by run id.
    """
    variables = ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"]
    if federation.ray_address:
        variables.append(f"RAY_ADDRESS={shlex.quote(federation.ray_address)}")
    return " ".join([*variables, shlex.join(["flwr", *_run_command(app, settings, federation), "--stream"])])


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


def _run_command(app: Path, settings: Mapping[str, Setting], federation: Federation) -> list[str]:
    overrides = ["--run-config", run_config(settings)] if settings else []
    return ["run", str(app), "--federation-config", federation.config(), *overrides]


def _submit(flwr: FlowerCommand, app: Path, settings: Mapping[str, Setting], federation: Federation) -> str:
    answer = flwr.json(*_run_command(app, settings, federation))
    if not answer.get("success"):
        raise LaunchError("Flower refused the run: " + str(answer.get("error-message", "")).strip())
    return str(answer["run-id"])


def _reason(status: str, details: str, tail: "deque[str]", last_words: str) -> str:
    if status == COMPLETED:
        return ""
    said = (details.partition("failed with exception: ")[2] or details).strip()
    if said in _NO_REASON:
        return f"the run's process {_broke_off(last_words)}"
    # Flower wraps whatever breaks Ray or the ClientApp's import in one phrase; the cause stands in the log alone.
    causes = [line for line in tail if line.split(": ")[0].endswith(("Error", "Exception")) and _WRAPPED not in line]
    return causes[0] if said == _WRAPPED and causes else said


def _broke_off(last_words: str) -> str:
    said = f"; the last that was said:\n{last_words}" if last_words else " (killed, perhaps for want of memory)"
    return f"ended without giving a reason{said}"


@contextlib.contextmanager
def _stopped_if_gone(
    superlink: SuperLink, run_id: str, home: Path, environment: Mapping[str, str]
) -> Iterator[threading.Event]:
    """Stop a run whose process goes without a verdict, which Flower itself would notice after a minute; tell so.

    A run that has its verdict cannot be stopped any more: one that only ends slowly keeps it.
    """
    over, gone = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            if superlink.simulation_has_gone():
                if not over.wait(_PATIENCE):
                    gone.set()
                    with contextlib.suppress(LaunchError), FlowerCommand(home, environment) as flwr:
                        flwr.json("stop", run_id)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield gone
    finally:
        over.set()


class _Log:
    """Passes the log on and remembers its end, and when the app first and last spoke.

    The last line is held back if it is an error: whoever launched the run tells why it failed.
    """

    def __init__(self, out: Callable[[str], None], *, quiet: bool) -> None:
        self._out, self._quiet, self._filter = out, quiet, QuietLog()
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.first: float | None = None
        self.last: float | None = None
        self._held = ""

    def add(self, line: str) -> None:
        told = self._filter.line(line)
        if told is not None:
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.tail.append(told)
        shown = told if self._quiet else line
        if shown is None:
            return
        self.end("")
        if self._quiet and shown.startswith("error: "):
            self._held = shown
        else:
            self._out(shown)

    def end(self, said_elsewhere: str) -> None:
        """Pass on what is held back, unless it is what will be said anyway."""
        if self._held and self._held != said_elsewhere:
            self._out(self._held)
        self._held = ""


class _Clock:
    """Wall time between marks."""

    def __init__(self) -> None:
        self._marks = [("", time.monotonic())]

    def mark(self, name: str, *, at: float | None = None) -> None:
        """End a phase now, or at an earlier moment."""
        self._marks.append((name, time.monotonic() if at is None else at))

    def laps(self) -> dict[str, float]:
        """Return the seconds of each phase."""
        moments = [moment for _, moment in self._marks]
        return {name: now - before for (name, now), before in zip(self._marks[1:], moments, strict=False)}


class _Interrupts:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a `KeyboardInterrupt`, while armed; only records the rest.

    Starting and ending processes is done disarmed, so that no process can be lost between its start and its record.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._armed = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def arm(self) -> None:
        self._armed = True
        if self.received:
            raise KeyboardInterrupt

    def disarm(self) -> None:
        self._armed = False

    def repeated(self) -> bool:
        """Tell whether the user has asked twice."""
        return len(self.received) > 1

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def _temporary_home(scratch: Path | None) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="fedkd-", dir=scratch))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
