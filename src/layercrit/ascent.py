"""Projected gradient ascent on the parameters of one module, through what follows it alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layercrit.engine.differentiable_suffix import DifferentiableSuffix
from layercrit.engine.session import Session
from layercrit.errors import ModelError
from layercrit.layers import Layer
from layercrit.seeds import layer_seed, trial_seed

__all__ = ["Ascent", "Found"]

Change = Mapping[str, Tensor]


@dataclass(frozen=True)
class Found:
    """What the ascent found for one module.

    Attributes:
        layer: the module.
        norm: of its trained parameters.
        radius: largest norm of the change.
        first_order: radius times the norm of the gradient at the trained values; NaN where that is 0 by nature.
        reached: the largest value that each restart found; empty where there is none, as the status says.
        status: ``ok``; ``no_norm``: the radius is 0; or ``no_gradient``: no start has a gradient, and yet a change of
            the module moves the value.
    """

    layer: Layer
    norm: float
    radius: float
    first_order: float
    reached: Sequence[float]
    status: str = "ok"


class Ascent:
    """Raises the mean over images of the loss, less that of the trained network, or of 1 - cosine, module by module.

    Args:
        session: of the model and the images; its replay is in the mode ``reference``.
        objective: what is raised.
        radius: largest norm of the change, in units of that of the module's parameters.
        steps: of each restart.
        step_size: length of a step, in units of the radius.
        restarts: how many.
        seed: of the random starts.
    """

    def __init__(
        self,
        session: Session,
        objective: Literal["loss", "cosine"],
        *,
        radius: float,
        steps: int,
        step_size: float,
        restarts: int,
        seed: int,
    ) -> None:
        self._session, self._objective = session, objective
        self._radius, self._steps, self._step_size, self._restarts = radius, steps, step_size, restarts
        architecture = session.subject.model.architecture
        self._seeds = [trial_seed(seed, architecture, "worst case", restart) for restart in range(restarts)]
        labels = session.labels if objective == "loss" else None
        self._labels = None if labels is None else torch.tensor(labels, device=session.subject.device)

    def of(self, layer: Layer) -> Found:
        """Run all restarts for one module.

        Raises:
            ModelError: the gradient or the value becomes NaN or infinite.
        """
        network = self._session.subject.network
        trained = {name: network.get_parameter(name).detach() for name in layer.parameters}
        norm = _norm(trained)
        radius = self._radius * norm
        if not radius:
            return Found(layer, norm, radius, math.nan, [], "no_norm")

        def work(suffix: DifferentiableSuffix) -> Found:
            still = {name: torch.zeros_like(value) for name, value in trained.items()}
            at_rest, slope = self._value(suffix, layer, trained, still, "at the trained values")
            first_order = radius * _norm(slope) if self._objective == "loss" else math.nan
            reached, has_gradient = [], False
            for restart, seed in enumerate(self._seeds):
                start = still
                if restart or self._objective == "cosine":  # whose gradient is 0 at the trained values
                    start = _random(trained, radius, layer_seed(seed, layer.name))
                best, one_has = self._climb(suffix, layer, trained, start, radius)
                reached.append(best - at_rest)
                has_gradient |= one_has
            if not has_gradient:  # 0 is right where nothing moves the value, but not where forward rounds or detaches
                change = _random(trained, radius, layer_seed(self._seeds[0], layer.name))
                moved, _ = self._value(suffix, layer, trained, change, "at a random point")
                if moved != at_rest:
                    return Found(layer, norm, radius, math.nan, [], "no_gradient")
            return Found(layer, norm, radius, first_order, reached)

        return self._session.holder.run(lambda replay: work(DifferentiableSuffix(replay, self._session, layer)))

    def _climb(
        self, suffix: DifferentiableSuffix, layer: Layer, trained: Change, change: Change, radius: float
    ) -> tuple[float, bool]:
        """Return the largest value on the way up from a start, and whether there is a gradient at the start."""
        best, has_gradient = -math.inf, False
        for step in range(self._steps + 1):
            value, slope = self._value(suffix, layer, trained, change, f"at step {step}")
            best = max(best, value)
            length = _norm(slope)
            has_gradient |= length > 0
            if step == self._steps or not length:
                break
            moved = {name: change[name] + self._step_size * radius / length * slope[name] for name in change}
            shrink = min(1.0, radius / _norm(moved))
            change = {name: shrink * value for name, value in moved.items()}
        return best, has_gradient

    def _value(
        self, suffix: DifferentiableSuffix, layer: Layer, trained: Change, change: Change, where: str
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the mean over images and its gradient."""
        values = {name: (trained[name] + change[name]).requires_grad_() for name in trained}
        total, slope = 0.0, {name: torch.zeros_like(value) for name, value in values.items()}
        n_images = self._session.probe_set.n_images
        with torch.enable_grad():
            for start, n, logits in suffix.logits(values):
                mean = self._per_image(suffix, start, n, logits[:n].float()).sum() / n_images
                total += float(mean.detach())
                if mean.requires_grad:
                    parts = torch.autograd.grad(mean, list(values.values()), allow_unused=True)
                    for name, part in zip(values, parts, strict=True):
                        slope[name] += 0 if part is None else part
        if not math.isfinite(total) or not math.isfinite(_norm(slope)):
            raise ModelError(
                f"The ascent on {layer.name!r} reached NaN or infinity {where}: the value is {total:g}. Take smaller "
                "steps with --step-size (step_size=...), or a smaller --radius (radius=...)."
            )
        return total, slope

    def _per_image(self, suffix: DifferentiableSuffix, start: int, n: int, logits: Tensor) -> Tensor:
        """Return what is raised, ``(n_images,)``."""
        if self._labels is not None:
            return F.cross_entropy(logits, self._labels[start : start + n], reduction="none")
        return 1 - F.cosine_similarity(suffix.trained[start][:n].float().softmax(dim=1), logits.softmax(dim=1), dim=1)


def _norm(values: Change) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def _random(like: Change, radius: float, seed: int) -> dict[str, Tensor]:
    """Return a random point of the ball, evenly by its direction, at a tenth of the radius or more."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in like.items()}
    share = 0.1 + 0.9 * float(torch.rand((), generator=generator))
    return {name: share * radius / _norm(drawn) * value for name, value in drawn.items()}
