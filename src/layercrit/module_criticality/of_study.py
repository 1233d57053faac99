"""Module criticality of the models of a study that have their weights from before training."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from layercrit.conditions import under
from layercrit.donors import is_reference
from layercrit.errors import LayercritError, StudyError, near
from layercrit.foreign_files import read_json
from layercrit.foreign_text import encodable, write_csv
from layercrit.locks import hold, write_whole
from layercrit.models.file_source import initial_of_run, read_weights, weight_file
from layercrit.module_criticality.values import ASKED, ModuleCriticality, measure_module_criticality
from layercrit.progress_bar import Bar
from layercrit.study.image_tables import model_and_images, probe_set_of
from layercrit.study.tables import Study, load_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StudyModuleCriticality", "is_measured", "load_study_module_criticality", "measure_study_module_criticality"]

FOLDER = "module-criticality"
"""In that of the study: where the results are kept unless another folder is named."""

_TABLE, _MODELS, _ABOUT = "modules", "models", "of-study.json"
_NO_START = (
    "it is no training run that kept its epoch 0 (`layercrit train --keep-epochs`), and no weights before training are "
    "given with --initial (initial=...)"
)
_OF, _KEPT = "of.json", "kept-points.json"


@dataclass(frozen=True, eq=False, repr=False)
class StudyModuleCriticality:
    """The module criticality of the models of a study.

    Attributes:
        folder: of the study.
        found: model -> its module criticality, in the order of the study.
        left_out: model -> why it has none.
    """

    folder: Path
    found: Mapping[str, ModuleCriticality]
    left_out: Mapping[str, str]

    @property
    def table(self) -> pd.DataFrame:
        """One row per model and module: ``model``, and the columns of `ModuleCriticality.to_pandas`."""
        parts = [one.to_pandas().assign(model=model) for model, one in self.found.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["model", *(name for name in table if name != "model")]]

    @property
    def by_model(self) -> pd.DataFrame:
        """One row per model, those left out last.

        ``sum`` is that of its modules, ``n_modules_in_sum`` of ``n_modules``, for ranking networks of one
        architecture; ``loss``, ``allowed_loss`` and ``top1_accuracy`` are those of the trained network; ``left_out``
        says why a model has none of these.
        """
        names = ["sum", "n_modules_in_sum", "n_modules", "loss", "allowed_loss", "top1_accuracy", "n_images"]
        rows: list[dict[str, Any]] = [
            {"model": model, **{name: one.summary()[name] for name in names}, "left_out": ""}
            for model, one in self.found.items()
        ]
        rows += [{"model": model, "left_out": why} for model, why in self.left_out.items()]
        table = pd.DataFrame(rows, columns=["model", *names, "left_out"])
        return table.astype({"sum": "float64", "n_modules_in_sum": "Int64", "n_modules": "Int64", "n_images": "Int64"})

    def values(self, models: Sequence[str] | None = None) -> pd.DataFrame:
        """Return module criticality as models x modules; NaN: not measured.

        Args:
            models: the rows; None: those of the study that have some.
        """
        table = self.table
        wide = table.set_index(["model", "layer"])["module_criticality"].unstack("layer")  # noqa: PD010
        return wide.reindex(index=list(self.found if models is None else models), columns=table["layer"].unique())

    def plot(self) -> "Figure":
        """Return the heat map of models and modules."""
        from layercrit.figures.heat_maps import module_criticality_map

        about = {"label": None, "category": None, "accuracy": math.nan}
        models = pd.DataFrame({"model": list(self.found)}).assign(**about)
        return module_criticality_map(self.values(), models, title=self.folder.name)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the tables of modules and of models as CSV and Parquet, and the figure; return the files.

        Raises:
            LayercritError: the folder cannot be written.
        """
        from layercrit.figures.style import save_figure

        folder = Path(folder).expanduser()
        files = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in ((_TABLE, self.table), (_MODELS, self.by_model)):
                files += [folder / f"{name}.csv", folder / f"{name}.parquet"]
                write_csv(table, files[-2])
                table.to_parquet(files[-1], index=False, compression="zstd")
            return [*files, *save_figure(self.plot(), folder / FOLDER)]
        except OSError as error:
            raise LayercritError(
                f"The module criticality of the study cannot be written to {folder} ({error.strerror or error}). Free "
                "some space or name another folder (--out), then run it again: what has been measured is kept."
            ) from error

    def __repr__(self) -> str:
        return f"<StudyModuleCriticality of {self.folder}: {len(self.found)} models, {len(self.left_out)} left out>"


def measure_study_module_criticality(
    study: Study | str | Path,
    *,
    models: Sequence[str] | None = None,
    probe_set: str | None = None,
    n_images: int = 1_000,
    initial: str | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> StudyModuleCriticality:
    """Measure the module criticality of a study's models on its images.

    Which models have weights from before training is looked at before anything is measured. A model is written to the
    folder once it is measured, and the points of the grid of the one under way are kept, so that the same call goes on
    after an interruption; models whose weights, images and settings are the same are not measured again.

    Args:
        study: the study, or its folder. Its models were measured, with whatever reset.
        models: names of those wanted; None: all that have initial weights, the others being left out with the reason.
        probe_set: its name; None: the study's first.
        n_images: how many of the study's images to use, the first ones.
        initial: weights before training, of all models that are no training run which kept its epoch 0: as for
            `measure_module_criticality`.
        folder: where the results are kept; None: ``module-criticality`` in the study's folder, where
            `layercrit.report` finds them.
        overwrite: whether to measure models again that were measured with other settings, weights or images.
        progress: whether to show progress on a terminal.
        settings: ``tolerance``, ``excess``, ``draws``, ``n_a``, ``n_s``, ``s_range``, ``level``, ``dtype``,
            ``batch_size`` and ``device``, as for `measure_module_criticality`. Layers and seed are the study's.

    Raises:
        StudyError: there is no such study, model or probe set, a model that was asked for by name has no initial
            weights, no model has, or another process writes to the folder.

    Examples:
        >>> import layercrit
        >>> study = layercrit.load_study("layercrit-demo/study")  # whose models kept no epoch 0
        >>> try:
        ...     layercrit.measure_study_module_criticality(study)
        ... except layercrit.LayercritError as error:
        ...     print(str(error)[:79])
        The module criticality of 'baseline' cannot be measured, so nothing was: it is
    """
    opened = study if isinstance(study, Study) else load_study(study)
    rows, without = _with_initial(opened, models, probe_set, initial)
    protocol = opened.record.get("protocol", {})
    settings |= {name: protocol[name] for name in ("layers", "types", "group", "seed") if name in protocol}
    where = opened.folder / FOLDER if folder is None else Path(folder).expanduser()
    with hold(where, "module criticality"):
        asked = [_Asked.of_row(opened, row, start, where, n_images, settings) for row, start in rows]
        if not overwrite:
            _check_settings(asked)
        _say_left_out(without, progress)
        failed = dict[str, str]()
        for one in asked:
            try:
                one.measure(opened.folder, progress, settings)
            except LayercritError as error:
                failed[one.row["model"]] = str(error)
                _say_left_out({one.row["model"]: str(error)}, progress)
            about = {"left_out": {**without, **failed}}
            write_whole(where / _ABOUT, json.dumps(encodable(about), ensure_ascii=False))
        if len(failed) == len(asked):
            first, text = next(iter(failed.items()))
            raise StudyError(f"No model of the study in {opened.folder} has module criticality. {first}: {text}")
        found = load_study_module_criticality(opened, where)
        found.save(where)
    return found


def is_measured(study: Study) -> bool:
    """Whether the study's folder has module criticality of some model, or of models that it had."""
    return any((study.folder / FOLDER).glob(f"*/{_OF}"))


def load_study_module_criticality(study: Study, folder: str | Path | None = None) -> StudyModuleCriticality:
    """Return the module criticality that was measured of a study's models.

    Models that have other weights now than when they were measured are left out.

    Args:
        study: the study.
        folder: where the results are; None: ``module-criticality`` in the study's folder.

    Raises:
        StudyError: none was measured.
        LayercritError: what was measured is damaged.
    """
    where = study.folder / FOLDER if folder is None else Path(folder).expanduser()
    found: dict[str, ModuleCriticality] = {}
    left_out = _left_out(where)
    for row in study.models.to_dict("records"):
        if not (_folder_of(where, row["model"]) / _OF).is_file():
            continue
        one = ModuleCriticality.load(_folder_of(where, row["model"]))
        if one.record["sha256"] == row["record"].get("sha256"):
            found[row["model"]] = one
            left_out.pop(row["model"], None)
        else:
            left_out[row["model"]] = "it has other weights now than when it was measured; measure it again"
    if not found:
        raise StudyError(
            f"No module criticality of the study in {study.folder} is in {where}. Measure it with `layercrit "
            f"module-criticality {study.folder}`."
        )
    (first, one), *others = found.items()
    for model, other in others:
        if unlike := [name for name, value in one.record["asked"].items() if other.record["asked"].get(name) != value]:
            raise StudyError(
                f"The module criticality of {first!r} and of {model!r} in {where} is of other settings ({unlike[0]}), "
                "and cannot be in one table. Measure all models with the same ones: `layercrit module-criticality "
                f"{study.folder} --overwrite`."
            )
    return StudyModuleCriticality(study.folder, found, left_out)


def _with_initial(
    study: Study, models: Sequence[str] | None, probe_set: str | None, initial: str | None
) -> tuple[list[tuple[dict[Any, Any], str]], dict[str, str]]:
    """Return the rows of models, each with its initial weights, and why others have none."""
    rows = under(study.models, study.folder, probe_set=probe_set)[0].to_dict("records")
    names = [row["model"] for row in rows]
    if unknown := [name for name in models or () if name not in names]:
        raise StudyError(f"The study in {study.folder} has no model {unknown[0]!r}. {near(unknown[0], names)}")
    usable, without = [], dict[str, str]()
    for row in rows:
        if models is not None and row["model"] not in models:
            continue
        start = initial_of_run(str(row["reference"])) or initial
        if not row["record"].get("sha256"):
            without[row["model"]] = "the study has not measured it yet (`layercrit study run`)"
        elif start is None:
            without[row["model"]] = _NO_START
        else:
            usable.append((row, start))
    if without and (models is not None or not usable):
        first, why = next(iter(without.items()))
        raise StudyError(
            f"The module criticality of {first!r} cannot be measured, so nothing was: {why}. Name other models with "
            "--models (models=...)."
        )
    return usable, without


@dataclass(frozen=True)
class _Asked:
    """A model that is to be measured.

    Attributes:
        row: of the study's table of models.
        initial: where its weights from before training are.
        n_images: at most.
        folder: where its result is, or will be.
        of: what identifies the result, as plain data.
    """

    row: Mapping[Any, Any]
    initial: str
    n_images: int
    folder: Path
    of: Mapping[str, Any]

    @classmethod
    def of_row(
        cls, study: Study, row: Mapping[Any, Any], initial: str, where: Path, n_images: int, settings: Mapping[str, Any]
    ) -> "_Asked":
        """Return what is asked of one model."""
        defaults = {name: one.default for name, one in signature(measure_module_criticality).parameters.items()}
        asked = {name: settings.get(name, defaults[name]) for name in ASKED}
        images = probe_set_of(study.folder, row["record"])
        of = {
            "weights": row["record"]["sha256"],
            "initial": initial if is_reference(initial) else read_weights(weight_file(initial)).sha256,
            "images": None if images is None else images.first(n_images).sha256,
            "settings": asked | {"s_range": list(asked["s_range"])},
        }
        return cls(row, initial, n_images, _folder_of(where, row["model"]), of)

    @property
    def there(self) -> Mapping[str, Any] | None:
        """What the result in the folder is of; None where there is none, or a damaged one."""
        with suppress(OSError, ValueError):
            found = read_json(self.folder / _OF)
            return found if isinstance(found, dict) else None
        return None

    def measure(self, study: Path, progress: bool, settings: Mapping[str, Any]) -> None:
        """Measure the model, unless that is done."""
        if self.there == self.of:
            return
        model, probe_set = model_and_images(study, self.row)
        kept = self.folder / _KEPT
        found = measure_module_criticality(
            model, probe_set.first(self.n_images), initial=self.initial, keep_points=kept, progress=progress, **settings
        )
        (self.folder / _OF).unlink(missing_ok=True)  # while the files of a former result are replaced
        found.save(self.folder)
        write_whole(self.folder / _OF, json.dumps(self.of))
        kept.unlink(missing_ok=True)


def _check_settings(asked: Sequence[_Asked]) -> None:
    """Refuse to replace what was measured otherwise."""
    for one in asked:
        if one.there is not None and one.there != one.of:
            unlike = [name for name, value in one.of.items() if one.there.get(name) != value]
            raise StudyError(
                f"The module criticality of {one.row['model']!r} in {one.folder} is of other {unlike[0]} than asked "
                "for now. Nothing was measured. Replace it with --overwrite (overwrite=True), or name another folder "
                "with --out (folder=...)."
            )


def _say_left_out(why: Mapping[str, str], progress: bool) -> None:
    with Bar(progress) as bar:
        for model, text in why.items():
            bar.say(f"{model}: left out: {text}")


def _folder_of(where: Path, model: str) -> Path:
    """Return the folder of a model's result: readable, and its own on any file system."""
    readable = re.sub(r"[^A-Za-z0-9.=+-]+", "-", model).strip("-.")[:60]
    return where / f"{readable}-{hashlib.sha256(model.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _left_out(where: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {str(model): str(why) for model, why in read_json(where / _ABOUT)["left_out"].items()}
    return {}
