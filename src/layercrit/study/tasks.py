"""The tasks of a study: trials of models, the share of them that a shard has, and the plan of further ones."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from layercrit.precision import PrecisionPlan, run_together
from layercrit.resets import get_reset
from layercrit.statistics import needed_trials
from layercrit.study.entries import ModelEntry
from layercrit.study.executors import Task
from layercrit.study.file import StudyFile
from layercrit.study.ranks import Shard
from layercrit.study.worker import Job

__all__ = ["Trial", "deal", "first_tasks", "further_tasks", "places_of"]

Trial: TypeAlias = tuple[str, str, int]
"""Model, reset and number of a trial."""


def first_tasks(study: StudyFile) -> list[Task]:
    """Return a task for each trial that is asked for, or, where a pilot plans the others, each of the pilot's."""
    return [
        _task(entry, reset, {trial: None})
        for entry in study.models
        for reset in study.resets
        for trial in range(needed_trials(study.protocol.first_trials, get_reset(reset).random))
    ]


def further_tasks(
    study: StudyFile,
    plans: Mapping[tuple[str, str], PrecisionPlan],
    sizes: Mapping[tuple[str, str], int],
) -> list[Task]:
    """Return the tasks after the pilot: trials that are run together, for the layers that get them.

    Args:
        study: the study.
        plans: model and reset -> what is planned.
        sizes: model and layer -> how many parameters it has.
    """
    entries = {entry.name: entry for entry in study.models}
    tasks = []
    for (model, reset), plan in plans.items():
        if model not in entries or reset not in study.resets:
            continue
        of_model = {layer: size for (name, layer), size in sizes.items() if name == model}
        tasks += [_task(entries[model], reset, together) for together in run_together(plan.trials(), of_model)]
    return tasks


def places_of(task: Task) -> list[Trial]:
    """Return model, reset and trial of each trial of a task."""
    job: Job = task.payload
    return [(job.model.name, job.reset, trial) for trial in job.layers]


def deal(tasks: Sequence[Task], shard: Shard | None) -> list[Task]:
    """Return the tasks of a shard: as many as every other has, give or take one.

    Models are put into an order by a hash of their names, with their tasks one after the other, and this row is cut
    into shards. So a shard opens few models, and which tasks it has depends on nothing but names and numbers.
    """
    if shard is None:
        return list(tasks)
    row = sorted(tasks, key=lambda task: hashlib.sha256(task.payload.model.name.encode()).digest())
    start, stop = (number * len(row) // shard.of for number in (shard.number, shard.number + 1))
    return row[start:stop]


def _task(entry: ModelEntry, reset: str, layers: Mapping[int, Sequence[str] | None]) -> Task:
    """Return the task of some trials of one reset of a model: trial -> the layers that get it; None: all of them."""
    first, last = min(layers), max(layers)
    numbers = f"trial {first}" if first == last else f"trials {first} to {last}"
    return Task(f"{entry.name}, {reset}, {numbers}", f"{entry.name}, {reset}", Job(entry, reset, layers))
