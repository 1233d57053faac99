"""Which differences between models, or categories of them, are significant: layer by layer, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.comparison import Comparison, cells_of, compare, compare_models
from layercrit.conditions import under
from layercrit.contrasts import (
    Contrasts,
    benjamini_hochberg,
    contrasts_of_samples,
    crossed_contrasts,
    holm,
)
from layercrit.errors import StudyError, near
from layercrit.paired_samples import Sample, by_pairing, paired_distances, samples_of
from layercrit.protocol import MATCHED
from layercrit.study.shards import StoredStudy, open_study
from layercrit.study.tables import Study

__all__ = ["Differences", "condition_differences", "differences"]

Array = npt.NDArray[np.float64]
Pair = tuple[str, str]

_SAME_IMAGES = (
    "For some models only means over images are known: their intervals and tests hold for new trials on the same "
    "images."
)
_INDEPENDENT = (
    "Some models do not share their draws, as those of different architectures never do, or were shown other images: "
    "the trials of the two sides are treated as independent, and intervals hold for new trials on the same images."
)
_NOT_KNOWN = (
    "The seeds or the images of some models are not on record, as those of published results, so it is not known "
    "whether draws were shared: the trials of the two sides are treated as independent, and intervals hold for new "
    "trials on the same images. If draws were shared, these tests have less power than they could."
)
_COMMON = "Some models have more trials than others: their differences are taken over the trials that both sides have."
_THESE = "Intervals and tests hold for these models; another training seed may change a model by more than that."
_NEW = (
    "Intervals and tests treat the models of a category as a sample: they hold for new models of the category, under "
    "these draws and on these images."
)


@dataclass(frozen=True, eq=False, repr=False)
class Differences:
    """Differences of criticality, one for each pair and layer.

    Attributes:
        table: one row per pair and layer, pair by pair, layers in depth order: ``first``, ``second``, ``layer``,
            ``stage``, ``depth``, ``difference`` (first minus second, in [-1, 1]), ``low`` and ``high`` (its confidence
            limits), ``p_value`` (two-sided; NaN where nothing can be tested), ``p_holm`` and ``p_bh`` (adjusted within
            the family), ``covers`` (what intervals hold for), ``significant`` (``p_holm`` of at most alpha) and
            ``significant_bh``.
        alpha: level of the tests.
        family: which p-values were adjusted together: ``all``, or those of each ``pair``.
        baseline: the model that all others are compared with, or None.
        notes: what readers should know.
    """

    table: pd.DataFrame
    alpha: float
    family: Literal["all", "pair"]
    baseline: str | None
    notes: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Return one row per pair.

        The columns are ``difference`` (mean over layers), ``n_tested``, ``n_significant`` and ``n_significant_bh``.
        """
        pairs = self.table.groupby(["first", "second"], sort=False)
        return pairs.agg(
            difference=("difference", "mean"),
            n_tested=("p_value", "count"),
            n_significant=("significant", "sum"),
            n_significant_bh=("significant_bh", "sum"),
        ).reset_index()

    def sentence(self) -> str:
        """Say how many differences are significant."""
        to = f" to {self.baseline}" if self.baseline else ""
        of = "" if self.family == "all" else " within each pair"
        return (
            f"{self.table['significant'].sum():,} of {self.table['p_value'].count():,} differences{to} are significant "
            f"at the family-wise error rate {self.alpha:g}{of} (Holm), {self.table['significant_bh'].sum():,} at "
            f"the false discovery rate {self.alpha:g}{of} (Benjamini-Hochberg)."
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
    probe_set: str | None = None,
    norm_statistics: str | None = None,
    epoch: int | None = None,
) -> Differences:
    """Test the differences between models, or categories of models, layer by layer.

    Models that were measured under the same draws on the same images are paired in both: the interval holds for new
    trials and new images. If one has more trials, only those that all have are used. Where only means over images are
    known, the interval holds for new trials on the same images. Where draws or images are not known to be the same, the
    trials of the two sides are treated as independent samples (Welch's test); cells of one side that share a draw, or
    may share it (trials of one number), are averaged first.

    Args:
        study: finished or not.
        pairs: of names; ``all``: every pair; None: each model and the baseline, or every pair of categories.
        between: whether the names are of models or categories. A category stands for the mean of its models.
        unit: what intervals between categories hold for: new ``trials`` of these models, or new ``models`` of the
            categories. The second demands more, and needs at least two models of a category.
        family: which p-values are adjusted together: ``all``, or those of each ``pair``.
        matched: whether to use the temperature-matched criticality.
        alpha: level of the tests.
        baseline: as in `layercrit.compare`.
        leave_out: as in `layercrit.compare`.
        reset: as in `layercrit.compare`.
        probe_set: as in `layercrit.compare`.
        norm_statistics: as in `layercrit.compare`.
        epoch: as in `layercrit.compare`.

    Raises:
        StudyError: a name is unknown, there is no baseline, or a value asked for was not measured.

    Example:
        >>> import layercrit
        >>> study = layercrit.load_study("layercrit-demo/study")  # doctest: +SKIP
        >>> differences(study, pairs=[("pixmix", "baseline")]).table  # doctest: +SKIP
    """
    comparison = compare(
        study,
        baseline=baseline,
        leave_out=leave_out,
        reset=reset,
        probe_set=probe_set,
        norm_statistics=norm_statistics,
        epoch=epoch,
    )
    return compared_differences(
        study, comparison, pairs=pairs, between=between, unit=unit, family=family, matched=matched, alpha=alpha
    )


def condition_differences(
    study: Study,
    *,
    probe_set: str | None = None,
    norm_statistics: str | None = None,
    epoch: int | None = None,
    reset: str | None = None,
    leave_out: Sequence[str] | None = None,
    family: Literal["all", "pair"] = "all",
    matched: bool = False,
    alpha: float = 0.05,
) -> Differences:
    """Test what another condition changes, layer by layer: criticality under it minus that under the study's first one.

    Draws are the same under both and paired. So are images, unless the probe sets differ: intervals then hold for new
    trials on the same images.

    Args:
        study: finished or not.
        probe_set: of the other condition; None: the study's first.
        norm_statistics: of the other condition; None: what the study names first.
        epoch: of the other condition; None: the final weights.
        reset: as in `layercrit.compare`.
        leave_out: as in `layercrit.compare`.
        family: as in `differences`; a pair is a model under both conditions.
        matched: as in `differences`.
        alpha: as in `differences`.

    Raises:
        StudyError: the study has no such condition, only this one, or no model that was measured under both.
    """
    models, other = under(study.models, study.folder, probe_set=probe_set, norm_statistics=norm_statistics, epoch=epoch)
    first_models, first = under(study.models, study.folder)
    if other == first:
        raise StudyError(
            f"The study's first condition ({first.in_words() or 'its only one'}) cannot differ from itself. Name "
            f"another one: {'; '.join(one.in_words() for one in study.conditions[1:]) or 'the study has none'}."
        )
    sides = [
        compare_models(study, rows, condition, leave_out=leave_out, reset=reset).criticality.index
        for rows, condition in ((models, other), (first_models, first))
    ]
    own = {name: of or name for name, of in zip(study.models["model"], study.models["variant_of"], strict=True)}
    before = {own[name]: name for name in sides[1]}
    pairs = [(str(name), str(before[own[name]])) for name in sides[0] if own[name] in before]
    if not pairs:
        raise StudyError(f"No model of the study in {study.folder} was measured under both conditions. Run it first.")
    both = study.models[study.models["model"].isin([name for pair in pairs for name in pair])]
    comparison = compare_models(study, both, None, leave_out=[], reset=reset)
    return compared_differences(study, comparison, pairs=pairs, family=family, matched=matched, alpha=alpha)


def compared_differences(
    study: Study,
    comparison: Comparison,
    *,
    pairs: Sequence[Pair] | Literal["all"] | None = None,
    between: Literal["models", "categories"] = "models",
    unit: Literal["trials", "models"] = "trials",
    family: Literal["all", "pair"] = "all",
    matched: bool = False,
    alpha: float = 0.05,
) -> Differences:
    """Return what `differences` does, of the models, layers and baseline of a comparison of the study."""
    if unit == "models" and between == "models":
        raise StudyError(
            "The unit 'models' is for categories, not for single models: use between='categories' or unit='trials'."
        )
    cells = cells_of(study, comparison)
    quantity = MATCHED if matched else "cosine"
    if quantity not in cells or cells[quantity].isna().all():
        raise StudyError(
            "The study has no temperature-matched values, which need per-image predictions. Use matched=False."
        )
    chosen = _pairs(study, comparison, pairs, between)
    sides = [_members(comparison, [pair[side] for pair in chosen], between) for side in (0, 1)]
    found: list[dict[str, Any]] = []
    notes = [_NEW if unit == "models" else _THESE, *_about_fewer_models(comparison, between)]
    with open_study(study.folder) as store:
        for layer, samples in samples_of(store, study, comparison, cells[cells["status"] == "ok"], quantity).items():
            usable = comparison.criticality[layer].notna().to_numpy()
            if unit == "models":
                found.append(_over_models(sides, samples, usable, study.level))
            else:
                values, remarks = _over_trials(store, sides, samples, usable, quantity, study.level)
                found.append(values)
                notes += remarks
    to_baseline = comparison.baseline if pairs is None and between == "models" else None
    table = _table(comparison, chosen, found, family, alpha)
    return Differences(table, alpha, family, to_baseline, tuple(dict.fromkeys(notes)))


def _pairs(
    study: Study, comparison: Comparison, pairs: Sequence[Pair] | Literal["all"] | None, between: str
) -> list[Pair]:
    """Return the pairs of names, or say what is wrong with them."""
    known = [str(name) for name in (comparison.criticality if between == "models" else comparison.categories).index]
    if pairs is None and between == "models":
        if comparison.baseline is None:
            raise StudyError(f"The study in {study.folder} names no baseline to compare with. Name one, or give pairs.")
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


def _about_fewer_models(comparison: Comparison, between: str) -> list[str]:
    """Say on which layers a category's mean is over fewer of its models."""
    missing = comparison.criticality.isna()
    of_category = missing.groupby(comparison.models["category"])
    partly = of_category.any() & ~of_category.all()
    layers = list(partly.columns[partly.any()])
    if between == "models" or not layers:
        return []
    return [
        f"On {len(layers)} of {missing.shape[1]} layers a category's mean is over fewer of its models, since cells of "
        f"the others are not ok: {', '.join(layers[:5])}{' and more' if len(layers) > 5 else ''}."
    ]


def _weights(sides: Sequence[Array], usable: npt.NDArray[np.bool_]) -> Array:
    """Return the weight of each model in each pair, ``(n_pairs, n_models)``; NaN where a side has no model left."""
    with np.errstate(invalid="ignore"):
        first, second = (side * usable / (side * usable).sum(axis=1, keepdims=True) for side in sides)
    return np.asarray(first - second)


def _over_trials(
    store: StoredStudy,
    sides: Sequence[Array],
    samples: Sequence[Sample],
    usable: npt.NDArray[np.bool_],
    quantity: str,
    level: float,
) -> tuple[dict[str, Any], list[str]]:
    """Return the differences of one layer for new trials, and notes about them."""
    usable = usable & np.array([len(sample.means) > 0 and bool(np.isfinite(sample.means).all()) for sample in samples])
    weights = _weights(sides, usable)
    values, notes = _nothing(len(weights)), []
    for paired, rows in by_pairing(samples, weights).items():
        of_rows = weights[rows]
        if paired is None:
            _put(values, rows, _independent(samples, of_rows, level))
            pairs = [[samples[place] for place in row.nonzero()[0]] for row in of_rows]
            notes += [_INDEPENDENT if all(one.is_recorded for one in pair) else _NOT_KNOWN for pair in pairs]
            continue
        involved = (of_rows != 0).any(axis=0).nonzero()[0]
        distances = paired_distances(store, [samples[place] for place in involved], paired, quantity)
        contrasts = crossed_contrasts(distances, of_rows[:, involved], level=level, random_trials=paired.random)
        _put(values, rows, contrasts)
        notes += [_SAME_IMAGES] if not paired.every_image else []
        notes += [_COMMON] if any(len(samples[place].means) > len(paired.seeds or ()) > 0 for place in involved) else []
    return values, notes


def _independent(samples: Sequence[Sample], weights: Array, level: float) -> Contrasts:
    """Return contrasts of means over images, of models that are not paired.

    Models that share their draws make one sample, of their weighted sums; so do those of one side whose draws are not
    known, trial by trial, since draws of one number may be the same.
    """
    lone: list[tuple[int, list[list[int]]]] = []  # contrasts whose groups hold one model each
    grouped: list[tuple[int, list[list[int]]]] = []
    for row, of_models in enumerate(weights):
        groups: dict[Any, list[int]] = {}
        for place in of_models.nonzero()[0].tolist():
            sample = samples[place]
            key = (of_models[place] > 0, sample.trials) if sample.seeds is None else sample.seeds
            groups.setdefault(key, []).append(place)
        (lone if all(len(group) == 1 for group in groups.values()) else grouped).append((row, list(groups.values())))
    means = [sample.means for sample in samples]
    values = _nothing(len(weights))
    if lone:
        rows = [row for row, _ in lone]
        _put(values, rows, contrasts_of_samples(means, weights[rows], level=level))
    for row, groups_of_row in grouped:
        sums = [np.sum([weights[row, place] * means[place] for place in group], axis=0) for group in groups_of_row]
        _put(values, [row], contrasts_of_samples(sums, np.ones((1, len(sums))), level=level))
    return Contrasts(values["difference"], values["low"], values["high"], values["p_value"], "trials")


def _over_models(
    sides: Sequence[Array], samples: Sequence[Sample], usable: npt.NDArray[np.bool_], level: float
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
    return table.assign(significant=table["p_holm"] <= alpha, significant_bh=table["p_bh"] <= alpha)
