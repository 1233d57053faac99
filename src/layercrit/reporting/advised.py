"""Advice on a study's models, as the page marks it on their profiles."""

from collections.abc import Sequence
from typing import Any

from layercrit.advice import ACTIONS, Advice, advise
from layercrit.comparison import Comparison, estimates_of
from layercrit.errors import AdviceError
from layercrit.study.tables import Study

__all__ = ["advice_data"]


def advice_data(
    study: Study, comparison: Comparison, models: Sequence[str], places: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what the page says about each action, and which layers of some models it marks.

    Each layer is one knob, as with ``--of weights``, and budgets are the defaults. Models without advice are left out,
    such as those of which the numbers of parameters are not known.

    Args:
        study: finished or not.
        comparison: of its models.
        models: those to show.
        places: all models in the order of the page.
    """
    rows = estimates_of(study, comparison)
    layers = list(comparison.criticality.columns)
    found = []
    for action in ACTIONS.values():
        marked = []
        for model in models:
            table = rows[rows["model"] == model].set_index("layer").reindex(layers).reset_index()
            if table[["n_parameters", "status"]].isna().any(axis=None):
                continue
            try:
                advice = advise(table, action.name, model=model)
            except AdviceError:
                continue
            marked.append({"model": places.index(model), "said": _said(advice), **_marks(advice)})
        if marked:
            found.append({"name": action.name, "done": action.done, "models": marked})
    return found


def _said(advice: Advice) -> str:
    return " ".join(f"{line[0].upper()}{line[1:]}." for line in advice.in_words())


def _marks(advice: Advice) -> dict[str, list[int]]:
    """Return the places of the layers that are chosen, and of those that might be on the other side."""
    place = {layer: number for number, layer in enumerate(advice.record["layers"])}
    table = advice.to_pandas()
    return {name: sorted(table.loc[table[name], "layer"].map(place)) for name in ("chosen", "tie")}
