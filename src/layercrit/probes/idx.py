"""Images in IDX files, the format of MNIST and its successors.

A file begins with a magic number and the lengths of its axes, four bytes each with the most significant first; the
pixels or labels follow, one byte each (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits").
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProbeError
from layercrit.foreign_files import open_regular
from layercrit.probes.bounds import DEFLATED, check_room
from layercrit.probes.classes import Labels, labels_of
from layercrit.probes.parts import NoSuchPartError, part_named, same_part, words_of
from layercrit.probes.sources import ImageSource, Item, check_exists

__all__ = ["IdxSource"]

_PARTS = {"test": "t10k", "train": "train"}  # split -> how the names of its files begin
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_BYTES_AT_ONCE = 2**20


class IdxSource(ImageSource):
    """Grey images of an IDX file ``*-images-idx3-ubyte``, with or without ``.gz``.

    Labels come from the file beside it whose name has ``labels-idx1`` in place of ``images-idx3``, if there is one.

    Args:
        path: the file of images, or a folder with the two parts of a data set, ``t10k-*`` to test and ``train-*``.
        split: which part of a folder: ``test`` or ``train``. None: ``test``. For several data sets in one folder, such
            as EMNIST's, with the words that tell it from the others: ``letters``, ``letters-train``.

    Raises:
        ProbeError: there is no such file, folder or part, or the file is damaged or contains no images.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.description = str(path) if split is None else f"{path}?split={split}"
        self._path = _file_of(Path(path).expanduser(), split)
        self._images = _read(self._path, 3)  # (n_images, height, width)
        if self._images.size == 0:
            raise ProbeError(f"There are no images in '{self._path}': its shape is {self._images.shape}.")
        self._labels_path = _labels_beside(self._path)

    @staticmethod
    def is_images(path: Path) -> bool:
        """Return whether a file is named as the images of such a data set are."""
        return re.search(rf"(^|-){_IMAGES}(\.gz)?$", path.name) is not None and not path.name.startswith(".")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the name of the file and the position in it."""
        return f"{self._path.name}[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield uint8 pixels ``(height, width)``."""
        for index in indices:
            yield Item(index, self._images[index])

    def labels(self) -> Labels | None:
        """Return the labels of the file beside the images."""
        return self._labels

    @cached_property
    def _labels(self) -> Labels | None:
        if self._labels_path is None:
            return None
        labels = _read(self._labels_path, 1)
        if len(labels) != len(self):
            raise ProbeError(
                f"'{self._labels_path}' has {len(labels)} labels for the {len(self)} images of '{self._path.name}'. "
                "Download both again, or ignore the labels with labels='none' (--labels none)."
            )
        return labels_of(labels, f"the file {self._labels_path.name}", self.name)


def _file_of(path: Path, split: str | None) -> Path:
    """Return the file of images that a path names; of a compressed file and its uncompressed copy, the latter."""
    check_exists(path)
    if not path.is_dir():
        if split is not None:
            raise NoSuchPartError(
                f"'{path}' is a single file, so it has no part {split!r}. Give its folder, or no split."
            )
        return path
    wanted = words_of(split or "test")
    if part_named("-".join(wanted)) is None:
        wanted.append("test")
    candidates = sorted(entry for entry in path.iterdir() if IdxSource.is_images(entry))
    found = [file for file in candidates if _is_of(file, wanted)]
    names = {file.name.removesuffix(".gz") for file in found}
    if len(names) == 1:
        return found[0]
    mnist = f"{_PARTS.get(split or 'test', split)}-{_IMAGES}"
    if mnist in names:
        return next(file for file in found if file.name.startswith(mnist))
    there = ", ".join(file.name for file in candidates) or "none"
    if names:
        raise ProbeError(
            f"The folder '{path}' has several data sets: {there}. Choose one by its words, such as "
            f"'{path}?split={min(names).partition(_IMAGES)[0].strip('-')}', or give the path of a file."
        )
    missing = (
        f"file {mnist} or {mnist}.gz" if split in (None, *_PARTS) else f"part {split!r}: it has 'test' and 'train'"
    )
    raise ProbeError(
        f"The folder '{path}' has no {missing}. Files of images in it: {there}. To use another file, give its path."
    )


def _is_of(file: Path, wanted: Sequence[str]) -> bool:
    """Return whether the name of a file of images has all ``wanted`` words, or words of the same part."""
    words = words_of(file.name.partition(_IMAGES)[0])
    return all(any(same_part(word, one) for one in words) for word in wanted)


def _labels_beside(images: Path) -> Path | None:
    """Return the file of labels that goes with a file of images, compressed or not."""
    unpacked = images.with_name(images.name.removesuffix(".gz").removesuffix(_IMAGES) + _LABELS)
    packed = unpacked.with_name(f"{unpacked.name}.gz")
    paths = [packed, unpacked] if images.suffix == ".gz" else [unpacked, packed]
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path, n_axes: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of an IDX file as an array of ``n_axes`` axes.

    Its header is not trusted: no more is read than the file has, nor than one byte beyond what the header promises.
    """
    try:
        with open_regular(path) as stored, gzip.open(stored) if path.suffix == ".gz" else stored as file:
            shape = _lengths(path, file.read(4 + 4 * n_axes), n_axes)
            promised, content = math.prod(shape), bytearray()
            possible = os.fstat(stored.fileno()).st_size * (DEFLATED if file is not stored else 1)
            if promised > max(possible, _BYTES_AT_ONCE):  # a smaller promise is compared with what is read
                raise _damaged(path, shape, f"cannot have more than {possible:,}")
            check_room(promised, f"'{path}'", "Save its images with numpy.save: a .npy file is read in place.")
            while piece := file.read(min(_BYTES_AT_ONCE, promised + 1 - len(content))):
                content += piece
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises on damaged files
        raise ProbeError(f"Cannot read '{path}' ({error}). Download it again.") from error
    if len(content) != promised:
        found = f"has only {len(content):,}" if len(content) < promised else "has more"
        raise _damaged(path, shape, found)
    return np.frombuffer(content, np.uint8).reshape(shape)


def _damaged(path: Path, shape: tuple[int, ...], found: str) -> ProbeError:
    return ProbeError(
        f"'{path}' is damaged: its header promises {' x '.join(map(str, shape))} = {math.prod(shape):,} bytes, but it "
        f"{found}. Download it again."
    )


def _lengths(path: Path, header: bytes, n_axes: int) -> tuple[int, ...]:
    """Return the lengths of the axes that the header of an IDX file names."""
    magic = (0x0800 + n_axes).to_bytes(4, "big")  # unsigned bytes, and how many axes they have
    if header[:4] != magic or len(header) != 4 + 4 * n_axes:
        what = "images" if n_axes == 3 else "labels"
        raise ProbeError(
            f"'{path}' is not an IDX file of {what}: it begins with {header[:4].hex(' ') or 'nothing'}; expected "
            f"{magic.hex(' ')} and the lengths of its axes."
        )
    return tuple(int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4))
