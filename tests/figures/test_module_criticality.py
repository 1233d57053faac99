"""The figure of module criticality: which squares there are, what is written in them, and where border and ring are."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from figure_checks import numbers
from layercrit.errors import ProtocolError
from layercrit.figures.module_criticality import excess_map

A, S = np.array([0.0, 0.5, 1.0]), np.array([0.1, 1.0, 10.0])


def points(values):
    """Points of excess losses ``(n_s, n_a)``, without those that are NaN."""
    rows = [
        {"a": A[column], "s": S[row], "excess": values[row][column]}
        for row, column in itertools.product(range(3), range(3))
        if not np.isnan(values[row][column])
    ]
    return pd.DataFrame(rows)


VALUES = [[0.4, 0.1, -0.001], [0.6, 0.2, 0.1], [np.nan, 900.0, 40.0]]


@pytest.fixture
def figure():
    return excess_map(points(VALUES), (A, S), 0.2, (0.5, 1.0), title="model: $layer$")


def lines(figure, gid):
    return [line for line in figure.findobj(Line2D) if line.get_gid() == gid]


def test_excess_map__numbers_in_units_of_what_is_allowed(figure):
    written = [text for text, _, _ in numbers(figure, "excess loss")]
    assert written == ["> 999", "200", "3.0", "1.0", "0.5", "2.0", "0.5", "0.0"]  # the largest noise on top
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "model: $layer$" in texts
    assert any("0.2 nats" in text for text in texts)


def test_excess_map__border_between_what_is_allowed_and_what_is_not(figure):
    """a = 0 is not allowed anywhere, all else below the largest noise is."""
    drawn = {tuple(np.round([*line.get_xdata(), *line.get_ydata()], 3)) for line in lines(figure, "allowed")}
    upright = [one for one in drawn if one[0] == one[1]]
    level = [one for one in drawn if one[2] == one[3]]
    assert len(upright) == 2
    assert len({one[0] for one in upright}) == 1
    assert len(level) == 2
    assert len({one[2] for one in level}) == 1


def test_excess_map__ring_at_the_optimum(figure):
    ring = lines(figure, "optimum")[0]
    middle = next(place for text, place, _ in numbers(figure, "excess loss") if text == "1.0")
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx(middle)
    without = excess_map(points(VALUES), (A, S), 0.2, (float("nan"), float("nan")), title="x")
    assert not lines(without, "optimum")


def test_excess_map__a_point_that_is_not_of_the_grid():
    with pytest.raises(ProtocolError, match=r"a = 0\.3, s = 1 is not one of the grid"):
        excess_map(pd.DataFrame([{"a": 0.3, "s": 1.0, "excess": 0.1}]), (A, S), 0.2, (0.3, 1.0), title="x")
