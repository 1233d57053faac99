import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from figure_checks import CATEGORIES, NASTY, SHOWN, all_texts, check_layout, collection, numbers, tables, written
from layercrit.errors import ProtocolError
from layercrit.figures.categories import CATEGORY_COLORS
from layercrit.figures.heat_maps import difference_map, heat_map, module_criticality_map, spread_map


def corners(figure: Figure, gid: str = "values") -> np.ndarray:
    """Return the corners of squares in inches, ``(n_squares, 4, 2)``."""
    return np.array([path.vertices[:4] for path in collection(figure, gid).get_paths()])


def bar(figure: Figure) -> tuple[list[str], tuple[float, float]]:
    """Return what stands at the colour bar, and the values of its first and last colour."""
    (axes,) = (one for one in figure.axes if one.get_label() == "colours")
    return [label.get_text() for label in axes.get_xticklabels()], axes.get_xlim()


def one_row(*values: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a study of one model with these values."""
    _, models = tables(1)
    return pd.DataFrame([values], index=["model_0"], columns=[f"l{i}" for i in range(len(values))]), models


def mean_and_sd(numbers: list[float], between: str, number: str) -> str:
    """By the formulas, written out, of the numbers that are known."""
    numbers = [100 * number for number in numbers if number == number]
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    return f"{mean:{number}}{between}{variance**0.5:{number.lstrip('+')}}"


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
        collection(figure, "values").get_facecolors().tolist()
        == mpl.colormaps["viridis"](expected.to_numpy().ravel()).tolist()
    )


def test_heat_map__squares_lie_in_rows_and_columns() -> None:
    values, models = tables(6, 4)
    figure = heat_map(values, models.assign(category="augmentation"))
    places = corners(figure).reshape(6, 4, 4, 2)
    left, bottom = places[..., 0].min(axis=-1), places[..., 1].min(axis=-1)
    assert (np.ptp(left, axis=0) < 1e-9).all()
    assert (np.diff(left, axis=1) > 0).all()
    assert (np.ptp(bottom, axis=1) < 1e-9).all()
    assert (np.diff(bottom, axis=0) < 0).all()
    labels = {text.get_text(): text.get_position() for text in figure.findobj(Text) if text.get_gid() == "layer"}
    assert [labels[name][0] for name in values] == pytest.approx(places[0, ..., 0].mean(axis=-1))
    names = [text.get_position()[1] for text in figure.findobj(Text) if text.get_gid() == "model"]
    assert names == pytest.approx(places[:, 0, :, 1].mean(axis=-1))


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
    values, models = tables(3, 4)
    values.iloc[1, 2] = np.nan
    figure = heat_map(values, models.assign(category=None))
    assert written(figure, "model means") == [mean_and_sd(row.tolist(), " ± ", ".0f") for row in values.to_numpy()]
    assert written(figure, "layer means") == [mean_and_sd(row.tolist(), "\n±", ".0f") for row in values.to_numpy().T]
    means = mpl.colormaps["viridis"](values.mean(axis=1).to_numpy())
    np.testing.assert_allclose(collection(figure, "model means").get_facecolors(), means)


def test_heat_map__one_square_has_no_deviation() -> None:
    values, models = tables(1, 1)
    figure = heat_map(values, models)
    number = f"{100 * values.iloc[0, 0]:.0f}"
    assert [written(figure, gid) for gid in ("values", "model means", "layer means")] == [[number]] * 3
    check_layout(figure)


def test_heat_map__squares_without_a_value_are_hatched() -> None:
    values, models = tables()
    assert not written(heat_map(values, models), "values, not measured")
    assert "not measured" not in all_texts(heat_map(values, models))
    values.iloc[0, 1:3] = np.nan
    values.iloc[4] = np.nan  # a whole model
    figure = heat_map(values, models)
    assert len(collection(figure, "values, not measured").get_paths()) == 2 + 5
    assert collection(figure, "values, not measured").get_hatch()
    assert len(collection(figure, "model means, not measured").get_paths()) == 1
    assert len(written(figure, "values")) == values.notna().to_numpy().sum()
    assert "not measured" in all_texts(figure)


@pytest.mark.parametrize("value", [0.0, 0.2, 0.45, 0.55, 0.8, 1.0])
def test_heat_map__numbers_are_readable_on_their_squares(value: float) -> None:
    """Contrast of at least 4.5 to 1, as WCAG 2.2 wants it of small text (success criterion 1.4.3)."""
    _, models = tables(1)
    figure = heat_map(pd.DataFrame({"a": [value]}, index=["model_0"]), models)
    ((_, _, color),) = numbers(figure, "values")

    def luminance(color: object) -> float:
        parts = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in mpl.colors.to_rgb(color)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted([luminance(color), luminance(collection(figure, "values").get_facecolor()[0])])
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def check_numbers(figure: Figure) -> None:
    """Check that every number is in the middle of its square, and within it."""
    for gid in ("values", "model means", "layer means"):
        boxes = [path.get_extents() for path in collection(figure, gid).get_paths()]
        assert len(boxes) == len(numbers(figure, gid))
        for (_, middle, _), box in zip(numbers(figure, gid), boxes, strict=True):
            np.testing.assert_allclose(middle, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), atol=1e-6)
        for one in figure.findobj(PathCollection):
            if one.get_gid() == gid:
                outline = one.get_paths()[0].get_extents()  # points around the middle
                assert max(-outline.x0, outline.x1) < 36 * boxes[0].width, one.get_label()
                assert max(-outline.y0, outline.y1) < 36 * boxes[0].height, one.get_label()
                assert outline.y0 + outline.y1 == pytest.approx(0, abs=0.5), one.get_label()


def test_heat_map__numbers_lie_within_their_squares() -> None:
    values, models = tables(20, 40)
    values.iloc[0] = 1.0  # the widest
    check_numbers(heat_map(values, models))


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


def test_heat_map__colour_bar_goes_from_0_to_100_percent() -> None:
    figure = heat_map(*one_row(0.2, 0.3), quantity="agreement")
    assert bar(figure) == (["0", "25", "50", "75", "100"], (0, 1))
    assert written(figure, "quantity") == ["agreement (%)"]


def test_heat_map__layers_have_their_labels() -> None:
    values, models = tables(3, 3)
    figure = heat_map(values, models, layer_labels={"layer1.conv": "[1] conv 3x3", "elsewhere": "never"})
    assert written(figure, "layer") == ["layer0.conv", "[1] conv 3x3", "layer2.conv"]


def test_heat_map__gaps_part_stages() -> None:
    values, models = tables(3, 6)
    stages = dict(zip(values.columns, ["a", "b", "b", "c", "c"], strict=False))  # the last layer has none
    figures = [heat_map(values, models, stages=some) for some in (None, {}, dict.fromkeys(values, "a"), stages)]
    for gid, rows in (("values", 3), ("layer means", 1)):
        lefts = [corners(figure, gid).reshape(rows, 6, 4, 2)[0, :, 0, 0] for figure in figures]
        for without in lefts[:3]:
            assert np.ptp(np.diff(without)) < 1e-9
        steps = np.diff(lefts[3])
        gaps = steps - steps[1]  # layers 1 and 2 are of one stage
        np.testing.assert_allclose(gaps[[1, 3]], 0, atol=1e-9)
        assert (gaps[[0, 2, 4]] > 0.02).all()
    names = [text.get_position()[0] for text in figures[3].findobj(Text) if text.get_gid() == "layer"]
    assert names == pytest.approx(corners(figures[3])[:6, :, 0].mean(axis=-1))


@pytest.mark.parametrize(("n_models", "n_layers"), [(1, 2), (2, 1), (14, 23), (50, 54), (60, 120)])
def test_heat_map__nothing_is_cut_off_or_overlaps(n_models: int, n_layers: int) -> None:
    values, models = tables(n_models, n_layers)
    values.iloc[0, 0] = np.nan
    values.columns = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(n_layers)]
    title = "A rather long title of a study with many models"
    stages = {name: str(i // 4) for i, name in enumerate(values)}
    check_layout(heat_map(values, models, title=title, quantity="agreement", stages=stages))


def test_heat_map__texts_from_outside_are_shown_as_they_are() -> None:
    values, models = tables(len(NASTY), len(NASTY))
    models = models.assign(model=NASTY, label=NASTY, category=NASTY)
    values.index = values.columns = pd.Index(NASTY)
    figure = heat_map(values, models, title="$\\alpha$ and {\n", quantity="$q$")
    for gid in ("model", "layer"):
        assert written(figure, gid) == SHOWN
    assert written(figure, "quantity") == ["$q$ (%)"]
    assert written(figure, "title") == ["$\\alpha$ and { "]
    check_layout(figure)


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
    with pytest.raises(ProtocolError, match=r"values contain the layer 'layer0.conv' more than once"):
        heat_map(values.iloc[:, [0, 1, 0]], models)
    with pytest.raises(ProtocolError, match="values contain the model 'model_1' more than once"):
        heat_map(values.iloc[[0, 1, 1]], models)


# --- differences ------------------------------------------------------------------------------------------------------


def test_difference_map__numbers_have_their_signs() -> None:
    figure = difference_map(*one_row(0.304, -0.2, 0.0, 0.004, -0.004, -0.006, 1.0))
    assert written(figure, "values") == ["+30", "−20", "0", "0", "0", "−1", "+100"]  # noqa: RUF001 (minus signs)
    assert written(figure, "layer means") == written(figure, "values")


def test_difference_map__small_numbers_have_a_decimal() -> None:
    figure = difference_map(*one_row(0.0304, -0.0994, 0.0001, 0.0))
    assert written(figure, "values") == ["+3.0", "−9.9", "0.0", "0.0"]  # noqa: RUF001 (a minus sign)
    figure = difference_map(*one_row(0.0304, -0.0996))
    assert written(figure, "values") == ["+3", "−10"]  # noqa: RUF001


def test_difference_map__means_and_deviations() -> None:
    values, models = tables(3, 4)
    models = models.assign(category=None)
    for scale, number in ((1.0, "+.0f"), (0.09, "+.1f")):
        differences = scale * (values - 0.5)
        figure = difference_map(differences, models)
        for gid, rows, between in (("model means", differences, " ± "), ("layer means", differences.T, "\n±")):
            expected = [mean_and_sd(row.tolist(), between, number) for row in rows.to_numpy()]
            assert written(figure, gid) == [text.replace("-", "−") for text in expected]  # noqa: RUF001


@pytest.mark.parametrize(
    ("values", "end"),
    [((0.57, -0.1), 60), ((0.1, -0.57), 60), ((0.3,), 30), ((0.1 + 0.2,), 30), ((0.301,), 40), ((-1.0,), 100),
     ((0.11,), 15), ((0.0123, np.nan), 1.5), ((0.0,), 1), ((np.nan, np.nan), 1)],
)  # fmt: skip
def test_difference_map__scale_is_symmetric_and_has_room_for_all(values: tuple[float, ...], end: float) -> None:
    texts, limits = bar(difference_map(*one_row(*values)))
    ticks = [f"{sign}{part * end:g}" for sign, part in (("−", 1), ("−", 0.5), ("", 0), ("+", 0.5), ("+", 1))]  # noqa: RUF001
    assert texts == ticks
    assert limits == pytest.approx((-end / 100, end / 100))


def test_difference_map__purple_is_more_and_orange_less() -> None:
    values, models = tables(4, 3)
    differences = 0.78 * (values - 0.5)
    differences.iloc[0] = 0.4, -0.4, 0.0
    figure = difference_map(differences, models.assign(category=None))
    drawn = collection(figure, "values").get_facecolors()
    np.testing.assert_allclose(drawn, mpl.colormaps["PuOr"]((differences.to_numpy().ravel() + 0.4) / 0.8))
    more, less, same = drawn[:3, :3]
    assert more[2] > more[0] > more[1], "not purple"
    assert less[0] > less[1] > less[2], "not orange"
    assert same.min() > 0.95, "not nearly white"
    assert written(figure, "quantity") == ["difference to the baseline (percentage points)"]


def test_difference_map__numbers_fit_into_their_squares() -> None:
    values, models = tables(20, 54)
    models["label"] = "a long name, which leaves squares less room than their numbers need"
    figure = difference_map(values - values.iloc[::-1].to_numpy(), models, stages={"layer3.conv": "a"})
    check_layout(figure)
    check_numbers(figure)


@pytest.mark.parametrize("size", [(1, 1), (14, 23)])
def test_difference_map__nothing_is_cut_off_or_overlaps(size: tuple[int, int]) -> None:
    values, models = tables(*size)
    values.columns = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(size[1])]
    check_layout(difference_map(0.05 * values - 0.02, models, title="A rather long title of a study of many models"))


def test_difference_map__values_outside_of_their_range_are_an_error() -> None:
    message = r"value of 'model_0' at 'l1' is -20: expected differences in \[-1, 1\].* Divide percentages by 100"
    with pytest.raises(ProtocolError, match=message):
        difference_map(*one_row(0.1, -20))


# --- spreads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "texts"),
    [((0.0, 0.41, 0.2), ["0", "25", "50"]), ((0.034, 0.001), ["0", "2", "4"]), ((0.1,), ["0", "5", "10"]),
     ((0.0,), ["0", "0.5", "1"]), ((np.nan,), ["0", "0.5", "1"])],
)  # fmt: skip
def test_spread_map__scale_starts_at_0(values: tuple[float, ...], texts: list[str]) -> None:
    figure = spread_map(*one_row(*values), quantity="half-width")
    end = float(texts[-1]) / 100
    assert bar(figure) == (texts, pytest.approx((0, end)))
    known = np.array(values)[np.isfinite(values)]
    np.testing.assert_allclose(collection(figure, "values").get_facecolors(), mpl.colormaps["BuPu"](known / end))
    assert written(figure, "quantity") == ["half-width (percentage points)"]


def test_spread_map__nothing_is_white_and_more_is_darker() -> None:
    drawn = collection(spread_map(*one_row(0.0, 0.1, 0.2, 0.3, 0.4)), "values").get_facecolors()[:, :3].sum(axis=1)
    assert drawn[0] > 2.9
    assert (np.diff(drawn) < -0.2).all()


def test_spread_map__small_numbers_have_a_decimal() -> None:
    assert written(spread_map(*one_row(0.034, 0.0, 0.0994)), "values") == ["3.4", "0.0", "9.9"]
    assert written(spread_map(*one_row(0.034, 0.0, 0.0996)), "values") == ["3", "0", "10"]


def test_spread_map__means_and_deviations() -> None:
    values, models = tables(4, 3)
    values = 0.05 * values
    values.iloc[2] = np.nan  # a model of one trial
    figure = spread_map(values, models.assign(category=None))
    known = values.drop(index="model_2").to_numpy()
    assert written(figure, "model means") == [mean_and_sd(row.tolist(), " ± ", ".1f") for row in known]
    assert written(figure, "layer means") == [mean_and_sd(row.tolist(), "\n±", ".1f") for row in known.T]
    assert len(collection(figure, "values, not measured").get_paths()) == 3


@pytest.mark.parametrize("size", [(1, 1), (14, 23)])
def test_spread_map__nothing_is_cut_off_or_overlaps(size: tuple[int, int]) -> None:
    values, models = tables(*size)
    check_layout(spread_map(0.09 * values, models, title="A title", quantity="half-width of the interval"))


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_spread_map__values_outside_of_their_range_are_an_error(value: float) -> None:
    with pytest.raises(ProtocolError, match=rf"at 'l0' is {value:g}: expected spreads in \[0, 1\], NaN where"):
        spread_map(*one_row(value, 0.1))


# --- module criticality -----------------------------------------------------------------------------------------------


def test_module_criticality_map__powers_of_ten_and_geometric_means() -> None:
    _, models = tables(2, 3)
    values = pd.DataFrame([[0.0, 99.0, 12_345.0], [np.nan, 9_999.0, 2e6]], index=models["model"], columns=list("abc"))
    figure = module_criticality_map(values, models)
    assert sorted(written(figure, "values")) == sorted(["0", "99", "12k", "10k", "2M"])
    means = [10 ** np.mean([0, 2, np.log10(12_346)]) - 1, 10 ** np.mean([4, np.log10(2e6 + 1)]) - 1]
    assert set(written(figure, "model means")) == {f"{means[0]:.0f}", f"{means[1] / 1e3:.0f}k"}
    assert "geometric\nmean" in all_texts(figure)
    assert "geometric mean over models" in all_texts(figure)
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()][:3] == ["0", "10", "100"]
    check_layout(figure)


def test_module_criticality_map__what_it_refuses() -> None:
    _, models = tables(2, 3)
    values = pd.DataFrame(-1.0, index=models["model"], columns=list("abc"))
    with pytest.raises(ProtocolError, match=r"is -1: expected numbers in \[0, inf\], NaN where not measured.$"):
        module_criticality_map(values, models)
    with pytest.raises(ProtocolError, match="is infinite"):
        module_criticality_map(values * -np.inf, models)
    assert module_criticality_map(0 * values, models) is not None


def test_module_criticality_map__very_large_values() -> None:
    _, models = tables(2, 3)
    values = pd.DataFrame([[1e15, 999e12, 2.6e120], [1e300, 1.0, 0.0]], index=models["model"], columns=list("abc"))
    figure = module_criticality_map(values, models)
    assert {"1e15", "1e300", "3e120"} <= set(written(figure, "values"))
    ticks = bar(figure)[0]
    assert len(ticks) <= 13
    assert ticks[:2] == ["0", "1e25"]
