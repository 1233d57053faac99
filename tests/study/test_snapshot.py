"""Copies of a file of SQLite, of one state, while another process writes it and locks are of no use."""

import contextlib
import errno
import shutil
import sqlite3
import tempfile
import time

import pytest

from forked import FORKS
from layercrit.errors import StudyError
from layercrit.study import store_file
from layercrit.study.of_measurement import load_result
from layercrit.study.snapshot import logs_of, take_snapshot
from layercrit.study.store import FILE, Store
from running_jobs import write_rows

N_ROWS = 400  # of 1,000 bytes each: some 130 pages


@pytest.fixture(params=["DELETE", "WAL"])
def path(tmp_path, request):
    path = tmp_path / "rows.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {request.param}")
        connection.execute("CREATE TABLE rows (number, filler)")
        connection.executemany("INSERT INTO rows VALUES (0, zeroblob(1000))", [()] * N_ROWS)
        connection.commit()
    return path


@contextlib.contextmanager
def writing(*arguments, **settings):
    process = FORKS.Process(target=write_rows, args=arguments, kwargs=settings)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def numbers(path, folder, patience=30.0):
    """The numbers in a snapshot, and how many rows have them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(take_snapshot(path, folder, patience))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT number, count(*) FROM rows GROUP BY number").fetchall()


def test_take_snapshot__is_of_one_state_while_another_process_writes(path, tmp_path):
    found = []
    with writing(path, 1):
        deadline = time.monotonic() + 60
        while len(set(found)) < 10 and time.monotonic() < deadline:
            ((number, n_rows),) = numbers(path, tmp_path / "copy")
            assert n_rows == N_ROWS
            found.append(number)
    assert found == sorted(found)
    assert len(set(found)) == 10


@pytest.mark.parametrize("path", ["DELETE"], indirect=True)
def test_take_snapshot__a_whole_change_while_the_file_is_copied(path, tmp_path, monkeypatch):
    changes = iter(range(1, 3))

    def copied_amid_changes(source, to):
        with source.open("rb") as stream:
            half = stream.read(200_000)
            if source == path and (number := next(changes, None)):
                with contextlib.closing(sqlite3.connect(path)) as connection:
                    connection.execute("UPDATE rows SET number = ?", (number,))
                    connection.commit()
            to.write_bytes(half + stream.read())

    monkeypatch.setattr(shutil, "copyfile", copied_amid_changes)
    assert numbers(path, tmp_path / "copy") == [(2, N_ROWS)]


def test_take_snapshot__amid_a_change_it_is_the_state_before(path, tmp_path):
    begun = FORKS.Event()
    with writing(path, 1, begun=begun):
        assert begun.wait(60)
        original = path.read_bytes()
        assert numbers(path, tmp_path / "copy") == [(0, N_ROWS)]
        assert path.read_bytes() == original
        assert any(log.exists() for log in logs_of(path))
    assert numbers(path, tmp_path / "copy") == [(0, N_ROWS)], "that of a process that was killed"


def test_take_snapshot__waits_for_a_file_whose_size_is_known_late(path, tmp_path, monkeypatch):
    looks = iter(range(3))

    def copied_of_former_size(source, to):
        data = source.read_bytes()
        to.write_bytes(data[: len(data) // 2] if source == path and next(looks) < 2 else data)

    monkeypatch.setattr(shutil, "copyfile", copied_of_former_size)
    assert numbers(path, tmp_path / "copy") == [(0, N_ROWS)]
    assert next(looks, None) is None, "three looks"


def test_take_snapshot__a_file_that_is_always_being_written_is_refused(path, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def written_meanwhile(source, to):
        copyfile(source, to)
        if source == path:
            head = bytearray(path.read_bytes())
            head[27] += 1  # of the counter of changes
            path.write_bytes(head)

    monkeypatch.setattr(shutil, "copyfile", written_meanwhile)
    with pytest.raises(StudyError, match="writes it all the time"):
        numbers(path, tmp_path / "copy", patience=0.2)


def test_store__of_a_network_is_read_from_a_copy(tmp_path, monkeypatch):
    with Store(tmp_path, create=True) as made, made.transaction():
        made.put_meta("fact", 1)
    monkeypatch.setattr(store_file, "has_local_locks", lambda path: True)
    with Store(tmp_path) as read:
        (_, _, opened) = read._connection.execute("PRAGMA database_list").fetchone()
        assert read.meta("fact") == 1
        assert not opened.startswith(str(tmp_path))
        assert read.path == tmp_path / FILE


def test_store__of_a_network_that_cannot_be_copied(tmp_path, monkeypatch):
    def no_space(source, to):
        raise OSError(28, "No space left on device")

    with Store(tmp_path, create=True):
        pass
    monkeypatch.setattr(store_file, "has_local_locks", lambda path: True)
    monkeypatch.setattr(shutil, "copyfile", no_space)
    with pytest.raises(StudyError, match=r"No space left on device.*TMPDIR"):
        Store(tmp_path)


def test_store__of_a_network_where_no_copy_can_be_put(tmp_path, monkeypatch):
    with Store(tmp_path, create=True):
        pass
    monkeypatch.setattr(store_file, "has_local_locks", lambda path: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StudyError, match=r"No such file or directory.*TMPDIR"):
        load_result(tmp_path)


def test_store__what_would_be_lost_cannot_be_written(tmp_path, monkeypatch):
    with Store(tmp_path, create=True):
        pass
    monkeypatch.setattr(store_file, "has_local_locks", lambda path: True)
    with Store(tmp_path) as copy, pytest.raises(StudyError, match="readonly"), copy.transaction():
        copy.put_meta("fact", 1)


def test_take_snapshot__a_file_that_another_machine_just_replaced(path, tmp_path, monkeypatch):
    copyfile, stale = shutil.copyfile, iter([True, False])

    def handle_that_is_gone(source, to):
        if next(stale, False):
            raise OSError(errno.ESTALE, "Stale file handle")
        copyfile(source, to)

    monkeypatch.setattr(shutil, "copyfile", handle_that_is_gone)
    assert numbers(path, tmp_path / "copy") == [(0, N_ROWS)]


@pytest.mark.parametrize("path", ["DELETE"], indirect=True)
def test_take_snapshot__a_change_that_is_taken_back_while_the_file_is_copied(path, tmp_path, monkeypatch):
    changes = iter([1])

    def copied_amid_a_change(source, to):
        with source.open("rb") as stream:
            half = stream.read(200_000)
            if source == path and (number := next(changes, None)):
                with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                    connection.execute("PRAGMA cache_size = 10")
                    connection.execute("BEGIN")
                    connection.execute("UPDATE rows SET number = ?", (number,))
                    rest = stream.read()
                    connection.execute("ROLLBACK")
            else:
                rest = stream.read()
            to.write_bytes(half + rest)

    monkeypatch.setattr(shutil, "copyfile", copied_amid_a_change)
    assert numbers(path, tmp_path / "copy") == [(0, N_ROWS)]
