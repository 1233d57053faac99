import json
import multiprocessing
import os
import platform
import signal
import sys

import pytest

from layercrit.errors import StudyError
from layercrit.locks import hold, holder


def hold_until_told(folder, connection):
    """Be another process that runs a study."""
    with hold(folder):
        connection.send("held")
        connection.recv()
    connection.send("left")


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``tmp_path / 'study'``, and the connection to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold_until_told, args=(tmp_path / "study", there))
    process.start()
    assert here.poll(60), "the other process does not answer"
    assert here.recv() == "held"
    yield process, here
    process.kill()
    process.join()


def test_hold__one_process_at_a_time(tmp_path, other):
    process, connection = other
    folder = tmp_path / "study"
    who = f"process {process.pid} on {platform.node()}, since 20"
    assert holder(folder).startswith(who)
    with pytest.raises(StudyError, match=f"is being run by {who}.*layercrit study status"), hold(folder):
        pass
    assert holder(folder).startswith(who), "the refused process took away what the holder wrote"
    connection.send("leave")
    assert connection.recv() == "left"
    assert holder(folder) is None
    with hold(folder):
        assert json.loads((folder / "running.json").read_text())["process"] == os.getpid()


def test_hold__is_free_when_its_process_was_killed(tmp_path, other):
    process, _ = other
    os.kill(process.pid, signal.SIGKILL)
    process.join()
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
    with pytest.raises(StudyError, match=r"file cannot be used \(.*\)\. Name another with --out"), hold(tmp_path / "file"):
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
def test_holder__held_by_somebody_who_says_nothing(tmp_path, other, text):
    written = tmp_path / "study" / "running.json"
    written.unlink() if text is None else written.write_text(text)
    assert holder(tmp_path / "study") == "another process"
