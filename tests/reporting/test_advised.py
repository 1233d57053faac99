"""Advice on the page: the marks are those of `advise`."""

from types import SimpleNamespace

import numpy as np
import pytest

from browser import needs_browser, opened_browser, opened_page
from layercrit.advice import ACTIONS, advise
from layercrit.comparison import compare
from layercrit.reporting.advised import advice_data
from layercrit.reporting.page import write_page
from published_results import measured

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    generator = np.random.default_rng(2)
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": value + generator.normal(0, 0.08)}
        for model in ("base", "other")
        for layer, value in zip(LAYERS, generator.uniform(0.2, 0.8, len(LAYERS)), strict=True)
        for trial in range(3)
    ]
    return measured(tmp_path_factory.mktemp("study"), cells, record={"baseline": "base"}, n_images=20, noise=0.02)


def test_advice__is_that_of_each_model(study):
    found = advice_data(study, compare(study), ["other", "base"], ["base", "other"])
    assert [one["name"] for one in found] == list(ACTIONS)
    table = study.to_pandas()
    for one in found:
        assert [marks["model"] for marks in one["models"]] == [1, 0]
        for marks in one["models"]:
            expected = advise(table[table["model"] == ("base", "other")[marks["model"]]], one["name"])
            assert [LAYERS[i] for i in marks["chosen"]] == expected.chosen
            ties = expected.layers.loc[expected.layers["tie"], "layer"]
            assert {LAYERS[i] for i in marks["tie"]} == set(ties)
            assert marks["said"].startswith("Measured: ")
            assert not marks["said"].startswith("Measured: not measured")
    assert any(marks["tie"] for one in found for marks in one["models"]), "else nothing is known of ties"


def test_advice__without_numbers_of_parameters_there_is_none(study):
    blind = SimpleNamespace(to_pandas=lambda: study.to_pandas().assign(n_parameters=None))
    assert advice_data(blind, compare(study), ["base"], ["base", "other"]) == []


@needs_browser
def test_page__marks_layers(study, tmp_path):
    path = write_page(study, compare(study), tmp_path / "report.html", models=["base"])
    with opened_browser() as browser, opened_page(browser, path) as page:
        page.select_option("#action", label="pruned")
        drawn = page.evaluate("() => document.getElementById('model-plot').data.map(({ name, x }) => [name, [...x]])")
        (expected,) = [one for one in advice_data(study, compare(study), ["base"], ["base", "other"])
                       if one["name"] == "prune"]  # fmt: skip
        marks = expected["models"][0]
        assert sorted(i for name, x in drawn if name.startswith("to be pruned") for i in x) == marks["chosen"]
        assert page.inner_text("#advice-said") == marks["said"]
        page.select_option("#model", label="other")
        assert page.inner_text("#advice-said").startswith("Advice is here for base.")
        page.select_option("#action", label="unmarked")
        assert page.inner_text("#advice-said") == ""


@needs_browser
def test_page__marks_the_shown_model_if_there_is_advice_for_it(study, tmp_path):
    path = write_page(study, compare(study), tmp_path / "report.html", models=["base", "other"])
    with opened_browser() as browser, opened_page(browser, path) as page:
        for model in ("other", "base"):
            page.select_option("#model", label=model)
            for action in ("pruned", "frozen"):
                page.select_option("#action", label=action)
                assert page.locator("#model option:checked").inner_text() == model
            page.select_option("#action", label="unmarked")
