"""Interactions of pairs of layers: is resetting both worse than the sum of resetting each?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.contrasts import crossed_contrasts

__all__ = ["Pair", "interactions_of"]

_AT_ONCE = 64  # pairs, whose distances are copied in float64


@dataclass(frozen=True)
class Pair:
    """Two layers and the set of both, each as its place among what was reset."""

    first: int
    second: int
    both: int


def interactions_of(
    distances: npt.NDArray[np.float32],
    pairs: Sequence[Pair],
    *,
    level: float = 0.95,
    random_trials: bool = True,
) -> pd.DataFrame:
    """Return the interaction of each pair, ``c({i, j}) - c(i) - c(j)``, with its interval.

    A pair and its members share draws and images, so the sum is taken in each trial and image before it is averaged:
    what a draw or an image does to all three alike cancels. Above 0, the two resets together do more than the sum of
    both; below 0, less, as where each alone already does nearly all that can be done.

    Args:
        distances: ``(n_sets, n_trials, n_images)``, in [0, 1]; NaN in trials that are to be left out.
        pairs: whose interactions are wanted.
        level: confidence level, between 0 and 1.
        random_trials: whether the reset is random; if not, the interval is for new images.

    Returns:
        one row per pair: ``interaction`` in [-2, 1], ``low``, ``high``, ``p_value`` of the test that it is 0 (as in
        `layercrit.contrasts.crossed_contrasts`), ``criticality`` of both together, ``first`` and ``second`` of each
        alone, ``n_trials`` that all three have. NaN where they have none.
    """
    columns = ["interaction", "low", "high", "p_value", "criticality", "first", "second", "n_trials"]
    table = pd.DataFrame(np.nan, index=range(len(pairs)), columns=columns).astype({"n_trials": object})
    table["n_trials"] = 0
    known: npt.NDArray[np.bool_] = np.asarray(np.isfinite(distances).all(axis=2))  # (n_sets, n_trials)
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        common = (known[pair.first] & known[pair.second] & known[pair.both]).nonzero()[0]
        alike.setdefault(tuple(common.tolist()), []).append(place)
    for trials, places in alike.items():
        for start in range(0, len(places) if trials else 0, _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            found = _interactions(distances[:, trials], [pairs[place] for place in some], level, random_trials)
            table.loc[some, columns[:-1]] = np.stack([found[name] for name in columns[:-1]], axis=1)
            table.loc[some, "n_trials"] = len(trials)
    return table.astype({"n_trials": int})


def _interactions(
    distances: npt.NDArray[np.float32], pairs: Sequence[Pair], level: float, random_trials: bool
) -> Mapping[str, npt.NDArray[np.float64]]:
    used = sorted({place for pair in pairs for place in (pair.first, pair.second, pair.both)})
    at = {place: number for number, place in enumerate(used)}
    weights = np.zeros((len(pairs), len(used)))
    for row, pair in enumerate(pairs):
        for place, weight in ((pair.both, 1), (pair.first, -1), (pair.second, -1)):
            weights[row, at[place]] += weight
    values = distances[used].astype(np.float64)
    found = crossed_contrasts(values, weights, level=level, random_trials=random_trials, upper=2.0)
    means = values.mean(axis=(1, 2))
    return {
        "interaction": found.mean,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "criticality": means[[at[pair.both] for pair in pairs]],
        "first": means[[at[pair.first] for pair in pairs]],
        "second": means[[at[pair.second] for pair in pairs]],
    }
