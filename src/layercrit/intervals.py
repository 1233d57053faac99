"""Confidence limits of a mean in a known range: Student's t, kept in the range, and betting, which assumes nothing."""

from collections.abc import Sequence
from math import isinf, log
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from layercrit.errors import ProtocolError, near
from layercrit.protocol import INTERVALS

__all__ = ["betting", "check_interval", "check_level", "excluded_share", "half_width", "limits"]

Array = npt.NDArray[np.float64]

_HALVINGS = 50  # of [0, 1], until the ends of an interval are known to rounding


def check_interval(interval: str) -> None:
    """Check that there is such a kind of interval.

    Raises:
        ProtocolError: there is none.
    """
    if interval not in INTERVALS:
        raise ProtocolError(f"Unknown interval {str(interval)!r}. {near(str(interval), INTERVALS)}")


def check_level(level: float) -> None:
    """Check that a confidence level is one.

    Raises:
        ProtocolError: it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ProtocolError(f"The confidence level is {level}: expected a number between 0 and 1, such as 0.95.")


def half_width(parts: Sequence[tuple[Any, Any]], level: float = 0.95) -> Array:
    """Return how far an interval reaches to either side of a mean whose error has several independent sources.

    Args:
        parts: of each source its part of the variance of the mean, of any shape, and its degrees of freedom; NaN gives
            NaN.
        level: confidence level, between 0 and 1.

    Example:
        >>> print(f"{half_width([(0.0004, 2), (0.0003, 99)]):.3f}")
        0.088

    Notes:
        The standard error times the mean of the sources' quantiles of Student's t, weighted by their parts (Cochran
        1964, *Biometrics* 20, 191-195). Satterthwaite's degrees of freedom would give a shorter interval, which covers
        less than it says where one source has two degrees of freedom: three trials that happen to be close make the
        error small and its degrees of freedom many at once.
    """
    total = np.asarray(sum(variance for variance, _ in parts), np.float64)
    quantiles = sum(variance * stdtrit(df, 0.5 + level / 2) for variance, df in parts)
    return np.asarray(quantiles / np.sqrt(np.where(total == 0, 1.0, total)))


def limits(mean: Any, half_width: Any, upper: float = 1.0) -> tuple[Array, Array]:
    """Return the limits of a mean in [0, ``upper``], which stay in that range.

    Args:
        mean: in [0, ``upper``]; of any shape.
        half_width: how far from its mean the interval would reach if there were no range; NaN gives limits that are
            NaN.
        upper: the largest possible mean; infinite if there is none.

    Example:
        >>> low, high = limits(mean=0.8, half_width=0.2)
        >>> print(f"[{low:.2f}, {high:.2f}]")
        [0.55, 0.93]

    Notes:
        Wilson's score interval (1927, *Journal of the American Statistical Association* 22, 209-212). A variable in a
        range can vary most in its middle: if its shape stays the same, its variance is in proportion to
        mu (upper - mu), as that of a binomial share is. The limits are therefore the two mu with (mean - mu)^2 =
        half_width^2 mu (upper - mu) / (mean (upper - mean)). Where the half-width is small beside the distances to 0
        and to ``upper``, that is mean +- half_width; else it reaches farther into the middle, where the draws are that
        have not been seen, and less far towards the end. Without an upper end, the limits are mean +- half_width, cut
        at 0.
    """
    mean, reach = np.asarray(mean, np.float64), np.asarray(half_width, np.float64)
    if isinf(upper):
        return np.maximum(mean - reach, 0.0), mean + reach
    room = np.asarray(mean * (upper - mean))
    # k is 0 where a mean is at an end: there every distance is, and none varies
    k = np.divide(
        reach**2, room, out=np.where(np.isnan(reach), np.nan, np.zeros(np.broadcast(reach, room).shape)), where=room > 0
    )
    shift = k * (upper / 2 - mean) / (1 + k)
    spread = np.sqrt(k * room + (k * upper / 2) ** 2) / (1 + k)
    # np.minimum and np.maximum keep NaN
    low, high = mean + np.minimum(shift - spread, 0.0), mean + np.maximum(shift + spread, 0.0)
    return np.maximum(low, 0.0), np.minimum(high, upper)


def betting(values: npt.NDArray[Any], level: float = 0.95) -> tuple[Array, Array]:
    """Return the hedged betting interval of the mean of independent draws, of which nothing is assumed but the range.

    Where Student's t needs draws that are close to normal, this covers whatever the distribution in [0, 1] is, for any
    number of draws. The price is width: 0.05 to either side takes about 70 draws even where all are alike.

    Args:
        values: ``(..., n_draws)``, in [0, 1], in the order in which they were drawn; of each layer, for instance, the
            means of its trials over images, ``(n_layers, n_trials)``. The mean is then that of new trials on the same
            images.
        level: confidence level, between 0 and 1.

    Returns:
        The lower and the upper limits, ``(...)``.

    Raises:
        ProtocolError: there are no values, some are NaN or outside [0, 1], or ``level`` is no such level.

    Example:
        >>> low, high = betting(np.full(70, 0.8))
        >>> print(f"[{low:.3f}, {high:.3f}]")
        [0.722, 0.821]

    Notes:
        Waudby-Smith & Ramdas 2024, *Journal of the Royal Statistical Society B* 86, 1-27, section 4. If the mean is m,
        nobody gets rich by betting on draws above it or below it: the capitals K+ = prod(1 + l_t (x_t - m)) and
        K- = prod(1 - l_t (x_t - m)), where each stake l_t depends on earlier draws only, have expectation 1. Kept are
        the m with max(K+, K-) / 2 < 1 / alpha. K+ falls with m and K- rises, so that these are an interval, whose ends
        are found by halving. Draws that drift may leave none, or not the mean of the draws: the interval then reaches
        to that. Limits of fewer draws hold at the same time, but to cut with them narrows the interval of
        70 draws by less than a hundredth, so that it is left out.
    """
    x = np.asarray(values, np.float64)
    if x.ndim == 0 or x.size == 0:
        raise ProtocolError(f"The values to bet on have the shape {x.shape}: expected (..., n_draws), none of them 0.")
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise ProtocolError(
            f"The values to bet on lie in [{x.min():.6g}, {x.max():.6g}]: expected [0, 1]. Divide them by the largest "
            "possible value, and the limits back; where there is none, use the interval 't'."
        )
    check_level(level)
    t = np.arange(1, x.shape[-1] + 1)
    mu = (0.5 + x.cumsum(axis=-1)) / (t + 1)
    v = (0.25 + ((x - mu) ** 2).cumsum(axis=-1)) / (t + 1)
    earlier = np.concatenate([np.full_like(v[..., :1], 0.25), v[..., :-1]], axis=-1)
    stakes = np.sqrt(2 * log(2 / (1 - level)) / (earlier * t * np.log1p(t)))  # (..., n_draws)
    enough = log(2 / (1 - level))
    mean = x.mean(axis=-1)
    return np.minimum(_lower_end(x, stakes, enough), mean), np.maximum(1 - _lower_end(1 - x, stakes, enough), mean)


def _lower_end(x: Array, stakes: Array, enough: float) -> Array:
    """Return the largest m known to be excluded by bets on draws above it, 0 where none is; ``(...)``."""
    outside, inside = np.zeros(x.shape[:-1]), np.ones(x.shape[:-1])
    for _ in range(_HALVINGS):
        m = ((outside + inside) / 2)[..., None]
        excluded = np.log1p(np.minimum(stakes, 0.5 / m) * (x - m)).sum(axis=-1) >= enough
        outside = np.where(excluded, m[..., 0], outside)
        inside = np.where(excluded, inside, m[..., 0])
    return outside


def excluded_share(n_trials: int, level: float = 0.95) -> float:
    """Return the share of unlike draws from which on ``n_trials`` alike ones exclude them.

    If a share p of draws is unlike the others, n trials miss them with the probability (1 - p)^n. Above the returned
    share, about 3.7 / n at a level of 0.95, that is less probable than an error on one side of the interval. Of rarer
    draws the trials say nothing, and no interval without further assumptions can.

    Args:
        n_trials: number of trials, at least 1.
        level: confidence level of the interval, between 0 and 1.

    Raises:
        ProtocolError: there is no trial, or ``level`` is no such level.

    Example:
        >>> print(f"{excluded_share(10):.2f} {excluded_share(100):.3f}")
        0.31 0.036
    """
    check_level(level)
    if not n_trials >= 1:
        raise ProtocolError(f"The number of trials is {n_trials}: expected at least 1.")
    return float(1 - ((1 - level) / 2) ** (1 / n_trials))
