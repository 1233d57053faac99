"""Plan a measurement for an asked half-width: what a pilot says of each layer, and the trials and images that it takes.

Stein's two stages (1945, *Annals of Mathematical Statistics* 16, 243-258): a pilot estimates how much draws and images
vary, then one plan is fixed, and the interval rests on the pilot's estimate of the variance. Looking after each further
trial, and stopping when the interval seems short enough, would stop where chance makes it short: such intervals cover
the true value less often than they say.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from layercrit.counts import counted, duration
from layercrit.intervals import half_width
from layercrit.statistics import Estimate, estimate

__all__ = [
    "SD_TRIALS",
    "Components",
    "Cost",
    "LayerPlan",
    "Pilot",
    "PrecisionPlan",
    "n_pilot_images",
    "plan_half_width",
    "plan_seconds",
    "recentred",
    "run_together",
    "typical_trials",
]

Array = npt.NDArray[np.float64]
Key = TypeVar("Key")

SD_TRIALS = 0.068
"""Standard deviation of the effect of a trial: root mean square over the published cells (Gavrikov et al. 2024)."""

_SD_IMAGES = 0.3  # of the effect of an image, to choose the pilot's images; 0.28 (ResNet-20) to 0.4 were measured
_FEWEST_OK = 3  # trials of a layer in the pilot from which its further ones are planned
_FEWEST_IMAGES = 50  # of a pilot, for degrees of freedom
_IMAGES_WITHIN_TIME = 128  # of a pilot where a time is asked for
_SIZES = 24  # numbers of images among which the plan chooses
_LARGEST = 1.0  # half-width of an interval that says nothing
_BYTES = 4  # of a float32 number
_BYTES_OF_DRAWS = 2**28  # of new values that are held at once
_DEAREST = 3  # layers that are named with the plan
_STEPS = 40  # of the search for the half-width that a time allows


@dataclass(frozen=True)
class Components:
    """What a pilot says of how much the distances of one layer vary: the components of variance.

    Attributes:
        trials: variance of the effects of trials; 0 where a reset is not random.
        images: variance of the effects of images.
        rest: variance of what is left.
        n_trials: how many trials the pilot had; 1 for a reset that is not random, whose trials are all alike.
        n_images: how many images it had.
    """

    trials: float
    images: float
    rest: float
    n_trials: int
    n_images: int

    @classmethod
    def of(cls, distances: npt.NDArray[Any], random_trials: bool) -> "Components":
        """Return those of the distances ``(n_trials, n_images)`` of a pilot; see `layercrit.statistics.estimate`."""
        found = estimate(distances, random_trials=random_trials)
        known = {
            name: 0.0 if math.isnan(sd) else sd**2
            for name, sd in (
                ("trials", found.sd_trial_effect),
                ("images", found.sd_image_effect),
                ("rest", found.sd_rest),
            )
        }
        return cls(**known, n_trials=found.n_trials if random_trials else 1, n_images=found.n_images)

    @classmethod
    def of_pilot(cls, distances: npt.NDArray[Any], random_trials: bool) -> "Components | None":
        """Return those of the trials of a pilot that are ok; None if they are too few to plan further ones by."""
        fewest = _FEWEST_OK if random_trials else 1
        return cls.of(distances, random_trials) if len(distances) >= fewest else None

    def half_width(self, n_trials: npt.ArrayLike, n_images: npt.ArrayLike, level: float) -> Array:
        """Return how far the interval of the mean goes to each side with other numbers of trials and images.

        The degrees of freedom are those of the pilot; see `layercrit.intervals.half_width`.
        """
        n_trials, n_images = np.asarray(n_trials, np.float64), np.asarray(n_images, np.float64)
        df_trials, df_images = max(self.n_trials - 1, 1), max(self.n_images - 1, 1)  # where it is 0, so is the variance
        parts = [
            (self.trials / n_trials, df_trials),
            (self.images / n_images, df_images),
            (self.rest / (n_trials * n_images), min(df_trials, df_images)),
        ]
        return half_width(parts, level)

    def images_for(self, half_width: float, level: float) -> int:
        """Return about how many images a half-width takes, however many trials there are."""
        n = 1
        while self.half_width(math.inf, n, level) > half_width:
            n *= 2
        below = n // 2
        while n - below > max(1, n // 50):
            middle = (below + n) // 2
            below, n = (middle, n) if self.half_width(math.inf, middle, level) > half_width else (below, middle)
        return n

    def estimate(self, fixed: Estimate) -> Estimate:
        """Return an estimate with an interval that rests on these components, and is as wide as was planned."""
        half_width = float(self.half_width(fixed.n_trials, fixed.n_images, fixed.level))
        return replace(fixed, low=max(fixed.mean - half_width, 0.0), high=min(fixed.mean + half_width, 1.0))


@dataclass(frozen=True)
class Cost:
    """What running resets costs, in seconds, as the pilot measured it.

    Attributes:
        trial: drawing one trial's donor.
        prefix: running the trained network on one image, once for all layers and trials that are run together.
        layers: ``(n_layers,)``, packing one layer's new values for one trial.
        evaluations: ``(n_layers,)``, running one image after one layer's reset.
    """

    trial: float
    prefix: float
    layers: Array
    evaluations: Array

    def seconds(self, trials: Array, n_images: int) -> float:
        """Return the time for some trials of each layer, ``(n_layers,)``, on some images; none takes none."""
        if not trials.any():
            return 0.0
        most = float(trials.max())
        of_layers = float((trials * (self.layers + n_images * self.evaluations)).sum())
        return most * (self.trial + n_images * self.prefix) + of_layers


@dataclass(frozen=True)
class Pilot:
    """What the pilot of one model and reset found.

    Attributes:
        components: layer -> its components of variance, in depth order; None where too few of its trials were ok.
        cost: of further trials.
        random_trials: whether the reset is random; if not, more trials are no use, and only images count.
    """

    components: Mapping[str, Components | None]
    cost: Cost
    random_trials: bool


@dataclass(frozen=True)
class LayerPlan:
    """What is planned for one layer.

    Attributes:
        trials: how many it gets in all, those of the pilot included.
        components: what the pilot found; None where too few of its trials were ok.
        half_width: that these trials and the plan's images will give; NaN where it is not known.
        reached: whether that is at most the half-width asked for.
        needed: how many trials would give the half-width asked for, on the plan's images; None if no number would.
        seconds: expected time of its trials after the pilot, without what they share with those of other layers.
    """

    trials: int
    components: Components | None
    half_width: float
    reached: bool
    needed: int | None
    seconds: float = 0.0


@dataclass(frozen=True)
class PrecisionPlan:
    """How many images all layers get, and how many trials each.

    Attributes:
        half_width: what was asked for, or what the time allows.
        level: confidence level of the intervals.
        pilot: trials of the pilot.
        n_pilot_images: its images.
        n_images: images that all layers get.
        n_available: images that there are.
        max_trials: the most trials of a layer.
        layers: name -> what is planned for it, in depth order.
        seconds: expected time from the end of the pilot on.
    """

    half_width: float
    level: float
    pilot: int
    n_pilot_images: int
    n_images: int
    n_available: int
    max_trials: int
    layers: Mapping[str, LayerPlan]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, without NaN."""
        plan = asdict(self)
        for layer in plan["layers"].values():
            layer["half_width"] = layer["half_width"] if math.isfinite(layer["half_width"]) else None
        return plan

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> "PrecisionPlan":
        """Return what `to_dict` was called on."""
        layers = {}
        for name, layer in plan["layers"].items():
            components = None if layer["components"] is None else Components(**layer["components"])
            half_width = math.nan if layer["half_width"] is None else layer["half_width"]
            layers[name] = LayerPlan(**{**layer, "components": components, "half_width": half_width})
        return cls(**{**plan, "layers": layers})

    def trials(self) -> dict[int, list[str]]:
        """Return trial -> the layers that get it, for all trials after the pilot."""
        last = max((layer.trials for layer in self.layers.values()), default=0)
        return {
            trial: [name for name, layer in self.layers.items() if layer.trials > trial]
            for trial in range(self.pilot, last)
        }

    def estimate(self, layer: str, fixed: Estimate, distances: npt.NDArray[Any], *, matched: bool) -> Estimate:
        """Return the interval of a layer that rests on the pilot's estimate of the variance.

        Args:
            layer: its name.
            fixed: the estimate as if the number of trials had been fixed before any was run; its mean and its
                standard deviations are kept.
            distances: ``(n_trials, n_images)`` of its trials that are ok, in their order.
            matched: whether these are at the matched temperature, which is not what was planned by.
        """
        components = self.layers[layer].components
        if components is not None and matched:
            components = Components.of(distances[: components.n_trials], random_trials=components.n_trials > 1)
        return fixed if components is None or fixed.n_trials < components.n_trials else components.estimate(fixed)

    def reaches(self, layer: str, n_trials: int, n_images: int) -> bool:
        """Return whether so many trials and images give a layer the half-width."""
        components = self.layers[layer].components
        if components is None:
            return False
        return bool(components.half_width(n_trials, n_images, self.level) <= self.half_width)

    def in_words(self) -> list[str]:
        """Say what is planned, and the layers that take most of it."""
        further = {name: layer.trials - self.pilot for name, layer in self.layers.items()}
        n_enough = sum(n <= 0 for n in further.values())
        again = (
            ""
            if self.n_images == self.n_pilot_images
            else f", the pilot's trials again on {counted(self.n_images, 'image')}"
        )
        of_all = f"{n_enough} of {counted(len(further), 'layer')} {'has' if n_enough == 1 else 'have'}"
        lines = [
            f"plan for a half-width of {self.half_width:.3g}: {of_all} enough after "
            f"the pilot of {counted(self.pilot, 'trial')} on {counted(self.n_pilot_images, 'image')}{again}; "
            f"{sum(max(n, 0) for n in further.values()):,} more trials of single layers on "
            f"{counted(self.n_images, 'image')}, {_time(self.seconds)}"
        ]
        dearest = sorted(self.layers, key=lambda name: -self.layers[name].seconds)[:_DEAREST]
        lines += [
            f"  {name}: {counted(self.layers[name].trials, 'trial')} in all, {_time(self.layers[name].seconds)}"
            for name in dearest
            if further[name] > 0
        ]
        return lines + self.notes()

    def notes(self) -> list[str]:
        """Say which layers do not reach the half-width, and what it would take."""
        notes = []
        for name, layer in self.layers.items():
            if layer.reached or layer.components is None:
                continue
            if layer.needed is None:
                images = layer.components.images_for(self.half_width, self.level)
                takes = "no number of trials would do, since its images vary: it would take about "
                takes += counted(images, "image")
                takes += f", and there are {self.n_available:,}" if images > self.n_available else ""
            else:
                takes = f"it would take {counted(layer.needed, 'trial')} (max_trials is {self.max_trials})"
            notes.append(f"{name}: half-width {layer.half_width:.3g} instead of {self.half_width:.3g}; {takes}")
        return notes


def _time(seconds: float) -> str:
    return f"about {duration(seconds)}"


def n_pilot_images(half_width: float | None, level: float, pilot: int, n_available: int) -> int:
    """Return how many images a pilot gets, so that they take half of the variance that the half-width allows.

    Args:
        half_width: what is asked for; None where a time is, and the half-width follows from it.
        level: confidence level of the intervals.
        pilot: trials of the pilot.
        n_available: images that there are.
    """
    if half_width is None:
        return min(_IMAGES_WITHIN_TIME, n_available)
    n = math.ceil(2 * (float(stdtrit(pilot - 1, 0.5 + level / 2)) * _SD_IMAGES / half_width) ** 2)
    return min(max(n, _FEWEST_IMAGES), n_available)


def plan_half_width(
    pilots: Mapping[Key, Pilot],
    half_width: float,
    *,
    level: float,
    n_pilot: int,
    n_pilot_images: int,
    n_available: int,
    max_trials: int,
) -> dict[Key, PrecisionPlan]:
    """Return the cheapest plan that gives every layer a half-width, as far as the limits allow.

    The numbers of images are tried from the pilot's on; on more of them, the pilot's trials run again. Each layer gets
    the fewest trials that give it the half-width on so many images. The number of images is taken, one for all, with
    which most layers reach it, and of these the cheapest.

    Args:
        pilots: what the pilot found, of one model and reset or of each of a study's.
        half_width: in (0, 1).
        level: confidence level of the intervals.
        n_pilot: trials of the pilot.
        n_pilot_images: images of the pilot.
        n_available: images that there are.
        max_trials: the most trials of a layer.
    """
    steps = np.geomspace(n_pilot_images, max(n_available, n_pilot_images), _SIZES)
    best: tuple[tuple[int, float], dict[Key, PrecisionPlan]] | None = None
    for n_images in dict.fromkeys(np.rint(steps).astype(int).tolist()):
        plans = {}
        for key, pilot in pilots.items():
            first = n_pilot if pilot.random_trials else 1
            layers, seconds = _layers_on(pilot, n_images, half_width, level, first, max_trials, n_pilot_images)
            plans[key] = PrecisionPlan(
                half_width, level, first, n_pilot_images, n_images, n_available, max_trials, layers, seconds
            )
        n_missed = sum(not layer.reached for plan in plans.values() for layer in plan.layers.values())
        merit = n_missed, sum(plan.seconds for plan in plans.values())
        if best is None or merit < best[0]:
            best = merit, plans
    return {} if best is None else best[1]


def plan_seconds(pilots: Mapping[Key, Pilot], seconds: float, **limits: Any) -> dict[Key, PrecisionPlan]:
    """Return the plan of the smallest half-width for all layers that a time allows.

    Args:
        pilots: as in `plan_half_width`.
        seconds: what is left of the time.
        limits: as in `plan_half_width`.
    """
    low, high = 0.0, _LARGEST
    plans = plan_half_width(pilots, high, **limits)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried = plan_half_width(pilots, middle, **limits)
        missed = any(
            not layer.reached and layer.components is not None
            for plan in tried.values()
            for layer in plan.layers.values()
        )
        if missed or sum(plan.seconds for plan in tried.values()) > seconds:
            low = middle
        else:
            high, plans = middle, tried
    return plans


def typical_trials(half_width: float, level: float, pilot: int, n_images: int) -> int:
    """Return how many trials a half-width takes where trials vary as they do in the published networks."""
    components = Components(SD_TRIALS**2, _SD_IMAGES**2, _SD_IMAGES**2, pilot, n_images)
    return max(pilot, _needed_trials(components, n_images, half_width, level) or pilot)


def run_together(
    layers_of_trials: Mapping[int, Sequence[str]], n_parameters: Mapping[str, int]
) -> Iterator[dict[int, list[str]]]:
    """Divide trials into those that are run together, as many as memory should hold the new values of.

    Args:
        layers_of_trials: trial -> the names of the layers that get it; trials without any are left out.
        n_parameters: of each layer.
    """
    together: dict[int, list[str]] = {}
    n_bytes = 0
    for trial, layers in layers_of_trials.items():
        of_trial = _BYTES * sum(n_parameters[name] for name in layers)
        if together and n_bytes + of_trial > _BYTES_OF_DRAWS:
            yield together
            together, n_bytes = {}, 0
        if layers:
            together[trial] = list(layers)
            n_bytes += of_trial
    if together:
        yield together


def recentred(estimate: Estimate, mean: float) -> Estimate:
    """Return an estimate with another mean, and an interval that reaches as far from it as before."""
    shift = mean - estimate.mean
    return replace(estimate, mean=mean, low=max(estimate.low + shift, 0.0), high=min(estimate.high + shift, 1.0))


def _layers_on(
    pilot: Pilot, n_images: int, half_width: float, level: float, first: int, max_trials: int, n_pilot_images: int
) -> tuple[dict[str, LayerPlan], float]:
    """Return what is planned for each layer on so many images, and the time from the end of the pilot on."""
    numbers = np.arange(first, (max_trials if pilot.random_trials else 1) + 1)
    layers = {
        name: _layer_plan(components, numbers, n_images, half_width, level)
        for name, components in pilot.components.items()
    }
    further = np.array([layer.trials - first for layer in layers.values()], np.float64)
    again = np.full(len(layers), float(first if n_images > n_pilot_images else 0))
    of_layers = further * (pilot.cost.layers + n_images * pilot.cost.evaluations)
    layers = {
        name: replace(layer, seconds=float(seconds))
        for (name, layer), seconds in zip(layers.items(), of_layers, strict=True)
    }
    return layers, pilot.cost.seconds(again, n_images) + pilot.cost.seconds(further, n_images)


def _layer_plan(
    components: Components | None, numbers: npt.NDArray[np.int_], n_images: int, half_width: float, level: float
) -> LayerPlan:
    """Return the fewest trials, of some numbers, that give a layer a half-width; the most where none does."""
    if components is None:
        return LayerPlan(int(numbers[0]), None, math.nan, False, None)
    widths = components.half_width(numbers, n_images, level)
    enough = np.flatnonzero(widths <= half_width)
    if len(enough):
        place = enough[0]
        return LayerPlan(int(numbers[place]), components, float(widths[place]), True, int(numbers[place]))
    needed = _needed_trials(components, n_images, half_width, level)
    # where the images are too few, trials that bring less than a twentieth are wasted
    limit = float(components.half_width(math.inf, n_images, level))
    worthwhile = np.flatnonzero(widths <= 1.05 * limit)
    place = worthwhile[0] if needed is None and len(worthwhile) else -1
    return LayerPlan(int(numbers[place]), components, float(widths[place]), False, needed)


def _needed_trials(components: Components, n_images: int, half_width: float, level: float) -> int | None:
    """Return how many trials a half-width takes on some images; None if no number would do."""
    if components.n_trials == 1 or components.half_width(math.inf, n_images, level) > half_width:
        return None
    n = 1
    while components.half_width(n, n_images, level) > half_width:
        n *= 2
    below = n // 2
    while n - below > 1:
        middle = (below + n) // 2
        below, n = (middle, n) if components.half_width(middle, n_images, level) > half_width else (below, middle)
    return n
