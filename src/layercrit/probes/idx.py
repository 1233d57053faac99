"""Images in IDX files, the format of MNIST and of the data sets made after it.

A file begins with a magic number and the lengths of its axes, four bytes each with the most significant first; the
pixels or labels follow, one byte each (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits").
"""

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProbeError
from layercrit.probes.sources import ImageSource, Item, check_exists

__all__ = ["IdxSource"]

_PARTS = {"test": "t10k", "train": "train"}  # split -> how the names of its files begin
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_BYTES_AT_ONCE = 2**20


class IdxSource(ImageSource):
    """Grey images of an IDX file ``*-images-idx3-ubyte``, with or without ``.gz``.

    Labels are those of the file beside it whose name has ``labels-idx1`` in place of ``images-idx3``, if there is one.

    Args:
        path: The file of images, or a folder with the two parts of a data set, ``t10k-*`` to test and ``train-*``.
        split: Which part of a folder: ``test`` or ``train``. None: ``test``.

    Raises:
        ProbeError: Nothing lies there, there is no such part, or the file is damaged or none of images.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.description = str(path)
        self._path = _file_of(Path(path).expanduser(), split)
        self._images = _read(self._path, 3)  # (n_images, height, width)
        if self._images.size == 0:
            raise ProbeError(f"no images in '{self._path}': its axes have the lengths {self._images.shape}")
        self._labels_path = _labels_beside(self._path)
        if self._labels_path is not None:
            self.label_origin = f"the file {self._labels_path.name}"

    @staticmethod
    def is_images(path: Path) -> bool:
        """Return whether a file is named as the images of such a data set are."""
        return re.search(rf"(^|-){_IMAGES}(\.gz)?$", path.name) is not None and not path.name.startswith(".")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the name of the file and the position in it."""
        return f"{self._path.name}[{index}]"

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield uint8 pixels ``(height, width)``."""
        labels = self._labels if use_labels else None
        for index in indices:
            yield Item(index, self._images[index], None if labels is None else int(labels[index]))

    @cached_property
    def _labels(self) -> npt.NDArray[np.uint8] | None:
        """The labels ``(n_images,)``, None without any."""
        if self._labels_path is None:
            return None
        labels = _read(self._labels_path, 1)
        if len(labels) != len(self):
            raise ProbeError(
                f"'{self._labels_path}' holds {len(labels)} labels for the {len(self)} images of '{self._path.name}'; "
                "fetch both again, or leave the labels out with use_labels=False (--no-labels)"
            )
        return labels


def _file_of(path: Path, split: str | None) -> Path:
    """Return the file of images that a path means; of a packed file and its unpacked copy, the latter."""
    check_exists(path)
    if not path.is_dir():
        if split is not None:
            raise ProbeError(f"'{path}' is one file, so it has no part {split!r}; give its folder, or no split")
        return path
    if split not in (None, *_PARTS):
        raise ProbeError(f"a folder of IDX files has no part {split!r}: it has 'test' and 'train'")
    wanted = f"{_PARTS[split or 'test']}-{_IMAGES}"
    found = [path / name for name in (wanted, f"{wanted}.gz") if (path / name).is_file()]
    if not found:
        there = ", ".join(sorted(entry.name for entry in path.iterdir() if IdxSource.is_images(entry))) or "none"
        raise ProbeError(
            f"the folder '{path}' has no file {wanted} or {wanted}.gz. Files of images in it: {there}. "
            "To take another one, give its own path"
        )
    return found[0]


def _labels_beside(images: Path) -> Path | None:
    """Return the file of the labels that go with a file of images, packed like that or not."""
    unpacked = images.with_name(images.name.removesuffix(".gz").removesuffix(_IMAGES) + _LABELS)
    packed = unpacked.with_name(f"{unpacked.name}.gz")
    paths = [packed, unpacked] if images.suffix == ".gz" else [unpacked, packed]
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path, n_axes: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of an IDX file as an array of ``n_axes`` axes.

    Its header is not believed: no more is held in memory than the file has, nor than one byte beyond the promised.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _lengths(path, file.read(4 + 4 * n_axes), n_axes)
            promised, content = math.prod(shape), bytearray()
            while piece := file.read(min(_BYTES_AT_ONCE, promised + 1 - len(content))):
                content += piece
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises on damaged files
        raise ProbeError(f"cannot read '{path}': {error}. Fetch it again") from error
    if len(content) != promised:
        found = f"holds only {len(content):,}" if len(content) < promised else "goes on after them"
        raise ProbeError(
            f"'{path}' is damaged: its header promises {' x '.join(map(str, shape))} = {promised:,} bytes, but it "
            f"{found}. Fetch it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _lengths(path: Path, header: bytes, n_axes: int) -> tuple[int, ...]:
    """Return the lengths of the axes that the header of an IDX file names."""
    magic = (0x0800 + n_axes).to_bytes(4)  # unsigned bytes, and how many axes they have
    if header[:4] != magic or len(header) != 4 + 4 * n_axes:
        what = "images" if n_axes == 3 else "labels"
        raise ProbeError(
            f"'{path}' is no IDX file of {what}: it begins with {header[:4].hex(' ') or 'nothing'}, expected "
            f"{magic.hex(' ')} and the lengths of its axes"
        )
    return tuple(int.from_bytes(header[start : start + 4]) for start in range(4, len(header), 4))
