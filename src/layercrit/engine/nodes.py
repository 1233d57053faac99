"""What rewriting asks of the nodes of an exported graph: what they are, their shapes, their readers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "CONVOLUTIONS",
    "alike",
    "convolution_arguments",
    "epilogue",
    "only_user",
    "output_of",
    "shortcut_of",
    "value_of",
]

aten = torch.ops.aten

# `padding` is the variant whose padding is a word: "same" or "valid"
CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}


def value_of(node: fx.Node) -> Tensor:
    """Return what stands for a node's value in the exported network: a tensor without memory."""
    value: Tensor = node.meta["val"]
    return value


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the node that a graph ends with."""
    output: fx.Node = list(graph.nodes)[-1]
    return output


def alike(node: fx.Node, other: fx.Node) -> bool:
    """Return whether two nodes have the same shape and dtype in the exported network."""
    a, b = value_of(node), value_of(other)
    return a.shape == b.shape and a.dtype == b.dtype


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that reads a node, if there is one and no more."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def convolution_arguments(conv: fx.Node) -> tuple[Any, ...]:
    """Return image, weight, bias, stride, padding, dilation and groups of a two-dimensional convolution."""
    defaults: list[Any] = [None, [1, 1], [0, 0], [1, 1], 1]
    arguments = [*conv.args, *defaults[len(conv.args) - 2 :]]
    for index in (3, 4, 5):
        if len(arguments[index]) == 1:
            arguments[index] = [*arguments[index]] * 2
    return tuple(arguments)


def shortcut_of(follower: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return what a node's reader adds to it, if that is all the reader does and both have one shape."""
    if follower.target is not aten.add.Tensor or follower.kwargs:
        return None
    other = follower.args[1] if follower.args[0] is node else follower.args[0]
    return other if isinstance(other, fx.Node) and other is not node and alike(other, node) else None


def epilogue(
    conv: fx.Node, activations: Mapping[Any, str]
) -> tuple[list[fx.Node], fx.Node | None, str | None, list[float]]:
    """Return what one call can do: the nodes (convolution, residual sum, activation), the shortcut, the activation.

    Args:
        conv: a two-dimensional convolution.
        activations: those that the call knows, target -> name; after a residual sum only ``relu``.

    Returns:
        the nodes; what is added, or None; the activation's name, or None; the limits of a ``hardtanh``.
    """
    chain, shortcut = [conv], None
    follower = only_user(conv)
    grouped = len(conv.args) > 6 and conv.args[6] != 1  # oneDNN then computes the sum apart, and not in bfloat16
    if follower is not None and not grouped:
        shortcut = shortcut_of(follower, conv)
        if shortcut is not None:
            chain.append(follower)
            follower = only_user(follower)
    activation = None if follower is None else activations.get(follower.target)
    if follower is None or activation is None or (shortcut is not None and activation != "relu"):
        return chain, shortcut, None, []
    limits = [float(limit) for limit in follower.args[1:]] if activation == "hardtanh" else []  # type: ignore[arg-type]
    return [*chain, follower], shortcut, activation, limits
