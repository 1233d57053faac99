"""Optimizers, schedules and moving averages by timm; devices and processes by accelerate."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercrit.errors import TrainingError, near
from layercrit.machine import find_device
from layercrit.training.methods import Optimisation

__all__ = ["make_accelerator", "make_optimizer", "make_schedule", "moving_average"]


def make_accelerator(device: str, precision: str, trackers: Sequence[str], folder: Path) -> Any:
    """Return accelerate's handle on devices, processes, mixed precision and trackers.

    Raises:
        TrainingError: a package is not installed.
        ProtocolError: the device cannot be used.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise TrainingError(
            "Training needs accelerate, which is not installed. Run `pip install 'layercrit[train]'`."
        ) from error
    for name in ("tensorboard", "wandb"):
        if name in trackers and importlib.util.find_spec(name) is None:
            raise TrainingError(f"{name} is not installed. Run `pip install {name}`, or leave out --log {name}.")
    find_device(device)
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") not in (None, precision):
        AcceleratorState._reset_state()  # of an earlier run in this process with another precision
    log_with, place = list(trackers) or None, str(folder / "tracking")
    return Accelerator(mixed_precision=precision, cpu=device == "cpu", log_with=log_with, project_dir=place)


def moving_average(network: nn.Module, decay: float) -> Any:
    """Return timm's moving average of a network's weights, or None for a decay of 0."""
    if not decay:
        return None
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(network, decay=decay, use_warmup=True)


def make_optimizer(learner: nn.Module, how: Optimisation) -> torch.optim.Optimizer:
    """Return timm's optimizer of a given name, without weight decay for biases and normalisation.

    Raises:
        TrainingError: timm has no optimizer of this name.
    """
    from timm.optim._optim_factory import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if how.optimizer not in known:
        raise TrainingError(f"timm has no optimizer {how.optimizer!r}. {near(how.optimizer, known)}")
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        learner, opt=how.optimizer, lr=how.lr, weight_decay=how.weight_decay, momentum=how.momentum
    )
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, how: Optimisation, n_steps: int, steps_per_epoch: int) -> Any:
    """Return timm's schedule, to be updated with the number of the step within the phase."""
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.step_lr import StepLRScheduler

    warmup: dict[str, Any] = {
        "warmup_t": round(how.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": 0.0,
        "t_in_epochs": False,
    }
    if how.schedule == "step":
        return StepLRScheduler(optimizer, decay_t=n_steps / 3, decay_rate=0.1, **warmup)
    return CosineLRScheduler(optimizer, t_initial=n_steps, **warmup)
