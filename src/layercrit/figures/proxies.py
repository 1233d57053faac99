"""The figures of proxies: exact criticality over each, and the rank correlation of each in many models."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.parts import FRAME_COLOR, GUIDE_COLOR, NAME_SIZE, NOTE_SIZE, framed
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["proxy_ranks", "proxy_scatter"]

_PROXY_COLOR, _NULL_COLOR = "#0072B2", "#8A8A8A"
_TABLE = ("proxy", "label", "null", "n_layers", "spearman", "spearman_low", "spearman_high")

# Inches.
_LEFT, _BELOW, _MOST_COLUMNS = 0.47, 0.3, 5
_PANEL, _APART, _HEAD = 1.35, 0.14, 0.62  # a panel, and what is between two of them beside and above each other
_ROW, _ROWS_WIDTH = 0.2, 3.2


def proxy_scatter(values: "pd.DataFrame", table: "pd.DataFrame", *, title: str) -> "Figure":
    """Plot the exact criticality of layers over each proxy, a panel each, the highest rank correlation first.

    Nulls are grey. A proxy that is positive throughout and spans more than a factor of 30 has a logarithmic axis.

    Args:
        values: one row per layer: ``exact``, in [0, 1], and a column per proxy; NaN: it does not apply.
        table: one row per proxy, in the order of the panels: ``proxy``, ``label``, ``null``, ``n_layers``, and
            ``spearman`` with ``spearman_low`` and ``spearman_high`` (NaN: not known).
        title: shown above the figure.

    Raises:
        ProtocolError: a column is missing, or no proxy applies to any layer.
    """
    _check(table, (*_TABLE,))
    rows = [row for row in table.to_dict("records") if np.isfinite(values[row["proxy"]]).any()]
    if not rows:
        raise ProtocolError("No proxy applies to any layer, so there is nothing to plot. Give a table with values.")
    columns = min(_MOST_COLUMNS, len(rows))
    n_lines = math.ceil(len(rows) / columns)
    size = columns * (_PANEL + _APART) - _APART, n_lines * (_PANEL + _HEAD)
    places = [
        (
            number % columns * (_PANEL + _APART),
            (n_lines - 1 - number // columns) * (_PANEL + _HEAD),
            _PANEL,
            _PANEL,
        )
        for number in range(len(rows))
    ]
    with figure_style():
        notes = ["criticality of each layer (%) over the proxy; rho: Spearman's; nulls are grey"]
        figure, axes = framed(size, _LEFT, _BELOW, title, [], notes, panels=places)
        for number, (one, row) in enumerate(zip(axes, rows, strict=True)):
            _draw_panel(one, row, values, numbered=number % columns == 0)
    return figure


def _draw_panel(axes: "Axes", row: dict[Any, Any], values: "pd.DataFrame", numbered: bool) -> None:
    x, y = values[row["proxy"]].to_numpy("float64"), values["exact"].to_numpy("float64")
    known = np.isfinite(x)
    color = _NULL_COLOR if row["null"] else _PROXY_COLOR
    if (x[known] > 0).all() and x[known].max() > 30 * x[known].min():
        axes.set_xscale("log")
        low, high = (math.log10(limit) for limit in (x[known].min(), x[known].max()))
        step = math.ceil((high - low) / 3)
        powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1, step)]
        axes.set_xticks(powers, [f"{power:g}" for power in powers])  # as texts, for formulas are not read
        axes.set_xticks([], minor=True)
    axes.plot(x[known], y[known], "o", color=color, markersize=3.2, markeredgecolor="white", markeredgewidth=0.3,
              clip_on=False, zorder=3, gid="layer")  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"] if numbered else ["", "", ""], fontsize=NOTE_SIZE)
    axes.axhline(0.5, color=GUIDE_COLOR, linewidth=0.5, zorder=0)
    axes.tick_params(axis="both", which="both", length=2, width=0.5, color=FRAME_COLOR, pad=2, labelsize=6)
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=4)
    label, room = shown(row["label"]), _PANEL
    size = min(NAME_SIZE, NAME_SIZE * room / text_width(label, NAME_SIZE, "bold"))
    axes.text(0, 1.17, label, transform=axes.transAxes, fontsize=size, fontweight="bold", color=color, gid="proxy")
    few = f", {row['n_layers']} layers" if row["n_layers"] < len(values) else ""
    axes.text(0, 1.06, f"{_rho(row)}{few}", transform=axes.transAxes, fontsize=6.2, gid="correlation")


def _rho(row: dict[Any, Any]) -> str:
    if not math.isfinite(row["spearman"]):
        return "no rank correlation"
    text = f"rho = {row['spearman']:.2f}"
    if math.isfinite(row["spearman_low"]):
        text += f" ({row['spearman_low']:.2f} to {row['spearman_high']:.2f})"
    return text.replace("-", "−")  # noqa: RUF001 (a minus sign)


def proxy_ranks(by_model: "pd.DataFrame", table: "pd.DataFrame", *, title: str) -> "Figure":
    """Plot the rank correlation of each proxy with criticality: a point per model, and the mean with its interval.

    Args:
        by_model: one row per model and proxy: ``proxy`` and ``spearman``.
        table: as for `proxy_scatter`, means over models, in the order of the rows.
        title: shown above the figure.

    Raises:
        ProtocolError: a column is missing, or no proxy can be ranked in any model.
    """
    _check(table, _TABLE)
    rows = [row for row in table.to_dict("records") if math.isfinite(row["spearman"])]
    if not rows:
        raise ProtocolError("No proxy can be ranked in any model, so there is nothing to plot. Measure more layers.")
    with figure_style():
        left = max(text_width(shown(row["label"]), NAME_SIZE) for row in rows) + 0.2
        size = _ROWS_WIDTH, _ROW * len(rows)
        notes = ["Spearman's rho over layers: a mark per model; mean and interval over models; nulls are grey"]
        figure, (axes,) = framed(size, left, _BELOW, title, [], notes)
        axes.axvline(0, color=FRAME_COLOR, linewidth=0.5, zorder=0)
        for place, row in enumerate(rows):
            color = _NULL_COLOR if row["null"] else _PROXY_COLOR
            own = by_model.loc[by_model["proxy"] == row["proxy"], "spearman"].dropna().to_numpy("float64")
            axes.plot(own, np.full(len(own), place), "|", color=color, alpha=0.5, markersize=5, zorder=2, gid="model")
            if math.isfinite(row["spearman_low"]):
                limits = [row["spearman_low"], row["spearman_high"]]
                axes.plot(limits, [place, place], color=color, linewidth=1.6, zorder=3, gid="interval")
            axes.plot(row["spearman"], place, "o", color=color, markersize=4.5, markeredgecolor="white",
                      markeredgewidth=0.4, zorder=4, gid="mean")  # fmt: skip
        axes.set_yticks(range(len(rows)), [shown(row["label"]) for row in rows], fontsize=NAME_SIZE)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.tick_params(axis="both", length=2.5, width=0.6, color=FRAME_COLOR, labelsize=NOTE_SIZE)
    return figure


def _check(table: "pd.DataFrame", columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in table.columns:
            raise ProtocolError(
                f"The table of proxies has no column {column!r}; it has {', '.join(map(str, table.columns))}; "
                f"expected {', '.join(columns)}."
            )
