"""The loss of every image with other values in one layer at a time, of many layers and draws in one sweep."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from layercrit.engine.replay import Replay, Values
from layercrit.engine.session import Session
from layercrit.layers import Layer

__all__ = ["ChangedLayer", "Losses"]

_BYTES_OF_VALUES = 2**28  # that are held at once


@dataclass(frozen=True)
class ChangedLayer:
    """A layer and what makes its new values, called when they are needed."""

    layer: Layer
    values: Callable[[], Values]


class Losses:
    """Cross-entropy of single images, in nats.

    Args:
        session: of a subject and images with labels; layers are those of the subject.
        labels: class numbers, ``(n_images,)``.
    """

    def __init__(self, session: Session, labels: npt.NDArray[np.int64]) -> None:
        self._holder = session.holder
        self._device = session.subject.device
        self._labels = torch.tensor(labels, device=self._device)

    def trained(self) -> npt.NDArray[np.float64]:
        """Return the losses of the trained network, ``(n_images,)``."""
        found: npt.NDArray[np.float64] = self._holder.run(lambda replay: self._swept(replay, [None], [{}]))[0]
        return found

    def changed(self, changes: Sequence[ChangedLayer]) -> npt.NDArray[np.float64]:
        """Return the losses after each change, ``(n_changes, n_images)``; NaN or infinite where logits are.

        What comes before a layer is run once for all its changes, as many as memory allows, and for other layers too.
        """
        parts = [self._together(some) for some in _in_parts(changes)]
        return np.concatenate(parts) if parts else np.empty((0, len(self._labels)))

    def _together(self, changes: Sequence[ChangedLayer]) -> npt.NDArray[np.float64]:
        values = [change.values() for change in changes]
        layers = [change.layer for change in changes]
        return self._holder.run(lambda replay: self._swept(replay, layers, values))

    def _swept(
        self, replay: Replay, layers: Sequence[Layer | None], values: Sequence[Values]
    ) -> npt.NDArray[np.float64]:
        """Return the losses after each change, ``(n_changes, n_images)``; of no layer: of the trained network."""
        trials: list[dict[str, Any]] = [{}]
        places: dict[str | None, list[int]] = {}  # layer -> its changes
        for place, (layer, new) in enumerate(zip(layers, values, strict=True)):
            mine = places.setdefault(None if layer is None else layer.name, [])
            if len(mine) == len(trials):
                trials.append({})
            if layer is not None:
                trials[len(mine)][layer.name] = replay.prepare(layer, new)
            mine.append(place)
        found = torch.empty(len(layers), len(self._labels), device=self._device)
        start = 0
        while start < len(self._labels):
            images, n = self._holder.batch(start)
            labels = self._labels[start : start + n]
            left = {name: iter(mine) for name, mine in places.items()}
            for name, logits in islice(replay.sweep(images, *trials), len(layers)):
                losses = F.cross_entropy(logits[:n].float(), labels, reduction="none")
                found[next(left[name]), start : start + n] = losses
            start += n
        losses_in_float64: npt.NDArray[np.float64] = found.double().cpu().numpy()
        return losses_in_float64


def _in_parts(changes: Sequence[ChangedLayer]) -> Iterator[Sequence[ChangedLayer]]:
    """Yield changes, so many together as may be held at once."""
    part: list[ChangedLayer] = []
    held = 0
    for change in changes:
        size = 4 * change.layer.n_parameters
        if part and held + size > _BYTES_OF_VALUES:
            yield part
            part, held = [], 0
        part.append(change)
        held += size
    if part:
        yield part
