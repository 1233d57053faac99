"""Save what can be read of a study whose file is damaged so that SQLite cannot read its tables any more.

SQLite finds rows by the schema on a file's first pages, and by the pages above those that hold rows. Neither is needed
here: the schema of a study is known, with the page at which each table begins, and a cell is told from anything else by
its checksum, wherever it lies.
"""

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError
from layercrit.locks import hold
from layercrit.study.migrations import MIGRATIONS, statements
from layercrit.study.rows import COLUMNS
from layercrit.study.snapshot import logs_of
from layercrit.study.store import FILE, Store

__all__ = ["Repaired", "repair_study"]

_MISSES = 1_000  # row numbers in a row that are not there; then there are no more
_PAGE, _HEADER = 4096, 100  # bytes of a page, and of what the first one begins with
_LEAF = 0x0D  # first byte of a page that holds rows
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)  # SQLite's own texts about damage may be damaged, too


@dataclass(frozen=True)
class Repaired:
    """What became of a damaged study.

    Attributes:
        n_kept: how many cells were read as they had been written.
        lost: which rows are damaged, or known to have been there and not found, in words.
        damaged: the damaged file under its new name; None: nothing was damaged, and the study is as it was.
    """

    n_kept: int
    lost: tuple[str, ...]
    damaged: Path | None


def repair_study(folder: str | Path) -> Repaired:
    """Put a new file in the place of a study's damaged one, with every row that can be read and is as it was written.

    A file in which SQLite finds nothing wrong, and of which every row is as it was written, is left alone.

    Raises:
        StudyError: there is no study, another process runs it, or nothing of it can be read.
    """
    folder = Path(folder).expanduser()
    if not (folder / FILE).is_file():
        raise StudyError(f"There is no study in {folder}: {FILE} is missing. Give the folder of a damaged study.")
    with hold(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".repair-") as scratch:
        old, new = Path(scratch) / "old" / FILE, Path(scratch)
        _copy(folder / FILE, old.parent)
        if (n_cells := _n_cells_if_sound(old, new)) is not None:
            return Repaired(n_cells, (), None)
        shutil.rmtree(old.parent)  # looking may have changed it
        _copy(folder / FILE, old.parent)
        with Store(new, create=True) as store:
            n_rows = _take_all(store, old)
            lost, n_kept = tuple(store.damaged), store.n_cells()
        if not n_rows and (folder / FILE).stat().st_size:
            raise StudyError(
                f"Nothing of {folder / FILE} can be read: no row of a study was found in it. Restore the file, or "
                "start over in another folder."
            )
        kept = next(path for n in range(1, 1000) if not (path := folder / f"{FILE}.damaged-{n}").exists())
        os.replace(folder / FILE, kept)  # noqa: PTH105
        for file in (*logs_of(folder / FILE), folder / f"{FILE}-shm"):
            file.unlink(missing_ok=True)
        (new / FILE).replace(folder / FILE)
    return Repaired(n_kept, lost, kept)


def _copy(file: Path, folder: Path) -> None:
    """Copy a file of SQLite, and the logs that an interrupted process left beside it, into a new folder."""
    folder.mkdir()
    for one in (file, *logs_of(file)):
        if one.exists():
            shutil.copyfile(one, folder / one.name)


def _n_cells_if_sound(file: Path, empty: Path) -> int | None:
    """Return how many cells a file has in which nothing is damaged; None if something is.

    Args:
        file: may be changed.
        empty: folder for an empty study, to compare the schema with.
    """
    if not any(one.exists() and one.stat().st_size for one in (file, *logs_of(file))):
        return None  # SQLite takes an empty file for a new one
    try:
        with Store(file.parent) as store, Store(empty, create=True) as new:
            is_sound = store.is_sound() and new.schema() <= store.schema()
            return store.n_cells() if is_sound else None
    except StudyError:
        return None


def _take_all(store: Store, old: Path) -> int:
    """Put into an empty store what can be read of a file, which is changed; return how many rows those are."""
    known, roots = _known_schema(old.parent)
    with old.open("rb") as stream:
        own = stream.read(_PAGE)
    _write(old, 1, known)
    _take_in_logs(old)
    _write(old, 1, known)
    with _reading(old) as damaged:
        n_rows = {table: store.take_rows(table, _rows(damaged, table)) for table in COLUMNS}
        keys = {row[0] for row in _from_both_ends(damaged, "SELECT key FROM cells", "key")}
    _write(old, 1, known[:_HEADER] + own[_HEADER:])
    with _reading(old) as damaged:  # tables are elsewhere after a VACUUM
        for table in [table for table, n in n_rows.items() if not n]:
            n_rows[table] += store.take_rows(table, _rows(damaged, table))
    _write(old, 1, known)
    n_rows["cells"] += store.take_rows("cells", _strewn_cells(old, roots["cells"]))
    store.miss_cells(keys)
    return sum(n_rows.values())


def _known_schema(folder: Path) -> tuple[bytes, dict[str, int]]:
    """Return the first page of any study's file, less what only writing needs, and table -> page where it begins."""
    with contextlib.closing(sqlite3.connect(folder / "empty.sqlite", isolation_level=None)) as empty:
        empty.execute(f"PRAGMA page_size = {_PAGE}")
        for step in MIGRATIONS:
            for statement in map(str.strip, statements(step)):
                if statement.startswith(("CREATE TABLE", "CREATE INDEX", "ALTER TABLE")):
                    empty.execute(statement)
        roots = dict(empty.execute("SELECT name, rootpage FROM sqlite_master"))
    page = bytearray((folder / "empty.sqlite").read_bytes()[:_PAGE])
    page[28:32] = bytes(4)  # how many pages there are is told from the file's size
    return bytes(page), roots


def _write(file: Path, number: int, page: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(_PAGE * (number - 1))
        stream.write(page)


def _take_in_logs(file: Path) -> None:
    """Let SQLite do what it does at opening with what an interrupted process left beside the file."""
    with contextlib.suppress(*_UNREADABLE), contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)) as connection:
        connection.text_factory = lambda text: text.decode(errors="surrogateescape")
        yield connection


def _rows(connection: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table that SQLite can read: the number of a run, the columns, and the checksum."""
    wanted = ("run" if table in ("cells", "runs") else "NULL", *COLUMNS[table], "checksum")
    query = f"SELECT {', '.join(wanted)} FROM {table}"  # noqa: S608
    try:
        connection.execute(f"{query} LIMIT 0")
    except _UNREADABLE:  # there is no such table
        return
    if table == "plan":  # has no row numbers
        yield from _from_both_ends(connection, query, "model", "reset", "trial", "layer")
        return
    yield from _from_both_ends(connection, query, "rowid")
    last, misses = 0, 0
    while misses < _MISSES:  # those between two damages
        try:
            found = connection.execute(f"{query} WHERE rowid = ?", (last + 1,)).fetchone()
        except _UNREADABLE:
            found = None
        last, misses = last + 1, 0 if found else misses + 1
        if found:
            yield found


def _from_both_ends(connection: sqlite3.Connection, query: str, *order: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows before the first damage and those after the last, as far as they are read in this order."""
    for direction in ("ASC", "DESC"):
        with contextlib.suppress(*_UNREADABLE):
            yield from connection.execute(f"{query} ORDER BY {', '.join(f'{name} {direction}' for name in order)}")


def _strewn_cells(file: Path, root: int) -> Iterator[tuple[Any, ...]]:
    """Yield the cells of all pages that hold rows, whether or not the damaged file still leads to them.

    One page after the other is put where the table of cells begins. Only what is named by its content can be taken so:
    a page may be one that is free, and what it says of other things out of date.
    """
    with file.open("rb") as stream:
        for page in iter(lambda: stream.read(_PAGE), b""):
            if page[0] != _LEAF:
                continue
            _write(file, root, page)
            with _reading(file) as connection:
                wanted = f"SELECT run, {', '.join(COLUMNS['cells'])}, checksum FROM cells"  # noqa: S608
                for row in _from_both_ends(connection, wanted, "rowid"):
                    if row[-1] is not None:  # as in rows of other tables, which are shorter
                        yield row
