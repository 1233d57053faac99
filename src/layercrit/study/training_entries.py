"""The table ``[training]`` of a study file, and the training runs of the models that have a ``method``."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layercrit.errors import LayercritError, StudyError
from layercrit.models.file_source import named_by_user
from layercrit.study.entries import ModelEntry, models_of
from layercrit.study.schema import ModelTable, TrainingTable

__all__ = ["Training", "TrainingRun", "model_mistakes", "run_of", "training_mistakes"]


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
        seed: of the initial weights and of all random numbers in training.
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
        entry = ModelEntry(self.name, named_by_user(self.folder, self.arch), method.category)
        return replace(entry, attack_norm=method.norm, eps=method.eps) if isinstance(method, Adversarial) else entry


@dataclass(frozen=True)
class Training:
    """How a study trains its own models.

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


def training_mistakes(table: TrainingTable, study_folder: Path) -> Iterator[str]:
    """Yield what is wrong with the architecture in a table ``[training]``, empty where it is missing."""
    arch = table.arch
    if arch.startswith("file:"):
        yield f"[training] arch must be a model reference without weights, such as 'timm:resnet18'; got {arch!r}"
    elif arch:
        try:
            if (n_models := len(list(models_of(arch, study_folder)))) != 1:
                yield f"[training] arch must be one model reference; {arch!r} names {n_models}"
        except LayercritError as error:
            yield f"[training] arch: {error}"


def model_mistakes(where: str, model: ModelTable, table: TrainingTable | None) -> Iterator[str]:
    """Yield what is wrong with a model that has a method, beyond its single keys.

    Args:
        where: the model's place in the study file.
        model: its keys, without those whose value is wrong by itself.
        table: the table ``[training]``, or None without one.
    """
    from layercrit.training.methods import get_method

    if table is None:
        yield f"{where}: method needs a table [training] with the architecture (arch) and the images (data)"
    if model.name is None:
        yield f"{where}: a model with a method needs a name, which is also that of its folder"
    elif not re.fullmatch(r"\w([\w.,+= -]*[\w+=-])?", model.name):
        words = "fit for a folder (letters, digits and any of '.,+=- _' inside)"
        yield f"{where}: name must be {words}; got {model.name!r}"
    settings = {**(table.settings if table else {}), **model.settings}
    if "epochs" in settings:
        yield f"{where}: epochs must be given next to settings, not in them"
    if model.method is None:
        return  # said already
    try:
        get_method(model.method, settings)
    except LayercritError as error:
        yield f"{where}: {error}"


def run_of(model: ModelTable, table: TrainingTable, file: Path, data: str) -> TrainingRun:
    """Return the training run of a model without mistakes; its own keys take precedence over those of ``[training]``.

    Args:
        model: the model's keys.
        table: the table ``[training]``, without values that are wrong.
        file: the study file.
        data: the source of the training images, with an absolute path.
    """
    arch, name = table.arch, str(model.name)
    with suppress(LayercritError):  # which is among the mistakes of the table
        arch = next(models_of(arch, file.parent)).reference
    return TrainingRun(
        name=name,
        method=str(model.method),
        settings={**table.settings, **model.settings},
        arch=arch,
        data=data,
        folder=file.parent / Path(table.folder).expanduser() / name,
        epochs=table.epochs if model.epochs is None else model.epochs,
        seed=table.seed if model.seed is None else model.seed,
        precision=table.precision,
        weights_dtype=table.weights_dtype,
    )
