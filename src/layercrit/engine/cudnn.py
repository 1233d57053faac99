"""cuDNN's fused operators: a convolution with the residual sum and the ReLU after it, in one kernel."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from layercrit.engine.nodes import convolution_arguments, epilogue, value_of

__all__ = ["convolutions_work", "fuse_convolutions"]

aten = torch.ops.aten


# --- what a node can call -------------------------------------------------------------------------------------------


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolve and apply ReLU in one kernel."""
    y: Tensor = aten.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
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
) -> Tensor:
    """Convolve, add the shortcut and apply ReLU in one kernel."""
    y: Tensor = aten.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, stride, padding, dilation, groups)
    return y


# --- rewriting ------------------------------------------------------------------------------------------------------


def fuse_convolutions(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Make a convolution, the residual sum and the ReLU after it one call."""
    for conv in [node for node in graph.nodes if node.target is aten.conv2d.default]:
        arguments = convolution_arguments(conv)
        if conv.args[1] in dynamic or value_of(conv).dtype is not torch.float32 or arguments[6] != 1:
            continue  # the weight is made from the image, another format is the network's own, or it is grouped
        chain, shortcut, activation, _ = epilogue(conv, {aten.relu.default: "relu"})
        if activation is None:
            continue
        # computed where the last node of the chain stood, so that the shortcut is there by then
        with graph.inserting_before(chain[-1]):
            if shortcut is None:
                fused = graph.call_function(fused_convolution, arguments)
            else:
                fused = graph.call_function(fused_residual, (*arguments, shortcut))
        fused.meta = dict(conv.meta)
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.erase_node(node)
    _add_biases_once(graph, dynamic)


def _add_biases_once(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Where a shortcut is a convolution that nothing else reads, let the sum add its bias, too.

    Convolutions without an activation add their bias in a kernel of its own, which reads and writes the whole output.
    """
    for fused in [node for node in graph.nodes if node.target is fused_residual]:
        shortcut: Any = fused.args[7]
        bias = fused.args[2]
        if shortcut.target is not aten.conv2d.default or len(shortcut.users) != 1:
            continue
        x, weight, own_bias, *where = convolution_arguments(shortcut)
        if own_bias is None or own_bias in dynamic or bias in dynamic:
            continue
        with graph.inserting_before(fused):
            both = own_bias
            if bias is not None:
                both = graph.call_function(aten.add.Tensor, (bias, own_bias))
                both.meta = dict(own_bias.meta)
            without = graph.call_function(aten.conv2d.default, (x, weight, None, *where))
        without.meta = dict(shortcut.meta)
        fused.args = (*fused.args[:2], both, *fused.args[3:7], without)
        graph.erase_node(shortcut)


@cache
def convolutions_work(dtype: torch.dtype, device: torch.device) -> bool:
    """Try the operators once; where they are missing or wrong, the public ones are used."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 5, 5), (2, 16, 5, 5), (16, 8, 3, 3), (16,))
    where = ([1, 1], [1, 1], [1, 1], 1)
    try:
        x, shortcut, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        x, shortcut, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut, weight))
        expected = nn.functional.conv2d(x.float(), weight.float(), bias.float(), 1, 1)
        with torch.inference_mode():
            plain = fused_convolution(x, weight, bias, *where)
            added = fused_residual(x, weight, bias, *where, shortcut)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    summed = (expected + shortcut.float()).relu()
    return all(
        torch.allclose(got.float(), wanted, atol=tolerance, rtol=tolerance)
        for got, wanted in ((plain, expected.relu()), (added, summed))
    )
