"""What the figures of many models agree on: order, colours and markers of categories, and names as they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layercrit.errors import ProtocolError
from layercrit.figures import printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CATEGORY_COLORS",
    "CATEGORY_MARKERS",
    "NO_CATEGORY",
    "Category",
    "categories_of",
    "check_models",
    "labels_of",
    "shown",
]

# Colours of Okabe & Ito 2008 (jfly.uni-koeln.de/color), told apart with any common colour blindness. The order is that
# of the categories in every figure.
CATEGORY_COLORS = {
    "baseline": "#000000",
    "training_recipes": "#0072B2",
    "augmentation": "#E69F00",
    "adversarial_training": "#CC79A7",
    "contrastive": "#009E73",
    "freezing": "#56B4E9",
}
CATEGORY_MARKERS = {
    "baseline": "*",
    "training_recipes": "o",
    "augmentation": "s",
    "adversarial_training": "^",
    "contrastive": "D",
    "freezing": "v",
}
_OTHER_COLORS = ("#D55E00", "#F0E442", "#7A5195", "#8C6D31", "#7FA653")
_OTHER_MARKERS = ("P", "X", "<", ">", "p", "h")
NO_CATEGORY, _NO_CATEGORY_COLOR, _NO_CATEGORY_MARKER = "no category", "#8A8A8A", "."
_LONGEST = 60  # characters of a name


@dataclass(frozen=True)
class Category:
    """A category of models: how it looks, and which rows of the table are its."""

    label: str
    color: str
    marker: str
    rows: tuple[int, ...]


def check_models(models: "pd.DataFrame", required: Sequence[str]) -> None:
    """Raise ProtocolError for a table that lacks a column, has no rows, or holds a model twice."""
    """Raise ProtocolError for a table that lacks a column, has no rows, or holds a model twice."""
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
        raise ProtocolError(f"The table of models holds {twice.iloc[0]!r} more than once: expected one row per model.")


def categories_of(models: "pd.DataFrame") -> list[Category]:
    """Return the categories in their order: the known ones, others as they appear, then models without one."""
    names = [name if isinstance(name, str) and name else None for name in models["category"]]
    others = [name for name in dict.fromkeys(names) if name is not None and name not in CATEGORY_COLORS]
    look = {name: (color, CATEGORY_MARKERS[name]) for name, color in CATEGORY_COLORS.items()}
    for index, name in enumerate(others):
        look[name] = _OTHER_COLORS[index % len(_OTHER_COLORS)], _OTHER_MARKERS[index % len(_OTHER_MARKERS)]
    rows = {name: tuple(row for row, one in enumerate(names) if one == name) for name in [*look, None]}
    found = [Category(shown(name.replace("_", " ")), *look[name], rows[name]) for name in look if rows[name]]
    if rows[None]:
        found.append(Category(NO_CATEGORY, _NO_CATEGORY_COLOR, _NO_CATEGORY_MARKER, rows[None]))
    return found


def labels_of(models: "pd.DataFrame") -> list[str]:
    """Return what each model is called in figures."""
    pairs = zip(models["label"], models["model"], strict=True)
    return [shown(label if isinstance(label, str) and label.strip() else name) for label, name in pairs]


def shown(text: object) -> str:
    """Return a text from outside as it can be drawn, without the middle where it is very long."""
    text = printable(text)
    half = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"
