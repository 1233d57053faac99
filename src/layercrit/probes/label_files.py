"""Files of labels beside images: tables, lists and arrays, matched to the images by name or by order."""

import csv
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProbeError, near
from layercrit.foreign_files import parse_json, read_regular
from layercrit.probes.image_columns import like_labels
from layercrit.probes.numpy_files import opened
from layercrit.probes.parts import part_named, words_of

__all__ = ["LABEL_SUFFIXES", "notes_on_files", "read_labels"]

LABEL_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".npy")
_OTHER_WORDS = ("annotations", "metadata", "solution", "truth")  # of files with labels
_NAME_COLUMNS = (
    "file_name", "filename", "file", "image", "image_id", "imageid", "image_name", "img", "path", "filepath", "name",
    "id",
)  # fmt: skip
_LARGEST = 2**30  # bytes of a file of labels
_OF_CLASSES = ("classes", "class_names", "classnames")  # files that --classes takes
_KAGGLE = "predictionstring"  # class and boxes, as in ImageNet's LOC_val_solution.csv
_EXPECTED = (
    "a .csv or .tsv with a column of file names and one of labels, a .txt with 'NAME LABEL' or a label per line, a "
    ".json mapping of names to labels, or a .npy array in the order of the images"
)


@dataclass(frozen=True)
class _Content:
    """What a file of labels says: labels by the name of the image, or in order."""

    by_name: Sequence[tuple[str, Any]] | None = None
    in_order: Sequence[Any] | npt.NDArray[Any] = ()


def read_labels(given: str | Path, names: Sequence[str]) -> list[Any] | npt.NDArray[Any]:
    """Return the label of each image, as a file of labels has it: None for an empty one, or rows of an array.

    Args:
        given: the path of the file; ``?column=NAME`` at its end says which column of a table has the labels.
        names: where the images are, in order.

    Raises:
        ProbeError: the file cannot be read or understood, or has no label for some images, or two for one.
    """
    path, _, column = str(given).partition("?column=")
    file = Path(path).expanduser()
    if file.exists() and not file.is_file():
        raise ProbeError(f"'{path}' is no file of labels, but a folder or a device. Expected {_EXPECTED}.")
    try:
        content = _read(file, column or None, names)
    except FileNotFoundError as error:
        there = sorted(entry.name for entry in file.parent.iterdir()) if file.parent.is_dir() else []
        raise ProbeError(f"No such file of labels: '{path}'. {near(file.name, there)}") from error
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, ProbeError):
            raise
        raise ProbeError(f"Cannot read the labels in '{path}' ({error}). Expected {_EXPECTED}.") from error
    if content.by_name is not None:
        return _first_words(_matched(path, [(name, _stripped(label)) for name, label in content.by_name], names))
    values = content.in_order
    if len(values) != len(names):
        raise ProbeError(
            f"'{path}' has {len(values)} labels without names for {len(names)} images; expected one for each, in "
            "the sorted order of the images, or names beside the labels."
        )
    return values if isinstance(values, np.ndarray) else _first_words(list(map(_stripped, values)))


def notes_on_files(folder: Path) -> list[str]:
    """Return a note on a file in a folder, or beside it, that looks like the labels of its images; none without any."""
    folder = folder.absolute()
    try:
        inside, beside = (
            sorted(entry.name for entry in os.scandir(place) if entry.name.lower().endswith(LABEL_SUFFIXES))
            for place in (folder, folder.parent)
        )
    except OSError:
        return []
    own = folder.name.lower()
    found = [folder / name for name in inside if _sounds_like_labels(name)]
    for name in beside:
        stem, suffix = Path(name.lower()).stem, Path(name.lower()).suffix
        if stem in _OF_CLASSES:
            continue
        if (
            stem == "labels"
            or (stem == own and suffix != ".npy")
            or (stem.startswith(own) and _sounds_like_labels(name))
        ):
            found.append(folder.parent / name)
    if not found:
        return []
    best = min(found, key=lambda path: not like_labels(path.stem))
    return [f"the file '{best}' looks like labels and is not used; to use it, give --labels {best}"]


def _sounds_like_labels(name: str) -> bool:
    stem = Path(name).stem
    listed = any(word in _OTHER_WORDS for word in words_of(stem)) or part_named(stem) is not None
    return like_labels(stem) or (listed and not name.lower().endswith(".npy"))


def _read(file: Path, column: str | None, names: Sequence[str]) -> _Content:
    suffix = file.suffix.lower()
    if suffix == ".npy":
        with opened(file) as array:
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an .npz file")
            if array.ndim == 0:
                raise ProbeError(f"'{file}' has a single value. Expected {_EXPECTED}.")
            column_alone = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
            return _Content(in_order=list(column_alone) if column_alone.ndim == 1 else array)
    text = read_regular(file, _LARGEST).decode("utf-8-sig")
    if not text.strip():
        raise ValueError("it is empty")
    if suffix == ".json":
        return _of_json(file, parse_json(text), column)
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix == ".jsonl":
        return _of_json(file, [parse_json(line) for line in lines], column)
    delimiter = next((mark for mark in ("\t", ",", ";") if lines and mark in lines[0]), None)
    if suffix == ".txt" and delimiter is None:
        return _of_lines(lines, names)
    return _of_table(file, list(csv.reader(lines, delimiter=delimiter or ",")), column)


def _of_json(file: Path, content: Any, column: str | None) -> _Content:
    if isinstance(content, dict) and isinstance(content.get("labels"), list | dict):
        content = content["labels"]
    if isinstance(content, dict):
        return _Content(by_name=list(content.items()))
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        names, labels = _columns(file, list(content[0]), column)
        return _Content(by_name=[(str(row.get(names)), row.get(labels)) for row in content])
    if isinstance(content, list) and content and all(isinstance(row, list) and len(row) == 2 for row in content):
        return _Content(by_name=[(str(name), label) for name, label in content])
    if isinstance(content, list):
        return _Content(in_order=content)
    raise ProbeError(f"'{file}' is neither a mapping nor a list. Expected {_EXPECTED}.")


def _of_lines(lines: Sequence[str], names: Sequence[str]) -> _Content:
    """Return what lines without commas say: names and labels, if one of them begins with the name of an image."""
    pairs = [line.rsplit(None, 1) for line in lines]
    known = {key(name) for name in names for key in _KEYS}
    if any(len(pair) == 2 and key(pair[0]) in known for pair in pairs for key in _KEYS):
        return _Content(by_name=[(pair[0], pair[1] if len(pair) == 2 else None) for pair in pairs])
    return _Content(in_order=[line.strip() for line in lines])


def _of_table(file: Path, rows: Sequence[Sequence[str]], column: str | None) -> _Content:
    header = [cell.strip() for cell in rows[0]] if rows else []
    titled = column in header or any(cell.lower() in (*_NAME_COLUMNS, _KAGGLE) or _is_title(cell) for cell in header)
    if not titled and len(header) == 2 and column is None:
        return _Content(by_name=[(row[0], row[1] if len(row) > 1 else None) for row in rows])
    body = rows[1:] if titled else rows
    if len(header) == 1 and column in (None, *header):
        return _Content(in_order=[row[0].strip() for row in body])
    name, label = (header.index(one) for one in _columns(file, header, column))
    named = [row for row in body if len(row) > name]
    return _Content(by_name=[(row[name], row[label] if len(row) > label else None) for row in named])


def _is_title(cell: str) -> bool:
    return like_labels(cell) and not re.search(r"[.\d/]", cell)


def _columns(file: Path, header: Sequence[str], column: str | None) -> tuple[str, str]:
    """Return which column of a table has the names of images, and which the labels."""
    names = [title for known in _NAME_COLUMNS for title in header if title.lower() == known and title != column]
    others = [title for title in header if title not in names[:1]]
    labels = [title for title in others if like_labels(title) or title.lower() == _KAGGLE]
    if column is not None:
        labels = [title for title in header if title == column]
    elif not labels and len(others) == 1:
        labels = others
    if not names or len(labels) != 1:
        missing = (
            "no column of file names"
            if not names
            else "no column of labels"
            if not labels
            else "several columns of labels"
        )
        raise ProbeError(
            f"'{file}' has {missing}: its columns are {', '.join(map(repr, header))}. Name the first "
            f"{_NAME_COLUMNS[0]!r}, and choose the labels by '{file}?column=NAME'."
        )
    return names[0], labels[0]


def _path(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./")


# What may be the same in the names of a file and of an image: the path, without its suffix, the file's name, its stem.
_KEYS: tuple[Callable[[str], str], ...] = (
    _path,
    lambda name: _path(name).removesuffix(PurePosixPath(_path(name)).suffix),
    lambda name: PurePosixPath(_path(name)).name,
    lambda name: PurePosixPath(_path(name)).stem,
)


def _matched(path: str, pairs: Sequence[tuple[str, Any]], names: Sequence[str]) -> list[Any]:
    """Return the label of each image, by the most exact part of its name that finds all images and tells them apart."""
    fewest, reason, example = len(names) + 1, f"none of the {len(names)} images here", names[0] if names else ""
    for key in _KEYS:
        wanted = [key(name) for name in names]
        labels: dict[str, Any] = {}
        clashes = {key(name) for name, label in pairs if labels.setdefault(key(name), label) != label}
        if len(set(wanted)) < len(wanted):
            continue
        if twice := [name for name, one in zip(names, wanted, strict=True) if one in clashes]:
            reason, example = f"several labels for {len(twice)} of the {len(names)} images here", twice[0]
            continue
        found = [labels.get(name) for name in wanted]
        missing = [name for name, label in zip(names, found, strict=True) if label is None]
        if not missing:
            return found
        if len(missing) < fewest and not labels.keys().isdisjoint(wanted):
            fewest, example = len(missing), missing[0]
            reason = f"no label for {fewest} of the {len(names)} images here"
    raise ProbeError(
        f"'{path}' has {reason}, such as '{example}'. The first name in it is {pairs[0][0] if pairs else ''!r}. Give "
        "paths within the folder of images, file names or their stems, each with one label."
    )


def _stripped(label: Any) -> Any:
    """Return a text without spaces around, and None for an empty one."""
    return label.strip() or None if isinstance(label, str) else label


def _first_words(values: list[Any]) -> list[Any]:
    """Return WordNet ids without the boxes that follow them in ImageNet's tables."""
    if all(isinstance(value, str) and re.fullmatch(r"n\d{8}( .*)?", value) for value in values):
        return [value.partition(" ")[0] for value in values]
    return values
