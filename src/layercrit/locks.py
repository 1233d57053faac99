"""Locks on the folders of studies and training runs: one process writes at a time, also over a network.

Some file systems of networks hold locks on one machine only. There, who holds a folder says so again and again, and who
wants it from another machine looks whether that goes on.
"""

import contextlib
import errno
import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from layercrit.errors import StudyError
from layercrit.foreign_files import read_json

__all__ = ["about_holder", "has_locks", "hold", "holder", "is_free", "is_on_network", "write_whole"]

_LOG = logging.getLogger(__name__)
_LOCK = ".lock"  # released when the process that holds it ends, however it ends
_SOFT_LOCK = ".lock-soft"  # its being there is the lock: for file systems that know no other
_HOLDER = "running.json"  # who that is
_NETWORK_FILE_SYSTEMS = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "fuse.beegfs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs"),
    *("gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"),
)
_BEAT = 10  # seconds after which a holder says again that it is there
_SILENCE = 30  # seconds after which it is taken to be gone
_LOOK_AGAIN = 0.5  # seconds
_NO_LOCKS = [getattr(errno, name) for name in ("ENOSYS", "EOPNOTSUPP", "ENOTSUP", "ENOLCK") if hasattr(errno, name)]


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
    on_network = is_on_network(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder, patience)  # a moment at least: `holder` takes it
        try:
            if on_network:
                _wait_for_other_machines(folder, patience)
        except BaseException:
            lock.release()
            raise
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
        (folder / _HOLDER).unlink(missing_ok=True)  # of a process that was killed
        told = {
            "process": os.getpid(),
            "machine": platform.node(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **(about or {}),
        }
        with _telling(folder / _HOLDER, told, again=on_network):
            yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def is_free(folder: Path) -> bool:
    """Return whether `hold` would give a folder now; who was killed on another machine is waited for, for a moment."""
    if (folder / _LOCK).exists() and _is_held(folder):
        return False
    try:
        if is_on_network(folder):
            _wait_for_other_machines(folder, patience=0)
    except Timeout:
        return False
    return True


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
    if _is_held(folder):
        return _told(folder)
    return _told_elsewhere(folder) if is_on_network(folder) else None


def _told(folder: Path) -> Mapping[str, Any]:
    """Return what a holder told of itself; nothing where there is none."""
    try:
        about = read_json(folder / _HOLDER)
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _told_elsewhere(folder: Path) -> Mapping[str, Any] | None:
    """Return what a holder on another machine told of itself lately; None if there is none."""
    about = _told(folder)
    alive = about.get("alive")
    if about.get("machine") == platform.node() or not isinstance(alive, int | float):
        return None
    return about if abs(time.time() - alive) < _SILENCE else None


def _wait_for_other_machines(folder: Path, patience: float) -> None:
    """Wait until a holder on another machine has left the folder, or has been silent for so long that it must be gone.

    Raises:
        Timeout: it holds it still.
    """
    deadline = time.monotonic() + patience
    if (former := _told_elsewhere(folder)) is not None:
        _LOG.warning(
            f"process {former.get('process')} on {former['machine']} wrote in {folder} a moment ago; waiting up to "
            f"{max(_SILENCE, patience):.0f} s to see whether it still does"
        )
    while (former := _told_elsewhere(folder)) is not None:
        silent_at = time.monotonic() + _SILENCE
        while _told(folder).get("alive") == former["alive"]:
            if time.monotonic() > silent_at:
                return
            time.sleep(_LOOK_AGAIN)
        if time.monotonic() > deadline and _told_elsewhere(folder) is not None:
            raise Timeout(str(folder / _LOCK))


@contextlib.contextmanager
def _telling(file: Path, told: Mapping[str, Any], *, again: bool) -> Iterator[None]:
    """Tell who holds a folder; and ``again`` and again that it still does."""

    def tell() -> None:
        write_whole(file, json.dumps({**told, "alive": time.time()}))

    def go_on() -> None:
        while not over.wait(_BEAT):
            with contextlib.suppress(OSError):  # the disk may be full, or the network slow
                tell()

    tell()
    over = threading.Event()
    teller = threading.Thread(target=go_on, name="layercrit-holder", daemon=True)
    if again:
        teller.start()
    try:
        yield
    finally:
        over.set()
        if again:
            teller.join()


def write_whole(path: Path, text: str) -> None:
    """Write a file such that whoever reads it meanwhile, or writes it, too, gets all of one text."""
    new = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _is_held(folder: Path) -> bool:
    """Return whether a process holds the folder; several may ask at the same time."""
    with contextlib.suppress(ImportError, OSError, NotImplementedError):
        import fcntl

        with (folder / _LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which does not keep others from asking
            except BlockingIOError:
                return True
        return (folder / _SOFT_LOCK).exists()
    try:
        _acquired(folder, timeout=0).release()
    except Timeout:
        return True
    except OSError:
        pass  # a folder that cannot be written is run by nobody
    return False


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


def has_locks(folder: Path) -> bool:
    """Return whether the file system of a folder has locks that end with the process that holds them.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".layercrit-", dir=folder) as inside:
        lock = _acquired(Path(inside), timeout=1)
        lock.release()
    return not isinstance(lock, SoftFileLock)


def is_on_network(path: Path) -> bool:
    """Return whether a file is in a file system that other machines share, as far as the system says."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return False
    where = str(path.resolve())
    on = [(len(at), kind) for _, at, kind, *_ in mounts if where == at or where.startswith(f"{at.rstrip('/')}/")]
    return bool(on) and max(on)[1] in _NETWORK_FILE_SYSTEMS
