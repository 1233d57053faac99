"""Data sets of the datasets library, saved on disk; nothing is downloaded."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from layercrit.errors import ProbeError
from layercrit.foreign_files import open_regular, read_json
from layercrit.probes.classes import Labels, labels_of
from layercrit.probes.image_columns import IMAGE_COLUMNS, LABEL_COLUMNS, stored_bytes, unused_columns
from layercrit.probes.parts import chosen_part
from layercrit.probes.sources import ImageSource, Item, check_exists, find_names

__all__ = ["HuggingFaceSource"]


class HuggingFaceSource(ImageSource):
    """A data set that the datasets library wrote with ``Dataset.save_to_disk``.

    Its images are the one column of type ``Image``, else ``image`` or ``img`` with encoded bytes; its labels the one
    column of type ``ClassLabel``, else ``label`` or ``labels``.

    Args:
        path: the folder.
        split: which of the splits in the folder to take.
        column: the column with the labels.

    Raises:
        ProbeError: the folder contains no such data set or column, or several splits of one and none is named, or
            datasets is not installed.
    """

    def __init__(self, path: str | Path, split: str | None = None, column: str | None = None) -> None:
        folder = Path(path).expanduser()
        check_exists(folder)
        if split is not None:
            splits = [entry.name for entry in folder.iterdir() if self.is_saved(entry)]
            folder /= chosen_part(splits, split, str(path)) or ""
        if not self.is_saved(folder):
            splits = sorted(str(entry) for entry in folder.iterdir() if self.is_saved(entry))
            hint = f"It contains several splits; give one of them: {', '.join(splits)}. " if splits else ""
            raise ProbeError(
                f"'{folder}' is not a data set that the datasets library wrote with Dataset.save_to_disk. {hint}"
                "Nothing is downloaded: load the data set yourself and save it with save_to_disk."
            )
        try:
            import datasets
        except ImportError as error:
            raise ProbeError(
                f"Reading '{folder}' requires the datasets library. Install it: pip install 'layercrit[hf]'."
            ) from error
        try:
            _check_data_files(folder)
            dataset = datasets.load_from_disk(str(folder)).with_format(None)
        except Exception as error:  # on damaged files, the library raises errors of any type
            raise ProbeError(
                f"Cannot read the data set '{folder}' ({error!r}). Save it again with Dataset.save_to_disk."
            ) from error
        self.description, self._prefix = str(path) if split is None else f"{path}?split={split}", folder.name
        features = dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self._image_column, self._label_column = find_names(
            features,
            images if len(images) == 1 else IMAGE_COLUMNS,
            labels if len(labels) == 1 else LABEL_COLUMNS,
            f"the columns of '{folder}'",
            column,
        )
        self._columns, self._class_names = list(features), getattr(features.get(self._label_column), "names", None)
        self._table, self._dataset = dataset, dataset.select_columns([self._image_column])
        if images:
            # Left encoded, so that we report a damaged image like any other and the library does not raise.
            self._dataset = self._dataset.cast_column(self._image_column, datasets.Image(decode=False))

    @staticmethod
    def is_saved(folder: Path) -> bool:
        """Return whether ``Dataset.save_to_disk`` wrote this folder."""
        return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return the name of the folder and the row."""
        return f"{self._prefix}[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield encoded images."""
        for index in indices:
            yield Item(index, stored_bytes(self._dataset[int(index)][self._image_column]))

    def labels(self) -> Labels | None:
        """Return the labels of the column with labels."""
        return self._labels

    def unused_labels(self) -> list[str]:
        """Return which columns look like labels."""
        return unused_columns(self._columns, "column")

    @cached_property
    def _labels(self) -> Labels | None:
        column = self._label_column
        if column is None:
            return None
        labels = labels_of(self._table.select_columns([column])[:][column], f"column '{column}'", self.name)
        names = self._class_names
        if names is None:
            return labels
        return replace(labels, classes=replace(labels.classes, n_classes=len(names)), names=dict(enumerate(names)))


def _check_data_files(folder: Path) -> None:
    """Check what the library takes on trust: that the JSON can be parsed, and the data are files in the folder."""
    read_json(folder / "dataset_info.json")
    for name in (file["filename"] for file in read_json(folder / "state.json")["_data_files"]):
        if name != Path(name).name:
            raise ValueError(f"its file {name!r} is not in its folder")
        open_regular(folder / name).close()
