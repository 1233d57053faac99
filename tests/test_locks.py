import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from layercrit import locks
from layercrit.errors import StudyError
from layercrit.locks import hold, holder, is_free

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


# --- file systems of networks ---------------------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A folder in a file system whose locks hold on one machine only; holders are silent for two seconds at most."""
    monkeypatch.setattr(locks, "has_local_locks", lambda path: True)
    monkeypatch.setattr(locks, "_BEAT", 0.05)
    monkeypatch.setattr(locks, "_SILENCE", 2)
    monkeypatch.setattr(locks, "_SETTLED", 0.1)
    monkeypatch.setattr(locks, "_LOOK_AGAIN", 0.02)
    (tmp_path / ".lock").touch()
    return tmp_path


class Elsewhere:
    """A process on another machine that holds a folder for some seconds, and then leaves it or is killed."""

    def __init__(self, folder, seconds=3600.0, *, leaves=True):
        self.file, self.until, self.leaves = folder / "running.json", time.monotonic() + seconds, leaves
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.tell)

    def tell(self):
        while time.monotonic() < self.until:
            told = {"process": 7, "machine": "node7", "since": "then", "alive": f"{time.time():.3f}"}
            locks.write_whole(self.file, json.dumps(told))
            if self.over.wait(0.05):
                break
        if self.leaves:
            self.file.unlink(missing_ok=True)

    def __enter__(self):
        self.thread.start()
        while not self.file.exists():
            time.sleep(0.01)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def test_hold__is_refused_while_another_machine_says_that_it_holds_it(network):
    with Elsewhere(network):
        assert holder(network) == "process 7 on node7, since then"
        assert not is_free(network)
        with pytest.raises(StudyError, match="is being run by process 7 on node7"), hold(network):
            pass
        assert holder(network) == "process 7 on node7, since then", "it still tells"
    assert holder(network) is None
    assert is_free(network)
    with hold(network):
        assert not is_free(network)


@pytest.mark.parametrize("leaves", [True, False], ids=["that leaves it", "that was killed"])
def test_hold__waits_for_another_machine(network, leaves):
    with Elsewhere(network, 0.3, leaves=leaves), hold(network, patience=60):
        assert f"process {os.getpid()} " in holder(network)


def test_hold__what_a_machine_said_long_ago_is_not_waited_for(network, monkeypatch):
    told = {"process": 7, "machine": "node7", "since": "then"}
    monkeypatch.setattr(locks, "_SETTLED", 0)
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds and pytest.fail("it waits"))
    for alive in ({"alive": f"{time.time() - 1000}"}, {}, {"alive": "now"}):
        (network / "running.json").write_text(json.dumps(told | alive))
        assert holder(network) is None
        with hold(network):
            pass


def test_hold__tells_other_machines_again_and_again(network):
    with hold(network):
        found, deadline = set(), time.monotonic() + 30
        while len(found) < 3 and time.monotonic() < deadline:
            found.add(json.loads((network / "running.json").read_text())["alive"])
        assert len(found) == 3
    assert not (network / "running.json").exists()
    assert "layercrit-holder" not in [thread.name for thread in threading.enumerate()]


def test_hold__on_a_disk_of_its_own_other_machines_are_not_heard(tmp_path):
    (tmp_path / ".lock").touch()
    with Elsewhere(tmp_path):
        assert holder(tmp_path) is None
        with hold(tmp_path):
            pass


def test_hold__a_text_that_cannot_be_read_is_no_sign_of_nobody(network):
    with Elsewhere(network):
        pass
    (network / "running.json").write_text('{"process": 7, "mach')  # as a client shows it that remembers a former size
    began = time.monotonic()
    with hold(network):
        assert time.monotonic() - began > 2


def test_hold__of_two_machines_at_the_same_time_one_gives_way(network, monkeypatch):
    """Both have looked when neither had told; the other one told last."""
    monkeypatch.setattr(locks, "_SETTLED", 0.5)
    waiting = iter([None])
    wait = locks._wait_for_other_machines
    monkeypatch.setattr(
        locks, "_wait_for_other_machines", lambda *given, **how: next(waiting, 0) is None or wait(*given, **how)
    )
    other = Elsewhere(network)
    threading.Timer(0.2, other.thread.start).start()
    try:
        with pytest.raises(StudyError, match="is being run by process 7 on node7"), hold(network):
            pass
    finally:
        other.__exit__()


@pytest.mark.parametrize(
    ("mount", "local"),
    [
        ("host:/x {} fuse.sshfs rw,nosuid 0 0", True),
        ("beegfs_nodev {} beegfs rw,relatime 0 0", True),
        ("server:/x {} nfs4 rw,vers=4.2,local_lock=none,addr=1.2.3.4 0 0", False),
        ("server:/x {} nfs rw,nolock,addr=1.2.3.4 0 0", True),
        ("server:/x {} nfs rw,local_lock=all 0 0", True),
        ("1.2.3.4@tcp:/x {} lustre rw,flock,lazystatfs 0 0", False),
        ("1.2.3.4@tcp:/x {} lustre rw,localflock 0 0", True),
        ("1.2.3.4@tcp:/x {} lustre rw,lazystatfs 0 0", True),
        ("//server/x {} cifs rw 0 0", False),
        ("/dev/sda1 {} ext4 rw 0 0", False),
    ],
)
def test_has_local_locks__by_type_and_options(tmp_path, monkeypatch, mount, local):
    mounts = f"/dev/sda1 / ext4 rw 0 0\n{mount.format(tmp_path)}\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: mounts)
    assert locks.has_local_locks(tmp_path / "study") is local
    assert locks.is_on_network(tmp_path / "study") is ("ext4" not in mount)
