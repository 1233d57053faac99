"""Data augmentation: policies of operations, mixtures of them, images mixed in, noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.training.methods import Inputs, Learner, Method, Supervised, Views, method, setting
from layercrit.training.mixing_set import mixing_set

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
    "mix_images",
]


@method(
    "autoaugment",
    category="augmentation",
    changes="pairs of operations from a learned policy",
    paper="Cubuk et al. 2019, arXiv 1805.09501",
)
@dataclass(frozen=True)
class AutoAugment(Method):
    """Policies learned on other data sets (section 4), by torchvision."""

    epochs: int = setting(270, "passes over the training images", low=1)
    policy: str = setting("imagenet", "data set the policy was learned on", choices=("imagenet", "cifar10", "svhn"))

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the policy."""
        from torchvision import transforms

        return [transforms.AutoAugment(transforms.AutoAugmentPolicy(self.policy))]


@method(
    "randaugment",
    category="augmentation",
    changes="a few random operations of fixed strength",
    paper="Cubuk et al. 2020, arXiv 1909.13719",
)
@dataclass(frozen=True)
class RandAugment(Method):
    """Randomly chosen operations (section 3), by torchvision."""

    epochs: int = setting(270, "passes over the training images", low=1)
    n_operations: int = setting(2, "number of operations applied in sequence", low=1)
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
    """One operation (section 3, the wide search space of table 1), by torchvision; translations of up to 32 pixels."""

    epochs: int = setting(270, "passes over the training images", low=1)

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the operation."""
        from torchvision import transforms

        return [transforms.TrivialAugmentWide()]


@method(
    "augmix",
    category="augmentation",
    changes="mixtures of operations, with a loss for consistent predictions",
    paper="Hendrycks et al. 2020, arXiv 1912.02781",
)
@dataclass(frozen=True)
class AugMix(Method):
    """Mixtures by torchvision (algorithm 1), without operations that overlap with corruption benchmarks."""

    epochs: int = setting(180, "passes over the training images", low=1)
    severity: int = setting(3, "maximum strength of the operations", low=1, high=10)
    consistency: float = setting(12.0, "weight of the Jensen-Shannon divergence between predictions", low=0)

    def views(self, inputs: Inputs) -> Views:
        """Return a function that makes three views of one crop: the crop itself and two mixtures."""
        from torchvision import transforms

        crop = transforms.Compose(self.crops(inputs))
        mix = transforms.AugMix(self.severity, all_ops=False)
        tensor = transforms.PILToTensor()

        def views(image: Image.Image) -> Sequence[Tensor]:
            part = crop(image)
            return [tensor(view) for view in (part, mix(part), mix(part))]

        return views

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return the learner with the consistency loss."""
        return Consistent(network, inputs, self.consistency)


class Consistent(Learner):
    """Supervised learning on the first view, with a consistency loss over all views (AugMix, equation 3).

    Attributes:
        weight: of the consistency loss.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, weight: float) -> None:
        super().__init__(network, inputs)
        self.weight = weight

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the cross-entropy of the first view plus the weighted consistency loss of all views."""
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
    changes="fractals and other generated images mixed in",
    paper="Hendrycks et al. 2022, arXiv 2112.05135",
)
@dataclass(frozen=True)
class PixMix(Method):
    """Rounds of mixing with an image of the mixing set or with the augmented image itself (section 3).

    The paper's mixing set consists of collected fractals and feature visualisations; `layercrit.training.mixing_set`
    generates a substitute. The image itself is augmented by one operation of torchvision's RandAugment.
    """

    rounds: int = setting(4, "maximum number of mixing rounds", low=0)
    beta: float = setting(4.0, "mixing strength: the larger, the less is mixed in", low=1)
    magnitude: int = setting(9, "strength of the operations", low=0, high=30)
    n_mixing_images: int = setting(48, "size of the mixing set, which is the same in every run", low=1)

    def views(self, inputs: Inputs) -> Views:
        """Return a function that makes one mixed view of an image."""
        from torchvision import transforms

        crop = transforms.Compose(self.crops(inputs))
        operation = transforms.RandAugment(1, self.magnitude)
        tensor = transforms.PILToTensor()
        # 1.5 times the size of the images, so that random crops differ.
        images = mixing_set(self.n_mixing_images, inputs.channels, inputs.height * 3 // 2, inputs.width * 3 // 2)
        random_crop = transforms.RandomCrop((inputs.height, inputs.width))

        def views(image: Image.Image) -> Sequence[Tensor]:
            part = crop(image)
            mixed_in = random_crop(images[_below(self.n_mixing_images)])
            mixed = tensor(operation(part) if _below(2) else part) / 255
            for _ in range(_below(self.rounds + 1)):
                other = tensor(operation(part)) if _below(2) else mixed_in
                mixed = mix_images(mixed, other / 255, self.beta)
            return [(mixed * 255).round().to(torch.uint8)]

        return views


def _below(n: int) -> int:
    """Return a random whole number from 0 to ``n - 1``."""
    return int(torch.randint(n, ()))


def mix_images(first: Tensor, second: Tensor, beta: float) -> Tensor:
    """Return a random additive or multiplicative mixture of two images, clipped to [0, 1].

    With random weights a and b, pixels in [-1, 1] become ``a first + b second``, or pixels in [0, 2] become
    ``first^a second^b``. Either a is just below 1 and b just above 0, or a is just above 1 and b just below 0, so that
    the second image is subtracted.

    Args:
        first: values in [0, 1].
        second: values in [0, 1], of the same shape.
        beta: parameter of the weights' distribution: a differs from 1, and b from 0, by a Beta(1, beta) variable.

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
    changes="noise of random strength, as in training diffusion models",
    paper="Jaini, Clark & Geirhos 2024, arXiv 2309.16779",
)
@dataclass(frozen=True)
class DiffusionNoise(Method):
    """Each image is blended with noise at a random noise level (appendix), sampled anew in each step.

    Noise levels follow the cosine schedule of Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17 without offset.
    """

    largest_noise: float = setting(
        1.0, "maximum standard deviation of the noise, relative to that of the images; 1: pure noise", low=0, high=1
    )

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return the learner that adds noise."""
        return Noisy(network, inputs, self.largest_noise)


class Noisy(Supervised):
    """Supervised learning on ``sqrt(abar) image + sqrt(1 - abar) noise``, normalised, with ``sqrt(abar) = cos(angle)``.

    Attributes:
        largest_angle: upper limit of the angles, which are uniform and independent for each image.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, largest_noise: float) -> None:
        super().__init__(network, inputs)
        self.largest_angle = math.asin(largest_noise)

    def normalise(self, images: Tensor) -> Tensor:
        """Return normalised images with noise."""
        clean = super().normalise(images)
        angles = self.largest_angle * torch.rand(len(clean), 1, 1, 1, device=clean.device)
        return angles.cos() * clean + angles.sin() * torch.randn_like(clean)
