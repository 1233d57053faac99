"""Heat map of one model: a square per layer and class of images, classes with like profiles next to each other."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from layercrit.errors import ProtocolError
from layercrit.figures.heat_maps import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["class_map", "classes_by_similarity"]

_MOST_CLASSES = 60
_REQUIRED = ("layer", "class", "n_images", "criticality")


def classes_by_similarity(table: pd.DataFrame, most: int = _MOST_CLASSES) -> pd.DataFrame:
    """Return criticality as classes x layers, classes with like profiles next to each other, layers in their order.

    Classes are joined step by step, those first whose profiles over layers differ least (mean linkage of Euclidean
    distances), and each join is turned such that neighbours differ as little as possible.

    Args:
        table: one row per (layer, class) of one model, with the columns ``layer``, ``class`` and ``criticality``; NaN
            counts as the layer's mean.
        most: of more classes, these many are kept: those whose profile is farthest from the mean profile.

    Notes:
        Optimal leaf ordering: Bar-Joseph, Gifford & Jaakkola 2001, *Bioinformatics* 17, S22-S29.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    order = table["layer"].drop_duplicates(), table["class"].drop_duplicates()
    values = table.pivot(index="class", columns="layer", values="criticality").reindex(  # noqa: PD010
        index=order[1].astype(str), columns=order[0].astype(str)
    )
    apart = (values - values.mean()).fillna(0.0).to_numpy()
    far = np.sort(np.argsort(-(apart**2).sum(axis=1), kind="stable")[:most])
    if len(far) > 2:
        far = far[leaves_list(linkage(apart[far], "average", optimal_ordering=True))]
    return values.iloc[far]


def class_map(
    table: pd.DataFrame,
    *,
    title: str | None = None,
    accuracy: Mapping[str, float] | None = None,
    layer_labels: Mapping[str, str] | None = None,
    stages: Mapping[str, str] | None = None,
) -> "Figure":
    """Plot a square per class and layer of one model, coloured by criticality for the images of the class.

    Classes are in the order of `classes_by_similarity`, 60 of them at most. Behind the name of a class is in brackets
    how many images it has, unless all have as many. All else is as in `layercrit.figures.heat_maps.heat_map`.

    Args:
        table: as `layercrit.Measurement.by_class` returns it.
        title: shown above the figure.
        accuracy: class -> share of its images that the trained network names right. None: not shown.
        layer_labels: layer name -> the label below its column; missing: its name.
        stages: layer name -> its stage; a thin gap separates different stages. None: no gaps.

    Raises:
        ProtocolError: the table has no rows, lacks a column, or contains a layer and class twice.
    """
    for column in _REQUIRED:
        if column not in table.columns:
            raise ProtocolError(
                f"The table of classes has no column {column!r}. Expected {', '.join(_REQUIRED)}, as by_class returns."
            )
    if len(table) == 0 or table.duplicated(["layer", "class"]).any():
        raise ProtocolError(
            "The table of classes has no rows, or a layer and class more than once: expected one row for each, of one "
            "model. Select the model first."
        )
    values = classes_by_similarity(table)
    counts = table.drop_duplicates("class").set_index("class")["n_images"]
    alike = counts.min() == counts.max()
    names = list(values.index)
    about = pd.DataFrame(
        {
            "model": names,
            "label": [name if alike else f"{name} ({counts[name]})" for name in names],
            "category": None,
            "accuracy": [(accuracy or {}).get(name, np.nan) for name in names],
        }
    )
    few = len(names) < len(counts)
    return heat_map(
        values,
        about,
        title=title,
        quantity=f"criticality, {len(names)} of {len(counts):,} classes, least like the mean" if few else "criticality",
        layer_labels=layer_labels,
        stages=stages,
        rows="classes",
    )
