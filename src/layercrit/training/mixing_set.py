"""The mixing set of PixMix: generated images of fractal noise, interfering waves and Julia sets in random colours."""

import math

import torch
from torch import Tensor

__all__ = ["mixing_set"]


def mixing_set(n_images: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return generated images, uint8 ``(n_images, channels, height, width)``, of each kind in turn.

    Args:
        n_images: number of images.
        channels: 1 or 3.
        height: in pixels.
        width: in pixels.
        seed: of everything random about them; the same seed gives the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = (_fractal_noise, _waves, _julia)
    images = [_coloured(kinds[i % len(kinds)](height, width, generator), channels, generator) for i in range(n_images)]
    return torch.stack(images)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return x and y of each pixel ``(height, width)``, from -1 to 1 along the longer side."""
    longer = max(height, width)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (2 * x - width + 1) / longer, (2 * y - height + 1) / longer


def _fractal_noise(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return noise ``(height, width)`` whose amplitude falls with a random power of the frequency."""
    white = torch.fft.rfft2(torch.randn(height, width, generator=generator))
    frequencies = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequencies[0, 0] = math.inf
    power = _uniform(0.8, 2.0, generator)
    noise: Tensor = torch.fft.irfft2(white * frequencies**-power, s=(height, width))
    return noise


def _waves(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return plane waves ``(height, width)``, each distorted by those before it."""
    x, y = _grid(height, width)
    total = torch.zeros(height, width)
    for _ in range(6):
        angle, turns = _uniform(0, 2 * math.pi, generator), _uniform(2, 12, generator)
        total = total + torch.sin(turns * (math.cos(angle) * x + math.sin(angle) * y) + 2 * total)
    return total


def _julia(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return the root of the escape time under z -> z^2 + c ``(height, width)``, for a random c."""
    x, y = _grid(height, width)
    zoom, angle = _uniform(0.7, 1.4, generator), _uniform(0, 2 * math.pi, generator)
    z = torch.complex(zoom * x, zoom * y)
    # c lies a little outside the main cardioid of the Mandelbrot set, where Julia sets have the most detail.
    half = 1.05 * complex(math.cos(angle), math.sin(angle)) / 2
    c = half - half * half
    escape = torch.zeros(height, width)
    for _ in range(60):
        z = z * z + c
        inside = z.abs() < 8
        escape += inside
        z = torch.where(inside, z, 8)
    return escape.sqrt()


def _coloured(values: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Return values ``(height, width)`` as an image, uint8 ``(channels, height, width)``, by a periodic colour map."""
    span = values.max() - values.min()
    shares = (values - values.min()) / span.clamp_min(1e-6)
    turns = torch.tensor([_uniform(0.5, 2.0, generator) for _ in range(channels)]).view(-1, 1, 1)
    shifts = torch.rand(channels, 1, 1, generator=generator)
    return (127.5 + 127.5 * torch.cos(2 * math.pi * (turns * shares + shifts))).to(torch.uint8)
