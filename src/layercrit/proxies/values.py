"""Proxies of one model: what a loss and a reset say of its layers, in one sweep over the images."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.attacks import split_attack
from layercrit.donors import read_donor
from layercrit.engine.allocator import large_blocks_stay
from layercrit.engine.layer_gradients import ImageGradients, LayerGradients, OutputChange
from layercrit.engine.subject import Subject
from layercrit.errors import LayercritError, ModelError, ProtocolError, first_line
from layercrit.foreign_text import encodable, write_csv
from layercrit.layer_groups import block_of, blocks_of
from layercrit.layers import find_layers
from layercrit.machine import is_out_of_memory, versions
from layercrit.measurement import Measurement
from layercrit.measuring import drawn_images, with_input_of
from layercrit.models.model import Model
from layercrit.probes.labelling import LabelsGiven, are_wanted
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.proxies.agreement import Agreement, Exact, agreement
from layercrit.proxies.formulas import PROXIES, Part
from layercrit.resets import get_reset
from layercrit.restoring import copied, rng_untouched, undisturbed, untouched
from layercrit.seeds import seed_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HESSIAN_IMAGES", "N_IMAGES", "RADIUS", "Proxies", "measure_proxies", "proxy_samples"]

N_IMAGES, HESSIAN_IMAGES, RADIUS = 64, 8, 0.1
"""Defaults: images, images of the second order, and radius of the first-order worst case."""

Array = npt.NDArray[np.float64]
_AXES = {"layers": (), "images": (1,), "draws": (1, 1)}  # lengths of further axes where all is blank
_UNMOVED = OutputChange(0.0, 0.0)
LossOfClass = Callable[[Tensor, Tensor], Tensor]
"""The loss of logits ``(1, n_classes)`` and a class ``(1,)``, a scalar."""


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
        if not isinstance(level, Real) or not 0 < level < 1:
            raise ProtocolError(f"level must be between 0 and 1, such as 0.95; got {level!r}.")
        return agreement(
            self.samples,
            list(self.about["layer"]),
            exact,
            images=self.record["probe_set"]["sha256"],
            seeds=self.record["trial_seeds"],
            title=self.record["model"]["reference"],
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
            f"{self.record['probe_set']['n_images']} images, {self.record['labels']}>"
        )

    def _exact_of(self, measured: "Measurement | str | Path") -> Exact:
        measurement = measured if isinstance(measured, Measurement) else _load(measured)
        mine, theirs = self.record["model"], measurement.record["model"]
        if mine["sha256"] != theirs["sha256"]:
            raise ProtocolError(
                f"The exact values are of another model: {theirs['reference']!r} with the hash {theirs['sha256'][:12]}, "
                f"the proxies of {mine['reference']!r} with {mine['sha256'][:12]}. Give a measurement of the same "
                "weights, or measure it at once with --measure."
            )
        asked, found = self.record["protocol"]["reset"], measurement.record["protocol"]["reset"]
        if asked != found:
            raise ProtocolError(
                f"The exact values are of the reset {found!r}, the proxies of {asked!r}. Ask for proxies of the same: "
                f"--reset '{found}' (reset={found!r})."
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
    """
    started = time.perf_counter()
    protocol = Protocol(
        trials=trials, n_images=n_images, layers=layers, types=types, group=group, reset=get_reset(reset).name,
        seed=seed, device=device,
    )  # fmt: skip
    _check(radius, hessian_images)
    attack, images = split_attack(images)
    with undisturbed(), rng_untouched(), Bar(progress) as bar:
        opened = with_input_of(images, labels, model)
        with untouched(opened.network), large_blocks_stay():
            subject = Subject(protocol, opened, donor)
            subject.check_draws()
            start = None if initial is None else read_donor(initial, subject.model, subject.layers)
            if isinstance(images, ProbeSet):
                probe_set = ProbeSet.from_source(images, opened.preprocessing, labels=labels, classes=classes)
            else:
                probe_set = drawn_images(
                    images, subject, bar, attack=attack, n_images=protocol.n_images, seed=seed, labels=labels,
                    classes=classes,
                )  # fmt: skip
            known, notes = probe_set.labels_for(subject.model.n_classes) if are_wanted(labels) else (None, [])
            sweep = _Sweep(subject, probe_set, known, hessian_images, bar, protocol.seed)
            with untouched(sweep.network):
                samples = sweep.run()
            samples |= _of_parameters(subject, samples, None if start is None else start.values, float(radius))
    record = {
        "model": {
            "reference": encodable(subject.model.reference),
            "architecture": subject.model.architecture,
            "sha256": subject.model.sha256,
            "donor": subject.donor_in_words,
            "initial": None if start is None else start.origin,
        },
        "protocol": {**protocol.to_dict(), "trials": subject.n_trials, "n_images": probe_set.n_images},
        "radius": float(radius),
        "hessian_images": sweep.n_hessian,
        "probe_set": probe_set.to_dict(),
        "labels": "labels of the images" if known is not None else "labels drawn from the model's predictions",
        "trial_seeds": [subject.seed(trial) for trial in range(subject.n_trials)],
        "loss": sweep.mean_loss,
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "notes": list(dict.fromkeys([*subject.notes(), *probe_set.notes, *notes, *sweep.notes])),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 3),
    }
    about = pd.DataFrame([{"layer": layer.name, "type": layer.type, "depth": layer.depth,
                           "n_parameters": layer.n_parameters} for layer in subject.layers])  # fmt: skip
    blank = {axes: np.full((len(about), *more), np.nan) for axes, more in _AXES.items()}
    found = {name: samples.get(name, blank[proxy.axes]) for name, proxy in PROXIES.items()}
    return Proxies(found, about, sweep.costs(), record)


def _check(radius: float, hessian_images: int) -> None:
    if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 < float(radius) < math.inf:
        raise ProtocolError(f"radius must be above 0, such as 0.1, a share of the norm of a layer; got {radius!r}.")
    if isinstance(hessian_images, bool) or not isinstance(hessian_images, int) or hessian_images < 0:
        raise ProtocolError(
            f"hessian_images must be a whole number, 0 for no second order; got {hessian_images!r}."
        )


def _of_parameters(
    subject: Subject, samples: Mapping[str, Array], initial: Mapping[str, Tensor] | None, radius: float
) -> dict[str, Array]:
    """Return the proxies that are made of norms of parameters, of their gradients, and of nothing but the layer."""
    norms, distances = [], []
    for layer in subject.layers:
        trained = {name: subject.model.network.get_parameter(name).detach().cpu() for name in layer.parameters}
        norms.append(math.sqrt(sum(float(value.double().square().sum()) for value in trained.values())))
        if initial is not None:
            squares = sum(float((value.double() - initial[name].double()).square().sum())
                          for name, value in trained.items())  # fmt: skip
            distances.append(math.sqrt(squares / max(layer.n_parameters, 1)))
    sizes = np.array([layer.n_parameters for layer in subject.layers], np.float64)
    norm, gradient = np.array(norms), samples["gradient_norm"]
    found = {
        "relative_gradient": np.divide(gradient, norm, out=np.full_like(norm, np.nan), where=norm > 0),
        "worst_case": radius * norm * gradient,
        "log_parameters": np.log(np.maximum(sizes, 1)),
        "depth": np.array([layer.depth for layer in subject.layers], np.float64),
        "weight_norm": norm,
    }
    return found | ({"distance": np.array(distances)} if initial is not None else {})


def proxy_samples(
    subject: Subject,
    probe_set: ProbeSet,
    loss: LossOfClass = F.cross_entropy,
    *,
    hessian_images: int = HESSIAN_IMAGES,
    seed: int = DEFAULTS.seed,
) -> dict[str, Array]:
    """Return what the proxies are means of, for a loss of your own; see `Proxies.samples`.

    ``gradient_norm`` is the norm of the mean gradient of each layer's parameters. Classes are the labels of the probe
    set, or drawn from the predictions.
    """
    labels, _ = probe_set.labels_for(subject.model.n_classes)
    sweep = _Sweep(subject, probe_set, labels, hessian_images, Bar(shown=False), seed, loss)
    with untouched(sweep.network):
        return sweep.run()


class _Sweep:
    """One pass over the images, one at a time.

    Attributes:
        network: as in the subject, or a copy where its tensors can have no gradient.
        notes: what the user should know.
        n_hessian: how many images the second order is taken over.
        mean_loss: over the images, once they are run.
    """

    def __init__(
        self,
        subject: Subject,
        probe_set: ProbeSet,
        labels: npt.NDArray[np.int64] | None,
        hessian_images: int,
        bar: Bar,
        seed: int,
        loss: LossOfClass = F.cross_entropy,
    ) -> None:
        self._subject, self._probe_set, self._labels, self._bar, self._loss = subject, probe_set, labels, bar, loss
        self._seed = seed
        self.notes: list[str] = []
        self.n_hessian = min(hessian_images, probe_set.n_images)
        self.mean_loss = math.nan
        self._seconds: dict[Part, float] = dict.fromkeys(("forward", "backward", "outputs", "curvature"), 0.0)
        network = subject.network
        self.network = copied(network) if any(one.is_inference() for one in network.parameters()) else network
        self._changes = [list(subject.changes(trial)) for trial in range(subject.n_trials)]
        self._blocks = self._blocks_of_layers()

    def run(self) -> dict[str, Array]:
        """Return the samples of the proxies that need a pass."""
        layers, n = self._subject.layers, self._probe_set.n_images
        shape = (len(layers), self._subject.n_trials, n)
        found = {name: np.full(shape, np.nan) for name in ("fisher", "first_order", "gauss_newton")}
        found |= {name: np.zeros((len(layers), n)) for name in ("obd", "taylor")}
        found["block_influence"] = np.full((len(layers), n), np.nan)
        found["second_order"] = np.full((len(layers), self.n_hessian), np.nan)
        totals: dict[int, Tensor] = {}  # id of a parameter -> the sum of its gradients over images
        with self._explained():
            blocks = sorted(set(self._blocks.values()))
            gradients = LayerGradients(self.network, layers, blocks, self._subject.model.read_logits, self._image(0))
            losses = [self._run_image(gradients, place, found, totals) for place in range(n)]
        self.mean_loss = float(np.mean(losses))
        pairs = [
            [(one.detach(), totals[id(one)] / n) for one in gradients.parameters(layer) if id(one) in totals]
            for layer in layers
        ]
        found["snip"] = np.array([sum(_total((p * g).abs()) for p, g in own) for own in pairs], np.float64)
        found["gradient_norm"] = np.sqrt([sum(_total(g.square()) for _, g in own) for own in pairs])
        return self._checked(found)

    def costs(self) -> pd.DataFrame:
        """Return what each proxy took, as in `Proxies.costs`."""
        n, n_layers = self._probe_set.n_images, len(self._subject.layers)
        rows = []
        for proxy in PROXIES.values():
            curvature = self.n_hessian * ("curvature" in proxy.parts)
            row = {
                "proxy": proxy.name,
                "forward": n * ("forward" in proxy.parts) + curvature,
                "backward": n * ("backward" in proxy.parts) + curvature,
                "layer_passes": n * self._subject.n_trials * ("outputs" in proxy.parts),
                "hessian_products": n_layers * curvature,
                "seconds": round(sum(self._seconds[part] for part in proxy.parts), 3),
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def _run_image(
        self, gradients: LayerGradients, place: int, found: Mapping[str, Array], totals: dict[int, Tensor]
    ) -> float:
        """Run one image, write down its samples, add its gradients to the totals, and return its loss."""
        image, loss = self._image(place), self._loss_of(place)
        with self._timed("backward"):
            of_image = gradients.of_image(image, loss)
            self._check_image(of_image, place)
            for one, gradient in of_image.of_parameters.items():
                totals[one] = totals[one] + gradient if one in totals else gradient
            for index, layer in enumerate(self._subject.layers):
                for parameter, gradient in of_image.pairs(layer):
                    product = parameter * gradient
                    found["obd"][index, place] += 0.5 * _total(product.square())
                    found["taylor"][index, place] += _total(product)
                alike = of_image.alike.get(self._blocks.get(layer.name, ""), math.nan)
                found["block_influence"][index, place] = 1 - alike
        self._seconds["forward"] += of_image.seconds_forward
        self._seconds["backward"] -= of_image.seconds_forward
        with self._timed("outputs"):
            for trial, changes in enumerate(self._changes):
                for index, change in enumerate(changes):
                    if change.status == "no_branch":
                        continue
                    moved = of_image.output_change(change.layer, change.values) if change.delta_norm else _UNMOVED
                    found["fisher"][index, trial, place] = moved.weighted
                    found["first_order"][index, trial, place] = moved.first_order
                    found["gauss_newton"][index, trial, place] = 0.5 * moved.first_order**2
        if place < self.n_hessian:
            with self._timed("curvature"):
                self._run_curvature(gradients, place, image, loss, found["second_order"])
        self._bar.measured(place + 1, self._probe_set.n_images)
        return of_image.loss

    def _check_image(self, of_image: ImageGradients, place: int) -> None:
        if not math.isfinite(of_image.loss):
            raise ModelError(
                f"The loss of {self._subject.model.reference!r} is not finite for the image "
                f"{self._probe_set.names[place]!r}. Check its normalisation (mean, std)."
            )
        if not of_image.of_parameters:
            raise ModelError(
                f"No gradient of the loss reaches any layer of {self._subject.model.reference!r}: its forward switches "
                "gradients off, or returns what does not depend on its parameters. Measure its exact criticality "
                "instead (layercrit measure), which needs none."
            )

    def _run_curvature(
        self, gradients: LayerGradients, place: int, image: Tensor, loss: Callable[[Tensor], Tensor], found: Array
    ) -> None:
        changes = self._changes[place % len(self._changes)]
        try:
            curvature = gradients.curvature(image, loss, [change.values if change.delta_norm else {} for change in changes])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.n_hessian = 0  # the columns stay blank
            self.notes.append(f"no second order: the network has no second derivative ({first_line(error)})")
            return
        applies = [change.status != "no_branch" for change in changes]
        found[:, place] = np.where(applies, curvature, np.nan)

    def _loss_of(self, place: int) -> Callable[[Tensor], Tensor]:
        """Return the loss of an image: with its label, or with a class drawn from the prediction."""

        def loss(logits: Tensor) -> Tensor:
            if self._labels is not None:
                label = int(self._labels[place])
            else:
                generator = torch.Generator().manual_seed(seed_of(self._seed, "proxies", "drawn label", place))
                p = logits.detach().float().softmax(dim=1)[0].cpu()
                label = int(torch.multinomial(p, 1, generator=generator))
            return self._loss(logits, torch.tensor([label], device=logits.device))

        return loss

    def _image(self, place: int) -> Tensor:
        return self._subject.normalise(self._probe_set.batch_on(self._subject.device, place, place + 1))

    def _blocks_of_layers(self) -> dict[str, str]:
        """Return layer -> name of the block that it is or lies in; those in none are left out."""
        every = find_layers(self._subject.network, self._subject.normalise(self._subject.model.black_image))
        blocks = blocks_of(layer.name for layer in every if layer.type in ("conv", "linear"))
        found = {
            layer.name: layer.name if layer.name in blocks else block_of(layer.name, blocks)
            for layer in self._subject.layers
        }
        return {layer: block for layer, block in found.items() if block in blocks}

    def _checked(self, found: dict[str, Array]) -> dict[str, Array]:
        """Return the samples, blank for layers where a reset makes some that are not finite."""
        applies = np.array([change.status != "no_branch" for change in self._changes[0]])
        if not self.n_hessian:
            del found["second_order"]
        for name in found.keys() & {"fisher", "first_order", "gauss_newton", "second_order"}:
            bad = ~np.isfinite(found[name]).all(axis=tuple(range(1, found[name].ndim)))
            if names := [self._subject.layers[row].name for row in np.flatnonzero(bad & applies)]:
                self.notes.append(f"{PROXIES[name].label} is not finite for {len(names)} layers, such as {names[0]}")
            found[name][bad] = np.nan
        return found

    @contextlib.contextmanager
    def _timed(self, part: Part) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - started

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what to do where the network cannot be differentiated, or does not fit into memory."""
        try:
            yield
        except LayercritError:
            raise
        except (RuntimeError, MemoryError) as error:
            model = self._subject.model.reference
            if is_out_of_memory(error):
                raise LayercritError(
                    f"Out of memory on {self._subject.device} with the gradients of one image ({first_line(error)}). "
                    "Close other programs, or use another device (--device)."
                ) from error
            raise ModelError(
                f"The loss of {model!r} cannot be differentiated ({first_line(error)}). Measure its exact criticality "
                "instead (layercrit measure), which needs no gradient."
            ) from error


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
