"""What a study keeps of single images: distances, read for one layer at a time, labels, names and predictions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import StudyError
from layercrit.models.model import Model
from layercrit.models.references import open_model
from layercrit.probes.probe_set import ProbeSet
from layercrit.shown_images import ShownImages, unpack_classes
from layercrit.study.images import stored_images
from layercrit.study.shards import StoredStudy, open_study

__all__ = ["check_images", "distances_of", "images_of", "model_and_images", "probe_set_of"]


def distances_of(folder: Path, cells: pd.DataFrame) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the layers of one model, each with the distances of every image, ``(n_trials, n_images)``.

    Only one layer's values are in memory at a time.

    Args:
        folder: of the study.
        cells: those of the model under one reset, of any status, in the order of depth.

    Raises:
        StudyError: only means over images are known.
    """
    with open_study(folder) as store:
        check_images(store, cells, folder)
        n_images = int(cells["n_images"].max())
        for layer, own in cells.groupby("layer", sort=False):
            ok = own[own["status"] == "ok"].sort_values("trial")
            values = [store.per_image([key])[key]["cosine"] for key in ok["key"]]
            yield str(layer), np.stack(values) if values else np.empty((0, n_images), np.float32)


def check_images(store: StoredStudy, cells: pd.DataFrame, folder: Path) -> None:
    """Raise StudyError where distances of single images are missing in cells that are ok."""
    if not store.keys_with_images().issuperset(cells.loc[cells["status"] == "ok", "key"]):
        raise StudyError(
            f"The study in {folder} has no distances of single images: it was imported from means over images. Measure "
            "the models yourself (layercrit study run), which keeps them."
        )


def images_of(folder: Path, model: str, record: Mapping[str, Any]) -> ShownImages:
    """Return what is known of the images that a model was shown.

    Args:
        folder: of the study.
        model: its name.
        record: what is known of it since it was opened.
    """
    predictions = record.get("predictions", {})
    packed = predictions.get("classes")
    try:
        classes = None if packed is None else unpack_classes(packed)
    except ValueError as error:
        raise StudyError(
            f"What is known of {model} in {folder} is damaged ({error}). Restore the study's file, or run the study in "
            "another folder."
        ) from error
    probe_set = probe_set_of(folder, record)
    if probe_set is None:
        why = f"the images that {model} was shown are not in {folder} (those of a merged study are in its parts)"
        return ShownImages(None, None, classes, why_unknown=why)
    return probe_set.shown_to(predictions["n_classes"], classes)


def probe_set_of(folder: Path, record: Mapping[str, Any]) -> ProbeSet | None:
    """Return the images on which a model was measured, or None where they are not in the study's folder any more.

    Args:
        folder: of the study.
        record: what is known of the model.
    """
    for found in stored_images(folder):
        first = found.first(int(record.get("n_images", 0) or found.n_images))
        for one in (found, first):
            if one.sha256 == record.get("probe_set"):
                return one
    return None


def model_and_images(folder: Path, row: Mapping[Any, Any]) -> tuple[Model, ProbeSet]:
    """Return a model of a study, opened for the images that it was measured on, and these.

    Args:
        folder: of the study.
        row: of the study's table of models.

    Raises:
        StudyError: the images are not in the study's folder any more.
        ModelError: the model cannot be opened.
    """
    probe_set = probe_set_of(folder, row["record"])
    if probe_set is None:
        raise StudyError(
            f"The images of {row['model']} are not in {folder} any more. Measure it by itself, with --images SOURCE."
        )
    size = probe_set.preprocessing
    shape = (size.channels, size.height, size.width)
    own = open_model(row["reference"], input_size=None if size.channels == 3 else shape)
    model = replace(open_model(own, input_size=shape), preprocessing=size, undeclared=own.undeclared)
    return model, probe_set
