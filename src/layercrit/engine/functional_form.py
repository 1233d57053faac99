"""The functional form of an exported graph: no operator writes to memory, and none is made of others.

``run_decompositions({})`` of `torch.export` makes it by tracing the network once more, which takes longer than the
export itself. Where what it would do is known, the graph is rewritten instead.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["BATCH_NORM", "write_functionally"]

aten = torch.ops.aten

BATCH_NORM = aten._native_batch_norm_legit_no_training.default
# neither views nor writes to memory, nor made of other operators: these stay as they are
_FINAL = {
    *(aten.conv2d.default, aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default),
    *(aten.conv1d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv_transpose2d.input),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.exp.default),
    *(aten.mean.dim, aten.mean.default, aten.cat.default, aten.roll.default, aten.flip.default),
    *(aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.gelu.default, aten.hardswish.default),
    *(aten.hardsigmoid.default, aten.hardtanh.default, aten.leaky_relu.default, aten.prelu.default),
    *(aten.elu.default, aten.celu.default, aten.mish.default, aten.tanh.default),
    *(aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default),
    *(aten.layer_norm.default, aten.group_norm.default, aten.softmax.int),
}
# these, too, as long as nothing writes to the memory that they share
_VIEWS = {
    *(aten.view.default, aten.transpose.int, aten.permute.default, aten.expand.default, aten.unsqueeze.default),
    *(aten.select.int, aten.slice.Tensor, aten.unbind.int, operator.getitem),
}
_RESHAPES = {aten.flatten.using_ints, aten.reshape.default}
_IN_PLACE: Mapping[Any, Any] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.elu_.default: aten.elu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.silu_.default: aten.silu.default,
}


def write_functionally(graph: fx.Graph) -> bool:
    """Make a fresh export what ``run_decompositions({})`` would make of it, without tracing the network once more.

    Returns:
        whether that is known; if not, the graph is as it was.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if not all(_is_known(node, place) for node in calls):
        return False
    for node in calls:
        if node.target is aten.batch_norm.default:
            x, gamma, beta, mean, variance, _, momentum, eps, _ = node.args
            with graph.inserting_before(node):
                normalised = graph.call_function(BATCH_NORM, (x, gamma, beta, mean, variance, momentum, eps))
                value = _value(node)
                normalised.meta = {"val": (value, value.new_empty(0), value.new_empty(0))}
                _replace(node, graph.call_function(operator.getitem, (normalised, 0)))
        elif node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        elif node.target is aten.dropout.default or _is_flat_already(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _RESHAPES:
            x, *shape = node.args
            shape = shape[:1] if node.target is aten.reshape.default else [list(_value(node).shape)]
            with graph.inserting_before(node):
                _replace(node, graph.call_function(aten.view.default, (x, *shape)))
    return True


def _is_known(node: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    if node.target in (aten.batch_norm.default, aten.dropout.default):
        is_training = node.args[5 if node.target is aten.batch_norm.default else 2]
        return is_training is False
    if node.target in _RESHAPES:  # of others, it is known only when running whether memory is copied
        return bool(_value(node.args[0]).is_contiguous())
    if node.target in _IN_PLACE:
        return _owns_what_it_writes_to(node, place)
    return node.target in _FINAL or node.target in _VIEWS


def _owns_what_it_writes_to(node: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    """Whether an operator in place writes to memory of an operator's own that nobody reads afterwards."""
    written: Any = node.args[0]
    is_own = written.target in _FINAL or written.target in _IN_PLACE or written.target is aten.batch_norm.default
    before = _value(written)
    others = [user for user in written.users if user is not node]
    operands: list[Any] = [_value(one) if isinstance(one, fx.Node) else one for one in node.args[:2]]
    promoted = torch.result_type(*operands) if len(operands) > 1 else before.dtype  # which in place is not
    return (
        is_own
        and (before.shape, before.dtype) == (_value(node).shape, promoted)
        and all(place[user] < place[node] and user.target in _FINAL for user in others)
        and all(argument is not written for argument in node.args[1:])
    )


def _is_flat_already(node: fx.Node) -> bool:
    return node.target is aten.flatten.using_ints and _value(node).shape == _value(node.args[0]).shape


def _replace(node: fx.Node, other: fx.Node) -> None:
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _value(node: Any) -> Tensor:
    """The shape, dtype and layout of what a node computes, without its memory."""
    value: Tensor = node.meta["val"]
    return value
