"""Real photographs, those that scikit-image ships, and pieces of them as image files."""

import io
import struct
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


def write_fashion_mnist(root: Path, n_images: int = 6) -> tuple[np.ndarray, list[int]]:
    """Write both splits in the raw format of IDX files; return the pixels and labels of the test split."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = pieces(2 * n_images, 28)[..., 0], [number % 10 for number in range(2 * n_images)]
    for split, part in [("train", slice(0, n_images)), ("t10k", slice(n_images, None))]:
        header = struct.pack(">IIII", 0x803, n_images, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images[part].tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n_images) + bytes(labels[part]))
    return images[n_images:], labels[n_images:]
