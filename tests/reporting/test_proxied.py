"""Proxies on the page: the points are those of the study's proxies."""

import json

import numpy as np
import pytest

from browser import needs_browser, opened_browser, opened_page
from layercrit.comparison import compare
from layercrit.errors import StudyError
from layercrit.proxies.of_study import measure_study_proxies
from layercrit.reporting.page import write_page
from layercrit.reporting.proxied import proxies_data, read_proxies
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from layercrit.study.tables import load_study
from running_jobs import Inline
from small_studies import write_study

CHOSEN = "conv1,layer1.1.*,fc"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder, n_models=2, n_images=8, protocol={"layers": CHOSEN})
    run_study(read_study_file(path), folder / "out", executor=Inline(), progress=False)
    return load_study(folder / "out")


@pytest.fixture(scope="module")
def proxies(study):
    return measure_study_proxies(study, n_images=6, hessian_images=0, progress=False, device="cpu")


@pytest.fixture(scope="module")
def saved(proxies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxies")
    proxies.save(folder)
    return folder


def test_proxies__points_are_those_of_each_model(study, proxies, saved):
    comparison = compare(study)
    found = proxies_data(proxies, comparison, ["m1", "m0"])
    assert found["models"] == [1, 0]
    assert found["sentence"] == proxies.sentence
    layers = list(comparison.criticality.columns)
    labels = {row["label"]: row["proxy"] for row in proxies.table.to_dict("records")}
    assert found["proxies"][0]["label"] == proxies.table["label"][0], "the best one comes first"
    for one in found["proxies"]:
        for place, model in enumerate(["m0", "m1"]):
            table = proxies.agreements[model].by_layer.set_index("layer").loc[layers]
            values = np.array(one["values"][place], dtype=float)
            np.testing.assert_allclose(values, table[labels[one["label"]]].to_numpy(float), rtol=1e-5)
    exact = np.array(found["exact"])
    np.testing.assert_allclose(exact, comparison.criticality.loc[["m0", "m1"]], atol=1e-5)
    assert proxies_data(read_proxies(saved), comparison, ["m1", "m0"]) == found
    assert proxies_data(proxies, comparison, ["another"]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There are no proxies of a study"),
        ("{", "is not what `layercrit proxies STUDY` writes"),
        ("[]", "is not what `layercrit proxies STUDY` writes"),
        (json.dumps({"table": [], "by_layer": [{"model": "m0"}], "sentence": ""}), "lack some of exact, layer, model"),
    ],
    ids=["nothing", "no JSON", "a list", "other columns"],
)
def test_read_proxies__something_else(tmp_path, content, message):
    if content is not None:
        (tmp_path / "against.json").write_text(content)
    with pytest.raises(StudyError, match=message):
        read_proxies(tmp_path)


@needs_browser
def test_page__plots_proxies(study, saved, tmp_path):
    path = write_page(study, compare(study), tmp_path / "report.html", proxies=saved)
    expected = proxies_data(read_proxies(saved), compare(study), ["m0", "m1"])
    with opened_browser() as browser, opened_page(browser, path) as page:
        page.select_option("#proxies-model", label="m1")
        page.select_option("#proxy", index=1)
        x = page.evaluate("() => [...document.getElementById('proxies-plot').data[0].x]")
        assert x == [value for value in expected["proxies"][1]["values"][1] if value is not None]
        assert page.inner_text("#proxies-said") == expected["sentence"]
    path = write_page(study, compare(study), tmp_path / "without.html")
    with opened_browser() as browser, opened_page(browser, path) as page:
        assert not page.is_visible("#proxies")
