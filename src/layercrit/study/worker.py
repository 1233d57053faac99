"""What a worker of a study does: it measures trials of models, and reports its progress."""

import contextlib
import hashlib
import json
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from layercrit.engine.allocator import large_blocks_stay
from layercrit.engine.norm_statistics import N_IMAGES
from layercrit.engine.predictions import Predictions
from layercrit.engine.replay import Mode
from layercrit.engine.session import Batch, Draws, Session
from layercrit.engine.subject import Subject
from layercrit.layer_sets import members_of, stages_of_sets
from layercrit.layers import Layer, shared_parameters
from layercrit.models.model import Model
from layercrit.models.own_networks import import_here
from layercrit.models.references import open_model
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import MATCHED
from layercrit.resets import get_reset
from layercrit.restoring import undisturbed
from layercrit.study.entries import ModelEntry
from layercrit.study.executors import Place, Question, Task, Work
from layercrit.study.file import StudyFile
from layercrit.study.images import shown_images
from layercrit.study.rows import CellRow, PartRow, PlanRow

_MEANING = 1  # of a cell's numbers; raised when the same cell would be measured as something else
_SECONDS_BETWEEN_PARTS = 1.0


@dataclass(frozen=True)
class Job:
    """The payload of a task: one trial of one reset of a model, or several that are run together.

    Attributes:
        model: the model.
        reset: its name.
        layers: trial -> names of the layers that get it; None: all of them.
    """

    model: ModelEntry
    reset: str
    layers: Mapping[int, Sequence[str] | None]


@dataclass(frozen=True)
class Opening:
    """Asks what is known of a model before it is opened: the answer is its record, empty where nothing is."""

    model: str


@dataclass(frozen=True)
class Planned:
    """Asks, with a model open, what is left of a task: the answer is a `Left`.

    Attributes:
        record: what is known of the model.
        plan: the cells of the task.
    """

    record: dict[str, Any]
    plan: list[PlanRow]


@dataclass(frozen=True)
class Left:
    """What is left of a task.

    Attributes:
        known: keys of its cells that are measured already.
        task: names the cells that are not, for `Progressed`.
        parts: what an interrupted run measured of these.
    """

    known: Set[str]
    task: str
    parts: Sequence[PartRow]


@dataclass(frozen=True)
class Progressed:
    """Some images of a task are measured."""

    task: str
    part: PartRow
    n_cells: int


@dataclass(frozen=True)
class Measured:
    """A task is measured."""

    task: str
    cells: list[CellRow]
    record: dict[str, Any]


_Steps: TypeAlias = Generator[Question | Progressed | Measured, Any, None]


class _Opened:
    """A model under one reset, opened for a study: at once the network, and its session when `start` is called.

    Attributes:
        study: the study.
        probe_set: the images that the model is shown.
        reset: its name.
        subject: the network, for the study's pixels, with its layers and draws.
        record: what is known of the model; keeps what an earlier session with the same weights, images and settings
            found.
    """

    def __init__(
        self,
        study: StudyFile,
        entry: ModelEntry,
        reset: str,
        probe_set: ProbeSet,
        folder: Path,
        device: str,
        known: Mapping[str, Any],
    ) -> None:
        self.study, self.reset = study, reset
        self._protocol = replace(
            study.protocol, device=device, n_images=study.n_images, norm_statistics=entry.norm_statistics
        )
        (images,) = (images for images in study.images if images.name == entry.probe_set)
        self._labels = images.labels
        self._entry = entry
        self._model, notes = _open_model(entry, study)
        self.probe_set = shown_images(probe_set, images, self._model, folder, device)
        self.subject = self._subject_of(reset)
        self._flops, self._flops_after = self.subject.flops
        self.record = self._record([*self.subject.notes(), *notes], known)
        self._session: Session | None = None

    def _subject_of(self, reset: str) -> Subject:
        donor = self._entry.donor_for(get_reset(reset))
        return Subject(replace(self._protocol, reset=reset), self._model, donor)

    def _record(self, notes: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
        about = {
            "sha256": self._model.sha256,
            "architecture": self._model.architecture,
            "mean": list(self._model.mean),
            "std": list(self._model.std),
            "probe_set": self.probe_set.sha256,
            "asked_dtype": self._protocol.dtype,
        }
        about |= self._content_of_statistics()
        again = all(known.get(name) == value for name, value in about.items()) and (
            "norm_statistics" in about or "norm_statistics" not in known
        )
        shared = shared_parameters(self.subject.layers, self.subject.network)
        kept = {name: known[name] for name in ("dtype", "backend", "predictions", "notes") if name in known and again}
        return {
            **kept,
            **about,
            "warnings": Predictions.from_dict(kept["predictions"]).warnings() if "predictions" in kept else [],
            "notes": list(dict.fromkeys([*kept.get("notes", []), *notes])),
            "n_images": self.probe_set.n_images,
            "flops_per_image": self._flops,
            "n_parameters": sum(p.numel() for p in self.subject.network.parameters()),
            **({"shared": {name: vars(of) for name, of in shared.items()}} if shared else {}),
            "donor": {self.reset: self.subject.donor_in_words},
            "random_trials": {self.reset: self.subject.random_trials},
        }

    def start(self) -> Session:
        """Return the session; the first call opens it, in the number format that the record names or gets now."""
        if self._session is None:
            if self._protocol.dtype == "auto" and "dtype" not in self.record:
                self._choose_dtype()
            self._session = self._open_session(self.subject)
            self.take_notes(self._session)
        return self._session

    def _choose_dtype(self) -> None:
        """Let the first reset that the model can undergo choose, so that it does not matter which is opened first."""
        for reset in self.study.resets[: self.study.resets.index(self.reset)]:
            with contextlib.suppress(Exception):  # it fails where that reset is run
                self._open_session(self._subject_of(reset))
                return

    def _open_session(self, subject: Subject) -> Session:
        predictions = self.record.get("predictions")
        session = Session(
            self._protocol,
            subject,
            self.probe_set,
            list(self.study.distances),
            self._labels is not False,
            Bar(shown=False),
            mode=cast(Mode | None, self.record.get("dtype")),
            predictions=None if predictions is None else Predictions.from_dict(predictions),
        )
        self.record |= {
            "dtype": session.holder.replay.mode,
            "backend": session.holder.backend,
            "predictions": session.predictions.to_dict(),
            "warnings": session.predictions.warnings(),
        }
        return session

    def take_notes(self, session: Session) -> None:
        """Write into the record what the session noted so far; it may note more while it measures."""
        self.record["notes"] = list(dict.fromkeys([*self.record["notes"], *session.notes]))

    def plan(self, job: Job) -> list[PlanRow]:
        """Return the cells of a task."""
        if "dtype" not in self.record:  # a part of each cell's identity
            self.start()
        self.record["content"] = {self.reset: _hash(self._content())}
        layers = self.subject.layers
        stages = stages_of_sets(members_of(layers))
        return [
            PlanRow(
                model=job.model.name,
                layer=layer.name,
                reset=self.reset,
                trial=trial,
                key=self._key(layer, trial),
                type=layer.type,
                stage=stages[layer.name],
                depth=layer.depth,
                n_parameters=layer.n_parameters,
                flops_after=self._flops_after[layer.name],
                shape="x".join(map(str, layer.shape)),
            )
            for trial, names in job.layers.items()
            for layer in layers
            if names is None or layer.name in names
        ]

    @cached_property
    def _has_labels(self) -> bool:
        return self.probe_set.labels_for(self._model.n_classes)[0] is not None

    def _key(self, layer: Layer, trial: int) -> str:
        """Name the content of a cell: equal keys mean equal numbers, up to rounding."""
        seed = self.subject.seed(trial)
        names = [layer.name, *layer.parameters, *layer.buffers]
        members = [[one.name, *one.parameters, *one.buffers] for one in layer.members]  # each drawn on its own
        of_set = {"members": members} if members else {}
        return _hash({**self._content(), "layer": names, **of_set, "seed": seed})

    def _content(self) -> dict[str, Any]:
        """Return what all cells of this model and reset have in common."""
        return {
            "meaning": _MEANING,
            "weights": self.record["sha256"],
            "normalisation": [self.record["mean"], self.record["std"]],
            "reset": self.reset,
            "donor": self.subject.donor_identity,
            "probe_set": self.record["probe_set"],
            "labels": self._labels is not False and self._has_labels,
            "dtype": self.record["dtype"],
            "distances": sorted(self.study.distances),
            **self._content_of_output(),
            **self._content_of_statistics(),
        }

    def _content_of_statistics(self) -> dict[str, Any]:
        """Return what becomes of running statistics; where they stay as trained, keys are those they always were."""
        how = self._protocol.norm_statistics
        return {} if how == "trained" else {"norm_statistics": how, "n_images_of_statistics": N_IMAGES}

    def _content_of_output(self) -> dict[str, Any]:
        """Return which output was chosen, if any: those that leave no choice keep the keys they always had."""
        model = self.subject.model
        return {"output": model.output_in_words} if model.output is not None or model.probabilities else {}


class _Worker:
    """Measures trials; keeps the model of the last one open."""

    def __init__(self, study: StudyFile, probe_sets: Mapping[str | None, ProbeSet], folder: Path, place: Place) -> None:
        for module in study.imports:
            import_here(module)
        torch.set_num_threads(place.n_threads)
        self._study, self._probe_sets, self._folder, self._device = study, probe_sets, folder, place.device
        self._opened: tuple[tuple[ModelEntry, str], _Opened | Exception] | None = None

    def __call__(self, task: Task) -> _Steps:
        job: Job = task.payload
        with undisturbed(), large_blocks_stay():  # the study's own imports may have changed settings of the process
            opened = yield from self._open(job)
            plan = opened.plan(job)
            left: Left = yield Question(Planned(opened.record, plan))
            missing = {(row.trial, row.layer): row.key for row in plan if row.key not in left.known}
            if missing:
                yield from self._measure(opened, missing, left)

    def _open(self, job: Job) -> Generator[Question, Any, _Opened]:
        """Open a model; one that failed fails again at once."""
        what = (job.model, job.reset)
        if self._opened is None or self._opened[0] != what:
            self._opened = None  # frees the model before
            known = yield Question(Opening(job.model.name))
            try:
                probe_set = self._probe_sets[job.model.probe_set]
                opened: _Opened | Exception = _Opened(
                    self._study, job.model, job.reset, probe_set, self._folder, self._device, known
                )
            except Exception as error:  # raised below, and again for the model's other trials
                opened = error
            self._opened = (what, opened)
        if isinstance(self._opened[1], Exception):
            raise self._opened[1]
        return self._opened[1]

    def _measure(
        self, opened: _Opened, missing: Mapping[tuple[int, str], str], left: Left
    ) -> Iterator[Progressed | Measured]:
        session = opened.start()
        layers = opened.subject.layers
        draws = session.draws(
            {
                trial: [layer for layer in layers if (trial, layer.name) in missing]
                for trial in dict.fromkeys(trial for trial, _ in missing)
            }
        )
        done = [part for part in left.parts if all(len(rows) == len(missing) for rows in part.values.values())]
        pending: list[Batch] = []
        started = time.perf_counter()
        for batch in draws.batches(done[-1].stop if done else 0):
            pending.append(batch)
            seconds = time.perf_counter() - started
            if seconds > _SECONDS_BETWEEN_PARTS or batch.stop == opened.probe_set.n_images:
                part = PartRow(pending[0].start, batch.stop, seconds, _joined([b.per_image for b in pending]))
                done.append(part)
                pending, started = [], time.perf_counter()
                if batch.stop < opened.probe_set.n_images:
                    yield Progressed(left.task, part, len(missing))
        values = _joined([part.values for part in done])
        cells = _cells(opened, session, draws, values, missing, sum(part.seconds for part in done))
        opened.take_notes(session)
        yield Measured(left.task, cells, opened.record)


def start_worker(study: StudyFile, probe_sets: Mapping[str | None, ProbeSet], folder: Path, place: Place) -> Work:
    """Prepare a worker for a study and its probe sets, by name; see `layercrit.study.executors.Start`.

    Its folder is that of the study, where adversarial images are kept; nothing else is read there or written.
    """
    return _Worker(study, probe_sets, folder, place)


def name_of_parts(keys: Iterable[str]) -> str:
    """Name what the parts of cells that are measured together are kept under."""
    return _hash(sorted(keys))


def _cells(
    opened: _Opened,
    session: Session,
    draws: Draws,
    values: Mapping[str, npt.NDArray[np.float32]],
    keys: Mapping[tuple[int, str], str],
    seconds: float,
) -> list[CellRow]:
    finished = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    kept = [*opened.study.distances, MATCHED]
    cells = []
    for index, ((trial, layer), status) in enumerate(zip(draws.cells, draws.status(values), strict=True)):
        means = session.means(values, index, status)
        cells.append(
            CellRow(
                key=keys[trial, layer.name],
                status=status,
                seed=draws.seeds[trial],
                delta_norm=draws.delta_norm[index],
                n_images=opened.probe_set.n_images,
                means=means,
                per_image={name: values[name][index] for name in kept} if status == "ok" else None,
                seconds=seconds / len(draws.cells),
                finished=finished,
            )
        )
    return cells


def _open_model(entry: ModelEntry, study: StudyFile) -> tuple[Model, list[str]]:
    """Return a model for the study's pixels, with notes if its own evaluation uses others or is not known."""
    size = study.preprocessing
    shape = (size.channels, size.height, size.width)
    own = open_model(entry.reference, input_size=None if size.channels == 3 else shape)
    declared = {"input_size"} if study.says_input_size else set()
    undeclared = tuple(name for name in own.undeclared if name not in declared)
    model = replace(open_model(own, input_size=shape), preprocessing=size, undeclared=undeclared)
    notes = [model.undeclared_in_words("the default of study files, [images] input_size")]
    if "input_size" not in own.undeclared and size not in (own.preprocessing, _without_resize(own.preprocessing)):
        notes.append(f"its own evaluation differs from the study's pixels: {_in_words(own.preprocessing)}")
    return model, [note for note in notes if note is not None]


def _without_resize(size: Preprocessing) -> Preprocessing:
    """Return the same without resizing, where that does nothing to images of the model's size."""
    nothing = size.resize in (max(size.height, size.width), (size.height, size.width))
    return replace(size, resize=None) if nothing else size


def _joined(parts: Sequence[Mapping[str, npt.NDArray[np.float32]]]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _in_words(size: Preprocessing) -> str:
    crop = "" if size.crop_offset == "rounded" else f", first pixel of the crop {size.crop_offset}"
    return f"{size.channels} x {size.height} x {size.width}, resize {size.resize}, {size.interpolation}{crop}"
