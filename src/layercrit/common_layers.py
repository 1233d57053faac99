"""The layers that all compared models have, and the means of their cells."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from layercrit.compared_studies import listed_names
from layercrit.counts import counted
from layercrit.errors import StudyError
from layercrit.protocol import MATCHED
from layercrit.wrappers import wrapper_of

__all__ = ["in_order_of_depth", "means_of_cells", "with_common_layers"]


def with_common_layers(cells: pd.DataFrame, first: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the cells of the layers that all models have, under names without wrappers where that is needed.

    Args:
        cells: of the models.
        first: the model whose layers are looked at first.

    Returns:
        the cells, and what is left out, in words.

    Raises:
        StudyError: there is no such layer.
    """
    of_model = {
        str(model): list(layers) for model, layers in cells.groupby("model", sort=False)["layer"].unique().items()
    }
    if all(set(layers) == set(of_model[first]) for layers in of_model.values()):
        return cells, []
    wrappers = {model: wrapper_of(layers) for model, layers in of_model.items()}
    bare = {model: [name.removeprefix(wrappers[model]) for name in layers] for model, layers in of_model.items()}
    common, unwrapped = (set[str].intersection(*map(set, names.values())) for names in (of_model, bare))
    if len(unwrapped) > len(common):
        common, of_model = unwrapped, bare
        lengths = cells["model"].map({model: len(wrapper) for model, wrapper in wrappers.items()})
        cells = cells.assign(
            **{
                column: [text and text[n:] for text, n in zip(cells[column], lengths, strict=True)]
                for column in ("layer", "stage")
            }
        )
    if not common:
        examples = "; ".join(f"{model}: {listed_names(layers, 3)}" for model, layers in list(of_model.items())[:3])
        raise StudyError(
            f"The models have no layer in common ({examples}). Compare models of one architecture: "
            "leave out the others."
        )
    return cells[cells["layer"].isin(common)], _about_layers(of_model, common)


def _about_layers(of_model: Mapping[str, Sequence[str]], common: set[str]) -> list[str]:
    left: dict[tuple[str, ...], list[str]] = {}
    for model, layers in of_model.items():
        if rest := tuple(name for name in layers if name not in common):
            left.setdefault(rest, []).append(model)
    if not left:
        return []
    parts = [
        f"{len(names)} of the {counted(len(common) + len(names), 'layer')} of {listed_names(models)} "
        f"({listed_names(names)})"
        for names, models in left.items()
    ]
    return [
        "The models differ in their layers, which are paired by name, wherever in the network they lie: compared are "
        f"the {len(common)} that all models have. Left out: {'; '.join(parts)}."
    ]


def in_order_of_depth(cells: pd.DataFrame, model: str) -> list[str]:
    """Return the layers in the order of a model's depth."""
    return list(cells[cells["model"] == model].sort_values("depth", kind="stable")["layer"].unique())


def means_of_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (model, layer): means and spread over trials, NaN where a cell is not ok."""
    table = cells.assign(**{MATCHED: cells.get(MATCHED, math.nan), "bad": cells["status"] != "ok"})
    groups = table.groupby(["model", "layer"], sort=False)
    grid = groups.agg(
        cosine=("cosine", "mean"),
        sd=("cosine", "std"),
        depth=("depth", "first"),
        stage=("stage", "first"),
        n_bad=("bad", "sum"),
        **{MATCHED: (MATCHED, "mean")},
    )
    grid.loc[grid["n_bad"] > 0, ["cosine", "sd", MATCHED]] = math.nan
    return grid
