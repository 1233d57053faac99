"""Shards: the files that a folder, a name or a pattern stands for."""

import re
from collections.abc import Iterable
from pathlib import Path

from layercrit.errors import ProbeError
from layercrit.probes.parts import chosen_part, part_named
from layercrit.probes.sources import ACCEPTED, check_exists, is_folder

__all__ = ["shards_of"]

_MOST = 10**6  # shards of one range


def shards_of(path: str | Path, suffix: str, split: str | None = None, *, inside: bool = False) -> list[Path]:
    """Return the sorted files that ``path`` names: one file, the files of a folder, or those that match a pattern.

    Args:
        path: the name.
        suffix: of the files of a folder.
        split: which part to take of files such as ``train-00000-of-00001.parquet``.
        inside: whether parts may also be inside the files, so that files not named after parts are all taken.

    Raises:
        ProbeError: there are none, no such part, or those of several parts and none is named.
    """
    plain = Path(path).expanduser()
    if is_folder(plain):
        found = _visible(plain.glob("*" + suffix))
    else:
        found = [file for pattern in _braces(str(plain)) for file in _matching(Path(pattern))]
    if not found:
        raise ProbeError(f"There are no images: no {suffix} file matches '{path}'. Accepted: {ACCEPTED}.")
    for file in found:
        check_exists(file)  # and is neither a pipe, which would wait, nor a device
    parts = [part_named(file.stem) for file in found]
    named = {part for part in parts if part is not None}
    if split is None or (inside and not named):
        chosen_part(named, None, str(path))
        return found
    part = chosen_part(named, split, str(path))
    return [file for file, name in zip(found, parts, strict=True) if name == part]


def _matching(pattern: Path) -> list[Path]:
    """Return the file named ``pattern``, or the sorted files that match its ``*``, ``?`` and ``[]``."""
    if set(str(pattern)) & set("*?[") and not pattern.is_file():
        return _visible(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    return [pattern]


def _visible(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if not file.name.startswith("."))


def _braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..009}`` as a shell does."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    limits = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", group[1])
    if limits is None:
        choices = group[1].split(",")
    elif int(limits[2]) - int(limits[1]) > _MOST:
        raise ProbeError(f"'{{{group[1]}}}' stands for more than {_MOST:,} files. Give a smaller range, or use '*'.")
    else:
        choices = [str(i).zfill(len(limits[1])) for i in range(int(limits[1]), int(limits[2]) + 1)]
    return [
        whole for choice in choices for whole in _braces(pattern[: group.start()] + choice + pattern[group.end() :])
    ]
