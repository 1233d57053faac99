"""The SQLite file of a study: opened to be written or read, by several processes and machines, and of any schema."""

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self

from layercrit.errors import StudyError
from layercrit.locks import has_local_locks, is_on_network
from layercrit.study.migrations import MIGRATIONS, statements
from layercrit.study.rows import checksum
from layercrit.study.snapshot import logs_of, take_snapshot

__all__ = ["FILE", "StoreFile"]

FILE = "cells.sqlite"
_MAGIC = 0x6C637274  # "lcrt": tells a study's file from other SQLite files
# `checksum` itself raises nothing, but a signal may while it runs; SQLite lets no exception through as it is
_CHECKSUM_STOPPED = "user-defined function raised exception"

_ATTEMPTS, _MOMENT = 40, 0.05  # to read a file that another process may be writing; and seconds between them
_PATIENCE = 600  # seconds that a writer waits for readers, of a large file in a slow network, or these for it

SCHEMA = len(MIGRATIONS)


class StoreFile:
    """The SQLite file of a study's folder; a context manager that closes it.

    Any number of processes may read while one writes; of other machines, where the file is in a network file system or
    was created as ``shared``. Where locks hold on one machine only, a file that is not created is read from a copy.
    What is put into it is put inside a `transaction`. A study that cannot be written, as on read-only media, can be
    read.

    Args:
        folder: of the study.
        create: whether to make one where there is none.
        shared: whether processes on other machines read it, too, while this one writes.
        read_only: whether to leave the file as it is, such as that of another process.

    Attributes:
        path: of the file.

    Raises:
        StudyError: there is none, it is damaged or not a study's, a newer version of layercrit wrote it, or the disk is
            full.
    """

    def __init__(
        self, folder: str | Path, *, create: bool = False, shared: bool = False, read_only: bool = False
    ) -> None:
        self._shared = shared
        self.path = Path(folder).expanduser() / FILE
        if not create and not self.path.is_file():
            first = ""
            if (self.path.parent / "measurement.json").is_file():
                first = (
                    "`layercrit measure` wrote it, of one model, and `layercrit report` makes a page of it. For all "
                    "else, name that model in a study file, and run it. "
                )
            raise StudyError(
                f"There is no study in {self.path.parent}: {FILE} is missing. {first}Give the folder that `layercrit "
                "study run` or `layercrit import` wrote."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{self.path} cannot be created ({error.strerror}). Name another folder.") from error
        self._cleared_up = contextlib.ExitStack()
        with self._explained(), contextlib.ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            if not create and has_local_locks(self.path):
                self._connect_to_copy(_PATIENCE)
            elif _is_writable(self.path) and not read_only:
                self._connect(self.path)
            else:
                self._connect_read_only(may_change=read_only)
            unless_opened.pop_all()

    def _connect(self, path: Path, how: str = "") -> None:
        """Open a file, the study's own or a copy, and bring it to the current schema."""
        self._uri = f"{path.absolute().as_uri()}{how}"
        # transactions are written out below: the module's own begin them where it guesses
        self._connection = sqlite3.connect(self._uri, timeout=_PATIENCE, isolation_level=None, uri=True)
        self._cleared_up.callback(self._connection.close)
        self._connection.text_factory = lambda text: text.decode(errors="surrogateescape")
        self._connection.create_function("checksum", -1, checksum, deterministic=True)
        self._open()

    def _connect_read_only(self, may_change: bool) -> None:
        """Open a file that is not to be written, or a copy where SQLite would have to write to read it.

        Args:
            may_change: whether another process may write it, and just be about to.
        """
        for attempt in range(_ATTEMPTS if may_change else 1):
            time.sleep(_MOMENT if attempt else 0)
            is_alone = not may_change and not any(log.exists() for log in logs_of(self.path))
            try:
                # where nobody is writing it, it needs no locks, which cannot be made on read-only media
                self._connect(self.path, "?mode=ro&immutable=1" if is_alone else "?mode=ro")
                return
            except (sqlite3.OperationalError, StudyError) as error:  # a log is to be read first, or an old schema
                if not isinstance(error.__cause__ or error, sqlite3.OperationalError):
                    raise
                self._cleared_up.close()
        self._connect_to_copy(_ATTEMPTS * _MOMENT)

    def _connect_to_copy(self, patience: float) -> None:
        try:
            scratch = self._cleared_up.enter_context(tempfile.TemporaryDirectory(prefix="layercrit-"))
            copy = take_snapshot(self.path, Path(scratch), patience)
        except OSError as error:
            raise StudyError(
                f"{self.path} cannot be read, or not be copied to the folder for temporary files ({error.strerror}). "
                "Free some space there, or set TMPDIR to another folder."
            ) from error
        self._connect(copy)
        self._connection.execute("PRAGMA query_only = ON")  # what is written into a copy would be lost

    def _open(self) -> None:
        self._connection.execute("BEGIN")  # another process may just create it: all three are of one state
        (magic,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (n_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._connection.execute("COMMIT")
        if magic != _MAGIC and n_tables:
            raise StudyError(
                f"{self.path} is an SQLite file, but not that of a layercrit study. Name another folder; if it "
                f"was one, `layercrit study repair {self.path.parent}` keeps what can be read."
            )
        if version > SCHEMA:
            raise StudyError(
                f"{self.path} has schema version {version}, but this version of layercrit only knows versions up to "
                f"{SCHEMA}. Install the newer version of layercrit that wrote it; if there is none, the file is "
                f"damaged, and `layercrit study repair {self.path.parent}` keeps what can be read."
            )
        if version == SCHEMA:
            if "mode=ro" not in self._uri and is_on_network(self.path):  # where it was moved to, maybe
                with contextlib.suppress(sqlite3.OperationalError):  # somebody reads it
                    self._connection.execute("PRAGMA journal_mode = DELETE")
            return
        self._choose_journal()
        with self.transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()  # another process was faster?
            for step in MIGRATIONS[version:]:
                for statement in statements(step):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_MAGIC}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def _choose_journal(self) -> None:
        """Let readers go on while a cell is committed, where all of them are on this machine."""
        if not self._shared and not is_on_network(self.path):
            with contextlib.suppress(sqlite3.OperationalError):  # a file system lacks the shared memory that it needs
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
        self._connection.execute("PRAGMA journal_mode = DELETE")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was committed is in it."""
        self._cleared_up.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything that is written inside, or nothing."""
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself ends one for which the disk is too small
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._explained():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # also SQLite's own texts about damage may be damaged
            if str(error) == _CHECKSUM_STOPPED:
                raise KeyboardInterrupt from error
            raise StudyError(
                f"{self.path} cannot be used ({error}). If the disk is full, free some space; if the file is damaged, "
                f"`layercrit study repair {self.path.parent}` keeps what can be read, or restore it, or start over in "
                "another folder."
            ) from error


def _is_writable(path: Path) -> bool:
    return os.access(path if path.exists() else path.parent, os.W_OK) and os.access(path.parent, os.W_OK)
