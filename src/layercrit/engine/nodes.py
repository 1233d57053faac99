"""What rewriting asks of the nodes of an exported graph: what they are, their shapes, their readers."""

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["CONVOLUTIONS", "alike", "convolution_arguments", "only_user", "value_of"]

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
