"""The figures of a report, but for the heat maps. Each comes with the table of the numbers in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.canvas import COLORS, Figure, Table, amount, folded, legend, new_axes, percent
from experiments.evidence import reliability
from experiments.statistics import Price, mean, median
from experiments.study import Scenario, Variant, differing, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", ":", "-.")
_NAMES = {"round": "communication round", "bytes": "bytes exchanged by all peers, up and down"}
_MOST_LINES = 8  # in one panel


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
        percent(axes.yaxis)
        axes.set_title(folded(panel), fontsize=8)
        amount(axes, what)
    for axes in grid[-columns:]:
        axes.set_xlabel(_NAMES[what] if columns == 1 else what)
    canvas.supylabel("test accuracy, mean of the peers", fontsize=9)
    legend(canvas, grid)
    caption = "Mean over seeds; the band is its 95 % bootstrap interval over seeds."
    if what == "bytes":
        caption += " Bytes are those of the encoded arrays as they travel; round 0 sends the first knowledge."
    return Figure(f"accuracy-by-{what}", f"Accuracy by {what}", caption, canvas, table)


def finals(scenario: Scenario) -> Figure:
    """Draw final accuracy: the mean of the peers with its interval, every seed, and the worst peer."""
    variants = [variant for variant in scenario.variants if variant.runs]
    canvas, (axes,) = new_axes(1, 1, height=1.6 + 0.32 * len(variants))
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
    axes.set_yticks(range(len(variants)), [folded(variant.label) for variant in variants])
    axes.invert_yaxis()
    axes.set_xlabel("final test accuracy")
    percent(axes.xaxis)
    legend(canvas, [axes])
    caption = (
        "Dots: mean of the peers, averaged over seeds, with its 95 % bootstrap interval; ticks: every seed; "
        "triangles: the worst peer, averaged over seeds."
    )
    return Figure("final-accuracy", "Final accuracy", caption, canvas, table)


def to_target(prices: Mapping[str, Sequence[Price]], target: float) -> Figure | None:
    """Draw what every run paid until a target accuracy; what never reached it stands at the right edge.

    None if no run reached it: the table says so, and there is no scale to draw on.
    """
    if not any(math.isfinite(p.rounds) for paid in prices.values() for p in paid):
        return None
    names = [name for name in prices if prices[name]]
    canvas, panels = new_axes(2, 1, height=2.4 + 0.5 * len(names))
    table = [
        {"variant": name, "run": i, "rounds": p.rounds, "bytes": p.bytes, "seconds": p.seconds, "target": target}
        for name in names
        for i, p in enumerate(prices[name])
    ]
    for axes, what in zip(panels, ("rounds", "bytes"), strict=True):
        reached = [getattr(p, what) for name in names for p in prices[name] if math.isfinite(getattr(p, what))]
        top = max(reached, default=1.0)
        edge = top * (1.15 if what == "rounds" else 3) + (what == "rounds")
        for y, name in enumerate(names):
            values = [getattr(p, what) for p in prices[name]]
            inside = [v for v in values if math.isfinite(v)]
            axes.plot(inside, [y] * len(inside), "|", color=COLORS[0], markersize=9)
            middle = median(values)
            if math.isfinite(middle):
                axes.plot(middle, y, "o", color=COLORS[0])
            if missed := len(values) - len(inside):
                axes.plot(edge, y, "x", color=COLORS[1])
                note = f"{missed} of {len(values)}"
                axes.annotate(note, (edge, y), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
        if len(reached) < sum(map(len, prices.values())):
            axes.axvline(edge, color=COLORS[1], linestyle=":", linewidth=1)
        amount(axes, "bytes" if what == "bytes" else "round")
        if what == "rounds":
            axes.set_xlim(left=-0.3)
        axes.set_xlabel(f"{what} to {target:.0%}")
        axes.set_yticks(range(len(names)), [folded(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
    caption = (
        f"What a run spent until the mean of its peers reached {target:.1%}: dots are medians over seeds, ticks every "
        "seed. Crosses at the dotted line: not reached, and in how many runs; those count as infinite in the median."
    )
    return Figure("to-target", "Rounds and bytes to the target", caption, canvas, table)


def dumbbell(variant: Variant, isolated: Mapping[str, float]) -> Figure:
    """Draw every peer of a variant before and after, averaged over seeds, and what it reaches by itself."""
    peers = [{**peer, "isolated": isolated.get(peer["peer"], math.nan)} for peer in _peers(variant)]
    canvas, (axes,) = new_axes(1, 1, height=1.6 + 0.34 * len(peers))
    for y, peer in enumerate(peers):
        gained = peer["after"] >= peer["before"]
        color = COLORS[2] if gained else COLORS[1]
        axes.plot([peer["before"], peer["after"]], [y, y], color=color, linewidth=3, alpha=0.6, zorder=1)
        axes.plot(peer["before"], y, "o", color="0.45", label="before" if y == 0 else None)
        axes.plot(peer["after"], y, "o", color=color, label="after" if y == 0 else None)
        if math.isfinite(peer["isolated"]):
            axes.plot(peer["isolated"], y, "|", color="black", markersize=14, label="isolated" if y == 0 else None)
    axes.set_yticks(range(len(peers)), [f"{peer['peer']} ({peer['model']})" for peer in peers])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy")
    percent(axes.xaxis)
    legend(canvas, [axes])
    caption = f"Every peer under “{variant.label}”, averaged over seeds; green gained, orange lost."
    return Figure("peers", "Every peer before and after", caption, canvas, peers)


def reliability_diagram(variant: Variant) -> Figure | None:
    """Draw accuracy by confidence before and after, over all peers and seeds."""
    found = reliability(variant.runs.values())
    if len(found) == 0:
        return None
    canvas, (axes,) = new_axes(1, 1, height=3.9)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    table: Table = []
    for (name, bins), color in zip(found.items(), ("0.45", COLORS[0]), strict=False):
        axes.plot(bins.confidence, bins.accuracy, "o-", color=color, label=f"{name} (ECE {bins.ece:.3f})")
        table += [
            {"when": name, "confidence": c, "accuracy": a, "samples": n}
            for c, a, n in zip(bins.confidence, bins.accuracy, bins.samples, strict=True)
        ]
    axes.set(xlabel="confidence of the top class", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(canvas, [axes])
    caption = (
        f"“{variant.label}”: test samples of all peers and seeds in bins of their confidence. Below the diagonal a "
        "model is too sure of itself. The ECE here is that of the pooled bins, not the mean of the peers' own."
    )
    return Figure("reliability", "Is confidence worth what it says?", caption, canvas, table)


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


def _peers(variant: Variant) -> Table:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in variant.runs.values():
        for peer in run.summary["peers"]:
            found.setdefault(peer["peer"], []).append(peer)
    rows: Table = []
    for name, entries in found.items():
        numbers = {
            what: mean([math.nan if e[what] is None else e[what] for e in entries]).value
            for what in ("before", "after")
        }
        rows.append({"variant": variant.label, "peer": name, "model": entries[0]["model"], **numbers})
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


def _controls(axes: "Axes", scenario: Scenario, *, vertical: bool) -> None:
    """Draw the controls; one that lies far off is told in the legend and does not squeeze the rest."""
    limits = axes.get_xlim() if vertical else axes.get_ylim()
    span = max(limits) - min(limits)
    for values, text, color in ((scenario.isolated, "isolated", "0.3"), (scenario.pooled, "pooled", "#B00020")):
        if values:
            level = fmean(values.values())
            draw = axes.axvline if vertical else axes.axhline
            near = min(limits) - span / 2 <= level <= max(limits) + span / 2
            draw(
                level if near else math.nan,
                color=color, linestyle=(0, (4, 2)), linewidth=1.2,
                label=f"{text} {level:.1%}" + ("" if near else " (outside)"),
            )  # fmt: skip
