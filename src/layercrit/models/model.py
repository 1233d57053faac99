"""A trained network with what is needed to show it images."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from layercrit.errors import LayercritError, ModelError, first_line
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.outputs import Output, logits_of, reader_of
from layercrit.probes.images import Preprocessing
from layercrit.restoring import rng_untouched, undisturbed, untouched

__all__ = ["INPUT", "Classifier", "Model", "size_explained", "structure"]

INPUT = ("input_size", "mean", "std")
"""What a model should say about its input, and what a reference's options replace."""


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network with what is needed to show it images and to draw fresh weights.

    Attributes:
        reference: the model reference as given, such as ``"timm:resnet50.a1_in1k"``.
        architecture: the architecture without weights, such as ``"timm:resnet50"``.
        network: the trained network in evaluation mode.
        mean: mean subtracted from each channel, in units of pixels in [0, 1].
        std: divisor of each channel after that, in the same units.
        preprocessing: how an image becomes the pixels the network expects.
        build: makes the network with its own initialiser's values, drawn from PyTorch's global generator; None when
            only a finished network was given.
        initialiser: what ``build`` does, in words.
        output: which part of the network's output are the logits, as `open_model` takes it; None: it leaves no choice.
        probabilities: whether that part are probabilities, whose logarithms then stand for logits.
        undeclared: which of `INPUT` neither the model nor the user has said, so that they are defaults.
        notes: what a reader of results has to know about how it was opened, in words.

    Examples:
        >>> import layercrit
        >>> model = layercrit.open_model("file:layercrit-demo/models/baseline")
        >>> model.architecture, model.n_classes, model.mean
        ('py:layercrit.demo:small_resnet', 10, (0.286,))
    """

    reference: str
    architecture: str
    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: Preprocessing
    build: Callable[[], nn.Module] | None
    initialiser: str
    output: Output | None = None
    probabilities: bool = False
    undeclared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the network's parameters and buffers as they stand when this is first asked for."""
        return hash_tensors(self.network.state_dict())

    @cached_property
    def classifier(self) -> "Classifier":
        """The network from uint8 images to logits; it shares the parameters of ``network``."""
        return Classifier(self.network, self.mean, self.std, self.read_logits).eval()

    @cached_property
    def read_logits(self) -> Callable[[object], Tensor]:
        """What takes the logits ``(n_images, n_classes)`` out of what the network returns."""
        return reader_of(self.output, self.probabilities)

    @property
    def output_in_words(self) -> str:
        """Which part of the network's output are the logits, as text that is equal for equal choices."""
        name = f"{self.output.__module__}.{self.output.__qualname__}" if callable(self.output) else str(self.output)
        return f"{'logits' if self.output is None else name}{', probabilities' if self.probabilities else ''}"

    def undeclared_in_words(self, about_size: str = "") -> str | None:
        """Return which of the model's input settings are defaults, and how to set them; None if all are declared.

        Args:
            about_size: why the image size is what it is, in words.
        """
        if not self.undeclared:
            return None
        size = self.preprocessing
        why = f" ({about_size})" if about_size else ""
        scaled = set(self.mean) == {0.0} and set(self.std) == {1.0}
        values = {
            "input_size": f"{size.height} x {size.width} pixels{why}",
            "mean": "mean 0" if scaled else f"mean {self.mean}",
            "std": "std 1, that is, no normalisation" if scaled else f"std {self.std}",
        }
        shown = ", ".join(values[name] for name in INPUT if name in self.undeclared)
        each = "(" + ",".join(["0.5"] * size.channels) + ("," if size.channels == 1 else "") + ")"
        forms = {"input_size": f"({size.channels},{size.height},{size.width})", "mean": each, "std": each}
        options = [f"{name}={forms[name]}" for name in INPUT if name in self.undeclared]
        return (
            f"the model does not say all of its input; defaults: {shown}. Give what it was trained with, in this form: "
            f"'?{'&'.join(options)}' in the reference, or open_model(..., {', '.join(options)})"
        )

    @property
    def black_image(self) -> Tensor:
        """A black image of the size that the network takes, uint8 ``(1, channels, height, width)``."""
        size = self.preprocessing
        return torch.zeros(1, size.channels, size.height, size.width, dtype=torch.uint8)

    @cached_property
    def n_classes(self) -> int:
        """Number of classes, found by running one black image.

        Raises:
            ModelError: the network's output contains no logits, or it cannot run on an image of this size.
        """
        with size_explained(self), undisturbed(), rng_untouched(), untouched(self.network), torch.no_grad():
            return int(self.classifier(self.black_image.to(self.classifier.mean.device)).shape[1])


@contextmanager
def size_explained(model: Model) -> Iterator[None]:
    """Say what to do where a model cannot run on an image of its size.

    Raises:
        ModelError: for whatever is raised inside.
    """
    try:
        yield
    except LayercritError:
        raise
    except Exception as error:  # a network's own code raises what it likes
        size = model.preprocessing
        raise ModelError(
            f"{model.reference!r} cannot run on one image of {size.channels} channels, {size.height} x "
            f"{size.width} pixels ({first_line(error)}). Give images of the size that the network takes, or set "
            "that size: open_model(..., input_size=(channels, height, width)), or '?input_size=' in a reference."
        ) from error


class Classifier(nn.Module):
    """A network from images to logits, normalisation included.

    Its parameters are the network's, named ``network.<name>``; mean and standard deviation are not saved.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        read_logits: Callable[[object], Tensor] = logits_of,
    ) -> None:
        super().__init__()
        self.network, self._read_logits = network, read_logits
        device = next((t.device for t in chain(network.parameters(), network.buffers())), torch.device("cpu"))
        for name, values in (("mean", mean), ("std", std)):
            shaped = torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)  # (1, channels, 1, 1)
            self.register_buffer(name, shaped, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(n_images, n_classes)`` of uint8 images ``(n_images, channels, height, width)``."""
        return self._read_logits(self.network(self.normalise(images)))

    def normalise(self, images: Tensor) -> Tensor:
        """Return what the network is given for uint8 images ``(n_images, channels, height, width)``, float32.

        The normalised pixels are bit for bit those of torchvision's ``ToTensor`` followed by ``Normalize``.
        """
        pixels = images.to(torch.float32).div(255)
        return pixels.sub(self.mean).div(self.std)


def structure(network: nn.Module) -> str:
    """Eight hexadecimal digits that tell architectures apart: a hash of all names and shapes."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in sorted(network.state_dict().items())]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
