"""Packed images: Parquet and tar shards, and data sets of the datasets and torchvision libraries.

All are read from disk: nothing is downloaded or extracted, and no name found inside a shard is used as a path.
"""

import inspect
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from layercrit.errors import ProbeError, near
from layercrit.probes.images import SUFFIXES
from layercrit.probes.sources import (
    ACCEPTED,
    ImageSource,
    Item,
    check_exists,
    find_names,
    integer_label,
)

__all__ = ["HuggingFaceSource", "ParquetSource", "TarSource", "TorchvisionSource"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
BATCH_ROWS = 64  # Parquet rows in memory at once: a row group can hold gigabytes


class ParquetSource(ImageSource):
    """Parquet shards with a column ``image`` (or ``img``) and, if there are labels, ``label`` (or ``labels``).

    An image is the bytes of a file or, as Hugging Face writes it, a struct with ``bytes``. Only the row groups with a
    wanted image are read, a few rows at a time.

    Args:
        path: a file, a folder of ``*.parquet`` files, or a pattern such as ``test-{0..3}.parquet`` or ``*.parquet``.

    Raises:
        ProbeError: a shard is missing, damaged or lacks such a column, or all shards are empty.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.description = str(path)
        self._groups: list[tuple[Path, int]] = []  # (shard, number of the row group in it)
        starts = [0]  # the first row of each row group, counted through all shards
        columns: set[tuple[str, str | None]] = set()
        for shard in _shards(path, ".parquet"):
            try:
                with pq.ParquetFile(shard) as file:
                    metadata, names = file.metadata, file.schema_arrow.names
            except (OSError, pa.ArrowException) as error:
                raise ProbeError(
                    f"Cannot read '{shard}' as Parquet ({error}). If it is damaged, download it again."
                ) from error
            columns.add(find_names(names, IMAGE_COLUMNS, LABEL_COLUMNS, f"'{shard}'"))
            for group in range(metadata.num_row_groups):
                self._groups.append((shard, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        if len(columns) > 1:
            raise ProbeError(
                f"The shards of '{path}' differ in their columns: {sorted(map(str, columns))}. Give all of them the "
                "same columns for images and labels."
            )
        self._image_column, self._label_column = columns.pop()
        self._starts = np.array(starts)
        if len(self) == 0:
            raise ProbeError(f"There are no images in '{path}': it has no rows.")
        self.label_origin = None if self._label_column is None else f"column '{self._label_column}'"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """Return the shard, the row group and the row in it."""
        position = self._position(index)
        shard, group = self._groups[position]
        return f"{shard.name}[group {group}, row {index - self._starts[position]}]"

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield encoded images; each row group is read once."""
        label_column = self._label_column if use_labels else None
        for position, members in groupby(indices, self._position):
            start = int(self._starts[position])
            wanted = list(members)
            rows = self._rows(position, [index - start for index in wanted], label_column)
            for index, (content, label) in zip(wanted, rows, strict=True):
                number = None if label is None else integer_label(label, self.name(index))
                yield Item(index, _stored_bytes(content), number)

    def _position(self, index: int) -> int:
        """Return which row group, counted through all shards, contains row ``index``."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _rows(self, position: int, rows: list[int], label_column: str | None) -> Iterator[tuple[Any, Any]]:
        """Yield image and label of some ascending ``rows`` of one row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        shard, group = self._groups[position]
        columns = [column for column in (self._image_column, label_column) if column is not None]
        waiting, end = iter(rows), 0
        row = next(waiting, None)
        try:
            # Streamed page by page, so that a row group need not lie in memory whole.
            with pq.ParquetFile(shard, pre_buffer=False, buffer_size=2**20) as file:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    start, end = end, end + batch.num_rows
                    while row is not None and row < end:
                        values = [batch.column(column)[row - start].as_py() for column in columns]
                        yield values[0], values[1] if label_column is not None else None
                        row = next(waiting, None)
                    if row is None:
                        return
        except (OSError, pa.ArrowException) as error:
            raise ProbeError(
                f"Cannot read row group {group} of '{shard}' ({error}). If it is damaged, download it again."
            ) from error


class TarSource(ImageSource):
    """Tar shards in the layout of webdataset: ``key.jpg`` (or another image), ``key.cls`` or ``key.json`` with a label.

    ``key.cls`` has an integer in digits, ``key.json`` a mapping with ``label``. The shards are indexed once and members
    read by offset, so they must not be compressed as a whole. Links and hidden names are left out.

    Args:
        path: a file, a folder of ``*.tar`` files, or a pattern such as ``shard-{000..009}.tar`` or ``*.tar``.

    Raises:
        ProbeError: a shard is missing, damaged or compressed, or none contains an image.
    """

    def __init__(self, path: str | Path) -> None:
        self.description = str(path)
        self._images: list[tuple[Path, str, int, int]] = []  # (shard, name, offset, size) of each image
        self._labels: dict[tuple[Path, str], tuple[int, int]] = {}  # (shard, name) -> (offset, size)
        for shard in _shards(path, ".tar"):
            for name, offset, size in _members(shard):
                suffix = PurePosixPath(name).suffix.lower()
                if suffix in SUFFIXES:
                    self._images.append((shard, name, offset, size))
                elif suffix in (".cls", ".json"):
                    self._labels[shard, name] = (offset, size)
        if not self._images:
            raise ProbeError(
                f"There are no images in '{path}': no member has one of the suffixes {', '.join(SUFFIXES)}."
            )
        self.label_origin = "the members *.cls and *.json" if self._labels else None

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the shard and the name of the member."""
        shard, name, _, _ = self._images[index]
        return f"{shard.name}[{name}]"

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield encoded images."""
        for shard, members in groupby(indices, lambda index: self._images[index][0]):
            with shard.open("rb") as file:
                for index in members:
                    _, _, offset, size = self._images[index]
                    yield Item(index, _part(file, offset, size), self._label(file, index) if use_labels else None)

    def _label(self, file: BinaryIO, index: int) -> int | None:
        shard, name, _, _ = self._images[index]
        key = name.removesuffix(PurePosixPath(name).suffix)
        for suffix in (".cls", ".json"):
            if (shard, key + suffix) in self._labels:
                content = _part(file, *self._labels[shard, key + suffix])
                value = _class_number(content) if suffix == ".cls" else _json_label(content)
                return None if value is None else integer_label(value, f"{shard.name}[{key}{suffix}]")
        return None


def _class_number(content: bytes) -> int | bytes:
    """Return the number that ``content`` spells, or itself where it spells none."""
    return int(content) if re.fullmatch(rb"\s*-?\d+\s*", content) else content


def _json_label(content: bytes) -> Any:
    """Return what JSON gives as ``label``, None where it gives nothing, or ``content`` where it is no JSON."""
    try:
        mapping = json.loads(content)
    except ValueError:
        return content
    return mapping.get("label") if isinstance(mapping, dict) else None


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of the visible plain files in a tar file."""
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                # The list of all members, kept for lookup by name, would grow to gigabytes with a million images.
                tar.members = []  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse() and not PurePosixPath(member.name).name.startswith("."):
                    yield member.name, member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise ProbeError(
            f"Cannot read '{shard}' as an uncompressed tar file ({error}). Download a damaged file again; decompress a "
            "compressed one."
        ) from error


def _part(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


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
        except (OSError, ValueError, LookupError) as error:  # the last where no row was saved
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
            yield Item(index, _stored_bytes(row[self._image_column]), number)


def _stored_bytes(value: object) -> bytes | Exception:
    """Return the bytes of an image in a table, which may be wrapped in a struct, or replaced by a path."""
    stored = value.get("bytes") if isinstance(value, dict) else value
    return stored if isinstance(stored, bytes) else ValueError("the row holds no bytes of an image file")


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


def _shards(path: str | Path, suffix: str) -> list[Path]:
    """Return the sorted files that ``path`` names: one file, the files of a folder, or those that match a pattern."""
    plain = Path(path).expanduser()
    if plain.is_dir():
        found = _visible(plain.glob("*" + suffix))
    else:
        found = [file for pattern in _braces(str(plain)) for file in _matching(Path(pattern))]
    if not found:
        raise ProbeError(f"There are no images: no {suffix} file matches '{path}'. Accepted: {ACCEPTED}.")
    return found


def _matching(pattern: Path) -> list[Path]:
    """Return the file named ``pattern``, or the sorted files that match its ``*``, ``?`` and ``[]``."""
    if not pattern.is_file() and set(str(pattern)) & set("*?["):
        return _visible(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    check_exists(pattern)
    return [pattern]


def _visible(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if not file.name.startswith("."))


def _braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..009}`` as a shell does."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", group[1])
    if limits is None:
        choices = group[1].split(",")
    else:
        choices = [str(i).zfill(len(limits[1])) for i in range(int(limits[1]), int(limits[2]) + 1)]
    return [
        whole for choice in choices for whole in _braces(pattern[: group.start()] + choice + pattern[group.end() :])
    ]
