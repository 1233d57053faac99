"""What self-supervised methods share: settings, views, features of the network, and the linear head."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layercrit.errors import TrainingError, first_line
from layercrit.training.methods import (
    Inputs,
    Learner,
    Method,
    Optimisation,
    Phase,
    Supervised,
    Views,
    setting,
)

__all__ = [
    "LinearHead",
    "MultiCrop",
    "Pretraining",
    "SelfSupervised",
    "features_of",
    "find_classifier",
    "full_precision",
    "gathering",
    "local_size",
    "need_lightly",
]

SMALL = 64
"""Largest side in pixels of images that are augmented like those of CIFAR: larger crops, no blur."""


@dataclass(frozen=True)
class SelfSupervised(Method):
    """Pretraining on two views of each image without labels, then a linear head on the frozen features.

    Attributes:
        colours: jitter of brightness, contrast, saturation and hue; the last two for colour images only.
        blurred: probability that the first and the second view are blurred.
        solarised: probability that the first and the second view are solarised.
        paper_scale: minimum crop area of a large image, as a share of the image.
        small_scale: minimum crop area of a small image, as a share of the image.
    """

    colours: ClassVar[tuple[float, float, float, float]] = (0.8, 0.8, 0.8, 0.2)
    blurred: ClassVar[tuple[float, float]] = (0.5, 0.5)
    solarised: ClassVar[tuple[float, float]] = (0.0, 0.0)
    paper_scale: ClassVar[float] = 0.08
    small_scale: ClassVar[float] = 0.2

    epochs: int = setting(800, "of pretraining: passes over the training images", low=1)
    batch_size: int = setting(4096, "images per step, over all processes", low=1)
    optimizer: str = setting("lars", "of pretraining: name of an optimizer in timm")
    lr: float = setting(4.8, "of pretraining: peak learning rate, at this batch size", low=0)
    weight_decay: float = setting(1e-6, "of pretraining: weight decay, not applied to biases and normalisation", low=0)
    warmup_epochs: float = setting(10.0, "of pretraining: epochs over which the learning rate rises from 0", low=0)
    min_scale: float = setting(
        0.0,
        "minimum crop area of a view, as a share of the image; 0: the paper's, or more for images up to 64 pixels",
        low=0,
        high=1,
    )
    jitter: float = setting(1.0, "strength of colour jitter, relative to the paper's", low=0, high=2)
    blur: str = setting(
        "auto", "Gaussian blur of views; auto: for images larger than 64 pixels", choices=("auto", "on", "off")
    )
    hidden_dim: int = setting(2048, "width of the projection head's hidden layers", low=1)
    output_dim: int = setting(128, "width of the projection head's output", low=1)
    head_epochs: int = setting(100, "of the linear head: passes over the training images", low=1)
    head_optimizer: str = setting("sgd", "of the linear head: name of an optimizer in timm")
    head_lr: float = setting(1.6, "of the linear head: peak learning rate, at this batch size", low=0)

    def phases(self) -> tuple[Phase, ...]:
        """Return two phases: pretraining without labels, and a linear head trained on plain crops and flips."""
        plain = Method(crop=self.crop, flip=self.flip)
        head = Optimisation(self.head_optimizer, lr=self.head_lr, weight_decay=0.0)
        return (
            Phase("pretraining", self.epochs, self.views, self.learner, self.optimisation(), labelled=False),
            Phase("linear head", self.head_epochs, plain.views, LinearHead, head),
        )

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return the learner for pretraining without labels."""
        raise NotImplementedError

    def views(self, inputs: Inputs) -> Views:
        """Return a function that makes two views of an image, each randomly cropped, flipped and colour-jittered."""
        need_lightly()
        size = (inputs.height, inputs.width)
        scale = (self.smallest_share(inputs), 1.0)
        makers = [
            self.view(inputs, size, scale, blurred, solarised)
            for blurred, solarised in zip(self.blurred, self.solarised, strict=True)
        ]
        return lambda image: [make(image) for make in makers]

    def smallest_share(self, inputs: Inputs) -> float:
        """Return the minimum crop area of a view, as a share of the image."""
        return self.min_scale or (self.small_scale if _is_small(inputs) else self.paper_scale)

    def view(
        self, inputs: Inputs, size: tuple[int, int], scale: tuple[float, float], blurred: float, solarised: float
    ) -> Callable[[Any], Tensor]:
        """Return a function that makes one view of an image, uint8 ``(channels, height, width)``.

        Args:
            inputs: what the network is trained on.
            size: height and width of the view in pixels.
            scale: minimum and maximum crop area, as a share of the image.
            blurred: probability of blur, if images are blurred at all.
            solarised: probability of solarisation.
        """
        from lightly.transforms.gaussian_blur import GaussianBlur
        from lightly.transforms.solarize import RandomSolarization
        from torchvision import transforms

        steps: list[Any] = [transforms.RandomResizedCrop(size, scale=scale), transforms.RandomHorizontalFlip(self.flip)]
        brightness, contrast, saturation, hue = (self.jitter * strength for strength in self.colours)
        if inputs.channels == 3:
            colours = transforms.ColorJitter(brightness, contrast, saturation, min(hue, 0.5))
            steps += [transforms.RandomApply([colours], 0.8), transforms.RandomGrayscale(0.2)]
        else:
            steps.append(transforms.RandomApply([transforms.ColorJitter(brightness, contrast)], 0.8))
        if self.blur == "on" or (self.blur == "auto" and not _is_small(inputs)):
            steps.append(GaussianBlur(prob=blurred, sigmas=(0.1, 2.0)))
        if solarised:
            steps.append(RandomSolarization(prob=solarised))
        whole: Callable[[Any], Tensor] = transforms.Compose([*steps, transforms.PILToTensor()])
        return whole


@dataclass(frozen=True)
class MultiCrop(SelfSupervised):
    """Pretraining on two large views of each image and several small ones (Caron et al. 2020, section 3.2)."""

    paper_scale: ClassVar[float] = 0.14
    small_scale: ClassVar[float] = 0.3

    n_local_views: int = setting(6, "number of small views of each image", low=0)
    local_min_scale: float = setting(
        0.0,
        "minimum crop area of a small view, as a share of the image; 0: 0.05, or 0.1 for images up to 64 pixels",
        low=0,
        high=1,
    )

    def views(self, inputs: Inputs) -> Views:
        """Return a function that makes views of an image: two large ones, then small ones of `local_size`.

        Raises:
            TrainingError: ``local_min_scale`` is larger than ``min_scale``.
        """
        large = super().views(inputs)
        highest = self.smallest_share(inputs)
        lowest = self.local_min_scale or (0.1 if _is_small(inputs) else 0.05)
        if lowest > highest:
            raise TrainingError(
                f"{self.name}: local_min_scale must not be larger than min_scale; got {lowest} and {highest}."
            )
        small = self.view(inputs, local_size(inputs), (lowest, highest), 0.5, 0.0)
        return lambda image: [*large(image), *(small(image) for _ in range(self.n_local_views))]


def local_size(inputs: Inputs) -> tuple[int, int]:
    """Return height and width of small views: 3/7 of the network's input (96 of 224), but at least 16 pixels."""
    height, width = (min(side, max(16, round(side * 3 / 7))) for side in (inputs.height, inputs.width))
    return height, width


def _is_small(inputs: Inputs) -> bool:
    return max(inputs.height, inputs.width) <= SMALL


def need_lightly() -> None:
    """Raise a TrainingError if lightly is missing."""
    try:
        import lightly  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            "Self-supervised methods need lightly, which is not installed. Run `pip install 'layercrit[train]'`."
        ) from error


def find_classifier(network: nn.Module, n_classes: int) -> str:
    """Return the name of the network's classifier layer, whose input is taken as the features.

    It is the layer that timm names as the classifier, else the last linear layer with one output per class.

    Args:
        network: an image classifier.
        n_classes: number of its classes.

    Raises:
        TrainingError: there is no such layer.
    """
    get_classifier = getattr(network, "get_classifier", None)
    named = get_classifier() if callable(get_classifier) else None
    linear: dict[str, nn.Linear] = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    fitting = [name for name, part in linear.items() if part.out_features == n_classes]
    if fitting:
        return next((name for name in fitting if linear[name] is named), fitting[-1])
    found = ", ".join(f"{name} ({part.out_features})" for name, part in linear.items()) or "none"
    raise TrainingError(
        f"{type(network).__name__} has no linear layer with {n_classes} outputs, one per class, so its features cannot "
        f"be found. Linear layers and their outputs: {found}. Self-supervised methods need a network that ends in "
        "torch.nn.Linear."
    )


def features_of(network: nn.Module, classifier: str, images: Tensor) -> Tensor:
    """Return the input of the classifier layer, float32 ``(n_images, n_features)``, for normalised images.

    Raises:
        TrainingError: the classifier layer is not called, or its input has another shape.
    """
    caught: list[Tensor] = []
    hook = network.get_submodule(classifier).register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        network(images)
    finally:
        hook.remove()
    if not caught or caught[-1].dim() != 2:
        given = f"{tuple(caught[-1].shape)}" if caught else "nothing"
        raise TrainingError(
            f"The input of the classifier {classifier!r} of {type(network).__name__} must have the shape "
            f"(n_images, n_features); got {given}. Self-supervised methods need one feature vector per image."
        )
    return caught[-1].float()


class Pretraining(Learner):
    """Learning without labels; the classifier layer is not trained.

    Attributes:
        classifier: name of the classifier layer in ``network``.
        n_features: number of features per image.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Find the classifier and see that the network takes views of its own size and of ``sizes``.

        Raises:
            TrainingError: the network has no classifier, or does not take them.
        """
        need_lightly()
        super().__init__(network, inputs)
        self.classifier = find_classifier(network, inputs.n_classes)
        layer = network.get_submodule(self.classifier)
        layer.requires_grad_(False)
        self.n_features = int(layer.in_features)  # type: ignore[arg-type]
        self._try(((inputs.height, inputs.width), *sizes), inputs.channels)

    def _try(self, sizes: Sequence[tuple[int, int]], channels: int) -> None:
        """Raise a TrainingError unless the network has features of images of all sizes."""
        network, was_training = self.network, self.network.training
        device = next(network.parameters()).device
        network.eval()  # so that BatchNorm's statistics do not notice
        try:
            for height, width in sizes:
                with torch.no_grad():
                    features_of(network, self.classifier, torch.zeros(1, channels, height, width, device=device))
        except TrainingError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            raise TrainingError(
                f"{type(network).__name__} does not take views of {height} x {width} pixels ({first_line(error)}). "
                "Take a network for images of any size, or set n_local_views=0 where the method has it."
            ) from error
        finally:
            network.train(was_training)

    def features(self, network: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(n_images, n_features)`` for each view; neighbours of the same size go through in one batch."""
        found: list[Tensor] = []
        for _, alike in groupby(views, key=lambda view: view.shape):
            together = list(alike)
            output = features_of(network, self.classifier, self.normalise(torch.cat(together)))
            found += output.chunk(len(together))
        return found


@contextmanager
def full_precision(views: Sequence[Tensor]) -> Iterator[None]:
    """Compute inside in float32: exponentials of similarities overflow in half precision."""
    with torch.autocast(views[0].device.type, enabled=False):
        yield


def gathering() -> bool:
    """Return whether losses can gather images from all processes, which they do if there are several."""
    return torch.distributed.is_available()


class LinearHead(Supervised):
    """Training of the classifier layer alone; the rest of the network is frozen and in evaluation mode."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__(network, inputs)
        network.requires_grad_(False)
        network.get_submodule(find_classifier(network, inputs.n_classes)).requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> "LinearHead":
        """Set the mode of everything but the network, which stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self
