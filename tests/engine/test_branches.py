"""Residual branches, against networks some of whose modules are replaced by hand by their shortcut."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layercrit.engine.branches import branch_ends
from layercrit.errors import ProtocolError
from layercrit.layers import Layer, find_layers, select_layers
from layercrit.measuring import measure
from layercrit.models.outputs import logits_of
from small_subjects import QUIET, fresh, normalised, photographs, small_network
from tiny_networks import ARCHITECTURES, IMAGES, case, normal
from tiny_networks import _Head as Head


def ends_of(network, images, units, layers=None):
    return branch_ends(network, images[:1], units, layers or find_layers(network, images), logits_of)


def blocks_of(network, images, **selection):
    return select_layers(find_layers(network, images), **{"group": "block", **selection})


def with_zeros(network, names, images):
    """Logits of the network with some parameters at 0."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        for name in names:
            changed.get_parameter(name).zero_()
        return logits_of(changed(images))


def with_shortcuts(network, forwards, images):
    """Logits of the network with some modules computed by hand: name -> function of the module and its input."""
    changed = copy.deepcopy(network)
    for name, forward in forwards.items():
        module = changed.get_submodule(name)
        module.forward = lambda x, *_, forward=forward, module=module, **__: forward(module, x)
    with torch.no_grad():
        return logits_of(changed(images))


def nothing(module, x):
    return torch.zeros_like(x), None  # what attention returns in torch: output and weights


def itself(module, x):
    return x


def downsampled(module, x):
    return F.relu(x if module.downsample is None else module.downsample(x))


def swin_v2():
    import timm

    return timm.create_model(
        "swinv2_tiny_window8_256",
        num_classes=10,
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 2),
    )


def transformers_convnext():
    import transformers

    config = transformers.ConvNextConfig(depths=[1, 2], hidden_sizes=[8, 16], num_stages=2, num_labels=10)
    return transformers.ConvNextForImageClassification(config)


MORE = {"swin_v2": (swin_v2, 32), "transformers_convnext": (transformers_convnext, 32)}

# network -> what names its blocks with a shortcut, and what a block is without its branch
SHORTCUTS = {
    "resnet50": (r"layer\d\.\d", downsampled),
    "torchvision_resnet18": (r"layer\d\.\d", downsampled),
    "regnety_008": (r"s\d\.b\d", downsampled),
    "convnext_tiny": (r"stages\.\d\.blocks\.\d", itself),
    "transformers_convnext": (r".*stages\.\d\.layers\.\d", itself),
    "mobilenetv3_large_100": (r"blocks\.(0\.0|1\.1|2\.1)", itself),
    "vit_tiny": (r"blocks\.\d", itself),
    "torchvision_vit_b_16": (r"encoder\.layers\.encoder_layer_\d", itself),
    "transformers_vit": (r"vit\..*layers?\.\d", itself),
    "swin_tiny": (r"layers\.\d\.blocks\.\d", itself),
    "swin_v2": (r"layers\.\d\.blocks\.\d", itself),
    "mixer_b16": (r"blocks\.\d", itself),
    "densenet121": (None, itself),
    "vgg16_bn": (None, itself),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_branch_ends__without_them_a_block_is_its_shortcut(name):
    build, size = (ARCHITECTURES | MORE)[name]
    made = case(build, 2, 3, size, size)
    pattern, shortcut = SHORTCUTS[name]
    units = select_layers(made.layers, group="block")
    ends = ends_of(made.network, made.images, units, made.layers)
    blocks = [unit.name for unit in units if pattern and re.fullmatch(pattern, unit.name)]
    assert list(ends) == blocks
    trained = with_zeros(made.network, (), made.images)
    for block in blocks:
        found = with_zeros(made.network, ends[block], made.images)
        torch.testing.assert_close(found, with_shortcuts(made.network, {block: shortcut}, made.images))
        assert not torch.allclose(found, trained), "the branch does something"
    if blocks:
        every = [name for block in blocks for name in ends[block]]
        expected = with_shortcuts(made.network, dict.fromkeys(blocks, shortcut), made.images)
        torch.testing.assert_close(with_zeros(made.network, every, made.images), expected)


def unit_of(network, images, prefixes):
    """Layers of a network below some modules as one unit."""
    layers = find_layers(network, images)
    inside = [one for one in layers if one.type in ("conv", "linear") and one.name.startswith(tuple(prefixes))]
    return Layer("unit", "linear", tuple(p for one in inside for p in one.parameters), (1,), 1)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vit_tiny", "blocks.1.attn"),
        ("vit_tiny", "blocks.1.mlp"),
        ("swin_tiny", "layers.0.blocks.1.attn"),
        ("swin_v2", "layers.0.blocks.1.mlp"),
        ("torchvision_vit_b_16", "encoder.layers.encoder_layer_1.self_attention"),
        ("torchvision_vit_b_16", "encoder.layers.encoder_layer_1.mlp"),
        ("mixer_b16", "blocks.0.mlp_tokens"),
    ],
)
def test_branch_ends__of_attention_or_mlp_alone(name, module):
    build, size = (ARCHITECTURES | MORE)[name]
    made = case(build, 2, 3, size, size)
    ends = ends_of(made.network, made.images, [unit_of(made.network, made.images, [module])])
    forward = nothing if module.endswith("self_attention") else lambda _, x: torch.zeros_like(x)
    # of post-norm blocks it is the normalised output that is added
    norm = {"layers.0.blocks.1.mlp": "layers.0.blocks.1.norm2"}.get(module, module) if name == "swin_v2" else module
    expected = with_shortcuts(made.network, {norm: forward}, made.images)
    torch.testing.assert_close(with_zeros(made.network, ends["unit"], made.images), expected)
    rest = [f"{module}.{child}" for child, _ in made.network.get_submodule(module).named_children()][1:]
    assert not ends_of(made.network, made.images, [unit_of(made.network, made.images, rest)]), "half a branch is none"


# --- networks made for one case each --------------------------------------------------------------------------------


class Block(nn.Module):
    """``forward(block, x)`` around three convolutions and a normalisation."""

    def __init__(self, forward, **more):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)
        for name, value in more.items():
            setattr(self, name, value)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


class OfBlocks(Head):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def body(self, x):
        return self.blocks(x)


def branch(block, x):
    return block.c(F.relu(block.b(block.a(x))))


def fixup(block, x):
    return x + (block.scale * branch(block, x) + block.shift)


def gated(block, x):
    y = block.norm(block.b(block.a(x)))
    return x + y * torch.sigmoid(block.c(y.mean(dim=(2, 3), keepdim=True)))


def parallel(block, x):
    return x + block.a(x) + block.b(F.relu(block.c(x)))


def padded(block, x):
    return F.relu(F.pad(x[..., ::2, ::2], (0, 0, 0, 0)) + F.avg_pool2d(branch(block, x), 2))


def scaled(block, x):
    return 0.5 * x + branch(block, x)


def nested(block, x):
    y = block.a(x)
    return x + block.b(y + block.c(F.relu(y)))


def ones(*shape):
    return nn.Parameter(torch.full(shape, 0.7))


ENDED_BY = {
    "projection": (Block(lambda block, x: x + branch(block, x)), ["c.weight", "c.bias"]),
    "activation behind it": (Block(lambda block, x: x + F.gelu(branch(block, x))), ["c.weight", "c.bias"]),
    "norm behind it": (Block(lambda block, x: block.norm(branch(block, x)) + x), ["norm.weight", "norm.bias"]),
    "layer scale": (Block(lambda block, x: x + branch(block, x) * block.gamma, gamma=ones(8, 1, 1)), ["gamma"]),
    "scale and shift": (Block(fixup, scale=ones(1), shift=ones(1)), ["scale", "shift"]),
    "gate": (Block(gated), ["norm.weight", "norm.bias"]),
    "two branches": (Block(parallel), ["a.weight", "a.bias", "b.weight", "b.bias"]),
    "padded shortcut": (Block(padded), ["c.weight", "c.bias"]),
    "scaled shortcut": (Block(scaled), ["c.weight", "c.bias"]),
    "a branch within": (Block(nested), ["b.weight", "b.bias"]),
    "plain norm": (Block(lambda block, x: x + F.layer_norm(branch(block, x), [8, 8])), ["c.weight", "c.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDED_BY)
def test_branch_ends__by_what_is_last(name):
    block, expected = ENDED_BY[name]
    made = case(lambda: OfBlocks(copy.deepcopy(block)), *IMAGES)
    unit = Layer("unit", "conv", tuple(f"blocks.0.{x}.{p}" for x in "abc" for p in ("weight", "bias")), (1,), 1)
    ends = ends_of(made.network, made.images, [unit], made.layers)
    assert {end.removeprefix("blocks.0.") for end in ends["unit"]} == set(expected)


NO_BRANCH = {
    "no shortcut": Block(branch),
    "product": Block(lambda block, x: x * branch(block, x)),
    "concatenation": Block(lambda block, x: torch.cat([x, branch(block, x)], dim=1)[:, :8]),
    "two paths alike": Block(lambda block, x: block.a(x) + block.b(x) + block.c(x)),
    "half of it": Block(lambda block, x: block.a(x + block.c(F.relu(block.b(x))))),
    "bias from outside": Block(lambda block, x: x + torch.sigmoid(branch(block, x))),
    "norm of statistics": Block(
        lambda block, x: x + block.plain(branch(block, x)), plain=nn.BatchNorm2d(8, affine=False)
    ),
}


@pytest.mark.parametrize("name", NO_BRANCH)
def test_branch_ends__none_where_values_cannot_leave_the_branch_out(name):
    made = case(lambda: OfBlocks(copy.deepcopy(NO_BRANCH[name])), *IMAGES)
    units = [Layer("unit", "conv", tuple(f"blocks.0.{x}.{p}" for x in "abc" for p in ("weight", "bias")), (1,), 1)]
    assert ends_of(made.network, made.images, units, made.layers) == {}


def test_branch_ends__of_a_projection_shared_with_another_block():
    """The same last convolution ends both branches: neither can be left out alone, both together can."""
    one, other = (Block(lambda block, x: x + branch(block, x)) for _ in range(2))
    other.c = one.c
    made = case(lambda: OfBlocks(*copy.deepcopy([one, other])), *IMAGES)
    both = [f"blocks.{n}.{x}.{p}" for n in (0, 1) for x in "abc" for p in ("weight", "bias")]
    units = [Layer("one", "conv", tuple(both[:6]), (1,), 1), Layer("both", "conv", tuple(both), (1,), 1)]
    assert list(ends_of(made.network, made.images, units, made.layers)) == ["both"]


def spectral(block, x):
    return x + block.c(F.relu(block.a(x)))


def test_branch_ends__where_0_would_be_divided_by_0_there_are_none():
    """A weight divided by its norm is not 0 where its values are: that is seen by running."""
    made = Block(spectral)
    nn.utils.parametrizations.spectral_norm(made.c)
    network = fresh(lambda: OfBlocks(made), 3).eval()
    images = normal(*IMAGES)
    units = [Layer("unit", "conv", tuple(n for n, _ in network.blocks[0].named_parameters()), (1,), 1)]
    assert ends_of(network, images, units) == {}


# --- measuring ------------------------------------------------------------------------------------------------------


def skipped(network, block, images):
    """A small network's logits where a block's branch is left out by hand."""
    return with_shortcuts(network, {block: lambda module, x: F.relu(module.shortcut(x))}, images)


@pytest.mark.parametrize("dtype", ["reference", "float32"])
def test_measure__skip_is_a_network_without_the_branch(dtype):
    network, probe_set = small_network(), photographs()
    found = measure(network, probe_set, reset="skip", group="block", trials=3, dtype=dtype, **QUIET)
    cells = found.cells.set_index("layer")
    images = normalised(probe_set)
    with torch.no_grad():
        clean = network(images)
    for block in ("layer1.0", "layer1.1", "layer2.0"):
        expected = 1 - F.cosine_similarity(
            clean.double().softmax(1), skipped(network, block, images).double().softmax(1)
        )
        assert cells["cosine"][block] == pytest.approx(float(expected.mean()), abs=1e-6)
        assert cells["status"][block] == "ok"
        assert found.record["layers"][block]["parameters"] == [f"{block}.conv2.weight", f"{block}.conv2.bias"]
    for other in ("stem", "fc"):
        assert cells["status"][other] == "no_branch"
        assert np.isnan(cells["cosine"][other])
    (note,) = [note for note in found.record["notes"] if note.startswith("skip")]
    assert note == "skip: 2 of 5 units do not consist of residual branches, so nothing is measured for them: stem, fc"
    assert found.summary()["cells"] == {"ok": 3, "no_branch": 2}
    assert found.summary()["n_layers_in_mean"] == 3


def test_measure__skip_of_a_branch_that_is_0_changes_nothing():
    network = small_network()
    with torch.no_grad():
        network.layer1[1].conv2.weight.zero_()
        network.layer1[1].conv2.bias.zero_()
    cells = measure(network, photographs(), reset="skip", group="block", **QUIET).cells.set_index("layer")
    assert cells["status"].to_dict() == {
        "stem": "no_branch", "layer1.0": "ok", "layer1.1": "unchanged", "layer2.0": "ok", "fc": "no_branch"
    }  # fmt: skip
    assert cells["delta_norm"]["layer1.1"] == 0


def test_measure__skip_of_a_stage_is_its_shortcuts():
    network, probe_set = small_network(), photographs()
    cells = measure(network, probe_set, reset="skip", group="stage", **QUIET).cells.set_index("layer")
    images = normalised(probe_set)
    both = dict.fromkeys(["layer1.0", "layer1.1"], lambda module, x: F.relu(module.shortcut(x)))
    with torch.no_grad():
        clean = network(images).double().softmax(1)
    left = with_shortcuts(network, both, images).double().softmax(1)
    assert cells["cosine"]["layer1"] == pytest.approx(float(1 - F.cosine_similarity(clean, left).mean()), abs=1e-6)


def test_measure__skip_of_single_layers_is_refused_and_names_the_way_out():
    finished = []
    with pytest.raises(ProtocolError, match=r"none of the 9 units, such as 'stem', consists .* --group block"):
        measure(small_network(), photographs(), reset="skip", on_trial=finished.append, **QUIET)
    assert not finished


def test_measure__skip_of_a_network_without_shortcuts_is_refused():
    network = fresh(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)), 0).eval()
    with pytest.raises(ProtocolError, match=r"none of the 2 units, .* Choose another reset, such as zero\."):
        measure(network, photographs(), reset="skip", group="block", **QUIET)


class ByImage(Head):
    """Its way depends on the image, so it cannot be exported."""

    def __init__(self):
        super().__init__()
        self.block = Block(lambda block, x: x + branch(block, x))

    def body(self, x):
        return self.block(x) if x.mean() > 0 else x


def test_measure__skip_of_a_network_that_cannot_be_exported_is_refused():
    with pytest.raises(ProtocolError, match=r"cannot be exported \(.*\)\. Choose another reset"):
        measure(fresh(ByImage, 0).eval(), photographs(), reset="skip", group="block", **QUIET)


def test_measure__skip_leaves_the_network_as_it_was():
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure(network, photographs(), reset="skip", group="block", **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
