"""Images, networks and seeds for the tests of training methods."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from layercrit.seeds import drawing
from layercrit.training.methods import Inputs, Views

GREY = Inputs(1, 28, 28, 10, (0.29,), (0.35,), same_size=True)
COLOUR = Inputs(3, 50, 40, 10, (0.49, 0.45, 0.40), (0.23, 0.22, 0.21), same_size=True)


def photograph(inputs: Inputs, seed: int = 0) -> Image.Image:
    """Return a smooth picture with an edge, so that every change of it shows."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[: inputs.height, : inputs.width] / inputs.height
    waves = [np.sin(6 * generator.random() * x + 6 * generator.random() * y) for _ in range(inputs.channels)]
    pixels = (100 + 80 * np.stack(waves, -1) + 60 * (x > y)[..., None]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if inputs.channels == 1 else pixels)


def seeded_views(views: Views, image: Image.Image, seed: int) -> Sequence[Tensor]:
    """Return an image's views, drawn under a seed of all global generators, which are as before afterwards."""
    with drawing(seed):
        return views(image)


def batch(inputs: Inputs, n_images: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images in [0, 1] and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n_images, inputs.channels, inputs.height, inputs.width, generator=generator)
    return images, torch.randint(inputs.n_classes, (n_images,), generator=generator)


def tiny_network(inputs: Inputs) -> nn.Module:
    """Return a small residual-free network with batch normalisation and dropout."""
    with drawing(1):
        return nn.Sequential(
            nn.Conv2d(inputs.channels, 8, 5, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(64, inputs.n_classes),
        )
