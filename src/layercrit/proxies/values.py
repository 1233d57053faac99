"""Proxies of one model: what a loss and a reset say of its layers, in one sweep over the images."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from layercrit.attacks import split_attack
from layercrit.counts import counted
from layercrit.donors import read_donor
from layercrit.engine.subject import Subject
from layercrit.errors import LayercritError, ProtocolError
from layercrit.foreign_text import encodable, write_csv
from layercrit.measurement import Measurement
from layercrit.measuring import draw_images, opened_subject
from layercrit.models.model import Model
from layercrit.models.sources import short_name
from layercrit.probes.labelling import LabelsGiven, are_wanted
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.provenance import versions_with
from layercrit.proxies.agreement import Agreement, Exact, agreement, check_level
from layercrit.proxies.formulas import PROXIES
from layercrit.proxies.sweep import HESSIAN_IMAGES, Sweep, of_parameters
from layercrit.resets import get_reset
from layercrit.restoring import untouched

__all__ = ["N_IMAGES", "RADIUS", "Proxies", "exact_of", "measure_proxies"]

N_IMAGES, RADIUS = 64, 0.1
"""Defaults: images, and radius of the first-order worst case."""

Array = npt.NDArray[np.float64]
_AXES = {"layers": (), "images": (1,), "draws": (1, 1)}  # lengths of further axes where all is blank


@dataclass(frozen=True, eq=False, repr=False)
class Proxies:
    """What cheap proxies say of each layer of a model.

    Attributes:
        samples: proxy -> what its values are means of: ``(n_layers, n_draws, n_images)``, ``(n_layers, n_images)`` or
            ``(n_layers,)``, as `layercrit.proxies.formulas.Proxy.axes` says; NaN where it does not apply.
        about: one row per layer in depth order: ``layer``, ``type``, ``depth``, ``n_parameters``.
        costs: one row per proxy: how many ``forward`` and ``backward`` passes of one image it takes, how many
            ``layer_passes`` (each layer once on its recorded input) and ``hessian_products``, and ``seconds``. Proxies
            share passes: what all of them took is in the record.
        record: everything else worth keeping, as plain data; ``labels`` says which labels the gradient is of.
    """

    samples: Mapping[str, Array]
    about: pd.DataFrame
    costs: pd.DataFrame
    record: Mapping[str, Any]

    @property
    def layers(self) -> pd.DataFrame:
        """One row per layer, in depth order, a column per proxy; NaN where a proxy does not apply to a layer."""
        values = {name: PROXIES[name].value(found) for name, found in self.samples.items()}
        return self.about.assign(**values)

    def against(
        self,
        exact: "Measurement | Exact | str | Path",
        *,
        k: int | None = None,
        level: float = DEFAULTS.level,
        n_resamples: int = 1000,
    ) -> Agreement:
        """Set the proxies against exact criticality; see `layercrit.proxies.agreement.agreement`.

        Args:
            exact: a measurement of the same model under the same reset, or the folder (or a file in it) that
                `layercrit measure` wrote.
            k: how many layers are lowest, and highest; None: a quarter of them.
            level: confidence level, between 0 and 1.
            n_resamples: how many resamples make the intervals; 0: none.

        Raises:
            ProtocolError: the exact values are of another model or reset, or there are too few layers in common.
            LayercritError: there is no measurement in the folder.
        """
        if not isinstance(exact, Exact):
            exact = self._exact_of(exact)
        check_level(level)
        return agreement(
            self.samples,
            list(self.about["layer"]),
            exact,
            images=self.record["probe_set"]["sha256"],
            seeds=self.record["trial_seeds"],
            title=short_name(self.record["model"]["reference"]),
            k=k,
            level=float(level),
            n_resamples=n_resamples,
            seed=self.record["protocol"]["seed"],
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``proxies.csv`` (the table of layers), ``costs.csv`` and ``proxies.json`` into a folder.

        Raises:
            LayercritError: it cannot be written.
        """
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(self.layers, folder / "proxies.csv")
            write_csv(self.costs, folder / "costs.csv")
            text = json.dumps(encodable(dict(self.record)), indent=2, ensure_ascii=False, allow_nan=False)
            (folder / "proxies.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LayercritError(
                f"The proxies cannot be written to {folder} ({error.strerror or error}). Free some space or name "
                "another folder (--out), then save again."
            ) from error
        return [folder / name for name in ("proxies.csv", "costs.csv", "proxies.json")]

    def __repr__(self) -> str:
        return (
            f"<Proxies of {self.record['model']['reference']}: {len(self.samples)} of {len(self.about)} layers, "
            f"{counted(self.record['probe_set']['n_images'], 'image')}, {self.record['labels']}>"
        )

    def _exact_of(self, measured: "Measurement | str | Path") -> Exact:
        measurement = measured if isinstance(measured, Measurement) else _load(measured)
        mine, theirs = self.record["model"], measurement.record["model"]
        if mine["sha256"] != theirs["sha256"]:
            raise ProtocolError(
                f"The exact values are of another model: {theirs['reference']!r} of hash {theirs['sha256'][:12]}; "
                f"the proxies are of {mine['reference']!r} with {mine['sha256'][:12]}. Give a measurement of the same "
                "weights, or measure it at once with --measure."
            )
        asked, found = self.record["protocol"]["reset"], measurement.record["protocol"]["reset"]
        if asked != found:
            raise ProtocolError(
                f"The exact values are of the reset {found!r}, the proxies of {asked!r}. Ask for proxies of the same: "
                f"--reset '{found}' (reset={found!r})."
            )
        statistics = measurement.record["protocol"].get("norm_statistics", DEFAULTS.norm_statistics)
        if statistics != DEFAULTS.norm_statistics:
            raise ProtocolError(
                f"The exact values are with the norm statistics {statistics!r}, and proxies are about a reset beside "
                f"trained ones. Give a measurement with --norm-statistics {DEFAULTS.norm_statistics}."
            )
        if mine["donor"] != theirs.get("donor"):
            raise ProtocolError(
                f"The exact values are of resets to {theirs.get('donor')!r}, the proxies of those to "
                f"{mine['donor']!r}. Take new values from the same place: --from (donor=...)."
            )
        return exact_of(measurement)


def exact_of(measurement: Measurement) -> Exact:
    """Return the exact values of a measurement; resets that change nothing have 0."""
    distances = measurement.per_image["cosine"].copy()
    place = {layer: number for number, layer in enumerate(measurement.record["layers"])}
    unchanged = measurement.cells[measurement.cells["status"] == "unchanged"]
    distances[unchanged["layer"].map(place).to_numpy(np.int64), unchanged["trial"].to_numpy(np.int64)] = 0
    return Exact(
        layers=tuple(place),
        distances=distances,
        images=measurement.record["probe_set"]["sha256"],
        seeds=tuple(measurement.record["trial_seeds"]),
        random_trials=measurement.record["random_trials"],
    )


def _load(where: str | Path) -> Measurement:
    path = Path(where).expanduser()
    return Measurement.load(path.parent if path.is_file() else path)


def measure_proxies(
    model: str | Model | nn.Module,
    images: Any,
    *,
    trials: int = DEFAULTS.trials,
    n_images: int = N_IMAGES,
    layers: str = DEFAULTS.layers,
    types: str = DEFAULTS.types,
    group: str = DEFAULTS.group,
    reset: str = DEFAULTS.reset,
    donor: nn.Module | str | Path | None = None,
    initial: nn.Module | str | Path | None = None,
    radius: float = RADIUS,
    hessian_images: int = HESSIAN_IMAGES,
    seed: int = DEFAULTS.seed,
    device: str = DEFAULTS.device,
    labels: LabelsGiven = "auto",
    classes: str | Path | Sequence[str] | None = None,
    progress: bool = True,
) -> Proxies:
    """Say cheaply which layers may be critical: all proxies, in one forward and backward pass an image.

    The loss is the cross-entropy with the labels of the images. Without labels that the model knows, each image gets a
    class drawn from the model's own prediction, so that g² estimates the true Fisher information; the mean of g is
    then 0 but for chance, and with it first order, Taylor, SNIP, relative gradient and worst case. All values are means
    over images, and each image is run on its own. The model is left bit for bit as it was, also after an exception.

    Args:
        model: as for `layercrit.measure`, as are the following.
        images: the source.
        trials: draws of the reset.
        n_images: how many of the images to use, drawn by ``seed``. A `ProbeSet` is used whole.
        layers: patterns on layer names.
        types: types of layers.
        group: what is reset at once.
        reset: what replaces a layer's parameters.
        donor: where new values come from.
        initial: the weights before training, for the distance from the start: as ``donor``, such as ``DIR@epoch=0``.
        radius: of the first-order worst case, as a share of the norm of a layer's parameters.
        hessian_images: how many images the second order is taken over, with one draw each in turn: it costs one
            Hessian-vector product a layer and image. 0: none.
        seed: of draws, of the choice of images, and of drawn labels.
        device: where to compute.
        labels: as for `layercrit.measure`; ``"none"``: draw them.
        classes: names of classes.
        progress: whether to show a progress bar on a terminal.

    Raises:
        LayercritError: a subclass, with a message that says what was wrong and what to do.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> proxies = layercrit.measure_proxies(
        ...     "file:layercrit-demo/models/baseline", images, layers="conv1,fc", n_images=8, hessian_images=0
        ... )
        >>> proxies.layers["layer"].tolist()
        ['conv1', 'fc']
    """
    started = time.perf_counter()
    protocol = Protocol(
        trials=trials, n_images=n_images, layers=layers, types=types, group=group, reset=get_reset(reset).name,
        seed=seed, device=device,
    )  # fmt: skip
    _check(radius, hessian_images)
    attack, images = split_attack(images)
    with Bar(progress) as bar, opened_subject(model, images, labels, protocol, donor) as subject:
        subject.check_draws()
        start = None if initial is None else read_donor(initial, subject.model, subject.layers)
        probe_set = draw_images(images, subject, protocol.n_images, seed, attack, labels, classes, None, bar)
        known, notes = probe_set.labels_for(subject.model.n_classes) if are_wanted(labels) else (None, [])
        sweep = Sweep(subject, probe_set, known, hessian_images, bar, protocol.seed)
        with untouched(sweep.network):
            samples = sweep.run()
        samples |= of_parameters(subject, samples, start, float(radius))
    record = {
        **_record(subject, probe_set, protocol, sweep),
        "initial": None if start is None else start.origin,
        "radius": float(radius),
        "labels": "labels of the images" if known is not None else "labels drawn from the model's predictions",
        "notes": list(dict.fromkeys([*subject.notes(), *probe_set.notes, *notes, *sweep.notes])),
        "seconds": round(time.perf_counter() - started, 3),
    }
    about = pd.DataFrame([{"layer": layer.name, "type": layer.type, "depth": layer.depth,
                           "n_parameters": layer.n_parameters} for layer in subject.layers])  # fmt: skip
    blank = {axes: np.full((len(about), *more), np.nan) for axes, more in _AXES.items()}
    found = {name: samples.get(name, blank[proxy.axes]) for name, proxy in PROXIES.items()}
    return Proxies(found, about, _costs(sweep, len(about), probe_set.n_images, subject.n_trials), record)


def _record(subject: Subject, probe_set: ProbeSet, protocol: Protocol, sweep: Sweep) -> dict[str, Any]:
    """Return what is worth keeping of a model, its images and the sweep over them."""
    return {
        "model": {
            "reference": encodable(subject.model.reference),
            "architecture": subject.model.architecture,
            "sha256": subject.model.sha256,
            "donor": subject.donor_in_words,
        },
        "protocol": {**protocol.to_dict(), "trials": subject.n_trials, "n_images": probe_set.n_images},
        "hessian_images": sweep.n_hessian,
        "probe_set": probe_set.to_dict(),
        "trial_seeds": [subject.seed(trial) for trial in range(subject.n_trials)],
        "loss": sweep.mean_loss,
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "versions": versions_with(
            resets=[protocol.reset],
            models=[subject.model.reference, subject.model.architecture],
            images=[probe_set.source],
        ),
    }


def _check(radius: float, hessian_images: int) -> None:
    if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 < float(radius) < math.inf:
        raise ProtocolError(f"radius must be above 0, such as 0.1, a share of the norm of a layer; got {radius!r}.")
    if isinstance(hessian_images, bool) or not isinstance(hessian_images, int) or hessian_images < 0:
        raise ProtocolError(f"hessian_images must be a whole number, 0 for no second order; got {hessian_images!r}.")


def _costs(sweep: Sweep, n_layers: int, n_images: int, n_trials: int) -> pd.DataFrame:
    """Return what each proxy took, as in `Proxies.costs`."""
    rows = []
    for proxy in PROXIES.values():
        curvature = sweep.n_hessian * ("curvature" in proxy.parts)
        row = {
            "proxy": proxy.name,
            "forward": n_images * ("forward" in proxy.parts) + curvature,
            "backward": n_images * ("backward" in proxy.parts) + curvature,
            "layer_passes": n_images * n_trials * ("outputs" in proxy.parts),
            "hessian_products": n_layers * curvature,
            "seconds": round(sum(sweep.seconds[part] for part in proxy.parts), 3),
        }
        rows.append(row)
    return pd.DataFrame(rows)
