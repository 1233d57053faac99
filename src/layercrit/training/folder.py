"""The folder of a training run: weights of chosen epochs, the final ones with their record, states to go on from."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from layercrit.errors import TrainingError

__all__ = ["RunFolder"]

_STATES = 2  # kept, so that one damaged in the writing leaves another


class RunFolder:
    """Where a training run writes.

    ``model.safetensors`` and ``model.json`` are the final weights and their record, written last;
    ``epochs/epoch-0000.safetensors`` the initial weights and so on; ``log.csv`` one row an epoch; ``state/`` what is
    needed to go on after an interruption, removed at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"
        self.record = path / "model.json"
        self._states = path / "state"

    def finished(self) -> dict[str, Any] | None:
        """Return the record of a finished run, or None while there is none.

        Raises:
            TrainingError: the record cannot be read.
        """
        if not (self.record.is_file() and self.weights.is_file()):
            return None
        try:
            record: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
            record["method"], record["top1_accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{self.record} is no record of a training run ({error}). Name another --out."
            ) from error
        return record

    def save_epoch(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights after ``epoch`` epochs; 0 are the initial ones."""
        _write(self.path / "epochs" / f"epoch-{epoch:04d}.safetensors", _safetensors(tensors))

    def save_log(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write one row for each epoch so far."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]) if history else [])
        writer.writeheader()
        writer.writerows(history)
        _write(self.path / "log.csv", text.getvalue().encode())

    def save_final(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the final weights and their record, remove what only an interrupted run needs; return the record.

        The record is completed by the weight file's hash, ``sha256``.
        """
        data = _safetensors(tensors)
        _write(self.weights, data)
        whole = {**record, "sha256": hashlib.sha256(data).hexdigest()}
        _write(self.record, (json.dumps(whole, indent=2) + "\n").encode())
        shutil.rmtree(self._states, ignore_errors=True)
        return whole

    # --- states -----------------------------------------------------------------------------------------------------

    def save_state(self, state: Mapping[str, Any], step: int) -> None:
        """Keep what is needed to go on from a step, and the state before it.

        Args:
            state: tensors, numbers, texts, and lists and dictionaries of them.
            step: number of steps done in all.
        """
        content = io.BytesIO()
        torch.save(dict(state), content)
        data = content.getvalue()
        _write(self._states / f"step-{step:08d}.pt", hashlib.sha256(data).digest() + data)
        for old in self._state_files()[_STATES:]:
            old.unlink(missing_ok=True)

    def load_state(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the latest state that is whole, if there is any, and in words what was wrong with later ones.

        Nothing in a state can run code: it is read with ``weights_only``.
        """
        problems = []
        for path in self._state_files():
            try:
                data = path.read_bytes()
                if hashlib.sha256(data[32:]).digest() != data[:32]:
                    problems.append(f"{path} is damaged or was cut off, so it is left out")
                    continue
                return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True), problems
            except Exception as error:  # whatever unpickling says
                problems.append(f"{path} cannot be read ({type(error).__name__}), so it is left out")
        return None, problems

    def kept_state(self) -> str:
        """Say which state is kept, for an error."""
        files = self._state_files()
        return f"The last good state is kept: {files[0]}." if files else "No state was kept yet."

    def _state_files(self) -> list[Path]:
        """Return the states, latest first."""
        return sorted(self._states.glob("step-*.pt"), reverse=True)


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # copies, for tied tensors share their memory, which the format does not know
    plain = torch.contiguous_format
    return save({name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in tensors.items()})


def _write(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it is there as a whole or not at all.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
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
            part.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise TrainingError(
            f"{path} cannot be written ({error.strerror}). Run the same again when it can: training goes on."
        ) from error
