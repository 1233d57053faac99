"""What is known of each model on each layer, and which models are paired: by the draws and images that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.comparison import Comparison
from layercrit.study.shards import StoredStudy
from layercrit.study.tables import Study

__all__ = ["Pairing", "Sample", "by_pairing", "paired_distances", "samples_of"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """What is known of one model on one layer.

    Attributes:
        means: of each trial, ``(n_trials,)``.
        keys: of its cells.
        trials: their numbers.
        seeds: of their draws; None where they are not known.
        images: number and hash of the images; None where the hash is not known.
        random: whether the reset is.
        every_image: whether the distances of single images are known.
    """

    means: Array
    keys: tuple[str, ...]
    trials: tuple[int, ...]
    seeds: tuple[int, ...] | None
    images: tuple[int, str] | None
    random: bool
    every_image: bool

    @property
    def is_recorded(self) -> bool:
        """Whether its draws and images are known, so that one can tell whether others have the same."""
        return self.seeds is not None and self.images is not None


def samples_of(
    store: StoredStudy, study: Study, comparison: Comparison, cells: pd.DataFrame, quantity: str
) -> dict[str, list[Sample]]:
    """Return layer -> the samples of its models; that of a model without a cell is empty."""
    records = dict(zip(study.models["model"], study.models["record"], strict=True))
    places = cells.groupby(["layer", "model"], sort=False).indices
    means = cells[quantity].to_numpy(np.float64)
    seeds, trials, keys = (cells[name].to_numpy() for name in ("seed", "trial", "key"))
    n_images = cells["n_images"].fillna(0).to_numpy(np.int64)
    with_images = store.keys_with_images()
    found: dict[str, list[Sample]] = {}
    for layer, model in product(comparison.criticality.columns, comparison.criticality.index):
        rows = places.get((layer, model), [])
        record: Mapping[str, Any] = records[model]
        sample = Sample(
            means=means[rows],
            keys=tuple(keys[rows]),
            trials=tuple(trials[rows]),
            seeds=None if pd.isna(seeds[rows]).any() else tuple(seeds[rows]),
            images=(n_images[rows].max(initial=0), record["probe_set"]) if record.get("probe_set") else None,
            random=record.get("random_trials", {}).get(comparison.reset, True),
            every_image=with_images.issuperset(keys[rows]),
        )
        found.setdefault(layer, []).append(sample)
    return found


@dataclass(frozen=True)
class Pairing:
    """What the models of a contrast have in common.

    Attributes:
        seeds: of the trials that all of them have; empty where the reset is not random, so that all trials are alike.
        images: number and hash.
        random: whether the reset is.
        every_image: whether the distances of single images are known of all.
    """

    seeds: tuple[int, ...]
    images: tuple[int, str]
    random: bool
    every_image: bool


def by_pairing(samples: Sequence[Sample], weights: Array) -> dict[Pairing | None, list[int]]:
    """Return how the models of each contrast are paired (None: not at all) -> the contrasts, those of known models."""
    kinds = [(sample.seeds, sample.images, sample.random, sample.every_image) for sample in samples]
    of_kind = dict(zip(kinds, samples, strict=True))
    found: dict[Pairing | None, list[int]] = {}
    known: dict[frozenset[Any], Pairing | None] = {}
    for row in np.flatnonzero(np.isfinite(weights).all(axis=1)).tolist():
        involved = frozenset(kinds[place] for place in weights[row].nonzero()[0])
        if involved not in known:
            known[involved] = _pairing([of_kind[kind] for kind in involved])
        found.setdefault(known[involved], []).append(row)
    return found


def _pairing(samples: Sequence[Sample]) -> Pairing | None:
    """Return what some models have in common, None where that is not enough to pair them."""
    images, random = {sample.images for sample in samples}, {sample.random for sample in samples}
    every_image = len(images) == 1 and all(sample.every_image for sample in samples)
    if len(random) > 1 or None in images or (len(images) > 1 and random == {False}):
        return None
    (chance,) = random
    asked = samples[0].images or (0, "")
    if not chance:
        return Pairing((), asked, chance, every_image)
    of_samples = [sample.seeds for sample in samples]
    common = [seed for seed in of_samples[0] or () if all(seed in (seeds or ()) for seeds in of_samples)]
    alike = all(seeds is not None and len(seeds) == len(common) for seeds in of_samples)
    return Pairing(tuple(common), asked, chance, every_image) if len(common) > 1 or (alike and common) else None


def paired_distances(store: StoredStudy, samples: Sequence[Sample], paired: Pairing, quantity: str) -> Array:
    """Return the distances of paired models, ``(n_models, n_trials, n_images)``; means if images are not known."""
    found = []
    for sample in samples:
        wanted = [sample.seeds.index(seed) for seed in paired.seeds] if sample.seeds else range(len(sample.keys))
        wanted = wanted if paired.random else range(len(sample.keys))
        if paired.every_image:
            of_cells = store.per_image([sample.keys[place] for place in wanted])
            trials = np.array([of_cells[sample.keys[place]][quantity] for place in wanted], np.float64)
        else:
            trials = sample.means[list(wanted), None]
        found.append(trials if paired.random else trials.mean(axis=0, keepdims=True))
    return np.array(found)
