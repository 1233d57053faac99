import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from figure_checks import NASTY, SHOWN, all_texts, check_layout, collection, legend, lines, tables, written
from layercrit.errors import ProtocolError
from layercrit.figures.categories import CATEGORY_COLORS
from layercrit.figures.depth import criticality_over_depth


def study(rows: dict[str, list[float]], *categories: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return values, models x layers, and models of these categories."""
    layers = [f"l{index}" for index in range(len(next(iter(rows.values()))))]
    models = pd.DataFrame({"model": list(rows), "label": None, "category": list(categories)})
    return pd.DataFrame(rows.values(), index=list(rows), columns=layers), models


def panels(figure: Figure) -> dict[str, Axes]:
    """Return what stands above a panel -> panel, from top to bottom."""
    return {written(axes, "category")[0]: axes for axes in figure.axes}


def curve(axes: Axes, gid: str) -> list[float]:
    """Return the heights of a line over the layers."""
    (line,) = lines(axes, gid)
    assert line.get_xdata().tolist() == list(range(len(line.get_xdata())))
    return line.get_ydata().tolist()


def band(axes: Axes) -> dict[int, tuple[float, float]]:
    """Return layer -> lower and upper edge of the band there."""
    found: dict[int, list[float]] = {}
    for path in collection(axes, "band").get_paths():
        for x, y in path.vertices.tolist():
            found.setdefault(round(x), []).append(y)
    return {x: (min(heights), max(heights)) for x, heights in sorted(found.items())}


def test_criticality_over_depth__mean_and_band_of_each_category() -> None:
    values, models = tables(14, 6)
    values.iloc[1, 2] = np.nan  # of augmentation, which has four models
    figure = criticality_over_depth(values.iloc[::-1], models)  # the order of models counts, not that of values
    assert list(panels(figure)) == [
        "baseline (2 models)", "training recipes (2 models)", "augmentation (4 models)", "contrastive (2 models)",
        "own idea (2 models)", "no category (2 models)",
    ]  # fmt: skip
    for title, axes in panels(figure).items():
        name = title.split(" (")[0].replace(" ", "_")
        known = models["category"].fillna("no_category")
        own = [model for model, one in zip(models["model"], known, strict=True) if one == name]
        for layer, drawn in enumerate(curve(axes, "mean")):
            numbers = [values.loc[model].iloc[layer] for model in own]
            numbers = [number for number in numbers if not math.isnan(number)]
            mean = sum(numbers) / len(numbers)
            spread = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
            assert drawn == pytest.approx(mean)
            assert band(axes)[layer] == pytest.approx((max(mean - spread, 0), min(mean + spread, 1)))
        (line,), (filled,) = lines(axes, "mean"), collection(axes, "band").get_facecolors()
        assert to_hex(line.get_color()) == to_hex(filled)
        assert to_hex(filled).upper() == CATEGORY_COLORS.get(name, to_hex(filled).upper())


def test_criticality_over_depth__band_is_cut_at_0_and_1() -> None:
    figure = criticality_over_depth(*study({"a": [0.0, 1.0, 0.4], "b": [0.9, 0.7, 0.6], "c": [0.0, 1.0, 0.5]}, *"ddd"))
    assert [axes.get_ylim() for axes in figure.axes] == [(0, 1)]
    spread = math.sqrt((0.3**2 + 0.3**2 + 0.6**2) / 2)
    assert band(figure.axes[0])[0] == pytest.approx((0, 0.3 + spread))
    assert band(figure.axes[0])[1] == pytest.approx((0.9 - math.sqrt((0.1**2 + 0.1**2 + 0.2**2) / 2), 1))
    assert band(figure.axes[0])[2] == pytest.approx((0.4, 0.6))


def test_criticality_over_depth__gaps_where_nothing_was_measured() -> None:
    nan = float("nan")
    rows = {"a": [0.1, 0.2, nan, 0.4, 0.5], "b": [0.3, nan, nan, 0.2, 0.5], "c": [nan, 0.5, 0.6, nan, nan]}
    figure = criticality_over_depth(*study(rows, "one", "one", "two"))
    one, two = figure.axes
    assert curve(one, "mean") == pytest.approx([0.2, 0.2, nan, 0.3, 0.5], nan_ok=True)
    assert sorted(band(one)) == [0, 3, 4]  # one value has no spread
    assert len(collection(one, "band").get_paths()) == 2, "the band must not cross the gap"
    assert curve(two, "mean") == pytest.approx([nan, 0.5, 0.6, nan, nan], nan_ok=True)
    assert lines(one, "mean")[0].get_marker() not in ("", "None"), "a layer between two gaps must be seen"


def test_criticality_over_depth__one_model_has_no_band() -> None:
    figure = criticality_over_depth(*study({"a": [0.1, 0.2], "b": [0.3, 0.4], "c": [0.5, 0.5]}, "one", "two", "two"))
    one, two = panels(figure).items()
    assert (one[0], two[0]) == ("one (1 model)", "two (2 models)")
    assert not [patch for patch in one[1].collections if patch.get_gid() == "band"]
    assert curve(one[1], "mean") == [0.1, 0.2]
    assert sorted(band(two[1])) == [0, 1]


def test_criticality_over_depth__baseline_is_dashed_in_every_panel_but_its_own() -> None:
    values, models = tables(7, 4)
    values.iloc[4, 1] = np.nan
    for baseline, row, absent in ((None, 4, "baseline (1 model)"), ("model_0", 0, "contrastive (1 model)")):
        figure = criticality_over_depth(values, models, baseline=baseline)
        for title, axes in panels(figure).items():
            if title == absent:  # it would only hide its own line
                assert not lines(axes, "baseline")
            else:
                assert curve(axes, "baseline") == pytest.approx(values.iloc[row].tolist(), nan_ok=True)
                assert lines(axes, "baseline")[0].get_linestyle() == "--"
        assert list(legend(figure)) == ["mean", "± SD", "baseline"]
    figure = criticality_over_depth(values, models, baseline="model_1")  # of augmentation, which has two models
    assert len(lines(figure, "baseline")) == len(figure.axes)
    without = criticality_over_depth(values.drop(index="model_4"), models.drop(index=4))
    assert not lines(without, "baseline")
    assert list(legend(without)) == ["mean", "± SD"]
    with pytest.raises(ProtocolError, match=r"no model 'model_22'. Did you mean 'model_2'"):
        criticality_over_depth(values, models, baseline="model_22")


def test_criticality_over_depth__stages_are_named_and_parted_by_lines() -> None:
    values, models = tables(7, 9)
    names = ["stem", *["first"] * 3, *["second"] * 4]  # the last layer has no stage
    figure = criticality_over_depth(values, models, stages=dict(zip(values.columns, names, strict=False)))
    for axes in figure.axes:
        assert [line.get_xdata()[0] for line in lines(axes, "stage")] == [0.5, 3.5, 7.5]
    places = {text.get_text(): text.get_position()[0] for text in figure.axes[-1].texts}
    assert places == {"stem": 0, "first": 2, "second": 5.5}
    assert not [text for axes in figure.axes[:-1] for text in written(axes, "stage")]
    check_layout(figure)
    for stages in (None, {}):
        figure = criticality_over_depth(values, models, stages=stages)
        assert not lines(figure, "stage")
        assert not written(figure, "stage")


def test_criticality_over_depth__names_of_stages_are_left_out_where_they_have_no_room() -> None:
    values, models = tables(7, 54)
    names = ["a stem", *["body"] * 4, *["trunk"] * 46, "head", "a long name", "end"]
    figure = criticality_over_depth(values, models, stages=dict(zip(values.columns, names, strict=True)))
    assert len(lines(figure.axes[0], "stage")) == 5
    assert sorted(written(figure, "stage")) == ["body", "head", "trunk"]  # the largest first, then from the left
    check_layout(figure)


def test_criticality_over_depth__a_stage_at_the_edge_keeps_off_the_scale() -> None:
    values, models = tables(7, 54)
    names = ["stem", *["body"] * 52, "fc"]
    figure = criticality_over_depth(values, models, stages=dict(zip(values.columns, names, strict=True)))
    assert sorted(written(figure, "stage")) == ["body", "fc", "stem"]
    check_layout(figure)


def test_criticality_over_depth__layers_have_their_labels_where_there_is_room() -> None:
    values, models = tables(7, 40)
    figure = criticality_over_depth(values, models, layer_labels={"layer1.conv": "[1] conv"})
    expected = ["layer0.conv", "[1] conv", *values.columns[2:]]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == expected
    assert figure.axes[-1].get_xticks().tolist() == list(range(40))
    assert not [label for axes in figure.axes[:-1] for label in axes.get_xticklabels()]
    check_layout(figure)
    values, models = tables(7, 54)
    assert not [label for axes in criticality_over_depth(values, models).axes for label in axes.get_xticklabels()]


def test_criticality_over_depth__categories_without_a_value_have_no_panel() -> None:
    values, models = tables(7, 4)
    values.loc["model_0"] = np.nan  # the only one of contrastive
    values.loc["model_3"] = np.nan  # the only one of own_idea, of which there is a second one now
    models.loc[2, "category"] = "own_idea"
    figure = criticality_over_depth(values, models)
    assert [title.split(" (")[0] for title in panels(figure)] == [
        "baseline", "training recipes", "augmentation", "own idea",
    ]  # fmt: skip
    with pytest.raises(
        ProtocolError, match=r"No value is known, so there is nothing to plot. Measure at least one model"
    ):
        criticality_over_depth(values * np.nan, models)


def test_criticality_over_depth__panels_have_one_scale_in_percent() -> None:
    figure = criticality_over_depth(*tables(7, 4))
    for axes in figure.axes:
        assert axes.get_xlim() == figure.axes[0].get_xlim()
        assert axes.get_ylim() == (0, 1)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "50", "100"]
    bottoms = [axes.get_position().y0 for axes in figure.axes]
    assert bottoms == sorted(bottoms, reverse=True)
    assert "mean criticality over models (%)" in all_texts(figure)
    assert "criticality (%)" in all_texts(criticality_over_depth(*tables(1, 4)))  # where the whole has no room


@pytest.mark.parametrize(("n_models", "n_layers"), [(1, 1), (1, 60), (2, 8), (14, 23), (50, 54)])
def test_criticality_over_depth__nothing_is_cut_off_or_overlaps(n_models: int, n_layers: int) -> None:
    values, models = tables(n_models, n_layers)
    values.columns = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(n_layers)]
    stages = {name: f"stage{i // 6}" for i, name in enumerate(values)}
    check_layout(criticality_over_depth(values, models))
    title = "A rather long title of a study with many models"
    check_layout(criticality_over_depth(values, models, title=title, stages=stages))
    models["category"] = [f"a category of our own with a long name {index % 9}" for index in range(n_models)]
    check_layout(criticality_over_depth(values, models, stages=stages))


def test_criticality_over_depth__texts_from_outside_are_shown_as_they_are() -> None:
    values, models = tables(len(NASTY), len(NASTY))
    values.columns = pd.Index(NASTY)
    models["category"] = NASTY
    figure = criticality_over_depth(values, models, stages=dict(zip(NASTY, NASTY, strict=True)), title="$t$")
    assert [title.removesuffix(" (1 model)") for title in panels(figure)] == [name.replace("_", " ") for name in SHOWN]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == SHOWN
    check_layout(figure)


def test_criticality_over_depth__tables_that_do_not_fit_are_an_error() -> None:
    values, models = tables()
    with pytest.raises(ProtocolError, match=r"value of 'model_2' at 'layer3.conv' is 45: expected shares in \[0, 1\]"):
        criticality_over_depth(values.mask(values == values.iloc[2, 3], 45), models)
    with pytest.raises(ProtocolError, match="Models in the values but not in the table of models: model_6"):
        criticality_over_depth(values, models.iloc[:6])
    with pytest.raises(ProtocolError, match="values have no layer: expected"):
        criticality_over_depth(values.iloc[:, :0], models)
    with pytest.raises(ProtocolError, match=r"values contain the layer 'layer0.conv' more than once"):
        criticality_over_depth(values.iloc[:, [0, 1, 0]], models)
