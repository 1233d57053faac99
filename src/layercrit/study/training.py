"""Train the models of a study file: one architecture and data set, one method each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercrit.errors import LayercritError, TrainingError, near
from layercrit.study.file import read_study_file
from layercrit.training import Options, TrainedModel, get_method, open_training_data, train
from layercrit.training.runs import TrainingProgress

__all__ = ["TrainingReport", "train_models"]


@dataclass(frozen=True)
class TrainingReport:
    """The outcome of training the models of a study file.

    Attributes:
        trained: the trained models by name, those of earlier calls included.
        failures: why each of the others could not be trained.
    """

    trained: dict[str, TrainedModel]
    failures: dict[str, str]


def train_models(
    study_file: str | Path,
    names: Sequence[str] = (),
    *,
    options: Options | None = None,
    download: bool = False,
    progress: Callable[[str, TrainingProgress], Any] | None = None,
    say: Callable[[str], Any] | None = None,
) -> TrainingReport:
    """Train what the ``[training]`` table of a study file describes; models that are already trained stay as they are.

    Args:
        study_file: its path.
        names: of the models to train; none: all.
        options: what results do not depend on.
        download: let torchvision fetch the data.
        progress: called with the name of the model and the progress of its training.
        say: called with every other message.

    Raises:
        StudyError: the file has mistakes.
        TrainingError: it has no ``[training]`` table, or no such model; the data cannot be used.
    """
    study = read_study_file(study_file)
    if study.training is None:
        raise TrainingError(f"{study_file} has no [training] table, so there is nothing in it to train.")
    runs = {run.name: run for run in study.training.runs}
    if not runs:
        raise TrainingError(f"{study_file} has no model with a method, so there is nothing in it to train.")
    for name in names:
        if name not in runs:
            raise TrainingError(f"{study_file} trains no model {name!r}. {near(name, runs)}")
    wanted = [runs[name] for name in dict.fromkeys(names or runs)]
    say = say or (lambda line: None)
    data = open_training_data(wanted[0].data, download=download)
    trained: dict[str, TrainedModel] = {}
    failures: dict[str, str] = {}
    for run in wanted:
        settings = dict(run.settings) | ({} if run.epochs is None else {"epochs": run.epochs})
        try:
            trained[run.name] = train(
                get_method(run.method, settings),
                run.arch,
                data,
                run.folder,
                seed=run.seed,
                precision=run.precision,
                weights_dtype=run.weights_dtype,
                options=options,
                progress=False if progress is None else lambda done, name=run.name: progress(name, done),  # type: ignore[misc]
                say=say,
            )
        except Exception as error:  # whatever a network or a device raises must not stop the other models
            known = isinstance(error, LayercritError)
            failures[run.name] = str(error) if known else f"{type(error).__name__}: {error}"
            say(f"{run.name} failed: {failures[run.name]}")
        else:
            say(f"{run.name}: {trained[run.name].top1_accuracy:.1%} top-1 accuracy on the held-out images.")
    return TrainingReport(trained, failures)
