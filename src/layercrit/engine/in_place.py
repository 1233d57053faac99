"""Which nodes may write over an input that nothing reads any more, instead of taking fresh memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from layercrit.engine import cublas
from layercrit.engine.layer_norms import normalised
from layercrit.engine.nodes import CONVOLUTIONS, alike
from layercrit.engine.onednn import (
    fused_convolution,
    fused_linear,
    fused_linear_residual,
    fused_residual,
    fused_residual_,
)

__all__ = ["IN_PLACE", "KEEPS_INPUT", "in_place"]

aten = torch.ops.aten

# Target -> the variant that writes over one of its inputs, and that input's position.
IN_PLACE: dict[Any, tuple[Callable[..., Any], int]] = {
    fused_residual: (fused_residual_, 7),
    aten.add.Tensor: (aten.add_.Tensor, 0),
    aten.relu.default: (aten.relu_.default, 0),
    aten.hardtanh.default: (aten.hardtanh_.default, 0),
    aten.silu.default: (aten.silu_.default, 0),
    aten.hardswish.default: (aten.hardswish_.default, 0),
}
# Targets whose output never shares memory with an input.
KEEPS_INPUT = {
    *IN_PLACE,
    *CONVOLUTIONS,
    fused_convolution,
    fused_linear,
    fused_linear_residual,
    cublas.fused_linear,
    normalised,
    aten.linear.default,
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.cat.default,
    aten.layer_norm.default,
    aten.gelu.default,
}


def in_place(node: fx.Node, dead: tuple[fx.Node, ...]) -> Callable[..., Any]:
    """Return the node's target, or the variant that writes over an input which nothing else reads any more.

    Safe only where no other node can see that input's memory: its maker returned fresh memory and so did every reader.
    """
    target: Any = node.target
    variant, position = IN_PLACE.get(target, (None, 0))
    if variant is None:
        return target  # type: ignore[no-any-return]
    victim = node.args[position]
    if not isinstance(victim, fx.Node) or victim not in dead or node.args.count(victim) > 1 or not alike(victim, node):
        return target  # type: ignore[no-any-return]
    if all(other.target in KEEPS_INPUT for other in [victim, *victim.users]):
        return variant
    return target  # type: ignore[no-any-return]
