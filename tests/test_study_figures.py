import itertools
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from layercrit.comparison import compare
from layercrit.errors import ProtocolError
from layercrit.figures import save_figure
from layercrit.published import import_published
from layercrit.study_figures import (
    CATEGORY_COLORS,
    CATEGORY_MARKERS,
    criticality_against_accuracy,
    heat_map,
    ranking,
)
from published_results import RELEASED, released

CATEGORIES = ["contrastive", "augmentation", None, "own_idea", "baseline", "augmentation", "training_recipes"]
NASTY = ["$x_1$", "a$b$c", r"\frac{", "_hidden", "cost$", "tab\tbell\x07", "line\nbreak", "<&>\"'", "Cé±", "x" * 500]


def tables(n_models: int = 7, n_layers: int = 5) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return values and models of an invented study."""
    generator = np.random.default_rng(n_models)
    names = [f"model_{index}" for index in range(n_models)]
    values = pd.DataFrame(
        generator.random((n_models, n_layers)), index=names, columns=[f"layer{i}.conv" for i in range(n_layers)]
    )
    means = values.mean(axis=1).to_numpy()
    models = pd.DataFrame(
        {
            "model": names,
            "label": [f"Model {index}" for index in range(n_models)],
            "category": list(itertools.islice(itertools.cycle(CATEGORIES), n_models)),
            "accuracy": generator.uniform(0.5, 0.8, n_models),
            "criticality": means,
            "low": means - 0.02,
            "high": means + 0.03,
        }
    )
    return values, models


def written(figure: Figure, gid: str) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_gid() == gid]


def cells(figure: Figure, gid: str) -> PolyCollection:
    (found,) = (one for one in figure.findobj(PolyCollection) if one.get_gid() == gid)
    return found


def lines(figure: Figure, gid: str) -> list[Line2D]:
    return [line for line in figure.findobj(Line2D) if line.get_gid() == gid]


def legend(figure: Figure) -> dict[str, tuple[str, str]]:
    """Return label -> colour and marker."""
    if not figure.legends:
        return {}
    (one,) = figure.legends
    handles = [(to_hex(line.get_color()).upper(), str(line.get_marker())) for line in one.get_lines()]
    return dict(zip([text.get_text() for text in one.get_texts()], handles, strict=True))


def check_layout(figure: Figure) -> None:
    """Check that no text is cut off, and that no text covers another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.bbox.size
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [Text.get_window_extent(text, renderer) for text in shown]
    boxes = [box for box in boxes if box.width]
    for text, box in zip(shown, boxes, strict=True):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    edges = np.array([(box.x0, box.y0, box.x1, box.y1) for box in boxes])
    apart = np.minimum(edges[:, None, 2:], edges[None, :, 2:]) - np.maximum(edges[:, None, :2], edges[None, :, :2])
    # A pixel of 100 to the inch: boxes are as high as the highest letters of a font, those of numbers stay empty there.
    over = np.argwhere(np.triu((apart > 1).all(axis=-1), 1))
    assert not len(over), [(shown[i].get_text(), shown[j].get_text()) for i, j in over[:5]]


# --- heat map ---------------------------------------------------------------------------------------------------------


def test_heat_map__models_are_grouped_by_category_and_keep_their_order() -> None:
    values, models = tables()
    figure = heat_map(values.iloc[::-1], models)  # the order of models counts, not that of values
    assert written(figure, "category") == [
        "baseline", "training recipes", "augmentation", "contrastive", "own idea", "no category",
    ]  # fmt: skip
    order = [4, 6, 1, 5, 0, 3, 2]
    assert written(figure, "model") == [f"Model {index}" for index in order]
    assert written(figure, "accuracy") == [f"{100 * models['accuracy'][index]:.1f}" for index in order]
    assert written(figure, "layer") == values.columns.tolist()
    expected = values.iloc[order]
    assert written(figure, "values") == [f"{100 * value:.0f}" for value in expected.to_numpy().ravel()]
    assert (
        cells(figure, "values").get_facecolors().tolist()
        == mpl.colormaps["viridis"](expected.to_numpy().ravel()).tolist()
    )


def test_heat_map__cells_lie_in_rows_and_columns() -> None:
    values, models = tables(6, 4)
    figure = heat_map(values, models.assign(category="augmentation"))
    corners = np.array([path.vertices[:4] for path in cells(figure, "values").get_paths()]).reshape(6, 4, 4, 2)
    left, bottom = corners[..., 0].min(axis=-1), corners[..., 1].min(axis=-1)
    assert (np.ptp(left, axis=0) < 1e-9).all()
    assert (np.diff(left, axis=1) > 0).all()
    assert (np.ptp(bottom, axis=1) < 1e-9).all()
    assert (np.diff(bottom, axis=0) < 0).all()
    labels = {text.get_text(): text.get_position() for text in figure.findobj(Text) if text.get_gid() == "layer"}
    assert [labels[name][0] for name in values] == pytest.approx(corners[0, ..., 0].mean(axis=-1))
    names = [text.get_position()[1] for text in figure.findobj(Text) if text.get_gid() == "model"]
    assert names == pytest.approx(corners[:, 0, :, 1].mean(axis=-1))


def test_heat_map__strips_have_the_colours_of_the_categories() -> None:
    values, models = tables()
    strips = {
        patch.get_gid(): patch for patch in heat_map(values, models).findobj(Rectangle) if patch.get_gid() is not None
    }
    for name, color in CATEGORY_COLORS.items():
        if name in CATEGORIES:
            assert to_hex(strips[name.replace("_", " ")].get_facecolor()).upper() == color
    assert strips["augmentation"].get_height() > 1.9 * strips["baseline"].get_height()
    assert len({to_hex(strip.get_facecolor()) for strip in strips.values()}) == 6


def test_heat_map__means_and_deviations() -> None:
    """Against the formulas, written out."""
    values, models = tables(3, 4)
    values.iloc[1, 2] = np.nan
    figure = heat_map(values, models.assign(category=None))

    def both(numbers: list[float], between: str) -> str:
        numbers = [number for number in numbers if number == number]
        mean = sum(numbers) / len(numbers)
        variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
        return f"{100 * mean:.0f}{between}{100 * variance**0.5:.0f}"

    assert written(figure, "model means") == [both(row.tolist(), " ± ") for row in values.to_numpy()]
    assert written(figure, "layer means") == [both(column.tolist(), "\n±") for column in values.to_numpy().T]


def test_heat_map__one_cell_has_no_deviation() -> None:
    values, models = tables(1, 1)
    figure = heat_map(values, models)
    number = f"{100 * values.iloc[0, 0]:.0f}"
    assert [written(figure, gid) for gid in ("values", "model means", "layer means")] == [[number]] * 3
    check_layout(figure)


def test_heat_map__cells_without_a_value_are_hatched() -> None:
    values, models = tables()
    assert not written(heat_map(values, models), "values, not measured")
    assert "not measured" not in [text.get_text() for text in heat_map(values, models).findobj(Text)]
    values.iloc[0, 1:3] = np.nan
    values.iloc[4] = np.nan  # a whole model
    figure = heat_map(values, models)
    assert len(cells(figure, "values, not measured").get_paths()) == 2 + 5
    assert cells(figure, "values, not measured").get_hatch()
    assert len(cells(figure, "model means, not measured").get_paths()) == 1
    assert len(written(figure, "values")) == values.notna().to_numpy().sum()
    assert "not measured" in [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("value", [0.0, 0.2, 0.45, 0.55, 0.8, 1.0])
def test_heat_map__numbers_are_readable_on_their_cells(value: float) -> None:
    """Contrast of at least 4.5 to 1, as WCAG 2.2 wants it of small text (success criterion 1.4.3)."""
    _, models = tables(1)
    figure = heat_map(pd.DataFrame({"a": [value]}, index=["model_0"]), models)
    (number,) = (text for text in figure.findobj(Text) if text.get_gid() == "values")

    def luminance(color: object) -> float:
        parts = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in mpl.colors.to_rgb(color)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted([luminance(number.get_color()), luminance(cells(figure, "values").get_facecolor()[0])])
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_heat_map__numbers_are_left_out_where_they_have_no_room() -> None:
    values, models = tables(5, 150)
    figure = heat_map(values, models)
    assert written(figure, "values") == written(figure, "layer means") == []
    assert len(written(figure, "model means")) == 5
    assert len(written(figure, "layer")) == 150


def test_heat_map__without_accuracies_or_categories() -> None:
    values, models = tables()
    figure = heat_map(
        values, models.assign(accuracy=np.nan, category=None, label=[None, np.nan, "", " ", "B", "C", "D"])
    )
    assert written(figure, "accuracy") == written(figure, "category") == []
    assert written(figure, "model") == ["model_0", "model_1", "model_2", "model_3", "B", "C", "D"]
    models.loc[4, "accuracy"] = np.nan  # the baseline, on top
    assert written(heat_map(values, models), "accuracy")[0] == "–"  # noqa: RUF001 (a dash)


@pytest.mark.parametrize(("n_models", "n_layers"), [(1, 2), (2, 1), (14, 23), (50, 54), (60, 120)])
def test_heat_map__nothing_is_cut_off_or_overlaps(n_models: int, n_layers: int) -> None:
    values, models = tables(n_models, n_layers)
    values.iloc[0, 0] = np.nan
    values.columns = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(n_layers)]
    check_layout(
        heat_map(values, models, title="A rather long title of a study with many models", quantity="agreement")
    )


def test_heat_map__texts_from_outside_are_shown_as_they_are(tmp_path: Path) -> None:
    values, models = tables(len(NASTY), len(NASTY))
    models = models.assign(model=NASTY, label=NASTY, category=NASTY)
    values.index = values.columns = pd.Index(NASTY)
    figure = heat_map(values, models, title="$\\alpha$ and {\n", quantity="$q$")
    plain = ["".join(one if one.isprintable() else " " for one in name) for name in NASTY[:-1]]
    long = "x" * 29 + "…" + "x" * 29
    for gid in ("model", "layer"):
        assert written(figure, gid) == [*plain, long]
    check_layout(figure)
    for path in save_figure(figure, tmp_path / "nasty"):
        ET.parse(path) if path.suffix == ".svg" else Image.open(path).verify()


def test_heat_map__values_outside_of_their_range_are_an_error() -> None:
    values, models = tables()
    values.iloc[2, 3] = 45
    with pytest.raises(ProtocolError, match=r"value of 'model_2' at 'layer3.conv' is 45: expected shares in \[0, 1\]"):
        heat_map(values, models)


def test_heat_map__different_models_are_an_error() -> None:
    values, models = tables()
    with pytest.raises(ProtocolError, match=r"Models in the table of models but not in the values: model_0, model_3\."):
        heat_map(values.drop(index=["model_0", "model_3"]), models)
    with pytest.raises(ProtocolError, match="Models in the values but not in the table of models: model_6"):
        heat_map(values, models.iloc[:6])


def test_heat_map__tables_that_are_empty_or_hold_a_name_twice_are_an_error() -> None:
    values, models = tables()
    with pytest.raises(ProtocolError, match="values have no layer: expected"):
        heat_map(values.iloc[:, :0], models)
    with pytest.raises(ProtocolError, match="values have no model: expected"):
        heat_map(values.iloc[:0], models)
    with pytest.raises(ProtocolError, match=r"values hold the layer 'layer0.conv' more than once"):
        heat_map(values.iloc[:, [0, 1, 0]], models)
    with pytest.raises(ProtocolError, match="values hold the model 'model_1' more than once"):
        heat_map(values.iloc[[0, 1, 1]], models)


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
    bars = [one for one in figure.axes[0].collections if one.get_gid() == "interval"]
    found = [bar.get_segments()[0].tolist() for bar in bars]
    assert found == [[[row.low, y], [row.high, y]] for y, row in ordered.iterrows() if row.low == row.low]
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


# --- criticality against accuracy -------------------------------------------------------------------------------------


def test_criticality_against_accuracy__one_point_per_model() -> None:
    _, models = tables()
    figure = criticality_against_accuracy(models)
    for category, rows in models.groupby(models["category"].fillna("no category")):
        (drawn,) = lines(figure, category.replace("_", " "))
        np.testing.assert_array_equal(drawn.get_xydata(), rows[["accuracy", "criticality"]])
        if category in CATEGORY_COLORS:
            assert to_hex(drawn.get_color()).upper() == CATEGORY_COLORS[category]
            assert drawn.get_marker() == CATEGORY_MARKERS[category]
    assert figure.axes[0].get_xlabel() == "accuracy (%)"
    assert figure.axes[0].get_ylabel() == "mean criticality (%)"


def test_criticality_against_accuracy__labels_up_to_twenty_models() -> None:
    for n_models, n_labels in ((1, 1), (20, 20), (21, 0)):
        _, models = tables(n_models)
        figure = criticality_against_accuracy(models)
        assert sorted(written(figure, "label")) == sorted(models["label"][:n_labels])
        check_layout(figure)


def test_criticality_against_accuracy__a_label_gives_way_to_a_point() -> None:
    _, models = tables(3)
    # A label stands to the right of its point, unless another point is there.
    models[["accuracy", "criticality"]] = [[0.5, 0.5], [0.55, 0.5], [0.9, 0.9]]
    figure = criticality_against_accuracy(models)
    places = {text.get_text(): text.xyann[0] - text.xy[0] for text in figure.axes[0].texts if text.get_gid() == "label"}
    assert places["Model 0"] < 0 < places["Model 1"]


@pytest.mark.parametrize("seed", range(5))
def test_criticality_against_accuracy__labels_of_a_crowd_keep_apart(seed: int) -> None:
    generator = np.random.default_rng(seed)
    _, models = tables(20)
    crowd = generator.uniform(0.5, 0.8, (20, 2))
    crowd[:3] = 0.8, 0.8  # the same point, thrice, in a corner
    models[["accuracy", "criticality"]] = crowd
    figure = criticality_against_accuracy(models)
    check_layout(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = figure.axes[0].transData.transform(crowd)
    for text in figure.findobj(Text):
        if text.get_gid() == "label":
            box = Text.get_window_extent(text, renderer)
            assert not any(box.contains(*point) for point in points), text.get_text()


def test_criticality_against_accuracy__models_without_numbers_are_counted() -> None:
    _, models = tables()
    whole = legend(criticality_against_accuracy(models))
    models.loc[2, "accuracy"] = np.nan
    models.loc[0, "criticality"] = np.nan
    figure = criticality_against_accuracy(models)
    assert "not shown: 2 without accuracy or criticality" in [text.get_text() for text in figure.findobj(Text)]
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
    ("rho", "p_value", "expected"),
    [
        (-0.6123, 2e-6, ["Spearman's ρ = −0.61, p < 0.001"]),  # noqa: RUF001 (a minus sign)
        (0.3, 0.214, ["Spearman's ρ = 0.30, p = 0.21"]),  # noqa: RUF001 (a rho)
        (0.3, None, ["Spearman's ρ = 0.30"]),  # noqa: RUF001
        (1.0, float("nan"), ["Spearman's ρ = 1.00"]),  # noqa: RUF001
        (float("nan"), 0.1, []),
        (None, None, []),
    ],
)
def test_criticality_against_accuracy__correlation(
    rho: float | None, p_value: float | None, expected: list[str]
) -> None:
    _, models = tables()
    assert written(criticality_against_accuracy(models, rho=rho, p_value=p_value, title="t"), "note") == expected


# --- all of them ------------------------------------------------------------------------------------------------------

FIGURES = {
    "heat_map": (lambda values, models: heat_map(values, models, title="t"), "accuracy"),
    "ranking": (lambda _, models: ranking(models, title="t"), "low"),
    "scatter": (lambda _, models: criticality_against_accuracy(models, rho=0.5, p_value=0.1, title="t"), "criticality"),
}  # name -> how it is drawn, and a column that it needs
each = pytest.mark.parametrize(("draw", "column"), FIGURES.values(), ids=FIGURES)


@each
def test_figures__missing_column_is_an_error(draw, column) -> None:
    values, models = tables()
    for name in ("model", "label", "category", column):
        with pytest.raises(ProtocolError, match=rf"no column '{name}'; it has .*Expected model, label, category"):
            draw(values, models.drop(columns=name))


@each
def test_figures__no_rows_or_a_model_twice_are_errors(draw, column) -> None:
    values, models = tables()
    with pytest.raises(ProtocolError, match="table of models has no rows"):
        draw(values, models.iloc[:0])
    with pytest.raises(ProtocolError, match="holds 'model_2' more than once"):
        draw(values, models.iloc[[0, 2, 1, 2]])


@each
def test_figures__tables_are_left_as_they_were(draw, column) -> None:
    values, models = tables()
    before = values.copy(deep=True), models.copy(deep=True)
    draw(values, models)
    pd.testing.assert_frame_equal(values, before[0])
    pd.testing.assert_frame_equal(models, before[1])


@each
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures__same_tables_give_the_same_bytes_in_any_style(draw, column, suffix: str, tmp_path: Path) -> None:
    values, models = tables()
    values.iloc[0, 0] = np.nan
    (plain,) = save_figure(draw(values, models), tmp_path / "plain", [suffix])
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9, "text.usetex": True}):
        (styled,) = save_figure(draw(values, models), tmp_path / "styled", [suffix])
    assert plain.read_bytes() == styled.read_bytes()


@each
def test_figures__texts_from_outside_are_never_formulas(draw, column, tmp_path: Path) -> None:
    values, models = tables(len(NASTY))
    models = models.assign(label=NASTY, category=NASTY[::-1])
    figure = draw(values, models)
    check_layout(figure)
    assert all(not text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())
    assert any("$x_1$" in text.get_text() for text in figure.findobj(Text))
    ET.parse(save_figure(figure, tmp_path / "nasty", ["svg"])[0])


def test_figures__categories_look_the_same_everywhere() -> None:
    values, models = tables()
    scatter, ranked = legend(criticality_against_accuracy(models)), legend(ranking(models))
    assert list(scatter) == [
        "baseline", "training recipes", "augmentation", "contrastive", "own idea", "no category",
    ]  # fmt: skip
    ranked.pop("mean of the baseline")
    assert scatter == ranked
    strips = {patch.get_gid(): patch.get_facecolor() for patch in heat_map(values, models).findobj(Rectangle)}
    assert {name: to_hex(strips[name]).upper() for name in scatter} == {name: look[0] for name, look in scatter.items()}
    assert len(set(scatter.values())) == len(scatter)
    assert list(CATEGORY_COLORS) == list(CATEGORY_MARKERS)
    assert legend(criticality_against_accuracy(models.assign(category="augmentation"))) == {}


def test_figures__no_matplotlib_before_drawing_and_never_pyplot() -> None:
    program = """
import sys
import layercrit.study_figures as figures
assert not [name for name in sys.modules if name.startswith("matplotlib")], "matplotlib is imported too early"
import pandas
models = pandas.DataFrame({"model": ["a", "b"], "label": None, "category": "c", "accuracy": 0.5, "criticality": 0.1,
                           "low": 0.0, "high": 0.5})
figures.heat_map(pandas.DataFrame({"x": [0.1, 0.2]}, index=["a", "b"]), models)
figures.ranking(models)
figures.criticality_against_accuracy(models)
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@released
def test_figures__of_the_published_study(tmp_path: Path) -> None:
    study = import_published(RELEASED / "results.csv", tmp_path / "study", RELEASED / "models.csv")
    comparison = compare(study, baseline="tv_resnet50")
    models = comparison.models.reset_index().assign(low=np.nan, high=np.nan)
    heat = heat_map(comparison.criticality, models, title="Published study")
    assert len(written(heat, "values")) == 50 * 54
    assert written(heat, "model")[0] == "Baseline"
    means = [int(text.split()[0]) / 100 for text in written(heat, "model means")]
    assert sorted(means) == pytest.approx(sorted(comparison.models["criticality"]), abs=0.005)
    ranked = ranking(models, baseline=comparison.baseline)
    names = [label.get_text() for label in ranked.axes[0].get_yticklabels()]
    assert (names[0], names[-1]) == ("timm B1k", "PixMix (180Ep)")
    scatter = criticality_against_accuracy(models, rho=-0.5, p_value=0.01)
    for figure in (heat, ranked, scatter):
        check_layout(figure)
    assert [path.stat().st_size > 10_000 for path in save_figure(heat, tmp_path / "heat")] == [True, True]
