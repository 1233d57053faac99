"""What estimates of a study are made of: the values of its images in each trial, or only their means."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from layercrit.protocol import MATCHED
from layercrit.study.shards import StoredStudy

__all__ = ["means_of_trials", "values_per_image"]


def values_per_image(
    store: StoredStudy, keys: npt.NDArray[np.object_], trials: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return name -> ``(n_trials, n_images)`` of some cells, given by key and trial, the mean over those of a trial."""
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    for trial in np.unique(trials):
        of_trial = keys[trials == trial]
        sums: dict[str, npt.NDArray[np.float64]] = {}
        for key in of_trial:
            for name, values in store.per_image([key])[key].items():
                if name in ("cosine", MATCHED):
                    sums[name] = sums.get(name, 0.0) + values.astype(np.float64)
        for name, total in sums.items():
            found.setdefault(name, []).append(total / len(of_trial))
    return {name: np.stack(trials) for name, trials in found.items()}


def means_of_trials(
    means: Mapping[str, npt.NDArray[np.float64]], trials: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return name -> ``(n_trials, 1)`` of some cells of which only means are known, ``(n_cells,)`` each."""
    return {
        name: np.array([[values[trials == trial].mean()] for trial in np.unique(trials)])
        for name, values in means.items()
    }
