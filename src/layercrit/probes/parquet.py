"""Images in Parquet shards, as Hugging Face and others publish them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from layercrit.errors import ProbeError
from layercrit.probes.bounds import check_room
from layercrit.probes.classes import Labels, labels_of
from layercrit.probes.image_columns import IMAGE_COLUMNS, LABEL_COLUMNS, stored_bytes, unused_columns
from layercrit.probes.shards import shards_of
from layercrit.probes.sources import ImageSource, Item, find_names

__all__ = ["ParquetSource"]

BATCH_ROWS = 64  # rows in memory at once, at most: a row group can hold gigabytes
BATCH_BYTES = 2**28  # and what they may take where values repeat or compress well


class ParquetSource(ImageSource):
    """Parquet shards with a column ``image`` (or ``img``) and, if there are labels, ``label`` (or ``labels``).

    An image is the bytes of a file or, as Hugging Face writes it, a struct with ``bytes``. Only the row groups with a
    wanted image are read, a few rows at a time.

    Args:
        path: a file, a folder of ``*.parquet`` files, or a pattern such as ``test-{0..3}.parquet`` or ``*.parquet``.
        split: which part of files such as ``test-00000-of-00001.parquet`` to take.
        column: the column with the labels.

    Raises:
        ProbeError: a shard is missing, damaged or lacks such a column, all shards are empty, or they are of several
            parts and none is named.
    """

    def __init__(self, path: str | Path, split: str | None = None, column: str | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.description = str(path) if split is None else f"{path}?split={split}"
        self._groups: list[tuple[Path, int]] = []  # (shard, number of the row group in it)
        starts = [0]  # the first row of each row group, counted through all shards
        columns: set[tuple[str, str | None]] = set()
        for shard in shards_of(path, ".parquet", split):
            try:
                with pq.ParquetFile(shard) as file:
                    metadata, names = file.metadata, file.schema_arrow.names
            except (OSError, pa.ArrowException) as error:
                raise ProbeError(
                    f"Cannot read '{shard}' as Parquet ({error}). If it is damaged, download it again."
                ) from error
            columns.add(find_names(names, IMAGE_COLUMNS, LABEL_COLUMNS, f"'{shard}'", column))
            self._columns = names
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

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """Return the shard, the row group and the row in it."""
        position = self._position(index)
        shard, group = self._groups[position]
        return f"{shard.name}[group {group}, row {index - self._starts[position]}]"

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield encoded images; each row group is read once."""
        for position, members in groupby(indices, self._position):
            start = int(self._starts[position])
            wanted = list(members)
            rows = self._rows(position, [index - start for index in wanted])
            for index, content in zip(wanted, rows, strict=True):
                yield Item(index, stored_bytes(content))

    def labels(self) -> Labels | None:
        """Return the labels of the column with labels."""
        return self._labels

    def unused_labels(self) -> list[str]:
        """Return which columns look like labels."""
        return unused_columns(self._columns, "column")

    @cached_property
    def _labels(self) -> Labels | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column, values = self._label_column, list[Any]()
        if column is None:
            return None
        for shard in dict.fromkeys(shard for shard, _ in self._groups):
            try:
                values += pq.read_table(shard, columns=[column]).column(column).to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise ProbeError(
                    f"Cannot read column '{column}' of '{shard}' ({error}). If it is damaged, download it again."
                ) from error
        return labels_of(values, f"column '{column}'", self.name)

    def _position(self, index: int) -> int:
        """Return which row group, counted through all shards, contains row ``index``."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _rows(self, position: int, rows: list[int]) -> Iterator[Any]:
        """Yield the images of some ascending ``rows`` of one row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        shard, group = self._groups[position]
        column = self._image_column
        waiting, end = iter(rows), 0
        row = next(waiting, None)
        try:
            # Streamed page by page, so that a row group need not lie in memory whole.
            with pq.ParquetFile(shard, pre_buffer=False, buffer_size=2**20) as file:
                larger = _compressible_bytes(file.metadata.row_group(group), column)
                n_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, larger)))
                if n_rows == 1:  # of ordinary images, next to nothing is compressible
                    check_room(2 * larger, f"Row group {group} of '{shard}'", "Write it in smaller row groups.")
                for batch in file.iter_batches(n_rows, row_groups=[group], columns=[column]):
                    start, end = end, end + batch.num_rows
                    while row is not None and row < end:
                        yield batch.column(column)[row - start].as_py()
                        row = next(waiting, None)
                    if row is None:
                        return
        except (OSError, pa.ArrowException) as error:
            raise ProbeError(
                f"Cannot read row group {group} of '{shard}' ({error}). If it is damaged, download it again."
            ) from error


def _compressible_bytes(group: Any, column: str) -> int:
    """Return how many bytes more a column of a row group takes unpacked than in the file, by its metadata.

    Bytes that cannot be compressed, as those of images, are in the file for each row. But a value of a dictionary is
    there once for any number of rows, and a value of zeros takes next to nothing. No value is larger than all of these.
    """
    larger = 0
    for chunk in (group.column(number) for number in range(group.num_columns)):
        if chunk.path_in_schema.partition(".")[0] == column:
            dictionary = chunk.data_page_offset - (chunk.dictionary_page_offset or chunk.data_page_offset)
            incompressible = 0.9 * (chunk.total_compressed_size - dictionary)
            larger += max(0, int(chunk.total_uncompressed_size - incompressible))
    return larger
