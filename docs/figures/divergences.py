"""Draws each divergence and its gradient against the logit gap: `python docs/figures/divergences.py`.

Ten classes. The student's logits are the teacher's but for one class, whose logit is off by the gap; once this is the
teacher's first class, once its second, once the last. Values and gradients are those of the library.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedkd.losses import divergences

FOLDER = Path(__file__).parent / "divergences"
TEACHER = torch.tensor([4.0, 2.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0], dtype=torch.float64)
CLASSES = {"the teacher's first class": 0, "its second class": 1, "its last class": 9}
GAPS = torch.linspace(-10, 10, 401, dtype=torch.float64)
SWAPPED = [1, 0, *range(2, len(TEACHER))]
OPTIONS = {"cakd": {"strong": "top-k", "top_k": 2}}
COLOURS = ("#0b6e99", "#d9730d", "#8b5fbf")
TOGETHER = ("ce", "kl", "reverse_kl", "jeffreys", "js", "td", "sed")


class Curve(NamedTuple):
    """A divergence over the gaps, and its gradient in the logit that is off."""

    value: Tensor
    gradient: Tensor


def curve(name: str, off: int) -> Curve:
    """Return the divergence of that name where the logit of class ``off`` is off by each gap, at T = 1."""
    divergence = divergences.get(name)
    teacher = TEACHER.expand(len(GAPS), -1)
    student = teacher.clone()
    student[:, off] += GAPS
    student.requires_grad_()
    options = dict(OPTIONS.get(name, {}), temperature=1.0)
    if name == "dkd":
        options["labels"] = TEACHER.argmax().expand(len(GAPS))
    if divergence.multiway:  # two more teachers: one less sure, one of another opinion
        teacher = torch.stack([teacher, teacher / 2, teacher[:, SWAPPED]])
    value = divergence(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return Curve(value.detach(), gradient[:, off])


def one(name: str) -> Figure:
    """Draw one divergence: value on the left, gradient on the right, forward KL dashed."""
    figure, (left, right) = _panels(name)
    highest, steepest = 0.0, 0.0
    for (label, off), colour in zip(CLASSES.items(), COLOURS, strict=True):
        found, reference = curve(name, off), curve("kl", off)
        left.plot(GAPS, found.value, color=colour, label=label)
        right.plot(GAPS, found.gradient, color=colour)
        if name != "kl":
            dashed = {"color": colour, "linewidth": 0.9, "linestyle": (0, (4, 3)), "alpha": 0.6, "zorder": 1}
            left.plot(GAPS, reference.value, **dashed)
            right.plot(GAPS, reference.gradient, **dashed)
        highest = max(highest, float(found.value.max()))
        steepest = max(steepest, float(found.gradient.abs().max()))
    if name != "kl":
        left.plot([], [], color="0.5", linewidth=0.9, linestyle=(0, (4, 3)), label="kl")
    left.set_ylim(-0.03 * highest, 1.05 * highest)
    right.set_ylim(-1.1 * steepest, 1.1 * steepest)
    left.legend(frameon=False, fontsize="small", title="logit off by the gap", title_fontsize="small")
    return figure


def together() -> Figure:
    """Draw the divergences of a pair, all for the teacher's first class, each over its gradient at a small gap.

    So scaled they agree near zero, and what is left is their shape far from it.
    """
    figure, (left, right) = _panels("scaled to one slope near zero")
    near = int((GAPS - 0.05).abs().argmin())
    for name in TOGETHER:
        value, gradient = curve(name, 0)
        scale = float(curve("kl", 0).gradient[near] / gradient[near])
        value = value - value[len(GAPS) // 2]  # `ce` begins at the teacher's entropy
        style = {"linestyle": ":", "linewidth": 3} if name == "ce" else {}  # under `kl`
        left.plot(GAPS, scale * value, label=f"{name} × {scale:.2g}", **style)
        right.plot(GAPS, scale * gradient, **style)
    left.set_ylim(-0.15, 6)
    right.set_ylim(-0.8, 0.5)
    left.legend(frameon=False, fontsize="small")
    return figure


def _panels(title: str) -> tuple[Figure, tuple]:
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title=f"{title}: value", xlabel="logit gap, student − teacher")
    right.set(title="gradient in that logit", xlabel="logit gap, student − teacher")
    for axes in (left, right):
        axes.set_xticks(range(-10, 11, 5))
        axes.grid(alpha=0.25)
        axes.axvline(0, color="0.5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, (left, right)


def draw(folder: Path = FOLDER) -> None:
    """Write a figure per registered divergence, and one of them together."""
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Figure]] = {"together": together}
    makers |= {name: lambda name=name: one(name) for name in divergences.names()}
    with mpl.rc_context({"svg.hashsalt": "fedkd", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, make in makers.items():
            make().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw()
