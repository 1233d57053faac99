"""Many models measured under one protocol: the tables of a study's folder."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.cell_columns import NOT_REACHED
from layercrit.comparison import Comparison, compare
from layercrit.conditions import Condition, conditions_of
from layercrit.counts import counted
from layercrit.errors import LayercritError, ProbeError, StudyError, near
from layercrit.image_groups import Layers, by_correctness, by_group, by_image, extreme_images
from layercrit.layer_table import estimate_columns, layer_table
from layercrit.precision import PrecisionPlan
from layercrit.protocol import MATCHED
from layercrit.shown_images import GroupsOf, ShownImages
from layercrit.statistics import estimate
from layercrit.study import status
from layercrit.study.cell_table import ABOUT_LAYER, mean_names
from layercrit.study.cell_values import means_of_trials, values_per_image
from layercrit.study.model_table import models_table
from layercrit.study.pilots import plans_of
from layercrit.study.rows import FailureRow
from layercrit.study.shards import Shards, holders, open_study

__all__ = ["Study", "load_study"]


@dataclass(frozen=True, eq=False, repr=False)
class Study:
    """Many models, each with the criticality of each of its layers.

    Attributes:
        folder: where it is.
        models: one row per model in the order of the study: ``model`` (its name), ``reference``, ``category``,
            ``label``, ``documented_accuracy`` (top-1 as its authors give it, a share in [0, 1]), ``attack_norm`` and
            ``eps`` (which perturbations it was trained to withstand, if any), and, where it was opened,
            ``top1_accuracy`` (top-1 on the probe set), ``chance``, ``temperature``, ``dtype`` and ``sha256``. A variant
            of a model has its name under ``variant_of``; ``epoch`` (of its training run; NaN: final weights),
            ``probe_set`` (its name; None where there is only one) and ``norm_statistics`` say what is asked of a model.
        cells: one row per measured cell, in the order of models, resets, depth and trials; the columns are those of
            `layercrit.measurement.CELL_COLUMNS` with the model's name under ``model``, ``stage``, and ``shape`` (of
            the layer's largest parameter, such as ``64x3x7x7``).
        failures: what could not be measured, and why.
        planned: model -> how many cells it has; models that were not opened yet are missing.
        record: everything else worth keeping, as plain data: name, protocol, probe set, baseline, origin.
        runs: when, where and with which versions cells were measured.
        damaged: which rows of the study's file are damaged and so left out, in words.
        plans: model and reset -> what was planned after its pilot, where a half-width was asked for.
        conflicts: which stores of its shards are about different weights, images or number formats, in words.
        shown: model -> what is known of the images that it was shown, where the folder does not have them.

    Examples:
        >>> import layercrit
        >>> study = layercrit.load_study("layercrit-demo/study")
        >>> study.by_model()["n_layers"].unique().tolist()
        [23]
    """

    folder: Path
    models: pd.DataFrame
    cells: pd.DataFrame
    failures: tuple[FailureRow, ...]
    planned: Mapping[str, int]
    record: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    damaged: tuple[str, ...] = ()
    plans: Mapping[tuple[str, str], PrecisionPlan] = field(default_factory=dict)
    conflicts: tuple[str, ...] = ()
    shown: Mapping[str, ShownImages] = field(default_factory=dict)

    @property
    def resets(self) -> list[str]:
        """The resets of which there are cells, in the order of the study."""
        found = list(dict.fromkeys(self.cells["reset"]))
        asked = self.record.get("protocol", {}).get("resets", [])
        return sorted(found, key=lambda reset: asked.index(reset) if reset in asked else len(asked))

    def of_reset(self, reset: str | None = None) -> pd.DataFrame:
        """Return the cells of one reset that are ok.

        Args:
            reset: its name; None for the study's only or first one.

        Raises:
            StudyError: the study has no such reset, or no cell that is ok.
        """
        if reset is not None and reset not in self.resets:
            reset = _as_written(reset)
        if reset is not None and reset not in self.resets:
            raise StudyError(f"The study in {self.folder} has no reset {reset!r}. {near(reset, self.resets)}")
        wanted = reset or next(iter(self.resets), None)
        cells = self.cells[(self.cells["reset"] == wanted) & (self.cells["status"] == "ok")]
        if cells.empty:
            raise StudyError(
                f"The study in {self.folder} has no finished cell. Run it with `layercrit study run`, or look at "
                "`layercrit study status`."
            )
        return cells

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per (model, reset, layer), in the order of the study and of depth.

        ``criticality`` is 1 minus the mean cosine similarity of softmax outputs, in [0, 1]. ``low`` and ``high`` are
        the limits of its interval at the study's level, which holds for what ``covers`` says: new trials and new images
        where per-image distances were kept, new trials on the same images where only means are known (imported
        results). ``status`` is ``ok`` or says which share of the trials was left out and why.
        """
        return self._layers.copy()

    def per_image(
        self, model: str, layer: str, *, distance: str = "cosine", reset: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the distances of every image in the cells of one layer that are ok.

        Returns:
            ``(n_trials, n_images)``, images in the order of the probe set; ``(0, 0)`` where only means are known.

        Raises:
            StudyError: there is no such model, layer or distance, or no reset of that name.
        """
        cells = self.of_reset(reset)
        for what, name in (("model", model), ("layer", layer)):
            known = list(cells[what].unique())
            if name not in known:
                raise StudyError(f"The study in {self.folder} has no measured {what} {name!r}. {near(name, known)}")
            cells = cells[cells[what] == name]
        with open_study(self.folder) as store:
            found = list(store.per_image(cells["key"].to_list()).values())
        if found and distance not in found[0]:
            raise StudyError(f"No per-image distances {distance!r} were kept. {near(distance, found[0])}")
        return np.stack([values[distance] for values in found]) if found else np.empty((0, 0), np.float32)

    def by_class(
        self, models: str | Sequence[str] | None = None, *, of: GroupsOf = "label", reset: str | None = None
    ) -> pd.DataFrame:
        """Return one row per (model, layer, class): the criticality of the layer for the images of the class.

        Columns are ``model``, ``reset`` and those of `layercrit.Measurement.by_class`, where they are explained. Of
        the distances of single images, those of one layer are in memory at a time.

        Args:
            models: names of those wanted; None: all that have cells. The table of 50 models of 60 layers and 1,000
                classes has 3 million rows.
            of: ``"label"``, ``"prediction"`` (of each trained network), or the group of each image.
            reset: its name; None for the study's only or first one.

        Raises:
            StudyError: there is no such model or reset, or no distances of single images, as in imported results.
            ProbeError: labels or predictions are not known, or there is not one group for each image.
        """
        return self._of_models(models, reset, lambda layers, images, how: by_group(layers, images.groups(of), **how))

    def by_correctness(self, models: str | Sequence[str] | None = None, *, reset: str | None = None) -> pd.DataFrame:
        """Return one row per (model, layer): criticality for images that the trained network names right, and wrong.

        Columns are ``model``, ``reset`` and those of `layercrit.Measurement.by_correctness`.

        Args:
            models: as in `by_class`, as is ``reset``.
            reset: its name.

        Raises:
            StudyError: as in `by_class`.
            ProbeError: labels or predictions are not known.
        """
        return self._of_models(
            models,
            reset,
            lambda layers, images, how: by_correctness(
                layers, images.correct, level=how["level"], random_trials=how["random_trials"]
            ),
        )

    def by_image(self, model: str, *, layer: str | None = None, reset: str | None = None) -> pd.DataFrame:
        """Return one row per layer and image of one model; see `layercrit.Measurement.by_image`.

        Args:
            model: its name.
            layer: the only one wanted; None: all.
            reset: as in `by_class`.

        Raises:
            StudyError: as in `by_class`, or there is no such layer.
        """
        return self._of_models(
            model,
            reset,
            lambda layers, images, how: by_image(layers, images, random_trials=how["random_trials"]),
            layer,
        )

    def extreme_images(self, model: str, layer: str, k: int = 5, *, reset: str | None = None) -> pd.DataFrame:
        """Return the images that the reset of a layer moves most and least; see `Measurement.extreme_images`."""
        return extreme_images(self.by_image(model, layer=layer, reset=reset), k)

    def images_of(self, model: str) -> ShownImages:
        """Return names, labels and predictions of the images that a model was shown, as far as they are known."""
        from layercrit.study.image_tables import images_of  # imports torch, for which status need not wait

        return self.shown.get(model) or images_of(self.folder, model, self._records[model])

    def by_model(self) -> pd.DataFrame:
        """Return one row per (model, reset): its mean criticality over layers with its interval, and its accuracies.

        The mean is over the layers all of whose cells are ok, ``n_layers`` of them. Where they have unlike numbers of
        trials, each counts with the mean over its own, and the interval rests on the ``n_trials`` that all have.
        """
        return self._means.copy()

    def progress(self) -> pd.DataFrame:
        """Return one row per model: its progress.

        ``state`` is done, failed, left or not opened; ``n_planned`` cells (NaN before it is opened), ``n_done`` cells,
        ``n_failed`` trials, and the first ``error``.
        """
        return status.progress(self.models["model"], self.cells, self.failures, self.planned)

    def seconds_left(self) -> float | None:
        """Estimate the time for the cells left, at the speed of the last run; None if that measured nothing.

        Models that were not opened yet count with the mean number of cells of the others. What failed is not left: it
        is retried only on request. A merged or imported study has nothing left to run.
        """
        if not self.runs or not status.is_run(self.record):
            return None
        n_trials = status.trials_of_models(self.record, self.models["record"])
        return status.seconds_left(
            self.models["model"],
            self.cells,
            self.failures,
            self.planned,
            n_trials=n_trials,
            runs=self.runs,
            running=[shard for shard in holders(self.folder) if shard],
        )

    def compare(
        self,
        *,
        baseline: str | None = None,
        leave_out: list[str] | None = None,
        reset: str | None = None,
        probe_set: str | None = None,
        norm_statistics: str | None = None,
        epoch: int | None = None,
    ) -> Comparison:
        """Compare the models; see `layercrit.comparison.compare`."""
        return compare(
            self,
            baseline=baseline,
            leave_out=leave_out,
            reset=reset,
            probe_set=probe_set,
            norm_statistics=norm_statistics,
            epoch=epoch,
        )

    @property
    def conditions(self) -> list[Condition]:
        """The conditions under which models are measured, in the order of the study; the first is the default."""
        return conditions_of(self.models)

    def __repr__(self) -> str:
        failed = f", {counted(len(self.failures), 'failed trial')}" if self.failures else ""
        n_models, n_cells = counted(len(self.models), "model"), counted(len(self.cells), "cell")
        return f"<Study {self._name}: {n_models}, {n_cells}{failed}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: facts, the ranking of the models, and their table."""
        from layercrit.study.notebook_view import study_html

        return study_html(self._name, self.record, self.resets, self.by_model(), self.progress(), self.warnings)

    @property
    def _name(self) -> str:
        return str(self.record.get("name", self.folder.name))

    @property
    def warnings(self) -> list[str]:
        """What puts the numbers of a model in doubt, such as an accuracy no better than guessing, in words."""
        return self.warnings_of(self.models)

    def warnings_of(self, models: pd.DataFrame) -> list[str]:
        """Return those of the `warnings` that are about some rows of ``models``, or about the study."""
        return [
            *self.conflicts,
            *(
                f"{model}: {text}"
                for model, record in zip(models["model"], models["record"], strict=True)
                for text in record.get("warnings", [])
            ),
            *self._warnings_of_half_widths(),
        ]

    def _warnings_of_half_widths(self) -> list[str]:
        """Say, by the plans alone, how many layers will not have the half-width that was asked for."""
        layers = [layer for plan in self.plans.values() for layer in plan.layers.values()]
        missed = [layer.half_width for layer in layers if not layer.reached and layer.components is not None]
        if not missed:
            return []
        asked = min(plan.half_width for plan in self.plans.values())
        miss = "misses" if len(missed) == 1 else "miss"
        return [
            f"{len(missed)} of {counted(len(layers), 'layer')} of all models {miss} the half-width of {asked:.3g} that "
            f"was asked for, with up to {max(missed):.3g} (status {NOT_REACHED}); more images, or a larger max_trials, "
            "may reach it"
        ]

    @property
    def notes_of_models(self) -> dict[str, list[str]]:
        """What readers should know of single models, such as defaults of their input: text -> these models."""
        found: dict[str, list[str]] = {}
        for model, record in zip(self.models["model"], self.models["record"], strict=True):
            for text in record.get("notes", []):
                found.setdefault(text, []).append(model)
        return found

    @property
    def level(self) -> float:
        """Confidence level of the intervals."""
        return float(self.record.get("protocol", {}).get("level", 0.95))

    def _of_models(
        self,
        models: str | Sequence[str] | None,
        reset: str | None,
        table_of: Callable[[Layers, ShownImages, dict[str, Any]], pd.DataFrame],
        layer: str | None = None,
    ) -> pd.DataFrame:
        """Return the tables of models under each other; each is made of its layers, its images and how to estimate."""
        from layercrit.study.image_tables import distances_of

        ok = self.of_reset(reset)
        of_reset = self.cells["reset"] == ok["reset"].iloc[0]
        found = self.cells[of_reset & self.cells["model"].isin(ok["model"].unique())]
        wanted = [models] if isinstance(models, str) else list(found["model"].unique() if models is None else models)
        for what, names in (("model", wanted), ("layer", [] if layer is None else [layer])):
            known = list(found[what].unique())
            if unknown := [name for name in names if name not in known]:
                raise StudyError(
                    f"The study in {self.folder} has no measured {what} {unknown[0]!r}. {near(unknown[0], known)}"
                )
            found = found[found[what].isin(names)] if names else found
        tables = []
        for model in wanted:
            cells = found[found["model"] == model]
            how = self._how(model, cells["reset"].iloc[0])
            try:
                table = table_of(distances_of(self.folder, cells), self.images_of(model), how)
            except ProbeError as error:
                raise ProbeError(f"{model}: {error}") from error
            tables.append(table.assign(model=model, reset=cells["reset"].iloc[0]))
        table = pd.concat(tables, ignore_index=True)
        texts = [name for name in ("model", "reset", "layer", "class", "image", "covers") if name in table]
        return table[["model", "reset", *table.columns[:-2]]].astype(dict.fromkeys(texts, "category"))

    @cached_property
    def _records(self) -> dict[str, Mapping[str, Any]]:
        return dict(zip(self.models["model"], self.models["record"], strict=True))

    def _how(self, model: str, reset: str) -> dict[str, Any]:
        """Return how intervals of a model under a reset are made."""
        is_random = self._records[model].get("random_trials", {}).get(reset, True)
        interval = self.record.get("protocol", {}).get("interval", "t") if is_random else "t"
        return {"level": self.level, "random_trials": is_random, "interval": interval}

    @cached_property
    def _layers(self) -> pd.DataFrame:
        by = ["model", "reset", "layer"]
        layers = self.cells.groupby(by, sort=False).size().index
        estimates = self._estimates(self.cells[self.cells["status"] == "ok"], by, layers)
        means = [name for name in mean_names(self.cells) if name not in ("cosine", MATCHED)]
        table = layer_table(self.cells, estimates, by=by, about=ABOUT_LAYER, means=means)
        if self.plans:
            reached = [self._reaches(row) for row in table.to_dict("records")]
            table.loc[(table["status"] == "ok") & ~np.array(reached), "status"] = NOT_REACHED
        return table

    def _reaches(self, row: Mapping[Any, Any]) -> bool:
        """Return whether a row of the table of layers has the half-width that was asked for, if any was planned."""
        plan = self.plans.get((row["model"], row["reset"]))
        return plan is None or plan.reaches(row["layer"], row["n_trials"], row["n_images"])

    @cached_property
    def _means(self) -> pd.DataFrame:
        by = ["model", "reset"]
        ok = self.cells["status"] == "ok"
        cells = self.cells[ok.groupby([self.cells[column] for column in (*by, "layer")]).transform("all")]
        n_layers = cells.groupby(by, sort=False)["layer"].nunique().rename("n_layers")
        of_trials = cells.groupby([*by, "trial"])["layer"].transform("nunique")
        common = cells[of_trials == cells.groupby(by)["layer"].transform("nunique")]
        n_trials = common.groupby(by, sort=False)["trial"].nunique().rename("n_trials")
        means = self._estimates(common, by, n_layers.index).join(n_layers).join(n_trials)
        if len(common) < len(cells):
            self._recentre(means, cells, by)
        means = means.drop(columns=["sd_trials", "matched_low", "matched_high", "half_width"])
        return self.models.drop(columns="record").merge(means.reset_index(), on="model", how="left")

    def _recentre(self, means: pd.DataFrame, cells: pd.DataFrame, by: list[str]) -> None:
        """Put the means of models around the means of their layers, which may rest on more trials than all have."""
        for column, name in (("criticality", "cosine"), ("criticality_matched", MATCHED)):
            of_layers = cells.groupby([*by, "layer"], sort=False)[name].mean()
            shift = of_layers.groupby(by, sort=False).mean() - means[column]
            means[column] += shift
            if column == "criticality":
                means["low"] = (means["low"] + shift).clip(0, 1)
                means["high"] = (means["high"] + shift).clip(0, 1)

    def _estimates(self, cells: pd.DataFrame, by: list[str], groups: pd.Index) -> pd.DataFrame:
        """Return one row per group: the estimates of its mean distance and of the temperature-matched one.

        Args:
            cells: those that are ok. The cells of a group that share a trial are averaged first: they share the donor.
            by: the columns that make groups.
            groups: the groups wanted; one without cells gives NaN.
        """
        places = cells.groupby(by, sort=False).indices
        keys, trials = cells["key"].to_numpy(), cells["trial"].to_numpy()
        means = {name: cells[name].to_numpy(dtype=np.float64) for name in ("cosine", MATCHED) if name in cells}
        rows = []
        with open_study(self.folder) as store:
            with_images = store.keys_with_images()
            for group in groups:
                own = places.get(group, [])
                if with_images.issuperset(keys[own]):
                    values = values_per_image(store, keys[own], trials[own])
                else:
                    values = means_of_trials({name: column[own] for name, column in means.items()}, trials[own])
                how = self._how(*group[:2])
                found = {
                    name: estimate(distances, **how) if np.isfinite(distances).all() else None
                    for name, distances in values.items()
                }
                plan = self.plans.get(group[:2])
                if plan is not None and len(group) > len(("model", "reset")):
                    found = {
                        name: one and plan.estimate(group[2], one, values[name], matched=name == MATCHED)
                        for name, one in found.items()
                    }
                rows.append(estimate_columns(found.get("cosine"), found.get(MATCHED)))
        return pd.DataFrame(rows, index=groups, columns=list(estimate_columns(None, None)))


def load_study(folder: str | Path) -> Study:
    """Read a study's folder, finished or not; it may be running.

    Raises:
        StudyError: the folder contains no study, or a damaged one.

    Examples:
        >>> import layercrit
        >>> layercrit.load_study("layercrit-demo/study").progress()["state"].unique().tolist()
        ['done']
    """
    folder = Path(folder).expanduser()
    with open_study(folder) as store:
        models, record = models_table(store), store.meta("study", {})
        plans = plans_of(store.meta("precision"))
        return Study(
            folder=folder,
            models=models,
            cells=store.cells(),
            failures=tuple(store.failures()),
            planned=status.planned(store.plan(), record, models["record"], plans),
            record=record,
            runs=tuple(store.runs()),
            damaged=tuple(store.damaged),  # by the reads above
            plans=plans,
            conflicts=tuple(store.conflicts) if isinstance(store, Shards) else (),
        )


def _as_written(reset: str) -> str:
    """Return the name of a reset as tables have it: ``noise(scale=0.5)`` for ``noise( scale = .5 )``."""
    from layercrit.resets import get_reset  # which imports torch; tables do without it

    with suppress(LayercritError):
        return get_reset(reset).name
    return reset
