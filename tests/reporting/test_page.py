"""The page of a study, in a real browser."""

import csv
import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from browser import cut_off, needs_browser, opened_browser, opened_page, violations
from layercrit import differences as differences_module
from layercrit.comparison import compare
from layercrit.differences import differences
from layercrit.errors import StudyError
from layercrit.figures.palette import contrast
from layercrit.figures.squares import COLOR_MAPS
from layercrit.reporting.page import write_page
from layercrit.study.published import import_published
from layercrit.study.store import ModelRow
from published_results import RELEASED, measured, released

pytestmark = needs_browser

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc")
CATEGORIES = {
    "base": "baseline",
    "seed": "baseline",
    "mix": "augmentation",
    "jigsaw": "augmentation",
    "pgd": "adversarial_training",
}
HOSTILE = (
    '<script>window.ran = 1</script><img src=x onerror="window.ran = 2">\'"&amp;</script> --> {{x}} ${title} $title'
)


def made_up(folder, noise=0.05, trials=3, matched=True, models=CATEGORIES, layers=LAYERS, **more):
    """A study of a few models whose values differ."""
    generator = np.random.default_rng(1)
    cells = []
    for model in models:
        for layer in layers:
            middle = generator.uniform(0.1, 0.9)
            for trial in range(trials):
                value = float(np.clip(middle + generator.normal(0, 0.12), 0.06, 0.94))
                cells.append(
                    {"model": model, "layer": layer, "trial": trial, "cosine": value, "top1": value / 2}
                    | ({"cosine_matched": value * 0.9} if matched else {})
                )
    known = {"random_trials": {"rerandomize": True}, "predictions": {"chance": 0.2, "top1_accuracy": None},
             "probe_set": "p"}  # fmt: skip
    rows = [ModelRow(name, f"file:/home/me/{name}", category, name.title(), 0.5 + 0.05 * i, known)
            for i, (name, category) in enumerate(models.items())]  # fmt: skip
    arguments = {"models": rows, "record": {"baseline": next(iter(models))}} | more
    return measured(folder, cells, noise=noise, n_images=20, **arguments)


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def path(study):
    return write_page(study, compare(study), study.folder / "report.html")


@pytest.fixture
def page(browser, path):
    with opened_page(browser, path) as opened:
        yield opened


def shown(page, picture="map", trace=0):
    """Return one trace of a picture as Plotly holds it."""
    return page.evaluate(f"() => JSON.parse(JSON.stringify(document.getElementById('{picture}-plot').data[{trace}]))")


def table_of(page, picture):
    """Return the rows of a picture's table: name of a column -> value."""
    return page.evaluate(
        f"""() => shownTables.{picture}.rows.map((row) =>
            Object.fromEntries(shownTables.{picture}.columns.map((column) => [column.name, column.of(row)])))"""
    )


def rows_shown(page):
    """Return the names of the models in the heat map, from the top."""
    return [row["model"] for row in table_of(page, "map")]


def download(page, kind, picture):
    with page.expect_download() as waiting:
        page.click(f"[data-save={kind}][data-of={picture}]")
    assert waiting.value.suggested_filename == f"{picture}.{kind}"
    with waiting.value.path().open(encoding="utf-8", newline="") as file:
        return file.read()


# --- the heat map -----------------------------------------------------------------------------------------------------


def test_page__opens_without_network_or_complaint(page, study):
    values = compare(study).criticality
    np.testing.assert_allclose(shown(page)["z"], values.loc[rows_shown(page)], atol=1e-6)
    assert rows_shown(page)[0] == "base", "the baseline comes first"
    assert page.evaluate("() => performance.getEntriesByName('first figure').length") == 1
    assert "5 models, 5 layers in common, 3 trials of the reset rerandomize on 20 images" in page.inner_text("#facts")


def test_page__every_measure(page, study):
    comparison, table = compare(study), study.to_pandas().set_index(["model", "layer"])
    of_table = {
        "difference to the baseline": comparison.difference.stack(),
        "spread over trials": table["sd_trials"],
        "half-width of the interval": (table["high"] - table["low"]) / 2,
        "top-1 agreement": table["top1_agreement"],
        "temperature-matched criticality": table["criticality_matched"],
        "criticality": table["criticality"],
    }
    options = page.locator("#measure option").all_inner_texts()
    assert sorted(options) == sorted(of_table)
    for label, values in of_table.items():
        page.select_option("#measure", label=label)
        expected = [[values[model, layer] for layer in LAYERS] for model in rows_shown(page)]
        if label == "spread over trials":  # as figures have it: of the cells' means
            expected = comparison.sd_trials.loc[rows_shown(page)]
        np.testing.assert_allclose(shown(page)["z"], expected, atol=1e-6, err_msg=label)


def test_page__what_was_not_measured_cannot_be_chosen(browser, tmp_path):
    study = made_up(tmp_path, matched=False, trials=1, record={})
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert page.locator("#measure option").all_inner_texts() == ["criticality", "top-1 agreement"]
        assert "Choose two models" in page.inner_text("#compare")
        assert page.locator("#values option").all_inner_texts() == ["criticality"]


def test_page__sorts(page, study):
    models = compare(study).models
    for sort, expected in {
        "name": sorted(CATEGORIES),
        "mean": models["criticality"].sort_values(ascending=False).index,
        "accuracy": models["accuracy"].sort_values(ascending=False).index,
        "category": ["base", "seed", "mix", "jigsaw", "pgd"],
    }.items():
        page.select_option("#sort", sort)
        assert rows_shown(page) == list(expected), sort
    page.select_option("#layer", label="[2.0] conv1")
    page.select_option("#sort", "layer")
    of_layer = compare(study).criticality["layer2.0.conv1"].sort_values(ascending=False)
    assert rows_shown(page) == list(of_layer.index)


def test_page__filters(page):
    page.fill("#find", "IX")
    assert rows_shown(page) == ["mix"]
    page.fill("#find", "")
    page.uncheck("#categories input >> nth=1")
    assert rows_shown(page) == ["base", "seed", "pgd"]
    page.fill("#find", "nothing like it")
    assert rows_shown(page) == []
    assert page.inner_text("#map-none").startswith("No model is shown")
    page.fill("#find", "")
    assert page.inner_text("#map-none") == ""
    page.check("#categories input >> nth=1")
    assert len(rows_shown(page)) == 5


def test_page__hover_says_value_interval_trials_and_status(page, study):
    row = study.to_pandas().set_index(["model", "layer"]).loc["mix", "fc"]
    text = shown(page)["text"][rows_shown(page).index("mix")][LAYERS.index("fc")]
    for part in (
        "Mix",
        "fc",
        f"{row['criticality']:.3f}",
        f"{row['low']:.3f} to {row['high']:.3f}",
        "trials: 3",
        "status: ok",
    ):
        assert part in text


def click_cell(page, row, column, picture="map"):
    """Click on a cell of the heat map."""
    x, y = page.evaluate(
        f"""([column, row]) => {{
          const plot = document.getElementById("{picture}-plot"), {{ xaxis, yaxis, margin }} = plot._fullLayout;
          plot.scrollIntoView({{ block: "center" }});
          const box = plot.getBoundingClientRect();
          return [box.left + xaxis._offset + xaxis.c2p(column), box.top + yaxis._offset + yaxis.c2p(row)];
        }}""",
        [column, row],
    )
    page.mouse.move(x, y)
    page.mouse.click(x, y)


def test_page__a_click_on_a_cell_chooses_its_layer_and_its_model(page, study):
    click_cell(page, rows_shown(page).index("jigsaw"), 2)
    assert page.locator("#layer option:checked").inner_text() == "[1.0] conv2"
    assert page.locator("#model option:checked").inner_text() == "Jigsaw"
    assert "Jigsaw, [1.0] conv2, criticality" in page.inner_text("#map-said")
    links = page.locator("#map-said a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert links == ["#one-model", "#one-layer"]
    profile = shown(page, "model", 1)
    np.testing.assert_allclose(profile["y"], compare(study).criticality.loc["jigsaw"], atol=1e-6)
    beside = shown(page, "model", 0)
    np.testing.assert_allclose(beside["y"], compare(study).criticality.loc["base"], atol=1e-6)
    table = study.to_pandas().set_index(["model", "layer"]).loc["jigsaw"]
    np.testing.assert_allclose(profile["error_y"]["array"], table["high"] - table["criticality"], atol=2e-6)
    np.testing.assert_allclose(profile["error_y"]["arrayminus"], table["criticality"] - table["low"], atol=2e-6)
    layer = table_of(page, "layer")
    of_layer = compare(study).criticality["layer1.0.conv2"].sort_values()
    assert [row["model"] for row in layer] == list(of_layer.index)
    np.testing.assert_allclose([row["criticality"] for row in layer], of_layer, atol=1e-6)


def test_page__starts_with_the_layer_on_which_models_differ_most(browser, tmp_path):
    spread = {"conv1": 0.1, "layer1.0.conv1": 0.3, "fc": 0.2}
    cells = [
        {"model": model, "layer": layer, "trial": 0, "cosine": 0.5 + sign * by}
        for model, sign in (("a", -1), ("b", 1)) for layer, by in spread.items()
    ]  # fmt: skip
    study = measured(tmp_path, cells)
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert page.locator("#layer option:checked").inner_text() == "[1.0] conv1"
        assert [(row["layer"], row["model"]) for row in table_of(page, "layer")] == [
            ("layer1.0.conv1", "a"), ("layer1.0.conv1", "b"),
        ]  # fmt: skip


def test_page__colours_are_those_of_the_figures(page):
    for kind, label in (("criticality", "criticality"), ("difference", "difference to the baseline"),
                        ("spread", "spread over trials")):  # fmt: skip
        page.select_option("#measure", label=label)
        (_, first), *_, (_, last) = shown(page)["colorscale"]
        assert (first, last) == tuple(to_hex(colormaps[COLOR_MAPS[kind]](end)) for end in (0.0, 1.0)), label


def test_page__numbers_in_squares_are_readable(page, study):
    numbers, squares = shown(page, trace=3), shown(page, trace=1)
    means = compare(study).models.loc[rows_shown(page), "criticality"]
    assert numbers["text"] == [f"{100 * mean:.0f}" for mean in means]
    scale = squares["colorscale"]
    for mean, color in zip(means, numbers["textfont"]["color"], strict=True):
        of_square = to_rgb(scale[round(mean * (len(scale) - 1))][1])
        assert contrast(of_square, to_rgb(color)) >= 4.5
    page.select_option("#measure", label="difference to the baseline")
    assert shown(page, trace=3)["text"][0] == "0"


def test_page__says_what_short_names_and_percent_mean(page):
    said = page.inner_text("#map-about")
    assert "Layer names are short: [1.0] conv1 is layer1.0.conv1." in said
    assert "in percent: 62 stands for 0.62" in said
    heads = page.locator("#models-table th button")
    titles = dict(zip(heads.all_inner_texts(), heads.evaluate_all("all => all.map((one) => one.title)"), strict=True))
    assert titles["top-1 agreement (%)"] == "Images, of 100, whose top-1 class a reset does not change."


@pytest.mark.parametrize("section", ["compare", "models"])
def test_page__links_to_the_pitfall_on_architectures(page, section):
    page.click(f"#{section} a[href='#pitfall-architectures']")
    assert page.evaluate("() => document.querySelector(location.hash).matches('#pitfalls h3')")


def test_page__writes_numbers(page):
    for call, text in {
        "percent(0.7615)": "76.2",  # as Python writes 76.15; 100 * 0.7615 is less than that
        "percent(null)": "–",  # noqa: RUF001 (a dash)
        "signed(-0.0004, 3)": "0.000",
        "signed(-0.25, 2)": "−0.25",  # noqa: RUF001 (a minus sign)
        "signed(0.25, 2)": "+0.25",
        "pValue(0.00001)": "< 0.0001",
        "pValue(0.0123)": "0.012",
        "interval(0.1, null)": "none",
    }.items():
        assert page.evaluate(f"() => {call}") == text, call


def test_page__a_click_on_a_name_chooses_it(page):
    page.locator("#map-plot .ytick text").nth(4).click()
    assert page.locator("#model option:checked").inner_text() == "Pgd"
    page.locator("#map-plot .xtick text").nth(3).click()
    assert page.locator("#layer option:checked").inner_text() == "[2.0] conv1"


def test_page__cells_that_are_not_ok_are_not_drawn_and_said(browser, tmp_path):
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": 0.5 + 0.1 * trial}
        for model in "ab" for layer in LAYERS for trial in range(2)
    ]  # fmt: skip
    cells[3] |= {"status": "not_finite", "cosine": float("nan")}
    study = measured(tmp_path, cells)
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert shown(page)["z"][0][1] is None
        assert "not_finite 1/2" in shown(page)["text"][0][1]
        assert "its means are over 4 of 5 layers" in page.inner_text("#methods")


# --- differences ------------------------------------------------------------------------------------------------------


def compared(page):
    """Return the table of the comparison: name of a column -> values."""
    rows = table_of(page, "compare")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def check_differences(rows, table):
    for column in ("difference", "low", "high"):
        np.testing.assert_allclose(rows[column].astype(float), table[column], atol=6e-5)
    for column in ("p_value", "p_holm", "p_bh"):
        np.testing.assert_allclose(rows[column].astype(float), table[column], rtol=2e-3)
    assert list(rows["significant"]) == list(table["significant"])
    assert list(rows["covers"]) == list(table["covers"])


def test_page__differences_of_models(page, study):
    for first, second in (("mix", "base"), ("pgd", "mix"), ("mix", "jigsaw")):
        page.select_option("#first", label=first.title())
        page.select_option("#second", label=second.title())
        for values in ("criticality", "matched"):
            page.select_option("#values", values)
            table = differences(study, pairs=[(first, second)], family="pair", matched=values == "matched").table
            check_differences(compared(page), table)
            assert 0 < sum(table["significant"]) < len(table), "some are significant and some are not"
            said = page.inner_text("#compare-said")
            assert f"{table['significant'].sum()} of 5 tested layers differ significantly" in said
    page.select_option("#control", "bh")
    assert list(compared(page)["significant"]) == list(table["significant_bh"])


def test_page__differences_of_categories(page, study):
    assert page.locator("#unit").is_disabled()
    page.select_option("#first", label="augmentation")
    assert "Choose two models or two categories." in page.inner_text("#compare-said")
    page.select_option("#second", label="baseline")
    for unit in ("trials", "models"):
        page.select_option("#unit", unit)
        pair = [("augmentation", "baseline")]
        check_differences(
            compared(page), differences(study, pairs=pair, between="categories", unit=unit, family="pair").table
        )


def test_page__differences_stand_as_their_exact_p_values_say(browser, tmp_path, monkeypatch):
    """0.04998 and 0.05002 are the same number in 16 bits."""
    study = made_up(tmp_path)
    exact = differences_module.compared_differences

    def close_to_alpha(*arguments, **options):
        found = exact(*arguments, **options)
        p_values = np.resize([0.04998, 0.05002], len(found.table))
        table = found.table.assign(
            p_holm=p_values, p_bh=p_values, significant=p_values <= 0.05, significant_bh=p_values <= 0.05
        )
        return replace(found, table=table)

    monkeypatch.setattr("layercrit.reporting.page_data.compared_differences", close_to_alpha)
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert list(compared(page)["significant"]) == [True, False, True, False, True]


def test_page__differences_are_of_the_layers_that_they_stand_at(browser, tmp_path):
    """Models whose layers differ in their order, and another baseline than the study's own, whose order then counts."""
    generator = np.random.default_rng(2)
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": generator.uniform(0.2, 0.8)}
        for model, layers in (("a", "xyz"), ("b", "zyx"), ("c", "zyx")) for layer in layers for trial in range(3)
    ]  # fmt: skip
    study = measured(tmp_path, cells, record={"baseline": "a"}, noise=0.1)
    comparison = compare(study, baseline="b")
    expected = comparison.criticality.loc["c"] - comparison.criticality.loc["b"]
    with opened_page(browser, write_page(study, comparison, tmp_path / "r.html")) as page:
        page.select_option("#first", label="c")
        page.select_option("#second", label="b")
        rows = compared(page)
        assert list(rows["layer"]) == list("zyx")
        np.testing.assert_allclose(rows["difference"].astype(float), expected[list("zyx")], atol=6e-5)


def test_page__without_a_baseline_it_begins_with_a_trained_model(browser, tmp_path):
    categories = {"random": "untrained", "mine": None, "yours": None}
    study = made_up(tmp_path, models=categories, record={})
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        chosen = page.evaluate("""() => ["model", "first", "second"].map((id) => {
            const one = document.getElementById(id); return one.options[one.selectedIndex].label; })""")
        assert chosen == ["Mine", "Mine", "Yours"]
        assert len(compared(page)["layer"]) == len(LAYERS)


def test_page__says_first_what_is_most_critical_and_least(page, study):
    comparison = compare(study)
    for paragraph, values in zip(
        page.locator("#answer p").all_inner_texts(),
        (comparison.layers["criticality"], comparison.models["criticality"].rename(str.title)),  # as they are labelled
        strict=True,
    ):
        ranked = values.sort_values(ascending=False)
        most, least = paragraph.removesuffix(".").split("; least critical: ")
        assert most.endswith(": " + ", ".join(f"{name} ({value:.2f})" for name, value in ranked[:2].items()))
        assert least == ", ".join(f"{name} ({value:.2f})" for name, value in ranked[:-3:-1].items())


def test_page__where_nothing_is_to_be_cautioned_there_is_no_box(study, tmp_path, monkeypatch):
    path = write_page(study, compare(study), tmp_path / "r.html")
    assert '<aside aria-label="Cautions"><details>' in path.read_text()
    monkeypatch.setattr("layercrit.reporting.page.pitfalls_of_comparison", lambda study, comparison: [])
    write_page(study, compare(study), path)
    assert "<aside" not in path.read_text()


def test_page__says_what_differences_rest_on(page, study):
    listed = page.inner_text("#compare-notes")
    assert "are not adjusted for multiple testing" in listed
    assert "another training seed may change a model" in listed
    page.select_option("#first", label="augmentation")
    page.select_option("#second", label="baseline")
    page.select_option("#unit", "models")
    assert "under these draws and on these images" in page.inner_text("#compare-notes")
    page.select_option("#second", label="augmentation")
    assert page.locator("#compare-notes").is_hidden()


def test_page__what_was_not_tested_is_not_called_equal(browser, tmp_path):
    study = made_up(tmp_path, trials=1)
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert page.evaluate("() => D.models.every((model) => model.layers_that_differ === null)")
        assert "no layer can be tested" in page.inner_text("#compare-said")
        assert "at least two trials on each side" in page.inner_text("#compare-said")
        assert not page.inner_text("#compare-notes")


def test_page__a_model_against_itself(page):
    page.select_option("#first", label="Base")
    page.select_option("#second", label="Base")
    assert "Choose two different ones" in page.inner_text("#compare-said")
    assert not page.locator("#compare-plot").is_visible()
    buttons = page.locator("[data-of=compare]")
    assert [buttons.nth(i).is_disabled() for i in range(2)] == [True, True], "there is nothing to download"
    page.select_option("#second", label="Mix")
    assert [buttons.nth(i).is_disabled() for i in range(2)] == [False, False]
    assert "svg" in download(page, "svg", "compare")


def test_page__says_how_many_differences_to_the_baseline_are_significant(page, study):
    assert differences(study).sentence() in page.inner_text("#compare")


# --- tables and files -------------------------------------------------------------------------------------------------


def test_page__downloads(page, study):
    comparison = compare(study)
    page.select_option("#measure", label="difference to the baseline")
    page.uncheck("#categories input >> nth=0")
    rows = list(csv.DictReader(io.StringIO(download(page, "csv", "map"))))
    assert [row["model"] for row in rows] == ["mix", "jigsaw", "pgd"]
    for row in rows:
        np.testing.assert_allclose(
            [float(row[layer]) for layer in LAYERS], comparison.difference.loc[row["model"]], atol=1e-6
        )
    for picture in ("layer", "model", "compare", "accuracy", "models"):
        header, first, *_ = csv.reader(io.StringIO(download(page, "csv", picture)))
        assert len(header) == len(first)


def test_page__downloads_of_pictures(page):
    for picture in ("map", "layer", "model", "compare", "accuracy"):
        root = ElementTree.fromstring(download(page, "svg", picture))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_page__table_of_models_sorts_by_any_heading(page, study):
    heads = page.locator("#models-table thead button").all_inner_texts()
    assert "temperature-matched" in heads
    column = heads.index("mean criticality")
    for click, ascending in ((1, True), (2, False)):
        page.locator("#models-table thead button").nth(column).click()
        assert page.locator("#models-table th[aria-sort]").get_attribute("aria-sort") == (
            "ascending" if ascending else "descending"
        ), click
        numbers = [
            float(text) for text in page.locator(f"#models-table tbody tr td:nth-child({column + 1})").all_inner_texts()
        ]
        expected = compare(study).models["criticality"].sort_values(ascending=ascending)
        np.testing.assert_allclose(numbers, expected, atol=5e-4)
    page.locator("#models-table thead button").first.click()
    assert page.locator("#models-table tbody th").all_inner_texts() == sorted(name.title() for name in CATEGORIES)


def test_page__heat_map_as_a_table(page, study):
    page.click("#map-details summary")
    page.wait_for_selector("#map-table tbody tr")
    cells = page.locator("#map-table tbody tr").first.locator("td").all_inner_texts()
    np.testing.assert_allclose([float(cell) for cell in cells], compare(study).criticality.loc["base"], atol=5e-4)


def test_page__methods(page, study):
    text = page.inner_text("#methods")
    for part in (
        "1 minus the mean over trials and images",
        "softmax outputs, not of hidden states",
        "95%",
        "trials and images",
    ):
        assert part in text
    assert "/home/me" not in page.content(), "folders of this machine do not belong into a file that is passed on"
    assert "The cosine depends on confidence." in page.inner_text("aside")


# --- safety -----------------------------------------------------------------------------------------------------------


def test_page__texts_from_outside_run_nothing_and_are_shown_as_they_are(browser, tmp_path):
    names = [f"{HOSTILE}{i}" for i in range(3)]
    cells = [
        {"model": name, "layer": layer, "trial": trial, "stage": f"s{HOSTILE}", "cosine": 0.2 + 0.1 * trial + 0.1 * i}
        for i, name in enumerate(names) for layer in (f"{HOSTILE}.a", f"{HOSTILE}.b") for trial in range(2)
    ]  # fmt: skip
    known = {"random_trials": {"rerandomize": True}, "dtype": HOSTILE, "sha256": HOSTILE}
    models = [
        ModelRow(name, f"py:{HOSTILE}", HOSTILE, f"{HOSTILE} label {i}", 0.5 + 0.1 * i, known)
        for i, name in enumerate(names)
    ]
    record = {"name": HOSTILE, "baseline": names[0], "notes": [HOSTILE], "origin": {"source": HOSTILE},
              "probe_set": {"source": f"/x/{HOSTILE}", "sha256": HOSTILE}}  # fmt: skip
    failures = [{"model": names[0], "trial": 1, "error": HOSTILE}]
    study = measured(tmp_path, cells, models=models, record=record,
                     failures=[tuple(failure.values()) for failure in failures])  # fmt: skip
    drawn = b'<svg xmlns="http://www.w3.org/2000/svg"><script>window.top.ran = 3</script></svg>'
    written = write_page(study, compare(study), tmp_path / "r.html", pictures=[(HOSTILE, [drawn])])
    with opened_page(browser, written) as page:
        for measure in page.locator("#measure option").all_inner_texts():
            page.select_option("#measure", label=measure)
        for place in ("#map-details summary", "#compare-details summary"):
            page.click(place)
        click_cell(page, 1, 1)
        page.wait_for_timeout(200)
        page.select_option("#first", index=1)
        page.locator("#models-table thead button").first.click()
        assert page.evaluate("() => window.ran") is None
        assert page.locator("script").count() == 5, "the page's own, and Plotly"
        assert page.locator("img").count() == 1, "the further figure"
        assert page.inner_text("#further h3") == page.locator("img").get_attribute("alt") == HOSTILE
        assert page.inner_text("h1") == HOSTILE
        assert HOSTILE in page.inner_text("#methods")
        assert page.locator("#models-table tbody th").first.inner_text() == f"{HOSTILE} label 0"
        assert "<script>" in page.locator("#map-plot g.ytick").first.text_content()
        assert HOSTILE in download(page, "csv", "models").replace('""', '"')
        assert "<script" not in download(page, "svg", "map")


@pytest.mark.parametrize("text", ["\U0001f9ea" * 30, "=1+1", "-x", "\udcff" * 3, "__proto__"], ids=ascii)
def test_page__names_of_any_characters_can_be_downloaded(browser, tmp_path, text):
    """An emoji is two characters of JavaScript, and half of one cannot be saved; a formula is guarded."""
    cells = [{"model": name, "layer": layer, "trial": trial, "cosine": 0.1 + 0.2 * trial}
             for name in ("one", "other") for layer in (text, "fc") for trial in range(2)]  # fmt: skip
    models = [ModelRow("one", "py:x", text, text, 0.5), ModelRow("other", "py:x")]
    if "\udcff" in text:  # SQLite takes none, but a study's folder may be called so
        cells = [cell | {"layer": "fc", "stage": cell["layer"].replace("\udcff", "")} for cell in cells[::2]]
        models = [ModelRow("one", "py:x", None, None, 0.5), ModelRow("other", "py:x")]
    study = measured(tmp_path, cells, models=models, record={"name": text.replace("\udcff", "x")})
    study.record["name"] = text
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert page.inner_text("h1") == (r"\udcff" * 3 if "\udcff" in text else text)
        for picture in ("map", "layer", "model"):
            assert ElementTree.fromstring(download(page, "svg", picture)).tag.endswith("svg")
        if text[0] in "=-":
            assert f"'{text}" in download(page, "csv", "model")
            fields = [field for row in csv.reader(io.StringIO(download(page, "csv", "models"))) for field in row]
            assert f"'{text}" in fields
            assert not [field for field in fields if field[:1] in ("=", "-", "+", "@")]


def test_page__tells_nothing_of_where_files_lie(tmp_path):
    home = "/home/somebody/secret"
    models = [ModelRow("a", f"file:{home}/a.pth?arch=timm:resnet50", "k", "A"),
              ModelRow("b", f"hf:{home}/b", "k", "B", 0.5, {"dtype": "C:\\Users\\somebody\\secret\\x"})]  # fmt: skip
    cells = [{"model": m, "layer": "x", "trial": t, "cosine": 0.5} for m in "ab" for t in (0, 1)]
    record = {"notes": [f"Images are those of {home}/images/val and org/name; see https://example.org/a/b."],
              "probe_set": {"source": f"{home}/images", "skipped": [f"{home}/broken.png"]},
              "protocol": {"trials": 2, "donor": f"{home}/donor.pt"}}  # fmt: skip
    study = measured(tmp_path / "s", cells, models=models, record=record,
                     failures=[("b", 2, f"There is no file {home}/weights/b.pth.")])  # fmt: skip
    text = html.unescape(write_page(study, compare(study), tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "somebody" not in text
    for kept in ("file:a.pth?arch=timm:resnet50", "hf:b", "no file b.pth", "broken.png", "org/name",
                 "https://example.org/a/b", "donor.pt"):  # fmt: skip
        assert kept in text


def test_page__its_policy_lets_no_other_script_run(page):
    page.evaluate(
        "() => document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))"
    )
    assert page.evaluate("() => window.ran") is None
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert re.match(r"default-src 'none'; .*script-src 'sha256-\S+' 'sha256-\S+';", policy)
    assert [message for message in page.complaints if "Content Security Policy" in message]
    page.complaints.clear()


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]


def test_page__refers_to_nothing_outside(path):
    links = _Links()
    links.feed(path.read_text(encoding="utf-8"))
    assert links.found
    assert [link for link in links.found if not link.startswith(("#", "data:"))] == []


# --- for everybody ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_page__has_no_serious_barrier(browser, path, color_scheme):
    with opened_page(browser, path, color_scheme=color_scheme) as page:
        assert page.evaluate("() => document.documentElement.dataset.theme") == color_scheme
        for details in page.locator("details").all():
            details.evaluate("(element) => { element.open = true; }")
        assert violations(page) == []


def test_violations__finds_a_barrier(page):
    page.evaluate("() => document.body.append(document.createElement('button'))")
    assert [rule for rule, _ in violations(page)] == ["button-name"]


def test_page__theme_can_be_changed(page):
    before = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != before
    color = page.evaluate("() => document.getElementById('map-plot').layout.font.color")
    assert color == page.evaluate("() => style('--text')")


def test_page__fits_a_phone(browser, path):
    with opened_page(browser, path, width=390, height=800) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        assert page.locator("#measure").is_visible()


LONG = "stages.3.blocks.17.mobile_inverted_bottleneck.depthwise_separable_convolution"
HEIGHTS = """() => [...document.querySelectorAll('.plot')].filter((plot) => plot._fullLayout)
    .map((plot) => [plot.id, plot._fullLayout.yaxis._length])"""


@pytest.mark.parametrize(("name", "layers", "width"), [
    ("m", ["fc"], 1280), ("m", [f"{LONG}{i}" for i in range(30)], 1280),
    ("adversarial training of a large network, eps=4.0, ", [LONG], 390),
], ids=["short", "many long", "narrow"])  # fmt: skip
def test_page__labels_are_not_cut_off(browser, tmp_path, name, layers, width):
    study = made_up(tmp_path, models={f"{name}{i}": "category" for i in range(3)}, layers=layers, noise=0.02)
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html"), width=width) as page:
        labels = page.locator(".plot [class$=tick] text")
        assert labels.filter(has_text="mean over models").count() == 1
        assert labels.count() > 3 * len(layers)
        assert cut_off(page) == []
        heights = dict(page.evaluate(HEIGHTS))
        assert heights["map-plot"] == pytest.approx(3 * 17)
        assert all(220 < heights[f"{picture}-plot"] < 350 for picture in ("model", "layer", "accuracy", "compare"))
        for find in ("2", "nothing like it"):
            page.fill("#find", find)
            assert cut_off(page) == [], find


def test_page__works_from_the_keyboard(page):
    page.focus("#measure")
    page.keyboard.press("ArrowDown")
    assert page.locator("#measure option:checked").inner_text() == "difference to the baseline"
    assert "Criticality minus that of the baseline" in page.inner_text("#map-about")
    page.locator("#models-table thead button").nth(3).focus()
    page.keyboard.press("Enter")
    assert page.locator("#models-table th[aria-sort]").count() == 1
    assert page.evaluate("() => document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_write_page__same_study_same_bytes(study, path, tmp_path):
    again = write_page(study, compare(study), tmp_path / "deep" / "report.html")
    assert again.read_bytes() == path.read_bytes()
    assert [entry.name for entry in again.parent.iterdir()] == ["report.html"]


def test_write_page__a_place_that_cannot_be_written(study, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"cannot be written \(.+\)\. Name another folder"):
        write_page(study, compare(study), tmp_path / "file" / "report.html")


def test_write_page__one_model(browser, tmp_path):
    study = made_up(tmp_path, models={"base": None})
    with opened_page(browser, write_page(study, compare(study), tmp_path / "r.html")) as page:
        assert rows_shown(page) == ["base"]
        names = page.locator("#map-plot :is(.xtick, .ytick, .x2tick, .y2tick) text").all_inner_texts()
        assert len(names) == 1 + len(LAYERS) + 1, "the model, its layers, and their mean"
        assert cut_off(page) == []
        for section in ("one-layer", "accuracy", "compare"):
            assert page.locator(f"#{section}").is_hidden()
            assert page.locator(f"nav a[href='#{section}']").is_hidden()
        assert page.locator("#find").is_hidden()
        assert page.locator("#model-plot .point").count() == len(LAYERS)
        page.click("#map-plot .xtick text >> nth=2")
        assert "Selected: Base, [1.0] conv2, criticality" in page.inner_text("#map-said")
        assert "this layer" not in page.inner_text("#map-said")


@released
def test_released__page_is_small(browser, tmp_path):
    study = import_published(RELEASED / "results.csv", tmp_path / "study")
    path = write_page(study, compare(study, baseline="tv_resnet50"), tmp_path / "report.html")
    assert path.stat().st_size < 5e6
    with opened_page(browser, path) as page:
        assert len(rows_shown(page)) == 50
        assert page.locator("#measure option").all_inner_texts()[0] == "criticality"
        assert "\u22120.46" in page.inner_text("#accuracy")


def test_page__warnings_stand_above_everything_and_notes_on_models_below(tmp_path):
    cells = [
        {"model": model, "layer": "conv", "trial": trial, "cosine": 0.1 * trial + 0.2}
        for model in "ab"
        for trial in range(3)
    ]
    study = measured(tmp_path / "study", cells, models=[
        ModelRow("a", "py:a", record={"warnings": ["it <guesses>"], "notes": ["a default"]}),
        ModelRow("b", "py:b", record={"notes": ["a default"]}),
    ])  # fmt: skip
    text = write_page(study, compare(study), tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.index("<strong>Warning:</strong> a: it &lt;guesses&gt;.") < text.index("The cosine depends")
    assert "<li>a, b: a default</li>" in text
