"""What a study will cost, before anything is measured: cells, FLOPs, bytes to download, time of its forward passes."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from layercrit.counts import counted, duration
from layercrit.engine.allocator import large_blocks_stay
from layercrit.engine.flops import count_flops
from layercrit.errors import LayercritError, ModelError, first_line
from layercrit.layer_sets import sets_of
from layercrit.layers import Layer, find_layers, select_layers
from layercrit.machine import find_device
from layercrit.models.model import Classifier
from layercrit.models.references import is_here, open_model, without_weights
from layercrit.precision import SD_TRIALS, PrecisionPlan, n_pilot_images, typical_trials
from layercrit.resets import get_reset
from layercrit.restoring import undisturbed
from layercrit.statistics import needed_trials
from layercrit.study.entries import ModelEntry
from layercrit.study.file import StudyFile, read_study_file
from layercrit.study.images import check_lists, n_available_images
from layercrit.study.module_entries import models_asked
from layercrit.study.pilots import plans_of
from layercrit.study.shards import is_study, open_study

__all__ = ["StudyPlan", "plan_study"]

_TOTALS = ("n_images", "images_mistake", "flops_plain", "flops", "seconds", "precision", "module_criticality")
_TIMED_PIXELS = 4 * 224 * 224  # of the batch whose forward pass is timed
_BYTES = 4  # of a float32 number


@dataclass(frozen=True)
class _Architecture:
    """What models without weights tell of their cost; FLOPs are of one image."""

    n_layers: int
    flops: float
    flops_after: float  # sum over layers of the FLOPs that run anew
    n_numbers: int  # parameters and buffers
    seconds: float  # a forward pass of one image here
    mistake: str = ""
    n_modules: int = 0  # layers, without sets of them
    flops_modules: float = 0.0  # sum over these of the FLOPs that run anew


@dataclass(frozen=True)
class StudyPlan:
    """What a study will cost.

    Attributes:
        models: one row per model: ``model``, ``reference``, ``architecture``, ``n_layers``, ``n_cells``, ``n_done``
            (cells that the study's folder has), ``download`` (bytes that are not on this machine), ``mistake`` (why it
            cannot be planned, or an empty text).
        n_images: images that every model gets; the number asked for if the source's cannot be counted.
        images_mistake: why the images cannot be used, or an empty text.
        flops_plain: FLOPs of the cells left if the whole network ran for each.
        flops: FLOPs of the cells left as they will be run, everything before a reset layer once per batch.
        seconds: time for these FLOPs on this machine with one worker, at the speed of the network's own forward pass
            in float32; the fused and the bfloat16 replay are faster. All else comes on top: starting workers, opening
            models, drawing resets, comparing outputs. In a small study, that is most of the time.
        precision: what an asked half-width means for these numbers, in words; empty where none is asked for.
        module_criticality: what it costs at most, beside these numbers, in words; empty where none is asked for.
    """

    models: pd.DataFrame
    n_images: int
    images_mistake: str
    flops_plain: float
    flops: float
    seconds: float
    precision: str = ""
    module_criticality: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "models": self.models.to_dict("records"),
            **{name: getattr(self, name) for name in _TOTALS},
            **{name: int(self.models[name].sum()) for name in ("n_cells", "n_done", "download")},
        }


@undisturbed()
def plan_study(study: StudyFile | str | Path, folder: str | Path | None = None) -> StudyPlan:
    """Estimate what a study will cost. Each architecture is built and run on a black image; nothing is measured.

    Args:
        study: what to measure: a study file, or what `layercrit.study.file.read_study_file` makes of one.
        folder: the study's folder, to count what is done; None for a new study.

    Raises:
        StudyError: the file has mistakes, or models are not trained yet.

    Examples:
        >>> import layercrit
        >>> plan = layercrit.plan_study("layercrit-demo/fashion.toml", "layercrit-demo/study")
        >>> bool((plan.models["n_done"] == plan.models["n_cells"]).all())
        True
    """
    if not isinstance(study, StudyFile):
        study = read_study_file(study)
    study.check_trained()
    n_images, images_mistake = study.n_images, ""
    available = {images.name: images.n_images for images in study.images}
    try:
        available = {images.name: n_available_images(images) for images in study.images}
        n_images = available[study.probe_set]
        for images in study.images:
            check_lists(images)
    except LayercritError as error:
        images_mistake = str(error)
    done, plans = (_done(Path(folder)), _plans(Path(folder))) if folder is not None else (Counter[str](), {})
    protocol = study.protocol
    if protocol.is_planned:
        first = n_pilot_images(protocol.half_width, protocol.level, protocol.pilot, n_images)
        n_images = next((plan.n_images for plan in plans.values()), first)
    architectures: dict[str, _Architecture] = {}
    n_trials = sum(needed_trials(protocol.first_trials, get_reset(reset).random) for reset in study.resets)
    rows, plain, replayed, seconds = [], 0.0, 0.0, 0.0
    with large_blocks_stay():
        for entry in study.models:
            name, built = _architecture(study, entry, architectures)
            here, mistake = _is_here(entry, built.mistake)
            further = _n_further(plans, entry.name)
            n_cells = built.n_layers * n_trials + further
            n_done = min(done[entry.name], n_cells)
            n_shown = available[entry.probe_set]
            n_shown = min(n_shown, n_images) if protocol.is_planned else n_shown
            left = (n_cells - n_done) / max(1, n_cells) * n_shown
            # beside the resets, each trial runs the trained network, which is asked once before all trials, too
            n_sweeps = n_trials + further / max(1, built.n_layers)
            flops = left * (n_sweeps * (built.flops + built.flops_after) + built.flops)
            plain += left * built.flops * (n_cells + 1)
            replayed += flops
            seconds += flops / built.flops * built.seconds if built.flops else 0.0
            rows.append(
                {
                    "model": entry.name,
                    "reference": entry.reference,
                    "architecture": name,
                    "n_layers": built.n_layers,
                    "n_cells": n_cells,
                    "n_done": n_done,
                    "download": 0 if here or entry.variant_of else _BYTES * built.n_numbers,
                    "mistake": mistake,
                }
            )
    words = _precision(study, plans, n_images), _module_criticality(study, architectures, available)
    return StudyPlan(pd.DataFrame(rows), n_images, images_mistake, plain, replayed, seconds, *words)


def _module_criticality(
    study: StudyFile, architectures: dict[str, _Architecture], available: Mapping[str | None, int]
) -> str:
    """Say what the module criticality that is asked for costs at most."""
    settings = study.module_criticality
    if settings is None:
        return ""
    models = models_asked(study.models, settings)
    points, draws = settings["n_a"] * settings["n_s"], settings["draws"]
    flops = seconds = 0.0
    n_modules = 0
    for entry in models:
        built = _architecture(study, entry, architectures)[1]
        n_modules += built.n_modules
        one = min(settings["n_images"], available[entry.probe_set]) * points * draws * built.flops_modules
        flops += one
        seconds += one / built.flops * built.seconds if built.flops else 0.0
    return (
        f"module criticality of {counted(len(models), 'model')}, {counted(n_modules, 'module')} in all, comes on top: "
        f"at most {counted(n_modules * points * draws, 'evaluation')} ({points} points of the grid, {draws} draws), "
        f"{flops:.3g} FLOPs, of which the forward passes alone take about {duration(seconds)} in one process; its "
        "search usually takes a part of these"
    )


def _plans(folder: Path) -> dict[tuple[str, str], PrecisionPlan]:
    """Return what was planned after the pilots of a study."""
    if not is_study(folder):
        return {}
    with open_study(folder) as store:
        return plans_of(store.meta("precision"))


def _n_further(plans: Mapping[tuple[str, str], PrecisionPlan], model: str) -> int:
    """Return how many cells of a model were planned after its pilot."""
    own = [plan for (name, _), plan in plans.items() if name == model]
    return sum(layer.trials - plan.pilot for plan in own for layer in plan.layers.values())


def _precision(study: StudyFile, plans: Mapping[tuple[str, str], PrecisionPlan], n_images: int) -> str:
    """Say what is known of the cost of the half-width that is asked for."""
    protocol = study.protocol
    if protocol.half_width is None:
        return ""
    if plans:
        trials = [layer.trials for plan in plans.values() for layer in plan.layers.values()]
        missed = sum(not layer.reached for plan in plans.values() for layer in plan.layers.values())
        numbers = f"{min(trials)}" if min(trials) == max(trials) else f"{min(trials)} to {max(trials)}"
        short = f"; {missed} layers will not reach it" if missed else ""
        return (
            f"half-width {protocol.half_width:g}, as planned after the pilot: {numbers} trials a layer "
            f"on {n_images:,} images{short}"
        )
    typical = typical_trials(protocol.half_width, protocol.level, protocol.pilot, n_images)
    return (
        f"half-width {protocol.half_width:g}: these are the cells of the pilot, {protocol.pilot} trials on "
        f"{n_images:,} images. What follows depends on how much draws differ: a layer in which they vary as in the "
        f"published networks (SD {SD_TRIALS}) takes {typical} trials in all, any layer {protocol.max_trials} at most"
    )


def _architecture(study: StudyFile, entry: ModelEntry, known: dict[str, _Architecture]) -> tuple[str, _Architecture]:
    """Return a model's architecture, built once however many models share it."""
    name = ""
    try:
        name = without_weights(entry.reference)
        if name not in known:
            known[name] = _built(study, name)
    except LayercritError as error:
        known[name or entry.reference] = _Architecture(0, 0.0, 0.0, 0, 0.0, str(error))
    return name, known[name or entry.reference]


def _built(study: StudyFile, reference: str) -> _Architecture:
    size, protocol = study.preprocessing, study.protocol
    zeros, ones = (0.0,) * size.channels, (1.0,) * size.channels  # what a model's own are costs nothing
    model = open_model(reference, mean=zeros, std=ones, input_size=(size.channels, size.height, size.width))
    network = model.network
    normalise = Classifier(network, model.mean, model.std).normalise
    black = model.black_image
    layers = select_layers(
        _all_layers(reference, network, normalise(black), protocol.group),
        types=protocol.types,
        patterns=protocol.layers,
        group=protocol.group,  # type: ignore[arg-type]
    )
    modules, layers = layers, sets_of(layers, protocol.sets)
    flops, after = count_flops(network, layers, normalise(black))
    after_modules = after if modules == layers else count_flops(network, modules, normalise(black))[1]
    n_numbers = sum(tensor.numel() for tensor in network.state_dict().values())
    batch = black.expand(max(1, _TIMED_PIXELS // (size.height * size.width)), -1, -1, -1)
    device = find_device(protocol.device)
    seconds = _seconds(network.to(device), normalise(batch).to(device))
    ahead, of_modules = (flops * sum(shares.values()) for shares in (after, after_modules))
    return _Architecture(len(layers), flops, ahead, n_numbers, seconds, "", len(modules), of_modules)


def _all_layers(reference: str, network: torch.nn.Module, image: torch.Tensor, group: str) -> list[Layer]:
    try:
        return find_layers(network, image, group)
    except LayercritError:
        raise
    except Exception as error:  # a network's own code raises what it likes
        raise ModelError(
            f"{reference!r} cannot run on an image of {' x '.join(map(str, image.shape[1:]))} (channels, height, "
            f"width) ({first_line(error)}). All models of a study get the same pixels: change input_size under "
            "[images], or leave the model out."
        ) from error


def _seconds(network: torch.nn.Module, images: torch.Tensor) -> float:
    """Return the time that the network's forward pass takes for one image of a batch."""
    with torch.inference_mode():
        network(images[:1])  # what is done only once
        times = []
        for _ in range(3):  # of which the shortest had least to wait for other programs
            started = time.perf_counter()
            network(images)
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return min(times) / len(images)


def _is_here(entry: ModelEntry, mistake: str) -> tuple[bool, str]:
    """Return whether opening a model downloads nothing, and the mistake known of it or found in its weights' name."""
    if mistake:
        return True, mistake
    try:
        return is_here(entry.reference), ""
    except LayercritError as error:
        return True, str(error)


def _done(folder: Path) -> Counter[str]:
    """Count the measured cells of each model."""
    if not is_study(folder):
        return Counter()
    with open_study(folder) as store:
        return Counter(store.cells()["model"])
