from collections import Counter
from dataclasses import replace
from functools import cache, partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.errors import LayerError
from layercrit.layers import (
    LAYER_TYPES,
    Layer,
    find_layers,
    joined,
    joined_where_shared,
    layer_labels,
    select_layers,
    shared_parameters,
    stages_of,
)
from layercrit.wrappers import wrapper_of
from tiny_networks import (
    ARCHITECTURES,
    BY_HAND_IMAGES,
    IMAGES,
    ByHand,
    Counting,
    DataDependent,
    Sketch,
    Tied,
    UsedTwice,
    normal,
)


def found(*sketch: object, **parts: nn.Module | nn.Parameter) -> dict[str, Layer]:
    """The layers of a sketch, by name, without the convolution before and the linear layer after."""
    (how,) = sketch
    layers = find_layers(Sketch(how, **parts).eval(), normal(*IMAGES))
    assert [layer.name for layer in layers[:1]] == ["stem"]
    return {layer.name: layer for layer in layers if layer.name not in ("stem", "last")}


def types_of(layers: dict[str, Layer]) -> dict[str, str]:
    return {name: layer.type for name, layer in layers.items()}


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (n_images, n_pixels, n_channels)


def map_of(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(-1, 8, 8, 8)


# --- find_layers ----------------------------------------------------------------------------------------------------


def test_find_layers__by_hand():
    assert find_layers(ByHand(), BY_HAND_IMAGES) == [
        Layer("first", "linear", ("first.weight",), (2, 1), 2, 0),
        Layer("last", "linear", ("last.weight",), (2, 2), 4, 1),
    ]


def test_find_layers__order_is_that_of_first_use_not_of_registration():
    layers = found(lambda net, x: net.a(net.c(net.b(net.c(x)))), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1), c=norm())
    assert list(layers) == ["c", "b", "a"]
    network = Sketch(lambda net, x: net.b(x), a=nn.Linear(2, 2), b=nn.Conv2d(8, 8, 1), d=nn.Linear(1, 1)).eval()
    layers = find_layers(network, normal(*IMAGES))
    assert [layer.name for layer in layers] == ["stem", "b", "last", "a", "d"], "layers that are never used come last"
    assert [layer.depth for layer in layers] == [0, 1, 2, 3, 4]


def norm() -> nn.Module:
    return nn.BatchNorm2d(8)


def test_find_layers__order_follows_what_is_computed_from_a_weight():
    """The weight of `a` is turned around first, but meets the image last."""

    def how(net: Sketch, x: Tensor) -> Tensor:
        turned = net.a.weight.flip(0) * 2
        return F.conv2d(net.b(x), turned, net.a.bias)

    assert list(found(how, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))) == ["b", "a"]


@pytest.mark.parametrize(
    ("kind", "module", "before", "after"),
    [
        ("conv", nn.Conv1d(8, 8, 1), lambda x: x.flatten(2), lambda y: y.view(4, 8, 8, 8)),
        ("conv", nn.Conv3d(8, 8, 1), lambda x: x.unsqueeze(2), lambda y: y.squeeze(2)),
        ("conv", nn.ConvTranspose2d(8, 8, 1), None, None),
        ("linear", nn.Linear(8, 8), tokens, map_of),
        ("norm", nn.BatchNorm2d(8), None, None),
        ("norm", nn.InstanceNorm2d(8, affine=True), None, None),
        ("norm", nn.GroupNorm(2, 8), None, None),
        ("norm", nn.LayerNorm(8), tokens, map_of),
        ("norm", nn.RMSNorm(8), tokens, map_of),
        ("other", nn.PReLU(8), None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_find_layers__types_of_modules(kind, module, before, after):
    before, after = before or (lambda x: x), after or (lambda y: y)
    layers = found(lambda net, x: after(net.part(before(x))), part=module)
    assert {layer.type for layer in layers.values()} == {kind}
    assert {p for layer in layers.values() for p in layer.parameters} == {
        f"part.{name}" for name, _ in module.named_parameters()
    }


def test_find_layers__types_of_lookup_tables_and_products_of_two():
    table, product = nn.Embedding(10, 8), nn.Bilinear(8, 8, 8)
    number = torch.arange(64) % 10
    layers = found(lambda net, x: map_of(net.b(tokens(x), net.a(number).expand(4, -1, -1))), a=table, b=product)
    assert types_of(layers) == {"a": "embedding", "b": "linear"}


class FrozenNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(8))
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.gain


class NormedDense(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias) * self.gain


class Convolution(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None] * self.gain[:, None, None, None], self.bias)


def test_find_layers__modules_of_the_networks_own():
    """A module with a weight and a bias is one layer under the module's name; what else it owns stands beside it."""
    assert types_of(found(lambda net, x: net.a(x), a=FrozenNorm2d())) == {"a": "norm"}
    assert types_of(found(lambda net, x: map_of(net.a(tokens(x))), a=Dense())) == {"a": "linear", "a.gain": "other"}
    layers = found(lambda net, x: map_of(net.a(tokens(x))), a=NormedDense())
    assert types_of(layers) == {"a": "linear", "a.gain": "other"}
    assert layers["a"].parameters == ("a.weight", "a.bias")
    assert layers["a"].n_parameters == 72
    assert types_of(found(lambda net, x: net.a(x), a=Convolution())) == {"a": "conv", "a.gain": "conv"}


def test_find_layers__parameters_of_the_network_itself():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1), self.weight, self.bias)

    assert find_layers(Bare().eval(), normal(2, 1, 2, 2)) == [
        Layer("Bare", "linear", ("weight", "bias"), (3, 4), 15, 0)
    ]
    (layer,) = find_layers(nn.Linear(4, 3).eval(), normal(2, 4))
    assert (layer.name, layer.parameters) == ("Linear", ("weight", "bias"))


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x: map_of(tokens(x) @ net.proj),
        lambda net, x: map_of(tokens(x) @ net.proj.t()),
        lambda net, x: map_of(torch.matmul(tokens(x), net.proj.transpose(0, 1) * 0.5)),
        lambda net, x: torch.einsum("nchw,cd->ndhw", x, net.proj),
        lambda net, x: map_of(torch.bmm(tokens(x), net.proj.expand(4, 8, 8))),
        lambda net, x: map_of(F.linear(tokens(x), net.proj)),
        lambda net, x: map_of((net.proj @ x.flatten(2)).transpose(1, 2)),
        lambda net, x: map_of(torch.tensordot(tokens(x), net.proj, dims=1)),
        lambda net, x: map_of(torch.addmm(net.proj[0], tokens(x).flatten(0, 1), net.proj).view(4, 64, 8)),
    ],
)
def test_find_layers__a_parameter_that_multiplies_its_input_is_linear(how):
    layers = found(how, proj=nn.Parameter(torch.randn(8, 8)))
    assert list(layers.values()) == [Layer("proj", "linear", ("proj",), (8, 8), 64, 1)]


def test_find_layers__a_parameter_that_is_added_or_scales_is_other():
    def how(net: Sketch, x: Tensor) -> Tensor:
        x = x + net.position
        x = torch.cat([net.token.expand(4, -1, -1), tokens(x)], 1)[:, 1:]
        x = x * net.gamma + net.table[torch.arange(64) % 5]
        return map_of(x) @ net.proj

    layers = found(
        how,
        position=nn.Parameter(torch.randn(1, 8, 8, 8)),
        token=nn.Parameter(torch.randn(1, 1, 8)),
        gamma=nn.Parameter(torch.randn(8)),
        table=nn.Parameter(torch.randn(5, 8)),
        proj=nn.Parameter(torch.randn(8, 8)),
    )
    assert types_of(layers) == {
        "position": "other",
        "token": "other",
        "gamma": "other",
        "table": "other",
        "proj": "linear",
    }


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_find_layers__attention(need_weights, wide):
    """`in_proj` is three matrices and their biases; for keys wider than queries torch keeps the matrices apart."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **({"kdim": 16, "vdim": 16} if wide else {}))

    def how(net: Sketch, x: Tensor) -> Tensor:
        keys = torch.cat([tokens(x), tokens(x)], 2) if wide else tokens(x)
        return map_of(net.a(tokens(x), keys, keys, need_weights=need_weights)[0])

    layers = found(how, a=attention)
    if wide:
        assert set(layers) == {"a.q_proj", "a.k_proj", "a.v_proj", "a.in_proj_bias", "a.out_proj"}
        assert {layer.type for name, layer in layers.items() if name != "a.in_proj_bias"} == {"linear"}
    else:
        assert {layer.type for layer in layers.values()} == {"linear"}
        assert list(layers) == ["a.in_proj", "a.out_proj"]
        assert layers["a.in_proj"].parameters == ("a.in_proj_weight", "a.in_proj_bias")
        assert (layers["a.in_proj"].shape, layers["a.in_proj"].n_parameters) == ((24, 8), 24 * 9)


def test_find_layers__encoder_layer_that_runs_as_one_kernel():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layers = found(lambda net, x: map_of(net.a(tokens(x))), a=encoder)
    assert types_of(layers) == {
        "a.self_attn.in_proj": "linear",
        "a.self_attn.out_proj": "linear",
        "a.linear1": "linear",
        "a.linear2": "linear",
        "a.norm1": "norm",
        "a.norm2": "norm",
    }


@pytest.mark.parametrize(
    ("wrap", "parameters"),
    [
        (
            nn.utils.parametrizations.weight_norm,
            ("a.bias", "a.parametrizations.weight.original0", "a.parametrizations.weight.original1"),
        ),
        (nn.utils.parametrizations.spectral_norm, ("a.bias", "a.parametrizations.weight.original")),
        (nn.utils.parametrizations.orthogonal, ("a.bias", "a.parametrizations.weight.original")),
    ],
)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_find_layers__parametrised_modules_are_one_layer(wrap, parameters, kind):
    if kind == "conv":
        layers = found(lambda net, x: net.a(x), a=wrap(nn.Conv2d(8, 8, 3, padding=1)))
    else:
        layers = found(lambda net, x: map_of(net.a(tokens(x))), a=wrap(nn.Linear(8, 8)))
    assert types_of(layers) == {"a": kind}
    assert layers["a"].parameters == parameters


def test_find_layers__scripted_modules():
    layers = found(lambda net, x: net.a(x), a=torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())))
    assert types_of(layers) == {"a.0": "conv"}


def test_find_layers__a_branch_that_torch_chooses():
    def how(net: Sketch, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: net.a(x), lambda x: net.b(x), (x,))

    assert set(found(how, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))) == {"a", "b"}


def test_find_layers__a_module_used_twice_is_one_layer():
    network = UsedTwice().eval()
    layers = find_layers(network, normal(*IMAGES))
    assert [layer.name for layer in layers] == ["stem", "conv", "norm", "block.0", "last"]  # not block.2, which is conv
    assert [layer.parameters for layer in layers if "conv" in layer.name] == [("conv.weight", "conv.bias")]


def test_find_layers__tied_parameters_belong_to_both_layers():
    layers = {layer.name: layer.parameters for layer in find_layers(Tied().eval(), normal(*IMAGES))}
    assert layers["first"] == ("first.weight", "first.bias")
    assert layers["second"] == ("second.weight", "second.bias")
    assert layers["encode"] == ("encode.weight", "encode.bias")
    assert layers["decode"] == ("decode.weight",)


def test_joined_where_shared__tied_layers_are_one_with_each_parameter_once():
    network = Tied().eval()
    layers = find_layers(network, normal(*IMAGES))
    shared = shared_parameters(layers, network)
    assert {name: (of.first, of.parameters, of.n_parameters) for name, of in shared.items()} == {
        "second": ("first", ("second.bias",), 8),
        "decode": ("encode", (), 0),
    }
    found = {layer.name: layer for layer in joined_where_shared(layers, network)}
    assert list(found) == ["stem", "first + second", "encode + decode", "last"]
    assert found["first + second"].parameters == ("first.weight", "first.bias", "second.bias")
    assert [layer.depth for layer in found.values()] == [0, 1, 2, 3]
    assert sum(layer.n_parameters for layer in found.values()) == sum(p.numel() for p in network.parameters())


def test_shared_parameters__a_layer_that_shares_with_two_joins_them():
    network = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    network["c"].weight, network["c"].bias = network["a"].weight, network["b"].bias
    layers = [Layer(name, "linear", (f"{name}.weight", f"{name}.bias"), (4, 4), 20) for name in "abc"]
    assert {name: of.first for name, of in shared_parameters(layers, network).items()} == {"b": "a", "c": "a"}
    (one,) = joined_where_shared(layers, network)
    assert (one.name, one.n_parameters) == ("a + b + c", 40)
    assert one.parameters == ("a.weight", "a.bias", "b.weight", "b.bias")


def test_shared_parameters__sets_overlap_by_nature():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers = [Layer(name, "linear", (f"{name}.weight", f"{name}.bias"), (2, 2), 6) for name in "01"]
    pairs = [replace(joined(name, layers), members=tuple(layers)) for name in ("all", "again")]
    assert shared_parameters(pairs, network) == {}


def test_joined_where_shared__a_parameter_of_two_names_in_one_group_counts_once():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    (one,) = joined_where_shared([Layer("block", "linear", names, (2, 2), 12)], network)
    assert (one.parameters, one.n_parameters) == (("0.weight", "0.bias", "1.bias"), 8)


@pytest.mark.parametrize("name", ["swin_tiny", "vit_tiny", "torchvision_vit_b_16", "transformers_vit", "mixer_b16"])
def test_find_layers__every_parameter_of_published_architectures_belongs_to_one_layer(name):
    build, size = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        network = build().eval()
    layers = find_layers(network, normal(1, 3, size, size))
    owned = Counter(parameter for layer in layers for parameter in layer.parameters)
    assert owned == Counter(dict(network.named_parameters()).keys())
    assert sum(layer.n_parameters for layer in layers) == sum(p.numel() for p in network.parameters())
    assert {layer.type for layer in layers} <= LAYER_TYPES.keys()
    assert layers[-1].type == "linear"
    others = {layer.name.split(".")[-1] for layer in layers if layer.type == "other"}
    assert others <= {
        *("cls_token", "pos_embed", "class_token", "pos_embedding", "position_embeddings"),
        "relative_position_bias_table",
    }


@pytest.mark.parametrize("build", [Counting, DataDependent, partial(Sketch, lambda net, x: x + torch.zeros(1))])
def test_find_layers__leaves_network_and_random_numbers_as_they_were(build):
    network = build().eval()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    state = torch.get_rng_state()
    find_layers(network, normal(*IMAGES))
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert all(after[name] is tensors[name] and torch.equal(after[name], values[name]) for name in values)
    assert after.keys() == values.keys()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


# --- select_layers --------------------------------------------------------------------------------------------------

LAYERS = [
    Layer("stem", "conv", ("stem.weight",), (8, 3, 3, 3), 216, 0),
    Layer("norm", "norm", ("norm.weight",), (8,), 8, 1),
    Layer("body.0.conv1", "conv", ("body.0.conv1.weight",), (8, 8, 3, 3), 576, 2),
    Layer("body.0.conv2", "conv", ("body.0.conv2.weight",), (8, 8, 1, 1), 64, 3),
    Layer("body.1.conv1", "conv", ("body.1.conv1.weight",), (8, 8, 3, 3), 576, 4),
    Layer("body.1.conv2", "conv", ("body.1.conv2.weight",), (8, 8, 1, 1), 64, 5),
    Layer("body.1.gamma", "other", ("body.1.gamma",), (8,), 8, 6),
    Layer("fc", "linear", ("fc.weight", "fc.bias"), (10, 8), 90, 7),
]


def names(**options: object) -> list[str]:
    return [layer.name for layer in select_layers(LAYERS, **options)]


def test_select_layers__default_is_convolutions_and_linear_layers():
    assert names() == ["stem", "body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2", "fc"]
    assert [layer.depth for layer in select_layers(LAYERS)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("linear", ["fc"]),
        ("norm, linear", ["norm", "fc"]),
        (["other", "norm"], ["norm", "body.1.gamma"]),
        ("all", [layer.name for layer in LAYERS]),
        (["all"], [layer.name for layer in LAYERS]),
        ("conv,all", [layer.name for layer in LAYERS]),
    ],
)
def test_select_layers__types(types, expected):
    assert names(types=types) == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("fc", ["fc"]),
        ("fc, stem", ["stem", "fc"]),
        ("body.*", ["body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2"]),
        ("*conv2", ["body.0.conv2", "body.1.conv2"]),
        (["*.1.*", "body.1.conv1"], ["body.1.conv1", "body.1.conv2"]),
        ("body.[0-9].conv?", ["body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2"]),
    ],
)
def test_select_layers__patterns(patterns, expected):
    assert names(patterns=patterns) == expected


def test_select_layers__groups_are_reset_as_a_whole():
    block = select_layers(LAYERS, types="all", group="block")
    assert [layer.name for layer in block] == ["stem", "norm", "body.0", "body.1", "fc"]
    assert block[3] == Layer(
        "body.1", "conv+other", ("body.1.conv1.weight", "body.1.conv2.weight", "body.1.gamma"), (8, 8, 3, 3), 648, 3
    )
    stage = select_layers(LAYERS, group="stage")
    assert [layer.name for layer in stage] == ["stem", "body", "fc"]
    assert stage[1].n_parameters == 1280
    assert [layer.depth for layer in stage] == [0, 1, 2]


def test_select_layers__a_group_holds_selected_layers_only():
    (only,) = select_layers(LAYERS, patterns="body.1.conv2", group="block")
    assert (only.name, only.parameters) == ("body.1", ("body.1.conv2.weight",))


def test_select_layers__a_group_stands_where_its_first_layer_is_used():
    shuffled = [LAYERS[index] for index in (2, 0, 3, 7, 4, 5)]
    shuffled = [Layer(**{**vars(layer), "depth": depth}) for depth, layer in enumerate(shuffled)]
    assert [layer.name for layer in select_layers(shuffled, group="block")] == ["body.0", "stem", "fc", "body.1"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"types": "convolution"}, r"Unknown layer type 'convolution'\. .*'conv'"),
        ({"types": ["norms"]}, r"Unknown layer type 'norms'\. Did you mean 'norm'"),
        ({"types": "embedding"}, r"no layer of type embedding\. Its types are: conv, linear, norm, other\."),
        ({"patterns": "fd"}, r"No layer matches 'fd'\. Did you mean 'fc'"),
        ({"patterns": "stem,body.7.*"}, r"No layer matches 'body\.7\.\*'\. Did you mean 'body\.1\.conv2' or"),
        ({"patterns": "body.1.gamma"}, r"No layer of type conv, linear matches 'body.1.gamma'; 1 of type other would"),
        ({"patterns": "n*"}, r"1 of type norm would\. Add the type with --types \(types=\.\.\.\)"),
        ({"patterns": ["fc", 3]}, r"Expected patterns of layers as texts; got 3, a int"),
        ({"patterns": None}, r"Expected patterns of layers as texts; got None\. Leave them out"),
        ({"types": 3}, r"Expected types of layers as texts; got 3\. Leave them out"),
        ({"types": [nn.Conv2d]}, r"Expected types of layers as texts; got <class 'torch.*Conv2d'>, a type"),
        ({"patterns": []}, r"the list of patterns is empty\. Give '\*' for all layers"),
        ({"group": "blocks"}, r"Unknown group 'blocks'\. Did you mean 'block'"),
    ],
)
def test_select_layers__errors(options, text):
    with pytest.raises(LayerError, match=text):
        select_layers(LAYERS, **options)


def test_select_layers__a_network_without_parameters():
    with pytest.raises(LayerError, match="Its types are: none, it has no parameters"):
        select_layers([])


# --- groups of published architectures ------------------------------------------------------------------------------


@cache
def published(name: str) -> list[Layer]:
    import timm
    import torchvision

    with torch.random.fork_rng(devices=[]):
        if name in ("vit_b_16", "efficientnet_b0", "swin_t", "mobilenet_v2"):
            network = getattr(torchvision.models, name)()
        else:
            options = {"img_size": 56} if "swin" in name or "vit" in name else {}
            network = timm.create_model(name, **options)
    size = 224 if name == "vit_b_16" else 56 if "swin" in name or "vit" in name else 32
    return find_layers(network.eval(), normal(1, 3, size, size))


def numbered(pattern: str, *counts: int, start: int = 0) -> list[str]:
    return [
        pattern.format(outer, inner) for outer, n in enumerate(counts, start=start) for inner in range(start, start + n)
    ]


BLOCKS = {
    "resnet50": (
        ["conv1", *[f"layer{n}.{i}" for n, count in enumerate((3, 4, 6, 3), 1) for i in range(count)], "fc"],
        ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"],
    ),
    "regnety_008": (
        ["stem.conv", *numbered("s{}.b{}", 1, 3, 8, 2, start=1), "head.fc"],
        ["stem", "s1", "s2", "s3", "s4", "head"],
    ),
    "vit_tiny_patch16_224": (
        ["patch_embed.proj", *[f"blocks.{i}" for i in range(12)], "head"],
        ["patch_embed", "blocks", "head"],
    ),
    "swin_tiny_patch4_window7_224": (
        [
            "patch_embed.proj",
            *numbered("layers.{}.blocks.{}", 2),
            *[
                name
                for n, count in ((1, 2), (2, 6), (3, 2))
                for name in (f"layers.{n}.downsample.reduction", *[f"layers.{n}.blocks.{i}" for i in range(count)])
            ],
            "head.fc",
        ],
        ["patch_embed", "layers.0", "layers.1", "layers.2", "layers.3", "head"],
    ),
    "convnext_tiny": (
        [
            "stem.0",
            *numbered("stages.{}.blocks.{}", 3),
            *[
                name
                for n, count in ((1, 3), (2, 9), (3, 3))
                for name in (f"stages.{n}.downsample.1", *[f"stages.{n}.blocks.{i}" for i in range(count)])
            ],
            "head.fc",
        ],
        ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"],
    ),
    "vgg16_bn": (  # no blocks: each convolution stands alone
        [
            *[f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)],
            *("pre_logits.fc1", "pre_logits.fc2", "head.fc"),
        ],
        ["features", "pre_logits", "head"],
    ),
    "densenet121": (
        [
            "features.conv0",
            *[
                name
                for n, count in enumerate((6, 12, 24, 16), 1)
                for name in (
                    *[f"features.denseblock{n}.denselayer{i}" for i in range(1, count + 1)],
                    *([f"features.transition{n}.conv"] if n < 4 else []),
                )
            ],
            "classifier",
        ],
        [
            "features",
            *[name for n in (1, 2, 3) for name in (f"features.denseblock{n}", f"features.transition{n}")],
            *("features.denseblock4", "classifier"),
        ],
    ),
    "vit_b_16": (
        ["conv_proj", *[f"encoder.layers.encoder_layer_{i}" for i in range(12)], "heads.head"],
        ["conv_proj", "encoder", "heads"],
    ),
    "efficientnet_b0": (  # of torchvision; its squeeze-and-excitation modules are numbered, and are no blocks
        [
            "features.0.0",
            *[f"features.{n}.{i}" for n, count in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for i in range(count)],
            *("features.8.0", "classifier.1"),
        ],
        [*[f"features.{n}" for n in range(9)], "classifier"],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_select_layers__blocks_and_stages_of_published_architectures(name):
    layers, (blocks, stages) = published(name), BLOCKS[name]
    assert [layer.name for layer in select_layers(layers, group="block")] == blocks
    assert [layer.name for layer in select_layers(layers, group="stage")] == stages


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("group", ["layer", "block", "stage"])
def test_select_layers__every_parameter_belongs_to_one_group(name, group):
    """Also normalisation layers, which join the block they stand in."""
    layers = published(name)
    grouped = select_layers(layers, types="all", group=group)
    owned, expected = (Counter(p for layer in some for p in layer.parameters) for some in (grouped, layers))
    assert owned == expected
    assert len({layer.name for layer in grouped}) == len(grouped)
    if group == "block":
        mixed = {layer.name for layer in grouped if "+" in layer.type}
        assert mixed == {block for block in BLOCKS[name][0] if block not in {layer.name for layer in layers}}


@pytest.mark.parametrize("wrapper", ["", "model.", "module.model."])
def test_stages_of__a_resnet_by_its_names(wrapper):
    names = [layer.name for layer in select_layers(published("resnet50"))]
    assert len(names) == 54
    stages = stages_of([wrapper + name for name in names])
    assert list(stages) == [wrapper + name for name in names]
    assert list(dict.fromkeys(stages.values())) == [wrapper + stage for stage in BLOCKS["resnet50"][1]]
    assert stages[f"{wrapper}layer1.0.downsample.0"] == f"{wrapper}layer1"


@pytest.mark.parametrize("name", BLOCKS)
def test_stages_of__agrees_with_groups_of_the_network(name):
    layers = select_layers(published(name))
    stages = stages_of([layer.name for layer in layers])
    assert list(dict.fromkeys(stages.values())) == BLOCKS[name][1]


@pytest.mark.parametrize(
    ("names", "wrapper"),
    [
        (["model.conv1", "model.fc"], "model."),
        (["module.model.conv1", "module.model.fc"], "module.model."),
        (["backbone.conv1", "fc"], ""),
        (["modelling.conv1"], ""),
        ([], ""),
    ],
)
def test_wrapper_of(names, wrapper):
    assert wrapper_of(names) == wrapper


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "label"),
    [
        ("conv1", "64x3x7x7", "conv1:7x7"),
        ("layer1.0.conv2", "64x64x3x3", "[1.0] conv2:3x3"),
        ("layer4.2.downsample.0", "256x64x1x1", "[4.2] downsample.0:1x1"),
        ("stages.2.blocks.10.mlp.fc1", "8x4", "[2.10] mlp.fc1"),
        ("encoder.layer.3.attention.self.query", "8x8", "[3] attention.self.query"),
        ("blocks.3.conv3d", "8x4x3x1x1", "[3] conv3d:3x1x1"),
        ("pos_embed", "1x5x8", "pos_embed"),
        ("fc", None, "fc"),
        ("12", None, "12"),
    ],
)
def test_layer_labels(name, shape, label):
    assert layer_labels({name: shape, "other": None}) == {name: label, "other": "other"}


def test_layer_labels__without_the_wrapper():
    shapes = {"model.conv1": "8x3x3x3", "model.layer1.0.conv1": "8x8x3x3"}
    assert list(layer_labels(shapes).values()) == ["conv1:3x3", "[1.0] conv1:3x3"]


def test_layer_labels__names_where_labels_would_be_equal():
    names = {"a.0.conv": None, "b.0.conv": None, "fc": None}
    assert layer_labels(names) == {name: name for name in names}


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "densenet121", "swin_tiny_patch4_window7_224"])
def test_layer_labels__of_published_architectures_are_short_and_unique(name):
    with torch.device("meta"):
        layers = find_layers(timm.create_model(name), torch.zeros(1, 3, 224, 224))
    labels = layer_labels({layer.name: "x".join(map(str, layer.shape)) for layer in layers})
    assert len(set(labels.values())) == len(layers)
    assert sum(map(len, labels.values())) <= sum(len(layer.name) + 4 for layer in layers)
