"""The embedded default: small networks trained on handwritten digits, one of them measured, all three for a study."""

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.errors import LayercritError
from layercrit.images import Preprocessing
from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.models import Model
from layercrit.networks import drawing

__all__ = ["digits_network", "example_study", "run_demo"]

_MEAN, _STD = (0.305,), (0.376,)  # of the training images' pixels
_EPOCHS = 12
_BATCH = 128


class _Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions, as in ResNet-50 (He et al. 2016, figure 5)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        width = n_out // 2
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.downsample = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class _DigitsNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Bottleneck(16, 32, 1), _Bottleneck(32, 32, 1))
        self.layer2 = nn.Sequential(_Bottleneck(32, 64, 2), _Bottleneck(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def digits_network() -> nn.Module:
    """Return the demo's network with fresh weights: images ``(n_images, 1, 8, 8)`` to 10 classes."""
    return _DigitsNetwork()


def run_demo(folder: Path, say: Callable[[str], Any] = print) -> tuple[Measurement, tuple[str, str]]:
    """Train the demo's networks, measure the plain one, and leave weights, images and a study file for more.

    Args:
        folder: where ``digits.safetensors``, ``digits-smoothing.safetensors`` and ``digits-frozen.safetensors`` are
            written, ``digits.npz`` (360 test images with labels), and ``digits.toml``, the study of all three.
        say: is told what goes on.

    Returns:
        The measurement, and command lines for more: one that does it again, and one that runs the study.

    Raises:
        LayercritError: scikit-learn, which ships the digits, is not installed.
    """
    pixels, labels = _digits()
    n_train = len(pixels) - 360  # the first writers train, the last ones test
    say(f"Training a small residual network in three ways on {n_train} handwritten digits of scikit-learn ...")
    folder.mkdir(parents=True, exist_ok=True)
    networks = {}
    for name, train in _METHODS.items():
        with drawing(0):  # the same initial weights and order of images for each
            networks[name] = train(digits_network(), pixels[:n_train], labels[:n_train])
        save_file(networks[name].state_dict(), folder / f"{name}.safetensors")
    images = folder / "digits.npz"
    np.savez_compressed(images, images=pixels[n_train:], labels=labels[n_train:])
    (folder / "digits.toml").write_text(example_study("digits"), encoding="utf-8")
    say("Resetting each layer of the plain one in turn, 5 draws each, and asking about 360 other digits ...")
    size = Preprocessing(channels=1, height=8, width=8, resize=None)
    architecture = "py:layercrit.demo:digits_network"
    options = f"mean=({_MEAN[0]},)&std=({_STD[0]},)&input_size=(1,8,8)"
    reference = f"file:{folder / 'digits.safetensors'}?arch={architecture}&{options}"
    model = Model(
        "demo:digits", architecture, networks["digits"], _MEAN, _STD, size, digits_network, "PyTorch's initialisers"
    )
    again = f"layercrit measure '{reference}' --images {images} --trials 5"
    family = f"layercrit study run {folder / 'digits.toml'} --out {folder / 'study'}"
    return measure(model, images, trials=5), (again, family)


def example_study(name: str) -> str:
    """Return a study file that comes with layercrit: ``paper`` or ``digits``."""
    return resources.files("layercrit").joinpath(f"studies/{name}.toml").read_text(encoding="utf-8")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise LayercritError(
            "The demo's images come with scikit-learn, which is not installed. Install layercrit with its demo extra: "
            "pip install 'layercrit[demo]'."
        ) from error
    digits = load_digits()
    # 17 grey levels, 0 to 16, on 8 x 8 pixels
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _frozen(network: nn.Module, pixels: np.ndarray, labels: np.ndarray) -> nn.Module:
    """Train with all 3x3 convolutions left at their random initial values."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.requires_grad_(False)
    return _trained(network, pixels, labels)


def _trained(network: nn.Module, pixels: np.ndarray, labels: np.ndarray, label_smoothing: float = 0.0) -> nn.Module:
    """Train with shifts by up to one pixel, SGD and a cosine schedule."""
    x = ((torch.from_numpy(pixels).float() / 255 - _MEAN[0]) / _STD[0])[:, None]
    y = torch.from_numpy(labels)
    background = -_MEAN[0] / _STD[0]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    n_steps = _EPOCHS * (len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    network.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast at this size, and the same weights on every number of cores
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(x))[: len(x) // _BATCH * _BATCH].view(-1, _BATCH):
            down, right = torch.randint(0, 3, (2,)).tolist()
            shifted = F.pad(x[batch], (1, 1, 1, 1), value=background)[:, :, down : down + 8, right : right + 8]
            loss = F.cross_entropy(network(shifted), y[batch], label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return network.eval()


_METHODS: dict[str, Callable[[nn.Module, np.ndarray, np.ndarray], nn.Module]] = {
    "digits": _trained,
    "digits-smoothing": partial(_trained, label_smoothing=0.2),
    "digits-frozen": _frozen,
}
