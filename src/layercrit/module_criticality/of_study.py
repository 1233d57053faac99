"""Module criticality of the models of a study that have their weights from before training."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from layercrit.conditions import under
from layercrit.donors import is_reference
from layercrit.errors import LayercritError, ProtocolError, StudyError, near
from layercrit.foreign_files import read_json
from layercrit.foreign_text import encodable, write_csv
from layercrit.locks import hold, write_whole
from layercrit.models.file_source import initial_of_run, read_weights, weight_file
from layercrit.models.references import open_model
from layercrit.module_criticality.values import (
    ASKED,
    ModuleCriticality,
    check_settings,
    identity_of,
    measure_module_criticality,
)
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
_OF_ALL = ("n_images", *ASKED)
"""Of what identifies a result: that which all models of a table have in common."""

_IDENTITY = {"weights", "initial weights", "architecture", "output", "normalisation", "images", *_OF_ALL}
_DEFAULTS = {name: one.default for name, one in signature(measure_module_criticality).parameters.items()}


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
    if models is not None and not models:
        raise StudyError("No model is named. Name some with --models (models=...), or leave it out for all models.")
    rows, without = _with_initial(opened, models, probe_set, initial)
    settings = _settings(opened, n_images, settings)
    where = opened.folder / FOLDER if folder is None else Path(folder).expanduser()
    with hold(where, "module criticality"):
        asked, failed = list[_Asked](), dict[str, str]()
        for row, start in rows:
            try:
                asked.append(_Asked.of_row(opened, row, start, where, n_images, settings))
            except LayercritError as error:
                failed[row["model"]] = str(error)
        if not overwrite:
            _check_settings(asked)
            _check_others(opened, where, probe_set, asked)
        _say_left_out({**without, **failed}, progress)
        kept = {model: why for model, why in _left_out(where).items() if model not in {row["model"] for row, _ in rows}}
        _write_left_out(where, {**kept, **without, **failed})
        for one in asked:
            try:
                one.measure(progress, settings)
            except LayercritError as error:
                failed[one.row["model"]] = str(error)
                _say_left_out({one.row["model"]: str(error)}, progress)
                _write_left_out(where, {**kept, **without, **failed})
        if len(failed) == len(rows):
            first, text = next(iter(failed.items()))
            raise StudyError(
                f"Of the models of the study in {opened.folder} that were asked for, none can be measured. {first}: "
                f"{text}"
            )
        found = load_study_module_criticality(opened, where, probe_set)
        found.save(where)
    return found


def is_measured(study: Study) -> bool:
    """Whether the study's folder has module criticality of some model, or of models that it had."""
    return any((study.folder / FOLDER).glob(f"*/{_OF}"))


def load_study_module_criticality(
    study: Study, folder: str | Path | None = None, probe_set: str | None = None
) -> StudyModuleCriticality:
    """Return the module criticality that was measured of a study's models.

    Models that the study has measured with other weights, images or normalisation since are left out, and so are those
    whose results are damaged.

    Args:
        study: the study.
        folder: where the results are; None: ``module-criticality`` in the study's folder.
        probe_set: the name of the images; None: the study's first.

    Raises:
        StudyError: none was measured, or models were measured with different settings.
    """
    where = study.folder / FOLDER if folder is None else Path(folder).expanduser()
    found: dict[str, ModuleCriticality] = {}
    identities: dict[str, Mapping[str, Any]] = {}
    why = _left_out(where)
    left_out = dict[str, str]()
    digest_of = _digests(study)
    for row in under(study.models, study.folder, probe_set=probe_set)[0].to_dict("records"):
        model, own = row["model"], _folder_of(where, row["model"])
        if (own / _OF).is_file():
            try:
                identity, one = _read(own)
            except LayercritError as error:
                left_out[model] = str(error)
                continue
            if unlike := _unlike_the_study(identity, row["record"], digest_of):
                left_out[model] = (
                    f"the study has it with other {unlike} now than when it was measured; measure it again"
                )
            else:
                identities[model], found[model] = identity, one
        elif model in why:
            left_out[model] = why[model]
    if not found:
        first = next(iter(left_out.items()), None)
        raise StudyError(
            f"No module criticality of the study in {study.folder} is in {where}. Measure it with `layercrit "
            f"module-criticality {study.folder}`.{'' if first is None else f' {first[0]}: {first[1]}'}"
        )
    (first_model, one_identity), *others = identities.items()
    for model, identity in others:
        if unlike := ", ".join(_unlike(one_identity, identity, _OF_ALL)):
            raise StudyError(
                f"The module criticality of {first_model!r} and of {model!r} in {where} is of other settings "
                f"({unlike}), and cannot be in one table. Measure all models with the same ones: `layercrit "
                f"module-criticality {study.folder} --overwrite`."
            )
    return StudyModuleCriticality(study.folder, found, left_out)


def _settings(study: Study, n_images: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings that are not defaults, with those of the study.

    Raises:
        ProtocolError: one is unknown, or makes no sense.
        StudyError: one is the study's own.
    """
    protocol = study.record.get("protocol", {})
    own = {name: protocol[name] for name in ("layers", "types", "group", "seed") if name in protocol}
    if taken := sorted(own.keys() & given.keys()):
        raise StudyError(
            f"{taken[0]} of the study in {study.folder} is {own[taken[0]]!r}, and module criticality takes the same. "
            "Leave it out."
        )
    defaults = {name: _DEFAULTS[name] for name in (*ASKED, "batch_size", "device")}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ProtocolError(f"There is no setting {unknown[0]!r} of module criticality. {near(unknown[0], defaults)}")
    check_settings(**{**defaults, **own, **given, "n_images": n_images})
    return {**own, **given}


def _digests(study: Study) -> Callable[[Mapping[str, Any], int], str | None]:
    """Return a function from a model's record and a number of images to the hash of the first of its images."""
    known: dict[tuple[Any, int], str | None] = {}

    def digest_of(record: Mapping[str, Any], n_images: int) -> str | None:
        what = record.get("probe_set"), n_images
        if what not in known:
            images = probe_set_of(study.folder, record)
            known[what] = None if images is None else images.first(n_images).sha256
        return known[what]

    return digest_of


def _unlike_the_study(
    identity: Mapping[str, Any], record: Mapping[str, Any], digest_of: Callable[[Mapping[str, Any], int], str | None]
) -> str:
    """Return in what the study's model is another one now than that which was measured; empty where in nothing."""
    now = {
        "weights": record.get("sha256"),
        "architecture": record.get("architecture"),
        "normalisation": [record["mean"], record["std"]] if "mean" in record and "std" in record else None,
        "images": digest_of(record, identity["n_images"]),  # None: a merged study has them in its parts
    }
    known = {name: value for name, value in now.items() if value is not None or name == "weights"}
    return ", ".join(_unlike(identity, known, known))


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if one.get(name) != other.get(name)]


def _read(folder: Path) -> tuple[Mapping[str, Any], ModuleCriticality]:
    """Return what a result is of, and the result.

    Raises:
        LayercritError: there is none, or a damaged one.
    """
    found = ModuleCriticality.load(folder)
    try:
        identity = read_json(folder / _OF)
        if isinstance(identity, dict) and not _IDENTITY - identity.keys() and isinstance(identity["n_images"], int):
            return identity, found
        what = "is no record of what was measured"
    except (OSError, ValueError) as error:
        what = str(error)
    raise LayercritError(
        f"The module criticality in {folder} is damaged ({_OF}: {what}). Measure it again: `layercrit "
        "module-criticality` of the study."
    )


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
        study: its folder.
        row: of the study's table of models.
        initial: where its weights from before training are.
        n_images: at most.
        folder: where its result is, or will be.
        of: what identifies the result, as plain data.
    """

    study: Path
    row: Mapping[Any, Any]
    initial: str
    n_images: int
    folder: Path
    of: Mapping[str, Any]

    @classmethod
    def of_row(
        cls, study: Study, row: Mapping[Any, Any], initial: str, where: Path, n_images: int, settings: Mapping[str, Any]
    ) -> "_Asked":
        """Return what is asked of one model, which is opened for that.

        Raises:
            StudyError: it has other weights than the study measured, or its images are gone.
            LayercritError: it or its initial weights cannot be read.
        """
        model, probe_set = model_and_images(study.folder, row)
        if model.sha256 != row["record"]["sha256"]:
            raise StudyError(
                "it has other weights now than those that the study measured. Run the study again (`layercrit study "
                "run`), or put the former weights back"
            )
        is_model = is_reference(initial)
        start = open_model(initial).sha256 if is_model else read_weights(weight_file(initial)).sha256
        of = identity_of(model, start, probe_set.first(n_images), {**_DEFAULTS, **settings})
        return cls(study.folder, row, initial, n_images, _folder_of(where, row["model"]), of)

    @property
    def there(self) -> Mapping[str, Any] | None:
        """What the result in the folder is of; None where there is none, or a damaged one."""
        with suppress(LayercritError):
            return _read(self.folder)[0]
        return None

    def measure(self, progress: bool, settings: Mapping[str, Any]) -> None:
        """Measure the model, unless that is done."""
        if self.there == self.of:
            return
        model, probe_set = model_and_images(self.study, self.row)
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
        there = one.there
        if there is not None and (unlike := _unlike(one.of, there, {**one.of, **there})):
            raise StudyError(
                f"The module criticality of {one.row['model']!r} in {one.folder} is of other settings, weights or "
                f"images than asked for now ({', '.join(unlike)}). Nothing was measured. Replace it with --overwrite "
                "(overwrite=True), or name another folder with --out (folder=...)."
            )


def _check_others(study: Study, where: Path, probe_set: str | None, asked: Sequence[_Asked]) -> None:
    """Refuse to measure what cannot be in one table with models that are there and are not asked for now."""
    names = {one.row["model"] for one in asked}
    others = [
        model for model in under(study.models, study.folder, probe_set=probe_set)[0]["model"] if model not in names
    ]
    for model in others if asked else []:
        there: Mapping[str, Any] = asked[0].of
        with suppress(LayercritError):  # there is none, or it is damaged, and so in no table
            there = _read(_folder_of(where, model))[0]
        if unlike := ", ".join(_unlike(asked[0].of, there, _OF_ALL)):
            raise StudyError(
                f"The module criticality of {model!r} in {where} is of other settings than asked for now ({unlike}), "
                "so that the two cannot be in one table. Nothing was measured. Ask for the same, measure all models "
                "with --overwrite (overwrite=True), or name another folder with --out (folder=...)."
            )


def _say_left_out(why: Mapping[str, str], progress: bool) -> None:
    with Bar(progress) as bar:
        for model, text in why.items():
            bar.say(f"{model}: left out: {text}")


def _folder_of(where: Path, model: str) -> Path:
    """Return the folder of a model's result: readable, and its own on any file system."""
    readable = re.sub(r"[^A-Za-z0-9.=+-]+", "-", model).strip("-.")[:60]
    return where / f"{readable}-{hashlib.sha256(model.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _write_left_out(where: Path, left_out: Mapping[str, str]) -> None:
    write_whole(where / _ABOUT, json.dumps(encodable({"left_out": left_out}), ensure_ascii=False))


def _left_out(where: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {str(model): str(why) for model, why in read_json(where / _ABOUT)["left_out"].items()}
    return {}
