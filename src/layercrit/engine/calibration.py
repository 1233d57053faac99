"""Whether a faster number format is exact enough: the same resets on the same images, both ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layercrit.counts import counted
from layercrit.distances import measure_distances
from layercrit.engine.replay import Replay
from layercrit.engine.subject import Change

LAYER_TOLERANCE, MEAN_TOLERANCE = 0.02, 0.002  # error in criticality


@dataclass(frozen=True)
class Calibration:
    """How far the criticalities of a rough replay are from those of an exact one.

    Attributes:
        worst: largest error of a layer's criticality.
        mean: error of the mean criticality of these layers.
        n_layers: how many layers were reset, once each.
        n_images: how many images were used.
    """

    worst: float
    mean: float
    n_layers: int
    n_images: int

    @property
    def tolerable(self) -> bool:
        """Whether the rough replay is exact enough to measure with."""
        return self.worst <= LAYER_TOLERANCE and self.mean <= MEAN_TOLERANCE

    def __str__(self) -> str:
        return (
            f"error in criticality {self.worst:.4f} at most and {self.mean:.5f} on average over "
            f"{counted(self.n_layers, 'layer')} and {counted(self.n_images, 'image')}"
        )


def calibrate(exact: Replay, rough: Replay, changes: Sequence[Change], images: Tensor) -> Calibration:
    """Compare two replays of one network on one batch of normalised images."""
    right, found = (_criticalities(replay, changes, images) for replay in (exact, rough))
    errors = found - right  # (n_layers,)
    return Calibration(float(errors.abs().max()), float(errors.mean().abs()), len(changes), len(images))


def _criticalities(replay: Replay, changes: Sequence[Change], images: Tensor) -> Tensor:
    shared: dict[Any, Any] = {}
    prepared = {change.layer.name: replay.prepare(change.layer, change.values, shared) for change in changes}
    logits: Mapping[str | None, Tensor] = dict(replay.sweep(images, prepared))
    clean = logits[None].softmax(dim=1)
    return torch.stack(
        [
            measure_distances(clean, logits[change.layer.name].softmax(dim=1), ["cosine"])["cosine"].mean()
            for change in changes
        ]
    )
