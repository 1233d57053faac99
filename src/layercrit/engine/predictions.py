"""What the trained network itself predicts: accuracy, chance level, and the temperature that matches its entropy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from layercrit.distances import label_scores
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.replay import Replay
from layercrit.errors import ModelError
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.shown_images import pack_classes, unpack_classes
from layercrit.statistics import ChanceLevel, fit_temperature, p_of_guessing

__all__ = ["MATCHED_ENTROPY", "Predictions", "predict", "scores_of"]

MATCHED_ENTROPY = 0.1  # of the largest possible entropy, ln(n_classes): what the matched temperature aims at
_ALIKE = 0.99  # mean cosine between predictions for different images from which a network knows no images apart
_TEMPERATURE_IMAGES = 512
_SURELY = 0.05  # level of the test that a network is better than guessing
_COLUMN_OF_SCORE = {"loss": "loss", "top1": "top1_accuracy", "top5": "top5_accuracy"}


@dataclass(frozen=True)
class Predictions:
    """What the trained network itself predicts.

    Attributes:
        n_classes: how many classes it has.
        temperature: at which its mean entropy is ``matched_entropy``; None where there is none.
        matched_entropy: in nats.
        chance: mean cosine between predictions for different images, in [0, 1]; None for a single image.
        top1_accuracy: share of images whose label is the most probable class; None without labels.
        loss: mean cross-entropy in nats; None without labels.
        guessing_accuracy: top-1 accuracy of guessing: always the largest class of the images, or any one of the
            classes; None without labels.
        p_guessing: probability that guessing is as accurate as the network or more; None without labels, or with so
            few images that even guessing may name them all right.
        classes: the most probable class of each image, ``(n_images,)``; None where an earlier version of layercrit
            kept none.
    """

    n_classes: int
    temperature: float | None
    matched_entropy: float
    chance: float | None
    top1_accuracy: float | None
    loss: float | None
    guessing_accuracy: float | None = None
    p_guessing: float | None = None
    classes: npt.NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, classes as `pack_classes` writes them."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"classes": None if self.classes is None else pack_classes(self.classes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Predictions":
        """Return what `to_dict` was called on."""
        classes = values.get("classes")
        return cls(**{**values, "classes": None if classes is None else unpack_classes(classes)})

    def warnings(self) -> list[str]:
        """Return what puts the whole measurement in doubt, in words; empty if nothing does."""
        if self.p_guessing is None or self.p_guessing <= _SURELY:
            return []
        return [
            f"top-1 accuracy {self.top1_accuracy:.1%} is no better than guessing ({self.guessing_accuracy:.1%}; exact "
            f"binomial test, p = {self.p_guessing:.2g}), so these numbers may not be about what the network learned. "
            "Check that the labels are the model's class numbers, that image size and normalisation (mean, std) are "
            "those of its training, and that its weights are trained"
        ]


def predict(
    holder: ReplayHolder,
    probe_set: ProbeSet,
    labels: npt.NDArray[np.int64] | None,
    *,
    model: str,
    notes: list[str],
    bar: Bar,
) -> Predictions:
    """Run the trained network on all images.

    Args:
        holder: runs it.
        probe_set: the images; all of them count for the chance level and the accuracy.
        labels: ``(n_images,)``, class numbers of the network, or None.
        model: the model's reference, for errors.
        notes: gets what a reader has to know about the predictions.
        bar: shows how many images are done.

    Raises:
        ModelError: some predictions are NaN or infinite.
    """
    n_images = probe_set.n_images
    first: list[Tensor] = []
    chance = ChanceLevel()
    scores: dict[str, list[npt.NDArray[np.float32]]] = {}
    classes: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < n_images:
        logits = holder.run(partial(_logits, holder=holder, probe_set=probe_set, model=model, start=start))
        if start < _TEMPERATURE_IMAGES:
            first.append(logits)
        chance.add(logits.softmax(dim=1))
        classes.append(logits.argmax(dim=1).cpu().numpy())
        if labels is not None:
            for name, values in scores_of(logits, labels[start : start + len(logits)]).items():
                scores.setdefault(name, []).append(values.cpu().numpy())
        start += len(logits)
        bar.predicted(start, n_images)
    if chance.value > _ALIKE:
        notes.append(
            f"predictions hardly differ from image to image (mean cosine {chance.value:.4f}), like those of an "
            "untrained network: criticality then means little"
        )
    means = {name: _finite(np.concatenate(parts).mean(dtype=np.float64)) for name, parts in scores.items()}
    n_classes = first[0].shape[1]
    entropy = MATCHED_ENTROPY * math.log(n_classes)
    temperature = fit_temperature(torch.cat(first)[:_TEMPERATURE_IMAGES], entropy)
    if math.isnan(temperature):
        notes.append(
            "no temperature gives these predictions the target entropy (are they constant?): "
            "nothing is temperature-matched"
        )
    return Predictions(
        n_classes=n_classes,
        temperature=_finite(temperature),
        matched_entropy=entropy,
        chance=_finite(chance.value),
        top1_accuracy=means.get("top1_accuracy"),
        loss=means.get("loss"),
        classes=np.concatenate(classes),
        **_against_guessing(means.get("top1_accuracy"), labels, n_classes),
    )


def _against_guessing(
    accuracy: float | None, labels: npt.NDArray[np.int64] | None, n_classes: int
) -> dict[str, float | None]:
    """Compare a top-1 accuracy with that of guessing."""
    if accuracy is None or labels is None:
        return {}
    counts = np.unique(labels, return_counts=True)[1]
    # images of one class only do not tell a network that knows it from one that always names it
    largest = counts.max() / len(labels) if len(counts) > 1 else 0.0
    share = max(1 / n_classes, float(largest))
    if p_of_guessing(len(labels), len(labels), share) > _SURELY:
        return {"guessing_accuracy": share}  # so few images that not even naming all of them right would tell
    p = p_of_guessing(round(accuracy * len(labels)), len(labels), share)
    return {"guessing_accuracy": share, "p_guessing": p}


def scores_of(logits: Tensor, labels: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    """Return column -> ``(n_images,)`` of logits ``(n_images, n_classes)`` and labels ``(n_images,)``."""
    wanted = torch.tensor(labels, device=logits.device)
    return {_COLUMN_OF_SCORE[name]: values for name, values in label_scores(logits, wanted).items()}


def _logits(replay: Replay, holder: ReplayHolder, probe_set: ProbeSet, model: str, start: int) -> Tensor:
    images, n = holder.batch(start)
    logits = replay.logits(images)[:n].float()
    bad = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"{model!r} itself predicts NaN or infinity for {len(bad)} of {len(logits)} "
            f"images; the first is {probe_set.names[start + bad[0]]!r}. {_way_out(holder.network)}"
        )
    return logits


def _way_out(network: nn.Module) -> str:
    """Return what to do about a network whose predictions are NaN or infinite."""
    broken = [name for name, tensor in network.named_parameters() if not bool(tensor.isfinite().all())]
    broken += [name for name, tensor in network.named_buffers() if bool(tensor.isnan().any())]  # masks are infinite
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return (
            f"There are such values in its weights: {', '.join(broken[:3])}{more}. Its training failed, or its file is "
            "damaged: take the weights of an earlier epoch, or another file."
        )
    return "Check its normalisation (mean, std)."


def _finite(number: float) -> float | None:
    """Return a number as JSON can hold it."""
    return float(number) if math.isfinite(number) else None
