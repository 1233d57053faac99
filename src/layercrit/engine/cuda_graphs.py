"""Sweeps on a GPU as CUDA graphs: one call starts all their kernels, thousands in large networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SweepCaptures"]

Sweep = Iterator[tuple[str | None, Tensor]]
Prepared = Mapping[str, Mapping[Any, Any]]  # layer name -> node -> value


@dataclass(frozen=True)
class _Capture:
    """A captured sweep, which reads and writes memory of its own.

    Attributes:
        graph: its kernels.
        images: what it reads.
        prepared: likewise, for each trial.
        outputs: what it writes, in the order of a sweep.
    """

    graph: torch.cuda.CUDAGraph
    images: Tensor
    prepared: Sequence[Mapping[str, Mapping[Any, Tensor]]]
    outputs: Sequence[tuple[str | None, Tensor]]


class SweepCaptures:
    """Captures a sweep when the same layers are swept a second time in a row, and then replays it.

    One capture is kept. What cannot be captured is run as it is.

    Args:
        run: runs a sweep; called with images and, for each trial, what is prepared for its layers.
    """

    def __init__(self, run: Callable[..., Sweep]) -> None:
        self._run = run
        self._layers: list[list[str]] | None = None  # of the last sweep, for each trial
        self._capture: _Capture | None = None
        self._held: Sequence[Prepared] = ()  # whose values the capture's memory holds
        self._capturable = True

    def sweep(self, images: Tensor, *prepared: Prepared) -> Sweep:
        """Run a sweep; the logits are not overwritten by later ones."""
        layers = [list(of_trial) for of_trial in prepared]
        if layers != self._layers:
            self._layers, self._capture, self._held = layers, None, ()
            yield from self._run(images, *prepared)
            return
        if self._capture is None and self._capturable:
            self._capture = self._captured(images, prepared)
            self._capturable = self._capture is not None
        if self._capture is None:
            yield from self._run(images, *prepared)
            return
        self._fill(self._capture, images, prepared)
        self._capture.graph.replay()
        for name, logits in self._capture.outputs:
            yield name, logits.clone()

    def _captured(self, images: Tensor, prepared: Sequence[Prepared]) -> _Capture | None:
        try:
            own_images = torch.empty_like(images)
            own = [
                {
                    name: {node: torch.empty_like(value) for node, value in of_layer.items()}
                    for name, of_layer in p.items()
                }
                for p in prepared
            ]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = list(self._run(own_images, *own))
        except (RuntimeError, TypeError):  # an operator waits for the GPU, memory is short, or a value is no tensor
            return None
        return _Capture(graph, own_images, own, outputs)

    def _fill(self, capture: _Capture, images: Tensor, prepared: Sequence[Prepared]) -> None:
        with torch.inference_mode():
            capture.images.copy_(images)
            if len(self._held) == len(prepared) and all(a is b for a, b in zip(self._held, prepared, strict=True)):
                return
            for own, of_trial in zip(capture.prepared, prepared, strict=True):
                for name, of_layer in of_trial.items():
                    for node, value in of_layer.items():
                        own[name][node].copy_(value)
        self._held = prepared
