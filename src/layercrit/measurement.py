"""The result of measuring one model: cells, layers, summary, figure, files."""

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.cell_columns import CELL_COLUMNS, NOT_REACHED, PER_IMAGE
from layercrit.counts import counted, counted_range
from layercrit.distances import DISTANCES
from layercrit.errors import LayercritError, LayerError, ProtocolError, first_line, near
from layercrit.foreign_text import encodable, write_csv
from layercrit.image_groups import Layers, by_correctness, by_group, by_image, extreme_images
from layercrit.interactions import Pair, interactions_of
from layercrit.intervals import excluded_share
from layercrit.layer_table import estimate_columns, layer_table
from layercrit.layers import layer_labels
from layercrit.measurement_files import FILES, FORMAT, IMAGES, check_together, move_files, read_record
from layercrit.models.sources import short_name
from layercrit.precision import PrecisionPlan, recentred
from layercrit.protocol import MATCHED
from layercrit.shown_images import GroupsOf, ShownImages
from layercrit.statistics import Estimate, estimate, estimate_mean_over_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CELL_COLUMNS", "PER_IMAGE", "Measurement"]


@dataclass(frozen=True, eq=False, repr=False)
class Measurement:
    """How far one model's predictions move when each of its layers is reset.

    Attributes:
        cells: one row per (layer, trial), layers in depth order, with the columns `CELL_COLUMNS` and the mean over
            images of every distance, of which ``cosine`` is the criticality of that cell. Means of cells that are not
            ok are NaN. Columns about labels exist if the images had labels.
        per_image: distance name -> values ``(n_layers, n_trials, n_images)``, float32, images in the order of the probe
            set; NaN in cells that are not ok, and where a layer has fewer trials than others.
        record: everything else worth keeping, as plain data: the resolved protocol, model, probe set, versions,
            device, the backend, the chance level and the temperature.
        images: names of the images, their labels, and what the trained network predicts for each; None in measurements
            that an earlier version of layercrit saved.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> measurement = layercrit.measure("file:layercrit-demo/models/pixmix", images, layers="conv1,fc", n_images=50)
        >>> layercrit.Measurement.load(measurement.save("layercrit-pixmix")).summary()["n_layers"]
        2
    """

    cells: pd.DataFrame
    per_image: Mapping[str, npt.NDArray[np.float32]]
    record: Mapping[str, Any]
    images: ShownImages | None = None

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per layer, in depth order.

        ``criticality`` is 1 minus the mean cosine similarity of softmax outputs, in [0, 1], and ``low`` and ``high``
        are the limits of its interval, which covers new trials and new images (NaN where that cannot be known).
        ``criticality_matched`` is the same at the model's matched temperature. ``status`` is ``ok``, or says what
        share of the trials was left out and why; all other columns are then over the remaining ``n_trials``. Where a
        half-width was asked for, a layer that has a larger one has the status ``not_reached``.
        """
        rows = []
        for index, (layer, cells) in enumerate(self.cells.groupby("layer", sort=False)):
            trials = cells.loc[cells["status"] == "ok", "trial"].to_list()
            found = (self._estimate(distance, index, str(layer), trials) for distance in ("cosine", MATCHED))
            rows.append(estimate_columns(*found))
        estimates = pd.DataFrame(rows, index=self.cells["layer"].drop_duplicates()).drop(columns="covers")
        about = ("type", "depth", "n_parameters", "flops_after")
        table = layer_table(self.cells, estimates, by=["layer"], about=about, means=self._mean_columns())
        reached = [self._reaches(layer, n) for layer, n in zip(table["layer"], table["n_trials"], strict=True)]
        table.loc[(table["status"] == "ok") & ~np.array(reached, bool), "status"] = NOT_REACHED
        return table.drop(columns="n_images")

    def by_class(self, of: GroupsOf = "label") -> pd.DataFrame:
        """Return one row per layer and class: the criticality of the layer for the images of the class.

        ``low`` and ``high`` are the limits of an interval for new trials and new images of the class, at the
        measurement's level; NaN for a class of one image or a single random trial. With the interval ``betting`` they
        hold for new trials on the same images. Each interval is for its layer and class alone: of many, some miss.
        The mean over classes, weighted by ``n_images``, is the layer's criticality.

        Args:
            of: ``"label"``; ``"prediction"``, the class that the trained network predicts, for images without labels,
                too; or the group of each image, ``(n_images,)``, in the order of the probe set: any values.

        Returns:
            a table with the columns ``layer``, ``class`` (its name, or its number as text), ``number`` (among the
            model's outputs), ``n_images``, ``n_trials``, ``criticality``, ``low``, ``high`` and ``covers`` (what may
            be drawn again).

        Raises:
            ProbeError: labels or predictions are not known, or there is not one group for each image.
        """
        return by_group(self._distances(), self._images.groups(of), **self._how())

    def by_correctness(self) -> pd.DataFrame:
        """Return one row per layer: criticality for images that the trained network names right, and wrong.

        Returns:
            a table with the columns ``layer``, ``n_correct``, ``n_wrong``, ``n_trials``, ``correct`` and ``wrong`` (the
            criticality for these images), and ``difference`` (``correct`` minus ``wrong``) with ``low`` and ``high``,
            the limits of Student's interval for new trials and new images.

        Raises:
            ProbeError: labels or predictions are not known.
        """
        how = {name: value for name, value in self._how().items() if name != "interval"}
        return by_correctness(self._distances(), self._images.correct, **how)

    def by_image(self) -> pd.DataFrame:
        """Return one row per layer and image, in the order of the probe set.

        Returns:
            a table with the columns ``layer``, ``position`` (in the probe set), ``image`` (where it was found),
            ``label`` and ``prediction`` (of the trained network), ``correct``, ``criticality`` (mean over trials) and
            ``sd_trials`` (standard deviation over trials). What is not known is missing.
        """
        return by_image(self._distances(), self._images, random_trials=self.record["random_trials"])

    def extreme_images(self, layer: str, k: int = 5) -> pd.DataFrame:
        """Return the images that the reset of a layer moves most and least: rows of `by_image` and ``moved``.

        Args:
            layer: its name.
            k: how many of each; no image is both.

        Raises:
            LayerError: there is no such layer.
            ProtocolError: ``k`` is no positive number, or no trial of the layer is ok.
        """
        if layer not in self.record["layers"]:
            raise LayerError(f"No layer {layer!r} was measured. {near(layer, self.record['layers'])}")
        found = by_image(self._distances([layer]), self._images, random_trials=self.record["random_trials"])
        return extreme_images(found, k)

    @cached_property
    def plan(self) -> PrecisionPlan | None:
        """What was planned after the pilot, where a half-width or a time was asked for."""
        plan = self.record.get("precision")
        return None if plan is None else PrecisionPlan.from_dict(plan)

    def summary(self) -> dict[str, Any]:
        """Return the model's mean criticality with its interval, and what is needed to read it, as plain data.

        ``criticality`` and ``criticality_matched`` are means over the layers whose cells are all ok, the others are
        ``left_out``; None where no layer is left or no temperature matched. Where layers have unlike numbers of trials,
        each counts with the mean over its own, and the interval rests on the ``n_trials_in_mean`` that all have.
        ``chance`` is the mean cosine between predictions of different images: an unrelated prediction has criticality
        ``1 - chance``. ``unreadable`` are the images that were left out because they could not be read, with the
        reasons. ``precision`` is what was asked of half-widths, and the layers that did not reach it.
        ``donor`` says where new values come from, None where the reset makes them of the trained ones.
        ``excluded_share`` is the share of all draws from which on so many trials would have shown unlike ones; see
        `layercrit.intervals.excluded_share`.
        """
        statuses = self.cells.groupby("layer", sort=False)["status"].agg(list)
        whole = [all(status == "ok" for status in of_layer) for of_layer in statuses]
        common = self._common_trials(list(statuses.index[whole]))
        mean, matched = (self._estimate_mean(distance, whole, common) for distance in ("cosine", MATCHED))
        return {
            "model": self.record["model"]["reference"],
            "name": self.name,
            "donor": self.record["model"].get("donor"),
            "criticality": _limits(mean),
            "criticality_matched": _limits(matched),
            "level": self.record["protocol"]["level"],
            "covers": "nothing" if mean is None else mean.covers,
            **{key: self.record["predictions"][key] for key in ("chance", "temperature", "top1_accuracy")},
            "guessing_accuracy": self.record["predictions"].get("guessing_accuracy"),
            "n_layers": len(whole),
            "n_layers_in_mean": sum(whole),
            "left_out": [name for name, counts in zip(statuses.index, whole, strict=True) if not counts],
            "n_trials": int(self.cells["trial"].nunique()),  # of the layer that has the most
            "fewest_trials": int(self.cells.groupby("layer")["trial"].nunique().min()),
            "n_trials_in_mean": len(common),
            "excluded_share": excluded_share(len(common)) if common and self.record["random_trials"] else None,
            "precision": self._precision(),
            "n_images": self.record["probe_set"]["n_images"],
            "unreadable": list(self.record["probe_set"].get("skipped", [])),
            "cells": {str(status): int(n) for status, n in self.cells["status"].value_counts().items()},
            "backend": self.record["backend"],
            "dtype": self.record["dtype"],
            "warnings": list(self.record.get("warnings", [])),
            "notes": list(self.record["notes"]),
        }

    @property
    def name(self) -> str:
        """What tables and figures call the model: the name that it was given, or one made of its reference."""
        return self.record.get("name") or short_name(self.record["model"]["reference"])

    def __repr__(self) -> str:
        summary = self.summary()
        trials = counted_range(summary["fewest_trials"], summary["n_trials"], "trial")
        return (
            f"<Measurement of {summary['model']}: mean criticality {self._mean_in_words(summary)}, "
            f"{counted(summary['n_layers'], 'layer')}, {trials}, "
            f"{counted(summary['n_images'], 'image')}, reset {self.record['protocol']['reset']}>"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: facts, the figure, and the table of layers."""
        from layercrit.notebook_html import Column, result_html

        summary, table = self.summary(), self.to_pandas()
        chance, accuracy = summary["chance"], summary["top1_accuracy"]
        left_out = len(summary["left_out"])
        facts = {
            "model": summary["model"] if summary["model"] != self.name else "",
            "mean criticality": self._mean_in_words(summary),
            "an unrelated prediction would give": "" if chance is None else f"{1 - chance:.3f}",
            "top-1 accuracy": "" if accuracy is None else f"{accuracy:.1%}",
            "reset": self.record["protocol"]["reset"],
            "trials": " to ".join(map(str, sorted({summary["fewest_trials"], summary["n_trials"]}))),
            "images": f"{summary['n_images']:,} of {self.record['probe_set']['source']}",
            "left out of the mean": counted(left_out, "layer") if left_out else "",
            "warnings": " ".join(summary["warnings"]),
        }
        columns = [Column("layer"), Column("type"), Column("criticality", "bar"), Column("low", "number"),
                   Column("high", "number"), Column("n_trials", "number", "trials"), Column("status")]  # fmt: skip
        return result_html(self.name, facts, counted(len(table), "layer"), table, columns, self.plot())

    def _mean_in_words(self, summary: Mapping[str, Any]) -> str:
        mean = summary["criticality"]
        if mean is None:
            return "not known"
        if mean["low"] is None:
            return f"{mean['mean']:.3f}"
        return f"{mean['mean']:.3f} ({100 * summary['level']:g}% interval {mean['low']:.3f} to {mean['high']:.3f})"

    def plot(self) -> "Figure":
        """Return the bar chart of criticality in depth order; of pairs, only the layers that were reset alone."""
        from layercrit.figures.bars import criticality_bars

        summary, table = self.summary(), self.to_pandas()
        if self.has_pairs:  # whose figure is `plot_interactions`
            table = table[[not self._members(layer) for layer in table["layer"]]]
        return criticality_bars(
            table,
            title=self.name,
            mean=summary["criticality"]["mean"] if summary["criticality"] else None,
            chance=summary["chance"],
        )

    def plot_classes(self, of: GroupsOf = "label") -> "Figure":
        """Return the heat map of layers and classes, as `by_class` has them, like classes next to each other."""
        from layercrit.figures.class_maps import class_map
        from layercrit.layers import stages_of

        accuracy = self._images.accuracy_by(of) or None
        has_sets = any(self._members(layer) for layer in self.record["layers"])
        stages = None if has_sets else stages_of(list(self.record["layers"]))
        return class_map(self.by_class(of), title=self.name, accuracy=accuracy, stages=stages)

    @property
    def has_pairs(self) -> bool:
        """Whether two layers were reset together, and each alone."""
        return bool(self._pairs())

    def interactions(self) -> pd.DataFrame:
        """Return one row per pair of layers, in depth order: how much more a reset of both does than the sum of two.

        ``layer_i`` and ``layer_j`` name the layers, ``interaction`` is ``c({i, j}) - c(i) - c(j)`` of the criticality
        c, ``low`` and ``high`` are the limits of its interval, which covers what ``covers`` of `summary` says, and
        ``p_value`` is of the test that it is 0. Draws and images are the same in all three, so the differences are
        taken one by one; trials in which one of the three is not finite are left out, and a reset that changes nothing
        has criticality 0. ``criticality`` is that of both, ``criticality_i`` and ``criticality_j`` are of each alone.

        Raises:
            ProtocolError: no pair of layers was reset beside each of both alone.
        """
        pairs = self._pairs()
        if not pairs:
            raise ProtocolError(
                "There are no interactions in this measurement: they need pairs of layers beside each layer alone. "
                "Measure with --sets pairs (sets='pairs'), or name sets of one and of two layers."
            )
        unchanged = self.cells[self.cells["status"] == "unchanged"]
        values = self.per_image["cosine"].copy()
        place = {layer: number for number, layer in enumerate(self.record["layers"])}
        values[unchanged["layer"].map(place).to_numpy(np.int64), unchanged["trial"].to_numpy(np.int64)] = 0
        how = {key: self._how()[key] for key in ("level", "random_trials")}
        places = [Pair(place[first], place[second], place[both]) for both, (first, second) in pairs.items()]
        found = interactions_of(values, places, **how)
        names = pd.DataFrame(list(pairs.values()), columns=["layer_i", "layer_j"])
        renamed = {"first": "criticality_i", "second": "criticality_j"}
        return pd.concat([names, found.rename(columns=renamed)], axis=1)

    def plot_interactions(self) -> "Figure":
        """Return the matrix of `interactions`.

        Raises:
            ProtocolError: as `interactions`.
        """
        from layercrit.figures.interactions import interaction_map

        table = self.interactions()
        used = {*table["layer_i"], *table["layer_j"]}
        layers = [name for name in self.record["layers"] if name in used]
        shapes = {name: "x".join(map(str, self.record["layers"][name]["shape"])) for name in layers}
        return interaction_map(table, layers, title=self.name, layer_labels=layer_labels(shapes))

    def _members(self, layer: str) -> list[str]:
        return list(self.record["layers"][layer].get("members", []))

    def _pairs(self) -> dict[str, tuple[str, str]]:
        """Return set -> its two layers, of the sets of two layers that were also reset alone."""
        members = {layer: self._members(layer) for layer in self.record["layers"]}
        alone = {layer for layer, own in members.items() if not own}
        return {both: (own[0], own[1]) for both, own in members.items() if len(own) == 2 and alone.issuperset(own)}

    def save(self, folder: str | Path) -> Path:
        """Write ``cells.parquet``, ``images.parquet``, ``layers.csv``, ``measurement.json`` and the figure.

        Where there are interactions, they are written to ``interactions.csv`` and a figure, too.

        Each file is written next to its place and then moved there, so that a reader never sees half a file.

        Raises:
            LayercritError: the folder cannot be written, for instance because the disk is full.
        """
        from layercrit.figures.style import save_figure

        folder = Path(folder).expanduser()
        cells = self.cells.copy()
        for name, values in self.per_image.items():
            cells[name + PER_IMAGE] = pd.Series(list(values[self._places()]))
        record = encodable({"format": FORMAT, **self.record, "summary": self.summary()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
                new = Path(scratch)
                cells.to_parquet(new / "cells.parquet", index=False, compression="zstd")
                write_csv(self.to_pandas(), new / "layers.csv")
                if self.images is not None:
                    self.images.write(new / IMAGES)
                if self.has_pairs:
                    write_csv(self.interactions(), new / "interactions.csv")
                text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
                (new / "measurement.json").write_text(text + "\n", encoding="utf-8")
                try:
                    save_figure(self.plot(), new / "criticality")
                    if self.has_pairs:
                        save_figure(self.plot_interactions(), new / "interactions")
                except Exception as error:
                    if not isinstance(error, OSError):  # what goes wrong with the picture must not lose the numbers
                        move_files(new, folder)
                    raise
                written = {file.name for file in new.iterdir()}
                move_files(new, folder)
            for name in set(FILES) - written:
                (folder / name).unlink(missing_ok=True)  # of another measurement, which this one replaces
        except OSError as error:
            raise LayercritError(
                f"The measurement cannot be written to {folder} ({error.strerror or error}). "
                "Free some space or name another folder (--out), then save again."
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Measurement":
        """Read a folder that `save` wrote.

        Raises:
            LayercritError: the folder contains no measurement, or a damaged one.
        """
        folder = Path(folder).expanduser()
        if not (folder / "measurement.json").is_file():
            within = sorted(path.parent.name for path in folder.glob("*/measurement.json"))
            raise LayercritError(
                f"There is no measurement in {folder}: measurement.json is missing. "
                + (f"Of those in folders of it, name one: {', '.join(within)}." if within else
                   "Give the folder that `layercrit measure --out` wrote.")
            )  # fmt: skip
        try:
            record = read_record(folder)
            cells = pd.read_parquet(folder / "cells.parquet")
            check_together(record, cells)
            shape = (len(record["layers"]), 1 + int(cells["trial"].max()), record["probe_set"]["n_images"])
            columns = [column for column in cells.columns if column.endswith(PER_IMAGE)]
            per_image = {column.removesuffix(PER_IMAGE): np.full(shape, np.nan, np.float32) for column in columns}
            place = {layer: number for number, layer in enumerate(record["layers"])}
            where = cells["layer"].map(place).to_numpy(), cells["trial"].to_numpy()
            for column in columns:
                per_image[column.removesuffix(PER_IMAGE)][where] = np.stack(cells[column].to_list())
            if record.get("precision") is not None:
                PrecisionPlan.from_dict(record["precision"])
            images = ShownImages.read(folder / IMAGES, shape[2]) if (folder / IMAGES).exists() else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LayercritError(
                f"The measurement in {folder} is damaged ({first_line(error)}). Restore the folder, or measure again."
            ) from error
        kept = {key: value for key, value in record.items() if key not in ("format", "summary")}
        return cls(cells.drop(columns=columns), per_image, kept, images)

    @property
    def _images(self) -> ShownImages:
        return self.images or ShownImages(None, None, None)

    def _distances(self, layers: Collection[str] | None = None) -> Layers:
        """Yield layers with the distances of their trials that are ok, ``(n_trials, n_images)``."""
        for index, (layer, cells) in enumerate(self.cells.groupby("layer", sort=False)):
            if layers is None or layer in layers:
                yield str(layer), self.per_image["cosine"][index, cells.loc[cells["status"] == "ok", "trial"].to_list()]

    def _places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the layer and the trial of each cell, as indices."""
        place = {layer: number for number, layer in enumerate(self.record["layers"])}
        return self.cells["layer"].map(place).to_numpy(np.int64), self.cells["trial"].to_numpy(np.int64)

    def _common_trials(self, layers: list[str]) -> list[int]:
        """Return the trials that all of some layers have."""
        own = self.cells[self.cells["layer"].isin(layers)]
        counts = own.groupby("trial")["layer"].nunique()
        return [int(trial) for trial in counts.index[counts == len(layers)]] if layers else []

    def _estimate(self, distance: str, index: int, layer: str, trials: list[int]) -> Estimate | None:
        values = self.per_image[distance][index, trials]  # (n_trials, n_images)
        known = values.size > 0 and np.isfinite(values).all()
        found = estimate(values, **self._how()) if known else None
        if found is None or self.plan is None:
            return found
        return self.plan.estimate(layer, found, values, matched=distance == MATCHED)

    def _estimate_mean(self, distance: str, layers: list[bool], trials: list[int]) -> Estimate | None:
        values = self.per_image[distance][layers]  # (n_layers, n_trials, n_images)
        common = values[:, trials]
        if not common.size or not np.isfinite(common).all():
            return None
        found = estimate_mean_over_layers(common, **self._how())
        if common.shape == values.shape:
            return found
        return recentred(found, float(np.nanmean(values, axis=(1, 2), dtype=np.float64).mean()))

    def _reaches(self, layer: str, n_trials: int) -> bool:
        """Return whether a layer has the half-width that was asked for, if any was."""
        if self.plan is None:
            return self.record["protocol"].get("half_width") is None
        return self.plan.reaches(layer, n_trials, self.record["probe_set"]["n_images"])

    def _precision(self) -> dict[str, Any] | None:
        """Return what was asked and planned of precision, and what came of it; None where nothing was asked."""
        asked = {name: self.record["protocol"].get(name) for name in ("half_width", "minutes")}
        if all(value is None for value in asked.values()):
            return None
        plan = self.plan
        statuses = self.to_pandas().set_index("layer")["status"]
        return {
            **asked,
            "planned_half_width": None if plan is None else plan.half_width,
            "pilot": self.record["protocol"]["pilot"],
            "max_trials": self.record["protocol"]["max_trials"],
            "not_reached": list(statuses.index[statuses == NOT_REACHED]),
        }

    def _how(self) -> dict[str, Any]:
        protocol, random = self.record["protocol"], self.record["random_trials"]
        interval = protocol.get("interval", "t") if random else "t"  # there is nothing to bet on but trials
        return {"level": protocol["level"], "random_trials": random, "interval": interval}

    def _mean_columns(self) -> list[str]:
        distances = [*DISTANCES, *(name for name in self.per_image if name not in DISTANCES)]
        wanted = [name for name in distances if name not in ("cosine", MATCHED)]
        wanted += ["loss", "top1_accuracy", "top5_accuracy", "recovered_accuracy"]
        return [name for name in wanted if name in self.cells.columns]


def _limits(mean: Estimate | None) -> dict[str, float | None] | None:
    """Return an estimate as JSON can hold it."""
    if mean is None:
        return None
    low, high = (limit if math.isfinite(limit) else None for limit in (mean.low, mean.high))
    return {"mean": mean.mean, "low": low, "high": high}
