"""Run the module itself, with module calls that cannot differ answered from a recording."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from layercrit.engine.replay import PlainReplay, Values
from layercrit.layers import Layer
from layercrit.restoring import calls_answered
from layercrit.watchers import ParameterReads

__all__ = ["RecordedReplay"]


@dataclass
class _Call:
    """One call of a module during the recorded pass; times are counted in calls and reads of parameters."""

    module: nn.Module
    start: int
    end: int = -1
    output: Any = None
    following: int = 0  # index of the first call that starts after this one ended


class _DivergedError(Exception):
    """The network did not call the same modules as in the recorded pass."""


class RecordedReplay(PlainReplay):
    """The module itself, where calls that ended before the reset layer was first used return their recorded output."""

    backend = "recorded outputs"

    @override
    def sweep(self, images: Tensor, *prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        recording = _Recording(self.network, self.run)
        clean = recording.record(images)
        for layer in self.layers:
            for of_trial in prepared:
                if layer.name in of_trial:
                    yield layer.name, recording.replay(layer, of_trial[layer.name], images)
        yield None, clean


class _Recording:
    """All module calls of one forward pass with their outputs, and when each parameter was first read."""

    def __init__(self, network: nn.Module, run: Callable[[Values, Tensor], Tensor]) -> None:
        self.network, self.run = network, run
        self.calls: list[_Call] = []
        self.tick = count(1).__next__
        self.reads = ParameterReads(chain(network.parameters(), network.buffers()), self.tick)

    def record(self, images: Tensor) -> Tensor:
        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            record = _Call(module, self.tick())
            self.calls.append(record)
            output = forward(*args, **kwargs)
            record.output = _copy(output)
            record.end = self.tick()
            record.following = len(self.calls)
            return output

        with self.reads, calls_answered(self.network, call):
            return self.run({}, images)

    def replay(self, layer: Layer, values: Values, images: Tensor) -> Tensor:
        tensors: dict[str, Tensor] = dict(self.network.named_parameters(remove_duplicate=False))
        tensors |= dict(self.network.named_buffers(remove_duplicate=False))
        # one that was not seen to be read: nothing is reused
        reset = (*layer.parameters, *layer.buffers)
        first_read = min(self.reads.first_read.get(id(tensors[name]), 0) for name in reset)
        upcoming = 0

        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal upcoming
            if upcoming >= len(self.calls) or self.calls[upcoming].start > first_read:
                return forward(*args, **kwargs)
            record = self.calls[upcoming]
            if record.module is not module:
                raise _DivergedError
            if record.end < first_read and record.output is not None:
                upcoming = record.following
                return _copy(record.output)
            upcoming += 1
            return forward(*args, **kwargs)

        try:
            with calls_answered(self.network, call):
                return self.run(values, images)
        except _DivergedError:
            return self.run(values, images)


def _copy(output: Any) -> Any:
    """Copy the tensors of a module's output, for what follows may write to them; None if it holds anything opaque."""
    leaves, structure = pytree.tree_flatten(output)
    if not all(isinstance(leaf, (Tensor, int, float, bool, str, type(None))) for leaf in leaves):
        return None
    return pytree.tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
