"""Training recipes: long schedules, other optimisers, mixed images and smoothed labels, all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.training.methods import Inputs, Learner, Method, Views, method, setting

__all__ = ["A1", "A2", "A3", "C1", "B1k", "D", "Mixing", "Recipe", "TorchVision2", "binary_cross_entropy"]

PRESENT = 0.2
"""Binary cross-entropy counts a class as present above this share of a mixed image; timm's value for A1 to A3."""


@dataclass(frozen=True)
class Recipe(Method):
    """Settings that the recipes below share, each with its own values.

    Learning rates are the published ones where known, for the published batch sizes; scale them down with the batch
    size. No recipe uses stochastic depth, which would change the architecture.
    """

    label_smoothing: float = setting(0.0, "probability that is spread over all classes", low=0, high=1)
    mixup: float = setting(0.0, "alpha of mixup; 0: none", low=0)
    cutmix: float = setting(0.0, "alpha of CutMix; 0: none", low=0)
    loss: str = setting(
        "cross_entropy",
        "loss on mixed labels; bce: binary cross-entropy for each class",
        choices=("cross_entropy", "bce"),
    )
    policy: str = setting(
        "none", "augmentation: none, RandAugment or TrivialAugment", choices=("none", "rand", "trivial")
    )
    magnitude: int = setting(7, "mean strength of RandAugment", low=0, high=10)
    random_erasing: float = setting(0.0, "probability that a rectangle of an image is erased", low=0, high=1)

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the policy: torchvision's TrivialAugment or timm's RandAugment."""
        from timm.data.auto_augment import rand_augment_transform
        from torchvision import transforms

        if self.policy == "none":
            return []
        if self.policy == "trivial":
            return [transforms.TrivialAugmentWide()]
        colour = _mean_colour(inputs)
        changes = {
            "img_mean": tuple(colour) if len(colour) > 1 else colour[0],
            "translate_const": int(0.45 * min(inputs.height, inputs.width)),
            # At strength 10 posterising would keep 0 bits, which Pillow refuses.
            "magnitude_max": 9.99,
        }
        return [rand_augment_transform(f"rand-m{self.magnitude}-mstd0.5-inc1", changes)]

    def views(self, inputs: Inputs) -> Views:
        """Return a function that makes one view of an image; erased rectangles get the mean colour."""
        from torchvision import transforms

        whole = super().views(inputs)
        if not self.random_erasing:
            return whole
        erase = transforms.RandomErasing(self.random_erasing, value=_mean_colour(inputs))
        return lambda image: [erase(view) for view in whole(image)]

    def learner(self, network: nn.Module, inputs: Inputs) -> "Mixing":
        """Return the learner that mixes images and their labels."""
        return Mixing(network, inputs, self)


def _mean_colour(inputs: Inputs) -> list[int]:
    """Return the mean colour of the training images as a pixel, which is 0 after normalisation."""
    return [round(255 * mean) for mean in inputs.mean]


class Mixing(Learner):
    """Supervised learning on images mixed within a batch, with mixed labels.

    Each batch is mixed by mixup (Zhang et al. 2018, arXiv 1710.09412, eq. 1) or by CutMix (Yun et al. 2019,
    arXiv 1905.04899, eq. 1), chosen at random with equal probability if a recipe has both.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, recipe: Recipe) -> None:
        super().__init__(network, inputs)
        self.recipe = recipe
        self.n_classes = inputs.n_classes
        self.mix = _mixer(recipe.mixup, recipe.cutmix, inputs.n_classes)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images of the same shape and their mixed labels ``(n_images, n_classes)``."""
        if self.mix is None:
            return images, F.one_hot(labels, self.n_classes).to(images.dtype)
        return self.mix(images, labels)  # type: ignore[no-any-return]

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of the first view's images, mixed."""
        images, shares = self.mixed(views[0], labels)
        loss = binary_cross_entropy if self.recipe.loss == "bce" else F.cross_entropy
        return loss(self.logits(images), shares, label_smoothing=self.recipe.label_smoothing)


def _mixer(mixup: float, cutmix: float, n_classes: int) -> Callable[[Tensor, Tensor], Any] | None:
    """Return a function that mixes a batch, or None."""
    from torchvision.transforms import v2

    ways: list[Any] = []
    if mixup:
        ways.append(v2.MixUp(alpha=mixup, num_classes=n_classes))
    if cutmix:
        ways.append(v2.CutMix(alpha=cutmix, num_classes=n_classes))
    return v2.RandomChoice(ways) if ways else None


def binary_cross_entropy(logits: Tensor, shares: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean binary cross-entropy over images and classes; both classes of a mixed image count as present.

    Args:
        logits: ``(n_images, n_classes)``.
        shares: share of each class in each image ``(n_images, n_classes)``; more than `PRESENT` counts as present.
        label_smoothing: moves the targets 1 and 0 to ``1 - s + s / n_classes`` and ``s / n_classes``.

    Note:
        Wightman et al. 2021, section 3: the target is 1, or 1 minus the smoothing, for every class that is mixed in.
    """
    present = (shares > PRESENT).to(logits.dtype)
    targets = present * (1 - label_smoothing) + label_smoothing / shares.shape[1]
    return F.binary_cross_entropy_with_logits(logits, targets)


def default(name: str, value: Any) -> Any:
    """Declare the setting ``name`` of `Recipe` again, with another default."""
    return field(default=value, metadata=Recipe.__dataclass_fields__[name].metadata)


@method(
    "a1",
    category="training_recipes",
    changes="LAMB, binary cross-entropy, mixup, CutMix, RandAugment, smoothing, repeated augmentation, 600 epochs",
    paper="Wightman et al. 2021, arXiv 2110.00476",
)
@dataclass(frozen=True)
class A1(Recipe):
    """timm's A1, the longest (table 2)."""

    epochs: int = default("epochs", 600)
    batch_size: int = default("batch_size", 2048)
    optimizer: str = default("optimizer", "lamb")
    lr: float = default("lr", 5e-3)
    weight_decay: float = default("weight_decay", 0.01)
    warmup_epochs: float = default("warmup_epochs", 5.0)
    repeats: int = default("repeats", 3)
    label_smoothing: float = default("label_smoothing", 0.1)
    mixup: float = default("mixup", 0.2)
    cutmix: float = default("cutmix", 1.0)
    loss: str = default("loss", "bce")
    policy: str = default("policy", "rand")


@method(
    "a2",
    category="training_recipes",
    changes="as a1 with 300 epochs, less mixup, more weight decay, no label smoothing",
    paper="Wightman et al. 2021, arXiv 2110.00476",
)
@dataclass(frozen=True)
class A2(A1):
    """timm's A2 (table 2)."""

    epochs: int = default("epochs", 300)
    weight_decay: float = default("weight_decay", 0.02)
    label_smoothing: float = default("label_smoothing", 0.0)
    mixup: float = default("mixup", 0.1)


@method(
    "a3",
    category="training_recipes",
    changes="as a2 with 100 epochs, a higher learning rate, weaker RandAugment, no repeated augmentation",
    paper="Wightman et al. 2021, arXiv 2110.00476",
)
@dataclass(frozen=True)
class A3(A2):
    """timm's A3 (table 2), but trained at full resolution."""

    epochs: int = default("epochs", 100)
    lr: float = default("lr", 8e-3)
    repeats: int = default("repeats", 1)
    magnitude: int = default("magnitude", 6)


@method(
    "b1k",
    category="training_recipes",
    changes="RMSProp, RandAugment, random erasing, mixup, label smoothing, EMA of weights",
    paper="Wightman et al. 2021, arXiv 2110.00476, recipe B (timm's RA2)",
)
@dataclass(frozen=True)
class B1k(Recipe):
    """After timm's B1k, an EfficientNet recipe: RMSProp as in TensorFlow, RandAugment, EMA of weights.

    Simplified: a cosine instead of a step schedule, erased rectangles of the mean colour instead of noise, timm's
    default epsilon of RMSProp and hence a low learning rate. The optimiser and the kind of recipe are those of timm's
    model card; the other values are our choice, modelled on timm's RandAugment examples.
    """

    epochs: int = default("epochs", 450)
    optimizer: str = default("optimizer", "rmsproptf")
    lr: float = default("lr", 1e-3)
    weight_decay: float = default("weight_decay", 1e-5)
    warmup_epochs: float = default("warmup_epochs", 3.0)
    ema_decay: float = default("ema_decay", 0.9999)
    label_smoothing: float = default("label_smoothing", 0.1)
    mixup: float = default("mixup", 0.2)
    policy: str = default("policy", "rand")
    magnitude: int = default("magnitude", 9)
    random_erasing: float = default("random_erasing", 0.3)


@method(
    "c1",
    category="training_recipes",
    changes="SGD with gradient clipping, RandAugment, mixup, CutMix, random erasing, label smoothing",
    paper="Wightman et al. 2021, arXiv 2110.00476, recipe C",
)
@dataclass(frozen=True)
class C1(Recipe):
    """After timm's C1: SGD with Nesterov momentum, gradient clipping, cosine schedule with warmup.

    Simplified: gradients are clipped by their global norm, where the original uses adaptive gradient clipping.
    Optimiser, clipping and schedule are those of timm's model cards; the other values are our choice.
    """

    epochs: int = default("epochs", 300)
    batch_size: int = default("batch_size", 1024)
    lr: float = default("lr", 0.4)
    weight_decay: float = default("weight_decay", 5e-5)
    warmup_epochs: float = default("warmup_epochs", 5.0)
    clip_norm: float = default("clip_norm", 1.0)
    label_smoothing: float = default("label_smoothing", 0.1)
    mixup: float = default("mixup", 0.2)
    cutmix: float = default("cutmix", 1.0)
    policy: str = default("policy", "rand")
    random_erasing: float = default("random_erasing", 0.25)


@method(
    "d",
    category="training_recipes",
    changes="AdamW, binary cross-entropy, RandAugment, mixup, CutMix, random erasing",
    paper="Wightman et al. 2021, arXiv 2110.00476, recipe D",
)
@dataclass(frozen=True)
class D(Recipe):
    """After timm's D: AdamW with binary cross-entropy.

    Optimiser and loss are the recipe's; the other values are our choice, modelled on a2 and DeiT.
    """

    epochs: int = default("epochs", 300)
    batch_size: int = default("batch_size", 1024)
    optimizer: str = default("optimizer", "adamw")
    lr: float = default("lr", 1e-3)
    weight_decay: float = default("weight_decay", 0.05)
    warmup_epochs: float = default("warmup_epochs", 5.0)
    mixup: float = default("mixup", 0.1)
    cutmix: float = default("cutmix", 1.0)
    loss: str = default("loss", "bce")
    policy: str = default("policy", "rand")
    random_erasing: float = default("random_erasing", 0.25)


@method(
    "tv2",
    category="training_recipes",
    changes="TrivialAugment, mixup, CutMix, random erasing, label smoothing, repeated augmentation, EMA, 600 epochs",
    paper="Vryniotis 2021, pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives",
)
@dataclass(frozen=True)
class TorchVision2(Recipe):
    """torchvision's newer recipe for ResNet-50 (the command in its classification references).

    Simplified: training at full resolution, where the original trains on smaller images; the EMA of weights is updated
    in each step, and 32 of these updates amount to the one that torchvision makes every 32 steps.
    """

    epochs: int = default("epochs", 600)
    batch_size: int = default("batch_size", 1024)
    optimizer: str = default("optimizer", "momentum")
    lr: float = default("lr", 0.5)
    weight_decay: float = default("weight_decay", 2e-5)
    warmup_epochs: float = default("warmup_epochs", 5.0)
    ema_decay: float = default("ema_decay", 0.99997)
    repeats: int = default("repeats", 4)
    label_smoothing: float = default("label_smoothing", 0.1)
    mixup: float = default("mixup", 0.2)
    cutmix: float = default("cutmix", 1.0)
    policy: str = default("policy", "trivial")
    random_erasing: float = default("random_erasing", 0.1)
