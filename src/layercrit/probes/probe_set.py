"""Image sources -> probe set: the images a model is shown, drawn by seed, decoded once, identified by a hash."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Unpack

from layercrit.errors import ProbeError
from layercrit.foreign_files import read_json
from layercrit.probes.bounds import check_room
from layercrit.probes.classes import Classes, former_classes, imagenet_names
from layercrit.probes.corruptions import Corruption, about_corruptions
from layercrit.probes.decoding import Draw, Progress, check_settings, order_of
from layercrit.probes.hugging_face import HuggingFaceSource
from layercrit.probes.images import STANDARD, Pixels, Preprocessing
from layercrit.probes.labelling import LabelsGiven, open_labelled
from layercrit.probes.parquet import ParquetSource
from layercrit.probes.pixels import KeptPixels, PixelStore, about_copies, digest_of
from layercrit.probes.sources import ArraySource, FolderSource, ImageSource
from layercrit.probes.tar import TarSource
from layercrit.probes.torchvision import TorchvisionSource
from layercrit.shown_images import ShownImages

__all__ = ["MEMORY_LIMIT", "ProbeOptions", "ProbeSet", "Progress"]

MEMORY_LIMIT = 2**30  # bytes
_LOG = logging.getLogger(__name__)

_IMAGES, _ABOUT = "images.npy", "probe_set.json"
_IMAGES_AT_ONCE = 256
_SHARE_OF_GPU = 0.2  # of its free memory, that images may take
_BYTES_OF_ORDER = 64  # for each image of a source, drawn or not


class _OptionsButLabels(TypedDict, total=False):
    n_images: int | None
    seed: int
    classes: str | Path | Sequence[str] | None
    max_unreadable: float
    memory_limit: int
    n_threads: int | None
    progress: Progress | None


class ProbeOptions(_OptionsButLabels, total=False):
    """Options of every constructor of a probe set; meanings and defaults are those of ``ProbeSet.from_source``."""

    labels: LabelsGiven


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Images as a model is shown them, in the order in which they were drawn.

    Attributes:
        preprocessing: how images became pixels.
        source: where the images come from, as the user named it.
        seed: the seed of the draw.
        sha256: hash of shape, pixels and labels, 64 hexadecimal digits; it identifies the probe set.
        labels: ``(n_images,)`` int64, or None without labels.
        classes: what the labels are, judged on the whole source; None without labels.
        names: where each image was found.
        skipped: name and reason of each image left out because it could not be read.
        notes: what the user should know about images and labels, in words.
        names_of_labels: label -> name of its class, where classes have names.

    Examples:
        >>> import layercrit
        >>> size = layercrit.open_model("file:layercrit-demo/models/baseline").preprocessing
        >>> images = layercrit.ProbeSet.from_source("layercrit-demo/fashion-mnist-test.npz", size, n_images=50)
        >>> images.n_images, images.labels.shape
        (50, (50,))
    """

    preprocessing: Preprocessing
    source: str
    seed: int
    sha256: str
    labels: npt.NDArray[np.int64] | None = field(repr=False)
    classes: Classes | None
    names: tuple[str, ...] = field(repr=False)
    skipped: tuple[str, ...] = field(repr=False)
    notes: tuple[str, ...]
    _pixels: PixelStore | KeptPixels = field(repr=False)
    names_of_labels: Mapping[int, str] = field(default_factory=dict, repr=False)
    _on_gpus: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_images(self) -> int:
        """How many images there are."""
        return len(self.names)

    @property
    def images(self) -> Pixels:
        """All images, ``(n_images, channels, height, width)``, read-only; memory-mapped if they are stored in a file.

        Pages of a memory map that were read count as memory of the process while the array exists: to iterate over all
        images, use ``batch``.
        """
        return self._pixels.first(self.n_images)

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of images ``start`` to ``stop`` (cut at the end), ``(n, channels, height, width)`` uint8.

        Raises:
            ProbeError: the range is empty or begins outside the probe set.
        """
        if not 0 <= start < min(stop, self.n_images):
            raise ProbeError(f"There are no images {start} to {stop} in a probe set of {self.n_images} images.")
        return torch.from_numpy(self._pixels.read(start, min(stop, self.n_images)))

    def batch_on(self, device: torch.device, start: int, stop: int) -> torch.Tensor:
        """Return `batch` on a device; a GPU with room for all images gets them once and keeps them.

        They are freed with the probe set: all models that are shown it on this GPU share them.
        """
        if device.type != "cuda" or not 0 <= start < min(stop, self.n_images):
            return self.batch(start, stop).to(device)
        if device not in self._on_gpus:
            n_bytes = math.prod((self.n_images, *self._pixels.shape[1:]))
            if n_bytes > _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
                return self.batch(start, stop).to(device)
            kept = torch.empty((self.n_images, *self._pixels.shape[1:]), dtype=torch.uint8, device=device)
            for first in range(0, self.n_images, _IMAGES_AT_ONCE):
                some = self.batch(first, first + _IMAGES_AT_ONCE)
                kept[first : first + len(some)] = some
            self._on_gpus[device] = kept
        return self._on_gpus[device][start:stop]

    def leave_gpus(self) -> None:
        """Free the images that GPUs keep; they are put there again where there is room."""
        self._on_gpus.clear()

    def first(self, n_images: int) -> "ProbeSet":
        """Return the probe set of the first images, or this one if it has no more."""
        if n_images >= self.n_images:
            return self
        labels = None if self.labels is None else self.labels[:n_images]
        return replace(
            self, names=self.names[:n_images], labels=labels, sha256=digest_of(self._pixels, n_images, labels)
        )

    def in_memory(self) -> "ProbeSet":
        """Return the same probe set without its file, to send it to a machine that does not see that."""
        pixels = PixelStore((self.n_images, *self._pixels.shape[1:]), memory_limit=sys.maxsize)
        for start in range(0, self.n_images, _IMAGES_AT_ONCE):
            for slot, image in enumerate(self._pixels.read(start, min(start + _IMAGES_AT_ONCE, self.n_images)), start):
                pixels.write(slot, image)
        return replace(self, _pixels=pixels)

    def corrupted(self, kind: str, severity: int) -> "ProbeSet":
        """Return the same images corrupted, as ``corrupt:KIND@SEVERITY:SOURCE`` draws them.

        Args:
            kind: a name in `layercrit.probes.corruptions.CORRUPTIONS`.
            severity: 1 (weak) to 5 (strong).

        Raises:
            ProbeError: there is no such kind or severity, or a library is missing.
        """
        corruption = Corruption(kind, severity)
        n_unchanged = 0

        def change(start: int, pixels: Pixels) -> Pixels:
            nonlocal n_unchanged
            names = self.names[start : start + len(pixels)]
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="layercrit-corrupt") as pool:
                new = np.stack([*pool.map(corruption, pixels, [self.seed] * len(pixels), names)])
            n_unchanged += sum(map(np.array_equal, new, pixels))
            return new

        changed = self.changed(change, f"corrupt:{corruption}:{self.source}")
        notes = about_corruptions([corruption], self.preprocessing.height, self.preprocessing.width, n_unchanged)
        return replace(changed, notes=(*self.notes, *notes))

    def changed(self, change: Callable[[int, Pixels], Pixels], source: str) -> "ProbeSet":
        """Return the same images with other pixels, which ``change`` makes of those that there are.

        Args:
            change: from the position of a first image and some images from there on,
                ``(n, channels, height, width)``, to as many of that shape, uint8.
            source: where the images come from, and what is done to them.
        """
        pixels = PixelStore((self.n_images, *self._pixels.shape[1:]), MEMORY_LIMIT)
        for start in range(0, self.n_images, _IMAGES_AT_ONCE):
            some = change(start, self._pixels.read(start, min(start + _IMAGES_AT_ONCE, self.n_images)))
            for slot, image in enumerate(some, start):
                pixels.write(slot, image)
        return replace(self, source=source, sha256=digest_of(pixels, self.n_images, self.labels), _pixels=pixels)

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies the probe set and how it was made, as plain data."""
        return {
            "source": str(self.source),
            "sha256": self.sha256,
            "seed": self.seed,
            "n_images": self.n_images,
            "skipped": list(self.skipped),
            "labels": self.labels is not None,
            "preprocessing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.preprocessing.settings().items()
            },
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``images.npy``, ``(n_images, channels, height, width)`` uint8, and ``probe_set.json`` into a folder.

        Raises:
            ProbeError: the folder cannot be written, for instance because the disk is full.
        """
        folder = Path(folder).expanduser()
        about = {
            **self.to_dict(),
            "labels": None if self.labels is None else self.labels.tolist(),
            "classes": None if self.classes is None else asdict(self.classes),
            "names": list(self.names),
            "notes": list(self.notes),
            "names_of_labels": list(self.names_of_labels.items()),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _ABOUT).unlink(missing_ok=True)  # without it, images of another probe set are none
            new = folder / f".{_IMAGES}.new"  # whoever reads the former images may go on
            shape = (self.n_images, *self._pixels.shape[1:])
            with new.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, self.n_images, _IMAGES_AT_ONCE):
                    file.write(self._pixels.read(start, min(start + _IMAGES_AT_ONCE, self.n_images)).data)
            new.replace(folder / _IMAGES)
            (folder / _ABOUT).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ProbeError(
                f"The images cannot be written to {folder} ({error.strerror or error}). Free some space, or name "
                "another folder."
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> "ProbeSet":
        """Read what `save` wrote, without decoding anything.

        Args:
            folder: the folder.
            verify: whether to check that pixels and labels still have their hash.

        Raises:
            ProbeError: there is no probe set in the folder, or it is damaged.
        """
        folder = Path(folder).expanduser()
        try:
            about = read_json(folder / _ABOUT)
            settings = about["preprocessing"]
            resize = settings["resize"]
            labels = None if about["labels"] is None else np.array(about["labels"], np.int64)
            if labels is not None:
                labels.flags.writeable = False
            classes = about["classes"] if "classes" in about else former_classes(about)
            probe_set = cls(
                preprocessing=Preprocessing(
                    **settings | {"resize": tuple(resize) if isinstance(resize, list) else resize}
                ),
                labels=labels,
                names=tuple(about["names"]),
                skipped=tuple(about["skipped"]),
                notes=tuple(about.get("notes", ())),
                classes=None if classes is None else Classes.from_dict(classes),
                _pixels=KeptPixels(folder / _IMAGES),
                names_of_labels={int(label): str(name) for label, name in about.get("names_of_labels", ())},
                **{name: about[name] for name in ("source", "seed", "sha256")},
            )
            if len(probe_set._pixels) != probe_set.n_images:
                raise ValueError(f"{probe_set.n_images} names for {len(probe_set._pixels)} images")
        except ProbeError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProbeError(
                f"There is no complete probe set in {folder} ({error}). Delete the folder to have it made again."
            ) from error
        if verify and digest_of(probe_set._pixels, probe_set.n_images, labels) != probe_set.sha256:
            raise ProbeError(f"The images in {folder} were changed. Delete the folder to have them decoded again.")
        return probe_set

    def labels_for(self, n_classes: int) -> tuple[npt.NDArray[np.int64] | None, list[str]]:
        """Return the labels as class numbers of a model with ``n_classes`` outputs, and what the user should know.

        Labels that are not numbers of their own, such as names of folders, depend on how many outputs there are:
        see `Classes.fit`.

        Raises:
            ProbeError: a label is out of range, or the source has another number of classes.
        """
        labels, classes = self.labels, self.classes
        if labels is None or classes is None:
            return None, []
        notes = []
        match classes.fit(n_classes):
            case "not":
                return None, [
                    f"the labels of '{self.source}' are not used: they are {classes.origin}, and the model has "
                    f"{n_classes} outputs; to use them, list its classes in order (--classes FILE)"
                ]
            case "in sorted order":
                labels = np.searchsorted(classes.values, labels).astype(np.int64)
                notes = [
                    f"the {n_classes} classes of '{self.source}' are taken for the model's outputs in sorted order"
                ]
                if classes.empty:
                    notes[0] += f"; no class: {', '.join(map(repr, classes.empty))}, without images"
            case "as they are":
                self._check_labels(labels, classes, n_classes)
                if classes.empty:
                    notes = [f"classes of '{self.source}' without images: {', '.join(map(repr, classes.empty))}"]
        return labels, notes

    def shown_to(
        self, n_classes: int, predictions: npt.NDArray[np.int64] | None, *, use_labels: bool = True
    ) -> ShownImages:
        """Return what is known of the images as a model with ``n_classes`` outputs was shown them.

        Args:
            n_classes: outputs of the model.
            predictions: the most probable class of each image, ``(n_images,)``, or None.
            use_labels: whether the labels are used.
        """
        labels = self.labels_for(n_classes)[0] if use_labels else None
        if labels is None or self.classes is None:
            return ShownImages(self.names, None, predictions)
        names = imagenet_names() if self.classes.kind == "imagenet" else dict(self.names_of_labels)
        if self.classes.fit(n_classes) == "in sorted order":
            names = {place: names[label] for place, label in enumerate(self.classes.values) if label in names}
        return ShownImages(self.names, labels, predictions, names)

    def _check_labels(self, labels: npt.NDArray[np.int64], classes: Classes, n_classes: int) -> None:
        wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
        reason = classes.mistake(n_classes)
        if len(wrong) and classes.kind in ("numbers", "imagenet"):
            reason = f"label {labels[wrong[0]]} of '{self.names[wrong[0]]}' is not in 0 to {n_classes - 1}"
        if reason is None:
            return
        raise ProbeError(
            f"The labels of '{self.source}' do not match the model's classes: {reason}. The labels are "
            f"{classes.origin}. Name the classes in a file, one per line, in the order of the model's outputs: "
            "classes='FILE' (--classes FILE); or label the images by the model's class numbers (class folders may be "
            "named by these integers); or ignore the labels: labels='none' (--labels none; labels = false in a study "
            "file)."
        )

    @classmethod
    def from_source(
        cls,
        source: "str | Path | npt.NDArray[Any] | torch.Tensor | ImageSource | ProbeSet",
        preprocessing: Preprocessing = STANDARD,
        *,
        n_images: int | None = 10_000,
        seed: int = 0,
        labels: LabelsGiven = "auto",
        classes: str | Path | Sequence[str] | None = None,
        max_unreadable: float = 0.05,
        memory_limit: int = MEMORY_LIMIT,
        n_threads: int | None = None,
        progress: Progress | None = None,
    ) -> "ProbeSet":
        """Draw images from any accepted source, and decode them.

        The images of a source are put into an order that depends only on how many there are and on ``seed``, and the
        first ``n_images`` readable ones are taken: a smaller probe set is the beginning of a larger one. Pixels in an
        array that already have the model's size are used as they are; all else goes through ``preprocessing``.

        Args:
            source: what ``open_source`` takes, or an opened source. A probe set is returned as it is, whatever the
                other settings, provided its images have the size that ``preprocessing`` asks for.
            preprocessing: how an image becomes pixels.
            n_images: how many images to draw; None, or more than there are, takes all.
            seed: the seed of the draw.
            labels: ``"auto"``, ``"none"``, a file, a column, or an array; see `LabelsGiven`.
            classes: the names of classes in the order of the model's outputs, or a text file with one per line: folders
                or labels with these names get these numbers.
            max_unreadable: largest share of the images tried that may be skipped as unreadable, in [0, 1].
            memory_limit: bytes above which the images are kept in a temporary file instead of in memory.
            n_threads: threads that decode; None: one per processor, 8 at most. The result does not depend on it.
            progress: called in this thread with the number of images decoded, and of those wanted.

        Raises:
            ProbeError: a setting is out of range; there are no images; too many are unreadable; labels are wrong or
                given for some images only; or the disk is too small.
        """
        if isinstance(source, ProbeSet):
            return source._fitting(preprocessing, labels, classes)
        check_settings(n_images, max_unreadable, n_threads)
        opened, found, notes = open_labelled(source, labels, classes)
        check_room(
            _BYTES_OF_ORDER * len(opened),
            f"The order of the {len(opened):,} images of '{opened.description}'",
            "Give a part of them, such as one shard.",
        )
        n_wanted = len(opened) if n_images is None else min(n_images, len(opened))
        shape = (n_wanted, preprocessing.channels, preprocessing.height, preprocessing.width)
        store = PixelStore(shape, memory_limit)
        threads = n_threads or min(8, os.cpu_count() or 1)
        draw = Draw(opened, preprocessing, seed, max_unreadable, threads, progress)
        draw.fill(store, order_of(len(opened), seed))
        kept = None if found is None else found.of(draw.kept)
        _LOG.info("decoded %d images of %s, %d of them unreadable", n_wanted, opened.description, len(draw.skipped))
        n_unchanged = len({*draw.unchanged} & {*draw.kept})
        notes += about_copies(store, len(draw.kept))
        notes += about_corruptions(opened.corruptions, preprocessing.height, preprocessing.width, n_unchanged)
        return cls(
            preprocessing=preprocessing,
            source=opened.description,
            seed=seed,
            sha256=digest_of(store, len(draw.kept), kept),
            labels=kept,
            classes=None if found is None else found.classes,
            names=tuple(map(opened.name, draw.kept)),
            skipped=tuple(draw.skipped),
            notes=tuple(notes),
            _pixels=store,
            names_of_labels={} if found is None else dict(found.names),
        )

    @classmethod
    def from_folder(
        cls, path: str | Path, preprocessing: Preprocessing = STANDARD, **options: Unpack[ProbeOptions]
    ) -> "ProbeSet":
        """Draw from the image files below a folder; ``FolderSource`` says which labels they get."""
        return cls.from_source(FolderSource(path), preprocessing, **options)

    @classmethod
    def from_array(
        cls,
        images: npt.NDArray[Any] | torch.Tensor | str | Path,
        preprocessing: Preprocessing = STANDARD,
        labels: LabelsGiven | None = None,
        **options: Unpack[_OptionsButLabels],
    ) -> "ProbeSet":
        """Draw from an array, a tensor, or a ``.npy`` or ``.npz`` file; ``ArraySource`` says of which shapes."""
        return cls.from_source(
            ArraySource(images), preprocessing, labels="auto" if labels is None else labels, **options
        )

    @classmethod
    def from_parquet(
        cls, path: str | Path, preprocessing: Preprocessing = STANDARD, **options: Unpack[ProbeOptions]
    ) -> "ProbeSet":
        """Draw from Parquet shards; ``ParquetSource`` says of which columns."""
        return cls.from_source(ParquetSource(path), preprocessing, **options)

    @classmethod
    def from_tar(
        cls, path: str | Path, preprocessing: Preprocessing = STANDARD, **options: Unpack[ProbeOptions]
    ) -> "ProbeSet":
        """Draw from tar shards; ``TarSource`` says in which layout."""
        return cls.from_source(TarSource(path), preprocessing, **options)

    @classmethod
    def from_huggingface(
        cls, path: str | Path, preprocessing: Preprocessing = STANDARD, **options: Unpack[ProbeOptions]
    ) -> "ProbeSet":
        """Draw from a data set saved by the datasets library; ``HuggingFaceSource`` says from which columns."""
        return cls.from_source(HuggingFaceSource(path), preprocessing, **options)

    @classmethod
    def from_torchvision(
        cls,
        name: str,
        root: str | Path,
        preprocessing: Preprocessing = STANDARD,
        split: str | None = None,
        **options: Unpack[ProbeOptions],
    ) -> "ProbeSet":
        """Draw from a data set of torchvision on disk; ``TorchvisionSource`` says what the arguments mean."""
        return cls.from_source(TorchvisionSource(name, root, split), preprocessing, **options)

    def _fitting(self, preprocessing: Preprocessing, labels: LabelsGiven, classes: object) -> "ProbeSet":
        if classes is not None or not (isinstance(labels, str) and labels in ("auto", "none")):
            raise ProbeError("A probe set has its labels: give labels and classes when it is made.")
        size, wanted = self._pixels.shape[1:], (preprocessing.channels, preprocessing.height, preprocessing.width)
        if size != wanted:
            raise ProbeError(
                f"The probe set of '{self.source}' has images of {size} (channels, height, width), but "
                f"{wanted} are asked for. Make a probe set with the model's preprocessing."
            )
        return self
