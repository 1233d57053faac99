"""Module criticality of the models of a study that have their weights from before training."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from layercrit.conditions import under
from layercrit.donors import is_reference
from layercrit.errors import LayercritError, ProtocolError, StudyError, first_line, near
from layercrit.locks import hold, write_whole
from layercrit.models.file_source import initial_of_run, read_weights, weight_file
from layercrit.models.references import open_model
from layercrit.module_criticality.values import ASKED, check_settings, identity_of, measure_module_criticality
from layercrit.progress_bar import Bar
from layercrit.study.image_tables import model_and_images
from layercrit.study.module_tables import (
    OF_ALL,
    StudyModuleCriticality,
    digests,
    load_study_module_criticality,
    read_left_out,
    read_result,
    result_folder,
    unlike_in,
    unlike_the_study,
    write_left_out,
)
from layercrit.study.status import MODULES, RESULT
from layercrit.study.tables import Study, load_study

__all__ = ["measure_of_file", "measure_study_module_criticality"]

_KEPT = "kept-points.json"
_NO_START = (
    "it is no training run that kept its epoch 0 (`layercrit train --keep-epochs`), and no weights before training are "
    "given with --initial (initial=...)"
)
_WHICH = ("models", "probe_set", "n_images", "initial")
"""What is asked for beside the settings of each measurement."""

_N_IMAGES = 1_000
_DEFAULTS = {name: one.default for name, one in signature(measure_module_criticality).parameters.items()}

_Row = dict[Any, Any]


def measure_study_module_criticality(
    study: Study | str | Path,
    *,
    models: Sequence[str] | None = None,
    probe_set: str | None = None,
    n_images: int | None = None,
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

    What is not given is as in the section ``[module_criticality]`` of the study file, where it has one.

    Args:
        study: the study, or its folder. Its models were measured, with whatever reset.
        models: names of those wanted; None: all that have initial weights, the others being left out with the reason.
        probe_set: its name; None: the study's first.
        n_images: how many of the study's images to use, the first ones; None: 1,000.
        initial: weights before training, of all models that are no training run which kept its epoch 0: as for
            `measure_module_criticality`.
        folder: where the results go; None: ``module-criticality`` in the study's folder, where
            `layercrit.report` finds them.
        overwrite: whether to measure models again that were measured with other settings, weights or images.
        progress: whether to show progress on a terminal.
        settings: ``tolerance``, ``excess``, ``draws``, ``n_a``, ``n_s``, ``s_range``, ``level``, ``dtype``,
            ``batch_size`` and ``device``, as for `measure_module_criticality`. Layers and seed are the study's.

    Raises:
        StudyError: there is no such study, model or probe set, a model that was asked for by name has no initial
            weights, no model has, models would be in one table with others of other settings, or another process
            writes to the folder.

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
    which = dict(zip(_WHICH, (models, probe_set, n_images, initial), strict=True))
    given = {**{name: value for name, value in which.items() if value is not None}, **settings}
    of_file = _of_file(opened, given)
    _say_of_file(of_file, progress)
    asked = _Asked.of(opened, {**of_file, **given}, folder)
    if asked.without and (asked.by_name or not asked.rows):
        first, why = next(iter(asked.without.items()))
        raise StudyError(
            f"The module criticality of {first!r} cannot be measured, so nothing was: {why}. Name other models with "
            "--models (models=...)."
        )
    found, failed = asked.measure(overwrite, progress)
    if found is None:
        first, text = next(iter(failed.items()))
        raise StudyError(
            f"Of the models of the study in {opened.folder} that were asked for, none can be measured. {first}: {text}"
        )
    return found


def measure_of_file(folder: Path, progress: bool) -> dict[str, str]:
    """Measure the module criticality that the file of a study asks for, once its cells are measured.

    Args:
        folder: of the study.
        progress: whether to show progress on a terminal.

    Returns:
        model -> why it could not be measured; with the key "" what concerns all of them.
    """
    try:
        study = load_study(folder)
        asked = _Asked.of(study, _of_file(study, {}), None)
        failed = asked.without if asked.by_name or not asked.rows else {}
        return {**failed, **(asked.measure(False, progress)[1] if asked.rows else {})}
    except LayercritError as error:
        return {"": str(error)}


def _of_file(study: Study, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the study file says of module criticality and is not given."""
    known = {name: value for name, value in study.record.get("module_criticality", {}).items() if name not in given}
    for one, other in (("tolerance", "excess"), ("excess", "tolerance")):  # which take each other's place
        if one in given:
            known.pop(other, None)
    return known


def _say_of_file(known: Mapping[str, Any], progress: bool) -> None:
    if not known:
        return
    defaults = {**_DEFAULTS, "n_images": _N_IMAGES, "models": None, "probe_set": None}
    others = [f"{name} = {json.dumps(value)}" for name, value in known.items() if not _same(value, defaults[name])]
    with Bar(progress) as bar:
        bar.say(f"as [module_criticality] in the study file says: {', '.join(others) or 'all by default'}")


def _same(value: Any, default: Any) -> bool:
    return bool(value == (list(default) if isinstance(default, tuple) else default))


@dataclass(frozen=True)
class _Asked:
    """What is asked of a study.

    Attributes:
        study: the study.
        rows: of the table of models, those that can be measured, each with its initial weights.
        without: why others cannot.
        by_name: whether models were named.
        probe_set: its name; None: the study's first.
        n_images: at most.
        settings: of each measurement, those that are not defaults.
        folder: where the results are.
    """

    study: Study
    rows: Sequence[tuple[_Row, str]]
    without: Mapping[str, str]
    by_name: bool
    probe_set: str | None
    n_images: int
    settings: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, study: Study, given: Mapping[str, Any], folder: str | Path | None) -> "_Asked":
        """Return what is asked for by these arguments of `measure_study_module_criticality`.

        Raises:
            ProtocolError: a setting is unknown, or makes no sense.
            StudyError: there is no such model or probe set, or a setting is the study's own.
        """
        models, probe_set, n_images, initial = (given.get(name) for name in _WHICH)
        n_images = _N_IMAGES if n_images is None else n_images
        rows, without = _with_initial(study, models, probe_set, initial)
        settings = _settings(study, n_images, {name: one for name, one in given.items() if name not in _WHICH})
        where = study.folder / MODULES if folder is None else Path(folder).expanduser()
        return cls(study, rows, without, models is not None, probe_set, n_images, settings, where)

    def measure(self, overwrite: bool, progress: bool) -> tuple[StudyModuleCriticality | None, dict[str, str]]:
        """Measure what is not there yet, and write the tables.

        Returns:
            the tables, None where no model could be measured; and model -> why it could not.

        Raises:
            StudyError: what is there was measured otherwise.
        """
        with hold(self.folder, "module criticality"):
            found, failed = list[_AskedModel](), dict[str, str]()
            for row, start in self.rows:
                try:
                    found.append(_AskedModel.of_row(self, row, start))
                except LayercritError as error:
                    failed[row["model"]] = str(error)
            if not overwrite:
                _check_settings(found)
            _check_others(self, found)
            _say_left_out({**self.without, **failed}, progress)
            now = {row["model"] for row, _ in self.rows}
            kept = {model: why for model, why in read_left_out(self.folder).items() if model not in now}
            write_left_out(self.folder, {**kept, **self.without, **failed})
            for one in found:
                try:
                    one.measure(progress, self.settings)
                except Exception as error:  # whatever a network or a device raises must not stop the other models
                    why = str(error) if isinstance(error, LayercritError) else first_line(error)
                    failed[one.row["model"]] = why
                    (one.folder / RESULT).unlink(missing_ok=True)  # what it was to replace is of other settings
                    _say_left_out({one.row["model"]: why}, progress)
                    write_left_out(self.folder, {**kept, **self.without, **failed})
            if len(failed) == len(self.rows):
                return None, failed
            tables = load_study_module_criticality(self.study, self.folder, self.probe_set)
            tables.save(self.folder)
        return tables, failed


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


def _with_initial(
    study: Study, models: Sequence[str] | None, probe_set: str | None, initial: str | None
) -> tuple[list[tuple[_Row, str]], dict[str, str]]:
    """Return the rows of models, each with its initial weights, and why others have none.

    A model may also be named as in the study file, where its variant under a condition has another name.
    """
    rows = under(study.models, study.folder, probe_set=probe_set)[0].to_dict("records")
    names = {row["model"]: {row["model"], row["variant_of"]} for row in rows}
    if unknown := [name for name in models or () if not any(name in one for one in names.values())]:
        raise StudyError(f"The study in {study.folder} has no model {unknown[0]!r}. {near(unknown[0], list(names))}")
    usable, without = [], dict[str, str]()
    for row in rows:
        if models is not None and names[row["model"]].isdisjoint(models):
            continue
        start = initial_of_run(str(row["reference"])) or initial
        if not row["record"].get("sha256"):
            without[row["model"]] = "the study has not measured it yet (`layercrit study run`)"
        elif start is None:
            without[row["model"]] = _NO_START
        else:
            usable.append((row, start))
    return usable, without


@dataclass(frozen=True)
class _AskedModel:
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
    def of_row(cls, asked: _Asked, row: Mapping[Any, Any], initial: str) -> "_AskedModel":
        """Return what is asked of one model, which is opened for that.

        Raises:
            StudyError: it has other weights than the study measured, or its images are gone.
            LayercritError: it or its initial weights cannot be read.
        """
        study = asked.study.folder
        model, probe_set = model_and_images(study, row)
        if model.sha256 != row["record"]["sha256"]:
            raise StudyError(
                "it has other weights now than those that the study measured. Run the study again (`layercrit study "
                "run`), or put the former weights back"
            )
        is_model = is_reference(initial)
        start = open_model(initial).sha256 if is_model else read_weights(weight_file(initial)).sha256
        of = identity_of(model, start, probe_set.first(asked.n_images), {**_DEFAULTS, **asked.settings})
        return cls(study, row, initial, asked.n_images, result_folder(asked.folder, row["model"]), of)

    @property
    def there(self) -> Mapping[str, Any] | None:
        """What the result in the folder is of; None where there is none, or a damaged one."""
        with suppress(LayercritError):
            return read_result(self.folder)[0]
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
        (self.folder / RESULT).unlink(missing_ok=True)  # while the files of a former result are replaced
        found.save(self.folder)
        write_whole(self.folder / RESULT, json.dumps(self.of))
        kept.unlink(missing_ok=True)


def _check_settings(found: Sequence[_AskedModel]) -> None:
    """Refuse to replace what was measured otherwise."""
    for one in found:
        there = one.there
        if there is not None and (unlike := unlike_in(one.of, there, {**one.of, **there})):
            raise StudyError(
                f"The module criticality of {one.row['model']!r} in {one.folder} is of other settings, weights or "
                f"images than asked for now ({', '.join(unlike)}). Nothing was measured. Replace it with --overwrite "
                "(overwrite=True), or name another folder with --out (folder=...)."
            )


def _check_others(asked: _Asked, found: Sequence[_AskedModel]) -> None:
    """Refuse to measure what cannot be in one table with models that are there and are not measured now."""
    names = {one.row["model"] for one in found}
    study, digest_of = asked.study, digests(asked.study)
    rows = under(study.models, study.folder, probe_set=asked.probe_set)[0].to_dict("records")
    for row in rows if found else ():
        if row["model"] in names:
            continue
        there: Mapping[str, Any] = found[0].of
        with suppress(LayercritError):  # there is none, or it is damaged, and so in no table
            there = read_result(result_folder(asked.folder, row["model"]))[0]
        unlike = ", ".join(unlike_in(found[0].of, there, OF_ALL))
        if unlike and not unlike_the_study(there, row["record"], digest_of):  # else it is in no table, either
            raise StudyError(
                f"The module criticality of {row['model']!r} in {asked.folder} is of other settings than asked for now "
                f"({unlike}), so that the two cannot be in one table. Nothing was measured. Ask for the same, measure "
                "all models with --overwrite (overwrite=True), or name another folder with --out (folder=...)."
            )


def _say_left_out(why: Mapping[str, str], progress: bool) -> None:
    with Bar(progress) as bar:
        for model, text in why.items():
            bar.say(f"{model}: left out: {text}")
