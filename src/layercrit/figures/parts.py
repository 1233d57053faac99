"""The parts of the figures of many models: a frame with title, notes and legend, axes, markers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProtocolError, near
from layercrit.figures.categories import Category, shown
from layercrit.figures.style import text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "BASELINE",
    "BASELINE_LINE",
    "FRAME_COLOR",
    "GUIDE_COLOR",
    "MARGIN",
    "NAME_SIZE",
    "NOTE_SIZE",
    "baseline_mean",
    "baseline_of",
    "dot",
    "framed",
    "handles_of",
    "line_handle",
    "percent_axis",
]

BASELINE = "baseline"
GUIDE_COLOR, FRAME_COLOR = "#E4E4E4", "#8A8A8A"
BASELINE_LINE: dict[str, Any] = {"color": "#333333", "linewidth": 0.7, "linestyle": "--"}
MARGIN = 0.1  # inches
NAME_SIZE, NOTE_SIZE = 7.5, 7.0  # points

# Inches.
_TITLE_HEIGHT, _LINE_HEIGHT = 0.24, 0.15
_LEGEND_MARKER = 0.36  # a marker in the legend and the room around it

_TITLE_SIZE, _MARKER_SIZE = 9.5, 5.0  # points


def framed(
    size: tuple[float, float],
    left: float,
    below: float,
    title: str | None,
    handles: Sequence["Line2D"],
    notes: Sequence[str] = (),
    panels: Sequence[tuple[float, float, float, float]] = (),
    widest: float = 0,
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with axes, and with title, notes and legend above them.

    Args:
        size: width and height of the area of the axes, in inches, as are all lengths here.
        left: room beside the area.
        below: room below it.
        title: of the figure, or None.
        handles: entries of the legend.
        notes: lines of text.
        panels: left and lower edge, width and height of each panel within the area. None: one fills it.
        widest: width of what else is above panels, from their left edge.
    """
    from matplotlib.figure import Figure

    labels = [str(handle.get_label()) for handle in handles]
    entry = max((text_width(label, NOTE_SIZE) for label in labels), default=0) + _LEGEND_MARKER
    title = shown(title) if title else ""
    columns = max(1, int((left + size[0] - MARGIN) // entry))
    legend = math.ceil(len(labels) / columns) * _LINE_HEIGHT + 0.06 * bool(labels)
    texts = [entry, text_width(title, _TITLE_SIZE, "bold"), *(text_width(note, NOTE_SIZE) for note in notes)]
    width = max(left + max(size[0], widest), MARGIN + max(texts)) + MARGIN
    notes_height = _LINE_HEIGHT * len(notes) + 0.04 * bool(notes)
    height = below + size[1] + legend + notes_height + _TITLE_HEIGHT * bool(title) + MARGIN
    figure = Figure(figsize=(width, height), dpi=100)
    axes: list[Axes] = []
    for x, y, panel_width, panel_height in panels or [(0, 0, *size)]:
        place = (left + x) / width, (below + y) / height, panel_width / width, panel_height / height
        axes.append(figure.add_axes(place, label=f"panel {len(axes)}"))
        axes[-1].spines[["top", "right"]].set_visible(False)
        axes[-1].spines[["left", "bottom"]].set_color(FRAME_COLOR)
    start, top = MARGIN / width, 1 - MARGIN / height
    style: dict[str, Any] = {"verticalalignment": "top", "horizontalalignment": "left"}
    if title:
        figure.text(start, top, title, fontsize=_TITLE_SIZE, fontweight="bold", gid="title", **style)
    top -= _TITLE_HEIGHT * bool(title) / height
    for index, note in enumerate(notes):
        figure.text(start, top - index * _LINE_HEIGHT / height, note, fontsize=NOTE_SIZE, gid="note", **style)
    if labels:
        figure.legend(
            handles,
            labels,
            ncols=columns,
            loc="upper left",
            bbox_to_anchor=(start, top - notes_height / height),
            borderaxespad=0,
            borderpad=0,
            columnspacing=1.0,
            frameon=False,
            fontsize=NOTE_SIZE,
            handlelength=1.4,
            handletextpad=0.4,
            labelspacing=0.35,
        )
    return figure, axes


def baseline_of(models: "pd.DataFrame", baseline: str | None) -> str | None:
    """Return the name of the baseline: the one asked for, the first model of category ``baseline``, or None."""
    if baseline is None:
        return next(iter(models.loc[(models["category"] == BASELINE).to_numpy(), "model"]), None)
    if baseline not in set(models["model"]):
        raise ProtocolError(f"The table has no model {baseline!r}. {near(baseline, map(str, models['model']))}")
    return baseline


def baseline_mean(models: "pd.DataFrame", baseline: str | None) -> float | None:
    """Return the baseline's mean criticality, None where there is none."""
    rows = models["model"] == baseline_of(models, baseline)
    found = [float(value) for value in models.loc[rows.to_numpy(), "criticality"]]
    return found[0] if found and math.isfinite(found[0]) else None


def handles_of(categories: Sequence[Category]) -> list["Line2D"]:
    """Return the legend's entries of categories. One alone needs none."""
    from matplotlib.lines import Line2D

    if len(categories) == 1:
        return []
    return [
        Line2D([], [], linestyle="", color=one.color, marker=one.marker, label=one.label, **dot(one.marker))
        for one in categories
    ]


def line_handle() -> "Line2D":
    """Return the legend's entry of the baseline's line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label="mean of the baseline", **BASELINE_LINE)


def dot(marker: str) -> dict[str, Any]:
    """Return size and edge of a marker; stars and the like are small for their nominal size."""
    size = {"*": 1.6, ".": 1.7, "D": 0.85, "P": 1.3, "X": 1.3}.get(marker, 1.0) * _MARKER_SIZE
    return {"markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.3}


def percent_axis(axis: "Axis", shares: npt.NDArray[np.float64], room: float) -> tuple[float, float]:
    """Prepare an axis for these shares, in percent, and return its limits, with some room at both ends.

    Args:
        axis: x or y.
        shares: what it has to show.
        room: at each end, as a share of their range.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = float(np.nanmin(shares)), float(np.nanmax(shares))
    beyond = room * (high - low) or 0.05
    low, high = low - beyond, high + beyond
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high)
    ticks = [tick for tick in ticks if max(low, -1e-9) <= tick <= min(high, 1 + 1e-9)]
    axis.set_ticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    axis.set_tick_params(length=2.5, width=0.6, color=FRAME_COLOR)
    return low, high
