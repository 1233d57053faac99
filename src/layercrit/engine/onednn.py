"""oneDNN's fused operators: a convolution with the residual sum and the activation after it, its weight packed once.

The operators are private to torch: `convolutions_work` tries them once, and where they are missing or wrong the public
ones are used.
"""

from functools import cache

import torch
from torch import Tensor, fx, nn

from layercrit.engine.nodes import alike, convolution_arguments, only_user, value_of

__all__ = ["convolutions_work", "fuse_convolutions"]

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


# --- what a node can call -------------------------------------------------------------------------------------------


def packed_weight(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: list[int]
) -> Tensor:
    """Return a convolution weight in the blocked order that oneDNN wants for inputs of this shape."""
    packed: Tensor = mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)
    return packed


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    limits: list[float | None],
) -> Tensor:
    """Convolve and apply the activation in one call."""
    y: Tensor = mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, activation, limits, ""
    )
    return y


def fused_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    shortcut: Tensor,
    activation: str | None,
) -> Tensor:
    """Convolve, add the shortcut and apply the activation in one call."""
    y: Tensor = mkldnn._convolution_pointwise.binary(
        x, shortcut, weight, bias, padding, stride, dilation, groups, "add", 1.0, activation, [], None
    )
    return y


def fused_residual_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    shortcut: Tensor,
    activation: str | None,
) -> Tensor:
    """Do as `fused_residual`, writing over the shortcut."""
    y: Tensor = mkldnn._convolution_pointwise_.binary(
        shortcut, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, activation, [], None
    )
    return y


# --- rewriting ------------------------------------------------------------------------------------------------------


_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.hardtanh.default: "hardtanh",
    aten.hardswish.default: "hardswish",
    aten.silu.default: "swish",
    aten.sigmoid.default: "sigmoid",
}


def fuse_convolutions(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Make a convolution, the residual sum and the activation after it one call with packed weights."""
    for conv in [node for node in graph.nodes if node.target is aten.conv2d.default]:
        if conv.args[1] in dynamic or value_of(conv).dtype is not torch.float32:
            continue  # the weight is made from the image, or the network itself computes in another format
        chain, shortcut, activation, limits = _epilogue(conv)
        x, weight, bias, stride, padding, dilation, groups = convolution_arguments(conv)
        # computed where the last node of the chain stood, so that the shortcut is there by then
        with graph.inserting_before(chain[-1]):
            shape = list(value_of(x).shape)
            packed = graph.call_function(packed_weight, (weight, padding, stride, dilation, groups, shape))
            arguments = (x, packed, bias, stride, padding, dilation, groups)
            if shortcut is None:
                fused = graph.call_function(fused_convolution, (*arguments, activation or "none", limits))
            else:
                fused = graph.call_function(fused_residual, (*arguments, shortcut, activation))
        fused.meta = dict(conv.meta)
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.erase_node(node)


def _epilogue(conv: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str | None, list[float]]:
    """Return what one call can do: the nodes (convolution, residual sum, activation), the shortcut, the activation."""
    chain, shortcut = [conv], None
    follower = only_user(conv)
    grouped = (
        conv.args[6] != 1 if len(conv.args) > 6 else False
    )  # oneDNN then computes the sum apart, and not in bfloat16
    if follower is not None and follower.target is aten.add.Tensor and not follower.kwargs and not grouped:
        other = follower.args[1] if follower.args[0] is conv else follower.args[0]
        if isinstance(other, fx.Node) and other is not conv and alike(other, conv):
            shortcut = other
            chain.append(follower)
            follower = only_user(follower)
    activation = None if follower is None else _ACTIVATIONS.get(follower.target)  # type: ignore[call-overload]
    if follower is None or activation is None or (shortcut is not None and activation != "relu"):
        return chain, shortcut, None, []
    limits = [float(limit) for limit in follower.args[1:]] if activation == "hardtanh" else []  # type: ignore[arg-type]
    return [*chain, follower], shortcut, activation, limits


@cache
def convolutions_work(dtype: torch.dtype) -> bool:
    """Try the private oneDNN operators once; where they are missing or wrong, the public ones are used."""
    generator = torch.Generator().manual_seed(0)
    x, shortcut = (
        torch.randn(2, 4, 5, 5, generator=generator).to(dtype, memory_format=torch.channels_last) for _ in range(2)
    )
    weight = torch.randn(4, 4, 3, 3, generator=generator).to(dtype, memory_format=torch.channels_last)
    where = ([1, 1], [1, 1], [1, 1], 1)
    expected = nn.functional.conv2d(x.float(), weight.float(), None, 1, 1)
    try:
        with torch.inference_mode():
            packed = packed_weight(weight, [1, 1], [1, 1], [1, 1], 1, [2, 4, 5, 5])
            plain = fused_convolution(x, packed, None, *where, "relu", [])
            added = fused_residual(x, packed, None, *where, shortcut, "relu")
            written = fused_residual_(x, packed, None, *where, shortcut.clone(), "relu")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    summed = (expected + shortcut.float()).relu()
    return all(
        torch.allclose(got.float(), wanted, atol=tolerance, rtol=tolerance)
        for got, wanted in ((plain, expected.relu()), (added, summed), (written, summed))
    )
