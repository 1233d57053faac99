"""Measure one model on one probe set: which layers do its decisions depend on?"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from layercrit._allocator import large_blocks_stay
from layercrit._calibration import calibrate
from layercrit._machine import choose_batch_size, is_out_of_memory, multiplies_bfloat16, versions
from layercrit._progress import Bar
from layercrit._subject import Subject
from layercrit._untouched import rng_untouched, untouched
from layercrit.distances import DISTANCES, get_distance, label_scores, measure_distances
from layercrit.errors import LayercritError, ModelError, ProtocolError
from layercrit.measurement import CELL_COLUMNS, MATCHED, PER_IMAGE, Measurement
from layercrit.models import Model, open_model
from layercrit.networks import first_line
from layercrit.probes import ProbeSet
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.replay import GraphReplay, Mode, Replay, open_replay, reopen
from layercrit.resets import get_reset, seed_of
from layercrit.statistics import ChanceLevel, fit_temperature

__all__ = ["Measurement", "measure"]

MATCHED_ENTROPY = 0.1  # of the largest possible entropy, ln(n_classes): what the matched temperature aims at
_TEMPERATURE_IMAGES = 512
_CALIBRATION_LAYERS = 12
_COLUMN_OF_SCORE = {"loss": "loss", "top1": "top1_accuracy", "top5": "top5_accuracy"}
_LONG_JOB = 4e12  # FLOPs from which `auto` considers bfloat16: some 20 s on a CPU, where a calibration pays

Result = TypeVar("Result")


def measure(
    model: str | Model | nn.Module,
    images: Any,
    *,
    trials: int = DEFAULTS.trials,
    n_images: int = DEFAULTS.n_images,
    layers: str = DEFAULTS.layers,
    types: str = DEFAULTS.types,
    group: str = DEFAULTS.group,
    reset: str = DEFAULTS.reset,
    donor: nn.Module | str | Path | None = None,
    distances: Iterable[str] | None = None,
    seed: int = DEFAULTS.seed,
    batch_size: int | str = DEFAULTS.batch_size,
    dtype: str = DEFAULTS.dtype,
    device: str = DEFAULTS.device,
    level: float = DEFAULTS.level,
    use_labels: bool = True,
    progress: bool = True,
    on_trial: Callable[[Measurement], object] | None = None,
) -> Measurement:
    """Reset each layer of a model in turn and measure how far its predictions move.

    The criticality of a layer is 1 minus the cosine similarity of the softmax outputs before and after its reset,
    averaged over trials and images (Gavrikov et al. 2024, arXiv 2410.14470): 0 for a layer that the decisions do not
    depend on, near 1 for one that they do. The model is bit for bit what it was afterwards, also after an exception.

    Args:
        model: a reference such as ``timm:resnet50.a1_in1k``, an opened `Model`, or a module that takes images
            ``(n_images, channels, height, width)``. An array of images is shown to a module in the size they have.
        images: anything that `ProbeSet.from_source` takes: a folder, an array, a file; or a `ProbeSet`, taken whole.
        trials: see `Protocol`, as for all settings that are not listed here. A reset without chance is run once.
        n_images: see `Protocol`.
        layers: see `Protocol`.
        types: see `Protocol`.
        group: see `Protocol`.
        reset: a name in `layercrit.resets.RESETS`.
        donor: where new values come from instead of the architecture's initialiser: a module of the same architecture,
            or a weight file. Needed for ``rewind``. It is the same in every trial, so one trial is run.
        distances: names of the distances to keep beside ``cosine``; all registered ones by default.
        seed: see `Protocol`.
        batch_size: see `Protocol`.
        dtype: see `Protocol`.
        device: see `Protocol`.
        level: see `Protocol`.
        use_labels: whether to use labels that the images come with, for accuracy and loss.
        progress: whether to show a progress bar on a terminal.
        on_trial: called with the measurement so far after every finished trial, to save it.

    Returns:
        The measurement, for tables, summary, picture and files.

    Raises:
        LayercritError: with a subclass and a text that say what was wrong and what to do.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(),
        ...                               torch.nn.Linear(8, 3))
        >>> pixels = torch.randint(0, 256, (32, 3, 2, 2), dtype=torch.uint8)
        >>> result = measure(network, pixels, trials=5, progress=False)
        >>> list(result.to_pandas()["layer"])
        ['1', '3']
    """
    started = time.perf_counter()
    protocol = Protocol(trials, n_images, layers, types, group, reset, seed, batch_size, dtype, device, level)
    get_reset(reset)
    names = _distance_names(distances)
    with rng_untouched(), Bar(progress) as bar:
        opened = open_model(model, input_size=_size_of(images)) if isinstance(model, nn.Module) else open_model(model)
        with untouched(opened.network), large_blocks_stay():
            subject = Subject(protocol, opened, donor)
            probe_set = ProbeSet.from_source(
                images,
                opened.preprocessing,
                n_images=protocol.n_images,
                seed=seed_of(protocol.seed, "probe set") % 2**32,
                use_labels=use_labels,
                progress=bar.decoded,
            )
            return _Session(started, protocol, subject, probe_set, names, use_labels, bar).run(on_trial)


@dataclass(frozen=True)
class _Trial:
    """What one trial gave, layers in depth order."""

    trial: int
    seed: int
    status: list[str]
    delta_norm: list[float]
    distances: Mapping[str, npt.NDArray[np.float32]]  # distance or score -> (n_layers, n_images)


@dataclass
class _Clean:
    """What the trained network itself predicts."""

    chance: ChanceLevel = field(default_factory=ChanceLevel)
    scores: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=dict)

    def add(self, logits: Tensor, labels: Tensor | None) -> None:
        self.chance.add(logits.softmax(dim=1))
        if labels is not None:
            for name, values in label_scores(logits, labels).items():
                self.scores.setdefault(name, []).append(values.cpu().numpy())

    def mean(self, score: str) -> float | None:
        return _finite(np.concatenate(self.scores[score]).mean(dtype=np.float64)) if self.scores else None


class _Session:
    """The state of one measurement: what is open, what is known so far.

    A replay fits one batch size. When memory runs out it is dropped, and opened again for batches of half the size in
    the mode that was chosen first.
    """

    def __init__(
        self,
        started: float,
        protocol: Protocol,
        subject: Subject,
        probe_set: ProbeSet,
        distances: list[str],
        use_labels: bool,
        bar: Bar,
    ) -> None:
        self.started, self.seconds_opening = started, 0.0
        self.protocol, self.subject, self.probe_set, self.distances = protocol, subject, probe_set, distances
        self.labels = probe_set.labels if use_labels else None
        self.bar = bar
        self.batch_size = choose_batch_size(protocol.batch_size, probe_set, subject.device)
        self.notes = subject.notes()
        self.replay: Replay | None = None
        self.mode: Mode | None = None
        self.n_classes, self.temperature = self._with_memory(self._look_at_predictions)
        if self.labels is not None:
            probe_set.check_labels(self.n_classes)
        self.clean = _Clean()

    def run(self, on_trial: Callable[[Measurement], object] | None) -> Measurement:
        """Run all trials and return the measurement."""
        finished: list[_Trial] = []
        for trial in range(self.subject.n_trials):
            finished.append(self._with_memory(partial(self._run_trial, trial)))
            if on_trial is not None:
                on_trial(self._measurement(finished))
        return self._measurement(finished)

    # --- opening ----------------------------------------------------------------------------------------------------

    def _with_memory(self, work: Callable[[Replay], Result]) -> Result:
        """Do some work; where memory runs out, do it again with half the batch size, and say so."""
        while True:
            try:
                if self.replay is None:
                    self.replay = self._open()
                return work(self.replay)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Only here, where the error's traceback no longer holds the tensors that were too many:
            self.replay = None
            if self.batch_size == 1:
                raise LayercritError(
                    f"Out of memory on {self.subject.device} even with a batch of one image ({reason}). "
                    "Close other programs, use a smaller network or another device (--device)."
                )
            self.batch_size //= 2
            self.notes.append(f"out of memory: batch size halved to {self.batch_size}")
            self.bar.say(self.notes[-1])

    def _open(self) -> Replay:
        started = time.perf_counter()
        images, _ = self._normalised(0)
        network, layers = self.subject.network, self.subject.layers
        mode = self.mode or self.protocol.dtype
        replay = self._fastest(images) if mode == "auto" else open_replay(network, layers, images, cast(Mode, mode))
        self.mode = replay.mode
        if replay.note and replay.note not in self.notes:
            self.notes.append(replay.note)
        self.seconds_opening += time.perf_counter() - started
        return replay

    def _fastest(self, images: Tensor) -> Replay:
        """Return a bfloat16 replay where it pays and its error is tolerable on one batch, else the float32 one."""
        network, layers = self.subject.network, self.subject.layers
        float32 = open_replay(network, layers, images, "float32")
        if not isinstance(float32, GraphReplay) or not multiplies_bfloat16(self.subject.device):
            return float32
        share = float32.flops_after()
        evaluations = self.subject.n_trials * self.probe_set.n_images * (1 + sum(share.values()))
        if float32.flops_per_image * evaluations < _LONG_JOB:
            return float32
        bfloat16 = reopen(float32, images, "bfloat16")
        if bfloat16.mode != "bfloat16":
            return bfloat16  # its note says why it is another
        some = layers[:: math.ceil(len(layers) / _CALIBRATION_LAYERS)]
        calibration = calibrate(float32, bfloat16, list(self.subject.changes(0, some)), images)
        if calibration.tolerable:
            self.notes.append(f"bfloat16: {calibration}")
            return bfloat16
        self.notes.append(f"float32, for bfloat16 is too rough: {calibration}")
        return float32

    def _look_at_predictions(self, replay: Replay) -> tuple[int, float]:
        """Return the number of classes and the matched temperature, from the first images."""
        parts = []
        for start in range(0, min(_TEMPERATURE_IMAGES, self.probe_set.n_images), self.batch_size):
            images, n = self._normalised(start)
            parts.append(replay.logits(images)[:n])
        logits = torch.cat(parts)[:_TEMPERATURE_IMAGES]  # (n_images, n_classes)
        self._check_finite(logits, 0)
        temperature = fit_temperature(logits, MATCHED_ENTROPY * math.log(logits.shape[1]))
        if math.isnan(temperature):
            self.notes.append(
                "no temperature gives these predictions the entropy aimed at (are they constant?): "
                "nothing is temperature-matched"
            )
        return logits.shape[1], temperature

    # --- one trial --------------------------------------------------------------------------------------------------

    def _run_trial(self, trial: int, replay: Replay) -> _Trial:
        prepared, delta_norm = {}, []
        for change in self.subject.changes(trial):
            delta_norm.append(change.delta_norm)
            if change.delta_norm != 0:
                prepared[change.layer.name] = replay.prepare(change.layer, change.values)
        clean, parts = _Clean(), []
        for start in range(0, self.probe_set.n_images, self.batch_size):
            parts.append(self._run_batch(trial, start, replay, prepared, clean))
        distances = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        status = [
            "unchanged" if norm == 0 else "ok" if np.isfinite(row).all() else "not_finite"
            for norm, row in zip(delta_norm, distances["cosine"], strict=True)
        ]
        self.clean = clean
        return _Trial(trial, self.subject.seed(trial), status, delta_norm, distances)

    def _run_batch(
        self, trial: int, start: int, replay: Replay, prepared: Mapping[str, Any], clean: _Clean
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return each distance and score of one batch, ``(n_layers, n_images)``."""
        images, n = self._normalised(start)
        logits = {}
        for name, found in replay.sweep(images, prepared):
            logits[name] = found[:n].float()
            done = trial * self.probe_set.n_images + start + n * len(logits) / (len(prepared) + 1)
            self.bar.measured(done, self.subject.n_trials * self.probe_set.n_images)
        before = logits[None]
        self._check_finite(before, start)
        labels = None
        if self.labels is not None:
            labels = torch.tensor(self.labels[start : start + n], device=before.device)
        clean.add(before, labels)
        p, p_matched = before.softmax(dim=1), (before / self.temperature).softmax(dim=1)
        rows = []
        for layer in self.subject.layers:
            after = logits.get(layer.name, before)
            row = measure_distances(p, after.softmax(dim=1), self.distances)
            matched = measure_distances(p_matched, (after / self.temperature).softmax(dim=1), ["cosine"])
            row[MATCHED] = matched["cosine"]
            if labels is not None:
                row |= {_COLUMN_OF_SCORE[name]: values for name, values in label_scores(after, labels).items()}
            rows.append(row)
        return {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}

    def _normalised(self, start: int) -> tuple[Tensor, int]:
        """Return a full batch of normalised images, and how many of them count: the last one repeats to fill it."""
        pixels = self.probe_set.batch(start, start + self.batch_size)
        n = len(pixels)
        if n < self.batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch_size - n, *pixels.shape[1:])])
        return self.subject.normalise(pixels), n

    def _check_finite(self, logits: Tensor, start: int) -> None:
        bad = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"{self.subject.model.reference!r} itself predicts NaN or infinity for {len(bad)} of {len(logits)} "
                f"images, the first is {self.probe_set.names[start + bad[0]]!r}. "
                "Check its normalisation (mean, std), or use --dtype float32 (dtype='float32')."
            )

    # --- the result -------------------------------------------------------------------------------------------------

    def _measurement(self, finished: list[_Trial]) -> Measurement:
        per_image = {
            name: np.stack([trial.distances[name] for trial in finished], axis=1)  # (n_layers, n_trials, n_images)
            for name in (*self.distances, MATCHED)
        }
        ok = np.array([trial.status for trial in finished]).T == "ok"  # (n_layers, n_trials)
        for values in per_image.values():
            values[~ok] = np.nan
        rows = [self._cell(index, trial) for index in range(len(self.subject.layers)) for trial in finished]
        cells = pd.DataFrame(rows).astype({"seed": "uint64"})
        return Measurement(cells, per_image, self._record(finished))

    def _cell(self, index: int, trial: _Trial) -> dict[str, Any]:
        layer, replay = self.subject.layers[index], cast(Replay, self.replay)
        cell: dict[str, Any] = {
            "model": self.subject.model.reference,
            "layer": layer.name,
            "type": layer.type,
            "depth": layer.depth,
            "n_parameters": layer.n_parameters,
            "flops_after": (replay.flops_after() or {}).get(layer.name, math.nan),
            "reset": self.protocol.reset,
            "trial": trial.trial,
            "seed": trial.seed,
            "status": trial.status[index],
            "delta_norm": trial.delta_norm[index],
            "n_images": self.probe_set.n_images,
        }
        ok = trial.status[index] == "ok"
        for name, values in trial.distances.items():
            cell[name] = values[index].mean(dtype=np.float64) if ok else math.nan
        if self.labels is not None:
            cell["recovered_accuracy"] = cell["top1_accuracy"] / (self.clean.mean("top1") or math.nan)
        return cell

    def _record(self, finished: list[_Trial]) -> dict[str, Any]:
        subject, model, probe_set = self.subject, self.subject.model, self.probe_set
        replay = cast(Replay, self.replay)
        resolved = {
            "trials": subject.n_trials,
            "n_images": probe_set.n_images,
            "batch_size": self.batch_size,
            "dtype": replay.mode,
            "device": str(subject.device),
            "distances": self.distances,
        }
        return {
            "protocol": {**self.protocol.to_dict(), **resolved},
            "random_trials": subject.random_trials,
            "trial_seeds": [trial.seed for trial in finished],
            "model": {
                "reference": model.reference,
                "architecture": model.architecture,
                "sha256": model.sha256,
                "donor": subject.donor_in_words,
                "mean": list(model.mean),
                "std": list(model.std),
                "n_classes": self.n_classes,
                "n_parameters": sum(p.numel() for p in subject.network.parameters()),
            },
            "probe_set": {
                "source": str(probe_set.source),
                "sha256": probe_set.sha256,
                "seed": probe_set.seed,
                "n_images": probe_set.n_images,
                "skipped": list(probe_set.skipped),
                "labels": self.labels is not None,
                "preprocessing": {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in vars(probe_set.preprocessing).items()
                },
            },
            "predictions": {
                "chance": _finite(self.clean.chance.value),
                "temperature": _finite(self.temperature),
                "matched_entropy": MATCHED_ENTROPY * math.log(self.n_classes),
                "top1_accuracy": self.clean.mean("top1"),
                "loss": self.clean.mean("loss"),
            },
            "layers": {
                layer.name: {"parameters": list(layer.parameters), "shape": list(layer.shape)}
                for layer in subject.layers
            },
            "road": replay.road,
            "dtype": replay.mode,
            "device": str(subject.device),
            "threads": torch.get_num_threads(),
            "notes": list(self.notes),
            "versions": versions(),
            "seconds_opening": round(self.seconds_opening, 3),
            "seconds": round(time.perf_counter() - self.started, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _distance_names(distances: str | Iterable[str] | None) -> list[str]:
    if isinstance(distances, str):
        distances = distances.split(",")
    names = list(dict.fromkeys(DISTANCES if distances is None else ["cosine", *distances]))
    for name in names:
        get_distance(name)
        if name in CELL_COLUMNS or name.endswith(PER_IMAGE):
            raise ProtocolError(
                f"The distance {name!r} has the name of another column of the table of cells. Register it under "
                "another name."
            )
    return names


def _size_of(images: Any) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of images given as a probe set, a tensor or an array; else None."""
    if isinstance(images, ProbeSet):
        return images.preprocessing.channels, images.preprocessing.height, images.preprocessing.width
    shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
    if len(shape) != 4:
        return None
    if shape[1] in (1, 3):
        return shape[1], shape[2], shape[3]
    return (shape[3], shape[1], shape[2]) if shape[3] in (1, 3) else None


def _finite(number: float) -> float | None:
    """Return a number as JSON can hold it."""
    return float(number) if math.isfinite(number) else None
