"""Open a trained network by reference, with its normalisation, its image geometry and a way to build it anew.

A model reference is ``kind:name``, with options after a question mark: ``kind:name?option=value&option=value``. The
kinds are those of `layercrit.models.sources.MODEL_SOURCES`.

Options of every kind: ``mean``, ``std``, ``input_size`` and ``output`` (see `open_model`), ``pretrained=false`` for
fresh weights and ``seed`` (default 0), under which those are drawn, so that equal references give equal weights. All
other options are passed on to the library's constructor, as ``num_classes=10`` is. Values are Python literals or plain
words.
"""

import logging
import math
from collections.abc import Collection, Sequence

import torch
from torch import nn

import layercrit.models.file_source
import layercrit.models.hubs
import layercrit.models.zoo.source  # noqa: F401 - these register their kinds of references
from layercrit.errors import ModelError
from layercrit.models.model import Model
from layercrit.models.outputs import Output
from layercrit.models.own_networks import given_model
from layercrit.models.sources import Progress, open_reference, parse, with_input, with_output, written
from layercrit.restoring import undisturbed

__all__ = ["fetch", "is_here", "open_model", "without_weights"]

_LOG = logging.getLogger(__name__)


@undisturbed()
def open_model(
    reference: str | nn.Module | Model,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
    output: Output | None = None,
) -> Model:
    """Open a model, without changing any global random state or a given network.

    A network given as an object is used as it is if in evaluation mode, and copied if in training mode. What it does
    not declare of its input is a default, listed in ``undeclared`` and said beside each result: pixels in [0, 1]
    without normalisation; and 224 x 224 of them, but in `layercrit.measure` the size that all images have, if they
    have one.

    Args:
        reference: a model reference (see the module), a network, or an opened model.
        mean: replaces the mean of each channel, in units of pixels in [0, 1].
        std: replaces the standard deviation of each channel.
        input_size: replaces ``(channels, height, width)``; images are then resized to just cover it. A
            mean or standard deviation that is the same for all channels is kept for the new number of channels.
        output: which part of what the network returns are its logits ``(n_images, n_classes)``: a position in a tuple
            or list, a name in a mapping or of an attribute (``logits``: a tensor as it is), a function that returns
            them, or ``probabilities`` if a softmax is part of the network. Needed where that is not clear.

    Raises:
        ModelError: the reference is unknown, its weights are not available, or the arguments do not fit together.
        CheckpointError: a weight file is unreadable, unsafe, or does not fit.

    Examples:
        >>> import layercrit
        >>> layercrit.open_model("py:layercrit.demo:small_resnet?input_size=(1,28,28)").black_image.shape
        torch.Size([1, 1, 28, 28])
    """
    if isinstance(reference, Model):
        model = reference
    elif isinstance(reference, nn.Module):
        model = given_model(reference)
    elif isinstance(reference, str):
        model = open_reference(reference)
    else:
        raise ModelError(
            f"Expected a model reference such as 'timm:resnet50', or a network; got {type(reference).__name__}."
        )
    model = with_output(with_input(model, mean, std, input_size), output)
    channels = model.preprocessing.channels
    for name, values in (("mean", model.mean), ("std", model.std)):
        if len(values) != channels:
            raise ModelError(
                f"{model.reference}: {name} has {len(values)} values {values}; expected one for each of {channels} "
                f"channels. Give {name}= with {channels}, or input_size= with another number of channels."
            )
    if not all(math.isfinite(m) for m in model.mean) or not all(math.isfinite(s) and s > 0 for s in model.std):
        raise ModelError(
            f"{model.reference}: mean {model.mean} and std {model.std} must be finite, and std above 0; they are in "
            "units of pixels in [0, 1]."
        )
    for name, parameter in model.network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"{model.reference}: {name!r} is {parameter.dtype}; expected torch.float32. Call .float() first."
            )
    n_parameters = sum(parameter.numel() for parameter in model.network.parameters())
    _LOG.info("opened %s: %s with %d parameters", model.reference, type(model.network).__name__, n_parameters)
    return model


def without_weights(reference: str, keep: Collection[str] = ()) -> str:
    """Return a reference to the untrained architecture, equal for models that differ only in their weights.

    Args:
        reference: a model reference.
        keep: which of the options that belong to the weights to keep: ``seed``, ``mean``, ``std``, ``input_size``,
            ``output``.

    Raises:
        LayercritError: the reference is unknown, or a file's architecture is not given.
    """
    source, rest, options = parse(reference)
    name, options = source.architecture(rest, options)
    of_weights = {"seed", "mean", "std", "input_size", "output"} - set(keep)
    options = {option: value for option, value in options.items() if option not in of_weights}
    return f"{name}{written({**options, 'pretrained': False})}"


def is_here(reference: str) -> bool:
    """Whether a model opens without a download; its files may still be incomplete.

    Raises:
        ModelError: the reference is unknown.
    """
    source, rest, options = parse(reference)
    return not options.get("pretrained", True) or source.is_here(rest)


def fetch(reference: str, progress: Progress | None = None) -> None:
    """Download the weights of a model, unless it has none, they are cached, or opening it downloads them.

    Raises:
        LayercritError: the reference is unknown, or its weights cannot be fetched.
    """
    source, rest, options = parse(reference)
    if options.get("pretrained", True):
        source.fetch(rest, progress)
