"""The interface of image sources, and the two simplest: a folder of files, and pixels in an array."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from layercrit.counts import counted
from layercrit.errors import ProbeError, near
from layercrit.foreign_files import kind_of_special
from layercrit.probes.classes import Classes, Kind, Labels, as_numpy, class_numbers, labels_of
from layercrit.probes.corruptions import Corruption
from layercrit.probes.image_columns import unused_columns
from layercrit.probes.images import SUFFIXES, Pixels
from layercrit.probes.label_files import notes_on_files
from layercrit.probes.numpy_files import opened, unpacked
from layercrit.probes.parts import chosen_part, level_of_parts, part_named, same_part, words_of

__all__ = [
    "ACCEPTED",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "Item",
    "check_exists",
    "find_names",
    "is_folder",
    "labels_of_array",
]

ACCEPTED = (
    "a folder of images, with or without one folder per class; a .npy or .npz file; .parquet or .tar shards, as a "
    "file, a folder or a pattern such as 'shard-{000..009}.tar' or 'data/*.parquet'; a folder written by the datasets "
    "library's save_to_disk; MNIST's format, as a folder or a file such as t10k-images-idx3-ubyte.gz; "
    "'torchvision:NAME?root=PATH&split=test'; or any of these with 'corrupt:KIND@SEVERITY:' before it"
)
IMAGE_KEYS = ("images", "x", "arr_0")
LABEL_KEYS = ("labels", "y")
_IMAGE_WORDS = ("images", "image", "imgs", "data", "x")  # of a part: test_images, x_test
_LABEL_WORDS = ("labels", "label", "targets", "target", "y")
_ORIGINS: dict[Kind, str] = {
    "names": "the integers that name the class folders",
    "imagenet": "ImageNet-1k's numbers of the class folders",
    "positions": "positions of the sorted class folders",
}


@dataclass(frozen=True)
class Item:
    """One image of a source, as it is stored there.

    Attributes:
        index: its number in the source.
        content: a path or the bytes of an image file, a decoded image, uint8 pixels ``(height, width)`` or
            ``(height, width, channels)``, or the exception that says why there is none.
    """

    index: int
    content: Path | bytes | Image.Image | Pixels | Exception


class ImageSource(ABC):
    """A numbered list of images, in an order that depends on the data alone.

    Attributes:
        description: the source as the user named it.
        notes: what the user should know about what was taken, in words.
        unreadable: images whose labels cannot be read because they are damaged themselves; they are left out.
        corruptions: what is done to its images in this order, once they have the size that the model takes.
    """

    description: str
    notes: tuple[str, ...] = ()
    unreadable: frozenset[int] = frozenset()
    corruptions: tuple[Corruption, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images, readable or not."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where image ``index`` is, in words."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield the images ``indices``, which ascend, without decoding them.

        Raises:
            ProbeError: the source as a whole is damaged.
        """

    def labels(self) -> Labels | None:
        """Return the labels of all images, None without labels.

        Raises:
            ProbeError: they are damaged, or neither integers nor names of classes.
        """
        return None

    def unused_labels(self) -> list[str]:
        """Return, in words, what looks like labels of this source although it has none."""
        return []


class FolderSource(ImageSource):
    """Image files below a folder, by suffix, sorted by their path in it; hidden names are left out.

    Folders directly below are classes if every image lies in one of them (at any depth, as in torchvision's
    ``ImageFolder``). What their names are decides the labels:

    - all integers: these integers;
    - all WordNet ids of ImageNet-1k (``n01440764``): their number there, also in a subset of ImageNet;
    - else the position in the sorted list of class folders, also counting empty ones. A single folder is no class.

    Without class folders, or with images beside them, there are no labels.

    Args:
        path: the folder.
        split: which of its parts to take, where it has folders such as ``train`` and ``val``, above its class folders
            or in each of them.

    Raises:
        ProbeError: there is no such folder, no image in it, no such part, or several parts and none is named.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.root = Path(path).expanduser()
        check_exists(self.root)
        self.description = str(path) if split is None else f"{path}?split={split}"
        names = sorted(_image_names(self.root))
        if not names:
            raise ProbeError(
                f"There are no images in the folder '{self.root}': no file below it has one of the suffixes "
                f"{', '.join(SUFFIXES)}. Accepted: {ACCEPTED}."
            )
        self._level, self._part = _part_of(names, split, str(path).rstrip("/"))
        self._names = [name for name in names if self._part in (None, _folder_at(name, self._level))]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return the path within the folder."""
        return self._names[index]

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield paths."""
        for index in indices:
            yield Item(index, self.root / self._names[index])

    def labels(self) -> Labels | None:
        """Return the labels that the names of class folders stand for."""
        folders = [name[0] if len(name) > 1 else "" for name in map(self._path_in_part, self._names)]
        if "" in folders:
            return None
        used, empty = sorted({*folders}), []
        label_of, kind = class_numbers(used)
        if kind == "positions":
            above = self.root / (self._part or "") if self._level == 0 else self.root
            label_of, _ = class_numbers(sorted(e.name for e in above.iterdir() if e.is_dir() and e.name[0] != "."))
            empty = sorted(label_of.keys() - {*used})
            if len(label_of) < 2:
                return None
        numbers = [label_of[folder] for folder in folders]
        n_classes = len(label_of) if kind == "positions" else None
        classes = Classes(_ORIGINS[kind], kind, tuple(sorted({*numbers})), n_classes, tuple(empty))
        return Labels(numbers, classes, {label: name for name, label in label_of.items()})

    def unused_labels(self) -> list[str]:
        """Return what folders and files below or beside the folder look like labels."""
        paths = [self._path_in_part(name) for name in self._names]
        beside = [path[0] for path in paths if len(path) == 1]
        depth = next((i for i, names in enumerate(zip(*paths, strict=False)) if len({*names}) > 1), 0)
        if len(beside) == len(paths) or not (beside or all(len(path) > depth + 1 for path in paths)):
            return notes_on_files(self.root / self._part if self._part and self._level == 0 else self.root)
        folder = self.root.joinpath(*paths[0][:depth])
        if beside:
            hint = f"since images lie beside them, such as '{beside[0]}'; to use them, move these elsewhere"
        else:
            hint = f"since they are not directly below the folder given; to use them, give '{folder}'"
        return [f"the folders in '{folder}' look like classes and are not used, {hint}"]

    def _path_in_part(self, name: str) -> list[str]:
        """Return the folders of an image, without that of its part, and its file."""
        words = name.split("/")
        return words if self._part is None else words[: self._level] + words[self._level + 1 :]


def _part_of(names: Sequence[str], split: str | None, folder: str) -> tuple[int, str | None]:
    """Return the part of a folder that is asked for, None without parts, and at which level its name stands."""
    level = level_of_parts(names) or 0
    several = level_of_parts(names) is not None
    found = {_folder_at(name, level) for name in names} - {""} if several or split is not None else set()
    parts = {name for name in found if part_named(name) == name.lower()}
    return level, chosen_part(parts, split, folder, "{0}?split={1}" if level else "{0}/{1}' or '{0}?split={1}")


def _folder_at(name: str, level: int) -> str:
    folders = name.split("/")[:-1]
    return folders[level] if level < len(folders) else ""


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


class ArraySource(ImageSource):
    """Pixels in an array, a tensor, or a NumPy file; ``keys`` are those of an ``.npz`` file that it takes.

    Shapes: ``(n_images, height, width)`` grey, ``(n_images, height, width, channels)`` or
    ``(n_images, channels, height, width)`` with 1 or 3 channels. Pixels: uint8, or floats that are multiples of 1/255
    within their precision, so that nothing is lost. An ``.npz`` file has the images under one of ``images``, ``x``
    and ``arr_0``, the labels (if any) under one of ``labels`` and ``y``; or parts, such as ``test_images`` with
    ``test_labels``, or ``x_test`` with ``y_test``.

    Args:
        images: the array, the tensor, or the path of a ``.npy`` or ``.npz`` file.
        labels: integers ``(n_images,)``, ``(n_images, 1)`` or one-hot ``(n_images, n_classes)``, or names of classes
            ``(n_images,)``; they replace those of the file.
        split: which part of an ``.npz`` file to take.
        key: where an ``.npz`` file has the labels.

    Raises:
        ProbeError: the file is missing, damaged, pickled or without images, its shape or type is none of the above, or
            it has several parts and none is named.
    """

    def __init__(
        self,
        images: npt.NDArray[Any] | torch.Tensor | str | Path,
        labels: npt.ArrayLike | torch.Tensor | None = None,
        *,
        split: str | None = None,
        key: str | None = None,
    ) -> None:
        stored, self._file, self.keys = None, None, list[str]()
        if isinstance(images, str | Path):
            self.description, self._prefix = str(images) + (f"?split={split}" if split else ""), Path(images).name
            self._file = Path(images).expanduser()
            array, stored, self.keys, self._other_keys = _load_numpy(self._file, split, key)
            parts = sorted({part for key in self._other_keys if (part := _part_of_key(key, _IMAGE_WORDS))})
            if parts and split is None:
                self.notes = (f"'{images}' has other parts: {', '.join(parts)}; such as '{images}?split={parts[-1]}'",)
        else:
            array = as_numpy(images)
            self.description = self._prefix = f"array {array.shape}"
        self._images = _channels_last(array, self.description)
        self._labels = stored if labels is None else as_numpy(labels)

    @property
    def n_channels(self) -> int:
        """How many channels the images have: 1 or 3."""
        return 1 if self._images.ndim == 3 else 3

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the name of the file or array and the position in it."""
        return f"{self._prefix}[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield uint8 pixels ``(height, width, channels)`` or ``(height, width)``."""
        for index in indices:
            yield Item(index, _as_uint8(self._images[index], self.name(index)))

    def labels(self) -> Labels | None:
        """Return the labels given or stored."""
        return None if self._labels is None else labels_of_array(self._labels, "the array with the images", self)

    def unused_labels(self) -> list[str]:
        """Return which keys of the file, or which files beside it, look like labels."""
        if self._file is None:
            return []
        return unused_columns(self._other_keys, "key") if self._other_keys else notes_on_files(self._file.parent)


def labels_of_array(values: npt.NDArray[Any], origin: str, source: ImageSource) -> Labels:
    """Return labels ``(n_images,)``, ``(n_images, 1)`` or one-hot ``(n_images, n_classes)`` of a source's images.

    Raises:
        ProbeError: their shape is none of these, or they are neither integers nor names.
    """
    n_images = len(source)
    if values.shape == (n_images, 1):
        values = values[:, 0]
    n_classes = values.shape[1] if values.ndim == 2 else None
    if n_classes is not None and len(values) == n_images and values.dtype.kind in "biuf":
        hot = values == 1
        if (hot.sum(axis=1) == 1).all() and (hot | (values == 0)).all():
            labels = labels_of(hot.argmax(axis=1), f"{origin}, one-hot", source.name)
            return replace(labels, classes=replace(labels.classes, n_classes=n_classes))
    if values.shape != (n_images,):
        raise ProbeError(
            f"The labels of '{source.description}' have the shape {values.shape}; expected ({n_images},), one per "
            "image. Reshape them, or ignore them with labels='none' (--labels none)."
        )
    return labels_of(values, origin, source.name)


def _load_numpy(
    path: Path, split: str | None, key: str | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, list[str], list[str]]:
    """Return images, labels (if any) and their keys of a ``.npy`` or ``.npz`` file, and the keys of other arrays."""
    check_exists(path)
    with opened(path) as loaded:
        if isinstance(loaded, np.ndarray):
            chosen_part([], split, str(path))
            return loaded, None, [], []
        image_key, label_key = _keys(loaded.files, split, key, path)
        keys = [key for key in (image_key, label_key) if key is not None]
        others = [name for name in loaded.files if name not in keys]
        labels = None if label_key is None else unpacked(loaded, label_key, path)
        return unpacked(loaded, image_key, path), labels, keys, others


def _keys(names: Sequence[str], split: str | None, key: str | None, path: Path) -> tuple[str, str | None]:
    """Return which keys of an ``.npz`` file hold the images and the labels, if any, of the part asked for."""
    parts = {part: name for name in names if (part := _part_of_key(name, _IMAGE_WORDS)) is not None}
    plain = any(name in names for name in IMAGE_KEYS)
    if plain and parts and split is not None and same_part(split, "train"):
        split = next((part for part in parts if same_part(part, split)), None)  # None: 'images' beside 'test_images'
    part = None if plain and split is None else chosen_part(parts, split, str(path))
    if part is None:
        return find_names(names, IMAGE_KEYS, LABEL_KEYS, f"'{path}'", key)
    labels = [name for name in names if _part_of_key(name, _LABEL_WORDS) == part]
    return find_names(names, [parts[part]], labels, f"'{path}'", key)


def _part_of_key(name: str, words: Sequence[str]) -> str | None:
    """Return the part of which a key such as ``x_test`` holds what one of ``words`` says."""
    part = part_named(name)
    return (
        part if part is not None and [word for word in words_of(name) if word != part] in ([w] for w in words) else None
    )


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


def _as_uint8(pixels: npt.NDArray[Any], name: str) -> Pixels:
    if pixels.dtype == np.uint8:
        return pixels
    n_missing = int(np.count_nonzero(~np.isfinite(pixels)))
    if n_missing:
        raise ProbeError(
            f"{counted(n_missing, 'value')} of the pixels of '{name}' {'is' if n_missing == 1 else 'are'} NaN or "
            "infinite. Find out why, then correct the image or leave it out: in uint8 they could be any value."
        )
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
    present: Iterable[str], images: Sequence[str], labels: Sequence[str], where: str, label: str | None = None
) -> tuple[str, str | None]:
    """Return which of the ``present`` names is that of the images, and which that of the labels, if any.

    Args:
        present: keys of a file or columns of a table.
        images: names accepted for the images.
        labels: names accepted for the labels.
        where: what has these names, for the error.
        label: the name of the labels, where it was given.

    Raises:
        ProbeError: none of the names for images is there, or there are several for images or for labels, or the given
            one is not there.
    """
    names = list(present)
    if label is not None and label not in names:
        raise ProbeError(f"There are no labels {label!r} in {where}. {near(label, names)}")
    found_images = [name for name in images if name in names and name != label]
    found_labels = [name for name in labels if name in names] if label is None else [label]
    if len(found_images) != 1 or len(found_labels) > 1:
        wrong = "are no images" if not found_images else "is more than one name for images or labels"
        raise ProbeError(
            f"There {wrong} in {where}: it has {', '.join(map(repr, names)) or 'nothing'}; expected one of "
            f"{', '.join(map(repr, images))} for the images and at most one of {', '.join(map(repr, labels))} "
            "for the labels. Which of several has the labels: labels='NAME' (--labels NAME)."
        )
    return found_images[0], found_labels[0] if found_labels else None
