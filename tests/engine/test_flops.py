import pytest
import torch
from torch import nn
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

import tiny_networks
from layercrit.engine.exports import graph_of
from layercrit.engine.flops import count_flops
from layercrit.layers import find_layers, select_layers
from layercrit.measuring import measure
from small_subjects import QUIET, normalised, photographs, small_network
from tiny_networks import ARCHITECTURES, BY_HAND_IMAGES, IMAGES, ByHand, Counting, Sketch, case, seeded

EXPORTED = {
    **{
        name: (ARCHITECTURES[name][0], (2, 3, ARCHITECTURES[name][1], ARCHITECTURES[name][1]))
        for name in ("resnet50", "mobilenetv3_large_100", "convnext_tiny", "vit_tiny", "swin_tiny", "transformers_vit")
    },
    **{
        name: (getattr(tiny_networks, name), IMAGES)
        for name in ("UsedTwice", "Tied", "InPlace", "PreActivation", "Structured", "Remembering", "Recurrent")
    },
}


def counted(build, shape=IMAGES, **selection):
    """A network and what is counted of it, with names of layers as `selection` says."""
    with seeded(0):
        network = build().eval()
    images = torch.zeros(shape)
    layers = find_layers(network, images)
    return count_flops(network, select_layers(layers, **selection) if selection else layers, images)


@pytest.mark.parametrize("name", EXPORTED)
def test_count_flops__is_what_the_exported_graph_says(name):
    """The same by another way: operators of the exported network that descend from a layer's parameters."""
    build, shape = EXPORTED[name]
    made = case(build, *shape)
    exported = graph_of(made.network, made.images)[0]
    costs = {node: node_flops(node) for node in exported.dynamic_nodes() if node.op == "call_function"}
    total = sum(costs.values())
    flops, after = count_flops(made.network, made.layers, made.images)
    assert flops * len(made.images) == total > 0
    for layer in made.layers:
        below = {node for node, names in exported.names.items() if not set(names).isdisjoint(layer.parameters)}
        for node in exported.graph.nodes:
            if not below.isdisjoint(node.all_input_nodes):
                below.add(node)
        assert after[layer.name] == sum(costs.get(node, 0) for node in below) / total, layer.name


def node_flops(node):
    def value(argument):
        return argument.meta["val"]

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
    return counter.get_total_flops()


CONVOLUTIONS = {  # module -> multiply-adds an image: channels x pixels x channels in the kernel's reach
    "same": (nn.Conv2d(8, 8, 3, padding="same"), 8 * 64 * 72),
    "grouped": (nn.Conv2d(8, 8, 3, padding=1, groups=2), 8 * 64 * 36),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), 8 * 64 * 9),
    "strided": (nn.Conv2d(8, 8, 3, padding=1, stride=2), 8 * 16 * 72),
    "1-d": (nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3, padding=1), nn.Unflatten(2, (8, 8))), 8 * 64 * 24),
    "3-d": (nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv3d(1, 1, 3, padding=1), nn.Flatten(1, 2)), 8 * 64 * 27),
    "transposed": (nn.ConvTranspose2d(8, 8, 2, stride=2), 8 * 64 * 32),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_count_flops__of_convolutions_by_hand(name):
    """Between a stem of 64*8*27 and a last layer of 80 multiply-adds; activations cost nothing."""
    conv, expected = CONVOLUTIONS[name]
    flops, _ = counted(lambda: Sketch(lambda net, x: net.conv(x).relu() * 2, conv=conv))
    assert flops == 2 * (64 * 8 * 27 + expected + 80)


def test_count_flops__falls_along_a_chain():
    """Multiply-adds an image of 4 x 4 pixels, layer by layer: what is reset runs anew, and all that follows it."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 5),
    ).eval()  # fmt: skip
    costs = {"0": 16 * 4 * 27, "2": 4 * 8 * 36, "3": 0, "4": 4 * 16 * 8, "7": 64 * 10, "8": 10 * 5}
    images = torch.zeros(2, 3, 4, 4)

    flops, after = count_flops(network, find_layers(network, images), images)

    total = sum(costs.values())
    assert flops == 2 * total
    names = list(costs)
    assert list(after) == names
    for place, name in enumerate(names):
        assert after[name] == sum(costs[later] for later in names[place:]) / total, name
    shares = list(after.values())
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == len(shares) - 1  # a normalisation itself costs nothing


@pytest.mark.parametrize("dtype", ["reference", "float32"])
def test_measure__notes_what_is_counted_in_every_mode(dtype):
    """Also where normalisations are folded into convolutions, and in no graph at all."""
    for network in (small_network(), Counting().eval()):
        probe_set = photographs(2)
        found = measure(network, probe_set, types="all", trials=1, **{**QUIET, "dtype": dtype})
        images = normalised(probe_set)[:1]
        _, expected = count_flops(network, find_layers(network, images), images)
        assert dict(zip(found.cells["layer"], found.cells["flops_after"], strict=True)) == expected


def test_count_flops__by_hand():
    """Two linear layers, of 2 and 4 multiply-adds an image."""
    network = ByHand()
    flops, after = count_flops(network, find_layers(network, BY_HAND_IMAGES), BY_HAND_IMAGES)
    assert flops == 12
    assert after == {"first": 1.0, "last": 8 / 12}


def test_count_flops__two_branches_by_hand():
    """Multiply-adds an image of 8 x 8 pixels: stem 64*8*27, left 64*8*72, right 64*8*8 (2 of 8 groups), last 80."""

    def body(net, x):
        return net.left(x) + net.right(x)

    flops, after = counted(lambda: Sketch(body, left=nn.Conv2d(8, 8, 3, padding=1), right=nn.Conv2d(8, 8, 1, groups=4)))
    stem, left, right, last = 64 * 8 * 27, 64 * 8 * 72, 64 * 8 * 2, 80
    total = stem + left + right + last
    assert flops == 2 * total
    assert after == pytest.approx(
        {"stem": 1.0, "left": (left + last) / total, "right": (right + last) / total, "last": last / total}
    )


def test_count_flops__tied_weights_by_hand():
    """A convolution of 64*64 multiply-adds called by two modules: a reset of either changes the first call on."""

    def build():
        network = Sketch(lambda net, x: net.two(net.one(x).relu()), one=nn.Conv2d(8, 8, 1), two=nn.Conv2d(8, 8, 1))
        network.two.weight = network.one.weight
        return network

    flops, after = counted(build)
    stem, conv, last = 64 * 8 * 27, 64 * 64, 80
    assert flops == 2 * (stem + 2 * conv + last)
    assert after["one"] == after["two"] == pytest.approx((2 * conv + last) / (stem + 2 * conv + last))


def test_count_flops__written_in_place():
    """The shortcut is written over by the branch's output: what reads it afterwards depends on the branch."""

    def body(net, x):
        y = net.branch(x)
        x[:, :4] += y[:, :4]
        return net.after(x)

    with seeded(0):
        network = Sketch(body, branch=nn.Conv2d(8, 8, 1), after=nn.Conv2d(8, 8, 1)).eval()
    images = torch.zeros(IMAGES)
    _, after = count_flops(network, find_layers(network, images), images)
    stem, conv, last = 64 * 8 * 27, 64 * 64, 80
    assert after["branch"] == pytest.approx((2 * conv + last) / (stem + 2 * conv + last))


def test_count_flops__of_weights_alone_are_none():
    """A product of two weights is computed once and not for each image."""

    def body(net, x):
        return torch.nn.functional.conv2d(x, (net.a.weight @ net.b.weight)[:, :, None, None])

    flops, after = counted(lambda: Sketch(body, a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    stem, conv, last = 64 * 8 * 27, 64 * 64, 80
    assert flops == 2 * (stem + conv + last)
    assert after["a"] == after["b"] == pytest.approx((conv + last) / (stem + conv + last))


def test_count_flops__groups_and_unused_layers():
    with seeded(0):
        network = Sketch(
            lambda net, x: net.blocks(x),
            blocks=nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)) for _ in range(2))),
            idle=nn.Conv2d(8, 8, 1),
        ).eval()
    images = torch.zeros(IMAGES)
    layers = find_layers(network, images)
    _, single = count_flops(network, layers, images)
    assert single["idle"] == 0
    _, blocks = count_flops(network, select_layers(layers, group="block"), images)
    assert blocks["blocks.0"] == single["blocks.0.0"]
    assert blocks["blocks.1"] == single["blocks.1.0"]


def test_count_flops__does_not_depend_on_the_number_of_images():
    build, _ = EXPORTED["resnet50"]
    few, many = counted(build, (1, 3, 32, 32)), counted(build, (3, 3, 32, 32))
    assert few[0] == many[0]
    assert few[1] == pytest.approx(many[1])


@pytest.mark.parametrize("name", ["torchvision_vit_b_16", "transformers_vit"])
def test_count_flops__attention_that_torch_runs_in_one_call(name):
    """17 tokens of width 32, 2 blocks of attention and a perceptron of width 64, around them embedding and head."""
    build, size = ARCHITECTURES[name]
    flops, after = counted(build, (2, 3, size, size))
    block = 17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 17 * 17 * 32
    assert flops == 2 * (16 * 32 * 192 + 2 * block + 32 * 10)
    assert max(after.values()) == 1
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["DataDependent", "Counting"])
def test_count_flops__of_networks_that_cannot_be_exported(name):
    made = case(getattr(tiny_networks, name), *IMAGES)
    flops, _ = count_flops(made.network, made.layers, made.images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.network(made.images)
    assert flops == counter.get_total_flops() / len(made.images)


def test_count_flops__leaves_the_network_as_it_was():
    made = case(Counting, *IMAGES)
    before = {name: tensor.clone() for name, tensor in made.network.state_dict().items()}
    count_flops(made.network, made.layers, made.images)
    after = made.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_count_flops__after_an_error_the_fast_path_is_on_again():
    made = case(tiny_networks.Failing, *IMAGES)
    made.network.fuse.calls_left = 1
    with pytest.raises(RuntimeError, match="blown"):
        count_flops(made.network, made.layers, made.images)
    assert torch.backends.mha.get_fastpath_enabled()
