import contextlib
import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from photographs import pieces
from safetensors.torch import save_file
from slow_measurement import GROUPS, SmallNetwork, fresh, hashed, members, small_network, slow_measurement
from torch import nn

import layercrit
from layercrit import _calibration
from layercrit import measure as measure_module
from layercrit._machine import choose_batch_size, find_device, is_out_of_memory
from layercrit.distances import DISTANCES, distance
from layercrit.errors import (
    CheckpointError,
    LayercritError,
    LayerError,
    ModelError,
    ProbeError,
    ProtocolError,
)
from layercrit.measure import measure
from layercrit.models import open_model
from layercrit.networks import structure
from layercrit.probes import Preprocessing, ProbeSet
from layercrit.replay import GraphReplay, PlainReplay
from layercrit.resets import RESETS, reset

SIZE = 12
QUIET = {"progress": False}
STILL = Preprocessing(height=SIZE, width=SIZE, resize=None)


def photographs(n_images=10, labelled=True):
    labels = np.random.default_rng(1).integers(0, 6, n_images) if labelled else None
    return ProbeSet.from_array(pieces(n_images, SIZE), STILL, labels)


def normalised(probe_set, mean=0.0, std=1.0):
    return (torch.tensor(probe_set.images).float() / 255 - mean) / std


@contextlib.contextmanager
def registered(registry):
    """Take out again what is registered inside."""
    before = dict(registry)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


@pytest.fixture
def own_reset():
    with registered(RESETS):
        yield reset


def assert_same_cells(found, expected, atol):
    """Every distance of every image, and every number of every cell, are the same within ``atol``."""
    assert found.per_image.keys() == expected.per_image.keys()
    for name, values in expected.per_image.items():
        np.testing.assert_allclose(found.per_image[name], values, rtol=0, atol=atol, err_msg=name)
    numbers = expected.cells.select_dtypes("number").columns
    pd.testing.assert_frame_equal(found.cells[numbers], expected.cells[numbers], rtol=0, atol=atol)
    assert (found.cells["status"] == expected.cells["status"]).all()


# the whole measurement against a slow one


@pytest.mark.parametrize(
    ("group", "dtype", "batch_size", "labelled"),
    [
        ("layer", "reference", 10, True),
        ("layer", "float32", 4, True),
        ("layer", "float32", 1, False),
        ("block", "float32", 64, True),
        ("block", "reference", 7, False),
        ("stage", "float32", 3, True),
        ("layer", "auto", "auto", True),
    ],
)
def test_measure__equals_the_slow_way(group, dtype, batch_size, labelled):
    network, probe_set, trials = small_network(), photographs(labelled=labelled), 3
    architecture = f"module:slow_measurement.SmallNetwork-{structure(network)}"
    seeds = [hashed(8, architecture, "rerandomize", trial) for trial in range(trials)]
    donors = [fresh(SmallNetwork, seed) for seed in seeds]
    expected, whole = slow_measurement(network, normalised(probe_set), probe_set.labels, members(group), donors)

    found = measure(network, probe_set, trials=trials, group=group, seed=8, dtype=dtype, batch_size=batch_size, **QUIET)

    table = found.to_pandas()
    assert list(table["layer"]) == GROUPS[group]
    assert list(found.cells["seed"]) == seeds * len(table)
    assert list(found.cells["trial"]) == [0, 1, 2] * len(table)
    assert (found.cells["status"] == "ok").all()
    for name, values in found.per_image.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5, err_msg=name)
    for name, values in expected.items():
        if values.ndim == 3:
            values = values.mean(axis=2)
        np.testing.assert_allclose(found.cells[name], values.ravel(), rtol=1e-5, atol=1e-5, err_msg=name)
    assert expected["cosine"].mean(axis=(1, 2)).min() > 0.01, "layers that hardly matter prove little"
    np.testing.assert_allclose(table["criticality"], expected["cosine"].mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(table["criticality_matched"], expected["cosine_matched"].mean(axis=(1, 2)), atol=1e-5)
    assert found.summary()["criticality"]["mean"] == pytest.approx(expected["cosine"].mean(), abs=1e-5)
    for name, value in whole.items():
        assert found.record["predictions"][name] == pytest.approx(value, rel=1e-5), name
    assert ("top1_accuracy" in found.cells) == ("recovered_accuracy" in table) == labelled


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_measure__equals_the_slow_way_for_a_reference(architecture):
    reference = f"timm:{architecture}?pretrained=false&seed=3&num_classes=9&input_size=(3,160,160)"
    model = open_model(reference)
    probe_set = ProbeSet.from_array(pieces(4, 160), model.preprocessing)

    def build():
        return timm.create_model(architecture, pretrained=False, num_classes=9)

    seeds = [hashed(0, f"timm:{architecture}?num_classes=9", "rerandomize", trial) for trial in range(2)]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (model.mean, model.std))
    layers = {name: [name] for name, m in model.network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    expected, whole = slow_measurement(
        fresh(build, 3).eval(), normalised(probe_set, mean, std), None, layers, [fresh(build, seed) for seed in seeds]
    )

    found = measure(reference, probe_set, trials=2, batch_size=3, **QUIET)

    position = {name: index for index, name in enumerate(layers)}
    order = [position[name] for name in found.to_pandas()["layer"]]
    assert sorted(order) == list(range(len(layers)))
    for name, values in found.per_image.items():
        tolerance = {"rtol": 1e-3, "atol": 1e-5} if name == "cosine_matched" else {"rtol": 0, "atol": 1e-5}
        np.testing.assert_allclose(values, expected[name][order], **tolerance, err_msg=name)
    assert found.record["predictions"]["chance"] == pytest.approx(whole["chance"], abs=1e-6)
    assert found.record["model"]["donor"] == f"timm.create_model('{architecture}', pretrained=False)"
    assert found.summary()["notes"] == []
