import array
import enum
import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.engine import exports
from layercrit.engine.graph import WeightGraph
from layercrit.engine.opening import open_replay
from layercrit.layers import find_layers
from tiny_networks import ARCHITECTURES, Case, PlainWay, case

SHAPE = 4, 3, 6, 6


class Order(enum.Enum):
    FIRST, LAST = "first", "last"


class Settings:
    """As configurations of networks are: an object with a dictionary."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        return f"Settings({self.factor})"


class Small(nn.Module):
    """A network with settings of many kinds; `last` is its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.slope, self.passes, self.around = 0.1, 1, F.leaky_relu
        self.sizes, self.by_name = [1, 2], {"scale": 2.0}
        self.order, self.settings, self.activation = Order.FIRST, Settings(1.5), partial(F.elu, alpha=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for _ in range(self.passes):
            x = self.around(self.body(x), self.slope) * self.by_name["scale"]
        if self.order is Order.LAST:
            x = x.flip(1)
        x = self.activation(x) * self.settings.factor
        logits: Tensor = self.last(x.mean((2, 3)) * self.sizes[1])
        return logits


@pytest.fixture
def exported(monkeypatch) -> list[nn.Module]:
    """Networks that were exported, in order."""
    networks, real = list[nn.Module](), exports.export_graph

    def counting(network: nn.Module, *asked: object) -> object:
        networks.append(network)
        return real(network, *asked)

    monkeypatch.setattr(exports, "export_graph", counting)
    monkeypatch.setattr(exports, "_kept", [])
    return networks


def other_weights(made: Case) -> Case:
    """The same architecture as if trained by another method: the donor, with the first network as its donor."""
    return Case(made.donor, made.network, made.images, made.layers)


def assert_right(made: Case) -> None:
    opened = open_replay(made.network, made.layers, made.images, "reference")
    prepared = {layer.name: opened.prepare(layer, made.values(layer)) for layer in made.layers}
    expected = PlainWay(made.network).sweep(made)
    for name, logits in opened.sweep(made.images, prepared):
        assert torch.equal(logits, expected[name])


def test_graph_of__networks_of_one_architecture_are_exported_once(exported):
    made = case(Small, *SHAPE)
    assert_right(made)
    assert_right(other_weights(made))
    assert_right(made)
    assert exported == [made.network]


def _tied(network: Small) -> None:
    network.norm.bias = network.body.bias


def _own_forward(network: Small) -> None:
    network.body.forward = MethodType(lambda self, x: F.conv2d(x, self.weight) + 1, network.body)


def _hooked(network: Small) -> None:
    network.norm.register_forward_hook(lambda module, given, made: made + module.eps * 1e4)


def _tensor(network: Small) -> None:
    network.slope = torch.tensor(0.3)


def _set(name: str, value: object, shown: str | None = None) -> Callable[[Small], None]:
    def change(network: Small) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, value)

    change.__name__ = f"{name}={shown or getattr(value, '__name__', value)}"
    return change


@pytest.mark.parametrize(
    "change",
    [
        *(_set("slope", 0.5), _set("passes", 2), _set("passes", True), _set("around", torch.mul)),
        *(_set("sizes", [1, 3]), _set("by_name", {"scale": 3.0}), _set("norm.eps", 0.5)),
        *(_set("order", Order.LAST), _set("settings", Settings(3.0))),
        *(
            _set("activation", partial(F.elu, alpha=2.0), "alpha"),
            _set("activation", partial(F.celu, alpha=0.5), "celu"),
        ),
        *(_set("body", nn.Conv2d(8, 8, 1, bias=False)), _set("norm", nn.Identity())),
        *(_tied, _own_forward, _hooked, _tensor),
    ],
    ids=lambda change: change.__name__,
)
def test_graph_of__a_network_that_is_unlike_in_one_thing_is_exported_again(exported, change):
    made = case(Small, *SHAPE)
    assert_right(made)
    other = case(Small, *SHAPE)
    for network in (other.network, other.donor):
        change(network)
    other.layers = find_layers(other.network, other.images)
    assert_right(other)
    assert exported == [made.network, other.network]


def test_graph_of__another_batch_size_or_format_is_exported_again(exported):
    made = case(Small, *SHAPE)
    assert_right(made)
    assert_right(Case(made.network, made.donor, made.images[:3], made.layers))
    assert_right(Case(made.network.double(), made.donor.double(), made.images.double(), made.layers))
    assert len(exported) == 3


def test_graph_of__two_networks_with_hooks_of_their_own_are_exported_both(exported):
    for shift in (1.0, 2.0):
        made = case(Small, *SHAPE)
        for network in (made.network, made.donor):
            network.norm.register_forward_hook(lambda module, given, made, shift=shift: made + shift)
        assert_right(made)
    assert len(exported) == 2


def test_graph_of__architectures_in_turn_are_exported_once_each(exported):
    wide = Small()
    wide.slope = 0.7
    networks = [case(Small, *SHAPE).network, wide.eval()]
    images = torch.zeros(*SHAPE)
    found = [exports.graph_of(networks[number % 2], images) for number in range(6)]
    assert exported == networks
    assert [is_shared for _, is_shared in found] == [False, False, True, True, True, True]
    assert found[0][0].graph is found[4][0].graph
    assert not exports.graph_of(wide, images, anew=True)[1]
    assert exports.graph_of(networks[0], images)[1], "of another architecture"


def test_graph_of__forgets_the_oldest(exported, monkeypatch):
    monkeypatch.setattr(exports, "_N_KEPT", 2)
    for slope in (0.1, 0.2, 0.3):
        network = Small().eval()
        network.slope = slope
        exports.graph_of(network, torch.zeros(*SHAPE))
    assert exports.graph_of(network, torch.zeros(*SHAPE))[1]
    network.slope = 0.1
    assert not exports.graph_of(network, torch.zeros(*SHAPE))[1]
    assert len(exports._kept) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graph_of__published_architectures_are_exported_once(name, exported, monkeypatch):
    monkeypatch.setattr(exports, "export_graph", lambda *_: WeightGraph(*[None] * 3, {}, {}))
    build, size = ARCHITECTURES[name]
    images = torch.zeros(1, 3, size, size)
    assert [exports.graph_of(build().eval(), images)[1] for _ in range(2)] == [False, True]


class Answering:
    def __getattr__(self, name: str) -> float:
        return FACTOR


class Rounding(enum.Flag):
    UP, DOWN, AWAY = 1, 2, 4


@pytest.mark.parametrize(
    "value", [random.Random(1), array.array("f", [1.0]), Answering(), type("P", (partial,), {})(F.elu)]
)
def test_graph_of__objects_that_have_more_than_their_dictionary_are_not_compared(value):
    with pytest.raises(TypeError):
        exports._comparable(value)


def test_graph_of__flags_and_variables_of_a_class_are_seen(monkeypatch):
    assert exports._comparable(Rounding.UP | Rounding.AWAY) != exports._comparable(Rounding.UP | Rounding.DOWN)
    before = exports._comparable(Settings(1.0))
    assert before == exports._comparable(Settings(1.0))
    monkeypatch.setattr(Settings, "offset", 2, raising=False)
    assert before != exports._comparable(Settings(1.0))


def test_graph_of__keeps_no_weights(exported):
    made = case(Small, *SHAPE)
    assert_right(made)
    weight = weakref.ref(made.network.body.weight)
    del made
    exported.clear()
    gc.collect()
    assert weight() is None
    assert len(exports._kept) == 1


def test_graph_of__another_forward_of_the_class_is_exported_again(exported, monkeypatch):
    assert_right(case(Small, *SHAPE))
    forward = Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, x: forward(self, x) * 2)
    assert_right(case(Small, *SHAPE))
    assert len(exported) == 2


def test_graph_of__a_setting_of_the_class_is_seen(exported, monkeypatch):
    monkeypatch.setattr(Small, "factor", 1.0, raising=False)
    forward = Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, x: forward(self, x) * self.factor)
    assert_right(case(Small, *SHAPE))
    monkeypatch.setattr(Small, "factor", 2.0)
    assert_right(case(Small, *SHAPE))
    assert len(exported) == 2


FACTOR = 1.0


def test_graph_of__a_shared_graph_that_is_another_networks_is_exported_again(exported, monkeypatch):
    """A variable of the file is read, which no description has; the network's own logits show it."""
    forward = Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, x: forward(self, x) * FACTOR)
    for factor in (1.0, 2.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        made = case(Small, *SHAPE)
        assert open_replay(made.network, made.layers, made.images, "reference").backend == "exported graph"
        assert_right(made)
    assert len({id(network) for network in exported}) == 2


def test_graph_of__a_setting_that_contains_itself_is_no_trouble(exported):
    for _ in range(2):
        made = case(Small, *SHAPE)
        for network in (made.network, made.donor):
            network.sizes.append(network.sizes)
        assert_right(made)
    assert len(exported) == 2
