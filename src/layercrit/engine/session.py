"""One opened model and one probe set, ready to run trials: what the model predicts after each reset."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layercrit.distances import measure_distances
from layercrit.engine.dependence import check_dependence
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.norm_statistics import NormStatistics
from layercrit.engine.predictions import Predictions, predict, scores_of
from layercrit.engine.replay import Mode, PlainReplay, Replay
from layercrit.engine.subject import Subject
from layercrit.layers import Layer
from layercrit.machine import is_out_of_memory
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import MATCHED, Protocol

__all__ = ["Batch", "Draws", "Session"]

_BYTES_OF_LOGITS = 2**28  # of the trained network, up to which they are kept
_BYTES_OF_CELLS = 2**26  # of logits that a GPU compares in one call, for calls cost more there than what they compute


@dataclass(frozen=True)
class Batch:
    """What the resets of some trials did to images ``start`` to ``stop``.

    Attributes:
        start: the first image's position in the probe set.
        stop: the position after the last image's.
        per_image: name of a distance or score -> ``(n_cells, n_images)``, float32, in the order of `Draws.cells`.
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
        statistics: what becomes of running statistics beside a reset; None: they stay as trained.
        shift: how far predictions move (1 minus cosine, mean over images) when the trained network's running statistics
            are estimated again, without any reset; None where they are not.
        seconds_drawing: the time that drawing new values took so far.
        seconds_packing: the time that preparing them for the replay took.
        seconds_running: the time that running the resets took.
        n_run: single images that were run after a single reset so far.
        n_expected: how many of them there will be, for the progress bar.

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
        self.statistics = (
            None
            if protocol.norm_statistics == "trained"
            else NormStatistics(protocol.norm_statistics, subject, probe_set.n_images, self.notes)
        )
        self.holder = ReplayHolder(
            subject,
            probe_set,
            dtype=protocol.dtype,
            batch_size=protocol.batch_size,
            mode=mode,
            notes=self.notes,
            say=bar.say,
            statistics=self.statistics,
        )
        self._bar = bar
        self.seconds_drawing, self.seconds_packing, self.seconds_running = 0.0, 0.0, 0.0
        self.n_run, self.n_expected = 0, subject.n_trials * len(subject.layers) * probe_set.n_images
        self._kept: tuple[Replay | None, dict[tuple[int, int], Tensor]] = (None, {})
        subject.check_draws()
        self._check_dependence()
        if predictions is None:
            predictions = predict(
                self.holder, probe_set, self.labels, model=subject.model.reference, notes=self.notes, bar=bar
            )
        self.predictions = predictions
        self._temperature = math.nan if predictions.temperature is None else predictions.temperature
        self.shift = self.holder.run(self._shift_by_statistics)

    def _shift_by_statistics(self, replay: Replay) -> float | None:
        """Return how far predictions move when the trained network's statistics are estimated again, and note it."""
        if self.statistics is None or not self.statistics.are_estimated:
            return None
        change = self.statistics.of_trained_network(self.holder.batches())
        prepared = {change.layer.name: replay.prepare(change.layer, change.values)}
        n, total = 0, 0.0
        for images, n_counted in self.holder.batches():
            (_, after), (_, before) = replay.sweep(images, prepared)
            p, q = (logits[:n_counted].float().softmax(dim=1) for logits in (before, after))
            total += float(measure_distances(p, q, ["cosine"])["cosine"].double().sum())
            n += n_counted
        self.notes.append(
            f"running statistics are estimated on {self.statistics.n_images} images; without any reset this alone "
            f"moves predictions by {total / n:.3f}"
        )
        return total / n

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

    def trial(self, trial: int, layers: Sequence[Layer] | None = None) -> "Draws":
        """Draw the new values of one trial.

        Args:
            trial: which, from 0.
            layers: those to reset; all of the subject by default.
        """
        return self.draws({trial: self.subject.layers if layers is None else layers})

    def draws(self, layers_of_trials: Mapping[int, Sequence[Layer]]) -> "Draws":
        """Draw the new values of some trials, which are run together: trial, from 0 -> the layers to reset."""
        return Draws(self, layers_of_trials)

    def means(self, values: Mapping[str, npt.NDArray[np.float32]], index: int, status: str) -> dict[str, float]:
        """Return the mean over images of everything measured for one layer of a trial; NaN unless it is ok.

        Args:
            values: name -> ``(n_cells, n_images)``, all images of the probe set.
            index: the cell's position in ``values``.
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

    def run_batch(self, draws: "Draws", start: int) -> Batch:
        """Run the resets of some trials on the images from ``start`` on, as many as fit into a batch."""

        def work(replay: Replay) -> Batch:
            try:
                return self._run_batch(replay, draws, start)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):  # what holds the replay must go before another one is opened
                    self._kept = (None, {})
                    draws.drop_prepared()
                raise

        return self.holder.run(work)

    def _run_batch(self, replay: Replay, draws: "Draws", start: int) -> Batch:
        prepared = draws.prepared(replay)
        started = time.perf_counter()
        images, n = self.holder.batch(start)
        before, after = self._logits(replay, images, prepared, start, n)
        logits = [after.get((trial, layer.name), before) for trial, layer in draws.cells]
        clean = before.softmax(dim=1), (before / self._temperature).softmax(dim=1)
        at_once = self._n_at_once(before)
        parts = [
            self._compare_cells(clean, logits[first : first + at_once], start)
            for first in range(0, len(logits), at_once)
        ]
        values = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        self.seconds_running += time.perf_counter() - started
        return Batch(start, start + n, values)

    def _n_at_once(self, before: Tensor) -> int:
        """Return how many cells to compare in one call.

        One on a CPU: its vector instructions round the end of a tensor in another way, so that a cell's distances would
        depend on the cells beside it.
        """
        return 1 if before.device.type == "cpu" else max(1, _BYTES_OF_CELLS // before.nbytes)

    def _compare_cells(self, clean: tuple[Tensor, Tensor], logits: Sequence[Tensor], start: int) -> dict[str, Tensor]:
        """Return distance or score -> ``(n_cells, n_images)``, all cells in one call.

        Args:
            clean: the trained network's predictions, ``(n_images, n_classes)``, and those at the matched temperature.
            logits: those after each reset, ``(n_images, n_classes)``.
            start: the position of the first image.
        """
        n_cells, n = len(logits), len(clean[0])
        p, p_matched = (predictions.repeat(n_cells, 1) for predictions in clean)
        after = torch.cat(list(logits))  # (n_cells * n_images, n_classes)
        found = measure_distances(p, after.softmax(dim=1), self.distances)
        matched = measure_distances(p_matched, (after / self._temperature).softmax(dim=1), ["cosine"])
        found[MATCHED] = matched["cosine"]
        if self.labels is not None:
            found |= scores_of(after, np.tile(self.labels[start : start + n], n_cells))
        return {name: values.view(n_cells, n) for name, values in found.items()}

    def _logits(
        self, replay: Replay, images: Tensor, prepared: Mapping[int, Mapping[str, Any]], start: int, n: int
    ) -> tuple[Tensor, dict[tuple[int, str], Tensor]]:
        """Return the trained network's logits, and by trial and layer those after its reset."""
        left = {
            layer.name: [trial for trial, of_trial in prepared.items() if layer.name in of_trial][::-1]
            for layer in self.subject.layers
        }
        before = self._kept_logits(replay).get((start, n))
        after = {}
        sweep = replay.sweep(images, *prepared.values())
        # the sweep is longer by the trained network's logits, which are run only if they are needed
        for name, logits in islice(sweep, sum(map(len, left.values()))):
            after[left[cast(str, name)].pop(), cast(str, name)] = logits[:n].float()
            self.n_run += n
            self._bar.measured(self.n_run, max(self.n_expected, self.n_run))
        if before is None:  # what it takes beyond the last reset layer is run only now
            _, logits = next(sweep)
            before = logits[:n].float()
            if before.nbytes * self.probe_set.n_images <= _BYTES_OF_LOGITS * n:
                self._kept_logits(replay)[start, n] = before
        return before, after

    def _kept_logits(self, replay: Replay) -> dict[tuple[int, int], Tensor]:
        """Return the trained network's logits by start and length of the batch, as this replay gave them."""
        if self._kept[0] is not replay:
            self._kept = replay, {}
        return self._kept[1]


class Draws:
    """The random draws of some trials for layers of a session's model, ready to be run together.

    Attributes:
        cells: trial and layer of each reset, trial by trial, layers in depth order.
        seeds: trial -> its seed, in [0, 2^64).
        delta_norm: Euclidean norm of new minus trained values, for each cell; 0 where the reset changes nothing.
    """

    def __init__(self, session: Session, layers_of_trials: Mapping[int, Sequence[Layer]]) -> None:
        started = time.perf_counter()
        self.cells = [(trial, layer) for trial, layers in layers_of_trials.items() for layer in layers]
        self.seeds = {trial: session.subject.seed(trial) for trial in layers_of_trials}
        self._session = session
        self._changes = {
            trial: list(session.subject.changes(trial, layers)) for trial, layers in layers_of_trials.items()
        }
        self.delta_norm = [change.delta_norm for changes in self._changes.values() for change in changes]
        self._if_unchanged = [change.status for changes in self._changes.values() for change in changes]
        self._prepared: tuple[Replay, dict[int, dict[str, Any]]] | None = None
        self._is_complete = False
        session.seconds_drawing += time.perf_counter() - started

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Run all resets on the images from ``start`` on, batch by batch."""
        while start < self._session.probe_set.n_images:
            batch = self._session.run_batch(self, start)
            yield batch
            start = batch.stop

    def prepared(self, replay: Replay) -> dict[int, dict[str, Any]]:
        """Return for each trial what the replay's sweep takes, made once for each replay."""
        if self._prepared is None or self._prepared[0] is not replay:
            self._prepared = None  # frees what belonged to the replay before
            started = time.perf_counter()
            self._complete()
            made: dict[int, dict[str, Any]] = {}
            for trial, changes in self._changes.items():
                shared: dict[Any, Any] = {}
                made[trial] = {
                    c.layer.name: replay.prepare(c.layer, c.values, shared) for c in changes if c.delta_norm != 0
                }
            self._prepared = (replay, made)
            self._session.seconds_packing += time.perf_counter() - started
        return self._prepared[1]

    def _complete(self) -> None:
        """Add the running statistics that go with the drawn values, once."""
        statistics = self._session.statistics
        if statistics is not None and not self._is_complete:
            self._changes = statistics.complete(self._changes, self._session.holder.batches())
            self._is_complete = True

    def drop_prepared(self) -> None:
        """Free what was made for a replay; it is made again when it is needed."""
        self._prepared = None

    def forget(self) -> None:
        """Free the drawn values; the trials are over."""
        self._changes, self._prepared = {}, None

    def status(self, values: Mapping[str, npt.NDArray[np.float32]]) -> list[str]:
        """Return each cell's status, given what was measured: name -> ``(n_cells, n_images)``, all distances among it.

        New values that are NaN or infinite are never ok: an activation may make finite numbers of what comes of them.
        """
        finite = np.logical_and.reduce([np.isfinite(values[name]).all(axis=1) for name in self._session.distances])
        return [
            unchanged if norm == 0 else "ok" if math.isfinite(norm) and one_is_finite else "not_finite"
            for norm, unchanged, one_is_finite in zip(self.delta_norm, self._if_unchanged, finite, strict=True)
        ]
