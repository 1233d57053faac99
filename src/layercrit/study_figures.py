"""Figures of many models: criticality as a heat map, as a ranking, and against accuracy."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit._categories import (
    CATEGORY_COLORS,
    CATEGORY_MARKERS,
    Category,
    categories_of,
    check_models,
    labels_of,
    shown,
)
from layercrit._heat_map import heat_map
from layercrit._label_places import label_places
from layercrit.errors import ProtocolError, near
from layercrit.figures import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["CATEGORY_COLORS", "CATEGORY_MARKERS", "criticality_against_accuracy", "heat_map", "ranking"]

_BASELINE = "baseline"
_ROOM, _LABEL_ROOM = 0.06, 0.18  # beside the points, as shares of their range
_LABELLED = 20  # models up to which every point has its label
_LINE_COLOR, _GUIDE_COLOR, _FRAME_COLOR = "#333333", "#E4E4E4", "#8A8A8A"
_LEADER: dict[str, Any] = {"arrowstyle": "-", "color": _FRAME_COLOR, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2}

# Inches.
_MARGIN = 0.1
_RANKING_WIDTH, _RANKING_HEIGHT, _ROW_HEIGHTS = 3.6, 7.0, (0.135, 0.21)
_SCATTER_SIZE = (4.6, 3.5)
_TITLE_HEIGHT, _LINE_HEIGHT, _AXIS_HEIGHT = 0.24, 0.16, 0.45
_LEGEND_MARKER = 0.36  # a marker in the legend and the room around it

# Points.
_TITLE_SIZE, _NAME_SIZE, _NOTE_SIZE, _LABEL_SIZE = 9.5, 7.5, 7.0, 6.5
_LINE = 1.3  # height of a line of text, in sizes of its font
_MARKER_SIZE, _LARGEST_MARKER = 5.0, 7.0


def ranking(models: "pd.DataFrame", *, baseline: str | None = None, title: str | None = None) -> "Figure":
    """Draw a dot per model at its mean criticality, the least critical on top, with its interval.

    A model without a mean stands last, without a dot. Save the figure with `layercrit.figures.save_figure`.

    Args:
        models: One row per model: ``model`` (its name), ``label`` (None: its name), ``category`` (or None; decides the
            colour), ``criticality`` (mean over layers, in [0, 1]), ``low`` and ``high`` (its confidence limits; NaN:
            no bar).
        baseline: Name of the model whose mean is the vertical line. None: the first of category ``baseline``, if any.
        title: Stands above.

    Raises:
        ProtocolError: The table is empty, lacks a column or holds a model twice, no model has a mean, or the baseline
            is unknown.
    """
    check_models(models, ("model", "label", "category", "criticality", "low", "high"))
    line = _baseline_value(models, baseline)
    if not models["criticality"].notna().any():
        raise ProtocolError("No model has a mean criticality, so none can be ranked. Measure a model at least.")
    categories = categories_of(models)
    look = {row: category for category in categories for row in category.rows}
    order = [int(row) for row in np.argsort(models["criticality"].to_numpy("float64"), kind="stable")]  # NaN last
    ranked = models.iloc[order]
    labels = labels_of(ranked)
    with figure_style():
        height = min(max(_RANKING_HEIGHT / len(models), _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
        name_size = min(0.72 * 72 * height, _NAME_SIZE)
        left = _MARGIN + max(text_width(label, name_size) for label in labels) + 0.06
        handles = _handles(categories) + ([_line_handle()] if line is not None else [])
        size = (_RANKING_WIDTH, (len(models) + 0.4) * height)
        figure, axes = _framed(size, left, _AXIS_HEIGHT, title, handles, None)
        axes.set_ylim(len(models) - 0.3, -0.7)
        axes.set_yticks(range(len(models)), labels, fontsize=name_size)
        axes.tick_params(axis="y", length=0, pad=4)
        axes.hlines(range(len(models)), 0, 1, transform=axes.get_yaxis_transform(), color=_GUIDE_COLOR, linewidth=0.5)
        if line is not None:
            axes.axvline(line, color=_LINE_COLOR, linewidth=0.7, linestyle="--", zorder=1.5, gid="baseline")
        axes.set_xlim(_percent_axis(axes.xaxis, ranked[["criticality", "low", "high"]].to_numpy("float64"), _ROOM))
        axes.set_xlabel("mean criticality (%)")
        for y, (row, mean, low, high) in enumerate(
            zip(order, ranked["criticality"], ranked["low"], ranked["high"], strict=True)
        ):
            color = look[row].color
            if math.isfinite(low) and math.isfinite(high) and math.isfinite(mean):
                axes.hlines(y, low, high, color=color, linewidth=1.3, zorder=3, gid="interval")
            axes.plot(mean, y, look[row].marker, color=color, **_dot(look[row].marker), zorder=4, gid="mean")
    return figure


def _baseline_value(models: "pd.DataFrame", baseline: str | None) -> float | None:
    """Return the baseline's mean criticality, None where there is none."""
    if baseline is None:
        rows = models["category"] == _BASELINE
    else:
        rows = models["model"] == baseline
        if not rows.any():
            raise ProtocolError(f"The table has no model {baseline!r}. {near(baseline, map(str, models['model']))}")
    found = [float(value) for value in models.loc[rows.to_numpy(), "criticality"]]
    return found[0] if found and math.isfinite(found[0]) else None


def criticality_against_accuracy(
    models: "pd.DataFrame", *, rho: float | None = None, p_value: float | None = None, title: str | None = None
) -> "Figure":
    """Draw a point per model: its accuracy and its mean criticality.

    Up to 20 models have their labels beside them, moved away from each other; more are told apart by category only.
    Models without accuracy or criticality are counted below. Save the figure with `layercrit.figures.save_figure`.

    Args:
        models: One row per model: ``model`` (its name), ``label`` (None: its name), ``category`` (or None; decides
            colour and marker), ``accuracy`` and ``criticality`` (mean over layers), both shares in [0, 1].
        rho: Spearman's rank correlation of the two, written above; None or NaN: nothing is written.
        p_value: Of ``rho``; None or NaN: not known.
        title: Stands above.

    Raises:
        ProtocolError: The table is empty, lacks a column or holds a model twice, or no model has both numbers.
    """
    check_models(models, ("model", "label", "category", "accuracy", "criticality"))
    known = models[["accuracy", "criticality"]].notna().all(axis=1).to_numpy()
    if not known.any():
        raise ProtocolError(
            "No model has both an accuracy and a mean criticality, so there is no point to draw. Give the accuracy of "
            "a model at least."
        )
    # Of all models, so that those of another figure of the same table have the same colours.
    categories = [category for category in categories_of(models) if known[list(category.rows)].any()]
    points = models[["accuracy", "criticality"]].to_numpy("float64")
    n_absent, labelled = int((~known).sum()), known.sum() <= _LABELLED
    with figure_style():
        below = _AXIS_HEIGHT + _LINE_HEIGHT * bool(n_absent)
        figure, axes = _framed(_SCATTER_SIZE, 0.55, below, title, _handles(categories), _correlation(rho, p_value))
        axes.set_xlim(_percent_axis(axes.xaxis, points[known, 0], _LABEL_ROOM if labelled else _ROOM))
        axes.set_ylim(_percent_axis(axes.yaxis, points[known, 1], _ROOM))
        axes.set_xlabel("accuracy (%)")
        axes.set_ylabel("mean criticality (%)")
        for one in categories:
            x, y = points[[row for row in one.rows if known[row]]].T
            axes.plot(x, y, one.marker, color=one.color, **_dot(one.marker), zorder=3, gid=one.label)
        if labelled:
            _draw_labels(axes, points[known], labels_of(models[known]))
        if n_absent:
            note = f"not shown: {n_absent} without accuracy or criticality"
            place = (0, -(below - _MARGIN) / _SCATTER_SIZE[1])
            axes.text(*place, note, transform=axes.transAxes, fontsize=_NOTE_SIZE, color=_FRAME_COLOR)
    return figure


def _correlation(rho: float | None, p_value: float | None) -> str | None:
    if rho is None or not math.isfinite(rho):
        return None
    text = f"Spearman's ρ = {rho:.2f}".replace("-", "−")  # noqa: RUF001 (a minus sign)
    if p_value is None or not math.isfinite(p_value):
        return text
    return f"{text}, p < 0.001" if p_value < 0.001 else f"{text}, p = {p_value:.2g}"


def _draw_labels(axes: "Axes", points: npt.NDArray[np.float64], labels: Sequence[str]) -> None:
    """Write each label beside its point, with a thin line to it where it had to move further away."""
    size = 72 * np.array(_SCATTER_SIZE)
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    places = (points - limits[:, 0]) / (limits[:, 1] - limits[:, 0]) * size  # in points of the axes
    boxes = np.array([(72 * text_width(label, _LABEL_SIZE), _LINE * _LABEL_SIZE) for label in labels])
    middles, far = label_places(places, boxes, size, _LARGEST_MARKER)
    for label, place, middle, with_line in zip(labels, places, middles, far, strict=True):
        axes.annotate(
            label,
            place / size,
            middle / size,
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=_LABEL_SIZE,
            horizontalalignment="center",
            verticalalignment="center_baseline",
            arrowprops=_LEADER if with_line else None,
            gid="label",
        )


# --- shared parts ---------------------------------------------------------------------------------------------------


def _framed(
    size: tuple[float, float],
    left: float,
    below: float,
    title: str | None,
    handles: Sequence["Line2D"],
    note: str | None,
) -> tuple["Figure", "Axes"]:
    """Return a figure with axes of ``size`` inches, and the title, a note and the legend above each other on top."""
    from matplotlib.figure import Figure

    labels = [str(handle.get_label()) for handle in handles]
    widest = max((text_width(label, _NOTE_SIZE) for label in labels), default=0) + _LEGEND_MARKER
    title = shown(title) if title else ""
    room = left + size[0] - _MARGIN
    columns = max(1, int(room // widest))
    legend = math.ceil(len(labels) / columns) * _LINE_HEIGHT + 0.06 * bool(labels)
    note_height = _LINE_HEIGHT * bool(note)
    width = max(left + size[0], _MARGIN + widest, _MARGIN + text_width(title, _TITLE_SIZE, "bold")) + 0.15
    height = below + size[1] + legend + note_height + _TITLE_HEIGHT * bool(title) + _MARGIN
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((left / width, below / height, size[0] / width, size[1] / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FRAME_COLOR)
    start, top = _MARGIN / width, 1 - _MARGIN / height
    style: dict[str, Any] = {"verticalalignment": "top", "horizontalalignment": "left"}
    if title:
        figure.text(start, top, title, fontsize=_TITLE_SIZE, fontweight="bold", gid="title", **style)
    top -= _TITLE_HEIGHT * bool(title) / height
    if note:
        figure.text(start, top, note, fontsize=_NOTE_SIZE + 0.5, gid="note", **style)
    if labels:
        figure.legend(
            handles,
            labels,
            ncols=columns,
            loc="upper left",
            bbox_to_anchor=(start, top - note_height / height),
            borderaxespad=0,
            borderpad=0,
            columnspacing=1.0,
            frameon=False,
            fontsize=_NOTE_SIZE,
            handlelength=1.4,
            handletextpad=0.4,
            labelspacing=0.35,
        )
    return figure, axes


def _handles(categories: Sequence[Category]) -> list["Line2D"]:
    """Return the entries of the legend. One category needs none."""
    from matplotlib.lines import Line2D

    if len(categories) == 1:
        return []
    return [
        Line2D([], [], linestyle="", color=one.color, marker=one.marker, label=one.label, **_dot(one.marker))
        for one in categories
    ]


def _line_handle() -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], color=_LINE_COLOR, linewidth=0.7, linestyle="--", label="mean of the baseline")


def _dot(marker: str) -> dict[str, Any]:
    """Return size and edge of a marker; stars and the like are small for their nominal size."""
    size = {"*": 1.6, ".": 1.7, "D": 0.85, "P": 1.3, "X": 1.3}.get(marker, 1.0) * _MARKER_SIZE
    return {"markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.3}


def _percent_axis(axis: "Axis", shares: npt.NDArray[np.float64], room: float) -> tuple[float, float]:
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
    axis.set_tick_params(length=2.5, width=0.6, color=_FRAME_COLOR)
    return low, high
