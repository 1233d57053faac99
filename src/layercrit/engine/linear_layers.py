"""What is done to the outputs of a linear layer moves next to it: scales into its weight, sums before permutations."""

from typing import Any

import torch
from torch import Tensor, fx

from layercrit.engine.nodes import alike, only_user, value_of

__all__ = ["add_before_permuting", "fold_layer_scales"]

aten = torch.ops.aten


def scaled_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight of a linear layer with the scale after it folded in."""
    return weight * scale.reshape(-1, 1)


def scaled_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the bias of a linear layer with the scale after it folded in."""
    return bias * scale.flatten()


def fold_layer_scales(graph: fx.Graph, dynamic: set[fx.Node]) -> None:
    """Fold what multiplies the outputs of a linear layer one by one into its weight and bias."""
    for product in [node for node in graph.nodes if node.target is aten.mul.Tensor and node in dynamic]:
        for x, scale in (product.args, reversed(product.args)):
            if isinstance(scale, fx.Node) and scale not in dynamic and _scales_outputs(x, scale):
                break
        else:
            continue
        linear = x.args[0] if x.target is aten.permute.default else x
        weight, bias = [*linear.args, None][1:3]
        if weight in dynamic or bias in dynamic:
            continue
        with graph.inserting_before(product):  # where the scale is there
            new_weight = graph.call_function(scaled_weight, (weight, scale))
            new_bias = None if bias is None else graph.call_function(scaled_bias, (bias, scale))
            folded = graph.call_function(linear.target, (linear.args[0], new_weight, new_bias))
            result = folded if x is linear else graph.call_function(x.target, (folded, *x.args[1:]))
        new_weight.meta, folded.meta, result.meta = dict(weight.meta), dict(linear.meta), dict(x.meta)
        if new_bias is not None:
            new_bias.meta = dict(bias.meta)
        dynamic |= {folded, result}
        product.replace_all_uses_with(result)
        for node in dict.fromkeys((product, x, linear)):
            graph.erase_node(node)


def _scales_outputs(x: Any, scale: fx.Node) -> bool:
    """Return whether x is a linear layer's output, read once and maybe permuted, with one scale for each output."""
    if not isinstance(x, fx.Node) or only_user(x) is None:
        return False
    linear: Any = x
    outputs = -1  # the dimension of outputs, from the end
    if x.target is aten.permute.default:
        order: Any
        linear, order = x.args
        outputs = [d % len(order) for d in order].index(len(order) - 1) - len(order)
    if linear.target is not aten.linear.default or only_user(linear) is None:
        return False
    if value_of(linear.args[1]).ndim != 2:  # a single output, whose dimension is dropped
        return False
    shape, n_outputs = value_of(scale).shape, value_of(linear).shape[-1]
    whole = value_of(scale).numel() == n_outputs and len(shape) <= value_of(x).ndim
    return whole and -outputs <= len(shape) and shape[outputs] == n_outputs and value_of(scale).dtype is torch.float32


def add_before_permuting(graph: fx.Graph) -> None:
    """Add a shortcut to a linear layer's output before the output is permuted, where both lie in memory alike.

    In networks that go back and forth between channels-first and channels-last order the two permutations around a
    block then cancel.
    """
    for total in [node for node in graph.nodes if node.target is aten.add.Tensor and not node.kwargs]:
        for x, other in (total.args, reversed(total.args)):
            if isinstance(other, fx.Node) and other is not x and _is_permuted_linear(x) and alike(x, other):
                break
        else:
            continue
        linear, order = x.args
        back = sorted(range(len(order)), key=lambda d: order[d] % len(order))
        with graph.inserting_before(total):
            shortcut: Any = other.args[0] if other.args else None
            if other.target is not aten.permute.default or list(other.args[1]) != list(order):  # type: ignore[arg-type]
                shortcut = graph.call_function(aten.permute.default, (other, back))
                shortcut.meta = {"val": value_of(linear)}
            inner = graph.call_function(aten.add.Tensor, (linear, shortcut))
            outer = graph.call_function(aten.permute.default, (inner, order))
        inner.meta, outer.meta = dict(linear.meta), dict(x.meta)
        total.replace_all_uses_with(outer)
        for node in (total, x):
            graph.erase_node(node)


def _is_permuted_linear(x: Any) -> bool:
    if not isinstance(x, fx.Node) or x.target is not aten.permute.default or only_user(x) is None:
        return False
    (linear, _) = x.args
    return isinstance(linear, fx.Node) and linear.target is aten.linear.default and only_user(linear) is not None
