"""Data sets of the datasets library, saved on disk; nothing is downloaded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from layercrit.errors import ProbeError
from layercrit.probes.image_columns import IMAGE_COLUMNS, LABEL_COLUMNS, stored_bytes
from layercrit.probes.sources import ImageSource, Item, check_exists, find_names, integer_label

__all__ = ["HuggingFaceSource"]


class HuggingFaceSource(ImageSource):
    """A data set that the datasets library wrote with ``Dataset.save_to_disk``.

    Its images are the one column of type ``Image``, else ``image`` or ``img`` with encoded bytes; its labels the one
    column of type ``ClassLabel``, else ``label`` or ``labels``.

    Raises:
        ProbeError: the folder contains no such data set, or several splits of one, or datasets is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path).expanduser()
        check_exists(folder)
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
            dataset = datasets.load_from_disk(str(folder)).with_format(None)
        except Exception as error:  # the library takes its own files as they are
            raise ProbeError(
                f"Cannot read the data set '{folder}' ({error!r}). Save it again with Dataset.save_to_disk."
            ) from error
        self.description, self._prefix = str(path), folder.name
        features = dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self._image_column, self._label_column = find_names(
            features,
            images if len(images) == 1 else IMAGE_COLUMNS,
            labels if len(labels) == 1 else LABEL_COLUMNS,
            f"the columns of '{folder}'",
        )
        self.label_origin = None if self._label_column is None else f"column '{self._label_column}'"
        classes = getattr(features.get(self._label_column), "names", None)
        self.n_classes = None if classes is None else len(classes)
        self._dataset = dataset.select_columns([c for c in (self._image_column, self._label_column) if c is not None])
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

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield encoded images."""
        for index in indices:
            row = self._dataset[int(index)]
            label = row[self._label_column] if use_labels and self._label_column is not None else None
            number = None if label is None else integer_label(label, self.name(index))
            yield Item(index, stored_bytes(row[self._image_column]), number)
