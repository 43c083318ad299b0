"""Ending processes: what a launch or a trial started, and, as a script, what a launch left when it was killed.

As a script it is the guard of a launch: it waits on its standard input, a pipe that only the launcher holds open, and
when that ends it ends the launch's processes and removes its temporary folder. It imports nothing of the project, so
that it runs from wherever the project lies.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

_GRACE = 3.0


def below(pid: int) -> list[psutil.Process]:
    """Return a process and all that descend from it; none if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def at_home(home: Path) -> list[psutil.Process]:
    """Return the processes whose `FLWR_HOME` is this folder, and all that descend from them.

    What descends from a SuperLink that was killed is found so, too; and Ray's actors, whose environment cannot be read
    because they write their title over it, are found below Ray's own processes.
    """
    everyone = list(psutil.process_iter(["ppid"]))
    found = {process.pid: process for process in everyone if _home(process) == str(home)}
    while more := {p.pid: p for p in everyone if p.pid not in found and p.info["ppid"] in found}:
        found |= more
    return list(found.values())


def end(
    find: Callable[[], Iterable[psutil.Process]], *, grace: float, hurry: Callable[[], bool] = lambda: False
) -> None:
    """End processes: SIGTERM, and after `grace` seconds SIGKILL; return when they have ended.

    Flower and Ray start their parts in sessions of their own, so a process group does not reach them. They are looked
    for before the first signal, because a process whose parent has ended cannot be found by it any more, and again
    before the last one, because they may have started others meanwhile.

    Args:
        find: returns the processes.
        grace: seconds; 0 ends them at once.
        hurry: asked while they are given time to end; True ends them at once.
    """
    found = {process.pid: process for process in find()}
    if grace:
        _signal(found.values(), psutil.Process.terminate)
        _wait(found.values(), grace, hurry)
        found = {process.pid: process for process in find()} | found
    _signal(found.values(), psutil.Process.kill)
    _wait(found.values(), _GRACE, lambda: False)


def lives(process: psutil.Process) -> bool:
    """Tell whether a process still runs."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # in a container its reaping may take seconds
    except psutil.NoSuchProcess:
        return False


def guard(home: Path) -> None:
    """Wait until the launcher has ended; then end what runs at this home, and remove it."""
    sys.stdin.read()
    end(lambda: at_home(home), grace=_GRACE)
    shutil.rmtree(home, ignore_errors=True)


def _home(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error, OSError):  # another user's, or it has ended meanwhile
        return process.environ().get("FLWR_HOME")
    return None


def _wait(processes: Iterable[psutil.Process], seconds: float, hurry: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while any(map(lives, processes)) and time.monotonic() < deadline and not hurry():
        time.sleep(0.02)


def _signal(processes: Iterable[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            send(process)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
