"""A copy of a study's file, of one state, although another process may be writing it.

Who reads a file of SQLite relies on locks, to wait while it is written, and to tell a log that an interrupted process
left behind from that of a process at work. Some network file systems hold locks on one machine only, such as SSHFS, and
BeeGFS and Lustre unless they are set up otherwise: a reader there would take the log of a process at work for one left
behind, and undo what that is writing.
"""

import contextlib
import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TypeAlias

from layercrit.errors import StudyError

__all__ = ["logs_of", "take_snapshot"]

_LOG = logging.getLogger(__name__)
_MOMENT = 0.05  # seconds between attempts
_CACHED = 30  # seconds that a client of a network file system may remember the former size of a file
_LONG = 5  # seconds of waiting after which that is said
_HEAD = 100  # bytes: a file's counter of changes, and what a log's number, drawn anew for each, is among
_State: TypeAlias = tuple[int, int, bytes] | None


def logs_of(path: Path) -> tuple[Path, Path]:
    """Return the files that hold what SQLite has yet to write into a file, or to take out of it."""
    return Path(f"{path}-wal"), Path(f"{path}-journal")


def take_snapshot(path: Path, folder: Path, patience: float) -> Path:
    """Copy a file of SQLite and its logs into a folder, as they are between two changes or amid one; return the copy.

    A change that was begun is taken back by whoever opens the copy.

    Args:
        path: of the file.
        folder: for the copies, an empty one.
        patience: seconds to go on trying while the file is being changed.

    Raises:
        StudyError: there was no moment in which it was not.
        OSError: it cannot be read, or the folder is full.
    """
    copy, files = folder / path.name, (path, *logs_of(path))
    began = time.monotonic()
    cut_since, said = began, False
    while True:
        states = [_state(file) for file in files]
        copied = [_copy(file, folder / file.name) for file in files]
        changed = not all(copied) or [_state(file) for file in files] != states
        now = time.monotonic()
        if changed:
            cut_since = now
        elif not _is_cut_short(copy) or now - cut_since > min(patience, _CACHED):
            return copy
        if now - began > patience + _CACHED * (not changed):
            raise StudyError(f"{path} could not be read: another process writes it all the time. Try again.")
        if now - began > _LONG and not said:
            _LOG.warning(f"waiting for a moment in which nobody writes {path}")
            said = True
        time.sleep(_MOMENT)


def _state(file: Path) -> _State:
    """Return what tells a state of a file from others; None where there is none."""
    try:
        with file.open("rb") as stream:
            about = os.fstat(stream.fileno())
            return about.st_size, about.st_mtime_ns, stream.read(_HEAD)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _copy(file: Path, to: Path) -> bool:
    """Copy a file; where there is none, or no more, there is no copy either. False: it was replaced meanwhile."""
    try:
        shutil.copyfile(file, to)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        with contextlib.suppress(FileNotFoundError):
            to.unlink()
        return error.errno == errno.ENOENT
    return True


def _is_cut_short(file: Path) -> bool:
    """Return whether a file of SQLite has fewer pages than it says, as one whose former size is remembered."""
    size, _, head = _state(file) or (0, 0, b"")
    if len(head) < _HEAD:
        return False
    page_size, n_pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    return size < n_pages * (65_536 if page_size == 1 else page_size)
