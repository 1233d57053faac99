"""Locks on the folders of studies and training runs: one process writes at a time."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from layercrit.errors import StudyError
from layercrit.foreign_files import read_json

__all__ = ["hold", "holder"]

_LOCK = ".lock"  # released when the process that holds it ends, however it ends
_HOLDER = "running.json"  # who that is


@contextlib.contextmanager
def hold(folder: Path, what: str = "study") -> Iterator[None]:
    """Hold the folder of a study or training run, so that one process at a time writes it.

    Raises:
        StudyError: another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=1)  # `holder` takes it for a moment
    except Timeout as error:
        raise StudyError(
            f"The {what} in {folder} is being run by {holder(folder) or 'another process'}. Wait for it, or stop it."
            + " Watch it with `layercrit study status`." * (what == "study")
        ) from error
    except OSError as error:
        raise StudyError(f"The folder {folder} cannot be used ({error.strerror}). Name another with --out.") from error
    try:
        about = {
            "process": os.getpid(),
            "machine": platform.node(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / _HOLDER).write_text(json.dumps(about), encoding="utf-8")
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> str | None:
    """Say which process runs the study in a folder; None if none does."""
    if not (folder / _LOCK).exists():
        return None
    lock = FileLock(folder / _LOCK)
    try:
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        pass
    except OSError:
        return None  # a folder that cannot be written is run by nobody
    try:
        about = read_json(folder / _HOLDER)
        return f"process {about['process']} on {about['machine']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
