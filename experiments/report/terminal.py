"""`fedkd show`: one run's table and curves in the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis.comparison import again
from experiments.analysis.runs import Run, read_run
from experiments.report.sentences import CONTROL_NAMES
from fedkd.errors import FedkdError

_BLOCKS = "▁▂▃▄▅▆▇█"


def show(path: Path) -> None:
    """Print a run: its command, every peer before and after, and accuracy by round.

    Raises:
        FedkdError: it is not the folder of a run.
    """
    if (path / "comparison.json").exists():
        raise FedkdError(f"{path} is a comparison: show one of {path / 'trials'}/*, or open {path / 'report.html'}.")
    from rich.console import Console

    console = Console(highlight=False)
    run = read_run(path)
    console.print(again(run), markup=False, soft_wrap=True)
    for problem in run.problems:
        console.print(problem, style="red", markup=False)
    for caveat in run.caveats:
        console.print(caveat, style="yellow", markup=False, soft_wrap=True)
    if run.error:
        console.print(run.error, style="red", markup=False)
    if run.rows:
        console.print(_peers(run))
        console.print(_curves(run))


def sparkline(values: Sequence[float], *, low: float, high: float) -> str:
    """Draw numbers as blocks between two levels; what was not measured is a gap.

    >>> sparkline([0.0, 0.5, math.nan, 1.0], low=0.0, high=1.0)
    '▁▅ █'
    """
    span = (high - low) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[min(top, max(0, round((value - low) / span * top + 0.01)))] if math.isfinite(value) else " "
        for value in values
    )


def _peers(run: Run) -> Any:
    from rich.table import Table

    table = Table("peer", "model", box=None, title="test accuracy", title_justify="left")
    for name in ("before", "after", "gain", "own classes", "isolated", "true labels", "accuracy by round"):
        table.add_column(name, justify="left" if name == "accuracy by round" else "right")
    summaries = {entry["peer"]: entry for entry in run.summary.get("peers", [])}
    measured = [row.test_accuracy for row in run.rows if math.isfinite(row.test_accuracy)]
    low, high = (min(measured), max(measured)) if measured else (0.0, 1.0)
    for name in run.peers:
        rows = [row for row in run.rows if row.peer == name]
        accuracies = [row.test_accuracy for row in rows]
        first, last = _ends(accuracies)
        own = _ends([row.own_accuracy for row in rows])[1]
        isolated, shown = (_number(summaries.get(name, {}), control) for control in ("isolated", "channel"))
        table.add_row(
            name, rows[0].model, _share(first), _share(last), f"{100 * (last - first):+.1f}", _share(own),
            _share(isolated), _share(shown), sparkline(accuracies, low=low, high=high),
        )  # fmt: skip
    return table


def _curves(run: Run) -> Any:
    from rich.table import Table

    from strategies.relay.console import channel_line, pooled_line, size

    table = Table(box=None, title="by round", title_justify="left")
    for name in ("round", "mean", "worst", "spread", "ECE", "NLL", "Brier", "bytes so far", "seconds so far"):
        table.add_column(name, justify="right")
    for point in run.curve():
        seconds = f"{point.seconds:.1f}" if math.isfinite(point.seconds) else "–"
        table.add_row(
            str(point.round), _share(point.accuracy), _share(point.worst), f"{100 * point.spread:.1f}",
            *(f"{value:.3f}" if math.isfinite(value) else "–" for value in (point.ece, point.nll, point.brier)),
            size(point.bytes), seconds,
        )  # fmt: skip
    table.caption = ", ".join(
        f"{words} {_share(run.control(name))}"
        for name, words in CONTROL_NAMES.items()
        if math.isfinite(run.control(name))
    )
    if seen := pooled_line(_number(run.summary, "pooled_samples_seen"), _number(run.summary, "samples_seen")):
        table.caption += f"; {seen}"
    if line := channel_line(_number(run.summary, "share_of_channel")):
        table.caption += f"; {line}"
    return table


def _ends(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (finite[0], finite[-1]) if finite else (math.nan, math.nan)


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    return math.nan if value is None else float(value)


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "–"
