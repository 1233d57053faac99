"""The figure of criticality over depth: a panel with a line and a band for each category."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit.counts import counted
from layercrit.errors import ProtocolError
from layercrit.figures.categories import Category, categories_of, check_models, check_values, shown
from layercrit.figures.parts import (
    BASELINE_LINE,
    FRAME_COLOR,
    GUIDE_COLOR,
    MARGIN,
    NAME_SIZE,
    NOTE_SIZE,
    baseline_of,
    framed,
)
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["criticality_over_depth"]

_ROOM = 0.7  # beside the first and the last layer, in layers
_BAND = 0.22  # opacity
_SMALLEST = 4.5  # points: smaller names of layers are left out

# Inches.
_LEFT, _WIDTH = 0.47, 2.85
_PANEL_HEIGHT, _BETWEEN = 0.62, 0.2  # between panels stands the name of the lower one
_STAGE_HEIGHT = 0.28


def criticality_over_depth(
    values: "pd.DataFrame",
    models: "pd.DataFrame",
    *,
    stages: Mapping[str, str] | None = None,
    layer_labels: Mapping[str, str] | None = None,
    baseline: str | None = None,
    title: str | None = None,
) -> "Figure":
    """Plot the criticality of each layer, in depth order, as a line per category: the mean over its models.

    Each category has its own panel, since lines over many layers hide each other. The band is the mean plus or minus
    one standard deviation (ddof 1) over the category's models, clipped to [0, 1]; a single model has none. The dashed
    line is the baseline. Values that were not measured are in no mean, and leave gaps where a category has no others.
    Names of layers are shown if there is room. The figure fits a column of a paper. Save it with
    `layercrit.figures.style.save_figure`.

    Args:
        values: models x layers, criticality in [0, 1]; NaN: not measured. The index has the names of models, the
            columns those of layers in depth order.
        models: one row per model of ``values``: ``model`` (its name), ``label`` (None: its name) and ``category`` (or
            None; decides the colour).
        stages: layer name -> its stage; stages are named below and separated by lines. None: no stages.
        layer_labels: layer name -> its label below; missing: its name.
        baseline: name of a model. None: the first of category ``baseline``, if any.
        title: shown above the figure.

    Raises:
        ProtocolError: a table is empty, lacks a column or contains a name twice, the two differ in their models, a
            value is outside of [0, 1], no value is known, or the baseline is unknown.
    """
    check_models(models, ("model", "label", "category"))
    check_values(values, models)
    reference = baseline_of(models, baseline)
    table = values.loc[models["model"].to_list()].to_numpy("float64")  # in the order of models
    # Of all models, so that those of another figure of the same table have the same colours.
    categories = [one for one in categories_of(models) if np.isfinite(table[list(one.rows)]).any()]
    if not categories:
        raise ProtocolError("No value is known, so there is nothing to plot. Measure at least one model.")
    dashed = None if reference is None else table[models["model"].to_list().index(reference)]
    names = [shown((layer_labels or {}).get(name, name)) for name in values.columns]
    size = _WIDTH, (_PANEL_HEIGHT + _BETWEEN) * len(categories)
    places = [
        (0, size[1] - (_PANEL_HEIGHT + _BETWEEN) * (index + 1), _WIDTH, _PANEL_HEIGHT)
        for index in range(len(categories))
    ]
    with figure_style():
        name_size = min(0.9 * 72 * _WIDTH / (len(names) - 1 + 2 * _ROOM), NOTE_SIZE)
        name_size = name_size if name_size >= _SMALLEST else 0
        names_height = max(text_width(name, name_size) for name in names) + 0.08 if name_size else 0.0
        below = names_height + (_STAGE_HEIGHT if stages else MARGIN)
        heads = [_head(category) for category in categories]
        widest = max(text_width(head, NAME_SIZE, "bold") for head in heads)
        figure, axes = framed(size, _LEFT, below, title, _handles(dashed is not None), panels=places, widest=widest)
        for one, head, category in zip(axes, heads, categories, strict=True):
            own = table[list(category.rows)]
            _prepare_panel(one, head, len(names), [(stages or {}).get(name) for name in values.columns])
            if dashed is not None and not (len(own) == 1 and np.array_equal(own[0], dashed, equal_nan=True)):
                one.plot(range(len(names)), dashed, zorder=2, gid="baseline", **BASELINE_LINE)
            _draw_category(one, own, category)
        middle = (axes[0].get_position().y1 + axes[-1].get_position().y0) / 2
        style: dict[str, Any] = {
            "rotation": 90,
            "horizontalalignment": "left",
            "verticalalignment": "center",
            "fontsize": NAME_SIZE,
        }
        label = "mean criticality over models (%)"
        label = label if text_width(label, NAME_SIZE) < size[1] else "criticality (%)"
        figure.text(0.5 * MARGIN / figure.get_figwidth(), middle, label, **style)
        _draw_stages(axes[-1], [(stages or {}).get(name) for name in values.columns], names_height)
        if name_size:
            axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=name_size)
    return figure


def _handles(dashed: bool) -> list["Line2D"]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=FRAME_COLOR, label="mean"),
        Line2D([], [], color=FRAME_COLOR, alpha=2 * _BAND, linewidth=6, solid_capstyle="butt", label="± SD"),
    ]
    return handles + ([Line2D([], [], label="baseline", **BASELINE_LINE)] if dashed else [])


def _head(category: Category) -> str:
    n_models = len(category.rows)
    return f"{category.label} ({counted(n_models, 'model')})"


def _prepare_panel(axes: "Axes", head: str, n_layers: int, stages: Sequence[str | None]) -> None:
    axes.set_xlim(-_ROOM, n_layers - 1 + _ROOM)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"], fontsize=NOTE_SIZE)
    axes.set_xticks([])
    axes.tick_params(axis="both", length=2.5, width=0.6, color=FRAME_COLOR, pad=2)
    axes.set_title(head, loc="left", fontsize=NAME_SIZE, fontweight="bold", pad=3, gid="category")
    axes.axhline(0.5, color=GUIDE_COLOR, linewidth=0.5, zorder=0)
    for place in _ends(stages):
        axes.axvline(place, color=FRAME_COLOR, linewidth=0.5, linestyle=":", zorder=1, gid="stage")


def _draw_category(axes: "Axes", own: npt.NDArray[np.float64], category: Category) -> None:
    """Plot the mean over the models of one category, ``(n_models, n_layers)``, and the band around it."""
    known = np.isfinite(own)
    counts = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, own, 0).sum(axis=0) / counts
        spread = np.sqrt((np.where(known, own - mean, 0) ** 2).sum(axis=0) / (counts - 1))
    x = np.arange(len(mean))
    if (counts > 1).any():
        low, high = np.maximum(mean - spread, 0), np.minimum(mean + spread, 1)
        axes.fill_between(x, low, high, color=category.color, alpha=_BAND, linewidth=0, zorder=2.5, gid="band")
    axes.plot(x, mean, ".-", color=category.color, linewidth=1.0, markersize=2.5, zorder=3, clip_on=False, gid="mean")


def _ends(stages: Sequence[str | None]) -> list[float]:
    """Return the places between two layers of different stages."""
    return [index + 0.5 for index, (before, after) in enumerate(pairwise(stages)) if before != after]


def _draw_stages(axes: "Axes", stages: Sequence[str | None], names_height: float) -> None:
    """Write the name of each stage below its layers, the largest first, without those that have no room left."""
    edges = [-0.5, *_ends(stages), len(stages) - 0.5]
    step = _WIDTH / (len(stages) - 1 + 2 * _ROOM)  # inches
    taken: list[tuple[float, float]] = []
    for low, high in sorted(pairwise(edges), key=lambda pair: pair[0] - pair[1]):
        stage = stages[int(high - 0.5)]
        if stage is None:
            continue
        name = shown(stage)
        middle, half = ((low + high) / 2 + _ROOM) * step, text_width(name, NOTE_SIZE) / 2 + 0.03
        if middle - half < -_LEFT or middle + half > _WIDTH + MARGIN:
            continue
        if any(middle - half < end and start < middle + half for start, end in taken):
            continue
        taken.append((middle - half, middle + half))
        y = -(names_height + 0.07) / _PANEL_HEIGHT
        style: dict[str, Any] = {"horizontalalignment": "center", "verticalalignment": "top", "fontsize": NOTE_SIZE}
        axes.text((low + high) / 2, y, name, transform=axes.get_xaxis_transform(), gid="stage", **style)
