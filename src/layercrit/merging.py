"""Put studies together: parts of one study from several machines, or one's own models among published ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError
from layercrit.store import FILE, ModelRow, Store
from layercrit.study import Study, load_study

__all__ = ["merge_studies"]


def merge_studies(folders: Sequence[str | Path], out: str | Path) -> Study:
    """Put the models and cells of several studies into a new one; the studies themselves are left as they are.

    Cells of the same content are taken once. Models may have been measured under different protocols or on different
    images: they are then put together all the same, and the new study's notes say so.

    Args:
        folders: of the studies, two or more.
        out: where the new study is to lie.

    Raises:
        StudyError: a folder holds no study, the new one holds one already, or two different models have one name.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    out = Path(out).expanduser()
    if len(paths) < 2:
        raise StudyError(f"Expected two or more studies to merge, got {len(paths)}.")
    if (out / FILE).exists():
        raise StudyError(f"{out} holds a study already. Name another folder with --out.")
    studies = [load_study(path) for path in paths]
    models = _models(studies)
    with Store(out, create=True) as merged:
        for path in paths:
            with Store(path) as store:
                merged.copy_cells(store)
        with merged.transaction():
            merged.put_models(models)
            for path in paths:
                with Store(path) as store:
                    merged.put_plan(store.plan())
            known = {(row.model, row.reset, row.trial) for row in merged.plan() if merged.known([row.key])}
            for study in studies:
                for failure in study.failures:
                    if (failure.model, failure.reset, failure.trial) not in known:
                        merged.put_failure(failure)
            merged.put_meta("study", _record(studies, out.name))
    return load_study(out)


def _models(studies: Sequence[Study]) -> list[ModelRow]:
    """Return the models of all studies, in their order, those of the same name and weights once."""
    found: dict[str, tuple[ModelRow, Study]] = {}
    for study in studies:
        with Store(study.folder) as store:
            rows = store.models()
        for row in rows:
            if row.model not in found:
                found[row.model] = (row, study)
                continue
            other, first = found[row.model]
            if _identity(row) != _identity(other) and row.record and other.record:
                raise StudyError(
                    f"{first.folder} and {study.folder} both have a model {row.model!r}, with different weights or "
                    "images. Give one of them another name in its study file and run it again: what is measured stays."
                )
            if other.record is None:
                found[row.model] = (row, first)
    return [row for row, _ in found.values()]


def _identity(row: ModelRow) -> tuple[Any, ...]:
    record = row.record or {}
    return tuple(record.get(name) for name in ("sha256", "probe_set", "dtype", "origin"))


def _record(studies: Sequence[Study], name: str) -> dict[str, Any]:
    """Return the facts about the new study, with notes where the studies differ."""
    records = [study.record for study in studies]
    protocols = [record.get("protocol", {}) for record in records]
    notes = [note for record in records for note in record.get("notes", [])]
    differing = sorted(
        {key for protocol in protocols for key in protocol if any(p.get(key) != protocol[key] for p in protocols)}
    )
    if differing:
        notes.append(f"The merged studies differ in their protocol ({', '.join(differing)}).")
    images = {str(study.folder): _images(record) for study, record in zip(studies, records, strict=True)}
    if len(set(images.values())) > 1:
        told = "; ".join(f"{folder}: {text}" for folder, text in images.items())
        notes.append(f"The merged studies asked about different images ({told}): differences between their models may "
                     "come from that.")  # fmt: skip
    shared: dict[str, Any] = {key: value for key, value in protocols[0].items() if key not in differing}
    shared["trials"] = max(int(protocol.get("trials", 0)) for protocol in protocols)
    return {
        "name": name,
        "baseline": next((record["baseline"] for record in records if record.get("baseline")), None),
        "leave_out": list(dict.fromkeys(left for record in records for left in record.get("leave_out", []))),
        "protocol": shared,
        "notes": list(dict.fromkeys(notes)),
        "merged": [str(study.folder) for study in studies],
    }


def _images(record: Mapping[str, Any]) -> str:
    probe_set = record.get("probe_set")
    if probe_set is None:
        return "not known"
    return f"{probe_set['n_images']} of {Path(probe_set['source']).name}, SHA-256 {probe_set['sha256'][:12]}"
