"""The models of a study file: what one is, and which ones a pattern names."""

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layercrit.errors import StudyError, near
from layercrit.models import MODEL_SOURCES
from layercrit.zoo import find_entries

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class ModelEntry:
    """One model of a study file, patterns and lists expanded.

    Attributes:
        name: unique in the study.
        reference: its model reference, paths in it absolute.
        category: the family of its training method, or None.
        label: how figures call it, or None.
        accuracy: top-1 accuracy as its authors give it, a share in [0, 1], or None.
        donor: a weight file, for resets whose values come from one.
    """

    name: str
    reference: str
    category: str | None = None
    label: str | None = None
    accuracy: float | None = None
    donor: str | None = None


def models_of(reference: str, folder: Path) -> Iterator[ModelEntry]:
    """Yield the models that a reference or pattern of a study file names.

    Args:
        reference: such as ``timm:resnet50.tv_in1k``, ``zoo:robust_*``, ``file:runs/*/final.safetensors?arch=...``.
        folder: what paths are relative to.

    Raises:
        StudyError: it names none, or is no reference; the text offers near names.
    """
    name, _, options = reference.partition("?") if not reference.startswith("file:") else _file_parts(reference)
    kind, _, rest = name.partition(":")
    if kind not in MODEL_SOURCES or not rest:
        raise StudyError(f"{reference!r} is no model reference. {near(kind, MODEL_SOURCES)}")
    tail = f"?{options}" if options else ""
    if kind == "zoo":
        for entry in find_entries(rest):
            yield ModelEntry(entry.id, f"zoo:{entry.id}{tail}", entry.category, entry.label, entry.documented_accuracy)
    elif kind == "file":
        yield from _files(rest, tail, folder)
    elif kind == "timm":
        for model in _timm_names(rest):
            yield ModelEntry(model, f"timm:{model}{tail}")
    elif _WILD.search(rest):
        raise StudyError(f"{reference!r}: patterns are known for zoo:, timm: and file: only")
    else:
        local = folder / Path(rest).expanduser()
        place = str(local) if kind == "hf" and local.is_dir() else rest
        yield ModelEntry(rest.rpartition("/")[2] if kind in ("hf", "hf-hub") else rest, f"{kind}:{place}{tail}")


def _files(rest: str, tail: str, study_folder: Path) -> Iterator[ModelEntry]:
    path = study_folder / Path(rest).expanduser()
    if path.exists():
        paths = [path]
    elif _WILD.search(rest):
        # relative to the study's folder, whose own name may hold brackets
        found = glob.glob(str(Path(rest).expanduser()), root_dir=study_folder, recursive=True)  # noqa: PTH207
        paths = sorted(study_folder / name for name in found)
    else:
        there = near(path.name, sorted(other.name for other in path.parent.glob("*")))
        raise StudyError(f"there is no file {path}. {there}")
    if not paths:
        raise StudyError(f"no file matches {path}")
    stems = [path.name if path.is_dir() else path.stem for path in paths]
    parents = [path.parent.name for path in paths]
    both = [f"{parent}-{stem}" for parent, stem in zip(parents, stems, strict=True)]
    names = next((names for names in (stems, parents, both) if len(set(names)) == len(names)), stems)
    for name, path in zip(names, paths, strict=True):
        yield ModelEntry(name, f"file:{path}{tail}")


def _file_parts(reference: str) -> tuple[str, str, str]:
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
        raise StudyError(f"timm has no model {name!r}. {near(architecture, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        raise StudyError(f"timm has no weights {tag!r} for {architecture}. {near(tag, tags)}")
    return [name]
