import math

import numpy as np
import pytest
import scipy.stats

from layercrit.errors import ProtocolError
from layercrit.intervals import INTERVALS, betting, check_interval, check_level, excluded_share, half_width, limits


def test_half_width__of_one_source_is_students_and_of_two_between_theirs() -> None:
    one = [float(half_width([(0.01, df)], 0.9)) for df in (2, 50)]
    assert one == pytest.approx([0.1 * scipy.stats.t.ppf(0.95, df) for df in (2, 50)])
    both = float(half_width([(0.005, 2), (0.005, 50)], 0.9))
    assert both == pytest.approx(sum(one) / 2)
    assert float(half_width([(0.01, 50), (0.0, 2)], 0.9)) == pytest.approx(one[1])
    assert float(half_width([(0.0, 2), (0.0, 50)])) == 0


def test_half_width__of_many_means_are_those_of_each() -> None:
    trials, images = np.array([[0.01], [0.0], [math.nan]]), np.array([0.0, 1e-300, 0.02])
    found = half_width([(trials, 2), (images, 30)])
    assert found.shape == (3, 3)
    for i, j in np.ndindex(3, 3):
        assert found[i, j] == pytest.approx(float(half_width([(trials[i, 0], 2), (images[j], 30)])), nan_ok=True)


def test_limits__of_many_means_are_those_of_each() -> None:
    means, reach = np.linspace(0, 1, 11), np.linspace(0.1, 0.0, 11)
    low, high = limits(means, reach)
    for i in range(11):
        assert (low[i], high[i]) == limits(means[i], reach[i])


def test_limits__are_wilsons_for_a_share() -> None:
    """16 of 20 with the normal quantile 1.96: [0.5840, 0.9193] (scipy.stats.binomtest, method wilson)."""
    expected = scipy.stats.binomtest(16, 20).proportion_ci(method="wilson")
    low, high = limits(0.8, scipy.stats.norm.ppf(0.975) * math.sqrt(0.8 * 0.2 / 20))
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e-12, 0.3, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("reach", [0.0, 1e-200, 1e-9, 0.1, 10.0])
@pytest.mark.parametrize("upper", [1.0, 0.7, math.inf])
def test_limits__hold_the_mean_and_stay_in_range(mean: float, reach: float, upper: float) -> None:
    mean = min(mean, upper)
    low, high = limits(mean, reach, upper)
    assert 0 <= low <= mean <= high <= upper
    if reach == 0:
        assert low == mean == high


def test_limits__of_nothing_are_nan() -> None:
    for upper in (1.0, math.inf):
        assert np.isnan(limits(0.5, math.nan, upper)).all()


def twin_kept(x: list[float], m: float, level: float) -> bool:
    """Whether the hedged capital leaves a mean m in the interval: the formulas, draw by draw."""
    alpha, above, below, seen, squares, variance = 1 - level, 1.0, 1.0, 0.0, 0.0, 0.25
    for t, draw in enumerate(x, start=1):
        stake = math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(1 + t)))
        above *= 1 + min(stake, math.inf if m == 0 else 1 / (2 * m)) * (draw - m)
        below *= 1 - min(stake, math.inf if m == 1 else 1 / (2 * (1 - m))) * (draw - m)
        seen += draw
        squares += (draw - (0.5 + seen) / (t + 1)) ** 2
        variance = (0.25 + squares) / (t + 1)
    return max(above, below) / 2 < 1 / alpha


DRAWS = {
    "spread": lambda rng, n: rng.random(n),
    "near 1": lambda rng, n: rng.beta(8, 1, n),
    "0 or 1": lambda rng, n: (rng.random(n) < 0.3).astype(float),
    "close together": lambda rng, n: 0.4 + 0.02 * rng.random(n),
    "all 0": lambda rng, n: np.zeros(n),
    "all 1": lambda rng, n: np.ones(n),
}


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 80])
@pytest.mark.parametrize("draws", DRAWS)
def test_betting__keeps_the_means_that_the_formulas_keep(draws: str, n: int, level: float) -> None:
    x = DRAWS[draws](np.random.default_rng(0), n)
    low, high = betting(x, level)
    for m in np.linspace(0, 1, 401):
        if min(abs(m - low), abs(m - high)) > 1e-9:
            assert (low < m < high) == twin_kept(list(x), float(m), level), m
    assert 0 <= low <= high <= 1
    for end, outwards in ((low, -1), (high, 1)):
        if 0 < end < 1:
            assert twin_kept(list(x), end - 1e-9 * outwards, level)
            assert not twin_kept(list(x), end + 1e-9 * outwards, level)


def test_betting__many_rows_at_once_are_the_rows() -> None:
    x = np.random.default_rng(0).beta(4, 2, (3, 5, 20))
    low, high = betting(x)
    assert low.shape == high.shape == (3, 5)
    for place in np.ndindex(3, 5):
        assert (low[place], high[place]) == betting(x[place])


def test_betting__mirrors() -> None:
    x = np.random.default_rng(0).beta(8, 2, 30)
    low, high = betting(x)
    assert betting(1 - x) == (pytest.approx(1 - high, abs=1e-12), pytest.approx(1 - low, abs=1e-12))


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: np.full(shape, 0.5),
        lambda rng, shape: rng.normal(0.5, 0.04, shape),
        lambda rng, shape: rng.normal(0.8, 0.068, shape).clip(0, 1),
    ],
    ids=["all alike", "SD 0.04", "SD 0.068 near 0.8"],
)
def test_betting__a_half_width_of_5_points_takes_65_to_88_trials(draw) -> None:
    x = draw(np.random.default_rng(0), (200, 88))
    half_widths = [np.mean(np.subtract(*betting(x[:, :n])[::-1])) / 2 for n in (64, 88)]
    assert half_widths[0] > 0.05 > half_widths[1]


@pytest.mark.parametrize("n", [3, 10, 100])
def test_betting__covers_where_draws_are_rarely_unlike(n: int) -> None:
    """3 % of draws are far below the others: Student's t of ten draws covers the mean in 27 % of cases."""
    rng = np.random.default_rng(0)
    rare = rng.random((2000, n)) < 0.03
    x = np.where(rare, rng.normal(0.4, 0.1, rare.shape), rng.normal(0.95, 0.01, rare.shape)).clip(0, 1)
    low, high = betting(x)
    assert np.mean((low <= 0.9335) & (high >= 0.9335)) >= 0.95


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf], ids=str)
def test_betting__values_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(ProtocolError, match=r"expected \[0, 1\].*use the interval 't'"):
        betting(np.array([0.5, bad, 0.5]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_betting__no_values_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"expected \(\.\.\., n_draws\)"):
        betting(np.zeros(shape))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_check_level__what_is_no_level_is_refused_everywhere(level: float) -> None:
    for refused in (check_level, lambda level: betting(np.ones(3), level), lambda level: excluded_share(3, level)):
        with pytest.raises(ProtocolError, match=r"between 0 and 1, such as 0\.95"):
            refused(level)


def test_check_interval__near_names_are_named() -> None:
    assert INTERVALS == ("t", "betting")
    for name in INTERVALS:
        check_interval(name)
    with pytest.raises(ProtocolError, match=r"Unknown interval 'beting'.*betting"):
        check_interval("beting")


@pytest.mark.parametrize("n", [1, 3, 10, 200])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_excluded_share__is_unseen_as_often_as_the_interval_errs_on_a_side(n: int, level: float) -> None:
    assert (1 - excluded_share(n, level)) ** n == pytest.approx((1 - level) / 2)


def test_excluded_share__is_about_3_7_over_n() -> None:
    assert 1000 * excluded_share(1000) == pytest.approx(3.7, rel=0.01)


def test_excluded_share__no_trial_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected at least 1"):
        excluded_share(0)
