"""oneDNN's fused linear layers; its convolutions are tested with the rest of the rewriting in test_graph.py.

In float32 `speed_up` fuses linear layers with AVX-512 only, since elsewhere that is slower. So that the fused ones run
on every processor, most of these tests fuse them in float32 all the same.
"""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_graphs import CPU, RELATIVE, assert_near, sweep, targets
from layercrit.engine import onednn
from layercrit.engine.graph import WeightGraph, export_graph, speed_up
from layercrit.engine.graph_replay import GraphReplay
from tiny_networks import ARCHITECTURES, IMAGES, Case, PlainWay, Sketch, case

aten = torch.ops.aten
LINEAR = partial(nn.Linear, 8, 8)

needs_onednn = pytest.mark.skipif(
    not onednn.linears_work(torch.float32), reason="this build of torch or this processor is without them"
)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def then(what: Callable[[Tensor], Tensor]) -> Callable[[Sketch, Tensor], Tensor]:
    return lambda net, x: first(what(net.a(last(x))))


def shortcut_read_later(net: Sketch, x: Tensor) -> Tensor:
    y = last(x).relu()
    return first(net.b(net.a(y) + y) + y)


def read_twice(net: Sketch, x: Tensor) -> Tensor:
    y = net.a(last(x))
    return first(F.gelu(y) + y)


def weight_from_image(net: Sketch, x: Tensor) -> Tensor:
    """One weight is computed from the image, and one by a linear layer that is fused itself."""
    weight = net.a.weight * x.mean()
    return first(F.linear(F.linear(last(x), weight), net.a(x.mean((0, 2)))))


def in_half(net: Sketch, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.a(last(x))
    return first(y.float())


# name -> how, whether there is a bias, plain and residual fused layers before the last one of the network
SKETCHES = {
    "alone": (then(lambda y: y), True, 1, 0),
    "without bias": (then(lambda y: y), False, 1, 0),
    "gelu": (then(F.gelu), True, 1, 0),
    "gelu by tanh": (then(partial(F.gelu, approximate="tanh")), True, 1, 0),
    **{
        f.__name__: (then(f), True, 1, 0)
        for f in (F.relu, F.silu, F.hardswish, torch.sigmoid, F.hardtanh, F.leaky_relu, torch.tanh)
    },
    "shortcut": (lambda net, x: first(net.a(last(x)) + last(x)), True, 0, 1),
    "shortcut first, without bias": (lambda net, x: first(last(x) + net.a(last(x))), False, 0, 1),
    "strided input and shortcut": (lambda net, x: net.a(x.transpose(2, 3)) + x.transpose(1, 2), True, 0, 1),
    "shortcut read later": (shortcut_read_later, True, 0, 2),
    "static shortcut": (lambda net, x: first(net.a(last(x)) + net.b.weight.expand(4, 8, 8, 8)), True, 0, 1),
    "two layers": (lambda net, x: first(net.a(last(x)) + net.b(last(x))), True, 1, 1),
    "shortcut, then gelu": (lambda net, x: first(F.gelu(net.a(last(x)) + last(x))), True, 0, 1),
    "small shortcut": (lambda net, x: first(net.a(last(x)) + x.mean((2, 3))[:, None, None]), True, 1, 0),
    "with a factor": (lambda net, x: first(torch.add(net.a(last(x)), last(x), alpha=2)), True, 1, 0),
    "with itself": (lambda net, x: first((y := net.a(last(x))) + y), True, 1, 0),
    "read twice": (read_twice, True, 1, 0),
    "weight from the image": (weight_from_image, True, 1, 0),
    "in bfloat16": (in_half, True, 0, 0),
}


@cache
def sketched(name: str) -> tuple[Case, dict[str | None, Tensor], WeightGraph]:
    how, bias, *_ = SKETCHES[name]
    made = case(lambda: Sketch(how, a=LINEAR(bias=bias), b=LINEAR()), *IMAGES)
    return made, PlainWay(made.network).sweep(made), export_graph(made.network, made.images)


def fused(exported: WeightGraph) -> WeightGraph:
    fast = speed_up(exported, torch.float32, CPU)
    onednn.fuse_linears(fast.graph, fast.dynamic_nodes())
    return fast


def counts(fast: WeightGraph) -> tuple[int, int, int]:
    """Count linear layers: fused, fused with a sum, and left."""
    found = targets(fast)
    wanted = (onednn.fused_linear, onednn.fused_linear_residual, aten.linear.default)
    return tuple(found.count(target) for target in wanted)


@pytest.mark.parametrize("name", SKETCHES)
def test_fuse_linears__fuses(name):
    _, _, exported = sketched(name)
    _, _, plain, residual = SKETCHES[name]
    left = {"weight from the image": 2, "in bfloat16": 1}.get(name, 0)
    assert counts(fused(exported)) == (plain + 1, residual, left)
    activations = {
        aten.gelu.default,
        aten.relu.default,
        aten.silu.default,
        aten.hardswish.default,
        aten.sigmoid.default,
    }
    if name not in ("shortcut, then gelu", "read twice", "shortcut read later"):
        assert not activations & set(targets(fused(exported)))


@needs_onednn
@pytest.mark.parametrize("name", SKETCHES)
def test_fuse_linears__changes_no_value(name):
    made, expected, exported = sketched(name)
    fast = GraphReplay(fused(exported), made.layers, "float32")
    got = sweep(fast, made)
    assert_near(got, expected, 0.02 if name == "in bfloat16" else RELATIVE["float32"])
    again = sweep(fast, made)  # a value that was written over would show
    assert all(torch.equal(again[n], got[n]) for n in got)


@needs_onednn
@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        ("vit_tiny", (7, 6, 0)),  # 3 blocks: queries, keys and values; projection + x; GELU; + x. And the head
        ("deit_tiny", (5, 5, 0)),  # the mean of two heads is a sum, too
        ("swin_tiny", (15, 4, 0)),  # 4 blocks and 2 that merge patches
        ("mixer_b16", (7, 2, 0)),
        ("convnext_tiny", (6, 5, 0)),
        ("transformers_vit", (9, 4, 0)),
    ],
)
def test_fuse_linears__transformers(architecture, found):
    build, size = ARCHITECTURES[architecture]
    made = case(build, 4, 3, size, size)
    fast = fused(export_graph(made.network, made.images))
    assert counts(fast) == found
    got = sweep(GraphReplay(fast, made.layers, "float32"), made)
    expected = PlainWay(made.network).sweep(made)
    assert_near(got, expected, 5e-5)
    clean = {"got": got[None].softmax(1), "expected": expected[None].softmax(1)}
    for name in expected:
        right, found_here = (
            1 - torch.cosine_similarity(clean[which], logits[name].softmax(1)).mean()
            for which, logits in (("expected", expected), ("got", got))
        )
        assert abs(right - found_here) < 1e-5, name


@pytest.mark.parametrize(
    ("capability", "dtype", "fuses"),
    [
        ("AVX2", torch.float32, False),
        ("AVX2", torch.bfloat16, True),
        ("AVX512", torch.float32, True),
        ("AVX512", torch.bfloat16, True),
    ],
)
def test_speed_up__fuses_linear_layers_where_that_pays(capability, dtype, fuses, monkeypatch):
    monkeypatch.setattr(onednn, "linears_work", lambda dtype: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    _, _, exported = sketched("gelu")
    assert counts(speed_up(exported, dtype, CPU)) == ((2, 0, 0) if fuses else (0, 0, 2))
    assert counts(speed_up(exported, dtype, torch.device("cuda"))) == (0, 0, 2)


def test_speed_up__leaves_linear_layers_where_the_private_operators_do_not_work(monkeypatch):
    monkeypatch.setattr(onednn, "linears_work", lambda dtype: False)
    _, _, exported = sketched("gelu")
    assert counts(speed_up(exported, torch.bfloat16, CPU)) == (0, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_work__says_no_where_an_operator_is_missing_or_wrong(dtype, monkeypatch):
    works = onednn.linears_work.__wrapped__
    if not works(dtype):
        pytest.skip("this build of torch or this processor is without them")

    def missing(*_: object) -> Tensor:
        raise RuntimeError("no such operator")

    for name in ("packed_linear_weight", "fused_linear", "fused_linear_residual"):
        with monkeypatch.context() as patch:
            patch.setattr(onednn, name, missing)
            assert not works(dtype), name
    for name in ("fused_linear", "fused_linear_residual"):
        right = getattr(onednn, name)
        with monkeypatch.context() as patch:
            patch.setattr(onednn, name, lambda *arguments, right=right: right(*arguments) * 1.5)
            assert not works(dtype), name
    assert works(dtype)
