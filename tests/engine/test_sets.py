"""Sets of layers against the plain way: every kind of sets, every group, every kind of architecture."""

from functools import cache

import pytest
import torch
from torch import nn

from layercrit.engine import graph_replay
from layercrit.engine.exports import graph_of
from layercrit.engine.graph import speed_up
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.opening import open_replay
from layercrit.engine.recorded_replay import RecordedReplay
from layercrit.engine.replay import PlainReplay
from layercrit.layer_sets import sets_of
from layercrit.layers import find_layers, select_layers
from layercrit.protocol import GROUPS, SETS
from tiny_networks import ARCHITECTURES, IMAGES, PlainWay, Tied, UsedTwice, _Head, case

NAMES = ["torchvision_resnet18", "convnext_tiny", "swin_tiny", "vit_tiny", "transformers_vit"]
LARGEST = 5  # pairs and cascades are of so many units, for the plain way takes its time


@cache
def exported(name):
    build, size = ARCHITECTURES[name]
    made = case(build, 2, 3, size, size)
    made.layers = find_layers(made.network, made.images, "attention")
    return made, graph_of(made.network, made.images)[0]


def units_of(layers, group, sets, types="conv,linear"):
    selected = select_layers(layers, types=types, group=group)
    step = max(1, len(selected) // LARGEST)
    return sets_of(selected[::step], sets)


def swept(replay, made, units):
    shared = {}
    prepared = {unit.name: replay.prepare(unit, made.values(unit), shared) for unit in units}
    return dict(replay.sweep(made.images, prepared))


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), f"other logits after a reset of {name}"


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(f"sets {name}")) for name in NAMES])
def test_sweep__sets_are_the_plain_way_bit_for_bit(name, group, sets):
    made, graph = exported(name)
    units = units_of(made.layers, group, sets)
    expected = PlainWay(made.network).sweep(made, units)
    assert len({tuple(logits.flatten().tolist()) for logits in expected.values()}) == len(units) + 1
    assert_same(swept(GraphReplay(graph, units), made, units), expected)


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("name", ["torchvision_resnet18", "convnext_tiny", "swin_tiny"])
def test_sweep__sets_in_float32_are_near_the_plain_way(name, sets):
    """Also where one weight, such as that of a convolution with its folded norm, is computed from several layers'."""
    made, graph = exported(name)
    units = units_of(made.layers, "layer", sets, types="all")
    fast = GraphReplay(speed_up(graph, torch.float32, torch.device("cpu")), units, "float32")
    found, expected = swept(fast, made, units), PlainWay(made.network).sweep(made, units)
    assert set(found) == set(expected)
    for name_of_set, logits in expected.items():
        torch.testing.assert_close(found[name_of_set].softmax(1), logits.softmax(1), rtol=0, atol=2e-5)
    assert_same(swept(fast, made, units), found)  # a value that was written over would show


class Branches(_Head):
    """Two branches side by side, of which the first is used again at the end, beside a layer that nothing reads."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def body(self, x):
        self.idle(x)
        left, right = self.left(x), self.right(x.flip(-1)).relu()
        return self.left((left + right).relu_()) + right


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("build", [Branches, Tied, UsedTwice])
@pytest.mark.parametrize("backend", [GraphReplay, RecordedReplay, PlainReplay])
def test_sweep__sets_of_odd_networks(build, sets, backend):
    made = case(build, *IMAGES)
    units = sets_of(select_layers(made.layers, types="all"), sets)
    first_names = {id(p): name for name, p in reversed(list(made.network.named_parameters(remove_duplicate=False)))}
    expected = {None: PlainWay(made.network)({}, made.images)}
    parameters = dict(made.network.named_parameters(remove_duplicate=False))
    for unit in units:  # of tied parameters, the first name in the set counts
        values = {}
        for parameter, value in made.values(unit).items():
            values.setdefault(first_names[id(parameters[parameter])], value)
        expected[unit.name] = PlainWay(made.network)(values, made.images)
    source = graph_of(made.network, made.images)[0] if backend is GraphReplay else made.network
    assert_same(swept(backend(source, units), made, units), expected)


def test_sweep__two_trials_of_unlike_sets():
    """A trial gets only the sets that it is given values for, each with the draw of its own trial."""
    made, graph = exported("torchvision_resnet18")
    units = units_of(made.layers, "layer", "pairs")
    replay, plain = GraphReplay(graph, units), PlainWay(made.network)

    def values(unit, trial):
        return {name: value * (1 + trial) for name, value in made.values(unit).items()}

    chosen = [units, units[2::3], units[:1]]
    prepared = [
        {one.name: replay.prepare(one, values(one, trial)) for one in some} for trial, some in enumerate(chosen)
    ]
    waiting = {one.name: [trial for trial, some in enumerate(chosen) if one in some] for one in units}
    *found, (last, clean) = replay.sweep(made.images, *prepared)
    assert last is None
    assert torch.equal(clean, plain({}, made.images))
    assert len(found) == sum(map(len, chosen))
    by_name = {one.name: one for one in units}
    for name, logits in found:
        trial = waiting[name].pop(0)
        assert torch.equal(logits, plain(values(by_name[name], trial), made.images)), (name, trial)
    assert not any(waiting.values())


@pytest.mark.parametrize("sets", ["all-but-one", "pairs", "cascade-up"])
def test_prepare__a_trial_holds_each_weight_once(sets):
    """However many sets a layer is in, and however many others they begin with."""
    made, graph = exported("convnext_tiny")
    selected = select_layers(made.layers)
    values = {one.name: made.values(one) for one in selected}

    def held(units):
        fast = GraphReplay(speed_up(graph, torch.float32, torch.device("cpu")), units, "float32")
        shared = {}
        prepared = []
        for unit in units:
            of_unit = {k: v for one in unit.members or (unit,) for k, v in values[one.name].items()}
            prepared.append(fast.prepare(unit, of_unit, shared))
        return sum(
            value.numel() for value in {id(v): v for of in prepared for p in of.values() for v in p.values()}.values()
        )

    assert held(sets_of(selected, sets)) == held(selected)


@pytest.mark.parametrize("sets", SETS)
def test_sweep__what_sets_share_is_run_once(sets, monkeypatch):
    made, graph = exported("torchvision_resnet18")
    units = units_of(made.layers, "layer", sets)
    replay = GraphReplay(graph, units)
    layers = {one.name: one for unit in units for one in unit.members or (unit,)}
    after = {name: len(replay._suffix((one,)).steps) for name, one in layers.items()}  # nodes
    prepared = {unit.name: replay.prepare(unit, made.values(unit)) for unit in units}
    calls, call = [], graph_replay.call
    monkeypatch.setattr(graph_replay, "call", lambda *args: calls.append(args[0]) or call(*args))

    list(replay.sweep(made.images, prepared))

    whole = sum(node.op == "call_function" for node in replay._dynamic)
    if sets == "all-but-one":  # the resets before the layer that is left out go on from each other
        assert len(calls) <= 2 * whole + sum(after.values())
    else:  # a cascade from below, and a pair, run what comes after their last layer; a cascade from above all
        place = 0 if sets == "cascade-down" else -1
        assert len(calls) == whole + sum(after[(unit.members or (unit,))[place].name] for unit in units)


def test_open_replay__opens_sets():
    build, size = ARCHITECTURES["torchvision_resnet18"]
    made = case(build, 2, 3, size, size)
    units = units_of(made.layers, "block", "pairs")
    opened = open_replay(made.network, units, made.images, "reference")
    assert opened.backend == "exported graph"
    assert_same(swept(opened, made, units), PlainWay(made.network).sweep(made, units))
