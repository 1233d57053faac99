"""Differences between means, with intervals and p-values that respect trials and images; control of many tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit
from scipy.stats import false_discovery_control

from layercrit.errors import ProtocolError

__all__ = ["Contrasts", "benjamini_hochberg", "contrasts_of_samples", "crossed_contrasts", "holm"]

Array = npt.NDArray[np.float64]

_ROUNDING = 1e-13  # a sum of squares below this share of its parts is rounding


@dataclass(frozen=True)
class Contrasts:
    """Weighted sums of means, such as the difference of two, each with its interval and its test.

    Attributes:
        mean: ``(n_contrasts,)``.
        low: lower confidence limit; NaN where there is no interval.
        high: upper confidence limit; NaN where there is no interval.
        p_value: of the two-sided test that the sum is 0; NaN where nothing can be tested, also where nothing varies.
        covers: what may be drawn anew, so that the intervals still hold.
    """

    mean: Array
    low: Array
    high: Array
    p_value: Array
    covers: Literal["trials and images", "images", "trials", "nothing"]


def crossed_contrasts(
    distances: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    *,
    level: float = 0.95,
    random_trials: bool = True,
    upper: float = 1.0,
) -> Contrasts:
    """Contrast the mean distances of models that were asked about the same images under the same draws.

    What counts is the weighted sum d[r, x] of the models' distances in each trial and image: what a draw or an image
    does to all models alike cancels. It is analysed as one model's distances are in `layercrit.statistics.estimate`,
    as two crossed random effects, with the same rules and the same standard error; Student's t tests it against 0.

    Args:
        distances: ``(n_models, n_trials, n_images)``; trial r is the same draw and image x the same image in all. One
            image column holds means over images: the interval is then for new trials on the same images.
        weights: ``(n_contrasts, n_models)``; 1 and -1 for the difference of two models.
        level: confidence level, between 0 and 1.
        random_trials: whether the reset draws at random; if not, trials are averaged, and images alone vary.
        upper: the largest possible distance; limits are clipped to it on both sides of 0.

    Raises:
        ProtocolError: a shape does not fit, or a distance is NaN or infinite.

    Notes:
        Every mean square of d is a quadratic form in the weights, so all pairs of many models cost three products of
        matrices, not a pass over the images each. Where nothing differs (normal effects, 50 or 500 images), tests at
        the level 0.05 are wrong in 7.8 % of simulated studies of three trials, 5.5 % of five and 4.9 % of ten.
    """
    values, weights = np.asarray(distances, np.float64), np.asarray(weights, np.float64)
    if values.ndim != 3 or values.size == 0 or weights.ndim != 2 or weights.shape[1] != len(values):
        raise ProtocolError(
            f"The distances have the shape {values.shape} and the weights {weights.shape}: expected (n_models, "
            "n_trials, n_images) and (n_contrasts, n_models)."
        )
    if not np.isfinite(values).all():
        raise ProtocolError("Some distances are NaN or infinite. Leave out cells whose status is not 'ok'.")
    if not random_trials:
        values = values.mean(axis=1, keepdims=True)
    n_models, n_trials, n_images = values.shape
    mean = weights @ values.mean(axis=(1, 2))
    values = values - values.mean(axis=(1, 2), keepdims=True)
    trials, images = values.mean(axis=2), values.mean(axis=1)  # (n_models, n_trials), (n_models, n_images)
    squares = [n_images * _quadratic(trials, weights), n_trials * _quadratic(images, weights)]
    df = np.array([n_trials - 1, n_images - 1, (n_trials - 1) * (n_images - 1)], np.float64)
    if n_trials > 1 and n_images > 1:
        rest = values - trials[:, :, None] - images[:, None, :]
        rest_square = _quadratic(rest.reshape(n_models, -1), weights) / df[2]
        squares = [np.maximum(square / one, rest_square) for square, one in zip(squares, df, strict=False)]
        parts = np.stack([*squares, rest_square]) / (n_trials * n_images)
        return _tested(mean, parts[0] + parts[1] - parts[2], parts, df, level, upper, "trials and images")
    for square, one, covers in zip(squares, df[:2], ("trials", "images"), strict=True):
        if one and (covers == "trials") == random_trials:
            part = square / one / (n_trials * n_images)
            return _tested(mean, part, part[None], df[df == one][:1], level, upper, covers)  # type: ignore[arg-type]
    nothing = np.full(len(weights), np.nan)
    return Contrasts(mean, nothing, nothing, nothing, "nothing")


def contrasts_of_samples(
    samples: Sequence[npt.NDArray[Any]], weights: npt.NDArray[Any], *, level: float = 0.95, upper: float = 1.0
) -> Contrasts:
    """Contrast the means of independent samples, which may differ in size and spread.

    Of two samples with the weights 1 and -1 this is Welch's test (Welch 1947, *Biometrika* 34, 28-35), its degrees of
    freedom Satterthwaite's.

    Args:
        samples: of each model the mean distance of each trial ``(n_trials,)``, or of each category the criticality of
            each of its models ``(n_models,)``. One value tells nothing of its spread: contrasts with it have no
            interval.
        weights: ``(n_contrasts, n_samples)``.
        level: confidence level, between 0 and 1.
        upper: the largest possible mean; limits are clipped to it on both sides of 0.
    """
    weights = np.asarray(weights, np.float64)
    means = np.array([np.mean(sample) if len(sample) else np.nan for sample in samples])
    variances = np.array([np.var(sample, ddof=1) / len(sample) if len(sample) > 1 else np.nan for sample in samples])
    used = weights != 0
    parts = np.where(used, weights**2 * variances, 0.0).T  # (n_samples, n_contrasts)
    df = np.array([max(len(sample) - 1, 1) for sample in samples], np.float64)
    mean = np.where(used, weights * means, 0.0).sum(axis=1)
    return _tested(mean, parts.sum(axis=0), parts, df, level, upper, "trials")


def _quadratic(effects: Array, weights: Array) -> Array:
    """Return the squared length of each weighted sum of rows, 0 where it is nothing but rounding."""
    products = effects @ effects.T  # (n_models, n_models)
    found = ((weights @ products) * weights).sum(axis=1)
    largest = ((np.abs(weights) @ np.abs(products)) * np.abs(weights)).sum(axis=1)
    return np.where(found > _ROUNDING * largest, found, 0.0)


def _tested(
    mean: Array,
    variance: Array,
    parts: Array,
    df: Array,
    level: float,
    upper: float,
    covers: Literal["trials and images", "images", "trials"],
) -> Contrasts:
    """Return interval and test of means, given the variance of each.

    Args:
        mean: ``(n_contrasts,)``.
        variance: of the mean, ``(n_contrasts,)``.
        parts: the mean squares that it is made of, each divided as it is there, ``(n_parts, n_contrasts)``.
        df: their degrees of freedom, ``(n_parts,)``.
        level: as in `crossed_contrasts`.
        upper: as in `crossed_contrasts`.
        covers: as in `Contrasts`.
    """
    varies = variance > 0
    scale = np.where(varies, variance, 1.0)
    # shares, so that squares of tiny variances cannot underflow
    of_all = 1 / np.where(varies, ((parts / scale) ** 2 / df[:, None]).sum(axis=0), 1.0)
    error = np.sqrt(np.where(varies, variance, 0.0))
    half_width = np.where(np.isnan(variance), np.nan, stdtrit(of_all, 0.5 + level / 2) * error)
    p_value = np.where(varies, 2 * stdtr(of_all, -np.abs(mean) / np.sqrt(scale)), np.nan)
    low, high = np.maximum(mean - half_width, -upper), np.minimum(mean + half_width, upper)
    return Contrasts(mean, low, high, p_value, covers)


def holm(p_values: npt.NDArray[Any]) -> Array:
    """Adjust p-values so that with probability 1 - alpha no true null has an adjusted value of alpha or less.

    Holm 1979, *Scandinavian Journal of Statistics* 6, 65-70. It holds whatever the tests have in common.

    Args:
        p_values: ``(n_tests,)``; NaN is no test, stays NaN and does not count.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03]))
        array([0.03, 0.06, 0.06])
    """
    p_values = np.asarray(p_values, np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    (tested,) = np.nonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def benjamini_hochberg(p_values: npt.NDArray[Any]) -> Array:
    """Adjust p-values so that of those of alpha or less a share of at most alpha are false in the mean.

    Benjamini & Hochberg 1995, *Journal of the Royal Statistical Society B* 57, 289-300. It holds for independent tests
    and for those that depend on each other positively.

    Args:
        p_values: ``(n_tests,)``; NaN is no test, stays NaN and does not count.
    """
    p_values = np.asarray(p_values, np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    tested = ~np.isnan(p_values)
    if tested.any():
        adjusted[tested] = false_discovery_control(p_values[tested], method="bh")
    return adjusted
