"""Sweeps on a GPU as CUDA graphs: one call starts all their kernels, thousands in large networks."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SweepCaptures"]

Sweep = Iterator[tuple[str | None, Tensor]]
Prepared = Mapping[str, Any]  # layer name -> mappings, one within the other, whose values are tensors
Run = Callable[..., Sweep]


@dataclass(frozen=True)
class _Capture:
    """A captured sweep, which reads and writes memory of its own.

    Attributes:
        graph: its kernels.
        images: what it reads.
        prepared: likewise; what several layers share, once.
        outputs: what it writes, in the order of a sweep.
    """

    graph: torch.cuda.CUDAGraph
    images: Tensor
    prepared: Sequence[Tensor]
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
            # kernels are chosen by requires_grad, too
            copies = {
                id(value): torch.empty_like(value, requires_grad=value.requires_grad) for value in _tensors(prepared)
            }
            own = [_copied(of_trial, copies) for of_trial in prepared]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = list(run(own_images, *own))
        except (RuntimeError, TypeError):  # an operator waits for the GPU, memory is short, or a value is no tensor
            torch.cuda.set_stream(stream)  # which a capture that failed may leave
            return None
        return _Capture(graph, own_images, list(copies.values()), outputs)

    def _fill(self, capture: _Capture, images: Tensor, prepared: Sequence[Prepared]) -> None:
        with torch.inference_mode():
            capture.images.copy_(images)
            values = _tensors(prepared)
            if len(self._held) == len(values) and all(a() is b for a, b in zip(self._held, values, strict=True)):
                return
            for own, value in zip(capture.prepared, values, strict=True):
                own.copy_(value)
        self._held = [weakref.ref(value) for value in values]


def _tensors(prepared: Sequence[Prepared]) -> list[Tensor]:
    """Return all tensors of what is prepared, each once."""
    found: dict[int, Tensor] = {}
    left: list[Any] = list(prepared)[::-1]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            left.extend(list(one.values())[::-1])
        else:
            found[id(one)] = one
    return list(found.values())


def _copied(prepared: Any, copies: Mapping[int, Tensor]) -> Any:
    if isinstance(prepared, Mapping):
        return {key: _copied(value, copies) for key, value in prepared.items()}
    return copies[id(prepared)]
