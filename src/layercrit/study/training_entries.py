"""The table ``[training]`` of a study file, and the training runs of the models that have a ``method``."""

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layercrit.errors import LayercritError, StudyError, near
from layercrit.study.entries import ModelEntry, models_of

__all__ = ["Training", "TrainingRun", "model_mistakes", "run_of", "training_mistakes"]

TRAINING_KEYS: dict[str, tuple[type, ...]] = {
    "arch": (str,), "data": (str,), "folder": (str,), "epochs": (int,), "seed": (int,), "precision": (str,),
    "weights_dtype": (str,), "settings": (dict,),
}  # fmt: skip
"""What may stand in ``[training]``, and of which types."""

METHOD_KEYS: dict[str, tuple[type, ...]] = {"method": (str,), "settings": (dict,), "epochs": (int,), "seed": (int,)}
"""What a model with a method may have beyond the keys of all models."""

_CHOICES = {"precision": ("no", "bf16", "fp16"), "weights_dtype": ("float32", "float16")}  # the first is the default


@dataclass(frozen=True)
class TrainingRun:
    """How one model of a study is trained.

    Attributes:
        name: the model's.
        method: name of a training method.
        settings: those of the method that are not its defaults.
        arch: the architecture, as a model reference, paths in it absolute.
        data: source of the training images.
        folder: where the run writes.
        epochs: passes over the training images; None: as many as the method says.
        seed: of the initial weights and of everything drawn in training.
        precision: ``no`` for float32, ``bf16`` or ``fp16``.
        weights_dtype: how the final weights are stored, ``float32`` or ``float16``.
    """

    name: str
    method: str
    settings: dict[str, Any]
    arch: str
    data: str
    folder: Path
    epochs: int | None
    seed: int
    precision: str
    weights_dtype: str

    def is_finished(self) -> bool:
        """Return whether the final weights and their record are there."""
        return all((self.folder / name).is_file() for name in ("model.safetensors", "model.json"))

    def entry(self) -> ModelEntry:
        """Return the model that the run makes, in the category of its method."""
        from layercrit.training.adversarial import Adversarial
        from layercrit.training.methods import get_method

        method = get_method(self.method, self.settings)
        entry = ModelEntry(self.name, f"file:{self.folder}", method.category)
        return replace(entry, attack_norm=method.norm, eps=method.eps) if isinstance(method, Adversarial) else entry


@dataclass(frozen=True)
class Training:
    """The models that a study trains itself.

    Attributes:
        runs: one for each model with a method, in order.
        file: the study file.
    """

    runs: tuple[TrainingRun, ...]
    file: Path

    def untrained(self) -> list[str]:
        """Return the names of the models whose training has not finished."""
        return [run.name for run in self.runs if not run.is_finished()]

    def check_finished(self) -> None:
        """Make sure that all models are trained.

        Raises:
            StudyError: some are not.
        """
        if names := self.untrained():
            many = len(names) > 1
            raise StudyError(
                f"{len(names)} model{'s are' if many else ' is'} not trained yet: {', '.join(names)}. "
                f"Train {'them' if many else 'it'} with: layercrit train --study {shlex.quote(str(self.file))}"
            )


def training_mistakes(table: Mapping[str, Any], study_folder: Path) -> Iterator[str]:
    """Yield what is wrong with a table ``[training]``, in which values of a wrong type are None."""
    for key, question in (("arch", "what is trained, such as 'timm:resnet18'"), ("data", "what is it trained on")):
        if key not in table:
            yield f"[training] {key} is missing: {question}?"
    for key, known in _CHOICES.items():
        if (given := table.get(key)) is not None and given not in known:
            yield f"[training] unknown {key} {given!r}. {near(given, known)}"
    yield from _number_mistakes("[training]", table)
    if (arch := table.get("arch")) is None:
        return
    if arch.startswith("file:"):
        yield f"[training] arch must be a model reference without weights, such as 'timm:resnet18'; got {arch!r}"
        return
    try:
        found = list(models_of(arch, study_folder))
    except LayercritError as error:
        yield f"[training] arch: {error}"
        return
    if len(found) != 1:
        yield f"[training] arch must be one model reference; {arch!r} names {len(found)}"


def model_mistakes(where: str, model: Mapping[str, Any], table: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what is wrong with a model that has a method.

    Args:
        where: the model's place in the study file.
        model: its keys, without those whose value has a wrong type.
        table: the table ``[training]``, or None without one.
    """
    from layercrit.training.methods import get_method

    if table is None:
        yield f"{where}: method needs a table [training] that says the architecture (arch) and the images (data)"
    name = model.get("name")
    if name is None:
        yield f"{where}: a model with a method needs a name, after which its folder is called"
    elif not re.fullmatch(r"\w([\w.,+= -]*[\w+=-])?", name):
        yield f"{where}: name must be fit for a folder (letters, digits and any of '.,+=- _' inside); got {name!r}"
    yield from _number_mistakes(f"{where}:", model)
    settings = {**_settings(table), **_settings(model)}
    if "epochs" in settings:
        yield f"{where}: epochs must stand beside settings, not in them"
    if (method := model.get("method")) is None:
        return  # said already
    try:
        get_method(method, settings)
    except LayercritError as error:
        yield f"{where}: {error}"


def run_of(model: Mapping[str, Any], table: Mapping[str, Any], file: Path, data: str) -> TrainingRun:
    """Return the training run of a model without mistakes; its own keys win over those of ``[training]``.

    Args:
        model: the model's keys.
        table: the table ``[training]``, without values of a wrong type.
        file: the study file.
        data: the source of the training images, with an absolute path.
    """
    arch = table.get("arch", "")
    with suppress(LayercritError):  # which is among the mistakes of the table
        arch = next(models_of(arch, file.parent)).reference
    return TrainingRun(
        name=model["name"],
        method=model["method"],
        settings={**_settings(table), **_settings(model)},
        arch=arch,
        data=data,
        folder=file.parent / Path(table.get("folder", "models")).expanduser() / model["name"],
        epochs=model.get("epochs", table.get("epochs")),
        seed=model.get("seed", table.get("seed", 0)),
        **{key: table.get(key, known[0]) for key, known in _CHOICES.items()},
    )


def _settings(table: Mapping[str, Any] | None) -> dict[str, Any]:
    return (table or {}).get("settings") or {}


def _number_mistakes(where: str, table: Mapping[str, Any]) -> Iterator[str]:
    epochs, seed = table.get("epochs"), table.get("seed")
    if epochs is not None and epochs < 1:
        yield f"{where} epochs must be at least 1; got {epochs}"
    if seed is not None and not 0 <= seed < 2**64:
        yield f"{where} seed must be a whole number from 0 to 2**64 - 1; got {seed}"
