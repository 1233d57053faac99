"""Proxies over the models of a study: each against its own exact values, and means over models."""

import math

import numpy as np
import pytest
from scipy.stats import t

from layercrit.demo import small_resnet
from layercrit.errors import StudyError
from layercrit.proxies import measure_proxies
from layercrit.proxies.of_study import measure_study_proxies
from layercrit.seeds import drawing
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from layercrit.study.tables import load_study
from running_jobs import Inline
from small_studies import OPTIONS, write_study
from training_runs import write_run

HOW = {"n_images": 6, "hessian_images": 0, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    sections = {"protocol": {"layers": "conv1,layer1.1.*,fc", "resets": ["rerandomize", "zero"]}}
    run_study(
        read_study_file(write_study(folder, n_models=3, n_images=8, **sections)), folder / "out", executor=Inline()
    )
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return measure_study_proxies(folder / "out", **HOW)


def test_measure_study_proxies__each_model_is_that_of_a_single_call(found, folder):
    """The same layers, draws, images and exact values as the study's."""
    assert list(found.agreements) == ["m0", "m1", "m2"]
    assert not found.failed
    study = load_study(folder / "out")
    table = study.to_pandas().set_index(["model", "reset", "layer"])["criticality"]
    for model, one in found.agreements.items():
        values = one.by_layer.set_index("layer")["exact"]
        np.testing.assert_allclose(values, table[model, "rerandomize"][values.index], rtol=1e-6)
    alone = measure_proxies(
        f"file:{folder}/m1.safetensors?{OPTIONS}&input_size=(1,8,8)", str(folder / "images.npz"), n_images=8, trials=2,
        hessian_images=0, layers="conv1,layer1.1.*,fc", progress=False, device="cpu",
    )  # fmt: skip
    mine = found.proxies["m1"]
    assert list(mine.about["layer"]) == ["conv1", "layer1.1.conv1", "layer1.1.conv2", "layer1.1.conv3", "fc"]
    np.testing.assert_allclose(mine.samples["fisher"], alone.samples["fisher"][..., :6], rtol=1e-4, atol=1e-7)


def test_table__means_over_models_with_students_interval(found):
    by_model = found.by_model.set_index(["proxy", "model"])["spearman"]
    row = found.table.set_index("proxy").loc["fisher"]
    values = by_model["fisher"].to_numpy()
    half = t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3)
    assert row["n_models"] == 3
    assert row["spearman"] == pytest.approx(values.mean())
    assert row["spearman_low"] == pytest.approx(max(values.mean() - half, -1))
    assert row["spearman_high"] == pytest.approx(min(values.mean() + half, 1))
    best = found.best_null
    nulls = {name: by_model[name].mean() for name in ("log_parameters", "depth", "weight_norm")}
    assert best == max(nulls, key=lambda name: abs(nulls[name]))
    sign = math.copysign(1, nulls[best])
    assert row["difference"] == pytest.approx((values - sign * by_model[best].to_numpy()).mean())
    assert math.isnan(found.table.set_index("proxy").loc[best, "difference"])
    assert found.sentence.startswith("Over 3 models: ")
    assert found.table.set_index("proxy").loc["distance", "n_models"] == 0


def test_measure_study_proxies__some_models_and_another_reset(folder):
    found = measure_study_proxies(folder / "out", models="m2", reset="zero", **HOW)
    assert list(found.agreements) == ["m2"]
    assert found.proxies["m2"].record["protocol"]["reset"] == "zero"
    table = load_study(folder / "out").to_pandas().set_index(["model", "reset", "layer"])["criticality"]
    values = found.agreements["m2"].by_layer.set_index("layer")["exact"]
    np.testing.assert_allclose(values, table["m2", "zero"][values.index], rtol=1e-6)
    assert "there are no intervals" in found.sentence  # of one model


def test_measure_study_proxies__a_model_that_is_gone_is_left_out(folder, tmp_path):
    """The others are measured; with none left there is an error that says why."""
    file = folder / "m1.safetensors"
    file.rename(tmp_path / "m1.safetensors")
    try:
        found = measure_study_proxies(folder / "out", **HOW)
        assert list(found.agreements) == ["m0", "m2"]
        assert list(found.failed) == ["m1"]
        with pytest.raises(StudyError, match=r"No model of the study .* has proxies"):
            measure_study_proxies(folder / "out", models=["m1"], **HOW)
    finally:
        (tmp_path / "m1.safetensors").rename(file)


def test_measure_study_proxies__a_training_run_has_its_own_start(tmp_path):
    """The distance from the start is known where the run kept epoch 0, and for no other model."""
    with drawing(3):
        final = small_resnet().state_dict()
    start = {
        name: value + 2 if name.endswith(".weight") or name == "fc.bias" else value for name, value in final.items()
    }
    write_run(tmp_path / "run", {0: start, 1: final}, final=final)
    models = [{"reference": f"file:run?{OPTIONS}", "name": "run"},
              {"reference": f"file:m0.safetensors?{OPTIONS}", "name": "m0"}]  # fmt: skip
    sections = {"protocol": {"layers": "conv1,layer1.1.conv1,fc"}, "models": models, "study": {"baseline": None}}
    file = write_study(tmp_path, n_models=1, n_images=4, **sections)
    run_study(read_study_file(file), tmp_path / "out", executor=Inline())
    found = measure_study_proxies(tmp_path / "out", **HOW)
    np.testing.assert_allclose(found.proxies["run"].layers["distance"], 2, rtol=1e-5)
    assert found.proxies["m0"].layers["distance"].isna().all()
    assert found.table.set_index("proxy").loc["distance", "n_models"] == 1


def test_measure_study_proxies__unknown_names(folder, tmp_path):
    with pytest.raises(StudyError, match="no measured model 'm7'"):
        measure_study_proxies(folder / "out", models=["m7"], **HOW)
    with pytest.raises(StudyError, match="no reset 'noise"):
        measure_study_proxies(folder / "out", reset="noise", **HOW)
    with pytest.raises(StudyError, match="no probe set"):
        measure_study_proxies(folder / "out", probe_set="fog", **HOW)
    with pytest.raises(StudyError):
        measure_study_proxies(tmp_path, **HOW)


def test_save__tables_and_each_model(found, tmp_path):
    files = found.save(tmp_path)
    assert [path.name for path in files] == ["against.csv", "by_model.csv", "against.json"]
    assert (tmp_path / "model-002" / "proxies.json").exists()
