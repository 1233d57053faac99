"""Find out what a source of images is, and open it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layercrit.errors import ProbeError
from layercrit.probes.hugging_face import HuggingFaceSource
from layercrit.probes.idx import IdxSource
from layercrit.probes.images import SUFFIXES
from layercrit.probes.parquet import ParquetSource
from layercrit.probes.sources import ACCEPTED, ArraySource, FolderSource, ImageSource, check_exists, is_folder
from layercrit.probes.tar import TarSource
from layercrit.probes.torchvision import TorchvisionSource

__all__ = ["open_source"]


def open_source(source: str | Path | npt.NDArray[Any] | torch.Tensor) -> ImageSource:
    """Find out what ``source`` is, from its type, its suffix or the contents of a folder, and open it.

    Raises:
        ProbeError: there is no such file or folder, it contains no image, or it is of an unknown kind.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return ArraySource(source)
    if str(source).startswith("torchvision:"):
        return TorchvisionSource.from_text(str(source))
    if not isinstance(source, str | Path):
        raise ProbeError(f"Cannot read images from an object of type {type(source).__name__}. Accepted: {ACCEPTED}.")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # of a user who is not known
        raise ProbeError(f"Cannot read '{source}' ({error}). Give the path without '~'.") from error
    if is_folder(path):
        return _open_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetSource(source)
    if suffix == ".tar":
        return TarSource(source)
    check_exists(path)
    if IdxSource.is_images(path):
        return IdxSource(source)
    if suffix in (".npy", ".npz"):
        return ArraySource(path)
    hint = " For a single image, give its folder." if suffix in SUFFIXES else ""
    if suffix == ".tgz" or ".tar" in path.suffixes:
        hint = " A compressed tar file cannot be read by offset: decompress it first."
    raise ProbeError(f"Cannot read images from '{path}': unknown file type. Accepted: {ACCEPTED}.{hint}")


def _open_folder(path: Path) -> ImageSource:
    if HuggingFaceSource.is_saved(path) or (path / "dataset_dict.json").is_file():
        return HuggingFaceSource(path)
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    suffixes = {entry.suffix.lower() for entry in entries}
    if any(entry.is_dir() for entry in entries) or suffixes & set(SUFFIXES):
        return FolderSource(path)
    if {".parquet", ".tar"} <= suffixes:
        raise ProbeError(f"'{path}' contains both .parquet and .tar files. Choose one, such as '{path / '*.tar'}'.")
    if ".parquet" in suffixes:
        return ParquetSource(path)
    if ".tar" in suffixes:
        return TarSource(path)
    return IdxSource(path) if any(map(IdxSource.is_images, entries)) else FolderSource(path)
