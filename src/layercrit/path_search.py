"""Search a path and the noise on it for the smallest ratio of both that is allowed, by as few points as can be."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Excess", "Optimum", "PathSearch", "Point"]

Point = tuple[int, int]
"""Places of a point of the grid: in the path and in the noise."""

Limit = Literal["mean", "low", "high"]


@dataclass(frozen=True)
class Excess:
    """How far the loss at a point of the grid is above what is allowed: at most 0 where the point may be taken.

    Attributes:
        mean: over draws and images.
        low: lower confidence limit; NaN where there is none.
        high: upper confidence limit; NaN where there is none.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Optimum:
    """The smallest ratio of path and noise among the points that may be taken.

    Attributes:
        ratio: a / s; 0 where a is; infinite where no point may be taken.
        a: place on the path, 0 for the initial and 1 for the trained values; NaN where there is none.
        s: standard deviation of the noise; NaN where there is none, and at a = 0, where any will do.
        edge: ``largest s`` where more noise than the grid has may be as good, ``smallest s`` where even its smallest is
            too much on the whole path; else empty.
    """

    ratio: float
    a: float
    s: float
    edge: str


_NOTHING = Optimum(math.inf, math.nan, math.nan, "smallest s")


class PathSearch:
    """Finds the smallest a / s of one module over a grid, and asks for as few of its points as it can.

    More noise is taken to mean more loss, so that the largest noise is found by bisection, and a place on the path is
    left out at its first point if it cannot be better than the best one so far. Between the last point that may be
    taken and the next, the loss is taken to be linear in the square of the noise, as a quadratic loss is.

    The search is run three times over, of which the later ones know the points of the earlier: for the mean of the loss
    and for its confidence limits, which give those of the ratio.

    Attributes:
        a: places on the path, from 0 to 1.
        s: standard deviations of the noise, rising.
        known: the points that were asked for.
        found: of the mean and of each limit, once its search is over.
        share: how much of the search is done, in [0, 1].
    """

    def __init__(self, a: Sequence[float], s: Sequence[float]) -> None:
        self.a: npt.NDArray[np.float64] = np.asarray(a, np.float64)
        self.s: npt.NDArray[np.float64] = np.asarray(s, np.float64)
        self.known: dict[Point, Excess] = {}
        self.found: dict[Limit, Optimum] = {}
        self.share = 0.0

    def run(self, *, limits: bool = True) -> Generator[Point, Excess, None]:
        """Yield the points to be evaluated, and take what they gave.

        Args:
            limits: whether there are confidence limits.
        """
        order = list(range(len(self.a) - 1, 0, -1))  # from the trained values on
        wanted: tuple[Limit, ...] = ("mean", "high", "low") if limits else ("mean",)
        for number, limit in enumerate(wanted):
            best = _NOTHING
            for done, place in enumerate([0, *order]):
                best = yield from self._better(best, place, limit)
                if best.ratio == 0:
                    break
                self.share = (number + (done + 1) / len(self.a)) / len(wanted)
            self.found[limit] = best
            order.sort(key=lambda place: self.a[place] != best.a)  # the best one first, the others as they were
        self.share = 1.0

    def _better(self, best: Optimum, place: int, limit: Limit) -> Generator[Point, Excess, Optimum]:
        """Return the best point at one place of the path, if that is better than the best one so far."""
        a = float(self.a[place])
        if a == 0:
            kept = yield from self._is_kept((place, 0), limit)
            return Optimum(0.0, 0.0, math.nan, "") if kept else best
        needed = a / best.ratio
        if needed >= self.s[-1]:
            return best
        low = max(int(np.searchsorted(self.s, needed, side="right")) - 1, 0)
        if not (yield from self._is_kept((place, low), limit)):
            return best
        low, high = self._bracket(place, limit)
        middle = low + 1 if needed else (low + high) // 2  # a best one is rarely improved by far
        while high - low > 1:
            kept = yield from self._is_kept((place, middle), limit)
            low, high = (middle, high) if kept else (low, middle)
            middle = (low + high) // 2
        s = self._between(place, low, limit) if high < len(self.s) else float(self.s[-1])
        edge = "largest s" if high == len(self.s) else ""
        return Optimum(a / s, a, s, edge) if a / s < best.ratio else best

    def _is_kept(self, point: Point, limit: Limit) -> Generator[Point, Excess, bool]:
        """Return whether a point may be taken; one of which nothing is known is asked for."""
        place, s = point
        low, high = self._bracket(place, limit)
        if low < s < high:
            self.known[point] = yield point
            return self._may_be_taken(point, limit)
        return s <= low

    def _bracket(self, place: int, limit: Limit) -> tuple[int, int]:
        """Return the largest noise that is known to be kept at a place, and the smallest that is known not to be.

        Where the loss does not rise with the noise, the larger noise counts that was found to be kept.
        """
        mine = {s: self._may_be_taken((a, s), limit) for a, s in self.known if a == place}
        low = max((s for s, taken in mine.items() if taken), default=-1)
        return low, min((s for s, taken in mine.items() if not taken and s > low), default=len(self.s))

    def _may_be_taken(self, point: Point, limit: Limit) -> bool:
        return bool(getattr(self.known[point], limit) <= 0)

    def _between(self, place: int, below: int, limit: Limit) -> float:
        """Return the noise at which the loss is as allowed, between a point that may be taken and the next."""
        inside, outside = (getattr(self.known[place, at], limit) for at in (below, below + 1))
        squares = self.s[below : below + 2] ** 2
        share = -inside / (outside - inside) if math.isfinite(outside) else 0.0
        return math.sqrt(squares[0] + share * (squares[1] - squares[0]))
