"""The search of the path and the noise on it."""

import math

import numpy as np
import pytest

from layercrit.path_search import Excess, PathSearch

A = [place / 10 for place in range(11)]
S = np.geomspace(1e-3, 10, 21)


def searched(excess, a=A, s=S, width=0.0, **settings):
    """The search, given the mean excess loss as a function of place and noise."""
    search = PathSearch(a, s)
    questions = search.run(**settings)
    try:
        point = next(questions)
        while True:
            value = excess(search.a[point[0]], search.s[point[1]])
            point = questions.send(Excess(value, value - width, value + width))
    except StopIteration:
        return search


def quadratic(d, k, allowed):
    """Excess of the mean of 1/2 ||theta - theta_trained||^2 with k parameters, above what is allowed."""
    return lambda a, s: 0.5 * ((1 - a) ** 2 * d**2 + k * s**2) - allowed


@pytest.mark.parametrize("left", [0.1, 0.3, 0.5, 0.8])
def test_search__quadratic_loss(left):
    """mu = k (d^2 / (2 eps) - 1) at a = 1 - 2 eps / d^2."""
    d, k = 2.0, 50
    allowed = left * d**2 / 2
    best = searched(quadratic(d, k, allowed)).found["mean"]
    assert best.a == pytest.approx(1 - left)
    assert (best.ratio * d) ** 2 == pytest.approx(k * (d**2 / (2 * allowed) - 1))
    assert best.edge == ""


def test_search__quadratic_loss_that_is_allowed_at_the_initial_values():
    search = searched(quadratic(2.0, 50, 2.1))
    assert search.found["mean"].ratio == 0
    assert search.found["mean"].a == 0
    assert len(search.known) == 1


def slowly(excess, a, s):
    """The smallest a / s by looking at every point of the grid."""
    best = math.inf
    for place in a:
        values = np.array([excess(place, noise) for noise in s])
        kept = (values <= 0).nonzero()[0]
        if not len(kept):
            continue
        last = kept[-1]
        largest = s[last]
        if last + 1 < len(s):
            share = -values[last] / (values[last + 1] - values[last])
            largest = math.sqrt(s[last] ** 2 + share * (s[last + 1] ** 2 - s[last] ** 2))
        best = min(best, place / largest)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_search__finds_what_the_whole_grid_has(seed):
    """Any loss that rises with the noise, however it runs along the path."""
    generator = np.random.default_rng(seed)
    at_place = dict(zip(A, generator.uniform(-1, 2, len(A)) - 1.5 * np.array(A), strict=True))
    powers = dict(zip(A, generator.uniform(0.5, 3, len(A)), strict=True))

    def excess(a, s):
        return at_place[float(a)] + (5 * s) ** powers[float(a)]

    search = searched(excess, width=0.1)
    for limit, shift in (("mean", 0.0), ("low", -0.1), ("high", 0.1)):
        expected = slowly(lambda a, s, shift=shift: excess(a, s) + shift, A, S)
        assert search.found[limit].ratio == pytest.approx(expected), limit
    assert len(search.known) < 0.4 * len(A) * len(S)
    assert search.found["low"].ratio <= search.found["mean"].ratio <= search.found["high"].ratio
    assert search.share == 1


def test_search__edges_of_the_grid():
    most = searched(lambda a, s: 1.0 if a < 0.35 else -1.0).found["mean"]
    assert (most.a, most.s, most.edge) == (0.4, 10, "largest s")
    none = searched(lambda a, s: 1.0).found["mean"]
    assert math.isinf(none.ratio)
    assert none.edge == "smallest s"


def test_search__loss_without_a_value_is_not_allowed():
    best = searched(lambda a, s: math.inf if s > 0.1 else -1.0 if a == 1 else 1.0).found["mean"]
    assert best.s == S[S <= 0.1 * (1 + 1e-9)][-1]


def test_search__without_limits_asks_for_less():
    excess = quadratic(2.0, 50, 0.2)
    assert set(searched(excess, limits=False).found) == {"mean"}
    assert len(searched(excess, limits=False).known) < len(searched(excess, width=0.1).known)
