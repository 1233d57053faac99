import numpy as np
import pandas as pd
import pytest

from layercrit.advice.ranking import in_order, knobs_of, ranked


def table(*rows):
    """Rows of (layer, criticality, half-width, number of parameters)."""
    return pd.DataFrame(
        [(name, c, c - half, c + half, n, True) for name, c, half, n in rows],
        columns=["layer", "criticality", "low", "high", "n_parameters", "measured"],
    )


def test_ranked__places_are_those_that_the_intervals_leave():
    layers = table(("a", 0.1, 0.05, 1), ("b", 0.15, 0.05, 1), ("c", 0.5, 0.05, 1), ("d", 0.9, 0.05, 1))

    found = ranked(knobs_of(layers, {}), highest_first=False)

    assert list(found.index) == ["a", "b", "c", "d"]
    assert found[["rank", "rank_low", "rank_high"]].to_numpy().tolist() == [[1, 1, 2], [2, 1, 2], [3, 3, 3], [4, 4, 4]]
    assert list(ranked(knobs_of(layers, {}), highest_first=True).index) == ["d", "c", "b", "a"]


@pytest.mark.parametrize(("gap", "separates"), [(0.0700, False), (0.0715, True)])
def test_ranked__two_separate_where_the_interval_of_their_difference_excludes_0(gap, separates):
    """With half-widths of 0.05 each that is 0.05 times the root of two: closer than intervals that do not overlap."""
    found = ranked(knobs_of(table(("a", 0.3, 0.05, 1), ("b", 0.3 + gap, 0.05, 1)), {}), highest_first=True)

    assert list(found["rank_high"]) == ([1, 2] if separates else [2, 2])


def test_ranked__the_limits_that_face_each_other_count():
    layers = table(("a", 0.2, 0.0, 1), ("b", 0.3, 0.0, 1))
    layers[["low", "high"]] = [[0.0, 0.21], [0.29, 1.0]]  # wide where they look away from each other

    assert list(ranked(knobs_of(layers, {}), highest_first=False)["rank_high"]) == [1, 2]


def test_ranked__nothing_separates_where_an_interval_is_not_known():
    layers = table(("a", 0.1, np.nan, 1), ("b", 0.9, 0.01, 1), ("c", 0.5, 0.01, 1))

    found = ranked(knobs_of(layers, {}), highest_first=False)

    assert found.loc["a", ["rank_low", "rank_high"]].to_list() == [1, 3]
    assert found.loc["b", ["rank_low", "rank_high"]].to_list() == [2, 3]


def test_in_order__the_least_critical_for_their_size_come_first():
    layers = table(("large", 0.4, 0.1, 1000), ("small", 0.1, 0.1, 10), ("larger", 0.3, 0.1, 2000)).set_index("layer")

    assert list(in_order(layers, highest_first=False).index) == ["larger", "large", "small"]
    assert list(in_order(layers, highest_first=True).index) == ["large", "larger", "small"]


def test_knobs_of__a_knob_is_as_critical_as_its_most_critical_layer():
    layers = table(("a", 0.1, 0.01, 5), ("b", 0.7, 0.02, 6), ("c", 0.4, 0.03, 7))

    found = knobs_of(layers, {"a": "a", "b": "a"})

    assert found.loc["a", ["layer", "criticality", "low", "n_parameters"]].to_list() == ["b", 0.7, 0.7 - 0.02, 11]
    assert found.loc["c", ["layer", "n_parameters"]].to_list() == ["c", 7]


@pytest.mark.parametrize("missing", ["in the table", "elsewhere"])
def test_knobs_of__a_knob_with_a_layer_that_was_not_measured_was_not_measured(missing):
    layers = table(("a", 0.1, 0.01, 5), ("b", 0.7, 0.02, 6), ("c", 0.4, 0.03, 7))
    layers.loc[layers["layer"] == "b", "measured"] = missing != "in the table"
    knobs = {"a": "a", "b": "a"} if missing == "in the table" else {"a": "a", "not in the table": "a"}

    found = knobs_of(layers, knobs)

    assert not found.loc["a", "measured"]
    assert found.loc["c", "measured"]
    assert "a" not in ranked(found, highest_first=False).index
