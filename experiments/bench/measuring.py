"""What benchmarks share: the facts about a machine, the cost of a tree of processes, and the file of figures."""

import contextlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import psutil

from experiments.outputs import refuse_foreign
from fedkd.results.folder import environment

Figures = dict[str, Any]

_LOOK_SECONDS, _MARK_SECONDS = 1.0, 0.02
_Noted = TypeVar("_Noted")


def facts() -> Figures:
    """Return what every file of figures begins with: ``machine``, ``versions`` and ``commit``."""
    found = environment()
    machine = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": found["platform"],
    }
    return {"machine": machine, "versions": found["versions"], "commit": found["commit"]}


def leave(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write figures, and the facts about where they were measured, as JSON where a path is given."""
    if path is not None:
        path.write_text(json.dumps({**facts(), **figures}, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def trials_folder(folder: Path | None, bench: str, *names: str) -> Iterator[Path]:
    """Give the folder of a benchmark's trials; one that is removed at the end unless one to keep is given.

    Args:
        folder: to keep; made if it is not there.
        bench: the benchmark, whose folder it is then.
        names: of what will be written into it.

    Raises:
        SettingError: there are files of somebody else's in it, or another benchmark's.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix=f"fedkd-{bench}-") as name:
            yield Path(name).resolve()
        return
    folder, mark = folder.resolve(), {"fedkd bench": bench}
    told = folder / "bench.json"
    ours = told.is_file() and told.read_text(encoding="utf-8") == json.dumps(mark)
    refuse_foreign(folder, (told.name, *names), key="--folder", ours=ours)
    folder.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(mark), encoding="utf-8")
    yield folder


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass
class Cost:
    """What one process has cost so far.

    Attributes:
        name: what it calls itself.
        cpu_seconds: of all its threads.
        peak_bytes: the most memory it held at once, pages that it shares with others included.
    """

    name: str
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


class _Beside:
    """Does its work in a thread of its own while its block runs."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError


class Watch(_Beside):
    """Looks at this process's descendants, once a second, while its block runs.

    Attributes:
        costs: by process id, of those that have ended too.
        peak_bytes: the most memory that all of them held together, shared pages counted once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[int, Cost] = {}
        self.peak_bytes = 0
        self._lock = threading.Lock()

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of all descendants up to now."""
        self._look()
        return sum(cost.cpu_seconds for cost in list(self.costs.values()))

    def spent(self, chosen: Callable[[str], bool]) -> float:
        """Return the CPU seconds of the processes whose name is chosen."""
        return sum(cost.cpu_seconds for cost in self.costs.values() if chosen(cost.name))

    def peak(self, chosen: Callable[[str], bool]) -> int:
        """Return the largest ``peak_bytes`` among the processes whose name is chosen; 0 if there was none."""
        return max((cost.peak_bytes for cost in self.costs.values() if chosen(cost.name)), default=0)

    def _run(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        with self._lock:
            alive = psutil.Process().children(recursive=True)
            for process in alive:
                self._note(process)
            self.peak_bytes = max(self.peak_bytes, _together(alive))

    def _note(self, process: psutil.Process) -> None:
        try:
            with process.oneshot():
                name, times = _title(process), process.cpu_times()
            peak = _high_water(process.pid) or process.memory_info().rss
        except (psutil.Error, OSError):  # it has ended meanwhile
            return
        # A process takes its final name a while after its start.
        cost = self.costs.setdefault(process.pid, Cost(name))
        cost.name, cost.cpu_seconds = name, times.user + times.system
        cost.peak_bytes = max(cost.peak_bytes, peak)


class Marks(_Beside, Generic[_Noted]):
    """Notes something as soon as a file that others append to has some number of lines, while its block runs.

    The lines that a run prints come up to a second late through Flower's log; the file of its rounds does not.

    Args:
        path: the file, which need not exist yet.
        lines: the numbers of lines, ascending.
        note: called at each of them.

    Attributes:
        noted: what was noted so far.
    """

    def __init__(self, path: Path, lines: Sequence[int], note: Callable[[], _Noted]) -> None:
        super().__init__()
        self.noted: list[_Noted] = []
        self._path, self._lines, self._note = path, lines, note
        self._problem: Exception | None = None

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        try:
            self._look()
        except Exception as error:  # of another thread: raised where somebody hears it
            self._problem = error

    def _look(self) -> None:
        size, over = -1, False
        while len(self.noted) < len(self._lines) and not over:
            over = self._over.wait(_MARK_SECONDS)  # once more after the end, for what came just before it
            if not self._path.exists() or self._path.stat().st_size == size:
                continue
            size = self._path.stat().st_size
            count = self._path.read_bytes().count(b"\n")
            while len(self.noted) < len(self._lines) and count >= self._lines[len(self.noted)]:
                self.noted.append(self._note())


def _title(process: psutil.Process) -> str:
    words = process.cmdline()
    return " ".join(words[:3]) if words else process.name()


def _high_water(pid: int) -> int:
    """Return the peak that the kernel itself has recorded, where it does."""
    path = Path(f"/proc/{pid}/status")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _together(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            memory = process.memory_full_info()
        except (psutil.Error, OSError):
            continue
        total += getattr(memory, "pss", memory.uss)
    return total
