"""Cells on disk: the SQLite file of a study, in which every finished cell is a row, committed as it was measured.

========== ==========================================================================================================
``models`` the models of the study in its order; ``record`` is what is known of one since it was opened
``plan``   which cells the study has, by model, layer, reset and trial; ``key`` is a hash of the content of each
``cells``  what was measured, by key: the same content is never measured twice, and other content never mixed in
``parts``  batches of trials that are under way, so that an interruption loses a batch and not a trial
``failures`` what could not be measured, and why
``runs``   when and on which machine, with which versions, cells were measured
``meta``   facts about the whole study, as JSON
========== ==========================================================================================================
"""

import contextlib
import json
import math
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import StudyError
from layercrit.study.cell_table import cells_table
from layercrit.study.packing import pack, unpack
from layercrit.study.rows import COLUMNS, CellRow, FailureRow, ModelRow, PartRow, PlanRow, is_sound
from layercrit.study.store_file import FILE, StoreFile

__all__ = [
    "FILE",
    "CellRow",
    "FailureRow",
    "ModelRow",
    "PartRow",
    "PlanRow",
    "Store",
]


class Store(StoreFile):
    """What stands in the file of a study's folder, which is opened as a `StoreFile`.

    Rows that were damaged on the disk are left out.

    Args:
        folder: of the study.
        create: as for `StoreFile`.
        shared: likewise.
        read_only: likewise.

    Attributes:
        damaged: which damaged rows were met so far, in words.
    """

    def __init__(
        self, folder: str | Path, *, create: bool = False, shared: bool = False, read_only: bool = False
    ) -> None:
        self.damaged: dict[str, None] = {}  # used as a set with an order
        super().__init__(folder, create=create, shared=shared, read_only=read_only)

    # --- facts about the study --------------------------------------------------------------------------------------

    def put_meta(self, name: str, value: Any) -> None:
        """Remember a fact, any plain data."""
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, NULL)", (name, _json(value)))

    def meta(self, name: str, default: Any = None) -> Any:
        """Return a fact."""
        rows = list(self._sound("meta", "WHERE name = ?", [name]))
        return json.loads(rows[0][1]) if rows else default

    def put_run(self, started: str, record: Mapping[str, Any]) -> int:
        """Remember where and with what cells are being measured; return the run's number."""
        with self._explained():
            cursor = self._connection.execute(
                "INSERT INTO runs (started, record) VALUES (?, ?)", (started, _json(record))
            )
        return int(cursor.lastrowid or 0)

    def runs(self) -> list[dict[str, Any]]:
        """Return what `put_run` remembered, in order."""
        rows = self._sound("runs", "ORDER BY run", more=("run",))
        return [{"run": run, "started": started, **json.loads(record)} for run, started, record in rows]

    # --- models and plan --------------------------------------------------------------------------------------------

    def put_models(self, models: Sequence[ModelRow]) -> None:
        """Replace the list of models; what was known and planned of one by the same name and reference is kept."""
        known = {(row.model, row.reference): row.record for row in self.models()}
        for name, _ in known.keys() - {(row.model, row.reference) for row in models}:
            self._connection.execute("DELETE FROM plan WHERE model = ?", (name,))
            self._connection.execute("DELETE FROM failures WHERE model = ?", (name,))
        self._connection.execute("DELETE FROM models")
        columns = COLUMNS["models"]
        self._connection.executemany(
            f"INSERT INTO models ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",  # noqa: S608
            [
                (
                    row.model,
                    position,
                    row.reference,
                    row.category,
                    row.label,
                    row.documented_accuracy,
                    row.attack_norm,
                    row.eps,
                    _json(record),
                    row.variant_of,
                    row.epoch,
                    row.probe_set,
                    row.norm_statistics,
                )
                for position, row in enumerate(models)
                for record in [row.record or known.get((row.model, row.reference))]
            ],
        )

    def put_record(self, model: str, record: Mapping[str, Any]) -> None:
        """Remember what is known of an opened model."""
        self._connection.execute("UPDATE models SET record = ? WHERE model = ?", (_json(record), model))

    def models(self) -> list[ModelRow]:
        """Return the models in the order of the study."""
        found = []
        for row in self._sound("models", "ORDER BY position"):
            values = dict(zip(COLUMNS["models"], row, strict=True))
            del values["position"]
            record = values.pop("record")
            found.append(ModelRow(**values, record=None if record is None else json.loads(record)))
        return found

    def put_plan(self, rows: Iterable[PlanRow]) -> None:
        """Add cells to the plan; one that is planned already gets the new key."""
        self._connection.executemany(
            "INSERT OR REPLACE INTO plan (model, layer, reset, trial, key, type, stage, depth, n_parameters, "
            "flops_after, shape) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [tuple(vars(row).values()) for row in rows],
        )

    def clear_plan(self, model: str | None = None, reset: str | None = None, trial: int | None = None) -> None:
        """Forget which cells were planned, of all models or of one, its resets and trials; cells measured stay."""
        self._connection.execute(
            "DELETE FROM plan WHERE model = coalesce(?, model) AND reset = coalesce(?, reset) "
            "AND trial = coalesce(?, trial)",
            (model, reset, trial),
        )

    def plan(self) -> list[PlanRow]:
        """Return the planned cells, by model, reset, trial and depth."""
        return [PlanRow(*row) for row in self._sound("plan", "ORDER BY model, reset, trial, depth")]

    # --- cells ------------------------------------------------------------------------------------------------------

    def put_cells(self, cells: Iterable[CellRow], run: int | None = None) -> None:
        """Add finished cells; one that is there already is left as it is."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            [
                (
                    cell.key,
                    cell.status,
                    None if cell.seed is None else str(cell.seed),  # SQLite's integers end at 2^63
                    cell.delta_norm,
                    cell.n_images,
                    _json({name: _finite(mean) for name, mean in cell.means.items()}),
                    None if cell.per_image is None else pack(cell.per_image),
                    _json(cell.raw),
                    cell.seconds,
                    cell.finished,
                    run,
                )
                for cell in cells
            ],
        )

    def copy_cells(self, other: "Store") -> None:
        """Add all cells of another study, with the runs they come from; cells that are there already are left."""
        sound = json.dumps([row[0] for row in other._sound("cells")])
        with self._explained():
            self._connection.execute("ATTACH DATABASE ? AS other", (other._uri,))
        try:
            with self.transaction():
                (offset,) = self._connection.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone()
                self._connection.execute(
                    "INSERT INTO runs SELECT run + ?, started, record, NULL FROM other.runs", (offset,)
                )
                self._connection.execute(
                    "INSERT OR IGNORE INTO cells SELECT key, status, seed, delta_norm, n_images, means, per_image, "
                    "raw, seconds, finished, run + ?, NULL FROM other.cells "
                    "WHERE key IN (SELECT value FROM json_each(?))",
                    (offset, sound),
                )
        finally:
            self._connection.execute("DETACH DATABASE other")

    def known(self, keys: Iterable[str]) -> set[str]:
        """Return those of some keys whose cells are measured."""
        wanted = list(keys)
        found: set[str] = set()
        for start in range(0, len(wanted), 500):  # SQLite limits the number of parameters
            some = wanted[start : start + 500]
            marks = ", ".join("?" * len(some))
            found.update(row[0] for row in self._sound("cells", f"WHERE key IN ({marks})", some))
        return found

    def cells(self) -> pd.DataFrame:
        """Return the planned cells that are measured, one row each, in the order of models, resets, depth and trials.

        Columns are those of `PlanRow`, of `CellRow` without ``per_image``, and one for each mean.
        """
        plan = self.plan()
        return cells_table(self.models(), plan, self.measured({row.key for row in plan}))

    def measured(self, keys: Set[str]) -> dict[str, dict[str, Any]]:
        """Return key -> the cell's row, without per-image values, of those of some keys whose cells are measured."""
        found = {}
        for values in self._sound("cells", more=("run",)):  # not joined with the plan, whose index may be damaged, too
            cell = dict(zip(("run", *COLUMNS["cells"]), values, strict=True))
            del cell["per_image"]
            if cell["key"] in keys:
                found[cell["key"]] = cell
        return found

    def n_cells(self) -> int:
        """Return how many cells are measured, planned or not."""
        return int(self._rows("SELECT count(*) FROM cells")[0][0])

    def keys(self) -> set[str]:
        """Return the keys of all measured cells, planned or not, damaged or not."""
        return {key for (key,) in self._rows("SELECT key FROM cells")}

    def keys_with_images(self) -> set[str]:
        """Return the keys of all cells for which per-image values were kept."""
        return {key for (key,) in self._rows("SELECT key FROM cells WHERE per_image IS NOT NULL")}

    def per_image(self, keys: Sequence[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
        """Return key -> name of a distance or score -> one value an image, for those cells that have any.

        Raises:
            StudyError: a cell is not found, although there is one with its key: the file's index is damaged.
        """
        found = {}
        for key in keys:
            rows = self._rows("SELECT per_image FROM cells WHERE key = ?", [key])
            if not rows:
                raise StudyError(
                    f"The index of {self.path} is damaged: the cell {key[:8]} is not found by its key. Make it anew "
                    f"with `layercrit study repair {self.path.parent}`; no finished cell is lost."
                )
            for (blob,) in rows:
                if blob is not None:
                    found[key] = _unpacked(blob)
        return found

    # --- parts and failures -----------------------------------------------------------------------------------------

    def put_part(self, task: str, part: PartRow) -> None:
        """Keep one batch of a trial that is under way; ``task`` is a hash of the cells it will make."""
        self._connection.execute(
            "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, NULL)",
            (task, part.start, part.stop, part.seconds, pack(part.values)),
        )

    def parts(self, task: str) -> list[PartRow]:
        """Return the batches of a trial that follow each other without a gap from the first image on."""
        found: list[PartRow] = []
        for _, start, stop, seconds, data in self._sound("parts", "WHERE task = ? ORDER BY start", [task]):
            if start != (found[-1].stop if found else 0):
                break
            found.append(PartRow(start, stop, seconds, _unpacked(data)))
        return found

    def drop_parts(self, task: str) -> None:
        """Forget the batches of a trial, whose cells are there by now."""
        self._connection.execute("DELETE FROM parts WHERE task = ?", (task,))

    def put_failure(self, failure: FailureRow) -> None:
        """Remember what could not be measured."""
        self._connection.execute(
            "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?, NULL)", tuple(vars(failure).values())
        )

    def drop_failures(self, model: str, reset: str | None = None, trial: int | None = None) -> None:
        """Forget failures, to try again or because it worked."""
        self._connection.execute(
            "DELETE FROM failures WHERE model = ? AND reset = coalesce(?, reset) AND trial = coalesce(?, trial)",
            (model, reset, trial),
        )

    def failures(self) -> list[FailureRow]:
        """Return what could not be measured, in the order of the study."""
        position = {row.model: place for place, row in enumerate(self.models())}
        found = [FailureRow(*row) for row in self._sound("failures") if row[0] in position]
        return sorted(found, key=lambda row: (position[row.model], row.reset, row.trial))

    # --- damage -----------------------------------------------------------------------------------------------------

    def is_sound(self) -> bool:
        """Return whether SQLite finds nothing wrong with the file, and all rows are as they were written.

        Raises:
            StudyError: SQLite cannot even look.
        """
        if self._rows("PRAGMA integrity_check(1)") != [("ok",)]:
            return False
        for table in COLUMNS:
            deque(self._sound(table), maxlen=0)
        return not self.damaged

    def schema(self) -> set[tuple[str, ...]]:
        """Return what the file says of its tables, indexes and triggers, of which new rows get their checksums."""
        return set(self._rows("SELECT type, name, tbl_name, sql FROM sqlite_master"))

    def drop_damaged(self) -> None:
        """Delete all damaged rows, so that what was in them is measured anew; `damaged` says which they were."""
        with self._explained():
            self._connection.execute("REINDEX")
        for table in COLUMNS:
            if table == "plan":  # which has no row numbers, and of which a run makes the rest again
                if len(list(self._sound("plan"))) < self._rows("SELECT count(*) FROM plan NOT INDEXED")[0][0]:
                    self._connection.execute("DELETE FROM plan")
                continue
            kept = {row[0] for row in self._sound(table, more=("rowid",))}
            numbers = {number for (number,) in self._rows(f"SELECT rowid FROM {table}")}  # noqa: S608
            self._connection.executemany(
                f"DELETE FROM {table} WHERE rowid = ?",  # noqa: S608
                [(number,) for number in numbers - kept],
            )

    def take_rows(self, table: str, rows: Iterable[tuple[Any, ...]]) -> int:
        """Add the sound ones of a damaged file's rows, and return how many there are; `damaged` says which are not.

        Args:
            table: its name.
            rows: (number of the run or None, the columns `COLUMNS`, the checksum) of each.
        """
        columns = COLUMNS[table]
        named = [*(["run"] if table in ("cells", "runs") else []), *columns]
        query = f"INSERT OR IGNORE INTO {table} ({', '.join(named)}) VALUES ({', '.join('?' * len(named))})"  # noqa: S608
        n_sound = 0
        with self.transaction():
            for row in rows:
                if is_sound(table, row[1:-1], row[-1]):
                    self._connection.execute(query, row[len(columns) + 1 - len(named) : -1])
                    n_sound += 1
                else:
                    self.damaged[self._in_words(table, dict(zip(columns, row[1:-1], strict=True)))] = None
        return n_sound

    def miss_cells(self, keys: Iterable[str]) -> None:
        """Say under `damaged` which planned cells are not there, of those that a damaged file once had."""
        planned = {row.key for row in self.plan()}
        for key in sorted(planned.intersection(keys) - self.known(planned)):
            self.damaged[self._in_words("cells", {"key": key})] = None

    def _sound(
        self, table: str, which: str = "", values: Sequence[object] = (), *, more: Sequence[str] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a table that are as they were written: ``more`` columns, and those of `COLUMNS`.

        What is damaged is remembered under `damaged`.
        """
        columns = COLUMNS[table]
        query = f"SELECT {', '.join([*more, *columns])}, checksum FROM {table} {which}"  # noqa: S608
        with self._explained():
            for *row, known in self._connection.execute(query, values):
                if is_sound(table, row[len(more) :], known):
                    yield tuple(row)
                else:
                    self.damaged[self._in_words(table, dict(zip(columns, row[len(more) :], strict=True)))] = None

    def _in_words(self, table: str, row: Mapping[str, Any]) -> str:
        """Say what a damaged row is about, as far as it can be told."""
        if table == "cells":
            with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
                found = self._connection.execute(
                    "SELECT model, layer, reset, trial FROM plan WHERE key = ?", (row["key"],)
                )
                for model, layer, reset, trial in found:
                    return f"the cell of {model}, {layer}, {reset}, trial {trial}"
        names = [name for name in ("name", "model", "layer", "reset", "trial", "task", "start", "started", "key")
                 if name in row]  # fmt: skip
        return f"a row of the table {table} ({', '.join(f'{name} {str(row[name])[:40]}' for name in names[:4])})"


def _unpacked(data: bytes) -> dict[str, npt.NDArray[np.float32]]:
    try:
        return unpack(data)
    except ValueError as error:
        raise StudyError(
            f"Per-image values in the study's file are damaged ({error}). Restore {FILE}, or start over in another "
            "folder."
        ) from error


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(number: float) -> float | None:
    """Return a number as JSON can hold it; None stands for NaN."""
    return float(number) if math.isfinite(number) else None
