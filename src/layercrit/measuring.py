"""Measure one model on one probe set: which layers do its decisions depend on?"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import nn

from layercrit.attacks import Pgd, attacked, split_attack
from layercrit.counts import counted, counted_units
from layercrit.distances import DISTANCES, get_distance
from layercrit.engine.allocator import large_blocks_stay
from layercrit.engine.flops import count_flops
from layercrit.engine.subject import Subject
from layercrit.errors import ProtocolError
from layercrit.layer_sets import read_sets, sets_of
from layercrit.layers import Group, find_layers, select_layers
from layercrit.measurement import Measurement
from layercrit.models.model import Model, size_explained
from layercrit.models.references import open_model, without_weights
from layercrit.probes.image_sizes import common_size
from layercrit.probes.labelling import LabelsGiven, are_wanted, open_images
from layercrit.probes.probe_set import ProbeSet
from layercrit.probes.sources import ArraySource
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.resets import get_reset
from layercrit.restoring import attributes_kept, rng_untouched, undisturbed, untouched
from layercrit.sampling import OnTrial, Sampling
from layercrit.seeds import probe_set_seed
from layercrit.trackers.callbacks import Caller, OnCell

__all__ = ["Measurement", "list_layers", "measure"]


def measure(
    model: str | Model | nn.Module,
    images: Any,
    *,
    trials: int = DEFAULTS.trials,
    n_images: int = DEFAULTS.n_images,
    layers: str = DEFAULTS.layers,
    types: str = DEFAULTS.types,
    group: str = DEFAULTS.group,
    sets: str | Path | Mapping[str, Any] = DEFAULTS.sets,
    reset: str = DEFAULTS.reset,
    norm_statistics: str = DEFAULTS.norm_statistics,
    donor: nn.Module | str | Path | None = None,
    distances: Iterable[str] | None = None,
    seed: int = DEFAULTS.seed,
    batch_size: int | str = DEFAULTS.batch_size,
    dtype: str = DEFAULTS.dtype,
    device: str = DEFAULTS.device,
    level: float = DEFAULTS.level,
    interval: str = DEFAULTS.interval,
    half_width: float | None = DEFAULTS.half_width,
    minutes: float | None = DEFAULTS.minutes,
    pilot: int = DEFAULTS.pilot,
    max_trials: int = DEFAULTS.max_trials,
    labels: LabelsGiven = "auto",
    classes: str | Path | Sequence[str] | None = None,
    keep_images: str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
    resume: Measurement | None = None,
    on_trial: OnTrial | None = None,
    on_cell: OnCell | None = None,
) -> Measurement:
    """Reset each layer of a model in turn and measure how far its predictions move.

    The criticality of a layer is 1 minus the cosine similarity of the softmax outputs before and after its reset,
    averaged over trials and images (Gavrikov et al. 2024, arXiv 2410.14470): 0 for a layer that the decisions do not
    depend on, near 1 for one that they do. The model is left bit for bit as it was, also after an exception.

    Args:
        model: a reference such as ``timm:resnet50.a1_in1k``, an opened `Model`, or a module that takes images
            ``(n_images, channels, height, width)``. A module gets an array of images in the size they have.
        images: anything that `ProbeSet.from_source` takes: a folder, an array, a file; ``corrupt:fog@3:SOURCE`` for
            corrupted images, ``attack:pgd(norm=linf, eps=4/255):SOURCE`` for adversarial ones (see
            `layercrit.attacks.attacked`); or a `ProbeSet`, used whole.
        trials: random draws per layer. A reset that is not random is run once.
        n_images: how many of the images to use, drawn by ``seed``; all if there are fewer.
        layers: shell-style patterns on layer names, comma-separated, such as ``layer1.*,fc``.
        types: types of layers that are reset, comma-separated, of `layercrit.layers.LAYER_TYPES`, or ``all``.
        group: reset each ``layer`` separately, or a whole ``block`` or ``stage`` at once, or a block's ``attention``,
            its ``mlp``, or a convolution with its normalisation (``conv+norm``); see `layercrit.layers.select_layers`.
        sets: reset ``each`` of these on its own, or sets of them: ``all-but-one``, ``cascade-up``, ``cascade-down``,
            ``pairs``, or those that a TOML file or a mapping names; see `layercrit.layer_sets.sets_of`.
        reset: what replaces a layer's parameters, a name in `layercrit.resets.RESETS`, with options in brackets if it
            has some: ``noise(scale=0.5)``.
        norm_statistics: running statistics of normalisation layers beside a reset: as ``trained``, as in the published
            study; ``reset``, where those of the first normalisation layer that the reset reaches become what they are
            before training, mean 0 and variance 1; or ``reestimate``, where those of all that it reaches are estimated
            again, layer by layer, on the first 128 images of the probe set.
        donor: where new values come from instead of the architecture's initialiser: a module or model reference of the
            same architecture, or a weight file. Needed for ``rewind`` and ``donor``, and for ``rewind(epoch=N)`` unless
            the model's reference is the folder of a training run. The same in every trial, so one trial is run.
        distances: names of the distances to measure beside ``cosine``; all registered ones by default.
        seed: the seed of all draws and of the choice of images.
        batch_size: images run at once; ``auto`` depends on their size and the device.
        dtype: ``reference`` (the network's own operators), ``float32`` (folded and fused), ``bfloat16``, or ``auto``:
            bfloat16 where that is fast and, on a first batch, exact enough, else float32 (see `Protocol`).
        device: ``auto`` (a GPU if there is one), or any name that torch knows.
        level: confidence level of intervals, between 0 and 1.
        interval: ``t`` (Student's) or ``betting``, which assumes nothing but that distances lie in [0, 1].
        half_width: half-width of the interval that every layer is to have, between 0 and 1. A pilot then plans, once,
            how many images all layers get and how many trials each (see `layercrit.precision`), in place of ``trials``;
            ``n_images`` is the most images. A layer that does not reach it has the status ``not_reached``.
        minutes: in place of ``half_width``: the smallest one that can be had in this time.
        pilot: trials of the pilot, at least 3.
        max_trials: the most trials of a layer under ``half_width`` or ``minutes``.
        labels: labels for accuracy and loss: ``"auto"``: those that the images come with; ``"none"``; a file of labels,
            a column, or an array: see `ProbeSet.from_source`.
        classes: the names of classes in the order of the model's outputs, or a text file with one per line.
        keep_images: a folder for adversarial images, in which a measurement that goes on finds them again.
        name: what tables and figures call the model; None: a short form of its reference.
        progress: whether to show a progress bar on a terminal.
        resume: an unfinished measurement of the same, or one of fewer trials, to go on with.
        on_trial: called after every finished trial with a function without arguments, which builds and returns the
            measurement of the trials up to that one: call it when you want to save them, now or later.
        on_cell: called with every cell that was measured now: a row as in `Measurement.cells`, and with ``n_done`` and
            ``n_planned``, the cells that are done and that there are to be. Cells of a pilot come again where it is run
            again on more images. An exception is said once, as a RuntimeWarning, and the measurement goes on.

    Returns:
        the measurement, with tables, summary, figure and files.

    Raises:
        LayercritError: a subclass, with a message that says what was wrong and what to do.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> measurement = layercrit.measure("file:layercrit-demo/models/baseline", images, layers="layer1.0.*,fc",
        ...                                 n_images=50, trials=2)
        >>> measurement.to_pandas()["layer"].tolist()[-2:]
        ['layer1.0.downsample.0', 'fc']
    """
    started = time.perf_counter()
    protocol = Protocol(
        trials=trials,
        n_images=n_images,
        layers=layers,
        types=types,
        group=group,
        sets=read_sets(sets),
        reset=get_reset(reset).name,
        norm_statistics=norm_statistics,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        level=level,
        interval=interval,
        half_width=half_width,
        minutes=minutes,
        pilot=pilot,
        max_trials=max_trials,
    )
    if resume is not None and not isinstance(resume, Measurement):
        raise ProtocolError(
            f"What to resume is a measurement, not a {type(resume).__name__}. Read a folder with "
            "layercrit.Measurement.load(DIR)."
        )
    attack, images = split_attack(images)
    names = distance_names(distances)
    with Bar(progress) as bar, opened_subject(model, images, labels, protocol, donor) as subject:
        whole, size = None, None
        if isinstance(images, ProbeSet):
            whole = ProbeSet.from_source(images, subject.model.preprocessing, labels=labels, classes=classes)
            n_available = whole.n_images
        else:
            source = open_images(images, labels)
            n_available, size = min(protocol.n_images, len(source)), common_size(source)
        bar.say(_intention(subject, protocol, n_available, size))

        def draw(n_images: int) -> ProbeSet:
            if whole is not None:
                return whole.first(n_images)
            return draw_images(images, subject, n_images, protocol.seed, attack, labels, classes, keep_images, bar)

        sampling = Sampling(started, protocol, subject, draw, n_available, names, are_wanted(labels), bar, name)
        return sampling.run(resume, on_trial, on_cell and Caller(on_cell))


def list_layers(
    model: str | Model | nn.Module,
    *,
    layers: str = DEFAULTS.layers,
    types: str = DEFAULTS.types,
    group: str = DEFAULTS.group,
    sets: str | Path | Mapping[str, Any] = DEFAULTS.sets,
) -> pd.DataFrame:
    """Return what `measure` would reset in a model, in depth order, without measuring and without its weights.

    Args:
        model: as for `measure`; a module must take images of 224 x 224 pixels, else give
            ``open_model(module, input_size=(channels, height, width))``.
        layers: as for `measure`, and so are ``types``, ``group`` and ``sets``.
        types: types of layers.
        group: what is reset at once.
        sets: sets of layers.

    Returns:
        one row per layer, with ``layer`` (its name), ``type``, ``depth`` (its place, from 0), ``shape`` (of its
        largest parameter), ``n_parameters`` and others; ``flops_after`` is the share of the forward pass's FLOPs that
        must be computed again when it is reset.

    Raises:
        LayerError: no layer is chosen, or the sets make no sense.
        ModelError: the model cannot be opened.

    Examples:
        >>> import layercrit
        >>> layers = layercrit.list_layers("file:layercrit-demo/models/baseline")
        >>> len(layers), layers["layer"].iloc[-1], layers["n_parameters"].sum()
        (23, 'fc', np.int64(123658))
    """
    kept = ("mean", "std", "input_size")
    opened = open_model(without_weights(model, keep=kept) if isinstance(model, str) else model)
    with undisturbed(), rng_untouched(), attributes_kept(opened.network):
        black = opened.classifier.normalise(opened.black_image.to(opened.classifier.mean.device))
        wanted = read_sets(sets)
        with size_explained(opened):
            every = find_layers(opened.network, black, group)
        found = sets_of(select_layers(every, types=types, patterns=layers, group=cast(Group, group)), wanted)
        _, after = count_flops(opened.network, found, black)
    rows = [{**layer.to_dict(), "flops_after": after[layer.name]} for layer in found]
    return pd.DataFrame(rows).rename(columns={"name": "layer"})


@contextmanager
def opened_subject(
    model: str | Model | nn.Module,
    images: Any,
    labels: LabelsGiven,
    protocol: Protocol,
    donor: nn.Module | str | Path | None = None,
) -> Iterator[Subject]:
    """Open a model for the images that it is to be shown; it and the caller's settings are then as they were.

    Args:
        model: as for `measure`.
        images: likewise, without an attack; only their size is looked at.
        labels: likewise.
        protocol: says what is reset, and to what.
        donor: as for `measure`.
    """
    with undisturbed(), rng_untouched():
        opened = _with_input_of(images, labels, model)
        with untouched(opened.network), large_blocks_stay():
            yield Subject(protocol, opened, donor)


def draw_images(
    images: Any,
    subject: Subject,
    n_images: int,
    seed: int,
    attack: Pgd | None,
    labels: LabelsGiven,
    classes: str | Path | Sequence[str] | None,
    folder: str | Path | None,
    bar: Bar,
) -> ProbeSet:
    """Return so many images of a source, drawn by the seed of the study; attacked, and kept in a folder, if asked.

    A probe set is returned as a whole.
    """
    if isinstance(images, ProbeSet):
        return ProbeSet.from_source(images, subject.model.preprocessing, labels=labels, classes=classes)
    drawn = ProbeSet.from_source(
        images,
        subject.model.preprocessing,
        n_images=n_images,
        seed=probe_set_seed(seed),
        labels=labels,
        classes=classes,
        progress=bar.decoded,
    )
    if attack is None:
        return drawn
    return attacked(
        drawn,
        replace(subject.model, network=subject.network),
        attack,
        use_labels=are_wanted(labels),
        device=str(subject.device),
        folder=folder,
        progress=bar.attacked,
    )


def distance_names(distances: str | Iterable[str] | None) -> list[str]:
    if isinstance(distances, str):
        distances = distances.split(",")
    names = list(dict.fromkeys(DISTANCES if distances is None else ["cosine", *distances]))
    for name in names:
        get_distance(name)
    return names


def _with_input_of(images: Any, labels: LabelsGiven, model: str | Model | nn.Module) -> Model:
    """Open a model for the size of the images where it declares none, and note which input settings are defaults.

    A network given as an object gets an array or a probe set in the size that its images have, whatever it declares.
    """
    opened = open_model(model)
    size, about_size = None, "a default"
    arrays = ProbeSet | ArraySource | np.ndarray | torch.Tensor
    as_they_are = isinstance(model, nn.Module) and isinstance(images, arrays)
    if isinstance(images, ProbeSet):
        size = images.preprocessing.height, images.preprocessing.width
        channels, about_size = images.preprocessing.channels, "that of the probe set"
    elif as_they_are or "input_size" in opened.undeclared:
        source = open_images(images, labels)
        size = common_size(source)
        channels = opened.preprocessing.channels
        says_channels = any(isinstance(module, nn.Conv2d) for module in opened.network.modules())
        if isinstance(source, ArraySource):  # grey images also fit a network of three channels
            channels = max(channels, source.n_channels) if says_channels else source.n_channels
        about_size = "the size of all images" if size else "a default, as the images differ in size"
    if size and (as_they_are or "input_size" in opened.undeclared):
        sized = open_model(opened, input_size=(channels, *size))
        height, width = size
        unchanged = replace(sized.preprocessing, resize=height if height == width else size)  # images of this size are
        opened = replace(sized, preprocessing=unchanged, undeclared=opened.undeclared)
    note = opened.undeclared_in_words(about_size)
    return replace(opened, notes=(*opened.notes, note)) if note else opened


def _intention(subject: Subject, protocol: Protocol, n_images: int, size_before: tuple[int, int] | None) -> str:
    """Say what will be measured, before it takes its time.

    Args:
        subject: the network.
        protocol: how to measure it.
        n_images: the most images that it is shown.
        size_before: height and width of all images before they are resized, if they have one size.
    """
    model, size = subject.model, subject.model.preprocessing
    resized = "" if size.resize is None else f", resized to {size.resize} ({size.interpolation})"
    if size_before is not None and size.keeps(*size_before):
        resized = " as they are"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (model.mean, model.std))
    what = counted_units(len(subject.layers), protocol.sets)
    trials = counted(subject.n_trials, "trial")
    at_most = " at most" if protocol.is_planned else ""
    if protocol.half_width is not None:
        trials = f"a pilot of {trials}, then as many as a half-width of {protocol.half_width:g} takes"
    elif protocol.minutes is not None:
        trials = f"a pilot of {trials}, then as many as {protocol.minutes:g} min allow"
    return (
        f"{model.reference}: {what}, {trials}, {counted(n_images, 'image')}{at_most} "
        f"of {size.channels} x {size.height} x {size.width} pixels{resized}; mean {mean}; std {std}"
    )
