"""Where a network reads one token, only that token is computed, and nothing else changes."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_graphs import CPU, DTYPES, RELATIVE, assert_near, sweep, with_plain_linears
from layercrit.engine.graph import WeightGraph, export_graph, speed_up
from layercrit.engine.graph_replay import GraphReplay
from tiny_networks import ARCHITECTURES, IMAGES, Case, PlainWay, Sketch, case

aten = torch.ops.aten


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (n_images, 64 tokens, 8)


def pixel(token: Tensor) -> Tensor:
    return token[:, :, None, None]  # (n_images, 8) as an image of one pixel


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def attended(net: Sketch, t: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = net.qkv(net.norm(t)).reshape(len(t), 64, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return t + net.a(y.transpose(1, 2).reshape(len(t), 64, 8))


def spelt_out(net: Sketch, t: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in net.qkv(net.norm(t)).chunk(3, 2))
    weights = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1)
    return t + net.a((weights @ v).transpose(1, 2).contiguous().flatten(2))


def mlp(net: Sketch, t: Tensor) -> Tensor:
    return t + net.b(F.gelu(net.b(net.norm(t))))


def class_token(net: Sketch, x: Tensor) -> Tensor:
    return pixel(net.norm(mlp(net, attended(net, tokens_of(x))))[:, 0])


def two_tokens(net: Sketch, x: Tensor) -> Tensor:
    y = mlp(net, tokens_of(x))
    return pixel(y[:, 0] - y[:, 1])


def token_and_mean(net: Sketch, x: Tensor) -> Tensor:
    y = mlp(net, tokens_of(x))
    return pixel(y[:, 0] + y.mean(1))


def a_channel(net: Sketch, x: Tensor) -> Tensor:
    return pixel(net.b(mlp(net, tokens_of(x)))[:, :, 3].unflatten(1, (8, 8)).mean(2))


def square(net: Sketch, x: Tensor) -> Tensor:
    """Two dimensions of one size: the index is of the one that changes places."""
    t = net.b(x.permute(0, 2, 3, 1))  # (n_images, 8 rows, 8 columns, 8)
    return pixel(net.b(t.transpose(1, 2))[:, 2, 5])


def split_again(net: Sketch, x: Tensor) -> Tensor:
    """Rows that are no dimension of the merged tokens, of which another one has their size."""
    return pixel(net.b(net.b(tokens_of(x)).unflatten(1, (8, 8)))[:, 2, 5])


def split(net: Sketch, x: Tensor) -> Tensor:
    """Token 9 of a merged dimension has no index of its own before it was merged."""
    return pixel(net.b(x.permute(0, 2, 3, 1)).reshape(len(x), 64, 8)[:, 9])


def of_the_batch(net: Sketch, x: Tensor) -> Tensor:
    """A value that all images share: the first image's."""
    return pixel(net.b(x.mean((2, 3)))[:, :] + 0.1 * net.b(x.mean((2, 3)))[0])


PARTS = {"norm": partial(nn.LayerNorm, 8), "b": partial(nn.Linear, 8, 8)}
ATTENTION = {**PARTS, "qkv": partial(nn.Linear, 8, 24), "a": partial(nn.Linear, 8, 8)}
# name -> how, modules, linear layers of one token
SKETCHES = {
    "class token": (class_token, ATTENTION, 3),
    "attention spelt out": (lambda net, x: pixel(spelt_out(net, tokens_of(x))[:, 0]), ATTENTION, 1),
    "last token": (lambda net, x: pixel(mlp(net, attended(net, tokens_of(x)))[:, -1]), ATTENTION, 3),
    "masked attention": (
        lambda net, x: pixel(attended(net, tokens_of(x), net.mask)[:, 5]),
        {**ATTENTION, "mask": partial(parameter, 64, 64)},
        1,
    ),
    "two blocks": (lambda net, x: pixel(attended(net, mlp(net, attended(net, tokens_of(x))))[:, 3]), ATTENTION, 1),
    "read twice": (
        lambda net, x: pixel((y := mlp(net, tokens_of(x)))[:, 3] + y.select(-2, 3).relu()),
        PARTS,
        2,
    ),
    "with positions": (
        lambda net, x: pixel(net.b((tokens_of(x) + net.position) * net.scale)[:, 7]),
        {**PARTS, "position": partial(parameter, 1, 64, 8), "scale": partial(parameter, 64, 1)},
        1,
    ),
    "one for all tokens": (
        lambda net, x: pixel(net.b(net.position + x.mean((2, 3))[:, None])[:, 7]),
        {**PARTS, "position": partial(parameter, 64, 8)},
        1,
    ),
    "two tokens": (two_tokens, PARTS, 0),
    "a token and the mean": (token_and_mean, PARTS, 0),
    "a channel": (a_channel, PARTS, 0),
    "square": (square, PARTS, 2),
    "split again": (split_again, PARTS, 1),
    "split": (split, PARTS, 0),
    "of the batch": (of_the_batch, PARTS, 1),
    "softmax over tokens": (lambda net, x: pixel(net.b(net.b(tokens_of(x)).softmax(1))[:, 2]), PARTS, 1),
    "normalised over tokens": (
        lambda net, x: pixel(net.b(net.whole(net.b(tokens_of(x))))[:, 2]),
        {**PARTS, "whole": partial(nn.LayerNorm, (64, 8))},
        1,
    ),
}


@cache
def sketched(name: str) -> tuple[Case, dict[str | None, Tensor], WeightGraph]:
    how, parts, _ = SKETCHES[name]
    made = case(lambda: Sketch(how, **{part: make() for part, make in parts.items()}), *IMAGES)
    expected = PlainWay(made.network).sweep(made)
    return made, expected, export_graph(made.network, made.images)


def n_small(weight_graph: WeightGraph) -> int:
    """Count the linear layers that run on one index of a dimension; the last layer of all has two dimensions."""
    values = [node.meta["val"] for node in weight_graph.graph.nodes if node.target is aten.linear.default]
    return sum(1 in value.shape for value in values)


@pytest.mark.parametrize("name", SKETCHES)
def test_narrow__computes_what_is_read(name):
    _, _, exported = sketched(name)
    assert n_small(exported) == 0
    assert n_small(with_plain_linears(exported)) == SKETCHES[name][2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SKETCHES)
def test_narrow__changes_no_value(name, dtype):
    made, expected, exported = sketched(name)
    fast = GraphReplay(speed_up(exported, DTYPES[dtype], CPU), made.layers, dtype)
    got = sweep(fast, made)
    assert_near(got, expected, RELATIVE[dtype])
    again = sweep(fast, made)  # a value that was written over would show
    assert all(torch.equal(again[n], got[n]) for n in got)


@pytest.mark.parametrize(
    ("architecture", "n"),
    [
        ("vit_tiny", 3),  # the projection after attention and the two layers after that
        ("transformers_vit", 4),  # and the layer of queries
        ("transformers_vit_eager", 4),
        ("torchvision_vit_b_16", 2),  # its projection takes tokens and images as one dimension
    ],
)
def test_narrow__only_the_class_token_goes_through_the_last_block(architecture, n):
    build, size = ARCHITECTURES[architecture]
    made = case(build, 2, 3, size, size)
    assert n_small(with_plain_linears(export_graph(made.network, made.images))) == n
