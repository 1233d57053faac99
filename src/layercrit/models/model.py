"""A trained network with what is needed to show it images."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from layercrit.errors import ModelError
from layercrit.models.checkpoints import hash_tensors
from layercrit.probes.images import Preprocessing

__all__ = ["Classifier", "Model", "logits_of", "structure"]


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
        notes: sentences for the user about how it was opened, shown with the result.
    """

    reference: str
    architecture: str
    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: Preprocessing
    build: Callable[[], nn.Module] | None
    initialiser: str
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the network's parameters and buffers as they stand when this is first asked for."""
        return hash_tensors(self.network.state_dict())

    @cached_property
    def classifier(self) -> "Classifier":
        """The network from uint8 images to logits; it shares the parameters of ``network``."""
        return Classifier(self.network, self.mean, self.std).eval()

    @property
    def black_image(self) -> Tensor:
        """A black image of the size that the network takes, uint8 ``(1, channels, height, width)``."""
        size = self.preprocessing
        return torch.zeros(1, size.channels, size.height, size.width, dtype=torch.uint8)

    @cached_property
    def n_classes(self) -> int:
        """Number of classes, found by running one black image.

        Raises:
            ModelError: the network's output contains no logits.
        """
        with torch.inference_mode():
            return int(self.classifier(self.black_image.to(self.classifier.mean.device)).shape[1])


class Classifier(nn.Module):
    """A network from images to logits, normalisation included.

    Its parameters are the network's, named ``network.<name>``; mean and standard deviation are not saved.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        device = next((t.device for t in chain(network.parameters(), network.buffers())), torch.device("cpu"))
        for name, values in (("mean", mean), ("std", std)):
            shaped = torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)  # (1, channels, 1, 1)
            self.register_buffer(name, shaped, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(n_images, n_classes)`` of uint8 images ``(n_images, channels, height, width)``."""
        return logits_of(self.network(self.normalise(images)))

    def normalise(self, images: Tensor) -> Tensor:
        """Return what the network is given for uint8 images ``(n_images, channels, height, width)``, float32.

        The normalised pixels are bit for bit those of torchvision's ``ToTensor`` followed by ``Normalize``.
        """
        pixels = images.to(torch.float32).div(255)
        return pixels.sub(self.mean).div(self.std)


def logits_of(output: object) -> Tensor:
    """Find the logits ``(n_images, n_classes)`` in what a network returned.

    Args:
        output: a tensor; an object with ``.logits``; a mapping, of which ``"logits"`` or else the first
            two-dimensional tensor is taken; a tuple or list, of which the first two-dimensional tensor is taken.

    Raises:
        ModelError: it is none of these, or has fewer than two classes.
    """
    candidates: Iterable[object]
    if isinstance(output, Tensor):
        candidates = [output]
    elif hasattr(output, "logits"):
        candidates = [output.logits]
    elif isinstance(output, Mapping):
        candidates = [output["logits"]] if "logits" in output else output.values()
    elif isinstance(output, tuple | list):
        candidates = output
    else:
        raise ModelError(
            f"The network returned {type(output).__name__}; expected logits (n_images, n_classes) as a tensor, in a "
            "tuple, list or mapping, or as .logits. Wrap it in a module that returns its logits."
        )
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.dim() == 2:
            if candidate.shape[1] < 2:
                raise ModelError("The network returned one number per image; expected logits of at least 2 classes.")
            return candidate
    shapes = [tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__ for c in candidates]
    raise ModelError(
        f"The network returned {type(output).__name__} with {shapes}; expected logits of shape (n_images, n_classes). "
        "Wrap it in a module that returns its logits."
    )


def structure(network: nn.Module) -> str:
    """Eight hexadecimal digits that tell architectures apart: a hash of all names and shapes."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in sorted(network.state_dict().items())]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
