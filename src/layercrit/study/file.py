"""The file that describes a study: read, checked as a whole, and written with everything resolved.

.. code-block:: toml

    [images]
    source = "imagenet/val"        # paths are relative to this file

    [[models]]
    reference = "zoo:*"            # one model, or a pattern, as are timm:resnet50.*, file:runs/*/final.safetensors

    [[models]]
    list = "models.csv"            # a column `reference` and any key of a model; or one reference a line

A study can also train its models, with ``layercrit train --study FILE``, each in its own folder:

.. code-block:: toml

    [training]
    arch = "timm:resnet18"
    data = "fashion-mnist"

    [[models]]
    method = "robust_l2"           # the model is file:models/pgd
    name = "pgd"

The donor of such a model, for rewind, is its initial weights unless another one is given. All keys, with
their types, defaults and meanings, are declared in `layercrit.study.schema`.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from layercrit.declarations import Declaration, read_table
from layercrit.distances import DISTANCES, get_distance
from layercrit.errors import LayercritError, StudyError, near
from layercrit.layer_sets import read_sets
from layercrit.models.file_source import weight_file
from layercrit.models.own_networks import import_here
from layercrit.models.references import without_weights
from layercrit.probes.images import STANDARD, Preprocessing
from layercrit.probes.labelling import is_label_file
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.resets import RESETS, get_reset
from layercrit.study.entries import ModelEntry, models_of, rows_of_list
from layercrit.study.schema import (
    METHOD_KEYS,
    TABLES,
    ImagesTable,
    ModelTable,
    ProtocolTable,
    StudyTable,
    TrainingTable,
)
from layercrit.study.shards import is_study
from layercrit.study.training_entries import Training, TrainingRun, model_mistakes, run_of, training_mistakes

__all__ = ["ModelEntry", "StudyFile", "Training", "TrainingRun", "read_study_file"]

_LISTED = 20  # mistakes shown at once
_Section = TypeVar("_Section", bound=Declaration)


@dataclass(frozen=True)
class StudyFile:
    """What a study is about, checked.

    Attributes:
        name: the study's name.
        models: the models, in order.
        source: where the images come from.
        n_images: how many images to draw.
        labels: whether to use labels; or the file or the column that has them.
        preprocessing: how images become the pixels that every model gets.
        protocol: the settings of all measurements; its ``reset`` is the first of ``resets``.
        resets: names of the resets.
        distances: names of the distances, ``cosine`` first.
        baseline: name of the model that others are compared with, or None.
        leave_out: names of models or categories that comparisons leave out.
        imports: modules to import first.
        training: how the study trains its own models, or None without a table ``[training]``.
        classes: the file with the names of classes in the order of the models' outputs, or None.
    """

    name: str
    models: tuple[ModelEntry, ...]
    source: str
    n_images: int
    labels: bool | str
    preprocessing: Preprocessing
    protocol: Protocol
    resets: tuple[str, ...]
    distances: tuple[str, ...]
    baseline: str | None
    leave_out: tuple[str, ...]
    imports: tuple[str, ...]
    training: Training | None = None
    classes: str | None = None

    def untrained(self) -> list[str]:
        """Return the names of the models whose training has not finished."""
        return self.training.untrained() if self.training else []

    def check_trained(self) -> None:
        """Make sure that all models are trained.

        Raises:
            StudyError: some are not.
        """
        if self.training:
            self.training.check_finished()

    def to_toml(self) -> str:
        """Return the study file with every default, pattern and path resolved; trained models are files like others."""
        size = self.preprocessing
        protocol = {name: value for name, value in self.protocol.to_dict().items() if name not in ("reset", "n_images")}
        sections: list[tuple[str, Mapping[str, Any]]] = [
            ("[study]", {"name": self.name, "baseline": self.baseline, "leave_out": list(self.leave_out),
                         "imports": list(self.imports)}),
            ("[images]", {"source": self.source, "n_images": self.n_images, "labels": self.labels,
                          "classes": self.classes, "input_size": [size.channels, size.height, size.width],
                          "resize": 0 if size.resize is None else size.resize, "interpolation": size.interpolation}),
            ("[protocol]", {**protocol, "resets": list(self.resets), "distances": list(self.distances)}),
            *(("[[models]]", vars(model)) for model in self.models),
        ]  # fmt: skip
        return "\n".join(_section(title, values) for title, values in sections)


def read_study_file(path: str | Path) -> StudyFile:
    """Read a study file, or the one in a study's folder, and check all that can be checked without opening models.

    Raises:
        StudyError: naming every mistake found, with its place.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if is_study(path) and not (path / "study.toml").is_file():
            raise StudyError(f"The study in {path} was imported or merged, so it cannot be run.")
        path = path / "study.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"The study file {path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"The study file {path} is not valid TOML: {error}.") from error
    return _Reader(path.absolute(), content).read()


_COLUMNS = ModelTable.model_fields.keys() - {"list", *METHOD_KEYS}  # of a list of models


class _Reader:
    """Reads one study file and gathers its mistakes."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content
        self.mistakes = [f"unknown section [{name}]. {near(name, TABLES)}" for name in content if name not in TABLES]
        self.some_unread = False  # models that could not be understood
        self.runs: list[TrainingRun] = []

    def read(self) -> StudyFile:
        study, images = self._section("study", StudyTable), self._section("images", ImagesTable)
        protocol = self._section("protocol", ProtocolTable)
        self.training = self._section("training", TrainingTable) if "training" in self.content else None
        tables = self._model_tables()
        for module in study.imports:
            self._import(module)
        resets = protocol.resets or [DEFAULTS.reset]
        distances = protocol.distances or list(DISTANCES)
        self._check_names(resets, get_reset)
        self._check_names(distances, get_distance)
        preprocessing = self._preprocessing(images)
        if self.training:
            self.mistakes.extend(training_mistakes(self.training, self.path.parent))
        models = self._models(tables, resets)
        self._check_donors(models, resets)
        self._check_comparison(models, study.baseline, study.leave_out)
        settings = self._protocol(protocol, resets[0])
        self._raise_mistakes()
        return StudyFile(
            name=self._default_name() if study.name is None else study.name,
            models=tuple(models),
            source=self._absolute_source(images.source),
            n_images=images.n_images,
            labels=self._absolute_labels(images.labels),
            classes=None if images.classes is None else str(self._absolute(images.classes)),
            preprocessing=preprocessing,
            protocol=settings,
            resets=tuple(dict.fromkeys(resets)),
            distances=tuple(dict.fromkeys(["cosine", *distances])),
            baseline=study.baseline,
            leave_out=tuple(study.leave_out),
            imports=tuple(study.imports),
            training=Training(tuple(self.runs), self.path) if self.training else None,
        )

    def _protocol(self, table: Declaration, reset: str) -> Protocol:
        """Return the settings of a table whose keys are right each by itself, and note where they contradict."""
        try:
            settings = table.model_dump(exclude={"resets", "distances"})
            sets = settings["sets"]
            if isinstance(sets, str):
                settings["sets"] = read_sets(sets, self.path.parent)
            return Protocol(**settings, reset=reset)
        except LayercritError as error:
            self.mistakes.append(f"[protocol] {error}")
            return DEFAULTS

    def _default_name(self) -> str:
        return self.path.parent.name if self.path.stem == "study" else self.path.stem

    def _raise_mistakes(self) -> None:
        if self.mistakes:
            shown = "\n".join(f"  - {mistake}" for mistake in self.mistakes[:_LISTED])
            more = len(self.mistakes) - _LISTED
            raise StudyError(
                f"{self.path} has {len(self.mistakes)} mistake{'s' * (len(self.mistakes) > 1)}:\n{shown}"
                + (f"\n  ... and {more} more" if more > 0 else "")
            )

    # --- sections ---------------------------------------------------------------------------------------------------

    def _section(self, name: str, kind: type[_Section]) -> _Section:
        table = self.content.get(name, {})
        if isinstance(table, dict):
            return read_table(kind, table, f"[{name}]", self.mistakes)
        self.mistakes.append(f"expected one table [{name}], got {table!r}")
        return read_table(kind, {}, "", [])

    def _model_tables(self) -> list[tuple[str, Set[str], ModelTable]]:
        """Return place, keys as they were written, and what is right of each table ``[[models]]``."""
        tables = self.content.get("models", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.mistakes.append(f"expected [[models]] tables, got {tables!r}")
            return []
        if not tables:
            self.mistakes.append("there are no models: add [[models]] tables with a reference each")
        places = [f"[[models]] no. {number}" for number in range(1, len(tables) + 1)]
        return [
            (where, table.keys(), read_table(ModelTable, table, f"{where}:", self.mistakes))
            for where, table in zip(places, tables, strict=True)
        ]

    def _preprocessing(self, images: ImagesTable) -> Preprocessing:
        try:
            return images.preprocessing()
        except LayercritError as error:
            self.mistakes.append(f"[images] {error}")
            return STANDARD

    def _import(self, module: str) -> None:
        try:
            import_here(module)
        except Exception as error:  # the user's own code, run by importing it
            self.mistakes.append(f"[study] imports: {module!r} cannot be imported ({type(error).__name__}: {error})")

    def _check_names(self, names: Sequence[str], get: Any) -> None:
        for name in names:
            try:
                get(name)
            except LayercritError as error:
                self.mistakes.append(f"[protocol] {error}")

    # --- models -----------------------------------------------------------------------------------------------------

    def _models(self, tables: Sequence[tuple[str, Set[str], ModelTable]], resets: Sequence[str]) -> list[ModelEntry]:
        rewinds = any(name in RESETS and RESETS[name].donor == "checkpoint" for name in resets)
        models: list[ModelEntry] = []
        for where, keys, table in tables:
            if len({"reference", "list", "method"} & keys) != 1:
                self.mistakes.append(f"{where}: expected exactly one of reference, list and method")
                self.some_unread = True
            elif "method" in keys:
                models.extend(self._trained(where, table, rewinds))
            elif wrong := sorted({*METHOD_KEYS} & keys):
                self.mistakes.append(f"{where}: {', '.join(wrong)} can be given only for a model with a method")
            elif table.list is not None:
                given = table.model_dump(exclude_unset=True, exclude={"list"})
                for place, row in rows_of_list(where, self._absolute(table.list), given, _COLUMNS, self.mistakes):
                    models.extend(self._entries(place, read_table(ModelTable, row, f"{place}:", self.mistakes)))
            else:
                models.extend(self._entries(where, table))
        self._check_unique(models)
        return models

    def _trained(self, where: str, table: ModelTable, rewinds: bool) -> Iterator[ModelEntry]:
        """Yield the model of a table with a method, and keep how it is trained."""
        found = list(model_mistakes(where, table, self.training))
        self.mistakes.extend(found)
        if found or self.training is None or table.method is None:
            self.some_unread = True
            return
        run = run_of(table, self.training, self.path, self._absolute_source(self.training.data))
        self.runs.append(run)
        entry = run.entry()
        if run.is_finished():
            self._check_architecture(where, [entry])
        yield self._with_own_words(replace(entry, donor=f"{run.folder}@epoch=0") if rewinds else entry, table)

    def _with_own_words(self, entry: ModelEntry, table: ModelTable) -> ModelEntry:
        given = table.model_dump(
            include={field.name for field in fields(ModelEntry)} - {"reference"}, exclude_none=True
        )
        if table.donor is not None:
            given["donor"] = str(self._absolute(table.donor))
        return replace(entry, **given)

    def _entries(self, where: str, table: ModelTable) -> Iterator[ModelEntry]:
        """Yield the models of one row, more than one where its reference is a pattern."""
        if table.reference is None:
            return  # said already
        try:
            found = list(models_of(table.reference, self.path.parent))
        except LayercritError as error:
            self.mistakes.append(f"{where}: {error}")
            self.some_unread = True
            return
        self._check_architecture(where, found)
        single = sorted({"name", "label", "accuracy", "donor", "eps"} & table.model_fields_set)
        if len(found) > 1 and single:
            self.mistakes.append(
                f"{where}: {table.reference!r} names {len(found)} models, but {', '.join(single)} can be given for one "
                "only"
            )
            return
        for entry in found:
            yield self._with_own_words(entry, table)

    def _check_architecture(self, where: str, found: Sequence[ModelEntry]) -> None:
        """Say, once for a pattern, where a weight file comes without its architecture."""
        for entry in found:
            if entry.reference.startswith("file:"):
                try:
                    without_weights(entry.reference)
                except LayercritError as error:
                    self.mistakes.append(f"{where}: {error}")
                    return

    def _check_unique(self, models: Sequence[ModelEntry]) -> None:
        names: dict[str, str] = {}
        for model in models:
            if model.name in names:
                self.mistakes.append(
                    f"two models are named {model.name!r}: {names[model.name]} and {model.reference}; give one of them "
                    "another name"
                )
            names.setdefault(model.name, model.reference)

    def _check_donors(self, models: Sequence[ModelEntry], resets: Sequence[str]) -> None:
        needing = [name for name in resets if name in RESETS and RESETS[name].donor == "checkpoint"]
        for model in models:
            if needing and model.donor is None:
                self.mistakes.append(f"model {model.name!r} has no donor, which the reset {needing[0]!r} needs")
            if model.donor is not None:
                self._check_donor(model.name, model.donor)

    def _check_donor(self, model: str, donor: str) -> None:
        folder = Path(donor.rpartition("@epoch=")[0] or donor)
        if any(run.folder == folder and not run.is_finished() for run in self.runs):
            return  # it will be there
        try:
            if not weight_file(donor).is_file():
                self.mistakes.append(f"the donor of model {model!r} is not a file: {donor}")
        except LayercritError as error:
            self.mistakes.append(f"the donor of model {model!r}: {error}")

    def _check_comparison(self, models: Sequence[ModelEntry], baseline: str | None, leave_out: Sequence[str]) -> None:
        names = [model.name for model in models]
        categories = [model.category for model in models if model.category]
        if self.some_unread:
            return  # what is not known here may be one of those
        if baseline is not None and baseline not in names:
            self.mistakes.append(f"[study] baseline {baseline!r} is not one of the models. {near(baseline, names)}")
        for name in leave_out:
            if name not in names and name not in categories:
                known = [*dict.fromkeys(categories), *names]
                self.mistakes.append(
                    f"[study] leave_out {name!r} is neither a category nor a model. {near(name, known)}"
                )

    # --- paths ------------------------------------------------------------------------------------------------------

    def _absolute(self, path: str) -> Path:
        return self.path.parent / Path(path).expanduser()

    def _absolute_labels(self, labels: bool | str) -> bool | str:
        return str(self._absolute(labels)) if isinstance(labels, str) and is_label_file(labels) else labels

    def _absolute_source(self, source: str) -> str:
        """Make the path in an image source absolute; that of a torchvision data set is its option ``root``."""
        if source.startswith("torchvision:"):
            return re.sub(r"(?<=[?&]root=)[^&]*", lambda found: str(self._absolute(found[0])), source)
        return str(self._absolute(source))


def _section(title: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join([title, *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    # JSON's texts, numbers, truth values and lists are TOML's, too, but for one character that JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
