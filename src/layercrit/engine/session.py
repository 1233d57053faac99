"""One opened model and one probe set, ready to run trials: what it predicts, then what it predicts after each reset."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layercrit.distances import label_scores, measure_distances
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.replay import Mode, Replay
from layercrit.engine.subject import Subject
from layercrit.errors import ModelError
from layercrit.layers import Layer
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import MATCHED, Protocol
from layercrit.statistics import ChanceLevel, fit_temperature

__all__ = ["MATCHED_ENTROPY", "Batch", "Predictions", "Session", "Trial"]

MATCHED_ENTROPY = 0.1  # of the largest possible entropy, ln(n_classes): what the matched temperature aims at
_ALIKE = 0.99  # mean cosine between predictions for different images from which a network knows no images apart
_TEMPERATURE_IMAGES = 512
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
    """

    n_classes: int
    temperature: float | None
    matched_entropy: float
    chance: float | None
    top1_accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class Batch:
    """What the resets of one trial did to images ``start`` to ``stop``.

    Attributes:
        start: the first image's position in the probe set.
        stop: the position after the last image's.
        per_image: name of a distance or score -> ``(n_layers, n_images)``, float32, layers in the order of the trial.
    """

    start: int
    stop: int
    per_image: Mapping[str, npt.NDArray[np.float32]]


class Session:
    """One opened model and one probe set.

    Attributes:
        subject: the network, its layers and what is drawn for them.
        probe_set: the images.
        predictions: what the trained network predicts.
        notes: what the user should know, in words.
        holder: holds the replay.

    Args:
        protocol: how to measure.
        subject: as above.
        probe_set: as above.
        distances: names of the distances to measure.
        use_labels: whether to use the labels of the probe set.
        bar: shows the progress.
        mode: the replay's mode, where an earlier session with the same protocol chose it.
        predictions: those of an earlier session with the same model, probe set and mode.
    """

    def __init__(
        self,
        protocol: Protocol,
        subject: Subject,
        probe_set: ProbeSet,
        distances: list[str],
        use_labels: bool,
        bar: Bar,
        *,
        mode: Mode | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        self.subject, self.probe_set, self.distances = subject, probe_set, distances
        self.labels = probe_set.labels if use_labels else None
        self.notes = subject.notes()
        self.holder = ReplayHolder(
            subject,
            probe_set,
            dtype=protocol.dtype,
            batch_size=protocol.batch_size,
            mode=mode,
            notes=self.notes,
            say=bar.say,
        )
        self._bar = bar
        if predictions is None:
            predictions = self._predict()
        self.predictions = predictions
        self._temperature = math.nan if predictions.temperature is None else predictions.temperature

    def trial(self, trial: int, layers: list[Layer] | None = None) -> "Trial":
        """Draw the new values of one trial.

        Args:
            trial: which, from 0.
            layers: those to reset; all of the subject by default.
        """
        return Trial(self, trial, self.subject.layers if layers is None else layers)

    def means(self, values: Mapping[str, npt.NDArray[np.float32]], index: int, status: str) -> dict[str, float]:
        """Return the mean over images of everything measured for one layer of a trial; NaN unless it is ok.

        Args:
            values: name -> ``(n_layers, n_images)``, all images of the probe set.
            index: the layer's position in ``values``.
            status: the cell's.
        """
        means = {
            name: float(found[index].mean(dtype=np.float64)) if status == "ok" else math.nan
            for name, found in values.items()
        }
        if self.labels is not None:
            means["recovered_accuracy"] = means["top1_accuracy"] / (self.predictions.top1_accuracy or math.nan)
        return means

    # --- the trained network ----------------------------------------------------------------------------------------

    def _predict(self) -> Predictions:
        """Run the trained network on all images."""
        n_images = self.probe_set.n_images
        first: list[Tensor] = []
        chance = ChanceLevel()
        scores: dict[str, list[npt.NDArray[np.float32]]] = {}
        start = 0
        while start < n_images:
            logits = self.holder.run(partial(self._logits, start=start))
            if start == 0 and self.labels is not None:
                self.probe_set.check_labels(logits.shape[1])
            if start < _TEMPERATURE_IMAGES:
                first.append(logits)
            chance.add(logits.softmax(dim=1))
            for name, values in self._label_scores(logits, start).items():
                scores.setdefault(name, []).append(values.cpu().numpy())
            start += len(logits)
            self._bar.predicted(start, n_images)
        if chance.value > _ALIKE:
            self.notes.append(
                f"predictions hardly differ from image to image (mean cosine {chance.value:.4f}), like those of an "
                "untrained network: criticality then means little"
            )
        means = {name: _finite(np.concatenate(parts).mean(dtype=np.float64)) for name, parts in scores.items()}
        n_classes = first[0].shape[1]
        entropy = MATCHED_ENTROPY * math.log(n_classes)
        temperature = fit_temperature(torch.cat(first)[:_TEMPERATURE_IMAGES], entropy)
        if math.isnan(temperature):
            self.notes.append(
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
        )

    def _logits(self, replay: Replay, start: int) -> Tensor:
        images, n = self.holder.batch(start)
        logits = replay.logits(images)[:n].float()
        bad = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"{self.subject.model.reference!r} itself predicts NaN or infinity for {len(bad)} of {len(logits)} "
                f"images; the first is {self.probe_set.names[start + bad[0]]!r}. "
                "Check its normalisation (mean, std), or use --dtype float32 (dtype='float32')."
            )
        return logits

    # --- resets -----------------------------------------------------------------------------------------------------

    def run_batch(self, trial: "Trial", start: int) -> Batch:
        """Run the resets of a trial on the images from ``start`` on, as many as a batch holds."""
        return self.holder.run(partial(self._run_batch, trial=trial, start=start))

    def _run_batch(self, replay: Replay, trial: "Trial", start: int) -> Batch:
        images, n = self.holder.batch(start)
        logits = {}
        prepared = trial.prepared(replay)
        for name, found in replay.sweep(images, prepared):
            logits[name] = found[:n].float()
            done = trial.trial * self.probe_set.n_images + start + n * len(logits) / (len(prepared) + 1)
            self._bar.measured(done, self.subject.n_trials * self.probe_set.n_images)
        before = logits[None]
        p, p_matched = before.softmax(dim=1), (before / self._temperature).softmax(dim=1)
        rows = []
        for layer in trial.layers:
            after = logits.get(layer.name, before)
            row = measure_distances(p, after.softmax(dim=1), self.distances)
            matched = measure_distances(p_matched, (after / self._temperature).softmax(dim=1), ["cosine"])
            row[MATCHED] = matched["cosine"]
            rows.append(row | self._label_scores(after, start))
        values = {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
        return Batch(start, start + n, values)

    def _label_scores(self, logits: Tensor, start: int) -> dict[str, Tensor]:
        """Return column -> ``(n_images,)`` of logits ``(n_images, n_classes)``; nothing without labels."""
        if self.labels is None:
            return {}
        labels = torch.tensor(self.labels[start : start + len(logits)], device=logits.device)
        return {_COLUMN_OF_SCORE[name]: values for name, values in label_scores(logits, labels).items()}


class Trial:
    """One random draw for some layers of a session's model.

    Attributes:
        trial: which, from 0.
        seed: the trial's seed, in [0, 2^64).
        layers: what is reset, in depth order.
        delta_norm: Euclidean norm of new minus trained values, for each layer; 0 where the reset changes nothing.
    """

    def __init__(self, session: Session, trial: int, layers: list[Layer]) -> None:
        self.trial, self.layers = trial, layers
        self.seed = session.subject.seed(trial)
        self._session = session
        self._changes = list(session.subject.changes(trial, layers))
        self.delta_norm = [change.delta_norm for change in self._changes]
        self._prepared: tuple[Replay, dict[str, Any]] | None = None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Run all resets on the images from ``start`` on, batch by batch."""
        while start < self._session.probe_set.n_images:
            batch = self._session.run_batch(self, start)
            yield batch
            start = batch.stop

    def prepared(self, replay: Replay) -> dict[str, Any]:
        """Return what the replay's sweep takes, made once for each replay."""
        if self._prepared is None or self._prepared[0] is not replay:
            self._prepared = None  # frees what belonged to the replay before
            made = {c.layer.name: replay.prepare(c.layer, c.values) for c in self._changes if c.delta_norm != 0}
            self._prepared = (replay, made)
        return self._prepared[1]

    def forget(self) -> None:
        """Free the drawn values; the trial is over."""
        self._changes, self._prepared = [], None

    def status(self, cosine: npt.NDArray[np.float32]) -> list[str]:
        """Return each layer's status, given its distances ``(n_layers, n_images)``."""
        return [
            "unchanged" if norm == 0 else "ok" if np.isfinite(row).all() else "not_finite"
            for norm, row in zip(self.delta_norm, cosine, strict=True)
        ]


def _finite(number: float) -> float | None:
    """Return a number as JSON can hold it."""
    return float(number) if math.isfinite(number) else None
