"""Maps over epochs in the report: in its data, and in a real browser."""

import json
import re

import numpy as np
import pytest

from browser import needs_browser, opened_browser, opened_page, violations
from conditioned_studies import N, network, write
from layercrit.comparison import compare
from layercrit.epoch_map import measure_epochs
from layercrit.reporting.epochs import epochs_data
from layercrit.reporting.page import write_page
from layercrit.reporting.reports import report
from layercrit.seeds import drawing
from layercrit.study.tables import load_study
from running_jobs import run
from training_runs import write_run

FUNCTION = "py:conditioned_studies:network"
ARCH = f"{FUNCTION}?input_size=(3,2,2)"
RESETS = ["rerandomize", "rewind(epoch=5)", "rewind(epoch=0)", "rewind(epoch=2)"]


def states():
    """Epoch -> weights; layer '1' is frozen from epoch 2 on, and the last epoch is the final network."""
    found = {}
    for epoch in (0, 2, 5):
        with drawing(epoch):
            found[epoch] = {name: value.detach().clone() for name, value in network().state_dict().items()}
            found[epoch]["4.weight"] *= 20
    for name in ("1.weight", "1.bias"):
        found[5][name] = found[2][name].clone()
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    write_run(folder / "runs" / "one", states(), arch=ARCH, final=states()[5])
    images = [{"name": None, "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2], "resize": 0}]
    models = [{"reference": f"file:runs/one?arch={FUNCTION}", "name": "one", "label": "The one"}]
    protocol = {"epochs": "all", "resets": RESETS}
    run(write(folder, protocol=protocol, images=images, models=models, study={"baseline": None}), folder / "out")
    return load_study(folder / "out")


def maps_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])[
        "epochs"
    ]


def test_epochs_data__of_a_study(study, tmp_path):
    """Rows in the order of training; the last epoch and the frozen layer move nothing."""
    back, after = maps_of(write_page(study, compare(study), tmp_path / "r.html"))
    assert (back["label"], back["kind"], after["label"], after["kind"]) == ("The one", "rewound", "The one", "trained")
    assert [row["name"] for row in back["rows"]] == ["fresh draw", "epoch 0", "epoch 2", "epoch 5"]
    assert [row["name"] for row in after["rows"]] == ["final weights", "epoch 0", "epoch 2", "epoch 5"]
    table = study.to_pandas().set_index(["model", "reset", "layer"])
    assert back["criticality"][3] == [0, 0]
    assert back["criticality"][2][0] == 0 < back["criticality"][2][1]
    for column in ("criticality", "low", "high"):
        expected = table.loc[("one", "rewind(epoch=0)")][column]
        np.testing.assert_allclose(np.array(back[column][1], float), expected, atol=5e-5)
        for place, model in enumerate(("one", "one (epoch 0)", "one (epoch 2)", "one (epoch 5)")):
            np.testing.assert_allclose(after[column][place], table.loc[(model, "rerandomize")][column], atol=5e-5)
    accuracies = study.models.set_index("model")["top1_accuracy"]
    assert [row["accuracy"] for row in after["rows"]] == pytest.approx(list(accuracies), abs=5e-5)
    assert {row["accuracy"] for row in back["rows"]} == {None}


def test_epochs_data__same_under_every_epoch_of_the_page(study):
    """Readers who switch to another epoch see the same map: of the final network."""
    assert epochs_data(study, compare(study, epoch=2)) == epochs_data(study, compare(study))


def test_epochs_data__of_another_training_run(study):
    folder = study.folder.parent
    found = measure_epochs(
        f"file:{folder}/runs/one?arch={FUNCTION}", str(folder / "clean.npz"), trials=2, dtype="float32",
        maps=["rewound"], seed=0, progress=False,
    )  # fmt: skip
    own, _, other = epochs_data(study, compare(study), [found])
    assert other["label"] == "one", "the page shows no folders of this machine"
    np.testing.assert_allclose(other["criticality"][1:], own["criticality"][1:], atol=1e-3)


@needs_browser
def test_page__shows_the_maps(study, tmp_path):
    page_file = report(study, tmp_path, figures=["ranking"], formats=["png"]).page
    with opened_browser() as browser, opened_page(browser, page_file) as page:
        assert page.is_visible("#epochs-link")
        assert page.locator("#epochs-map option").all_text_contents() == [
            "The one: set back to an epoch", "The one: fresh draws after each epoch",
        ]  # fmt: skip
        (cells,) = page.evaluate("document.getElementById('epochs-plot').data.map((one) => one.z)")
        assert cells == page.evaluate("D.epochs[0].criticality")
        page.select_option("#epochs-map", index=1)
        page.locator("#epochs-details summary").click()
        page.locator("#epochs-table tbody tr").nth(3).wait_for()
        assert page.locator("#epochs-table tbody th").all_text_contents()[0] == "final weights"
        assert page.evaluate("document.getElementById('epochs-plot').data[0].z") == page.evaluate(
            "D.epochs[1].criticality"
        )
        assert violations(page) == []


@needs_browser
def test_page__without_epochs_has_no_such_section(tmp_path):
    images = [{"name": None, "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]}]
    run(write(tmp_path, protocol={}, images=images), tmp_path / "out")
    page_file = report(load_study(tmp_path / "out"), tmp_path / "r", figures=["ranking"], formats=["png"]).page
    assert maps_of(page_file) == []
    with opened_browser() as browser, opened_page(browser, page_file) as page:
        assert not page.is_visible("#epochs")
        assert not page.is_visible("#epochs-link")
