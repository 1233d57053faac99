"""Save what can be read of a study whose file is damaged so that SQLite cannot read its tables any more."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError
from layercrit.locks import hold
from layercrit.study.rows import COLUMNS
from layercrit.study.store import FILE, Store

__all__ = ["repair_study"]

_MISSES = 10_000  # row numbers in a row that are not there; then there are no more


def repair_study(folder: str | Path) -> tuple[int, Path]:
    """Put a new file in the place of a study's damaged one, with every row that can be read and is as it was written.

    Returns:
        How many cells were kept, and the damaged file under its new name.

    Raises:
        StudyError: there is no study, another process runs it, or nothing of it can be read.
    """
    folder = Path(folder).expanduser()
    if not (folder / FILE).is_file():
        raise StudyError(f"There is no study in {folder}: {FILE} is missing. Give the folder of a damaged study.")
    with hold(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".repair-") as scratch:
        old, new = Path(scratch) / "old", Path(scratch)
        old.mkdir()
        for name in (FILE, f"{FILE}-wal"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, old / name)
        try:
            with closing(sqlite3.connect(old / FILE)) as damaged, Store(new, create=True) as store:
                damaged.execute("SELECT count(*) FROM sqlite_master")  # without its schema nothing can be read
                damaged.text_factory = lambda text: text.decode(errors="surrogateescape")
                n_kept = store.take_rows({table: _rows(damaged, table) for table in COLUMNS})
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StudyError(
                f"Nothing of {folder / FILE} can be read ({error}). Restore the file, or start over in another folder."
            ) from error
        kept = next(path for n in range(1, 1000) if not (path := folder / f"{FILE}.damaged-{n}").exists())
        os.replace(folder / FILE, kept)  # noqa: PTH105
        for log in ("-wal", "-shm"):
            Path(f"{folder / FILE}{log}").unlink(missing_ok=True)
        (new / FILE).replace(folder / FILE)
    return n_kept, kept


def _rows(connection: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table that SQLite can read: the number of a run, the columns, and the checksum."""
    there = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}  # older files have fewer
    wanted = ("run" if table in ("cells", "runs") else "", *COLUMNS[table], "checksum")
    query = f"SELECT {', '.join(name if name in there else 'NULL' for name in wanted)} FROM {table}"  # noqa: S608
    if table == "plan":  # has no row numbers: from both ends up to the damage
        yield from _until_damage(connection, query)
        yield from _until_damage(connection, f"{query} ORDER BY model DESC, reset DESC, trial DESC, layer DESC")
        return
    last, misses = 0, 0
    while misses < _MISSES:
        try:
            found = connection.execute(f"{query} WHERE rowid = ?", (last + 1,)).fetchone()
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            found = None
        last, misses = last + 1, 0 if found else misses + 1
        if found:
            yield found


def _until_damage(connection: sqlite3.Connection, query: str) -> Iterator[tuple[Any, ...]]:
    try:
        yield from connection.execute(query)
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return
