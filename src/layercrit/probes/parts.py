"""Parts of a data set, such as train and test: their names, and which one is asked for."""

import re
from collections.abc import Iterable, Sequence

from layercrit.errors import ProbeError, near

__all__ = ["NoSuchPartError", "chosen_part", "level_of_parts", "part_named", "same_part", "words_of"]

_ALIKE = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing", "t10k", "eval"))
_PART_OF = {name: alike[0] for alike in _ALIKE for name in alike}


class NoSuchPartError(ProbeError):
    """A data set has no part of the name asked for."""


def words_of(name: str) -> list[str]:
    """Return the words of a file's name or a key: ``test-00000-of-00001.parquet`` has ``test``, ``00000``, ..."""
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def part_named(name: str) -> str | None:
    """Return the word by which a name says that it is a part of a data set; None without one."""
    return next((word for word in words_of(name) if word in _PART_OF), None)


def same_part(one: str, other: str) -> bool:
    """Return whether two names mean the same part, as ``val`` and ``validation`` do."""
    one, other = one.lower(), other.lower()
    return _PART_OF.get(one, one) == _PART_OF.get(other, other)


def chosen_part(parts: Iterable[str], split: str | None, where: str, example: str = "{0}?split={1}") -> str | None:
    """Return which of the parts of a source is asked for; None where it has no parts.

    Args:
        parts: names of those it has.
        split: the name asked for, or None.
        where: the source, for errors.
        example: how to ask for part ``{1}`` of source ``{0}``, for errors.

    Raises:
        ProbeError: it has several and none is named; or, as `NoSuchPartError`, it has none of that name.
    """
    names = sorted(set(parts))
    listed = ", ".join(map(repr, names))
    if split is None:
        if len(names) < 2:
            return names[0] if names else None
        best = next((name for kind in ("test", "val") for name in names if same_part(name, kind)), names[0])
        raise ProbeError(
            f"'{where}' has several parts: {listed}. They are not mixed: choose one, such as "
            f"'{example.format(where, best)}'."
        )
    found = [name for name in names if name == split] or [name for name in names if same_part(name, split)]
    if len(found) != 1:
        has = f"it has {listed}. {near(split, names)}" if names else "it has no parts: leave out the split."
        raise NoSuchPartError(f"'{where}' has no part {split!r}: {has}")
    return found[0]


def level_of_parts(paths: Sequence[str]) -> int | None:
    """Return at which level of folders the images divide into parts: 0 in ``val/cat/1.jpg``, 1 in ``cat/val/1.jpg``.

    Outermost folders are parts if two of them are named so: no classes of one data set are. Inner ones are if all are.
    """
    for level in (0, 1):
        folders = {path.split("/")[level].lower() for path in paths if path.count("/") > level}
        parts = {_PART_OF[name] for name in folders if name in _PART_OF}
        inner = level == 0 or (folders <= _PART_OF.keys() and all(path.count("/") > 1 for path in paths))
        if len(parts) > 1 and inner:
            return level
    return None
