"""The figure of the worst case: what ascent found for each module, beside what the gradient alone promises."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.parts import FRAME_COLOR, GUIDE_COLOR, MARGIN, NAME_SIZE, NOTE_SIZE, dot, framed
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["worst_case_rows"]

_FOUND, _FIRST = "#0072B2", "#8A8A8A"
_COLUMNS = ("layer", "worst_case", "smallest_restart", "first_order", "status")
_SPAN = 30  # a factor between values from which on the axis is logarithmic
_ROOM = 0.06  # beside the points, as a share of their range

# Inches.
_WIDTH, _HEIGHT, _ROW_HEIGHTS, _AXIS_HEIGHT = 3.9, 7.0, (0.135, 0.2), 0.45


def worst_case_rows(table: "pd.DataFrame", *, quantity: str, title: str) -> "Figure":
    """Plot the worst case of each module as a dot, a row each, in the order of the table.

    The line goes from the restart that found least to the one that found most, which is the dot. The diamond is the
    first order. Where values differ by more than a factor of 30, the axis is logarithmic, and what is 0 is said in
    words, as is what was not measured.

    Args:
        table: one row per module, with the columns ``layer``, ``worst_case``, ``smallest_restart``, ``first_order``
            (NaN: there is none) and ``status``.
        quantity: what was raised, with its unit, below the axis.
        title: shown above the figure.

    Raises:
        ProtocolError: a column is missing, or no module has a worst case.
    """
    for column in _COLUMNS:
        if column not in table.columns:
            raise ProtocolError(
                f"The table of worst cases has no column {column!r}; it has {', '.join(map(str, table.columns))}; "
                f"expected {', '.join(_COLUMNS)}."
            )
    if not table["worst_case"].notna().any():
        raise ProtocolError("No module has a worst case, so there is nothing to plot. Measure other layers.")
    values = table[["worst_case", "smallest_restart", "first_order"]].to_numpy("float64")
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    logarithmic = positive.size > 0 and positive.max() > _SPAN * positive.min()
    names = [shown(layer) for layer in table["layer"]]
    with figure_style():
        height = min(max(_HEIGHT / len(table), _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
        name_size = min(0.72 * 72 * height, NAME_SIZE)
        left = MARGIN + max(text_width(name, name_size) for name in names) + 0.06
        has_first = bool(table["first_order"].notna().any())
        figure, (axes,) = framed((_WIDTH, (len(table) + 0.4) * height), left, _AXIS_HEIGHT, title, _handles(has_first))
        _prepare(axes, names, name_size, finite, logarithmic)
        axes.set_xlabel(quantity)
        for y, row in enumerate(table.to_dict("records")):
            _draw_row(axes, y, row, logarithmic)
    return figure


def _handles(has_first: bool) -> list["Line2D"]:
    from matplotlib.lines import Line2D

    found = Line2D([], [], color=_FOUND, marker="o", linewidth=1.3, label="found: from the least to the best restart",
                   **dot("o"))  # fmt: skip
    first = Line2D([], [], linestyle="", color=_FIRST, marker="D", label="first order", **dot("D"))
    return [found, first] if has_first else [found]


def _prepare(axes: "Axes", names: list[str], size: float, finite: np.ndarray, logarithmic: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(len(names) - 0.3, -0.7)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(axis="y", length=0, pad=4)
    axes.hlines(range(len(names)), 0, 1, transform=axes.get_yaxis_transform(), color=GUIDE_COLOR, linewidth=0.5)
    if logarithmic:
        low, high = float(finite[finite > 0].min()), float(finite.max())
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


def _draw_row(axes: "Axes", y: int, row: dict[object, Any], logarithmic: bool) -> None:
    found, least, first = (float(row[name]) for name in ("worst_case", "smallest_restart", "first_order"))
    if not math.isfinite(found) or (logarithmic and found <= 0):
        text = _in_words(found, str(row["status"]))
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(0.01, y, text, transform=axes.get_yaxis_transform(), fontsize=NOTE_SIZE, va="center_baseline",
                  color=_FIRST, gid="in words", bbox=paper)  # fmt: skip
        return
    start = max(least, axes.get_xlim()[0]) if logarithmic else least
    axes.plot([start, found], [y, y], color=_FOUND, linewidth=1.3, zorder=3, gid="restarts")
    if math.isfinite(first) and (first > 0 or not logarithmic):
        axes.plot(first, y, "D", color=_FIRST, **dot("D"), zorder=4, gid="first order")
    axes.plot(found, y, "o", color=_FOUND, **dot("o"), zorder=5, gid="found")


def _in_words(found: float, status: str) -> str:
    """Return what is written in place of a dot."""
    if status == "no_norm":
        return "not measured: its parameters are 0"
    if math.isnan(found):
        return f"not measured: {shown(status)}"
    return f"{found:.2g}" if math.isfinite(found) else "not finite"
