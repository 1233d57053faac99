"""Which differences between models, or categories of them, stand: layer by layer, with intervals and tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.comparison import Comparison, cells_of, compare
from layercrit.contrasts import Contrasts, benjamini_hochberg, contrasts_of_samples, crossed_contrasts, holm
from layercrit.errors import StudyError, near
from layercrit.store import Store
from layercrit.study import Study

__all__ = ["Differences", "differences"]

Array = npt.NDArray[np.float64]
Pair = tuple[str, str]

_MATCHED = "cosine_matched"
_SAME_IMAGES = (
    "Only means over images are known of some models: their intervals hold for new trials on the same images."
)
_INDEPENDENT = "Trials of these models are taken for independent draws, since their seeds are not known to be equal."
_THESE = "Intervals and tests hold for these models; another training seed may move a model by more than they say."
_NEW = "Intervals and tests take the models of a category for a sample of it, and hold for new models of its kind."


@dataclass(frozen=True, eq=False, repr=False)
class Differences:
    """Differences of criticality, one for each pair and layer.

    Attributes:
        table: one row per pair and layer, pair by pair, layers in depth order: ``first``, ``second``, ``layer``,
            ``stage``, ``depth``, ``difference`` (first minus second, in [-1, 1]), ``low`` and ``high`` (its confidence
            limits), ``p_value`` (two-sided; NaN where nothing can be tested), ``p_holm`` and ``p_bh`` (adjusted within
            the family), ``covers`` (what may be drawn anew), ``stands`` (``p_holm`` of at most alpha) and
            ``stands_bh``.
        alpha: level of the tests.
        baseline: the model that all differences are to, or None.
        notes: what a reader has to know.
    """

    table: pd.DataFrame
    alpha: float
    baseline: str | None
    notes: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Return one row per pair: ``difference`` (mean over layers), ``n_tested``, ``n_stand`` and ``n_stand_bh``."""
        pairs = self.table.groupby(["first", "second"], sort=False)
        return pairs.agg(
            difference=("difference", "mean"),
            n_tested=("p_value", "count"),
            n_stand=("stands", "sum"),
            n_stand_bh=("stands_bh", "sum"),
        ).reset_index()

    def sentence(self) -> str:
        """Return in words how many differences stand."""
        to = f" to {self.baseline}" if self.baseline else ""
        return (
            f"{self.table['stands'].sum():,} of {self.table['p_value'].count():,} differences{to} stand at the "
            f"family-wise error rate {self.alpha:g} (Holm), {self.table['stands_bh'].sum():,} at the false discovery "
            f"rate {self.alpha:g} (Benjamini-Hochberg)."
        )

    def __repr__(self) -> str:
        return f"<Differences: {self.sentence()}>"


def differences(
    study: Study,
    *,
    pairs: Sequence[Pair] | Literal["all"] | None = None,
    between: Literal["models", "categories"] = "models",
    unit: Literal["trials", "models"] = "trials",
    family: Literal["all", "pair"] = "all",
    matched: bool = False,
    alpha: float = 0.05,
    baseline: str | None = None,
    leave_out: Sequence[str] | None = None,
    reset: str | None = None,
) -> Differences:
    """Set models, or categories of models, against each other layer by layer.

    Two models that were measured under the same draws on the same images are paired in both: the interval holds for
    new trials and new images. Where only means over images are known, or draws or images differ, trials are taken for
    independent samples, and the interval holds for new trials (Welch's).

    Args:
        study: finished or not.
        pairs: of names; ``all``: every pair; None: each model and the baseline, or every pair of categories.
        between: what the names are of. Of a category its mean over models is taken.
        unit: of categories, what is drawn anew: ``trials``, these very models staying, or ``models``, new ones of the
            same kind. The second asks for more, and needs two models of a category at least.
        family: which p-values are adjusted together: ``all``, or those of each ``pair``.
        matched: whether the temperature-matched criticality is taken.
        alpha: level of the tests.
        baseline: as in `layercrit.compare`.
        leave_out: as in `layercrit.compare`.
        reset: as in `layercrit.compare`.

    Raises:
        StudyError: a name is unknown, there is no baseline, or a value asked for was not measured.

    Example:
        >>> import layercrit
        >>> study = layercrit.load_study("layercrit-demo/study")  # doctest: +SKIP
        >>> differences(study, pairs=[("pixmix", "baseline")]).table  # doctest: +SKIP
    """
    if unit == "models" and between == "models":
        raise StudyError("The unit 'models' is for categories: of two single models only trials can be drawn anew.")
    comparison = compare(study, baseline=baseline, leave_out=leave_out, reset=reset)
    cells = cells_of(study, comparison)
    quantity = _MATCHED if matched else "cosine"
    if quantity not in cells or cells[quantity].isna().all():
        raise StudyError("The study has no temperature-matched values: they need the predictions for single images.")
    chosen = _pairs(study, comparison, pairs, between)
    sides = [_members(comparison, [pair[side] for pair in chosen], between) for side in (0, 1)]
    found: list[dict[str, Any]] = []
    notes = [_NEW if unit == "models" else _THESE]
    with Store(study.folder) as store:
        for layer, samples in _samples(study, comparison, cells[cells["status"] == "ok"], quantity).items():
            usable = comparison.criticality[layer].notna().to_numpy()
            if unit == "models":
                found.append(_over_models(sides, samples, usable, study.level))
            else:
                values, remarks = _over_trials(store, sides, samples, usable, quantity, study.level)
                found.append(values)
                notes += remarks
    to_baseline = comparison.baseline if pairs is None and between == "models" else None
    table = _table(comparison, chosen, found, family, alpha)
    return Differences(table, alpha, to_baseline, tuple(dict.fromkeys(notes)))


def _pairs(
    study: Study, comparison: Comparison, pairs: Sequence[Pair] | Literal["all"] | None, between: str
) -> list[Pair]:
    """Return the pairs of names, or say what is wrong with them."""
    known = [str(name) for name in (comparison.criticality if between == "models" else comparison.categories).index]
    if pairs is None and between == "models":
        if comparison.baseline is None:
            raise StudyError(
                f"The study in {study.folder} names no baseline that differences could be to. Name one, or give pairs."
            )
        return [(name, comparison.baseline) for name in known if name != comparison.baseline]
    if pairs is None or pairs == "all":
        return list(combinations(known, 2))
    for name in (name for pair in pairs for name in pair):
        if name not in known:
            what = "model" if between == "models" else "category"
            raise StudyError(f"The study in {study.folder} compares no {what} {name!r}. {near(name, known)}")
    return [(str(first), str(second)) for first, second in pairs]


def _members(comparison: Comparison, names: Sequence[str], between: str) -> Array:
    """Return which models each name stands for, 1 or 0, ``(n_names, n_models)``."""
    known = comparison.models.index if between == "models" else comparison.models["category"]
    of_model = np.array([str(name) for name in known])
    return np.array([of_model == name for name in names], np.float64).reshape(len(names), len(of_model))


@dataclass(frozen=True)
class _Sample:
    """What is known of one model on one layer.

    Attributes:
        means: of each trial, ``(n_trials,)``.
        keys: of its cells.
        draws: what another model must have in common to be paired: trials and seeds, number and hash of the images,
            whether the reset is random; None where seeds are not known.
    """

    means: Array
    keys: tuple[str, ...]
    draws: tuple[Any, ...] | None


def _samples(study: Study, comparison: Comparison, cells: pd.DataFrame, quantity: str) -> dict[str, list[_Sample]]:
    """Return layer -> the samples of its models; that of a model without a cell is empty."""
    records = dict(zip(study.models["model"], study.models["record"], strict=True))
    places = cells.groupby(["layer", "model"], sort=False).indices
    means = cells[quantity].to_numpy(np.float64)
    seeds, trials, keys = (cells[name].to_numpy() for name in ("seed", "trial", "key"))
    n_images = cells["n_images"].fillna(0).to_numpy(np.int64)
    found: dict[str, list[_Sample]] = {}
    for layer, model in product(comparison.criticality.columns, comparison.criticality.index):
        rows = places.get((layer, model), [])
        record: Mapping[str, Any] = records[model]
        random = record.get("random_trials", {}).get(comparison.reset, True)
        images = n_images[rows].max(initial=0), record.get("probe_set")
        draws = None if pd.isna(seeds[rows]).any() else (tuple(trials[rows]), tuple(seeds[rows]), images, random)
        found.setdefault(layer, []).append(_Sample(means[rows], tuple(keys[rows]), draws))
    return found


def _weights(sides: Sequence[Array], usable: npt.NDArray[np.bool_]) -> Array:
    """Return the weight of each model in each pair, ``(n_pairs, n_models)``; NaN where a side has no model left."""
    with np.errstate(invalid="ignore"):
        first, second = (side * usable / (side * usable).sum(axis=1, keepdims=True) for side in sides)
    return np.asarray(first - second)


def _over_trials(
    store: Store,
    sides: Sequence[Array],
    samples: Sequence[_Sample],
    usable: npt.NDArray[np.bool_],
    quantity: str,
    level: float,
) -> tuple[dict[str, Any], list[str]]:
    """Return the differences of one layer for new trials, and what a reader has to know of them."""
    usable = usable & np.array([len(sample.means) > 0 and bool(np.isfinite(sample.means).all()) for sample in samples])
    weights = _weights(sides, usable)
    left = np.isfinite(weights).all(axis=1)
    values, notes = _nothing(len(weights)), []
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        if usable[place] and sample.draws is not None:
            groups.setdefault(sample.draws, []).append(place)
    for draws, group in groups.items():
        rows = left & (weights[:, ~np.isin(np.arange(len(samples)), group)] == 0).all(axis=1)
        if rows.any():
            distances = _distances(store, [samples[place] for place in group], quantity)
            _put(
                values,
                rows,
                crossed_contrasts(distances, weights[rows][:, group], level=level, random_trials=draws[-1]),
            )
            left &= ~rows
            notes += [_SAME_IMAGES] if distances.shape[2] == 1 else []
    if left.any():
        _put(values, left, contrasts_of_samples([sample.means for sample in samples], weights[left], level=level))
        notes += [_SAME_IMAGES, _INDEPENDENT]
    return values, notes


def _distances(store: Store, samples: Sequence[_Sample], quantity: str) -> Array:
    """Return the distances of models under the same draws, ``(n_models, n_trials, n_images)``; means if need be."""
    found = [store.per_image(sample.keys) for sample in samples]
    if all(quantity in of_model.get(key, {}) for of_model, one in zip(found, samples, strict=True) for key in one.keys):
        return np.array(
            [[of_model[key][quantity] for key in one.keys] for of_model, one in zip(found, samples, strict=True)],
            np.float64,
        )
    return np.array([sample.means for sample in samples])[:, :, None]


def _over_models(
    sides: Sequence[Array], samples: Sequence[_Sample], usable: npt.NDArray[np.bool_], level: float
) -> dict[str, Any]:
    """Return the differences of one layer for new models."""
    values = _nothing(len(sides[0]))
    means = np.array([sample.means.mean() if len(sample.means) else np.nan for sample in samples])
    of_side = [[means[usable & (members > 0)] for members in side] for side in sides]
    for row, (first, second) in enumerate(zip(*of_side, strict=True)):
        if len(first) and len(second):
            _put(values, slice(row, row + 1), contrasts_of_samples([first, second], np.array([[1, -1]]), level=level))
    values["covers"] = np.where(np.isnan(values["low"]), "nothing", "models")
    return values


def _nothing(n_pairs: int) -> dict[str, Any]:
    numbers = {name: np.full(n_pairs, np.nan) for name in ("difference", "low", "high", "p_value")}
    return numbers | {"covers": np.full(n_pairs, "nothing", dtype=object)}


def _put(values: dict[str, Any], rows: Any, found: Contrasts) -> None:
    for name, one in (("difference", found.mean), ("low", found.low), ("high", found.high), ("p_value", found.p_value)):
        values[name][rows] = one
    values["covers"][rows] = np.where(np.isnan(found.low), "nothing", found.covers)


def _table(
    comparison: Comparison, pairs: Sequence[Pair], found: Sequence[dict[str, Any]], family: str, alpha: float
) -> pd.DataFrame:
    """Return one row per pair and layer, with adjusted p-values."""
    layers = comparison.layers
    stacked = {name: np.stack([values[name] for values in found], axis=1) for name in found[0]}  # (n_pairs, n_layers)
    adjusted = {}
    for name, adjust in (("p_holm", holm), ("p_bh", benjamini_hochberg)):
        p_values = stacked["p_value"]
        adjusted[name] = (
            adjust(p_values.ravel()) if family == "all" else np.concatenate([*map(adjust, p_values), np.empty(0)])
        )
    table = pd.DataFrame(
        {
            "first": np.repeat([first for first, _ in pairs], len(layers)),
            "second": np.repeat([second for _, second in pairs], len(layers)),
            "layer": np.tile(layers.index.to_numpy(), len(pairs)),
            "stage": np.tile(layers["stage"].to_numpy(), len(pairs)),
            "depth": np.tile(np.arange(len(layers)), len(pairs)),
            **{name: stacked[name].ravel() for name in ("difference", "low", "high", "p_value")},
            **adjusted,
            "covers": stacked["covers"].ravel(),
        }
    )
    return table.assign(stands=table["p_holm"] <= alpha, stands_bh=table["p_bh"] <= alpha)
