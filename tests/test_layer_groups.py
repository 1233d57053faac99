"""Attention, MLPs and convolutions with their norms, found by what flows where."""

import re
from functools import partial

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F

from layercrit.errors import LayerError
from layercrit.layers import find_layers, select_layers
from tiny_networks import ARCHITECTURES


def groups_of(network, group, size, types="conv,linear"):
    """Name of each unit of several layers -> the last parts of the names of its parameters' modules."""
    network.eval()
    layers = find_layers(network, torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)), group)
    alone = {layer.name for layer in select_layers(layers, types="all")}
    units = select_layers(layers, types=types, group=group)
    owned = [p for unit in units for p in unit.parameters]
    assert len(owned) == len(set(owned))
    return {unit.name: list(unit.parameters) for unit in units if unit.name not in alone}


def weights(parameters):
    """The modules whose weights these are; of a weight by another name, that name."""
    of_modules = [name.removesuffix(".weight") for name in parameters if name.endswith("weight")]
    return [name.rpartition(".")[2] for name in of_modules]


def timm_network(name, size, **options):
    return timm.create_model(name, pretrained=False, img_size=size, **options)


def swin(v2=""):
    window = "swinv2_tiny_window8_256" if v2 else "swin_tiny_patch4_window7_224"
    return timm_network(window, 32, depths=(2,), num_heads=(2,), embed_dim=16, window_size=4)


def torchvision_swin():
    return torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=5)


def torchvision_convnext():
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(16, 32, 1), setting(32, None, 1)], num_classes=5)


def transformers_swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


class Block(nn.Module):
    """A transformer block whose linear layers are all its own children."""

    def __init__(self, width=16, gated=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2, self.q_norm = (nn.LayerNorm(width) for _ in range(3))
        self.up, self.gate, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)
        self.gated = gated

    def forward(self, x):
        y = self.norm1(x)
        scores = self.q_norm(self.q(y)) @ self.k(y).transpose(1, 2) / 4
        x = x + self.out(scores.softmax(-1) @ self.v(y))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y) if self.gated else self.up(y).relu())


class OfBlocks(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Conv2d(3, 16, 8, 8), nn.Sequential(*blocks), nn.Linear(16, 5)

    def forward(self, images):
        return self.head(self.blocks(self.embed(images).flatten(2).transpose(1, 2)).mean(1))


class Excited(nn.Module):
    """A residual block with squeeze and excitation, whose two layers are no MLP: their output is multiplied."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return x + y * self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Convolutional(nn.Module):
    """Blocks of images, a norm after the sum of two paths, and an MLP as head, which no residual joins."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks, self.norm = nn.Conv2d(3, 16, 3), nn.Sequential(*blocks), nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, images):
        return self.head(self.norm(self.blocks(self.stem(images))).mean((2, 3)))


ENCODER = partial(nn.TransformerEncoderLayer, 16, 2, 32, batch_first=True)

ATTENTION = {  # name -> network, size, first group, its weights, how many there are
    "timm vit": (*ARCHITECTURES["vit_tiny"], "blocks.0.attn", ["qkv", "proj"], 3),
    "timm swin": (swin, 32, "layers.0.blocks.0.attn", ["qkv", "proj"], 2),
    "timm swin v2": (partial(swin, "v2"), 32, "layers.0.blocks.0.attn", ["qkv", "0", "2", "proj"], 2),
    "timm eva": (partial(timm_network, "eva02_tiny_patch14_224", 28, depth=2), 28, "blocks.0.attn", ["qkv", "proj"], 2),
    "timm cait": (
        partial(timm_network, "cait_xxs24_224", 32, depth=2, embed_dim=32, num_heads=2),
        32,
        "blocks.0.attn",
        ["qkv", "proj_l", "proj_w", "proj"],
        4,
    ),
    "torchvision vit": (*ARCHITECTURES["torchvision_vit_b_16"], "encoder.layers.encoder_layer_0.self_attention",
                        ["in_proj_weight", "out_proj"], 2),
    "torchvision swin": (torchvision_swin, 32, "features.1.0.attn", ["qkv", "proj"], 2),
    "transformers vit": (*ARCHITECTURES["transformers_vit"], None, None, 2),
    "transformers vit, eager": (*ARCHITECTURES["transformers_vit_eager"], None, None, 2),
    "transformers swin": (transformers_swin, 32, None, None, 2),
    "own block": (lambda: OfBlocks(Block(), Block()), 32, "blocks.0.attention", ["q", "k", "v", "out"], 2),
    "torch's encoder": (lambda: OfBlocks(ENCODER(), ENCODER(norm_first=True)), 32, "blocks.0.self_attn",
                        ["in_proj_weight", "out_proj"], 2),
    "mixer": (*ARCHITECTURES["mixer_b16"], None, None, 0),
    "resnet": (*ARCHITECTURES["torchvision_resnet18"], None, None, 0),
    "squeeze and excitation": (lambda: Convolutional(Excited()), 32, None, None, 0),
}  # fmt: skip

MLP = {
    "timm vit": (*ARCHITECTURES["vit_tiny"], "blocks.0.mlp", ["fc1", "fc2"], 3),
    "timm swin": (swin, 32, "layers.0.blocks.0.mlp", ["fc1", "fc2"], 2),
    "timm convnext": (*ARCHITECTURES["convnext_tiny"], "stages.0.blocks.0.mlp", ["fc1", "fc2"], 5),
    "torchvision convnext": (torchvision_convnext, 32, "features.1.0.block.mlp", ["3", "5"], 2),
    "torchvision vit": (*ARCHITECTURES["torchvision_vit_b_16"], "encoder.layers.encoder_layer_0.mlp", ["0", "3"], 2),
    "torchvision swin": (torchvision_swin, 32, "features.1.0.mlp", ["0", "3"], 2),
    "transformers vit": (*ARCHITECTURES["transformers_vit"], None, None, 2),
    "transformers swin": (transformers_swin, 32, None, None, 2),
    "own block": (lambda: OfBlocks(Block(), Block()), 32, "blocks.0.mlp", ["up", "down"], 2),
    "own block, gated": (lambda: OfBlocks(Block(gated=True)), 32, "blocks.0.mlp", ["gate", "up", "down"], 1),
    "torch's encoder": (lambda: OfBlocks(ENCODER()), 32, "blocks.0.mlp", ["linear1", "linear2"], 1),
    "mixer": (*ARCHITECTURES["mixer_b16"], "blocks.0.mlp_tokens", ["fc1", "fc2"], 4),
    "resnet": (*ARCHITECTURES["torchvision_resnet18"], None, None, 0),
    "inverted residuals": (*ARCHITECTURES["efficientnet_b0"], None, None, 0),
    "squeeze and excitation, a head of two layers": (lambda: Convolutional(Excited()), 32, None, None, 0),
}

CONV_NORM = {
    "torchvision resnet": (*ARCHITECTURES["torchvision_resnet18"], "conv1+bn1", ["conv1", "bn1"], 14),
    "timm convnext": (*ARCHITECTURES["convnext_tiny"], "stem.0+1", ["0", "1"], 6),
    "torchvision convnext": (torchvision_convnext, 32, "features.0.0+1", ["0", "1"], 3),
    "timm swin": (swin, 32, "patch_embed.proj+norm", ["proj", "norm"], 1),
    "after a sum": (lambda: Convolutional(Excited()), 32, "blocks.0.conv+bn", ["conv", "bn"], 1),
    "after a sum with an embedding": (*ARCHITECTURES["vit_tiny"], None, None, 0),
}


def check(case, group):
    build, size, first, own, n = case
    found = groups_of(build(), group, size)
    assert len(found) == n
    if first is not None:
        assert next(iter(found)) == first
        assert weights(found[first]) == own
    return found


@pytest.mark.parametrize("name", ATTENTION)
def test_select_layers__attention(name):
    check(ATTENTION[name], "attention")


@pytest.mark.parametrize("name", MLP)
def test_select_layers__mlp(name):
    check(MLP[name], "mlp")


@pytest.mark.parametrize("name", CONV_NORM)
def test_select_layers__convolution_and_norm(name):
    """The norm is reset with its convolution though its type is not asked for."""
    check(CONV_NORM[name], "conv+norm")


@pytest.mark.parametrize("build", [ARCHITECTURES["transformers_vit"][0], ARCHITECTURES["transformers_vit_eager"][0]])
def test_select_layers__attention_and_mlp_of_transformers_are_halves_of_a_block(build):
    of = {group: groups_of(build(), group, 32) for group in ("attention", "mlp", "block")}
    blocks = [set(parameters) for parameters in of["block"].values()]
    halves = [set(a) | set(m) for a, m in zip(of["attention"].values(), of["mlp"].values(), strict=True)]
    assert blocks == halves
    assert all(len(parameters) == 8 for parameters in of["attention"].values())  # four layers, each with a bias


def test_select_layers__bias_tables_join_attention_if_their_type_is_selected():
    some, every = (groups_of(swin(), "attention", 32, types)["layers.0.blocks.0.attn"] for types in ("linear", "all"))
    assert set(every) - set(some) == {"layers.0.blocks.0.attn.relative_position_bias_table"}
    own = groups_of(OfBlocks(Block()), "attention", 32, "all")["blocks.0.attention"]
    assert {"blocks.0.q_norm.weight", "blocks.0.q_norm.bias"} <= set(own)
    assert not any("norm1" in name for name in own)


def test_select_layers__what_a_group_does_not_cover_stays_alone():
    network = ARCHITECTURES["vit_tiny"][0]().eval()
    layers = find_layers(network, torch.rand(1, 3, 48, 48), "attention")
    units = [one.name for one in select_layers(layers, group="attention")]
    assert units[:4] == ["patch_embed.proj", "blocks.0.attn", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert units[-1] == "head"


@pytest.mark.parametrize("group", ["attention", "mlp", "conv+norm"])
def test_select_layers__needs_layers_that_were_found_for_it(group):
    layers = find_layers(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))
    with pytest.raises(LayerError, match=re.escape(f"find_layers(network, images, group={group!r})")):
        select_layers(layers, group=group)


def test_find_layers__of_a_group_finds_the_same_layers():
    network = OfBlocks(Block(), ENCODER()).eval()
    images = torch.rand(1, 3, 32, 32)
    fast = torch.backends.mha.get_fastpath_enabled()
    plain, looked = find_layers(network, images), find_layers(network, images, "mlp")
    assert [one.to_dict() for one in plain] == [one.to_dict() for one in looked]
    assert torch.backends.mha.get_fastpath_enabled() == fast
