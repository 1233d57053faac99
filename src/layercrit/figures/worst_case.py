"""The figure of the worst case: what ascent found for each module, beside what the gradient alone promises."""

import math
from typing import TYPE_CHECKING, Any

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.parts import dot
from layercrit.figures.rows import check_columns, in_rows, write_in_row
from layercrit.figures.style import figure_style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["worst_case_rows"]

_FOUND, _FIRST = "#0072B2", "#8A8A8A"
_WORDS = {
    "no_norm": "not measured: its parameters are 0",
    "no_gradient": "not measured: no gradient leads there",
}
_COLUMNS = ("layer", "worst_case", "smallest_restart", "first_order", "status")


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
    check_columns(table, _COLUMNS, "worst cases")
    if not table["worst_case"].notna().any():
        raise ProtocolError("No module has a worst case, so there is nothing to plot. Measure other layers.")
    values = table[["worst_case", "smallest_restart", "first_order"]].to_numpy("float64")
    with figure_style():
        handles = _handles(bool(table["first_order"].notna().any()))
        figure, axes = in_rows(list(table["layer"]), values, quantity=quantity, title=title, handles=handles)
        for y, row in enumerate(table.to_dict("records")):
            _draw_row(axes, y, row)
    return figure


def _handles(has_first: bool) -> list["Line2D"]:
    from matplotlib.lines import Line2D

    found = Line2D([], [], color=_FOUND, marker="o", linewidth=1.3, label="found: from the least to the best restart",
                   **dot("o"))  # fmt: skip
    first = Line2D([], [], linestyle="", color=_FIRST, marker="D", label="first order", **dot("D"))
    return [found, first] if has_first else [found]


def _draw_row(axes: "Axes", y: int, row: dict[object, Any]) -> None:
    found, least, first = (float(row[name]) for name in ("worst_case", "smallest_restart", "first_order"))
    logarithmic = axes.get_xscale() == "log"
    if not math.isfinite(found) or (logarithmic and found <= 0):
        write_in_row(axes, y, _in_words(found, str(row["status"])))
        return
    start = max(least, axes.get_xlim()[0]) if logarithmic else least
    axes.plot([start, found], [y, y], color=_FOUND, linewidth=1.3, zorder=3, gid="restarts")
    if math.isfinite(first) and (first > 0 or not logarithmic):
        axes.plot(first, y, "D", color=_FIRST, **dot("D"), zorder=4, gid="first order")
    axes.plot(found, y, "o", color=_FOUND, **dot("o"), zorder=5, gid="found")


def _in_words(found: float, status: str) -> str:
    """Return what is written in place of a dot."""
    if math.isnan(found):
        return _WORDS.get(status, f"not measured: {shown(status)}")
    return f"{found:.2g}" if math.isfinite(found) else "not finite"
