"""Sweeps on a GPU as CUDA graphs: one call starts all their kernels, thousands in large networks."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SweepCaptures"]

Sweep = Iterator[tuple[str | None, Tensor]]
Prepared = Mapping[str, Mapping[Any, Any]]  # layer name -> node -> value
Run = Callable[..., Sweep]


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
    """

    def __init__(self) -> None:
        self._layers: list[list[str]] | None = None  # of the last sweep, for each trial
        self._capture: _Capture | None = None
        self._held: list[weakref.ref[Tensor]] = []  # values that the capture's memory has copies of
        self._capturable = True

    def sweep(self, run: Run, images: Tensor, *prepared: Prepared) -> Sweep:
        """Run a sweep; later ones do not write over its logits.

        Args:
            run: runs it; called with what follows, and the same in every call. It is not kept: replays are large, and
                freed at once where nothing holds them in a circle.
            images: ``(n_images, channels, height, width)``.
            prepared: for each trial, what is prepared for its layers.
        """
        layers = [list(of_trial) for of_trial in prepared]
        if layers != self._layers:
            self._layers, self._capture, self._held = layers, None, []
            return run(images, *prepared)
        if self._capture is None and self._capturable:
            self._capture = self._captured(run, images, prepared)
            self._capturable = self._capture is not None
        if self._capture is None:
            return run(images, *prepared)
        self._fill(self._capture, images, prepared)
        self._capture.graph.replay()
        return iter([(name, logits.clone()) for name, logits in self._capture.outputs])

    def _captured(self, run: Run, images: Tensor, prepared: Sequence[Prepared]) -> _Capture | None:
        stream = torch.cuda.current_stream()
        try:
            own_images = torch.empty_like(images)
            own = [
                {
                    name: {
                        # kernels are chosen by requires_grad, too
                        node: torch.empty_like(value, requires_grad=value.requires_grad)
                        for node, value in of_layer.items()
                    }
                    for name, of_layer in p.items()
                }
                for p in prepared
            ]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = list(run(own_images, *own))
        except (RuntimeError, TypeError):  # an operator waits for the GPU, memory is short, or a value is no tensor
            torch.cuda.set_stream(stream)  # which a capture that failed may leave
            return None
        return _Capture(graph, own_images, own, outputs)

    def _fill(self, capture: _Capture, images: Tensor, prepared: Sequence[Prepared]) -> None:
        with torch.inference_mode():
            capture.images.copy_(images)
            values = [v for of_trial in prepared for of_layer in of_trial.values() for v in of_layer.values()]
            if len(self._held) == len(values) and all(a() is b for a, b in zip(self._held, values, strict=True)):
                return
            for own, of_trial in zip(capture.prepared, prepared, strict=True):
                for name, of_layer in of_trial.items():
                    for node, value in of_layer.items():
                        own[name][node].copy_(value)
        self._held = [weakref.ref(value) for value in values]
