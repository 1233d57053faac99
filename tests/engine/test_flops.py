import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tiny_networks
from layercrit.engine.flops import count_flops
from layercrit.engine.replay import GraphReplay, open_replay
from layercrit.layers import find_layers, select_layers
from tiny_networks import ARCHITECTURES, BY_HAND_IMAGES, IMAGES, ByHand, Sketch, case, seeded

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
def test_count_flops__is_what_the_replay_runs_anew(name):
    """The replay finds the same by another way: from the exported graph of operators."""
    build, shape = EXPORTED[name]
    made = case(build, *shape)
    replay = open_replay(made.network, made.layers, made.images, "reference")
    assert isinstance(replay, GraphReplay)
    flops, after = count_flops(made.network, made.layers, made.images)
    assert flops == replay.flops_per_image > 0
    assert after == pytest.approx(replay.flops_after(), abs=1e-12)


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
    made = case(tiny_networks.Counting, *IMAGES)
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
