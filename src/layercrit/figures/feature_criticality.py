"""The figure of feature criticality: how much farther than the layer before each layer moves."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.parts import dot
from layercrit.figures.rows import check_columns, in_rows, write_in_row
from layercrit.figures.style import figure_style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["feature_criticality_rows"]

_COLOR, _EVEN_LINE = "#0072B2", {"color": "#8A8A8A", "linewidth": 0.7, "linestyle": "--"}
_COLUMNS = ("layer", "feature_criticality", "status")
_WORDS = {
    "no_gradient": "not measured: no gradient leads there",
    "no_output": "not measured: no module returns its output",
    "nothing_before": "no ratio: the layer before has no W, or 0",
}


def feature_criticality_rows(table: "pd.DataFrame", *, quantity: str, title: str) -> "Figure":
    """Plot the feature criticality of each layer as a dot, a row each, in the order of the table.

    Dots are empty where the layer before is not all that feeds a layer. The dashed line is at 1, where both move alike.
    Where values differ by more than a factor of 30, the axis is logarithmic, and what is 0 is said in words, as is what
    has no ratio.

    Args:
        table: one row per layer, with the columns ``layer``, ``feature_criticality`` and ``status``.
        quantity: what is shown, below the axis.
        title: shown above the figure.

    Raises:
        ProtocolError: a column is missing, or no layer has a feature criticality.
    """
    check_columns(table, _COLUMNS, "feature criticality")
    if not table["feature_criticality"].notna().any():
        raise ProtocolError("No layer has a feature criticality, so there is nothing to plot. Measure other layers.")
    from matplotlib.lines import Line2D

    values = np.append(table["feature_criticality"].to_numpy("float64"), 1.0)
    handles = [
        Line2D([], [], linestyle="", color=_COLOR, marker="o", label="fed by the layer before alone", **dot("o")),
        Line2D([], [], linestyle="", marker="o", label="by other paths, too: doubtful", **_empty()),
        Line2D([], [], label="as much as the layer before", **_EVEN_LINE),  # type: ignore[arg-type]
    ]
    is_used = [(table["status"] != "other_paths").any(), (table["status"] == "other_paths").any(), True]
    with figure_style():
        used = [handle for handle, used in zip(handles, is_used, strict=True) if used]
        figure, axes = in_rows(list(table["layer"]), values, quantity=quantity, title=title, handles=used)
        axes.axvline(1.0, zorder=2, gid="even", **_EVEN_LINE)  # type: ignore[arg-type]
        for y, row in enumerate(table.to_dict("records")):
            _draw_row(axes, y, row)
    return figure


def _empty() -> dict[str, Any]:
    return {**dot("o"), "markerfacecolor": "white", "markeredgecolor": _COLOR, "markeredgewidth": 1.0}


def _draw_row(axes: "Axes", y: int, row: dict[object, Any]) -> None:
    ratio, status = float(row["feature_criticality"]), str(row["status"])
    if status == "same_output":
        write_in_row(axes, y, "1: one output with the layer before")
    elif math.isnan(ratio):
        write_in_row(axes, y, _WORDS.get(status, f"not measured: {shown(status)}"))
    elif ratio <= 0 and axes.get_xscale() == "log":
        write_in_row(axes, y, f"{ratio:.2g}")
    else:
        style = _empty() if status == "other_paths" else {"color": _COLOR, **dot("o")}
        axes.plot(ratio, y, "o", zorder=5, gid="doubtful" if status == "other_paths" else "found", **style)
