"""Adversarial training: each step is taken on images perturbed to raise the loss, within a small norm ball."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from layercrit.attacks import attack
from layercrit.training.methods import Inputs, Learner, Method, Supervised, method, setting

__all__ = ["Adversarial", "AttackedLearner", "RobustL2", "RobustLinf"]


class AttackedLearner(Supervised):
    """Supervised learning on adversarial images, computed anew in each step.

    Attributes:
        method: the method, whose settings define the attack.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, method: "Adversarial") -> None:
        super().__init__(network, inputs)
        self.method = method

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss on adversarial images of the first view."""
        return self.loss(self.logits(self.attacked(views[0], labels)), labels)

    def attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images, computed by `attack` with the network in evaluation mode."""
        how = self.method
        step_size = (how.step_size or 2 * how.eps / how.steps) * how.unit
        with _evaluating(self.network):
            return attack(
                self.logits, images, labels, how.norm, how.eps * how.unit, how.steps, step_size, how.random_start
            )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and restore the mode of each of its modules afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Adversarial(Method):
    """Training on adversarial images (Madry et al. 2018, equation 2.1); defaults of Salman et al. 2020, appendix A.

    Salman et al. use 3 steps of size ``2 eps / 3``, which is the default ``step_size=0``.

    Attributes:
        norm: of perturbations, ``l2`` or ``linf``.
        unit: of ``eps`` and ``step_size``, for pixels in [0, 1].
    """

    norm: ClassVar[str]
    unit: ClassVar[float]

    batch_size: int = setting(512, "images per step, over all processes", low=1)
    schedule: str = setting("step", "learning rate schedule", choices=("cosine", "step"))
    eps: float = setting(0.0, "maximum norm of a perturbation", low=0)
    steps: int = setting(3, "number of attack steps, each as costly as a standard training step", low=1)
    step_size: float = setting(0.0, "step size of the attack, in the unit of eps; 0: 2 eps / steps", low=0)
    random_start: bool = setting(True, "whether attacks start at a random point of the ball instead of at the image")

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner that trains on adversarial images, or on the images themselves if ``eps`` is 0."""
        return AttackedLearner(network, inputs, self) if self.eps else Supervised(network, inputs)


@method(
    "robust_l2",
    category="adversarial_training",
    changes="adversarial images by PGD within an L2 ball",
    paper="Madry et al. 2018, arXiv 1706.06083; models of Salman et al. 2020, arXiv 2007.08489",
)
@dataclass(frozen=True)
class RobustL2(Adversarial):
    """Attacks limited in the L2 norm over all pixels; the same ``eps`` means less change per pixel in larger images."""

    norm: ClassVar[str] = "l2"
    unit: ClassVar[float] = 1.0

    eps: float = setting(0.5, "maximum L2 norm of a perturbation, for pixels in [0, 1]; 0: standard training", low=0)


@method(
    "robust_linf",
    category="adversarial_training",
    changes="adversarial images by PGD within an Linf ball",
    paper="Madry et al. 2018, arXiv 1706.06083; models of Salman et al. 2020, arXiv 2007.08489",
)
@dataclass(frozen=True)
class RobustLinf(Adversarial):
    """Attacks limited in the change of each pixel."""

    norm: ClassVar[str] = "linf"
    unit: ClassVar[float] = 1 / 255

    eps: float = setting(4.0, "maximum change of a pixel, in 1/255; 0: standard training", low=0)
