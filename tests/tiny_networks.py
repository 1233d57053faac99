"""Networks small enough to reset each layer of: published architectures shrunk, one to compute by hand, oddities."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.layers import Layer, find_layers
from layercrit.models.model import logits_of

N_CLASSES = 10


# --- how a test prepares and resets a network -----------------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is built inside under a seed; the global generator is then as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A network as if trained, a donor of fresh values, and images."""

    network: nn.Module
    donor: nn.Module
    images: Tensor
    layers: list[Layer]

    def values(self, layer: Layer) -> dict[str, Tensor]:
        parameters = dict(self.donor.named_parameters(remove_duplicate=False))
        return {name: parameters[name].detach() for name in layer.parameters}

    def all_values(self) -> dict[str, dict[str, Tensor]]:
        return {layer.name: self.values(layer) for layer in self.layers}


def case(build: Callable[[], nn.Module], *shape: int) -> Case:
    """Build a network twice, with no value left at 0 or 1, and with predictions that differ between images."""
    images = normal(*shape, seed=1)
    with seeded(0):
        network = _livened(build(), images)
    with seeded(1):
        donor = _livened(build(), images)
    return Case(network, donor, images, find_layers(network, images))


def _livened(network: nn.Module, images: Tensor) -> nn.Module:
    """Give a fresh network what training gives: statistics, no constant parameters, outspoken predictions."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter += 0.2 * torch.randn(parameter.shape)
        for norm in network.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                if norm.weight is not None:
                    norm.weight[0], norm.weight[-1] = 0.0, -0.7
                if norm.running_mean is not None:
                    norm.running_mean += 0.2 * torch.randn(norm.num_features)
                    norm.running_var *= 0.5 + torch.rand(norm.num_features)
        network.eval()
        last = getattr(network, "last", None) or [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        spread = logits_of(network(images)).std()
        for parameter in last.parameters(recurse=False):
            parameter *= 2 / spread
    return network


class PlainWay:
    """The plain way, slowly: a copy of the network, weights loaded into it in place, the whole of it run."""

    def __init__(self, network: nn.Module) -> None:
        self.twin = copy.deepcopy(network)
        self.parameters = dict(self.twin.named_parameters(remove_duplicate=False))

    def __call__(self, values: Mapping[str, Tensor], images: Tensor) -> Tensor:
        parameters = self.parameters
        trained = {name: parameters[name].detach().clone() for name in values}
        state = {name: buffer.clone() for name, buffer in self.twin.named_buffers()}
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
            logits = logits_of(self.twin(images))
            for name, value in trained.items():
                parameters[name].copy_(value)
            for name, buffer in self.twin.named_buffers():
                buffer.copy_(state[name])
        return logits

    def sweep(self, case: Case, layers: Sequence[Layer] | None = None) -> dict[str | None, Tensor]:
        """Layer name -> logits after its reset, and None -> logits of the trained network."""
        chosen = case.layers if layers is None else layers
        logits: dict[str | None, Tensor] = {layer.name: self(case.values(layer), case.images) for layer in chosen}
        return {**logits, None: self({}, case.images)}


# --- published architectures, shrunk --------------------------------------------------------------------------------


def _timm(name: str, **options: object) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=N_CLASSES, **options)


def _vgg16_bn() -> nn.Module:
    from timm.models.vgg import VGG

    widths = [16, 16, "M", 32, 32, "M", 32, "M", 64, "M", 64, "M"]
    return VGG(widths, num_classes=N_CLASSES, norm_layer=nn.BatchNorm2d, mlp_ratio=0.02)


def _densenet121() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(num_classes=N_CLASSES, growth_rate=8, block_config=(2, 2, 3, 2))


def _regnety_008() -> nn.Module:
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(depth=6, w0=16, wa=16.0, wm=2.0, group_size=8, se_ratio=0.25), num_classes=N_CLASSES)


def _inverted_residuals(cls: str, blocks: list[list[str]], **options: object) -> nn.Module:
    """One of timm's networks of inverted residuals, of the blocks that timm's notation says."""
    from timm.models import efficientnet, mobilenetv3
    from timm.models._efficientnet_builder import decode_arch_def

    build = {"EfficientNet": efficientnet.EfficientNet, "MobileNetV3": mobilenetv3.MobileNetV3}[cls]
    return build(decode_arch_def(blocks), num_classes=N_CLASSES, num_features=96, stem_size=16, **options)


_EFFICIENTNET = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k3_s2_e6_c24_se0.25"], ["ir_r2_k5_s2_e6_c40_se0.25"]]
_MOBILENET = [["ds_r1_k3_s1_e1_c16_nre"], ["ir_r2_k5_s2_e3_c24_se0.25_nre"], ["ir_r2_k3_s2_e3_c40"],
              ["cn_r1_k1_s1_c96"]]  # fmt: skip


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=N_CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)


def _torchvision_resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=N_CLASSES)


def _torchvision_vit() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=N_CLASSES
    )


def _transformers_vit(attention: str = "sdpa") -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=N_CLASSES,
        attn_implementation=attention,
    )
    return transformers.ViTForImageClassification(config)


# name -> (builder, size of an image)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (partial(_timm, "resnet50", channels=(16, 32, 64, 128), layers=(2, 1, 2, 1)), 32),
    "vgg16_bn": (_vgg16_bn, 32),
    "densenet121": (_densenet121, 32),
    "convnext_tiny": (partial(_timm, "convnext_tiny", depths=(1, 1, 2, 1), dims=(16, 32, 64, 96)), 64),
    "efficientnet_b0": (partial(_inverted_residuals, "EfficientNet", _EFFICIENTNET, act_layer=nn.SiLU), 32),
    "mobilenetv3_large_100": (
        partial(_inverted_residuals, "MobileNetV3", _MOBILENET, act_layer=nn.Hardswish),
        32,
    ),
    "regnety_008": (_regnety_008, 32),
    "vit_tiny": (partial(_timm, "vit_tiny_patch16_224", img_size=48, depth=3, embed_dim=48), 48),
    "deit_tiny": (partial(_timm, "deit_tiny_distilled_patch16_224", img_size=48, depth=2, embed_dim=48), 48),
    "swin_tiny": (
        partial(_timm, "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 1, 1)),
        56,
    ),
    "mixer_b16": (_mixer, 32),
    "torchvision_resnet18": (_torchvision_resnet18, 32),
    "torchvision_vit_b_16": (_torchvision_vit, 32),
    "transformers_vit": (_transformers_vit, 32),
    "transformers_vit_eager": (partial(_transformers_vit, "eager"), 32),
}


# --- one to compute by hand -----------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Two linear layers on one pixel; all weights are small whole numbers.

    For an image with the one value x: hidden = relu(2 x, -x), logits = (hidden_0 - hidden_1, 3 hidden_1).
    x = 1 gives hidden (2, 0) and logits (2, 0); x = -1 gives hidden (0, 1) and logits (-1, 3).
    Multiply-adds per image: 2 in `first`, 4 in `last`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 2, bias=False)
        self.last = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[2.0], [-1.0]]))
            self.last.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 3.0]]))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1)).relu())


BY_HAND_IMAGES = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
BY_HAND_LOGITS = torch.tensor([[2.0, 0.0], [-1.0, 3.0]])


# --- oddities: images are (n_images, 3, 8, 8) -----------------------------------------------------------------------

IMAGES = (4, 3, 8, 8)


class _Head(nn.Module):
    """Base of the oddities: `body` on the images, then a mean over all pixels and a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Linear(width, N_CLASSES)

    def body(self, x: Tensor) -> Tensor:
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(self.stem(images)).flatten(2).mean(2))


class Sketch(_Head):
    """Any few modules and a function that says how they are used: ``body(sketch, x)``, x ``(n_images, 8, 8, 8)``."""

    def __init__(self, how: Callable[["Sketch", Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def body(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class UsedTwice(_Head):
    """One convolution and one normalisation, each called twice, and a whole block that holds both called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), self.conv)

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = x + self.norm(self.conv(x))
        return self.block(self.block(x))


class Tied(_Head):
    """Two convolutions with one weight but their own biases, and a linear map that uses the other's weight by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.encode = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 8, bias=False)
        self.decode.weight = self.encode.weight

    def body(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = x.permute(0, 2, 3, 1)
        return F.linear(self.encode(x).relu(), self.decode.weight.t()).permute(0, 3, 1, 2)


class InPlace(_Head):
    """Activations and sums that write over their input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(x))
        y = self.conv2(self.act(self.conv1(y)))
        y += x
        y = self.act(y)
        y *= 0.5
        return y


class PreActivation(_Head):
    """A shortcut that the following in-place activation writes over, as in published pre-activation networks."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = x + conv(self.act(x))  # the activated x is added: the activation wrote over it
        return x


@dataclass
class Output:
    """An object that holds tensors and that nothing knows how to take apart."""

    value: Tensor


class Structured(_Head):
    """Modules that take and return tuples, dictionaries, None, and an object of the network's own."""

    class _Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor | float | None]]:
            return self.conv(x) * scale, {"input": x, "scale": scale, "nothing": None}

    class _Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Output:
            return Output(self.conv(x))

    def __init__(self) -> None:
        super().__init__()
        self.pair = self._Pair()
        self.opaque = self._Opaque()

    def body(self, x: Tensor) -> Tensor:
        y, more = self.pair(x, scale=0.5)
        z, _ = self.pair(y + more["input"])
        return self.opaque(z.relu()).value


class DataDependent(_Head):
    """Control flow that depends on the images, and on what resets do to them: it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.odd = nn.Conv2d(8, 8, 1)
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def body(self, x: Tensor) -> Tensor:
        for step in range(4):
            x = self.even(x) if (x[0, step] - x[1, step]).mean() * (-1) ** step > 0 else self.odd(x)
        if x.abs().amax() > 0.1:
            x = self.tail(x)
        return x


class Caching(_Head):
    """A module leaves its output where another picks it up, past the modules' own inputs and outputs."""

    class _Leave(nn.Module):
        def __init__(self, shelf: dict[str, Tensor]) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.shelf = shelf

        def forward(self, x: Tensor) -> Tensor:
            self.shelf["left"] = self.conv(x).relu()
            return x

    def __init__(self) -> None:
        super().__init__()
        self.shelf: dict[str, Tensor] = {}
        self.leave = self._Leave(self.shelf)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        x = self.conv(self.leave(x))
        return x + self.shelf["left"] if x.mean() < 1e9 else x  # the condition keeps it from being exported


class Counting(_Head):
    """Buffers count forward passes and remember the last images, in evaluation mode too, and decide nothing."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(8))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.mean((0, 2, 3))  # another tensor in the buffer's place
        return self.conv(x)


class Remembering(_Head):
    """Leaves its features on itself after every forward pass."""

    def body(self, x: Tensor) -> Tensor:
        self.features = x.relu()
        return self.features


class Moody(_Head):
    """Answers differently at every second call: no two forward passes need agree."""

    def __init__(self) -> None:
        super().__init__()
        self.moods = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)])
        self.calls = 0

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.moods[self.calls % 2](x) if x.mean() < 1e9 else x


class Failing(_Head):
    """Raises an error at a call of your choice."""

    class _Fuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.calls_left: int | None = None
            self.error: type[BaseException] = RuntimeError

        def forward(self, x: Tensor) -> Tensor:
            if self.calls_left is not None:
                self.calls_left -= 1
                if self.calls_left < 0:
                    raise self.error("blown")
            return self.conv(x)

    def __init__(self) -> None:
        super().__init__()
        self.fuse = self._Fuse()
        self.norm = nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.fuse(self.norm(self.fuse(x))))


class Recurrent(_Head):
    """A recurrent layer, which keeps a list of its weights beside the parameters, over the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 64, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        return x + self.lstm(x.flatten(2))[0].view_as(x)


class Hidden(_Head):
    """A weight is read as a Python number, which neither the exporter nor a recording can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(2) + 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x * float(self.scale.detach().numpy()[0]))
