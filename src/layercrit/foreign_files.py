"""Files that others made: only regular ones are read, and JSON that cannot be read is an ordinary error."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

__all__ = ["kind_of_special", "open_regular", "parse_json", "read_json", "read_regular"]

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LARGEST_JSON = 2**28  # bytes; parsed, it takes ten times as many


def kind_of_special(mode: int) -> str | None:
    """Return what a file with that ``st_mode`` is if it is neither a regular file nor a folder, such as a pipe."""
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _SPECIAL.get(stat.S_IFMT(mode), "a special file")


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes; a pipe that nobody writes would wait for ever, a device might never end.

    Raises:
        OSError: it cannot be opened, or is, also behind a link, no regular file.
    """
    _check_regular(Path(path).stat())  # first, since opening a device can do something
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - returned open
    try:
        _check_regular(os.fstat(file.fileno()))  # again, of what was opened
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | Path, largest: int) -> bytes:
    """Return the bytes of a file of ``largest`` bytes or fewer.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        ValueError: it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"it has {size:,} bytes, more than {largest:,}")
        return file.read(size)


def read_json(path: str | Path) -> Any:
    """Return what a JSON file contains.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        ValueError: it is not UTF-8 or not JSON, or too large or too deeply nested to be read.
    """
    return parse_json(read_regular(path, _LARGEST_JSON).decode("utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Return what ``text`` says in JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check_regular(status: os.stat_result) -> None:
    if (special := kind_of_special(status.st_mode)) is not None:
        raise OSError(f"it is {special}, not a regular file")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # which Windows lacks, as it lacks such pipes
