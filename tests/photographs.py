"""Real photographs, those that scikit-image ships, and pieces of them as image files."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

FOLDER = Path(skimage.__file__).parent / "data"
NAMES = [name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg") if (FOLDER / name).is_file()]


@cache
def photograph(name: str = NAMES[0]) -> Image.Image:
    return Image.open(FOLDER / name).convert("RGB")


def piece(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A part of a photograph, another one for each number."""
    whole = photograph(NAMES[number % len(NAMES)])
    left, top = (number * 37) % (whole.width - width), (number * 23) % (whole.height - height)
    return whole.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def pieces(n_images: int, size: int = 16) -> np.ndarray:
    """``(n_images, size, size, 3)`` uint8."""
    return np.stack([np.asarray(piece(number, size, size)) for number in range(n_images)])
