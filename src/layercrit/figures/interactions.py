"""The figure of interactions: a square per pair of layers."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from layercrit.errors import ProtocolError
from layercrit.figures.categories import shown
from layercrit.figures.squares import COLOR_MAPS, Scale, Squares, draw_color_bar, draw_squares, number_size
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["interaction_map"]

# Inches.
_MARGIN, _GAP, _SQUARE, _SMALLEST, _LARGEST_GRID = 0.1, 0.06, 0.27, 0.07, 8.0
_BAND, _BAR_WIDTH, _BAR_HEIGHT = 0.62, 1.6, 0.09
_WIDTH = 4.2  # at least, for title and colour bar

_TITLE_SIZE, _NOTE_SIZE = 9.5, 7.0  # points
_TEXT = "interaction (percentage points); numbers where the interval excludes 0"


def interaction_map(
    table: "pd.DataFrame", layers: Sequence[str], *, title: str, layer_labels: Mapping[str, str] | None = None
) -> "Figure":
    """Plot the interaction of each two layers as a square, rows and columns in depth order.

    Args:
        table: one row per pair, with the columns ``layer_i``, ``layer_j``, ``interaction``, ``low`` and ``high``.
        layers: names of the layers in depth order.
        title: shown above, such as the model's name.
        layer_labels: layer name -> its label; missing: its name.

    Raises:
        ProtocolError: there are no pairs, or one is of a layer that is not among ``layers``.
    """
    place = {layer: number for number, layer in enumerate(layers)}
    unknown = [name for name in (*table["layer_i"], *table["layer_j"]) if name not in place]
    if table.empty or unknown:
        raise ProtocolError(
            f"Expected pairs of the layers {', '.join(map(repr, layers[:3]))}, ...; "
            + (f"got {unknown[0]!r}." if unknown else "got none.")
        )
    from matplotlib.figure import Figure

    values = np.full((len(layers), len(layers)), np.nan)
    written = np.full(values.shape, "", dtype=object)
    largest = float(np.nanmax(np.abs(table["interaction"].to_numpy("float64")), initial=0.0))
    end = max(math.ceil(20 * largest) / 20, 0.05)
    scale = Scale(COLOR_MAPS["difference"], -end, end, ticks=3, signed=True, unit="percentage points")
    for row in table.to_dict("records"):
        i, j = sorted((place[row["layer_i"]], place[row["layer_j"]]))
        values[j, i] = row["interaction"]
        excluded = row["low"] > 0 or row["high"] < 0
        written[j, i] = scale.number(row["interaction"]) if excluded else ""
    names = [shown((layer_labels or {}).get(name, name)) for name in layers]
    with figure_style():
        size = max(min(_SQUARE, _LARGEST_GRID / len(layers)), _SMALLEST)
        letters = min(0.78 * 72 * size, 7.5)
        names_width = max(text_width(name, letters) for name in names) + _GAP
        left, base, grid = _MARGIN + names_width, _MARGIN + names_width, size * len(layers)
        width = max(left + grid + _MARGIN, _WIDTH, 2 * _MARGIN + text_width(_TEXT, _NOTE_SIZE))
        figure = Figure(figsize=(width, base + grid + _BAND), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1), label="squares")
        axes.set_xlim(0, width)
        axes.set_ylim(0, base + grid + _BAND)
        axes.set_axis_off()
        rows, columns = np.tril_indices(len(layers), -1)
        squares = Squares(values[rows, columns], written[rows, columns].tolist())
        at = left + size * columns.astype(float), base + size * (len(layers) - 1 - rows.astype(float))
        draw_squares(axes, at, (size, size), squares, scale, number_size(squares.widest(1), size, size), "interactions")
        _draw_names(axes, names, (left, base), size, letters)
        _draw_band(figure, axes, scale, title)
    return figure


def _draw_names(axes: "Axes", names: Sequence[str], corner: tuple[float, float], size: float, letters: float) -> None:
    left, base = corner
    style = {"fontsize": letters, "gid": "layer"}
    for number, name in enumerate(names):
        middle = base + size * (len(names) - number - 0.5)
        axes.text(left - _GAP, middle, name, ha="right", va="center_baseline", **style)  # type: ignore[arg-type]
        axes.text(left + size * (number + 0.5), base - _GAP, name, ha="center", va="top", rotation=90, **style)  # type: ignore[arg-type]


def _draw_band(figure: "Figure", axes: "Axes", scale: Scale, title: str) -> None:
    """Plot the title, what is shown, and the colour bar."""
    width, height = figure.get_size_inches()
    top = height - _MARGIN - 0.1
    axes.text(_MARGIN, top, shown(title), fontsize=_TITLE_SIZE, fontweight="bold", va="center", gid="title")
    axes.text(_MARGIN, top - 0.2, _TEXT, fontsize=_NOTE_SIZE, va="center", gid="quantity")
    place = (
        (width - _MARGIN - _BAR_WIDTH - 0.15) / width,
        (top - 0.02) / height - 0.25 / height * (width < _MARGIN * 4 + _BAR_WIDTH + text_width(shown(title), 9.5)),
        _BAR_WIDTH / width,
        _BAR_HEIGHT / height,
    )
    draw_color_bar(figure, place, scale, _NOTE_SIZE)
