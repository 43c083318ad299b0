"""A GPU's memory and utilisation while something runs, as nvidia-smi has them."""

import os
import subprocess
import threading
from contextlib import suppress
from statistics import fmean
from typing import NamedTuple, Self

_COMMAND = ("nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200")


class Sample(NamedTuple):
    """One look: MiB in use and percent of the time in which a kernel ran."""

    used: float
    busy: float


class Watch:
    """Samples five times a second while its block runs; without nvidia-smi it has nothing to say."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._smi: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        with suppress(OSError):
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"  # a run uses no other
            self._smi = subprocess.Popen(
                [*_COMMAND, f"--id={first}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._smi:
            self._smi.kill()
            self._smi.wait()
        self._reader.join()

    def _read(self) -> None:
        for line in (self._smi and self._smi.stdout) or ():
            try:
                used, busy = map(float, line.split(",")[:2])
            except ValueError:  # "[N/A]"
                continue
            self.samples.append(Sample(used, busy))

    def since(self, first: int) -> dict[str, float]:
        """Return what was seen since a number of samples; empty where nothing was.

        Returns:
            ``peak_mib``; ``before_mib``, at the beginning; and ``busy_percent`` while more than half of the memory
            between these two was in use.
        """
        return seen(self.samples[first:])


def seen(samples: list[Sample]) -> dict[str, float]:
    """Sum samples up, as :meth:`Watch.since` returns them.

    >>> seen([Sample(100, 0), Sample(1100, 80), Sample(900, 60), Sample(150, 10)])
    {'peak_mib': 1100, 'before_mib': 100, 'busy_percent': 70.0}
    """
    if not samples:
        return {}
    before, peak = samples[0].used, max(sample.used for sample in samples)
    working = [sample.busy for sample in samples if sample.used > before + (peak - before) / 2]
    return {"peak_mib": peak, "before_mib": before, "busy_percent": round(fmean(working or [0.0]), 1)}
