"""When bfloat16 is taken, and what is said about it."""

import numpy as np
import pytest
import torch

from layercrit.engine import calibration as _calibration
from layercrit.engine import holder
from layercrit.measuring import measure
from small_subjects import (
    QUIET,
    photographs,
    small_network,
)


@pytest.fixture
def long_job(monkeypatch):
    monkeypatch.setattr(holder, "_LONG_JOB", 0)
    monkeypatch.setattr(holder, "multiplies_bfloat16", lambda device: True)


def test_measure__auto_takes_bfloat16_where_it_is_exact_enough(long_job):
    network, probe_set = small_network(), photographs(6)
    with torch.no_grad():
        network.fc.weight.mul_(0.1)
    found, again = (measure(network, probe_set, dtype="auto", **QUIET) for _ in range(2))
    asked = measure(network, probe_set, dtype="bfloat16", **QUIET)
    assert found.record["dtype"] == found.summary()["dtype"] == found.record["protocol"]["dtype"] == "bfloat16"
    (note,) = (note for note in found.record["notes"] if "bfloat16" in note)
    assert note.startswith("bfloat16: error in criticality 0.0")
    assert note.endswith("on average over 9 layers and 6 images")
    for name, values in found.per_image.items():
        assert np.array_equal(values, again.per_image[name]), "the choice is not deterministic"
        assert np.array_equal(values, asked.per_image[name])


@pytest.mark.parametrize("tolerance", ["LAYER_TOLERANCE", "MEAN_TOLERANCE"])
def test_measure__auto_takes_float32_where_bfloat16_is_too_rough(long_job, monkeypatch, tolerance):
    monkeypatch.setattr(_calibration, tolerance, -1)
    found = measure(small_network(), photographs(6), **QUIET)
    assert found.record["dtype"] == "float32"
    assert any(note.startswith("float32, since bfloat16 is too inexact: error") for note in found.record["notes"])


def test_measure__auto_calibrates_on_some_of_many_layers(long_job, monkeypatch):
    monkeypatch.setattr(holder, "_CALIBRATION_LAYERS", 4)
    monkeypatch.setattr(_calibration, "LAYER_TOLERANCE", 1)
    found = measure(small_network(), photographs(4), trials=1, **QUIET)
    assert "on average over 3 layers and 4 images" in found.record["notes"][-1]
    assert len(found.to_pandas()) == 9


def test_measure__the_error_that_auto_notes_is_that_of_the_cells(long_job, monkeypatch):
    """With one trial and one batch, calibration and measurement reset the same layers to the same values."""
    monkeypatch.setattr(_calibration, "LAYER_TOLERANCE", 1)
    monkeypatch.setattr(_calibration, "MEAN_TOLERANCE", 1)
    network, probe_set = small_network(), photographs(6)
    rough, exact = (measure(network, probe_set, dtype=dtype, trials=1, **QUIET) for dtype in ("auto", "float32"))
    errors = rough.cells["cosine"] - exact.cells["cosine"]
    assert f"{errors.abs().max():.4f} at most and {abs(errors.mean()):.5f} in the mean" in rough.record["notes"][-1]


@pytest.mark.parametrize(("flops", "native"), [(1e30, True), (0, False)], ids=["short job", "emulated"])
def test_measure__auto_takes_float32_where_bfloat16_does_not_pay(monkeypatch, flops, native):
    monkeypatch.setattr(holder, "_LONG_JOB", flops)
    monkeypatch.setattr(holder, "multiplies_bfloat16", lambda device: native)
    found = measure(small_network(), photographs(4), trials=1, layers="fc", **QUIET)
    assert found.record["dtype"] == "float32"
    assert not any("bfloat16" in note for note in found.record["notes"])
