"""Invented studies for the figures of many models, and what is found and checked in a drawn figure."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from layercrit.figures.style import figure_style

CATEGORIES = ["contrastive", "augmentation", None, "own_idea", "baseline", "augmentation", "training_recipes"]
NASTY = ["$x_1$", "a$b$c", r"\frac{", "_hidden", "cost$", "tab\tbell\x07", "line\nbreak", "<&>\"'", "Cé±", "x" * 500]
SHOWN = ["".join(one if one.isprintable() else " " for one in name) for name in NASTY[:-1]] + [f"{'x' * 29}…{'x' * 29}"]


def tables(n_models: int = 7, n_layers: int = 5) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return values and models of an invented study."""
    generator = np.random.default_rng(n_models)
    names = [f"model_{index}" for index in range(n_models)]
    values = pd.DataFrame(
        generator.random((n_models, n_layers)), index=names, columns=[f"layer{i}.conv" for i in range(n_layers)]
    )
    means = values.mean(axis=1).to_numpy()
    models = pd.DataFrame(
        {
            "model": names,
            "label": [f"Model {index}" for index in range(n_models)],
            "category": list(itertools.islice(itertools.cycle(CATEGORIES), n_models)),
            "accuracy": generator.uniform(0.5, 0.8, n_models),
            "criticality": means,
            "low": means - 0.02,
            "high": means + 0.03,
            "attack_norm": [("linf", "l2")[index % 2] for index in range(n_models)],
            "eps": [(8.0, 0.01, 0.0)[index % 3] for index in range(n_models)],
        }
    )
    return values, models


def correlations(*rows: tuple[str | float | None, str, float, float]) -> pd.DataFrame:
    """Return rows of ``without``, ``method``, ``statistic`` and ``pvalue`` as a comparison holds them."""
    table = pd.DataFrame(rows, columns=["without", "method", "statistic", "pvalue"])
    return table.assign(without=pd.Series([row[0] for row in rows], dtype=object), n=9)  # keeps None


def numbers(figure: Figure | Axes, gid: str) -> list[tuple[str, tuple[float, float], str]]:
    """Return the numbers in squares, row by row from the top: what is written, where its middle is, and its colour."""
    found = [
        (one.get_label(), tuple(middle), to_hex(color))
        for one in figure.findobj(PathCollection) if one.get_gid() == gid
        for middle, color in zip(one.get_offsets().tolist(), one.get_facecolors(), strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda one: (-round(one[1][1], 6), one[1][0]))


def written(figure: Figure | Axes, gid: str) -> list[str]:
    found = [text.get_text() for text in figure.findobj(Text) if text.get_gid() == gid and text.get_text()]
    return found or [text for text, _, _ in numbers(figure, gid)]


def all_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def collection(figure: Figure | Axes, gid: str) -> PolyCollection:
    (found,) = (one for one in figure.findobj(PolyCollection) if one.get_gid() == gid)
    return found


def lines(figure: Figure | Axes, gid: str) -> list[Line2D]:
    return [line for line in figure.findobj(Line2D) if line.get_gid() == gid]


def bars(figure: Figure | Axes, gid: str) -> list[list[list[float]]]:
    """Return the ends of lines that were drawn together, ``[[x, y], [x, y]]`` each."""
    found = [one for one in figure.findobj(LineCollection) if one.get_gid() == gid]
    return [segment.tolist() for one in found for segment in one.get_segments()]


def legend(figure: Figure) -> dict[str, tuple[str, str]]:
    """Return label -> colour and marker."""
    if not figure.legends:
        return {}
    (one,) = figure.legends
    handles = [(to_hex(line.get_color()).upper(), str(line.get_marker())) for line in one.get_lines()]
    return dict(zip([text.get_text() for text in one.get_texts()], handles, strict=True))


def boxes_of(figure: Figure) -> list[tuple[Text, np.ndarray]]:
    """Return the texts of a figure as it is saved, each with its left, lower, right and upper edge in pixels."""
    with figure_style():
        figure.draw_without_rendering()  # places ticks
        renderer = FigureCanvasAgg(figure).get_renderer()
        shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        found = [(text, Text.get_window_extent(text, renderer)) for text in shown]  # of a label without its line
    return [(text, box.extents) for text, box in found if box.width]


def check_layout(figure: Figure) -> None:
    """Check that no text is cut off, and that no text covers another."""
    width, height = figure.bbox.size
    boxes = boxes_of(figure)
    texts = [text.get_text() for text, _ in boxes]
    left, low, right, high = np.array([box for _, box in boxes]).T
    for over, side in ((left < 0, "left"), (low < 0, "bottom"), (right > width, "right"), (high > height, "top")):
        assert not over.any(), f"cut off at the {side}: {[texts[index] for index in np.flatnonzero(over)[:5]]}"
    # A pixel of 100 to the inch: boxes are as high as the highest letters of a font, those of numbers stay empty there.
    beside = np.minimum.outer(right, right) - np.maximum.outer(left, left) > 1
    above = np.minimum.outer(high, high) - np.maximum.outer(low, low) > 1
    pairs = np.argwhere(np.triu(beside & above, 1))
    assert not len(pairs), f"over each other: {[(texts[i], texts[j]) for i, j in pairs[:5]]}"
