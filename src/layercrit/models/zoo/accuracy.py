"""Whether the weights of a zoo entry reach the accuracy that is documented for them."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from layercrit.errors import ZooError
from layercrit.machine import choose_batch_size, find_device
from layercrit.models.zoo.entries import ZooEntry
from layercrit.models.zoo.fetching import find_entry, open_entry
from layercrit.probes.probe_set import ProbeSet
from layercrit.restoring import undisturbed

__all__ = ["AccuracyCheck", "check_accuracy"]

_Z = 1.959963984540054  # normal quantile of two-sided 95 %


@dataclass(frozen=True)
class AccuracyCheck:
    """The accuracy of an entry on labelled images, next to the documented one.

    Attributes:
        id: the entry's identifier.
        n_images: how many images were classified.
        top1_accuracy: share in [0, 1] of images whose label has the largest logit.
        low: lower end of the 95 % Wilson interval of ``top1_accuracy``.
        high: upper end.
        documented_accuracy: see `ZooEntry`.
        verdict: "agrees" if the documented accuracy lies in the interval, else "differs"; "undocumented" without one.
    """

    id: str
    n_images: int
    top1_accuracy: float
    low: float
    high: float
    documented_accuracy: float | None
    verdict: str


@undisturbed()
def check_accuracy(
    entry: ZooEntry | str,
    images: Any,
    *,
    n_images: int | None = 10_000,
    batch_size: int | str = "auto",
    device: str = "auto",
) -> AccuracyCheck:
    """Compare the top-1 accuracy of an entry's weights on labelled images with the documented one.

    The interval is Wilson's score interval (1927), which is valid near 0 and 1 too.

    Args:
        entry: what to check, or its identifier; its weights must have been downloaded.
        images: anything that `ProbeSet.from_source` takes, with labels.
        n_images: how many to draw; None for all.
        batch_size: how many to classify at once.
        device: where the network runs.

    Raises:
        LayercritError: the weights or the images cannot be used.
    """
    if isinstance(entry, str):
        entry = find_entry(entry)
    model = open_entry(entry, {})
    probe_set = ProbeSet.from_source(images, model.preprocessing, n_images=n_images)
    known, notes = probe_set.labels_for(model.n_classes)
    if known is None:
        raise ZooError(
            f"{probe_set.source} has no labels, so no accuracy can be computed. Give a folder with one subfolder per "
            "class, named by WordNet id or number, or another source with labels."
            + "".join(f" Note: {note}." for note in (*probe_set.notes, *notes))
        )
    where = find_device(device)
    classifier = model.classifier.to(where)
    size = probe_set.preprocessing
    step = choose_batch_size(batch_size, probe_set.n_images, size.height, size.width, where)
    labels = torch.tensor(known)
    n_right = 0
    with torch.inference_mode():
        for start in range(0, probe_set.n_images, step):
            found = classifier(probe_set.batch(start, start + step).to(where)).argmax(dim=1).cpu()  # (n_images,)
            n_right += int((found == labels[start : start + step]).sum())
    low, high = _wilson(n_right, probe_set.n_images)
    documented = entry.documented_accuracy
    verdict = "undocumented" if documented is None else "agrees" if low <= documented <= high else "differs"
    share = n_right / probe_set.n_images
    return AccuracyCheck(entry.id, probe_set.n_images, share, low, high, documented, verdict)


def _wilson(n_right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share."""
    share, z2 = n_right / n, _Z**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
