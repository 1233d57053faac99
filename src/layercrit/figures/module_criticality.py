"""The figure of module criticality: the excess loss of one module at each place of its path and amount of noise."""

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.squares import COLOR_MAPS, Scale, Squares, draw_color_bar, draw_squares, number_size
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["excess_map"]

Array = npt.NDArray[np.float64]

# Inches.
_MARGIN, _WIDTH, _HEIGHT, _LEFT, _BELOW, _BAND = 0.1, 0.44, 0.2, 0.72, 0.42, 0.72
_BAR_WIDTH, _BAR_HEIGHT = 1.7, 0.09
_TITLE_SIZE, _NOTE_SIZE, _TICK_SIZE = 9.5, 7.0, 7.0  # points

_DECADES = 2  # of the excess loss to both sides of what is allowed, that colours tell apart
_LINE = {"color": "white", "linewidth": 2.4, "solid_capstyle": "butt"}
_CORE = {"color": "black", "linewidth": 1.2, "solid_capstyle": "butt"}


class _Decades(Scale):
    """Powers of ten of what is allowed."""

    def tick(self, value: float) -> str:
        """Return what is written at the colour bar."""
        return f"{10**value:g}"


def excess_map(
    points: "pd.DataFrame", grid: tuple[Array, Array], allowed: float, optimum: tuple[float, float], *, title: str
) -> "Figure":
    """Plot the excess loss of one module over the place on its path and the noise, in units of what is allowed.

    The line goes round the points at which the loss is as allowed; the ring is where the module criticality is.
    Squares without a value were not evaluated.

    Args:
        points: one row per point, with the columns ``a``, ``s`` and ``excess`` in nats.
        grid: all places ``(n_a,)`` and amounts of noise ``(n_s,)``, both rising.
        allowed: excess loss that is allowed, in nats.
        optimum: place and noise; NaN where there is none.
        title: shown above, such as the module's name.

    Raises:
        ProtocolError: a point is not of the grid.
    """
    from matplotlib.figure import Figure

    a, s = grid
    values = np.full((len(s), len(a)), np.nan)  # (n_s, n_a), in units of what is allowed
    for row in points.to_dict("records"):
        column, line = int(np.abs(a - row["a"]).argmin()), int(np.abs(np.log(s / row["s"])).argmin())
        if not (math.isclose(a[column], row["a"], abs_tol=1e-9) and math.isclose(s[line], row["s"], rel_tol=1e-9)):
            raise ProtocolError(f"The point a = {row['a']:g}, s = {row['s']:g} is not one of the grid.")
        values[line, column] = row["excess"] / allowed
    scale = _Decades(COLOR_MAPS["criticality"], -_DECADES, _DECADES, ticks=2 * _DECADES + 1)
    with figure_style():
        quantity = f"excess loss in units of what is allowed, {allowed:.2g} nats"
        bar_at = _MARGIN + text_width(quantity, _NOTE_SIZE) + 0.25
        titled = 2 * _MARGIN + text_width(shown(title), _TITLE_SIZE, "bold")
        width = max(_LEFT + _WIDTH * len(a) + _MARGIN, bar_at + _BAR_WIDTH + 2 * _MARGIN, titled)
        height = _BELOW + _HEIGHT * len(s) + _BAND
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1), label="squares")
        axes.set_xlim(0, width)
        axes.set_ylim(0, height)
        axes.set_axis_off()
        rows, columns = np.indices(values.shape).reshape(2, -1)
        colors = np.log10(np.clip(values, 10.0**-_DECADES, 10.0**_DECADES))
        squares = Squares(colors[rows, columns], [_number(value) for value in values[rows, columns]])
        at = _LEFT + _WIDTH * columns.astype(float), _BELOW + _HEIGHT * rows.astype(float)
        size = number_size(squares.widest(1), _WIDTH, _HEIGHT)
        draw_squares(axes, at, (_WIDTH, _HEIGHT), squares, scale, size, "excess loss")
        _draw_border(axes, values)
        _draw_optimum(axes, grid, optimum)
        _draw_names(axes, a, s)
        _draw_band(figure, axes, scale, (title, quantity), bar_at)
    return figure


def _number(value: float) -> str:
    """Return an excess in units of what is allowed, in two digits; empty where there is none or it is too long."""
    if not math.isfinite(value):
        return ""
    text = f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}" if abs(value) < 1000 else "> 999"
    return "0.0" if text == "-0.0" else text.replace("-", "−")  # noqa: RUF001 (a minus sign)


def _draw_border(axes: "Axes", values: Array) -> None:
    """Plot a line between squares that are allowed and those that are not."""
    kept = np.where(np.isnan(values), np.nan, (values <= 1).astype(float))
    n_s, n_a = values.shape
    lines = []
    for row, column in np.ndindex(n_s, n_a):
        left, bottom = _LEFT + _WIDTH * column, _BELOW + _HEIGHT * row
        if row + 1 < n_s and abs(kept[row, column] - kept[row + 1, column]) == 1:
            lines.append(((left, left + _WIDTH), (bottom + _HEIGHT, bottom + _HEIGHT)))
        if column + 1 < n_a and abs(kept[row, column] - kept[row, column + 1]) == 1:
            lines.append(((left + _WIDTH, left + _WIDTH), (bottom, bottom + _HEIGHT)))
    for style in (_LINE, _CORE):
        for x, y in lines:
            axes.plot(x, y, gid="allowed", **style)  # type: ignore[arg-type]


def _draw_optimum(axes: "Axes", grid: tuple[Array, Array], optimum: tuple[float, float]) -> None:
    (places, s), (a, noise) = grid, optimum
    if math.isnan(a) or math.isnan(noise):
        return
    steps = math.log(noise / s[0]) / math.log(s[1] / s[0])
    place = _LEFT + _WIDTH * (a * (len(places) - 1) + 0.5), _BELOW + _HEIGHT * (steps + 0.5)
    for style in (_LINE, _CORE):
        axes.plot(*place, "o", markersize=13, fillstyle="none", markeredgecolor=style["color"],
                  markeredgewidth=style["linewidth"], gid="optimum")  # fmt: skip


def _draw_names(axes: "Axes", a: Array, s: Array) -> None:
    for column, value in enumerate(a):
        x = _LEFT + _WIDTH * (column + 0.5)
        axes.text(x, _BELOW - 0.05, f"{value:.2g}", ha="center", va="top", fontsize=_TICK_SIZE, gid="a")
    for row, value in enumerate(s):
        y = _BELOW + _HEIGHT * (row + 0.5)
        axes.text(_LEFT - 0.05, y, f"{value:.2g}", ha="right", va="center_baseline", fontsize=_TICK_SIZE, gid="s")
    middle = _LEFT + _WIDTH * len(a) / 2
    text = "a: from its initial (0) to its trained values (1)"
    axes.text(middle, _MARGIN, text, ha="center", va="bottom", fontsize=_NOTE_SIZE)
    up = _BELOW + _HEIGHT * len(s) / 2
    text = "s: SD of the noise, in root mean squares of the module"
    axes.text(_MARGIN, up, text, ha="left", va="center", rotation=90, fontsize=_NOTE_SIZE)


def _draw_band(figure: "Figure", axes: "Axes", scale: Scale, texts: tuple[str, str], bar_at: float) -> None:
    """Plot the title, what is shown, and the colour bar."""
    width, height = figure.get_size_inches()
    top = height - _MARGIN - 0.08
    axes.text(_MARGIN, top, shown(texts[0]), fontsize=_TITLE_SIZE, fontweight="bold", va="center", gid="title")
    axes.text(_MARGIN, top - 0.24, texts[1], fontsize=_NOTE_SIZE, va="center", gid="quantity")
    place = (bar_at / width, (top - 0.26) / height, _BAR_WIDTH / width, _BAR_HEIGHT / height)
    draw_color_bar(figure, place, scale, _NOTE_SIZE)
