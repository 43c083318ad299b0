"""Ends of processes that this one did not start: a zombie, which nobody may ever reap in a container, has ended."""

import time
from collections.abc import Iterable

import psutil

_LOOK_SECONDS = 0.05


def has_ended(process: psutil.Process | int) -> bool:
    """Tell whether a process, or the one of this number, is gone or a zombie."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def still_running(processes: Iterable[psutil.Process | int], *, seconds: float = 10.0) -> list[psutil.Process | int]:
    """Wait until processes have ended; return those that have not after so many seconds.

    ``psutil.Process.wait`` waits for a zombie too, and without a limit for ever where process 1 does not reap.
    """
    until = time.monotonic() + seconds
    alive = list(processes)
    while (alive := [process for process in alive if not has_ended(process)]) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    return alive
