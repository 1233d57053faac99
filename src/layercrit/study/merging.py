"""Merge studies: parts of one study that several machines measured, or one's own models and published ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError
from layercrit.study.rows import ModelRow, PlanRow
from layercrit.study.shards import is_study, open_study, store_folders
from layercrit.study.store import Store
from layercrit.study.tables import Study, load_study

__all__ = ["merge_studies"]

# settings that decide no number of a cell
_NO_DIFFERENCE = (
    "batch_size",
    "device",
    "level",
    "resets",
    "trials",
    "interval",
    "pilot",
    "max_trials",
)


def merge_studies(folders: Sequence[str | Path], out: str | Path) -> Study:
    """Copy the models and cells of several studies into a new one; the studies themselves stay as they are.

    Cells of the same content are copied once. Models that were measured under different protocols or on different
    images are merged all the same, and the new study's notes say so.

    Args:
        folders: of the studies, two or more; or of one that was run in shards, whose stores become one.
        out: the folder of the new study.

    Raises:
        StudyError: a folder contains no study, the new one already contains one, two different models have one name, or
            a trial of a model was measured under different settings.

    Examples:
        >>> import layercrit
        >>> both = layercrit.merge_studies(["layercrit-demo/study", "layercrit-demo/study"], "both")
        >>> both.models["model"].is_unique
        True
    """
    paths = [Path(folder).expanduser() for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    out = Path(out).expanduser()
    if len(paths) < 2 and not any(len(store_folders(path)) > 1 for path in paths):
        raise StudyError(
            f"Expected two or more studies to merge, got {len(paths)}: a single one only where it was run in shards."
        )
    if is_study(out):
        raise StudyError(f"{out} already contains a study. Name another folder with --out.")
    studies = [load_study(path) for path in paths]
    models, plan, measured = _models(studies), *_plan(paths)
    with Store(out, create=True) as merged:
        for path in paths:
            for number, own in store_folders(path).items():
                with Store(own, read_only=number > 0) as store:
                    merged.copy_cells(store)
        with merged.transaction():
            merged.put_models(models)
            merged.put_plan(plan)
            for study in studies:
                for failure in study.failures:
                    if (failure.model, failure.reset, failure.trial) not in measured:
                        merged.put_failure(failure)
            merged.put_meta("study", _record(studies, out.name))
            plans = {key: plan for study in studies for key, plan in study.plans.items()}
            if plans:
                merged.put_meta("precision", [[*key, plan.to_dict()] for key, plan in plans.items()])
    return load_study(out)


def _models(studies: Sequence[Study]) -> list[ModelRow]:
    """Return the models of all studies, in their order, those of the same name and weights once."""
    found: dict[str, tuple[ModelRow, Study]] = {}
    for study in studies:
        with open_study(study.folder) as store:
            rows = store.models()
        for row in rows:
            if row.model not in found:
                found[row.model] = (row, study)
                continue
            other, first = found[row.model]
            if _identity(row) != _identity(other) and row.record and other.record:
                raise StudyError(
                    f"{first.folder} and {study.folder} both have a model {row.model!r}, with different weights, "
                    "images or number formats. Give one of them another name in its study file and run it again: what "
                    "has been measured is kept."
                )
            found[row.model] = (replace(other, record=_joined(other.record or {}, row.record or {}) or None), first)
    return [row for row, _ in found.values()]


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two studies know of one model, of which they may have measured different resets."""
    joined = {**other, **one}
    for of_resets in ("content", "donor", "random_trials"):
        if of_resets in joined:
            joined[of_resets] = {**other.get(of_resets, {}), **one.get(of_resets, {})}
    if "notes" in joined:
        joined["notes"] = list(dict.fromkeys([*one.get("notes", []), *other.get("notes", [])]))
    return joined


def _plan(paths: Sequence[Path]) -> tuple[list[PlanRow], set[tuple[str, str, int]]]:
    """Return the cells of all studies, and of which model, reset and trial some are measured."""
    planned: dict[tuple[str, str, int, str], PlanRow] = {}
    measured: dict[tuple[str, str, int, str], Path] = {}
    for path in paths:
        with open_study(path) as store:
            rows = store.plan()
            known = store.known(row.key for row in rows)
        for row in rows:
            place = (row.model, row.reset, row.trial, row.layer)
            if place in measured and row.key in known and row.key != planned[place].key:
                raise StudyError(
                    f"{measured[place]} and {path} have both measured trial {row.trial} of {row.model!r}, reset "
                    f"{row.reset!r}, under different settings (such as the seed or the distances). Give the model "
                    "another name in one of the study files and run it again: what has been measured is kept."
                )
            if place not in measured:
                planned[place] = row
            if row.key in known:
                measured.setdefault(place, path)
    return list(planned.values()), {place[:3] for place in measured}


def _identity(row: ModelRow) -> tuple[Any, ...]:
    record = row.record or {}
    return tuple(record.get(name) for name in ("sha256", "probe_set", "dtype", "origin"))


def _record(studies: Sequence[Study], name: str) -> dict[str, Any]:
    """Return the facts about the new study, with notes where the studies differ."""
    records = [study.record for study in studies]
    protocols = [record.get("protocol", {}) for record in records]
    notes = [note for record in records for note in record.get("notes", [])]
    notes += [f"{study.folder}: {row} is damaged and left out." for study in studies for row in study.damaged]
    differing = sorted(key for key in {*chain(*protocols)} - {*_NO_DIFFERENCE} if _differ(protocols, key))
    if differing:
        notes.append(f"The merged studies differ in their protocol ({', '.join(differing)}).")
    images = {str(study.folder): _images(record) for study, record in zip(studies, records, strict=True)}
    if len(set(images.values())) > 1:
        told = "; ".join(f"{folder}: {text}" for folder, text in images.items())
        notes.append(f"The merged studies used different images ({told}): differences between their models may be due "
                     "to that.")  # fmt: skip
    conditions = {str(study.folder): [one.in_words() or "one" for one in study.conditions] for study in studies}
    if len({tuple(sorted(names)) for names in conditions.values()}) > 1:
        told = "; ".join(f"{folder}: {', '.join(names)}" for folder, names in conditions.items())
        notes.append(f"The merged studies have different conditions ({told}): models are compared under one at a time.")
    shared: dict[str, Any] = {key: value for key, value in protocols[0].items() if key not in differing}
    shared["trials"] = max(int(protocol.get("trials", 0)) for protocol in protocols)
    shared["resets"] = list(dict.fromkeys(chain(*(protocol.get("resets", []) for protocol in protocols))))
    merged = {
        "name": name,
        "baseline": next((record["baseline"] for record in records if record.get("baseline")), None),
        "leave_out": list(dict.fromkeys(left for record in records for left in record.get("leave_out", []))),
        "protocol": shared,
        "notes": list(dict.fromkeys(notes)),
        "merged": [str(study.folder) for study in studies],
    }
    if len(set(images.values())) == 1 and "probe_set" in records[0]:
        merged |= {key: records[0][key] for key in ("probe_set", "probe_sets") if key in records[0]}
    return merged


def _differ(protocols: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Return whether a setting differs; published studies do not tell all of theirs."""
    values = [protocol[key] for protocol in protocols if key in protocol]
    return any(value != values[0] for value in values)


def _images(record: Mapping[str, Any]) -> str:
    probe_set = record.get("probe_set")
    if probe_set is None:
        return "not known"
    from layercrit.probes.changes import plain_source  # imports torch, for which other commands need not wait

    several = record.get("probe_sets", {})
    told = [
        f"{name and f'{name}, '}{one['n_images']} of {Path(plain_source(one['source'])[1]).name}, SHA-256 "
        f"{one['sha256'][:12]}"
        for name, one in (several or {"": probe_set}).items()
    ]
    return " and ".join(told)
