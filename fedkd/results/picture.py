"""The picture of one run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkd.results.folder import Row, Summary
from fedkd.results.profile import PHASES, by_peer
from fedkd.wire.messages import one_line

_MOST_NAMED = 40
_MOST_ARROWS, _MOST_EDGES = 2000, 20_000


def accuracy_png(path: Path, rows: Sequence[Row], summary: Summary, *, title: str) -> None:
    """Draw test accuracy by round: a line per peer, named where they are few, the mean bold, the controls dashed.

    Args:
        path: the file to write.
        rows: all rows of the run; those without a measurement are left out.
        summary: of the same run.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured = [row for row in rows if _possible(row.test_accuracy)]
    by_peer: dict[str, list[Row]] = {}
    by_round: dict[int, list[float]] = {}
    for row in measured:
        by_peer.setdefault(row.peer, []).append(row)
        by_round.setdefault(row.round, []).append(row.test_accuracy)
    few = len(by_peer) <= _MOST_NAMED
    for peer, own in by_peer.items():
        label = _text(f"{peer} ({own[0].model})") if few else None
        width, alpha = (1.2, 0.8) if few else (0.5, max(0.05, 20 / len(by_peer)))
        curve = [r.round for r in own], [r.test_accuracy for r in own]
        axes.plot(*curve, linewidth=width, alpha=alpha, label=label, color=None if few else "tab:blue")
    rounds = sorted(by_round)
    means = [_mean(by_round[round]) for round in rounds]
    axes.plot(rounds, means, color="black", linewidth=3, label="mean")
    if points := [(r, a) for r, a in enumerate(summary.isolated_by_round) if _possible(a)]:
        axes.plot(*zip(*points, strict=True), "--", color="black", linewidth=1.5, label="isolated (mean)")
    if points := [(r, a) for r, a in enumerate(summary.channel_by_round) if _possible(a)]:
        axes.plot(*zip(*points, strict=True), "--", color="tab:green", linewidth=1.5, label="true labels (mean)")
    if _possible(summary.pooled):
        axes.axhline(
            summary.pooled,
            linestyle="--",
            color="tab:red",
            linewidth=1.5,
            label=_text(f"pooled ({summary.pooled_model})"),
        )
    axes.set(xlabel="round", ylabel="test accuracy", title=_text(title, 120))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _possible(accuracy: float) -> bool:
    return 0 <= accuracy <= 1


def _text(text: str, longest: int = 60) -> str:
    """Return text that anyone may have written as a short label; matplotlib takes what is between $ for mathematics."""
    return one_line(text, longest).replace("$", r"\$")


def profile_png(path: Path, lines: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw where each peer's time goes in a round: a bar per peer, its phases one after another.

    Args:
        path: the file to write.
        lines: those of ``profile.jsonl``; round 0, in which peers start, is left out.
        title: above the picture.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    peers = by_peer(lines)
    figure = Figure(figsize=(9.0, min(40.0, 1.6 + 0.32 * len(peers))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    models = {str(line["peer"]): str(line["model"]) for line in lines}
    names = [_text(f"{peer} ({models[peer]})") for peer in peers]
    ends = [0.0] * len(peers)
    for phase, color in zip(PHASES, colormaps["tab10"].colors, strict=True):  # type: ignore[attr-defined]
        seconds = [own[phase] for own in peers.values()]
        shown = {"color": "0.85"} if phase == "waiting" else {"color": color}
        axes.barh(names, seconds, left=ends, label=phase, **shown)
        ends = [end + more for end, more in zip(ends, seconds, strict=True)]
    axes.set(xlabel="seconds a round", title=_text(title, 120))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def topology_png(
    path: Path, edges: Sequence[tuple[int, int]], accuracies: Sequence[float], *, title: str, directed: bool = False
) -> None:
    """Draw who can hear whom: peers on a circle, coloured by their final accuracy.

    Args:
        path: the file to write.
        edges: pairs of peer indices; (heard, hearer) where directed.
        accuracies: of each peer; grey unless in [0, 1].
        title: above the picture.
        directed: draw arrows.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    angles = [2 * math.pi * i / len(accuracies) for i in range(len(accuracies))]
    shown = [value if _possible(value) else math.nan for value in accuracies]
    spots = [(math.sin(angle), math.cos(angle)) for angle in angles]
    width = 1.0 if len(edges) < 200 else 0.2
    if directed and len(edges) <= _MOST_ARROWS:
        for heard, hearer in edges:
            arrow = {"arrowstyle": "-|>", "color": "0.6", "shrinkA": 9, "shrinkB": 9}
            axes.annotate("", xy=spots[hearer], xytext=spots[heard], arrowprops=arrow)
    else:
        edges = edges[:: -(-len(edges) // _MOST_EDGES) or 1]  # more of them fill the circle anyway
        axes.add_collection(LineCollection([(spots[a], spots[b]) for a, b in edges], colors="0.7", linewidths=width))
    few = len(accuracies) <= _MOST_NAMED
    colors = colormaps["viridis"].with_extremes(bad="0.85")
    across, up = [x for x, _ in spots], [y for _, y in spots]
    dots = axes.scatter(across, up, c=shown, s=360 if few else 20, cmap=colors, zorder=2, plotnonfinite=True)
    if few:
        finite = [value for value in shown if math.isfinite(value)]
        middle = (min(finite) + max(finite)) / 2 if finite else 0.0
        for i, (x, y) in enumerate(spots):
            color = "white" if shown[i] < middle else "black"  # on dark violet, on green and yellow
            axes.annotate(str(i), (x, y), ha="center", va="center", fontsize=8, color=color, zorder=3)
    figure.colorbar(dots, ax=axes, label="test accuracy", format=PercentFormatter(1.0), shrink=0.8)
    axes.set(title=_text(title, 120), aspect="equal")
    axes.axis("off")
    figure.savefig(path, dpi=150)
