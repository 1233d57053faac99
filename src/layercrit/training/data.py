"""Training images and held-out images: opened from disk, described, and read one at a time."""

import hashlib
import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from layercrit.errors import ProbeError, TrainingError
from layercrit.foreign_files import open_regular
from layercrit.probes.changes import plain_source
from layercrit.probes.idx import IdxSource
from layercrit.probes.images import FORMATS, Preprocessing, open_image
from layercrit.probes.kinds import without_split
from layercrit.probes.opening import open_source
from layercrit.probes.parts import NoSuchPartError
from layercrit.probes.sources import ArraySource, ImageSource
from layercrit.seeds import seed_of
from layercrit.training.methods import Inputs

__all__ = ["Split", "TrainingData", "open_training_data"]

_HELD_OUT = 0.1  # share of the images, if a source has no test split
_TEST_FOLDERS = ("val", "valid", "validation", "test")
_TORCHVISION_SPLITS = ("train", "trainval"), ("test", "val", "valid")  # for training, and for testing
_LARGEST = 8 * 2**30  # bytes of decoded images in memory
_KEPT = 2 * 2**30  # bytes of encoded images in memory; the rest is read again from its shards
_SAMPLE = 2000  # number of images for mean and standard deviation, if they must be decoded
_GREY = ("1", "L", "I")  # prefixes of the names of Pillow's greyscale modes
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on damaged files


class Split:
    """Labelled images, kept in memory if they are decoded or few, else read when needed.

    Attributes:
        labels: classes ``(n_images,)``.
        size: ``(height, width)`` of all images, or None if sizes differ.
        channels: of the returned images; by default 1 if all images are greyscale, else 3.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)
        self._contents: list[Any] = []  # pixels, path or bytes of a file, or None for what is read again when needed
        self._encoded = b""  # a hash of the bytes of all files
        labels, n_bytes = [], 0
        looks = _Looks()
        stored = source.labels()
        for item in source.read(self._indices):
            name = source.name(item.index)
            label = None if stored is None else stored.numbers[item.index]
            if isinstance(item.content, Exception):
                raise TrainingError(f"The image {name} cannot be read: {item.content}")
            if label is None:
                raise TrainingError(f"The image {name} has no label; training needs labels.")
            content = _pixels(item.content) if isinstance(item.content, Image.Image) else item.content
            looks.add(content, name)
            if isinstance(content, bytes):
                self._encoded = hashlib.sha256(self._encoded + content).digest()
            if not isinstance(content, Path):
                n_bytes += content.nbytes if isinstance(content, np.ndarray) else len(content)
            if isinstance(content, np.ndarray) and n_bytes > _LARGEST:
                raise TrainingError(
                    f"The images of {source.description} take more than {_LARGEST / 2**30:.0f} GiB when decoded. "
                    "Provide them as image files with one folder per class."
                )
            self._contents.append(None if isinstance(content, bytes) and n_bytes > _KEPT else content)
            labels.append(label)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.size, self.channels = looks.size(), 1 if looks.all_grey(len(labels)) else 3

    def __len__(self) -> int:
        return len(self._contents)

    def image(self, position: int) -> Image.Image:
        """Return one image, with `channels` channels.

        Raises:
            TrainingError: its file is missing or damaged.
        """
        content, index = self._contents[position], self._indices[position]
        try:
            if content is None:
                (item,) = self._source.read([index])
                content = item.content
            if isinstance(content, Exception):
                raise content
            image = Image.fromarray(content) if isinstance(content, np.ndarray) else open_image(content)
            if image.mode == ("L" if self.channels == 1 else "RGB"):
                return image
            return Image.fromarray(_pixels(image, self.channels))
        except _UNREADABLE as error:
            raise TrainingError(
                f"The image {self._source.name(index)} of {self._source.description} cannot be read: {error}"
            ) from error

    def digest(self) -> str:
        """Return a SHA-256 of labels and images; for image files in folders, of their names and sizes in bytes."""
        hasher = hashlib.sha256(self.labels.tobytes() + self._encoded)
        for content in self._contents:
            if isinstance(content, np.ndarray):
                hasher.update(repr(content.shape).encode() + content.tobytes())
            elif isinstance(content, Path):
                hasher.update(f"{content.parent.name}/{content.name} {content.stat().st_size}\n".encode())
        return hasher.hexdigest()

    def sample(self) -> Iterator[Image.Image]:
        """Yield all images if they are decoded, else an evenly spaced sample."""
        decoded = bool(self._contents) and isinstance(self._contents[0], np.ndarray)
        for position in range(0, len(self), 1 if decoded else max(1, len(self) // _SAMPLE)):
            yield self.image(position)


class _Looks:
    """Finds out whether all images have the same size and are greyscale, opening as few files as possible."""

    def __init__(self) -> None:
        self.sizes: set[tuple[int, int]] = set()
        self.n_grey = 0

    def add(self, content: Any, name: str) -> None:
        if isinstance(content, np.ndarray):
            self.sizes.add((content.shape[0], content.shape[1]))
            self.n_grey += content.ndim == 2
        elif len(self.sizes) < 2:
            try:
                with (
                    io.BytesIO(content) if isinstance(content, bytes) else open_regular(content) as file,
                    Image.open(file, formats=FORMATS) as image,
                ):
                    self.sizes.add((image.height, image.width))
                    self.n_grey += image.mode.startswith(_GREY)
            except _UNREADABLE as error:
                raise TrainingError(f"The image {name} cannot be read: {error}") from error

    def size(self) -> tuple[int, int] | None:
        return next(iter(self.sizes)) if len(self.sizes) == 1 else None

    def all_grey(self, n_images: int) -> bool:
        return self.n_grey == n_images


def _pixels(image: Image.Image, channels: int | None = None) -> npt.NDArray[np.uint8]:
    """Return the pixels ``(height, width)`` or ``(height, width, 3)`` of an image; by default with its own channels."""
    channels = channels or (1 if image.mode.startswith(_GREY) else 3)
    pixels = Preprocessing(channels, image.height, image.width, None).at_size(image)
    return pixels[0] if channels == 1 else np.moveaxis(pixels, 0, 2)


@dataclass(frozen=True)
class TrainingData:
    """Training images, and held-out images that no method sees.

    Attributes:
        source: the source as given.
        train: the training images.
        test: the held-out images, on which accuracy is measured.
        test_origin: origin of the held-out images, in words.
        inputs: inputs and classes of the network.
        sha256: of both splits.
    """

    source: str
    train: Split
    test: Split
    test_origin: str
    inputs: Inputs
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain values."""
        return {
            "source": self.source,
            "n_train": len(self.train),
            "n_test": len(self.test),
            "test_origin": self.test_origin,
            "n_classes": self.inputs.n_classes,
            "sha256": self.sha256,
        }


def open_training_data(
    source: str | Path, *, input_size: tuple[int, int, int] | None = None, download: bool = False
) -> TrainingData:
    """Open labelled images for training.

    Args:
        source: a folder with the splits ``train`` and ``val`` (or ``valid``, ``validation``, ``test``), each with one
            folder per class; a folder of MNIST's IDX files; ``torchvision:NAME?root=PATH``; or anything else that
            `open_source` accepts, of which a fixed random tenth is held out.
        input_size: channels, height and width of the network's input; by default the size of the images if they all
            have the same size, else 3 x 224 x 224.
        download: let torchvision download the data set.

    Raises:
        TrainingError: an image has no label or cannot be read, or there are fewer than two classes.
        ProbeError: the source cannot be read.
    """
    if not isinstance(source, str | Path):
        raise TrainingError(
            f"Images to train on are named by a source, such as a folder or a file; got a {type(source).__name__}. "
            "Save arrays as an .npz file with the keys images and labels."
        )
    if plain_source(str(source))[0]:
        raise TrainingError(
            f"{str(source)!r} asks for corrupted or adversarial images, which are for measurements. To train on such "
            "images, name them as they are, and choose a method such as augmix, pixmix or robust_linf."
        )
    train_source, test_source, origin = _parts(str(source), download)
    if test_source is None:
        order = np.random.PCG64(seed_of("training", "held out")).random_raw(len(train_source)).argsort(kind="stable")
        n_test = max(1, round(_HELD_OUT * len(order)))
        test = Split(train_source, sorted(order[:n_test].tolist()))
        train = Split(train_source, sorted(order[n_test:].tolist()))
    else:
        train, test = (Split(part, range(len(part))) for part in (train_source, test_source))
    n_classes = _n_classes(str(source), train.labels, test.labels, strict=test_source is not None)
    inputs = _inputs(train, test, n_classes, input_size)
    digest = hashlib.sha256((train.digest() + test.digest()).encode()).hexdigest()
    return TrainingData(str(source), train, test, origin, inputs, digest)


def _n_classes(source: str, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], strict: bool) -> int:
    """Return the number of classes; ``strict``: every class of the test images must have training images."""
    classes = np.unique(train)
    if len(classes) < 2:
        raise TrainingError(
            f"The training images of {source} are all of class {classes[0]}; expected at least two classes."
        )
    if (lowest := min(classes.min(), test.min())) < 0:
        raise TrainingError(f"Labels of {source} must be 0 or larger; got {lowest}.")
    n_classes = int(max(classes.max(), test.max())) + 1
    if len(classes) < n_classes / 2:
        raise TrainingError(
            f"{source} has {len(classes)} classes with labels up to {n_classes - 1}. Number them from 0 without gaps. "
            "(Folders named by ImageNet's WordNet ids get ImageNet's labels: rename them for a subset.)"
        )
    if strict and (new := np.setdiff1d(test, classes)).size:
        raise TrainingError(
            f"{source} has test images but no training images of {len(new)} class{'es' * (len(new) > 1)}, "
            f"such as {new[0]}."
        )
    return n_classes


def _parts(source: str, download: bool) -> tuple[ImageSource, ImageSource | None, str]:
    """Return training images, test images if the source has a test split, and the origin of the test images."""
    held_out = f"a tenth of {source}, held out"
    if source.startswith("torchvision:"):
        return _torchvision_parts(source, download) or (open_source(source), None, held_out)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if any(folder.glob("*-images-idx3-ubyte*")):
            return IdxSource(folder, "train"), IdxSource(folder, "test"), "its part 't10k'"
        if (train := _train_folder(folder)) is not None:
            tests = [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]
            if not tests:
                return open_source(train), None, held_out
            _check_same_classes(train, tests[0])
            return open_source(train), open_source(tests[0]), f"its folder '{tests[0].name}'"
    return _named_parts(source) or (open_source(source), None, held_out)


def _train_folder(folder: Path) -> Path | None:
    """Return the folder ``train`` of a data set, unless it contains the images of a class of that name."""
    train = folder / "train"
    if not train.is_dir():
        return None
    others = _folders(folder) - {"train", *_TEST_FOLDERS}
    return None if others and not _folders(train) else train


def _folders(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


def _named_parts(source: str) -> tuple[ImageSource, ImageSource, str] | None:
    """Return the parts ``train`` and ``test`` (or ``val``) of arrays in a file or of shards; None without both."""
    if without_split(source)[1] is not None:
        return None
    for name in ("test", "val"):
        with suppress(NoSuchPartError):
            train, test = open_source(source, split="train"), open_source(source, split=name)
            arrays = " and ".join(map(repr, test.keys)) if isinstance(test, ArraySource) else ""
            return train, test, f"its arrays {arrays}" if arrays else f"its part '{name}'"
    return None


def _check_same_classes(train: Path, test: Path) -> None:
    if only := sorted(_folders(train) ^ _folders(test)):
        raise TrainingError(
            f"{train} and {test} must contain the same folders, one per class; "
            f"{len(only)} {'is' if len(only) == 1 else 'are'} in only one of them, such as {only[0]!r}."
        )


def _torchvision_parts(source: str, download: bool) -> tuple[ImageSource, ImageSource, str] | None:
    """Return the splits of a torchvision data set, or None if its class has none or the source names one."""
    from torchvision import datasets

    name, _, query = source.removeprefix("torchvision:").partition("?")
    options = dict(part.partition("=")[::2] for part in query.split("&"))
    if name not in datasets.__all__ or "root" not in options:
        return None  # reported when it is opened
    cls = getattr(datasets, name)
    parameters = inspect.signature(cls).parameters
    keyword = next((keyword for keyword in ("split", "train") if keyword in parameters), None)
    trains, tests = _TORCHVISION_SPLITS
    if download and "download" in parameters:
        splits = [options["split"]] if "split" in options else (*trains, *tests)
        if keyword == "train":
            _fetch(cls, options["root"], [{"train": True}, {"train": False}])
        else:
            _fetch(cls, options["root"], [{"split": split} for split in splits] if keyword else [{}])
    if "split" in options or keyword is None:
        return None
    train, _ = _first_split(source, trains if keyword == "split" else ("train",))
    test, split = _first_split(source, tests if keyword == "split" else ("test",))
    return train, test, f"its part '{split}'"


def _first_split(source: str, splits: Sequence[str]) -> tuple[ImageSource, str]:
    """Open the first of some splits that a torchvision class has, and return it with its name."""
    first: ProbeError | None = None
    for split in splits:
        try:
            return open_source(f"{source}&split={split}"), split
        except ProbeError as error:
            if not isinstance(error.__cause__, ValueError):  # which torchvision raises for unknown splits
                raise
            first = first or error
    raise first or ProbeError(f"{source} has no splits.")


def _fetch(cls: Any, root: str, parts: Sequence[Mapping[str, Any]]) -> None:
    """Let torchvision's class download the files of some splits, skipping those it does not have."""
    for part in parts:
        try:
            cls(str(Path(root).expanduser()), download=True, **part)
        except ValueError:
            continue  # the class has no split of this name; if it has none, this is reported when it is opened
        except Exception as error:  # a server or a disk may raise anything
            raise TrainingError(f"torchvision could not download {cls.__name__} to {root} ({error}).") from error


def _inputs(train: Split, test: Split, n_classes: int, input_size: tuple[int, int, int] | None) -> Inputs:
    own = train.size if train.size == test.size else None
    channels, height, width = input_size or (train.channels, *(own or (224, 224)))
    if channels not in (1, 3) or min(height, width) < 1:
        raise TrainingError(f"input_size must be channels (1 or 3), height and width; got {channels} {height} {width}.")
    train.channels = test.channels = channels
    total = np.zeros((2, channels))
    n_pixels = 0
    for image in train.sample():
        pixels = np.asarray(image, dtype=np.float64).reshape(-1, channels) / 255
        total += pixels.sum(axis=0), np.square(pixels).sum(axis=0)
        n_pixels += len(pixels)
    mean = total[0] / n_pixels
    std = np.sqrt(np.maximum(total[1] / n_pixels - mean**2, 1e-8))
    return Inputs(
        channels=channels,
        height=height,
        width=width,
        n_classes=n_classes,
        mean=tuple(round(float(value), 4) for value in mean),
        std=tuple(max(round(float(value), 4), 1e-4) for value in std),
        same_size=own == (height, width),
    )
