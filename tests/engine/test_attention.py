"""Attention that is written out becomes one call: which is, and that it changes no value."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fast_graphs import CPU, DTYPES, RELATIVE, assert_near, sweep, targets
from layercrit.engine.attention import attention
from layercrit.engine.graph import WeightGraph, export_graph, speed_up
from layercrit.engine.graph_replay import GraphReplay
from tiny_networks import IMAGES, Case, PlainWay, Sketch, case, normal

N, H, T, D = 4, 2, 64, 4  # images, heads, tokens, features of a head
BIAS, MASK = normal(1, H, T, T, seed=3), normal(1, 2, 1, T, T, seed=4)
EACH = normal(N, 1, T, T, seed=5)


def attending(scores: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sketch, Tensor], Tensor]:
    """Attend between the pixels; `scores` says how products of queries and keys are made into what softmax takes."""

    def forward(net: Sketch, x: Tensor) -> Tensor:
        q, k, v = net.a(x.flatten(2).transpose(1, 2)).reshape(N, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        y = scores(q, k.transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).reshape(N, T, H * D).transpose(1, 2).reshape(x.shape)

    return forward


def windows(scores: Tensor, mask: Tensor = MASK) -> Tensor:
    """Add the mask of windows: every second image counts as another window."""
    return (scores.view(N // 2, 2, H, T, T) + mask).view(N, H, T, T)


def read_twice(net: Sketch, x: Tensor) -> Tensor:
    q, k, v = net.a(x.flatten(2).transpose(1, 2)).reshape(N, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1)).softmax(-1)
    y = scores @ v + scores.mean()
    return y.transpose(1, 2).reshape(N, T, H * D).transpose(1, 2).reshape(x.shape)


# name -> how, whether it becomes one call
SKETCHES = {
    "plain": (attending(lambda q, k: q @ k), True),
    "scaled queries": (attending(lambda q, k: (q * 0.5) @ k), True),
    "scaled products": (attending(lambda q, k: (q @ k) * 0.5), True),
    "divided products": (attending(lambda q, k: (q @ k) / 2), True),
    "bias": (attending(lambda q, k: (q * 0.5) @ k + BIAS), True),
    "bias first": (attending(lambda q, k: BIAS + (q @ k) / 2), True),
    "two biases": (attending(lambda q, k: q @ k + BIAS + BIAS[0, 0]), True),
    "bias of each image": (attending(lambda q, k: q @ k + EACH), True),
    "windows": (attending(lambda q, k: windows(q @ k)), True),
    "bias and windows": (attending(lambda q, k: windows((q * 0.5) @ k + BIAS)), True),
    "windows, then bias": (attending(lambda q, k: windows(q @ k) + BIAS), False),
    "windows alike, then bias": (attending(lambda q, k: windows(q @ k, MASK[:, :1]) + BIAS), False),
    "bias of each image and windows": (attending(lambda q, k: windows(q @ k + EACH)), False),
    "scaled bias": (attending(lambda q, k: (q @ k + BIAS) * 0.5), False),
    "bias from the image": (attending(lambda q, k: q @ k + q.mean()), False),
    "products as bias": (attending(lambda q, k: (q @ k).tanh() + q @ k), False),
    "bias with a factor": (attending(lambda q, k: torch.add(q @ k, BIAS, alpha=2)), False),
    "a bias of truth values": (attending(lambda q, k: q @ k + (BIAS > 0)), False),
    "a bias of whole numbers": (attending(lambda q, k: q @ k + BIAS.int()), False),
    "a curve": (attending(lambda q, k: (q @ k).tanh()), False),
    "read twice": (read_twice, False),
}


@cache
def sketched(name: str) -> tuple[Case, dict[str | None, Tensor], WeightGraph]:
    made = case(lambda: Sketch(SKETCHES[name][0], a=nn.Linear(8, 3 * H * D)), *IMAGES)
    return made, PlainWay(made.network).sweep(made), export_graph(made.network, made.images)


@pytest.mark.parametrize("name", SKETCHES)
def test_fuse_attention__makes_one_call(name):
    _, fuses = SKETCHES[name]
    found = targets(speed_up(sketched(name)[2], torch.float32, CPU))
    assert found.count(attention) == fuses
    assert found.count(torch.ops.aten.softmax.int) == (not fuses)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("name", SKETCHES)
def test_fuse_attention__changes_no_value(name, mode):
    made, expected, exported = sketched(name)
    got = sweep(GraphReplay(speed_up(exported, DTYPES[mode], CPU), made.layers, mode), made)
    assert_near(got, expected, RELATIVE[mode])
