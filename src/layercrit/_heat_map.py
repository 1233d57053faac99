"""The heat map of a study: a cell per model and layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from layercrit._categories import NO_CATEGORY, Category, categories_of, check_models, labels_of, shown
from layercrit.errors import ProtocolError
from layercrit.figures import figure_style, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["heat_map"]

Array = npt.NDArray[np.float64]

_LAYER_MEANS = "mean ± SD over models"
_COLOR_MAP = "viridis"  # even steps to the eye, also without colours
_NOT_MEASURED: dict[str, Any] = {"facecolor": "#E3E3E3", "edgecolor": "#A8A8A8", "hatch": "/////"}

# Inches.
_MARGIN, _GAP, _GROUP_GAP = 0.1, 0.07, 0.035
_GRID_WIDTH, _CELL_WIDTHS = 9.5, (0.08, 0.3)
_GRID_HEIGHT, _CELL_HEIGHTS = 7.0, (0.125, 0.21)
_STRIP_WIDTH, _LAYER_MEANS_HEIGHT = 0.07, 0.27
_BAND_HEIGHT, _HEADER_HEIGHT = 0.36, 0.3  # title and colour bar; heads of columns
_BAR_WIDTH, _BAR_HEIGHT, _PATCH_WIDTH = 1.6, 0.09, 0.2

# Points.
_TITLE_SIZE, _NAME_SIZE, _NOTE_SIZE = 9.5, 7.5, 7.0
_NUMBER_SIZES = (4.0, 6.5)  # smaller numbers than that are left out


@dataclass(frozen=True)
class _Grid:
    """Where the cells of a heat map lie, in inches from the lower left corner of the figure.

    Attributes:
        lefts: left edges of the columns, ``(n_layers,)``.
        bottoms: lower edges of the rows, ``(n_models,)``, the first on top.
        cell: width and height of a cell.
        columns: right edge of the category names, left edges of strips and names, right edge of accuracies, left edge
            of the models' means.
        means_width: of the models' means.
        size: width and height of the figure.
    """

    lefts: Array
    bottoms: Array
    cell: tuple[float, float]
    columns: tuple[float, float, float, float, float]
    means_width: float
    size: tuple[float, float]


def heat_map(
    values: "pd.DataFrame", models: "pd.DataFrame", *, title: str | None = None, quantity: str = "criticality"
) -> "Figure":
    """Draw a cell per model and layer, coloured by criticality.

    Models are grouped by category, the baseline first; within a category the order is that of ``models``. Numbers are
    in percent and are left out where cells are smaller than they. At the right stand mean and standard deviation
    (ddof 1) of a model over its layers, below those of a layer over the models. Cells without a value are grey and
    hatched, and in no mean. Save the figure with `layercrit.figures.save_figure`.

    Args:
        values: Models x layers, in [0, 1]; NaN: not measured. The index holds names of models, the columns those of
            layers in depth order.
        models: One row per model of ``values``: ``model`` (its name), ``label`` (None: its name), ``category`` (or
            None) and ``accuracy``, a share in [0, 1] (NaN: not known).
        title: Stands above.
        quantity: What ``values`` are, for the colour bar.

    Raises:
        ProtocolError: A table is empty, lacks a column or holds a name twice, the two differ in their models, or a
            value is outside of [0, 1].
    """
    check_models(models, ("model", "label", "category", "accuracy"))
    _check_values(values, models)
    from matplotlib.figure import Figure

    categories = categories_of(models)
    ordered = models.iloc[[row for category in categories for row in category.rows]]
    values = values.loc[ordered["model"].to_list()].astype("float64")
    missing = bool(values.isna().to_numpy().any())
    layers = [shown(name) for name in values.columns]
    with figure_style():
        top = _band_width(title, quantity, missing)
        grid = _grid(categories, ordered, layers, top)
        figure = Figure(figsize=grid.size, dpi=100)
        axes = figure.add_axes((0, 0, 1, 1), label="cells")
        axes.set_xlim(0, grid.size[0])
        axes.set_ylim(0, grid.size[1])
        axes.set_axis_off()
        _draw_values(axes, grid, values)
        _draw_about_models(axes, grid, categories, ordered)
        _draw_layers(axes, grid, layers)
        _draw_band(figure, axes, title, quantity, missing)
    return figure


def _grid(categories: Sequence[Category], ordered: "pd.DataFrame", layers: Sequence[str], top: float) -> _Grid:
    """Lay out the heat map; ``top`` is the width that title and colour bar need."""
    n_models, n_layers = len(ordered), len(layers)
    width = min(max(_GRID_WIDTH / n_layers, _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    height = min(max(_GRID_HEIGHT / n_models, _CELL_HEIGHTS[0]), _CELL_HEIGHTS[1])
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
    accuracies = max(accuracies, _MARGIN + text_width(_LAYER_MEANS, _NOTE_SIZE))
    left = accuracies + _GAP
    means = left + n_layers * width + _GAP
    means_width = text_width("100 ± 50", _number_size("100", 9, height)) + 0.08
    layer_names = max(text_width(name, _layer_size(width)) for name in layers) + 0.05
    gaps = np.repeat(np.arange(len(categories)), [len(category.rows) for category in categories]) * _GROUP_GAP
    base = _MARGIN + layer_names + _LAYER_MEANS_HEIGHT + _GAP
    rows = np.arange(1, n_models + 1) * height + gaps  # down from the top of the grid to the lower edge of a row
    size = (
        max(means + means_width, _MARGIN + top) + _MARGIN,
        base + rows[-1] + _HEADER_HEIGHT + _BAND_HEIGHT + _MARGIN,
    )
    return _Grid(
        lefts=left + width * np.arange(n_layers, dtype=np.float64),
        bottoms=base + rows[-1] - rows,
        cell=(width, height),
        columns=(categories_end, strips, names, accuracies, means),
        means_width=means_width,
        size=size,
    )


def _name_size(height: float) -> float:
    return min(0.72 * 72 * height, _NAME_SIZE)


def _layer_size(width: float) -> float:
    return min(0.78 * 72 * width, _NAME_SIZE)


def _number_size(widest: str, width: float, height: float) -> float:
    """Return the size of numbers in a cell of so many inches, 0 where they have no room."""
    size = min(0.86 * width / text_width(widest, 1), 0.66 * 72 * height, _NUMBER_SIZES[1])
    return size if size >= _NUMBER_SIZES[0] else 0.0


def _category_labels(categories: Sequence[Category]) -> list[str]:
    """Return what stands beside each strip, on several lines where there are rows enough.

    Without any category there are no strips.
    """
    if [category.label for category in categories] == [NO_CATEGORY]:
        return []
    words = [category.label.split() for category in categories]
    return [
        ("\n" if len(several) <= len(category.rows) else " ").join(several)
        for several, category in zip(words, categories, strict=True)
    ]


def _draw_values(axes: "Axes", grid: _Grid, values: "pd.DataFrame") -> None:
    """Draw the cells, and the means of models and of layers."""
    (width, height), (n_models, n_layers) = grid.cell, values.shape
    x, y = np.meshgrid(grid.lefts, grid.bottoms)
    cells = values.to_numpy().ravel()
    written = [f"{100 * value:.0f}" for value in cells]
    _draw_cells(axes, (x.ravel(), y.ravel()), grid.cell, cells, written, _number_size("100", width, height), "values")

    means, spreads = values.mean(axis=1).to_numpy(), values.std(axis=1).to_numpy()
    written = [_mean_and_spread(mean, " ± ", sd) for mean, sd in zip(means, spreads, strict=True)]
    place = np.full(n_models, grid.columns[4]), grid.bottoms
    size = _number_size("100 ± 50", grid.means_width, height)
    _draw_cells(axes, place, (grid.means_width, height), means, written, size, "model means")

    means, spreads = values.mean(axis=0).to_numpy(), values.std(axis=0).to_numpy()
    written = [_mean_and_spread(mean, "\n±", sd) for mean, sd in zip(means, spreads, strict=True)]
    place = grid.lefts, np.full(n_layers, grid.bottoms[-1] - _GAP - _LAYER_MEANS_HEIGHT)
    size = _number_size("±50", width, _LAYER_MEANS_HEIGHT / 2)
    _draw_cells(axes, place, (width, _LAYER_MEANS_HEIGHT), means, written, size, "layer means")


def _mean_and_spread(mean: float, between: str, deviation: float) -> str:
    return f"{100 * mean:.0f}" + (f"{between}{100 * deviation:.0f}" if math.isfinite(deviation) else "")


def _draw_cells(
    axes: "Axes",
    place: tuple[Array, Array],
    size: tuple[float, float],
    values: Array,
    written: Sequence[str],
    number_size: float,
    gid: str,
) -> None:
    """Draw cells at ``place`` (their left and lower edges) with what is written in them; hatched without a value."""
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    left, bottom = place
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * size
    cells = np.stack([left, bottom], axis=1)[:, None, :] + corners  # (n_cells, 4, 2)
    known = np.isfinite(values)
    colors = colormaps[_COLOR_MAP](values)
    edges: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.4}
    axes.add_collection(PolyCollection(list(cells[known]), facecolors=colors[known], gid=gid, **edges), autolim=False)
    if not known.all():
        absent = PolyCollection(list(cells[~known]), gid=f"{gid}, not measured", linewidths=0.4, **_NOT_MEASURED)
        axes.add_collection(absent, autolim=False)
    if not number_size:
        return
    for index in known.nonzero()[0].tolist():
        axes.text(
            left[index] + size[0] / 2,
            bottom[index] + size[1] / 2,
            written[index],
            color=_readable_on(colors[index]),
            fontsize=number_size,
            horizontalalignment="center",
            verticalalignment="center_baseline" if "\n" not in written[index] else "center",
            linespacing=1.0,
            gid=gid,
        )


def _readable_on(color: Array) -> str:
    """Return black or white, whichever has more contrast by the relative luminance of WCAG 2.2."""
    parts = color[:3]
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _draw_about_models(axes: "Axes", grid: _Grid, categories: Sequence[Category], ordered: "pd.DataFrame") -> None:
    """Draw names, accuracies and categories at the left, and the heads of the columns."""
    from matplotlib.patches import Rectangle

    categories_end, strips, names, accuracies, means = grid.columns
    height, size = grid.cell[1], _name_size(grid.cell[1])
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
    axes.text(middle, head, "mean\n± SD", fontsize=_NOTE_SIZE, horizontalalignment="center", verticalalignment="bottom")


def _draw_layers(axes: "Axes", grid: _Grid, layers: Sequence[str]) -> None:
    """Draw the names of the layers, below their means."""
    means = grid.bottoms[-1] - _GAP - _LAYER_MEANS_HEIGHT
    _right(axes, grid.lefts[0] - _GAP, means + _LAYER_MEANS_HEIGHT / 2, _LAYER_MEANS, fontsize=_NOTE_SIZE)
    for name, left in zip(layers, grid.lefts, strict=True):
        axes.text(
            left + grid.cell[0] / 2,
            means - 0.05,
            name,
            fontsize=_layer_size(grid.cell[0]),
            rotation=90,
            horizontalalignment="center",
            verticalalignment="top",
            gid="layer",
        )


def _right(axes: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, **{"horizontalalignment": "right", "verticalalignment": "center_baseline", **style})


def _band_width(title: str | None, quantity: str, missing: bool) -> float:
    """Return the width of what stands above the heat map."""
    parts = [text_width(f"{shown(quantity)} (%)", _NOTE_SIZE) + _GAP + _BAR_WIDTH + 0.1]
    if missing:
        parts.append(_PATCH_WIDTH + _GAP + text_width("not measured", _NOTE_SIZE) + 0.2)
    return sum(parts) + (text_width(shown(title), _TITLE_SIZE, "bold") + 0.3 if title else 0)


def _draw_band(figure: "Figure", axes: "Axes", title: str | None, quantity: str, missing: bool) -> None:
    """Draw title and colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    if title:
        y = height - _MARGIN - 0.13
        axes.text(_MARGIN, y, shown(title), fontsize=_TITLE_SIZE, fontweight="bold", gid="title")
    left, low = width - _MARGIN - _BAR_WIDTH - 0.1, height - _MARGIN - 0.13
    bar = figure.add_axes((left / width, low / height, _BAR_WIDTH / width, _BAR_HEIGHT / height), label="colours")
    colors = ScalarMappable(Normalize(0, 1), _COLOR_MAP)
    scale = figure.colorbar(colors, cax=bar, orientation="horizontal")
    scale.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    scale.ax.tick_params(labelsize=_NOTE_SIZE, length=2, width=0.5, pad=1.5)
    scale.outline.set_visible(False)
    if scale.solids is not None:
        scale.solids.set_edgecolor("face")  # without, many viewers show gaps
    label, middle = f"{shown(quantity)} (%)", low + _BAR_HEIGHT / 2
    _right(axes, left - _GAP, middle, label, fontsize=_NOTE_SIZE)
    if missing:
        end = left - _GAP - text_width(label, _NOTE_SIZE) - 0.2
        _right(axes, end, middle, "not measured", fontsize=_NOTE_SIZE)
        start = end - text_width("not measured", _NOTE_SIZE) - _GAP - _PATCH_WIDTH
        axes.add_patch(Rectangle((start, low - 0.015), _PATCH_WIDTH, 0.12, linewidth=0.4, **_NOT_MEASURED))


def _check_values(values: "pd.DataFrame", models: "pd.DataFrame") -> None:
    for kind, index in (("layer", values.columns), ("model", values.index)):
        if len(index) == 0:
            raise ProtocolError(f"The values have no {kind}: expected a row per model and a column per layer.")
        if index.has_duplicates:
            name = index[index.duplicated()][0]
            raise ProtocolError(f"The values hold the {kind} {name!r} more than once: expected it once.")
    sides = ("values", list(values.index)), ("table of models", list(models["model"]))
    for (here, names), (there, others) in (sides, sides[::-1]):
        if lacking := [str(name) for name in names if name not in set(others)]:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise ProtocolError(
                f"Models in the {here} but not in the {there}: {', '.join(lacking[:5])}{more}. Expected the same "
                "models in both."
            )
    outside = ((values < 0) | (values > 1)).to_numpy()
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        raise ProtocolError(
            f"The value of {values.index[row]!r} at {values.columns[column]!r} is {values.to_numpy()[row, column]:g}: "
            "expected shares in [0, 1], NaN where not measured. Divide percentages by 100."
        )
