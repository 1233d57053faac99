import copy
import gc
import random
import re
import weakref
from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layercrit.engine import exports, graph, graph_replay, opening
from layercrit.engine.graph import export_graph
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.opening import open_replay
from layercrit.engine.recorded_replay import RecordedReplay
from layercrit.engine.replay import MODES, PlainReplay, Replay
from layercrit.errors import ProtocolError
from layercrit.layers import Layer, find_layers, select_layers
from layercrit.machine import multiplies_bfloat16
from layercrit.seeds import drawing
from tiny_networks import (
    ARCHITECTURES,
    BY_HAND_IMAGES,
    BY_HAND_LOGITS,
    IMAGES,
    ByHand,
    Caching,
    Case,
    Counting,
    DataDependent,
    Failing,
    Hidden,
    InPlace,
    Moody,
    PlainWay,
    PreActivation,
    Recurrent,
    Remembering,
    Sketch,
    Structured,
    Tied,
    UsedTwice,
    case,
    normal,
)

CPU = torch.device("cpu")
BACKENDS = {"exported graph": GraphReplay, "recorded outputs": RecordedReplay, "plain": PlainReplay}

# Error of a fast mode against the plain way, over all layers of all architectures below, which are untrained and
# therefore ill-conditioned. Measured: float32 7e-6 in a softmax output; bfloat16 0.09, and in criticality 0.027 for a
# layer and 3e-4 in the mean. For networks with trained weights see benchmarks/replay.py.
TOLERANCE = {"float32": (1e-5, 1e-5, 1e-5), "bfloat16": (0.2, 0.05, 0.002)}


def sweep(opened: Replay, made: Case, layers: list[Layer] | None = None) -> dict[str | None, Tensor]:
    chosen = made.layers if layers is None else layers
    prepared = {layer.name: opened.prepare(layer, made.values(layer)) for layer in chosen}
    return dict(opened.sweep(made.images, prepared))


def assert_equal(got: dict[str | None, Tensor], expected: dict[str | None, Tensor]) -> None:
    assert list(got) == list(expected)  # depth order, the trained network last
    for name in expected:
        assert torch.equal(got[name], expected[name]), f"other logits after a reset of {name}"


def criticalities(logits: dict[str | None, Tensor]) -> Tensor:
    clean = logits[None].softmax(1)
    layers = [name for name in logits if name is not None]
    return torch.stack([1 - torch.cosine_similarity(clean, logits[name].softmax(1)).mean() for name in layers])


# --- every layer of every architecture ------------------------------------------------------------------------------


@cache
def architecture(name: str) -> tuple[Case, dict[str | None, Tensor], Replay]:
    build, size = ARCHITECTURES[name]
    made = case(build, 3, 3, size, size)
    expected = PlainWay(made.network).sweep(made)
    return made, expected, open_replay(made.network, made.layers, made.images, "reference")


LARGE = {"resnet50", "densenet121", "efficientnet_b0", "mobilenetv3_large_100", "regnety_008"}
NAMES = [
    # one worker of pytest-xdist for all tests of an architecture (with --dist=loadgroup), so that it is opened once
    pytest.param(name, marks=[pytest.mark.xdist_group(name), *([pytest.mark.slow] if name in LARGE else [])])
    for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", NAMES)
def test_open_replay__reference_is_the_plain_way_bit_for_bit(name):
    made, expected, opened = architecture(name)
    assert select_layers(made.layers, types="all") == made.layers
    assert {p for layer in made.layers for p in layer.parameters} == dict(made.network.named_parameters()).keys()
    assert opened.mode == "reference"
    # nn.MultiheadAttention runs a kernel of its own, which the exporter does not write down
    assert opened.backend == ("recorded outputs" if name == "torchvision_vit_b_16" else "exported graph")
    assert_equal(sweep(opened, made), expected)


@pytest.mark.parametrize("name", NAMES)
def test_open_replay__every_reset_of_the_sweep_matters(name):
    """Else the tests beside this one would pass for an engine that resets nothing."""
    _, expected, _ = architecture(name)
    clean = expected[None]
    assert clean.softmax(1).std(dim=1).min() > 0.02, "predictions are near-constant"
    idle = [n for n in expected if n is not None and torch.equal(expected[n], clean)]
    # the last windows of swin_tiny are one position, whose bias means nothing unless timm pads them
    assert [n for n in idle if not re.match(r"layers\.3\..*relative_position_bias_table", n)] == []
    assert criticalities(expected).max() > 0.05


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_open_replay__fast_modes_are_near_the_plain_way(name, mode):
    if mode == "bfloat16" and not multiplies_bfloat16(CPU):
        pytest.skip("this processor emulates bfloat16, which takes minutes for networks of this size")
    made, expected, opened = architecture(name)
    if isinstance(opened, GraphReplay):  # as open_replay does, without exporting again
        opened = opened.in_mode(mode, CPU)
    else:
        opened = open_replay(made.network, made.layers, made.images, mode)
    assert (opened.mode, opened.backend, opened.note) == (mode, "exported graph", "")
    got = sweep(opened, made)
    assert list(got) == list(expected)
    assert all(logits.dtype == torch.float32 for logits in got.values())
    of_softmax, of_layer, of_mean = TOLERANCE[mode]
    assert max(float((got[n].softmax(1) - expected[n].softmax(1)).abs().max()) for n in expected) <= of_softmax
    error = criticalities(got) - criticalities(expected)
    assert error.abs().max() <= of_layer
    assert error.mean().abs() <= of_mean
    if mode == "float32":  # also where a reset moves logits little, it is that reset which moves them
        for n in expected:
            moved = float((expected[n] - expected[None]).abs().max())
            rounding = 4 * torch.finfo(torch.float32).eps * float(expected[n].abs().max())  # differs between processors
            assert n is None or float((got[n] - expected[n]).abs().max()) <= 0.02 * moved + rounding, n


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["convnext_tiny", "vit_tiny", "torchvision_resnet18"])
def test_open_replay__opens_in_the_mode_asked_for(name, mode):
    made, _, reference = architecture(name)
    opened = open_replay(made.network, made.layers, made.images, mode)
    assert (opened.mode, opened.backend, opened.note) == (mode, "exported graph", "")
    other = reference if mode == "reference" else reference.in_mode(mode, CPU)
    assert_equal(sweep(opened, made), sweep(other, made))


@pytest.mark.parametrize("backend", ["recorded outputs", "plain"])
@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "swin_tiny", "vit_tiny", "torchvision_resnet18", "torchvision_vit_b_16", "transformers_vit"],
)
def test_sweep__slower_backends_are_the_plain_way_bit_for_bit(name, backend):
    made, expected, _ = architecture(name)
    assert_equal(sweep(BACKENDS[backend](made.network, made.layers), made), expected)


# --- odd networks ---------------------------------------------------------------------------------------------------

ODD = {
    "UsedTwice": (UsedTwice, "exported graph"),
    "Tied": (Tied, "exported graph"),
    "InPlace": (InPlace, "exported graph"),
    "PreActivation": (PreActivation, "exported graph"),
    "Structured": (Structured, "exported graph"),
    "Remembering": (Remembering, "exported graph"),
    "Recurrent": (Recurrent, "exported graph"),
    "DataDependent": (DataDependent, "recorded outputs"),
    "Counting": (Counting, "recorded outputs"),
    "Hidden": (Hidden, "recorded outputs"),
    "Caching": (Caching, "plain"),
}


@cache
def oddity(name: str) -> tuple[Case, dict[str | None, Tensor]]:
    made = case(ODD[name][0], *IMAGES)
    expected = PlainWay(made.network).sweep(made)
    assert not any(torch.equal(expected[n], expected[None]) for n in expected if n is not None)
    return made, expected


@pytest.mark.parametrize("name", ODD)
def test_open_replay__odd_networks_bit_for_bit(name):
    made, expected = oddity(name)
    opened = open_replay(made.network, made.layers, made.images, "reference")
    assert opened.backend == ODD[name][1]
    assert_equal(sweep(opened, made), expected)


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ODD)
def test_open_replay__odd_networks_in_fast_modes(name, mode):
    made, expected = oddity(name)
    opened = open_replay(made.network, made.layers, made.images, mode)
    if ODD[name][1] != "exported graph":
        assert opened.mode == "reference"
        return assert_equal(sweep(opened, made), expected)
    assert opened.mode == mode
    got = sweep(opened, made)
    for n in expected:
        change = (got[n].softmax(1) - expected[n].softmax(1)).abs().max()
        assert change <= (1e-5 if mode == "float32" else 0.03), n
    return None


@pytest.mark.parametrize("name", sorted(ODD.keys() - {"PreActivation", "Caching"}))
def test_sweep__recorded_odd_networks_bit_for_bit(name):
    made, expected = oddity(name)
    opened = RecordedReplay(made.network, made.layers)
    for _ in range(2):
        assert_equal(sweep(opened, made), expected)


@pytest.mark.parametrize("name", ODD)
def test_sweep__plain_odd_networks_bit_for_bit(name):
    made, expected = oddity(name)
    assert_equal(sweep(PlainReplay(made.network, made.layers), made), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("build", "backend", "note"),
    [
        (
            DataDependent,
            "recorded outputs",
            r"recorded outputs instead of an exported graph: the network cannot be exported \(GuardOnDataDependent.*\)",
        ),
        (
            Counting,
            "recorded outputs",
            r"recorded outputs instead of an exported graph: the network cannot be exported "
            r"\(RuntimeError: the network writes to its own buffers or to its input\)",
        ),
        (
            Caching,
            "plain",
            r"the plain backend, without reuse: the network cannot be exported \(GuardOnDataDependent.*\), "
            "and recorded outputs give other logits",
        ),
        (
            Moody,
            "plain",
            r"the plain backend, without reuse: the network cannot be exported \(.*\), and recorded outputs give .*",
        ),
    ],
    ids=["recorded outputs", "buffers", "plain", "unsteady"],
)
def test_open_replay__says_in_one_line_which_slower_backend_it_takes(build, backend, note, mode, capfd):
    made = case(build, *IMAGES)
    opened = open_replay(made.network, made.layers, made.images, mode)
    assert (opened.backend, opened.mode) == (backend, "reference")
    assert "\n" not in opened.note
    assert re.fullmatch(note, opened.note)
    assert capfd.readouterr() == ("", ""), "the exporter prints a whole graph when it fails"


def test_open_replay__a_weight_that_the_graph_took_for_a_constant_is_found(monkeypatch):
    made = case(UsedTwice, *IMAGES)

    def forgetful(*asked: Any) -> graph.WeightGraph:
        weight_graph = export_graph(*asked)
        lost = next(node for node, names in weight_graph.names.items() if "norm.bias" in names)
        weight_graph.names[lost] = ("a constant",)
        return weight_graph

    monkeypatch.setattr(exports, "export_graph", forgetful)
    monkeypatch.setattr(exports, "_kept", [])
    opened = open_replay(made.network, made.layers, made.images, "float32")
    assert opened.backend == "recorded outputs"
    assert opened.note == (
        "recorded outputs instead of an exported graph: "
        "the exported network does not reproduce the network's own logits"
    )
    assert_equal(sweep(opened, made), PlainWay(made.network).sweep(made))


class Unseparable(nn.Module):
    """A Fourier transform, which CPUs do not compute in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).abs()


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.4 and 2.5 cannot export a Fourier transform")
def test_open_replay__a_number_format_that_fails_gives_way_to_the_next():
    made = case(partial(Sketch, lambda net, x: net.fourier(x), fourier=Unseparable()), *IMAGES)
    opened = open_replay(made.network, made.layers, made.images, "bfloat16")
    assert (opened.mode, opened.backend) == ("float32", "exported graph")
    assert opened.note.startswith("float32 instead of bfloat16: bfloat16 fails (NotImplementedError: ")
    assert "\n" not in opened.note
    expected = PlainWay(made.network).sweep(made)
    got = sweep(opened, made)
    assert all(torch.allclose(got[n], expected[n], atol=1e-5) for n in expected)


def test_open_replay__a_mode_that_moves_predictions_too_far_is_not_taken(monkeypatch):
    made = case(UsedTwice, *IMAGES)
    monkeypatch.setitem(opening._BROKEN, "bfloat16", 1e-7)
    opened = open_replay(made.network, made.layers, made.images, "bfloat16")
    assert opened.mode == "float32"
    assert opened.note.startswith("float32 instead of bfloat16: bfloat16 moves predictions too far (total variation ")
    monkeypatch.setitem(opening._BROKEN, "float32", -1.0)
    opened = open_replay(made.network, made.layers, made.images, "bfloat16")
    assert (opened.mode, opened.backend) == ("reference", "exported graph")
    assert opened.note.startswith("reference instead of bfloat16: bfloat16 moves ")
    assert "; float32 moves " in opened.note
    assert_equal(sweep(opened, made), PlainWay(made.network).sweep(made))


def test_open_replay__out_of_memory_is_not_taken_for_an_unknown_number_format(monkeypatch):
    made = case(UsedTwice, *IMAGES)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(graph_replay, "speed_up", full)
    with pytest.raises(torch.OutOfMemoryError):
        open_replay(made.network, made.layers, made.images, "bfloat16")


def test_open_replay__a_network_that_overflows_is_still_followed():
    made = case(UsedTwice, *IMAGES)
    with torch.no_grad():
        made.network.norm.running_var.fill_(-1.0)  # a root of a negative number: NaN
    opened = open_replay(made.network, made.layers, made.images, "reference")
    assert opened.backend == "exported graph"
    assert opened.logits(made.images).isnan().any()


def test_sweep__calls_that_differ_from_the_recorded_ones_are_run(monkeypatch):
    made, expected = oddity("DataDependent")
    diverted = _Diverted(made.network)
    opened = RecordedReplay(diverted, find_layers(diverted, made.images))
    with_prefix = {f"inner.{n}" if n else n: logits for n, logits in expected.items()}
    prepared = {
        f"inner.{layer.name}": {f"inner.{name}": value for name, value in made.values(layer).items()}
        for layer in made.layers
    }
    got = dict(opened.sweep(made.images, prepared))
    assert all(torch.equal(got[n], with_prefix[n]) for n in with_prefix)


class _Diverted(nn.Module):
    """Calls one module more in its first pass than ever after."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.extra, self.inner, self.passes = nn.Identity(), inner, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.inner(self.extra(images) if self.passes <= 2 else images)


# --- what a sweep takes and gives -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand() -> tuple[ByHand, list[Layer]]:
    network = ByHand()
    return network, find_layers(network, BY_HAND_IMAGES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sweep__by_hand(by_hand, backend, mode):
    """Small whole numbers are exact in every number format.

    first <- (1, 1): hidden relu(x, x) is (1, 1) and (0, 0), logits (0, 3) and (0, 0).
    last <- ((0, 1), (1, 0)): logits (hidden_1, hidden_0), (0, 2) and (1, 0).
    """
    network, layers = by_hand
    if backend != "exported graph" and mode != "reference":
        pytest.skip("the other backends know reference only")
    opened = (
        open_replay(network, layers, BY_HAND_IMAGES, mode)
        if backend == "exported graph"
        else BACKENDS[backend](network, layers)
    )
    assert (opened.backend, opened.mode) == (backend, mode)
    drawn = {
        "first": {"first.weight": torch.tensor([[1.0], [1.0]])},
        "last": {"last.weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]])},
    }
    prepared = {layer.name: opened.prepare(layer, drawn[layer.name]) for layer in layers}
    got = list(opened.sweep(BY_HAND_IMAGES, prepared))
    assert [name for name, _ in got] == ["first", "last", None]
    assert got[0][1].tolist() == [[0, 3], [0, 0]]
    assert got[1][1].tolist() == [[0, 2], [1, 0]]
    assert torch.equal(got[2][1], BY_HAND_LOGITS)
    assert torch.equal(opened.logits(BY_HAND_IMAGES), BY_HAND_LOGITS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sweep__some_layers_any_order_twice_give_the_same_bits(backend):
    made, expected = oddity("UsedTwice")
    opened = (
        GraphReplay(export_graph(made.network, made.images), made.layers)
        if backend == "exported graph"
        else BACKENDS[backend](made.network, made.layers)
    )
    clean = opened.logits(made.images)
    assert_equal(sweep(opened, made), expected)
    some = [made.layers[3], made.layers[1]]
    for _ in range(2):
        got = sweep(opened, made, some)
        assert list(got) == [made.layers[1].name, made.layers[3].name, None], "not in depth order"
        assert all(torch.equal(got[n], expected[n]) for n in got)
    assert_equal(sweep(opened, made), expected)
    assert torch.equal(opened.logits(made.images), clean)


def test_sweep__other_images_of_the_same_shape(by_hand):
    network, layers = by_hand
    opened = open_replay(network, layers, BY_HAND_IMAGES, "reference")
    assert opened.logits(BY_HAND_IMAGES.flip(0)).tolist() == BY_HAND_LOGITS.flip(0).tolist()


def test_sweep__another_shape_is_an_error(by_hand):
    network, layers = by_hand
    opened = open_replay(network, layers, BY_HAND_IMAGES, "reference")
    with pytest.raises(ProtocolError, match=r"shape \(1, 1, 1, 1\), but .* exported for \(2, 1, 1, 1\).*last batch"):
        opened.logits(BY_HAND_IMAGES[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sweep__a_layer_that_is_never_used_changes_nothing(backend):
    made = case(partial(Sketch, lambda net, x: net.conv(x), conv=nn.Conv2d(8, 8, 1), idle=nn.Linear(2, 2)), *IMAGES)
    assert made.layers[-1].name == "idle"
    opened = (
        open_replay(made.network, made.layers, made.images, "reference")
        if backend == "exported graph"
        else BACKENDS[backend](made.network, made.layers)
    )
    got = sweep(opened, made)
    assert torch.equal(got["idle"], got[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepare__of_tied_parameters_the_first_name_in_the_layer_counts(backend):
    made, _ = oddity("Tied")
    both = Layer("both", "conv", ("second.weight", "first.weight", "first.bias"), (8, 8, 3, 3), 0)
    values = {"second.weight": normal(8, 8, 3, 3), "first.weight": normal(8, 8, 3, 3, seed=5), "first.bias": normal(8)}
    opened = (
        GraphReplay(export_graph(made.network, made.images), [both])
        if backend == "exported graph"
        else BACKENDS[backend](made.network, [both])
    )
    got = dict(opened.sweep(made.images, {"both": opened.prepare(both, values)}))
    one = {"first.weight": values["second.weight"], "first.bias": values["first.bias"]}
    assert torch.equal(got["both"], PlainWay(made.network)(one, made.images))


@pytest.mark.parametrize("group", ["block", "stage"])
def test_sweep__groups_of_layers(group):
    made, _, _ = architecture("convnext_tiny")
    grouped = select_layers(made.layers, types="all", group=group)
    opened = open_replay(made.network, grouped, made.images, "reference")
    assert_equal(sweep(opened, made, grouped), PlainWay(made.network).sweep(made, grouped))


# --- memory ---------------------------------------------------------------------------------------------------------


def chain(depth: int) -> nn.Module:
    return Sketch(lambda net, x: net.convs(x), convs=nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(depth))))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the results of nodes, of the shape of an activation of `chain`, that are still alive."""
    call, results = graph_replay.call, []

    def watched(*arguments: object) -> object:
        result = call(*arguments)
        if isinstance(result, Tensor) and result.shape == (4, 8, 8, 8):
            results.append(weakref.ref(result))
        most.append(count())
        return result

    def count() -> int:
        return sum(result() is not None for result in results)

    most: list[int] = []
    count.most = most
    monkeypatch.setattr(graph_replay, "call", watched)
    return count


@pytest.mark.parametrize("mode", MODES)
def test_sweep__keeps_no_value_after_its_last_use(live, mode):
    made = case(partial(chain, 12), *IMAGES)
    opened = open_replay(made.network, made.layers, made.images, mode)
    for layers in (made.layers, made.layers[-1:], made.layers[3:5]):
        prepared = {layer.name: opened.prepare(layer, made.values(layer)) for layer in layers}
        live.most.clear()
        for _ in opened.sweep(made.images, prepared):
            assert live() <= 1, "between two resets, one clean value is enough"
        assert len(live.most) > 12
        assert max(live.most) <= 3, "one clean value, and the input and output of one node after the reset"
        assert live() == 0


@pytest.mark.parametrize(
    "build", [UsedTwice, DataDependent, Caching], ids=["exported graph", "recorded outputs", "plain"]
)
def test_open_replay__nothing_keeps_the_network_alive(build):
    made = case(build, *IMAGES)
    opened = open_replay(made.network, made.layers, made.images, "float32")
    sweep(opened, made)
    network, weight = weakref.ref(made.network), weakref.ref(made.network.stem.weight)
    engine = weakref.ref(opened)
    del made, opened
    gc.collect()
    assert engine() is None
    assert network() is None
    assert weight() is None


# --- nothing is changed for good ------------------------------------------------------------------------------------


class Snapshot:
    """All that a user could find changed in a network and in the process."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.tensors = [(n, t, t.detach().clone()) for n, t in self._tensors()]
        self.flags = [(m, m.training, m.__dict__.get("forward")) for m in network.modules()]
        self.requires_grad = [(p, p.requires_grad) for p in network.parameters()]
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]
        self.attributes = [dict(m.__dict__) for m in network.modules()]
        self.states = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [
            *self.network.named_parameters(remove_duplicate=False),
            *self.network.named_buffers(remove_duplicate=False),
        ]
        return sorted(named, key=lambda pair: pair[0])

    def assert_same(self) -> None:
        for (name, before, value), (other, now) in zip(self.tensors, self._tensors(), strict=True):
            assert name == other
            assert now is before, f"{name} is another object"
            assert type(now) is type(before)
            assert torch.equal(now, value), f"{name} has other values"
        for module, training, forward in self.flags:
            assert module.training is training
            assert module.__dict__.get("forward") is forward
        assert all(p.requires_grad is flag for p, flag in self.requires_grad)
        assert self.hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in self.network.modules()]
        for module, attributes in zip(self.network.modules(), self.attributes, strict=True):
            assert module.__dict__.keys() - {"features", "calls", "passes", "calls_left"} == attributes.keys() - {
                "features",
                "calls",
                "passes",
                "calls_left",
            }
        torch_state, python_state, numpy_state = self.states
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == python_state
        assert str(np.random.get_state()) == str(numpy_state)  # noqa: NPY002
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def _one_more(module: nn.Linear, x: Tensor) -> Tensor:
    return type(module).forward(module, x) + 1


def dressed(build: type[nn.Module]) -> Case:
    """A network with a training flag, a frozen parameter, a hook and a forward of the user's own."""
    made = case(build, *IMAGES)
    made.network.stem.training = True  # a convolution does not mind
    made.network.last.bias.requires_grad_(False)
    made.network.stem.register_forward_hook(lambda module, inputs, output: output * 2)
    made.network.last.forward = MethodType(_one_more, made.network.last)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [ODD[name][0] for name in ODD], ids=list(ODD))
def test_open_replay__leaves_network_and_process_as_they_were(build, mode):
    made = dressed(build)
    snapshot = Snapshot(made.network)
    opened = open_replay(made.network, made.layers, made.images, mode)
    snapshot.assert_same()
    got = sweep(opened, made)
    snapshot.assert_same()
    if opened.mode == "reference":
        assert_equal(got, PlainWay(made.network).sweep(made))


def test_open_replay__hooks_and_a_forward_of_the_users_own_count():
    made = dressed(DataDependent)
    bare = copy.deepcopy(made.network)
    bare.stem._forward_hooks.clear()
    assert not torch.equal(bare(made.images), made.network(made.images))
    for backend in (RecordedReplay, PlainReplay):
        assert torch.equal(backend(made.network, made.layers).logits(made.images), made.network(made.images))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls_left", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("backend", ["recorded outputs", "plain"])
def test_sweep__after_an_exception_everything_is_as_it_was(backend, calls_left, error):
    made = dressed(Failing)
    opened = BACKENDS[backend](made.network, made.layers)
    expected = sweep(opened, made)
    snapshot = Snapshot(made.network)
    made.network.fuse.calls_left, made.network.fuse.error = calls_left, error
    with pytest.raises(error, match="blown"):
        sweep(opened, made)
    made.network.fuse.calls_left, made.network.fuse.error = None, RuntimeError
    snapshot.assert_same()
    assert_equal(sweep(opened, made), expected)


def test_sweep__after_an_exception_in_a_graph_everything_is_as_it_was(monkeypatch):
    made = dressed(Failing)
    opened = open_replay(made.network, made.layers, made.images, "reference")
    expected = sweep(opened, made)
    snapshot = Snapshot(made.network)
    call, left = graph_replay.call, [15]

    def blowing(*arguments: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt("blown")
        return call(*arguments)

    monkeypatch.setattr(graph_replay, "call", blowing)
    with pytest.raises(KeyboardInterrupt, match="blown"):
        sweep(opened, made)
    snapshot.assert_same()
    assert_equal(sweep(opened, made), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls_left", [0, 1])
def test_open_replay__after_an_exception_everything_is_as_it_was(calls_left, error):
    """The first call is the exporter's: what it raises is answered by a slower backend, which then meets it itself."""
    made = dressed(Failing)
    snapshot = Snapshot(made.network)
    made.network.fuse.calls_left, made.network.fuse.error = calls_left, error
    with pytest.raises(error, match="blown"):
        open_replay(made.network, made.layers, made.images, "float32")
    made.network.fuse.calls_left, made.network.fuse.error = None, RuntimeError
    snapshot.assert_same()


def test_sweep__abandoned_halfway_leaves_everything_as_it_was():
    for build in (UsedTwice, DataDependent, Caching):
        made = dressed(build)
        opened = open_replay(made.network, made.layers, made.images, "reference")
        snapshot = Snapshot(made.network)
        prepared = {layer.name: opened.prepare(layer, made.values(layer)) for layer in made.layers}
        running = opened.sweep(made.images, prepared)
        next(running)
        snapshot.assert_same()  # between two resets, too
        running.close()
        snapshot.assert_same()


def test_sweep__a_network_made_in_inference_mode():
    made = case(DataDependent, *IMAGES)
    with torch.inference_mode():
        network = copy.deepcopy(made.network)
    assert network.stem.weight.is_inference()
    snapshot = Snapshot(network)
    got = sweep(PlainReplay(network, made.layers), made)
    assert_equal(got, PlainWay(made.network).sweep(made))
    snapshot.assert_same()


class OneMask(nn.Module):
    """Attention with one bias for each key, the same for all queries, which is zero before training."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(12, 8), nn.Linear(8, 24), nn.Linear(8, 5)
        self.mask = nn.Parameter(torch.zeros(16))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(1).view(len(images), 16, 12))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, self.mask)[:, 0])


class Strided(nn.Module):
    """Reads values as they lie in memory, behind a gate that is closed before training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        turned = x.contiguous().as_strided(x.shape, (256, 1, 4, 32))
        return self.head((x + self.gate * turned).mean(dim=(2, 3)))


class OneOutput(nn.Module):
    """A linear layer whose weight is a vector, and a scale of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(12, 8), nn.Parameter(torch.ones(8))
        self.scale, self.head = nn.Parameter(torch.ones(16)), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.first(images.flatten(1).view(len(images), 16, 12))
        return self.head(nn.functional.linear(tokens, self.weight) * self.scale)


@pytest.mark.parametrize("build", [OneMask, Strided, OneOutput])
def test_open_replay__float32_is_right_where_only_drawn_values_tell(build):
    with drawing(0):
        network = build().eval()
        images = torch.randn(3, 3, 8, 8)
        layers = [Layer(name, "linear", (name,), (), 0) for name, _ in network.named_parameters()]
        values = {name: {name: torch.randn_like(p)} for name, p in network.named_parameters()}
    replay = open_replay(network, layers, images, "float32")
    prepared = {layer.name: replay.prepare(layer, values[layer.name]) for layer in layers}
    expected = PlainReplay(network, layers).sweep(images, values)
    for (name, found), (_, logits) in zip(replay.sweep(images, prepared), expected, strict=True):
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5, msg=str(name))
    assert (replay.mode, "as they lie in memory" in replay.note) == (
        ("reference", True) if build is Strided else ("float32", False)
    )


def test_open_replay__a_mode_that_fails_in_any_way_is_not_taken(monkeypatch):
    with drawing(0):
        network, images = OneOutput().eval(), torch.randn(3, 3, 8, 8)

    def fails(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(graph_replay, "speed_up", fails)
    replay = open_replay(network, [], images, "bfloat16")
    assert replay.mode == "reference"
    assert "bfloat16 fails (IndexError: out of range)" in replay.note


def test_open_replay__is_freed_at_once():
    with drawing(0):
        network, images = OneOutput().eval(), torch.randn(3, 3, 8, 8)
    replay = open_replay(network, [], images, "float32")
    list(replay.sweep(images, {}))
    gc.collect()
    gc.disable()
    try:
        known = weakref.ref(replay)
        del replay
        assert known() is None
    finally:
        gc.enable()
