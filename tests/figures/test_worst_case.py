"""The figure of the worst case."""

import numpy as np
import pandas as pd
import pytest

from figure_checks import NASTY, SHOWN, check_layout, lines, written
from layercrit.errors import ProtocolError
from layercrit.figures.worst_case import worst_case_rows

HOW = {"quantity": "rise of the loss, nats", "title": "baseline: worst case"}


def table(*rows):
    columns = ["layer", "worst_case", "smallest_restart", "first_order"]
    found = pd.DataFrame(rows, columns=columns)
    return found.assign(status=np.where(found["worst_case"].isna(), "no_norm", "ok"))


WIDE = table(("conv1", 8.0, 5.0, 0.2), ("conv2", 0.1, 0.0, 0.05), ("none", 0.0, 0.0, 0.0), ("zeros", *3 * [np.nan]))


def test_worst_case_rows__a_dot_a_line_and_a_diamond_for_each_module():
    (axes,) = (figure := worst_case_rows(WIDE, **HOW)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "conv2", "none", "zeros"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first module is on top
    assert axes.get_xscale() == "log"  # 8 is more than 30 times 0.05
    assert [line.get_xydata().tolist() for line in lines(figure, "found")] == [[[8.0, 0]], [[0.1, 1]]]
    assert [line.get_xydata().tolist() for line in lines(figure, "first order")] == [[[0.2, 0]], [[0.05, 1]]]
    restarts = [line.get_xdata().tolist() for line in lines(figure, "restarts")]
    assert restarts == [[5.0, 8.0], [axes.get_xlim()[0], 0.1]]  # 0 has no place on the axis: to its edge
    assert written(figure, "in words") == ["0", "not measured: its parameters are 0"]
    assert axes.get_xlabel() == "rise of the loss, nats"
    check_layout(figure)


def test_worst_case_rows__a_narrow_range_is_linear_and_there_may_be_no_first_order():
    narrow = table(("a", 0.3, 0.2, np.nan), ("b", 0.0, 0.0, np.nan))
    (axes,) = (figure := worst_case_rows(narrow, **HOW)).axes
    assert axes.get_xscale() == "linear"
    assert [line.get_xydata().tolist() for line in lines(figure, "found")] == [[[0.3, 0]], [[0.0, 1]]]
    assert lines(figure, "first order") == []
    assert len(figure.legends[0].get_texts()) == 1
    check_layout(figure)


def test_worst_case_rows__negative_values_are_on_the_axis_and_what_is_no_number_is_said():
    rows = table(("a", 0.3, -0.2, np.nan), ("b", -0.1, -0.4, np.nan), ("c", np.inf, 0.1, np.nan),
                 ("d", *3 * [np.nan]), ("e", *3 * [np.nan]))  # fmt: skip
    rows = pd.concat([rows, table(("f", *3 * [np.nan]))], ignore_index=True)
    rows.loc[4:, "status"] = ["failed", "no_gradient"]
    (axes,) = (figure := worst_case_rows(rows, **HOW)).axes
    low, high = axes.get_xlim()
    assert low < -0.4 < 0.3 < high
    assert written(figure, "in words") == ["not finite", "not measured: its parameters are 0", "not measured: failed",
                                           "not measured: no gradient leads there"]  # fmt: skip
    wide = worst_case_rows(table(("a", 9.0, 9.0, 0.1), ("b", -0.5, -0.5, 0.1)), **HOW)
    assert written(wide, "in words") == ["-0.5"]
    worst_case_rows(table(("a", -0.1, -0.1, np.nan)), **HOW)


@pytest.mark.parametrize("n", [1, 130])
def test_worst_case_rows__any_names_and_numbers_of_modules(n):
    rows = [(NASTY[i % len(NASTY)], 1.0 + i, 0.5 + i, 0.1) for i in range(n)]
    figure = worst_case_rows(table(*rows), **{**HOW, "title": NASTY[-1]})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][: len(SHOWN)] == SHOWN[:n]
    check_layout(figure)


def test_worst_case_rows__nothing_to_plot():
    with pytest.raises(ProtocolError, match="No module has a worst case"):
        worst_case_rows(table(("a", *3 * [np.nan])), **HOW)
    with pytest.raises(ProtocolError, match="has no column 'status'"):
        worst_case_rows(WIDE.drop(columns="status"), **HOW)
