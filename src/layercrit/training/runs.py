"""A training run: what its phases share, and the folder that it is saved in."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from layercrit.errors import TrainingError
from layercrit.foreign_files import read_json
from layercrit.models.file_source import epochs_of
from layercrit.models.outputs import logits_of
from layercrit.models.unpickling import read_pickled
from layercrit.training.batches import held_out_batches, to_device
from layercrit.training.data import TrainingData
from layercrit.training.methods import Learner, Method

__all__ = ["WEIGHTS_DTYPES", "Options", "Run", "RunFolder", "TrainingProgress"]

WEIGHTS_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_STATES = 2  # number of saved states, so that one is left if the latest was damaged while it was written


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


class RunFolder:
    """The folder that a training run is saved in.

    ``model.safetensors`` and ``model.json`` are the final weights and their record, written last;
    ``epochs/epoch-0000.safetensors`` the initial weights and so on; ``log.csv`` has one row per epoch; ``state/``
    contains the states to resume from, and is removed at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"
        self.record = path / "model.json"
        self._states = path / "state"

    def finished(self) -> dict[str, Any] | None:
        """Return the record of a finished run, or None if it is not finished.

        Raises:
            TrainingError: the record cannot be read.
        """
        if not (self.record.is_file() and self.weights.is_file()):
            return None
        try:
            record: dict[str, Any] = read_json(self.record)
            record["method"], record["top1_accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{self.record} is not the record of a training run ({error}). Choose another --out."
            ) from error
        return record

    def save_epoch(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the weights after ``epoch`` epochs; 0: the initial weights."""
        _write(self.path / "epochs" / f"epoch-{epoch:04d}.safetensors", _safetensors(tensors))

    def kept_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the weight file of every epoch that was kept, by its number."""
        kept = sorted(epochs_of(self.path).items())
        return {str(epoch): hashlib.sha256(path.read_bytes()).hexdigest() for epoch, path in kept}

    def save_log(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write ``log.csv``, with one row for each finished epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]) if history else [])
        writer.writeheader()
        writer.writerows(history)
        _write(self.path / "log.csv", text.getvalue().encode())

    def save_final(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
        """Save the final weights and their record, remove the saved states, and return the record.

        The SHA-256 of the weight file is added to the record.
        """
        data = _safetensors(tensors)
        _write(self.weights, data)
        whole = {**record, "sha256": hashlib.sha256(data).hexdigest()}
        _write(self.record, (json.dumps(whole, indent=2) + "\n").encode())
        shutil.rmtree(self._states, ignore_errors=True)
        return whole

    # --- states -----------------------------------------------------------------------------------------------------

    def save_state(self, state: Mapping[str, Any], step: int) -> None:
        """Save a state to resume from, and delete all but the one before it.

        Args:
            state: tensors, numbers and strings, and lists and dictionaries of them.
            step: number of steps done so far, over all phases.
        """
        content = io.BytesIO()
        torch.save(dict(state), content)
        data = content.getvalue()
        _write(self._states / f"step-{step:08d}.pt", hashlib.sha256(data).digest() + data)
        for old in self._state_files()[_STATES:]:
            old.unlink(missing_ok=True)

    def load_state(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the latest intact state, if there is one, and messages about damaged later ones.

        A state cannot run code: it is read as weight files are.
        """
        problems = []
        for path in self._state_files():
            try:
                data = path.read_bytes()
                if hashlib.sha256(data[32:]).digest() != data[:32]:
                    problems.append(f"{path} is damaged or incomplete, so it is skipped")
                    continue
                return dict(cast(Mapping[str, Any], read_pickled(data[32:], {}))), problems
            except Exception as error:  # unpickling may raise anything
                problems.append(f"{path} cannot be read ({type(error).__name__}), so it is skipped")
        return None, problems

    def last_state(self) -> str:
        """Return a sentence about the latest saved state, for error messages."""
        files = self._state_files()
        return f"The last saved state is {files[0]}." if files else "No state was saved yet."

    def _state_files(self) -> list[Path]:
        """Return the states, latest first."""
        return sorted(self._states.glob("step-*.pt"), reverse=True)


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

    def as_saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights in the format that they are saved in: matrices may be rounded, vectors are not.

        Kept epochs are rounded as the final weights are, so that what training did not change stays equal.
        """
        dtype = WEIGHTS_DTYPES[self.about["weights_dtype"]]
        if dtype == torch.float32:
            return dict(tensors)
        return {name: t.to(dtype) if t.dim() > 1 and t.is_floating_point() else t for name, t in tensors.items()}

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


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # copies, because the format does not support tied tensors, which share memory
    plain = torch.contiguous_format
    return save({name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in tensors.items()})


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        TrainingError: the file cannot be written, for example because the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # do not let a partial file fill the disk
        raise TrainingError(
            f"{path} cannot be written ({error.strerror}). Fix this and run the same command again: training resumes."
        ) from error
