"""Merge studies: parts of one study that several machines measured, or one's own models and published ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

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
_NOT_KNOWN = "not known"


class _Content(NamedTuple):
    """What a probe set shows: SHA-256 of its images, and the attack on each model by which they are changed then."""

    sha256: str
    attack: str = ""


def merge_studies(folders: Sequence[str | Path], out: str | Path) -> Study:
    """Copy the models and cells of several studies into a new one; the studies themselves stay as they are.

    Cells of the same content are copied once. Models that were measured under different protocols or on different
    images are merged all the same, and the new study's notes say so. Where only some of the studies name their probe
    sets, one without a name gets that of the same images in another study, or else that of its own study.

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
    studies, notes = _named([load_study(path) for path in paths])
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
            merged.put_meta("study", _record(studies, out.name, notes))
            plans = {key: plan for study in studies for key, plan in study.plans.items()}
            if plans:
                merged.put_meta("precision", [[*key, plan.to_dict()] for key, plan in plans.items()])
    return load_study(out)


def _named(studies: Sequence[Study]) -> tuple[list[Study], list[str]]:
    """Return the studies with a name for every probe set if any has one, and notes on names that no study gave."""
    names: dict[_Content | None, str] = {}
    taken: set[str] = set()
    for study in studies:
        contents = _contents(study)
        for model, name in _probe_sets(study).items():
            if name is not None:
                taken.add(name)
                if (content := contents[model]) is not None:
                    names.setdefault(content, name)
    if not taken:
        return list(studies), []
    found, notes = [], []
    for study in studies:
        contents, named = _contents(study), _probe_sets(study)
        for model in [model for model, name in named.items() if name is None]:
            content = contents[model]
            if content not in names:
                wanted = _NOT_KNOWN if content is None else str(study.record.get("name", study.folder.name))
                names[content] = next(name for name in _numbered(wanted) if name not in taken)
                taken.add(names[content])
                why = "It is not known what they are" if content is None else "No study has a name for the same images"
                notes.append(f"The images of {study.folder} have no name. {why}: they are called {names[content]!r}.")
            named[model] = names[content]
        probe_sets = pd.Series(list(named.values()), index=study.models.index, dtype=object)
        record = dict(study.record)
        if "probe_set" in record and "probe_sets" not in record:  # of the only one, which all models were shown
            record["probe_sets"] = dict.fromkeys(probe_sets, record["probe_set"])
        found.append(replace(study, models=study.models.assign(probe_set=probe_sets), record=record))
    return found, notes


def _numbered(name: str) -> Iterator[str]:
    """Yield a name, and it with one number after the other."""
    yield name
    yield from (f"{name} {number}" for number in count(2))


def _probe_sets(study: Study) -> dict[str, str | None]:
    """Return model -> name of its probe set."""
    return dict(zip(study.models["model"], study.models["probe_set"], strict=True))


def _contents(study: Study) -> dict[str, _Content | None]:
    """Return model -> what it was shown; None: it is not known."""
    from layercrit.probes.changes import split_change  # imports torch, for which other commands need not wait

    found: dict[str, _Content | None] = {}
    for row in study.models.to_dict("records"):
        about = _images_by_name(study).get(row["probe_set"])
        known = row["record"].get("probe_set")  # under an attack, the images as they are changed for this model
        if about is not None:
            attack = split_change("attack", about["source"])
            found[row["model"]] = _Content(about["sha256"], attack[0] if attack else "")
        else:
            found[row["model"]] = None if known is None else _Content(known)
    return found


def _images_by_name(study: Study) -> dict[str | None, Mapping[str, Any]]:
    """Return name -> what a study knows of the images."""
    if several := study.record.get("probe_sets"):
        return dict(several)
    about = study.record.get("probe_set")
    return {} if about is None else {None: about}


def _models(studies: Sequence[Study]) -> list[ModelRow]:
    """Return the models of all studies, in their order, those of the same name and weights once."""
    found: dict[str, tuple[ModelRow, Study]] = {}
    for study in studies:
        probe_sets = _probe_sets(study)
        with open_study(study.folder) as store:
            rows = [replace(row, probe_set=probe_sets[row.model]) for row in store.models()]
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


def _record(studies: Sequence[Study], name: str, about_names: Sequence[str]) -> dict[str, Any]:
    """Return the facts about the new study, with notes where the studies differ."""
    records = [study.record for study in studies]
    protocols = [record.get("protocol", {}) for record in records]
    notes = [note for record in records for note in record.get("notes", [])]
    notes += [f"{study.folder}: {row} is damaged and left out." for study in studies for row in study.damaged]
    differing = sorted(key for key in {*chain(*protocols)} - {*_NO_DIFFERENCE} if _differ(protocols, key))
    if differing:
        notes.append(f"The merged studies differ in their protocol ({', '.join(differing)}).")
    shown: dict[str | None, set[_Content | None]] = {}
    for study in studies:
        for model, content in _contents(study).items():
            shown.setdefault(_probe_sets(study)[model], set()).add(content)
    are_same = all(len(contents) == 1 for contents in shown.values())
    if not are_same:
        told = "; ".join(f"{study.folder}: {_images_in_words(study)}" for study in studies)
        notes.append(f"The merged studies used different images ({told}): differences between their models may be due "
                     "to that.")  # fmt: skip
    notes += about_names
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
    images = {name: about for study in reversed(studies) for name, about in _images_by_name(study).items()}
    if are_same and images.keys() == shown.keys():
        merged["probe_set"] = images[next(iter(shown))]
        if None not in shown:
            merged["probe_sets"] = {name: images[name] for name in shown}
    return merged


def _differ(protocols: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Return whether a setting differs; published studies do not tell all of theirs."""
    values = [protocol[key] for protocol in protocols if key in protocol]
    return any(value != values[0] for value in values)


def _images_in_words(study: Study) -> str:
    from layercrit.probes.changes import plain_source

    told = []
    for name, about in _images_by_name(study).items():
        changes, source = plain_source(about["source"])
        of_source = f"{about['n_images']} of {changes}{Path(source).name}, SHA-256 {about['sha256'][:12]}"
        told.append(of_source if name is None else f"{name}, {of_source}")
    return " and ".join(told) or _NOT_KNOWN
