"""One sweep over the images for all proxies, image by image, and what is made of the parameters alone."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from layercrit.counts import counted
from layercrit.donors import Donor
from layercrit.engine.layer_gradients import ImageGradients, LayerGradients, OutputChange
from layercrit.engine.subject import Subject
from layercrit.errors import LayercritError, ModelError, first_line
from layercrit.layer_groups import block_of, blocks_of
from layercrit.layers import find_layers
from layercrit.machine import is_out_of_memory
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS
from layercrit.proxies.formulas import PROXIES, Part
from layercrit.restoring import copied, untouched
from layercrit.seeds import seed_of

__all__ = ["HESSIAN_IMAGES", "LossOfClass", "Sweep", "of_parameters", "proxy_samples"]

HESSIAN_IMAGES = 8
"""Images of the second order, by default."""

Array = npt.NDArray[np.float64]
LossOfClass = Callable[[Tensor, Tensor], Tensor]
"""The loss of logits ``(1, n_classes)`` and a class ``(1,)``, a scalar."""

_UNMOVED = OutputChange(0.0, 0.0)


def of_parameters(
    subject: Subject, samples: Mapping[str, Array], start: Donor | None, radius: float
) -> dict[str, Array]:
    """Return the proxies that are made of norms of parameters, of their gradients, and of nothing but the layer."""
    norms, distances = [], []
    for layer in subject.layers:
        trained = {name: subject.model.network.get_parameter(name).detach().cpu() for name in layer.parameters}
        norms.append(math.sqrt(sum(float(value.double().square().sum()) for value in trained.values())))
        if start is not None:
            squares = sum(float((value.double() - start.values[name].double()).square().sum())
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
    return found | ({"distance": np.array(distances)} if start is not None else {})


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
    sweep = Sweep(subject, probe_set, labels, hessian_images, Bar(shown=False), seed, loss)
    with untouched(sweep.network):
        return sweep.run()


class Sweep:
    """One pass over the images, one at a time.

    Attributes:
        network: as in the subject, or a copy where its tensors can have no gradient.
        notes: what the user should know.
        n_hessian: how many images the second order is taken over.
        mean_loss: over the images, once they are run.
        seconds: what each part took.
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
        self.seconds: dict[Part, float] = dict.fromkeys(("forward", "backward", "outputs", "curvature"), 0.0)
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
        self._leave_blank([index for index, own in enumerate(pairs) if not own], found)
        return self._checked(found)

    def _leave_blank(self, unreached: list[int], found: dict[str, Array]) -> None:
        """Take away what a gradient says of layers that none reaches."""
        if not unreached:
            return
        for name in ("fisher", "first_order", "gauss_newton", "second_order", "obd", "taylor", "snip", "gradient_norm"):
            found[name][unreached] = np.nan
        names = [self._subject.layers[index].name for index in unreached]
        self.notes.append(
            f"no gradient of the loss reaches {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}: proxies that "
            "need one are blank there"
        )

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
        self.seconds["forward"] += of_image.seconds_forward
        self.seconds["backward"] -= of_image.seconds_forward
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
            curvature = gradients.curvature(
                image, loss, [change.values if change.delta_norm else {} for change in changes]
            )
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
                self.notes.append(
                    f"{PROXIES[name].label} is not finite for {counted(len(names), 'layer')}, such as {names[0]}"
                )
            found[name][bad] = np.nan
        return found

    @contextlib.contextmanager
    def _timed(self, part: Part) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

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
