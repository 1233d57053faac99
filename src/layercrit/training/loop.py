"""Train a model by a method: the loop that all methods share, interrupted and resumed at will."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercrit.errors import TrainingError
from layercrit.locks import hold
from layercrit.machine import versions
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.model import logits_of
from layercrit.restoring import rng_untouched
from layercrit.training.architecture import fitted_architecture, initial_network
from layercrit.training.batches import held_out_batches, to_device
from layercrit.training.data import TrainingData
from layercrit.training.methods import Learner, Method
from layercrit.training.optimisation import make_accelerator
from layercrit.training.phases import PhaseOfRun, TrainingProgress
from layercrit.training.runs import RunFolder

__all__ = ["PRECISIONS", "TRACKERS", "WEIGHTS_DTYPES", "Options", "TrainedModel", "train"]

PRECISIONS = ("no", "bf16", "fp16")
WEIGHTS_DTYPES = {"float32": torch.float32, "float16": torch.float16}
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Options:
    """What a training run is told that its result does not depend on, but for rounding.

    Attributes:
        keep_epochs: after which epochs, counted through all phases, to keep the weights; the initial ones always are.
        device: ``auto``, ``cpu`` or ``cuda``.
        n_workers: processes that make views; 0: this one.
        save_seconds: between states that an interrupted run goes on from; one is kept after each epoch anyway.
        trackers: of ``tensorboard`` and ``wandb``.
    """

    keep_epochs: Sequence[int] = ()
    device: str = "auto"
    n_workers: int = 0
    save_seconds: float = 60.0
    trackers: Sequence[str] = ()


@dataclass(frozen=True)
class TrainedModel:
    """What a training run left.

    Attributes:
        folder: where it lies.
        record: what stands in its ``model.json``.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def reference(self) -> str:
        """The model reference that `open_model` takes."""
        return f"file:{self.folder}"

    @property
    def top1_accuracy(self) -> float:
        """Share of held-out images that are classified right, in [0, 1]."""
        return float(self.record["top1_accuracy"])


def train(
    method: Method,
    architecture: str,
    data: TrainingData,
    folder: str | Path,
    *,
    seed: int = 0,
    precision: str = "no",
    weights_dtype: str = "float32",
    options: Options | None = None,
    progress: Callable[[TrainingProgress], Any] | None = None,
    say: Callable[[str], Any] | None = None,
) -> TrainedModel:
    """Train a model, or go on with a run that was interrupted, with the result of an uninterrupted one.

    Initial weights and the order of images depend on ``seed`` alone, so that models trained by several methods under
    one seed differ in nothing but the method.

    Args:
        method: how, with its settings.
        architecture: a model reference, whose weights are drawn anew.
        data: what to learn from.
        folder: where the run is kept (see `RunFolder`); a finished one is returned as it is.
        seed: of weights, order and views.
        precision: ``no`` for float32, or ``bf16`` or ``fp16``, in which products are computed.
        weights_dtype: ``float32``, or ``float16`` to store matrices of the final weights in half the space; the
            accuracy reported is that of the weights as stored.
        options: what the result does not depend on.
        progress: is told how far the run is.
        say: is told what happens besides.

    Raises:
        TrainingError: the folder holds another run, a setting makes no sense, or the loss is no number any more.
        ModelError: the architecture cannot be opened or does not fit the images.
    """
    if precision not in PRECISIONS or weights_dtype not in WEIGHTS_DTYPES:
        raise TrainingError(
            f"precision must be one of {', '.join(PRECISIONS)} and weights_dtype one of {', '.join(WEIGHTS_DTYPES)}; "
            f"got {precision!r} and {weights_dtype!r}."
        )
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
    options = options or Options()
    accelerator = make_accelerator(options.device, precision, options.trackers, run_folder.path)
    with (
        hold(run_folder.path, "training run") if accelerator.is_main_process else contextlib.nullcontext(),
        rng_untouched(),
    ):
        run = Run(method, data, about, run_folder, accelerator, options, progress or _nobody, say or _nobody)
        return TrainedModel(run_folder.path, run.go())


class Run:
    """One training run, from its initial weights or a kept state to its final weights."""

    def __init__(
        self,
        method: Method,
        data: TrainingData,
        about: dict[str, Any],
        folder: RunFolder,
        accelerator: Any,
        options: Options,
        progress: Callable[[TrainingProgress], Any],
        say: Callable[[str], Any],
    ) -> None:
        self.method, self.data, self.about, self.folder = method, data, about, folder
        self.accelerator, self.options, self.progress, self.say = accelerator, options, progress, say
        self.seed = int(about["seed"])
        self.phases = method.phases()
        self.batch_size = min(method.batch_size, len(data.train))
        if self.batch_size % accelerator.num_processes:
            raise TrainingError(
                f"batch_size {self.batch_size} cannot be shared by {accelerator.num_processes} processes evenly."
            )
        self.epochs = sum(phase.epochs for phase in self.phases)
        if max(options.keep_epochs, default=0) > self.epochs:
            raise TrainingError(
                f"keep_epochs are {', '.join(map(str, options.keep_epochs))}, but the run ends after epoch "
                f"{self.epochs}. Leave out what comes after it."
            )
        self.steps = self.epochs * (len(data.train) // self.batch_size)
        self.history: list[dict[str, Any]] = []
        self.saved_at = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Train to the end and return the record."""
        network = initial_network(self.about["arch"], self.seed, self.data.inputs)
        initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        state = self._last_state()
        self._start_trackers()
        if state is None and self.accelerator.is_main_process:
            self.folder.save_epoch(0, initial)
        step = 0
        for number, phase in enumerate(self.phases):
            n_steps = phase.epochs * (self.steps // self.epochs)
            if state is None or state["phase"] <= number:
                now = state if state is not None and state["phase"] == number else None
                network = PhaseOfRun(self, number, phase, network, first_step=step).go(now)
            step += n_steps
        record = self._finish(network, hash_tensors(initial))
        self.accelerator.end_training()
        return record

    def _last_state(self) -> dict[str, Any] | None:
        state, problems = self.folder.load_state()
        for problem in problems:
            self.say(f"{problem}.")
        if state is None:
            if problems:
                self.say("No whole state is left: training starts from the beginning.")
            return None
        _check_same_run(self.folder.path, json.loads(state["about"]), self.about)
        self.history = json.loads(state["history"])
        self.say(f"Going on with {self.folder.path} after {state['step']} of {self.steps} steps.")
        return state

    def _start_trackers(self) -> None:
        if self.options.trackers:
            settings = {name: value for name, value in self.about.items() if isinstance(value, str | int)}
            self.accelerator.init_trackers("layercrit", config={**settings, **self.about["settings"]})

    def _finish(self, network: nn.Module, initial_sha256: str) -> dict[str, Any]:
        dtype = WEIGHTS_DTYPES[self.about["weights_dtype"]]
        tensors = dict(network.state_dict())
        if dtype != torch.float32:
            rounded = {name: t.to(dtype) if t.dim() > 1 and t.is_floating_point() else t for name, t in tensors.items()}
            network.load_state_dict(rounded)
            tensors = rounded
        accuracy = self.accuracy_of(network)
        record = {
            **self.about,
            "category": self.method.category,
            "changes": self.method.changes,
            "paper": self.method.paper,
            "epochs": self.epochs,
            "top1_accuracy": accuracy,
            "seconds": round(sum(row["seconds"] for row in self.history), 1),
            "by_epoch": self.history,
            "n_parameters": sum(p.numel() for p in network.parameters()),
            "initial_sha256": initial_sha256,
            "device": str(self.accelerator.device),
            "n_processes": self.accelerator.num_processes,
            "versions": versions(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if self.accelerator.is_main_process:
            record = self.folder.save_final(tensors, record)
        self.accelerator.wait_for_everyone()
        return record

    @torch.no_grad()
    def accuracy_of(self, network: nn.Module) -> float:
        """Return the share of held-out images that are classified right, in [0, 1]."""
        data, device = self.data, self.accelerator.device
        normalise = Learner(nn.Identity(), data.inputs).to(device).normalise
        network.eval()
        right = torch.zeros((), device=device)
        for (images,), labels in held_out_batches(
            data.test,
            data.inputs,
            max(self.batch_size, 256),
            n_workers=self.options.n_workers,
            process=self.accelerator.process_index,
            n_processes=self.accelerator.num_processes,
        ):
            logits = logits_of(network(normalise(to_device(images, device))))  # in float32, as it is asked later
            right += (logits.argmax(dim=1) == labels.to(device)).sum()
        return float(self.accelerator.reduce(right, "sum").item() / len(data.test))


def _nobody(_: object) -> None:
    """Listen to nothing."""


def _check_same_run(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a TrainingError that says what is unlike, unless both are the same run."""

    def flat(about: Mapping[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps({name: about.get(name) for name in asked}))
        own = {"data": plain["data"]["sha256"], **plain["settings"]}
        return {**plain, **own, "settings": None}

    try:
        old, new = flat(there), flat(asked)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} holds something else than a training run. Name another --out.") from error
    unlike = [
        f"{name} {old.get(name)!r} there, {new.get(name)!r} asked for"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if unlike:
        raise TrainingError(
            f"{folder} holds another training run: {'; '.join(unlike[:5])}. Name another --out, or remove that folder."
        )
