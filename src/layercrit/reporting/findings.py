"""Which trends of the published study a family of models shows, in words that follow from its numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from layercrit.comparison import Comparison
from layercrit.counts import counted
from layercrit.errors import StudyError

__all__ = ["Trend", "describe_family", "trends_of"]

_FAMILIES = {"training_recipes": "Improved recipes", "contrastive": "Self-supervised methods"}


@dataclass(frozen=True)
class Trend:
    """One trend of the published study, and whether a family of models shows it.

    Attributes:
        claim: what the published study finds, in words.
        sign: -1 where it finds less than in the baseline, 1 for more.
        differences: to the baseline, or from one budget to the next, of each model concerned, by its label.
        yardstick: how far apart baselines with different training seeds lie; smaller differences are within seed noise.
    """

    claim: str
    sign: int
    differences: Mapping[str, float]
    yardstick: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many models differ as published, how many the other way, and how many are within seed noise."""
        along = [self.sign * value for value in self.differences.values()]
        with_it = sum(value > self.yardstick for value in along)
        against = sum(value < -self.yardstick for value in along)
        return with_it, against, len(along) - with_it - against

    @property
    def verdict(self) -> str:
        """``agrees`` if all models do, ``agrees in part`` if some do, ``disagrees`` if some differ the other way.

        ``is inconclusive`` if all differences are within seed noise.
        """
        with_it, against, undecided = self.counts
        if with_it:
            return "agrees in part" if against or undecided else "agrees"
        return "disagrees" if against else "is inconclusive"

    def sentence(self) -> str:
        """Return the trend, the verdict, and the numbers behind it."""
        listed = ", ".join(f"{label} {value:+.3f}" for label, value in self.differences.items())
        return f"{self.claim}: this study {self.verdict} ({self.counts[0]} of {len(self.differences)}; {listed})."


def trends_of(comparison: Comparison, budgets: Mapping[str, tuple[str, float]]) -> list[Trend]:
    """Return whether a family of models shows the trends that Gavrikov et al. 2024 find among 50 ResNet-50s.

    Improved recipes and self-supervision lower the mean criticality and make deep layers less critical; adversarial
    training raises it with its budget. The baseline is the mean of all models of category ``baseline``.

    Args:
        comparison: of the models; a category without models has no trend.
        budgets: norm and eps of the adversarially trained models, by name.

    Raises:
        StudyError: no model is of category ``baseline``.
    """
    models = comparison.models
    baselines = models["category"] == "baseline"
    if not baselines.any():
        raise StudyError(
            "No model has the category 'baseline', so there is nothing to compare the others with. Give it to one."
        )
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
    """Return paragraphs that say which trends a family of models shows, and what this does not show.

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
        "There is only one baseline, so it is not known how far the training seed alone moves these numbers."
        if one_seed
        else f"The {len(baselines)} baselines, which differ only in their training seed, lie "
        f"{baselines.max() - baselines.min():.3f} apart: smaller differences are within seed noise."
    )
    lines = [
        f"{counted(len(models), 'model')} of one architecture, {counted(len(comparison.layers), 'layer')}. {yardstick}",
        "",
        *(f"- {trend.sentence()}" for trend in trends),
        f"- Accuracy and mean criticality: Spearman's rho {all_models['statistic']:+.2f} "
        f"(p = {all_models['pvalue']:.2g}, {counted(int(all_models['n']), 'model')}).",
        "",
        "What this does not show: the networks are small, trained for a few epochs (recipes are made for hundreds) on "
        "one data set of 28 x 28 grey images, and each method but the baseline has one training seed, so a difference "
        "may be due to the seed as well as to the method. A trend of ResNet-50 on ImageNet that is absent here is not "
        "refuted, and one that is present is not confirmed for large networks.",
    ]
    return "\n".join(lines)
