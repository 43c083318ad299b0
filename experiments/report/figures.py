"""The figures that set variants side by side. Each comes with the table of the numbers in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from experiments.analysis.ranks import Ranking
from experiments.analysis.settings import label
from experiments.analysis.statistics import INTERVAL, Price, mean, median
from experiments.analysis.variants import Scenario, Variant, differing
from experiments.report.figure_style import COLORS, Figure, Table, amount, folded, legend, new_axes, percent, rows_of
from experiments.report.sentences import CONTROL_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", ":", "-.")
_NAMES = {"round": "communication round", "bytes": "bytes exchanged by all peers, up and down"}
_SPENT = {
    "rounds": "Communication rounds",
    "bytes": "Bytes of all peers, up and down,",
    "seconds": "Wall time of the rounds on this machine, without what comes before round 1,",
}
_CONTROLS = {"isolated": "0.3", "channel": "#1B7F3B", "pooled": "#B00020"}
_MOST_LINES = 8  # in one panel
_MANY_ROWS = 12


@dataclass(frozen=True)
class _Style:
    panel: str
    text: str
    color: str
    line: str


def accuracy_by(scenario: Scenario, what: str) -> Figure:
    """Draw mean accuracy over the peers by ``round`` or by ``bytes``: mean and interval over seeds."""
    variants = [variant for variant in scenario.variants if variant.runs]
    styles = _styles(variants)
    panels = list(dict.fromkeys(style.panel for style in styles))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    canvas, grid = new_axes(lines, columns, height=3.4 if lines == 1 else 2.4 * lines)
    table: Table = []
    for variant, style in zip(variants, styles, strict=True):
        axes = grid[panels.index(style.panel)]
        rows = _by(variant, what)
        table += rows
        across, values = [row[what] for row in rows], [row["accuracy"] for row in rows]
        low, high = ([row[end] for row in rows] for end in ("low", "high"))
        axes.plot(across, values, style.line, color=style.color, linewidth=1.8, label=style.text)
        axes.fill_between(across, low, high, color=style.color, alpha=0.15, linewidth=0)
    for axes, panel in zip(grid, panels, strict=False):
        _controls(axes, scenario, vertical=False)
        axes.set_ylim(*_possible(axes.get_ylim()))
        percent(axes.yaxis)
        axes.set_title(folded(panel), fontsize=8)
        amount(axes, what)
    for axes in grid[-columns:]:
        axes.set_xlabel(_NAMES[what] if columns == 1 else what)
    canvas.supylabel("test accuracy, mean of the peers", fontsize=9)
    legend(canvas, grid)
    caption = f"Mean over seeds; the band is its {INTERVAL}."
    if what == "bytes":
        caption += " Bytes are those of the encoded arrays as they travel; round 0 sends the first knowledge."
    return Figure(f"accuracy-by-{what}", f"Accuracy by {what}", caption, canvas, table)


def finals(scenario: Scenario) -> Figure:
    """Draw final accuracy: the mean of the peers with its interval, every seed, and the worst peer."""
    variants = [variant for variant in scenario.variants if variant.runs]
    canvas, (axes,) = new_axes(1, 1, height=0.4 + _rows_height(len(variants)))
    table: Table = []
    for y, variant in enumerate(variants):
        values, worst = variant.finals(), variant.finals("worst")
        found = mean(list(values.values()))
        axes.plot([found.low, found.high], [y, y], color=COLORS[0], linewidth=3, alpha=0.5)
        axes.plot(list(values.values()), [y] * len(values), "|", color=COLORS[0], markersize=9)
        axes.plot(found.value, y, "o", color=COLORS[0], label="mean of the peers" if y == 0 else None)
        axes.plot(
            fmean(worst.values()), y, "v", color=COLORS[1], fillstyle="none", label="worst peer" if y == 0 else None
        )
        table += [
            {"variant": variant.label, "seed": seed, "accuracy": values[seed], "worst": worst[seed]} for seed in values
        ]
    _controls(axes, scenario, vertical=True)
    _own_controls(axes, scenario, variants)
    rows_of([variant.label for variant in variants], axes)
    axes.set_xlim(*_possible(axes.get_xlim()))
    axes.set_xlabel("final test accuracy")
    percent(axes.xaxis)
    legend(canvas, [axes])
    caption = (
        f"Dots: mean of the peers, averaged over seeds; bars: its {INTERVAL}; ticks: every seed; "
        "triangles: the worst peer, averaged over seeds."
    )
    return Figure("final-accuracy", "Final accuracy", caption, canvas, table)


def to_target(prices: Mapping[str, Mapping[int, Price]], target: float, what: str) -> Figure | None:
    """Draw how many ``rounds``, ``bytes`` or ``seconds`` every run took to a target; what missed it stands at the edge.

    None if no run reached it: the table says so, and there is no scale to draw on.

    Args:
        prices: by variant and seed.
        target: accuracy.
        what: is counted.
    """
    names = [name for name in prices if prices[name]]
    values = {name: [float(getattr(p, what)) for p in prices[name].values()] for name in names}
    reached = [value for name in names for value in values[name] if math.isfinite(value)]
    if not reached:
        return None
    canvas, (axes,) = new_axes(1, 1, height=_rows_height(len(names)))
    edge = max(reached) * (3 if what == "bytes" else 1.15) + (what != "bytes")
    for y, name in enumerate(names):
        inside = [value for value in values[name] if math.isfinite(value)]
        axes.plot(inside, [y] * len(inside), "|", color=COLORS[0], markersize=9)
        if math.isfinite(middle := median(values[name])):
            axes.plot(middle, y, "o", color=COLORS[0])
        if missed := sum(map(math.isinf, values[name])):
            axes.plot(edge, y, "x", color=COLORS[1])
            note = f"{missed} of {len(values[name])}"
            axes.annotate(note, (edge, y), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    if any(math.isinf(value) for name in names for value in values[name]):
        axes.axvline(edge, color=COLORS[1], linestyle=":", linewidth=1)
    amount(axes, what)
    if what != "bytes":
        axes.set_xlim(left=-0.02 * edge)
    axes.set_xlabel(f"{what} to {target:.1%}")
    rows_of(names, axes)
    caption = (
        f"{_SPENT[what]} until the mean of its peers reached {target:.1%}: dots are medians over seeds, ticks every "
        "seed. Crosses at the dotted line: not reached, and in how many runs; those count as infinite in the median."
    )
    table = [
        {"variant": name, "seed": seed, **vars(paid), "target": target}
        for name in names
        for seed, paid in prices[name].items()
    ]
    return Figure(f"{what}-to-target", f"{what.capitalize()} to the target", caption, canvas, table)


def ranks(ranking: Ranking, *, blocks: str) -> Figure:
    """Draw mean ranks with bars over those that cannot be told apart: a critical-difference diagram, lying down.

    Args:
        ranking: of the variants.
        blocks: what a block is, for the caption.
    """
    names, means, count = ranking.labels, ranking.means, len(ranking.labels)
    canvas, (axes,) = new_axes(1, 1, height=_rows_height(count) + 0.2)
    axes.set_axisbelow(True)
    for y, places in enumerate(ranking.ranks):
        axes.plot(places, [y] * len(places), "|", color=COLORS[0], alpha=0.35, markersize=7)
    axes.plot(means, range(count), "o", color=COLORS[0])
    step = (count - 1) * min(0.06, 0.4 / max(1, len(ranking.cliques)))
    for i, clique in enumerate(ranking.cliques):
        across = count + (i + 1.5) * step
        axes.plot([across] * len(clique), clique, ".-", color=COLORS[1], linewidth=2, markersize=6)
    if math.isfinite(ranking.critical):
        axes.plot([1, 1 + ranking.critical], [-0.8, -0.8], "|-", color="black", linewidth=1.5)
        text = f"critical difference {ranking.critical:.2f}"
        axes.annotate(text, (1, -0.8), (0, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"mean rank over {ranking.blocks} blocks, 1 is best")
    rows_of(names, axes)
    axes.set_ylim(top=-1.5)
    axes.set_xlim(0.7, None)
    axes.set_xticks(range(1, count + 1, math.ceil(count / 8)))
    table = [
        {"variant": name, "place": place, "mean rank": mean_rank, "blocks": ranking.blocks,
         "cliques": " ".join(str(n) for n, clique in enumerate(ranking.cliques, 1) if place - 1 in clique)}
        for place, (name, mean_rank) in enumerate(zip(names, means, strict=True), 1)
    ]  # fmt: skip
    caption = (
        f"Ranks by final accuracy in {ranking.blocks} blocks, {blocks}: dots are means, ticks single blocks. "
        f"{_told(ranking)}"
    )
    return Figure("ranks", "Mean ranks and their critical difference", caption, canvas, table)


def _told(ranking: Ranking) -> str:
    """Say what the tests of a ranking allow to say."""
    text = f"Friedman's test by permutations: p = {ranking.p:.2g}. "
    if math.isnan(ranking.critical):
        method = "Wilcoxon's signed-rank test with Holm's correction over all pairs"
    elif math.isinf(ranking.critical):
        return text + "So few blocks cannot tell any two apart, however steady they are."
    else:
        method = (
            f"the critical difference of {ranking.critical:.2f} (Nemenyi's, by permutations: too few blocks for "
            "Wilcoxon's test to find anything)"
        )
    pairs = math.comb(len(ranking.labels), 2)
    return f"{text}{ranking.told_apart} of {pairs} pairs are told apart at 5 %, by {method}; orange bars join the rest."


def _possible(limits: tuple[float, float]) -> tuple[float, float]:
    """Return the part of an axis where accuracies can be: the interval of two seeds may reach far beyond."""
    return max(limits[0], -0.02), min(limits[1], 1.02)


def _rows_height(rows: int) -> float:
    return 1.2 + (0.32 if rows <= _MANY_ROWS else 0.25) * rows


def _by(variant: Variant, what: str) -> Table:
    """Return mean accuracy over seeds by round, with the mean of what it had cost by then."""
    by_round: dict[int, list[tuple[float, float]]] = {}
    for run in variant.runs.values():
        for point in run.curve():
            by_round.setdefault(point.round, []).append((float(getattr(point, what)), point.accuracy))
    rows: Table = []
    for round, points in sorted(by_round.items()):
        found = mean([accuracy for _, accuracy in points])
        across = fmean(x for x, _ in points)
        if what == "round" or across > 0:
            bounds = (found.low, found.high) if found.seeds > 1 else (found.value, found.value)
            row = {"variant": variant.label, "round": round, what: across, "accuracy": found.value}
            rows.append({**row, "low": bounds[0], "high": bounds[1], "seeds": found.seeds})
    return rows


def _styles(variants: Sequence[Variant]) -> list[_Style]:
    """Give the setting with the most values the colours, and what else differs the line style or a panel of its own."""
    values = {key: {label(v.settings, [key]) for v in variants} for key in differing(variants)}
    hue = max(values, key=lambda key: len(values[key]), default="")
    named = [v.label.split(" · ") for v in variants]
    hues = [label(v.settings, [hue]) if hue and label(v.settings, [hue]) in parts else "" for v, parts in
            zip(variants, named, strict=True)]  # fmt: skip
    rests = [" · ".join(p for p in parts if p != h) for parts, h in zip(named, hues, strict=True)]
    colors, lines = list(dict.fromkeys(hues)), list(dict.fromkeys(rests))
    crowded = len(variants) > _MOST_LINES and len(lines) > 1
    return [
        _Style(
            rest if crowded else "",
            (h or rest) if crowded else v.label,
            COLORS[colors.index(h) % len(COLORS)],
            "-" if crowded else _LINES[lines.index(rest) % len(_LINES)],
        )
        for v, h, rest in zip(variants, hues, rests, strict=True)
    ]


def _own_controls(axes: "Axes", scenario: Scenario, variants: Sequence[Variant]) -> None:
    """Draw the controls of each variant in its row, where they are not one for all."""
    for name, color in _CONTROLS.items():
        levels = {y: fmean(own.values()) for y, v in enumerate(variants) if (own := getattr(v, name))}
        if levels and not scenario.control(name):
            label = f"{CONTROL_NAMES[name]}, of each its own"
            axes.plot(list(levels.values()), list(levels), "d", color=color, fillstyle="none", label=label)


def _controls(axes: "Axes", scenario: Scenario, *, vertical: bool) -> None:
    """Draw the controls that are one for all; one that lies far off is told in the legend and squeezes nothing."""
    limits = axes.get_xlim() if vertical else axes.get_ylim()
    span = max(limits) - min(limits)
    for name, color in _CONTROLS.items():
        if values := scenario.control(name):
            level = fmean(values.values())
            draw = axes.axvline if vertical else axes.axhline
            near = min(limits) - span / 2 <= level <= max(limits) + span / 2
            draw(
                level if near else math.nan,
                color=color, linestyle=(0, (4, 2)), linewidth=1.2,
                label=f"{CONTROL_NAMES[name]} {level:.1%}" + ("" if near else " (outside)"),
            )  # fmt: skip
