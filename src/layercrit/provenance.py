"""What a result was made with: versions of Python, of packages, and of those whose plug-ins had a part in it."""

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from layercrit.distances import DISTANCES
from layercrit.engine.session import Session
from layercrit.foreign_text import encodable
from layercrit.machine import PACKAGES, versions
from layercrit.models.sources import MODEL_SOURCES
from layercrit.probes.changes import plain_source
from layercrit.probes.corruptions import CORRUPTIONS
from layercrit.probes.kinds import IMAGE_SOURCES, kind_of
from layercrit.registry import Registry
from layercrit.resets import RESETS

__all__ = ["about_session", "identity_of", "missing_plug_ins", "versions_with"]


def versions_with(
    *, resets: Iterable[str] = (), distances: Iterable[str] = (), models: Iterable[str] = (), images: Iterable[str] = ()
) -> dict[str, str]:
    """Return `layercrit.machine.versions`, and those of the packages whose plug-ins a result was made with.

    Args:
        resets: names of resets, with or without options.
        distances: names of distances.
        models: references of models.
        images: sources of images.
    """
    sources = [plain_source(source) for source in images]
    used: list[tuple[Registry[Any], Iterable[str]]] = [
        (RESETS, [name.partition("(")[0] for name in resets]),
        (DISTANCES, distances),
        (MODEL_SOURCES, [kind for one in models for kind in re.findall(r"(?:^|[?&]arch=)([\w-]+):", one)]),
        (IMAGE_SOURCES, [kind_of(source) or "" for _, source in sources]),
        (CORRUPTIONS, [kind for before, _ in sources for kind in re.findall("corrupt:([^@:]*)", before)]),
    ]
    found = versions()
    for registry, names in used:
        for name in names:
            found |= registry.package_of(name)
    return found


def about_session(session: Session) -> dict[str, Any]:
    """Return the model, the images and the machine of a session, as plain data for the record of a result."""
    model, predictions = session.subject.model, session.predictions
    return {
        "model": encodable(model.reference),
        "architecture": model.architecture,
        "sha256": model.sha256,
        "probe_set": session.probe_set.to_dict(),
        "n_images": session.probe_set.n_images,
        "loss": predictions.loss,
        "top1_accuracy": predictions.top1_accuracy,
        "backend": session.holder.backend,
        "dtype": session.holder.mode,
        "device": str(session.subject.device),
        "warnings": predictions.warnings(),
        "notes": list(dict.fromkeys(session.notes)),
        "versions": versions_with(models=[model.reference, model.architecture], images=[session.probe_set.source]),
    }


def identity_of(session: Session) -> dict[str, Any]:
    """Return the model, the images, their labels, and what computes, as plain data: equal ones give equal numbers."""
    model, about = session.subject.model, about_session(session)
    return {
        **{name: about[name] for name in ("architecture", "sha256", "dtype", "backend", "device", "versions")},
        "images": session.probe_set.sha256,
        "output": model.output_in_words,
        "normalisation": [list(model.mean), list(model.std)],
        "labels": None if session.labels is None else session.labels.tolist(),
        "layers": {layer.name: list(layer.parameters) for layer in session.subject.layers},
    }


def missing_plug_ins(recorded: Mapping[str, str]) -> list[str]:
    """Return name and version of each package of plug-ins that versions of a result name, and that is not installed."""
    return [f"{name} {recorded[name]}" for name in recorded if name not in ("python", *PACKAGES) and not _is_here(name)]


def _is_here(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
