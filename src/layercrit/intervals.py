"""Confidence limits of a mean in a known range: Student's t, kept in the range, and betting, which assumes nothing."""

from math import isinf, log
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

from layercrit.errors import ProtocolError, near

__all__ = ["INTERVALS", "betting", "check_interval", "check_level", "excluded_share", "limits"]

Array = npt.NDArray[np.float64]

INTERVALS = ("t", "betting")
"""The kinds of intervals: Student's t over trials and images, or betting on the means of trials."""

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


def limits(mean: Any, error: Any, df: Any, level: float = 0.95, upper: float = 1.0) -> tuple[Array, Array]:
    """Return the limits of a mean in [0, ``upper``], of which a standard error is known; they stay in that range.

    Args:
        mean: any shape; in [0, ``upper``].
        error: standard error of the mean; NaN gives limits that are NaN.
        df: degrees of freedom of the standard error.
        level: confidence level, between 0 and 1.
        upper: the largest possible mean; infinite if there is none.

    Example:
        >>> low, high = limits(mean=0.8, error=0.05, df=2)
        >>> print(f"[{low:.2f}, {high:.2f}]")
        [0.53, 0.93]

    Notes:
        Wilson's score interval (1927, *Journal of the American Statistical Association* 22, 209-212) with Student's
        quantile q. A variable in a range can vary most in its middle: its variance is in proportion to
        mu (upper - mu) where its shape stays the same, as that of a binomial share does. The limits are therefore the
        two mu with (mean - mu)^2 = q^2 error^2 mu (upper - mu) / (mean (upper - mean)). Where the error is small beside
        the distances to 0 and to ``upper`` that is Student's mean +- q error; else it reaches farther into the middle,
        where the draws are that have not been seen, and less far towards the end. Without an upper end the limits are
        Student's, cut at 0.
    """
    mean, reach = np.asarray(mean, np.float64), np.asarray(stdtrit(df, 0.5 + level / 2) * error)
    if isinf(upper):
        return np.maximum(mean - reach, 0.0), mean + reach
    room = np.asarray(mean * (upper - mean))
    # k is 0 where a mean is at an end: there every distance is, and none varies
    k = np.divide(reach**2, room, out=np.where(np.isnan(reach), np.nan, 0.0), where=room > 0)
    shift = k * (upper / 2 - mean) / (1 + k)
    half_width = np.sqrt(k * room + (k * upper / 2) ** 2) / (1 + k)
    # np.minimum and np.maximum keep NaN
    low, high = mean + np.minimum(shift - half_width, 0.0), mean + np.maximum(shift + half_width, 0.0)
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


def excluded_share(n_trials: Any, level: float = 0.95, dispersion: Any = 1.0) -> Array:
    """Return the share of draws that may be unlike all others although ``n_trials`` draws, all alike, show none.

    If a share p of draws is unlike the others, n trials miss them with the probability (1 - p)^n. Above the returned
    share, about 3.7 / n at a level of 0.95, that is less probable than an error on one side of the interval. Of rarer
    draws the trials say nothing, and no method can say more without an assumption.

    Other layers of the network allow one: they show how common it is that draws differ. With their ``dispersion``, the
    share p has the prior Beta(dispersion, 1 - dispersion), which has that mean and counts as one draw; returned is its
    limit after n draws without an unlike one. At 1, where in other layers all is or nothing, that is the share above.

    Args:
        n_trials: number of trials, at least 1; of any shape.
        level: confidence level of the interval, between 0 and 1.
        dispersion: variance of draws as a share of the largest that their mean allows, in [0, 1]; of any shape.

    Raises:
        ProtocolError: there is no trial, ``level`` is no such level, or the dispersion is out of range.

    Example:
        >>> print(f"{excluded_share(10):.2f} {excluded_share(100):.3f} {excluded_share(10, dispersion=0.1):.2f}")
        0.31 0.036 0.09
    """
    n_trials, dispersion = np.asarray(n_trials), np.asarray(dispersion, np.float64)
    check_level(level)
    if not (n_trials >= 1).all():
        raise ProtocolError(f"The number of trials is {n_trials}: expected at least 1.")
    if not ((dispersion >= 0) & (dispersion <= 1)).all():
        raise ProtocolError(f"The dispersion is {dispersion}: expected a share in [0, 1].")
    # 0 is no parameter of a beta distribution, but the limit there
    found = betaincinv(np.maximum(dispersion, 1e-300), n_trials + 1 - dispersion, 0.5 + level / 2)
    return np.where(dispersion > 0, found, 0.0)
