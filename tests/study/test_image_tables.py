"""Criticality by class, by correctness and by image of a study, against loops over the values that its file keeps."""

import json
import shutil
import tracemalloc
from statistics import fmean

import numpy as np
import pytest

from layercrit.errors import ProbeError, ProtocolError, StudyError
from layercrit.statistics import estimate
from layercrit.study.published import import_published
from layercrit.study.rows import CellRow, ModelRow, PlanRow
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from published_results import rows_of, write_models, write_table
from seen_images import LAYERS, seen


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return seen(tmp_path_factory.mktemp("seen"))


def test_by_class__is_the_estimate_of_the_images_of_each_class(known):
    study, labels, predictions = known
    for of, classes in (("label", labels), ("prediction", predictions)):
        table = study.by_class(of=of)
        assert list(table["class"].unique()) == ["ant", "bee", "cat"]
        assert len(table) == 2 * len(LAYERS) * 3
        for row in table.to_dict("records"):
            values = study.per_image(row["model"], row["layer"])[:, classes == row["number"]]
            expected = estimate(values)
            found = [row[name] for name in ("criticality", "low", "high")]
            np.testing.assert_allclose(found, [expected.mean, expected.low, expected.high], rtol=0, atol=1e-12)
            assert (row["n_images"], row["n_trials"]) == (values.shape[1], 3)


def test_by_class__weighted_mean_over_classes_is_the_criticality_of_the_layer(known):
    study = known[0]
    table = study.by_class(of=list("aabbbbbbbbcccccccccccccc"))
    weighted = (table["criticality"] * table["n_images"]).groupby([table["model"], table["layer"]], observed=True).sum()
    expected = study.to_pandas().set_index(["model", "layer"])["criticality"]
    for key, value in expected.items():
        assert weighted[key] / 24 == pytest.approx(value, abs=1e-12)


def test_by_class__of_some_models(known):
    study = known[0]
    everything = study.by_class()
    for models in ("other", ["other"]):
        own = study.by_class(models)
        expected = everything[everything["model"] == "other"].reset_index(drop=True)
        assert own["criticality"].equals(expected["criticality"])
    with pytest.raises(StudyError, match="Did you mean 'other'"):
        study.by_class("othr")
    with pytest.raises(StudyError, match="no reset"):
        study.by_class(reset="zero")


def test_by_correctness__are_the_means_of_both_kinds_of_images(known):
    study, labels, predictions = known
    for row in study.by_correctness().to_dict("records"):
        values = study.per_image(row["model"], row["layer"]).astype(float)
        assert row["correct"] == pytest.approx(values[:, labels == predictions].mean(), abs=1e-12)
        assert row["wrong"] == pytest.approx(values[:, labels != predictions].mean(), abs=1e-12)
        assert row["low"] < row["difference"] < row["high"]


def test_by_image__and_its_extremes(known):
    study, labels, _ = known
    values = study.per_image("other", "fc").astype(float)
    table = study.by_image("other", layer="fc")
    assert table["criticality"].tolist() == pytest.approx([fmean(column) for column in values.T], abs=1e-12)
    assert table["label"].tolist() == [{0: "ant", 1: "bee", 2: "cat"}[label] for label in labels]
    order = np.argsort(-values.mean(axis=0), kind="stable")
    found = study.extreme_images("other", "fc", 2)
    assert found["position"].tolist() == [*order[:2], *order[-2:]]
    with pytest.raises(StudyError, match="no measured layer 'fd'"):
        study.extreme_images("other", "fd")
    with pytest.raises(ProtocolError, match="expected 1 or more"):
        study.extreme_images("other", "fc", 0)


def test_by_class__images_without_labels_have_predictions(tmp_path):
    study, _, predictions = seen(tmp_path, labelled=False)
    with pytest.raises(ProbeError, match=r"^base: The images have no labels.*of='prediction'"):
        study.by_class()
    table = study.by_class("base", of="prediction")
    assert table["n_images"][:3].tolist() == np.bincount(predictions).tolist()


def test_by_class__study_of_an_earlier_version_knows_labels(tmp_path):
    study, labels, _ = seen(tmp_path)
    with Store(tmp_path) as store, store.transaction():
        for row in store.models():
            predictions = {name: value for name, value in row.record["predictions"].items() if name != "classes"}
            store.put_record(row.model, {**row.record, "predictions": predictions})
    about = json.loads((tmp_path / "probe_set" / "probe_set.json").read_text())
    del about["names_of_labels"]
    (tmp_path / "probe_set" / "probe_set.json").write_text(json.dumps(about))
    old = load_study(tmp_path)
    assert old.by_class()["criticality"].equals(study.by_class()["criticality"])
    assert list(old.by_class()["class"][:3]) == ["0", "1", "2"]
    for method in (old.by_correctness, lambda: old.by_class(of="prediction")):
        with pytest.raises(ProbeError, match="earlier version of layercrit"):
            method()
    assert old.by_class(of=labels)["criticality"].equals(study.by_class()["criticality"])


@pytest.mark.parametrize("change", ["gone", "others"])
def test_by_class__images_that_are_not_there_any_more(tmp_path, change):
    """Labels of other images are never taken for theirs."""
    study, labels, _ = seen(tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "probe_set")
    if change == "others":
        seen(tmp_path / "others", size=8)
        shutil.copytree(tmp_path / "others" / "probe_set", tmp_path / "study" / "probe_set")
    with pytest.raises(ProbeError, match=r"not in .*study"):
        study.by_class()
    assert len(study.by_class(of="prediction")) == 24
    assert study.by_class(of=labels)["n_images"].sum() == 2 * len(LAYERS) * 24


def test_by_class__imported_results_have_no_images(tmp_path):
    results = write_table(tmp_path / "results.csv", rows_of())
    study = import_published(results, tmp_path / "study", write_models(tmp_path / "models.csv"))
    with pytest.raises(StudyError, match=r"no distances of single images.*Measure the models yourself"):
        study.by_class(of=["a"])


def test_by_class__holds_one_layer_in_memory_at_a_time(tmp_path):
    """Of 40 layers with 4 trials of 20,000 images, 13 MB in all, 320 kB of a layer are read at a time."""
    generator, n_images = np.random.default_rng(0), 20_000
    with Store(tmp_path, create=True) as store, store.transaction():
        store.put_models([ModelRow("base", "py:base", record={"predictions": {}})])
        for layer in range(40):
            for trial in range(4):
                key = f"{layer} {trial}"
                store.put_plan(
                    [PlanRow("base", f"layer{layer}", "rerandomize", trial, key, "conv", None, layer, 1, 1.0)]
                )
                values = {"cosine": generator.random(n_images, np.float32)}
                store.put_cells([CellRow(key, "ok", 1, 1.0, n_images, {"cosine": 0.5}, values)])
        store.put_meta("study", {"name": "large"})
    study = load_study(tmp_path)
    groups = np.arange(n_images) % 100
    tracemalloc.start()
    table = study.by_class(of=groups)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 4_000
    assert peak < 8e6, f"{peak / 1e6:.1f} MB"
