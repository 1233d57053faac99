"""Open images with their labels: those of the source, of a file, of a column, or none."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layercrit.errors import ProbeError
from layercrit.probes.classes import Labels, as_numpy, labels_of, names_in_order
from layercrit.probes.label_files import LABEL_SUFFIXES, read_labels
from layercrit.probes.opening import open_source
from layercrit.probes.sources import ImageSource, labels_of_array

__all__ = ["LabelsGiven", "are_wanted", "is_label_file", "open_images", "open_labelled"]

LabelsGiven = str | Path | npt.ArrayLike | torch.Tensor
"""Which labels images get.

``"auto"``: those that the source comes with, if any; ``"none"``; the path of a file of labels, whose name ends in .csv,
.tsv, .txt, .json, .jsonl or .npy; the name of a column of a table, a key of an ``.npz`` file, or of an archive a suffix
of members, a key of JSON or ``folders``; or the labels of all images, ``(n_images,)``, ``(n_images, 1)`` or one-hot.
"""


def open_labelled(
    source: Any, labels: LabelsGiven = "auto", classes: str | Path | Sequence[str] | None = None
) -> tuple[ImageSource, Labels | None, list[str]]:
    """Open images with their labels.

    Args:
        source: what `open_source` takes, or an opened source.
        labels: which labels they have; see `LabelsGiven`.
        classes: the names of classes in the order of the model's outputs, or a text file with one per line: labels
            are looked up there.

    Returns:
        the source, the labels of all its images or None, and what the user should know, in words.

    Raises:
        ProbeError: images or labels cannot be read, some images have no label, or a class is not in ``classes``.
    """
    column, opened = _column(labels), open_images(source, labels)
    if column is not None and opened is source:
        raise ProbeError(f"labels={column!r} names a column of an opened source; open the source with that column.")
    found = _labels(opened, labels) if are_wanted(labels) else None
    notes = list(opened.notes)
    if found is None and isinstance(labels, str) and labels == "auto":
        notes += opened.unused_labels()
    if classes is not None:
        if found is None:
            raise ProbeError(
                f"classes say which output each label of '{opened.description}' stands for, but there are no labels. "
                "Leave out the classes (--classes), or give labels (--labels)."
            )
        found = found.renumbered(*names_in_order(classes))
    return opened, found, notes


def open_images(source: Any, labels: LabelsGiven = "auto") -> ImageSource:
    """Open images, without reading their labels; see `open_labelled`."""
    return source if isinstance(source, ImageSource) else open_source(source, column=_column(labels))


def are_wanted(labels: LabelsGiven) -> bool:
    """Return whether any labels are asked for.

    Raises:
        ProbeError: ``labels`` is ``None``, which may mean either.
    """
    if labels is None:
        raise ProbeError("labels is None; expected 'none' to use none, 'auto' for those of the images, or labels.")
    return not (isinstance(labels, str) and labels == "none")


def is_label_file(labels: object) -> bool:
    """Return whether ``labels`` is the path of a file and not a column: by its type, suffix, or a slash in it."""
    if isinstance(labels, Path):
        return True
    path = str(labels).partition("?column=")[0].lower()
    return isinstance(labels, str) and ("/" in path or path.endswith(LABEL_SUFFIXES))


def _column(labels: LabelsGiven) -> str | None:
    """Return the column that ``labels`` names, if it names one."""
    named = isinstance(labels, str) and labels not in ("auto", "none") and not is_label_file(labels)
    return str(labels) if named else None


def _labels(source: ImageSource, given: LabelsGiven) -> Labels | None:
    if isinstance(given, str | Path) and is_label_file(given):
        # Members of shards are named "shard.tar[name]".
        names = [re.sub(r"^[^/\[]*\[(.*)\]$", r"\1", source.name(index)) for index in range(len(source))]
        read, origin = read_labels(given, names), f"the file '{given}'"
        if isinstance(read, np.ndarray):
            found = labels_of_array(read, origin, source)
        else:
            found = labels_of(read, origin, source.name)
    elif isinstance(given, str | Path):
        stored = source.labels()
        if stored is None or not stored.classes.values:
            return None
        found = stored
    else:
        found = labels_of_array(as_numpy(given), "the array given", source)
    missing = [index for index, number in enumerate(found.numbers) if number is None and index not in source.unreadable]
    if missing:
        raise ProbeError(
            f"{len(missing)} of {len(source)} images of '{source.description}' have no label, such as "
            f"'{source.name(missing[0])}'. Label them all, or ignore the labels with labels='none' (--labels none)."
        )
    return found
