import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from figure_checks import (
    NASTY,
    all_texts,
    bars,
    check_layout,
    correlations,
    legend,
    lines,
    tables,
    written,
)
from layercrit import figures
from layercrit.comparison import Comparison, about_models, compare
from layercrit.errors import ProtocolError
from layercrit.figures.accuracy import criticality_against_accuracy
from layercrit.figures.budget import criticality_against_budget
from layercrit.figures.categories import CATEGORY_COLORS, CATEGORY_MARKERS
from layercrit.figures.depth import criticality_over_depth
from layercrit.figures.heat_maps import difference_map, heat_map, spread_map
from layercrit.figures.rankings import ranking
from layercrit.figures.style import save_figure
from layercrit.study.published import import_published
from published_results import RELEASED, released

# --- ranking ----------------------------------------------------------------------------------------------------------


def test_ranking__least_critical_model_on_top() -> None:
    _, models = tables()
    (axes,) = (figure := ranking(models)).axes
    ordered = models.sort_values("criticality")
    assert [label.get_text() for label in axes.get_yticklabels()] == ordered["label"].tolist()
    dots = lines(figure, "mean")
    assert [float(dot.get_xdata()[0]) for dot in dots] == ordered["criticality"].tolist()
    assert [int(dot.get_ydata()[0]) for dot in dots] == list(range(7))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # 0 is on top
    for dot, category in zip(dots, ordered["category"], strict=True):
        if category in CATEGORY_COLORS:
            assert to_hex(dot.get_color()).upper() == CATEGORY_COLORS[category]
            assert dot.get_marker() == CATEGORY_MARKERS[category]


def test_ranking__intervals_where_they_are_known() -> None:
    _, models = tables()
    models.loc[1, ["low", "high"]] = np.nan
    models.loc[3, "low"] = np.nan
    figure = ranking(models)
    ordered = models.sort_values("criticality", ignore_index=True)
    expected = [[[row.low, y], [row.high, y]] for y, row in ordered.iterrows() if row.low == row.low]
    assert bars(figure, "interval") == expected
    left, right = figure.axes[0].get_xlim()
    assert left < models["low"].min()
    assert right > models["high"].max()


def test_ranking__baseline_is_a_line() -> None:
    _, models = tables()
    (line,) = lines(ranking(models), "baseline")
    assert line.get_xdata()[0] == models["criticality"][4]  # of the category baseline
    assert "mean of the baseline" in legend(ranking(models))
    (line,) = lines(ranking(models, baseline="model_2"), "baseline")
    assert line.get_xdata()[0] == models["criticality"][2]
    without = ranking(models.drop(index=4))
    assert not lines(without, "baseline")
    assert "mean of the baseline" not in legend(without)
    with pytest.raises(ProtocolError, match=r"no model 'model_22'. Did you mean 'model_2'"):
        ranking(models, baseline="model_22")


def test_ranking__models_without_a_mean_stand_last() -> None:
    _, models = tables()
    models.loc[[0, 4], "criticality"] = np.nan
    figure = ranking(models)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][-2:] == ["Model 0", "Model 4"]
    assert not lines(figure, "baseline")
    with pytest.raises(ProtocolError, match="No model has a mean criticality"):
        ranking(models.assign(criticality=np.nan))


@pytest.mark.parametrize("n_models", [1, 2, 14, 50])
def test_ranking__nothing_is_cut_off_or_overlaps(n_models: int) -> None:
    _, models = tables(n_models)
    check_layout(ranking(models, title="A title"))
    models["label"] = [f"PGD Adversarial Training (Linf, eps={index}), with a long name" for index in range(n_models)]
    check_layout(ranking(models))


# --- all of them ------------------------------------------------------------------------------------------------------

Draw = Callable[[pd.DataFrame, pd.DataFrame], Figure]
SOME = correlations((None, "spearman", 0.5, 0.1), ("$x_1$", "$x_1$", 0.5, 0.1))


def about_layers(values: pd.DataFrame) -> dict[str, dict[str, str]]:
    return {"stages": {name: name[:6] for name in values}, "layer_labels": {name: name for name in values}}


def _heat_map(values: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return heat_map(values, models, title="t", **about_layers(values))


def _difference_map(values: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return difference_map(values - values.iloc[-1], models, title="t", **about_layers(values))


def _spread_map(values: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return spread_map(0.1 * values, models, title="t", **about_layers(values))


def _ranking(_: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return ranking(models, title="t")


def _accuracy(_: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return criticality_against_accuracy(models, correlations=SOME, title="t")


def _budget(_: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return criticality_against_budget(models, title="t")


def _depth(values: pd.DataFrame, models: pd.DataFrame) -> Figure:
    return criticality_over_depth(values, models, title="t", **about_layers(values))


# How each is drawn, and the columns that it needs besides those that all do.
FIGURES: dict[str, tuple[Draw, tuple[str, ...]]] = {
    "heat_map": (_heat_map, ("accuracy",)),
    "difference_map": (_difference_map, ("accuracy",)),
    "spread_map": (_spread_map, ("accuracy",)),
    "ranking": (_ranking, ("criticality", "low", "high")),
    "criticality_against_accuracy": (_accuracy, ("accuracy", "criticality")),
    "criticality_against_budget": (_budget, ("attack_norm", "eps", "criticality", "low", "high")),
    "criticality_over_depth": (_depth, ()),
}
each = pytest.mark.parametrize(("draw", "columns"), FIGURES.values(), ids=FIGURES)


def test_figures__all_are_here() -> None:
    functions = [
        name for name in figures.__all__ if name.islower() and "models" in signature(getattr(figures, name)).parameters
    ]
    assert sorted(FIGURES) == sorted(functions)


@each
def test_figures__missing_column_is_an_error(draw: Draw, columns: tuple[str, ...]) -> None:
    values, models = tables()
    for name in ("model", "label", "category", *columns):
        with pytest.raises(ProtocolError, match=rf"no column '{name}'; it has .*Expected model, label, category"):
            draw(values, models.drop(columns=name))
    draw(values, models[["model", "label", "category", *columns]])  # and no other one is needed
    with pytest.raises(ProtocolError, match="no column 'model'; it has none"):
        draw(values, pd.DataFrame(index=models.index))


@each
def test_figures__no_rows_or_a_model_twice_are_errors(draw: Draw, columns: tuple[str, ...]) -> None:
    values, models = tables()
    with pytest.raises(ProtocolError, match=r"table of models has no rows: expected one per model"):
        draw(values, models.iloc[:0])
    with pytest.raises(ProtocolError, match="contains 'model_2' more than once: expected one row per model"):
        draw(values, models.iloc[[0, 2, 1, 2]])


@each
def test_figures__tables_are_left_as_they_were(draw: Draw, columns: tuple[str, ...]) -> None:
    values, models = tables()
    before = values.copy(deep=True), models.copy(deep=True), SOME.copy(deep=True)
    draw(values, models)
    for table, copy in zip((values, models, SOME), before, strict=True):
        pd.testing.assert_frame_equal(table, copy)


@each
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures__same_tables_give_the_same_bytes_in_any_style(
    draw: Draw, columns: tuple[str, ...], suffix: str, tmp_path: Path
) -> None:
    values, models = tables(6, 4)
    values.iloc[0, 0] = np.nan
    (plain,) = save_figure(draw(values, models), tmp_path / "plain", [suffix])
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9, "text.usetex": True}):
        models.index = models["label"].str[::-1]  # nothing depends on it either
        (styled,) = save_figure(draw(values, models), tmp_path / "styled", [suffix])
    assert plain.read_bytes() == styled.read_bytes()


@each
def test_figures__texts_from_outside_are_never_formulas(draw: Draw, columns: tuple[str, ...], tmp_path: Path) -> None:
    values, models = tables(len(NASTY), len(NASTY))
    values.columns = pd.Index(NASTY)
    figure = draw(values, models.assign(label=NASTY, category=NASTY[::-1], attack_norm=NASTY))
    check_layout(figure)
    assert all(not text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())
    assert any("a$b$c" in text for text in all_texts(figure))
    png, svg, pdf = save_figure(figure, tmp_path / "nasty", ["png", "svg", "pdf"])
    Image.open(png).verify()
    ET.parse(svg)
    assert pdf.read_bytes().startswith(b"%PDF")


def test_figures__categories_look_the_same_everywhere() -> None:
    values, models = tables()
    scatter = legend(criticality_against_accuracy(models))
    names = ["baseline", "training recipes", "augmentation", "contrastive", "own idea", "no category"]
    assert list(scatter) == names
    assert len(set(scatter.values())) == len(names)
    assert list(CATEGORY_COLORS) == list(CATEGORY_MARKERS)
    line = {"mean of the baseline": ("#333333", "None")}
    assert legend(ranking(models)) == {**scatter, **line}
    assert legend(criticality_against_budget(models)) == {**scatter, **line}
    colors = {name: look[0] for name, look in scatter.items()}
    for figure in (heat_map(values, models), difference_map(values, models), spread_map(values, models)):
        strips = {patch.get_gid(): patch.get_facecolor() for patch in figure.findobj(Rectangle)}
        assert {name: to_hex(strips[name]).upper() for name in names} == colors
    panels = criticality_over_depth(values, models).axes
    drawn = {written(panel, "category")[0]: lines(panel, "mean")[0].get_color().upper() for panel in panels}
    assert {title.split(" (")[0]: color for title, color in drawn.items()} == colors
    one = models.assign(category="augmentation")
    for figure in (criticality_against_accuracy(one), ranking(one), criticality_against_budget(one)):
        assert legend(figure) == {}


def test_figures__no_matplotlib_before_drawing_and_never_pyplot() -> None:
    program = """
import sys
import layercrit.figures as figures
assert not [name for name in sys.modules if name.startswith("matplotlib")], "matplotlib is imported too early"
import pandas
models = pandas.DataFrame({"model": ["a", "b"], "label": None, "category": "c", "accuracy": 0.5, "criticality": 0.1,
                           "low": 0.0, "high": 0.5, "attack_norm": "l2", "eps": 1.0})
values = pandas.DataFrame({"x": [0.1, 0.2]}, index=["a", "b"])
for draw in (figures.heat_map, figures.difference_map, figures.spread_map, figures.criticality_over_depth):
    draw(values, models)
for draw in (figures.ranking, figures.criticality_against_accuracy, figures.criticality_against_budget):
    draw(models)
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the published study ----------------------------------------------------------------------------------------------


def cells_of_table(model: str) -> list[float]:
    """Return a model's criticality in percent, layer by layer, from the rows of the released table."""
    cosines: dict[str, list[float]] = {}
    with (RELEASED / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["model_id"] == model:
                cosines.setdefault(row["layer"], []).append(float(row["pred_cos_sim"]))
    return [100 * (1 - sum(found) / len(found)) for found in cosines.values()]


@dataclass(frozen=True)
class Published:
    comparison: Comparison
    models: pd.DataFrame
    stages: dict[str, str]
    percent: dict[str, float]  # of each model, its mean criticality
    expected: dict[str, Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published") / "study"
    study = import_published(RELEASED / "results.csv", folder, RELEASED / "models.csv")
    comparison = compare(study)
    models = about_models(study, comparison)
    expected = json.loads((RELEASED / "expected.json").read_text(encoding="utf-8"))
    percent = expected["mean_criticality_percent_by_model"]
    return Published(comparison, models, comparison.layers["stage"].to_dict(), percent, expected)


@released
def test_heat_map__of_the_published_study(published: Published) -> None:
    values = published.comparison.criticality
    figure = heat_map(values, published.models, title="Published study", stages=published.stages)
    names = written(figure, "model")
    assert names[0] == "Baseline"
    numbers = written(figure, "values")
    assert len(numbers) == 50 * 54
    assert numbers[:54] == [f"{value:.0f}" for value in cells_of_table("tv_resnet50")]
    assert numbers[:4] == ["99", "98", "65", "61"]
    labels = published.models.set_index("model")["label"]
    found = dict(zip(names, written(figure, "model means"), strict=True))
    expected = {labels[model]: f"{mean:.0f}" for model, mean in published.percent.items()}
    assert {name: text.split(" ± ")[0] for name, text in found.items()} == expected
    of_layer = published.expected["mean_criticality_percent_by_layer"]
    expected = [f"{of_layer[name]:.0f}" for name in values.columns]
    assert [text.split("\n±")[0] for text in written(figure, "layer means")] == expected
    check_layout(figure)


@released
def test_difference_map__of_the_published_study(published: Published) -> None:
    figure = difference_map(published.comparison.difference, published.models, stages=published.stages)
    assert written(figure, "values")[:54] == ["0"] * 54
    found = dict(zip(written(figure, "model"), written(figure, "model means"), strict=True))
    percent = published.percent
    assert found["timm B1k"].startswith("−30 ± ")  # noqa: RUF001 (a minus sign)
    assert percent["resnet50.b1k_in1k"] - percent["tv_resnet50"] == pytest.approx(-30, abs=0.5)
    assert found["SimCLRv2"].startswith("+16 ± ")
    assert percent["resnet50_simclrv2"] - percent["tv_resnet50"] == pytest.approx(16, abs=0.5)
    check_layout(figure)


@released
def test_spread_map__of_the_published_study(published: Published) -> None:
    figure = spread_map(published.comparison.sd_trials, published.models, stages=published.stages)
    numbers = [int(text) for text in written(figure, "values")]
    assert max(numbers) == round(published.expected["max_of_cell_std_percent"]) == 45
    assert sum(numbers) / len(numbers) == pytest.approx(published.expected["mean_of_cell_std_percent"], abs=0.1)


@released
def test_criticality_against_accuracy__of_the_published_study(published: Published) -> None:
    rows = published.comparison.correlations
    wanted = rows[rows["without"].isna() | (rows["without"] == "adversarial_training")]
    figure = criticality_against_accuracy(published.models, correlations=wanted)
    assert written(figure, "note") == [
        "Spearman's ρ = −0.46, p < 0.001; Kendall's τ = −0.35, p < 0.001",  # noqa: RUF001
        "without adversarial training:",
        "    ρ = −0.17, p = 0.32; τ = −0.08, p = 0.52",  # noqa: RUF001
    ]
    assert published.expected["spearman_all"]["statistic"] == pytest.approx(-0.46, abs=0.005)
    assert published.expected["spearman_without_adversarial"]["statistic"] == pytest.approx(-0.17, abs=0.005)
    check_layout(figure)


@released
def test_criticality_against_budget__of_the_published_study(published: Published) -> None:
    figure = criticality_against_budget(published.models, baseline=published.comparison.baseline)
    budgets = {
        "L2": ("l2", ["0", "0.01", "0.03", "0.05", "0.1", "0.25", "0.5", "1", "3", "5"]),
        "L∞": ("linf", ["0.5", "1", "2", "4", "8"]),
    }
    assert [written(panel, "norm") for panel in figure.axes] == [[norm] for norm in budgets]
    for panel, (norm, eps) in zip(figure.axes, budgets.values(), strict=True):
        assert [label.get_text() for label in panel.get_xticklabels()] == eps
        names = [f"robust_resnet50_{norm}_eps{one}" for one in eps]
        names = [name if name in published.percent else f"{name}.0" for name in names]
        (means,), (baseline,) = lines(panel, "means"), lines(panel, "baseline")
        assert (100 * means.get_ydata()).tolist() == pytest.approx([published.percent[name] for name in names])
        assert 100 * baseline.get_ydata()[0] == pytest.approx(published.percent["tv_resnet50"])
        assert len(bars(panel, "interval")) == len(eps)
    check_layout(figure)


@released
def test_criticality_over_depth__of_the_published_study(published: Published) -> None:
    figure = criticality_over_depth(published.comparison.criticality, published.models, stages=published.stages)
    found = {}
    for panel in figure.axes:
        (line,) = lines(panel, "mean")
        found[written(panel, "category")[0].split(" (")[0].replace(" ", "_")] = 100 * line.get_ydata().mean()
    assert found == pytest.approx(published.expected["mean_criticality_percent_by_category"])
    names = published.comparison.criticality.columns.tolist()
    ends = [line.get_xdata()[0] for line in lines(figure.axes[0], "stage")]
    assert ends == [names.index(f"model.{name}") - 0.5 for name in
                    ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1", "fc")]  # fmt: skip
    check_layout(figure)


@released
def test_ranking__of_the_published_study(published: Published) -> None:
    figure = ranking(published.models, baseline=published.comparison.baseline)
    labels = published.models.set_index("model")["label"]
    ranked = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ranked == [labels[model] for model in sorted(published.percent, key=published.percent.__getitem__)]
    assert (ranked[0], ranked[-1]) == ("timm B1k", "PixMix (180Ep)")
    check_layout(figure)
