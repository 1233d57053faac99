"""Adversarial training: each step on the images that fool the network most, within a small distance of the true ones.

The attack is our own, for the maintained libraries of attacks are made to evaluate: they wrap a finished classifier
with an input range, a normalisation and a mode of their own. A training step needs the network as it is trained, on
its device, and nothing left behind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.errors import TrainingError, near
from layercrit.training.methods import Inputs, Learner, Method, Supervised, method, setting

__all__ = ["Adversarial", "AttackedLearner", "RobustL2", "RobustLinf", "attack"]


def attack(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    steps: int,
    step_size: float,
    random_start: bool,
) -> Tensor:
    """Return images near the given ones with a higher loss, by projected gradient descent on the negative loss.

    Gradients are taken with respect to the images alone; those of parameters stay as they are.

    Args:
        logits: makes logits ``(n_images, n_classes)`` of images in [0, 1].
        images: ``(n_images, channels, height, width)``, in [0, 1].
        labels: classes ``(n_images,)``.
        norm: ``l2`` or ``linf``, of a perturbation.
        eps: largest norm of an image's perturbation, in units of pixels in [0, 1].
        steps: how many gradients are followed.
        step_size: norm of a step, in the same units.
        random_start: whether to start at random within the ball, not at the images.

    Returns:
        Images in [0, 1], of the same shape, without gradient.

    Raises:
        TrainingError: the norm is unknown.

    Note:
        Madry et al. 2018, arXiv 1706.06083, section 2.1, with the sign of the gradient for Linf, and its direction for
        L2.
    """
    if norm not in ("l2", "linf"):
        raise TrainingError(f"There is no attack in the norm {norm!r}. {near(norm, ('l2', 'linf'))}")
    perturbation = _start(images, norm, eps) if random_start else torch.zeros_like(images)
    perturbed = (images + perturbation).clamp(0, 1)
    for _ in range(steps):
        with torch.enable_grad():
            perturbed.requires_grad_()
            loss = F.cross_entropy(logits(perturbed), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, perturbed)
        moved = perturbed.detach() + step_size * _direction(gradient, norm)
        perturbed = (images + _projected(moved - images, norm, eps)).clamp(0, 1)
    return perturbed.detach()


def _lengths(tensors: Tensor) -> Tensor:
    """Return the L2 norm of each image's values ``(n_images, 1, 1, 1)``, never 0, as a divisor."""
    lengths: Tensor = tensors.flatten(1).norm(dim=1).clamp_min(torch.finfo(tensors.dtype).tiny).view(-1, 1, 1, 1)
    return lengths


def _start(images: Tensor, norm: str, eps: float) -> Tensor:
    """Return perturbations drawn uniformly from the ball."""
    if norm == "linf":
        return eps * (2 * torch.rand_like(images) - 1)
    directions = torch.randn_like(images)
    radii = torch.rand(len(images), 1, 1, 1, device=images.device) ** (1 / images[0].numel())
    return eps * radii * directions / _lengths(directions)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the perturbations of norm 1 that the loss rises with fastest; 0 where the gradient is 0."""
    return gradient.sign() if norm == "linf" else gradient / _lengths(gradient)


def _projected(perturbations: Tensor, norm: str, eps: float) -> Tensor:
    """Return the nearest perturbations within the ball."""
    if norm == "linf":
        return perturbations.clamp(-eps, eps)
    return perturbations * (eps / _lengths(perturbations)).clamp_max(1)


class AttackedLearner(Supervised):
    """Learning from attacked images, attacked anew in each step.

    Attributes:
        method: whose settings the attack has.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, method: "Adversarial") -> None:
        super().__init__(network, inputs)
        self.method = method

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of the first view's images, attacked."""
        return self.loss(self.logits(self.attacked(views[0], labels)), labels)

    def attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return attacked images, as `attack` does; the network is in evaluation mode meanwhile."""
        how = self.method
        step_size = (how.step_size or 2 * how.eps / how.steps) * how.unit
        with _evaluating(self.network):
            return attack(
                self.logits, images, labels, how.norm, how.eps * how.unit, how.steps, step_size, how.random_start
            )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Adversarial(Method):
    """Training on attacked images (Madry et al. 2018, equation 2.1); defaults of Salman et al. 2020, appendix A.

    Salman et al. use 3 steps of two thirds of ``eps``, which is what ``step_size=0`` gives.

    Attributes:
        norm: of perturbations.
        unit: of ``eps`` and ``step_size``, in units of pixels in [0, 1].
    """

    norm: ClassVar[str]
    unit: ClassVar[float]

    batch_size: int = setting(512, "images a step, over all processes", low=1)
    schedule: str = setting("step", "of the learning rate", choices=("cosine", "step"))
    eps: float = setting(0.0, "largest norm of a perturbation", low=0)
    steps: int = setting(3, "of the attack, each costs as much as a plain training step", low=1)
    step_size: float = setting(0.0, "of the attack, in the unit of eps; 0: 2 eps / steps", low=0)
    random_start: bool = setting(True, "whether attacks start at random within the ball, not at the image")

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner that attacks each batch; without attack, as in plain training, where ``eps`` is 0."""
        return AttackedLearner(network, inputs, self) if self.eps else Supervised(network, inputs)


@method(
    "robust_l2",
    category="adversarial_training",
    changes="images attacked by PGD within an L2 ball",
    paper="Madry et al. 2018, arXiv 1706.06083; models of Salman et al. 2020, arXiv 2007.08489",
)
@dataclass(frozen=True)
class RobustL2(Adversarial):
    """Attacks whose perturbation is short as a vector of all pixels; it grows with the number of pixels."""

    norm: ClassVar[str] = "l2"
    unit: ClassVar[float] = 1.0

    eps: float = setting(0.5, "largest length of a perturbation, of pixels in [0, 1]; 0: plain training", low=0)


@method(
    "robust_linf",
    category="adversarial_training",
    changes="images attacked by PGD within an Linf ball",
    paper="Madry et al. 2018, arXiv 1706.06083; models of Salman et al. 2020, arXiv 2007.08489",
)
@dataclass(frozen=True)
class RobustLinf(Adversarial):
    """Attacks that change every pixel a little."""

    norm: ClassVar[str] = "linf"
    unit: ClassVar[float] = 1 / 255

    eps: float = setting(4.0, "largest change of a pixel, in 1/255; 0: plain training", low=0)
