"""A study in several stores: each shard of a run writes its own, and who reads the study reads all of them.

A shard's store is in ``shards/NUMBER`` of the study's folder, that of a run without shards in the folder itself. No two
processes write one store, and those of shards are not in write-ahead mode, so that other machines can read them over a
network.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import StudyError
from layercrit.locks import holder
from layercrit.study.cell_table import cells_table
from layercrit.study.rows import FailureRow, ModelRow, PlanRow
from layercrit.study.store import FILE, Store

__all__ = [
    "Elsewhere",
    "Shards",
    "StoredStudy",
    "holders",
    "is_other_format",
    "is_study",
    "open_study",
    "shard_folder",
    "store_folders",
]

_SHARDS = "shards"
_RUNS_OF_A_STORE = 1_000_000  # the runs of shard 3 are numbered from 3,000,001
_IDENTITY = {"sha256": "weights", "probe_set": "images", "dtype": "number formats"}


def shard_folder(folder: Path, number: int) -> Path:
    """Return the folder of a shard, of those numbered from 1; 0: the study's own."""
    return folder / _SHARDS / f"{number:04d}" if number else folder


def store_folders(folder: Path) -> dict[int, Path]:
    """Return number -> folder of the stores of a study; 0 is the study's own."""
    found = {0: folder} if (folder / FILE).is_file() else {}
    shards = sorted((folder / _SHARDS).glob("[0-9]*/")) if (folder / _SHARDS).is_dir() else []
    return found | {int(path.name): path for path in shards if path.name.isdigit() and (path / FILE).is_file()}


def is_study(folder: Path) -> bool:
    """Return whether a folder contains a study, in one store or several."""
    return bool(store_folders(folder))


def holders(folder: Path) -> dict[int, str]:
    """Return number of the shard -> which process runs it, of those that are being run; 0: without shards."""
    begun = (folder / _SHARDS).glob("[0-9]*/.lock")  # before there is a store
    numbers = {0, *(int(lock.parent.name) for lock in begun if lock.parent.name.isdigit())}
    return {n: who for n in sorted(numbers) if (who := holder(shard_folder(folder, n))) is not None}


def is_other_format(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two records are about the same model and images in different number formats."""
    same = all(one.get(name) == other.get(name) for name in ("sha256", "probe_set", "asked_dtype"))
    return same and one.get("dtype") != other.get("dtype")


def open_study(folder: str | Path) -> "StoredStudy":
    """Open the stores of a study to read them.

    Raises:
        StudyError: there are none, or one cannot be read.
    """
    folder = Path(folder).expanduser()
    found = store_folders(folder)
    return Store(folder) if set(found) <= {0} else Shards(folder)


class Shards:
    """The stores of a study, read as one; a context manager that closes them.

    Stores of earlier runs, under other settings or on other images, count only for the cells that are the same.

    Args:
        folder: of the study.
        without: number of a shard to leave out.
        measured: what the study is about, of its record; None: what the newest store is about.

    Attributes:
        folder: of the study.

    Raises:
        StudyError: a store cannot be read.
    """

    def __init__(self, folder: Path, *, without: int | None = None, measured: Mapping[str, Any] | None = None) -> None:
        self.folder, self._measured = folder, measured
        self._close = contextlib.ExitStack()
        self._stores: dict[int, Store] = {}
        _allow_open_files()
        with contextlib.ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            for number, path in store_folders(folder).items():
                if number != without:
                    self._stores[number] = self._close.enter_context(Store(path, read_only=number > 0))
            unless_opened.pop_all()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the stores."""
        self._close.close()

    @property
    def damaged(self) -> dict[str, None]:
        """Which damaged rows were met so far, in words; used as a set with an order."""
        own = {n: store.damaged for n, store in self._stores.items()}
        return {f"{row}{f' (shard {n})' if n else ''}": None for n, damaged in own.items() for row in damaged}

    # --- which stores count -----------------------------------------------------------------------------------------

    @cached_property
    def _begun(self) -> dict[int, datetime]:
        """When the last run of each store began."""
        runs = {n: store.runs() for n, store in self._stores.items()}
        return {n: datetime.fromisoformat(of_store[-1]["started"]) for n, of_store in runs.items() if of_store}

    @cached_property
    def _current(self) -> dict[int, Store]:
        """The stores that are about what the newest is about, the newest first."""
        newest_first = sorted(self._begun, key=lambda n: self._begun[n], reverse=True)
        about = {n: self._stores[n].meta("study", {}).get("measured") for n in newest_first}
        wanted = about.get(newest_first[0] if newest_first else 0) if self._measured is None else self._measured
        return {n: self._stores[n] for n in newest_first if about[n] == wanted}

    @cached_property
    def _records(self) -> dict[str, dict[int, Mapping[str, Any]]]:
        """Model -> number of a current store -> what it knows of the model."""
        found: dict[str, dict[int, Mapping[str, Any]]] = {}
        for n, store in self._current.items():
            for row in store.models():
                if row.record is not None:
                    found.setdefault(row.model, {})[n] = row.record
        return found

    def _content(self, model: str, reset: str) -> str | None:
        """Return the hash of what is measured of a model and reset, as the newest store that knows it says."""
        contents = (record.get("content", {}).get(reset) for record in self._records.get(model, {}).values())
        return next((content for content in contents if content is not None), None)

    def _counts(self, n: int, model: str, reset: str) -> bool:
        """Return whether a current store is about the same weights, images and settings as the newest that knows."""
        record = self._records.get(model, {}).get(n, {})
        return bool(record.get("content", {}).get(reset) == self._content(model, reset))

    @property
    def conflicts(self) -> list[str]:
        """Where stores are about different weights, images or number formats of one model, in words."""
        found = []
        for model, records in self._records.items():
            (first, newest), *others = records.items()
            for n, record in others:
                unlike = [words for name, words in _IDENTITY.items() if record.get(name) != newest.get(name)]
                if unlike:
                    found.append(
                        f"{model}: shards {first} and {n} have different {' and '.join(unlike)}; what shard {n} "
                        "measured of it is left out. Run it again once all machines see the same files and have the "
                        "same kind of processor (or name the number format: dtype under [protocol])"
                    )
        return found

    # --- what a `Store` has, too ------------------------------------------------------------------------------------

    def meta(self, name: str, default: Any = None) -> Any:
        """Return a fact, as the newest store has it; plans of precision are those of all."""
        found = [value for store in self._current.values() if (value := store.meta(name)) is not None]
        if name == "precision" and found:
            plans = {(model, reset): plan for value in reversed(found) for model, reset, plan in value}
            return [[*key, plan] for key, plan in plans.items()]
        return next(iter(found), default)

    def runs(self) -> list[dict[str, Any]]:
        """Return when and with what cells were measured, in order of time."""
        found = [
            {**run, "run": _RUNS_OF_A_STORE * n + run["run"]}
            for n, store in self._stores.items()
            for run in store.runs()
        ]
        return sorted(found, key=lambda run: datetime.fromisoformat(run["started"]))

    def models(self) -> list[ModelRow]:
        """Return the models as the newest store lists them, with what all know of them."""
        newest = next(iter(self._current.values()), None)
        return [
            replace(row, record=self._joined(row.model)) if row.model in self._records else row
            for row in (newest.models() if newest else [])
        ]

    def _joined(self, model: str) -> dict[str, Any]:
        records = self._records[model]
        joined = dict(next(iter(records.values())))
        for of_resets in ("content", "donor", "random_trials"):
            joined[of_resets] = {
                reset: value
                for n in reversed(records)
                for reset, value in records[n][of_resets].items()
                if self._counts(n, model, reset)
            }
        joined["notes"] = list(dict.fromkeys(note for record in records.values() for note in record["notes"]))
        return joined

    def plan(self) -> list[PlanRow]:
        """Return the planned cells, by model, reset, trial and depth."""
        found: dict[tuple[str, str, int, str], PlanRow] = {}
        for n, store in self._current.items():
            for row in store.plan():
                if self._counts(n, row.model, row.reset):
                    found.setdefault((row.model, row.reset, row.trial, row.layer), row)
        return sorted(found.values(), key=lambda row: (row.model, row.reset, row.trial, row.depth))

    def cells(self) -> pd.DataFrame:
        """Return the table of planned cells that are measured; see `Store.cells`."""
        plan = self.plan()
        keys = {row.key for row in plan}
        measured: dict[str, dict[str, Any]] = {}
        for n, store in self._stores.items():
            for key, cell in store.measured(keys).items():
                run = cell["run"] and _RUNS_OF_A_STORE * n + cell["run"]
                measured.setdefault(key, {**cell, "run": run})
        return cells_table(self.models(), plan, measured)

    def known(self, keys: Iterable[str]) -> set[str]:
        """Return those of some keys whose cells are measured."""
        wanted = set(keys)
        return {key for store in self._stores.values() for key in store.known(wanted)}

    def n_cells(self) -> int:
        """Return how many cells are measured, planned or not."""
        return len(self.where)

    @cached_property
    def where(self) -> dict[str, int]:
        """Key of a cell -> number of the first store that has it."""
        return {key: n for n, store in reversed(self._stores.items()) for key in store.keys()}  # noqa: SIM118

    def keys_with_images(self) -> set[str]:
        """Return the keys of all cells for which per-image values were kept."""
        return {key for store in self._stores.values() for key in store.keys_with_images()}

    def per_image(self, keys: Sequence[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
        """Return key -> name of a distance or score -> one value an image; see `Store.per_image`.

        Raises:
            StudyError: a cell is not found.
        """
        found: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
        for key in keys:
            if key not in self.where:
                raise StudyError(f"No store in {self.folder} has the cell {key[:8]}: it was there before. Try again.")
            found |= self._stores[self.where[key]].per_image([key])
        return found

    def failures(self) -> list[FailureRow]:
        """Return what could not be measured and was neither measured nor tried again later."""
        retried: dict[tuple[str, str, int], datetime] = {}
        for store in self._current.values():
            for at, trials in store.meta("retried", []):
                for model, reset, trial in trials:
                    where, when = (model, reset, trial), datetime.fromisoformat(at)
                    retried[where] = max(when, retried.get(where, when))
        by_place: dict[tuple[str, str, int], set[str]] = {}
        for cell in self.plan():
            by_place.setdefault((cell.model, cell.reset, cell.trial), set()).add(cell.key)
        found: dict[tuple[str, str, int], FailureRow] = {}
        for store in self._current.values():
            for row in store.failures():
                where = (row.model, row.reset, row.trial)
                measured = where in by_place and by_place[where] <= self.where.keys()
                if not measured and (where not in retried or datetime.fromisoformat(row.at) >= retried[where]):
                    found.setdefault(where, row)
        position = {row.model: place for place, row in enumerate(self.models())}
        return sorted(
            (row for row in found.values() if row.model in position),
            key=lambda row: (position[row.model], row.reset, row.trial),
        )

    def first_records(self) -> dict[tuple[str, str], tuple[int, Mapping[str, Any]]]:
        """Return model and reference -> number of the first current store that knows the model, and what it knows."""
        found: dict[tuple[str, str], tuple[int, Mapping[str, Any]]] = {}
        for n in sorted(self._current):
            for row in self._current[n].models():
                if row.record is not None:
                    found.setdefault((row.model, row.reference), (n, row.record))
        return found

    def stores(self) -> Iterator[tuple[int, Store]]:
        """Yield number and store of each."""
        yield from self._stores.items()


def _allow_open_files() -> None:
    """Let this process open as many files as the system allows: each store is one, and often 1,024 are the limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # there is no such thing on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


StoredStudy: TypeAlias = Store | Shards
"""A study to be read: its only store, or all of them."""


@dataclass(frozen=True)
class Elsewhere:
    """What the other stores of a study held when a run began.

    Attributes:
        folder: of the study.
        where: key of a cell -> number of the store that has it.
        records: model and reference -> what is known of the model.
        failures: what could not be measured, and was not tried again since.
        first: model and reference -> number of the first store that knows the model, and what that knows.
    """

    folder: Path
    where: Mapping[str, int] = field(default_factory=dict)
    records: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    failures: tuple[FailureRow, ...] = ()
    first: Mapping[tuple[str, str], tuple[int, Mapping[str, Any]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, without: int, measured: Mapping[str, Any]) -> "Elsewhere":
        """Read the other stores than number ``without``, for a study that is about what ``measured`` says."""
        if not store_folders(folder).keys() - {without}:
            return cls(folder)
        with Shards(folder, without=without, measured=measured) as shards:
            records = {(row.model, row.reference): row.record for row in shards.models() if row.record is not None}
            return cls(folder, shards.where, records, tuple(shards.failures()), shards.first_records())

    def known(self, keys: Set[str]) -> set[str]:
        """Return those of some keys whose cells are measured and undamaged."""
        by_store: dict[int, list[str]] = {}
        for key in keys & self.where.keys():
            by_store.setdefault(self.where[key], []).append(key)
        found: set[str] = set()
        for number, of_store in by_store.items():
            with Store(shard_folder(self.folder, number), read_only=number > 0) as store:
                found |= store.known(of_store)
        return found
