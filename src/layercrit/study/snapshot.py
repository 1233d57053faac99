"""A copy of a study's file, of one state, although another process may be writing it.

Who reads a file of SQLite relies on locks, to wait while it is written, and to tell a log that an interrupted process
left behind from that of a process at work. Some file systems of networks hold locks on one machine only, such as SSHFS,
and BeeGFS and Lustre unless they are set up otherwise: a reader there would take the log of a process at work for one
left behind, and undo what that is writing.
"""

import shutil
import time
from pathlib import Path

from layercrit.errors import StudyError

__all__ = ["logs_of", "take_snapshot"]

_MOMENT = 0.05  # seconds between attempts
_HEAD = 100  # bytes: a file's counter of changes, and what a log's number, drawn anew for each, is among


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
    deadline = time.monotonic() + patience
    while True:
        before = [_head(file) for file in files]
        for file in files:
            _copy(file, folder / file.name)
        is_of_one_state = [_head(file) for file in files] == before
        is_late = time.monotonic() > deadline
        if is_of_one_state and (is_late or not _is_cut_short(copy)):
            return copy
        if is_late:
            raise StudyError(f"{path} could not be read: another process writes it all the time. Try again.")
        time.sleep(_MOMENT)


def _head(file: Path) -> bytes | None:
    """Return what tells a state of a file from others; None where there is none."""
    try:
        with file.open("rb") as stream:
            return stream.read(_HEAD)
    except FileNotFoundError:
        return None


def _copy(file: Path, to: Path) -> None:
    """Copy a file; where there is none, or no more, there is no copy either."""
    try:
        shutil.copyfile(file, to)
    except FileNotFoundError:
        to.unlink(missing_ok=True)


def _is_cut_short(file: Path) -> bool:
    """Return whether a file of SQLite has fewer pages than it says, as one whose former size is remembered."""
    head = _head(file) or b""
    if len(head) < _HEAD:
        return False
    page_size, n_pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    return file.stat().st_size < n_pages * (65_536 if page_size == 1 else page_size)
