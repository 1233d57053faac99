"""Logits of all images as a function of one layer's parameters, with gradients; what comes before it is run once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.replay import Replay, Values
from layercrit.engine.session import Session
from layercrit.layers import Layer

__all__ = ["DifferentiableSuffix"]

_BYTES_OF_PREFIX = 2**31  # of values from before the layer that are kept; those of later batches are computed again


class DifferentiableSuffix:
    """What follows one layer, for all images of a session.

    Where the network cannot be exported, the whole of it is run.

    Attributes:
        trained: start of a batch -> the trained network's logits, ``(n_images, n_classes)``.

    Args:
        replay: of the session.
        session: as above.
        layer: as above.
    """

    def __init__(self, replay: Replay, session: Session, layer: Layer) -> None:
        self._session, self._layer = session, layer
        self._graph = replay.in_reference() if isinstance(replay, GraphReplay) else None
        self._kept: dict[int, Any] = {}
        self._held = 0
        self.trained: dict[int, Tensor] = {}
        with torch.no_grad():
            for start, _, logits in self.logits({}):
                self.trained[start] = logits

    def logits(self, values: Values) -> Iterator[tuple[int, int, Tensor]]:
        """Yield start and length of a batch, and its logits with these values of the layer's parameters.

        Of the logits, only the first ``length`` count.
        """
        start = 0
        while start < self._session.probe_set.n_images:
            images, n = self._session.holder.batch(start)
            yield start, n, self._run(start, images, values)
            start += n

    def _run(self, start: int, images: Tensor, values: Values) -> Tensor:
        if self._graph is None:
            subject = self._session.subject
            return subject.model.read_logits(functional_call(subject.network, dict(values), (images.clone(),)))
        before = self._kept.get(start)
        if before is None:
            before = self._graph.before(self._layer, images)
            self._held += sum(value.nbytes for value in before.values() if isinstance(value, Tensor))
            if self._held <= _BYTES_OF_PREFIX:
                self._kept[start] = before
        return self._graph.after(self._layer, values, before)
