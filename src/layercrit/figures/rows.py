"""Figures with a row for each layer of a model: names beside it, values along one axis below."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.parts import FRAME_COLOR, GUIDE_COLOR, MARGIN, NAME_SIZE, NOTE_SIZE, framed
from layercrit.figures.style import text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["WORDS_COLOR", "check_columns", "in_rows", "write_in_row"]

WORDS_COLOR = "#8A8A8A"

_SPAN = 30  # a factor between values from which on the axis is logarithmic
_ROOM = 0.06  # beside the points, as a share of their range

# Inches.
_WIDTH, _HEIGHT, _ROW_HEIGHTS, _AXIS_HEIGHT = 3.9, 7.0, (0.135, 0.2), 0.45


def check_columns(table: "pd.DataFrame", columns: Sequence[str], what: str) -> None:
    """Raise ProtocolError where a table lacks a column.

    Args:
        table: of the layers.
        columns: those that it must have.
        what: what it is of, for the message, such as ``worst cases``.
    """
    for column in columns:
        if column not in table.columns:
            raise ProtocolError(
                f"The table of {what} has no column {column!r}; it has {', '.join(map(str, table.columns))}; "
                f"expected {', '.join(columns)}."
            )


def in_rows(
    layers: Sequence[str],
    values: npt.NDArray[np.float64],
    *,
    quantity: str,
    title: str,
    handles: Sequence["Line2D"],
) -> tuple["Figure", "Axes"]:
    """Return a figure with an empty row for each layer, the first on top, and its axes.

    Where values differ by more than a factor of 30, the axis is logarithmic.

    Args:
        layers: their names.
        values: all that are to be shown, of any shape; those that are not finite do not count.
        quantity: what they are, with the unit, below the axis.
        title: shown above the figure.
        handles: entries of the legend.
    """
    names = [shown(layer) for layer in layers]
    height = min(max(_HEIGHT / len(names), _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
    size = min(0.72 * 72 * height, NAME_SIZE)
    left = MARGIN + max(text_width(name, size) for name in names) + 0.06
    figure, (axes,) = framed((_WIDTH, (len(names) + 0.4) * height), left, _AXIS_HEIGHT, title, handles)
    axes.set_ylim(len(names) - 0.3, -0.7)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(axis="y", length=0, pad=4)
    axes.hlines(range(len(names)), 0, 1, transform=axes.get_yaxis_transform(), color=GUIDE_COLOR, linewidth=0.5)
    _set_scale(axes, values[np.isfinite(values)])
    axes.set_xlabel(quantity)
    return figure, axes


def write_in_row(axes: "Axes", y: int, text: str) -> None:
    """Write a text in a row in place of a value."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.text(0.01, y, text, transform=axes.get_yaxis_transform(), fontsize=NOTE_SIZE, va="center_baseline",
              color=WORDS_COLOR, gid="in words", bbox=paper)  # fmt: skip


def _set_scale(axes: "Axes", finite: npt.NDArray[np.float64]) -> None:
    from matplotlib.ticker import MaxNLocator

    positive = finite[finite > 0]
    if positive.size > 0 and positive.max() > _SPAN * positive.min():
        low, high = float(positive.min()), float(finite.max())
        axes.set_xscale("log")
        room = (high / low) ** _ROOM
        axes.set_xlim(low / room, high * room)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(powers) < 5 else (1,)
        ticks = [step * 10.0**power for power in powers for step in steps]
        axes.set_xticks([], minor=True)
    else:
        low, high = float(finite.min(initial=0)), float(finite.max(initial=0))  # a rise may be below 0
        high = high if high > low else 1.0
        axes.set_xlim(low - _ROOM * (high - low), high + _ROOM * (high - low))
        ticks = list(MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high))
    ticks = [tick for tick in ticks if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])  # as texts, for formulas are not read
    axes.tick_params(axis="x", length=2.5, width=0.6, color=FRAME_COLOR, labelsize=NOTE_SIZE)
