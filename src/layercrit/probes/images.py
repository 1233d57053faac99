"""From one image, given as a file, bytes or an array, to the uint8 pixels that a model is shown."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from layercrit.errors import ProbeError, near
from layercrit.foreign_files import read_regular
from layercrit.probes.bounds import LARGEST_IMAGE

__all__ = [
    "FORMATS",
    "STANDARD",
    "SUFFIXES",
    "CropOffset",
    "Interpolation",
    "Pixels",
    "Preprocessing",
    "decoded",
    "decoded_bytes",
    "open_image",
    "read_header",
]

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropOffset = Literal["rounded", "rounded down"]

# Only plain raster formats: Pillow also knows formats that start other programs (EPS) or read other files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the uint8 array that a model is shown: convert, resize, crop.

    The bits are those of torchvision's ``ImageClassification`` preset and of timm's evaluation transform
    (``create_transform(is_training=False)``) before they turn pixels into floats. Their ``crop_pct`` is
    ``resize = floor(height / crop_pct)`` here, timm's ``crop_mode="squash"`` a ``resize`` of two numbers. timm's
    ``crop_mode="border"`` and its centre mode for models that are not square have no counterpart.

    As in both libraries, the EXIF orientation is not applied, an alpha channel is dropped, and colours become grey by
    ITU-R 601-2 luma before anything is resized. Unlike them, 16-bit grey images keep their high byte instead of being
    clipped at 255.

    Attributes:
        channels: 3 for RGB, 1 for grey.
        height: of the result, in pixels.
        width: of the result, in pixels.
        resize: length of the shorter side after resizing (the aspect ratio stays), or ``(height, width)`` to squash
            the image to exactly that, or None for no resize.
        interpolation: Pillow's filter of that name, with its antialiasing.
        crop: whether to crop the central ``(height, width)`` of the resized image; a smaller image is padded with black
            on both sides.
        crop_offset: how half of the pixels too many gives the first row and column: ``rounded`` (half to even) as in
            torchvision and timm, ``rounded down`` as in transformers. They differ by one where 3, 7, 11, ... pixels
            are too many.

    Raises:
        ProbeError: the settings contradict each other or are out of range.
    """

    channels: int = 3
    height: int = 224
    width: int = 224
    resize: int | tuple[int, int] | None = 256
    interpolation: Interpolation = "bilinear"
    crop: bool = True
    crop_offset: CropOffset = "rounded"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ProbeError(f"channels must be 3 (RGB) or 1 (grey); got {self.channels}.")
        resize = self.resize if isinstance(self.resize, tuple) else (self.resize or 1,)
        if min(self.height, self.width, *resize) < 1 or self.resize == 0:
            raise ProbeError(
                f"Image sizes must be positive; got height {self.height}, width {self.width}, resize {self.resize}."
            )
        if self.interpolation not in get_args(Interpolation):
            raise ProbeError(
                f"Unknown interpolation {self.interpolation!r}. {near(self.interpolation, get_args(Interpolation))}"
            )
        if self.crop_offset not in get_args(CropOffset):
            raise ProbeError(
                f"Unknown crop_offset {self.crop_offset!r}. {near(self.crop_offset, get_args(CropOffset))}"
            )
        if not self.crop and self.resize not in (None, (self.height, self.width)):
            raise ProbeError(
                f"Without a crop, resize={self.resize} does not give {self.height} x {self.width} pixels. "
                f"Use resize=({self.height}, {self.width}), or crop=True."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def settings(self) -> dict[str, Any]:
        """Return the attributes by name, without a ``crop_offset`` of ``rounded``: former records have none."""
        return {name: value for name, value in vars(self).items() if (name, value) != ("crop_offset", "rounded")}

    def __call__(self, image: Image.Image) -> Pixels:
        """Return the pixels of ``image``, shape ``(channels, height, width)``.

        Raises:
            ValueError: the image cannot be used: its pixels are floats or 32-bit integers, it has a size other than
                the model's and nothing here changes it, or it would grow beyond ``PIL.Image.MAX_IMAGE_PIXELS``
                or ``LARGEST_IMAGE`` bytes.
            OSError: Pillow finds the image damaged while it decodes it.
        """
        resized = self._resized(self._converted(image))
        pixels = np.asarray(resized).reshape(resized.height, resized.width, self.channels)
        return np.ascontiguousarray(self._cropped(pixels).transpose(2, 0, 1))  # (channels, height, width)

    def at_size(self, image: Image.Image) -> Pixels:
        """Return the pixels of ``image``, already ``(height, width)``, with only its channels converted."""
        pixels = np.asarray(self._converted(image)).reshape(self.height, self.width, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (channels, height, width)

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size are shown as they are, neither resized nor cropped."""
        return (height, width) == self._size_after(height, width) == (self.height, self.width)

    def _converted(self, image: Image.Image) -> Image.Image:
        if image.mode == "F":
            raise ValueError("its pixels are floats, whose range no image format defines")
        if image.mode.startswith("I"):
            wide = np.asarray(image)  # (height, width), 16 bits, in 32 where Pillow knows no better
            if wide.min() < 0 or wide.max() > 0xFFFF:
                raise ValueError("its pixels are 32-bit integers, whose range no image format defines")
            image = Image.fromarray((wide >> 8).astype(np.uint8))
        mode = "RGB" if self.channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self._size_after(image.height, image.width)
        if height * width > min(LARGEST_IMAGE // 4, Image.MAX_IMAGE_PIXELS or LARGEST_IMAGE):
            raise ValueError(f"{image.height} x {image.width} pixels would be resized to {height} x {width}")
        if (width, height) == image.size:
            return image
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def _size_after(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image of this size is resized."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        longer = int(self.resize * max(height, width) / min(height, width))  # rounded down, as torchvision does
        return (longer, self.resize) if height >= width else (self.resize, longer)

    def _cropped(self, pixels: Pixels) -> Pixels:
        """Return the centre of ``pixels (height, width, channels)``, with zeros around it where it is too small."""
        if pixels.shape[:2] == (self.height, self.width):
            return pixels
        if not self.crop:
            raise ValueError(f"{pixels.shape[0]} x {pixels.shape[1]} pixels, not {self.height} x {self.width}")
        rows, target_rows = _centre(pixels.shape[0], self.height, self.crop_offset)
        columns, target_columns = _centre(pixels.shape[1], self.width, self.crop_offset)
        cropped = np.zeros((self.height, self.width, self.channels), np.uint8)
        cropped[target_rows, target_columns] = pixels[rows, columns]
        return cropped


STANDARD = Preprocessing()


def _centre(length: int, wanted: int, offset: CropOffset) -> tuple[slice, slice]:
    """Return which part of an axis of ``length`` goes to which part of an axis of ``wanted``, padded as torchvision."""
    if length >= wanted:
        half = (length - wanted) / 2
        start = round(half) if offset == "rounded" else int(half)
        return slice(start, start + wanted), slice(0, wanted)
    start = (wanted - length) // 2
    return slice(0, length), slice(start, start + length)


def read_header(encoded: bytes | Path) -> Image.Image:
    """Return what ``open_image`` does, with its pixels not decoded yet.

    Raises:
        ValueError: it is in none of ``FORMATS``, or takes more than ``LARGEST_IMAGE`` bytes as a file or decoded.
        OSError: the file cannot be read, or is no regular file.
        PIL.Image.DecompressionBombError: It has more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
    """
    content = encoded if isinstance(encoded, bytes) else read_regular(encoded, LARGEST_IMAGE)
    if len(content) > LARGEST_IMAGE:
        raise ValueError(f"it has {len(content):,} bytes, more than {LARGEST_IMAGE:,}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address, which would differ from run to run.
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    if (n_bytes := decoded_bytes(image)) > LARGEST_IMAGE:  # where the user has raised Pillow's own limit
        raise ValueError(f"{image.width} x {image.height} pixels would take {n_bytes:,} bytes, over {LARGEST_IMAGE:,}")
    return image


def decoded_bytes(image: Image.Image) -> int:
    """Return how many bytes the pixels of an image take in Pillow, decoded or not."""
    return image.width * image.height * (1 if image.mode in ("1", "L", "P") else 4)  # of which RGB leaves one unused


def decoded(image: Image.Image) -> Image.Image:
    """Return an image of ``read_header`` with its pixels decoded.

    Raises:
        OSError: it is damaged or truncated.
    """
    image.load()
    # What a transparent colour is does not matter without alpha; kept, converting it warns.
    image.info.pop("transparency", None)
    return image


def open_image(encoded: bytes | Path) -> Image.Image:
    """Decode a whole image file, so that damage shows here and not later.

    Args:
        encoded: the bytes of a file in one of ``FORMATS`` (found by content, not by suffix), or its path. Of several
            frames, the first is used.

    Raises:
        ValueError: the bytes are in none of these formats, or take more than ``LARGEST_IMAGE`` as a file or decoded.
        OSError: the file cannot be read, is no regular file, or is damaged or truncated.
        PIL.Image.DecompressionBombError: It has more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
    """
    return decoded(read_header(encoded))
