"""The page and the commands of a study that has several conditions."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from browser import needs_browser, opened_browser, opened_page, violations
from conditioned_studies import write
from layercrit.cli import cli, tables
from layercrit.comparison import compare
from layercrit.conditions import Condition
from layercrit.figures.heat_maps import heat_map
from layercrit.reporting import study_figures
from layercrit.reporting.reports import report
from layercrit.study.tables import load_study
from running_jobs import run

CONDITIONS = [
    "images clean, norm statistics as trained",
    "images dark, norm statistics as trained",
    "images clean, norm statistics re-estimated",
    "images dark, norm statistics re-estimated",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    run(write(folder, study={"baseline": "m0"}), folder / "out")
    return load_study(folder / "out")


@needs_browser
def test_page__switches_between_conditions(study, tmp_path):
    page_file = report(study, tmp_path, figures=["ranking"], formats=["png"]).page
    with opened_browser() as browser:
        with opened_page(browser, page_file) as page:
            assert page.locator("#condition option").all_text_contents() == CONDITIONS
            assert violations(page) == []
            first = page.evaluate("CRITICALITY.values")
        context = browser.new_context()
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        page.select_option("#condition", index=2)
        page.wait_for_url("**?condition=2")
        page.wait_for_selector("body[data-ready=yes]")
        assert page.locator("#condition").input_value() == CONDITIONS[2]
        shown = compare(study, norm_statistics="reestimate")
        assert page.evaluate("D.models.map((model) => model.name)") == list(shown.models.index)
        np.testing.assert_allclose(page.evaluate("CRITICALITY.values"), shown.criticality, atol=1e-4)
        np.testing.assert_allclose(first, compare(study).criticality, atol=1e-4)
        methods = page.locator("#methods").inner_text()
        assert "were estimated again, layer by layer" in methods
        assert "stayed as trained, too" not in methods
        context.close()


@needs_browser
def test_page__begins_with_what_was_asked_for(study, tmp_path):
    found = report(study, tmp_path, figures=["ranking"], formats=["png"], probe_set="dark")
    assert found.comparison.condition == Condition("dark")
    with opened_browser() as browser, opened_page(browser, found.page) as page:
        assert page.locator("#condition option").all_text_contents()[0] == CONDITIONS[1]
        assert page.evaluate("D.models.map((model) => model.name)") == ["m0 (dark)", "m1 (dark)"]


def test_figure__conditions(study, tmp_path):
    """A row for each condition, each square the mean over models."""
    seen = {}

    def remember(values, models, **how):
        seen.update(values=values, models=models)
        return heat_map(values, models, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_figures, "heat_map", remember)
        report(study, tmp_path, figures=["conditions"], formats=["png"])
    assert list(seen["values"].index) == CONDITIONS
    assert seen["models"]["label"].isna().all()
    for name, condition in zip(CONDITIONS, study.conditions, strict=True):
        found = compare(study, probe_set=condition.probe_set, norm_statistics=condition.norm_statistics)
        np.testing.assert_allclose(seen["values"].loc[name], found.criticality.mean())
    assert (tmp_path / "figures" / "conditions.png").stat().st_size > 5000


def test_report__a_model_means_its_variant_under_the_condition(study, tmp_path):
    found = report(study, tmp_path, figures=["profile"], formats=["png"], probe_set="dark", profiles=["m1"])
    assert [path.name for path in found.figures["profile"]] == ["profile-m1--dark-.png"]
    other = report(study, tmp_path, figures=["ranking"], formats=["png"], probe_set="dark", baseline="m1 (dark)")
    text = other.page.read_text(encoding="utf-8")
    assert all(f"<option>{name}</option>" in text for name in CONDITIONS), "the baseline is known under all of them"


def invoke(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_compare_command__under_a_condition(study, monkeypatch):
    asked = ("compare", study.folder, "--probe-set", "dark", "--norm-statistics", "reestimate")
    found = json.loads(invoke(*asked, "--json").stdout)
    assert found["condition"] == {"probe_set": "dark", "norm_statistics": "reestimate", "epoch": None}
    assert found["baseline"] == "m0 (dark, statistics re-estimated)"
    said = invoke("compare", study.folder).stderr
    assert f"there are also: {'; '.join(CONDITIONS[1:])}" in said
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_OTHERS", 2)
        said = invoke("compare", study.folder).stderr
    assert f"there are also: {'; '.join(CONDITIONS[1:3])}; and {len(CONDITIONS) - 3} more" in said


def test_compare_command__warns_of_what_is_compared(study, monkeypatch):
    """And not of the study's other conditions."""
    loaded = load_study(study.folder)
    names = loaded.models["model"]
    records = [{**record, "warnings": ["in doubt"]} for record in loaded.models["record"]]
    doubtful = replace(loaded, models=loaded.models.assign(record=records))
    monkeypatch.setattr("layercrit.study.tables.load_study", lambda folder: doubtful)
    said = invoke("compare", study.folder, "--probe-set", "dark", "--norm-statistics", "reestimate").stderr
    warned = {name for name in names if f"{name}: in doubt" in said}
    assert warned == {name for name in names if "(dark, statistics re-estimated)" in name}
    assert len(warned) < len(names) == len(doubtful.warnings)
