"""Squares of a heat map: coloured by a scale, with numbers in them, hatched where nothing was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit.figures.palette import readable_on
from layercrit.figures.style import text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

__all__ = [
    "COLOR_MAPS",
    "FILLED",
    "NOT_MEASURED",
    "NUMBER_SIZES",
    "Scale",
    "Squares",
    "draw_color_bar",
    "draw_squares",
    "number_size",
]

Array = npt.NDArray[np.float64]

# Even steps to the eye, also without colours; colours of Cynthia Brewer's PuOr and BuPu (colorbrewer2.org), told apart
# with any common colour blindness: purple is more, orange less.
COLOR_MAPS = {"criticality": "viridis", "difference": "PuOr", "spread": "BuPu"}

NOT_MEASURED: dict[str, Any] = {"facecolor": "#E3E3E3", "edgecolor": "#A8A8A8", "hatch": "/////"}
NUMBER_SIZES = (3.8, 6.5)  # smaller numbers than that are left out
FILLED = 0.9  # of a square's width, by its widest number
_LEADING = 1.1  # from one line of a number to the next, in sizes of its font


@dataclass(frozen=True)
class Scale:
    """How values are shown as colours and numbers.

    Attributes:
        color_map: its name in matplotlib.
        low: the value of its first colour.
        high: the value of its last colour.
        ticks: how many numbers the colour bar has.
        decimals: of numbers, in percent.
        signed: whether positive numbers get a sign, too.
        unit: of numbers.
        summary: what is written of a row or a column of values.
    """

    color_map: str
    low: float
    high: float
    ticks: int
    decimals: int = 0
    signed: bool = False
    unit: str = "%"
    summary: str = "mean ± SD"

    def colors(self, values: Array) -> Array:
        """Return red, green, blue and alpha in [0, 1], ``(n_values, 4)``."""
        from matplotlib import colormaps

        return np.asarray(colormaps[self.color_map]((values - self.low) / (self.high - self.low)))

    def number(self, value: float) -> str:
        """Return what is written for a value."""
        return _signed(f"{100 * value:+.{self.decimals}f}", self.signed)

    def spread(self, deviation: float) -> str:
        """Return what is written for a standard deviation; empty where it says nothing on this scale."""
        return f"{100 * deviation:.{self.decimals}f}"

    def tick(self, value: float) -> str:
        """Return what is written for a value at the colour bar, with all its digits."""
        return _signed(f"{100 * value:+g}", self.signed)


def _signed(number: str, positive: bool) -> str:
    """Write a number with a minus sign, or with a plus sign where that is wanted; zero has none."""
    if not float(number):
        return number[1:]
    return number.replace("-", "−") if number[0] == "-" or positive else number[1:]  # noqa: RUF001 (a minus sign)


@dataclass(frozen=True)
class Squares:
    """Values and the texts in their squares, ``(n_squares,)`` both."""

    values: Array
    written: Sequence[str]

    def widest(self, size: float) -> float:
        """Return the width in inches of the widest line that is written in letters of so many points."""
        lines = {line for text in self.written for line in text.split("\n")}
        return max(text_width(line, 10) for line in lines) * size / 10  # widths are in proportion, but for hinting


def number_size(widest: float, width: float, height: float) -> float:
    """Return the size of numbers in a square of so many inches, 0 where they have no room.

    Args:
        widest: width of the widest number in inches, in letters of one point.
        width: of the square.
        height: of the square, or of one line in it.
    """
    size = min(FILLED * width / widest if widest else math.inf, 0.66 * 72 * height, NUMBER_SIZES[1])
    return size if size >= NUMBER_SIZES[0] * (1 - 1e-9) else 0.0


def draw_squares(
    axes: "Axes",
    place: tuple[Array, Array],
    size: tuple[float, float],
    squares: Squares,
    scale: Scale,
    number_size: float,
    gid: str,
) -> None:
    """Plot squares at ``place`` (their left and lower edges) with their texts; hatched without a value."""
    from matplotlib.collections import PolyCollection

    left, bottom = place
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * size
    outlines = np.stack([left, bottom], axis=1)[:, None, :] + corners  # (n_squares, 4, 2)
    known = np.isfinite(squares.values)
    colors = scale.colors(squares.values)
    edges: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.4}
    filled = PolyCollection(list(outlines[known]), facecolors=colors[known], gid=gid, **edges)
    axes.add_collection(filled, autolim=False)
    if not known.all():
        absent = PolyCollection(list(outlines[~known]), gid=f"{gid}, not measured", linewidths=0.4, **NOT_MEASURED)
        axes.add_collection(absent, autolim=False)
    if not number_size:
        return
    middles = np.stack([left + size[0] / 2, bottom + size[1] / 2], axis=1)  # (n_squares, 2)
    places: dict[str, list[int]] = {}
    for index in known.nonzero()[0].tolist():
        if squares.written[index]:
            places.setdefault(squares.written[index], []).append(index)
    for number, indices in places.items():
        _draw_number(axes, number, middles[indices], [readable_on(colors[i]) for i in indices], number_size, gid)


def _draw_number(axes: "Axes", number: str, middles: Array, colors: Sequence[str], size: float, gid: str) -> None:
    """Write one number in the middle of squares, ``(n_squares, 2)``, in the colour of each.

    Its outlines are drawn, not a text for each square: a map has thousands of squares and a hundred numbers.
    """
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import Affine2D

    numbers = PathCollection(
        [_outlines(number, size)],
        offsets=middles,
        offset_transform=axes.transData,
        facecolors=colors,
        linewidths=0,
        gid=gid,
        label=number,
    )
    numbers.set_transform(Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans)
    axes.add_collection(numbers, autolim=False)


@cache
def _outlines(number: str, size: float) -> "Path":
    """Return the outlines of a number around its middle, in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    font, lines = FontProperties(size=size), number.split("\n")
    lowest = -_digit_height(size) / 2 - (len(lines) - 1) * _LEADING * size / 2
    return Path.make_compound_path(
        *(
            TextPath((-36 * text_width(line, size), lowest + i * _LEADING * size), line, prop=font)
            for i, line in enumerate(reversed(lines))
        )
    )


@cache
def _digit_height(size: float) -> float:
    """Return the height of digits in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), "0", prop=FontProperties(size=size)).get_extents().height)


def draw_color_bar(figure: "Figure", place: tuple[float, float, float, float], scale: Scale, font_size: float) -> None:
    """Plot what the colours of a scale stand for; ``place`` is left, bottom, width and height, shares of the figure."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(scale.low, scale.high), scale.color_map),
        cax=figure.add_axes(place, label="colours"),
        orientation="horizontal",
    )
    ticks = np.linspace(scale.low, scale.high, scale.ticks)
    bar.set_ticks(ticks.tolist(), labels=[scale.tick(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=font_size, length=2, width=0.5, pad=1.5)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # without, many viewers show gaps
