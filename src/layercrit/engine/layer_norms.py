"""Layer normalisation on a GPU in one pass over memory, with the bias of a convolution before it.

torch's own kernel gives each row a block of threads: over the 96 channels of ConvNeXt's first stage it reaches a tenth
of the rate of copies. And a convolution without an activation adds its bias in a kernel of its own.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from layercrit.engine.nodes import CONVOLUTIONS, only_user, value_of

__all__ = ["fuse_layer_norms", "normalised", "norms_work"]

aten = torch.ops.aten

_LARGEST_WIDTH = 4096  # a row is held by the threads of one block


def normalised(x: Tensor, added: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise ``x + added`` over the last dimension, then scale and shift it."""
    from layercrit.engine.layer_norm_kernel import layer_norm  # Triton comes with torch where there are GPUs

    return layer_norm(x.contiguous(), added, weight, bias, eps)


def fuse_layer_norms(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Let one kernel normalise, and add the bias of a convolution that nothing else reads."""
    for norm in [node for node in graph.nodes if node.target is aten.layer_norm.default]:
        given: Any = norm.args
        defaults: list[Any] = [None, None, 1e-5]
        x, shape, weight, bias, eps = list(given[:5]) + defaults[len(given) - 2 :]
        static = weight not in dynamic and bias not in dynamic
        if norm not in dynamic or not static or value_of(norm).dtype is not torch.float32:
            continue
        if len(shape) != 1 or shape[0] > _LARGEST_WIDTH:
            continue
        with graph.inserting_before(norm):
            x, added = _without_bias(graph, dynamic, x)
            fused = graph.call_function(normalised, (x, added, weight, bias, eps))
        fused.meta = dict(norm.meta)
        dynamic.add(fused)
        norm.replace_all_uses_with(fused)
        graph.erase_node(norm)


def _without_bias(graph: fx.Graph, dynamic: set[fx.Node], x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return x, and what is to be added to it: nothing, or the bias of the convolution that x is the output of."""
    if x.target is not aten.permute.default:
        return x, None
    conv: Any
    order: Any
    conv, order = x.args
    if conv.target not in CONVOLUTIONS or list(order) != [0, 2, 3, 1]:
        return x, None
    image, weight, *more = conv.args
    bias, *where = more or [None]
    if bias is None or bias in dynamic or only_user(conv) is None or only_user(x) is None:
        return x, None
    without = graph.call_function(conv.target, (image, weight, None, *where))
    permuted = graph.call_function(aten.permute.default, (without, order))
    without.meta, permuted.meta = dict(conv.meta), dict(x.meta)
    dynamic |= {without, permuted}
    return permuted, bias


@cache
def norms_work(dtype: torch.dtype, device: torch.device) -> bool:
    """Try the kernel once; where Triton or its compiler is missing, or the result wrong, torch's own is used."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7, 24), (24,), (24,), (24,))
    try:
        x, added, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        with torch.inference_mode():
            found = normalised(x, added, weight, bias, 1e-5)
    except Exception:  # Triton raises errors of its own, and whatever its compiler or the driver raise
        return False
    expected = nn.functional.layer_norm((x.float() + added.float()), (24,), weight.float(), bias.float(), 1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return torch.allclose(found.float(), expected, atol=tolerance, rtol=tolerance)
