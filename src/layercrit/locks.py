"""Locks on the folders of studies and training runs: one process writes at a time."""

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from layercrit.errors import StudyError
from layercrit.foreign_files import read_json

__all__ = ["about_holder", "hold", "holder"]

_LOCK = ".lock"  # released when the process that holds it ends, however it ends
_SOFT_LOCK = ".lock-soft"  # its being there is the lock: for file systems that know no other
_HOLDER = "running.json"  # who that is
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def hold(
    folder: Path, what: str = "study", *, patience: float = 1, about: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Hold the folder of a study or training run, so that one process at a time writes it.

    Args:
        folder: made where it is missing.
        what: is in it.
        patience: seconds to wait for another process that holds it.
        about: what `about_holder` tells other processes, beside who holds it.

    Raises:
        StudyError: another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder, patience)  # a moment at least: `holder` takes it
    except Timeout as error:
        left = folder / _SOFT_LOCK
        raise StudyError(
            f"The {what} in {folder} is being run by {holder(folder) or 'another process'}. Wait for it, or stop it."
            + " Watch it with `layercrit study status`." * (what == "study")
            + f" If it was killed, delete {left}, which its file system cannot do itself." * left.exists()
        ) from error
    except OSError as error:
        raise StudyError(f"The folder {folder} cannot be used ({error.strerror}). Name another with --out.") from error
    try:
        told = {
            "process": os.getpid(),
            "machine": platform.node(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            **(about or {}),
        }
        new = folder / f".{_HOLDER}.new"
        new.write_text(json.dumps(told), encoding="utf-8")
        new.replace(folder / _HOLDER)
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> str | None:
    """Say which process runs the study in a folder; None if none does."""
    about = about_holder(folder)
    if about is None:
        return None
    try:
        return f"process {about['process']} on {about['machine']}, since {about['since']}"
    except KeyError:
        return "another process"


def about_holder(folder: Path) -> Mapping[str, Any] | None:
    """Return what the process that runs the study in a folder told of itself; None if none does."""
    if not (folder / _LOCK).exists():
        return None
    try:
        _acquired(folder, timeout=0).release()
        return None
    except Timeout:
        pass
    except OSError:
        return None  # a folder that cannot be written is run by nobody
    try:
        about = read_json(folder / _HOLDER)
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _acquired(folder: Path, timeout: float) -> BaseFileLock:
    """Return the folder's lock, acquired: a soft one where its file system has no locks, as some of networks.

    Raises:
        Timeout: another process holds it.
        OSError: the folder cannot be written.
    """
    lock: BaseFileLock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=timeout)
        return lock
    except Timeout:
        raise
    except NotImplementedError:  # from older versions of filelock
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    lock = SoftFileLock(folder / _SOFT_LOCK)
    lock.acquire(timeout=timeout)
    return lock
