"""Which peers a run did nothing for: theirs is a failure of the run, whatever the others reached."""

import math
from collections.abc import Sequence

from fedkd.results.folder import Row

_NAMED = 12


def never_trained(rows: Sequence[Row]) -> str:
    """Return which peers failed in every round in which they were to learn, and why; empty if none did.

    A peer that only kept silent is none of them: it may have trained, and its rows say that it was late.

    >>> never_trained([Row(1, "a", "mlp", []), Row(1, "b", "mlp", [], status="error", error="no gradient")])
    'b never trained: no gradient'
    """
    reasons: dict[str, str] = {}
    learned: set[str] = set()
    for row in rows:
        if not row.round:
            continue
        if row.status == "error":
            reasons[row.peer] = row.error
        elif row.status in ("ok", "refused") or math.isfinite(row.seconds):
            learned.add(row.peer)
    by_reason: dict[str, list[str]] = {}
    for peer, why in reasons.items():
        if peer not in learned:
            by_reason.setdefault(why, []).append(peer)
    return "; ".join(f"{_named(peers)} never trained: {why}" for why, peers in by_reason.items())


def _named(peers: Sequence[str]) -> str:
    more = len(peers) - _NAMED
    return ", ".join(peers[:_NAMED]) + (f" and {more} more" if more > 0 else "")
