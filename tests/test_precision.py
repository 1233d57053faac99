import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as students

from layercrit.precision import (
    Components,
    Cost,
    Pilot,
    PrecisionPlan,
    n_pilot_images,
    plan_half_width,
    plan_seconds,
    recentred,
    run_together,
    typical_trials,
)
from layercrit.statistics import estimate

LIMITS = {"level": 0.95, "n_pilot": 10, "n_pilot_images": 60, "n_available": 60, "max_trials": 200}


def crossed(generator, n_trials, n_images, trials=0.05, images=0.1, rest=0.1, mean=0.5):
    """Distances with effects of trials, images and what is left, all normal and cut at 0 and 1."""
    values = (
        mean
        + trials * generator.normal(size=(n_trials, 1))
        + images * generator.normal(size=(1, n_images))
        + rest * generator.normal(size=(n_trials, n_images))
    )
    return values.clip(0, 1)


def cost(n_layers, trial=0.0, prefix=0.0, layer=0.0, evaluation=1e-3):
    return Cost(trial, prefix, np.full(n_layers, layer), np.full(n_layers, evaluation))


def plan_of(components, half_width, costs=None, random_trials=True, **limits):
    pilot = Pilot(components, costs or cost(len(components)), random_trials)
    return plan_half_width({"m": pilot}, half_width, **LIMITS | limits)["m"]


# components of variance


def test_half_width__is_that_of_crossed_effects():
    """The slow twin: mean squares by loops, and Cochran's mean of the quantiles weighted by the parts."""
    values = crossed(np.random.default_rng(1), 5, 8, trials=0.2, images=0.2)
    grand, rows, columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    ms_trials = sum(8 * (row - grand) ** 2 for row in rows) / 4
    ms_images = sum(5 * (column - grand) ** 2 for column in columns) / 7
    ms_rest = sum((values[r, x] - rows[r] - columns[x] + grand) ** 2 for r in range(5) for x in range(8)) / (4 * 7)
    assert ms_trials > ms_rest
    assert ms_images > ms_rest
    for n_trials, n_images in ((5, 8), (40, 8), (7, 100)):
        parts = [
            ((ms_trials - ms_rest) / 8 / n_trials, students.ppf(0.975, 4)),
            ((ms_images - ms_rest) / 5 / n_images, students.ppf(0.975, 7)),
            (ms_rest / (n_trials * n_images), students.ppf(0.975, 4)),
        ]
        expected = sum(part * quantile for part, quantile in parts) / math.sqrt(sum(part for part, _ in parts))

        found = Components.of(values, random_trials=True).half_width(n_trials, n_images, 0.95)

        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_half_width__of_effects_whose_variance_would_be_negative():
    """Trials whose means are equal: their mean square is below that of the rest, and their variance is 0."""
    generator = np.random.default_rng(2)
    values = crossed(generator, 10, 60, 0, 0.1, 0.1)
    values -= values.mean(axis=1, keepdims=True) - 0.5

    found = Components.of(values, random_trials=True)

    assert found.trials == 0
    assert found.rest > 0
    assert float(found.half_width(10, 60, 0.95)) > 0


def test_half_width__of_trials_alone_is_steins():
    """Where images do not matter, n trials give t of the pilot's degrees of freedom times its SD over root n."""
    generator = np.random.default_rng(2)
    values = np.repeat(0.5 + 0.05 * generator.normal(size=(10, 1)), 60, axis=1)
    sd = values[:, 0].std(ddof=1)

    found = Components.of(values, random_trials=True).half_width([10, 17, 40], 60, 0.9)

    np.testing.assert_allclose(found, students.ppf(0.95, 9) * sd / np.sqrt([10, 17, 40]), rtol=1e-12)


def test_half_width__of_a_reset_that_is_not_random_is_students_over_images():
    values = np.random.default_rng(3).uniform(size=(3, 40))
    sd = values.mean(axis=0).std(ddof=1)

    found = Components.of(values, random_trials=False)

    assert found.n_trials == 1
    assert float(found.half_width(1, 40, 0.95)) == pytest.approx(students.ppf(0.975, 39) * sd / math.sqrt(40))
    assert float(found.half_width(1, 160, 0.95)) == pytest.approx(students.ppf(0.975, 39) * sd / math.sqrt(160))


def test_half_width__of_one_image_is_students_over_trials():
    values = np.random.default_rng(4).uniform(size=(10, 1))

    found = Components.of(values, random_trials=True).half_width(20, 1, 0.95)

    assert float(found) == pytest.approx(students.ppf(0.975, 9) * values.std(ddof=1) / math.sqrt(20))


def test_half_width__falls_with_trials_and_images():
    components = Components.of(crossed(np.random.default_rng(5), 10, 60), random_trials=True)

    assert (np.diff(components.half_width(np.arange(10, 200), 60, 0.95)) < 0).all()
    assert (np.diff(components.half_width(10, np.arange(60, 600), 0.95)) < 0).all()


def test_of_pilot__needs_three_trials_of_a_random_reset():
    values = np.random.default_rng(6).uniform(size=(4, 20))

    assert Components.of_pilot(values[:2], random_trials=True) is None
    assert Components.of_pilot(values[:3], random_trials=True) is not None
    assert Components.of_pilot(values[:0], random_trials=False) is None
    assert Components.of_pilot(values[:1], random_trials=False) is not None


@pytest.mark.parametrize(("trials", "images"), [(0.05, 0.1), (0.1, 0.02)])
def test_two_stages__cover_the_mean_of_normal_effects(trials, images):
    """Stein's plan, drawn 400 times: between 92 and 98 % of its intervals cover, and none is wider than asked for."""
    generator, half_width, covered, n_repeats = np.random.default_rng(7), 0.06, 0, 400
    for _ in range(n_repeats):
        everything = crossed(generator, 200, 60, trials, images, 0.1)
        components = Components.of(everything[:10], random_trials=True)
        layer = plan_of({"a": components}, half_width).layers["a"]
        found = components.estimate(estimate(everything[: layer.trials]))
        assert not layer.reached or (found.high - found.low) / 2 <= half_width + 1e-12
        covered += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / n_repeats <= 0.985


# plans


def test_plan__gives_each_layer_the_fewest_trials_that_do():
    """The slow twin: count up until the half-width is there."""
    generator = np.random.default_rng(8)
    components = {
        f"{sd:g}": Components.of(crossed(generator, 10, 60, sd, 0.02, 0.05), random_trials=True)
        for sd in (0.0, 0.03, 0.06, 0.1)
    }

    plan = plan_of(components, 0.03)

    for name, layer in plan.layers.items():
        n = 10
        while float(components[name].half_width(n, 60, 0.95)) > 0.03:
            n += 1
        assert layer.trials == min(n, 200), name
        assert layer.needed == n
        assert layer.reached == (n <= 200)
        assert layer.half_width == float(components[name].half_width(layer.trials, 60, 0.95))
    assert plan.layers["0"].trials == 10
    assert 10 < plan.layers["0.06"].trials < plan.layers["0.1"].trials


def test_plan__takes_more_images_only_where_that_is_cheaper_or_needed():
    generator = np.random.default_rng(9)
    on_images = {"a": Components.of(crossed(generator, 10, 60, 0.01, 0.3, 0.05), random_trials=True)}
    on_trials = {"a": Components.of(crossed(generator, 10, 60, 0.1, 0.02, 0.05), random_trials=True)}

    needed, not_needed = (plan_of(components, 0.04, n_available=5000) for components in (on_images, on_trials))

    assert needed.n_images > 60
    assert needed.layers["a"].reached
    assert not_needed.n_images == 60
    assert not_needed.layers["a"].reached


def test_plan__is_the_cheapest_over_numbers_of_images():
    """By brute force over all numbers of images: no plan costs less than 0.9 of the one that is chosen."""
    components = {"a": Components.of(crossed(np.random.default_rng(10), 10, 60, 0.08, 0.15, 0.1), random_trials=True)}
    costs = cost(1, trial=0.05, prefix=1e-4, layer=0.01)

    plan = plan_of(components, 0.04, costs, n_available=600)

    def seconds(n_images):
        numbers = np.arange(10, 201)
        enough = numbers[components["a"].half_width(numbers, n_images, 0.95) <= 0.04]
        if not len(enough):
            return math.inf
        again = 10 if n_images > 60 else 0
        return sum(n * (0.05 + n_images * 1e-4 + 0.01 + n_images * 1e-3) for n in (enough[0] - 10, again))

    best = min(map(seconds, range(60, 601)))
    assert plan.seconds == pytest.approx(seconds(plan.n_images))
    assert best <= plan.seconds <= best / 0.9


def test_plan__of_one_number_of_images_for_all_models_of_a_study():
    generator = np.random.default_rng(11)
    pilots = {
        name: Pilot({"a": Components.of(crossed(generator, 10, 60, 0.02, sd, 0.05), True)}, cost(1), True)
        for name, sd in (("easy", 0.02), ("hard", 0.3))
    }

    plans = plan_half_width(pilots, 0.04, **LIMITS | {"n_available": 5000})

    assert plans["easy"].n_images == plans["hard"].n_images > 60
    assert plans["hard"].layers["a"].reached


def test_plan__says_what_a_half_width_would_take_that_the_limits_do_not_allow():
    generator = np.random.default_rng(12)
    components = {
        "draws": Components.of(crossed(generator, 10, 60, 0.2, 0.001, 0.001), random_trials=True),
        "images": Components.of(crossed(generator, 10, 60, 0.001, 0.3, 0.001), random_trials=True),
        "certain": Components.of(np.full((10, 60), 0.5), random_trials=True),
    }

    plan = plan_of(components, 0.02, max_trials=20)

    draws, images, certain = (plan.layers[name] for name in components)
    assert not draws.reached
    assert draws.trials == 20
    assert float(components["draws"].half_width(draws.needed, 60, 0.95)) <= 0.02
    assert float(components["draws"].half_width(draws.needed - 1, 60, 0.95)) > 0.02
    assert not images.reached
    assert images.needed is None
    assert images.trials == 10, "more trials would gain nothing"
    assert certain.reached
    assert certain.trials == 10
    n_images = components["images"].images_for(0.02, 0.95)
    assert float(components["images"].half_width(math.inf, n_images, 0.95)) <= 0.02
    assert float(components["images"].half_width(math.inf, 0.9 * n_images, 0.95)) > 0.02
    notes = plan.notes()
    assert len(notes) == 2
    assert f"{draws.needed:,} trials" in notes[0]
    assert f"about {n_images:,} images" in notes[1]


def test_plan__of_layers_without_enough_trials_that_are_ok_stays_with_the_pilot():
    plan = plan_of({"bad": None}, 0.05)

    assert plan.layers["bad"].trials == 10
    assert not plan.layers["bad"].reached
    assert plan.trials() == {}


def test_plan__of_a_reset_that_is_not_random_is_one_of_images():
    values = np.random.default_rng(13).uniform(size=(1, 60))

    plan = plan_of({"a": Components.of(values, False)}, 0.02, random_trials=False, n_available=10_000)

    assert plan.layers["a"].trials == 1
    assert plan.layers["a"].reached
    assert plan.n_images > 60


def test_trials__are_those_after_the_pilot_with_the_layers_that_get_them():
    components = Components.of(crossed(np.random.default_rng(14), 10, 60), random_trials=True)
    plan = plan_of({"a": components, "b": components, "c": components}, 0.5)
    layers = {name: replace(plan.layers[name], trials=n) for name, n in (("a", 12), ("b", 10), ("c", 11))}

    assert replace(plan, layers=layers).trials() == {10: ["a", "c"], 11: ["a"]}


def test_plan__is_the_same_after_it_was_plain_data():
    components = Components.of(crossed(np.random.default_rng(15), 10, 60, 0.1), random_trials=True)
    plan = plan_of({"a": components, "bad": None}, 0.02)

    again = PrecisionPlan.from_dict(plan.to_dict())

    assert again.to_dict() == plan.to_dict()
    assert again.layers["a"] == plan.layers["a"]
    assert math.isnan(again.layers["bad"].half_width)


def test_plan_seconds__is_the_smallest_half_width_that_fits():
    components = {"a": Components.of(crossed(np.random.default_rng(16), 10, 60, 0.1, 0.02, 0.05), random_trials=True)}
    pilots = {"m": Pilot(components, cost(1), True)}

    plan = plan_seconds(pilots, 3.0, **LIMITS)["m"]

    assert plan.seconds <= 3.0
    assert plan.seconds > 2.9
    assert plan_half_width(pilots, 0.97 * plan.half_width, **LIMITS)["m"].seconds > 3.0


def test_plan_seconds__without_time_is_the_pilot():
    components = {"a": Components.of(crossed(np.random.default_rng(17), 10, 60, 0.1), random_trials=True)}

    plan = plan_seconds({"m": Pilot(components, cost(1), True)}, -1.0, **LIMITS)["m"]

    assert plan.trials() == {}


# costs and the rest


def test_cost__counts_what_trials_share_once():
    costs = Cost(trial=2.0, prefix=0.1, layers=np.array([1.0, 3.0]), evaluations=np.array([0.01, 0.02]))

    assert costs.seconds(np.array([4.0, 1.0]), 10) == pytest.approx(4 * (2 + 1) + 4 * (1 + 0.1) + 1 * (3 + 0.2))
    assert costs.seconds(np.zeros(2), 10) == 0


def test_n_pilot_images__take_half_of_the_variance_that_is_allowed():
    n = n_pilot_images(0.05, 0.95, 10, 10_000)
    error = 0.05 / students.ppf(0.975, 9)

    assert 0.3**2 / n <= error**2 / 2
    assert 0.3**2 / (n - 1) > error**2 / 2
    assert n_pilot_images(0.05, 0.95, 10, 100) == 100
    assert n_pilot_images(0.5, 0.95, 10, 10_000) == 50


def test_typical_trials__are_those_of_the_published_spread():
    n = typical_trials(0.02, 0.95, 10, 10_000)

    assert n == pytest.approx((students.ppf(0.975, 9) * 0.068 / 0.02) ** 2, rel=0.15)
    assert typical_trials(0.3, 0.95, 10, 100) == 10


def test_run_together__holds_only_so_many_new_values_at_once(monkeypatch):
    monkeypatch.setattr("layercrit.precision._BYTES_OF_DRAWS", 40)

    found = list(run_together({3: ["a", "b"], 4: ["b"], 5: [], 6: ["b"], 7: ["a"]}, {"a": 9, "b": 1}))

    assert found == [{3: ["a", "b"]}, {4: ["b"], 6: ["b"]}, {7: ["a"]}]


def test_recentred__moves_the_interval_with_its_mean():
    found = estimate(np.array([[0.4, 0.5, 0.6], [0.5, 0.55, 0.6], [0.45, 0.5, 0.58]]))

    moved = recentred(found, found.mean + 0.1)

    assert moved.mean == found.mean + 0.1
    assert moved.high - moved.low == pytest.approx(found.high - found.low)
    assert recentred(found, 0.0).low == 0.0
