"""cuBLASLt's fused operator: a linear layer with the GELU or ReLU after it, in one kernel."""

from functools import cache

import torch
from torch import Tensor, fx, nn

from layercrit.engine.nodes import only_user, value_of

__all__ = ["fuse_linears", "fused_linear", "linears_work"]

aten = torch.ops.aten


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Multiply and apply the activation, ``relu`` or ``gelu`` (its tanh approximation), in one kernel."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = aten._addmm_activation(bias, rows, weight.t(), use_gelu=activation == "gelu")
    return y.view(*x.shape[:-1], len(weight))


def fuse_linears(graph: fx.Graph, dynamic: set[fx.Node], dtype: torch.dtype) -> None:
    """Make a linear layer and the activation after it one call.

    The kernel knows GELU as its tanh approximation only. In bfloat16 that replaces the exact GELU, too: it is applied
    to a product that was not rounded before, and came closer to the exact values at the sizes of ViT-B/16 and
    ConvNeXt-T (mean error 0.70 to 0.75 times that of product and exact GELU apart).
    """
    for linear in [node for node in graph.nodes if node.target is aten.linear.default]:
        x, weight, bias = [*linear.args, None][:3]
        if linear not in dynamic or weight in dynamic or bias in dynamic or value_of(linear).dtype is not torch.float32:
            continue
        follower = only_user(linear)
        if follower is None or bias is None or value_of(weight).ndim != 2:
            continue
        approximate = follower.kwargs.get("approximate", "none")
        if follower.target is aten.gelu.default and (approximate == "tanh" or dtype is torch.bfloat16):
            activation = "gelu"
        elif follower.target is aten.relu.default:
            activation = "relu"
        else:
            continue
        with graph.inserting_before(follower):
            fused = graph.call_function(fused_linear, (x, weight, bias, activation))
        fused.meta = dict(linear.meta)
        dynamic.add(fused)
        follower.replace_all_uses_with(fused)
        for node in (follower, linear):
            graph.erase_node(node)


@cache
def linears_work(dtype: torch.dtype, device: torch.device) -> bool:
    """Try the operator once; where it is missing or wrong, the public ones are used."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 32), (64, 32), (64,))
    try:
        x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        expected = nn.functional.linear(x.float(), weight.float(), bias.float())
        with torch.inference_mode():
            curved, cut = (fused_linear(x, weight, bias, activation) for activation in ("gelu", "relu"))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return all(
        torch.allclose(got.float(), wanted, atol=tolerance, rtol=tolerance)
        for got, wanted in ((curved, nn.functional.gelu(expected, approximate="tanh")), (cut, expected.relu()))
    )
