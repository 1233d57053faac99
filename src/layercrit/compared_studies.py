"""What a comparison needs of a study, and what its readers should know: what is missing, failed, or left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from layercrit.conditions import Condition, conditions_of
from layercrit.statistics import needed_trials

__all__ = ["ComparedStudy", "about_bad", "about_formats", "about_missing", "about_other_conditions", "listed_names"]


class _Failure(Protocol):
    """What a comparison needs of a trial that failed; see `layercrit.study.store.FailureRow`."""

    @property
    def model(self) -> str: ...
    @property
    def reset(self) -> str: ...
    @property
    def trial(self) -> int: ...
    @property
    def error(self) -> str: ...


class ComparedStudy(Protocol):
    """What a comparison needs of a study; see `layercrit.study.tables.Study`, which imports comparisons."""

    @property
    def folder(self) -> Path:
        """Where it is."""

    @property
    def models(self) -> pd.DataFrame:
        """One row per model."""

    @property
    def cells(self) -> pd.DataFrame:
        """One row per cell, of any status."""

    @property
    def failures(self) -> Sequence[_Failure]:
        """The trials that failed."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What is known of the study as a whole."""

    def of_reset(self, reset: str | None = None) -> pd.DataFrame:
        """Return the cells of one reset that are ok; None: the first one."""

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per (model, reset, layer)."""

    def by_model(self) -> pd.DataFrame:
        """Return one row per (model, reset)."""


def about_missing(
    study: ComparedStudy, models: Sequence[str], cells: pd.DataFrame, reset: str, left_out: set[str]
) -> list[str]:
    """Say which models have nothing to compare, or fewer trials than planned, and what failed."""
    wanted = [name for name in models if name not in left_out]
    cells = cells[cells["model"].isin(models)]
    usable = set(cells.loc[cells["status"] == "ok", "model"])
    notes = []
    if absent := [name for name in wanted if name not in usable]:
        notes.append(f"Not compared, since they have no cell that is ok: {listed_names(absent, len(absent))}.")
    trials = cells.groupby(["model", "layer"])["trial"].nunique().groupby("model").min()
    records = study.models.set_index("model")["record"]
    random = all(records[name].get("random_trials", {}).get(reset, True) for name in usable)
    protocol = study.record.get("protocol", {})
    if protocol.get("half_width") is None:
        most = max(int(trials.max()), needed_trials(protocol.get("trials", 0), random))
    else:
        most = needed_trials(protocol["pilot"], random)
        notes += _about_unlike_trials(cells, protocol["half_width"])
    if few := [f"{name} ({trials[name]})" for name in wanted if name in usable and trials[name] < most]:
        notes.append(f"Measured in fewer than the {most} trials of the study: {listed_names(few)}.")
    notes += [
        f"Failed: {failure.model}, trial {failure.trial} ({failure.error})."
        for failure in study.failures
        if failure.reset == reset and failure.model in wanted
    ]
    return notes


def about_other_conditions(
    study: ComparedStudy, models: pd.DataFrame, condition: Condition, left_out: set[str]
) -> list[str]:
    """Say which models were not measured under the condition of those that are compared.

    Args:
        study: all of it.
        models: those rows of its models that are under the condition.
        condition: the condition.
        left_out: names of models that are left out on request.
    """
    all_models, there = (table["variant_of"].fillna(table["model"]) for table in (study.models, models))
    absent = [name for name in dict.fromkeys(all_models) if name not in {*there, *left_out}]
    if not absent:
        return []
    words = condition.label(conditions_of(study.models))
    return [
        f"Not compared, since they were not measured under this condition ({words}): "
        f"{listed_names(absent, len(absent))}."
    ]


def _about_unlike_trials(cells: pd.DataFrame, half_width: float) -> list[str]:
    """Say which trials means rest on, where layers have unlike numbers of them."""
    of_layers = cells.groupby(["model", "layer"])["trial"].nunique()
    if of_layers.min() == of_layers.max():
        return []
    return [
        f"Layers have {of_layers.min()} to {of_layers.max()} trials, as planned for a half-width of {half_width:g}. A "
        "mean over layers takes each layer's mean over its own trials; its interval rests on those that all layers of "
        "a model have."
    ]


def about_formats(study: ComparedStudy, models: Sequence[str]) -> list[str]:
    """Say so where models were measured in different number formats."""
    known = dict(zip(study.models["model"], study.models["dtype"], strict=True))
    used: dict[str, list[str]] = {}
    for name in models:
        if isinstance(known[name], str):
            used.setdefault(known[name], []).append(name)
    if len(used) < 2:
        return []
    listed = "; ".join(f"{name}: {listed_names(members, 3)}" for name, members in sorted(used.items()))
    return [
        f"Measured in different number formats ({listed}); the models' notes give the error of each. Set `dtype` in "
        "the study file to measure all in one."
    ]


def about_bad(cells: pd.DataFrame, n_bad: pd.DataFrame) -> list[str]:
    """Say which layers of which models are in no mean, since some of their cells are not ok."""
    notes = []
    for model in n_bad.index[(n_bad > 0).any(axis=1)]:
        layers = n_bad.columns[n_bad.loc[model] > 0]
        bad = cells[(cells["model"] == model) & (cells["status"] != "ok")]
        counts = ", ".join(f"{n} {status}" for status, n in bad["status"].value_counts().items())
        notes.append(
            f"{model}: its means are over {n_bad.shape[1] - len(layers)} of {n_bad.shape[1]} layers; "
            f"left out, since cells are not ok ({counts}): {listed_names(layers)}."
        )
    return notes


def listed_names(names: Sequence[str] | pd.Index, limit: int = 5) -> str:
    """Return some names as a list for a note, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
