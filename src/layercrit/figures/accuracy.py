"""The figure of criticality against accuracy: a point per model."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProtocolError
from layercrit.figures.categories import categories_of, check_models, labels_of, shown
from layercrit.figures.parts import (
    FRAME_COLOR,
    MARGIN,
    NOTE_SIZE,
    dot,
    framed,
    handles_of,
    percent_axis,
)
from layercrit.figures.point_labels import label_places
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["criticality_against_accuracy"]

_ROOM, _LABEL_ROOM = 0.06, 0.18  # beside the points, as shares of their range
_LABELLED = 20  # models up to which every point has its label
_LEADER: dict[str, Any] = {"arrowstyle": "-", "color": FRAME_COLOR, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2}
_CORRELATION = ("without", "method", "statistic", "pvalue")
_METHODS = {"spearman": ("Spearman's ρ", "ρ"), "kendall": ("Kendall's τ", "τ")}  # noqa: RUF001 (Greek letters)

# Inches.
_LEFT, _SIZE = 0.47, (2.85, 2.75)
_AXIS_HEIGHT, _LINE_HEIGHT = 0.45, 0.16

# Points.
_LABEL_SIZE, _LINE = 6.0, 1.3  # of a label, and height of its line in sizes of its font
_LARGEST_MARKER = 7.0


def criticality_against_accuracy(
    models: "pd.DataFrame", *, correlations: "pd.DataFrame | None" = None, title: str | None = None
) -> "Figure":
    """Plot a point per model: its accuracy and its mean criticality.

    Up to 20 models are labelled, without overlaps; more are told apart by category only. A note below counts the models
    without accuracy or criticality. The figure fits a column of a paper. Save it with
    `layercrit.figures.style.save_figure`.

    Args:
        models: one row per model: ``model`` (its name), ``label`` (None: its name), ``category`` (or None; decides
            colour and marker), ``accuracy`` and ``criticality`` (mean over layers), both shares in [0, 1].
        correlations: rank correlations to print above, a line for each ``without``, in the order of the rows:
            ``without`` (the category that is left out; None: none is), ``method`` (``spearman`` or
            ``kendall``), ``statistic`` (NaN: not written) and ``pvalue`` (NaN: not known), such as rows of
            `layercrit.comparison.Comparison.correlations`.
        title: shown above the figure.

    Raises:
        ProtocolError: a table lacks a column, that of models is empty or contains a model twice, or no model has both
            numbers.
    """
    check_models(models, ("model", "label", "category", "accuracy", "criticality"))
    notes = _notes(correlations)
    known = models[["accuracy", "criticality"]].notna().all(axis=1).to_numpy()
    if not known.any():
        raise ProtocolError(
            "No model has both an accuracy and a mean criticality, so there is nothing to plot. Give the accuracy of "
            "at least one model."
        )
    # Of all models, so that those of another figure of the same table have the same colours.
    categories = [category for category in categories_of(models) if known[list(category.rows)].any()]
    points = models[["accuracy", "criticality"]].to_numpy("float64")
    n_absent, labelled = int((~known).sum()), known.sum() <= _LABELLED
    with figure_style():
        below = _AXIS_HEIGHT + _LINE_HEIGHT * bool(n_absent)
        figure, (axes,) = framed(_SIZE, _LEFT, below, title, handles_of(categories), notes)
        axes.set_xlim(percent_axis(axes.xaxis, points[known, 0], _LABEL_ROOM if labelled else _ROOM))
        axes.set_ylim(percent_axis(axes.yaxis, points[known, 1], _ROOM))
        axes.set_xlabel("accuracy (%)")
        axes.set_ylabel("mean criticality (%)")
        for one in reversed(categories):  # the baseline on top
            x, y = points[[row for row in one.rows if known[row]]].T
            axes.plot(x, y, one.marker, color=one.color, **dot(one.marker), zorder=3, gid=one.label)
        if labelled:
            _draw_labels(axes, points[known], labels_of(models[known]))
        if n_absent:
            note = f"not shown: {n_absent} without accuracy or criticality"
            place = (0, -(below - MARGIN) / _SIZE[1])
            axes.text(*place, note, transform=axes.transAxes, fontsize=NOTE_SIZE, color=FRAME_COLOR)
    return figure


def _notes(correlations: "pd.DataFrame | None") -> list[str]:
    """Return a line for each group of models, in two where it is wider than the figure."""
    if correlations is None:
        return []
    for column in _CORRELATION:
        if column not in correlations.columns:
            raise ProtocolError(
                f"The table of correlations has no column {column!r}; it has "
                f"{', '.join(map(str, correlations.columns)) or 'none'}. Expected {', '.join(_CORRELATION)}."
            )
    groups: dict[str | None, list[str]] = {}
    for without, method, statistic, p_value in correlations[list(_CORRELATION)].itertuples(index=False):
        group = without if isinstance(without, str) else None
        name, letter = _METHODS.get(method, (shown(method), shown(method)))
        if math.isfinite(statistic):
            first = next(iter(groups), group) == group  # names stand in full in the first line
            groups.setdefault(group, []).append(_number(name if first else letter, statistic, p_value))
    notes = []
    for group, found in groups.items():
        head, numbers = "" if group is None else f"without {shown(group.replace('_', ' '))}: ", "; ".join(found)
        fits = text_width(head + numbers, NOTE_SIZE) <= _LEFT + _SIZE[0] - MARGIN
        notes += [head + numbers] if fits or not head else [head.rstrip(), f"    {numbers}"]
    return notes


def _number(name: str, statistic: float, p_value: float) -> str:
    text = f"{name} = {statistic:.2f}".replace("-", "−")  # noqa: RUF001 (a minus sign)
    if not math.isfinite(p_value):
        return text
    return f"{text}, p < 0.001" if p_value < 0.001 else f"{text}, p = {p_value:.2g}"


def _draw_labels(axes: "Axes", points: npt.NDArray[np.float64], labels: Sequence[str]) -> None:
    """Write each label beside its point, with a thin line to it where it had to move further away."""
    size = 72 * np.array(_SIZE)
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
