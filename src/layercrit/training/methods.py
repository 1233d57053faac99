"""Training methods: settings, how an image becomes views and a batch becomes a loss; and their registry."""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.categories import CATEGORIES
from layercrit.errors import TrainingError, near
from layercrit.models.outputs import logits_of
from layercrit.registry import Registry

__all__ = [
    "CATEGORIES",
    "METHODS",
    "Inputs",
    "Learner",
    "Method",
    "Optimisation",
    "Phase",
    "Supervised",
    "Views",
    "get_method",
    "method",
    "setting",
]


@dataclass(frozen=True)
class Inputs:
    """Inputs and classes of a network in training.

    Attributes:
        channels: 1 or 3.
        height: of the network's input, in pixels.
        width: of the network's input, in pixels.
        n_classes: number of classes.
        mean: of the training images, per channel, for pixels in [0, 1].
        std: standard deviation of the training images, per channel, for pixels in [0, 1].
        same_size: whether all images already have the size of the network's input.
    """

    channels: int
    height: int
    width: int
    n_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    same_size: bool


Views = Callable[[Image.Image], Sequence[Tensor]]
"""Makes one or more views of an image, uint8 ``(channels, height, width)``, with torch's global generator."""


class Learner(nn.Module):
    """A network, and how a batch of views becomes a loss.

    Attributes:
        network: the classifier that is trained; subclasses add other modules, such as a teacher or a projection head.
    """

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(inputs.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(inputs.std).view(-1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Return normalised images for ``images (n_images, channels, height, width)`` in [0, 1]."""
        return (images - self.mean) / self.std  # type: ignore[operator]

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's logits ``(n_images, n_classes)`` for images in [0, 1]."""
        return logits_of(self.network(self.normalise(images)))

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            views: the batch once per view, ``(n_images, channels, height, width)``, float32 in [0, 1].
            labels: classes ``(n_images,)``; self-supervised methods ignore them.
            progress: finished share of the phase, in [0, 1).
        """
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step, for example to update a teacher."""


class Supervised(Learner):
    """Supervised learning on one view of each image."""

    def __init__(
        self, network: nn.Module, inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    ) -> None:
        super().__init__(network, inputs)
        self.loss = loss

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of the first view's logits."""
        return self.loss(self.logits(views[0]), labels)


@dataclass(frozen=True)
class Optimisation:
    """Optimiser and learning rate schedule.

    Attributes:
        optimizer: name of an optimizer in timm (`timm.optim.list_optimizers`).
        lr: peak learning rate, at the batch size in use.
        momentum: of optimizers that have one.
        weight_decay: not applied to biases and normalisation.
        schedule: ``cosine`` (to 0) or ``step`` (divided by 10 after each third of the epochs).
        warmup_epochs: number of epochs over which the learning rate rises linearly from 0.
        clip_norm: maximum global norm of the gradients; 0: no clipping.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    clip_norm: float = 0.0


@dataclass(frozen=True)
class Phase:
    """A part of a training run with views, loss and schedule of its own.

    Attributes:
        name: such as ``training``, or ``pretraining`` and ``linear head``.
        epochs: passes over the training images.
        views: returns `Views` for the given inputs.
        learner: returns the learner for a network, which is trained in place.
        optimisation: optimiser and learning rate schedule.
        labelled: whether the classifier is trained in this phase, so that its accuracy is meaningful.
    """

    name: str
    epochs: int
    views: Callable[[Inputs], Views]
    learner: Callable[[nn.Module, Inputs], Learner]
    optimisation: Optimisation
    labelled: bool = True


def setting(
    default: Any, text: str, *, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()
) -> Any:
    """Declare a setting of a method: a dataclass field with a meaning and a range.

    Args:
        default: the default, of the annotated type.
        text: its meaning, with its unit.
        low: minimum.
        high: maximum.
        choices: the allowed values.
    """
    return field(default=default, metadata={"text": text, "low": low, "high": high, "choices": tuple(choices)})


@dataclass(frozen=True)
class Method:
    """A training method: each is a subclass that changes what its paper changes.

    The fields are its settings. Subclasses are registered by `method`, which sets the class variables.

    Attributes:
        name: unique name.
        category: one of `CATEGORIES`.
        changes: what differs from the baseline, in a few words.
        paper: authors, year and identifier of its source.
    """

    name: ClassVar[str]
    category: ClassVar[str]
    changes: ClassVar[str]
    paper: ClassVar[str]

    epochs: int = setting(90, "passes over the training images", low=1)
    batch_size: int = setting(256, "images per step, over all processes", low=1)
    optimizer: str = setting("sgd", "name of an optimizer in timm")
    lr: float = setting(0.1, "peak learning rate, at this batch size", low=0)
    momentum: float = setting(0.9, "momentum of optimizers that have one", low=0, high=1)
    weight_decay: float = setting(1e-4, "weight decay, not applied to biases and normalisation", low=0)
    schedule: str = setting("cosine", "learning rate schedule", choices=("cosine", "step"))
    warmup_epochs: float = setting(0.0, "epochs over which the learning rate rises from 0", low=0)
    clip_norm: float = setting(0.0, "maximum global norm of the gradients; 0: no clipping", low=0)
    ema_decay: float = setting(
        0.0, "decay of an EMA of the weights, which is saved instead of them; 0: none", low=0, high=1
    )
    repeats: int = setting(1, "repeated augmentation: views of each image in a batch", low=1)
    crop: str = setting(
        "auto",
        "shift: random crop after padding by an eighth; resized: random resized crop; auto: shift for images up to 64 "
        "pixels that all have the size of the network's input",
        choices=("auto", "shift", "resized"),
    )
    min_scale: float = setting(0.08, "minimum area of a resized crop, as a share of the image", low=0, high=1)
    flip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of a run, in order; supervised methods have one."""
        return (Phase("training", self.epochs, self.views, self.learner, self.optimisation()),)

    def optimisation(self) -> Optimisation:
        """Return the settings of optimiser and schedule."""
        return Optimisation(**{one.name: getattr(self, one.name) for one in dataclasses.fields(Optimisation)})

    def views(self, inputs: Inputs) -> Views:
        """Return a function that makes one view of an image: cropped, flipped and augmented."""
        from torchvision import transforms

        whole = transforms.Compose([*self.crops(inputs), *self.augmentations(inputs), transforms.PILToTensor()])
        return lambda image: (whole(image),)

    def crops(self, inputs: Inputs) -> list[Any]:
        """Return the transforms for a random crop of the network's input size and a random flip."""
        from torchvision import transforms

        size = (inputs.height, inputs.width)
        shift = self.crop == "shift" or (self.crop == "auto" and inputs.same_size and max(size) <= 64)
        if shift:
            cut: Any = transforms.RandomCrop(size, padding=max(size) // 8)
        else:
            cut = transforms.RandomResizedCrop(size, scale=(self.min_scale, 1.0))
        return [cut, transforms.RandomHorizontalFlip(self.flip)] if self.flip else [cut]

    def augmentations(self, inputs: Inputs) -> list[Any]:
        """Return the transforms that a method applies to the cropped image; none by default."""
        return []

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return the learner for a network."""
        return Supervised(network, inputs)

    def changed(self) -> dict[str, Any]:
        """Return all settings as plain values, in the order of declaration."""
        return dataclasses.asdict(self)


METHODS = Registry[type[Method]]("training method", TrainingError, "layercrit.methods", summary=lambda cls: cls.changes)
"""All training methods by name, filled by `method` and by installed plug-ins."""


def method(name: str, *, category: str, changes: str, paper: str) -> Callable[[type[Method]], type[Method]]:
    """Register a training method.

    Args:
        name: unique name, such as ``augmix``.
        category: one of `CATEGORIES`.
        changes: what differs from the baseline, in a few words.
        paper: authors, year and identifier of its source.

    Raises:
        TrainingError: the name is taken by another class, or cannot be one.

    Examples:
        >>> import layercrit
        >>> from dataclasses import dataclass
        >>> from layercrit.training import Method, setting
        >>> @layercrit.method("baseline_long", category="training_recipes", changes="300 epochs", paper="none")
        ... @dataclass(frozen=True)
        ... class Long(Method):
        ...     epochs: int = setting(300, "passes over the training images", low=1)
    """

    def register(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        cls.name, cls.category, cls.changes, cls.paper = name, category, changes, paper
        return cls

    return register


def get_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Return a method, with some of its settings changed.

    Args:
        name: of a registered method.
        settings: values by name; strings, as from the command line, are converted to the type of the setting.

    Raises:
        TrainingError: the method or a setting is unknown, or a value has the wrong type or is out of range.
    """
    cls = METHODS.find(name)
    types = typing.get_type_hints(cls)
    declared = {one.name: one for one in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, given in (settings or {}).items():
        if key not in declared:
            raise TrainingError(f"The method {name} has no setting {key!r}. {near(key, declared)}")
        values[key] = _checked(f"{name}: {key}", given, types[key], declared[key].metadata)
    return cls(**values)


def _checked(where: str, given: Any, kind: type, limits: Mapping[str, Any]) -> Any:
    """Return a setting's value as its type, within its range."""
    value = _as_type(given, kind)
    low, high, choices = limits["low"], limits["high"], limits["choices"]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if low is not None or high is not None:
        words += f" from {low}" * (low is not None) + f" to {high}" * (high is not None)
    if choices:
        words = f"one of {', '.join(choices)}"
    wrong = value is None or (choices and value not in choices)
    if not wrong and kind in (int, float):
        wrong = not ((low is None or value >= low) and (high is None or value <= high) and abs(value) < float("inf"))
    if wrong:
        hint = f" {near(value, choices)}" if choices and isinstance(value, str) else ""
        raise TrainingError(f"{where} must be {words}; got {given!r}.{hint}")
    return value


def _as_type(given: Any, kind: type) -> Any:
    """Return the value as ``kind``, or None where it is of another one."""
    if kind is bool:
        return {"true": True, "false": False}.get(str(given).lower())
    if kind is str:
        return given if isinstance(given, str) else None
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        number = float(given)
    except (ValueError, OverflowError):
        return None
    if kind is float:
        return number
    return int(number) if number.is_integer() else None
