"""Corruptions of images, such as noise, blur, fog and JPEG, in five severities; their registry.

They are those of Hendrycks & Dietterich 2019 (arXiv 1903.12261) in kind and, where a table below says so, in strength,
but not in every bit: ImageNet-C was made by other libraries and versions. Streaks, warps and plasma are kornia's,
filters SciPy's, JPEG and resizing Pillow's.
"""

import functools
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layercrit.errors import ProbeError, first_line, near, shown
from layercrit.probes.changes import begins_with, split_change
from layercrit.probes.images import Pixels
from layercrit.registry import Registry, summary_of
from layercrit.seeds import seed_of

__all__ = ["CORRUPTIONS", "FAMILIES", "SEVERITIES", "Corruption", "CorruptionKind", "about_corruptions", "corruption",
           "split_corruption"]  # fmt: skip

SEVERITIES = (1, 2, 3, 4, 5)
FAMILIES = ("noise", "blur", "weather", "digital")
_SMALL, _LARGE = 32, 224  # pixels of the shorter side for which strengths are given: CIFAR-10-C and ImageNet-C

Family = Literal["noise", "blur", "weather", "digital"]
Function = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class CorruptionKind:
    """A kind of corruption.

    Attributes:
        name: its name.
        family: what it is like, one of `FAMILIES`.
        function: from an image ``(channels, height, width)`` in [0, 1], float64, with a strength and a generator of
            random numbers, to the corrupted image of the same shape; it is clipped and rounded to 8 bits afterwards.
        small: the strength of each severity where the shorter side has 32 pixels.
        large: likewise, where it has 224.
        unit: what the strength is, in words.
        in_pixels: whether it is a length in pixels, which goes on growing with larger images.
        needs: the library that it needs beside those of layercrit, or None.
    """

    name: str
    family: Family
    function: Function
    small: tuple[float, ...]
    large: tuple[float, ...]
    unit: str
    in_pixels: bool
    needs: str | None

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return summary_of(self.function)

    def strength(self, severity: int, height: int, width: int) -> float:
        """Return the strength of a severity for images of ``height`` and ``width`` pixels.

        Between 32 and 224 pixels of the shorter side it grows by the same factor with each doubling. Beyond them, a
        length in pixels stays the same share of the image, and anything else stays as it is.
        """
        small, large = self.small[severity - 1], self.large[severity - 1]
        side = min(height, width)
        place = math.log(side / _SMALL) / math.log(_LARGE / _SMALL)  # 0 at 32 pixels, 1 at 224
        if 0 <= place <= 1:
            return float(small ** (1 - place) * large**place)
        nearest, known = (small, _SMALL) if place < 0 else (large, _LARGE)
        return nearest * side / known if self.in_pixels else nearest


CORRUPTIONS: Registry[CorruptionKind] = Registry(
    "corruption", ProbeError, "layercrit.corruptions", summary=lambda kind: kind.summary
)


def corruption(
    name: str,
    family: Family,
    small: Sequence[float],
    large: Sequence[float] | None = None,
    *,
    unit: str,
    in_pixels: bool = False,
    needs: str | None = None,
) -> Callable[[Function], Function]:
    """Register a corruption; arguments are the attributes of `CorruptionKind`, and ``large`` is by default ``small``.

    Raises:
        ProbeError: the name is taken or not valid, the family is unknown, or there are not five positive strengths.

    Examples:
        >>> import layercrit
        >>> @layercrit.corruption("dimmed", "weather", small=(0.1, 0.2, 0.3, 0.4, 0.5), unit="what is taken away")
        ... def dimmed(images, strength, generator):
        ...     '''All pixels are darker by the same factor.'''
        ...     return images * (1 - strength)
    """
    strengths = tuple(small), tuple(small if large is None else large)
    if family not in FAMILIES:
        raise ProbeError(f"There is no family of corruptions {family!r}. {near(family, FAMILIES)}")
    if any(len(one) != len(SEVERITIES) or min(one) <= 0 for one in strengths):
        raise ProbeError(
            f"The corruption {name!r} must have {len(SEVERITIES)} positive strengths, one of each severity; got "
            f"{shown(small)}{'' if large is None else f' and {shown(large)}'}."
        )

    def register(function: Function) -> Function:
        CORRUPTIONS[name] = CorruptionKind(name, family, function, *strengths, unit, in_pixels, needs)
        return function

    return register


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption at one severity; as text, ``KIND@SEVERITY``.

    Attributes:
        kind: a name in `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).

    Raises:
        ProbeError: there is no such kind or severity, or a library is missing.
    """

    kind: str
    severity: int

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            raise ProbeError(f"There is no corruption {shown(self.kind)}. {CORRUPTIONS.hint(self.kind, limit=99)}")
        if isinstance(self.severity, bool) or self.severity not in SEVERITIES:
            raise ProbeError(
                f"The severity of a corruption is a whole number from 1 (weak) to 5 (strong); got "
                f"{shown(self.severity)} for {self.kind!r}. For images as they are, leave the corruption out."
            )
        needs = CORRUPTIONS[self.kind].needs
        if needs is not None and importlib.util.find_spec(needs) is None:
            raise ProbeError(
                f"The corruption {self.kind!r} requires the library {needs}. Install it: "
                "pip install 'layercrit[corrupt]' (with Python 3.11 or newer)."
            )

    def __str__(self) -> str:
        return f"{self.kind}@{self.severity}"

    def in_words(self) -> str:
        """Return kind, severity and the library that makes it, whose versions may differ."""
        needs = CORRUPTIONS[self.kind].needs
        library = "" if needs is None else f" ({needs} {metadata.version(needs)})"
        return f"{self.kind} at severity {self.severity}{library}"

    def __call__(self, pixels: Pixels, seed: int, name: str) -> Pixels:
        """Return the pixels ``(channels, height, width)`` of an image corrupted, uint8.

        Random numbers depend on ``seed``, on kind and severity and on the image's name alone: not on which other images
        there are, nor on their order.

        Args:
            pixels: those of the image.
            seed: of the probe set.
            name: of the image in its source.

        Raises:
            ProbeError: the corruption's function fails, or returns no image of the same size.
        """
        kind = CORRUPTIONS[self.kind]
        generator = torch.Generator().manual_seed(seed_of(seed, "corruption", self.kind, self.severity, name))
        # In float64: threads and processors may add in another order, and its errors are too small to move a value from
        # one 8-bit level to the next.
        image = torch.from_numpy(pixels.astype(np.float64) / 255)
        try:
            with torch.no_grad():
                changed = kind.function(image, kind.strength(self.severity, *pixels.shape[1:]), generator)
            if changed.shape != image.shape or not bool(torch.isfinite(changed).all()):
                raise ValueError(f"it returns {tuple(changed.shape)} with values that may be no numbers")
        except Exception as error:  # of a function that a user has registered
            raise ProbeError(
                f"The corruption '{self}' fails on '{name}' of {pixels.shape} (channels, height, width): "
                f"{first_line(error)}."
            ) from error
        return np.asarray((changed.clamp(0, 1) * 255).round().to(torch.uint8))


def split_corruption(source: str | Path) -> tuple[Corruption, str] | None:
    """Return the corruption that ``corrupt:KIND@SEVERITY:SOURCE`` begins with, and SOURCE; None for any other source.

    Raises:
        ProbeError: it begins with ``corrupt:``, but is not written like this, or kind or severity do not exist.
    """
    text = str(source)
    if not begins_with("corrupt", text):
        return None
    how, images = split_change("corrupt", text) or ("", "")
    kind, at, severity = how.partition("@")
    if not at:
        raise ProbeError(
            f"The images {text!r} are not written as corrupt:KIND@SEVERITY:SOURCE, such as "
            "'corrupt:gaussian_noise@3:imagenet/val'."
        )
    return Corruption(kind.strip(), int(severity) if severity.strip().isdecimal() else severity), images  # type: ignore[arg-type]  # refused there


# --- noise ------------------------------------------------------------------------------------------------------------


@corruption(
    "gaussian_noise", "noise", (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38),
    unit="standard deviation, for pixels in [0, 1]",
)  # fmt: skip
def gaussian_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Normal noise on every value, as in poor light."""
    return image + strength * torch.randn(image.shape, generator=generator, dtype=image.dtype)


@corruption(
    "shot_noise", "noise", (500, 250, 100, 75, 50), (60, 25, 12, 5, 3), unit="photons that a white pixel counts"
)
def shot_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Poisson noise: each value is a count of few photons."""
    return torch.poisson(image * strength, generator=generator) / strength


@corruption(
    "impulse_noise", "noise", (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), unit="share of values"
)
def impulse_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper: some values are set to 0 or 1."""
    chance = torch.rand(image.shape, generator=generator, dtype=image.dtype)
    return torch.where(chance < strength, (chance < strength / 2).to(image.dtype), image)


# --- blur -------------------------------------------------------------------------------------------------------------


@corruption(
    "gaussian_blur", "blur", (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6),
    unit="standard deviation in pixels", in_pixels=True,
)  # fmt: skip
def gaussian_blur(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Out of focus: a Gaussian filter."""
    from scipy import ndimage  # not above: every worker would wait for it

    # Outside, an image is what it is at its border, since a filter may be larger than the image.
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, strength, strength), mode="nearest"))


@corruption(
    "motion_blur", "blur", (2.0, 2.75, 3.5, 4.25, 5.0), (7, 11, 15, 19, 23),
    unit="length of the streak in pixels", in_pixels=True, needs="kornia",
)  # fmt: skip
def motion_blur(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The camera moves: a mean along a line, whose angle is drawn from -45 to 45 degrees."""
    angle = float(90 * torch.rand((), generator=generator, dtype=image.dtype) - 45)
    return _streaked(image, strength, angle)


@corruption(
    "zoom_blur", "blur", (1.05, 1.10, 1.15, 1.20, 1.25), (1.10, 1.15, 1.20, 1.25, 1.30),
    unit="largest zoom", needs="kornia",
)  # fmt: skip
def zoom_blur(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The camera moves closer: the mean of 11 zooms of the centre."""
    from kornia.geometry.transform import scale

    zooms = torch.linspace(1, strength, 11, dtype=image.dtype)
    zoomed: Tensor = scale(image.expand(11, *image.shape), torch.stack([zooms, zooms], 1), padding_mode="border")
    return zoomed.mean(0)


# --- weather ----------------------------------------------------------------------------------------------------------


@corruption(
    "fog", "weather", (0.2, 0.5, 0.75, 1.0, 1.5), (1.0, 1.5, 2.0, 2.5, 3.0),
    unit="brightest fog, for pixels in [0, 1]", needs="kornia",
)  # fmt: skip
def fog(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Light patches of a plasma fractal lie over the image, which loses contrast."""
    from kornia.contrib import diamond_square

    draw = functools.partial(torch.rand, generator=generator)
    shape = (1, 1, max(3, image.shape[1]), max(3, image.shape[2]))
    plasma: Tensor = diamond_square(shape, 0.6, 1.0, draw, normalize_range=(0.0, 1.0), dtype=image.dtype)
    clouds = plasma[0, :, : image.shape[1], : image.shape[2]]
    brightest = image.max()
    return (image + strength * clouds) * brightest / (brightest + strength)


@corruption(
    "snow", "weather", (0.01, 0.02, 0.03, 0.045, 0.06), (0.02, 0.03, 0.045, 0.06, 0.08),
    unit="share of the image that flakes cover", needs="kornia",
)  # fmt: skip
def snow(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Bright flakes fall through the image, which is whitened."""
    height, width = image.shape[1:]
    flake = max(1, round(min(height, width) / 80))  # side of a flake, in pixels
    cells = torch.rand((math.ceil(height / flake), math.ceil(width / flake)), generator=generator, dtype=image.dtype)
    angle = float(-90 + 60 * (torch.rand((), generator=generator, dtype=image.dtype) - 0.5))
    flakes = (cells < strength).to(image.dtype).repeat_interleave(flake, 0).repeat_interleave(flake, 1)
    falling = _streaked(flakes[None, :height, :width], max(2.0, 3.0 * flake), angle)
    grey = image.mean(0, keepdim=True)
    white = 3 * strength  # how far the whole image is whitened
    whitened = (1 - white) * image + white * torch.maximum(image, 1.5 * grey + 0.5)
    return whitened + falling


@corruption(
    "brightness", "weather", (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5),
    unit="what is added, for pixels in [0, 1]",
)  # fmt: skip
def brightness(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Glaring daylight: every value is raised by the same."""
    return image + strength


# --- digital ----------------------------------------------------------------------------------------------------------


@corruption(
    "contrast", "digital", (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05),
    unit="contrast that is left",
)  # fmt: skip
def contrast(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every value is drawn towards the mean of its channel."""
    mean = image.mean((1, 2), keepdim=True)
    return mean + strength * (image - mean)


@corruption(
    "elastic_transform", "digital", (0.2, 0.35, 0.5, 0.65, 0.8), (1.0, 1.5, 2.0, 2.5, 3.0),
    unit="root mean square displacement in pixels", in_pixels=True, needs="kornia",
)  # fmt: skip
def elastic_transform(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Small regions are stretched and squeezed: a smooth random displacement."""
    from kornia.geometry.transform import elastic_transform2d

    height, width = image.shape[1:]
    smooth = max(1.0, min(height, width) / 40)  # standard deviation of the Gaussian filter, in pixels
    noise = 2 * torch.rand((1, 2, height, width), generator=generator, dtype=image.dtype) - 1
    after = math.sqrt(1 / 3) / (2 * math.sqrt(math.pi) * smooth)  # root mean square of the filtered noise
    across = 2 * strength / after / width, 2 * strength / after / height  # an image is 2 wide there
    size = 2 * math.ceil(3 * smooth) + 1
    warped: Tensor = elastic_transform2d(
        image[None], noise, (size, size), (smooth, smooth), across, padding_mode="reflection"
    )
    return warped[0]


@corruption("pixelate", "digital", (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), unit="scale")
def pixelate(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The image is reduced and enlarged again, both without smoothing."""
    whole = _as_picture(image)
    reduced = max(1, int(whole.width * strength)), max(1, int(whole.height * strength))
    box = Image.Resampling.BOX
    return _as_image(whole.resize(reduced, box).resize(whole.size, box))


@corruption("jpeg_compression", "digital", (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), unit="quality, of 100")
def jpeg_compression(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The image is stored as a small JPEG file, and read again."""
    file = io.BytesIO()
    _as_picture(image).save(file, "JPEG", quality=round(strength))
    with Image.open(file, formats=["JPEG"]) as picture:
        return _as_image(picture)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _streaked(image: Tensor, length: float, angle: float) -> Tensor:
    """Return the mean along lines of ``length`` pixels at ``angle`` degrees, an image ``(channels, height, width)``."""
    from kornia.filters import get_motion_kernel2d
    from scipy import ndimage

    longer = 2 * math.ceil((max(length, 1) - 1) / 2) + 1  # lines of an odd number of pixels, the next longer one
    if longer == 1:
        return image
    kernel = get_motion_kernel2d(longer, angle, mode="bilinear")[0].double()
    kernel = kernel / kernel.sum()
    shorter = torch.zeros_like(kernel)
    if longer == 3:
        shorter[1, 1] = 1
    else:
        inner = get_motion_kernel2d(longer - 2, angle, mode="bilinear")[0].double()
        shorter[1:-1, 1:-1] = inner / inner.sum()
    share = (longer - length) / 2  # of the shorter line
    weights = (share * shorter + (1 - share) * kernel).numpy()
    # SciPy's, which leaves out the zeros around the line, and does so in float64.
    return torch.from_numpy(np.stack([ndimage.correlate(one, weights, mode="nearest") for one in image.numpy()]))


def _as_picture(image: Tensor) -> Image.Image:
    """Return an image ``(channels, height, width)`` in [0, 1] as Pillow's, grey or RGB."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy().transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _as_image(picture: Image.Image) -> Tensor:
    """Return a grey or RGB picture as an image ``(channels, height, width)`` in [0, 1], float64."""
    pixels = np.asarray(picture, np.float64) / 255
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


def about_corruptions(corruptions: Sequence[Corruption], height: int, width: int, n_unchanged: int) -> list[str]:
    """Return what the user should know about corrupted images, in words."""
    if not corruptions:
        return []
    listed = ", then ".join(one.in_words() for one in corruptions)
    note = f"the images are corrupted at the size of {height} x {width} pixels: {listed}"
    return [note + (f"; {n_unchanged} of them came out unchanged" if n_unchanged else "")]
