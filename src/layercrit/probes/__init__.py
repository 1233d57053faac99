"""The images that a model is shown: sources, preprocessing, and the probe set drawn from them."""

from layercrit.probes.images import Preprocessing
from layercrit.probes.kinds import IMAGE_SOURCES, image_source
from layercrit.probes.probe_set import MEMORY_LIMIT, ProbeOptions, ProbeSet, Progress
from layercrit.probes.sources import ArraySource, FolderSource, ImageSource, Item

__all__ = [
    "IMAGE_SOURCES",
    "MEMORY_LIMIT",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "Item",
    "Preprocessing",
    "ProbeOptions",
    "ProbeSet",
    "Progress",
    "image_source",
]
