import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from figure_checks import NASTY, bars, check_layout, legend, lines, tables, written
from layercrit.errors import ProtocolError
from layercrit.figures.budget import criticality_against_budget
from layercrit.figures.categories import CATEGORY_COLORS, CATEGORY_MARKERS


def trained(*rows: tuple[str | None, float | None, float]) -> pd.DataFrame:
    """Return models of norm, budget and criticality."""
    norms, budgets, means = (list(column) for column in zip(*rows, strict=True))
    names = [f"model_{index}" for index in range(len(rows))]
    return pd.DataFrame(
        {"model": names, "label": names, "category": "adversarial_training", "attack_norm": norms, "eps": budgets,
         "criticality": means, "low": np.array(means) - 0.05, "high": np.array(means) + 0.02}
    )  # fmt: skip


def panels(figure: Figure) -> dict[str, Axes]:
    """Return norm -> panel, from left to right."""
    return {written(axes, "norm")[0]: axes for axes in figure.axes}


def ticks(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def points(axes: Axes, gid: str) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in lines(axes, gid)]


def test_criticality_against_budget__a_panel_for_each_norm_with_budgets_in_order() -> None:
    models = trained(("linf", 8, 0.7), ("l1", 2, 0.3), ("l2", 1.0, 0.6), ("l2", 0, 0.4), ("linf", 0.5, 0.5),
                     ("l2", 0.01, 0.35), ("l2", 3e-5, 0.45), ("l0", 1, 0.2))  # fmt: skip
    found = panels(criticality_against_budget(models.set_index(models.index[::-1])))  # whatever the index
    assert list(found) == ["L2", "L∞", "l0", "l1"]
    assert ticks(found["L2"]) == ["0", "3e-05", "0.01", "1"]
    assert points(found["L2"], "model") == [[[3, 0.6], [0, 0.4], [2, 0.35], [1, 0.45]]]  # in the order of the table
    assert points(found["L2"], "means") == [[[0, 0.4], [1, 0.45], [2, 0.35], [3, 0.6]]]
    assert ticks(found["L∞"]) == ["0.5", "8"]
    assert points(found["L∞"], "means") == [[[0, 0.5], [1, 0.7]]]
    assert points(found["l1"], "model") == [[[0, 0.3]]]
    assert {tuple(axes.get_ylim()) for axes in found.values()} == {found["L2"].get_ylim()}
    assert found["L2"].get_ylabel() == "mean criticality (%)"


def test_criticality_against_budget__a_step_is_as_wide_in_every_panel() -> None:
    rows = [("l2", eps, 0.5) for eps in (0, 0.01, 5, 8)] + [("linf", eps, 0.5) for eps in (1, 2)] + [("l1", 1, 0.5)]
    figure = criticality_against_budget(trained(*rows))
    steps = [axes.get_position().width / np.ptp(axes.get_xlim()) for axes in figure.axes]
    assert steps == pytest.approx([steps[0]] * 3)
    for axes in figure.axes:
        assert np.diff(axes.get_xticks()).tolist() == [1] * (len(axes.get_xticks()) - 1)
        low, high = axes.get_xlim()
        assert axes.get_xticks()[0] - low == pytest.approx(high - axes.get_xticks()[-1])
    edges = [(axes.get_position().x0, axes.get_position().x1) for axes in figure.axes]
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(edges))


def test_criticality_against_budget__the_line_runs_through_means_of_budgets() -> None:
    rows = [("l2", 1, 0.2), ("l2", 0.5, 0.5), ("l2", 1, 0.6), ("l2", 1, 0.7), ("linf", 1, 0.9)]
    found = panels(criticality_against_budget(trained(*rows)))
    ((start, end),) = points(found["L2"], "means")
    assert start == [0, 0.5]
    assert end == [1, pytest.approx((0.2 + 0.6 + 0.7) / 3)]
    assert points(found["L∞"], "means") == [[[0, 0.9]]]


def test_criticality_against_budget__intervals_where_they_are_known() -> None:
    models = trained(("l2", 1, 0.2), ("l2", 2, 0.5), ("l2", 2, 0.6), ("l2", 4, 0.7))
    models.loc[1, "low"] = np.nan
    models.loc[3, ["low", "high"]] = np.nan
    figure = criticality_against_budget(models)
    expected = [[[x, models["low"][row]], [x, models["high"][row]]] for row, x in ((0, 0), (2, 1))]
    assert bars(figure, "interval") == expected
    low, high = figure.axes[0].get_ylim()
    assert low < models["low"].min()
    assert high > models["high"].max()
    models[["low", "high"]] = None
    assert bars(criticality_against_budget(models), "interval") == []


def test_criticality_against_budget__baseline_is_a_line_in_every_panel() -> None:
    models = trained(("l2", 1, 0.5), ("linf", 1, 0.6), (None, None, 0.3), (None, None, 0.9))
    models.loc[2, "category"] = "baseline"
    for baseline, row in ((None, 2), ("model_3", 3), ("model_1", 1)):
        figure = criticality_against_budget(models, baseline=baseline)
        level = models["criticality"][row]
        assert [line.get_ydata()[0] for line in lines(figure, "baseline")] == [level, level]
        assert list(legend(figure)) == ["mean of the baseline"]
        low, high = figure.axes[0].get_ylim()
        assert low < level < high
    assert not lines(criticality_against_budget(models.drop(index=2)), "baseline")
    assert legend(criticality_against_budget(models.drop(index=2))) == {}
    models.loc[2, "criticality"] = np.nan
    assert not lines(criticality_against_budget(models), "baseline")
    with pytest.raises(ProtocolError, match=r"no model 'model_33'. Did you mean 'model_3'"):
        criticality_against_budget(models, baseline="model_33")


def test_criticality_against_budget__models_without_a_number_are_left_out() -> None:
    models = trained(("l2", 1, 0.5), (None, 2, 0.6), ("linf", None, 0.3), ("l2", 4, np.nan), (np.nan, 8, 0.4))
    figure = criticality_against_budget(models)
    assert list(panels(figure)) == ["L2"]
    assert ticks(figure.axes[0]) == ["1"]
    assert points(figure.axes[0], "model") == [[[0, 0.5]]]
    with pytest.raises(ProtocolError, match=r"No model has an attack_norm, an eps and a mean criticality.* Give norm"):
        criticality_against_budget(models.drop(index=0))


def test_criticality_against_budget__each_category_has_its_line() -> None:
    models = trained(("l2", 1, 0.5), ("l2", 2, 0.6), ("l2", None, 0.7), ("l2", 2, 0.4), ("l2", 1, 0.2), ("l1", 1, 0.9))
    models["category"] = ["own_idea", "adversarial_training", "other_idea", "own_idea", "adversarial_training", None]
    figure = criticality_against_budget(models.set_index("model", drop=False))
    drawn = {to_hex(line.get_color()).upper(): line.get_xydata().tolist() for line in lines(figure, "means")}
    looks = legend(figure)
    assert list(looks) == ["adversarial training", "own idea", "no category"]  # the other idea has no budget
    name = "adversarial_training"
    assert looks["adversarial training"] == (CATEGORY_COLORS[name], CATEGORY_MARKERS[name])
    assert drawn[looks["adversarial training"][0]] == [[0, 0.2], [1, 0.6]]
    assert drawn[looks["own idea"][0]] == [[0, 0.5], [1, 0.4]]
    assert drawn[looks["no category"][0]] == [[0, 0.9]]
    dots = [(to_hex(line.get_color()).upper(), line.get_marker()) for line in lines(figure, "model")]
    assert dots == [looks["adversarial training"], looks["own idea"], looks["no category"]]


def test_criticality_against_budget__budgets_stand_upright_where_they_have_room() -> None:
    few = criticality_against_budget(trained(*[("l2", eps, 0.5) for eps in (0, 0.25, 8)]))
    assert {label.get_rotation() for label in few.axes[0].get_xticklabels()} == {0}
    many = criticality_against_budget(trained(*[("l2", eps / 100, 0.5) for eps in range(14)]))
    assert {label.get_rotation() for label in many.axes[0].get_xticklabels()} == {90}
    assert few.get_figwidth() == pytest.approx(many.get_figwidth())


def test_criticality_against_budget__names_of_norms_are_cut_where_they_have_no_room() -> None:
    names = ["$x$", "a norm with a long name", "another norm of the models", "norm with a long name"]
    figure = criticality_against_budget(trained(*[(name, 1, 0.5) for name in names]))
    found = list(panels(figure))
    assert found[0] == "$x$"
    for short, long in zip(found[1:], names[1:], strict=True):
        assert short.endswith("…")
        assert long.startswith(short[:-1])
    check_layout(figure)


@pytest.mark.parametrize("title", [None, "A rather long title of a study with many models"], ids=["bare", "titled"])
@pytest.mark.parametrize(
    "n_budgets", [(1,), (3, 2), (10, 5), (20, 1), (1, 20), (1, 1, 1, 1, 1, 1, 1), (30, 20)], ids=str
)
def test_criticality_against_budget__nothing_is_cut_off_or_overlaps(
    n_budgets: tuple[int, ...], title: str | None
) -> None:
    norms = ["l2", "linf", *NASTY]
    rows = [(norm, 0.01 * eps, 0.3 + 0.01 * eps) for norm, n in zip(norms, n_budgets, strict=False) for eps in range(n)]
    models = trained(*rows)
    models.loc[0, "category"] = "baseline"
    check_layout(criticality_against_budget(models, title=title))


def test_criticality_against_budget__fifty_models_of_two_norms() -> None:
    _, models = tables(50)
    check_layout(criticality_against_budget(models))
    names = [f"an own idea with a long name {index}" for index in range(50)]
    check_layout(criticality_against_budget(models.assign(category=names)))
