"""What a reset costs: the floating-point operations of a forward pass that depend on each layer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from layercrit.layers import Layer
from layercrit.restoring import holding

__all__ = ["count_flops"]


class _Influence(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one forward pass and notes for every operation which parameters its inputs were computed from.

    Influence is a set of bits, kept for each block of memory, so that views and writing in place are followed; blocks
    are kept alive, for the address of a freed one could be given to another. Bit 0 is the images'.
    """

    supports_higher_order_operators = True

    def __init__(self, bits: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = bits
        self.alive: list[torch.UntypedStorage] = []
        self.flops: list[tuple[int, int]] = []  # (influence, FLOPs) of each operation that costs any

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        influence = 0
        for tensor in _tensors((args, kwargs)):
            influence |= self.bits.get(_block(tensor), 0)
        for tensor in _tensors(output):
            self.alive.append(tensor.untyped_storage())
            self.bits[_block(tensor)] = influence
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self.flops.append((influence, int(count(*args, **(kwargs or {}), out_val=output))))
        return output


def count_flops(network: nn.Module, layers: Sequence[Layer], images: Tensor) -> tuple[float, dict[str, float]]:
    """Count the FLOPs of a forward pass, and which share of them a reset of each layer makes run anew.

    One forward pass is watched; nothing is exported. Products and convolutions count, two FLOPs per multiply-add.

    Args:
        network: in evaluation mode.
        layers: what may be reset.
        images: one small batch that the network accepts, ``(n_images, channels, height, width)``.

    Returns:
        FLOPs of one image, and for each layer's name a share in [0, 1].
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    bits: dict[int, int] = {}
    for place, layer in enumerate(layers, 1):
        for name in layer.parameters:
            block = _block(parameters[name])
            bits[block] = bits.get(block, 0) | 1 << place
    bits[_block(images)] = 1
    watch = _Influence(bits)
    with torch.no_grad(), holding(network, {}), _in_single_operators(), watch:
        network(images)
    dynamic = [(influence, flops) for influence, flops in watch.flops if influence & 1]
    total = sum(flops for _, flops in dynamic)
    after = {
        layer.name: sum(flops for influence, flops in dynamic if influence >> place & 1) / max(1, total)
        for place, layer in enumerate(layers, 1)
    }
    return total / len(images), after


@contextlib.contextmanager
def _in_single_operators() -> Iterator[None]:
    """Inside, attention of torch's own modules is no single call, whose FLOPs torch does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _block(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
