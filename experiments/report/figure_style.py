"""What all figures of a report share: their size, colours, axes and legends."""

import math
import textwrap
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
_TALL = 11.0  # inches


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

    @property
    def tall(self) -> bool:
        """Tell whether it would fill more than a screen."""
        return bool(self.canvas.get_figheight() > _TALL)


def new_axes(rows: int, columns: int, *, height: float) -> "tuple[Canvas, list[Axes]]":
    """Return a figure of a report's width with its panels, row by row."""
    canvas = _canvas(height, layout="constrained")
    flat = list(canvas.subplots(rows, columns, squeeze=False, sharey=columns > 1).flat)
    for axes in flat:
        _plain(axes, size=8)
        axes.xaxis.label.set_size(9)
    return canvas, flat


def small_panels(
    titles: Sequence[str], *, height: float, columns: int, left: float = 0.45, sharex: bool = True, sharey: bool = True
) -> "tuple[Canvas, list[Axes]]":
    """Return a figure with a small panel for each title.

    Its layout is fixed: to find one that fits would take seconds for dozens of panels.

    Args:
        titles: above the panels.
        height: of a panel, in inches.
        columns: panels side by side, if there are that many.
        left: room for the labels of the first column, in inches.
        sharex: one scale for all panels, with its numbers below the lowest.
        sharey: likewise, with its numbers at the first column.
    """
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    width = (_WIDTH - left) / columns
    folds = [
        "\n".join(textwrap.fill(line, int(18 * width), break_on_hyphens=False) for line in title.splitlines())
        for title in titles
    ]
    above = 0.1 + 0.12 * max(fold.count("\n") + 1 for fold in folds) + (0 if sharex else 0.14)
    bottom, total = 0.85, rows * (height + above) + 0.85
    canvas = _canvas(total)
    grid = canvas.subplots(
        rows, columns, squeeze=False, sharex=sharex, sharey=sharey,
        gridspec_kw={
            "left": left / _WIDTH, "right": 0.96, "bottom": bottom / total, "top": 1 - above / total,
            "hspace": above / height, "wspace": 0.18,
        },
    )  # fmt: skip
    flat = list(grid.flat)
    for axes, title in zip(flat, folds, strict=False):
        _plain(axes, size=7)
        axes.set_title(title, fontsize=7, pad=3)
    for axes in flat[len(titles) :]:
        axes.set_visible(False)
        flat[flat.index(axes) - columns].xaxis.set_tick_params(labelbottom=True)
    return canvas, flat[: len(titles)]


def _canvas(height: float, layout: str | None = None) -> "Canvas":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(canvas)
    return canvas


def _plain(axes: "Axes", *, size: int) -> None:
    axes.tick_params(labelsize=size)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def percent(axis: Any, *, steps: int = 5) -> None:
    """Write an axis in per cent, in so many steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=steps))
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
    place = "lower center" if canvas.get_layout_engine() is None else "outside lower center"
    if found:
        canvas.legend(list(found.values()), list(found), loc=place, ncols=columns, frameon=False, fontsize=8)


def rows_of(names: Sequence[str], axes: "Axes") -> None:
    """Label the y-axis with one name per row, the first on top."""
    axes.set_yticks(range(len(names)), [folded(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def folded(text: str) -> str:
    """Break a long label between its parts, in two lines."""
    parts = text.split(" · ")
    if len(text) <= _LONGEST_LABEL or len(parts) == 1:
        return text
    cut = min(range(1, len(parts)), key=lambda n: abs(len(" · ".join(parts[:n])) - len(text) / 2))
    return " · ".join(parts[:cut]) + "\n" + " · ".join(parts[cut:])


def amount(axes: "Axes", what: str) -> None:
    """Prepare the x-axis: bytes are logarithmic, with units; rounds are whole numbers."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    if what != "bytes":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=what != "seconds"))
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 3.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
