"""Many models measured under one protocol: the tables of a study's folder."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import StudyError, near
from layercrit.statistics import Estimate, estimate
from layercrit.store import FailureRow, Store

if TYPE_CHECKING:
    from layercrit.comparison import Comparison

__all__ = ["Study", "load_study"]

_MATCHED = "cosine_matched"
_ABOUT_LAYER = ("type", "stage", "depth", "n_parameters", "flops_after")
_NO_MEANS = {*_ABOUT_LAYER, "model", "layer", "reset", "trial", "seed", "status", "delta_norm", "n_images", "key",
             "seconds", "finished", "run", "raw"}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Study:
    """Many models, each with the criticality of each of its layers.

    Attributes:
        folder: where it lies.
        models: one row per model in the order of the study: ``model`` (its name), ``reference``, ``category``,
            ``label``, ``documented_accuracy`` (top-1 as its authors give it, a share in [0, 1]), and, where it was
            opened, ``top1_accuracy`` (top-1 on the probe set), ``chance``, ``temperature``, ``dtype`` and ``sha256``.
        cells: one row per measured cell, in the order of models, resets, depth and trials; the columns are those of
            `layercrit.measurement.CELL_COLUMNS` with the model's name under ``model``, and ``stage``.
        failures: what could not be measured, and why.
        n_planned: how many cells the study is about, as far as its models were opened.
        record: everything else worth keeping, as plain data: name, protocol, probe set, baseline, origin.
        runs: when, where and with which versions cells were measured.
    """

    folder: Path
    models: pd.DataFrame
    cells: pd.DataFrame
    failures: tuple[FailureRow, ...]
    n_planned: int
    record: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]

    @property
    def resets(self) -> list[str]:
        """The resets of the study."""
        return list(dict.fromkeys(self.cells["reset"]))

    def label(self, model: str) -> str:
        """Return what figures call a model."""
        return str(self.models.set_index("model")["label"][model])

    def of_reset(self, reset: str | None = None) -> pd.DataFrame:
        """Return the cells of one reset that are ok.

        Args:
            reset: its name; None for the study's only or first one.

        Raises:
            StudyError: the study has no such reset, or no cell that is ok.
        """
        if reset is not None and reset not in self.resets:
            raise StudyError(f"The study in {self.folder} has no reset {reset!r}. {near(reset, self.resets)}")
        wanted = reset or next(iter(self.resets), None)
        cells = self.cells[(self.cells["reset"] == wanted) & (self.cells["status"] == "ok")]
        if cells.empty:
            raise StudyError(
                f"The study in {self.folder} holds no finished cell. Run it with `layercrit study run`, or look at "
                "`layercrit study status`."
            )
        return cells

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per (model, reset, layer), in the order of the study and of depth.

        ``criticality`` is 1 minus the mean cosine similarity of softmax outputs, in [0, 1]. ``low`` and ``high`` limit
        its interval at the study's level, which holds for what ``covers`` says: new trials and new images where
        per-image distances were kept, new trials on the same images where only means are known (imported results).
        ``status`` is ``ok`` or says which share of the trials was left out and why.
        """
        return self._layers.copy()

    def by_model(self) -> pd.DataFrame:
        """Return one row per (model, reset): its mean criticality over layers with its interval, and its accuracies.

        The mean is over the layers all of whose cells are ok, ``n_layers`` of them.
        """
        return self._means.copy()

    def compare(
        self, *, baseline: str | None = None, leave_out: list[str] | None = None, reset: str | None = None
    ) -> "Comparison":
        """Set the models beside each other; see `layercrit.comparison.compare`."""
        from layercrit.comparison import compare

        return compare(self, baseline=baseline, leave_out=leave_out, reset=reset)

    def __repr__(self) -> str:
        return (
            f"<Study {self.record.get('name', self.folder.name)}: {len(self.models)} models, {len(self.cells)} cells>"
        )

    @property
    def _level(self) -> float:
        return float(self.record.get("protocol", {}).get("level", 0.95))

    @cached_property
    def _layers(self) -> pd.DataFrame:
        measured = [name for name in self.cells.columns if name not in _NO_MEANS]
        rows = []
        for group, cells in _groups(self.cells, ["model", "reset", "layer"]):
            ok = cells[cells["status"] == "ok"]
            per_image = self._per_image(ok)
            critical, matched = (self._estimate(ok, per_image, name) for name in ("cosine", _MATCHED))
            row = {
                **dict(zip(("model", "reset", "layer"), group, strict=True)),
                **{column: cells[column].iloc[0] for column in _ABOUT_LAYER},
                "criticality": np.nan if critical is None else critical.mean,
                "low": np.nan if critical is None else critical.low,
                "high": np.nan if critical is None else critical.high,
                "covers": "nothing" if critical is None else critical.covers,
                "sd_trials": ok["cosine"].std() if len(ok) > 1 else np.nan,
                "criticality_matched": np.nan if matched is None else matched.mean,
                "matched_low": np.nan if matched is None else matched.low,
                "matched_high": np.nan if matched is None else matched.high,
            }
            means = ok[[name for name in measured if name not in ("cosine", _MATCHED)]].mean()
            row |= means.to_dict()
            if "top1" in row:
                row["top1_agreement"] = 1 - row.pop("top1")
            rows.append({**row, "n_trials": len(ok), "n_images": cells["n_images"].max(), "status": _status(cells)})
        return pd.DataFrame(rows)

    @cached_property
    def _means(self) -> pd.DataFrame:
        rows = []
        for (model, reset), cells in _groups(self.cells, ["model", "reset"]):
            whole = cells.groupby("layer")["status"].transform(lambda of_layer: (of_layer == "ok").all())
            cells = cells[whole]
            critical, matched = (self._mean_over_layers(cells, name) for name in ("cosine", _MATCHED))
            rows.append(
                {
                    "model": model,
                    "reset": reset,
                    "criticality": np.nan if critical is None else critical.mean,
                    "low": np.nan if critical is None else critical.low,
                    "high": np.nan if critical is None else critical.high,
                    "covers": "nothing" if critical is None else critical.covers,
                    "criticality_matched": np.nan if matched is None else matched.mean,
                    "n_layers": cells["layer"].nunique(),
                    "n_trials": cells["trial"].nunique(),
                }
            )
        means = pd.DataFrame(rows, columns=list(rows[0]) if rows else ["model"])
        return self.models.drop(columns="record").merge(means, on="model", how="left")

    def _per_image(self, cells: pd.DataFrame) -> list[dict[str, npt.NDArray[np.float32]]]:
        """Return the per-image values of some cells, in their order; empty unless all of them have any."""
        if cells["raw"].notna().any():
            return []
        with Store(self.folder) as store:
            found = store.per_image(cells["key"].to_list())
        return list(found.values()) if len(found) == len(cells) else []

    def _estimate(
        self, cells: pd.DataFrame, per_image: list[dict[str, npt.NDArray[np.float32]]], name: str
    ) -> Estimate | None:
        if per_image:
            values = np.stack([of_cell[name] for of_cell in per_image])  # (n_trials, n_images)
        elif name in cells and len(cells):
            values = cells[[name]].to_numpy(dtype=np.float64)  # (n_trials, 1)
        else:
            return None
        return self._estimated(cells, values)

    def _mean_over_layers(self, cells: pd.DataFrame, name: str) -> Estimate | None:
        if name not in cells or cells.empty:
            return None
        trials = []
        for _, of_trial in _groups(cells, ["trial"]):
            per_image = self._per_image(of_trial)
            if per_image:
                trials.append(np.mean([of_cell[name] for of_cell in per_image], axis=0, dtype=np.float64))
            else:
                trials.append(np.array([of_trial[name].mean()]))
        return self._estimated(cells, np.stack(trials))  # (n_trials, n_images), or (n_trials, 1) of means

    def _estimated(self, cells: pd.DataFrame, values: npt.NDArray[Any]) -> Estimate | None:
        if not np.isfinite(values).all():
            return None
        records = self.models.set_index("model")["record"]
        known = records[cells["model"].iloc[0]].get("random_trials", {})
        return estimate(values, level=self._level, random_trials=known.get(cells["reset"].iloc[0], True))


def load_study(folder: str | Path) -> Study:
    """Read a study's folder, finished or not; it may be running.

    Raises:
        StudyError: the folder holds no study, or a damaged one.
    """
    folder = Path(folder).expanduser()
    with Store(folder) as store:
        return Study(
            folder=folder,
            models=_models_table(store),
            cells=store.cells(),
            failures=tuple(store.failures()),
            n_planned=len(store.plan()),
            record=store.meta("study", {}),
            runs=tuple(store.runs()),
        )


def _models_table(store: Store) -> pd.DataFrame:
    rows = []
    for row in store.models():
        record = row.record or {}
        predictions = record.get("predictions", {})
        rows.append(
            {
                "model": row.model,
                "reference": row.reference,
                "category": row.category,
                "label": row.label or row.model,
                "documented_accuracy": row.documented_accuracy,
                **{name: predictions.get(name) for name in ("top1_accuracy", "chance", "temperature")},
                **{name: record.get(name) for name in ("architecture", "dtype", "sha256")},
                "record": record,
            }
        )
    numbers = ("documented_accuracy", "top1_accuracy", "chance", "temperature")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, "float64"))


def _groups(cells: pd.DataFrame, by: list[str]) -> list[tuple[tuple[Hashable, ...], pd.DataFrame]]:
    """Return the groups of a table in the order in which they first appear."""
    return [(key, group) for key, group in cells.groupby(by, sort=False)]  # type: ignore[misc]


def _status(cells: pd.DataFrame) -> str:
    bad = cells.loc[cells["status"] != "ok", "status"]
    return ", ".join(f"{status} {n}/{len(cells)}" for status, n in bad.value_counts().items()) or "ok"
