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
    found = proxies_data(study, comparison, proxies, ["m1", "m0"])
    assert found["models"] == [1, 0]
    assert found["sentence"] == f"{proxies.sentence} Of the 2 models of this page, 2 have proxies."
    layers = list(comparison.criticality.columns)
    labels = {row["label"]: row["proxy"] for row in proxies.table.to_dict("records")}
    assert found["proxies"][0]["label"] == proxies.table["label"][0], "the best one comes first"
    for one in found["proxies"]:
        for place, model in enumerate(["m0", "m1"]):
            table = proxies.agreements[model].by_layer.set_index("layer").loc[layers]
            values = np.array(one["values"][place], dtype=float)
            np.testing.assert_allclose(values, table[labels[one["label"]]].to_numpy(float), rtol=1e-5)
    exact = np.array(found["exact"])
    np.testing.assert_allclose(exact, comparison.criticality.loc[["m0", "m1"]], rtol=1e-5)
    assert proxies_data(study, comparison, read_proxies(saved), ["m1", "m0"]) == found


def other_hash(told, what):
    hashes = {model: {**one, what: "0" * 64} for model, one in told["hashes"].items()}
    return {**told, "hashes": hashes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: {**told, "reset": "zero"}, "under the reset 'zero', and the page shows that under 'rerandomize'"),
        (lambda told: other_hash(told, "images"), "The proxies of 'm0' are those of other images than this study's"),
        (lambda told: other_hash(told, "weights"), "The proxies of 'm0' are those of other weights than this study's"),
        (lambda told: {**told, "hashes": {"x": {}}}, "of the models 'x', and none of these is among those of the page"),
    ],
    ids=["reset", "images", "weights", "models"],
)
def test_proxies__of_something_else_are_refused(study, saved, change, message):
    with pytest.raises(StudyError, match=message) as refused:
        proxies_data(study, compare(study), change(read_proxies(saved)), ["m0", "m1"])
    assert "--reset 'rerandomize' --out DIR`" in str(refused.value)


WHOLE = {
    "table": [{"proxy": "a", "label": "A", "null": False}],
    "by_layer": [{"model": "m0", "layer": "fc", "a": 1.0}],
    "sentence": "",
    "reset": "zero",
    "hashes": {"m0": {"images": None}},
}


@pytest.mark.parametrize(
    "damage",
    [
        {"by_layer": [{"model": "m0"}]},
        {"by_layer": []},
        {"by_layer": WHOLE["by_layer"] * 2},
        {"by_layer": [{"model": "m0", "layer": ["fc"]}]},
        {"by_layer": [{"model": "m1", "layer": "fc"}]},
        {"by_layer": [1]},
        {"table": [{"proxy": ["a"], "label": "A", "null": False}]},
        {"table": [{"proxy": "a", "label": 1, "null": False}]},
        {"table": WHOLE["table"] * 2},
        {"reset": None},
        {"hashes": {"m0": "x"}},
        {"hashes": []},
    ],
    ids=str,
)
def test_read_proxies__damaged(tmp_path, damage):
    path = tmp_path / "against.json"
    path.write_text(json.dumps(WHOLE))
    assert read_proxies(tmp_path) == WHOLE
    path.write_text(json.dumps({**WHOLE, **damage}))
    with pytest.raises(StudyError, match="is not what `layercrit proxies STUDY` writes"):
        read_proxies(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There are no proxies of a study"),
        ("{", "is not what `layercrit proxies STUDY` writes"),
        ("[]", "is not what `layercrit proxies STUDY` writes"),
    ],
    ids=["nothing", "no JSON", "a list"],
)
def test_read_proxies__something_else(tmp_path, content, message):
    if content is not None:
        (tmp_path / "against.json").write_text(content)
    with pytest.raises(StudyError, match=message):
        read_proxies(tmp_path)


@needs_browser
def test_page__plots_proxies(study, saved, tmp_path):
    path = write_page(study, compare(study), tmp_path / "report.html", proxies=saved)
    expected = proxies_data(study, compare(study), read_proxies(saved), ["m0", "m1"])
    with opened_browser() as browser, opened_page(browser, path) as page:
        page.select_option("#proxies-model", label="m1")
        page.select_option("#proxy", index=1)
        x = page.evaluate("() => [...document.getElementById('proxies-plot').data[0].x]")
        assert x == [value for value in expected["proxies"][1]["values"][1] if value is not None]
        assert page.inner_text("#proxies-said") == expected["sentence"]
    path = write_page(study, compare(study), tmp_path / "without.html")
    with opened_browser() as browser, opened_page(browser, path) as page:
        assert not page.is_visible("#proxies")
