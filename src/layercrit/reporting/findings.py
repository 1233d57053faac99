"""What a family of models shows of the published study's trends, in words drawn from its numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from layercrit.comparison import Comparison
from layercrit.errors import StudyError

__all__ = ["Trend", "describe_family", "trends_of"]

_FAMILIES = {"training_recipes": "Improved recipes", "contrastive": "Self-supervised methods"}


@dataclass(frozen=True)
class Trend:
    """One trend of the published study, and what a family of models shows of it.

    Attributes:
        claim: what the published study finds, in words.
        sign: -1 where it finds less than the baseline has, 1 for more.
        differences: to the baseline, or from one budget to the next, of each model concerned, by its label.
        yardstick: how far apart baselines of unlike training seeds lie; smaller differences say nothing.
    """

    claim: str
    sign: int
    differences: Mapping[str, float]
    yardstick: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many models differ as published, how many the other way, and how many by less than the yardstick."""
        along = [self.sign * value for value in self.differences.values()]
        with_it = sum(value > self.yardstick for value in along)
        against = sum(value < -self.yardstick for value in along)
        return with_it, against, len(along) - with_it - against

    @property
    def verdict(self) -> str:
        """``agrees`` where all models do, ``agrees in part`` where some do, ``disagrees`` where some do the other way.

        ``does not decide`` where all differences are smaller than the yardstick.
        """
        with_it, against, undecided = self.counts
        if with_it:
            return "agrees in part" if against or undecided else "agrees"
        return "disagrees" if against else "does not decide"

    def sentence(self) -> str:
        """Return the trend, the verdict, and the numbers that it rests on."""
        listed = ", ".join(f"{label} {value:+.3f}" for label, value in self.differences.items())
        return f"{self.claim}: this study {self.verdict} ({self.counts[0]} of {len(self.differences)}; {listed})."


def trends_of(comparison: Comparison, budgets: Mapping[str, tuple[str, float]]) -> list[Trend]:
    """Return what a family of models shows of the trends that Gavrikov et al. 2024 find among 50 ResNet-50.

    Improved recipes and self-supervision lower the mean criticality and unload deep layers, adversarial training
    raises it with its budget. The baseline is the mean of all models of category ``baseline``.

    Args:
        comparison: of the models; a category without models has no trend.
        budgets: norm and eps of the adversarially trained models, by name.

    Raises:
        StudyError: no model is of category ``baseline``.
    """
    models = comparison.models
    baselines = models["category"] == "baseline"
    if not baselines.any():
        raise StudyError("No model is of category 'baseline', so there is nothing to compare the others with.")
    label = models["label"].where(models["label"].notna(), models.index.to_series())

    def differences(values: pd.Series, chosen: pd.Series) -> tuple[dict[str, float], float]:
        reference = values[baselines]
        of_models = values[chosen] - reference.mean()
        return dict(zip(label[chosen], map(float, of_models), strict=True)), float(reference.max() - reference.min())

    deep_stage = _last_stage(comparison)
    found = []
    for category, family in _FAMILIES.items():
        chosen = models["category"] == category
        found += [
            Trend(f"{family} lower {what}", -1, *differences(values, chosen))
            for what, values in (
                ("the mean criticality", models["criticality"]),
                ("the temperature-matched mean", models["criticality_matched"]),
                (f"the mean of the deepest stage ({deep_stage})", comparison.stages[deep_stage]),
            )
            if chosen.any() and values[chosen].notna().all()
        ]
    for norm in sorted({norm for norm, _ in budgets.values()}):
        by_budget = sorted(
            (eps, name) for name, (kind, eps) in budgets.items() if kind == norm and name in models.index
        )
        found += [
            _rising(f"Adversarial training ({norm}) raises {what} with eps", by_budget, values, baselines)
            for what, values in (
                ("the mean criticality", models["criticality"]),
                ("the temperature-matched mean", models["criticality_matched"]),
            )
            if by_budget and values.notna().all()
        ]
    return found


def _rising(claim: str, by_budget: list[tuple[float, str]], values: pd.Series, baselines: pd.Series) -> Trend:
    """Return whether criticality rises from each budget to the next, from the baseline's on."""
    reference = values[baselines]
    steps, before = {}, float(reference.mean())
    for eps, name in by_budget:
        value = float(values[name])
        steps[f"to eps {eps:g}"], before = value - before, value
    return Trend(claim, 1, steps, float(reference.max() - reference.min()))


def _last_stage(comparison: Comparison) -> str:
    """Return the deepest stage of more than one layer; the classifier alone is none."""
    stages = comparison.layers["stage"]
    sizes = stages.value_counts()
    return str([stage for stage in dict.fromkeys(stages) if sizes[stage] > 1 or len(sizes) == 1][-1])


def describe_family(comparison: Comparison, budgets: Mapping[str, tuple[str, float]]) -> str:
    """Return paragraphs that say what a family of models shows, trend by trend, and what it does not.

    Args:
        comparison: of the models.
        budgets: norm and eps of the adversarially trained models, by name.

    Raises:
        StudyError: no model is of category ``baseline``.
    """
    models = comparison.models
    baselines = models[models["category"] == "baseline"]["criticality"]
    trends = trends_of(comparison, budgets)
    rho = comparison.correlations
    (all_models,) = rho[rho["without"].isna() & (rho["method"] == "spearman")].to_dict("records")
    one_seed = len(baselines) < 2
    yardstick = (
        "There is one baseline only, so nothing says how far training seeds alone move these numbers."
        if one_seed
        else f"The {len(baselines)} baselines, which differ in their training seed alone, lie "
        f"{baselines.max() - baselines.min():.3f} apart: this is the yardstick, and smaller differences say nothing."
    )
    lines = [
        f"{len(models)} models of one architecture, {len(comparison.layers)} layers. {yardstick}",
        "",
        *(f"- {trend.sentence()}" for trend in trends),
        f"- Accuracy and mean criticality: Spearman's rho {all_models['statistic']:+.2f} "
        f"(p = {all_models['pvalue']:.2g}, {int(all_models['n'])} models).",
        "",
        "What this does not show: the networks are small, trained for a few epochs (recipes are made for hundreds) on "
        "one data set of 28 x 28 grey images, and each method but the baseline has one training seed, so a difference "
        "can owe to the seed as well as to the method. Where the trends of ResNet-50 on ImageNet are not seen here, "
        "that does not refute them; where they are, it does not confirm them for large networks.",
    ]
    return "\n".join(lines)
