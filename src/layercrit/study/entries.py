"""The models of a study file: what one is, and which ones a list or a pattern stands for."""

import csv
import glob
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from layercrit.conditions import STATISTICS_IN_WORDS
from layercrit.errors import StudyError, near
from layercrit.foreign_text import unguarded
from layercrit.models.file_source import training_run, weight_file
from layercrit.models.sources import MODEL_SOURCES, OWN_NETWORK
from layercrit.models.zoo.fetching import find_entries
from layercrit.resets import Reset

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class ModelEntry:
    """One model of a study file, patterns and lists expanded.

    Attributes:
        name: unique in the study.
        reference: its model reference, paths in it absolute.
        category: that of its training method, or None.
        label: its name in figures, or None.
        accuracy: top-1 accuracy as its authors give it, a share in [0, 1], or None.
        donor: a weight file or a model reference, for resets whose values come from one.
        attack_norm: norm of the perturbations that it was trained to withstand, such as ``l2`` or ``linf``, or None.
        eps: the largest of them, in the units in which its authors give it, or None.
        variant_of: name of the model of which this is a variant: at another epoch, on another probe set, or with other
            norm statistics; None: it is none.
        epoch: of its training run, or None: its final weights.
        probe_set: name of the images that it is shown; None: the study has only one probe set.
        norm_statistics: as in `layercrit.protocol.Protocol`.
    """

    name: str
    reference: str
    category: str | None = None
    label: str | None = None
    accuracy: float | None = None
    donor: str | None = None
    attack_norm: str | None = None
    eps: float | None = None
    variant_of: str | None = None
    epoch: int | None = None
    probe_set: str | None = None
    norm_statistics: str = "trained"

    def donor_for(self, reset: Reset) -> str | None:
        """Return where a reset's values come from: the donor, or None where it needs none or the model's own run."""
        if reset.donor not in ("checkpoint", "model"):
            return None
        of_own_run = reset.options.get("epoch") is not None and training_run(self.reference) is not None
        return None if of_own_run else self.donor


def variants_of(
    entry: ModelEntry, epochs: Sequence[int], probe_sets: Sequence[str], norm_statistics: Sequence[str]
) -> Iterator[ModelEntry]:
    """Yield a model as it is asked for first, and each variant of it.

    Args:
        entry: the model, with its final weights.
        epochs: of its training run, to be measured as well.
        probe_sets: names of the probe sets, the first of which is the model's own; none: there is only one.
        norm_statistics: what becomes of running statistics, likewise.
    """
    path, mark, options = file_parts(entry.reference) if epochs else ("", "", "")
    names: Sequence[str | None] = probe_sets or [None]
    for how, images, epoch in product(norm_statistics, names, [None, *epochs]):
        changes = [
            *([] if epoch is None else [f"epoch {epoch}"]),
            *([] if not probe_sets or images == probe_sets[0] else [str(images)]),
            *([] if how == norm_statistics[0] else [STATISTICS_IN_WORDS[how].variant]),
        ]
        one = replace(entry, probe_set=images, norm_statistics=how)
        if probe_sets and images != probe_sets[0]:  # for which its authors give none
            one = replace(one, accuracy=None)
        if epoch is not None:
            one = replace(one, epoch=epoch, reference=f"{path}@epoch={epoch}{mark}{options}", accuracy=None)
        if changes:
            suffix = f" ({', '.join(changes)})"
            label = None if entry.label is None else entry.label + suffix
            one = replace(one, name=entry.name + suffix, label=label, variant_of=entry.name)
        yield one


def rows_of_list(
    where: str, path: Path, given: Mapping[str, Any], columns: Collection[str], mistakes: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a list file, which has columns or one reference a line.

    Args:
        where: the place in the study file that names the list.
        path: of the list.
        given: values by column, for rows in which it is empty.
        columns: names of the columns it may have.
        mistakes: mistakes are added here.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets write a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        mistakes.append(f"{where}: the list {path} cannot be read ({error})")
        return
    if lines and "reference" in next(csv.reader(lines[:1])):
        rows = list(_rows_of_table(path.name, lines, columns, mistakes))
    else:
        named = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        rows = [(n, {"reference": line}) for n, line in named if line and not line.startswith("#")]
    if not rows:
        mistakes.append(f"{where}: the list {path} names no models")
    for number, row in rows:
        yield f"{path.name} line {number}", {**given, **row}


def _rows_of_table(
    name: str, lines: Sequence[str], columns: Collection[str], mistakes: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, values that are not empty) of a list with columns."""
    reader = csv.DictReader(lines)
    for column in sorted({*(reader.fieldnames or ())} - {*columns}):
        mistakes.append(f"{name}: unknown column {column!r}. {near(column, sorted(columns))}")
    for row in reader:
        place = f"{name} line {reader.line_num}"
        values: dict[str, Any] = {key: unguarded(text) for key, text in row.items() if key in columns and text}
        if None in row:
            mistakes.append(
                f"{place}: more values than columns. Put quotation marks around a reference that has commas"
            )
            continue
        if "reference" not in values:
            mistakes.append(f"{place}: there is no reference")
        for column in {"accuracy", "eps"} & values.keys():
            with suppress(ValueError):  # what is no number stays text, which is refused as in the study file itself
                values[column] = float(values[column])
        yield reader.line_num, values


def models_of(reference: str, folder: Path) -> Iterator[ModelEntry]:
    """Yield the models that a reference or pattern of a study file stands for.

    Args:
        reference: such as ``timm:resnet50.tv_in1k``, ``zoo:robust_*``, ``file:runs/*/final.safetensors?arch=...``.
        folder: what paths are relative to.

    Raises:
        StudyError: it names none, or is not a reference; the text suggests similar names.
    """
    name, _, options = reference.partition("?") if not reference.startswith("file:") else file_parts(reference)
    kind, _, rest = name.partition(":")
    if kind not in MODEL_SOURCES or not rest:
        raise StudyError(f"{reference!r} is no model reference. {near(kind, MODEL_SOURCES)}")
    tail = f"?{options}" if options else ""
    if kind == "zoo":
        for entry in find_entries(rest):
            about = entry.category, entry.label, entry.documented_accuracy
            yield ModelEntry(entry.id, f"zoo:{entry.id}{tail}", *about, attack_norm=entry.attack_norm, eps=entry.eps)
    elif kind == "file":
        yield from _files(rest, tail, folder)
    elif kind == "timm":
        for model in _timm_names(rest):
            yield ModelEntry(model, f"timm:{model}{tail}")
    elif _WILD.search(rest):
        raise StudyError(f"{reference!r}: patterns work only with zoo:, timm: and file:")
    else:
        local = folder / Path(rest).expanduser()
        place = str(local) if kind == "hf" and local.is_dir() else rest
        yield ModelEntry(rest.rpartition("/")[2] if kind in ("hf", "hf-hub") else rest, f"{kind}:{place}{tail}")


def _files(rest: str, tail: str, study_folder: Path) -> Iterator[ModelEntry]:
    path = study_folder / Path(rest).expanduser()
    if path.exists():
        paths = [path]
    elif _WILD.search(rest):
        paths = _matching(rest, study_folder)
    else:
        if weight_file(path) == path:  # no epoch of a training run either
            there = near(path.name, sorted(other.name for other in path.parent.glob("*")))
            raise StudyError(f"there is no file {path}. {there}")
        paths = [path]
    if not paths:
        raise StudyError(f"no file matches {path}")
    stems = [path.stem if path.is_file() else path.name for path in paths]
    parents = [path.parent.name for path in paths]
    both = [f"{parent}-{stem}" for parent, stem in zip(parents, stems, strict=True)]
    names = next((names for names in (stems, parents, both) if len(set(names)) == len(names)), stems)
    for name, path in zip(names, paths, strict=True):
        yield ModelEntry(name, f"file:{path}{tail}")


def _matching(pattern: str, study_folder: Path) -> list[Path]:
    """Return the sorted files and folders that match a pattern, or, if it ends so, those with ``@epoch=N`` behind."""
    # relative to the study's folder, whose own name may hold brackets
    find = partial(glob.glob, root_dir=study_folder, recursive=True)
    pattern = str(Path(pattern).expanduser())
    found = find(pattern)
    folders, of_epoch, number = pattern.rpartition("@epoch=")
    if not found and of_epoch:
        found = [f"{name}{of_epoch}{number}" for name in find(folders) if (study_folder / name).is_dir()]
    return sorted(study_folder / name for name in found)


def file_parts(reference: str) -> tuple[str, str, str]:
    """Split ``file:PATH?arch=...`` at its options; a question mark elsewhere in a path is a wildcard."""
    match = re.match(r"(?s)(.*?)\?(\w+=.*)$", reference)
    return (match[1], "?", match[2]) if match else (reference, "", "")


def _timm_names(name: str) -> list[str]:
    import timm

    if _WILD.search(name):
        found = timm.list_models(name, pretrained=True) or timm.list_models(name)
        if not found:
            raise StudyError(f"timm has no model that matches {name!r}")
        return list(found)
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise StudyError(f"timm has no model {name!r}. {near(architecture, timm.list_models())} {OWN_NETWORK}")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        raise StudyError(f"timm has no weights {tag!r} for {architecture}. {near(tag, tags)}")
    return [name]
