"""Run the trials of one measurement: as many as were asked for, or a pilot and what is planned after it."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from layercrit.counts import counted
from layercrit.engine.predictions import Predictions
from layercrit.engine.session import Draws, Session
from layercrit.engine.subject import Subject
from layercrit.errors import ProtocolError
from layercrit.foreign_text import encodable
from layercrit.layers import Layer, shared_parameters
from layercrit.measurement import Measurement
from layercrit.precision import Components, Cost, Pilot, PrecisionPlan, plan_half_width, plan_seconds, run_together
from layercrit.precision import n_pilot_images as pilot_images
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, MATCHED, Protocol
from layercrit.provenance import versions_with
from layercrit.trackers.callbacks import OnCell

__all__ = ["OnTrial", "Sampling"]

_TIME_UP = "the time was up"  # how notes begin that are of one run, and not of those that go on with it

_LOG = logging.getLogger(__name__)

OnTrial = Callable[[Callable[[], Measurement]], object]


@dataclass(frozen=True)
class _Finished:
    """Trials that were run together.

    Attributes:
        cells: the number of the layer, and the trial, of each cell.
        rows: of the table of cells.
        distances: name -> ``(n_cells, n_images)``.
    """

    cells: list[tuple[int, int]]
    rows: list[dict[str, Any]]
    distances: Mapping[str, npt.NDArray[np.float32]]


class Sampling:
    """The trials of one measurement: those that are finished, and the plan of further ones.

    Args:
        started: when the measurement began, by `time.perf_counter`.
        protocol: how to measure.
        subject: the network.
        draw: returns the probe set of the first images, as many as it is asked for.
        n_available: images that there are.
        distances: names of the distances to measure.
        use_labels: whether to use the labels of the images.
        bar: shows the progress.
        name: what the model is called; None: a short form of its reference.
    """

    session: Session
    on_cell: OnCell | None = None

    def __init__(
        self,
        started: float,
        protocol: Protocol,
        subject: Subject,
        draw: Callable[[int], ProbeSet],
        n_available: int,
        distances: list[str],
        use_labels: bool,
        bar: Bar,
        name: str | None = None,
    ) -> None:
        self.name = name
        self.started, self.protocol, self.subject, self.bar = started, protocol, subject, bar
        self.draw, self.n_available = draw, n_available
        self.distances, self.use_labels = distances, use_labels
        _, self.flops_after = subject.flops
        self.finished: list[_Finished] = []
        self.plan: PrecisionPlan | None = None
        self.notes: list[str] = []
        self.seconds_before = 0.0  # that an interrupted run took

    def run(self, resume: Measurement | None, on_trial: OnTrial | None, on_cell: OnCell | None = None) -> Measurement:
        """Run all trials and return the measurement."""
        self.on_cell = on_cell
        n_pilot_images = self.n_available
        if self.protocol.is_planned:
            protocol = self.protocol
            n_pilot_images = pilot_images(protocol.half_width, protocol.level, protocol.pilot, self.n_available)
        if resume is None:
            self._open_session(n_pilot_images)
        else:
            self._resume(resume, n_pilot_images)
        self._run_first(on_trial)
        if self.protocol.is_planned and self.plan is None and self._n_first_left() == 0:
            self._make_plan(n_pilot_images)
            self._run_first(on_trial)  # again where the plan has more images
        if self.plan is not None:
            self._run_further(self.plan, on_trial)
        return self._measurement(len(self.finished), complete=True)

    # --- opening ----------------------------------------------------------------------------------------------------

    def _open_session(
        self,
        n_images: int,
        known: Mapping[str, Any] | None = None,
        classes: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Open the session; of an earlier one on the same images its record and the classes that were predicted."""
        predictions = None
        if known is not None:
            predictions = Predictions(**known["predictions"], n_classes=known["model"]["n_classes"], classes=classes)
        self.session = Session(
            self.protocol,
            self.subject,
            self.draw(n_images),
            self.distances,
            self.use_labels,
            self.bar,
            mode=None if known is None else known["dtype"],
            predictions=predictions,
        )

    def _resume(self, earlier: Measurement, n_pilot_images: int) -> None:
        """Take over the trials of an earlier measurement of the same; what differs is refused."""
        record = earlier.record
        if record.get("precision") is not None:
            self.plan = PrecisionPlan.from_dict(record["precision"])
        classes = None if earlier.images is None else earlier.images.predictions
        self._open_session(n_pilot_images if self.plan is None else self.plan.n_images, record, classes)
        now = self._record([])
        differences = [
            f"{what} {then!r} instead of {asked!r}"
            for what, then, asked in _compared(record, now)
            if then != asked and what not in ("trials", "minutes", "batch_size", "device")
        ]
        if differences:
            raise ProtocolError(
                f"The measurement to go on with is another one: {'; '.join(differences[:5])}. Ask for the same again; "
                "or measure anew, into another folder (--out) or in its place (--overwrite)."
            )
        n_trials = earlier.cells["trial"].nunique()
        if not self.protocol.is_planned and n_trials > self.subject.n_trials:
            raise ProtocolError(
                f"The measurement to go on with has {counted(n_trials, 'trial')}, more than the "
                f"{self.subject.n_trials} asked for. Ask for {n_trials} or more (--trials, trials=...); or measure "
                "anew, into another folder (--out) or in its place (--overwrite)."
            )
        self.finished = list(_finished_of(earlier, self.subject))
        self.seconds_before = float(record["seconds"])
        self.session.notes += [
            note for note in record["notes"] if note not in self.session.notes and not note.startswith(_TIME_UP)
        ]
        if record["versions"] != now["versions"]:
            self.notes.append("some trials were run earlier, under other versions of layercrit or of its libraries")
        self.bar.say(f"going on with {counted(len(self._done()), 'cell')} that are measured already")

    # --- running ----------------------------------------------------------------------------------------------------

    def _done(self) -> set[tuple[int, int]]:
        return {cell for finished in self.finished for cell in finished.cells}

    def _n_first_left(self) -> int:
        done = {trial for _, trial in self._done()}
        return sum(trial not in done for trial in range(self.subject.n_trials))

    def _run_first(self, on_trial: OnTrial | None) -> None:
        """Run the trials that are asked for, or the pilot's, as far as the time allows."""
        done = {trial for _, trial in self._done()}
        left = [trial for trial in range(self.subject.n_trials) if trial not in done]
        self.session.n_expected = self.session.n_run + (
            len(left) * len(self.subject.layers) * self.session.probe_set.n_images
        )
        started = time.perf_counter()
        for n_run, trial in enumerate(left):
            longest = (time.perf_counter() - started) / n_run if n_run else 0.0
            if n_run and self._seconds_left() < longest:
                self.notes.append(
                    f"{_TIME_UP} after {self.subject.n_trials - len(left) + n_run} of the "
                    f"{self.subject.n_trials} trials of the pilot: nothing could be planned, so intervals are wide"
                )
                return
            self._run_draws({trial: self.subject.layers}, on_trial)

    def _run_further(self, plan: PrecisionPlan, on_trial: OnTrial | None) -> None:
        """Run what is planned after the pilot: each trial for the layers that get it, several trials at once."""
        layers = {layer.name: layer for layer in self.subject.layers}
        place = {layer.name: number for number, layer in enumerate(self.subject.layers)}
        done = self._done()
        left = {
            trial: [name for name in names if (place[name], trial) not in done]
            for trial, names in plan.trials().items()
        }
        self.session.n_expected = self.session.n_run + self.session.probe_set.n_images * sum(map(len, left.values()))
        sizes = {layer.name: layer.n_parameters for layer in self.subject.layers}
        for number, together in enumerate(run_together(left, sizes)):
            if number and self._seconds_left() <= 0:
                self.notes.append(f"{_TIME_UP} before all planned trials were run")
                return
            self._run_draws({trial: [layers[name] for name in names] for trial, names in together.items()}, on_trial)

    def _run_draws(
        self,
        layers_of_trials: Mapping[int, Sequence[Layer]],
        on_trial: OnTrial | None,
    ) -> None:
        started = time.perf_counter()
        draws = self.session.draws(layers_of_trials)
        batches = [batch.per_image for batch in draws.batches()]
        values = {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}
        place = {layer.name: number for number, layer in enumerate(self.subject.layers)}
        status = draws.status(values)
        self.finished.append(
            _Finished(
                cells=[(place[layer.name], trial) for trial, layer in draws.cells],
                rows=[self._row(draws, values, index, status[index]) for index in range(len(draws.cells))],
                distances={name: values[name] for name in (*self.distances, MATCHED)},
            )
        )
        _LOG.debug(
            "trial %s: %d resets of %d images in %.1f s",
            ", ".join(map(str, layers_of_trials)),
            *(len(draws.cells), self.session.probe_set.n_images, time.perf_counter() - started),
        )
        draws.forget()
        if on_trial is not None:
            on_trial(partial(self._measurement, len(self.finished)))
        if self.on_cell is not None:
            rows, n_planned = self.finished[-1].rows, self._n_planned()
            for n_done, row in enumerate(rows, 1 + len(self._done()) - len(rows)):
                self.on_cell(row | {"n_done": n_done, "n_planned": n_planned})

    def _n_planned(self) -> int:
        """Return how many cells there are to be, as far as is known."""
        first = {(layer, trial) for layer in range(len(self.subject.layers)) for trial in range(self.subject.n_trials)}
        if self.plan is None:
            return len(first)
        place = {layer.name: number for number, layer in enumerate(self.subject.layers)}
        return len(first | {(place[name], trial) for trial, names in self.plan.trials().items() for name in names})

    def _seconds_left(self) -> float:
        if self.protocol.minutes is None:
            return math.inf
        return 60 * self.protocol.minutes - self.seconds_before - (time.perf_counter() - self.started)

    # --- planning ---------------------------------------------------------------------------------------------------

    def _make_plan(self, n_pilot_images: int) -> None:
        """Plan the further trials; where they are on more images, forget the pilot's values, to run it on those."""
        components: dict[str, Components | None] = {}
        pilot = self._measurement(len(self.finished))
        for number, layer in enumerate(self.subject.layers):
            values = pilot.per_image["cosine"][number]
            ok = values[np.isfinite(values).all(axis=1)]
            components[layer.name] = Components.of_pilot(ok, self.subject.random_trials)
        protocol = self.protocol
        limits: dict[str, Any] = {
            "level": protocol.level,
            "n_pilot": protocol.pilot,
            "n_pilot_images": n_pilot_images,
            "n_available": self.n_available,
            "max_trials": protocol.max_trials,
        }
        pilots = {"": Pilot(components, self._cost(), self.subject.random_trials)}
        if protocol.half_width is not None:
            self.plan = plan_half_width(pilots, protocol.half_width, **limits)[""]
        else:
            self.plan = plan_seconds(pilots, self._seconds_left(), **limits)[""]
        for line in self.plan.in_words():
            self.bar.say(line)
        if self.plan.n_images > n_pilot_images:
            self.finished = []
            self._open_session(self.plan.n_images)

    def _cost(self) -> Cost:
        """Return what the pilot says of the cost of resets; the network's operations say how layers share it."""
        session, layers = self.session, self.subject.layers
        n_trials = self.subject.n_trials
        after = np.array([self.flops_after[layer.name] for layer in layers])
        after = after if np.isfinite(after).all() else np.ones(len(layers))
        n_parameters = np.array([layer.n_parameters for layer in layers], np.float64)
        of_image = session.seconds_running / max(session.n_run / len(layers), 1)  # and trial, all its layers
        unit = of_image / (1 + after.sum())
        return Cost(
            trial=session.seconds_drawing / n_trials,
            prefix=unit,
            layers=session.seconds_packing / n_trials * n_parameters / max(n_parameters.sum(), 1),
            evaluations=unit * after,
        )

    # --- results ----------------------------------------------------------------------------------------------------

    def _measurement(self, n_finished: int, complete: bool = False) -> Measurement:
        """Return the measurement of what was finished first; what comes later may be running."""
        finished = self.finished[:n_finished]
        n_trials = 1 + max(trial for one in finished for _, trial in one.cells)
        shape = (len(self.subject.layers), n_trials, self.session.probe_set.n_images)
        per_image = {name: np.full(shape, np.nan, np.float32) for name in (*self.distances, MATCHED)}
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for one in finished:
            for index, (layer, trial) in enumerate(one.cells):
                rows[layer, trial] = one.rows[index]
                if one.rows[index]["status"] == "ok":
                    for name, distances in one.distances.items():
                        per_image[name][layer, trial] = distances[index]
        cells = pd.DataFrame([rows[cell] for cell in sorted(rows)]).astype({"seed": "uint64"})
        seeds = {trial: rows[layer, trial]["seed"] for layer, trial in sorted(rows)}
        record = self._record([int(seeds[trial]) for trial in sorted(seeds)], complete)
        predictions, probe_set = self.session.predictions, self.session.probe_set
        images = probe_set.shown_to(predictions.n_classes, predictions.classes, use_labels=self.use_labels)
        return Measurement(cells, per_image, record, images)

    def _row(
        self, draws: Draws, values: Mapping[str, npt.NDArray[np.float32]], index: int, status: str
    ) -> dict[str, Any]:
        trial, layer = draws.cells[index]
        return {
            "model": encodable(self.subject.model.reference),
            "layer": layer.name,
            "type": layer.type,
            "depth": layer.depth,
            "n_parameters": layer.n_parameters,
            "flops_after": self.flops_after[layer.name],
            "reset": self.protocol.reset,
            "trial": trial,
            "seed": draws.seeds[trial],
            "status": status,
            "delta_norm": draws.delta_norm[index],
            "n_images": self.session.probe_set.n_images,
            **self.session.means(values, index, status),
        }

    def _record(self, trial_seeds: list[int], complete: bool = False) -> dict[str, Any]:
        session, subject, model = self.session, self.subject, self.subject.model
        resolved = {
            "trials": subject.n_trials,
            "n_images": session.probe_set.n_images,
            "batch_size": session.holder.batch_size,
            "dtype": session.holder.replay.mode,  # of a session that goes on with an earlier one it opens only now
            "device": str(subject.device),
            "distances": session.distances,
        }
        predictions = session.predictions.to_dict()
        n_classes, _ = predictions.pop("n_classes"), predictions.pop("classes")  # of each image: see Measurement.images
        about_plan = [] if self.plan is None else self.plan.notes()
        shared = shared_parameters(subject.layers, subject.network)
        return {
            "protocol": {**self.protocol.to_dict(), **resolved},
            "asked": self.protocol.to_dict(),
            "complete": complete,
            "precision": None if self.plan is None else self.plan.to_dict(),
            "random_trials": subject.random_trials,
            "norm_statistics": None
            if session.statistics is None
            else session.statistics.to_dict() | {"shift": session.shift},
            "trial_seeds": trial_seeds,
            "name": encodable(self.name),
            "model": {
                "reference": encodable(model.reference),
                "architecture": model.architecture,
                "sha256": model.sha256,
                "donor": subject.donor_in_words,
                "mean": list(model.mean),
                "std": list(model.std),
                "undeclared": list(model.undeclared),
                "output": model.output_in_words,
                "n_classes": n_classes,
                "n_parameters": sum(p.numel() for p in subject.network.parameters()),
            },
            "probe_set": session.probe_set.to_dict() | {"labels": session.labels is not None},
            "predictions": predictions,
            "layers": {
                layer.name: {"parameters": list(layer.parameters), "shape": list(layer.shape)}
                | ({"members": [member.name for member in layer.members]} if layer.members else {})
                | ({"shared": vars(shared[layer.name])} if layer.name in shared else {})
                for layer in subject.layers
            },
            "backend": session.holder.backend,
            "dtype": session.holder.mode,
            "device": str(subject.device),
            "threads": torch.get_num_threads(),
            "warnings": session.predictions.warnings(),
            "notes": list(dict.fromkeys([*session.notes, *self.notes, *about_plan])),
            "versions": versions_with(
                resets=[self.protocol.reset],
                distances=session.distances,
                models=[model.reference, model.architecture],
                images=[session.probe_set.source],
            ),
            "seconds_opening": round(session.holder.seconds_opening, 3),
            "seconds": round(self.seconds_before + time.perf_counter() - self.started, 3),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two measurements must have in common, if one is to go on with the other: name, then, now."""
    for name, asked in now["asked"].items():
        yield name, then.get("asked", then["protocol"]).get(name, getattr(DEFAULTS, name)), asked
    for name in ("reference", "architecture", "sha256", "donor", "mean", "std", "output"):
        yield f"the model's {name}", then["model"].get(name), now["model"][name]
    yield "distances", list(then["protocol"]["distances"]), list(now["protocol"]["distances"])
    yield "the images' hash", then["probe_set"]["sha256"], now["probe_set"]["sha256"]
    yield "labels used", then["probe_set"]["labels"], now["probe_set"]["labels"]
    yield "layers", list(then["layers"]), list(now["layers"])


def _finished_of(earlier: Measurement, subject: Subject) -> Iterator[_Finished]:
    """Yield the trials of an earlier measurement as this one would have finished them."""
    place = {layer.name: number for number, layer in enumerate(subject.layers)}
    for trial, rows in earlier.cells.groupby("trial", sort=True):
        layers = [place[name] for name in rows["layer"]]
        yield _Finished(
            cells=[(layer, int(str(trial))) for layer in layers],
            rows=[{str(name): value for name, value in row.items()} for row in rows.to_dict("records")],
            distances={name: values[layers, int(str(trial))] for name, values in earlier.per_image.items()},
        )
