"""Attention that a network writes out as products and a softmax becomes one call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from layercrit.engine.nodes import only_user, value_of

__all__ = ["fuse_attention"]

aten = torch.ops.aten


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, shape: Sequence[int], scale: float
) -> Tensor:
    """Attend in one call.

    Args:
        query: ``(n, n_heads, n_queries, n_features)``.
        key: ``(n, n_heads, n_keys, n_features)``.
        value: as the key.
        bias: what is added to the scaled products, of a shape that fits ``shape``; None: nothing.
        shape: ``(n, n_heads, n_queries, n_keys)``, or with n as ``n_images, n_windows``.
        scale: what products are multiplied by.
    """
    # the kernel reads rows of keys as they lie in memory; here, not before, so that the windows' bias is held once
    mask = None if bias is None else bias.contiguous().expand(shape).reshape(*query.shape[:-1], key.shape[-2])
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)


@dataclass
class _WrittenOut:
    """The nodes between the products of queries and keys and the product with values.

    Attributes:
        nodes: from the last one to the first.
        biases: static nodes that are added.
        shape: of the products where the last bias is added; without one, of the products.
        scale: what the products are multiplied by.
    """

    nodes: list[fx.Node]
    biases: list[fx.Node] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)
    scale: float = 1.0


def fuse_attention(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Make a softmax of scaled products with static biases, between two products, one call."""
    for last in [node for node in graph.nodes if node.target is aten.matmul.default and node in dynamic]:
        found = _written_out(last, dynamic)
        if found is None:
            continue
        query, transposed = found.nodes[-1].args
        query, factor = _factored(query)
        bias: fx.Node | None = None
        with graph.inserting_before(last):
            key = graph.call_function(aten.transpose.int, (transposed, -2, -1))
            for one in found.biases:
                if bias is None:
                    bias = one
                else:
                    total = graph.call_function(aten.add.Tensor, (bias, one))
                    total.meta = {"val": value_of(bias) + value_of(one)}
                    bias = total
            arguments = (query, key, last.args[1], bias, found.shape, found.scale * factor)
            fused = graph.call_function(attention, arguments)
        key.meta = {"val": value_of(transposed).transpose(-2, -1)}  # type: ignore[arg-type]
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        for node in (last, *found.nodes):
            graph.erase_node(node)


def _written_out(last: fx.Node, dynamic: set[fx.Node]) -> _WrittenOut | None:
    """Return what stands before a product with values, if that is attention."""
    softmax: Any = last.args[0]
    if not _is_float32(last) or softmax.target is not aten.softmax.int or len(softmax.args) > 2 or softmax.kwargs:
        return None
    products = value_of(softmax)
    if products.ndim != 4 or softmax.args[1] not in (-1, 3) or only_user(softmax) is None:
        return None
    found, node = _WrittenOut([softmax], shape=list(products.shape)), softmax.args[0]
    while node.target is not aten.matmul.default:
        x: Any = None
        if only_user(node) is None or not _is_float32(node):
            return None
        if node.target is aten.add.Tensor and not node.kwargs and found.scale == 1:
            x, bias = node.args if node.args[1] not in dynamic else reversed(node.args)
            if not isinstance(bias, fx.Node) or bias in dynamic or value_of(x).shape != value_of(node).shape:
                return None
            if not _is_float32(bias):  # the kernel takes truth values for a mask
                return None
            here = list(value_of(node).shape)
            if not found.biases:
                found.shape = here
            elif here != found.shape and (len(here) > len(found.shape) or value_of(bias).shape[:-3].numel() != 1):
                return None  # it differs from image to image or window to window, which are apart elsewhere
            found.biases.append(bias)
        elif node.target is aten.reshape.default:
            x = node.args[0]
            if value_of(x).shape[-3:] != value_of(node).shape[-3:]:  # images and windows, together or apart
                return None
        else:
            x, factor = _factored(node)
            found.scale *= factor
        if not isinstance(x, fx.Node) or x is node:
            return None
        found.nodes.append(node)
        node = x
    query, transposed = node.args
    alike = value_of(query).ndim == 4 and value_of(query).shape[:2] == value_of(transposed).shape[:2]
    if only_user(node) is None or not alike or value_of(node).shape != products.shape:
        return None
    if value_of(last.args[1]).shape != value_of(transposed).transpose(-2, -1).shape:  # type: ignore[arg-type]
        return None  # for values with other features than keys there is no kernel
    found.nodes.append(node)
    return found


def _factored(node: Any) -> tuple[Any, float]:
    """Return what a node multiplies by a number, and the number; the node itself and 1 if it does something else."""
    if isinstance(node, fx.Node) and not node.kwargs and len(node.args) == 2 and _is_float32(node):
        x, number = node.args
        if isinstance(number, (int, float)) and number != 0:
            if node.target is aten.mul.Tensor:
                return x, float(number)
            if node.target is aten.div.Tensor:
                return x, 1 / number
    return node, 1.0


def _is_float32(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and value_of(node).dtype is torch.float32
