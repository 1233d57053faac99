"""A training run: what it trains on, what it was asked for, and how far it is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layercrit.errors import TrainingError
from layercrit.models.model import logits_of
from layercrit.training.batches import held_out_batches, to_device
from layercrit.training.data import TrainingData
from layercrit.training.folder import RunFolder
from layercrit.training.methods import Learner, Method

__all__ = ["Options", "Run", "TrainingProgress"]


@dataclass(frozen=True)
class Options:
    """Options of a training run that do not change its result, except for rounding.

    Attributes:
        keep_epochs: epochs, counted over all phases, after which the weights are kept; the initial ones always are.
        device: ``auto``, ``cpu`` or ``cuda``.
        n_workers: number of data loading processes; 0: load in this process.
        save_seconds: time between saved states in seconds; one is saved after each epoch in any case.
        trackers: any of ``tensorboard`` and ``wandb``.
    """

    keep_epochs: Sequence[int] = ()
    device: str = "auto"
    n_workers: int = 0
    save_seconds: float = 60.0
    trackers: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training run is.

    Attributes:
        phase: name of the current phase.
        epoch: number of the current epoch, from 1, counted over all phases.
        epochs: number of epochs of all phases.
        step: number of steps done so far, over all phases.
        steps: number of steps of the whole run.
        loss: mean loss of the current epoch so far.
        accuracy: top-1 accuracy on the held-out images after the last epoch, in [0, 1], or None.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None


class Run:
    """What all phases of a training run share, and what they have written down so far.

    Attributes:
        method: the training method with its settings.
        data: the images.
        about: what identifies the run, as plain values; a run is resumed only if they are the same.
        folder: where the run is saved.
        accelerator: accelerate's handle on devices and processes.
        options: what the result does not depend on.
        progress: called with the `TrainingProgress`.
        say: called with messages for the user.
        seed: of initial weights, order of images and views.
        phases: of the method.
        batch_size: number of images per step, over all processes.
        epochs: number of epochs of all phases.
        steps: number of steps of all phases.
        history: one row per finished epoch.
        saved_at: `time.monotonic` of the last saved state.

    Raises:
        TrainingError: the batch size or ``keep_epochs`` do not fit.
    """

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
                f"batch_size must be a multiple of the number of processes, {accelerator.num_processes}; "
                f"got {self.batch_size}."
            )
        self.epochs = sum(phase.epochs for phase in self.phases)
        if max(options.keep_epochs, default=0) > self.epochs:
            raise TrainingError(
                f"keep_epochs are {', '.join(map(str, options.keep_epochs))}, but training ends after epoch "
                f"{self.epochs}. Leave out the later ones."
            )
        self.steps = self.epochs * (len(data.train) // self.batch_size)
        self.history: list[dict[str, Any]] = []
        self.saved_at = time.monotonic()

    @torch.no_grad()
    def accuracy_of(self, network: nn.Module) -> float:
        """Return the network's top-1 accuracy on the held-out images, in [0, 1]."""
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
            logits = logits_of(network(normalise(to_device(images, device))))  # in float32, as in later measurements
            right += (logits.argmax(dim=1) == labels.to(device)).sum()
        return float(self.accelerator.reduce(right, "sum").item() / len(data.test))
