"""Images in tar shards, in the layout of webdataset. No name found inside a shard is used as a path."""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from layercrit.errors import ProbeError
from layercrit.foreign_files import open_regular, parse_json
from layercrit.probes.bounds import LARGEST_IMAGE, LARGEST_TEXT
from layercrit.probes.classes import Labels, labels_of
from layercrit.probes.image_columns import like_labels
from layercrit.probes.images import SUFFIXES
from layercrit.probes.parts import chosen_part, level_of_parts, part_named
from layercrit.probes.shards import shards_of
from layercrit.probes.sources import ImageSource, Item

__all__ = ["TarSource"]


FOLDERS = "folders"  # as the place of labels: the folders of the members


class TarSource(ImageSource):
    """Tar shards in the layout of webdataset: ``key.jpg`` (or another image), ``key.cls`` or ``key.json`` with a label.

    ``key.cls`` has an integer in digits or the name of a class, ``key.json`` a mapping with ``label``. The shards are
    indexed once and members read by offset, so they must not be compressed as a whole. Links and hidden names are left
    out.

    Args:
        path: a file, a folder of ``*.tar`` files, or a pattern such as ``shard-{000..009}.tar`` or ``*.tar``.
        split: which part of shards such as ``train-000.tar``, or of folders such as ``train`` in them, to take.
        column: where else the labels are: the suffix of the members of a sample, such as ``txt`` or ``output.cls``; a
            key of ``*.json``; or ``folders``: in the names of the members' folders.

    Raises:
        ProbeError: a shard is missing, damaged or compressed, none contains an image, or several parts are there and
            none is named.
    """

    def __init__(self, path: str | Path, split: str | None = None, column: str | None = None) -> None:
        self.description = str(path) if split is None else f"{path}?split={split}"
        self._images: list[tuple[Path, str, int, int]] = []  # (shard, name, offset, size) of each image
        self._texts: dict[tuple[Path, str], tuple[int, int]] = {}  # (shard, name) -> (offset, size)
        self._column = column
        self._beside: set[str] = set()  # suffixes of members beside an image, such as txt or output.cls
        shards = shards_of(path, ".tar", split, inside=True)
        for shard in shards:
            self._index(shard)
        if not self._images:
            raise ProbeError(
                f"There are no images in '{path}': no member has one of the suffixes {', '.join(SUFFIXES)}."
            )
        self._take_part(split if not any(part_named(shard.stem) for shard in shards) else None, str(path))

    def _index(self, shard: Path) -> None:
        """Note where the images and labels of a shard are."""
        image, text = "", ("", "")  # keys of the last members, and the suffix of the latter
        for name, offset, size in _members(shard):
            key, suffixes = _key_and_suffixes(name)
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in SUFFIXES:
                self._images.append((shard, name, offset, size))
                image = key
            else:
                text = (key, suffixes)
                if suffix in (".cls", ".json") or suffixes == self._column:
                    self._texts[shard, name] = (offset, size)
            if text[0] == image:
                self._beside.add(text[1])

    def _take_part(self, split: str | None, path: str) -> None:
        """Keep the images of one part, where folders in the shards are parts."""
        names = [name for _, name, _, _ in self._images]
        self._depth = _common_depth(names)
        inner = ["/".join(name.split("/")[self._depth :]) for name in names]
        level = level_of_parts(inner)
        folders = [] if level is None else [name.split("/")[level] for name in inner]
        part = chosen_part((name for name in folders if part_named(name) == name.lower()), split, path)
        if part is not None:
            self._images = [image for image, folder in zip(self._images, folders, strict=True) if folder == part]
            self._depth += level == 0

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the shard and the name of the member."""
        shard, name, _, _ = self._images[index]
        return f"{shard.name}[{name}]"

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yield encoded images."""
        for shard, members in groupby(indices, lambda index: self._images[index][0]):
            with open_regular(shard) as file:
                for index in members:
                    _, _, offset, size = self._images[index]
                    yield Item(index, _part(file, offset, size, LARGEST_IMAGE))

    def labels(self) -> Labels | None:
        """Return what the members with labels say."""
        return self._labels

    def unused_labels(self) -> list[str]:
        """Return which members, keys of mappings or folders look like labels."""
        found = [suffixes for suffixes in sorted(self._beside) if suffixes.rpartition(".")[2] in ("cls", "txt")]
        if self._texts and not found:
            (shard, name), place = next(iter(self._texts.items()))
            with open_regular(shard) as file:
                content = _part(file, *place, LARGEST_TEXT)
            found = [key for key in _keys(content) if like_labels(key)] if name.endswith(".json") else []
        folders = {tuple(name.split("/")[self._depth : -1][:1]) for _, name, _, _ in self._images}
        if not found and () not in folders and len(folders) > 1:
            found = [FOLDERS]
        if not found:
            return []
        what = "the members' folders" if found == [FOLDERS] else f"{found[0]!r} beside the images"
        return [f"{what}: looks like labels and is not used; to use it, give --labels {found[0]}"]

    @cached_property
    def _labels(self) -> Labels | None:
        if self._column == FOLDERS:
            folders = [name.split("/")[self._depth : -1] for _, name, _, _ in self._images]
            first = [names[0] if names else None for names in folders]
            return labels_of(first, "the members' folders", self.name, are_names=True)
        if not self._texts and self._column is None:
            return None
        values: list[Any] = []
        for shard, images in groupby(self._images, lambda image: image[0]):
            with open_regular(shard) as file:
                values += [self._stored(file, shard, name) for _, name, _, _ in images]
        if self._column is not None and values.count(None) == len(values):
            raise ProbeError(
                f"There are no labels {self._column!r} in '{self.description}': members beside the images have the "
                f"suffixes {', '.join(map(repr, sorted(self._beside))) or 'none'}. Give one of them, a key of *.json, "
                f"or {FOLDERS!r}."
            )
        origin = "the members *.cls and *.json" if self._column is None else f"{self._column!r} of the members"
        return labels_of(values, origin, self.name)

    def _stored(self, file: BinaryIO, shard: Path, image: str) -> Any:
        """Return what the member with the label of an image contains, None without one."""
        key, short = image.removesuffix(PurePosixPath(image).suffix), _key_and_suffixes(image)[0]
        column = self._column or "label"
        for name in (f"{key}.{column}", f"{short}.{column}") if self._column else (f"{key}.cls",):
            if (shard, name) in self._texts:
                return _text(_class_number(_part(file, *self._texts[shard, name], LARGEST_TEXT)))
        if (shard, f"{key}.json") in self._texts:
            return _json_label(_part(file, *self._texts[shard, f"{key}.json"], LARGEST_TEXT), column)
        return None


def _key_and_suffixes(name: str) -> tuple[str, str]:
    """Return what the members of a sample have in common, and what follows the first dot of this one's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffixes = file.partition(".")
    return folder + slash + stem, suffixes


def _common_depth(names: Sequence[str]) -> int:
    """Return how many of the outermost folders all members share."""
    folders = [name.split("/")[:-1] for name in names]
    return next((i for i, found in enumerate(zip(*folders, strict=False)) if len({*found}) > 1), min(map(len, folders)))


def _text(content: int | bytes | ValueError) -> int | str | bytes | ValueError:
    """Return the name of a class that ``content`` spells, or itself where it is no text."""
    try:
        return content.decode().strip() or content if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        return content


def _class_number(content: bytes | ValueError) -> int | bytes | ValueError:
    """Return the number that ``content`` spells, or itself where it spells none that a label can be."""
    spelled = isinstance(content, bytes) and re.fullmatch(rb"\s*(-?\d{1,19})\s*", content)
    return int(spelled[1]) if spelled else content


def _json_label(content: bytes | ValueError, key: str) -> Any:
    """Return what JSON gives as ``key``, None where it gives nothing, or ``content`` where it is no JSON."""
    try:
        mapping = parse_json(content) if isinstance(content, bytes) else content
    except ValueError:
        return content
    return mapping.get(key) if isinstance(mapping, dict) else None


def _keys(content: bytes | ValueError) -> Sequence[str]:
    try:
        mapping = parse_json(content) if isinstance(content, bytes) else None
    except ValueError:
        return ()
    return list(mapping) if isinstance(mapping, dict) else ()


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


def _part(file: BinaryIO, offset: int, size: int, largest: int = LARGEST_TEXT) -> bytes | ValueError:
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
