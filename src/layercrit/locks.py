"""Locks on the folders of studies and training runs: one process writes at a time, also over a network.

Some network file systems hold locks on one machine only. So who holds a folder says so in it again and again, and who
wants it from another machine looks whether that goes on.
"""

import contextlib
import errno
import json
import logging
import math
import os
import platform
import re
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

__all__ = ["about_holder", "has_local_locks", "has_locks", "hold", "holder", "is_free", "is_on_network", "write_whole"]

_LOG = logging.getLogger(__name__)
_LOCK = ".lock"  # released when the process that holds it ends, however it ends
_SOFT_LOCK = ".lock-soft"  # its being there is the lock: for file systems that know no other
_HOLDER = "running.json"  # who that is
_LOCAL_LOCKS = {  # types of file systems -> options of a mount with which its locks hold on one machine only
    **dict.fromkeys(("beegfs", "fuse.beegfs", "fuse.sshfs"), re.compile("")),
    **dict.fromkeys(("nfs", "nfs4"), re.compile(r"(^|,)(nolock|local_lock=(all|flock|posix))(,|$)")),
    "lustre": re.compile(r"^(?!(.*,)?flock(,|$))"),
}
_NETWORK_FILE_SYSTEMS = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "fuse.beegfs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs"),
    *("gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"),
)
_LENGTH = 1000  # bytes of what a holder tells, at least
_BEAT = 10  # seconds after which a holder says again that it is there
_SILENCE = 30  # seconds after which it is taken to be gone
_LONG_AGO = 600  # seconds after which nobody need wait for that; no clocks are that far apart
_SETTLED = 1.0  # seconds after which a holder looks whether another one wrote at the same time
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
    told = {
        "process": os.getpid(),
        "machine": platform.node(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **(about or {}),
    }
    with contextlib.ExitStack() as held:
        _take(folder, what, told, patience, held)
        yield


def _take(folder: Path, what: str, told: Mapping[str, Any], patience: float, held: contextlib.ExitStack) -> None:
    """Do what `hold` does, until ``held`` is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.callback(_acquired(folder, patience).release)  # a moment at least: `holder` takes it
        if has_local_locks(folder):
            _take_from_other_machines(folder, told, patience, held)
        else:
            held.enter_context(_telling(folder / _HOLDER, told))
    except Timeout as error:
        left = folder / _SOFT_LOCK
        raise StudyError(
            f"The {what} in {folder} is being run by {holder(folder) or 'another process'}. Wait for it, or stop it."
            + " Watch it with `layercrit study status`." * (what == "study")
            + f" If it was killed, delete {left}, which its file system cannot do itself." * left.exists()
        ) from error
    except OSError as error:
        raise StudyError(f"The folder {folder} cannot be used ({error.strerror}). Name another with --out.") from error


def is_free(folder: Path) -> bool:
    """Return whether `hold` would give a folder now; who was killed on another machine is waited for, for a moment."""
    if (folder / _LOCK).exists() and _is_held(folder):
        return False
    try:
        if has_local_locks(folder):
            _wait_for_other_machines(folder, time.monotonic())
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
    if not has_local_locks(folder):
        return None
    about = _told(folder)
    return about if _is_elsewhere(about) and _seconds_since(about) < _SILENCE else None


def _told(folder: Path) -> Mapping[str, Any]:
    """Return what a holder told of itself; nothing where there is none."""
    try:
        about = read_json(folder / _HOLDER)
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _is_elsewhere(about: Mapping[str, Any]) -> bool:
    return bool(about.get("machine", platform.node()) != platform.node())


def _seconds_since(about: Mapping[str, Any]) -> float:
    """Return how long ago a holder told of itself, if clocks agree."""
    try:
        return abs(time.time() - float(about["alive"]))
    except (KeyError, TypeError, ValueError):
        return math.inf


def _take_from_other_machines(
    folder: Path, told: Mapping[str, Any], patience: float, held: contextlib.ExitStack
) -> None:
    """Tell who holds a folder, once no other machine does: of those that come at the same time one stays.

    Raises:
        Timeout: another one holds it.
    """
    deadline, lost = time.monotonic() + patience, False
    while True:
        _wait_for_other_machines(folder, deadline, whoever=lost)
        with contextlib.ExitStack() as mine:
            mine.enter_context(_telling(folder / _HOLDER, told))
            time.sleep(_SETTLED)
            if _is_of(folder / _HOLDER, told):
                held.enter_context(mine.pop_all())
                return
        lost = True  # to another machine, even if that has the same name


def _wait_for_other_machines(folder: Path, deadline: float, *, whoever: bool = False) -> None:
    """Wait until a holder on another machine has left the folder, or has been silent for so long that it must be gone.

    Args:
        folder: whose lock this process has, so that a holder on this machine must be gone.
        deadline: after which a holder that is alive is waited for no more.
        whoever: whether to wait for a holder on a machine with the same name, too.

    Raises:
        Timeout: it holds it still after the deadline.
    """
    former, silent_since = _content(folder / _HOLDER), time.monotonic()
    about = _told(folder)
    is_gone = about and not whoever and (not _is_elsewhere(about) or _seconds_since(about) > _LONG_AGO)
    if former is None or is_gone:
        return
    _LOG.warning(
        f"{about.get('machine', 'another machine')} wrote in {folder} lately; waiting up to {_SILENCE} s to see "
        "whether it still does"
    )
    while time.monotonic() - silent_since < _SILENCE:
        time.sleep(_LOOK_AGAIN)
        now = _content(folder / _HOLDER)
        if now is None:
            return
        if now != former:
            former, silent_since = now, time.monotonic()
            if silent_since > deadline:
                raise Timeout(str(folder / _LOCK))


def _content(file: Path) -> bytes | None:
    """Return what is in a file, whole or not; None where there is none."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:  # another machine is just replacing it
        return str(error.errno).encode()


def _is_of(file: Path, told: Mapping[str, Any]) -> bool:
    """Return whether a file is of the holder that told this of itself."""
    try:
        there = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(there, dict) and all(there.get(name) == told[name] for name in ("process", "machine", "since"))


@contextlib.contextmanager
def _telling(file: Path, told: Mapping[str, Any]) -> Iterator[None]:
    """Tell who holds a folder, again and again."""
    over = threading.Event()

    def tell() -> None:
        # of one length, since a client may remember a former one
        write_whole(file, json.dumps({**told, "alive": f"{time.time():.3f}"}).ljust(_LENGTH))

    def go_on() -> None:
        while not over.wait(_BEAT):
            with contextlib.suppress(OSError):  # the disk may be full, or the network slow
                if not file.exists() or _is_of(file, told):
                    tell()

    teller = threading.Thread(target=go_on, name="layercrit-holder", daemon=True)
    try:
        tell()
        teller.start()
        yield
    finally:
        over.set()
        if teller.ident is not None:
            teller.join(_SILENCE)
        with contextlib.suppress(OSError):
            if _is_of(file, told):
                file.unlink(missing_ok=True)


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
    return _mount_of(path)[0] in _NETWORK_FILE_SYSTEMS


def has_local_locks(path: Path) -> bool:
    """Return whether other machines that share a file system do not see its locks, as far as the system says."""
    kind, options = _mount_of(path)
    return kind in _LOCAL_LOCKS and bool(_LOCAL_LOCKS[kind].search(options))


def _mount_of(path: Path) -> tuple[str, str]:
    """Return type and options of the mounted file system that a file is in; nothing where the system does not say."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return "", ""
    where = str(path.resolve())
    on = [
        (len(at), kind, how) for _, at, kind, how, *_ in mounts if where == at or where.startswith(f"{at.rstrip('/')}/")
    ]
    return max(on)[1:] if on else ("", "")
