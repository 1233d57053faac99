"""How far a study is: which cells each model has, which are done, and the time for those that are left."""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from layercrit.precision import PrecisionPlan
from layercrit.statistics import needed_trials
from layercrit.study.store import FailureRow, PlanRow

__all__ = ["MODULES", "RESULT", "has_modules", "is_run", "planned", "progress", "seconds_left", "trials_of_models"]

MODULES = "module-criticality"
"""In the folder of a study: where its module criticality is, unless another folder is named."""

RESULT = "of.json"
"""In the folder of a model there: what its result is of, and that it is whole."""


def has_modules(folder: Path, record: Mapping[str, Any]) -> bool:
    """Return whether the file of a study asks for module criticality, or its folder has that of some model."""
    return "module_criticality" in record or any((folder / MODULES).glob(f"*/{RESULT}"))


def progress(
    models: Iterable[str], cells: pd.DataFrame, failures: Sequence[FailureRow], planned: Mapping[str, int]
) -> pd.DataFrame:
    """Return one row per model; see `layercrit.study.tables.Study.progress`."""
    done = cells["model"].value_counts()
    rows = []
    for model in models:
        errors = [failure.error for failure in failures if failure.model == model]
        n_planned, n_done = planned.get(model), int(done.get(model, 0))
        state = "failed" if errors else "not opened" if n_planned is None else "done" if n_done == n_planned else "left"
        rows.append((model, state, n_planned, n_done, len(errors), errors[0] if errors else None))
    table = pd.DataFrame(rows, columns=["model", "state", "n_planned", "n_done", "n_failed", "error"])
    return table.astype({"n_planned": "float64"})


def seconds_left(
    models: Iterable[str],
    cells: pd.DataFrame,
    failures: Sequence[FailureRow],
    planned: Mapping[str, int],
    *,
    n_trials: int,
    runs: Sequence[Mapping[str, Any]],
    running: Container[int] = (),
) -> float | None:
    """Return the time for the cells left, at the speed of the last run, of all its shards; None if it measured nothing.

    Args:
        models: all models of the study.
        cells: those that are measured.
        failures: what failed; it is not left.
        planned: model -> how many cells it has; a model that was not opened yet counts with the mean of the others.
        n_trials: how many trials each model has, those of all resets together.
        runs: all of them, in order of time.
        running: numbers of the shards that are being run, whose speed counts; none: those that were run last.
    """
    speed = 0.0  # cells a second
    last = _last(runs)
    for run in [run for run in last if running and int(run.get("shard", "0").split("/")[0]) in running] or last:
        finished = cells.loc[cells["run"] == run["run"], "finished"].map(datetime.fromisoformat)
        if not finished.empty:
            took = (finished.max() - datetime.fromisoformat(run["started"])).total_seconds()
            speed += len(finished) / max(took, 1.0)
    if not speed or not planned:
        return None
    typical = sum(planned.values()) / len(planned)
    failed = Counter(failure.model for failure in failures)
    wanted = sum(planned.get(model, typical) * max(0.0, 1 - failed[model] / n_trials) for model in models)
    return float(max(0.0, wanted - len(cells)) / speed)


def _last(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the last run; if it was in shards, that of each of them."""
    shard = str(runs[-1].get("shard", ""))
    if not shard:
        return [runs[-1]]
    of = shard.partition("/")[2]
    return list({run["shard"]: run for run in runs if str(run.get("shard", "")).partition("/")[2] == of}.values())


def planned(
    plan: Sequence[PlanRow],
    record: Mapping[str, Any],
    models: Iterable[Mapping[str, Any]],
    plans: Mapping[tuple[str, str], PrecisionPlan],
) -> dict[str, int]:
    """Return model -> how many cells it has, for the models that were opened.

    Args:
        plan: the cells that are planned so far.
        record: of the study.
        models: the records of its models.
        plans: what was planned after the pilot of each model and reset; until then its cells are those of the pilot.
    """
    if not is_run(record):
        return Counter(row.model for row in plan)
    # the cells of a trial are in the plan only once it was begun
    layers = Counter(model for model, _ in {(row.model, row.layer) for row in plan})
    n_trials = trials_of_models(record, models)
    found = {model: n_layers * n_trials for model, n_layers in layers.items()}
    for (model, _), of_reset in plans.items():
        if model in found:
            found[model] += sum(layer.trials - of_reset.pilot for layer in of_reset.layers.values())
    return found


def is_run(record: Mapping[str, Any]) -> bool:
    """Return whether a study can be run; one that was imported or merged cannot."""
    return "measured" in record


def trials_of_models(record: Mapping[str, Any], models: Iterable[Mapping[str, Any]]) -> int:
    """Return how many trials each model of a study has before any is planned, those of all resets together."""
    random = {reset: known for model in models for reset, known in model.get("random_trials", {}).items()}
    protocol = record["protocol"]
    is_planned = protocol.get("half_width") is not None
    trials = protocol["pilot"] if is_planned else protocol["trials"]
    return sum(needed_trials(trials, random.get(reset, True)) for reset in record["protocol"]["resets"])
