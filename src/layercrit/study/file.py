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

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from layercrit.counts import counted
from layercrit.declarations import Declaration, read_table
from layercrit.distances import DISTANCES, get_distance
from layercrit.donors import is_reference
from layercrit.errors import LayercritError, StudyError, near
from layercrit.layer_sets import read_sets
from layercrit.models.file_source import epochs_of, weight_file
from layercrit.models.own_networks import import_here
from layercrit.models.references import without_weights
from layercrit.probes.images import Preprocessing
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.resets import Reset, epoch_of_run, get_reset
from layercrit.study.entries import ModelEntry, file_parts, models_of, rows_of_list, variants_of
from layercrit.study.image_entries import Images, absolute_source, images_tables, pixels_of, probe_sets_of
from layercrit.study.module_entries import module_mistakes, module_settings
from layercrit.study.schema import (
    METHOD_KEYS,
    TABLES,
    ImagesTable,
    ModelTable,
    ModuleCriticalityTable,
    ProtocolTable,
    StudyTable,
    TrainingTable,
)
from layercrit.study.shards import is_study
from layercrit.study.training_entries import Training, TrainingRun, model_mistakes, run_of, training_mistakes
from layercrit.toml import toml_section, tomllib

__all__ = ["ModelEntry", "StudyFile", "Training", "TrainingRun", "read_study_file"]

_OF_VARIANTS = ("variant_of", "epoch", "probe_set", "norm_statistics")  # the file says once for all models
_LISTED = 20  # mistakes shown at once
_Section = TypeVar("_Section", bound=Declaration)


@dataclass(frozen=True)
class StudyFile:
    """What a study is about, checked.

    Attributes:
        name: the study's name.
        models: the models, in order, each with its variants: at other epochs, on other probe sets, or with other norm
            statistics.
        source: where the images of the first probe set come from.
        n_images: how many images to draw.
        labels: whether to use labels; or the file or the column that has them.
        preprocessing: how images become the pixels that every model gets.
        protocol: the settings of all measurements; its ``reset`` is the first of ``resets``, and its
            ``norm_statistics`` are those of the models that are no variants.
        resets: names of the resets.
        distances: names of the distances, ``cosine`` first.
        baseline: name of the model that others are compared with, or None.
        leave_out: names of models or categories that comparisons leave out.
        imports: modules to import first.
        training: how the study trains its own models, or None without a table ``[training]``.
        classes: the file with the names of classes in the order of the models' outputs, or None.
        probe_set: the name of the first probe set; None where it is the only one.
        further_images: further probe sets.
        norm_statistics: what becomes of running statistics beside a reset, each of which is measured.
        epochs: of training runs that are measured beside the final weights.
        module_criticality: arguments of `layercrit.measure_study_module_criticality`; None without that section.
        says_input_size: whether the file gives the size of the images; else it is the default.
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
    probe_set: str | None = None
    further_images: tuple[Images, ...] = ()
    norm_statistics: tuple[str, ...] = (DEFAULTS.norm_statistics,)
    epochs: Literal["all"] | tuple[int, ...] = ()
    module_criticality: Mapping[str, Any] | None = None
    says_input_size: bool = field(default=True, compare=False)  # what is written with everything resolved does

    @property
    def images(self) -> tuple[Images, ...]:
        """All probe sets."""
        first = Images(self.probe_set, self.source, self.n_images, self.labels, self.classes)
        return (first, *self.further_images)

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
            *(("[[images]]" if self.further_images else "[images]",
               {**vars(images), "input_size": [size.channels, size.height, size.width],
                "resize": 0 if size.resize is None else size.resize, "interpolation": size.interpolation})
              for images in self.images),
            ("[protocol]", {**protocol, "resets": list(self.resets), "distances": list(self.distances),
                            "norm_statistics": list(self.norm_statistics),
                            "epochs": self.epochs if self.epochs == "all" else list(self.epochs)}),
            *([] if self.module_criticality is None else [("[module_criticality]", self.module_criticality)]),
            *(("[[models]]", {key: value for key, value in vars(model).items() if key not in _OF_VARIANTS})
              for model in self.models if model.variant_of is None),
        ]  # fmt: skip
        return "\n".join(toml_section(title, values) for title, values in sections)


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
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
        study = self._section("study", StudyTable)
        images, *further = self._images_tables()
        protocol = self._section("protocol", ProtocolTable)
        self.training = self._section("training", TrainingTable) if "training" in self.content else None
        tables = self._model_tables()
        for module in study.imports:
            self._import(module)
        resets = protocol.resets or [DEFAULTS.reset]
        distances = protocol.distances or list(DISTANCES)
        known = self._known_resets(resets)
        self._check_names(distances, get_distance)
        preprocessing = pixels_of(images, self.mistakes)
        if self.training:
            self.mistakes.extend(training_mistakes(self.training, self.path.parent))
        models = self._models(tables, known)
        self._check_donors(models, known)
        self._check_comparison(models, study.baseline, study.leave_out)
        settings = self._protocol(protocol, known[0].name if known else DEFAULTS.reset)
        first, *others = probe_sets_of([images, *further], preprocessing, self.path.parent, self.mistakes)
        modules = self._modules(models, (first, *others))
        names = [str(one.name) for one in (first, *others)] if others else []
        statistics = _listed(protocol.norm_statistics)
        every = [
            variant
            for entry in models
            for variant in variants_of(entry, self._epochs_of(entry, protocol.epochs), names, statistics)
        ]
        self._check_unique(every)
        are_trained = not self.some_unread and all(run.is_finished() for run in self.runs)
        if protocol.epochs and are_trained and not any(entry.epoch is not None for entry in every):
            self.mistakes.append(
                "[protocol] epochs: no model is the folder of a training run that kept one of these epochs "
                "(`layercrit train --keep-epochs`)"
            )
        self._raise_mistakes()
        return StudyFile(
            name=self._default_name() if study.name is None else study.name,
            models=tuple(every),
            source=first.source,
            n_images=first.n_images,
            labels=first.labels,
            classes=first.classes,
            probe_set=first.name,
            further_images=tuple(others),
            norm_statistics=tuple(statistics),
            epochs=protocol.epochs if protocol.epochs == "all" else tuple(protocol.epochs),
            preprocessing=preprocessing,
            says_input_size="input_size" in images.model_fields_set,
            protocol=settings,
            resets=tuple(reset.name for reset in known),
            distances=tuple(dict.fromkeys(["cosine", *distances])),
            baseline=study.baseline,
            leave_out=tuple(study.leave_out),
            imports=tuple(study.imports),
            training=Training(tuple(self.runs), self.path) if self.training else None,
            module_criticality=modules,
        )

    def _protocol(self, table: Declaration, reset: str) -> Protocol:
        """Return the settings of a table whose keys are right each by itself, and note where they contradict."""
        try:
            given = table.model_dump(exclude={"resets", "distances", "epochs"})
            statistics = _listed(given.pop("norm_statistics"))[0]
            if isinstance(given["sets"], str):
                given["sets"] = read_sets(given["sets"], self.path.parent)
            return Protocol(**given, reset=reset, norm_statistics=statistics)
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
                f"{self.path} has {counted(len(self.mistakes), 'mistake')}:\n{shown}"
                + (f"\n  ... and {more} more" if more > 0 else "")
            )

    # --- sections ---------------------------------------------------------------------------------------------------

    def _section(self, name: str, kind: type[_Section]) -> _Section:
        table = self.content.get(name, {})
        if isinstance(table, dict):
            return read_table(kind, table, f"[{name}]", self.mistakes)
        self.mistakes.append(f"expected one table [{name}], got {table!r}")
        return read_table(kind, {}, "", [])

    def _images_tables(self) -> list[ImagesTable]:
        tables = self.content.get("images", {})
        if isinstance(tables, list):
            return images_tables(tables, self.mistakes)
        return [self._section("images", ImagesTable)]

    def _epochs_of(self, entry: ModelEntry, asked: Literal["all"] | Sequence[int]) -> list[int]:
        """Return those of the epochs that are asked for that a model's training run has kept."""
        if not asked or not entry.reference.startswith("file:"):
            return []
        kept = sorted(epochs_of(Path(file_parts(entry.reference)[0].removeprefix("file:"))))
        return [epoch for epoch in kept if asked == "all" or epoch in asked]

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

    def _import(self, module: str) -> None:
        try:
            import_here(module)
        except Exception as error:  # the user's own code, run by importing it
            self.mistakes.append(f"[study] imports: {module!r} cannot be imported ({type(error).__name__}: {error})")

    def _known_resets(self, names: Sequence[str]) -> list[Reset]:
        """Return the resets of the names that are right, each once."""
        known: dict[str, Reset] = {}
        for name in names:
            try:
                reset = get_reset(name)
                known.setdefault(reset.name, reset)
            except LayercritError as error:
                self.mistakes.append(f"[protocol] {error}")
        return list(known.values())

    def _check_names(self, names: Sequence[str], get: Any) -> None:
        for name in names:
            try:
                get(name)
            except LayercritError as error:
                self.mistakes.append(f"[protocol] {error}")

    def _modules(self, models: Sequence[ModelEntry], images: Sequence[Images]) -> dict[str, Any] | None:
        if "module_criticality" not in self.content:
            return None
        table = self._section("module_criticality", ModuleCriticalityTable)
        pending = {run.name for run in self.runs if not run.is_finished()}
        self.mistakes.extend(module_mistakes(table, [] if self.some_unread else models, images, pending))
        initial = None if table.initial is None else self._absolute_donor(table.initial)
        if initial is not None:
            self._check_weights("[module_criticality] initial", initial)
        return module_settings(table, initial)

    # --- models -----------------------------------------------------------------------------------------------------

    def _models(self, tables: Sequence[tuple[str, Set[str], ModelTable]], resets: Sequence[Reset]) -> list[ModelEntry]:
        rewinds = any(reset.donor == "checkpoint" and reset.options.get("epoch") is None for reset in resets)
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
        return models

    def _trained(self, where: str, table: ModelTable, rewinds: bool) -> Iterator[ModelEntry]:
        """Yield the model of a table with a method, and keep how it is trained."""
        found = list(model_mistakes(where, table, self.training))
        self.mistakes.extend(found)
        if found or self.training is None or table.method is None:
            self.some_unread = True
            return
        run = run_of(table, self.training, self.path, absolute_source(self.training.data, self.path.parent))
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
            given["donor"] = self._absolute_donor(table.donor)
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

    def _check_donors(self, models: Sequence[ModelEntry], resets: Sequence[Reset]) -> None:
        needing = [reset for reset in resets if reset.donor in ("checkpoint", "model")]
        by_epoch = [reset for reset in needing if reset.options.get("epoch") is not None]
        others = [reset for reset in needing if reset not in by_epoch]
        if len({reset.donor for reset in others}) > 1:
            self.mistakes.append(
                f"[protocol] {' and '.join(reset.name for reset in others)} would both take the key donor of each "
                "model: rewind to an epoch by its number, rewind(epoch=0), which a model's own training run kept"
            )
        for model in models:
            if others and model.donor is None:
                self.mistakes.append(f"model {model.name!r} has no donor, which the reset {others[0].name!r} needs")
            if model.donor is not None:
                self._check_weights(f"the donor of model {model.name!r}", model.donor)
            for reset in by_epoch:
                self._check_epoch(model, reset)

    def _check_weights(self, what: str, donor: str) -> None:
        folder = Path(donor.rpartition("@epoch=")[0] or donor)
        if any(run.folder == folder and not run.is_finished() for run in self.runs):
            return  # it will be there
        try:
            if is_reference(donor):
                if (n_models := len(list(models_of(donor, self.path.parent)))) != 1:
                    self.mistakes.append(f"{what} must be one model; {donor!r} names {n_models}")
            elif not weight_file(donor).is_file():
                self.mistakes.append(f"{what} is not a file: {donor}")
        except LayercritError as error:
            self.mistakes.append(f"{what}: {error}")

    def _check_epoch(self, model: ModelEntry, reset: Reset) -> None:
        if any(file_parts(model.reference)[0] == f"file:{run.folder}" and not run.is_finished() for run in self.runs):
            return  # it may keep that epoch yet
        try:
            weight_file(epoch_of_run(reset, model.reference, model.donor_for(reset)))
        except LayercritError as error:
            self.mistakes.append(f"model {model.name!r}: {error}")

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

    def _absolute_donor(self, donor: str) -> str:
        """Make the path of a donor absolute, also that in a reference ``file:...``."""
        if not is_reference(donor):
            return str(self._absolute(donor))
        kind, _, rest = donor.partition(":")
        return f"{kind}:{self._absolute(rest)}" if kind == "file" else donor


def _listed(given: str | Sequence[str]) -> list[str]:
    return list(dict.fromkeys([given] if isinstance(given, str) else given))
