"""Small networks and images to be measured, and how two measurements are compared."""

import contextlib

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from layercrit.models.references import open_model
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from photographs import pieces

SIZE = 12
QUIET = {"progress": False}
STILL = Preprocessing(height=SIZE, width=SIZE, resize=None)


class Block(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))) + self.shortcut(x))


class SmallNetwork(nn.Module):
    """A residual network from images ``(n_images, 3, height, width)`` to 6 classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 6))
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean(dim=(2, 3)))


GROUPS = {
    "layer": ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "layer2.0.conv1",
              "layer2.0.conv2", "layer2.0.shortcut", "fc"],
    "block": ["stem", "layer1.0", "layer1.1", "layer2.0", "fc"],
    "stage": ["stem", "layer1", "layer2", "fc"],
}  # fmt: skip
"""Names of what is reset in a SmallNetwork, in the order of its forward."""


def members(group):
    """Name -> the modules that are reset together."""
    single = GROUPS["layer"]
    return {name: [one for one in single if one == name or one.startswith(f"{name}.")] for name in GROUPS[group]}


def fresh(build, seed):
    """What a factory builds under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def small_network(seed=5):
    """A SmallNetwork that is as sure of itself as a trained one, with normalisation statistics that are not 0 and 1."""

    def build():
        network = SmallNetwork().eval()
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.1, 0.4)
                    module.bias.normal_(0, 0.3)
            network.fc.weight.mul_(40)
        return network

    return fresh(build, seed)


def photographs(n_images=10, labels=None):
    return ProbeSet.from_array(pieces(n_images, SIZE), STILL, labels)


def mostly_right(network, n_images=10):
    """Labels in the order of the array: what the network predicts, but for every third image."""
    pixels = torch.from_numpy(pieces(n_images, SIZE)).permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = network(pixels / 255).argmax(dim=1).numpy()
    return np.where(np.arange(n_images) % 3 == 0, (predicted + 1) % 6, predicted)


def normalised(probe_set, mean=(0.0,) * 3, std=(1.0,) * 3):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (torch.tensor(probe_set.images).float() / 255 - mean) / std


def build_two_layers():
    """A network for `PIXELS`: linear layers '1' and '3' around a ReLU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def two_layers():
    return fresh(build_two_layers, 1)


PIXELS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (6, 3, 2, 2), dtype=np.uint8))


SMALL = open_model(two_layers(), input_size=(3, 2, 2))


@contextlib.contextmanager
def registered(registry):
    """Take out again what is registered inside."""
    before = dict(registry)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


def assert_same_cells(found, expected, atol):
    """Every distance of every image, and every number of every cell, are the same within ``atol``."""
    assert found.per_image.keys() == expected.per_image.keys()
    for name, values in expected.per_image.items():
        np.testing.assert_allclose(found.per_image[name], values, rtol=0, atol=atol, err_msg=name)
    numbers = expected.cells.select_dtypes("number").columns
    pd.testing.assert_frame_equal(found.cells[numbers], expected.cells[numbers], rtol=0, atol=atol)
    assert (found.cells["status"] == expected.cells["status"]).all()
