"""Heat maps of a study: a square per model and layer, for criticality, differences and spreads."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProtocolError
from layercrit.figures.categories import (
    NO_CATEGORY,
    Category,
    categories_of,
    check_models,
    check_values,
    labels_of,
    shown,
)
from layercrit.figures.squares import (
    COLOR_MAPS,
    FILLED,
    NOT_MEASURED,
    NUMBER_SIZES,
    Scale,
    Squares,
    draw_color_bar,
    draw_squares,
    number_size,
)
from layercrit.figures.style import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["difference_map", "heat_map", "module_criticality_map", "spread_map"]

Array = npt.NDArray[np.float64]

_POINTS = "percentage points"
_STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)  # where a scale may end, times a power of ten

_MOST_POWERS = 12  # of ten, with a number each at the colour bar

# Inches.
_WIDTH, _WIDEST = 10.0, 13.0  # of the figure: where that is enough, and where numbers need more
_MARGIN, _GAP, _GROUP_GAP = 0.1, 0.07, 0.035
_SQUARE_WIDTHS = (0.08, 0.3)
_GRID_HEIGHT, _SQUARE_HEIGHTS = 7.0, (0.125, 0.21)
_STRIP_WIDTH, _LAYER_MEANS_HEIGHT = 0.07, 0.25
_BAND_HEIGHT, _HEADER_HEIGHT = 0.36, 0.3  # title and colour bar; heads of columns
_BAR_WIDTH, _BAR_HEIGHT, _PATCH_WIDTH = 1.6, 0.09, 0.2

# Points.
_TITLE_SIZE, _NAME_SIZE, _NOTE_SIZE = 9.5, 7.5, 7.0


@dataclass(frozen=True)
class _Grid:
    """Where the squares of a heat map lie, in inches from the lower left corner of the figure.

    Attributes:
        lefts: left edges of the columns, ``(n_layers,)``.
        bottoms: lower edges of the rows, ``(n_models,)``, the first on top.
        square: width and height of a square.
        columns: right edge of the category names, left edges of strips and names, right edge of accuracies, left edge
            of the models' means.
        means_width: of the models' means.
        size: width and height of the figure.
        layer_means: what the row of the layers' means is called.
    """

    lefts: Array
    bottoms: Array
    square: tuple[float, float]
    columns: tuple[float, float, float, float, float]
    means_width: float
    size: tuple[float, float]
    layer_means: str


def heat_map(
    values: "pd.DataFrame",
    models: "pd.DataFrame",
    *,
    title: str | None = None,
    quantity: str = "criticality",
    layer_labels: Mapping[str, str] | None = None,
    stages: Mapping[str, str] | None = None,
    rows: str = "models",
) -> "Figure":
    """Plot a square per model and layer, coloured by criticality.

    Models are grouped by category, the baseline first; within a category the order is that of ``models``. Numbers are
    in percent and are left out where squares are too small for them. The column at the right has each model's mean and
    standard deviation (ddof 1) over its layers, the row at the bottom each layer's over the models. Squares without a
    value are grey and hatched, and in no mean. The figure is about 10 inches wide. Save it with
    `layercrit.figures.style.save_figure`.

    Args:
        values: models x layers, in [0, 1]; NaN: not measured. The index has the names of models, the columns those of
            layers in depth order.
        models: one row per model of ``values``: ``model`` (its name), ``label`` (None: its name), ``category`` (or
            None) and ``accuracy``, a share in [0, 1] (NaN: not known).
        title: shown above the figure.
        quantity: what ``values`` are, for the colour bar.
        layer_labels: layer name -> the label below its column; missing: its name.
        stages: layer name -> its stage; a thin gap separates different stages. None: no gaps.
        rows: what has a row each, such as classes of images; the parameters above call them models.

    Raises:
        ProtocolError: a table is empty, lacks a column or contains a name twice, the two differ in their models, or a
            value is outside of [0, 1].
    """
    _check(values, models, "shares", 0)
    scale = Scale(COLOR_MAPS["criticality"], 0, 1, ticks=5)
    return _drawn(values, models, scale, title, quantity, layer_labels, stages, rows)


def difference_map(
    values: "pd.DataFrame",
    models: "pd.DataFrame",
    *,
    title: str | None = None,
    quantity: str = "difference to the baseline",
    layer_labels: Mapping[str, str] | None = None,
    stages: Mapping[str, str] | None = None,
) -> "Figure":
    """Plot a square per model and layer, coloured by the difference of its criticality to that of the baseline.

    Purple: more critical than in the baseline, orange: less. The scale is symmetric and ends at the largest difference,
    rounded up. All else is as in `heat_map`.

    Args:
        values: models x layers, criticality minus that of the baseline, in [-1, 1]; NaN: not measured.
        models: as in `heat_map`.
        title: shown above the figure.
        quantity: what ``values`` are, for the colour bar.
        layer_labels: as in `heat_map`.
        stages: as in `heat_map`.

    Raises:
        ProtocolError: as in `heat_map`, but differences may be negative.
    """
    _check(values, models, "differences", -1)
    largest, decimals = _end(values)
    scale = Scale(COLOR_MAPS["difference"], -largest, largest, ticks=5, decimals=decimals, signed=True, unit=_POINTS)
    return _drawn(values, models, scale, title, quantity, layer_labels, stages)


def spread_map(
    values: "pd.DataFrame",
    models: "pd.DataFrame",
    *,
    title: str | None = None,
    quantity: str = "SD over trials",
    layer_labels: Mapping[str, str] | None = None,
    stages: Mapping[str, str] | None = None,
) -> "Figure":
    """Plot a square per model and layer, coloured by how uncertain its criticality is.

    The scale goes from 0, white, to the largest value, rounded up. All else is as in `heat_map`.

    Args:
        values: models x layers, in [0, 1]: standard deviations over trials, or half-widths of intervals; NaN: not
            known.
        models: as in `heat_map`.
        title: shown above the figure.
        quantity: what ``values`` are, for the colour bar.
        layer_labels: as in `heat_map`.
        stages: as in `heat_map`.

    Raises:
        ProtocolError: as in `heat_map`.
    """
    _check(values, models, "spreads", 0)
    largest, decimals = _end(values)
    scale = Scale(COLOR_MAPS["spread"], 0, largest, ticks=3, decimals=decimals, unit=_POINTS)
    return _drawn(values, models, scale, title, quantity, layer_labels, stages)


class _Powers(Scale):
    """Powers of ten of 1 + a value that is at least 0."""

    def number(self, value: float) -> str:
        """Return the value itself in two digits, with a letter for thousands."""
        return _short(10**value - 1)

    def spread(self, deviation: float) -> str:
        """Return nothing: the values span powers of ten."""
        return ""

    def tick(self, value: float) -> str:
        """Return the value itself; 10 in place of 9, which no eye tells apart on the bar."""
        return _short(10**value) if value else "0"


def _short(value: float) -> str:
    if value >= 0.995e15:
        return f"{value:.0e}".replace("e+", "e")
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if value >= 0.995 * factor or factor == 1:
            scaled = value / factor
            return (f"{scaled:.1f}" if scaled < 9.95 else f"{scaled:.0f}").removesuffix(".0") + letter
    raise AssertionError


def module_criticality_map(
    values: "pd.DataFrame",
    models: "pd.DataFrame",
    *,
    title: str | None = None,
    layer_labels: Mapping[str, str] | None = None,
    stages: Mapping[str, str] | None = None,
) -> "Figure":
    """Plot a square per model and module, coloured by the logarithm of 1 + its module criticality.

    Means are geometric ones of 1 + module criticality, since it spans powers of ten. All else is as in `heat_map`.

    Args:
        values: models x modules, at least 0; NaN: not measured.
        models: as in `heat_map`.
        title: shown above the figure.
        layer_labels: as in `heat_map`.
        stages: as in `heat_map`.

    Raises:
        ProtocolError: a table is empty, lacks a column or contains a name twice, the two differ in their models, or a
            value is below 0 or infinite.
    """
    _check(values, models, "numbers", 0, math.inf)
    if np.isinf(values.to_numpy("float64")).any():
        raise ProtocolError("A module criticality is infinite: expected finite numbers, NaN where not measured.")
    powers = (1 + values.astype("float64")).map(math.log10)
    largest = float(np.nan_to_num(powers.to_numpy()).max())
    step = max(1, math.ceil(largest / _MOST_POWERS))
    n_steps = max(1, math.ceil(largest / step))
    scale = _Powers(COLOR_MAPS["criticality"], 0, n_steps * step, ticks=n_steps + 1, unit="", summary="geometric mean")
    return _drawn(powers, models, scale, title, "module criticality", layer_labels, stages)


def _check(values: "pd.DataFrame", models: "pd.DataFrame", kind: str, low: float, high: float = 1) -> None:
    check_models(models, ("model", "label", "category", "accuracy"))
    check_values(values, models, kind, low, high)


def _end(values: "pd.DataFrame") -> tuple[float, int]:
    """Return where a scale ends that has room for all values, and how many decimals its numbers have, in percent."""
    largest = 100 * float(np.abs(np.nan_to_num(values.to_numpy("float64"))).max()) or 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    # Not a hair above a step that is meant, such as 30.000000000000004.
    end = next(step * power for step in _STEPS if largest <= step * power * (1 + 1e-9))
    return end / 100, 1 if largest < 9.95 else 0


def _drawn(
    values: "pd.DataFrame",
    models: "pd.DataFrame",
    scale: Scale,
    title: str | None,
    quantity: str,
    layer_labels: Mapping[str, str] | None,
    stages: Mapping[str, str] | None,
    rows: str = "models",
) -> "Figure":
    from matplotlib.figure import Figure

    categories = categories_of(models)
    ordered = models.iloc[[row for category in categories for row in category.rows]]
    values = values.loc[ordered["model"].to_list()].astype("float64")
    missing = bool(values.isna().to_numpy().any())
    layers = [shown((layer_labels or {}).get(name, name)) for name in values.columns]
    of_layer = [(stages or {}).get(name) for name in values.columns]
    squares = _squares(values, scale)
    quantity = f"{shown(quantity)} ({scale.unit})" if scale.unit else shown(quantity)
    with figure_style():
        top = _band_width(title, quantity, missing)
        grid = _grid(categories, ordered, layers, of_layer, squares, top, scale.summary, rows)
        figure = Figure(figsize=grid.size, dpi=100)
        axes = figure.add_axes((0, 0, 1, 1), label="squares")
        axes.set_xlim(0, grid.size[0])
        axes.set_ylim(0, grid.size[1])
        axes.set_axis_off()
        _draw_values(axes, grid, squares, scale)
        _draw_about_models(axes, grid, categories, ordered, scale.summary.replace(" ", "\n", 1))
        _draw_layers(axes, grid, layers)
        _draw_band(figure, axes, scale, title, quantity, missing)
    return figure


def _squares(values: "pd.DataFrame", scale: Scale) -> tuple[Squares, Squares, Squares]:
    """Return the values, row by row, the models' means, and the layers' means."""
    flat = values.to_numpy().ravel()
    found = [Squares(flat, [scale.number(value) if math.isfinite(value) else "" for value in flat])]
    for table, between in ((values.T, " ± "), (values, "\n±")):
        means, deviations = table.mean().to_numpy(), table.std().to_numpy()
        written = [
            (scale.number(mean) if math.isfinite(mean) else "")
            + (f"{between}{spread}" if math.isfinite(sd) and (spread := scale.spread(sd)) else "")
            for mean, sd in zip(means, deviations, strict=True)
        ]
        found.append(Squares(means, written))
    return found[0], found[1], found[2]


def _grid(
    categories: Sequence[Category],
    ordered: "pd.DataFrame",
    layers: Sequence[str],
    stages: Sequence[str | None],
    squares: tuple[Squares, Squares, Squares],
    top: float,
    summary: str,
    over: str,
) -> _Grid:
    """Lay out the heat map; ``top`` is the width that title and colour bar need."""
    layer_means = f"{summary} over {over}"
    n_models, n_layers = len(ordered), len(layers)
    height = min(max(_GRID_HEIGHT / n_models, _SQUARE_HEIGHTS[0]), _SQUARE_HEIGHTS[1])
    name_size = _name_size(height)
    blocks = _category_labels(categories)
    category_width = max(
        (text_width(line, name_size, "bold") for block in blocks for line in block.split("\n")), default=0
    )
    categories_end = _MARGIN + category_width
    strips = categories_end + 0.05 * bool(blocks)
    names = strips + (_STRIP_WIDTH + 0.06) * bool(blocks)
    names_end = names + max(text_width(name, name_size) for name in labels_of(ordered))
    accuracies = names_end + (0.14 + text_width("accuracy", _NOTE_SIZE)) * bool(ordered["accuracy"].notna().any())
    accuracies = max(accuracies, _MARGIN + text_width(layer_means, _NOTE_SIZE))
    left = accuracies + _GAP
    heads = max(text_width(word, _NOTE_SIZE) for word in summary.split(" ", 1))
    means_width = max(squares[1].widest(number_size(0, 1, height)) + 0.08, heads)
    apart = [before != after for before, after in pairwise(stages)]
    gaps = np.cumsum([0, *apart]) * _GROUP_GAP  # before each layer
    width = _square_width(left + gaps[-1] + _GAP + means_width + _MARGIN, n_layers, (squares[0], squares[2]))
    means = left + n_layers * width + gaps[-1] + _GAP
    layer_names = max(text_width(name, _layer_size(width)) for name in layers) + 0.05
    base = _MARGIN + layer_names + _LAYER_MEANS_HEIGHT + _GAP
    between = np.repeat(np.arange(len(categories)), [len(category.rows) for category in categories]) * _GROUP_GAP
    rows = np.arange(1, n_models + 1) * height + between  # down from the top of the grid to the lower edge of a row
    size = (
        max(means + means_width, _MARGIN + top) + _MARGIN,
        base + rows[-1] + _HEADER_HEIGHT + _BAND_HEIGHT + _MARGIN,
    )
    return _Grid(
        lefts=left + width * np.arange(n_layers, dtype=np.float64) + gaps,
        bottoms=base + rows[-1] - rows,
        square=(width, height),
        columns=(categories_end, strips, names, accuracies, means),
        means_width=means_width,
        size=size,
        layer_means=layer_means,
    )


def _square_width(rest: float, n_layers: int, columns: Sequence[Squares]) -> float:
    """Return the width of a square: that of the figure without the ``rest``, or more where numbers need it."""
    needed = max(squares.widest(NUMBER_SIZES[0]) for squares in columns) / FILLED
    width = (_WIDTH - rest) / n_layers
    if rest + n_layers * needed <= _WIDEST:
        width = max(width, needed)
    return min(max(width, _SQUARE_WIDTHS[0]), _SQUARE_WIDTHS[1])


def _name_size(height: float) -> float:
    return min(0.72 * 72 * height, _NAME_SIZE)


def _layer_size(width: float) -> float:
    return min(0.78 * 72 * width, _NAME_SIZE)


def _category_labels(categories: Sequence[Category]) -> list[str]:
    """Return the text next to each strip, on several lines if it has enough rows.

    Without any category there are no strips.
    """
    if [category.label for category in categories] == [NO_CATEGORY]:
        return []
    words = [category.label.split() for category in categories]
    return [
        ("\n" if len(several) <= len(category.rows) else " ").join(several)
        for several, category in zip(words, categories, strict=True)
    ]


def _draw_values(axes: "Axes", grid: _Grid, squares: tuple[Squares, Squares, Squares], scale: Scale) -> None:
    """Plot the squares, and the means of models and of layers."""
    width, height = grid.square
    x, y = np.meshgrid(grid.lefts, grid.bottoms)
    below = np.full(len(grid.lefts), grid.bottoms[-1] - _GAP - _LAYER_MEANS_HEIGHT)
    places = (x.ravel(), y.ravel()), (np.full(len(grid.bottoms), grid.columns[4]), grid.bottoms), (grid.lefts, below)
    sizes = grid.square, (grid.means_width, height), (width, _LAYER_MEANS_HEIGHT)
    for some, place, size, name in zip(squares, places, sizes, ("values", "model means", "layer means"), strict=True):
        lines = 2 if name == "layer means" else 1
        draw_squares(axes, place, size, some, scale, number_size(some.widest(1), size[0], size[1] / lines), name)


def _draw_about_models(
    axes: "Axes", grid: _Grid, categories: Sequence[Category], ordered: "pd.DataFrame", summary: str
) -> None:
    """Plot names, accuracies and categories at the left, and the heads of the columns."""
    from matplotlib.patches import Rectangle

    categories_end, strips, names, accuracies, means = grid.columns
    height, size = grid.square[1], _name_size(grid.square[1])
    middles = grid.bottoms + height / 2
    known = ordered["accuracy"].notna()
    for label, share, y in zip(labels_of(ordered), ordered["accuracy"], middles, strict=True):
        axes.text(names, y, label, fontsize=size, verticalalignment="center_baseline", gid="model")
        if known.any():
            number = f"{100 * share:.1f}" if math.isfinite(share) else "–"  # noqa: RUF001 (a dash)
            _right(axes, accuracies, y, number, fontsize=size, gid="accuracy")
    first = 0
    for category, label in zip(categories, _category_labels(categories), strict=False):
        last = first + len(category.rows) - 1
        low, high = grid.bottoms[last], grid.bottoms[first] + height
        strip = Rectangle((strips, low), _STRIP_WIDTH, high - low, facecolor=category.color, gid=category.label)
        axes.add_patch(strip)
        style = {"fontsize": size, "fontweight": "bold", "linespacing": 1.05}
        place = "center" if "\n" in label else "center_baseline"
        _right(axes, categories_end, (low + high) / 2, label, verticalalignment=place, gid="category", **style)
        first = last + 1
    head = grid.bottoms[0] + height + 0.05
    if known.any():
        _right(axes, accuracies, head, "accuracy\n(%)", verticalalignment="bottom", fontsize=_NOTE_SIZE)
    middle = means + grid.means_width / 2
    axes.text(middle, head, summary, fontsize=_NOTE_SIZE, horizontalalignment="center", verticalalignment="bottom")


def _draw_layers(axes: "Axes", grid: _Grid, layers: Sequence[str]) -> None:
    """Plot the names of the layers, below their means."""
    means = grid.bottoms[-1] - _GAP - _LAYER_MEANS_HEIGHT
    _right(axes, grid.lefts[0] - _GAP, means + _LAYER_MEANS_HEIGHT / 2, grid.layer_means, fontsize=_NOTE_SIZE)
    for name, left in zip(layers, grid.lefts, strict=True):
        axes.text(
            left + grid.square[0] / 2,
            means - 0.05,
            name,
            fontsize=_layer_size(grid.square[0]),
            rotation=90,
            horizontalalignment="center",
            verticalalignment="top",
            gid="layer",
        )


def _right(axes: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, **{"horizontalalignment": "right", "verticalalignment": "center_baseline", **style})


def _band_width(title: str | None, quantity: str, missing: bool) -> float:
    """Return the width of what is above the heat map."""
    parts = [text_width(quantity, _NOTE_SIZE) + _GAP + _BAR_WIDTH + 0.1]
    if missing:
        parts.append(_PATCH_WIDTH + _GAP + text_width("not measured", _NOTE_SIZE) + 0.2)
    return sum(parts) + (text_width(shown(title), _TITLE_SIZE, "bold") + 0.3 if title else 0)


def _draw_band(figure: "Figure", axes: "Axes", scale: Scale, title: str | None, quantity: str, missing: bool) -> None:
    """Plot title and colour bar."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    if title:
        y = height - _MARGIN - 0.13
        axes.text(_MARGIN, y, shown(title), fontsize=_TITLE_SIZE, fontweight="bold", gid="title")
    left, low = width - _MARGIN - _BAR_WIDTH - 0.1, height - _MARGIN - 0.13
    place = left / width, low / height, _BAR_WIDTH / width, _BAR_HEIGHT / height
    draw_color_bar(figure, place, scale, _NOTE_SIZE)
    middle = low + _BAR_HEIGHT / 2
    _right(axes, left - _GAP, middle, quantity, fontsize=_NOTE_SIZE, gid="quantity")
    if missing:
        end = left - _GAP - text_width(quantity, _NOTE_SIZE) - 0.2
        _right(axes, end, middle, "not measured", fontsize=_NOTE_SIZE)
        start = end - text_width("not measured", _NOTE_SIZE) - _GAP - _PATCH_WIDTH
        axes.add_patch(Rectangle((start, low - 0.015), _PATCH_WIDTH, 0.12, linewidth=0.4, **NOT_MEASURED))
