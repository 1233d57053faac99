"""oneDNN's fused operators: a convolution or linear layer with what follows it in one call, its weight packed once.

The operators are private to torch: `convolutions_work` and `linears_work` try them once, and where they are missing or
wrong the public ones are used.
"""

from functools import cache

import torch
from torch import Tensor, fx, nn

from layercrit.engine.nodes import convolution_arguments, epilogue, only_user, shortcut_of, value_of

__all__ = ["convolutions_work", "fuse_convolutions", "fuse_linears", "linears_pay", "linears_work"]

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


def packed_linear_weight(weight: Tensor, n_rows: int) -> Tensor:
    """Return the weight of a linear layer in the blocked order that oneDNN wants for inputs of so many rows."""
    packed: Tensor = mkldnn._reorder_linear_weight(weight, n_rows)
    return packed


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    """Multiply and apply the activation in one call."""
    y: Tensor = mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return y


def fused_linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor) -> Tensor:
    """Multiply and add the shortcut in one call."""
    y: Tensor = mkldnn._linear_pointwise.binary(x, shortcut, weight, bias, "add")
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
        chain, shortcut, activation, limits = epilogue(conv, _ACTIVATIONS)
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
        dynamic.add(fused)
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.erase_node(node)


def fuse_linears(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Make a linear layer and the activation or the residual sum after it one call with packed weights."""
    for linear in [node for node in graph.nodes if node.target is aten.linear.default]:
        x, weight, bias = [*linear.args, None][:3]
        if linear not in dynamic or weight in dynamic or bias in dynamic or value_of(linear).dtype is not torch.float32:
            continue
        if value_of(weight).ndim != 2:  # a vector is a layer of one output, without an axis of outputs
            continue
        last, shortcut, activation, algorithm = linear, None, "none", ""
        follower = only_user(linear)
        if follower is not None:
            shortcut = shortcut_of(follower, linear)
            if shortcut is not None:
                last = follower
            elif follower.target is aten.gelu.default:
                last, activation, algorithm = follower, "gelu", follower.kwargs.get("approximate", "none")  # type: ignore[assignment]
            elif follower.target in _ACTIVATIONS and follower.target is not aten.hardtanh.default:
                last, activation = follower, _ACTIVATIONS[follower.target]
        with graph.inserting_before(last):
            packed = graph.call_function(packed_linear_weight, (weight, value_of(x).shape[:-1].numel()))
            if shortcut is None:
                fused = graph.call_function(fused_linear, (x, packed, bias, activation, algorithm))
            else:
                fused = graph.call_function(fused_linear_residual, (x, packed, bias, shortcut))
        fused.meta = dict(linear.meta)
        dynamic.add(fused)
        last.replace_all_uses_with(fused)
        for node in dict.fromkeys((last, linear)):
            graph.erase_node(node)


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


def linears_pay(dtype: torch.dtype) -> bool:
    """Return whether fused linear layers are faster than the public operators on this processor.

    In float32 only with AVX-512, where sweeps of vit_tiny, swin_tiny and convnext_tiny are 9 to 14% faster and those of
    mixer_b16 as fast; with AVX2, MKL multiplies as fast and GELU takes less time apart than in oneDNN's product.
    """
    return dtype is torch.bfloat16 or (dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512")


@cache
def linears_work(dtype: torch.dtype) -> bool:
    """Try the private operators of linear layers once, as `convolutions_work` does."""
    generator = torch.Generator().manual_seed(0)
    x, shortcut, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 8), (2, 3, 4), (4, 8), (4,))
    )
    expected = nn.functional.linear(x.float(), weight.float(), bias.float())
    try:
        with torch.inference_mode():
            packed = packed_linear_weight(weight, 6)
            plain = fused_linear(x, packed, bias, "none", "")
            curved = fused_linear(x, packed, bias, "gelu", "none")
            added = fused_linear_residual(x, packed, bias, shortcut)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return all(
        torch.allclose(got.float(), wanted, atol=tolerance, rtol=tolerance)
        for got, wanted in (
            (plain, expected),
            (curved, nn.functional.gelu(expected)),
            (added, expected + shortcut.float()),
        )
    )
