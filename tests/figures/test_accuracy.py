import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from figure_checks import all_texts, boxes_of, check_layout, correlations, legend, lines, tables, written
from layercrit.errors import ProtocolError
from layercrit.figures.accuracy import criticality_against_accuracy
from layercrit.figures.categories import CATEGORY_COLORS, CATEGORY_MARKERS


def test_criticality_against_accuracy__one_point_per_model() -> None:
    _, models = tables()
    figure = criticality_against_accuracy(models)
    for category, rows in models.groupby(models["category"].fillna("no category")):
        (drawn,) = lines(figure, category.replace("_", " "))
        np.testing.assert_array_equal(drawn.get_xydata(), rows[["accuracy", "criticality"]])
        if category in CATEGORY_COLORS:
            assert to_hex(drawn.get_color()).upper() == CATEGORY_COLORS[category]
            assert drawn.get_marker() == CATEGORY_MARKERS[category]
    (left, right), (low, high) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert left < models["accuracy"].min() < models["accuracy"].max() < right
    assert low < models["criticality"].min() < models["criticality"].max() < high
    assert figure.axes[0].get_xlabel() == "accuracy (%)"
    assert figure.axes[0].get_ylabel() == "mean criticality (%)"


def test_criticality_against_accuracy__labels_up_to_twenty_models() -> None:
    for n_models, n_labels in ((1, 1), (20, 20), (21, 0)):
        _, models = tables(n_models)
        figure = criticality_against_accuracy(models)
        assert sorted(written(figure, "label")) == sorted(models["label"][:n_labels])
        check_layout(figure)


def test_criticality_against_accuracy__a_label_gives_way_to_a_point() -> None:
    _, models = tables(4)
    # A label stands to the right of its point, unless another point is there.
    models[["accuracy", "criticality"]] = [[0.1, 0.1], [0.5, 0.5], [0.53, 0.5], [0.9, 0.9]]
    figure = criticality_against_accuracy(models)
    places = {text.get_text(): text.xyann[0] - text.xy[0] for text in figure.axes[0].texts if text.get_gid() == "label"}
    assert places["Model 1"] < 0 < places["Model 2"]
    assert places["Model 0"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_criticality_against_accuracy__labels_of_a_crowd_keep_apart(seed: int) -> None:
    generator = np.random.default_rng(seed)
    _, models = tables(20)
    crowd = generator.uniform(0.5, 0.8, (20, 2))
    crowd[:3] = 0.8, 0.8  # the same point, thrice, in a corner
    models[["accuracy", "criticality"]] = crowd
    figure = criticality_against_accuracy(models)
    check_layout(figure)
    points = figure.axes[0].transData.transform(crowd)
    for text, (left, low, right, high) in boxes_of(figure):
        if text.get_gid() == "label":
            assert not any(left < x < right and low < y < high for x, y in points), text.get_text()


def test_criticality_against_accuracy__models_without_numbers_are_counted() -> None:
    _, models = tables()
    whole = legend(criticality_against_accuracy(models))
    models.loc[2, "accuracy"] = np.nan
    models.loc[0, "criticality"] = np.nan
    figure = criticality_against_accuracy(models)
    assert "not shown: 2 without accuracy or criticality" in all_texts(figure)
    assert len(written(figure, "label")) == 5
    assert legend(figure) == {name: look for name, look in whole.items() if name not in ("contrastive", "no category")}
    check_layout(figure)
    with pytest.raises(ProtocolError, match="No model has both an accuracy and a mean criticality"):
        criticality_against_accuracy(models.assign(accuracy=np.nan))


def test_criticality_against_accuracy__colours_stay_where_models_drop_out() -> None:
    _, models = tables()
    models.loc[[0, 1], "category"] = ["first_idea", "second_idea"]
    before = legend(criticality_against_accuracy(models))
    models.loc[0, "accuracy"] = np.nan
    assert legend(criticality_against_accuracy(models))["second idea"] == before["second idea"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((None, "spearman", -0.6123, 2e-6), ["Spearman's ρ = −0.61, p < 0.001"]),  # noqa: RUF001 (rho, and minus signs)
        ((None, "kendall", 0.3, 0.214), ["Kendall's τ = 0.30, p = 0.21"]),
        ((None, "kendall", 0.3, 0.001), ["Kendall's τ = 0.30, p = 0.001"]),
        ((None, "spearman", 1.0, np.nan), ["Spearman's ρ = 1.00"]),  # noqa: RUF001
        ((None, "pearson", 0.5, 0.5), ["pearson = 0.50, p = 0.5"]),
        (("own_idea", "spearman", 0.5, 0.04), ["without own idea: Spearman's ρ = 0.50, p = 0.04"]),  # noqa: RUF001
        ((None, "spearman", np.nan, 0.1), []),
        ((np.nan, "kendall", 0.5, 0.5), ["Kendall's τ = 0.50, p = 0.5"]),  # as it is read from a file
    ],
)
def test_criticality_against_accuracy__correlation(
    row: tuple[str | float | None, str, float, float], expected: list[str]
) -> None:
    _, models = tables()
    assert written(criticality_against_accuracy(models, correlations=correlations(row), title="t"), "note") == expected


def test_criticality_against_accuracy__correlations_have_a_line_for_each_group() -> None:
    _, models = tables()
    table = correlations(
        (None, "spearman", -0.459, 0.0008), (None, "kendall", -0.347, 0.0004),
        ("freezing", "spearman", -0.2, 0.3), ("freezing", "kendall", np.nan, np.nan),
        ("baseline", "spearman", np.nan, np.nan), ("baseline", "kendall", 0.125, 0.5),
    )  # fmt: skip
    figure = criticality_against_accuracy(models, correlations=table, title="A title")
    assert written(figure, "note") == [
        "Spearman's ρ = −0.46, p < 0.001; Kendall's τ = −0.35, p < 0.001",  # noqa: RUF001
        "without freezing: ρ = −0.20, p = 0.3",  # noqa: RUF001
        "without baseline: τ = 0.12, p = 0.5",
    ]
    check_layout(figure)
    order = {text.get_text(): box[1] for text, box in boxes_of(figure)}
    heights = [
        order[text] for text in ["A title", *written(figure, "note"), "baseline"]
    ]  # the last one is the legend's
    assert heights == sorted(heights, reverse=True)
    assert written(criticality_against_accuracy(models, correlations=table[:0]), "note") == []
    assert written(criticality_against_accuracy(models), "note") == []


def test_criticality_against_accuracy__wide_lines_of_correlations_wrap() -> None:
    _, models = tables()
    numbers = ("spearman", -0.17, 0.32), ("kendall", -0.08, 0.52)
    groups = None, "adversarial_training", "$of$ {my} own"
    table = correlations(*((group, *number) for group in groups for number in numbers))
    figure = criticality_against_accuracy(models, correlations=table)
    short = "ρ = −0.17, p = 0.32; τ = −0.08, p = 0.52"  # noqa: RUF001
    assert written(figure, "note") == [
        "Spearman's ρ = −0.17, p = 0.32; Kendall's τ = −0.08, p = 0.52",  # noqa: RUF001
        "without adversarial training:",
        f"    {short}",
        "without $of$ {my} own:",
        f"    {short}",
    ]
    check_layout(figure)
    assert figure.get_figwidth() == pytest.approx(criticality_against_accuracy(models).get_figwidth())


def test_criticality_against_accuracy__correlations_without_a_column_are_an_error() -> None:
    _, models = tables()
    table = correlations((None, "spearman", 0.5, 0.1))
    for name in ("without", "method", "statistic", "pvalue"):
        message = (
            f"table of correlations has no column '{name}'; it has .*n. Expected without, method, statistic, pvalue"
        )
        with pytest.raises(ProtocolError, match=message):
            criticality_against_accuracy(models, correlations=table.drop(columns=name))
    with pytest.raises(ProtocolError, match="no column 'without'; it has none"):
        criticality_against_accuracy(models, correlations=pd.DataFrame())


@pytest.mark.parametrize("n_models", [1, 2, 50])
def test_criticality_against_accuracy__nothing_is_cut_off_or_overlaps(n_models: int) -> None:
    _, models = tables(n_models)
    models["label"] = [f"PGD Adversarial Training (Linf, eps={index}), with a long name" for index in range(n_models)]
    check_layout(criticality_against_accuracy(models, title="A rather long title of a study with many models"))
