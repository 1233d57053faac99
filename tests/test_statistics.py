import json
import math
import statistics
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import torch

from layercrit.errors import ProtocolError
from layercrit.intervals import betting
from layercrit.statistics import ChanceLevel, estimate, estimate_mean_over_layers, fit_temperature

PUBLISHED = Path(__file__).parents[1] / ".." / "shared" / "published"


def crossed(
    rng: np.random.Generator, n_trials: int, n_images: int, sd: tuple[float, float, float], mean: float = 0.5
) -> np.ndarray:
    """Draw from the model distance[r, x] = mean + trial_r + image_x + rest; clipped evenly, so the mean stays 0.5."""
    trials, images = sd[0] * rng.standard_normal((n_trials, 1)), sd[1] * rng.standard_normal(n_images)
    return (mean + trials + images + sd[2] * rng.standard_normal((n_trials, n_images))).clip(0, 1)


def score_limits(mean: float, half_width: float, upper: float = 1.0) -> tuple[float, float]:
    """The two mu with (mean - mu)^2 = half_width^2 mu (upper - mu) / (mean (upper - mean)), by NumPy's roots."""
    share = half_width**2 / (mean * (upper - mean))
    low, high = sorted(np.roots([1 + share, -2 * mean - share * upper, mean**2]).real)
    return low, high


def twin_estimate(d: np.ndarray, level: float) -> dict[str, float]:
    """The table of the two-way analysis of variance, written out sum by sum."""
    n_trials, n_images = d.shape
    mean = sum(d[r, x] for r in range(n_trials) for x in range(n_images)) / (n_trials * n_images)
    of_trial = [sum(d[r]) / n_images for r in range(n_trials)]
    of_image = [sum(d[:, x]) / n_trials for x in range(n_images)]
    ms_trials = n_images * sum((t - mean) ** 2 for t in of_trial) / (n_trials - 1)
    ms_images = n_trials * sum((i - mean) ** 2 for i in of_image) / (n_images - 1)
    ms_rest = sum(
        (d[r, x] - of_trial[r] - of_image[x] + mean) ** 2 for r in range(n_trials) for x in range(n_images)
    ) / ((n_trials - 1) * (n_images - 1))
    variance_trials = max((ms_trials - ms_rest) / n_images, 0)
    variance_images = max((ms_images - ms_rest) / n_trials, 0)
    parts = [
        (variance_trials / n_trials, n_trials - 1),
        (variance_images / n_images, n_images - 1),
        (ms_rest / (n_trials * n_images), min(n_trials, n_images) - 1),
    ]
    variance = sum(part for part, _ in parts)
    quantile = sum(part * scipy.stats.t.ppf(0.5 + level / 2, df) for part, df in parts) / variance
    half_width = quantile * math.sqrt(variance)
    low, high = score_limits(mean, half_width)
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "sd_trial_effect": math.sqrt(variance_trials),
        "sd_image_effect": math.sqrt(variance_images),
        "sd_rest": math.sqrt(ms_rest),
    }


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize(
    "sd", [(0.1, 0.1, 0.1), (0.0, 0.2, 0.1), (0.3, 0.0, 0.05), (0.0, 0.0, 0.1), (1e-9, 1e-9, 1e-9)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 2), (2, 30), (3, 50), (10, 4)], ids=str)
def test_estimate__equals_the_anova_table(shape: tuple[int, int], sd: tuple[float, float, float], level: float) -> None:
    d = crossed(np.random.default_rng(0), *shape, sd)
    got = estimate(d, level=level)
    for name, value in twin_estimate(d, level).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-5, abs=1e-12), name
    assert (got.level, got.n_trials, got.n_images, got.covers) == (level, *shape, "trials and images")


def test_estimate__agreeing_trials_keep_the_few_degrees_of_freedom() -> None:
    """Without any trial effect MS_trials is below MS_rest; the interval then still counts on two degrees of freedom."""
    d = np.array([[0.1, 0.3, 0.5, 0.7], [0.3, 0.1, 0.7, 0.5], [0.2, 0.2, 0.6, 0.6]])
    got = estimate(d)
    assert got.sd_trial_effect == 0
    assert got.sd_rest > 0
    ms_images, ms_rest = 3 * d.mean(axis=0).var(ddof=1), got.sd_rest**2
    of_images, of_rest = (ms_images - ms_rest) / 12, ms_rest / 12
    quantiles = of_images * scipy.stats.t.ppf(0.975, 3) + of_rest * scipy.stats.t.ppf(0.975, 2)
    half_width = quantiles / math.sqrt(of_images + of_rest)
    assert (got.low, got.high) == pytest.approx(score_limits(got.mean, half_width))


CASES = {
    "balanced": (0.02, 0.15, 0.1),
    "trials dominate": (0.12, 0.05, 0.05),
    "images dominate": (0.002, 0.15, 0.05),
    "no trial effect": (0.0, 0.12, 0.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_images", [50, 200])
@pytest.mark.parametrize("n_trials", [3, 5, 10])
def test_estimate__intervals_cover_the_true_mean(n_trials: int, n_images: int, case: str) -> None:
    rng = np.random.default_rng(0)
    results = [estimate(crossed(rng, n_trials, n_images, CASES[case])) for _ in range(1500)]
    coverage = np.mean([one.low <= 0.5 <= one.high for one in results])
    assert 0.93 <= coverage <= 0.99  # 1500 repetitions tell 95 % within 1.1 points (two standard errors)


@pytest.mark.parametrize("n_trials", [3, 5, 10])
def test_estimate__without_any_effect_the_interval_is_wide_rather_than_short(n_trials: int) -> None:
    rng = np.random.default_rng(1)
    results = [estimate(crossed(rng, n_trials, 50, (0.0, 0.0, 0.1))) for _ in range(1000)]
    assert np.mean([one.low <= 0.5 <= one.high for one in results]) >= 0.97


def test_estimate__two_trials_cover_nearly_as_stated() -> None:
    rng = np.random.default_rng(2)
    results = [estimate(crossed(rng, 2, 50, (0.085, 0.15, 0.05))) for _ in range(1500)]
    assert np.mean([one.low <= 0.5 <= one.high for one in results]) >= 0.94


@pytest.mark.parametrize(
    ("sd", "n_trials", "least"),
    [((0.3, 1.5, 0.7), 3, 0.92), ((0.3, 1.5, 0.7), 10, 0.92), ((2.0, 1.0, 0.5), 3, 0.90), ((2.0, 1.0, 0.5), 10, 0.89)],
    ids=["skewed images, 3 trials", "skewed images, 10 trials", "skewed trials, 3", "skewed trials, 10"],
)
def test_estimate__coverage_of_skewed_distances(sd: tuple[float, float, float], n_trials: int, least: float) -> None:
    """Effects on the logistic scale pile up below 1; the documented loss of coverage is the loss there is."""
    mean = 1.5 if sd[0] < 1 else 3.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    true = weights @ scipy.special.expit(mean + math.hypot(*sd) * nodes) / weights.sum()
    rng = np.random.default_rng(4)
    results = []
    for _ in range(1500):
        effects = sd[0] * rng.standard_normal((n_trials, 1)) + sd[1] * rng.standard_normal(200)
        results.append(estimate(scipy.special.expit(mean + effects + sd[2] * rng.standard_normal((n_trials, 200)))))
    assert least <= np.mean([one.low <= true <= one.high for one in results]) <= 0.98


def test_estimate__components_are_those_simulated() -> None:
    rng = np.random.default_rng(3)
    results = [estimate(crossed(rng, 10, 100, (0.08, 0.12, 0.04))) for _ in range(400)]
    for name, sd in (("sd_trial_effect", 0.08), ("sd_image_effect", 0.12), ("sd_rest", 0.04)):
        assert np.mean([getattr(one, name) ** 2 for one in results]) == pytest.approx(sd**2, rel=0.05), name


def test_estimate__one_trial_of_a_random_reset_has_no_interval() -> None:
    got = estimate(np.array([[0.1, 0.2, 0.6]]))
    assert got.mean == pytest.approx(0.3)
    assert got.covers == "nothing"
    assert all(
        math.isnan(value) for value in (got.low, got.high, got.sd_trial_effect, got.sd_image_effect, got.sd_rest)
    )


@pytest.mark.parametrize("n_trials", [1, 3])
def test_estimate__reset_without_chance_covers_images(n_trials: int) -> None:
    images = np.array([0.1, 0.2, 0.6, 0.3])
    got = estimate(np.tile(images, (n_trials, 1)), random_trials=False)
    half_width = scipy.stats.t.ppf(0.975, 3) * images.std(ddof=1) / 2
    assert got.covers == "images"
    assert (got.sd_trial_effect, got.sd_rest) == (0, 0)
    assert got.sd_image_effect == pytest.approx(images.std(ddof=1))
    assert (got.low, got.high) == pytest.approx(score_limits(0.3, half_width))


def test_estimate__sd_of_trials_is_that_of_their_means() -> None:
    distances = np.array([[0.1, 0.3], [0.4, 0.8], [0.2, 0.2]])
    means = [0.2, 0.6, 0.2]
    assert estimate(distances).sd_trials == pytest.approx(statistics.stdev(means))
    assert estimate(distances).sd_trial_effect < statistics.stdev(means)
    assert estimate(distances, random_trials=False).sd_trials == 0
    assert math.isnan(estimate(distances[:1]).sd_trials)


def test_estimate__one_image_column_covers_trials() -> None:
    trials = np.array([0.70, 0.75, 0.62])
    got = estimate(trials[:, None])
    half_width = scipy.stats.t.ppf(0.975, 2) * trials.std(ddof=1) / math.sqrt(3)
    assert got.covers == "trials"
    assert got.sd_trial_effect == pytest.approx(trials.std(ddof=1))
    assert math.isnan(got.sd_image_effect)
    assert math.isnan(got.sd_rest)
    assert (got.low, got.high) == pytest.approx(score_limits(trials.mean(), half_width))


@pytest.mark.parametrize("random_trials", [True, False])
def test_estimate__a_single_value_has_no_interval(random_trials: bool) -> None:
    got = estimate(np.array([[0.4]]), random_trials=random_trials)
    assert got.mean == 0.4
    assert got.covers == "nothing"
    assert math.isnan(got.low)
    assert math.isnan(got.high)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("shape", [(3, 1), (3, 1000), (2, 7)], ids=str)
def test_estimate__equal_distances_give_an_interval_without_width(shape: tuple[int, int], value: float) -> None:
    got = estimate(np.full(shape, value))
    assert got.low == got.mean == got.high == value
    assert got.sd_trial_effect == 0


def test_estimate__identical_trials_leave_the_spread_of_images() -> None:
    images = np.random.default_rng(0).random(200)
    got = estimate(np.tile(images, (3, 1)))
    alone = estimate(images[None], random_trials=False)
    assert (got.low, got.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert got.sd_trial_effect == 0


def test_estimate__limits_stay_in_range() -> None:
    d = np.array([[0.0, 0.9], [1.0, 0.1], [0.9, 1.0]])
    got = estimate(d)
    assert 0 < got.low < got.mean < got.high < 1
    wide = estimate(d, upper=math.inf)
    assert wide.low == 0
    assert wide.high > 1


def test_estimate__limits_scale_with_the_largest_distance() -> None:
    d = crossed(np.random.default_rng(0), 3, 20, (0.2, 0.2, 0.1), mean=0.8)
    got, doubled = estimate(d), estimate(2 * d, upper=2.0)
    assert (doubled.low, doubled.high) == (pytest.approx(2 * got.low), pytest.approx(2 * got.high))
    assert got.mean - got.low > got.high - got.mean  # it reaches farther into the middle


def test_estimate__a_short_interval_is_students() -> None:
    d = 0.5 + 1e-4 * np.random.default_rng(0).standard_normal((3, 20))
    got, plain = estimate(d), estimate(d, upper=math.inf)
    assert (got.low - got.mean, got.high - got.mean) == pytest.approx(
        (plain.low - got.mean, plain.high - got.mean), rel=1e-3
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, bool])
def test_estimate__narrow_types_are_computed_in_float64(dtype: type) -> None:
    d = np.random.default_rng(0).random((3, 5000)).round().astype(dtype)
    assert estimate(d) == estimate(d.astype(np.float64))


def test_estimate__rounding_of_storage_is_taken_and_clipped() -> None:
    """ln 2 in float16 is above ln 2."""
    stored = np.full((3, 4), math.log(2)).astype(np.float16)
    assert float(stored[0, 0]) > math.log(2)
    assert estimate(stored, upper=math.log(2)).mean == math.log(2)
    assert estimate(np.full((3, 4), -1e-7)).mean == 0
    assert estimate(np.array([[-1e-4], [0.5], [1.0001]])).mean == pytest.approx(0.5, abs=1e-12)
    assert estimate(np.array([[-1e-4], [0.5], [0.5]])).mean == pytest.approx(1 / 3, abs=1e-12)


def test_estimate__order_of_trials_and_images_does_not_matter() -> None:
    d = crossed(np.random.default_rng(0), 4, 60, (0.1, 0.1, 0.1))
    a, b = estimate(d), estimate(d[::-1, ::-1])
    assert (a.mean, a.low, a.high) == (pytest.approx(b.mean), pytest.approx(b.low), pytest.approx(b.high))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_estimate__nan_is_an_error(bad: float) -> None:
    d = np.full((3, 4), 0.5)
    d[1, 2] = bad
    with pytest.raises(
        ProtocolError, match=r"1 of 12 distances are NaN or infinite, first at \(n_trials, n_images\) = \(1, 2\)"
    ):
        estimate(d)


@pytest.mark.parametrize("value", [-0.01, 1.01, 98.0])
def test_estimate__out_of_range_is_an_error(value: float) -> None:
    d = np.full((3, 4), 0.5)
    d[1, 2] = value
    with pytest.raises(ProtocolError, match=r"The distances lie in \[.*expected \[0, 1\]. Pass the `upper`"):
        estimate(d)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (3, 0), (2, 3, 4)], ids=str)
def test_estimate__wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"The distances have the shape .*: expected \(n_trials, n_images\)"):
        estimate(np.zeros(shape))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_estimate__wrong_level_is_an_error(level: float) -> None:
    with pytest.raises(ProtocolError, match=r"expected a number between 0 and 1, such as 0\.95"):
        estimate(np.zeros((3, 4)), level=level)


def test_estimate__betting_is_on_the_means_of_trials() -> None:
    d = crossed(np.random.default_rng(0), 8, 5, (0.1, 0.1, 0.1))
    got, students = estimate(d, level=0.9, interval="betting"), estimate(d, level=0.9)
    assert (got.low, got.high) == tuple(pytest.approx(float(end)) for end in betting(d.mean(axis=1), 0.9))
    assert (got.covers, got.level, got.mean, got.sd_trial_effect, got.sd_image_effect) == (
        "trials",
        0.9,
        students.mean,
        students.sd_trial_effect,
        students.sd_image_effect,
    )
    doubled = estimate(2 * d, upper=2.0, level=0.9, interval="betting")
    assert (doubled.low, doubled.high) == (pytest.approx(2 * got.low), pytest.approx(2 * got.high))


def test_estimate__betting_needs_no_second_trial_and_no_spread() -> None:
    one = estimate(np.array([[0.2, 0.4]]), interval="betting")
    assert (one.covers, one.low, one.high) == ("trials", 0, 1)
    alike = estimate(np.full((70, 4), 0.8), interval="betting")
    assert alike.high - alike.low == pytest.approx(0.1, abs=0.002)


def test_estimate__betting_limits_hold_the_mean_of_trials_that_drift() -> None:
    got = estimate(np.r_[np.ones(100), np.zeros(100)][:, None], interval="betting")
    assert got.low <= got.mean <= got.high


def test_estimate__betting_is_refused_where_it_means_nothing() -> None:
    d = np.full((3, 4), 0.5)
    with pytest.raises(ProtocolError, match=r"this reset is not random.*Use the interval 't'"):
        estimate(d, random_trials=False, interval="betting")
    with pytest.raises(ProtocolError, match=r"largest possible value is known.*Use the interval 't'"):
        estimate(d, upper=math.inf, interval="betting")
    with pytest.raises(ProtocolError, match=r"Unknown interval 'student'"):
        estimate(d, interval="student")


def test_estimate_mean_over_layers__betting_is_on_the_trials_that_layers_share() -> None:
    d = np.stack([crossed(np.random.default_rng(i), 12, 5, (0.1, 0.1, 0.1)) for i in range(4)])
    got = estimate_mean_over_layers(d, interval="betting")
    assert got == estimate(d.mean(axis=0), interval="betting")
    assert got.covers == "trials"


def test_estimate_mean_over_layers__averages_layers_first() -> None:
    rng = np.random.default_rng(0)
    d = np.stack([crossed(rng, 3, 40, (0.1, 0.1, 0.1)) for _ in range(6)])
    assert estimate_mean_over_layers(d, level=0.9) == estimate(d.mean(axis=0), level=0.9)
    assert estimate_mean_over_layers(d[:1]) == estimate(d[0])
    assert estimate_mean_over_layers(d, random_trials=False).covers == "images"
    assert estimate_mean_over_layers(2 * d, upper=2.0).mean == pytest.approx(2 * d.mean())


def test_estimate_mean_over_layers__shared_trials_do_not_average_out() -> None:
    """A bad donor moves all layers at once: 50 layers tell no more about it than one."""
    rng = np.random.default_rng(0)
    shared = 0.1 * rng.standard_normal((1, 3, 1))
    d = (0.5 + shared + 0.02 * rng.standard_normal((50, 3, 100))).clip(0, 1)
    whole, single = estimate_mean_over_layers(d), estimate(d[0])
    assert whole.high - whole.mean == pytest.approx(single.high - single.mean, rel=0.1)


def test_estimate_mean_over_layers__nan_names_the_layer() -> None:
    d = np.full((5, 3, 4), 0.5)
    d[4, 0, 1] = np.nan
    with pytest.raises(ProtocolError, match=r"first at \(n_layers, n_trials, n_images\) = \(4, 0, 1\)"):
        estimate_mean_over_layers(d)
    with pytest.raises(ProtocolError, match=r"expected \(n_layers, n_trials, n_images\)"):
        estimate_mean_over_layers(d[0])


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return criticality ``(n_layers, n_trials)`` of each model in the figures of the paper, and what is expected."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published results lie beside the working copy only (../shared/published)")
    table = pd.read_csv(PUBLISHED / "results.csv").query("model_id != 'resnet50_frozen_random'")
    cells = {
        model: 1 - rows.pivot_table(index="layer", columns="trial", values="pred_cos_sim").to_numpy()
        for model, rows in table.groupby("model_id")
    }
    return cells, json.loads((PUBLISHED / "expected.json").read_text())


def test_estimate_mean_over_layers__published_models(published) -> None:
    cells, expected = published
    wanted = expected["mean_criticality_percent_by_model"]
    assert len(wanted) == len(cells) == 50
    for model, d in cells.items():
        got = estimate_mean_over_layers(d[:, :, None])
        assert 100 * got.mean == pytest.approx(wanted[model], abs=1e-9)
        assert got.covers == "trials"
        assert got.low < got.mean < got.high


def test_estimate__published_spread_over_trials(published) -> None:
    cells, expected = published
    spread = [100 * estimate(trials[:, None]).sd_trial_effect for d in cells.values() for trials in d]
    assert np.mean(spread) == pytest.approx(expected["mean_of_cell_std_percent"], abs=1e-9)
    assert np.max(spread) == pytest.approx(expected["max_of_cell_std_percent"], abs=1e-9)


def mean_entropy(logits: torch.Tensor, temperature: float) -> float:
    p = (logits.double() / temperature).softmax(dim=1)
    return float(-torch.xlogy(p, p).sum(dim=1).mean())


@pytest.mark.parametrize("entropy", [1e-6, 0.1, 1.0, 2.2, math.log(10) - 1e-6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e6])
def test_fit_temperature__plugged_back_in(scale: float, entropy: float) -> None:
    logits = torch.randn(700, 10, generator=torch.Generator().manual_seed(0)) * scale
    temperature = fit_temperature(logits, entropy)
    assert mean_entropy(logits, temperature) == pytest.approx(entropy, rel=1e-8)


def test_fit_temperature__undoes_a_scaling() -> None:
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    entropy = mean_entropy(logits, 1.0)
    assert fit_temperature(logits, entropy) == pytest.approx(1.0, rel=1e-9)
    assert fit_temperature(logits * 7 + 100, entropy) == pytest.approx(7.0, rel=1e-9)


def test_fit_temperature__unreachable_entropy_is_nan() -> None:
    constant = torch.full((5, 4), 2.5)
    assert math.isnan(fit_temperature(constant, 0.5))
    two_best = torch.tensor([[1.0, 1.0, 0.0], [3.0, 3.0, -1.0]])  # never below ln 2
    assert math.isnan(fit_temperature(two_best, 0.69))
    assert fit_temperature(two_best, 0.70) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_fit_temperature__non_finite_logits_are_nan(bad: float) -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits[2, 1] = bad
    assert math.isnan(fit_temperature(logits, 0.5))


@pytest.mark.parametrize("entropy", [0.0, -1.0, math.log(4), 5.0, math.nan])
def test_fit_temperature__entropy_out_of_range_is_an_error(entropy: float) -> None:
    with pytest.raises(ProtocolError, match=r"expected one above 0 and below 1.38629.* 4 classes"):
        fit_temperature(torch.zeros(3, 4), entropy)


@pytest.mark.parametrize("shape", [(4,), (0, 4)], ids=str)
def test_fit_temperature__wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"expected \(n_images, n_classes\) with at least one image"):
        fit_temperature(torch.zeros(shape), 0.5)


@pytest.mark.parametrize("n_images", [2, 3, 60])
def test_chance_level__equals_the_mean_over_all_pairs(n_images: int) -> None:
    p = (torch.randn(n_images, 20, generator=torch.Generator().manual_seed(0)) * 3).softmax(dim=1)
    rows = p.double().numpy()
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in combinations(rows, 2)]
    level = ChanceLevel()
    for batch in (p[:1], p[1:7], p[7:]):
        level.add(batch)
    assert level.value == pytest.approx(np.mean(cosines), abs=1e-12)


def test_chance_level__of_equal_and_of_disjoint_predictions() -> None:
    same, disjoint = ChanceLevel(), ChanceLevel()
    same.add(torch.tensor([[0.2, 0.3, 0.5]]).repeat(9, 1))
    disjoint.add(torch.eye(9))
    assert same.value == pytest.approx(1.0, abs=1e-12)
    assert disjoint.value == pytest.approx(0.0, abs=1e-12)


def test_chance_level__of_equal_predictions_is_at_most_one() -> None:
    """Rounding would give 1.0000000000000002, so that an unrelated prediction were at the distance -0.000."""
    for n in range(2, 40):
        level = ChanceLevel()
        level.add(torch.tensor([[0.1, 0.2, 0.7]]).repeat(n, 1))
        assert 1 - 1e-12 < level.value <= 1


def test_chance_level__needs_two_images() -> None:
    level = ChanceLevel()
    assert math.isnan(level.value)
    level.add(torch.empty(0, 3))
    level.add(torch.ones(1, 3) / 3)
    assert math.isnan(level.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_chance_level__non_finite_predictions_give_nan(bad: float) -> None:
    level = ChanceLevel()
    level.add(torch.eye(3))
    level.add(torch.tensor([[bad, 0.5, 0.5]]))
    assert math.isnan(level.value)


def test_chance_level__other_number_of_classes_is_an_error() -> None:
    level = ChanceLevel()
    with pytest.raises(ProtocolError, match=r"expected \(n_images, n_classes\)"):
        level.add(torch.ones(3))
    level.add(torch.eye(3))
    with pytest.raises(ProtocolError, match=r"shape \(4, 4\): expected \(n_images, 3\)"):
        level.add(torch.eye(4))
