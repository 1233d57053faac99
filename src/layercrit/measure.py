"""Measure one model on one probe set: which layers do its decisions depend on?"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from layercrit._allocator import large_blocks_stay
from layercrit._machine import choose_batch_size, find_device, is_out_of_memory, multiplies_bfloat16, versions
from layercrit._progress import Bar
from layercrit._untouched import rng_untouched, untouched
from layercrit.checkpoints import fit_to, read_checkpoint
from layercrit.distances import DISTANCES, get_distance, label_scores, measure_distances
from layercrit.errors import LayercritError, ModelError, ProtocolError, near
from layercrit.layers import Group, Layer, find_layers, select_layers
from layercrit.measurement import MATCHED, Measurement
from layercrit.models import Classifier, Model, open_model
from layercrit.probes import ProbeSet
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.replay import Mode, Replay, open_replay
from layercrit.resets import donor_values, draw_values, get_reset, seed_of
from layercrit.statistics import ChanceLevel, fit_temperature

__all__ = ["Measurement", "measure"]

MATCHED_ENTROPY = 0.1  # of the largest possible entropy, ln(n_classes): what the matched temperature aims at
LAYER_TOLERANCE, MEAN_TOLERANCE = 0.02, 0.002  # error in criticality that `auto` accepts for bfloat16
_TEMPERATURE_IMAGES = 512
_CALIBRATION_LAYERS = 12
_LONG_JOB = 2e13  # FLOPs from which `auto` considers bfloat16: minutes on a CPU, where a calibration is worth its time


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
        model: a reference such as ``timm:resnet50.a1_in1k``, an opened `Model`, or a module that takes normalised
            images ``(n_images, channels, height, width)``.
        images: a `ProbeSet`, or anything that `ProbeSet.from_source` takes: a folder, an array, a file.
        trials: see `Protocol`, as for all settings that are not listed here. A reset without chance is run once.
        n_images: see `Protocol`.
        layers: see `Protocol`.
        types: see `Protocol`.
        group: see `Protocol`.
        reset: a name in `layercrit.resets.RESETS`.
        donor: where new values come from instead of the architecture's initialiser: a module of the same architecture,
            or a weight file. Needed for ``rewind``. It is the same in every trial, so one trial is run.
        distances: names of the distances to keep per image beside ``cosine``; all registered ones by default.
        seed: see `Protocol`.
        batch_size: see `Protocol`.
        dtype: see `Protocol`.
        device: see `Protocol`.
        level: see `Protocol`.
        use_labels: whether to use labels that the images come with, for accuracies.
        progress: whether to show a progress bar on a terminal.
        on_trial: called with the measurement so far after every finished trial, to save it.

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
    protocol = Protocol(trials, n_images, layers, types, group, reset, seed, batch_size, dtype, device, level)
    get_reset(reset)
    names = _distance_names(distances)
    with rng_untouched(), Bar(progress) as bar:
        opened = open_model(model, input_size=_size_of(images)) if isinstance(model, nn.Module) else open_model(model)
        probe_set = ProbeSet.from_source(
            images,
            opened.preprocessing,
            n_images=n_images,
            seed=seed_of(seed, "probe set") % 2**32,
            use_labels=use_labels,
            progress=bar.decoded,
        )
        with untouched(opened.network), large_blocks_stay():
            return _Session(protocol, opened, probe_set, names, donor, bar).run(on_trial)


@dataclass
class _Trial:
    """What one trial gave, layers in depth order."""

    trial: int
    seed: int
    status: list[str]
    delta_norm: list[float]
    distances: dict[str, npt.NDArray[np.float32]]  # distance or score -> (n_layers, n_images)


class _Session:
    """The state of one measurement: what is open, what is finished."""

    def __init__(
        self,
        protocol: Protocol,
        model: Model,
        probe_set: ProbeSet,
        distances: list[str],
        donor: nn.Module | str | Path | None,
        bar: "Bar",
    ) -> None:
        self.started = time.time()
        self.protocol, self.model, self.probe_set, self.distances, self.bar = protocol, model, probe_set, distances, bar
        self.reset = get_reset(protocol.reset)
        self.device = find_device(protocol.device)
        self.network = model.network.eval()
        if any(p.device != self.device for p in self.network.parameters()):
            self.network = copy.deepcopy(self.network).to(self.device)
        self.classifier = Classifier(self.network, model.mean, model.std)
        self.notes: list[str] = []
        self.batch_size = choose_batch_size(protocol.batch_size, probe_set, self.device)
        first = self._normalised(0)[0]
        self.layers = select_layers(
            find_layers(self.network, first[:1]),
            types=protocol.types,
            patterns=protocol.layers,
            group=cast(Group, protocol.group),
        )
        self.given_donor = _given_donor(donor, self.reset.donor, model, self.layers)
        self.random_trials = self.reset.random and self.given_donor is None
        self.n_trials = protocol.trials if self.random_trials else 1
        if self.n_trials < protocol.trials:
            self.notes.append(f"one trial: every trial of {protocol.reset!r} would be the same")
        self.replay = self._with_memory(self._open)
        self.seconds_opening = time.time() - self.started
        self.clean: dict[str, npt.NDArray[np.float32]] = {}
        self.n_classes, self.temperature = self._with_memory(self._look_at_predictions)
        if probe_set.labels is not None:
            probe_set.check_labels(self.n_classes)
        self.chance = ChanceLevel()

    def run(self, on_trial: Callable[[Measurement], object] | None) -> Measurement:
        """Run all trials and return the measurement."""
        finished: list[_Trial] = []
        batches = math.ceil(self.probe_set.n_images / self.batch_size)
        self.bar.start(self.n_trials * batches * sum(self._share_after(layer) for layer in self.layers))
        for trial in range(self.n_trials):
            finished.append(self._with_memory(lambda trial=trial: self._run_trial(trial)))  # type: ignore[misc]
            measurement = self._measurement(finished)
            if on_trial is not None:
                on_trial(measurement)
        return measurement

    # --- opening ----------------------------------------------------------------------------------------------------

    def _open(self) -> Replay:
        images = self._normalised(0)[0]
        if self.protocol.dtype != "auto":
            replay = open_replay(self.network, self.layers, images, cast(Mode, self.protocol.dtype))
            return self._noted(replay)
        replay = self._noted(open_replay(self.network, self.layers, images, "float32"))
        share = replay.flops_after()
        if share is None or not multiplies_bfloat16(self.device):
            return replay
        evaluations = self.n_trials * self.probe_set.n_images * (1 + sum(share.values()))
        if replay.flops_per_image * evaluations < _LONG_JOB:
            return replay
        return self._calibrated(replay, images)

    def _calibrated(self, float32: Replay, images: Tensor) -> Replay:
        """Return a bfloat16 replay if its error in criticality on one batch is tolerable, else the float32 one."""
        try:
            bfloat16 = open_replay(self.network, self.layers, images, "bfloat16")
            step = math.ceil(len(self.layers) / _CALIBRATION_LAYERS)
            some = self.layers[::step]
            donor = self._donor(0)
            drawn = {layer.name: self._draw(layer, donor, 0) for layer in some}
            exact, rough = (self._criticalities(replay, some, drawn, images) for replay in (float32, bfloat16))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.notes.append(f"float32: bfloat16 fails ({str(error).splitlines()[0][:120]})")
            return float32
        worst, mean = float((rough - exact).abs().max()), float((rough - exact).mean().abs())
        found = f"error in criticality {worst:.4f} at most and {mean:.5f} in the mean of {len(some)} layers"
        if worst <= LAYER_TOLERANCE and mean <= MEAN_TOLERANCE:
            self.notes.append(f"bfloat16: {found}, on {len(images)} images")
            return bfloat16
        self.notes.append(f"float32, for bfloat16 is too rough: {found}, on {len(images)} images")
        return float32

    def _criticalities(
        self, replay: Replay, layers: list[Layer], drawn: Mapping[str, Mapping[str, Tensor]], images: Tensor
    ) -> Tensor:
        prepared = {layer.name: replay.prepare(layer, drawn[layer.name]) for layer in layers}
        logits = dict(replay.sweep(images, prepared))
        clean = logits.pop(None).softmax(dim=1)
        return torch.stack(
            [
                measure_distances(clean, logits[layer.name].softmax(dim=1), ["cosine"])["cosine"].mean()
                for layer in layers
            ]
        )

    def _look_at_predictions(self) -> tuple[int, float]:
        """Return the number of classes and the matched temperature."""
        parts = []
        for start in range(0, min(_TEMPERATURE_IMAGES, self.probe_set.n_images), self.batch_size):
            images, n = self._normalised(start)
            parts.append(self.replay.logits(images)[:n])
        logits = torch.cat(parts)[:_TEMPERATURE_IMAGES]
        n_classes = logits.shape[1]
        if n_classes < 2:
            raise ModelError(
                f"{self.model.reference!r} returns one number per image. Criticality compares softmax outputs: "
                "expected logits of at least two classes."
            )
        _check_finite(logits, 0, self.model, self.probe_set)
        return n_classes, fit_temperature(logits, MATCHED_ENTROPY * math.log(n_classes))

    # --- one trial --------------------------------------------------------------------------------------------------

    def _run_trial(self, trial: int) -> _Trial:
        donor = self._donor(trial)
        prepared, status, delta_norm = {}, [], []
        trained = {name: p.detach() for name, p in self.model.network.named_parameters(remove_duplicate=False)}
        for layer in self.layers:
            values = self._draw(layer, donor, trial)
            change = sum(
                float((value.double() - trained[name].double()).square().sum()) for name, value in values.items()
            )
            delta_norm.append(math.sqrt(change))
            status.append("unchanged" if change == 0 else "ok")
            if change > 0 or math.isnan(change):
                prepared[layer.name] = self.replay.prepare(layer, values)
        del donor
        shape = (len(self.layers), self.probe_set.n_images)
        values_of: dict[str, npt.NDArray[np.float32]] = {}
        before = self.bar.done
        try:
            for start in range(0, self.probe_set.n_images, self.batch_size):
                for name, part in self._run_batch(start, prepared, first=trial == 0).items():
                    whole = values_of.setdefault(name, np.full(shape, np.nan, np.float32))
                    whole[:, start : start + part.shape[1]] = part
        except RuntimeError:
            self.bar.done = before  # the trial is run again, with smaller batches
            raise
        for index, row in enumerate(values_of["cosine"]):
            if status[index] == "ok" and not np.isfinite(row).all():
                status[index] = "not_finite"
        return _Trial(trial, self._seed(trial), status, delta_norm, values_of)

    def _run_batch(self, start: int, prepared: Mapping[str, Any], first: bool) -> dict[str, npt.NDArray[np.float32]]:
        images, n = self._normalised(start)
        after: dict[str, Tensor] = {}
        clean = torch.empty(0)
        for name, logits in self.replay.sweep(images, prepared):
            if name is None:
                clean = logits[:n].float()
            else:
                after[name] = logits[:n].float()
                self.bar.advance(self._shares[name])
        labels = None
        if self.probe_set.labels is not None:
            labels = torch.tensor(self.probe_set.labels[start : start + n], device=self.device)
        _check_finite(clean, start, self.model, self.probe_set)
        p, p_matched = clean.softmax(dim=1), (clean / self.temperature).softmax(dim=1)
        if first:
            self._note_clean(start, clean, p, labels)
        rows = []
        for layer in self.layers:
            logits = after.get(layer.name, clean)
            row = measure_distances(p, logits.softmax(dim=1), self.distances)
            row[MATCHED] = measure_distances(p_matched, (logits / self.temperature).softmax(dim=1), ["cosine"])[
                "cosine"
            ]
            if labels is not None:
                row |= {f"label_{name}": values for name, values in label_scores(logits, labels).items()}
            rows.append(row)
        return {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}

    def _note_clean(self, start: int, clean: Tensor, p: Tensor, labels: Tensor | None) -> None:
        if start == 0:  # also when the first trial is run again
            self.chance, self.clean = ChanceLevel(), {}
        self.chance.add(p)
        if labels is not None:
            for name, values in label_scores(clean, labels).items():
                part = values.cpu().numpy()
                self.clean[name] = np.concatenate([self.clean.get(name, part[:0]), part])

    def _donor(self, trial: int) -> Mapping[str, Tensor]:
        if self.given_donor is not None:
            return self.given_donor
        if self.reset.donor is None:
            return {}
        return donor_values(self.model, self.layers, self._seed(trial))

    def _draw(self, layer: Layer, donor: Mapping[str, Tensor], trial: int) -> dict[str, Tensor]:
        values = draw_values(self.reset, layer, self.model.network, donor, self._seed(trial))
        return {name: value.to(self.device) for name, value in values.items()}

    def _seed(self, trial: int) -> int:
        return seed_of(self.protocol.seed, self.model.architecture, self.protocol.reset, trial)

    def _normalised(self, start: int) -> tuple[Tensor, int]:
        """Return a full batch of normalised images, and how many of them count: the last one repeats to fill it."""
        pixels = self.probe_set.batch(start, start + self.batch_size)
        n = len(pixels)
        if n < self.batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch_size - n, *pixels.shape[1:])])
        return self.classifier.normalise(pixels.to(self.device)), n

    # --- the result -------------------------------------------------------------------------------------------------

    def _measurement(self, finished: list[_Trial]) -> Measurement:
        per_image = {
            name: np.stack([trial.distances[name] for trial in finished], axis=1) for name in [*self.distances, MATCHED]
        }
        ok = np.array([trial.status for trial in finished]).T == "ok"  # (n_layers, n_trials)
        for values in per_image.values():
            values[~ok] = np.nan
        clean_top1 = float(self.clean["top1"].mean()) if self.clean else None
        rows = []
        for index, layer in enumerate(self.layers):
            for trial in finished:
                row: dict[str, Any] = {
                    "model": self.model.reference,
                    "layer": layer.name,
                    "type": layer.type,
                    "depth": layer.depth,
                    "n_parameters": layer.n_parameters,
                    "flops_after": (self.replay.flops_after() or {}).get(layer.name, math.nan),
                    "reset": self.protocol.reset,
                    "trial": trial.trial,
                    "seed": trial.seed,
                    "status": trial.status[index],
                    "delta_norm": trial.delta_norm[index],
                    "n_images": self.probe_set.n_images,
                }
                counts = trial.status[index] == "ok"
                means = {
                    name: v[index].mean(dtype=np.float64) if counts else math.nan for name, v in trial.distances.items()
                }
                row |= {_column(name): value for name, value in means.items()}
                if clean_top1 is not None:
                    row["recovered_accuracy"] = row["top1_accuracy"] / clean_top1 if clean_top1 else math.nan
                rows.append(row)
        cells = pd.DataFrame(rows).astype({"seed": "uint64"})
        return Measurement(cells, per_image, self._record(clean_top1))

    def _record(self, clean_top1: float | None) -> dict[str, Any]:
        chance = self.chance.value
        resolved = {"trials": self.n_trials, "batch_size": self.batch_size, "dtype": self.replay.mode}
        return {
            "protocol": {
                **self.protocol.to_dict(),
                **resolved,
                "device": str(self.device),
                "distances": self.distances,
            },
            "random_trials": self.random_trials,
            "model": {
                "reference": self.model.reference,
                "architecture": self.model.architecture,
                "sha256": self.model.sha256,
                "donor": self._donor_in_words(),
                "mean": list(self.model.mean),
                "std": list(self.model.std),
                "n_classes": self.n_classes,
                "n_parameters": sum(p.numel() for p in self.network.parameters()),
            },
            "probe_set": {
                "source": str(self.probe_set.source),
                "sha256": self.probe_set.sha256,
                "seed": self.probe_set.seed,
                "n_images": self.probe_set.n_images,
                "skipped": list(self.probe_set.skipped),
                "labels": self.probe_set.labels is not None,
                "preprocessing": vars(self.probe_set.preprocessing),
            },
            "predictions": {
                "chance": chance if math.isfinite(chance) else None,
                "temperature": self.temperature if math.isfinite(self.temperature) else None,
                "matched_entropy": MATCHED_ENTROPY * math.log(self.n_classes),
                "top1_accuracy": clean_top1,
                "loss": float(self.clean["loss"].mean()) if self.clean else None,
            },
            "layers": {layer.name: {"parameters": layer.parameters, "shape": layer.shape} for layer in self.layers},
            "road": self.replay.road,
            "dtype": self.replay.mode,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "notes": self.notes,
            "versions": versions(),
            "seconds_opening": round(self.seconds_opening, 3),
            "seconds": round(time.time() - self.started, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _donor_in_words(self) -> str | None:
        if self.given_donor is not None:
            return "given"
        return self.model.initialiser if self.reset.donor == "initialiser" else None

    # --- memory and bookkeeping -------------------------------------------------------------------------------------

    def _with_memory(self, work: Callable[[], Any]) -> Any:
        """Do some work; where memory runs out, do it again with half the batch size, and say so."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if self.batch_size == 1:
                raise LayercritError(
                    f"Out of memory on {self.device} even with a batch of one image. "
                    "Close other programs, use a smaller network or another device (--device)."
                )
            self.batch_size //= 2
            self.notes.append(f"out of memory: batch size halved to {self.batch_size}")
            self.bar.say(self.notes[-1])
            if work != self._open:
                self.replay = self._with_memory(self._open)

    def _noted(self, replay: Replay) -> Replay:
        if replay.note and replay.note not in self.notes:
            self.notes.append(replay.note)
        return replay

    def _share_after(self, layer: Layer) -> float:
        return self._shares[layer.name]

    @property
    def _shares(self) -> Mapping[str, float]:
        return self.replay.flops_after() or dict.fromkeys((layer.name for layer in self.layers), 1.0)


def _distance_names(distances: Iterable[str] | None) -> list[str]:
    names = list(DISTANCES) if distances is None else ["cosine", *distances]
    return [get_distance(name).name for name in dict.fromkeys(names)]


def _column(name: str) -> str:
    """Return the column of the cell table that holds the mean of a distance or score."""
    if not name.startswith("label_"):
        return name
    score = name.removeprefix("label_")
    return score if score == "loss" else f"{score}_accuracy"


def _given_donor(
    donor: nn.Module | str | Path | None, needs: str | None, model: Model, layers: list[Layer]
) -> dict[str, Tensor] | None:
    if donor is None:
        if needs == "checkpoint":
            raise ProtocolError(
                "The reset 'rewind' needs the checkpoint to rewind to: give it with --from (donor=...)."
            )
        return None
    if needs is None:
        raise ProtocolError("A donor was given, but this reset takes no values from one. Leave out --from (donor=...).")
    trained = dict(model.network.named_parameters(remove_duplicate=False))
    if isinstance(donor, nn.Module):
        values = {name: p.detach().cpu() for name, p in donor.named_parameters(remove_duplicate=False)}
        for name in (name for layer in layers for name in layer.parameters):
            if name not in values or values[name].shape != trained[name].shape:
                raise ModelError(
                    f"The donor has no parameter {name!r} of shape {tuple(trained[name].shape)}. {near(name, values)} "
                    "Give a network of the same architecture."
                )
        return values
    checkpoint = read_checkpoint(Path(donor))
    return fit_to(checkpoint.tensors, model.network.state_dict(), str(donor))


def _size_of(images: Any) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of images given as a tensor or an array in that order, or as a probe set."""
    if isinstance(images, ProbeSet):
        return images.preprocessing.channels, images.preprocessing.height, images.preprocessing.width
    shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
    return (shape[1], shape[2], shape[3]) if len(shape) == 4 and shape[1] in (1, 3) else None


def _check_finite(logits: Tensor, start: int, model: Model, probe_set: ProbeSet) -> None:
    bad = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"{model.reference!r} itself predicts NaN or infinity for {len(bad)} of {len(logits)} images, the first is "
            f"{probe_set.names[start + bad[0]]!r}. Check its normalisation (mean, std), or use --dtype float32."
        )
