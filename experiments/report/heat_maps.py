"""The heat maps of a report: differences, accuracy over two settings, and what peers chose."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from experiments.analysis.settings import config_of, label
from experiments.analysis.statistics import Comparison
from experiments.analysis.variants import Scenario, Variant, differing
from experiments.report.figure_style import Figure, folded, new_axes

_MOST_WRITTEN = 10  # rows of a matrix with its numbers written into it


def differences(scenario: Scenario, pairs: Sequence[Comparison]) -> Figure:
    """Draw the difference of every two variants; a frame marks what is larger than seed noise."""
    names = [variant.label for variant in scenario.variants if variant.runs]
    matrix = np.full((len(names), len(names)), np.nan)
    canvas, (axes,) = new_axes(1, 1, height=1.4 + (0.36 if len(names) <= _MOST_WRITTEN else 0.24) * len(names))
    axes.grid(visible=False)
    for pair in pairs:
        i, j = names.index(pair.first), names.index(pair.second)
        matrix[i, j], matrix[j, i] = 100 * pair.difference, -100 * pair.difference
    top = float(np.nanmax(np.abs(matrix))) if np.isfinite(matrix).any() else 1.0
    image = axes.imshow(matrix, cmap="RdBu", vmin=-(top or 1.0), vmax=top or 1.0, aspect="auto")
    size = min(8.0, 60 / len(names))
    telling = {(p.first, p.second) for p in pairs if p.larger_than_noise}
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            marked = (a, b) in telling or (b, a) in telling
            if len(names) <= _MOST_WRITTEN and np.isfinite(matrix[i, j]):
                light = abs(matrix[i, j]) > 0.6 * top
                weight = "bold" if marked else "normal"
                digits = 1 if abs(matrix[i, j]) < 9.95 else 0
                axes.text(j, i, f"{matrix[i, j]:+.{digits}f}", ha="center", va="center", fontsize=size, weight=weight,
                          color="white" if light else "black")  # fmt: skip
            if marked:
                axes.add_patch(_frame(j, i))
    axes.set_xticks(range(len(names)), [str(i + 1) for i in range(len(names))], fontsize=8 if len(names) <= 12 else 5)
    axes.set_yticks(range(len(names)), [f"{folded(name)}  {i + 1}" for i, name in enumerate(names)])
    bar = canvas.colorbar(image, ax=axes, shrink=0.9)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("row minus column, points", size=8)
    table = [{**vars(pair), "verdict": pair.verdict} for pair in pairs]
    caption = (
        "Final accuracy of the row minus that of the column, in points, paired by seed. Framed: larger than seed noise "
        "(paired t-test, p < 0.05 after Holm's correction over all pairs here)."
    )
    return Figure("differences", "Which differences are larger than seed noise", caption, canvas, table)


def parameter_maps(scenario: Scenario) -> list[Figure]:
    """Draw final accuracy over two numbers that were varied together, a map for each setting of all the rest."""
    variants = [variant for variant in scenario.variants if variant.runs]
    keys = differing(variants)
    numbers = [key for key in keys if type(variants[0].settings[key]) in (int, float)]
    groups: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(tuple(variant.settings[k] for k in keys if k not in numbers), []).append(variant)
    figures: list[Figure] = []
    for members in groups.values():
        varied = [key for key in differing(members) if key in numbers]
        if len(varied) == 2 and all(len({v.settings[key] for v in members}) > 1 for key in varied):
            figures.append(_map(members, *varied, number=len(figures)))
    return figures


def _map(members: Sequence[Variant], down: str, across: str, *, number: int) -> Figure:
    ups, acrosses = (sorted({float(v.settings[key]) for v in members}) for key in (down, across))
    matrix = np.full((len(ups), len(acrosses)), np.nan)
    for v in members:
        place = ups.index(float(v.settings[down])), acrosses.index(float(v.settings[across]))
        matrix[place] = fmean(v.finals().values())
    canvas, (axes,) = new_axes(1, 1, height=1.6 + 0.5 * len(ups))
    axes.grid(visible=False)
    image = axes.imshow(matrix, cmap="viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
    for (i, j), value in np.ndenumerate(matrix):
        if math.isfinite(value):
            color = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.1%}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(acrosses)), [f"{value:g}" for value in acrosses])
    axes.set_yticks(range(len(ups)), [f"{value:g}" for value in ups])
    axes.set(xlabel=across, ylabel=down)
    canvas.colorbar(image, ax=axes, shrink=0.9)
    table = [
        {down: v.settings[down], across: v.settings[across], "seed": seed, "accuracy": accuracy}
        for v in members
        for seed, accuracy in v.finals().items()
    ]
    rest = label(
        members[0].settings, [key for key in ("divergence", "strategy", "regime") if key in members[0].settings]
    )
    name = "map" if number == 0 else f"map-{number + 1}"
    caption = f"Final accuracy, mean of the peers and over seeds: {rest}."
    return Figure(name, f"A map of {down} and {across}", caption, canvas, table)


def chosen_map(variant: Variant, number: int) -> Figure | None:
    """Draw how many peers chose which temperature and weight; None where nothing was chosen.

    Args:
        variant: of the regime ``tuned``.
        number: of the figure, from 1.
    """
    found = [
        (float(peer["temperature"]), float(peer["kd_weight"]), run.seed, peer["peer"])
        for run in variant.runs.values()
        for peer in run.summary["peers"]
        if run.settings["regime"] == "tuned" and None not in (peer["temperature"], peer["kd_weight"])
    ]
    if not found:
        return None
    temperatures, weights = (sorted({entry[i] for entry in found}) for i in (0, 1))
    counts = np.zeros((len(temperatures), len(weights)))
    for temperature, weight, _, _ in found:
        counts[temperatures.index(temperature), weights.index(weight)] += 1
    canvas, (axes,) = new_axes(1, 1, height=1.6 + 0.45 * len(temperatures))
    axes.grid(visible=False)
    axes.imshow(counts, cmap="Blues", aspect="auto", origin="lower")
    for (i, j), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 2 else "black"
        axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(weights)), [f"{value:g}" for value in weights])
    axes.set_yticks(range(len(temperatures)), [f"{value:g}" for value in temperatures])
    axes.set(xlabel="weight of the distillation loss, α", ylabel="temperature, T")
    given = config_of(variant.settings)
    usual = sum((t, w) == (given.temperature, given.distillation_weight) for t, w, _, _ in found)
    caption = (
        f"How many peers, over all seeds, chose which pair on held-out private data: “{variant.label}”. "
        f"{len(found) - usual} of {len(found)} did not choose the run's own default."
    )
    table = [{"temperature": t, "kd_weight": w, "seed": seed, "peer": peer} for t, w, seed, peer in found]
    return Figure(
        "chosen" if number == 1 else f"chosen-{number}", "Best temperature and weight", caption, canvas, table
    )


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.6)
