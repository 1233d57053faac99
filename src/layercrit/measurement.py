"""The result of measuring one model: cells, layers, summary, picture, files."""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.distances import DISTANCES
from layercrit.errors import LayercritError
from layercrit.statistics import Estimate, estimate, estimate_mean_over_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MATCHED", "Measurement"]

MATCHED = "cosine_matched"  # the cosine distance of temperature-matched predictions
_PER_IMAGE = "_per_image"
_FORMAT = 1  # of the files; raised when their layout changes


@dataclass(frozen=True, eq=False)
class Measurement:
    """How far one model's predictions move when each of its layers is reset.

    Attributes:
        cells: one row per (layer, trial), layers in depth order: what was reset, under which seed, ``status``, and the
            mean over images of every distance. ``cosine`` is the criticality of that cell.
        per_image: distance name -> values ``(n_layers, n_trials, n_images)``, float32; NaN in cells that are not ok.
        record: everything else worth keeping, as plain data: the resolved protocol, model, probe set, versions,
            device, the road taken, the chance level and the temperature.
    """

    cells: pd.DataFrame
    per_image: Mapping[str, npt.NDArray[np.float32]]
    record: Mapping[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per layer, in depth order.

        ``criticality`` is 1 minus the mean cosine similarity of softmax outputs, in [0, 1], and ``low`` and ``high``
        are the limits of its interval, which holds for new trials and new images (NaN where that cannot be known).
        ``criticality_matched`` is the same at the model's matched temperature. ``status`` is ``ok``, or says which
        share of the trials was left out and why.
        """
        rows = []
        n_trials = self.cells["trial"].nunique()
        for index, (name, cells) in enumerate(self.cells.groupby("layer", sort=False)):
            ok = (cells["status"] == "ok").to_numpy()
            row: dict[str, Any] = {
                "layer": name,
                **{column: cells[column].iloc[0] for column in ("type", "depth", "n_parameters", "flops_after")},
            }
            matched = self._estimate(MATCHED, index, ok)
            critical = self._estimate("cosine", index, ok)
            row |= {
                "criticality": critical.mean,
                "low": critical.low,
                "high": critical.high,
                "sd_trials": critical.sd_trials,
                "criticality_matched": matched.mean,
                "matched_low": matched.low,
                "matched_high": matched.high,
            }
            for column in self._mean_columns():
                row[column] = cells.loc[ok, column].mean()
            if "top1" in row:
                row["top1_agreement"] = 1 - row.pop("top1")
            row["n_trials"] = int(ok.sum())
            row["status"] = _status(cells["status"].to_list(), n_trials)
            rows.append(row)
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """Return the model's mean criticality with its interval, and what is needed to read it, as plain data.

        ``criticality`` and ``criticality_matched`` are means over the layers whose cells are all ok. ``chance`` is the
        mean cosine between predictions of different images: an unrelated prediction has criticality ``1 - chance``.
        """
        whole = self._whole_layers()
        result: dict[str, Any] = {"model": self.record["model"]["reference"]}
        for key, distance in (("criticality", "cosine"), ("criticality_matched", MATCHED)):
            values = self.per_image[distance][whole]
            mean = estimate_mean_over_layers(values, **self._how()) if len(values) else None
            result[key] = (
                None if mean is None else {"mean": mean.mean, "low": _plain(mean.low), "high": _plain(mean.high)}
            )
        counts = self.cells["status"].value_counts()
        return {
            **result,
            "level": self.record["protocol"]["level"],
            "covers": mean.covers if mean is not None else "nothing",
            **{key: self.record["predictions"].get(key) for key in ("chance", "temperature", "top1_accuracy")},
            "n_layers": int(self.cells["layer"].nunique()),
            "n_layers_in_mean": len(whole),
            "n_trials": int(self.cells["trial"].nunique()),
            "n_images": self.record["probe_set"]["n_images"],
            "cells": {status: int(n) for status, n in counts.items()},
            "road": self.record["road"],
            "dtype": self.record["dtype"],
            "notes": list(self.record["notes"]),
        }

    def plot(self) -> "Figure":
        """Return the bar picture of criticality in depth order."""
        from layercrit.figures import criticality_bars

        summary = self.summary()
        return criticality_bars(
            self.to_pandas(),
            title=summary["model"],
            mean=summary["criticality"]["mean"] if summary["criticality"] else None,
            chance=summary["chance"],
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``cells.parquet``, ``layers.csv``, ``measurement.json`` and the picture into a folder.

        Each file is written beside its place and then moved there, so that a reader never meets half a file.

        Raises:
            LayercritError: the folder cannot be written, for instance because the disk is full.
        """
        from layercrit.figures import save_figure

        folder = Path(folder).expanduser()
        cells = self.cells.copy()
        for name, values in self.per_image.items():
            cells[name + _PER_IMAGE] = pd.Series(list(values.reshape(len(cells), -1)))
        record = {"format": _FORMAT, **self.record, "summary": self.summary()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
                new = Path(scratch)
                cells.to_parquet(new / "cells.parquet", index=False, compression="zstd")
                self.to_pandas().to_csv(new / "layers.csv", index=False)
                text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
                (new / "measurement.json").write_text(text + "\n", encoding="utf-8")
                save_figure(self.plot(), new / "criticality")
                for file in sorted(new.iterdir()):
                    file.replace(folder / file.name)
        except OSError as error:
            raise LayercritError(
                f"The measurement cannot be written into {folder}: {error.strerror or error}. "
                "Free some space or name another folder (--out), then save again."
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Measurement":
        """Read a folder that `save` wrote.

        Raises:
            LayercritError: the folder holds no measurement, or a damaged one.
        """
        folder = Path(folder).expanduser()
        if not (folder / "measurement.json").is_file():
            raise LayercritError(
                f"There is no measurement in {folder}: measurement.json is missing. "
                "Give the folder that `layercrit measure --out` wrote."
            )
        try:
            record = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
            cells = pd.read_parquet(folder / "cells.parquet")
            shape = (cells["layer"].nunique(), cells["trial"].nunique(), -1)
            columns = [column for column in cells.columns if column.endswith(_PER_IMAGE)]
            per_image = {
                column.removesuffix(_PER_IMAGE): np.stack(cells[column].to_list()).astype(np.float32).reshape(shape)
                for column in columns
            }
            if record["format"] != _FORMAT:
                raise LayercritError(
                    f"The measurement in {folder} has format {record['format']}; this version reads {_FORMAT}. "
                    "Read it with the version that wrote it (see measurement.json, versions)."
                )
        except (OSError, ValueError, KeyError) as error:
            raise LayercritError(f"The measurement in {folder} cannot be read: {error}. Measure again.") from error
        kept = {key: value for key, value in record.items() if key not in ("format", "summary")}
        return cls(cells.drop(columns=columns), per_image, kept)

    def _estimate(self, distance: str, layer: int, ok: npt.NDArray[np.bool_]) -> Estimate:
        values = self.per_image[distance][layer, ok]
        if not len(values):
            nan = math.nan
            level = self.record["protocol"]["level"]
            return Estimate(nan, nan, nan, level, nan, nan, nan, 0, values.shape[1], "nothing")
        return estimate(values, **self._how())

    def _how(self) -> dict[str, Any]:
        return {"level": self.record["protocol"]["level"], "random_trials": self.record["random_trials"]}

    def _whole_layers(self) -> list[int]:
        groups = self.cells.groupby("layer", sort=False)["status"]
        return [index for index, (_, statuses) in enumerate(groups) if (statuses == "ok").all()]

    def _mean_columns(self) -> list[str]:
        wanted = [*(name for name in DISTANCES if name != "cosine"), "loss", "top1_accuracy", "top5_accuracy"]
        wanted += [name for name in self.per_image if name not in (*wanted, "cosine", MATCHED)]
        return [name for name in [*wanted, "recovered_accuracy"] if name in self.cells.columns]


def _status(statuses: list[str], n_trials: int) -> str:
    bad = [status for status in statuses if status != "ok"]
    if not bad:
        return "ok"
    return ", ".join(f"{status} {bad.count(status)}/{n_trials}" for status in dict.fromkeys(bad))


def _plain(number: float) -> float | None:
    """Return a number that JSON can hold."""
    return number if math.isfinite(number) else None
