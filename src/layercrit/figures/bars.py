"""Figures of one model: its layers' criticality as bars, in depth order."""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from layercrit.cell_columns import WHOLE
from layercrit.errors import ProtocolError
from layercrit.figures.palette import BLUE, GREEN, ORANGE, OTHERS, PURPLE, SKY
from layercrit.figures.style import figure_style, printable, text_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["criticality_bars"]

_TYPE_COLORS = {"conv": BLUE, "linear": ORANGE, "attention": GREEN, "norm": PURPLE, "embedding": SKY}
_DOUBTFUL: dict[str, Any] = {"facecolor": "#E3E3E3", "edgecolor": "#8A8A8A", "linewidth": 0.5, "hatch": "////"}
_DOUBTFUL_LABEL = "not all trials ok"
_LINE_COLOR = "#333333"

_REQUIRED = ("layer", "type", "criticality", "low", "high", "status")


# Inches. Everything but the bars has a fixed size, so that the figure grows with the number of layers only.
_LEFT, _MARGIN, _AXES_HEIGHT = 0.6, 0.1, 2.5
_TITLE_HEIGHT, _LEGEND_HEIGHT, _LEGEND_PATCH = 0.32, 0.24, 0.42
_MARKS_HEIGHT = 0.1
_NARROWEST_AXES, _USUAL_AXES = 3.4, 9.0
_SLOT_RANGE = (0.125, 0.4)  # room of one bar
_LABEL_GAP = 0.15  # between the centres of the labels at the right
_TITLE_SIZE, _NOTE_SIZE, _LARGEST_NAME_SIZE = 9.5, 7.5, 8.0  # points


# How layers are marked, in the order in which marks are given.
_MARKS: tuple[dict[str, Any], ...] = (
    {"color": "black"},
    {"color": "#9A9A9A"},
    {"markerfacecolor": "white", "markeredgecolor": "black", "markeredgewidth": 0.7},
)
_MARK: dict[str, Any] = {"linestyle": "none", "marker": "v", "markersize": 3.6}
_MARK_HEIGHT = 1.035  # of their centres, on the axis of criticality


def criticality_bars(
    table: "pd.DataFrame",
    *,
    title: str,
    mean: float | None = None,
    chance: float | None = None,
    marks: Mapping[str, Collection[str]] | None = None,
) -> "Figure":
    """Plot the criticality of one model's layers as bars, in the order of the table.

    Bars of layers some of whose cells are not ok are grey and hatched, and have full height if they have no value. The
    figure needs no display; save it with `save_figure`.

    Args:
        table: one row per layer, in depth order, with the columns ``layer`` (name), ``type`` (decides the colour),
            ``criticality`` in [0, 1], ``low`` and ``high`` (its confidence limits; NaN: no error bar) and ``status``;
            an optional column ``label`` replaces the names below the bars (None: the name), and a column ``n_trials``
            adds the numbers of trials in brackets where they differ.
        title: shown above the bars, such as the model's name.
        mean: mean criticality of the model: a dashed line. None or NaN: none.
        chance: chance level, the mean cosine between predictions for different images: a dotted line at 1 - chance,
            where the prediction after the reset is as far off as one for another image. None or NaN: none.
        marks: label -> layers that get a triangle above their bars; three labels at most.

    Raises:
        ProtocolError: the table has no rows, lacks a column, or contains a layer twice.
    """
    _check_table(table)
    from matplotlib.figure import Figure

    labels = zip(table["label" if "label" in table else "layer"], table["layer"], strict=True)
    names = [printable(label if isinstance(label, str) else name) for label, name in labels]
    if unlike := "n_trials" in table and len(set(table["n_trials"])) > 1:
        names = [f"{name} ({n})" for name, n in zip(names, table["n_trials"], strict=True)]
    doubtful = (~table["status"].isin(WHOLE) | table["criticality"].isna()).to_numpy()
    colors = _colors([str(kind) for kind in table["type"]])
    legend = _legend(colors, bool(doubtful.any()))
    marked = {label: look for look, (label, layers) in zip(_MARKS, (marks or {}).items(), strict=False) if layers}
    levels = _levels(mean, chance)
    with figure_style():
        slot = min(max(_USUAL_AXES / len(table), _SLOT_RANGE[0]), _SLOT_RANGE[1])
        name_size = min(0.78 * 72 * slot, _LARGEST_NAME_SIZE)  # points: the height of a rotated name fits its slot
        axes_width = max(
            slot * len(table),
            _NARROWEST_AXES,
            text_width(printable(title), _TITLE_SIZE, "bold"),
            sum(text_width(label, _NOTE_SIZE) + _LEGEND_PATCH for label in [*legend, *marked]),
        )
        right = max((text_width(label, _NOTE_SIZE) + 0.06 for _, label, _ in levels), default=0) + _MARGIN
        below = max(text_width(name, name_size) for name in names) + 0.06 + _MARGIN
        marks_height = _MARKS_HEIGHT * bool(marked)
        above = marks_height + _LEGEND_HEIGHT * bool(legend or marked) + _TITLE_HEIGHT
        width, height = _LEFT + axes_width + right, below + _AXES_HEIGHT + above
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.add_axes((_LEFT / width, below / height, axes_width / width, _AXES_HEIGHT / height))
        _prepare_axes(axes, names, name_size)
        if unlike:
            axes.text(-0.03, -0.02, "(trials)", transform=axes.transAxes, fontsize=_NOTE_SIZE,
                      horizontalalignment="right", verticalalignment="top")  # fmt: skip
        _draw_bars(axes, table, doubtful, [colors[str(kind)] for kind in table["type"]])
        _draw_levels(axes, levels)
        for label, look in marked.items():
            places = table["layer"].isin(set((marks or {})[label])).to_numpy().nonzero()[0]
            axes.plot(places, [_MARK_HEIGHT] * len(places), clip_on=False, gid=label, **_MARK, **look)
        _draw_legend(axes, legend, marked, marks_height)
        axes.text(
            0,
            1 + (above - _TITLE_HEIGHT + 0.1) / _AXES_HEIGHT,
            printable(title),
            transform=axes.transAxes,
            fontsize=_TITLE_SIZE,
            fontweight="bold",
        )
    return figure


def _check_table(table: "pd.DataFrame") -> None:
    for column in _REQUIRED:
        if column not in table.columns:
            raise ProtocolError(
                f"The table has no column {column!r}; it has {', '.join(map(str, table.columns)) or 'none'}. "
                f"Expected {', '.join(_REQUIRED)}, one row per layer."
            )
    if len(table) == 0:
        raise ProtocolError("The table has no rows: expected one per layer. Measure at least one layer.")
    twice = table["layer"][table["layer"].duplicated()]
    if len(twice):
        raise ProtocolError(
            f"The table contains the layer {twice.iloc[0]!r} more than once: expected one row per layer of one model. "
            "Select one model, and average over its trials first."
        )


def _colors(types: Sequence[str]) -> dict[str, str]:
    """Give each type its colour, in order of appearance; types without a fixed one take the others in turn."""
    distinct = list(dict.fromkeys(types))
    others = [kind for kind in distinct if kind not in _TYPE_COLORS]
    taken = {kind: OTHERS[index % len(OTHERS)] for index, kind in enumerate(others)}
    return {kind: _TYPE_COLORS.get(kind) or taken[kind] for kind in distinct}


def _legend(colors: dict[str, str], any_doubtful: bool) -> dict[str, dict[str, Any]]:
    """Return label -> look of the patch. One type needs no legend."""
    types = {printable(kind): {"facecolor": color} for kind, color in colors.items()} if len(colors) > 1 else {}
    return types | ({_DOUBTFUL_LABEL: _DOUBTFUL} if any_doubtful else {})


def _levels(mean: float | None, chance: float | None) -> list[tuple[float, str, str]]:
    """Return (height, label, line style) of the lines across the bars."""
    levels = []
    if mean is not None and isfinite(mean):
        levels.append((mean, f"mean {mean:.2f}", "--"))
    if chance is not None and isfinite(chance):
        levels.append((1 - chance, f"unrelated prediction {1 - chance:.2f}", ":"))
    return levels


def _prepare_axes(axes: "Axes", names: Sequence[str], name_size: float) -> None:
    middle, half = (len(names) - 1) / 2, max(len(names), 6) / 2 + 0.15  # a single bar does not fill the figure
    axes.set_xlim(middle - half, middle + half)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_ylabel("criticality (1 − mean cosine similarity)")  # noqa: RUF001 (a minus sign)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=name_size)
    axes.tick_params(axis="x", length=0, pad=3)
    axes.tick_params(axis="y", length=2.5, width=0.6)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_bounds(0, 1)
    for level in (0, 1):
        axes.axhline(level, color="#BBBBBB", linewidth=0.6, zorder=0, clip_on=False)


def _draw_bars(axes: "Axes", table: "pd.DataFrame", doubtful: Any, colors: Sequence[str]) -> None:
    for x, (value, grey, color) in enumerate(zip(table["criticality"], doubtful, colors, strict=True)):
        if grey:
            axes.bar(x, value if isfinite(value) else 1.0, width=0.76, zorder=2, **_DOUBTFUL)
        else:
            axes.bar(x, value, width=0.76, zorder=2, color=color)
    known = (table["low"].notna() & table["high"].notna()).to_numpy()
    ends = known.nonzero()[0], table["low"][known], table["high"][known]
    # A halo, since black on dark bars is hard to see; snapped to pixels it would be wider on one side.
    axes.vlines(*ends, color="white", linewidth=2.1, zorder=3, snap=False)
    axes.vlines(*ends, color=_LINE_COLOR, linewidth=0.9, zorder=3, snap=False, clip_on=False, gid="intervals")


def _draw_levels(axes: "Axes", levels: Sequence[tuple[float, str, str]]) -> None:
    for (level, label, style), y in zip(levels, _apart([level for level, _, _ in levels]), strict=True):
        axes.axhline(level, color=_LINE_COLOR, linewidth=1.0, linestyle=style, zorder=4)
        axes.annotate(
            label,
            (1, y),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            fontsize=_NOTE_SIZE,
        )


def _apart(levels: Sequence[float]) -> list[float]:
    """Move the labels of two levels apart, evenly, where they would overlap."""
    gap = _LABEL_GAP / _AXES_HEIGHT
    if len(levels) < 2 or abs(levels[0] - levels[1]) >= gap:
        return list(levels)
    middle = (levels[0] + levels[1]) / 2
    half = gap / 2 if levels[0] > levels[1] else -gap / 2
    return [middle + half, middle - half]


def _draw_legend(
    axes: "Axes", bars: dict[str, dict[str, Any]], marks: dict[str, dict[str, Any]], marks_height: float
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not bars and not marks:
        return
    axes.legend(
        [Patch(**look) for look in bars.values()] + [Line2D([], [], **_MARK, **look) for look in marks.values()],
        [*bars, *marks],
        ncols=len(bars) + len(marks),
        loc="lower left",
        bbox_to_anchor=(0, 1 + marks_height / _AXES_HEIGHT),
        borderaxespad=0,
        borderpad=0.3,
        columnspacing=1.4,
        frameon=False,
        fontsize=_NOTE_SIZE,
        handlelength=1.2,
        handletextpad=0.5,
    )
