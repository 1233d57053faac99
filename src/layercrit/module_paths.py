"""The paths of modules from their initial to their trained values, and the loss at noisy points of them."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from layercrit.contrasts import crossed_contrasts
from layercrit.engine.losses import ChangedLayer, Losses
from layercrit.engine.subject import Change, Subject
from layercrit.errors import ProtocolError
from layercrit.path_search import Excess, Optimum, PathSearch, Point
from layercrit.progress_bar import Bar
from layercrit.resets import Draw, Reset, draw_values
from layercrit.seeds import trial_seed

__all__ = ["Allowed", "Grid", "ModulePaths"]

Array = npt.NDArray[np.float64]

Keep = Callable[[Iterable[tuple[str, Point, Excess]]], None]
"""What is called with the points that were just evaluated: module, place, and what was found."""

_SMALLEST_ROOM = 1e-6  # nats: less is rounding of losses in float32


@dataclass(frozen=True)
class Grid:
    """Points of a path: places from 0 to 1, and standard deviations of noise in units of a module's root mean square.

    Raises:
        ProtocolError: a number is out of range.
    """

    a: Sequence[float]
    s: Sequence[float]

    @classmethod
    def of(cls, n_a: int, n_s: int, s_range: tuple[float, float]) -> "Grid":
        """Return so many places, evenly, and so many standard deviations, evenly in their logarithm."""
        for name, n in (("n_a", n_a), ("n_s", n_s)):
            if isinstance(n, bool) or not isinstance(n, int) or n < 2:
                raise ProtocolError(f"{name} must be a whole number of at least 2; got {n!r}.")
        low, high = s_range
        if not 0 < low < high < math.inf:
            raise ProtocolError(
                f"s_range must be two positive numbers, the smaller one first; got {low:g} and {high:g}. They are in "
                "units of the root mean square of a module's parameters."
            )
        return cls([place / (n_a - 1) for place in range(n_a)], np.geomspace(low, high, n_s).tolist())


@dataclass(frozen=True)
class Allowed:
    """Which loss is allowed: so many times the trained network's, or so many nats above it.

    Raises:
        ProtocolError: that is none at all.
    """

    factor: float
    excess: float | None = None

    def __post_init__(self) -> None:
        if self.excess is not None and not 0 < self.excess < math.inf:
            raise ProtocolError(f"excess must be a positive number of nats; got {self.excess!r}.")
        if not 1 < self.factor < math.inf:
            raise ProtocolError(
                f"tolerance is a factor of the trained network's loss and must be above 1; got {self.factor!r}. 1.01 "
                "allows 1 % more."
            )

    def of(self, losses: Array) -> Array:
        """Return what is allowed where the trained network has such losses, ``(n_images,)``.

        Raises:
            ProtocolError: their mean leaves no room.
        """
        if self.excess is not None:
            return losses + self.excess
        loss = float(losses.mean())
        if (self.factor - 1) * loss < _SMALLEST_ROOM:
            raise ProtocolError(
                f"The trained network's loss on these images is {loss:.2g} nats, so that {self.factor:g} times as much "
                "leaves no room for any change. Say how much more is allowed, in nats: --excess 0.01 (excess=0.01)."
            )
        return self.factor * losses


class ModulePaths:
    """The paths of all modules of a subject, each with its search, whose points are evaluated side by side.

    Attributes:
        draws: how many draws of the noise.
        level: confidence level of the limits.
        loss: of the trained network, mean over images in nats.
        allowed_loss: likewise, of what is allowed.
        covers: what the limits hold for.
        searches: module -> its search; those that have their initial values still have none.

    Args:
        subject: its reset puts the initial values into a layer.
        losses: of the subject.
        grid: as above.
        allowed: as above.
        draws: as above.
        seed: from which those of the draws are hashed.
        level: as above.
    """

    def __init__(
        self, subject: Subject, losses: Losses, *, grid: Grid, allowed: Allowed, draws: int, seed: int, level: float
    ) -> None:
        self._losses, self.level = losses, level
        trained = losses.trained()
        self._allowed = allowed.of(trained)  # (n_images,)
        self.loss, self.allowed_loss = float(trained.mean()), float(self._allowed.mean())
        self.draws = draws
        self._has_limits = draws > 1 and len(trained) > 1
        self.covers = "draws and images" if self._has_limits else "nothing"
        self._seeds = [
            trial_seed(seed, subject.model.architecture, "module criticality", draw) for draw in range(draws)
        ]
        self._paths = {change.layer.name: _Path.of(change, subject) for change in subject.changes(0)}
        self.searches = {
            name: PathSearch(grid.a, grid.s) for name, path in self._paths.items() if path.change.delta_norm
        }

    def search(self, bar: Bar, known: Mapping[str, Mapping[Point, Excess]], keep: Keep) -> None:
        """Search the grid of every module.

        Args:
            bar: shows how far it is.
            known: points of modules that were evaluated before.
            keep: called with those that are evaluated now.
        """
        running = {name: search.run(limits=self._has_limits) for name, search in self.searches.items()}

        def next_asked(name: str, excess: Excess | None) -> dict[str, list[Point]]:
            """Answer a search, and then again with what is known, as if it were evaluated now."""
            with contextlib.suppress(StopIteration):
                point = next(running[name]) if excess is None else running[name].send(excess)
                while point in known.get(name, {}):
                    point = running[name].send(known[name][point])
                return {name: [point]}
            return {}

        asked = {name: points for one in running for name, points in next_asked(one, None).items()}
        while asked:
            found = self._excesses(asked)
            keep((name, asked[name][0], excess) for name, (excess,) in found.items())
            asked = {name: left for one, (excess,) in found.items() for name, left in next_asked(one, excess).items()}
            bar.measured(sum(search.share for search in self.searches.values()), len(self.searches))

    def complete(self, name: str, bar: Bar, known: Mapping[str, Mapping[Point, Excess]], keep: Keep) -> None:
        """Evaluate the points of one module's grid that its search did not ask for; see `search`."""
        search = self.searches[name]
        search.known = {**known.get(name, {}), **search.known}
        for a in range(len(search.a)):
            left = [(a, s) for s in range(len(search.s)) if (a, s) not in search.known]
            if left:
                (found,) = self._excesses({name: left}).values()
                search.known |= dict(zip(left, found, strict=True))
                keep((name, point, excess) for point, excess in zip(left, found, strict=True))
            bar.measured(a + 1, len(search.a))

    def table(self) -> pd.DataFrame:
        """Return one row per module, with the columns of `ModuleCriticality.to_pandas`."""
        return pd.DataFrame([path.row(self.searches.get(name)) for name, path in self._paths.items()])

    def points(self) -> pd.DataFrame:
        """Return one row per point that was evaluated; losses are those above the trained network's."""
        room = self.allowed_loss - self.loss
        rows = [
            (name, search.a[a], search.s[s], *(room + np.array([at.mean, at.low, at.high])))
            for name, search in self.searches.items()
            for (a, s), at in sorted(search.known.items())
        ]
        return pd.DataFrame(rows, columns=["layer", "a", "s", "excess", "low", "high"])

    def _excesses(self, asked: Mapping[str, Sequence[Point]]) -> dict[str, list[Excess]]:
        """Return the excess losses of points, module by module."""
        changes = [
            ChangedLayer(path.change.layer, partial(path.values, search.a[a], search.s[s], seed))
            for name, points in asked.items()
            for path, search in [(self._paths[name], self.searches[name])]
            for a, s in points
            for seed in self._seeds
        ]
        losses = self._losses.changed(changes).reshape(-1, self.draws, len(self._allowed))
        found = iter(self._limited(losses - self._allowed))
        return {name: [next(found) for _ in points] for name, points in asked.items()}

    def _limited(self, above: Array) -> list[Excess]:
        """Return means and limits of losses above what is allowed, ``(n_points, n_draws, n_images)``."""
        finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(above).all(axis=(1, 2)))
        excesses = [Excess(math.inf, math.inf, math.inf)] * len(above)
        if finite.any():
            found = crossed_contrasts(above[finite], np.eye(finite.sum()), level=self.level, upper=math.inf)
            limits = zip(found.mean.tolist(), found.low.tolist(), found.high.tolist(), strict=True)
            for place, (mean, low, high) in zip(finite.nonzero()[0].tolist(), limits, strict=True):
                excesses[place] = Excess(mean, low, high)
        return excesses


@dataclass(frozen=True)
class _Path:
    """The path of one module.

    Attributes:
        change: from its trained to its initial values.
        subject: as above.
        initial: its parameters and buffers before training, on the CPU.
        unit: root mean square of its trained parameters; of its initial ones where these are all 0.
    """

    change: Change
    subject: Subject
    initial: Mapping[str, Tensor]
    unit: float

    @classmethod
    def of(cls, change: Change, subject: Subject) -> "_Path":
        new = change.values  # noqa: PD011 (no table)
        initial = {name: value.cpu() for name, value in new.items()}
        trained = {name: subject.model.network.get_parameter(name).detach() for name in change.layer.parameters}
        sizes = [
            math.sqrt(sum(float(values[name].double().square().sum()) for name in trained) / change.layer.n_parameters)
            for values in (trained, initial)
        ]
        return cls(change, subject, initial, sizes[0] or sizes[1])

    def values(self, a: float, s: float, seed: int) -> dict[str, Tensor]:
        """Return the values at a place of the path, with noise of ``s`` units; a draw's normal numbers are the same."""

        def noisy(draw: Draw) -> dict[str, Tensor]:
            return {
                name: (1 - a) * draw.donor[name]
                + a * value
                + s * self.unit * torch.randn(value.shape, generator=draw.generator, dtype=value.dtype)
                for name, value in draw.trained.items()
            }

        how = Reset("module criticality", noisy, random=True, donor="checkpoint", summary="")
        new = draw_values(how, self.change.layer, self.subject.model.network, self.initial, seed)
        return {name: value.to(self.subject.device) for name, value in new.items()}

    def row(self, search: PathSearch | None) -> dict[str, object]:
        """Return the module's row of the table."""
        layer, distance = self.change.layer, self.change.delta_norm
        about = {"layer": layer.name, "type": layer.type, "n_parameters": layer.n_parameters}
        size = {"distance": distance, "rms": self.unit}
        if search is None:
            nothing = {"module_criticality": 0.0, "low": 0.0, "high": 0.0, "a": math.nan, "s": math.nan, "edge": ""}
            return {**about, **nothing, **size, "status": "unchanged", "n_points": 0}
        best = search.found["mean"]
        value = self._criticality(best)
        low, high = (
            self._criticality(search.found[limit]) if limit in search.found else math.nan for limit in ("low", "high")
        )
        if "low" in search.found and search.found["low"].edge == "largest s":
            low = 0.0  # with more noise than the grid has, it may be anything below
        return {
            **about,
            "module_criticality": math.nan if math.isinf(value) else value,
            "low": min(low, value),
            "high": max(high, value),
            "a": best.a,
            "s": best.s,
            "edge": best.edge,
            **size,
            "status": "ok",
            "n_points": len(search.known),
        }

    def _criticality(self, best: Optimum) -> float:
        return (best.ratio / self.unit * self.change.delta_norm) ** 2
