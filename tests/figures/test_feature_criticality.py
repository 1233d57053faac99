"""The figure of feature criticality."""

import numpy as np
import pandas as pd
import pytest

from figure_checks import NASTY, SHOWN, check_layout, lines, written
from layercrit.errors import ProtocolError
from layercrit.figures.feature_criticality import feature_criticality_rows

HOW = {"quantity": "largest change relative to the layer before", "title": "baseline: feature criticality"}


def table(*rows):
    return pd.DataFrame(rows, columns=["layer", "feature_criticality", "status"])


WIDE = table(("conv1", 2.0, "ok"), ("conv2", 0.3, "other_paths"), ("fc", 40.0, "ok"), ("none", 0.0, "ok"),
             ("after", np.nan, "nothing_before"), ("rounded", np.nan, "no_gradient"),
             ("out_proj", 1.0, "same_output"))  # fmt: skip


def test_feature_criticality_rows__a_dot_for_each_layer_empty_where_doubtful():
    (axes,) = (figure := feature_criticality_rows(WIDE, **HOW)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == WIDE["layer"].tolist()
    assert axes.get_xscale() == "log"  # 40 is more than 30 times 0.3
    assert [line.get_xydata().tolist() for line in lines(figure, "found")] == [[[2.0, 0]], [[40.0, 2]]]
    (doubtful,) = lines(figure, "doubtful")
    assert doubtful.get_xydata().tolist() == [[0.3, 1]]
    assert doubtful.get_markerfacecolor() == "white"
    assert [set(line.get_xdata()) for line in lines(figure, "even")] == [{1.0}]
    said = ["0", "no ratio: the layer before has no W, or 0", "not measured: no gradient leads there",
            "1: one output with the layer before"]  # fmt: skip
    assert written(figure, "in words") == said
    assert len(figure.legends[0].get_texts()) == 3
    check_layout(figure)


@pytest.mark.parametrize("status", ["ok", "other_paths"])
def test_feature_criticality_rows__a_narrow_range_is_linear_and_shows_1(status):
    (axes,) = (figure := feature_criticality_rows(table(("a", 0.3, status), ("b", 0.0, status)), **HOW)).axes
    assert axes.get_xscale() == "linear"
    assert axes.get_xlim()[1] > 1
    assert len(figure.legends[0].get_texts()) == 2
    check_layout(figure)


@pytest.mark.parametrize("n", [1, 130])
def test_feature_criticality_rows__any_names_and_numbers_of_layers(n):
    rows = [(NASTY[i % len(NASTY)], 1.0 + i, "ok") for i in range(n)]
    figure = feature_criticality_rows(table(*rows), **{**HOW, "title": NASTY[-1]})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][: len(SHOWN)] == SHOWN[:n]
    check_layout(figure)


def test_feature_criticality_rows__nothing_to_plot():
    with pytest.raises(ProtocolError, match="No layer has a feature criticality"):
        feature_criticality_rows(table(("a", np.nan, "no_output")), **HOW)
    with pytest.raises(ProtocolError, match="has no column 'status'"):
        feature_criticality_rows(WIDE.drop(columns="status"), **HOW)
