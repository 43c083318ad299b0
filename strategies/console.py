"""What a run says while it goes on, and the table at its end."""

import math
from collections.abc import Sequence

from fedkd.protocol import one_line
from fedkd.results import Row, Summary
from strategies.topology import Topology

MOST_SHOWN = 40
"""Peers that are listed one by one; of more, the results have the rest."""

_SHOWN = 500  # characters of what went wrong at a peer; the whole text is in its row
_NAME = 60  # characters of a name in the table


def round_line(round: int, rounds: int, rows: Sequence[Row], durations: Sequence[float], *, unit: str = "round") -> str:
    """Return the progress line of a closed round.

    Args:
        round: the round that closed; 0 is the start.
        rounds: how many there are.
        rows: its rows.
        durations: seconds that every round so far took, round 0 first.
        unit: what is counted.
    """
    accuracies = [row.test_accuracy for row in rows if 0 <= row.test_accuracy <= 1]
    found = "accuracy not measured".ljust(43)
    if accuracies:
        mean = sum(accuracies) / len(accuracies)
        found = f"accuracy mean {mean:6.1%}  min {min(accuracies):6.1%}  max {max(accuracies):6.1%}"
    up, down = sum(row.bytes_up for row in rows), sum(row.bytes_down for row in rows)
    line = f"{unit} {round:>3}/{rounds}  {found}  up {size(up)}  down {size(down)}  {durations[-1]:5.1f} s"
    if 0 < round < rounds:
        ours = durations[1:]
        line += f"  ~{sum(ours) / len(ours) * (rounds - round):.0f} s left"
    problems = [one_line(f"{row.peer}: {row.error}", _SHOWN) for row in rows if row.error]
    if (more := len(problems) - MOST_SHOWN) > 0:
        problems[MOST_SHOWN:] = [f"and {more:,} more peers with a problem"]
    return "\n".join([line, *problems])


def size(count: int) -> str:
    """Return a number of bytes in words of constant width.

    >>> size(48_000)
    ' 48.0 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            return f"{count:5.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError("unreachable")


def summary_table(summary: Summary) -> str:
    """Return the table at the end of a run: every peer before and after, then the controls."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="test accuracy", title_justify="left")
    for name in ("peer", "model"):
        table.add_column(name)
    for name in ("parameters", "samples", "before", "after", "gain", "own classes", "isolated"):
        table.add_column(name, justify="right")
    for p in summary.peers[:MOST_SHOWN]:
        table.add_row(
            one_line(p.peer, _NAME), one_line(p.model, _NAME), f"{p.parameters:,}", f"{p.samples:,}",
            _share(p.before), _share(p.after), _points(p.gain), f"{_share(p.own_before)} → {_share(p.own_after)}",
            _share(p.isolated),
        )  # fmt: skip
    if (more := len(summary.peers) - MOST_SHOWN) > 0:
        table.add_row(f"and {more:,} more")
    table.add_section()
    mean = summary.mean
    table.add_row(
        "mean", "", "", "", _share(mean("before")), _share(mean("after")), _points(mean("gain")),
        f"{_share(mean('own_before'))} → {_share(mean('own_after'))}", _share(summary.isolated), style="bold",
    )  # fmt: skip
    table.add_section()
    before = mean("before")
    for name, model, after in (
        ("isolated", "local training only", summary.isolated),
        ("pooled", f"{summary.pooled_model} on all data", summary.pooled),
    ):
        if math.isfinite(after):
            table.add_row(name, model, "", "", _share(before) if name == "isolated" else "", _share(after),
                          _points(after - before) if name == "isolated" else "")  # fmt: skip
    # Names are the peers' own choice: what looks like markup in them is text.
    console = Console(width=120, force_terminal=False, no_color=True, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def topology_line(topology: Topology) -> str:
    """Return what a run says of its topology."""
    stats = topology.stats()
    degree = f"{stats.degree_mean:.3g}"
    if stats.degree_min != stats.degree_max:
        degree += f" ({stats.degree_min} to {stats.degree_max})"
    return (
        f"topology {topology.name}: {topology.peers} peers, degree {degree}, diameter {stats.diameter}, "
        f"spectral gap {stats.spectral_gap:.3f}"
    )


def closing_line(summary: Summary) -> str:
    """Return the one sentence that answers the user's question."""
    totals = summary.totals
    line = f"mean accuracy {_share(summary.mean('before'))} → {_share(summary.mean('after'))}"
    if math.isfinite(summary.isolated):
        line += f", {_points(summary.gain_over_isolated)} points over isolated"
    return (
        f"{line}; {totals['rounds']:.0f} rounds, {size(int(totals['bytes_up'])).strip()} up, "
        f"{size(int(totals['bytes_down'])).strip()} down, {totals['seconds']:.1f} s"
    )


def _share(value: float) -> str:
    return f"{value:.1%}" if 0 <= value <= 1 else "–"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}" if abs(value) <= 1 else "–"
