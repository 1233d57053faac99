"""Compute only what is read: of a network that classifies by one token, the last block needs no others.

Where every reader of a value takes the same index of the same dimension, the index is taken from the value's inputs
instead, as far up as operators allow: through sums, normalisations and linear layers, up to the keys and values of the
last attention, which all tokens do enter.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from layercrit.engine.nodes import value_of

__all__ = ["narrow"]

aten = torch.ops.aten

_ELEMENTWISE = {
    *(aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.clone.default, aten.alias.default, aten._to_copy.default),
}
_BROADCASTING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def narrow(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Take single indices of dimensions as early as possible."""
    for node in reversed(list(graph.nodes)):
        if node not in dynamic or node.op != "call_function":
            continue
        wanted = _wanted(node)
        if wanted is None:
            continue
        dim, index = wanted
        arguments = _narrowed(graph, node, dim, index)
        if arguments is None:
            continue
        with graph.inserting_before(node):
            small = graph.call_function(node.target, arguments, dict(node.kwargs))
        small.meta = {"val": value_of(node).narrow(dim, index, 1)}
        for reader in list(node.users):
            if reader.target is aten.select.int:
                reader.args = (small, dim, 0)
            else:
                reader.replace_all_uses_with(small)
                graph.erase_node(reader)
        graph.erase_node(node)


def _wanted(node: fx.Node) -> tuple[int, int] | None:
    """Return the dimension and the index that all readers of a node take, if they agree."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    shape, found = value_of(node).shape, set[tuple[int, int]]()
    for reader in node.users:
        if reader.target is aten.select.int:
            arguments: Any = reader.args
            dim = arguments[1] % len(shape)
            found.add((dim, arguments[2] % shape[dim]))
        elif reader.target is single:
            found.add(reader.args[1:])  # type: ignore[arg-type]
        else:
            return None
    return found.pop() if len(found) == 1 else None


def single(x: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """Return one index of a dimension, as a dimension of size 1."""
    return x.narrow(dim, index, 1)


def _narrowed(graph: fx.Graph, node: fx.Node, dim: int, index: int) -> tuple[Any, ...] | None:
    """Return the arguments with which a node computes one index of a dimension; None where it needs more than that."""
    rule = _RULES.get(node.target)
    dims = None if rule is None else rule(node, dim)
    if dims is None:
        return None
    arguments = list(node.args)
    for position, of_input in dims.items():
        x: Any = arguments[position]
        with graph.inserting_before(node):
            cut = graph.call_function(single, (x, of_input, index))
        cut.meta = {"val": value_of(x).narrow(of_input, index, 1)}
        arguments[position] = cut
    if node.target is aten.reshape.default:
        arguments[1] = [1 if d == dim else size for d, size in enumerate(value_of(node).shape)]
    return tuple(arguments)


# --- rules: where an index of the output comes from -----------------------------------------------------------------
# Each takes a node and a dimension of its output and returns: position of an argument -> the dimension of that input
# which has the same indices. Inputs left out are needed whole. None: the whole node is needed.

Dims = dict[int, int] | None


def _elementwise(node: fx.Node, dim: int) -> Dims:
    return {0: dim}


def _broadcasting(node: fx.Node, dim: int) -> Dims:
    size, from_the_end = value_of(node).shape[dim], dim - value_of(node).ndim
    return {
        position: value_of(x).ndim + from_the_end
        for position, x in enumerate(node.args[:2])
        if isinstance(x, fx.Node) and -from_the_end <= value_of(x).ndim and value_of(x).shape[from_the_end] == size
    }


def _linear(node: fx.Node, dim: int) -> Dims:
    return {0: dim} if dim < value_of(node).ndim - 1 else None


def _layer_norm(node: fx.Node, dim: int) -> Dims:
    return {0: dim} if dim < value_of(node).ndim - len(node.args[1]) else None  # type: ignore[arg-type]


def _softmax(node: fx.Node, dim: int) -> Dims:
    return {0: dim} if dim != node.args[1] % value_of(node).ndim else None  # type: ignore[operator]


def _transpose(node: fx.Node, dim: int) -> Dims:
    n_dims = value_of(node).ndim
    one, other = (int(d) % n_dims for d in node.args[1:])  # type: ignore[arg-type]
    return {0: {one: other, other: one}.get(dim, dim)}


def _permute(node: fx.Node, dim: int) -> Dims:
    order: Any = node.args[1]
    return {0: order[dim] % len(order)}


def _reshape(node: fx.Node, dim: int) -> Dims:
    """A dimension that stays as it is: as many values stand before it and after it as in the input."""
    before, after = list(value_of(node.args[0]).shape), list(value_of(node).shape)  # type: ignore[arg-type]
    for d, size in enumerate(before):
        if size == after[dim] and math.prod(before[:d]) == math.prod(after[:dim]):
            return {0: d}
    return None


def _attention(node: fx.Node, dim: int) -> Dims:
    """The queries and their rows of the mask; keys and values are needed whole."""
    mask, _, causal = [*node.args[3:], None, None, None][:3]
    if dim != value_of(node).ndim - 2 or causal or node.kwargs.keys() & {"attn_mask", "is_causal", "dropout_p"}:
        return None
    if not isinstance(mask, fx.Node):
        return {0: dim}
    rows = value_of(mask).ndim - 2
    alike = rows < 0 or value_of(mask).shape[rows] == 1  # the mask is the same for all queries
    return {0: dim} if alike else {0: dim, 3: rows}


def _matmul(node: fx.Node, dim: int) -> Dims:
    rows = value_of(node.args[0]).ndim >= 2 and value_of(node.args[1]).ndim >= 2  # type: ignore[arg-type]
    return {0: value_of(node.args[0]).ndim - 2} if rows and dim == value_of(node).ndim - 2 else None  # type: ignore[arg-type]


_RULES: dict[Any, Callable[[fx.Node, int], Dims]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_BROADCASTING, _broadcasting),
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.softmax.int: _softmax,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.reshape.default: _reshape,
    aten.scaled_dot_product_attention.default: _attention,
    aten.matmul.default: _matmul,
}
