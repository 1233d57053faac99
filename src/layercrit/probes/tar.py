"""Images in tar shards, in the layout of webdataset. No name found inside a shard is used as a path."""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from layercrit.errors import ProbeError
from layercrit.foreign_files import open_regular, parse_json
from layercrit.probes.bounds import LARGEST_IMAGE, LARGEST_TEXT
from layercrit.probes.images import SUFFIXES
from layercrit.probes.shards import shards_of
from layercrit.probes.sources import ImageSource, Item, integer_label

__all__ = ["TarSource"]


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
        for shard in shards_of(path, ".tar"):
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
            with open_regular(shard) as file:
                for index in members:
                    _, _, offset, size = self._images[index]
                    content = _part(file, offset, size, LARGEST_IMAGE)
                    yield Item(index, content, self._label(file, index) if use_labels else None)

    def _label(self, file: BinaryIO, index: int) -> int | None:
        shard, name, _, _ = self._images[index]
        key = name.removesuffix(PurePosixPath(name).suffix)
        for suffix in (".cls", ".json"):
            if (shard, key + suffix) in self._labels:
                content = _part(file, *self._labels[shard, key + suffix], LARGEST_TEXT)
                value = _class_number(content) if suffix == ".cls" else _json_label(content)
                return None if value is None else integer_label(value, f"{shard.name}[{key}{suffix}]")
        return None


def _class_number(content: bytes | ValueError) -> int | bytes | ValueError:
    """Return the number that ``content`` spells, or itself where it spells none that a label can be."""
    spelled = isinstance(content, bytes) and re.fullmatch(rb"\s*(-?\d{1,19})\s*", content)
    return int(spelled[1]) if spelled else content


def _json_label(content: bytes | ValueError) -> Any:
    """Return what JSON gives as ``label``, None where it gives nothing, or ``content`` where it is no JSON."""
    try:
        mapping = parse_json(content) if isinstance(content, bytes) else content
    except ValueError:
        return content
    return mapping.get("label") if isinstance(mapping, dict) else None


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of the visible plain files in a tar file."""
    try:
        with _Headers(open_regular(shard).detach()) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                # The list of all members, kept for lookup by name, would grow to gigabytes with a million images.
                tar.members = []  # type: ignore[attr-defined]
                plain = member.isreg() and not member.issparse()
                if tar.offset <= member.offset or (plain and not 0 <= member.size <= end - member.offset_data):
                    raise tarfile.ReadError(f"a member promises {member.size:,} bytes")
                if plain and not PurePosixPath(member.name).name.startswith("."):
                    yield member.name, member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise ProbeError(
            f"Cannot read '{shard}' as an uncompressed tar file ({error}). Download a damaged file again; decompress a "
            "compressed one."
        ) from error


def _part(file: BinaryIO, offset: int, size: int, largest: int) -> bytes | ValueError:
    """Return a member's bytes, or why they are not read."""
    if size > largest:
        return ValueError(f"it has {size:,} bytes, more than {largest:,}")
    file.seek(offset)
    return file.read(size)


class _Headers(io.BufferedReader):
    """A tar file of which only headers are read; a long name or an extended header is short."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_TEXT:
            raise tarfile.ReadError(f"a header promises {size:,} bytes")
        return super().read(size)
