"""Contrasts against the formulas written plainly, against SciPy, and by simulation."""

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from layercrit.contrasts import benjamini_hochberg, contrasts_of_samples, crossed_contrasts, holm
from layercrit.errors import ProtocolError
from layercrit.statistics import estimate


def drawn(n_models=3, n_trials=4, n_images=30, seed=0, sd_trials=0.05, sd_images=0.08, sd_rest=0.04):
    generator = np.random.default_rng(seed)
    trials = sd_trials * generator.normal(size=(n_models, n_trials, 1))
    images = sd_images * generator.normal(size=(n_models, 1, n_images))
    rest = sd_rest * generator.normal(size=(n_models, n_trials, n_images))
    return np.clip(0.5 + trials + images + rest, 0, 1)


WEIGHTS = np.array([[1, -1, 0], [0, -1, 1], [0.5, 0.5, -1], [-1, 1, 0]])


def plainly(d, level):
    """Mean, limits and p-value of weighted distances ``(n_trials, n_images)``: mean squares, and an integral over U."""
    n_trials, n_images = d.shape
    mean = d.mean()
    ss_trials = n_images * sum((d[r].mean() - mean) ** 2 for r in range(n_trials))
    ss_images = n_trials * sum((d[:, x].mean() - mean) ** 2 for x in range(n_images))
    ss_rest = sum(
        (d[r, x] - d[r].mean() - d[:, x].mean() + mean) ** 2 for r in range(n_trials) for x in range(n_images)
    )
    images, rest = ss_images / (n_images - 1), ss_rest / (n_trials - 1) / (n_images - 1)

    half_shares = np.logspace(-14, np.log10(0.5), 4000)
    shares = np.concatenate([half_shares, 1 - half_shares[-2::-1]])
    u = stats.chi2.ppf(shares, n_trials - 1)
    error = np.sqrt((np.maximum(ss_trials / u - rest, 0) + max(images, rest)) / (n_trials * n_images))

    def p_value(distance):
        return integrate.trapezoid(2 * stats.t.sf(distance / error, n_images - 1), shares)

    half = optimize.brentq(lambda x: p_value(x) - (1 - level), 1e-9, 1e6 * np.ptp(d), xtol=1e-12)
    return mean, mean - half, mean + half, p_value(abs(mean))


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("sd_trials", [0.0, 0.05])
def test_crossed_contrasts__is_the_analysis_of_the_weighted_distances(level, sd_trials):
    distances = drawn(sd_trials=sd_trials)
    found = crossed_contrasts(distances, WEIGHTS, level=level)
    for row, weights in enumerate(WEIGHTS):
        expected = plainly(np.einsum("m,mrx->rx", weights, distances), level)
        actual = found.mean[row], found.low[row], found.high[row], found.p_value[row]
        np.testing.assert_allclose(actual, expected, rtol=5e-4)
    assert found.covers == "trials and images"


@pytest.mark.parametrize(
    ("n_trials", "n_images", "sd_trials"), [(2, 40, 0.05), (3, 40, 0.0), (3, 40, 0.2), (10, 8, 0.05)]
)
def test_crossed_contrasts__the_interval_holds_what_the_test_does_not_reject(n_trials, n_images, sd_trials):
    d = drawn(1, n_trials, n_images, seed=8, sd_trials=sd_trials)
    found = crossed_contrasts(np.concatenate([d, 0 * d]), np.array([[1, -1]]), upper=99)
    for limit in (found.low[0], found.high[0]):
        shifted = crossed_contrasts(np.concatenate([d - limit, 0 * d]), np.array([[1, -1]]), upper=99)
        np.testing.assert_allclose(shifted.p_value[0], 0.05, rtol=1e-6)


def test_crossed_contrasts__where_trials_or_images_are_all_that_varies():
    generator = np.random.default_rng(9)
    trials = np.repeat(generator.normal(0.02, 0.05, (3, 1)), 2000, axis=1)
    images = np.repeat(generator.normal(0.02, 0.05, (1, 30)), 3, axis=0)
    weights = np.array([[1, -1]])
    for d, values, tolerance in ((trials, trials[:, 0], 2e-3), (images, images[0], 1e-6)):
        found = crossed_contrasts(np.stack([d, 0 * d]), weights)
        np.testing.assert_allclose(found.p_value[0], stats.ttest_1samp(values, 0).pvalue, rtol=tolerance)


def test_crossed_contrasts__is_about_as_wide_as_estimate_where_there_are_many_trials():
    d = drawn(2, n_trials=60, n_images=80, seed=3)
    shifted = np.stack([np.full_like(d[0], 0.25), (d[0] - d[1]) / 4 + 0.25])
    found = crossed_contrasts(shifted, np.array([[-1.0, 1.0]]))
    same = estimate(shifted[1])
    np.testing.assert_allclose(found.high[0] - found.low[0], same.high - same.low, rtol=0.02)
    np.testing.assert_allclose(found.mean[0], same.mean - 0.25, rtol=1e-9)


def test_crossed_contrasts__what_all_models_share_cancels():
    common = drawn(1, seed=1)[0]
    generator = np.random.default_rng(2)
    distances = np.stack([common, common + 0.01 + 1e-4 * generator.normal(size=common.shape)]).clip(0, 1)
    found = crossed_contrasts(distances, np.array([[-1, 1]]))
    np.testing.assert_allclose(
        (found.mean[0], found.low[0], found.high[0]), plainly(distances[1] - distances[0], 0.95)[:3], rtol=1e-4
    )
    assert found.p_value[0] < 1e-4
    apart = contrasts_of_samples(list(distances.mean(axis=2)), np.array([[-1, 1]]))
    assert apart.p_value[0] > 0.5, "unpaired, the difference drowns in what both have in common"


def test_crossed_contrasts__nearly_equal_models_keep_their_precision():
    distances = drawn(2, seed=4)
    distances[1] = distances[0] + 1e-6 * (distances[1] - 0.5)
    found = crossed_contrasts(distances, np.array([[1, -1]]))
    expected = plainly(distances[0] - distances[1], 0.95)
    np.testing.assert_allclose(found.high[0] - found.low[0], expected[2] - expected[1], rtol=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_crossed_contrasts__models_that_differ_by_a_constant_cannot_be_tested(shift):
    one = drawn(1, seed=5)[0] / 2
    found = crossed_contrasts(np.stack([one, one + shift]), np.array([[-1, 1]]))
    np.testing.assert_allclose((found.mean[0], found.low[0], found.high[0]), shift, atol=1e-12)
    assert np.isnan(found.p_value[0]), "no spread is no proof"


def test_crossed_contrasts__means_over_images():
    means = drawn(n_images=1, n_trials=5)
    found = crossed_contrasts(means, WEIGHTS)
    for row, weights in enumerate(WEIGHTS):
        expected = stats.ttest_1samp(np.einsum("m,mr->r", weights, means[:, :, 0]), 0)
        np.testing.assert_allclose(found.p_value[row], expected.pvalue, rtol=1e-9)
        np.testing.assert_allclose((found.low[row], found.high[row]), expected.confidence_interval(), rtol=1e-9)
    assert found.covers == "trials"


def test_crossed_contrasts__a_reset_without_chance():
    distances = np.repeat(drawn(n_trials=1), 3, axis=1)
    found = crossed_contrasts(distances, WEIGHTS[:1], random_trials=False)
    expected = stats.ttest_rel(distances[0, 0], distances[1, 0])
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-9)
    np.testing.assert_allclose((found.low[0], found.high[0]), expected.confidence_interval(), rtol=1e-9)
    assert found.covers == "images"


@pytest.mark.parametrize(("n_trials", "n_images", "random"), [(1, 20, True), (1, 1, True), (3, 1, False)])
def test_crossed_contrasts__too_little_to_tell(n_trials, n_images, random):
    distances = drawn(n_trials=n_trials, n_images=n_images)
    found = crossed_contrasts(distances, WEIGHTS, random_trials=random)
    np.testing.assert_allclose(found.mean, WEIGHTS @ distances.mean(axis=(1, 2)))
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert found.covers == "nothing"


def test_crossed_contrasts__limits_stay_within_what_is_possible():
    distances = np.stack([np.full((3, 4), 0.02), np.linspace(0.9, 1.0, 12).reshape(3, 4)])
    found = crossed_contrasts(distances, np.array([[1, -1], [-1, 1]]))
    assert found.low[0] >= -1
    assert found.high[1] <= 1


@pytest.mark.parametrize(
    ("distances", "weights", "text"),
    [
        (np.zeros((2, 3)), [[1, -1]], r"shape \(2, 3\).*expected \(n_models, n_trials, n_images\)"),
        (np.zeros((2, 3, 4)), [[1, -1, 0]], r"weights \(1, 3\): expected"),
        (np.full((2, 3, 4), np.nan), [[1, -1]], "NaN or infinite. Leave out cells"),
    ],
)
def test_crossed_contrasts__refuses(distances, weights, text):
    with pytest.raises(ProtocolError, match=text):
        crossed_contrasts(distances, np.array(weights))


def test_contrasts_of_samples__is_welchs_test():
    generator = np.random.default_rng(6)
    samples = [generator.normal(0.5, 0.1, 3), generator.normal(0.6, 0.02, 5), generator.normal(0.2, 0.1, 4)]
    found = contrasts_of_samples(samples, np.array([[1, -1, 0], [0, 1, -1]]))
    for row, (first, second) in enumerate([(0, 1), (1, 2)]):
        expected = stats.ttest_ind(samples[first], samples[second], equal_var=False)
        np.testing.assert_allclose(found.p_value[row], expected.pvalue, rtol=1e-9)
        np.testing.assert_allclose((found.low[row], found.high[row]), expected.confidence_interval(), rtol=1e-9)


def test_contrasts_of_samples__of_means_of_several():
    generator = np.random.default_rng(7)
    samples = [generator.normal(0.5, 0.1, 3) for _ in range(3)]
    parts = [w**2 * s.var(ddof=1) / 3 for w, s in zip((0.5, 0.5, -1), samples, strict=True)]
    variance = sum(parts)
    freedom = variance**2 / sum(part**2 / 2 for part in parts)
    mean = (samples[0].mean() + samples[1].mean()) / 2 - samples[2].mean()
    found = contrasts_of_samples(samples, np.array([[0.5, 0.5, -1]]))
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.p_value, 2 * stats.t.sf(abs(mean) / np.sqrt(variance), freedom))
    np.testing.assert_allclose(found.high - found.mean, stats.t.ppf(0.975, freedom) * np.sqrt(variance))


def test_contrasts_of_samples__one_value_has_no_spread():
    samples = [np.array([0.1]), np.array([0.2, 0.3]), np.array([0.5, 0.4])]
    found = contrasts_of_samples(samples, np.array([[-1, 1, 0], [0, 1, -1]]))
    np.testing.assert_allclose(found.mean, [0.15, -0.2])
    assert np.isnan([found.low[0], found.high[0], found.p_value[0]]).all()
    assert found.p_value[1] == pytest.approx(stats.ttest_ind([0.2, 0.3], [0.5, 0.4], equal_var=False).pvalue)


def test_contrasts_of_samples__no_spread_is_no_proof():
    found = contrasts_of_samples([np.full(3, 0.9), np.full(3, 0.2)], np.array([[1, -1]]))  # neither is exact in binary
    np.testing.assert_allclose((found.mean[0], found.low[0], found.high[0]), 0.7)
    assert np.isnan(found.p_value)


@pytest.mark.parametrize("n_trials", [2, 3, 10])
def test_crossed_contrasts__error_rate_without_a_difference(n_trials):
    """Two models that do not differ in the mean are found to differ in at most about 5 % of studies."""
    generator = np.random.default_rng(0)

    def effects(sd, *shape):
        return sd * generator.normal(size=shape)

    rejected = []
    for _ in range(1000):
        d = effects(0.05, 2, n_trials, 1) + effects(0.08, 2, 1, 50) + effects(0.04, 2, n_trials, 50)
        rejected.append(crossed_contrasts(0.5 + d, np.array([[1, -1]])).p_value[0] < 0.05)
    assert 0.02 < np.mean(rejected) < 0.055


@pytest.mark.parametrize("n_trials", [2, 3, 5])
def test_holm__controls_the_chance_of_any_error_where_trials_are_few(n_trials):
    """Of 54 layers without any difference, some is declared in at most about 5 % of studies, also of few trials."""
    generator = np.random.default_rng(n_trials)
    wrong = []
    for _ in range(150):
        d = 0.05 * generator.normal(size=(54, n_trials, 1)) + 0.08 * generator.normal(size=(54, 1, 50))
        d = d + 0.04 * generator.normal(size=(54, n_trials, 50))
        wrong.append((holm(crossed_contrasts(d, np.eye(54), upper=9).p_value) <= 0.05).any())
    assert np.mean(wrong) < 0.075


def test_holm__controls_the_chance_of_any_error():
    """Of 20 tests of layers without any difference, some is declared in at most about 5 % of studies."""
    wrong = []
    for seed in range(500):
        generator = np.random.default_rng(seed)
        samples = list(generator.normal(0.5, 0.05, (40, 4)))
        p_values = contrasts_of_samples(samples, np.eye(40)[::2] - np.eye(40)[1::2]).p_value
        wrong.append(((p_values < 0.05).any(), (holm(p_values) < 0.05).any()))
    alone, adjusted = np.mean(wrong, axis=0)
    assert alone > 0.4
    assert adjusted < 0.075


def step_down(p_values, alpha):
    """Which hypotheses Holm's procedure rejects, as its paper words it."""
    rejected = np.zeros(len(p_values), bool)
    for step, place in enumerate(np.argsort(p_values)):
        if p_values[place] > alpha / (len(p_values) - step):
            break
        rejected[place] = True
    return rejected


def step_up(p_values, q):
    """Which hypotheses the procedure of Benjamini and Hochberg rejects, as its paper words it."""
    order = np.argsort(p_values)
    passing = [rank for rank in range(1, len(order) + 1) if p_values[order[rank - 1]] <= rank / len(order) * q]
    rejected = np.zeros(len(p_values), bool)
    rejected[order[: max(passing, default=0)]] = True
    return rejected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("adjust", "procedure"), [(holm, step_down), (benjamini_hochberg, step_up)])
def test_adjusted__rejects_what_the_procedure_rejects(adjust, procedure, seed):
    p_values = np.random.default_rng(seed).random(30) ** 4
    adjusted = adjust(p_values)
    for alpha in (0.01, 0.05, 0.2, 0.5):
        np.testing.assert_array_equal(adjusted <= alpha, procedure(p_values, alpha))
    assert (adjusted >= p_values).all()
    assert (adjusted <= 1).all()


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_adjusted__what_was_not_tested_does_not_count(adjust):
    p_values = np.array([0.01, np.nan, 0.04, 0.03, np.nan])
    adjusted = adjust(p_values)
    assert np.isnan(adjusted[[1, 4]]).all()
    np.testing.assert_array_equal(adjusted[[0, 2, 3]], adjust(p_values[[0, 2, 3]]))
    assert np.isnan(adjust(np.array([np.nan]))).all()
    assert adjust(np.array([])).shape == (0,)
