"""Which part of what a network returns are its logits, and whether it has a classification head at all."""

import re
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from layercrit.errors import ModelError, near
from layercrit.watchers import ParameterReads

__all__ = ["PROBABILITIES", "Output", "are_probabilities", "logits_of", "missing_head", "reader_of"]

Output = str | int | Callable[[Any], Tensor]
"""Which part of a network's output are the logits: a name, a position, a function, or ``probabilities``."""

PROBABILITIES = "probabilities"
_SUM_MISTAKE = 1e-3  # of softmax outputs in half precision
_NAMES = ("logits", "out", "output")  # of logits in a mapping
_OF_FEATURES = re.compile("feat|pool|embed|hidden|state")  # in the name of what is no logits
_HEADS = {"fc", "head", "heads", "classifier", "last_linear", "linear", "logits", "output"}
_CHOOSE = (
    "Choose with output=: a position, a name or a function that returns the logits (open_model(..., output=1), or "
    "'?output=1' in a reference)"
)


def logits_of(output: object) -> Tensor:
    """Find the logits ``(n_images, n_classes)`` in what a network returned, where it leaves no choice.

    Args:
        output: a tensor; an object with ``.logits``; a mapping with ``logits``, ``out`` or ``output``, or with one
            two-dimensional tensor that is not named like features; a tuple or list with one two-dimensional tensor.

    Raises:
        ModelError: it is none of these, leaves a choice, or has fewer than two classes.
    """
    if isinstance(output, Tensor):
        return _checked(output, output)
    if isinstance(getattr(output, "logits", None), Tensor):
        return _checked(output.logits, output)  # type: ignore[attr-defined]
    if isinstance(output, Mapping):
        flat = [name for name, part in output.items() if isinstance(part, Tensor) and part.dim() == 2]
        lone = flat[0] if len(flat) == 1 and not _OF_FEATURES.search(str(flat[0])) else None
        name = next((name for name in _NAMES if name in output), lone)
        if name is None:
            named = " or ".join(map(repr, _NAMES))
            raise ModelError(f"The network returned {_in_words(output)}; none is named {named}. {_CHOOSE}.")
        return _checked(output[name], output)
    if not isinstance(output, tuple | list):
        raise ModelError(
            f"The network returned {type(output).__name__}; expected logits (n_images, n_classes) as a tensor, in a "
            f"tuple, list or mapping, or as .logits. {_CHOOSE}, or wrap it in a module that returns its logits."
        )
    candidates = [part for part in output if isinstance(part, Tensor) and part.dim() == 2]
    if len(candidates) > 1:
        raise ModelError(
            f"The network returned {_in_words(output)}: several of them could be logits (n_images, n_classes). "
            f"{_CHOOSE}."
        )
    return _checked(candidates[0] if candidates else None, output)


def reader_of(output: Output | None, probabilities: bool = False) -> Callable[[object], Tensor]:
    """Return what takes the logits ``(n_images, n_classes)`` out of what a network returned.

    Args:
        output: a position in a tuple or list; a name in a mapping or of an attribute, where ``logits`` also means a
            tensor as it is; a function; None for `logits_of`.
        probabilities: whether these are probabilities, whose logarithms then stand for logits.

    Raises:
        ModelError: it is none of these. What is returned raises the same where the output has no such part.
    """
    if output is None:
        read: Callable[[Any], Tensor] = logits_of
    elif isinstance(output, bool) or not (isinstance(output, str | int) or callable(output)):
        raise ModelError(f"output must be a position, a name, a function or {PROBABILITIES!r}; got {output!r}.")
    elif callable(output):
        read = lambda returned: _checked(output(returned), returned)  # noqa: E731
    else:
        read = lambda returned: _checked(_part(returned, output), returned)  # noqa: E731
    return (lambda returned: _logarithms(read(returned))) if probabilities else read


def _logarithms(probabilities: Tensor) -> Tensor:
    """Return logits whose softmax is ``probabilities`` ``(n_images, n_classes)``."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def are_probabilities(logits: Tensor) -> bool:
    """Whether all rows of ``(n_images, n_classes)`` are non-negative and sum to 1, as softmax outputs do."""
    return bool((logits >= 0).all() and ((logits.double().sum(dim=1) - 1).abs() < _SUM_MISTAKE).all())


def missing_head(network: nn.Module, images: Tensor, logits: Tensor) -> str | None:
    """Return why a network seems to have no classification head, None if it seems to have one.

    Either the last parameters that it reads are those of a normalisation, one for each output, as at the end of a
    backbone (a ``BatchNorm1d`` may follow a linear classifier); or its head is an ``nn.Identity`` (which may follow
    one, too).

    Args:
        network: in evaluation mode.
        images: normalised images, ``(n_images, channels, height, width)``, run once.
        logits: what are taken for its logits, ``(n_images, n_classes)``.
    """
    n_classes = logits.shape[1]
    owners = {id(p): (name, module) for name, module in network.named_modules() for p in module.parameters(False)}
    reads = ParameterReads(network.parameters(), count(1).__next__)
    with torch.no_grad(), reads:
        network(images)
    read = [owners[parameter] for parameter in reads.first_read if parameter in owners]  # in the order of the pass
    if not read:
        return None
    name, last = read[-1]
    # logits are of both signs, features after an activation are not
    classified = isinstance(last, nn.Linear) and last.out_features == n_classes and bool((logits < 0).any())
    for head, module in network.named_modules():
        if isinstance(module, nn.Identity) and _is_head(head, network) and not classified:
            return f"{head!r} is an nn.Identity"
    before = next((module for _, module in reversed(read) if module is not last), None)
    sizes = {p.numel() for p in last.parameters(recurse=False)}
    if "norm" not in type(last).__name__.lower() or sizes != {n_classes}:
        return None
    if isinstance(last, nn.BatchNorm1d) and isinstance(before, nn.Linear) and before.out_features == n_classes:
        return None
    return (
        f"its last parameters are those of {name!r}, a {type(last).__name__} with one for each of {n_classes} outputs"
    )


def _is_head(name: str, network: nn.Module) -> bool:
    """Whether a module is named as the last layer of a classification head is, such as head.fc or classifier.6."""
    parents, _, last = name.rpartition(".")
    if not all(part in _HEADS or part.isdecimal() for part in name.split(".")) or name.split(".")[0] not in _HEADS:
        return False
    return not last.isdecimal() or last == list(network.get_submodule(parents)._modules)[-1]


def _part(returned: Any, output: str | int) -> object:
    """Return the part of a network's output that the user chose."""
    if isinstance(output, int):
        if isinstance(returned, tuple | list) and -len(returned) <= output < len(returned):
            return returned[output]
        raise ModelError(f"The network returned {_in_words(returned)}; output={output} is no position in that.")
    if isinstance(returned, Tensor) and output == "logits":
        return returned
    if isinstance(returned, Mapping):
        if output in returned:
            return returned[output]
        raise ModelError(
            f"The network returned {_in_words(returned)}; none is named {output!r}. "
            f"{near(output, [str(name) for name in returned])}"
        )
    if hasattr(returned, output):
        return getattr(returned, output)
    raise ModelError(f"The network returned {_in_words(returned)}, which has no part named {output!r}. {_CHOOSE}.")


def _checked(logits: object, returned: object) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ModelError(
            f"The network returned {_in_words(returned)}; expected logits of shape (n_images, n_classes). {_CHOOSE}, "
            "or wrap it in a module that returns its logits."
        )
    if logits.shape[1] < 2:
        raise ModelError("The network returned one number per image; expected logits of at least 2 classes.")
    return logits


def _in_words(returned: object) -> str:
    """Say what a network returned: its type, with names and shapes of its parts."""
    if isinstance(returned, Tensor):
        return f"a tensor {tuple(returned.shape)}"
    if isinstance(returned, Mapping):
        parts = [f"{name!r} {_shape(part)}" for name, part in returned.items()]
    elif isinstance(returned, tuple | list):
        parts = [f"[{position}] {_shape(part)}" for position, part in enumerate(returned)]
    else:
        return type(returned).__name__
    return f"{type(returned).__name__} with {', '.join(parts) or 'nothing'}"


def _shape(part: object) -> str:
    return str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__
