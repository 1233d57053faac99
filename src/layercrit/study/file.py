"""The file that describes a study: read, checked as a whole, and written again with everything resolved.

.. code-block:: toml

    [study]
    name = "my study"              # default: the file's name
    baseline = "plain"             # the model that others are compared with
    leave_out = ["freezing"]       # models or categories that comparisons leave out
    imports = ["my_resets"]        # modules to import first, for resets, distances and model sources of your own

    [images]
    source = "imagenet/val"        # anything that `layercrit measure --images` takes; relative to this file
    n_images = 10000
    labels = true                  # use labels where there are some
    input_size = [3, 224, 224]     # every model is asked about the same pixels: channels, height, width,
    resize = 256                   # the shorter side before the crop (0: none)
    interpolation = "bilinear"

    [protocol]                     # the settings of `layercrit measure`
    trials = 3
    resets = ["rerandomize"]

    [[models]]
    reference = "zoo:*"            # one model, or a pattern, as are timm:resnet50.*, file:runs/*/final.safetensors
    name = "plain"                 # these are optional, and for single models but for the category
    category = "baseline"
    label = "Plain"
    accuracy = 0.7615
    donor = "runs/epoch0.safetensors"    # a weight file, for the reset rewind; "runs/a@epoch=0" of a training run
    attack_norm = "l2"             # of adversarial training, with the largest eps; known of the zoo's models and of
    eps = 0.5                      # those that layercrit trains

    [[models]]
    list = "models.csv"            # a column `reference` and any of the keys above; or one reference a line

A study can train models itself, by ``layercrit train --study FILE``, each in a folder of its own:

.. code-block:: toml

    [training]
    arch = "timm:resnet18"         # a model reference without weights
    data = "fashion-mnist"         # source of the training images; relative to this file
    folder = "models"              # where the trained models lie; relative to this file
    epochs = 10                    # default: as many as each method says
    seed = 0
    precision = "no"               # float32; or "bf16" or "fp16"
    weights_dtype = "float32"      # or "float16": how the final weights are stored
    settings = { batch_size = 128 }      # of every method

    [[models]]
    method = "robust_l2"           # instead of reference or list
    name = "pgd"                   # the folder's too, so it must be given; the model is file:models/pgd
    settings = { eps = 1.0 }       # these three are optional and win over those of [training]
    epochs = 12
    seed = 1
    category = "adversarial_training"    # default: the method's; label, accuracy and donor as for all models

The donor of such a model, for rewind, is the weights that it began with unless another one is given.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from layercrit.distances import DISTANCES, get_distance
from layercrit.errors import LayercritError, StudyError, near
from layercrit.layers import GROUPS, LAYER_TYPES
from layercrit.models.own_networks import import_here
from layercrit.models.references import without_weights
from layercrit.models.weight_files import weight_file
from layercrit.probes.images import STANDARD, Preprocessing
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.resets import RESETS, get_reset
from layercrit.study.entries import ModelEntry, models_of, rows_of_list
from layercrit.study.store import FILE
from layercrit.study.training_entries import (
    METHOD_KEYS,
    TRAINING_KEYS,
    Training,
    TrainingRun,
    model_mistakes,
    run_of,
    training_mistakes,
)

__all__ = ["ModelEntry", "StudyFile", "Training", "TrainingRun", "read_study_file"]

_LISTED = 20  # mistakes shown at once


@dataclass(frozen=True)
class StudyFile:
    """What a study is about, checked.

    Attributes:
        name: the study's name.
        models: the models, in order.
        source: where the images come from.
        n_images: how many to draw.
        labels: whether to use labels.
        preprocessing: how images become the pixels that every model is asked about.
        protocol: the settings of all measurements; its ``reset`` is the first of ``resets``.
        resets: names of the resets.
        distances: names of the distances, ``cosine`` first.
        baseline: name of the model that others are compared with, or None.
        leave_out: names of models or categories that comparisons leave out.
        imports: modules to import first.
        training: the models that the study trains itself, or None without a table ``[training]``.
    """

    name: str
    models: tuple[ModelEntry, ...]
    source: str
    n_images: int
    labels: bool
    preprocessing: Preprocessing
    protocol: Protocol
    resets: tuple[str, ...]
    distances: tuple[str, ...]
    baseline: str | None
    leave_out: tuple[str, ...]
    imports: tuple[str, ...]
    training: Training | None = None

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
                          "input_size": [size.channels, size.height, size.width],
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
        if (path / FILE).is_file() and not (path / "study.toml").is_file():
            raise StudyError(f"The study in {path} was imported or merged: there is nothing in it to run.")
        path = path / "study.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"The study file {path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"The study file {path} is not written as TOML: {error}.") from error
    return _Reader(path.absolute(), content).read()


_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "study": {"name": (str,), "baseline": (str,), "leave_out": (list,), "imports": (list,)},
    "images": {"source": (str,), "n_images": (int,), "labels": (bool,), "input_size": (list,), "resize": (int, list),
               "interpolation": (str,)},
    "protocol": {
        **{f.name: (type(getattr(DEFAULTS, f.name)), *((int,) if f.name in ("level", "batch_size") else ()))
           for f in fields(Protocol) if f.name not in ("reset", "n_images")},
        "resets": (list,), "distances": (list,),
    },
    "training": TRAINING_KEYS,
    "models": {"reference": (str,), "list": (str,), "name": (str,), "category": (str,), "label": (str,),
               "accuracy": (int, float), "donor": (str,), "attack_norm": (str,), "eps": (int, float), **METHOD_KEYS},
}  # fmt: skip
_COLUMNS = _KEYS["models"].keys() - {"list", *METHOD_KEYS}  # of a list of models
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}


class _Reader:
    """Reads one study file and gathers its mistakes."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content
        self.mistakes: list[str] = []
        self.some_unread = False  # models that could not be understood
        self.runs: list[TrainingRun] = []
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in _KEYS}  # None for values of a wrong type

    def read(self) -> StudyFile:
        self._check_keys()
        study, images, protocol = (self._table(name) for name in ("study", "images", "protocol"))
        for module in (imports := self._texts("study", "imports")):
            self._import(module)
        resets = self._texts("protocol", "resets") or [DEFAULTS.reset]
        distances = self._texts("protocol", "distances") or list(DISTANCES)
        self._check_names(resets, get_reset)
        self._check_names(distances, get_distance)
        single = {name: value for name, value in protocol.items() if name not in ("resets", "distances")}
        settings = self._protocol({**single, "reset": resets[0]})
        preprocessing = self._preprocessing(images)
        if self.tables["training"]:
            self.mistakes.extend(training_mistakes(self.tables["training"][0], self.path.parent))
        models = self._models(resets)
        self._check_donors(models, resets)
        leave_out = self._texts("study", "leave_out")
        baseline = study.get("baseline")
        self._check_comparison(models, baseline, leave_out)
        n_images = images.get("n_images", DEFAULTS.n_images)
        if n_images < 1:
            self.mistakes.append(f"[images] n_images must be at least 1; got {n_images}")
        if not any("source" in table for table in self.tables["images"]):
            self.mistakes.append("[images] source is missing: where do the images come from?")
        if self.mistakes:
            shown = "\n".join(f"  - {mistake}" for mistake in self.mistakes[:_LISTED])
            more = len(self.mistakes) - _LISTED
            raise StudyError(
                f"{self.path} has {len(self.mistakes)} mistake{'s' * (len(self.mistakes) > 1)}:\n{shown}"
                + (f"\n  ... and {more} more" if more > 0 else "")
            )
        return StudyFile(
            name=study.get("name", self.path.parent.name if self.path.stem == "study" else self.path.stem),
            models=tuple(models),
            source=self._absolute_source(images["source"]),
            n_images=n_images,
            labels=images.get("labels", True),
            preprocessing=preprocessing,
            protocol=settings,
            resets=tuple(dict.fromkeys(resets)),
            distances=tuple(dict.fromkeys(["cosine", *distances])),
            baseline=baseline,
            leave_out=tuple(leave_out),
            imports=tuple(imports),
            training=Training(tuple(self.runs), self.path) if "training" in self.content else None,
        )

    # --- sections ---------------------------------------------------------------------------------------------------

    def _table(self, name: str) -> dict[str, Any]:
        """Return what stands in a section, without values of a wrong type."""
        return {key: value for table in self.tables[name] for key, value in table.items() if value is not None}

    def _texts(self, section: str, key: str) -> list[str]:
        found: list[Any] = self._table(section).get(key, [])
        if all(isinstance(text, str) for text in found):
            return found
        self.mistakes.append(f"[{section}] {key} must be a list of texts; got {found!r}")
        return []

    def _check_keys(self) -> None:
        for section, values in self.content.items():
            if section not in _KEYS:
                self.mistakes.append(f"unknown section [{section}]. {near(section, _KEYS)}")
                continue
            tables = values if isinstance(values, list) else [values]
            expected = "[[models]] tables" if section == "models" else f"one table [{section}]"
            if not all(isinstance(t, dict) for t in tables) or isinstance(values, list) != (section == "models"):
                self.mistakes.append(f"expected {expected}, got {values!r}")
                continue
            for number, table in enumerate(tables, 1):
                where = f"[[models]] no. {number}:" if section == "models" else f"[{section}]"
                self.tables[section].append(self._well_typed(where, table, _KEYS[section]))

    def _well_typed(
        self, where: str, table: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in table.items():
            if key not in known:
                self.mistakes.append(f"{where} unknown key {key!r}. {near(key, known)}")
                continue
            fits = isinstance(value, known[key]) and (bool in known[key] or not isinstance(value, bool))
            found[key] = value if fits else None
            if not fits:
                words = " or ".join(_WORDS[kind] for kind in known[key] if kind is not int or float not in known[key])
                self.mistakes.append(f"{where} {key} must be {words}; got {value!r}")
        return found

    def _protocol(self, values: Mapping[str, Any]) -> Protocol:
        good: dict[str, Any] = {}
        for name, value in values.items():
            setting: dict[str, Any] = {name: value}
            try:
                Protocol(**setting)
            except LayercritError as error:
                self.mistakes.append(f"[protocol] {error}")
            else:
                good[name] = value
        protocol = Protocol(**good)
        if protocol.group not in GROUPS:
            self.mistakes.append(f"[protocol] unknown group {protocol.group!r}. {near(protocol.group, GROUPS)}")
        for name in (text.strip() for text in protocol.types.split(",")):
            if name not in (*LAYER_TYPES, "all"):
                self.mistakes.append(f"[protocol] unknown layer type {name!r}. {near(name, [*LAYER_TYPES, 'all'])}")
        return protocol

    def _preprocessing(self, images: Mapping[str, Any]) -> Preprocessing:
        size = images.get("input_size", [STANDARD.channels, STANDARD.height, STANDARD.width])
        if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int for n in size):
            self.mistakes.append(f"[images] input_size must be [channels, height, width]; got {size!r}")
            return STANDARD
        channels, height, width = size
        standard = STANDARD.resize if (height, width) == (STANDARD.height, STANDARD.width) else max(height, width)
        resize = images.get("resize", standard)
        try:
            return Preprocessing(
                channels=channels,
                height=height,
                width=width,
                resize=tuple(resize) if isinstance(resize, list) else resize or None,
                interpolation=images.get("interpolation", STANDARD.interpolation),
            )
        except (LayercritError, TypeError) as error:
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

    def _models(self, resets: Sequence[str]) -> list[ModelEntry]:
        if not self.content.get("models"):
            self.mistakes.append("there are no models: add [[models]] tables with a reference each")
        rewinds = any(name in RESETS and RESETS[name].donor == "checkpoint" for name in resets)
        models: list[ModelEntry] = []
        for number, table in enumerate(self.tables["models"], 1):
            where = f"[[models]] no. {number}"
            if len({"reference", "list", "method"} & table.keys()) != 1:
                self.mistakes.append(f"{where}: expected one of reference, list and method")
                self.some_unread = True
            elif "method" in table:
                models.extend(self._trained(where, table, rewinds))
            elif wrong := sorted(METHOD_KEYS.keys() & table.keys()):
                self.mistakes.append(f"{where}: {', '.join(wrong)} can be of models with a method only")
            elif "reference" in table:
                models.extend(self._entries(where, table))
            elif table["list"] is not None:  # else said already
                given = {key: value for key, value in table.items() if key != "list"}
                path = self._absolute(table["list"])
                for place, row in rows_of_list(where, path, given, _COLUMNS, self.mistakes):
                    models.extend(self._entries(place, row))
        self._check_unique(models)
        return models

    def _trained(self, where: str, table: Mapping[str, Any], rewinds: bool) -> Iterator[ModelEntry]:
        """Yield the model of a table with a method, and keep how it is trained."""
        table = {key: value for key, value in table.items() if value is not None}
        training = self._table("training") if "training" in self.content else None
        n_before = len(self.mistakes)
        self.mistakes.extend(model_mistakes(where, table, training))
        self._check_numbers(where, table)
        if len(self.mistakes) > n_before or training is None or "method" not in table:
            self.some_unread = True
            return
        run = run_of(table, training, self.path, self._absolute_source(training.get("data", "")))
        self.runs.append(run)
        entry = run.entry()
        if run.is_finished():
            self._check_architecture(where, [entry])
        beginning = {"donor": f"{run.folder}@epoch=0"} if rewinds else {}
        yield self._with_own_words(entry, beginning | table)

    def _with_own_words(self, entry: ModelEntry, table: Mapping[str, Any]) -> ModelEntry:
        words = ("name", "category", "label", "accuracy", "attack_norm", "eps")
        given = {key: table[key] for key in words if key in table}
        donor = str(self._absolute(table["donor"])) if "donor" in table else None
        return replace(entry, **given, donor=donor)

    def _check_numbers(self, where: str, table: Mapping[str, Any]) -> None:
        accuracy = table.get("accuracy")
        if accuracy is not None and not 0 <= accuracy <= 1:
            hint = f" Did you mean {accuracy / 100:g}?" if 1 < accuracy <= 100 else ""
            self.mistakes.append(f"{where}: accuracy must be a share in [0, 1]; got {accuracy}.{hint}")
        if (eps := table.get("eps")) is not None and not eps >= 0:
            self.mistakes.append(f"{where}: eps must be 0 or more; got {eps}")

    def _entries(self, where: str, table: Mapping[str, Any]) -> Iterator[ModelEntry]:
        """Yield the models of one row, more than one where its reference is a pattern."""
        table = {key: value for key, value in table.items() if value is not None}
        reference = table.get("reference")
        if reference is None:
            return  # said already
        self._check_numbers(where, table)
        try:
            found = list(models_of(reference, self.path.parent))
        except LayercritError as error:
            self.mistakes.append(f"{where}: {error}")
            self.some_unread = True
            return
        self._check_architecture(where, found)
        single = {"name", "label", "accuracy", "donor", "eps"} & table.keys()
        if len(found) > 1 and single:
            self.mistakes.append(
                f"{where}: {reference!r} names {len(found)} models, but {', '.join(sorted(single))} can be of one only"
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
                    f"two models are named {model.name!r}: {names[model.name]} and {model.reference}; give one a name"
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
                self.mistakes.append(f"the donor of model {model!r} is no file: {donor}")
        except LayercritError as error:
            self.mistakes.append(f"the donor of model {model!r}: {error}")

    def _check_comparison(self, models: Sequence[ModelEntry], baseline: Any, leave_out: Sequence[str]) -> None:
        names = [model.name for model in models]
        categories = [model.category for model in models if model.category]
        if self.some_unread:
            return  # what is not known here may be one of those
        if isinstance(baseline, str) and baseline not in names:
            self.mistakes.append(f"[study] baseline {baseline!r} is none of the models. {near(baseline, names)}")
        for name in leave_out:
            if name not in names and name not in categories:
                known = [*dict.fromkeys(categories), *names]
                self.mistakes.append(f"[study] leave_out {name!r} is no category and no model. {near(name, known)}")

    # --- paths ------------------------------------------------------------------------------------------------------

    def _absolute(self, path: str) -> Path:
        return self.path.parent / Path(path).expanduser()

    def _absolute_source(self, source: str) -> str:
        """Make the path in an image source absolute; that of a torchvision data set is its option ``root``."""
        if source.startswith("torchvision:"):
            return re.sub(r"(?<=[?&]root=)[^&]*", lambda found: str(self._absolute(found[0])), source)
        return str(self._absolute(source))


def _section(title: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join([title, *lines, ""])


def _toml(value: Any) -> str:
    # JSON's texts, numbers, truth values and lists are TOML's, too, but for one character that JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
