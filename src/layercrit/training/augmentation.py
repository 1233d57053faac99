"""Training on images that are changed at random: policies, mixtures, pictures mixed in, noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.training.methods import Inputs, Learner, Method, Supervised, Views, method, setting
from layercrit.training.pictures import draw_pictures

__all__ = [
    "AugMix",
    "AutoAugment",
    "Consistent",
    "DiffusionNoise",
    "Noisy",
    "PixMix",
    "RandAugment",
    "TrivialAugment",
    "consistency",
    "mix_pictures",
]


@method(
    "autoaugment",
    category="augmentation",
    changes="two operations of a policy that was searched for",
    paper="Cubuk et al. 2019, arXiv 1805.09501",
)
@dataclass(frozen=True)
class AutoAugment(Method):
    """Policies found on other images (section 4), by torchvision."""

    epochs: int = setting(270, "passes over the training images", low=1)
    policy: str = setting("imagenet", "on which the policy was found", choices=("imagenet", "cifar10", "svhn"))

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the policy."""
        from torchvision import transforms

        return [transforms.AutoAugment(transforms.AutoAugmentPolicy(self.policy))]


@method(
    "randaugment",
    category="augmentation",
    changes="some random operations of one strength",
    paper="Cubuk et al. 2020, arXiv 1909.13719",
)
@dataclass(frozen=True)
class RandAugment(Method):
    """Operations drawn at random (section 3), by torchvision."""

    epochs: int = setting(270, "passes over the training images", low=1)
    n_operations: int = setting(2, "applied one after another", low=1)
    magnitude: int = setting(9, "strength of the operations", low=0, high=30)

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the operations."""
        from torchvision import transforms

        return [transforms.RandAugment(self.n_operations, self.magnitude)]


@method(
    "trivialaugment",
    category="augmentation",
    changes="one random operation of random strength",
    paper="Mueller & Hutter 2021, arXiv 2103.10158",
)
@dataclass(frozen=True)
class TrivialAugment(Method):
    """One operation (section 3, the wide space of table 1), by torchvision; shifts are of up to 32 pixels."""

    epochs: int = setting(270, "passes over the training images", low=1)

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the operation."""
        from torchvision import transforms

        return [transforms.TrivialAugmentWide()]


@method(
    "augmix",
    category="augmentation",
    changes="mixtures of operations, and the same prediction for an image and two mixtures of it",
    paper="Hendrycks et al. 2020, arXiv 1912.02781",
)
@dataclass(frozen=True)
class AugMix(Method):
    """Mixtures by torchvision (algorithm 1), without the operations that tests of corruptions contain."""

    epochs: int = setting(180, "passes over the training images", low=1)
    severity: int = setting(3, "largest strength of operations", low=1, high=10)
    consistency: float = setting(12.0, "weight of the divergence between predictions", low=0)

    def views(self, inputs: Inputs) -> Views:
        """Return what makes three views of one crop: itself and two mixtures."""
        from torchvision import transforms

        crop = transforms.Compose(self.crops(inputs))
        mix = transforms.AugMix(self.severity, all_ops=False)
        tensor = transforms.PILToTensor()

        def views(image: Image.Image) -> Sequence[Tensor]:
            part = crop(image)
            return [tensor(view) for view in (part, mix(part), mix(part))]

        return views

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return the learner that compares predictions."""
        return Consistent(network, inputs, self.consistency)


class Consistent(Learner):
    """Learning from labels of the first view, and from the agreement of all views (AugMix, equation 3).

    Attributes:
        weight: of the agreement.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, weight: float) -> None:
        super().__init__(network, inputs)
        self.weight = weight

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the cross-entropy of the first view plus the weighted divergence between all."""
        logits = torch.stack(self.logits(torch.cat(list(views))).chunk(len(views)))
        return F.cross_entropy(logits[0], labels) + self.weight * consistency(logits)


def consistency(logits: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence between the predictions for several views, in nats.

    Args:
        logits: ``(n_views, n_images, n_classes)``.
    """
    # timm's JsdCrossEntropy takes logarithms of probabilities: its gradient is NaN once one of them underflows to 0.
    each = logits.log_softmax(dim=-1)
    mean = each.logsumexp(dim=0) - math.log(len(logits))  # (n_images, n_classes)
    divergences = F.kl_div(mean.expand_as(each), each, reduction="none", log_target=True)
    return divergences.sum(dim=-1).mean()


@method(
    "pixmix",
    category="augmentation",
    changes="pictures of fractals and textures mixed into images",
    paper="Hendrycks et al. 2022, arXiv 2112.05135",
)
@dataclass(frozen=True)
class PixMix(Method):
    """Rounds of mixing with drawn pictures or with the changed image itself (section 3).

    The paper's pictures are fractals and feature visualisations that others collected; those of
    `layercrit.training.pictures` stand in for them. The changed image has one operation of torchvision's RandAugment.
    """

    rounds: int = setting(4, "most rounds of mixing", low=0)
    beta: float = setting(4.0, "how little is mixed in: 1 much, larger is less", low=1)
    magnitude: int = setting(9, "strength of the operations", low=0, high=30)
    n_pictures: int = setting(48, "drawn once, always the same", low=1)

    def views(self, inputs: Inputs) -> Views:
        """Return what makes a view of an image, mixed."""
        from torchvision import transforms

        crop = transforms.Compose(self.crops(inputs))
        operation = transforms.RandAugment(1, self.magnitude)
        tensor = transforms.PILToTensor()
        # A half larger than the images, so that parts of them differ.
        pictures = draw_pictures(self.n_pictures, inputs.channels, inputs.height * 3 // 2, inputs.width * 3 // 2)
        picture_part = transforms.RandomCrop((inputs.height, inputs.width))

        def views(image: Image.Image) -> Sequence[Tensor]:
            part = crop(image)
            picture = picture_part(pictures[_below(self.n_pictures)])
            mixed = tensor(operation(part) if _below(2) else part) / 255
            for _ in range(_below(self.rounds + 1)):
                other = tensor(operation(part)) if _below(2) else picture
                mixed = mix_pictures(mixed, other / 255, self.beta)
            return [(mixed * 255).round().to(torch.uint8)]

        return views


def _below(n: int) -> int:
    """Return a random whole number from 0 to ``n - 1``."""
    return int(torch.randint(n, ()))


def mix_pictures(first: Tensor, second: Tensor, beta: float) -> Tensor:
    """Return a random mixture of two pictures, by addition or by multiplication, cut to [0, 1].

    With random weights a and b, pixels in [-1, 1] become ``a first + b second``, or pixels in [0, 2] become
    ``first^a second^b``. Either a is nearly 1 and b nearly 0, or a is a little above 1 and b a little below 0, so that
    the second picture is taken away.

    Args:
        first: values in [0, 1].
        second: likewise, of the same shape.
        beta: weights are a Beta(beta, 1) or Beta(1, beta) variable away from 0.

    Note:
        PixMix, appendix on mixing operations.
    """
    little, other = (1 - torch.rand(2) ** (1 / beta)).tolist()  # Beta(1, beta)
    a, b = (1 - little, other) if _below(2) else (1 + little, -other)
    if _below(2):
        mixed: Tensor = (a * (2 * first - 1) + b * (2 * second - 1) + 1) / 2
    else:
        # Black to a negative power is infinite.
        mixed = torch.pow(2 * first, a) * torch.pow((2 * second).clamp_min(1e-6), b) / 2
    return mixed.clamp(0, 1)


@method(
    "diffusionnoise",
    category="augmentation",
    changes="noise as in the training of diffusion models",
    paper="Jaini, Clark & Geirhos 2024, arXiv 2309.16779",
)
@dataclass(frozen=True)
class DiffusionNoise(Method):
    """Each image fades into noise by a random share (appendix), drawn anew in each step.

    The shares follow the cosine of Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17 without offset.
    """

    largest_noise: float = setting(
        1.0, "largest standard deviation of the noise, where images have 1; 1: nothing but noise", low=0, high=1
    )

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return the learner that adds noise."""
        return Noisy(network, inputs, self.largest_noise)


class Noisy(Supervised):
    """Learning from normalised images ``sqrt(abar) image + sqrt(1 - abar) noise``, with ``sqrt(abar) = cos(angle)``.

    Attributes:
        largest_angle: up to which angles are drawn uniformly, one for each image.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, largest_noise: float) -> None:
        super().__init__(network, inputs)
        self.largest_angle = math.asin(largest_noise)

    def normalise(self, images: Tensor) -> Tensor:
        """Return normalised images with noise."""
        clean = super().normalise(images)
        angles = self.largest_angle * torch.rand(len(clean), 1, 1, 1, device=clean.device)
        return angles.cos() * clean + angles.sin() * torch.randn_like(clean)
