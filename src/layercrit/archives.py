"""Images that others packed: Parquet and tar shards, and data sets of the libraries datasets and torchvision.

All lie on disk: nothing is downloaded. Nothing is extracted either, and no name found inside a shard is used as a path.
"""

import functools
import glob
import inspect
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from layercrit.errors import ProbeError, near
from layercrit.images import SUFFIXES
from layercrit.sources import ACCEPTED, Item, check_exists, integer_label, one_of

__all__ = ["HuggingFaceSource", "ParquetSource", "TarSource", "TorchvisionSource"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
BATCH_ROWS = 64  # Parquet rows in memory at once: a row group can hold gigabytes


class ParquetSource:
    """Parquet shards with a column ``image`` (or ``img``) and, if there are labels, ``label`` (or ``labels``).

    An image is the bytes of a file or, as Hugging Face writes it, a struct with ``bytes``. Only the row groups that
    hold a wanted image are read, a few rows at a time.

    Args:
        path: A file, a folder of ``*.parquet`` files, or a pattern such as ``test-{0..3}.parquet`` or ``*.parquet``.

    Raises:
        ProbeError: A shard is missing or damaged, or has no such column, or all are empty.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow.parquet as pq

        self.description, self.n_classes = str(path), None
        self._groups: list[tuple[Path, int]] = []  # (shard, number of the row group in it)
        starts = [0]  # the first row of each row group, counted through all shards
        columns: set[tuple[str, str | None]] = set()
        for shard in _shards(path, ".parquet"):
            try:
                with pq.ParquetFile(shard) as file:
                    metadata, names = file.metadata, file.schema_arrow.names
            except (OSError, ValueError) as error:
                raise ProbeError(f"cannot read '{shard}' as Parquet: {error}") from error
            columns.add(_columns(names, f"in '{shard}'"))
            for group in range(metadata.num_row_groups):
                self._groups.append((shard, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        if len(columns) > 1:
            raise ProbeError(f"the shards of '{path}' differ in their columns: {sorted(map(str, columns))}")
        self._image_column, self._label_column = columns.pop()
        self._starts = np.array(starts)
        if len(self) == 0:
            raise ProbeError(f"no images in '{path}': it has no rows")
        self.label_origin = None if self._label_column is None else f"column '{self._label_column}'"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """Return the shard, the row group and the row in it."""
        position = self._position(index)
        shard, group = self._groups[position]
        return f"{shard.name}[group {group}, row {index - self._starts[position]}]"

    def read(self, indices: Sequence[int], use_labels: bool) -> Iterator[Item]:
        """Yield encoded images, each row group being read once."""
        label_column = self._label_column if use_labels else None
        for position, members in groupby(indices, self._position):
            start = int(self._starts[position])
            wanted = list(members)
            rows = self._rows(position, [index - start for index in wanted], label_column)
            for index, (content, label) in zip(wanted, rows, strict=True):
                number = None if label is None else integer_label(label, self.name(index))
                yield Item(index, _stored_bytes(content), number)

    def _position(self, index: int) -> int:
        """Return which row group, counted through all shards, holds row ``index``."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _rows(self, position: int, rows: list[int], label_column: str | None) -> Iterator[tuple[Any, Any]]:
        """Yield image and label of some ascending ``rows`` of one row group."""
        import pyarrow.parquet as pq

        shard, group = self._groups[position]
        columns = [column for column in (self._image_column, label_column) if column is not None]
        waiting, end = iter(rows), 0
        row = next(waiting, None)
        try:
            # A stream with a buffer, so that not even one row group lies in memory whole.
            with pq.ParquetFile(shard, pre_buffer=False, buffer_size=2**20) as file:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    start, end = end, end + batch.num_rows
                    while row is not None and row < end:
                        values = [batch.column(column)[row - start].as_py() for column in columns]
                        yield values[0], values[1] if label_column is not None else None
                        row = next(waiting, None)
                    if row is None:
                        return
        except (OSError, ValueError) as error:
            raise ProbeError(f"cannot read row group {group} of '{shard}': {error}") from error


class TarSource:
    """Tar shards in the layout of webdataset: ``key.jpg`` (or another image), ``key.cls`` or ``key.json`` with a label.

    ``key.cls`` holds an integer in digits, ``key.json`` a mapping with ``label``. The shards are indexed once; members
    are then read by offset, so they must not be compressed as a whole. Links and hidden names are left out.

    Args:
        path: A file, a folder of ``*.tar`` files, or a pattern such as ``shard-{000..009}.tar`` or ``*.tar``.

    Raises:
        ProbeError: A shard is missing, damaged or compressed, or there is no image in any.
    """

    def __init__(self, path: str | Path) -> None:
        self.description, self.n_classes = str(path), None
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
            raise ProbeError(f"no images in '{path}': no member has one of the suffixes {', '.join(SUFFIXES)}")
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
                try:
                    value = json.loads(content)
                except ValueError:  # neither digits nor JSON
                    value = content
                if isinstance(value, dict):
                    value = value.get("label")
                return None if value is None else integer_label(value, f"{shard.name}[{key}{suffix}]")
        return None


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of the visible plain files in a tar file."""
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # the list would grow to gigabytes with a million images
                if member.isreg() and not member.issparse() and not PurePosixPath(member.name).name.startswith("."):
                    yield member.name, member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise ProbeError(
            f"cannot read '{shard}' as an uncompressed tar file: {error}. A damaged file must be fetched again, a "
            "compressed one decompressed first"
        ) from error


def _part(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


class HuggingFaceSource:
    """A data set that the datasets library wrote with ``Dataset.save_to_disk``.

    Its images are the one column of type ``Image``, else ``image`` or ``img`` with encoded bytes; its labels the one
    column of type ``ClassLabel``, else ``label`` or ``labels``.

    Raises:
        ProbeError: The folder holds no such data set, or several splits of one, or datasets is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path).expanduser()
        check_exists(folder)
        splits = folder / "dataset_dict.json"
        if splits.is_file():
            names = json.loads(splits.read_text()).get("splits", [])
            raise ProbeError(f"'{folder}' holds several splits; give one of them: {[str(folder / n) for n in names]}")
        if not self.is_saved(folder):
            raise ProbeError(
                f"'{folder}' is not a data set written by Dataset.save_to_disk of the datasets library. Nothing is "
                "downloaded: load the data set yourself and save it with save_to_disk"
            )
        try:
            import datasets
        except ImportError as error:
            raise ProbeError(f"reading '{folder}' needs the datasets library: pip install 'layercrit[hf]'") from error
        try:
            dataset = datasets.load_from_disk(str(folder)).with_format(None)
        except (OSError, ValueError) as error:
            raise ProbeError(f"cannot read the data set '{folder}': {error}") from error
        features = dataset.features
        by_type = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        image_column, label_column = _columns(by_type or list(features), f"in '{folder}'")
        print(labels)
