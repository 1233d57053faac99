"""What the page's script reads: the tables of a study as plain data, and differences of all pairs, 16 bits a number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from layercrit.cell_columns import WHOLE
from layercrit.comparison import Comparison, about_models, estimates_of
from layercrit.differences import compared_differences
from layercrit.figures.categories import categories_of
from layercrit.figures.squares import COLOR_MAPS
from layercrit.layers import layer_labels
from layercrit.study.tables import Study

__all__ = ["page_data"]

# Markers of the figures, as Plotly calls them.
_SYMBOLS = {
    "*": "star", "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross",
    "X": "x", "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "h": "hexagon",
}  # fmt: skip
_MATCHED = "temperature-matched criticality"
_VALUES = ("low", "high", "criticality_matched", "matched_low", "matched_high", "top1_agreement")
_MOST_PAIRS = 2_000  # of models; a study with more pairs gets those with the baseline only
_COVERS = ["nothing", "trials", "images", "trials and images", "models"]  # what intervals hold for
# Columns of differences, and how they are stored.
_STORED = {
    "difference": "difference", "low": "difference", "high": "difference", "p_value": "p_value", "p_holm": "p_value",
    "p_bh": "p_value", "covers": "place", "significant": "truth", "significant_bh": "truth",
}  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """The differences of some pairs, under one way to look at them.

    Attributes:
        between: models or categories.
        unit: what the intervals hold for.
        matched: whether at the matched temperature.
        pairs: of names.
        table: a row per pair and layer, in this order; layers in the order of the comparison.
        alpha: level of the tests.
        notes: what readers should know.
    """

    between: Literal["models", "categories"]
    unit: Literal["trials", "models"]
    matched: bool
    pairs: list[tuple[str, str]]
    table: pd.DataFrame
    alpha: float
    notes: tuple[str, ...]

    @property
    def quantity(self) -> str:
        return "matched" if self.matched else "criticality"


def page_data(study: Study, comparison: Comparison) -> tuple[dict[str, Any], bytes]:
    """Return what the page's script reads.

    Returns:
        Plain data for JSON, and the differences: of each of the ``blocks`` in turn each of the ``columns``,
        ``(n_pairs, n_layers)``, little-endian, stored as a difference (int16, units of 1e-4, -32768: none), a p-value
        (uint16, -1000 lg p, 65535: none), a place in the list of the column's name (uint8), or a truth (uint8). Whether
        it is significant is stored as well, since rounded p-values cannot tell.
    """
    about = about_models(study, comparison)
    categories = categories_of(about)
    about = about.iloc[[row for category in categories for row in category.rows]].reset_index(drop=True)
    places = [place for place, category in enumerate(categories) for _ in category.rows]
    models = about["model"].to_list()
    names = [about["category"][places.index(place)] for place in range(len(categories))]
    rows = estimates_of(study, comparison)
    # as everywhere else: where cells are not ok, means of the others are not shown
    rows.loc[~rows["status"].isin(WHOLE), list(_VALUES)] = math.nan
    tables = _tables(rows, models, list(comparison.criticality.columns))
    blocks = _blocks(study, comparison, models, [name for name in names if isinstance(name, str)])
    data = {
        "baseline": None if comparison.baseline is None else models.index(comparison.baseline),
        "level": study.level,
        "accuracy": comparison.accuracy,
        "categories": [
            {"name": name, "label": one.label, "color": one.color, "symbol": _SYMBOLS.get(one.marker, "circle")}
            for name, one in zip(names, categories, strict=True)
        ],
        "models": _models(comparison, about, places, tables, blocks),
        "layers": _layers(comparison, rows),
        "measures": _measures(comparison, tables, models),
        "trials": _numbers(tables["n_trials"], 0),
        "statuses": tables["status"].astype(object).where(tables["status"].notna(), None).to_numpy().tolist(),
        "scales": {name: _colors(color_map) for name, color_map in COLOR_MAPS.items()},
        "differences": {
            "alpha": blocks[0].alpha if blocks else None,
            "covers": _COVERS,
            "columns": _STORED,
            "values": list(dict.fromkeys(block.quantity for block in blocks)),
            "blocks": [
                {
                    "key": f"{block.between} {block.unit} {block.quantity}",
                    "notes": block.notes,
                    "pairs": [[(models if block.between == "models" else names).index(name) for name in pair]
                              for pair in block.pairs],
                }
                for block in blocks
            ],
        },
    }  # fmt: skip
    return data, b"".join(_packed(block.table) for block in blocks)


def _layers(comparison: Comparison, rows: pd.DataFrame) -> list[dict[str, str]]:
    shapes = rows.drop_duplicates("layer").set_index("layer")["shape"].reindex(comparison.layers.index)
    labels = layer_labels({str(name): shape if isinstance(shape, str) else None for name, shape in shapes.items()})
    return [
        {"name": str(name), "label": labels[str(name)], "stage": stage if isinstance(stage, str) else ""}
        for name, stage in comparison.layers["stage"].items()
    ]


def _tables(rows: pd.DataFrame, models: list[str], layers: list[str]) -> dict[str, pd.DataFrame]:
    """Return column -> models x layers."""
    found = rows.set_index(["model", "layer"])
    return {
        column: (found[column].unstack("layer") if column in found else pd.DataFrame())  # noqa: PD010
        .reindex(index=models, columns=layers)
        for column in (*_VALUES, "n_trials", "status")
    }  # fmt: skip


def _measures(
    comparison: Comparison, tables: Mapping[str, pd.DataFrame], models: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what the heat map can show; what was not measured is left out."""
    order = list(models)
    difference = None if comparison.difference is None else comparison.difference.loc[order]
    half_width = (tables["high"] - tables["low"]) / 2
    choices: list[tuple[str, str, str, pd.DataFrame | None]] = [
        ("criticality", "1 minus the mean cosine similarity of softmax outputs.", "criticality",
         comparison.criticality.loc[order]),
        ("difference to the baseline", "Criticality minus that of the baseline.", "difference", difference),
        ("spread over trials", "Standard deviation of criticality over trials.", "spread",
         comparison.sd_trials.loc[order]),
        ("half-width of the interval", "Half the width of the interval of criticality.", "spread", half_width),
        ("top-1 agreement", "Share of images whose top-1 class stays the same after the reset.", "criticality",
         tables["top1_agreement"]),
        (_MATCHED, "Criticality at the temperature at which each trained model's mean entropy is the same.",
         "criticality", tables["criticality_matched"]),
    ]  # fmt: skip
    limits = {"criticality": ("low", "high"), _MATCHED: ("matched_low", "matched_high")}
    return [
        {"label": label, "about": about, "scale": scale, "values": _numbers(table)}
        | {side: _numbers(tables[column]) for side, column in zip(("low", "high"), limits.get(label, ()), strict=False)}
        for label, about, scale, table in choices
        if table is not None and (label == "criticality" or table.notna().any(axis=None))
    ]


def _models(
    comparison: Comparison,
    about: pd.DataFrame,
    places: Sequence[int],
    tables: Mapping[str, pd.DataFrame],
    blocks: Sequence[_Block],
) -> list[dict[str, Any]]:
    """Return one mapping per model, in the order of the page."""
    numbers = pd.DataFrame(
        {
            "accuracy": about["accuracy"].to_numpy(),
            "criticality": about["criticality"].to_numpy(),
            "low": about["low"].to_numpy(),
            "high": about["high"].to_numpy(),
            "criticality_matched": about["criticality_matched"].to_numpy(),
            "difference": about["difference"].to_numpy(),
            "centre_of_mass": about["centre_of_mass"].to_numpy(),
            "top1_agreement": tables["top1_agreement"].mean(axis=1).to_numpy(),
            "unrelated": 1 - about["chance"].to_numpy(),
            "layers_that_differ": about["model"].map(_n_significant(comparison, blocks)).to_numpy(),
        },
        dtype="float64",
    )
    return [
        {"name": name, "label": label, "category": place} | {str(key): _number(value) for key, value in row.items()}
        for name, label, place, row in zip(
            about["model"], about["label"], places, numbers.to_dict("records"), strict=True
        )
    ]


def _n_significant(comparison: Comparison, blocks: Sequence[_Block]) -> dict[str, int]:
    """Return model -> on how many layers its difference to the baseline is significant.

    P-values are adjusted over the layers of one model. A model of which no difference could be tested is missing.
    """
    if not blocks:
        return {}
    baseline, table = comparison.baseline, blocks[0].table.dropna(subset="p_value")
    counts = table.groupby(["first", "second"], sort=False)["significant"].sum()
    found = zip(counts.index.to_flat_index(), counts, strict=True)
    return {
        str(second if first == baseline else first): int(count)
        for (first, second), count in found
        if baseline in (first, second)
    }


def _blocks(study: Study, comparison: Comparison, models: Sequence[str], categories: Sequence[str]) -> list[_Block]:
    """Return the differences of all pairs, those of models at first, under every way to look at them."""
    of_models = list(combinations(models, 2))
    if len(of_models) > _MOST_PAIRS:
        of_models = [(name, comparison.baseline) for name in models if comparison.baseline not in (None, name)]
    matched = [False, *([True] if comparison.models["criticality_matched"].notna().all() else [])]
    ways: list[tuple[Literal["models", "categories"], Literal["trials", "models"], list[tuple[str, str]]]] = [
        ("models", "trials", of_models),
        ("categories", "trials", list(combinations(categories, 2))),
        ("categories", "models", list(combinations(categories, 2))),
    ]
    blocks = []
    for between, unit, pairs in ways:
        for at_temperature in matched if pairs else ():
            found = compared_differences(
                study, comparison, pairs=pairs, between=between, unit=unit, family="pair", matched=at_temperature
            )
            blocks.append(_Block(between, unit, at_temperature, pairs, found.table, found.alpha, found.notes))
    return blocks


def _packed(table: pd.DataFrame) -> bytes:
    return b"".join(_column(table[name], stored) for name, stored in _STORED.items())


def _column(values: pd.Series, stored: str) -> bytes:
    match stored:
        case "difference":
            numbers = np.where(values.isna(), -32768, np.round(1e4 * values.fillna(0))).astype("<i2")
        case "p_value":
            with np.errstate(divide="ignore"):
                logarithms = -1000 * np.log10(values.fillna(1).to_numpy())
            numbers = np.where(values.isna(), 65535, np.clip(np.round(logarithms), 0, 65534)).astype("<u2")
        case "place":
            numbers = values.map(_COVERS.index).to_numpy(np.uint8)
        case _:
            numbers = values.to_numpy(np.uint8)
    return numbers.tobytes()


def _numbers(table: pd.DataFrame, digits: int = 6) -> list[list[float | None]]:
    """Return a table as JSON can hold it."""
    return [[_number(value, digits) for value in row] for row in table.to_numpy(dtype=np.float64)]


def _number(value: Any, digits: int = 6) -> float | None:
    number = math.nan if value is None else float(value)
    return round(number, digits) if math.isfinite(number) else None


def _colors(color_map: str) -> list[list[Any]]:
    """Return a colour map in Plotly's format."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [[place, to_hex(colormaps[color_map](place))] for place in np.linspace(0, 1, 33).tolist()]
