import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from layercrit.errors import StudyError
from layercrit.locks import hold, holder

HOLD = """
import sys
from pathlib import Path
from pathlib import Path
from layercrit.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``tmp_path / 'study'``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "study")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_hold__one_process_at_a_time(tmp_path, other):
    folder = tmp_path / "study"
    who = f"process {other.pid} on {platform.node()}, since 20"
    assert holder(folder).startswith(who)
    with pytest.raises(StudyError, match=f"is being run by {who}.*layercrit study status"), hold(folder):
        pass
    assert holder(folder).startswith(who), "the refused process took away what the holder wrote"
    other.stdin.write("leave\n")
    other.stdin.flush()
    assert other.stdout.readline() == "left\n"
    assert holder(folder) is None
    with hold(folder):
        assert json.loads((folder / "running.json").read_text())["process"] == os.getpid()


def test_holder__may_be_asked_by_many_at_once(tmp_path, other):
    """Who asks does not look like a holder to others that ask, also where a killed one left its name."""
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with (tmp_path / "study" / ".lock").open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert holder(tmp_path / "study") is None


def test_hold__is_free_when_its_process_was_killed(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    folder = tmp_path / "study"
    assert (folder / "running.json").exists()  # nobody was there to clear up
    assert holder(folder) is None
    with hold(folder):
        assert f"process {os.getpid()} " in holder(folder)
    assert not (folder / "running.json").exists()


def test_hold__is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a" / "b"):
        1 / 0  # noqa: B018
    assert holder(tmp_path / "a" / "b") is None
    with hold(tmp_path / "a" / "b"):
        pass


def test_hold__a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(StudyError, match=r"file cannot be used \(.*\)\. Name another with --out"),
        hold(tmp_path / "file"),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of folders")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_hold__a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StudyError, match="cannot be used"), hold(tmp_path):
        pass
    assert holder(tmp_path) is None


def test_holder__leaves_no_trace(tmp_path):
    assert holder(tmp_path) is None
    assert holder(tmp_path / "nowhere") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", None])
def test_holder__held_by_somebody_who_says_nothing(tmp_path, text):
    with hold(tmp_path):
        written = tmp_path / "running.json"
        written.unlink() if text is None else written.write_text(text)
        assert holder(tmp_path) == "another process"


@pytest.fixture(params=["ENOSYS", "EOPNOTSUPP", "ENOLCK", "filelock 3.13"])
def without_flock(request, monkeypatch):
    """A file system that knows no locks, as it shows."""

    def refuse(self, *_, **options):
        lock_file = Path(self.lock_file)
        lock_file.touch()
        if request.param == "filelock 3.13":
            raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr("layercrit.locks.FileLock.acquire", refuse)


@pytest.mark.usefixtures("without_flock")
def test_hold__on_a_file_system_without_locks(tmp_path):
    for _ in range(2):
        with hold(tmp_path):
            assert f"process {os.getpid()} " in holder(tmp_path)
            with pytest.raises(StudyError, match=r"is being run by process .*delete .*\.lock-soft"), hold(tmp_path):
                pass
        assert holder(tmp_path) is None
    assert not (tmp_path / ".lock-soft").exists()


def test_hold__other_errors_of_locks_are_told(tmp_path, monkeypatch):
    def refuse(self, *_, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("layercrit.locks.FileLock.acquire", refuse)
    with pytest.raises(StudyError, match=r"cannot be used \(Input/output error\)"), hold(tmp_path):
        pass
