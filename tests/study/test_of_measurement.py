"""A measurement as a study: all of its numbers are those of the measurement."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from layercrit.errors import ProbeError
from layercrit.measuring import measure
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.study.of_measurement import study_of

SIZE = Preprocessing(height=4, width=4, resize=None)


class Network(nn.Module):
    """Two stages; the last layer is 0, so that the reset `zero` leaves it unchanged."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        self.last = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        out = 8 * self.fc(self.layer2(self.layer1(x)).mean((2, 3)))
        return out + self.last(out)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Network().eval()


def images(labelled=True):
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    return ProbeSet.from_array(pixels, SIZE, np.arange(12) % 4 if labelled else None)


MEASUREMENTS = {
    "random draws": {"trials": 3},
    "one draw": {"trials": 1, "level": 0.9},
    "betting": {"trials": 4, "interval": "betting"},
    "no labels, and a layer that is unchanged": {"reset": "zero", "labelled": False},
    "a half-width that is not reached": {"half_width": 0.02, "pilot": 3, "max_trials": 4},
    "sets over stages": {"trials": 2, "sets": "pairs"},
    "other norm statistics": {"trials": 2, "norm_statistics": "reestimate"},
}


@pytest.fixture(scope="module", params=MEASUREMENTS.values(), ids=MEASUREMENTS)
def measurement(request):
    asked = dict(request.param)
    probe_set = images(asked.pop("labelled", True))
    return measure(network(), probe_set, name="the network", seed=4, device="cpu", progress=False, **asked)


@pytest.fixture
def study(measurement, tmp_path):
    return study_of(measurement, tmp_path / "study")


def test_study_of__layers(study, measurement):
    expected = measurement.to_pandas()
    found = study.to_pandas()
    assert found["model"].unique().tolist() == ["the network"]
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False)


def test_study_of__cells(study, measurement):
    columns = measurement.cells.columns.drop("model")
    expected = measurement.cells.sort_values(["depth", "trial"], ignore_index=True)
    pd.testing.assert_frame_equal(study.cells[columns], expected[columns], check_dtype=False)


def test_study_of__model(study, measurement):
    (found,) = study.by_model().to_dict("records")
    summary = measurement.summary()
    of_mean = {"mean": found["criticality"], "low": found["low"], "high": found["high"]}
    for name, value in of_mean.items():
        np.testing.assert_allclose(value, np.nan if (known := summary["criticality"][name]) is None else known)
    for name in ("chance", "temperature", "top1_accuracy", "dtype"):
        assert found[name] == summary[name] or (summary[name] is None and np.isnan(found[name]))
    assert found["n_layers"] == summary["n_layers_in_mean"]
    assert found["n_trials"] == summary["n_trials_in_mean"]
    assert found["covers"] == summary["covers"]
    assert found["norm_statistics"] == measurement.record["protocol"]["norm_statistics"]
    missed = [text for text in study.warnings if "half-width" in text]
    assert study.warnings == [*(f"the network: {text}" for text in summary["warnings"]), *missed]
    n_missed = len((summary["precision"] or {}).get("not_reached", []))
    expected = [f"{n_missed} of 5 layers of all models"] if n_missed else []
    assert [text.partition(" miss")[0] for text in missed] == expected
    assert list(study.notes_of_models) == summary["notes"]
    assert study.level == summary["level"]
    assert study.progress()["state"].to_list() == ["done"]


def test_study_of__images(study, measurement):
    texts = {"layer": str, "class": str, "covers": str}
    for of in ("label", "prediction"):
        if of == "label" and measurement.images.labels is None:
            with pytest.raises(ProbeError, match="labels"):
                study.by_class(of=of)
            continue
        expected = measurement.by_class(of).astype(texts)
        found = study.by_class(of=of).astype(texts)
        pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False)
    expected = measurement.by_image()
    found = study.by_image("the network").astype({"layer": str})
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False, check_categorical=False)


def test_study_of__stages_and_shapes(tmp_path):
    found = measure(network(), images(), trials=1, sets="pairs", device="cpu", progress=False)
    layers = study_of(found, tmp_path).to_pandas().set_index("layer")
    assert layers["stage"].dropna().to_dict() == {
        "layer1.0": "layer1",
        "layer1.2": "layer1",
        "layer2.0": "layer2",
        "fc": "fc",
        "last": "last",
        "layer1.0 + layer1.2": "layer1",
    }
    assert layers["shape"]["layer2.0"] == "8x6x3x3"


def test_study_of__without_what_earlier_versions_did_not_keep(tmp_path):
    found = measure(network(), images(), trials=2, device="cpu", progress=False)
    record = {key: value for key, value in found.record.items() if key not in ("warnings", "name", "finished")}
    protocol = {key: value for key, value in record["protocol"].items() if key not in ("norm_statistics", "interval")}
    older = replace(found, images=None, record=record | {"protocol": protocol})
    study = study_of(older, tmp_path)
    assert study.to_pandas()["criticality"].to_list() == found.to_pandas()["criticality"].to_list()
    with pytest.raises(ProbeError, match="not known"):
        study.by_class()
