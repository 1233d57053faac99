"""Data sets of torchvision on disk; nothing is downloaded."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from layercrit.errors import ProbeError, near
from layercrit.probes.classes import Labels, as_numpy, labels_of
from layercrit.probes.kinds import image_source
from layercrit.probes.parts import chosen_part
from layercrit.probes.sources import ImageSource, Item, check_exists

__all__ = ["TorchvisionSource"]

_LISTS = ("targets", "labels", "_labels", "y", "_samples")  # where torchvision's classes keep the labels of all images
_UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises on damaged files


class TorchvisionSource(ImageSource):
    """A torchvision data set on disk, opened by its own class with download switched off.

    Args:
        name: a class in ``torchvision.datasets``, such as ``FashionMNIST``.
        root: the folder passed to that class.
        split: as that class names it; ``train`` or ``test`` for those with a boolean ``train``; ``letters`` (the test
            part) or ``letters-train`` of ``EMNIST``. None: ``test``, or nothing for a class without splits.

    Raises:
        ProbeError: there is no such class or split, or its files are not below ``root``.
    """

    def __init__(self, name: str, root: str | Path, split: str | None = None) -> None:
        from torchvision import datasets

        parameters = {known: inspect.signature(getattr(datasets, known)).parameters for known in datasets.__all__}
        known = [candidate for candidate in datasets.__all__ if "root" in parameters[candidate]]
        if name not in known:
            raise ProbeError(f"torchvision has no data set '{name}' that reads a folder. {near(name, known)}")
        check_exists(Path(root).expanduser())
        settings = {"download": False} if "download" in parameters[name] else {}
        try:
            self._dataset = getattr(datasets, name)(
                str(Path(root).expanduser()), **settings, **_split_settings(name, split, parameters[name])
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ProbeError(
                f"torchvision cannot open {name} in '{root}' ({error}). Images are never downloaded: if the class "
                f"can, download them once with torchvision.datasets.{name}(root, download=True)."
            ) from error
        self.description = f"torchvision:{name}?root={root}" + (f"&split={split}" if split else "")
        self._prefix = f"{name}/{split}" if split else name
        self._origin = f"the targets of torchvision's {name}"
        if len(self) == 0:
            raise ProbeError(f"There are no images in '{self.description}'.")

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return class, split and position."""
        return f"{self._prefix}[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield images decoded by torchvision, or their paths where the class only lists files."""
        from torchvision.datasets import DatasetFolder

        for index in indices:
            if isinstance(self._dataset, DatasetFolder):
                yield Item(index, Path(self._dataset.samples[index][0]))
                continue
            try:
                yield Item(index, self._sample(index)[0])
            except ProbeError:
                raise
            except _UNREADABLE as error:
                yield Item(index, error)

    def labels(self) -> Labels | None:
        """Return the targets: the list that the class keeps, else those that come with the decoded images."""
        return self._labels

    @cached_property
    def _labels(self) -> Labels | None:
        values: list[Any] | None = next(filter(None, map(self._listed, _LISTS)), None)
        if values is None:
            values, damaged = [None] * len(self), set[int]()
            for index in range(len(self)):
                try:
                    values[index] = self._sample(index)[1]
                except ProbeError:
                    raise
                except _UNREADABLE:
                    damaged.add(index)
            self.unreadable = frozenset(damaged)
        labels = labels_of(values, self._origin, self.name)
        classes = getattr(self._dataset, "classes", None)
        if classes is None:
            return labels
        names = {number: str(name) for number, name in enumerate(classes)}
        return replace(labels, classes=replace(labels.classes, n_classes=len(classes)), names=names)

    def _listed(self, attribute: str) -> list[int] | None:
        """Return the labels of all images, where an attribute of the data set has them."""
        listed = getattr(self._dataset, attribute, ())
        if isinstance(listed, list) and listed and isinstance(listed[0], tuple):
            listed = [sample[-1] for sample in listed]  # (path, label)
        try:
            array = as_numpy(listed)
        except (TypeError, ValueError):
            return None
        return array.tolist() if array.shape == (len(self),) and array.dtype.kind in "iu" else None

    def _sample(self, index: int) -> tuple[Image.Image, Any]:
        sample = self._dataset[index]
        if not (isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Image.Image)):
            raise ProbeError(
                f"'{self.description}' does not return pairs of image and label, so it cannot be a probe set. "
                "Choose a data set for classification."
            )
        return sample[0], sample[1]


@image_source("torchvision")
def _open(rest: str, options: dict[str, str]) -> ImageSource:
    """Data sets of torchvision on disk, such as ``torchvision:CIFAR10?root=DIR&split=test``."""
    root, split = options.pop("root", None), options.pop("split", None)
    if root is None or options:
        raise ProbeError(
            f"Cannot read 'torchvision:{rest}': expected 'torchvision:NAME?root=PATH', optionally with '&split=SPLIT'."
        )
    return TorchvisionSource(rest, root, split)


def _split_settings(name: str, split: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the class ``name`` of torchvision is told to take ``split``."""
    if name == "EMNIST":
        data, _, part = (split or "").partition("-")  # its `split` is a data set, which has both parts
        return {"split": data, "train": chosen_part(["test", "train"], part or "test", f"EMNIST {data}") == "train"}
    if "version" in parameters:
        return {"version": split or "2021_valid"}  # of INaturalist, whose own default is its training part
    if "split" in parameters:
        return {"split": split or "test"}
    if "train" in parameters and split in (None, "train", "test"):
        return {"train": split == "train"}
    if split is None:
        return {}
    what = "'train' and 'test'" if "train" in parameters else "no splits"
    raise ProbeError(f"torchvision's {name} has no split '{split}': it has {what}.")
