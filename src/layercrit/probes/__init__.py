"""The images that a model is shown: sources, preprocessing, and the probe set drawn from them."""

from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import MEMORY_LIMIT, ProbeOptions, ProbeSet, Progress

__all__ = ["MEMORY_LIMIT", "Preprocessing", "ProbeOptions", "ProbeSet", "Progress"]
