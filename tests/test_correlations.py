"""Rank correlation of fresh draws with another way to reset layers."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from layercrit.correlations import rank_agreement


def test_rank_agreement__known_answers():
    draws = np.array([[0.1, 0.2, 0.3, 0.9, 0.95], [0.2, 0.3, 0.4, 0.8, 0.9]])
    same = rank_agreement(draws, np.array([0.0, 0.1, 0.5, 0.6, 0.7]))
    assert (same.rho, same.low, same.high, same.one_draw) == pytest.approx((1, 1, 1, 1))
    assert (same.n_layers, same.n_trials) == (5, 2)
    assert rank_agreement(draws, np.array([5.0, 4.0, 3.0, 2.0, 1.0])).rho == pytest.approx(-1)
    ties = np.array([0.0, 0.0, 1.0, 0.5, 0.5])
    assert rank_agreement(draws, ties).rho == pytest.approx(spearmanr(draws.mean(axis=0), ties).statistic)


def test_rank_agreement__what_is_not_known():
    draws = np.array([[0.1, 0.2, 0.3]])
    constant = rank_agreement(draws, np.zeros(3))
    assert np.isnan([constant.rho, constant.low, constant.high, constant.one_draw]).all()
    assert constant.to_dict()["rho"] is None
    assert rank_agreement(draws, draws[0]).to_dict() == {
        "rho": 1, "low": None, "high": None, "level": 0.95, "one_draw": None, "n_layers": 3, "n_trials": 1,
    }  # fmt: skip


def test_rank_agreement__one_draw_is_that_of_each_with_the_mean_of_the_others():
    draws = np.random.default_rng(1).uniform(size=(3, 8))
    plain = [spearmanr(draws[i], np.delete(draws, i, axis=0).mean(axis=0)).statistic for i in range(3)]
    assert rank_agreement(draws, draws[0]).one_draw == pytest.approx(np.mean(plain))


def test_rank_agreement__interval_covers_the_value_of_all_layers():
    """Layers with noise in both ways: of 60 intervals at 90%, most cover the rank correlation of the population.

    For normal values of correlation r, Spearman's rho is 6/pi * arcsin(r/2).
    """
    generator = np.random.default_rng(0)
    r = 0.7
    truth = 6 / np.pi * np.arcsin(r / 2)
    inside = []
    for _ in range(60):
        x = generator.normal(size=40)
        y = r * x + np.sqrt(1 - r**2) * generator.normal(size=40)
        found = rank_agreement(x + np.zeros((3, 1)), y, level=0.9)
        inside.append(found.low <= truth <= found.high)
    assert 0.78 <= np.mean(inside) <= 0.98


def test_rank_agreement__unlike_draws_widen_the_interval():
    generator = np.random.default_rng(0)
    truth = np.linspace(0, 1, 12)
    alike = rank_agreement(truth + np.zeros((4, 1)), truth)
    unlike = rank_agreement(truth + generator.normal(0, 0.5, (4, 12)), truth)
    assert unlike.high - unlike.low > 3 * (alike.high - alike.low)
