"""Train a model by a method: the loop that all methods share, which can be interrupted and resumed."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from layercrit.errors import TrainingError
from layercrit.locks import hold
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.file_source import named_by_user
from layercrit.progress_bar import Bar
from layercrit.provenance import versions_with
from layercrit.restoring import rng_untouched, undisturbed
from layercrit.training.architecture import fitted_architecture, initial_network
from layercrit.training.data import TrainingData, open_training_data
from layercrit.training.methods import METHODS, Method, get_method
from layercrit.training.optimisation import make_accelerator
from layercrit.training.phases import PhaseOfRun
from layercrit.training.runs import WEIGHTS_DTYPES, Options, Run, RunFolder, TrainingProgress

__all__ = ["PRECISIONS", "TRACKERS", "WEIGHTS_DTYPES", "TrainedModel", "train"]

PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class TrainedModel:
    """The result of a training run.

    Attributes:
        folder: of the run.
        record: content of its ``model.json``.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def reference(self) -> str:
        """The model reference that `open_model` takes."""
        return named_by_user(self.folder, self.record["arch"])

    @property
    def top1_accuracy(self) -> float:
        """Top-1 accuracy on the held-out images, in [0, 1]."""
        return float(self.record["top1_accuracy"])


@undisturbed()
def train(
    method: Method | str,
    architecture: str,
    data: TrainingData | str | Path,
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    precision: str = "no",
    weights_dtype: str = "float32",
    options: Options | None = None,
    progress: Callable[[TrainingProgress], Any] | bool = True,
    say: Callable[[str], Any] | None = None,
) -> TrainedModel:
    """Train a model, or resume an interrupted run, with the same result as without the interruption.

    Initial weights and the order of images depend only on ``seed``, so that models trained by different methods with
    the same seed differ only in the method.

    Args:
        method: the name of a training method, or one with its settings, as `get_method` returns it.
        architecture: a model reference; its weights are initialised at random.
        data: labelled images: a source, or what `open_training_data` makes of one.
        folder: where the run is saved (see `RunFolder`); a finished run is returned as it is.
        settings: of a method that is given by name, such as ``{"epochs": 5}``.
        seed: of initial weights, order of images and views.
        precision: of mixed-precision training, ``bf16`` or ``fp16``; ``no``: float32.
        weights_dtype: of the saved matrices, also those of kept epochs, ``float32`` or ``float16``; the reported
            accuracy is that of the saved weights.
        options: what the result does not depend on.
        progress: called with the progress of the run; or whether to show a progress bar on a terminal.
        say: called with messages for the user; None: they are shown with the progress bar.

    Raises:
        TrainingError: the method or a setting is unknown, the folder contains another run, an argument or a setting is
            invalid, or the loss is not finite.
        ProbeError: the images cannot be read.
        ModelError: the architecture cannot be opened or does not fit the images.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> network = "py:layercrit.demo:small_resnet"
        >>> trained = layercrit.train("baseline", network, images, "run", settings={"epochs": 1})
        >>> trained.reference, trained.record["epochs"]
        ('file:run', 1)
    """
    if isinstance(method, str):
        method = get_method(method, settings)
    elif settings:
        raise TrainingError("settings are for a method that is given by name; this one has its own.")
    if not isinstance(data, TrainingData):
        data = open_training_data(data)
    options = options or Options()
    for name, values, known in (
        ("precision", (precision,), PRECISIONS),
        ("weights_dtype", (weights_dtype,), WEIGHTS_DTYPES),
        ("trackers", options.trackers, TRACKERS),
    ):
        for value in values:
            if value not in known:
                raise TrainingError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
    run_folder = RunFolder(Path(folder).expanduser())
    about: dict[str, Any] = {
        "method": method.name,
        "settings": dataclasses.asdict(method),
        "seed": seed,
        "arch": fitted_architecture(architecture, data.inputs),
        "data": data.to_dict(),
        "precision": precision,
        "weights_dtype": weights_dtype,
    }
    if (record := run_folder.finished()) is not None:
        _check_same_run(run_folder.path, record, about)
        return TrainedModel(run_folder.path, record)
    accelerator = make_accelerator(options.device, precision, options.trackers, run_folder.path)
    with (
        hold(run_folder.path, "training run") if accelerator.is_main_process else contextlib.nullcontext(),
        rng_untouched(),
        Bar(shown=progress is True and accelerator.is_main_process) as bar,
    ):

        def show(done: TrainingProgress) -> None:
            bar.trained("", **vars(done))

        call = progress if callable(progress) else show
        run = Run(method, data, about, run_folder, accelerator, options, call, say or bar.say)
        return TrainedModel(run_folder.path, _all_phases(run))


def _all_phases(run: Run) -> dict[str, Any]:
    """Train from the initial weights or the last saved state to the end, and return the record."""
    network = initial_network(run.about["arch"], run.seed, run.data.inputs)
    initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = _last_state(run)
    _start_trackers(run)
    if state is None and run.accelerator.is_main_process:
        run.folder.save_epoch(0, run.as_saved(initial))
    step = 0
    for number, phase in enumerate(run.phases):
        n_steps = phase.epochs * (run.steps // run.epochs)
        if state is None or state["phase"] <= number:
            now = state if state is not None and state["phase"] == number else None
            network = PhaseOfRun(run, number, phase, network, first_step=step).go(now)
        step += n_steps
    record = _finish(run, network, hash_tensors(initial))
    run.accelerator.end_training()
    return record


def _last_state(run: Run) -> dict[str, Any] | None:
    """Return the state that the run is resumed from, and give the run its history; None for a new run."""
    state, problems = run.folder.load_state()
    for problem in problems:
        run.say(f"{problem}.")
    if state is None:
        if problems:
            run.say("No saved state is intact: training starts from the beginning.")
        return None
    _check_same_run(run.folder.path, json.loads(state["about"]), run.about)
    run.history = json.loads(state["history"])
    run.say(f"Resuming {run.folder.path} after {state['step']} of {run.steps} steps.")
    return state


def _start_trackers(run: Run) -> None:
    if run.options.trackers:
        settings = {name: value for name, value in run.about.items() if isinstance(value, str | int)}
        run.accelerator.init_trackers("layercrit", config={**settings, **run.about["settings"]})


def _finish(run: Run, network: nn.Module, initial_sha256: str) -> dict[str, Any]:
    """Save the final weights with their record, and return it."""
    tensors = run.as_saved(network.state_dict())
    network.load_state_dict(tensors)
    accuracy = run.accuracy_of(network)
    record = {
        **run.about,
        "category": run.method.category,
        "changes": run.method.changes,
        "paper": run.method.paper,
        "epochs": run.epochs,
        "top1_accuracy": accuracy,
        "seconds": round(sum(row["seconds"] for row in run.history), 1),
        "by_epoch": run.history,
        "n_parameters": sum(p.numel() for p in network.parameters()),
        "initial_sha256": initial_sha256,
        "kept_sha256": run.folder.kept_hashes(),
        "device": str(run.accelerator.device),
        "n_processes": run.accelerator.num_processes,
        "versions": versions_with(models=[run.about["arch"]], images=[run.about["data"]["source"]])
        | METHODS.package_of(run.method.name),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if run.accelerator.is_main_process:
        record = run.folder.save_final(tensors, record)
    run.accelerator.wait_for_everyone()
    return record


def _check_same_run(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a TrainingError that lists the differences unless both are the same run."""

    def flat(about: Mapping[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps({name: about.get(name) for name in asked}))
        own = {"data": plain["data"]["sha256"], **plain["settings"]}
        return {**plain, **own, "settings": None}

    try:
        old, new = flat(there), flat(asked)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} contains something other than a training run. Choose another --out.") from error
    different = [
        f"{name} is {old.get(name)!r}, but {new.get(name)!r} was requested"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if different:
        raise TrainingError(
            f"{folder} contains another training run: {'; '.join(different[:5])}. Choose another --out, or remove the "
            "folder."
        )
