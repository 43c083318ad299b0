"""What all figures of a report share: their size, colours, axes and legends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Table = list[dict[str, Any]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4F24", "#000000")

_WIDTH = 4.8  # inches; at a phone's 390 pixels the letters can still be read
_LONGEST_LABEL = 20


@dataclass(frozen=True)
class Figure:
    """A picture with what a reader needs beside it.

    Attributes:
        name: of its files.
        title: above it.
        caption: what is seen, and how to read it.
        canvas: matplotlib's figure.
        table: the numbers in it.
    """

    name: str
    title: str
    caption: str
    canvas: "Canvas"
    table: Table


def new_axes(rows: int, columns: int, *, height: float) -> "tuple[Canvas, list[Axes]]":
    """Return a figure of a report's width with its panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(rows, columns, squeeze=False, sharey=columns > 1)
    flat = list(grid.flat)
    for axes in flat:
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return canvas, flat


def percent(axis: Any) -> None:
    """Write an axis in per cent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def legend(canvas: "Canvas", grid: "Sequence[Axes]") -> None:
    """Write one legend for all panels below a figure, and hide panels without data."""
    found: dict[str, Any] = {}
    for axes in grid:
        handles, texts = axes.get_legend_handles_labels()
        for handle, text in zip(handles, texts, strict=True):
            found.setdefault(text, handle)
    for axes in grid:
        if not axes.has_data():
            axes.set_visible(False)
    columns = 1 if any(len(text) > 34 for text in found) else 2 if any(len(text) > 14 for text in found) else 4
    if found:
        canvas.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
        )


def folded(text: str) -> str:
    """Break a long label between its parts, in two lines."""
    parts = text.split(" · ")
    if len(text) <= _LONGEST_LABEL or len(parts) == 1:
        return text
    cut = min(range(1, len(parts)), key=lambda n: abs(len(" · ".join(parts[:n])) - len(text) / 2))
    return " · ".join(parts[:cut]) + "\n" + " · ".join(parts[cut:])


def amount(axes: "Axes", what: str) -> None:
    """Prepare the x-axis for rounds (whole numbers) or for bytes (logarithmic, with units)."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    if what == "round":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 3.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
