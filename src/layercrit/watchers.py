"""What a forward pass does with parameters, seen operator by operator while it runs."""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

__all__ = ["Dataflow", "FirstUses", "Influence", "Operation", "ParameterReads", "in_single_operators"]


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that runs while it is entered."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.watch(func, _tensors((args, kwargs)), args, kwargs or {})

    @abstractmethod
    def watch(self, operator: Callable[..., Any], inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator and return its output; ``inputs`` are the tensors among its arguments."""


class FirstUses(_Watcher):  # type: ignore[no-untyped-call]
    """Notes when each parameter first meets the image, and whether it multiplies its input.

    Attributes:
        first_use: id of a parameter -> when it was first used, counted in operators that read parameters.
        types: id of a parameter -> the type of the last operator with one that it met the image in.

    Args:
        parameters: those to watch.
        type_of_operator: operator (its overload packet) -> type.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], type_of_operator: Mapping[Any, str]) -> None:
        super().__init__()
        # Tensors computed from parameters alone stand for these parameters. They are kept alive, for a freed
        # tensor's id could be given to another one.
        self._origin: dict[int, tuple[Tensor, frozenset[int]]] = {id(p): (p, frozenset([id(p)])) for p in parameters}
        self._type_of_operator = type_of_operator
        self._n_calls = 0
        self.first_use: dict[int, int] = {}
        self.types: dict[int, str] = {}

    @override
    def watch(self, operator: Callable[..., Any], inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        output = operator(*args, **kwargs)
        weights = frozenset[int]().union(*(self._origin[id(t)][1] for t in inputs if id(t) in self._origin))
        if not weights:
            return output
        self._n_calls += 1
        if all(id(t) in self._origin for t in inputs):
            for t in _tensors(output):
                self._origin.setdefault(id(t), (t, weights))
        else:  # the image has come in: this is a use
            for weight in weights:
                self.first_use.setdefault(weight, self._n_calls)
            packet = _packet(operator)
            if packet in self._type_of_operator:
                self.types.update(dict.fromkeys(weights, self._type_of_operator[packet]))
        return output


class Influence(_Watcher):  # type: ignore[no-untyped-call]
    """Notes for every operator that costs FLOPs which of some tensors its inputs were computed from.

    Influence is a set of bits, kept for each block of memory, so that views and writing in place are followed; blocks
    are kept alive, for the address of a freed one could be given to another.

    Attributes:
        flops: (influence, FLOPs) of each operator that costs any.

    Args:
        sources: (tensor, its bits). Those of tensors that share memory, such as tied weights, are joined.
    """

    def __init__(self, sources: Iterable[tuple[Tensor, int]]) -> None:
        super().__init__()
        self._bits: dict[int, int] = {}
        for tensor, bits in sources:
            self._bits[_block(tensor)] = self._bits.get(_block(tensor), 0) | bits
        self._alive: list[torch.UntypedStorage] = []
        self.flops: list[tuple[int, int]] = []

    @override
    def watch(self, operator: Callable[..., Any], inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        output = operator(*args, **kwargs)
        influence = 0
        for tensor in inputs:
            influence |= self._bits.get(_block(tensor), 0)
        for tensor in _tensors(output):
            self._alive.append(tensor.untyped_storage())
            self._bits[_block(tensor)] = influence
        count = _flops().get(_packet(operator))
        if count is not None:
            self.flops.append((influence, int(count(*args, **kwargs, out_val=output))))
        return output


class ParameterReads(_Watcher):  # type: ignore[no-untyped-call]
    """Notes when each parameter or buffer is first read, be it by an operator on parameters alone.

    Attributes:
        first_read: id of a parameter -> the time before it was first read.

    Args:
        parameters: those to watch; buffers, too.
        time: the clock; others may advance it too.
    """

    def __init__(self, parameters: Iterable[Tensor], time: Callable[[], int]) -> None:
        super().__init__()
        self._parameters = {id(p) for p in parameters}
        self._time = time
        self.first_read: dict[int, int] = {}

    @override
    def watch(self, operator: Callable[..., Any], inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        for tensor in inputs:
            if id(tensor) in self._parameters and id(tensor) not in self.first_read:
                self.first_read[id(tensor)] = self._time()
        return operator(*args, **kwargs)


@dataclass(frozen=True)
class Operation:
    """A call of an operator; or a parameter, or the image, which no operator makes.

    Attributes:
        operator: its name, such as ``addmm``; empty for a parameter and for the image.
        inputs: the places of what made its inputs, in the order of its arguments; tensors that neither the image nor a
            parameter influences are left out.
        needs_image: whether the image influences it.
        parameter: id of the parameter that it is, if it is one.
    """

    operator: str
    inputs: tuple[int, ...]
    needs_image: bool
    parameter: int | None = None


class Dataflow(_Watcher):  # type: ignore[no-untyped-call]
    """Notes every operator that reads the image or a parameter, and which operators made its inputs.

    As in `Influence`, tensors are told by their block of memory.

    Attributes:
        operations: in the order in which they ran; the image comes first, parameters where they are first read.

    Args:
        images: what the network is given.
        parameters: those to watch.
    """

    def __init__(self, images: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._parameters = {id(p): p for p in parameters}
        self.operations = [Operation("", (), needs_image=True)]
        self._made_by: dict[int, int] = {_block(images): 0}
        self._places: dict[int, int] = {}  # id of a parameter -> where it stands
        self._alive: list[torch.UntypedStorage] = []

    @override
    def watch(self, operator: Callable[..., Any], inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        places = tuple(place for tensor in inputs if (place := self._place(tensor)) is not None)
        output = operator(*args, **kwargs)
        name = getattr(_packet(operator), "__name__", "")
        if places and not name.startswith("new_") and not name.endswith("_like"):  # which read a shape only
            needs_image = any(self.operations[place].needs_image for place in places)
            self.operations.append(Operation(name, places, needs_image))
            for tensor in _tensors(output):
                self._alive.append(tensor.untyped_storage())
                self._made_by[_block(tensor)] = len(self.operations) - 1
        return output

    def _place(self, tensor: Tensor) -> int | None:
        if id(tensor) not in self._parameters:
            return self._made_by.get(_block(tensor))
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(self.operations)
            self.operations.append(Operation("", (), needs_image=False, parameter=id(tensor)))
        return self._places[id(tensor)]


@contextlib.contextmanager
def in_single_operators() -> Iterator[None]:
    """Inside, torch's attention modules do not use their fused call, whose parts nobody sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@functools.cache
def _flops() -> dict[Any, Callable[..., Any]]:
    """Return operator (its overload packet) -> what counts its FLOPs."""
    from torch.utils.flop_counter import flop_registry, sdpa_flop  # not above: it imports Triton where that is

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # attention that older torch does not count
    return {on_cpu: sdpa_flop, **flop_registry}


def _packet(operator: Callable[..., Any]) -> Any:
    return getattr(operator, "overloadpacket", None)


def _block(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
