"""The rows of a study's file as Python has them, and how damage to one shows."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from layercrit.study.packing import unpack

__all__ = ["COLUMNS", "CellRow", "FailureRow", "ModelRow", "PartRow", "PlanRow", "as_plain_row", "checksum", "is_sound"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "meta": ("name", "value"),
    "models": ("model", "position", "reference", "category", "label", "documented_accuracy", "attack_norm", "eps",
               "record", "variant_of", "epoch", "probe_set", "norm_statistics"),
    "plan": ("model", "layer", "reset", "trial", "key", "type", "stage", "depth", "n_parameters", "flops_after",
             "shape"),
    "runs": ("started", "record"),
    "cells": ("key", "status", "seed", "delta_norm", "n_images", "means", "per_image", "raw", "seconds", "finished"),
    "parts": ("task", "start", "stop", "seconds", "data"),
    "failures": ("model", "reset", "trial", "error", "details", "at"),
}  # fmt: skip
"""Table -> the columns over which the checksum of a row is. The number of a run is not among them: it changes when
studies are merged."""

_LATER = {"models": 9}  # table -> how many of its columns there were when checksums began
_WHOLE = ("position", "epoch", "trial", "depth", "n_parameters", "n_images", "start", "stop")
_NUMBERS = ("documented_accuracy", "eps", "flops_after", "delta_norm", "seconds")
_JSON = ("value", "record", "means", "raw")
_PACKED = ("per_image", "data")
_NEEDED = ("name", "value", "model", "position", "reference", "layer", "reset", "trial", "key", "depth", "started",
           "status", "means", "task", "start", "stop", "data", "error", "details", "at")  # fmt: skip


@dataclass(frozen=True)
class ModelRow:
    """One model of a study.

    Attributes:
        model: its name in tables and figures, unique in the study.
        reference: its model reference, or for imported results the words under which they were published.
        category: of its training method, such as those of `layercrit.categories.CATEGORIES`, or None.
        label: its name in figures, or None: its name.
        documented_accuracy: top-1 accuracy as its authors give it, a share in [0, 1], or None.
        record: what is known since it was opened (hash, architecture, number format, predictions, notes), or None.
        attack_norm: norm of the perturbations that it was trained to withstand, such as ``l2`` or ``linf``, or None.
        eps: the largest of them, in the units in which its authors give it, or None.
        variant_of: the model of which this is a variant: at another epoch, on another probe set, or with other norm
            statistics; None: it is none.
        epoch: of its training run, or None: its final weights.
        probe_set: name of the images that it is shown; None: the study has only one probe set.
        norm_statistics: as in `layercrit.protocol.Protocol`; None: as trained.
    """

    model: str
    reference: str
    category: str | None = None
    label: str | None = None
    documented_accuracy: float | None = None
    record: Mapping[str, Any] | None = None
    attack_norm: str | None = None
    eps: float | None = None
    variant_of: str | None = None
    epoch: int | None = None
    probe_set: str | None = None
    norm_statistics: str | None = None


@dataclass(frozen=True)
class PlanRow:
    """One cell that a study is about; columns as in `layercrit.measurement.CELL_COLUMNS`, and its stage and key.

    ``shape`` is that of the layer's largest parameter, such as ``64x3x7x7``.
    """

    model: str
    layer: str
    reset: str
    trial: int
    key: str
    type: str | None
    stage: str | None
    depth: int
    n_parameters: int | None
    flops_after: float | None
    shape: str | None = None


@dataclass(frozen=True)
class CellRow:
    """What was measured in one cell.

    Attributes:
        key: name of its content.
        status: as in `layercrit.measurement.CELL_COLUMNS`.
        seed: of the trial, in [0, 2^64); None where it was not published.
        delta_norm: Euclidean norm of the new minus the trained values; None where it was not published.
        n_images: how many images the means are over.
        means: name of a distance or score -> mean over images; NaN where the cell is not ok.
        per_image: name of a distance or score -> one value an image ``(n_images,)``, float32; None where only means
            were published.
        raw: the published row as it stood, for a lossless export; None for measured cells.
        seconds: the trial's time divided by its layers.
        finished: when, ISO 8601.
    """

    key: str
    status: str
    seed: int | None
    delta_norm: float | None
    n_images: int | None
    means: Mapping[str, float]
    per_image: Mapping[str, npt.NDArray[np.float32]] | None = None
    raw: Mapping[str, Any] | None = None
    seconds: float | None = None
    finished: str | None = None


@dataclass(frozen=True)
class PartRow:
    """A batch of a trial under way: images ``start`` to ``stop``, name -> values ``(n_layers, n_images)``, float32."""

    start: int
    stop: int
    seconds: float
    values: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class FailureRow:
    """What could not be measured: one trial of one reset of one model, and why."""

    model: str
    reset: str
    trial: int
    error: str
    details: str = field(repr=False)
    at: str


def as_plain_row(plan: PlanRow, cell: CellRow) -> dict[str, Any]:
    """Return a cell as a row of the table of cells, without the values of single images."""
    measured = {k: v for k, v in vars(cell).items() if k not in ("per_image", "raw", "means")}
    return {**vars(plan), **measured, **cell.means}


def checksum(*values: Any) -> int:
    """Return the CRC-32 of a row's values as SQLite gives them back."""
    plain = [zlib.crc32(value) if isinstance(value, bytes) else value for value in values]
    return zlib.crc32(repr(plain).encode())


def is_sound(table: str, values: Sequence[Any], known: object) -> bool:
    """Return whether a row is as it was written.

    Args:
        table: its name.
        values: of the columns `COLUMNS`; bytes that are not UTF-8 in texts are lone surrogates.
        known: its checksum; None in rows that were written before there were any, of which only the types are checked.
    """
    if known is not None:
        n_first = _LATER.get(table, len(values))
        was_first = all(value is None for value in values[n_first:])  # as in rows from before there were more columns
        return known == checksum(*values) or (was_first and known == checksum(*values[:n_first]))
    try:
        return all(_has_type(column, value) for column, value in zip(COLUMNS[table], values, strict=True))
    except (ValueError, TypeError, KeyError):
        return False


def _has_type(column: str, value: Any) -> bool:
    if value is None:
        return column not in _NEEDED
    if column in _WHOLE:
        return isinstance(value, int)
    if column in _NUMBERS:
        return isinstance(value, int | float)
    if column in _PACKED:
        return isinstance(unpack(value), dict)
    if column == "seed":
        return 0 <= int(value) < 2**64
    value.encode()  # text that was not UTF-8 cannot be encoded
    return column not in _JSON or column == "value" or isinstance(json.loads(value), dict)
