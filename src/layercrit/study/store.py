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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import StudyError
from layercrit.study.packing import pack, unpack

__all__ = ["ABOUT_LAYER", "FILE", "CellRow", "FailureRow", "ModelRow", "PartRow", "PlanRow", "Store", "mean_names"]

FILE = "cells.sqlite"
ABOUT_LAYER = ("type", "stage", "depth", "n_parameters", "shape", "flops_after")  # of all its cells
_CELL_COLUMNS = ("model", "layer", *ABOUT_LAYER, "reset", "trial", "seed", "status", "delta_norm", "n_images", "key",
                 "seconds", "finished", "run", "raw")  # fmt: skip
_MAGIC = 0x6C637274  # "lcrt": tells a study's file from other SQLite files

# One step per schema version, applied in order to files that are older. A released step is never edited.
_MIGRATIONS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE models (
        model TEXT PRIMARY KEY, position INTEGER NOT NULL, reference TEXT NOT NULL, category TEXT, label TEXT,
        documented_accuracy REAL, record TEXT
    );
    CREATE TABLE plan (
        model TEXT NOT NULL, layer TEXT NOT NULL, reset TEXT NOT NULL, trial INTEGER NOT NULL, key TEXT NOT NULL,
        type TEXT, stage TEXT, depth INTEGER NOT NULL, n_parameters INTEGER, flops_after REAL,
        PRIMARY KEY (model, reset, trial, layer)
    ) WITHOUT ROWID;
    CREATE INDEX plan_by_key ON plan (key);
    CREATE TABLE runs (run INTEGER PRIMARY KEY, started TEXT NOT NULL, record TEXT NOT NULL);
    CREATE TABLE cells (
        key TEXT PRIMARY KEY, status TEXT NOT NULL, seed TEXT, delta_norm REAL, n_images INTEGER, means TEXT NOT NULL,
        per_image BLOB, raw TEXT, seconds REAL, finished TEXT, run INTEGER REFERENCES runs (run)
    );
    CREATE TABLE parts (
        task TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, seconds REAL NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (task, start)
    );
    CREATE TABLE failures (
        model TEXT NOT NULL, reset TEXT NOT NULL, trial INTEGER NOT NULL, error TEXT NOT NULL, details TEXT NOT NULL,
        at TEXT NOT NULL, PRIMARY KEY (model, reset, trial)
    );
    """,
    """
    ALTER TABLE plan ADD COLUMN shape TEXT;
    ALTER TABLE models ADD COLUMN attack_norm TEXT;
    ALTER TABLE models ADD COLUMN eps REAL;
    """,
    # the backend was called a road
    """
    UPDATE models SET record = json_set(
        json_remove(record, '$.road'), '$.backend',
        CASE json_extract(record, '$.road') WHEN 'graph' THEN 'exported graph' WHEN 'recorded' THEN 'recorded outputs'
            ELSE 'plain' END
    ) WHERE json_extract(record, '$.road') IS NOT NULL;
    """,
)
SCHEMA = len(_MIGRATIONS)


@dataclass(frozen=True)
class ModelRow:
    """One model of a study.

    Attributes:
        model: its name in tables and figures, unique in the study.
        reference: its model reference, or for imported results the words under which they were published.
        category: of its training method, such as those of `layercrit.categories.CATEGORIES`, or None.
        label: its name in figures, or None: its name.
        documented_accuracy: top-1 accuracy as its authors give it, a share in [0, 1], or None.
        record: what is known since it was opened (hash, architecture, number format, predictions, notes), or None.
        attack_norm: norm of the perturbations that it was trained to withstand, such as ``l2`` or ``linf``, or None.
        eps: the largest of them, in the units in which its authors give it, or None.
    """

    model: str
    reference: str
    category: str | None = None
    label: str | None = None
    documented_accuracy: float | None = None
    record: Mapping[str, Any] | None = None
    attack_norm: str | None = None
    eps: float | None = None


@dataclass(frozen=True)
class PlanRow:
    """One cell that a study is about; columns as in `layercrit.measurement.CELL_COLUMNS`, and its stage and key.

    ``shape`` is that of the layer's largest parameter, such as ``64x3x7x7``.
    """

    model: str
    layer: str
    reset: str
    trial: int
    key: str
    type: str | None
    stage: str | None
    depth: int
    n_parameters: int | None
    flops_after: float | None
    shape: str | None = None


@dataclass(frozen=True)
class CellRow:
    """What was measured in one cell.

    Attributes:
        key: name of its content.
        status: as in `layercrit.measurement.CELL_COLUMNS`.
        seed: of the trial, in [0, 2^64); None where it was not published.
        delta_norm: Euclidean norm of the new minus the trained values; None where it was not published.
        n_images: how many images the means are over.
        means: name of a distance or score -> mean over images; NaN where the cell is not ok.
        per_image: name of a distance or score -> one value an image ``(n_images,)``, float32; None where only means
            were published.
        raw: the published row as it stood, for a lossless export; None for measured cells.
        seconds: the trial's time divided by its layers.
        finished: when, ISO 8601.
    """

    key: str
    status: str
    seed: int | None
    delta_norm: float | None
    n_images: int | None
    means: Mapping[str, float]
    per_image: Mapping[str, npt.NDArray[np.float32]] | None = None
    raw: Mapping[str, Any] | None = None
    seconds: float | None = None
    finished: str | None = None


@dataclass(frozen=True)
class PartRow:
    """A batch of a trial under way: images ``start`` to ``stop``, name -> values ``(n_layers, n_images)``, float32."""

    start: int
    stop: int
    seconds: float
    values: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class FailureRow:
    """What could not be measured: one trial of one reset of one model, and why."""

    model: str
    reset: str
    trial: int
    error: str
    details: str = field(repr=False)
    at: str


class Store:
    """The SQLite file of a study's folder; a context manager that closes it.

    Any number of processes may read while one writes. What is put into it is put inside a `transaction`.

    Raises:
        StudyError: there is none, it is damaged or not a study's, a newer version of layercrit wrote it, or the disk is
            full.
    """

    def __init__(self, folder: str | Path, *, create: bool = False) -> None:
        self.path = Path(folder).expanduser() / FILE
        if not create and not self.path.is_file():
            raise StudyError(
                f"There is no study in {self.path.parent}: {FILE} is missing. Give the folder that `layercrit study "
                "run` or `layercrit import` wrote."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{self.path} cannot be created ({error.strerror}). Name another folder.") from error
        with self._explained():
            # transactions are written out below: the module's own begin them where it guesses
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        (magic,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (n_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if magic != _MAGIC and n_tables:
            raise StudyError(f"{self.path} is an SQLite file, but not that of a layercrit study. Name another folder.")
        if version > SCHEMA:
            raise StudyError(
                f"{self.path} has schema version {version}, but this version of layercrit only knows versions up to "
                f"{SCHEMA}. Install the newer version of layercrit that wrote it."
            )
        if version == SCHEMA:
            return
        # readers go on while a cell is committed
        self._connection.execute("PRAGMA journal_mode = WAL")
        with self.transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()  # another process was faster?
            for step in _MIGRATIONS[version:]:
                for statement in filter(str.strip, step.split(";")):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_MAGIC}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was committed is in it."""
        self._connection.close()

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

    # --- facts about the study --------------------------------------------------------------------------------------

    def put_meta(self, name: str, value: Any) -> None:
        """Remember a fact, any plain data."""
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, _json(value)))

    def meta(self, name: str, default: Any = None) -> Any:
        """Return a fact."""
        with self._explained():
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def put_run(self, started: str, record: Mapping[str, Any]) -> int:
        """Remember where and with what cells are being measured; return the run's number."""
        with self._explained():
            cursor = self._connection.execute(
                "INSERT INTO runs (started, record) VALUES (?, ?)", (started, _json(record))
            )
        return int(cursor.lastrowid or 0)

    def runs(self) -> list[dict[str, Any]]:
        """Return what `put_run` remembered, in order."""
        rows = self._rows("SELECT run, started, record FROM runs ORDER BY run")
        return [{"run": run, "started": started, **json.loads(record)} for run, started, record in rows]

    # --- models and plan --------------------------------------------------------------------------------------------

    def put_models(self, models: Sequence[ModelRow]) -> None:
        """Replace the list of models; what was known and planned of one by the same name and reference is kept."""
        known = {(row.model, row.reference): row.record for row in self.models()}
        for name, _ in known.keys() - {(row.model, row.reference) for row in models}:
            self._connection.execute("DELETE FROM plan WHERE model = ?", (name,))
            self._connection.execute("DELETE FROM failures WHERE model = ?", (name,))
        self._connection.execute("DELETE FROM models")
        self._connection.executemany(
            "INSERT INTO models (model, position, reference, category, label, documented_accuracy, attack_norm, eps, "
            "record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        names = [name for name in ModelRow.__dataclass_fields__ if name != "record"]
        rows = self._rows(f"SELECT record, {', '.join(names)} FROM models ORDER BY position")  # noqa: S608
        return [
            ModelRow(**dict(zip(names, values, strict=True)), record=None if record is None else json.loads(record))
            for record, *values in rows
        ]

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
        columns = ", ".join(PlanRow.__dataclass_fields__)
        return [PlanRow(*row) for row in self._rows(f"SELECT {columns} FROM plan ORDER BY model, reset, trial, depth")]  # noqa: S608

    # --- cells ------------------------------------------------------------------------------------------------------

    def put_cells(self, cells: Iterable[CellRow], run: int | None = None) -> None:
        """Add finished cells; one that is there already is left as it is."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        with self._explained():
            self._connection.execute("ATTACH DATABASE ? AS other", (str(other.path),))
        try:
            with self.transaction():
                (offset,) = self._connection.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone()
                self._connection.execute("INSERT INTO runs SELECT run + ?, started, record FROM other.runs", (offset,))
                self._connection.execute(
                    "INSERT OR IGNORE INTO cells SELECT key, status, seed, delta_norm, n_images, means, per_image, "
                    "raw, seconds, finished, run + ? FROM other.cells",
                    (offset,),
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
            found.update(key for (key,) in self._rows(f"SELECT key FROM cells WHERE key IN ({marks})", some))  # noqa: S608
        return found

    def cells(self) -> pd.DataFrame:
        """Return the planned cells that are measured, one row each, in the order of models, resets, depth and trials.

        Columns are those of `PlanRow`, of `CellRow` without ``per_image``, and one for each mean.
        """
        columns = ", ".join(_CELL_COLUMNS)
        rows = self._rows(
            f"SELECT {columns}, means FROM plan JOIN models USING (model) JOIN cells USING (key) "  # noqa: S608
            "ORDER BY position, reset, depth, trial"
        )
        table = pd.DataFrame(rows, columns=[*_CELL_COLUMNS, "means"])
        means = pd.DataFrame([json.loads(text) for text in table.pop("means")], index=table.index, dtype=np.float64)
        # from the rows: where only some are None, the table has NaN in their place
        seeds, raws = ([row[_CELL_COLUMNS.index(name)] for row in rows] for name in ("seed", "raw"))
        table["seed"] = pd.array([None if seed is None else int(seed) for seed in seeds], dtype="UInt64")
        table["raw"] = pd.Series([None if raw is None else json.loads(raw) for raw in raws], dtype=object)
        return pd.concat([table.drop(columns="raw"), means, table[["raw"]]], axis=1)

    def keys_with_images(self) -> set[str]:
        """Return the keys of all cells for which per-image values were kept."""
        return {key for (key,) in self._rows("SELECT key FROM cells WHERE per_image IS NOT NULL")}

    def per_image(self, keys: Sequence[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
        """Return key -> name of a distance or score -> one value an image, for those cells that have any."""
        found = {}
        for key in keys:
            for (blob,) in self._rows("SELECT per_image FROM cells WHERE key = ?", [key]):
                if blob is not None:
                    found[key] = _unpacked(blob)
        return found

    # --- parts and failures -----------------------------------------------------------------------------------------

    def put_part(self, task: str, part: PartRow) -> None:
        """Keep one batch of a trial that is under way; ``task`` is a hash of the cells it will make."""
        self._connection.execute(
            "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?)",
            (task, part.start, part.stop, part.seconds, pack(part.values)),
        )

    def parts(self, task: str) -> list[PartRow]:
        """Return the batches of a trial that follow each other without a gap from the first image on."""
        rows = self._rows("SELECT start, stop, seconds, data FROM parts WHERE task = ? ORDER BY start", [task])
        found: list[PartRow] = []
        for start, stop, seconds, data in rows:
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
            "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?)", tuple(vars(failure).values())
        )

    def drop_failures(self, model: str, reset: str | None = None, trial: int | None = None) -> None:
        """Forget failures, to try again or because it worked."""
        self._connection.execute(
            "DELETE FROM failures WHERE model = ? AND reset = coalesce(?, reset) AND trial = coalesce(?, trial)",
            (model, reset, trial),
        )

    def failures(self) -> list[FailureRow]:
        """Return what could not be measured, in the order of the study."""
        return [
            FailureRow(*row)
            for row in self._rows(
                "SELECT failures.model, reset, trial, error, details, at FROM failures JOIN models USING (model) "
                "ORDER BY position, reset, trial"
            )
        ]

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._explained():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StudyError(
                f"{self.path} cannot be used ({error}). If the disk is full, free some space; if the file is damaged, "
                "restore it or start over in another folder."
            ) from error


def mean_names(cells: pd.DataFrame) -> list[str]:
    """Return which columns of a table from `Store.cells` are means over images."""
    return [name for name in cells.columns if name not in _CELL_COLUMNS]


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
