"""Per-image distances between two predictions of one model, and scores of predictions against labels."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from layercrit.cell_columns import CELL_COLUMNS, PER_IMAGE
from layercrit.errors import ProtocolError
from layercrit.registry import Registry, summary_of

__all__ = ["DISTANCES", "Distance", "distance", "get_distance", "label_scores", "measure_distances"]

DistanceFunction = Callable[[Tensor, Tensor], Tensor]

# Softmax in float32 misses a sum of 1 by about 1e-6, in bfloat16 by a few thousandths; logits miss it by far more.
_SUM_TOLERANCE = 1e-2
# float32 rounding may carry a result this far (relative) over the largest possible value.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Distance:
    """A registered distance between two predictions.

    Attributes:
        name: the key in `DISTANCES`; also the name of its column.
        function: takes two tensors of probabilities, float32 ``(n_images, n_classes)``, and returns ``(n_images,)``.
        summary: the first line of the function's docstring.
        upper: the largest possible value; ``inf`` where there is none. The smallest is 0.
    """

    name: str
    function: DistanceFunction
    summary: str
    upper: float


def _check_column(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ProtocolError(
            f"The distance name {name!r} cannot name a column: "
            "expected lower-case letters, digits and '_', starting with a letter. Rename it."
        )
    if name in CELL_COLUMNS or name.endswith(PER_IMAGE):
        raise ProtocolError(
            f"The distance {name!r} has the name of another column of the cells. Register it under another name."
        )


DISTANCES = Registry[Distance](
    "distance", ProtocolError, "layercrit.distances", check=_check_column, summary=lambda distance: distance.summary
)
"""All distances by name, filled by `distance` and by installed plug-ins."""


def distance(name: str, *, upper: float) -> Callable[[DistanceFunction], DistanceFunction]:
    """Return a decorator that registers a function as a distance and leaves the function as it is.

    Args:
        name: lower-case identifier, not yet taken by another function or column.
        upper: the largest value that the distance can take, above 0; ``math.inf`` where there is none.

    Raises:
        ProtocolError: the name is taken or not a lower-case identifier, or ``upper`` is not above 0.

    Examples:
        >>> import layercrit
        >>> @layercrit.distance("largest_change", upper=1.0)
        ... def largest_change(p, q):
        ...     '''Largest change of the probability of any class.'''
        ...     return (p - q).abs().amax(dim=1)
    """
    if not upper > 0:
        raise ProtocolError(
            f"The distance {name!r} has upper={upper}; expected the largest value that it can take, above 0. "
            "Use math.inf where there is none."
        )

    def register(function: DistanceFunction) -> DistanceFunction:
        DISTANCES[name] = Distance(name, function, summary_of(function), upper)
        return function

    return register


def get_distance(name: str) -> Distance:
    """Return the registered distance of that name.

    Raises:
        ProtocolError: no distance has this name; the message suggests the nearest.
    """
    return DISTANCES.find(name)


@distance("cosine", upper=1.0)
def _cosine(p: Tensor, q: Tensor) -> Tensor:
    """1 - cosine of the two predictions, in [0, 1]; its mean is the criticality.

    Gavrikov et al. 2024 (arXiv 2410.14470), section 2; the published column ``pred_cos_sim`` is 1 minus this.

    Notes:
        For unit vectors u and v, 1 - u.v = |u - v|^2 / 2. The right side has no cancellation: equal predictions
        give exactly 0, and a distance of 1e-8 keeps its digits in float32.
    """
    u = p / p.square().sum(dim=1, keepdim=True).sqrt()
    v = q / q.square().sum(dim=1, keepdim=True).sqrt()
    return 0.5 * (u - v).square().sum(dim=1)


@distance("l1", upper=2.0)
def _l1(p: Tensor, q: Tensor) -> Tensor:
    """Sum of absolute differences, in [0, 2]: twice the total variation (published column ``pred_l1_err``)."""
    # Not torch.linalg.vector_norm: its sum over 1000 classes is wrong by 2e-5, that of `sum` by 1e-7.
    return (p - q).abs().sum(dim=1)


@distance("l2", upper=sqrt(2))
def _l2(p: Tensor, q: Tensor) -> Tensor:
    """Euclidean norm of the difference, in [0, sqrt 2] (published column ``pred_l2_err``)."""
    return (p - q).square().sum(dim=1).sqrt()


@distance("js", upper=log(2))
def _js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, in [0, ln 2].

    Lin 1991, "Divergence measures based on the Shannon entropy", equation 4.1 with equal weights; 0 log 0 = 0.

    Notes:
        With m = (p + q) / 2 and t = (p - q) / (p + q), the divergence is the sum over classes of
        m/2 [(1 + t) ln(1 + t) + (1 - t) ln(1 - t)]. No term is negative, so nothing cancels between classes. Within
        the bracket the leading terms cancel for small t, where ln(1 - t^2) + 2 t artanh(t), its equal, is exact.
    """
    m = 0.5 * (p + q)
    a, b = p / m, q / m  # 1 + t and 1 - t
    t = 0.5 * (a - b)
    far = torch.xlogy(a, a) + torch.xlogy(b, b)
    close = torch.log1p(-t.square()) + 2 * t * torch.atanh(t)
    bracket = torch.where(t.abs() < 0.5, close, far)
    return torch.where(m == 0, 0.0, 0.5 * m * bracket).sum(dim=1)


@distance("top1", upper=1.0)
def _top1(p: Tensor, q: Tensor) -> Tensor:
    """Top-1 disagreement: 1 where the most probable class differs, else 0; of tied classes the first counts."""
    return (p.argmax(dim=1) != q.argmax(dim=1)).to(p.dtype)


def measure_distances(p: Tensor, q: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Measure how far apart two predictions are, image by image.

    Args:
        p: probabilities before the reset, ``(n_images, n_classes)``. Computed in float32.
        q: probabilities after the reset, same shape.
        names: names of registered distances.

    Returns:
        for each name the distances, float32 ``(n_images,)``, on the device of ``p``. An image is NaN in all of them
        where either row is not a distribution: it has NaN or infinity, is negative somewhere, or its sum is not 1
        (logits, for instance), and in one that is below 0 or above its ``upper`` there. This is a value and not an
        error, to avoid waiting for a GPU.

    Raises:
        ProtocolError: the shapes do not fit, a name is unknown, or a distance returned another shape.
    """
    chosen = [get_distance(name) for name in names]
    if p.ndim != 2 or p.shape != q.shape or not (p.is_floating_point() and q.is_floating_point()):
        raise ProtocolError(
            f"The predictions have the shapes {tuple(p.shape)} and {tuple(q.shape)} and the types {p.dtype} and "
            f"{q.dtype}: expected two tensors of probabilities (n_images, n_classes) of one shape. "
            "Take the softmax of the logits of the same images."
        )
    p, q = p.float(), q.float()
    usable = _is_distribution(p) & _is_distribution(q)  # (n_images,)
    distances = {}
    for one in chosen:
        values = one.function(p, q)
        if values.shape != p.shape[:1]:
            raise ProtocolError(
                f"The distance {one.name!r} returned the shape {tuple(values.shape)}: expected one value per image, "
                f"{tuple(p.shape[:1])}. Reduce over the classes (dim=1) only."
            )
        in_range = (values >= 0) & (values <= one.upper * (1 + _ROUNDING))
        values = torch.where(values > one.upper, one.upper, values.float())
        distances[one.name] = torch.where(usable & in_range, values, torch.nan)
    return distances


def _is_distribution(p: Tensor) -> Tensor:
    """Say for each row of ``(n_images, n_classes)`` whether it is a distribution; NaN compares as false."""
    return (p >= 0).all(dim=1) & ((p.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE)


def label_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Score logits against the labels, image by image.

    Args:
        logits: before the softmax, ``(n_images, n_classes)``. Computed in float32.
        labels: class indices, whole numbers, ``(n_images,)``, on any device.

    Returns:
        float32 tensors ``(n_images,)``: ``loss``, the cross-entropy in nats, and ``top1`` and ``top5``, 1 where the
        label is the largest logit or among the five largest, else 0; of tied classes the first comes first, and with
        five classes or fewer top5 is always 1. An image is NaN in all three where a logit is NaN or infinite, or
        where the label is no class.

    Raises:
        ProtocolError: the shapes or types do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ProtocolError(
            f"The logits have the shape {tuple(logits.shape)} and the labels {tuple(labels.shape)} of {labels.dtype}: "
            "expected (n_images, n_classes) and one whole number per image, (n_images,)."
        )
    n_classes = logits.shape[1]
    logits, labels = logits.float(), labels.to(logits.device, torch.int64)
    usable = logits.isfinite().all(dim=1) & (labels >= 0) & (labels < n_classes)
    labels = torch.where(usable, labels, 0)
    own = logits.gather(1, labels[:, None])  # (n_images, 1)
    earlier = torch.arange(n_classes, device=logits.device) < labels[:, None]  # (n_images, n_classes)
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    scores = {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "top1": (rank < 1).float(),
        "top5": (rank < 5).float(),
    }
    return {name: torch.where(usable, values, torch.nan) for name, values in scores.items()}
