"""From per-image distances to estimates with intervals; the chance level and the matched temperature."""

from dataclasses import dataclass
from math import exp, isinf, log, nan, sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc

from layercrit.errors import ProtocolError
from layercrit.intervals import betting, check_interval, check_level, half_width, limits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ChanceLevel",
    "Estimate",
    "estimate",
    "estimate_mean_over_layers",
    "fit_temperature",
    "needed_trials",
]

# Storage in float16 may carry a distance this far (as a share of the largest possible one) out of its range.
_STORAGE_ROUNDING = 1e-3
# ln T is searched in [-64, 64], which is enough for logits of any scale from 1e-20 to 1e20.
_LARGEST_LOG_TEMPERATURE = 64.0
_ROWS_AT_ONCE = 512


def needed_trials(n_trials: int, random: bool) -> int:
    """Return how many of the requested trials are run: one if the reset is not random, since all would be the same."""
    return n_trials if random else 1


@dataclass(frozen=True)
class Estimate:
    """A mean distance, with confidence limits that are valid for what `covers` names.

    Attributes:
        mean: mean over trials and images.
        low: lower confidence limit, in [0, mean]; NaN where there is no interval.
        high: upper confidence limit, in [mean, the largest possible distance]; NaN where there is no interval.
        level: confidence level, such as 0.95.
        sd_trials: standard deviation (ddof 1) of the trials' means over images (0 if the reset is not random; NaN with
            one trial). It has a part of the images' scatter in it.
        sd_trial_effect: standard deviation of the effect of a trial alone (0 if the reset is not random; NaN if
            unknown).
        sd_image_effect: standard deviation of the effect of an image (NaN if unknown).
        sd_rest: standard deviation of what trial and image do not explain separately (NaN if unknown).
        n_trials: number of trials.
        n_images: number of images.
        covers: what may be drawn again while the interval stays valid.
    """

    mean: float
    low: float
    high: float
    level: float
    sd_trials: float
    sd_trial_effect: float
    sd_image_effect: float
    sd_rest: float
    n_trials: int
    n_images: int
    covers: Literal["trials and images", "images", "trials", "nothing"]


def estimate(
    distances: npt.NDArray[Any],
    *,
    level: float = 0.95,
    random_trials: bool = True,
    upper: float = 1.0,
    interval: str = "t",
) -> Estimate:
    """Estimate the mean distance of one layer, and how far it may be off.

    Images and trials are crossed random effects: distance[r, x] = mean + trial_r + image_x + rest[r, x]. The interval
    covers new trials and new images if both were drawn more than once. With one image column (such as the mean of many
    images in published tables) it covers new trials on the same images. With one trial of a random reset there is
    none, since a single draw does not tell how much draws vary: take more trials.

    Args:
        distances: ``(n_trials, n_images)``, in [0, ``upper``]; computed in float64.
        level: confidence level, between 0 and 1.
        random_trials: whether the reset draws at random. If not (`zero`, `rewind`), trials repeat each other: they
            are averaged, and the interval covers images only.
        upper: the largest possible distance; the limits stay below it.
        interval: one of `INTERVALS`. ``t``: Student's, as described above. ``betting``: for independent trials of any
            distribution in [0, ``upper``], on the same images, however few those are (see
            `layercrit.intervals.betting`); trials in the order in which they were drawn.

    Raises:
        ProtocolError: the shape does not fit, a value is NaN, infinite or out of range, ``level`` is no such level,
            there is no such interval, or the bets would be on trials of a reset that is not random, or on distances
            without an upper end.

    Example:
        >>> result = estimate(np.array([[0.1, 0.3, 0.2], [0.4, 0.6, 0.5], [0.2, 0.4, 0.3]]))
        >>> print(f"{result.mean:.2f} in [{result.low:.2f}, {result.high:.2f}], {result.covers}")
        0.33 in [0.08, 0.75], trials and images

    Notes:
        Analysis of variance of two crossed random effects without replication (Searle, Casella & McCulloch 1992,
        *Variance Components*, chapter 4). A variance that would be negative is 0. With R trials and N images the
        variance of the mean has the parts sd_trial_effect^2 / R, sd_image_effect^2 / N and sd_rest^2 / (R N), whose
        degrees of freedom are R - 1, N - 1 and, to be on the safe side, the smaller of the two: three trials that
        happen to agree do not pass for a proof that trials agree. `layercrit.intervals.half_width` weights their
        quantiles, and the limits are `layercrit.intervals.limits`, which reach farther towards the middle of the range.
        Simulated coverage of 95 % intervals (50 and 200 images) with normal effects: 94 % or more from three trials on,
        96 % or more for two. Where trials are skewed, most near the largest distance and a few far from it, three
        trials can hardly know of the few: coverage falls to 89 % for five trials. Rarer unlike draws stay unseen:
        `layercrit.intervals.excluded_share`.
    """
    values = _checked(distances, ("n_trials", "n_images"), upper)
    check_level(level)
    check_interval(interval)
    n_trials, n_images = values.shape
    # Differences from one of the values: equal distances then have a mean and a spread without any rounding.
    origin = float(values[0, 0])
    values = values - origin
    mean = min(max(origin + float(values.mean()), 0.0), upper)
    reach, sd_trial_effect, sd_image_effect, sd_rest = nan, nan, nan, nan
    covers: Literal["trials and images", "images", "trials", "nothing"] = "nothing"
    if not random_trials:
        sd_trial_effect, sd_rest = 0.0, 0.0
        if n_images > 1:
            reach, sd_image_effect = _one_way(values.mean(axis=0), level)
            covers = "images"
    elif n_trials > 1 and n_images > 1:
        reach, sd_trial_effect, sd_image_effect, sd_rest = _two_way(values, level)
        covers = "trials and images"
    elif n_trials > 1:
        reach, sd_trial_effect = _one_way(values[:, 0], level)
        covers = "trials"
    if interval == "betting":
        low, high = _bets(origin + values.mean(axis=1), level, random_trials, upper)
        low, high, covers = min(low, mean), max(high, mean), "trials"
    else:
        low, high = map(float, limits(mean, reach, upper))
    return Estimate(
        mean=mean,
        low=low,
        high=high,
        level=level,
        sd_trials=0.0 if not random_trials else float(values.mean(axis=1).std(ddof=1)) if n_trials > 1 else nan,
        sd_trial_effect=sd_trial_effect,
        sd_image_effect=sd_image_effect,
        sd_rest=sd_rest,
        n_trials=n_trials,
        n_images=n_images,
        covers=covers,
    )


def _bets(trials: npt.NDArray[np.float64], level: float, random_trials: bool, upper: float) -> tuple[float, float]:
    """Return the limits of the mean of ``(n_trials,)`` that betting on the trials gives."""
    if not random_trials:
        raise ProtocolError(
            "A betting interval is for new trials, and this reset is not random: its trials repeat each other. "
            "Use the interval 't', which then covers new images."
        )
    if isinf(upper):
        raise ProtocolError(
            "A betting interval is for distances whose largest possible value is known, and this one has none. "
            "Use the interval 't'."
        )
    low, high = betting((trials / upper).clip(0.0, 1.0), level)
    return upper * float(low), upper * float(high)


def estimate_mean_over_layers(
    distances: npt.NDArray[Any],
    *,
    level: float = 0.95,
    random_trials: bool = True,
    upper: float = 1.0,
    interval: str = "t",
) -> Estimate:
    """Estimate the mean over layers of a model's mean distance.

    The layers of a trial share the donor and all share the images, so they are not independent. The distances are
    therefore averaged over the layers first, which keeps what they have in common; the interval is for these
    layers.

    Args:
        distances: ``(n_layers, n_trials, n_images)``; trial r is the same draw in every layer, image x the same image.
        level: as in `estimate`.
        random_trials: as in `estimate`.
        upper: as in `estimate`.
        interval: as in `estimate`.

    Raises:
        ProtocolError: as in `estimate`.
    """
    values = _checked(distances, ("n_layers", "n_trials", "n_images"), upper)
    return estimate(values.mean(axis=0), level=level, random_trials=random_trials, upper=upper, interval=interval)


def _checked(distances: npt.NDArray[Any], axes: tuple[str, ...], upper: float) -> npt.NDArray[np.float64]:
    """Return the distances in float64 and in [0, upper], or say what is wrong with them."""
    values = np.asarray(distances, dtype=np.float64)
    if values.ndim != len(axes) or values.size == 0:
        raise ProtocolError(
            f"The distances have the shape {values.shape}: expected ({', '.join(axes)}), none of them 0. "
            "Pass one mean per trial as one column, `means[:, None]`."
        )
    finite = np.isfinite(values)
    if not finite.all():
        place = tuple(int(axis[0]) for axis in np.nonzero(~finite))
        raise ProtocolError(
            f"{int((~finite).sum())} of {values.size} distances are NaN or infinite, first at ({', '.join(axes)}) = "
            f"{place}; expected finite values. Leave out cells whose status is not 'ok'."
        )
    slack = 0.0 if isinf(upper) else _STORAGE_ROUNDING * upper
    if values.min() < -slack or values.max() > upper + slack:
        raise ProtocolError(
            f"The distances lie in [{values.min():.6g}, {values.max():.6g}]: expected [0, {upper:.6g}]. "
            "Pass the `upper` of the distance that was measured."
        )
    return values.clip(0.0, upper)


def _one_way(values: npt.NDArray[np.float64], level: float) -> tuple[float, float]:
    """Return the half-width of the interval of the mean of ``(n,)`` independent values, and their SD."""
    n = len(values)
    sd = float(values.std(ddof=1))
    return float(half_width([(sd**2 / n, n - 1)], level)), sd


def _two_way(values: npt.NDArray[np.float64], level: float) -> tuple[float, float, float, float]:
    """Return the half-width and the SDs of trials, images and rest of ``(n_trials, n_images)``; see `estimate`."""
    n_trials, n_images = values.shape
    grand = values.mean()
    trials = values.mean(axis=1, keepdims=True) - grand  # (n_trials, 1)
    images = values.mean(axis=0, keepdims=True) - grand  # (1, n_images)
    rest = values - grand - trials - images
    df_trials, df_images = n_trials - 1, n_images - 1
    ms_trials = n_images * float((trials**2).sum()) / df_trials
    ms_images = n_trials * float((images**2).sum()) / df_images
    ms_rest = float((rest**2).sum()) / (df_trials * df_images)
    of_trials = max(ms_trials - ms_rest, 0.0) / n_images
    of_images = max(ms_images - ms_rest, 0.0) / n_trials
    parts = [
        (of_trials / n_trials, df_trials),
        (of_images / n_images, df_images),
        (ms_rest / (n_trials * n_images), min(df_trials, df_images)),
    ]
    return float(half_width(parts, level)), sqrt(of_trials), sqrt(of_images), sqrt(ms_rest)


def p_of_guessing(n_right: int, n_images: int, share: float) -> float:
    """Return the probability that guessing names at least ``n_right`` of ``n_images`` right (exact binomial).

    Args:
        n_right: how many images were named right.
        n_images: of how many.
        share: the probability of guessing one image right, in [0, 1].

    Example:
        >>> round(p_of_guessing(n_right=2, n_images=3, share=0.5), 3)
        0.5
    """
    return 1.0 if n_right == 0 else float(bdtrc(n_right - 1, n_images, share))


def fit_temperature(logits: "Tensor", entropy: float) -> float:
    """Find the temperature T at which the mean entropy of softmax(logits / T) has a given value.

    Cosine depends on how peaked the predictions are; models trained with label smoothing, mixup or binary
    cross-entropy are compared at equal mean entropy. Temperature scaling: Guo et al. 2017 (arXiv 1706.04599).

    Args:
        logits: ``(n_images, n_classes)``; computed in float64.
        entropy: target mean entropy, in nats, between 0 and ln(n_classes), both excluded.

    Returns:
        t > 0; above 1 makes the predictions flatter. NaN, so that a measurement is not lost, where no
        temperature gives this entropy: for constant logits, for ties that keep the entropy above it, and for logits
        that are NaN or infinite.

    Raises:
        ProtocolError: the shape does not fit, or the entropy is out of range.

    Example:
        >>> import torch
        >>> round(fit_temperature(torch.tensor([[0.0, 1.0, 5.0], [2.0, 0.0, 0.0]]), entropy=0.8), 3)
        2.08
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ProtocolError(
            f"The logits have the shape {tuple(logits.shape)}: expected (n_images, n_classes) with at least one image."
        )
    largest = log(logits.shape[1]) if logits.shape[1] else 0.0
    if not 0 < entropy < largest:
        raise ProtocolError(
            f"The target mean entropy is {entropy} nats: expected one above 0 and below {largest:.6g}, "
            f"the entropy of a guess among {logits.shape[1]} classes."
        )
    logits = logits.detach().cpu()  # float64 follows, which some devices lack
    if not logits.isfinite().all():
        return nan
    # The entropy rises with T, since its derivative by 1/T is minus the variance of the logits divided by T.
    low, high = -1.0, 1.0
    while _mean_entropy(logits, low) > entropy:
        low, high = 2 * low, low
        if low < -_LARGEST_LOG_TEMPERATURE:
            return nan
    while _mean_entropy(logits, high) < entropy:
        low, high = high, 2 * high
        if high > _LARGEST_LOG_TEMPERATURE:
            return nan
    from scipy.optimize import brentq

    return exp(brentq(lambda log_t: _mean_entropy(logits, log_t) - entropy, low, high, xtol=1e-12))


def _mean_entropy(logits: "Tensor", log_temperature: float) -> float:
    """Return the mean entropy, in nats, of softmax(logits / T) over the rows of ``(n_images, n_classes)``."""
    total = 0.0
    for start in range(0, len(logits), _ROWS_AT_ONCE):  # float64 copies of 10,000 x 21,841 logits would take gigabytes
        rows = logits[start : start + _ROWS_AT_ONCE].double()
        log_p = (rows * exp(-log_temperature)).log_softmax(dim=1)
        total -= float((log_p.exp() * log_p).sum())
    return total / len(logits)


class ChanceLevel:
    """Mean cosine between a model's predictions for *different* images, collected batch by batch.

    An unrelated prediction is not at distance 1 from the right one, but at about 1 minus this level. With the
    predictions as unit vectors u_i, the mean over the pairs i != j is (|sum of u_i|^2 - n) / (n (n - 1)).

    Example:
        >>> import torch
        >>> level = ChanceLevel()
        >>> level.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> level.add(torch.tensor([[1.0, 0.0]]))
        >>> round(level.value, 4)
        0.3333
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._n_images = 0

    def add(self, p: "Tensor") -> None:
        """Add a batch of predictions.

        Args:
            p: probabilities, ``(n_images, n_classes)``; the images may be on any device.

        Raises:
            ProtocolError: the shape does not fit, or the number of classes differs from earlier batches.
        """
        expected = "n_classes" if self._sum is None else str(len(self._sum))
        if p.ndim != 2 or (self._sum is not None and p.shape[1] != len(self._sum)):
            raise ProtocolError(
                f"The predictions have the shape {tuple(p.shape)}: expected (n_images, {expected}). "
                "Start a new ChanceLevel for another model."
            )
        p = p.detach().cpu().double()  # summed in float64, which some devices lack
        total = (p / p.square().sum(dim=1, keepdim=True).sqrt()).sum(dim=0)  # (n_classes,)
        self._sum = total if self._sum is None else self._sum + total
        self._n_images += len(p)

    @property
    def value(self) -> float:
        """The mean cosine, in [0, 1]; NaN for fewer than two images or where a prediction was NaN or infinite."""
        n = self._n_images
        if self._sum is None or n < 2:
            return nan
        mean = (float(self._sum.square().sum()) - n) / (n * (n - 1))
        return min(max(mean, 0.0), 1.0)  # which rounding may pass
