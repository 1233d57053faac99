"""Whether a prediction depends on its image alone: the network is asked again, and in another batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from layercrit.engine.replay import PlainReplay
from layercrit.errors import ModelError
from layercrit.restoring import calls_answered

__all__ = ["check_dependence"]

_AGAIN = 3  # times: small random numbers may leave what is compared as it is
_SEARCHES = 10  # after which a module that draws random numbers has once drawn others
_COMPARED = 2  # images whose predictions are compared; as many are beside them
# Error of logits, relative to the largest. Batches of one shape run through the same kernels, which round alike. For
# another size others are chosen, some of which multiply in TF32 or bfloat16.
_ROUNDING, _OTHER_KERNELS = 1e-3, 0.05

_CHANCE = (
    "It draws random numbers in evaluation mode, or keeps something from one call to the next. Call dropout with "
    "training=self.training, and let forward depend on its input alone."
)
_STATISTICS = (
    "It has no running statistics (track_running_stats=False), so it normalises with those of the batch. Give it "
    "running statistics of training images, or wrap the network in a module that runs images one at a time."
)
_MIXED = (
    "It computes something over all images of a batch. Let it treat each image by itself, or wrap the network in a "
    "module that runs images one at a time."
)


def check_dependence(plain: PlainReplay, images: Tensor, model: str) -> None:
    """Make sure that a network predicts the same for an image whenever it is asked and whatever is beside it.

    Otherwise what a reset does could not be told from chance, or would depend on the batch size. Of single
    images, 22 forward passes are run.

    Args:
        plain: runs the network as it is.
        images: normalised images, ``(n_images, channels, height, width)``, of which the first four are used; fewer are
            filled up with fainter ones and negatives of them.
        model: the model's reference, for errors.

    Raises:
        ModelError: predictions change; it names the module in which they do.
    """
    batch = torch.cat([images * factor for factor in (1, -0.5, 0.25, -0.125)])[: 2 * _COMPARED]
    asked = batch[:_COMPARED]
    first = plain.logits(batch)[:_COMPARED]
    for other, tolerance, how in (
        *[(batch, _ROUNDING, "when it is asked again")] * _AGAIN,
        (torch.cat([asked, asked]), _ROUNDING, "beside other images"),
        (asked, _OTHER_KERNELS, "in a batch of another size"),
    ):
        moved = _distance(first, plain.logits(other)[:_COMPARED])
        if moved > tolerance:
            name, module = _where(plain, batch, other)
            no_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
            reason = _CHANCE if other is batch else _STATISTICS if no_statistics else _MIXED
            raise ModelError(
                f"{model!r} predicts differently for the same image {how}: its logits move by {100 * moved:.2g} % of "
                f"the largest. This begins in {name}. {reason}"
            )


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value; values that are not finite count as 0."""
    one, other = one.double().nan_to_num(0.0, 0.0, 0.0), other.double().nan_to_num(0.0, 0.0, 0.0)
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))


def _where(plain: PlainReplay, batch: Tensor, other: Tensor) -> tuple[str, nn.Module]:
    """Return the name of the first module that gets the same for the compared images and returns something else."""
    names = {module: f"{name!r} ({type(module).__name__})" for name, module in plain.network.named_modules()}
    for _ in range(_SEARCHES):
        calls = zip(_calls(plain, batch), _calls(plain, other), strict=False)
        for (module, given, made), (called, given_then, made_then) in calls:
            if module is not called:
                break  # it does not even call the same modules
            if _alike(given, given_then) and not _alike(made, made_then):
                return names[module], module
    return f"the forward of {type(plain.network).__name__} itself", plain.network


def _calls(plain: PlainReplay, images: Tensor) -> list[tuple[nn.Module, list[Tensor], list[Tensor]]]:
    """Return every call of a module in the order in which they end: the module, what it was given and returned."""
    calls = []

    def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _compared((args, kwargs))
        output = forward(*args, **kwargs)
        calls.append((module, given, _compared(output)))
        return output

    with calls_answered(plain.network, call):
        plain.logits(images)
    return calls


def _compared(tree: Any) -> list[Tensor]:
    """Copy what belongs to the compared images of the tensors in a tree; a batch is their first dimension."""
    return [leaf[:_COMPARED].clone() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    pairs = list(zip(some, others, strict=False))
    return all(one.shape == other.shape and _distance(one, other) <= _ROUNDING for one, other in pairs)
