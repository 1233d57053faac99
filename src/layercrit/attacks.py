"""Adversarial images: images perturbed to raise a trained model's loss, within a small norm ball.

The attack is our own because attack libraries are made for evaluation: they wrap a trained classifier with its input
range, normalisation and mode. A training step needs the network as it is being trained, on its device, with no side
effects.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.errors import LayercritError, ModelError, ProbeError, TrainingError, first_line, near
from layercrit.foreign_files import read_json
from layercrit.machine import find_device, is_out_of_memory
from layercrit.models.model import Model
from layercrit.models.references import open_model
from layercrit.named_options import AtLeast, checked_options, options_of, split_name, with_options
from layercrit.probes.changes import begins_with, split_change
from layercrit.probes.images import Pixels
from layercrit.probes.probe_set import ProbeSet, Progress
from layercrit.restoring import copied, rng_untouched, undisturbed, untouched
from layercrit.seeds import seed_of

__all__ = ["Pgd", "attack", "attacked", "in_levels", "split_attack", "start_in_ball", "stepped"]

_AT_ONCE = 16  # images; every batch has as many, since results differ in their last bits with the number
_ASKED = "attack.json"
_STEPS_OF_BISECTION = 30


@dataclass(frozen=True, kw_only=True)
class Pgd:
    """Projected gradient descent on the negative loss; as text, ``pgd(norm=linf, eps=4/255, steps=10)``.

    Attributes:
        norm: of perturbations: ``linf``, the largest change of a value, or ``l2``, over all values of an image.
        eps: largest norm of a perturbation, for pixels in [0, 1].
        steps: number of gradient steps.
        step_size: norm of a step; by default ``2.5 eps / steps``, so that the ball's border can be reached.
        random_start: whether to start at a random point of the ball instead of at the image.
        seed: of the random starts.

    Raises:
        ProbeError: a setting is out of range, or so small that no 8-bit pixel would change.

    Note:
        Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """

    norm: Literal["linf", "l2"]
    eps: float
    steps: Annotated[int, AtLeast(1)] = 10
    step_size: float | None = None
    random_start: bool = True
    seed: Annotated[int, AtLeast(0)] = 0

    def __post_init__(self) -> None:
        where = "The attack 'pgd'"
        for name, value in checked_options(where, asdict(self), options_of(Pgd), ProbeError).items():
            object.__setattr__(self, name, value)
        if self.eps < (1 - 1e-6) / 255:
            raise ProbeError(
                f"{where}: eps must be at least 1/255 for pixels in [0, 1], since images are kept in 8 bits; got "
                f"{self.eps:g}. For images as they are, leave the attack out."
            )
        if self.norm == "linf" and self.eps > 1:
            raise ProbeError(
                f"{where}: eps is for pixels in [0, 1], so that {self.eps:g} in Linf would allow any image. For "
                f"{self.eps:g} of 255 levels, write eps={self.eps:g}/255."
            )
        if self.step_size is not None and self.step_size <= 0:
            raise ProbeError(
                f"{where}: step_size must be positive; got {self.step_size:g}. Leave it out: 2.5 eps / steps."
            )

    @classmethod
    def from_text(cls, text: str) -> "Pgd":
        """Return the attack that ``pgd(option=value, ...)`` names.

        Raises:
            ProbeError: there is no such attack, or its options are wrong.
        """
        name, values = split_name(text, "attack", ProbeError)
        if name != "pgd":
            raise ProbeError(
                f"There is no attack {name!r}; there is pgd(norm=linf, eps=4/255, steps=10). One step without a random "
                "start is FGSM: pgd(norm=linf, eps=4/255, steps=1, step_size=4/255, random_start=false)."
            )
        return cls(**checked_options("The attack 'pgd'", values, options_of(cls), ProbeError))

    def __str__(self) -> str:
        defaults = {name: option.default for name, option in options_of(Pgd).items()}
        kept = {name: value for name, value in asdict(self).items() if name == "steps" or value != defaults[name]}
        written = {name: in_levels(value) if name in ("eps", "step_size") else value for name, value in kept.items()}
        return with_options("pgd", written).replace("'", "")


def in_levels(value: float) -> str:
    """Return a number as so many of 255 levels where it is, such as ``4/255``, else as it is, such as 1 in L2."""
    if value == int(value):
        return f"{value:g}"
    levels = Fraction(value * 255).limit_denominator(10)
    exact = abs(float(levels) / 255 - value) < 1e-12
    return f"{levels}/255" if exact and levels.denominator == 1 else repr(value)


def split_attack(source: Any) -> tuple[Pgd | None, Any]:
    """Return the attack that ``attack:pgd(...):SOURCE`` begins with, and SOURCE; None and the source without one.

    Raises:
        ProbeError: it begins with ``attack:``, but is not written like this, or the attack's options are wrong.
    """
    text = str(source) if isinstance(source, str | Path) else ""
    if not begins_with("attack", text):
        return None, source
    found = split_change("attack", text)
    if found is None:
        raise ProbeError(
            f"The images {text!r} are not written as attack:pgd(...):SOURCE, such as "
            "'attack:pgd(norm=linf, eps=4/255, steps=10):imagenet/val'."
        )
    how, images = found
    if begins_with("attack", images):
        raise ProbeError(f"There are several attacks in {text!r}. Give one.")
    return Pgd.from_text(how), images


# --- the images of a probe set ----------------------------------------------------------------------------------------


def attacked(
    probe_set: ProbeSet,
    model: str | Model | nn.Module,
    attack: str | Pgd,
    *,
    use_labels: bool = True,
    device: str = "auto",
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> ProbeSet:
    """Return adversarial images of a trained model, as 8-bit pixels within ``eps`` of those of a probe set.

    The loss that is raised is the cross-entropy with the labels; without labels that the model knows, with its own
    predictions. An image does not depend on which others there are: fewer images are the beginning of more.

    Args:
        probe_set: the images, of the size that the model takes.
        model: what `open_model` takes; it is attacked in evaluation mode, its normalisation included. One that does
            not declare the size of its input gets the images in theirs.
        attack: such as ``pgd(norm=linf, eps=4/255, steps=10)``; see `Pgd`.
        use_labels: whether to use the labels.
        device: where to compute; ``auto``: on a GPU if there is one.
        folder: where the images are kept. Those that are there are returned if they were made of the same images, by
            the same attack, on the same model.
        progress: called with the number of images done, and of all.

    Raises:
        ProbeError: the attack is wrong, or labels are not those of the model.
        ModelError: no gradient of the loss reaches the images, or it is not a number.
    """
    how = Pgd.from_text(attack) if isinstance(attack, str) else attack
    opened, size = open_model(model), probe_set.preprocessing
    if isinstance(model, nn.Module) or "input_size" in opened.undeclared:
        opened = open_model(opened, input_size=(size.channels, size.height, size.width))
    probe_set = ProbeSet.from_source(probe_set, opened.preprocessing)
    labels = probe_set.labels_for(opened.n_classes)[0] if use_labels else None
    asked = {"attack": str(how), "images": probe_set.sha256, "labels": labels is not None,
             "model": opened.sha256, "mean": list(opened.mean), "std": list(opened.std),
             "output": opened.output_in_words}  # fmt: skip
    if folder is not None and (found := _kept(Path(folder).expanduser(), asked)) is not None:
        return found
    with undisturbed(), rng_untouched(), untouched(opened.network):
        network = opened.network.eval()
        place = find_device(device)
        network = network if _is_on(network, place) else copied(network).to(place)
        attacker = _Attacker(how, replace(opened, network=network), place, probe_set, labels, progress)
        made = probe_set.changed(attacker.change, f"attack:{how}:{probe_set.source}")
    made = replace(made, notes=(*made.notes, attacker.note()))
    if folder is not None:
        _keep(made, Path(folder).expanduser(), asked)
    return made


def _is_on(network: nn.Module, device: torch.device) -> bool:
    return all(tensor.device == device for tensor in (*network.parameters(), *network.buffers()))


def _kept(folder: Path, asked: dict[str, Any]) -> ProbeSet | None:
    """Return the images that a folder keeps, if they are those asked for."""
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # none, damaged or of another version: made anew
        known = read_json(folder / _ASKED)
        if known["asked"] == asked:
            found = ProbeSet.load(folder)
            return found if found.sha256 == known["sha256"] else None
    return None


def _keep(probe_set: ProbeSet, folder: Path, asked: dict[str, Any]) -> None:
    probe_set.save(folder)
    try:
        about = json.dumps({"asked": asked, "sha256": probe_set.sha256}, ensure_ascii=False)
        (folder / _ASKED).write_text(about + "\n", encoding="utf-8")
    except OSError as error:
        raise ProbeError(
            f"The images cannot be written to {folder} ({error.strerror or error}). Free some space, or name another "
            "folder."
        ) from error


class _Attacker:
    """Attacks the images of a probe set, and counts what becomes of the predictions."""

    def __init__(
        self,
        how: Pgd,
        model: Model,
        device: torch.device,
        probe_set: ProbeSet,
        labels: npt.NDArray[np.int64] | None,
        progress: Progress | None,
    ) -> None:
        self.how, self.model, self.device, self.progress = how, model, device, progress
        self.probe_set, self.labels = probe_set, labels
        self.n_at_once, self.n_done, self.n_right_before, self.n_right_after = _AT_ONCE, 0, 0, 0

    def change(self, start: int, pixels: Pixels) -> Pixels:
        """Return adversarial images of ``pixels (n, channels, height, width)``, the first of which is ``start``."""
        new, done = np.empty_like(pixels), 0
        while done < len(pixels):
            some = pixels[done : done + self.n_at_once]
            try:
                new[done : done + len(some)] = self._batch(start + done, some)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.n_at_once == 1:
                    raise
                self.n_at_once //= 2
                continue
            done += len(some)
            if self.progress is not None:
                self.progress(start + done, self.probe_set.n_images)
        return new

    def note(self) -> str:
        """Return what was done and what became of the predictions, in words."""
        how, n = self.how, self.n_done
        of = "top-1 accuracy" if self.labels is not None else "share of the model's predictions that stay"
        towards = "labels" if self.labels is not None else "the model's own predictions on the images as they are"
        norm = {"linf": "Linf", "l2": "L2"}[how.norm]
        return (
            f"the images are adversarial: {how}, perturbed within {norm} {in_levels(how.eps)} to raise the loss with "
            f"{towards}; {of} {self.n_right_before / n:.1%} before and {self.n_right_after / n:.1%} after the attack"
        )

    def _batch(self, start: int, pixels: Pixels) -> Pixels:
        # Always as many images: the last one is repeated where there are fewer.
        places = np.minimum(np.arange(self.n_at_once), len(pixels) - 1)
        clean = torch.from_numpy(pixels[places]).to(self.device)
        with torch.no_grad():
            before = self.model.classifier(clean).argmax(1)
        labels = before if self.labels is None else torch.from_numpy(self.labels[start + places]).to(self.device)
        images = clean.to(torch.float32) / 255
        if start == 0:
            self._check_gradient(images, labels)
        how, step = self.how, self.how.step_size or 2.5 * self.how.eps / self.how.steps
        names = [self.probe_set.names[start + place] for place in places]
        generators = [torch.Generator().manual_seed(seed_of(how.seed, "attack", name)) for name in names]
        found = attack(self._logits, images, labels, how.norm, how.eps, how.steps, step, how.random_start, generators)
        if not bool(found.isfinite().all()):
            name = names[int((~found.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise ModelError(
                f"The gradient of the loss of {self.model.reference!r} is not a number for '{name}', so that no "
                "attack on it is possible. Leave the image out, or measure on images without an attack."
            )
        new = _in_8_bits(clean, found, how.norm, how.eps)
        with torch.no_grad():
            after = self.model.classifier(new).argmax(1)
        n = len(pixels)
        self.n_done += n
        self.n_right_before += int((before == labels)[:n].sum())
        self.n_right_after += int((after == labels)[:n].sum())
        return new[:n].cpu().numpy()

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits of images in [0, 1]."""
        classifier = self.model.classifier
        return self.model.read_logits(classifier.network(images.sub(classifier.mean).div(classifier.std)))

    def _check_gradient(self, images: Tensor, labels: Tensor) -> None:
        """Make sure that a gradient of the loss reaches the first images."""
        reason = "it is 0 everywhere on the first images"
        with torch.enable_grad():
            images = images.clone().requires_grad_()
            try:
                loss = F.cross_entropy(self._logits(images), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, images)
                if bool((gradient != 0).any()):
                    return
            except LayercritError:
                raise
            except Exception as error:  # a network's own code raises what it likes
                if is_out_of_memory(error):
                    raise
                reason = first_line(error)
        raise ModelError(
            f"{self.model.reference!r} cannot be attacked: no gradient of its loss reaches the images ({reason}). Its "
            "forward pass must be differentiable, without rounding, argmax or detach(); or measure on images without "
            "an attack."
        )


def _in_8_bits(clean: Tensor, found: Tensor, norm: str, eps: float) -> Tensor:
    """Return adversarial images in 8 bits, whose distance from the clean ones is still at most ``eps``.

    In Linf, perturbations are rounded and cut at the largest whole level. In L2, rounding alone would lose the many
    perturbations below half a level, and so nearly all of a small ``eps`` in a large image: they are multiplied by the
    largest factor with which they stay in the ball once they are rounded.

    Args:
        clean: ``(n_images, channels, height, width)``, uint8.
        found: likewise, in [0, 1].
        norm: ``l2`` or ``linf``.
        eps: for pixels in [0, 1].
    """
    away = found.double() * 255 - clean
    if norm == "linf":
        most = int(eps * 255 + 1e-6)
        away = away.round().clamp(-most, most)
    else:
        limit = eps * 255 * (1 + 1e-9)
        low = away.new_zeros(len(away), 1, 1, 1)
        high = (limit + 1) / away.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-9)
        for _ in range(_STEPS_OF_BISECTION):
            middle = (low + high) / 2
            within = (middle * away).round().square().sum((1, 2, 3), keepdim=True) <= limit**2
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        away = (low * away).round()
    return (clean + away).clamp(0, 255).to(torch.uint8)


# --- the attack -------------------------------------------------------------------------------------------------------


def attack(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    steps: int,
    step_size: float,
    random_start: bool,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Return images perturbed to raise the loss, by projected gradient descent (PGD) on the negative loss.

    Gradients are taken with respect to the images alone; gradients of parameters are left as they are.

    Args:
        logits: returns logits ``(n_images, n_classes)`` for images in [0, 1].
        images: ``(n_images, channels, height, width)``, in [0, 1].
        labels: classes ``(n_images,)``.
        norm: ``l2`` or ``linf``.
        eps: maximum norm of an image's perturbation, for pixels in [0, 1].
        steps: number of gradient steps.
        step_size: norm of a step, in the same unit.
        random_start: whether to start at a random point of the ball instead of at the images.
        generators: a generator on the CPU for each image, which draws its start; None: PyTorch's global generator.

    Returns:
        Images in [0, 1], of the same shape, without gradient.

    Raises:
        TrainingError: the norm is unknown.

    Note:
        Madry et al. 2018, arXiv 1706.06083, section 2.1: steps along the sign of the gradient for Linf, along its
        direction for L2.
    """
    if norm not in ("l2", "linf"):
        raise TrainingError(f"There is no attack in the norm {norm!r}. {near(norm, ('l2', 'linf'))}")
    perturbation = start_in_ball(images, norm, eps, generators) if random_start else torch.zeros_like(images)
    perturbed = (images + perturbation).clamp(0, 1)
    for _ in range(steps):
        with torch.enable_grad():
            perturbed.requires_grad_()
            loss = F.cross_entropy(logits(perturbed), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, perturbed)
        perturbed = stepped(perturbed.detach(), gradient, images, norm, eps, step_size)
    return perturbed.detach()


def stepped(perturbed: Tensor, gradient: Tensor, images: Tensor, norm: str, eps: float, step_size: float) -> Tensor:
    """Return perturbed images after a step up the gradient, back in the ball and in [0, 1].

    Args:
        perturbed: ``(n_images, channels, height, width)``, in [0, 1].
        gradient: of what is raised, of the same shape.
        images: those that are perturbed, of the same shape.
        norm: ``l2`` or ``linf``.
        eps: maximum norm of an image's perturbation.
        step_size: norm of the step.
    """
    moved = perturbed + step_size * _direction(gradient, norm)
    return (images + _projected(moved - images, norm, eps)).clamp(0, 1)


def _lengths(tensors: Tensor) -> Tensor:
    """Return the L2 norm of each image's values ``(n_images, 1, 1, 1)``, never 0, as a divisor."""
    lengths: Tensor = tensors.flatten(1).norm(dim=1).clamp_min(torch.finfo(tensors.dtype).tiny).view(-1, 1, 1, 1)
    return lengths


def start_in_ball(images: Tensor, norm: str, eps: float, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Return perturbations sampled uniformly from the ball.

    Args:
        images: ``(n_images, channels, height, width)``.
        norm: ``l2`` or ``linf``.
        eps: maximum norm of an image's perturbation.
        generators: a generator on the CPU for each image; None: PyTorch's global generator.
    """
    if generators is not None:
        starts = zip(torch.split(images.cpu(), 1), generators, strict=True)
        return torch.cat([_start_of_one(image, norm, eps, generator) for image, generator in starts]).to(images.device)
    if norm == "linf":
        return eps * (2 * torch.rand_like(images) - 1)
    directions = torch.randn_like(images)
    radii = torch.rand(len(images), 1, 1, 1, device=images.device) ** (1 / images[0].numel())
    return eps * radii * directions / _lengths(directions)


def _start_of_one(image: Tensor, norm: str, eps: float, generator: torch.Generator) -> Tensor:
    if norm == "linf":
        return eps * (2 * torch.rand(image.shape, generator=generator) - 1)
    direction = torch.randn(image.shape, generator=generator)
    radius = torch.rand((), generator=generator) ** (1 / image.numel())
    return eps * radius * direction / _lengths(direction)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the perturbations of norm 1 along which the loss rises fastest; 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign() + 0 * gradient  # the sign of NaN would be 0: that the gradient is none has to show
    return gradient / _lengths(gradient)


def _projected(perturbations: Tensor, norm: str, eps: float) -> Tensor:
    """Return the nearest perturbations within the ball."""
    if norm == "linf":
        return perturbations.clamp(-eps, eps)
    return perturbations * (eps / _lengths(perturbations)).clamp_max(1)
