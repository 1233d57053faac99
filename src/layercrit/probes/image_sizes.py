"""The size that all images of a source have, if they have one."""

import numpy as np
from PIL import Image

from layercrit.probes.images import open_image
from layercrit.probes.sources import ImageSource, Item

__all__ = ["common_size"]

_LOOKED_AT = 16  # images, decoded once more later


def common_size(source: ImageSource) -> tuple[int, int] | None:
    """Return ``(height, width)`` in pixels of images spread evenly over a source; None if they differ.

    Images that cannot be read are left out.
    """
    places = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).round().astype(int)).tolist()
    sizes = {_size(item) for item in source.read(places)} - {None}
    return sizes.pop() if len(sizes) == 1 else None


def _size(item: Item) -> tuple[int, int] | None:
    content = item.content
    if isinstance(content, Exception):
        return None
    if isinstance(content, np.ndarray):
        return content.shape[0], content.shape[1]
    try:
        image = content if isinstance(content, Image.Image) else open_image(content)
    except Exception:  # decoders answer damaged files with errors of almost any type; it is skipped later
        return None
    return image.height, image.width
