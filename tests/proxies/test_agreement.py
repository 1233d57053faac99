"""Rank correlations of proxies with exact values: scipy's, plain loops, and what is known beforehand."""

import math
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from layercrit.correlations import spearman
from layercrit.errors import ProtocolError
from layercrit.proxies.agreement import Exact, agreement, kendall, overlap
from layercrit.proxies.formulas import PROXIES, get_proxy
from layercrit.seeds import seed_of

L, R, N = 8, 3, 10
LAYERS = [f"layer{number}" for number in range(L)]
SEEDS = (11, 12, 13)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape)


def exact(distances=None, **settings):
    values = draw(L, R, N) * np.linspace(0.2, 1, L)[:, None, None] if distances is None else distances
    about = {"layers": tuple(LAYERS), "images": "hash", "seeds": SEEDS, "random_trials": True, **settings}
    return Exact(distances=values.astype(np.float32), **about)


def samples(**some):
    """Samples of all three kinds, blank or random where none are given."""
    found = {
        "fisher": draw(L, R, N, seed=1),
        "obd": draw(L, N, seed=2),
        "snip": draw(L, seed=3),
        "log_parameters": draw(L, seed=4),
        "depth": np.arange(L, dtype=float),
    }
    return found | some


def agree(found=None, against=None, **settings):
    how = {"images": "hash", "seeds": SEEDS, "title": "a model", "n_resamples": 200, **settings}
    return agreement(samples() if found is None else found, LAYERS, exact() if against is None else against, **how)


@pytest.mark.parametrize("tied", [False, True])
def test_rank_correlations__are_those_of_scipy(tied):
    x, y = (draw(20, 13, seed=seed) for seed in (5, 6))
    if tied:
        x, y = (5 * x).round(), (5 * y).round()
    np.testing.assert_allclose(spearman(x, y), [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(kendall(x, y), [kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)])
    constant = np.ones((1, 13))
    assert np.isnan(spearman(constant, y[:1])).all()
    assert np.isnan(kendall(x[:1], constant)).all()


def test_kendall__in_parts(monkeypatch):
    x, y = (draw(20, 13, seed=seed) for seed in (5, 6))
    whole = kendall(x, y)
    monkeypatch.setattr("layercrit.proxies.agreement._AT_ONCE", 200)
    np.testing.assert_array_equal(kendall(x, y), whole)


def test_overlap__by_hand_and_over_all_ways_to_break_ties():
    assert overlap(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4]), 2) == 1
    assert overlap(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1]), 2) == 0
    assert overlap(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 2, 3]), 2) == 0.5
    x, y, k = np.array([0.0, 1, 1, 1, 2]), np.array([3.0, 3, 0, 1, 3]), 3
    shares = [
        len({*np.lexsort((first, x))[:k]} & {*np.lexsort((second, y))[:k]}) / k
        for first in permutations(range(5))
        for second in permutations(range(5))
    ]
    assert overlap(x, y, k) == pytest.approx(np.mean(shares))


def test_agreement__point_values():
    found, against = samples(), exact()
    table = agree().table.set_index("proxy")
    values = against.distances.mean(axis=(1, 2), dtype=np.float64)
    own = {"fisher": found["fisher"].mean(axis=(1, 2)), "obd": found["obd"].mean(axis=1), "snip": found["snip"]}
    for name, mine in own.items():
        assert table.loc[name, "spearman"] == pytest.approx(spearmanr(mine, values).statistic)
        assert table.loc[name, "kendall"] == pytest.approx(kendalltau(mine, values).statistic)
        lowest = len({*np.argsort(mine)[:2]} & {*np.argsort(values)[:2]}) / 2
        highest = len({*np.argsort(mine)[-2:]} & {*np.argsort(values)[-2:]}) / 2
        assert table.loc[name, ["lowest", "highest"]].tolist() == [lowest, highest]
    assert list(table["spearman"]) == sorted(table["spearman"], reverse=True)
    assert table.loc[["log_parameters", "depth"], "null"].all()
    assert agree().k == 2


def resample(what, n, count, seed=0):
    generator = np.random.default_rng(seed_of(seed, "proxies", what))
    return generator.multinomial(n, np.full(n, 1 / n), size=count)


@pytest.mark.parametrize("same", [True, False])
def test_agreement__intervals_by_a_plain_loop(same):
    """Images and draws that are the same on both sides are resampled alike, others apart."""
    found, against, n = samples(), exact(), 50
    images, draws = resample("exact images", N, n), resample("exact draws", R, n)
    mine = images if same else resample("10 images of proxies", N, n)
    my_draws = draws if same else resample("draws of proxies", R, n)
    rows = {name: [] for name in ("fisher", "obd", "snip")}
    gaps = []
    for i in range(n):
        at, of = np.repeat(range(N), images[i]), np.repeat(range(R), draws[i])
        values = against.distances[:, of][:, :, at].mean(axis=(1, 2), dtype=np.float64)
        at, of = np.repeat(range(N), mine[i]), np.repeat(range(R), my_draws[i])
        own = {"fisher": found["fisher"][:, of][:, :, at].mean(axis=(1, 2)), "obd": found["obd"][:, at].mean(axis=1)}
        for name in rows:
            rows[name].append(spearmanr(own.get(name, found[name]), values).statistic)
        gaps.append(rows["fisher"][-1] - spearmanr(found["depth"], values).statistic)
    how = {} if same else {"images": "other", "seeds": (1, 2, 3)}
    shown = agree(n_resamples=n, **how)
    table = shown.table.set_index("proxy")
    assert shown.best_null == "depth"
    for name, rho in rows.items():
        expected = np.quantile(rho, [0.025, 0.975])
        np.testing.assert_allclose(
            table.loc[name, ["spearman_low", "spearman_high"]].astype(float), expected, atol=1e-6
        )
    expected = np.quantile(gaps, [0.025, 0.975])
    found_gap = table.loc["fisher", ["difference_low", "difference_high"]].astype(float)
    np.testing.assert_allclose(found_gap, expected, atol=1e-6)


def test_agreement__absolute_means_are_taken_within_a_resample():
    """The size of a mean is not the mean of sizes."""
    signed = draw(L, R, N, seed=8) - 0.5
    weights = resample("w", N, 5).astype(float), resample("v", R, 5).astype(float)
    found = PROXIES["first_order"].value(signed, *weights)
    for i in range(5):
        at, of = np.repeat(range(N), weights[0][i].astype(int)), np.repeat(range(R), weights[1][i].astype(int))
        np.testing.assert_allclose(found[i], np.abs(signed[:, of][:, :, at].mean(axis=2)).mean(axis=1))
    np.testing.assert_allclose(PROXIES["first_order"].value(signed), np.abs(signed.mean(axis=2)).mean(axis=1))
    np.testing.assert_allclose(PROXIES["taylor"].value(signed[:, 0]), np.abs(signed[:, 0].mean(axis=1)))


def test_agreement__a_proxy_in_the_order_of_the_exact_values():
    """It has rho 1 and all of the k; it beats the null, and the sentence says so."""
    against = exact(draw(L, R, N) * 0.01 + np.array([0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.4])[:, None, None])
    found = agree(samples(snip=against.criticality**3), against, k=3)
    row = found.table.iloc[0]
    assert (row["proxy"], row["spearman"], row["kendall"]) == ("snip", 1, 1)
    assert (row["lowest"], row["highest"], row["spearman_low"]) == (1, 1, 1)
    assert row["difference_low"] > 0
    assert found.sentence.startswith("1 of 3 proxies beats the best null")
    assert "SNIP (+" in found.sentence


def test_agreement__the_best_null_may_be_reversed():
    """Depth in the reverse order of criticality is as good as in its order; a proxy equal to it does not beat it."""
    against = exact(draw(L, R, N) * 0.01 + np.linspace(0.9, 0.2, L)[:, None, None])
    found = agree(samples(snip=-np.arange(L, dtype=float)), against)
    table = found.table.set_index("proxy")
    assert found.best_null == "depth"
    assert table.loc["depth", "spearman"] == -1
    assert table.loc["snip", "spearman"] == 1
    assert table.loc["snip", "difference"] == 0
    assert found.sentence.startswith("None of 3 proxies beats the best null, depth, its order reversed (Spearman 1.00)")


def test_agreement__a_proxy_of_some_layers_is_compared_on_these():
    """Also with the null; fewer than three layers have no ranks."""
    part = draw(L, N, seed=9)
    part[3:] = np.nan
    found = agree(samples(obd=part))
    table = found.table.set_index("proxy")
    values, depth = exact().criticality[:3], np.arange(3.0)
    assert table.loc["obd", "n_layers"] == 3
    rho = spearmanr(part[:3].mean(axis=1), values).statistic
    assert table.loc["obd", "spearman"] == pytest.approx(rho)
    assert found.best_null == "depth"
    assert table.loc["obd", "difference"] == pytest.approx(rho - spearmanr(depth, values).statistic)
    mine, theirs = part[:3].mean(axis=1), exact().criticality[:3]
    assert table.loc["obd", "lowest"] == (mine.argmin() == theirs.argmin())  # k of 2 of 8 layers is 1 of 3
    part[2:] = np.nan
    assert math.isnan(agree(samples(obd=part)).table.set_index("proxy").loc["obd", "spearman"])


def test_agreement__order_and_missing_layers():
    """Layers are matched by name; those without exact value are left out."""
    expected = agree().table
    order = np.random.default_rng(1).permutation(L)
    shuffled = exact(exact().distances[order], layers=tuple(LAYERS[row] for row in order))
    np.testing.assert_allclose(agree(against=shuffled).table["spearman"], expected["spearman"])
    distances = exact().distances.copy()
    distances[0] = np.nan
    distances[1, 0] = np.nan  # a trial that was not finite
    found = agree(against=exact(distances))
    assert list(found.by_layer["layer"]) == LAYERS[1:]
    assert found.by_layer["exact"][0] == pytest.approx(distances[1, 1:].mean())
    assert np.isfinite(found.table[["spearman_low", "spearman_high"]]).all(axis=None)


def test_agreement__where_draws_do_not_differ_only_images_are_resampled():
    found = agree(against=exact(exact().distances[:, :1], seeds=(11,), random_trials=False), seeds=(11,))
    assert found.resampled.startswith("images of the exact values")
    assert agree().resampled.startswith("images and draws of the exact values")
    assert "200 resamples" in agree().resampled


def test_agreement__seeds():
    one, again, other = agree().table, agree().table, agree(seed=1).table
    assert one.equals(again)
    assert not one["spearman_low"].equals(other["spearman_low"])
    assert one["spearman"].equals(other["spearman"])


def test_agreement__without_resamples_there_are_no_intervals():
    found = agree(n_resamples=0)
    assert found.table["spearman_low"].isna().all()
    assert found.table["difference"].notna().sum() == len(found.table) - 1
    assert "there are no intervals" in found.sentence


@pytest.mark.parametrize("k", [0, -1, L + 1, 2.5, True, "few"])
def test_agreement__k(k):
    with pytest.raises(ProtocolError, match=f"from 1 to the number of layers that are compared, {L}"):
        agree(k=k)


def test_agreement__too_few_layers():
    with pytest.raises(ProtocolError, match="have 2 layers in common"):
        agree(against=exact(exact().distances[:2], layers=tuple(LAYERS[:2])))
    with pytest.raises(ProtocolError, match="have 0 layers in common"):
        agree(against=exact(layers=tuple(f"other{n}" for n in range(L))))


def test_get_proxy__near_names():
    assert get_proxy("fisher").label == "output change, Fisher"
    with pytest.raises(ProtocolError, match="Did you mean 'fisher'"):
        get_proxy("fischer")
