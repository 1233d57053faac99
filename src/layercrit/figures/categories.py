"""What the figures of many models share: order, colours and markers of categories, and how names are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layercrit.categories import ADVERSARIAL, CATEGORIES
from layercrit.errors import ProtocolError
from layercrit.figures.palette import BLACK, BLUE, GREEN, GREY, ORANGE, OTHERS, PURPLE, SKY
from layercrit.figures.style import printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CATEGORY_COLORS",
    "CATEGORY_MARKERS",
    "NO_CATEGORY",
    "Category",
    "categories_of",
    "check_models",
    "check_values",
    "labels_of",
    "shown",
]

_LOOKS = {
    "baseline": (BLACK, "*"),
    "training_recipes": (BLUE, "o"),
    "augmentation": (ORANGE, "s"),
    ADVERSARIAL: (PURPLE, "^"),
    "contrastive": (GREEN, "D"),
    "freezing": (SKY, "v"),
}
CATEGORY_COLORS = {name: _LOOKS[name][0] for name in CATEGORIES}
CATEGORY_MARKERS = {name: _LOOKS[name][1] for name in CATEGORIES}
_OTHER_MARKERS = ("P", "X", "<", ">", "p", "h")
NO_CATEGORY, _NO_CATEGORY_MARKER = "no category", "."
_LONGEST = 60  # characters of a name


@dataclass(frozen=True)
class Category:
    """A category of models: its colour and marker, and its rows in the table."""

    label: str
    color: str
    marker: str
    rows: tuple[int, ...]


def check_models(models: "pd.DataFrame", required: Sequence[str]) -> None:
    """Raise ProtocolError for a table that lacks a column, has no rows, or contains a model twice."""
    for column in required:
        if column not in models.columns:
            raise ProtocolError(
                f"The table of models has no column {column!r}; it has {', '.join(map(str, models.columns)) or 'none'}."
                f" Expected {', '.join(required)}, one row per model."
            )
    if len(models) == 0:
        raise ProtocolError("The table of models has no rows: expected one per model.")
    twice = models["model"][models["model"].duplicated()]
    if len(twice):
        raise ProtocolError(
            f"The table of models contains {twice.iloc[0]!r} more than once: expected one row per model."
        )


def check_values(
    values: "pd.DataFrame", models: "pd.DataFrame", kind: str = "shares", low: float = 0, high: float = 1
) -> None:
    """Raise ProtocolError for values, models x layers, that do not fit the table of models or are out of range.

    Args:
        values: between ``low`` and ``high``, or NaN.
        models: the table, already checked.
        kind: what the values are.
        low: the least they may be.
        high: the most.
    """
    for what, index in (("layer", values.columns), ("model", values.index)):
        if len(index) == 0:
            raise ProtocolError(f"The values have no {what}: expected a row per model and a column per layer.")
        if index.has_duplicates:
            name = index[index.duplicated()][0]
            raise ProtocolError(f"The values contain the {what} {name!r} more than once: expected it once.")
    sides = ("values", list(values.index)), ("table of models", list(models["model"]))
    for (here, names), (there, others) in (sides, sides[::-1]):
        if lacking := [str(name) for name in names if name not in set(others)]:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise ProtocolError(
                f"Models in the {here} but not in the {there}: {', '.join(lacking[:5])}{more}. Expected the same "
                "models in both."
            )
    outside = ((values < low) | (values > high)).to_numpy()
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        raise ProtocolError(
            f"The value of {values.index[row]!r} at {values.columns[column]!r} is {values.to_numpy()[row, column]:g}: "
            f"expected {kind} in [{low:g}, {high:g}], NaN where not measured."
            + " Divide percentages by 100."
            * (high == 1)
        )


def categories_of(models: "pd.DataFrame") -> list[Category]:
    """Return the categories in their order: the known ones, others as they appear, then models without one."""
    names = [name if isinstance(name, str) and name else None for name in models["category"]]
    others = [name for name in dict.fromkeys(names) if name is not None and name not in CATEGORY_COLORS]
    look: dict[str, tuple[str, str]] = {
        name: (color, CATEGORY_MARKERS[name]) for name, color in CATEGORY_COLORS.items()
    }
    for index, name in enumerate(others):
        look[name] = OTHERS[index % len(OTHERS)], _OTHER_MARKERS[index % len(_OTHER_MARKERS)]
    rows = {name: tuple(row for row, one in enumerate(names) if one == name) for name in [*look, None]}
    found = [Category(shown(name.replace("_", " ")), *look[name], rows[name]) for name in look if rows[name]]
    if rows[None]:
        found.append(Category(NO_CATEGORY, GREY, _NO_CATEGORY_MARKER, rows[None]))
    return found


def labels_of(models: "pd.DataFrame") -> list[str]:
    """Return what each model is called in figures."""
    pairs = zip(models["label"], models["model"], strict=True)
    return [shown(label if isinstance(label, str) and label.strip() else name) for label, name in pairs]


def shown(text: object) -> str:
    """Return a text from outside as figures can show it, without the middle if it is very long."""
    text = printable(text)
    half = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"
