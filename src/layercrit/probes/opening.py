"""Find out what a source of images is, and open it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layercrit.errors import ProbeError
from layercrit.probes.changes import begins_with
from layercrit.probes.corruptions import split_corruption
from layercrit.probes.hugging_face import HuggingFaceSource
from layercrit.probes.idx import IdxSource
from layercrit.probes.images import SUFFIXES
from layercrit.probes.kinds import IMAGE_SOURCES, kind_of, named_kind, open_named, without_split
from layercrit.probes.label_files import LABEL_SUFFIXES
from layercrit.probes.parquet import ParquetSource
from layercrit.probes.parts import same_part
from layercrit.probes.sources import ACCEPTED, ArraySource, FolderSource, ImageSource, check_exists, is_folder
from layercrit.probes.tar import TarSource

__all__ = ["open_source"]


def open_source(
    source: str | Path | npt.NDArray[Any] | torch.Tensor, *, split: str | None = None, column: str | None = None
) -> ImageSource:
    """Find out what ``source`` is, from its type, its suffix or the contents of a folder, and open it.

    Args:
        source: the images; ``?split=NAME`` at the end of a path says which part of them, ``corrupt:KIND@SEVERITY:``
            before it that they are corrupted (`layercrit.probes.corruptions`).
        split: the same.
        column: where a table or an archive has the labels: a column, a key, a suffix of members.

    Raises:
        ProbeError: there is no such file or folder, it contains no image or not the part asked for, it is of an unknown
            kind, or has no columns.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        _refuse_column(column, "an array")
        return ArraySource(source)
    if not isinstance(source, str | Path):
        raise ProbeError(f"Cannot read images from an object of type {type(source).__name__}. Accepted: {ACCEPTED}.")
    if corrupted := split_corruption(source):
        corruption, inner = corrupted
        opened = open_source(inner, split=split, column=column)
        opened.corruptions = (*opened.corruptions, corruption)
        opened.description = f"corrupt:{corruption}:{opened.description}"
        return opened
    if begins_with("attack", source):
        raise ProbeError(
            f"The images '{source}' would be adversarial, and such images are made on a model: measure(model, "
            "'attack:pgd(...):SOURCE'), with corruptions, if any, behind the attack: "
            "'attack:pgd(...):corrupt:KIND@SEVERITY:SOURCE'. For a probe set, call layercrit.attacks.attacked."
        )
    if name := kind_of(source):
        _refuse_column(column, f"'{source}'")
        return open_named(name, str(source), split)
    source, named = without_split(source)
    kind, split = _kind(source), split or named
    if kind is ParquetSource or kind is TarSource or kind is HuggingFaceSource:
        return kind(source, split, column)
    if kind is ArraySource and str(source).lower().endswith(".npz"):
        return ArraySource(source, split=split, key=column)
    if kind is FolderSource and split is not None:
        for folder in sorted(Path(source).expanduser().iterdir()):
            if same_part(folder.name, split) and is_folder(folder) and _kind(folder) is not FolderSource:
                return open_source(folder, column=column)  # of shards or files of another kind
    _refuse_column(column, f"'{source}'")
    if kind is ArraySource:
        return ArraySource(source, split=split)
    return IdxSource(source, split) if kind is IdxSource else FolderSource(source, split)


def _refuse_column(column: str | None, where: str) -> None:
    if column is not None:
        raise ProbeError(
            f"The labels {column!r} are neither a file, whose name ends in {', '.join(LABEL_SUFFIXES)}, nor has "
            f"{where} columns. Give such a file, 'auto' or 'none'."
        )


def _kind(source: str | Path) -> type[ImageSource]:
    """Return the kind of source that a path names."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # of a user who is not known
        raise ProbeError(f"Cannot read '{source}' ({error}). Give the path without '~'.") from error
    if is_folder(path):
        return _kind_of_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetSource
    if suffix == ".tar":
        return TarSource
    if (name := named_kind(source)) and not os.path.exists(path):  # noqa: PTH110 - which no name makes raise
        raise ProbeError(
            f"'{source}' is neither a file nor a folder, and there is no kind of images {name!r}. "
            f"{IMAGE_SOURCES.hint(name)} Accepted: {ACCEPTED}."
        )
    check_exists(path)
    if IdxSource.is_images(path):
        return IdxSource
    if suffix in (".npy", ".npz"):
        return ArraySource
    hint = " For a single image, give its folder." if suffix in SUFFIXES else ""
    if suffix == ".tgz" or ".tar" in path.suffixes:
        hint = " A compressed tar file cannot be read by offset: decompress it first."
    raise ProbeError(f"Cannot read images from '{path}': unknown file type. Accepted: {ACCEPTED}.{hint}")


def _kind_of_folder(path: Path) -> type[ImageSource]:
    if HuggingFaceSource.is_saved(path) or (path / "dataset_dict.json").is_file():
        return HuggingFaceSource
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    suffixes = {entry.suffix.lower() for entry in entries}
    if any(entry.is_dir() for entry in entries) or suffixes & set(SUFFIXES):
        return FolderSource
    if {".parquet", ".tar"} <= suffixes:
        raise ProbeError(f"'{path}' contains both .parquet and .tar files. Choose one, such as '{path / '*.tar'}'.")
    if ".parquet" in suffixes:
        return ParquetSource
    if ".tar" in suffixes:
        return TarSource
    return IdxSource if any(map(IdxSource.is_images, entries)) else FolderSource
