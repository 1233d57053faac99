"""Data sets of torchvision on disk; nothing is downloaded."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from layercrit.errors import ProbeError, near
from layercrit.probes.sources import ImageSource, Item, check_exists, integer_label

__all__ = ["TorchvisionSource"]


class TorchvisionSource(ImageSource):
    """A torchvision data set on disk, opened by its own class with download switched off.

    Args:
        name: a class in ``torchvision.datasets``, such as ``FashionMNIST``.
        root: the folder passed to that class.
        split: as that class names it; ``train`` or ``test`` for those with a boolean ``train``. None: ``test``, or
            nothing for a class without splits.

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
        classes = getattr(self._dataset, "classes", None)
        self.n_classes = None if classes is None else len(classes)
        self.label_origin = f"the targets of torchvision's {name}"
        if len(self) == 0:
            raise ProbeError(f"There are no images in '{self.description}'.")

    @classmethod
    def from_text(cls, text: str) -> "TorchvisionSource":
        """Open ``torchvision:NAME?root=PATH&split=SPLIT``; the path is taken literally, without ``%`` escapes."""
        name, _, query = text.removeprefix("torchvision:").partition("?")
        settings = dict(part.partition("=")[::2] for part in query.split("&"))
        if "root" not in settings or not settings.keys() <= {"root", "split"}:
            raise ProbeError(
                f"Cannot read '{text}': expected 'torchvision:NAME?root=PATH', optionally with '&split=SPLIT'."
            )
        return cls(name, settings["root"], settings.get("split"))

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return class, split and position."""
        return f"{self._prefix}[{index}]"

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield images decoded by torchvision, or their paths where the class only lists files."""
        from torchvision.datasets import DatasetFolder

        if isinstance(self._dataset, DatasetFolder):
            for index in indices:
                path, label = self._dataset.samples[index]
                yield Item(index, Path(path), label if use_labels else None)
            return
        for index in indices:
            try:
                sample = self._dataset[index]
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
                yield Item(index, error, None)
                continue
            if not (isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Image.Image)):
                raise ProbeError(
                    f"'{self.description}' does not return pairs of image and label, so it cannot be a probe set. "
                    "Choose a data set for classification."
                )
            yield Item(index, sample[0], integer_label(sample[1], self.name(index)) if use_labels else None)


def _split_settings(name: str, split: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the class ``name`` of torchvision is told to take ``split``."""
    if "split" in parameters:
        return {"split": split or "test"}
    if "train" in parameters and split in (None, "train", "test"):
        return {"train": split == "train"}
    if split is None:
        return {}
    what = "'train' and 'test'" if "train" in parameters else "no splits"
    raise ProbeError(f"torchvision's {name} has no split '{split}': it has {what}.")
