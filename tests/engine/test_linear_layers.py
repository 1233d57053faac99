"""Scales and sums move next to linear layers where that is the same, and stay where they are elsewhere."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from fast_graphs import CPU, DTYPES, RELATIVE, assert_near, sweep, targets, with_plain_linears
from layercrit.engine.graph import WeightGraph, export_graph, speed_up
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.linear_layers import scaled_bias, scaled_weight
from tiny_networks import ARCHITECTURES, IMAGES, Case, PlainWay, Sketch, case

aten = torch.ops.aten


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*shape))


def used_twice(net: Sketch, x: Tensor) -> Tensor:
    y = net.a(last(x))
    return first(y * net.gamma + y)


def scale_from_image(net: Sketch, x: Tensor) -> Tensor:
    return first(net.a(last(x)) * x.mean((0, 2, 3)))


def scale_of_scaled(net: Sketch, x: Tensor) -> Tensor:
    """What scales is itself the scaled output of a linear layer, of one image here."""
    gate = net.a(x.mean((0, 2, 3))[None]) * net.gamma  # (1, 8)
    return first(net.b(last(x)) * gate)


LINEAR = partial(nn.Linear, 8, 8)
# name -> how, modules, how many scales are folded
SCALES = {
    "per output": (lambda net, x: first(net.a(last(x)) * net.gamma), {"a": LINEAR, "gamma": parameter(8)}, 1),
    "scale first": (lambda net, x: first(net.gamma * net.a(last(x))), {"a": LINEAR, "gamma": parameter(1, 8)}, 1),
    "without bias": (
        lambda net, x: first(net.a(last(x)) * net.gamma),
        {"a": partial(LINEAR, bias=False), "gamma": parameter(8)},
        1,
    ),
    "permuted": (lambda net, x: first(net.a(last(x))) * net.gamma, {"a": LINEAR, "gamma": parameter(8, 1, 1)}, 1),
    "twice": (
        lambda net, x: first(net.a(last(x)) * net.gamma * net.gamma.exp()),
        {"a": LINEAR, "gamma": parameter(8)},
        2,
    ),
    "after another layer's scale": (
        lambda net, x: first(net.b(net.a(last(x)) * net.gamma) * net.gamma),
        {"a": LINEAR, "b": LINEAR, "gamma": parameter(8)},
        2,
    ),
    "per column": (lambda net, x: first(net.a(last(x))) * net.gamma, {"a": LINEAR, "gamma": parameter(8)}, 0),
    "per row": (lambda net, x: first(net.a(last(x)) * net.gamma), {"a": LINEAR, "gamma": parameter(8, 1, 1)}, 0),
    "per pixel and output": (
        lambda net, x: first(net.a(last(x)) * net.gamma),
        {"a": LINEAR, "gamma": parameter(8, 8, 8)},
        0,
    ),
    "one for all": (lambda net, x: first(net.a(last(x)) * net.gamma), {"a": LINEAR, "gamma": parameter(1)}, 0),
    "used twice": (used_twice, {"a": LINEAR, "gamma": parameter(8)}, 0),
    "from the image": (scale_from_image, {"a": LINEAR}, 0),
    "scale of scaled": (scale_of_scaled, {"a": LINEAR, "b": LINEAR, "gamma": parameter(8)}, 1),
}


def shortcut_read_later(net: Sketch, x: Tensor) -> Tensor:
    y = first(net.a(last(x))) + x
    return y + 2 * x + y.mean()


def chain(net: Sketch, x: Tensor) -> Tensor:
    y = first(net.a(last(x)).relu())
    y = y + first(net.b(last(y)))
    return first(net.a(last(y))) + y


# name -> how, sums taken in channels-last order
SUMS = {
    "a shortcut": (lambda net, x: first(net.a(last(x))) + x, 1),
    "shortcut first": (lambda net, x: x + first(net.a(last(x))), 1),
    "a chain of blocks": (chain, 2),
    "two layers": (lambda net, x: first(net.a(last(x))) + first(net.b(last(x))), 1),
    "shortcut read later": (shortcut_read_later, 1),
    "turned otherwise": (lambda net, x: net.a(last(x)).permute(0, 3, 2, 1) + x, 1),
    "with itself": (lambda net, x: (y := first(net.a(last(x)))) + y, 0),
    "small": (lambda net, x: first(net.a(last(x))) + x.mean((2, 3), keepdim=True), 0),
    "with a factor": (lambda net, x: torch.add(first(net.a(last(x))), x, alpha=2), 0),
}


@cache
def sketched(name: str) -> tuple[Case, dict[str | None, Tensor], WeightGraph]:
    how, parts = SCALES[name][:2] if name in SCALES else (SUMS[name][0], {"a": LINEAR, "b": LINEAR})
    made = case(lambda: Sketch(how, **{part: make() for part, make in parts.items()}), *IMAGES)
    expected = PlainWay(made.network).sweep(made)
    return made, expected, export_graph(made.network, made.images)


@pytest.mark.parametrize("name", SCALES)
def test_fold_layer_scales__folds(name):
    _, _, exported = sketched(name)
    assert targets(speed_up(exported, torch.float32, CPU)).count(scaled_weight) == SCALES[name][2]


@pytest.mark.parametrize("name", SUMS)
def test_add_before_permuting__adds(name):
    _, _, exported = sketched(name)
    nodes = with_plain_linears(exported).graph.nodes
    sums = [node for node in nodes if node.target is aten.add.Tensor]
    linear = [node for node in sums if any(x.target is aten.linear.default for x in node.all_input_nodes)]
    assert len(linear) == SUMS[name][1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SCALES, *SUMS])
def test_linear_layers__change_no_value(name, dtype):
    made, expected, exported = sketched(name)
    fast = GraphReplay(speed_up(exported, DTYPES[dtype], CPU), made.layers, dtype)
    got = sweep(fast, made)
    assert_near(got, expected, RELATIVE[dtype])
    again = sweep(fast, made)  # a value that was written over would show
    assert all(torch.equal(again[n], got[n]) for n in got)


def test_linear_layers__convnext_has_neither_scales_nor_permuted_sums_left():
    build, size = ARCHITECTURES["convnext_tiny"]
    made = case(build, 2, 3, size, size)
    found = with_plain_linears(export_graph(made.network, made.images))
    assert targets(found).count(scaled_weight) == targets(found).count(scaled_bias) == 5  # blocks
    assert aten.mul.Tensor not in targets(found)
    sums = [node for node in found.graph.nodes if node.target is aten.add.Tensor]
    assert [aten.linear.default in [x.target for x in node.all_input_nodes] for node in sums] == [True] * 5
