"""One phase of a training run, step by step."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layercrit.errors import TrainingError
from layercrit.seeds import drawing, seed_generators, seed_of
from layercrit.training.batches import Batches, to_device
from layercrit.training.methods import Phase
from layercrit.training.optimisation import make_optimizer, make_schedule, moving_average
from layercrit.training.runs import Run, TrainingProgress

__all__ = ["PhaseOfRun"]

_CHECK_EVERY = 20  # steps between checks of the loss, because each check waits for the device


class PhaseOfRun:
    """One phase of a run: its learner, optimiser and schedule."""

    def __init__(self, run: Run, number: int, phase: Phase, network: nn.Module, first_step: int) -> None:
        self.run, self.number, self.phase, self.first_step = run, number, phase, first_step
        accelerator, inputs = run.accelerator, run.data.inputs
        n_steps = run.steps // run.epochs
        with drawing(seed_of("training", run.seed, "learner", phase.name)):
            learner = phase.learner(network, inputs)
        # channels last: convolutions are faster on CPUs and GPUs
        self.learner = learner.to(accelerator.device).to(memory_format=torch.channels_last)
        self.ema = moving_average(self.learner.network, run.method.ema_decay if phase.labelled else 0.0)
        optimizer = make_optimizer(self.learner, phase.optimisation)
        self.schedule = make_schedule(optimizer, phase.optimisation, phase.epochs * n_steps, n_steps)
        self.model, self.optimizer = accelerator.prepare(self.learner, optimizer)
        repeats, n_workers = run.method.repeats, run.options.n_workers
        views = phase.views(inputs)
        self.batches = Batches(run.data.train, views, run.seed, run.batch_size, repeats, n_workers)
        self.unchecked: list[Tensor] = []  # losses of the latest steps, not yet checked
        self.loss_sum = 0.0

    def go(self, state: Mapping[str, Any] | None) -> nn.Module:
        """Train from the start of the phase or from a saved state, and return the network with its final weights."""
        n_steps, first_epoch = self.batches.n_steps, self.first_step // self.batches.n_steps
        epoch, done, seconds = 0, 0, 0.0
        if state is not None:
            self._load(state)
            epoch, done = divmod(int(state["step"]) - self.first_step, n_steps)
            seconds, self.loss_sum = float(state["seconds"]), float(state["loss_sum"])
        for current in range(epoch, self.phase.epochs):
            started = time.monotonic() - seconds
            self._run_epoch(first_epoch + current, done, started)
            self._end_epoch(first_epoch + current + 1, started)
            done, seconds, self.loss_sum = 0, 0.0, 0.0
        return self.network()

    def network(self) -> nn.Module:
        """Return the network with the weights to keep: the moving average if there is one."""
        network: nn.Module = self.ema.module if self.ema is not None else self.learner.network
        return network

    def _run_epoch(self, epoch: int, first: int, started: float) -> None:
        run, device = self.run, self.run.accelerator.device
        n_steps = self.batches.n_steps
        share = (run.accelerator.process_index, run.accelerator.num_processes)
        self.model.train()
        for in_epoch, (views, labels) in enumerate(self.batches.of_epoch(epoch, first, *share), first):
            step = epoch * n_steps + in_epoch
            seed = seed_of("training", run.seed, "step", step, share[0])
            seed_generators(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed_all(seed)
            self._step(step - self.first_step, [to_device(view, device) for view in views], labels.to(device))
            if (step + 1) % _CHECK_EVERY == 0 or in_epoch + 1 == n_steps:
                self._check(step + 1, in_epoch + 1)
                if in_epoch + 1 < n_steps and time.monotonic() - run.saved_at > run.options.save_seconds:
                    self._save(step + 1, time.monotonic() - started)

    def _step(self, step: int, views: list[Tensor], labels: Tensor) -> None:
        """Take one optimisation step; ``step`` counts within the phase."""
        accelerator = self.run.accelerator
        progress = step / (self.phase.epochs * self.batches.n_steps)
        self.schedule.step_update(step)
        loss = self.model(views, labels, progress)
        accelerator.backward(loss)
        if self.phase.optimisation.clip_norm:
            accelerator.clip_grad_norm_(self.model.parameters(), self.phase.optimisation.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.learner.after_step(progress)
        if self.ema is not None:
            self.ema.update(self.learner.network, step=step)
        self.unchecked.append(loss.detach().float())

    def _check(self, steps_done: int, done_in_epoch: int) -> None:
        """Check the losses since the last check, and report progress.

        Raises:
            TrainingError: a loss is not finite.
        """
        run = self.run
        losses = run.accelerator.reduce(torch.stack(self.unchecked), "mean").tolist()
        first = steps_done - len(losses) + 1
        self.unchecked.clear()
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                epoch = (step - 1) // self.batches.n_steps + 1
                raise TrainingError(
                    f"The loss became {loss} at step {step} of {run.steps}, in epoch {epoch}. "
                    f"{run.folder.last_state()} "
                    "Try a lower lr, more warmup_epochs or a clip_norm: --set lr=... with another --out."
                )
        self.loss_sum += sum(losses)
        accuracy = run.history[-1]["top1_accuracy"] if run.history else None
        epoch = (steps_done - 1) // self.batches.n_steps + 1
        mean = self.loss_sum / done_in_epoch
        run.progress(TrainingProgress(self.phase.name, epoch, run.epochs, steps_done, run.steps, mean, accuracy))

    def _end_epoch(self, epoch: int, started: float) -> None:
        """Record a finished epoch; ``epoch`` counts from 1, over all phases."""
        run = self.run
        n_steps = self.batches.n_steps
        seconds = time.monotonic() - started
        row = {
            "epoch": epoch,
            "phase": self.phase.name,
            "loss": self.loss_sum / n_steps,
            "top1_accuracy": run.accuracy_of(self.network()) if self.phase.labelled else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "images_per_second": round(n_steps * run.batch_size / seconds, 1),
        }
        run.history.append(row)
        run.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=epoch)
        if not run.accelerator.is_main_process:
            return
        if epoch in run.options.keep_epochs:
            run.folder.save_epoch(epoch, run.as_saved(self.network().state_dict()))
        run.folder.save_log(run.history)
        self.loss_sum = 0.0
        if epoch < run.epochs:
            self._save(epoch * n_steps, 0.0)

    def _save(self, steps_done: int, seconds: float) -> None:
        run, scaler = self.run, self.run.accelerator.scaler
        run.saved_at = time.monotonic()
        if not run.accelerator.is_main_process:
            return
        state = {
            "about": json.dumps(run.about),
            "history": json.dumps(run.history),
            "phase": self.number,
            "step": steps_done,
            "seconds": seconds,
            "loss_sum": self.loss_sum,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        run.folder.save_state(state, steps_done)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.run.accelerator.scaler is not None:
            self.run.accelerator.scaler.load_state_dict(state["scaler"])
