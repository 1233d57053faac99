"""The figure that ranks models by mean criticality, with intervals."""

import math
from typing import TYPE_CHECKING

import numpy as np

from layercrit.errors import ProtocolError
from layercrit.figures.categories import (
    categories_of,
    check_models,
    labels_of,
)
from layercrit.figures.parts import (
    BASELINE_LINE,
    GUIDE_COLOR,
    MARGIN,
    NAME_SIZE,
    baseline_mean,
    dot,
    framed,
    handles_of,
    line_handle,
    percent_axis,
)
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ranking"]

_ROOM = 0.06  # beside the points, as a share of their range

# Inches.
_RANKING_WIDTH, _RANKING_HEIGHT, _ROW_HEIGHTS = 3.6, 7.0, (0.135, 0.21)
_AXIS_HEIGHT = 0.45


def ranking(models: "pd.DataFrame", *, baseline: str | None = None, title: str | None = None) -> "Figure":
    """Plot a dot per model at its mean criticality, the least critical on top, with its interval.

    A model without a mean comes last, without a dot. Save the figure with `layercrit.figures.style.save_figure`.

    Args:
        models: one row per model: ``model`` (its name), ``label`` (None: its name), ``category`` (or None; decides the
            colour), ``criticality`` (mean over layers, in [0, 1]), ``low`` and ``high`` (its confidence limits; NaN:
            no bar).
        baseline: name of the model whose mean is the vertical line. None: the first of category ``baseline``, if any.
        title: shown above the figure.

    Raises:
        ProtocolError: the table is empty, lacks a column or contains a model twice, no model has a mean, or the
            baseline is unknown.
    """
    check_models(models, ("model", "label", "category", "criticality", "low", "high"))
    line = baseline_mean(models, baseline)
    if not models["criticality"].notna().any():
        raise ProtocolError("No model has a mean criticality, so none can be ranked. Measure at least one model.")
    categories = categories_of(models)
    look = {row: category for category in categories for row in category.rows}
    order = [int(row) for row in np.argsort(models["criticality"].to_numpy("float64"), kind="stable")]  # NaN last
    ranked = models.iloc[order]
    labels = labels_of(ranked)
    with figure_style():
        height = min(max(_RANKING_HEIGHT / len(models), _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
        name_size = min(0.72 * 72 * height, NAME_SIZE)
        left = MARGIN + max(text_width(label, name_size) for label in labels) + 0.06
        handles = handles_of(categories) + ([line_handle()] if line is not None else [])
        size = (_RANKING_WIDTH, (len(models) + 0.4) * height)
        figure, (axes,) = framed(size, left, _AXIS_HEIGHT, title, handles)
        axes.set_ylim(len(models) - 0.3, -0.7)
        axes.set_yticks(range(len(models)), labels, fontsize=name_size)
        axes.tick_params(axis="y", length=0, pad=4)
        axes.hlines(range(len(models)), 0, 1, transform=axes.get_yaxis_transform(), color=GUIDE_COLOR, linewidth=0.5)
        if line is not None:
            axes.axvline(line, zorder=1.5, gid="baseline", **BASELINE_LINE)
        axes.set_xlim(percent_axis(axes.xaxis, ranked[["criticality", "low", "high"]].to_numpy("float64"), _ROOM))
        axes.set_xlabel("mean criticality (%)")
        for y, (row, mean, low, high) in enumerate(
            zip(order, ranked["criticality"], ranked["low"], ranked["high"], strict=True)
        ):
            color = look[row].color
            if math.isfinite(low) and math.isfinite(high) and math.isfinite(mean):
                axes.hlines(y, low, high, color=color, linewidth=1.3, zorder=3, gid="interval")
            axes.plot(mean, y, look[row].marker, color=color, **dot(look[row].marker), zorder=4, gid="mean")
    return figure
