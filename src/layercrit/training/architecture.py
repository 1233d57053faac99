"""The initial network of a run: an architecture adapted to the data, with weights drawn under a seed."""

import torch
from torch import nn

from layercrit.errors import ModelError, first_line
from layercrit.models.outputs import logits_of
from layercrit.models.references import open_model
from layercrit.seeds import seed_of
from layercrit.training.methods import Inputs

__all__ = ["fitted_architecture", "initial_network"]


def fitted_architecture(architecture: str, inputs: Inputs) -> str:
    """Return the reference with the options that the data determine: classes, channels, input size, normalisation.

    Args:
        architecture: a model reference; its own options for classes and channels take precedence.
        inputs: inputs and classes of the network.

    Raises:
        ModelError: it is no reference but, say, a network.
    """
    if not isinstance(architecture, str):
        raise ModelError(
            "The network to train is named by a model reference, so that the run can be resumed and its weights opened "
            f"again; got a {type(architecture).__name__}. Of an own network, name the function or class that makes it: "
            "'py:my_nets:MyNet'."
        )
    name, _, query = architecture.partition("?")
    options = dict(part.partition("=")[::2] for part in query.split("&") if part)
    if name.partition(":")[0] == "timm":
        options.setdefault("num_classes", str(inputs.n_classes))
        options.setdefault("in_chans", str(inputs.channels))
    if name.partition(":")[0] == "torchvision":
        options.setdefault("num_classes", str(inputs.n_classes))
    for weights in ("pretrained", "seed"):
        options.pop(weights, None)
    size = (inputs.channels, inputs.height, inputs.width)
    options |= {"mean": inputs.mean, "std": inputs.std, "input_size": size}  # type: ignore[dict-item]
    return f"{name}?" + "&".join(f"{key}={value}".replace(" ", "") for key, value in options.items())


def initial_network(architecture: str, seed: int, inputs: Inputs) -> nn.Module:
    """Return the architecture with random initial weights, after a forward pass at the right image size.

    Raises:
        ModelError: it cannot be opened, does not accept such images, or has another number of classes.
    """
    if architecture.startswith(("file:", "zoo:")):
        raise ModelError(
            f"{architecture!r} refers to trained weights; expected an architecture, such as timm:resnet18."
        )
    fresh = seed_of("training", seed, "initial weights")
    network = open_model(f"{architecture}&pretrained=false&seed={fresh}").network
    image = torch.zeros(2, inputs.channels, inputs.height, inputs.width)
    try:
        with torch.no_grad():
            logits = logits_of(network(image))
    except (RuntimeError, AssertionError, ValueError) as error:  # what networks raise at unsupported sizes
        raise ModelError(
            f"{architecture} does not accept images of {tuple(image.shape[1:])} (channels, height, width): "
            f"{first_line(error)}. Try another --input-size, such as 3 224 224."
        ) from error
    if logits.shape[1] != inputs.n_classes:
        raise ModelError(
            f"{architecture} has {logits.shape[1]} classes, but the data have {inputs.n_classes}. "
            f"Set {inputs.n_classes} classes, for example by an option of the reference."
        )
    return network
