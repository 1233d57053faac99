"""One opened model and one probe set, ready to run trials: what the model predicts after each reset."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layercrit.distances import measure_distances
from layercrit.engine.dependence import check_dependence
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.predictions import Predictions, predict, scores_of
from layercrit.engine.replay import Mode, PlainReplay, Replay
from layercrit.engine.subject import Subject
from layercrit.layers import Layer
from layercrit.machine import is_out_of_memory
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import MATCHED, Protocol

__all__ = ["Batch", "Session", "Trial"]


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
        labels: ``(n_images,)``, class numbers of the network, or None.
        predictions: what the trained network predicts.
        notes: what the user should know, in words.
        holder: opens and keeps the replay.

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
        self.labels, about_labels = probe_set.labels_for(subject.model.n_classes) if use_labels else (None, [])
        self.notes = [*subject.notes(), *probe_set.notes, *about_labels]
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
        subject.check_draws()
        self._check_dependence()
        if predictions is None:
            predictions = predict(
                self.holder, probe_set, self.labels, model=subject.model.reference, notes=self.notes, bar=bar
            )
        self.predictions = predictions
        self._temperature = math.nan if predictions.temperature is None else predictions.temperature

    def _check_dependence(self) -> None:
        """Make sure that predictions depend on their image alone, where four images fit into memory."""
        plain = PlainReplay(self.subject.network, [], read_logits=self.subject.model.read_logits)
        try:
            images = self.subject.normalise(self.probe_set.batch(0, 4))
            check_dependence(plain, images, self.subject.model.reference)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.notes.append("not checked for lack of memory: whether a prediction depends on its image alone")

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

    # --- resets -----------------------------------------------------------------------------------------------------

    def run_batch(self, trial: "Trial", start: int) -> Batch:
        """Run the resets of a trial on the images from ``start`` on, as many as fit into a batch."""
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
            rows.append(row | scores_of(after, self.labels, start))
        values = {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
        return Batch(start, start + n, values)


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
