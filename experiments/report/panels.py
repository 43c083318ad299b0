"""Every variant by itself, in small panels of one scale: its peers, who agrees with whom, and its calibration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.analysis.statistics import mean
from experiments.analysis.variants import Variant, best_first
from experiments.report.agreement import agreement, reliability
from experiments.report.figure_style import COLORS, Figure, Table, legend, percent, small_panels

_FEW_PEERS = 24
_MOST_WRITTEN = 10  # rows of a matrix with its numbers written into it


def dumbbells(variants: Sequence[Variant]) -> Figure:
    """Draw every peer before and after, averaged over seeds, and what it reaches by itself."""
    tables = [_peers(variant) for variant in best_first(variants)]
    names = list(dict.fromkeys(row["peer"] for table in tables for row in table))
    labels = [_with_model(name, tables) for name in names]
    few = len(names) <= _FEW_PEERS
    row = (0.2 if len(tables) == 1 else 0.14) if few else 0.05
    canvas, panels = small_panels(
        [table[0]["variant"] for table in tables], height=0.25 + row * len(names), columns=2,
        left=0.25 + 0.065 * max(map(len, labels)) if few else 0.3,
    )  # fmt: skip
    size = 4 if few else 2
    for axes, table in zip(panels, tables, strict=True):
        for gained, color in ((True, COLORS[2]), (False, COLORS[1])):
            some = [p for p in table if (p["after"] >= p["before"]) is gained]
            places = [names.index(p["peer"]) for p in some]
            axes.hlines(places, [p["before"] for p in some], [p["after"] for p in some], color=color, lw=2, alpha=0.6)
            text = "after" if gained else "after, lower"
            axes.plot([p["after"] for p in some], places, "o", color=color, markersize=size, label=text if some else "")
        everyone = [names.index(p["peer"]) for p in table]
        axes.plot([p["before"] for p in table], everyone, "o", color="0.45", markersize=size, label="before", zorder=1)
        if any(math.isfinite(p["isolated"]) for p in table):
            axes.plot([p["isolated"] for p in table], everyone, "|", color="black", markersize=8, label="isolated")
    panels[0].set_yticks(range(len(names)) if few else [], labels if few else None)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    percent(panels[0].xaxis, steps=4)
    canvas.supxlabel("test accuracy", fontsize=8, y=0.45 / canvas.get_figheight())
    legend(canvas, panels)
    caption = "Every peer, averaged over seeds; the best variant comes first. Orange: the peer lost."
    return Figure("peers", "Every peer before and after", caption, canvas, [row for table in tables for row in table])


def agreements(variants: Sequence[Variant]) -> Figure | None:
    """Draw on how much of the proxy set every two peers have the same top class, under the first seed that tells."""
    found = []
    for variant in best_first(variants):
        told = next(((run.seed, *known) for run in variant.runs.values() if (known := agreement(run))), None)
        if told:
            found.append((variant.label, *told))
    if not found:
        return None
    alone = len(found) == 1
    means = [(matrix.sum() - len(names)) / (len(names) * (len(names) - 1)) for _, _, names, matrix in found]
    titles = [f"{name}\n{level:.0%}" for (name, *_), level in zip(found, means, strict=True)]
    canvas, panels = small_panels(titles, height=3.6 if alone else 1.3, columns=3, sharex=False, sharey=False)
    table: Table = []
    for axes, (label, seed, names, matrix) in zip(panels, found, strict=True):
        axes.grid(visible=False)
        image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        if len(names) <= _MOST_WRITTEN:
            for i in range(len(names)):
                for j in range(len(names)):
                    color = "black" if matrix[i, j] > 0.6 else "white"
                    size = 8 if alone else min(6.0, 36 / len(names))
                    axes.text(j, i, f"{100 * matrix[i, j]:.0f}", ha="center", va="center", fontsize=size, color=color)
        short = [name.removeprefix("peer-") for name in names] if len(names) <= _MOST_WRITTEN else []
        axes.set_xticks(range(len(short)), short)
        axes.set_yticks(range(len(short)), short)
        table += [
            {"variant": label, "seed": seed, "first": a, "second": b, "agreement": float(matrix[i, j])}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
        ]
    height = canvas.get_figheight()
    bar = canvas.colorbar(image, cax=canvas.add_axes((0.2, 0.42 / height, 0.6, 0.1 / height)), orientation="horizontal")
    bar.ax.tick_params(labelsize=7)
    percent(bar.ax.xaxis)
    caption = (
        "Share of the proxy set, in %, on which two peers have the same top class in their last knowledge, under the "
        "first seed that left it readable; above each panel the mean over all pairs. A variant is absent where mail "
        "was sealed or weights travelled."
    )
    return Figure("agreement", "Who agrees with whom", caption, canvas, table)


def reliabilities(variants: Sequence[Variant]) -> Figure | None:
    """Draw accuracy by confidence before and after, over all peers and seeds."""
    found = [(v.label, bins) for v in best_first(variants) if (bins := reliability(v.runs.values()))]
    if not found:
        return None
    alone = len(found) == 1
    titles = [
        label + "\nECE " + " → ".join(f"{bins[when].ece:.3f}" for when in ("before", "after") if when in bins)
        for label, bins in found
    ]
    canvas, panels = small_panels(titles, height=3.6 if alone else 1.3, columns=3, left=0.55)
    table: Table = []
    for axes, (label, both) in zip(panels, found, strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
        for (when, bins), color in zip(both.items(), ("0.45", COLORS[0]), strict=False):
            size = 5 if alone else 2.5
            axes.plot(bins.confidence, bins.accuracy, "o-", color=color, markersize=size, linewidth=1.2, label=when)
            table += [
                {"variant": label, "when": when, "confidence": c, "accuracy": a, "samples": n}
                for c, a, n in zip(bins.confidence, bins.accuracy, bins.samples, strict=True)
            ]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_aspect("equal")
    percent(panels[0].xaxis, steps=5 if alone else 2)
    if not alone:
        panels[0].set_xticks((0.25, 0.5, 0.75))  # those at the edges would run into the next panel's
    percent(panels[0].yaxis, steps=5 if alone else 2)
    canvas.supxlabel("confidence of the top class", fontsize=8, y=0.4 / canvas.get_figheight())
    canvas.supylabel("accuracy", fontsize=8)
    legend(canvas, panels)
    caption = (
        "Test samples of all peers and seeds in bins of their confidence; the best variant comes first. Below the "
        "diagonal a model is too sure of itself. The ECE here is that of the pooled bins, not the peers' mean."
    )
    return Figure("reliability", "Is confidence worth what it says?", caption, canvas, table)


def _peers(variant: Variant) -> Table:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in variant.runs.values():
        for peer in run.summary["peers"]:
            found.setdefault(peer["peer"], []).append(peer)
    rows: Table = []
    for name, entries in found.items():
        before, after = (
            mean([math.nan if e[what] is None else e[what] for e in entries]).value for what in ("before", "after")
        )
        row = {"variant": variant.label, "peer": name, "model": entries[0]["model"], "before": before, "after": after}
        rows.append({**row, "isolated": variant.isolated_by_peer.get(name, math.nan)})
    return rows


def _with_model(name: str, tables: Sequence[Table]) -> str:
    """Return a peer's name, with its model where that is the same in all variants."""
    models = {row["model"] for table in tables for row in table if row["peer"] == name}
    return f"{name} {models.pop()}" if len(models) == 1 else name
