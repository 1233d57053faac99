"""Real labelled images, the first of Fashion-MNIST's test part, and how many of them a trained network names."""

import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import layercrit
from layercrit.models.model import Model

FAMILY = Path(str(files("layercrit") / "family"))
BASELINE = f"file:{FAMILY / 'baseline'}"
"""A network that names about 91 % of these images."""
N_IMAGES = 60
with np.load(FAMILY / "fashion-mnist-test.npz") as _stored:
    PIXELS, LABELS = _stored["images"][:N_IMAGES], _stored["labels"][:N_IMAGES].astype(int)
NAMES = ["tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
"""The classes in the order of the network's outputs; sorted, they are in another order."""


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.squeeze(PIXELS[number])).save(content, "PNG")
    return content.getvalue()


def write_pngs(folder: Path, pattern: str = "{number:03}.png", numbers: range = range(N_IMAGES), **names: Any) -> Path:
    """Write images as files whose path is ``pattern``, with ``number``, ``label``, ``name`` and keys of ``names``."""
    for number in numbers:
        label = int(LABELS[number])
        others = {key: values[label] for key, values in names.items()}
        path = folder / pattern.format(number=number, label=label, name=NAMES[label], **others)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def write_classes(path: Path, names: Any = NAMES) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


@cache
def _trained() -> Model:
    return layercrit.open_model(BASELINE)


@dataclass(frozen=True)
class Found:
    """What the images and labels of a source are to the trained network.

    Attributes:
        n_images: how many there are.
        accuracy: the share of them that it names; None without labels.
        notes: what the user is told of images and labels.
    """

    n_images: int
    accuracy: float | None
    notes: str


def found_in(source: Any, **options: Any) -> Found:
    """Draw a probe set and classify it, as a measurement does before any reset."""
    model = _trained()
    options = {"n_images": N_IMAGES} | options
    probe_set = layercrit.ProbeSet.from_source(source, model.preprocessing, **options)
    labels, notes = probe_set.labels_for(model.n_classes)
    with torch.inference_mode():
        named = model.classifier(probe_set.batch(0, probe_set.n_images)).argmax(dim=1).numpy()
    accuracy = None if labels is None else float((named == labels).mean())
    return Found(probe_set.n_images, accuracy, "\n".join([*probe_set.notes, *notes]))


def accuracy(source: Any, **options: Any) -> float | None:
    return found_in(source, **options).accuracy


def notes_of(source: Any, **options: Any) -> str:
    return found_in(source, **options).notes
