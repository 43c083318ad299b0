"""Where a peer's time goes in a round: what measures it, and the table of what was measured. Imports no torch."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedkd.results.folder import mean

PHASES = (
    "start-up", "decode", "distil", "train", "evaluate", "predict", "encode", "store", "other", "waiting",
)  # fmt: skip
"""What a peer's time in a round goes to.

``start-up`` is imports, reading and standardising data, building models; ``decode`` reading what came; ``distil``
learning from teachers and ``train`` from labels; ``evaluate`` measuring on the test set; ``predict`` the logits that
travel and ``encode`` putting them into the wire's form; ``store`` writing the state; ``other`` the rest of the peer's
own time. ``waiting`` is what is left between the relay's sending and its receiving: for a free actor, and the way.
"""

_PREFIX = "seconds-"


class Stopwatch:
    """Counts the time of phases; one within another counts for itself alone.

    Args:
        settle: called before every reading, to wait for a device that works on by itself; None: nothing does.
    """

    def __init__(self, settle: Callable[[], object] | None = None) -> None:
        self._settle = settle
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time under a name of :data:`PHASES`."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the seconds counted so far as a peer's measures, and begin anew."""
        taken, self._seconds = self._seconds, {}
        return {f"{_PREFIX}{name}": seconds for name, seconds in taken.items()}

    def _turn(self) -> None:
        if self._settle is not None:
            self._settle()
        now = time.perf_counter()
        if self._running:
            self.add(self._running[-1], now - self._since)
        self._since = now


def spent(metrics: Mapping[str, float], *, there_and_back: float) -> dict[str, float]:
    """Return a peer's seconds by phase, as far as what it says can be true.

    Args:
        metrics: the measures in its answer.
        there_and_back: seconds from the sending of its mail to the receipt of the answer.

    Returns:
        Every phase of :data:`PHASES`; empty if the peer measured none.
    """
    own = {phase: metrics[_PREFIX + phase] for phase in PHASES[:-1] if _PREFIX + phase in metrics}
    if not own or any(not 0 <= seconds < 1e12 for seconds in own.values()):
        return {}
    return {**dict.fromkeys(PHASES, 0.0), **own, "waiting": max(0.0, there_and_back - sum(own.values()))}


def by_peer(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return each peer's mean seconds a round by phase, without round 0, in which peers start.

    Args:
        lines: ``round``, ``peer``, and the seconds of every phase, as in ``profile.jsonl``.
    """
    peers: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["round"] > 0:
            peers.setdefault(str(line["peer"]), []).append(line)
    return {peer: {phase: mean([line[phase] for line in own]) for phase in PHASES} for peer, own in peers.items()}


def profile_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the seconds a round of every phase for each peer, and the mean over them, as text; empty without rounds.

    >>> line = {"round": 1, "peer": "a", **dict.fromkeys(PHASES, 0.0), "train": 1.5, "waiting": 0.25}
    >>> print(profile_table([line]))
    seconds a round  start-up  decode  distil  train  evaluate  predict  encode  store  other  waiting
    a                    0.00    0.00    0.00   1.50      0.00     0.00    0.00   0.00   0.00     0.25
    """
    peers = by_peer(lines)
    if not peers:
        return ""
    rows = list(peers.items())
    if len(rows) > 1:
        rows.append(("mean", {phase: mean([own[phase] for own in peers.values()]) for phase in PHASES}))
    title = "seconds a round"
    first = max(len(title), *(len(peer) for peer, _ in rows))
    head = "  ".join([title.ljust(first), *PHASES])
    texts = ["  ".join([peer.ljust(first), *(f"{own[p]:.2f}".rjust(len(p)) for p in PHASES)]) for peer, own in rows]
    return "\n".join([head, *texts])
