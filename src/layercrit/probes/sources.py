"""The interface of image sources, and the two simplest: a folder of files, and pixels in an array."""

import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from layercrit.errors import ProbeError, near, shown
from layercrit.foreign_files import kind_of_special
from layercrit.probes.images import SUFFIXES, Pixels
from layercrit.probes.numpy_files import opened, unpacked

__all__ = [
    "ACCEPTED",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "Item",
    "check_exists",
    "find_names",
    "integer_label",
    "is_folder",
]

ACCEPTED = (
    "a folder of images, with or without one folder per class; a .npy or .npz file; .parquet or .tar shards, as a "
    "file, a folder or a pattern such as 'shard-{000..009}.tar' or 'data/*.parquet'; a folder written by the datasets "
    "library's save_to_disk; MNIST's format, as a folder or a file such as t10k-images-idx3-ubyte.gz; "
    "or 'torchvision:NAME?root=PATH&split=test'"
)
IMAGE_KEYS = ("images", "x", "arr_0")
LABEL_KEYS = ("labels", "y")


@dataclass(frozen=True)
class Item:
    """One image of a source, as it is stored there.

    Attributes:
        index: its number in the source.
        content: a path or the bytes of an image file, a decoded image, uint8 pixels ``(height, width)`` or
            ``(height, width, channels)``, or the exception that says why there is none.
        label: the class, or None without one.
    """

    index: int
    content: Path | bytes | Image.Image | Pixels | Exception
    label: int | None


class ImageSource(ABC):
    """A numbered list of images, in an order that depends on the data alone.

    Attributes:
        description: the source as the user named it.
        label_origin: what the labels are, in words; None without labels.
        n_classes: how many classes the source has; None where it does not say, or where its labels are the class
            numbers of ImageNet-1k or of the user.
    """

    description: str
    label_origin: str | None = None
    n_classes: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images, readable or not."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where image ``index`` is, in words."""

    @abstractmethod
    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield the images ``indices``, which ascend, without decoding them.

        Raises:
            ProbeError: the source as a whole is damaged, or labels were asked for and are not integers.
        """


class FolderSource(ImageSource):
    """Image files below a folder, by suffix, sorted by their path in it; hidden names are left out.

    Folders directly below are classes if every image lies in one of them (at any depth, as in torchvision's
    ``ImageFolder``). What their names are decides the labels:

    - all integers: these integers;
    - all WordNet ids of ImageNet-1k (``n01440764``): their number there, also in a subset of ImageNet;
    - else the position in the sorted list of class folders, also counting empty ones. A single folder is no class.

    Without class folders, or with images beside them, there are no labels.

    Raises:
        ProbeError: there is no such folder, or no image in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).expanduser()
        check_exists(self.root)
        self.description = str(path)
        self._names = sorted(_image_names(self.root))
        if not self._names:
            raise ProbeError(
                f"There are no images in the folder '{self.root}': no file below it has one of the suffixes "
                f"{', '.join(SUFFIXES)}. Accepted: {ACCEPTED}."
            )
        flat = any("/" not in name for name in self._names)
        classes = [] if flat else sorted(e.name for e in self.root.iterdir() if e.is_dir() and e.name[0] != ".")
        self._label_of, self.label_origin, self.n_classes = _class_labels(classes)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return the path within the folder."""
        return self._names[index]

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield paths, with the labels of their class folders."""
        for index in indices:
            name = self._names[index]
            label = self._label_of.get(name.partition("/")[0]) if use_labels else None
            yield Item(index, self.root / name, label)


def _image_names(folder: Path, prefix: str = "", above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Yield the paths of all images below ``folder``, each with ``prefix``, with forward slashes."""
    try:
        real = folder.resolve()
        if real in above:  # a link back to a folder it lies in would be followed for ever
            return
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ProbeError(f"Cannot list the folder '{folder}' ({error.strerror}). Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            yield from _image_names(Path(entry), f"{prefix}{entry.name}/", above | {real})
        elif entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name


def is_folder(path: Path | os.DirEntry[str]) -> bool:
    """Return whether there is a folder; a link to itself, a name that no file can have or a closed folder is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _class_labels(classes: list[str]) -> tuple[dict[str, int], str | None, int | None]:
    """Return the label of each class folder, what these labels are, and the number of classes (or None)."""
    if classes and all(re.fullmatch(r"[0-9]{1,18}", name) for name in classes):
        return {name: int(name) for name in classes}, "the integers that name the class folders", None
    if classes and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        from timm.data.imagenet_info import ImageNetInfo

        numbers = {name: number for number, name in enumerate(ImageNetInfo().label_names())}  # type: ignore[no-untyped-call]
        if set(classes) <= numbers.keys():
            return {name: numbers[name] for name in classes}, "ImageNet-1k's numbers of the class folders", None
    if len(classes) < 2:
        return {}, None, None
    return {name: i for i, name in enumerate(classes)}, "positions of the sorted class folders", len(classes)


class ArraySource(ImageSource):
    """Pixels in an array, a tensor, or a NumPy file.

    Shapes: ``(n_images, height, width)`` grey, ``(n_images, height, width, channels)`` or
    ``(n_images, channels, height, width)`` with 1 or 3 channels. Pixels: uint8, or floats that are multiples of 1/255
    within their precision, so that nothing is lost. An ``.npz`` file has the images under one of ``images``, ``x``
    and ``arr_0``, the labels (if any) under one of ``labels`` and ``y``.

    Args:
        images: the array, the tensor, or the path of a ``.npy`` or ``.npz`` file.
        labels: integers ``(n_images,)``; they replace those of the file.

    Raises:
        ProbeError: the file is missing, damaged, pickled or without images, or its shape or type is none of the above.
    """

    def __init__(
        self, images: npt.NDArray[Any] | torch.Tensor | str | Path, labels: npt.ArrayLike | torch.Tensor | None = None
    ) -> None:
        stored = None
        if isinstance(images, str | Path):
            self.description, self._prefix = str(images), Path(images).name
            array, stored = _load_numpy(Path(images).expanduser())
        else:
            array = _as_numpy(images)
            self.description = self._prefix = f"array {array.shape}"
        self._images = _channels_last(array, self.description)
        self._labels = stored if labels is None else _as_numpy(labels)
        if self._labels is not None:
            self.label_origin = "stored with the images"

    @property
    def n_channels(self) -> int:
        """How many channels the images have: 1 or 3."""
        return 1 if self._images.ndim == 3 else 3

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the name of the file or array and the position in it."""
        return f"{self._prefix}[{index}]"

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield uint8 pixels ``(height, width, channels)`` or ``(height, width)``."""
        labels = self._labels if use_labels else None
        if labels is not None and labels.shape != (len(self),):
            raise ProbeError(
                f"The labels of '{self.description}' have the shape {labels.shape}; expected ({len(self)},), one per "
                "image. Reshape them, or ignore them with use_labels=False (--no-labels)."
            )
        for index in indices:
            label = None if labels is None else integer_label(labels[index], self.name(index))
            yield Item(index, _as_uint8(self._images[index], self.name(index)), label)


def _load_numpy(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Return the images and the labels, if any, of a ``.npy`` or ``.npz`` file."""
    check_exists(path)
    with opened(path) as loaded:
        if isinstance(loaded, np.ndarray):
            return loaded, None
        image_key, label_key = find_names(loaded.files, IMAGE_KEYS, LABEL_KEYS, f"'{path}'")
        labels = None if label_key is None else unpacked(loaded, label_key, path)
        return unpacked(loaded, image_key, path), labels


def _channels_last(images: npt.NDArray[Any], description: str) -> npt.NDArray[Any]:
    """Return a view of shape ``(n_images, height, width, channels)`` or ``(n_images, height, width)``."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ProbeError(f"The pixels of '{description}' are {images.dtype}; expected uint8 from 0 to 255.")
    if images.size == 0:
        raise ProbeError(f"There are no images in '{description}': its shape is {images.shape}.")
    if images.ndim == 3 and images.shape[2] not in (1, 3):
        return images
    channel_axes = [axis for axis in (1, 3) if images.ndim == 4 and images.shape[axis] in (1, 3)]
    if len(channel_axes) != 1:
        raise ProbeError(
            f"The images of '{description}' have the shape {images.shape}; expected (n_images, height, width), or with "
            "an axis of 1 or 3 channels in second or last place. Arrange the axes so, also for a single image."
        )
    images = np.moveaxis(images, channel_axes[0], 3)
    return images[..., 0] if images.shape[3] == 1 else images


def _as_numpy(values: npt.ArrayLike | torch.Tensor) -> npt.NDArray[Any]:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


def _as_uint8(pixels: npt.NDArray[Any], name: str) -> Pixels:
    if pixels.dtype == np.uint8:
        return pixels
    levels = np.rint(pixels.astype(np.float64) * 255).clip(0, 255)
    # A division by 255 in the array's own precision is off by half a last digit, a product with 1/255 by one.
    if not (np.abs(levels / 255 - pixels) <= np.finfo(pixels.dtype).eps).all():
        raise ProbeError(
            f"The pixels of '{name}' are {pixels.dtype} from {pixels.min():.4g} to {pixels.max():.4g} and not "
            "multiples of 1/255 from 0 to 1, so they would be rounded. Give uint8 from 0 to 255, not normalised."
        )
    return levels.astype(np.uint8)


def check_exists(path: Path) -> None:
    """Raise a ProbeError unless ``path`` is a file or a folder; where there is none, it suggests near names."""
    try:
        special = kind_of_special(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        hint = _near_names(path)
    except (OSError, ValueError) as error:  # no permission, a link to itself, a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ProbeError(f"Cannot read '{path}' ({reason}). Check the path and its permissions.") from error
    else:
        if special is not None:
            raise ProbeError(
                f"'{path}' is {special}, which cannot be read twice or by position. Save the images as files, and give "
                "the path of the file or folder."
            )
        return
    raise ProbeError(f"No such file or folder: '{path}'. {hint} Images are never downloaded. Accepted: {ACCEPTED}.")


def _near_names(path: Path) -> str:
    """Return a sentence on what there is in place of ``path``."""
    before, mark, _ = str(path).partition("?")
    if mark and Path(before).exists():
        return f"'{before}' exists: to read it, leave out the '?' and what follows."
    if not is_folder(path.parent):
        return f"The folder '{path.parent}' does not exist either."
    try:
        return near(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""


def find_names(
    present: Iterable[str], images: Sequence[str], labels: Sequence[str], where: str
) -> tuple[str, str | None]:
    """Return which of the ``present`` names is that of the images, and which that of the labels, if any.

    Args:
        present: keys of a file or columns of a table.
        images: names accepted for the images.
        labels: names accepted for the labels.
        where: what has these names, for the error.

    Raises:
        ProbeError: none of the names for images is there, or there are several for images or for labels.
    """
    names = list(present)
    found_images = [name for name in images if name in names]
    found_labels = [name for name in labels if name in names]
    if len(found_images) != 1 or len(found_labels) > 1:
        wrong = "are no images" if not found_images else "is more than one name for images or labels"
        raise ProbeError(
            f"There {wrong} in {where}: it has {', '.join(map(repr, names)) or 'nothing'}; expected one of "
            f"{', '.join(map(repr, images))} for the images and at most one of {', '.join(map(repr, labels))} "
            "for the labels."
        )
    return found_images[0], found_labels[0] if found_labels else None


def integer_label(value: object, name: str) -> int:
    """Return ``value`` as an integer, given as Python's, NumPy's or torch's.

    Raises:
        ProbeError: it is none, or beyond 64 bits.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # which values have an index is the question
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool) or not -(2**63) <= number < 2**63:
        raise ProbeError(
            f"Labels must be integers, the model's class numbers, but that of '{name}' is {shown(value)}. Give "
            "integers, or ignore the labels with use_labels=False (--no-labels)."
        )
    return number
