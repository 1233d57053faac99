import re

import pytest

from layercrit.comparison import compare
from layercrit.errors import StudyError
from layercrit.reporting.findings import Trend, describe_family, trends_of
from layercrit.study.published import import_published
from layercrit.study.store import ModelRow
from published_results import RELEASED, measured, released

LAYERS = ("conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc")
DEEP = ("layer2.0", "layer2.1")


def family(folder, **criticality):
    """A study whose layers are as critical as said, but for the deepest stage, which is half as critical.

    Args:
        folder: of the study.
        criticality: by name; names begin with their category.
    """
    categories = {"base": "baseline", "recipe": "training_recipes", "ssl": "contrastive", "pgd": "adversarial_training"}
    known = {"random_trials": {"rerandomize": True}}
    models = [
        ModelRow(name, f"py:{name}", categories.get(name.rstrip("0123456789"), "augmentation"), None, 0.9, known)
        for name in criticality
    ]
    cells = [
        {"model": name, "layer": layer, "trial": trial, "cosine": value / (1 + (layer in DEEP)), "cosine_matched": 0.5}
        for name, value in criticality.items() for layer in LAYERS for trial in range(2)
    ]  # fmt: skip
    return compare(measured(folder, cells, models=models))


def test_trends_of__differences_are_to_the_mean_of_the_baselines(tmp_path):
    comparison = family(tmp_path, base0=0.6, base1=0.5, recipe0=0.3, recipe1=0.52)
    first, matched, deep = trends_of(comparison, {})
    share = (4 + 2 / 2) / 6  # of a mean over layers, two of six are half as critical
    assert first.differences == pytest.approx({"recipe0": -0.25 * share, "recipe1": -0.03 * share})
    assert first.yardstick == pytest.approx(0.1 * share)
    assert deep.differences == pytest.approx({"recipe0": -0.125, "recipe1": -0.015})
    assert "layer2" in deep.claim
    assert matched.differences == pytest.approx({"recipe0": 0, "recipe1": 0}, abs=1e-7)
    assert [trend.verdict for trend in (first, matched, deep)] == [
        "agrees in part",
        "is inconclusive",
        "agrees in part",
    ]
    assert first.counts == (1, 0, 1)


@pytest.mark.parametrize(
    ("differences", "verdict", "counts"),
    [
        ({"a": -0.2, "b": -0.11}, "agrees", (2, 0, 0)),
        ({"a": -0.2, "b": -0.05}, "agrees in part", (1, 0, 1)),
        ({"a": -0.2, "b": 0.3}, "agrees in part", (1, 1, 0)),
        ({"a": 0.05, "b": -0.05}, "is inconclusive", (0, 0, 2)),
        ({"a": 0.05, "b": 0.2}, "disagrees", (0, 1, 1)),
        ({"a": 0.2}, "disagrees", (0, 1, 0)),
    ],
)
def test_trend__verdict_asks_for_more_than_the_yardstick(differences, verdict, counts):
    lower = Trend("Recipes lower it", -1, differences, 0.1)
    assert (lower.verdict, lower.counts) == (verdict, counts)
    higher = Trend("It rises", 1, {name: -value for name, value in differences.items()}, 0.1)
    assert (higher.verdict, higher.counts) == (verdict, counts)
    assert lower.sentence().startswith(f"Recipes lower it: this study {verdict} ({counts[0]} of {len(differences)}; a ")


def test_trends_of__budgets_are_steps_from_the_baseline_on(tmp_path):
    comparison = family(tmp_path, base0=0.4, base1=0.4, pgd1=0.6, pgd2=0.5, pgd3=0.7, pgd4=0.6)
    budgets = {
        "pgd2": ("l2", 0.5),
        "pgd1": ("l2", 1.0),
        "pgd3": ("linf", 8.0),
        "pgd4": ("linf", 16.0),
        "gone": ("l2", 9),
    }
    l2, matched, linf, _ = trends_of(comparison, budgets)
    share = 5 / 6
    assert l2.differences == pytest.approx({"to eps 0.5": 0.1 * share, "to eps 1": 0.1 * share})
    assert linf.differences == pytest.approx({"to eps 8": 0.3 * share, "to eps 16": -0.1 * share})
    assert matched.differences == pytest.approx({"to eps 0.5": 0, "to eps 1": 0}, abs=1e-7)
    assert (l2.verdict, linf.verdict) == ("agrees", "agrees in part")


def test_describe_family__says_what_the_numbers_say(tmp_path):
    text = describe_family(family(tmp_path, base0=0.6, base1=0.5, recipe0=0.3, ssl0=0.9), {})
    assert "4 models of one architecture, 6 layers." in text
    assert "The 2 baselines, which differ only in their training seed, lie 0.083 apart" in text
    assert "Improved recipes lower the mean criticality: this study agrees (1 of 1; recipe0 -0.208)." in text
    assert "Self-supervised methods lower the mean criticality: this study disagrees (0 of 1; ssl0 +0.292)." in text
    assert "Adversarial" not in text
    assert "What this does not show" in text


def test_describe_family__one_baseline_has_no_yardstick(tmp_path):
    assert "There is only one baseline" in describe_family(family(tmp_path, base0=0.6, recipe0=0.3), {})


def test_trends_of__needs_a_baseline(tmp_path):
    with pytest.raises(StudyError, match="No model has the category 'baseline'"):
        trends_of(family(tmp_path, recipe0=0.3, ssl0=0.2), {})


@released
def test_trends_of__the_published_study_shows_its_own_trends(tmp_path):
    study = import_published(RELEASED / "results.csv", tmp_path / "study", RELEASED / "models.csv")
    comparison = compare(study)
    names = (re.fullmatch(r"robust_resnet50_(l2|linf)_eps(.+)", name) for name in comparison.models.index)
    budgets = {match[0]: (match[1], float(match[2])) for match in names if match}
    trends = {trend.claim: trend for trend in trends_of(comparison, budgets)}
    assert trends["Improved recipes lower the mean criticality"].verdict == "agrees"
    contrastive = trends["Self-supervised methods lower the mean criticality"]
    assert contrastive.verdict == "agrees in part"  # all but SimCLRv2
    assert [label for label, value in contrastive.differences.items() if value > 0] == ["SimCLRv2"]
    assert trends["Adversarial training (linf) raises the mean criticality with eps"].verdict == "agrees"
    assert trends["Improved recipes lower the mean of the deepest stage (model.layer4)"].verdict == "agrees"
