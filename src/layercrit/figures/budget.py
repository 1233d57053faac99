"""The figure of criticality against the budget of adversarial training: a panel per norm."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from layercrit.errors import ProtocolError
from layercrit.figures.categories import categories_of, check_models, shown
from layercrit.figures.parts import (
    BASELINE_LINE,
    FRAME_COLOR,
    NAME_SIZE,
    NOTE_SIZE,
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["criticality_against_budget"]

_REQUIRED = ("model", "label", "category", "attack_norm", "eps", "criticality", "low", "high")
_NORMS = {"l2": "L2", "linf": "L∞"}
_ROOM = 0.06  # above and below the points, as a share of their range

# Inches.
_LEFT, _SIZE = 0.47, (2.85, 2.0)
_BETWEEN, _HEAD_HEIGHT, _AXIS_HEIGHT = 0.12, 0.2, 0.33  # panels; the norm above one; label and ticks below one
_BESIDE = 0.6  # the outermost budgets of a panel, in steps from one budget to the next


def criticality_against_budget(
    models: "pd.DataFrame", *, baseline: str | None = None, title: str | None = None
) -> "Figure":
    """Plot a point per model: the budget of its adversarial training, and its mean criticality with its interval.

    Each norm has its own panel. Budgets are in order and evenly spaced, so that 0, 0.01 and 8 can all be read: the axis
    is not to scale. A line per category joins the means at its budgets. Models without norm, budget or criticality are
    left out. The figure fits a column of a paper. Save it with
    `layercrit.figures.style.save_figure`.

    Args:
        models: one row per model: ``model`` (its name), ``label`` (not shown), ``category`` (or None; decides colour
            and marker), ``attack_norm`` (``l2``, ``linf`` or any text; None: not known), ``eps`` (the budget, in
            whatever unit), ``criticality`` (mean over layers, in [0, 1]), ``low`` and ``high`` (its confidence limits;
            NaN: no bar).
        baseline: name of the model whose mean is the dashed line. None: the first of category ``baseline``, if any.
        title: shown above the figure.

    Raises:
        ProtocolError: the table is empty, lacks a column or contains a model twice, no model has a budget, or the
            baseline is unknown.
    """
    check_models(models, _REQUIRED)
    line = baseline_mean(models, baseline)
    table = models.reset_index(drop=True).astype(dict.fromkeys(("eps", "criticality", "low", "high"), "float64"))
    table = table[table["attack_norm"].notna() & table[["eps", "criticality"]].notna().all(axis=1)]
    if table.empty:
        raise ProtocolError(
            "No model has an attack_norm, an eps and a mean criticality, so there is nothing to plot. Give norm and "
            "eps of at least one adversarially trained model."
        )
    # Of all models, so that those of another figure of the same table have the same colours.
    look = {row: category for category in categories_of(models) for row in category.rows if row in table.index}
    norms = sorted(map(str, table["attack_norm"].unique()), key=lambda norm: (norm not in _NORMS, norm))
    panels = [table[table["attack_norm"].astype(str) == norm] for norm in norms]
    steps = np.array([panel["eps"].nunique() - 1 + 2 * _BESIDE for panel in panels])
    between = min(_BETWEEN, _SIZE[0] / (3 * len(panels)))
    step = (_SIZE[0] - between * (len(panels) - 1)) / steps.sum()
    lefts = np.cumsum([0, *steps[:-1]]) * step + np.arange(len(panels)) * between
    places = [(left, 0, width, _SIZE[1] - _HEAD_HEIGHT) for left, width in zip(lefts, steps * step, strict=True)]
    with figure_style():
        widest = max(text_width(_budget(eps), NOTE_SIZE) for eps in table["eps"])
        upright = widest + 0.04 < step
        size = NOTE_SIZE if upright else min(0.85 * 72 * step, NOTE_SIZE)
        handles = handles_of(list(dict.fromkeys(look.values()))) + ([line_handle()] if line is not None else [])
        below = _AXIS_HEIGHT + (NOTE_SIZE / 72 if upright else widest)
        figure, axes = framed(_SIZE, _LEFT, below, title, handles, panels=places)
        shares = np.append(table[["criticality", "low", "high"]], np.nan if line is None else line)
        limits = percent_axis(axes[0].yaxis, shares, _ROOM)
        axes[0].set_ylabel("mean criticality (%)")
        middle = (_LEFT + _SIZE[0] / 2) / figure.get_figwidth(), 0.06 / figure.get_figheight()
        figure.text(*middle, "budget ε", fontsize=NAME_SIZE, horizontalalignment="center", verticalalignment="bottom")
        for one, norm, panel, (_, _, width, _) in zip(axes, norms, panels, places, strict=True):
            one.set_ylim(limits)
            if one is not axes[0]:
                one.set_yticks([])
                one.spines["left"].set_visible(False)
            _draw_panel(one, panel, size, 0 if upright else 90)
            one.set_title(_fitted(_NORMS.get(norm, shown(norm)), width), fontsize=NAME_SIZE, gid="norm")
            for category in dict.fromkeys(look.values()):
                own = panel[[look[row] is category for row in panel.index]]
                _draw_models(one, own, sorted(set(panel["eps"])), category.color, category.marker)
            if line is not None:
                one.axhline(line, zorder=1.5, gid="baseline", **BASELINE_LINE)
    return figure


def _budget(eps: float) -> str:
    return f"{eps:g}"


def _fitted(text: str, width: float) -> str:
    """Return a norm's name without its end where it is wider than its panel, in inches."""
    while len(text) > 1 and text_width(text, NAME_SIZE) > width:
        text = f"{text[:-2]}…"
    return text


def _draw_panel(axes: "Axes", panel: "pd.DataFrame", size: float, rotation: int) -> None:
    """Prepare the axes of one norm: its budgets in their order, one step apart each."""
    budgets = sorted(set(panel["eps"]))
    axes.set_xlim(-_BESIDE, len(budgets) - 1 + _BESIDE)
    axes.set_xticks(range(len(budgets)), [_budget(eps) for eps in budgets], fontsize=size, rotation=rotation)
    axes.tick_params(axis="x", length=2.5, width=0.6, color=FRAME_COLOR, pad=2)


def _draw_models(axes: "Axes", own: "pd.DataFrame", budgets: Sequence[float], color: str, marker: str) -> None:
    """Plot the models of one category and norm, and the line through the means of their budgets."""
    if own.empty:
        return
    means = own.groupby("eps")["criticality"].mean()
    axes.plot([budgets.index(eps) for eps in means.index], means, color=color, linewidth=0.9, zorder=2, gid="means")
    places = [budgets.index(eps) for eps in own["eps"]]
    known = own[["low", "high"]].notna().all(axis=1).to_numpy()
    ends = np.array(places)[known], own["low"][known], own["high"][known]
    axes.vlines(*ends, color=color, linewidth=1.3, zorder=3, gid="interval")
    axes.plot(places, own["criticality"], marker, color=color, **dot(marker), zorder=4, gid="model")
