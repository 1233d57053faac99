import copy
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from layercrit import sampling
from layercrit.distances import DISTANCES, distance
from layercrit.errors import (
    CheckpointError,
    LayercritError,
    LayerError,
    ModelError,
    ProbeError,
    ProtocolError,
)
from layercrit.measurement import Measurement
from layercrit.measuring import list_layers, measure
from layercrit.models.model import structure
from layercrit.models.references import open_model
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.resets import RESETS, reset
from photographs import pieces
from slow_measurement import hashed, slow_measurement
from small_subjects import (
    GROUPS,
    PIXELS,
    QUIET,
    SIZE,
    SMALL,
    STILL,
    SmallNetwork,
    assert_same_cells,
    build_two_layers,
    fresh,
    members,
    mostly_right,
    normalised,
    photographs,
    registered,
    small_network,
    two_layers,
)


@pytest.fixture
def own_reset():
    with registered(RESETS):
        yield reset


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
    network, trials = small_network(), 3
    probe_set = photographs(labels=mostly_right(network) if labelled else None)
    architecture = f"module:{structure(network)}"
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
    probe_set = ProbeSet.from_array(pieces(3, 160), model.preprocessing)

    def build():
        return timm.create_model(architecture, pretrained=False, num_classes=9)

    seeds = [hashed(0, f"timm:{architecture}?num_classes=9", "rerandomize", trial) for trial in range(2)]
    layers = {name: [name] for name, m in model.network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    expected, whole = slow_measurement(
        fresh(build, 3).eval(),
        normalised(probe_set, model.mean, model.std),
        None,
        layers,
        [fresh(build, seed) for seed in seeds],
    )

    found = measure(reference, probe_set, trials=2, batch_size=2, **QUIET)

    position = {name: index for index, name in enumerate(layers)}
    order = [position[name] for name in found.to_pandas()["layer"]]
    assert sorted(order) == list(range(len(layers)))
    for name, values in found.per_image.items():
        tolerance = {"rtol": 1e-3, "atol": 1e-5} if name == "cosine_matched" else {"rtol": 0, "atol": 1e-5}
        np.testing.assert_allclose(values, expected[name][order], **tolerance, err_msg=name)
    assert found.record["predictions"]["chance"] == pytest.approx(whole["chance"], abs=1e-6)
    assert found.record["model"]["donor"] == f"timm.create_model('{architecture}', pretrained=False)"
    assert [note for note in found.summary()["notes"] if "hardly differ" not in note] == []


# networks whose criticality is known


class Fixed(nn.Module):
    """Logits that do not depend on the image: the bias of a linear layer with weight 0."""

    def __init__(self, logits):
        super().__init__()
        self.fc = nn.Linear(3, len(logits))
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.copy_(torch.tensor(logits))

    def forward(self, images):
        return self.fc(images.mean(dim=(2, 3)))


def test_measure__a_forced_flip_has_criticality_1():
    """p = (1, 0) up to e^-200 and, from the donor, (0, 1): 1 - cos = 1."""
    found = measure(Fixed([100.0, -100.0]), photographs(), donor=Fixed([-100.0, 100.0]), **QUIET)
    (row,) = found.to_pandas().to_dict("records")
    assert row["criticality"] == 1
    assert row["top1_agreement"] == 0
    assert (found.cells["l1"] == 2).all()
    assert found.record["protocol"]["trials"] == 1


@pytest.mark.parametrize("n_classes", [2, 5, 100])
def test_measure__forgetting_a_sure_decision_has_a_known_criticality(n_classes):
    """p = (1, 0, ..., 0) and, with all parameters 0, (1/k, ..., 1/k): 1 - cos = 1 - (1/k) / (1 / sqrt k)."""
    found = measure(Fixed([200.0] + [0.0] * (n_classes - 1)), photographs(), reset="zero", **QUIET)
    assert found.summary()["criticality"]["mean"] == pytest.approx(1 - 1 / math.sqrt(n_classes), abs=1e-6)
    assert found.to_pandas()["top1_agreement"].item() == 1, "of tied classes the first counts, which was right"


class Ignoring(nn.Module):
    """Of four layers the output depends on ``used`` alone."""

    def __init__(self):
        super().__init__()
        self.multiplied_by_zero, self.dropped, self.used, self.never_called = (nn.Linear(3, 4) for _ in range(4))

    def forward(self, images):
        x = images.mean(dim=(2, 3))
        zero = 0 * self.multiplied_by_zero(x)
        self.dropped(x)
        return 30 * self.used(x) + zero


@pytest.mark.parametrize("dtype", ["reference", "float32", "bfloat16"])
def test_measure__a_layer_that_the_output_ignores_has_criticality_0(dtype):
    found = measure(fresh(Ignoring, 0).eval(), photographs(), dtype=dtype, **QUIET)
    table = found.to_pandas().set_index("layer")
    assert list(table.index) == ["multiplied_by_zero", "dropped", "used", "never_called"]
    for layer in ("multiplied_by_zero", "dropped", "never_called"):
        assert table.loc[layer, ["criticality", "low", "high", "criticality_matched", "l1"]].tolist() == [0] * 5
        assert table.loc[layer, "status"] == "ok", "the layer was changed, though it does not matter"
    assert table.loc["used", "criticality"] > 0.001
    assert (found.cells["delta_norm"] > 0).all()


# what a result may depend on


@pytest.mark.parametrize("dtype", ["reference", "float32"])
def test_measure__does_not_depend_on_the_batch_size(dtype):
    network, probe_set = small_network(), photographs(7, mostly_right(small_network(), 7))
    whole, *others = (
        measure(network, probe_set, batch_size=n, dtype=dtype, trials=1, group="block", **QUIET) for n in (7, 1, 3, 99)
    )
    for other in others:
        assert_same_cells(other, whole, atol=2e-6)
        assert other.record["predictions"] == pytest.approx(whole.record["predictions"], rel=1e-5)


def test_measure__does_not_depend_on_the_order_of_the_images():
    network, images = small_network(), pieces(9, SIZE)
    labels, order = mostly_right(network, 9), np.random.default_rng(2).permutation(9)
    straight = ProbeSet.from_array(images, STILL, labels)
    shuffled = ProbeSet.from_array(images[order], STILL, labels[order])
    position = {image.tobytes(): index for index, image in enumerate(straight.images)}
    moved = [position[image.tobytes()] for image in shuffled.images]
    assert moved != sorted(moved)
    one, other = (measure(network, probe_set, batch_size=4, **QUIET) for probe_set in (straight, shuffled))
    for name, values in other.per_image.items():
        np.testing.assert_allclose(values, one.per_image[name][..., moved], rtol=0, atol=1e-5, err_msg=name)
    numbers = one.cells.select_dtypes("number").columns
    pd.testing.assert_frame_equal(other.cells[numbers], one.cells[numbers], atol=1e-5)


@pytest.mark.parametrize("name", ["rerandomize", "permute"])
def test_measure__a_layer_does_not_depend_on_the_other_layers(name):
    network, probe_set = small_network(), photographs(6)
    everything, some = (
        measure(network, probe_set, reset=name, layers=layers, dtype="reference", **QUIET)
        for layers in ("*", "fc,layer1.*.conv2")
    )
    cells = everything.cells.set_index(["layer", "trial"])
    for cell in some.cells.to_dict("records"):
        for column in ("seed", "delta_norm", *DISTANCES):
            assert cell[column] == cells.loc[(cell["layer"], cell["trial"]), column]
    assert set(some.cells["layer"]) == {"fc", "layer1.0.conv2", "layer1.1.conv2"}


def test_measure__the_seed_decides_everything():
    network, images = small_network(), pieces(12, SIZE)
    once, again, other = (measure(network, images, n_images=5, seed=seed, **QUIET) for seed in (4, 4, 5))
    assert once.record["probe_set"]["sha256"] == again.record["probe_set"]["sha256"]
    for name, values in once.per_image.items():
        assert np.array_equal(values, again.per_image[name]), f"{name}: same seed, other bits"
    assert once.record["probe_set"]["sha256"] != other.record["probe_set"]["sha256"]
    assert not set(once.cells["seed"]) & set(other.cells["seed"])
    assert not np.isclose(once.cells["delta_norm"], other.cells["delta_norm"]).any()


def test_measure__a_trial_does_not_depend_on_how_many_there_are():
    network, probe_set = small_network(), photographs(5)
    few, many = (measure(network, probe_set, trials=trials, **QUIET) for trials in (1, 3))
    for name, values in few.per_image.items():
        assert np.array_equal(values[:, 0], many.per_image[name][:, 0])
    assert few.to_pandas()["low"].isna().all(), "one draw does not tell how far draws lie apart"
    assert few.summary()["covers"] == "nothing"


def test_measure__layers_of_a_trial_share_one_donor(own_reset):
    donors = []

    @own_reset("spy", random=True, donor="initialiser")
    def spy(draw):
        donors.append(draw.donor)
        return draw.donor

    found = measure(two_layers(), PIXELS, reset="spy", trials=2, seed=6, **QUIET)
    for trial in range(2):
        twin = fresh(build_two_layers, int(found.cells["seed"][trial]))
        mine = donors[2 * trial] | donors[2 * trial + 1]
        assert mine.keys() == dict(twin.named_parameters()).keys()
        assert all(torch.equal(mine[name], p) for name, p in twin.named_parameters())


def test_measure__buffers_stay_trained(own_reset):
    """Of a normalisation layer scale and shift are reset, running statistics never are."""
    network, probe_set = small_network(), photographs(4)
    donor = copy.deepcopy(network)
    with torch.no_grad():
        for module in donor.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(1e4)
    found = measure(network, probe_set, types="all", donor=donor, **QUIET)
    assert (found.cells["status"] == "unchanged").all()
    donor.stem.bias.data += 0.1
    found = measure(network, probe_set, types="all", donor=donor, **QUIET)
    assert found.to_pandas().set_index("layer").loc["stem", "criticality"] < 0.9


# cells that do not count


def test_measure__a_reset_that_changes_nothing_is_marked_and_left_out():
    """'1' is 0 already, '3' is not; nothing of '1' is averaged in silence."""
    network = two_layers()
    for parameter in network[1].parameters():
        nn.init.zeros_(parameter)
    found = measure(network, PIXELS, reset="zero", **QUIET)
    assert list(found.cells["status"]) == ["unchanged", "ok"]
    assert found.cells["delta_norm"][0] == 0
    assert found.cells.loc[0, list(DISTANCES)].isna().all()
    assert all(np.isnan(values[0]).all() and np.isfinite(values[1]).all() for values in found.per_image.values())
    table, summary = found.to_pandas().set_index("layer"), found.summary()
    assert table["status"].tolist() == ["unchanged 1/1", "ok"]
    assert table["n_trials"].tolist() == [0, 1]
    assert math.isnan(table.loc["1", "criticality"])
    assert summary["criticality"]["mean"] == table.loc["3", "criticality"]
    assert (summary["n_layers"], summary["n_layers_in_mean"], summary["left_out"]) == (2, 1, ["1"])
    assert summary["cells"] == {"unchanged": 1, "ok": 1}


def test_measure__where_no_cell_counts_there_is_no_mean():
    network = two_layers()
    found = measure(network, PIXELS, donor=copy.deepcopy(network), **QUIET)
    summary = found.summary()
    assert (summary["criticality"], summary["criticality_matched"], summary["covers"]) == (None, None, "nothing")
    assert summary["cells"] == {"unchanged": 2}
    assert "mean criticality not known" in repr(found)


def test_measure__new_values_that_are_not_finite_are_never_ok(own_reset):
    """Fused with a convolution, ReLU may make 0 of NaN, so that predictions are finite."""

    @own_reset("nans", random=False)
    def nans(draw):
        return {name: torch.full_like(value, math.nan) for name, value in draw.trained.items()}

    found = measure(small_network(), photographs(4), reset="nans", dtype="float32", **QUIET)
    assert set(found.cells["status"]) == {"not_finite"}


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_measure__predictions_that_are_not_finite_are_marked_and_left_out(own_reset, value):
    """In trial 1 layer '3' is given values under which logits overflow; its other trials and layer '1' count."""
    drawn = []

    @own_reset("explode", random=True)
    def explode(draw):
        drawn.append(draw.layer.name)
        exploding = drawn.count("3") == 2 and draw.layer.name == "3"
        return {name: torch.full_like(v, value) if exploding else v + 1 for name, v in draw.trained.items()}

    network, labels = two_layers(), [0, 1, 2, 0, 1, 2]
    probe_set = ProbeSet.from_array(PIXELS, Preprocessing(height=2, width=2, resize=None), labels)
    with torch.no_grad():
        network[1].weight.abs_()
        network[1].bias.fill_(1)
    found = measure(network, probe_set, reset="explode", trials=3, dtype="reference", batch_size=4, **QUIET)
    assert list(found.cells["status"]) == ["ok"] * 4 + ["not_finite", "ok"]
    bad, good = found.cells.iloc[4], found.cells.iloc[[3, 5]]
    assert bad[[*DISTANCES, "cosine_matched", "loss", "top1_accuracy", "recovered_accuracy"]].isna().all()
    row = found.to_pandas().set_index("layer").loc["3"]
    assert (row["status"], row["n_trials"]) == ("not_finite 1/3", 2)
    assert row["criticality"] == pytest.approx(good["cosine"].mean(), rel=1e-6)
    assert row["loss"] == pytest.approx(good["loss"].mean())
    summary = found.summary()
    assert summary["left_out"] == ["3"]
    assert summary["criticality"]["mean"] == pytest.approx(found.cells["cosine"][:3].mean(), rel=1e-6)
    assert summary["cells"] == {"ok": 5, "not_finite": 1}


class Fragile(nn.Module):
    """Predicts no number for white images."""

    def __init__(self, value):
        super().__init__()
        self.fc, self.value = nn.Linear(12, 3), value

    def forward(self, images):
        x = images.flatten(1)
        return self.fc(torch.where(x[:, :1] > 0.9, self.value, x))


def one_white(index):
    pixels = PIXELS.clamp(max=200)
    pixels[index] = 255
    return pixels


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_measure__a_model_that_predicts_nan_itself_is_an_error(own_reset, value):
    @own_reset("never", random=False)
    def never(draw):
        raise AssertionError("a layer was reset before the model's own predictions were looked at")

    with pytest.raises(ModelError, match=r"itself predicts NaN or infinity for 1 of 6 images; .* 'array .*\[2\]'"):
        measure(Fragile(value).eval(), one_white(2), reset="never", **QUIET)


class Logarithms(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(x.flatten(1)).log()


def test_measure__nan_of_the_weights_is_blamed_on_them():
    network = Logarithms().eval()  # of numbers below 0, too
    with pytest.raises(ModelError, match=r"Check its normalisation \(mean, std\)\.$"):
        measure(network, PIXELS, dtype="float32", **QUIET)
    with torch.no_grad():
        network.fc.bias[0] = math.nan
    with pytest.raises(ModelError, match=r"such values in its weights: fc\.bias\. Its training failed"):
        measure(network, PIXELS, dtype="float32", **QUIET)


def test_measure__a_model_that_predicts_nan_later_on_is_an_error_too(monkeypatch):
    """Beyond the images that are looked at first; found in the midst of the first trial."""
    monkeypatch.setattr("layercrit.engine.predictions._TEMPERATURE_IMAGES", 1)
    network = Fragile(math.nan).eval()
    drawn = ProbeSet.from_array(PIXELS, SMALL.preprocessing, seed=hashed(0, "probe set") % 2**32)
    index = int(drawn.names[-1].partition("[")[2].rstrip("]"))
    with pytest.raises(ModelError, match=rf"for 1 of 1 images; the first is 'array .*\[{index}\]'"):
        measure(network, one_white(index), batch_size=1, **QUIET)


def test_measure__constant_predictions_have_no_matched_temperature():
    network = two_layers()
    for parameter in network[3].parameters():
        nn.init.zeros_(parameter)
    found = measure(network, PIXELS, **QUIET)
    summary = found.summary()
    assert summary["temperature"] is None
    assert summary["criticality_matched"] is None
    assert summary["criticality"]["mean"] > 0
    assert any("no temperature" in note for note in summary["notes"])
    assert found.to_pandas()["criticality_matched"].isna().all()
    assert found.to_pandas()["status"].tolist() == ["ok", "ok"]


# what is asked for, and what cannot be


def test_measure__takes_a_model_an_array_and_a_reference_alike(tmp_path):
    network = two_layers()
    given = measure(network, PIXELS, **QUIET)
    opened = measure(open_model(network, input_size=(3, 2, 2)), PIXELS.numpy(), **QUIET)
    last = measure(network, np.ascontiguousarray(PIXELS.permute(0, 2, 3, 1)), **QUIET)
    for other in (opened, last):
        assert_same_cells(other, given, atol=0)
    np.savez(tmp_path / "images.npz", images=PIXELS.numpy(), labels=np.arange(6) % 3)
    stored = measure(open_model(network, input_size=(3, 2, 2)), tmp_path / "images.npz", **QUIET)
    assert np.array_equal(stored.per_image["cosine"], given.per_image["cosine"])
    assert stored.record["probe_set"]["labels"]


def test_list_layers__are_those_that_are_measured():
    model = open_model(two_layers(), input_size=(3, 2, 2))
    chosen = {"layers": "*", "types": "all", "sets": "pairs"}
    listed = list_layers(model, **chosen)
    measured = measure(model, PIXELS, **{**QUIET, **chosen}).to_pandas()
    columns = ["layer", "type", "depth", "n_parameters", "flops_after"]
    pd.testing.assert_frame_equal(listed[columns], measured[columns], check_dtype=False, check_names=False)
    with pytest.raises(LayerError, match="No layer matches"):
        list_layers(model, layers="nothing")


def test_measure__n_images_is_how_many_are_drawn():
    found = measure(two_layers(), PIXELS, n_images=4, **QUIET)
    assert found.per_image["cosine"].shape == (2, 3, 4)
    assert found.record["protocol"]["n_images"] == found.summary()["n_images"] == 4
    assert measure(two_layers(), PIXELS, n_images=99, **QUIET).record["protocol"]["n_images"] == 6


@pytest.mark.parametrize("how", ["array", "probe set"])
def test_measure__labels_can_be_left_alone(how, tmp_path):
    """Labels that the model cannot have are no error then."""
    labels = np.arange(6) + 100
    np.savez(tmp_path / "images.npz", images=PIXELS.numpy(), labels=labels)
    model = open_model(two_layers(), input_size=(3, 2, 2))
    probe_set = ProbeSet.from_source(tmp_path / "images.npz", model.preprocessing)
    images = probe_set if how == "probe set" else tmp_path / "images.npz"
    found = measure(model, images, labels="none", **QUIET)
    assert "loss" not in found.cells
    assert found.record["predictions"]["top1_accuracy"] is None
    with pytest.raises(ProbeError, match=r"do not match the model's classes: label 10\d .* is not in 0 to 2"):
        measure(model, images, **QUIET)


def test_measure__permute_and_zero_reset_what_they_say():
    """The permuted layer keeps its values, so that the norm of the change is bounded by twice theirs."""
    network = two_layers()
    norm = math.sqrt(sum(p.square().sum().item() for p in network[1].parameters()))
    zeroed = measure(network, PIXELS, reset="zero", layers="1", **QUIET)
    assert zeroed.cells["delta_norm"].tolist() == [pytest.approx(norm)]
    permuted = measure(network, PIXELS, reset="permute", layers="1", trials=4, **QUIET)
    assert permuted.cells["delta_norm"].nunique() == 4
    assert permuted.cells["delta_norm"].max() <= 2 * norm
    assert (zeroed.record["model"]["donor"], permuted.record["model"]["donor"]) == (None, None)


def test_measure__rewind_takes_the_values_of_a_file(tmp_path):
    network, earlier = small_network(), small_network(seed=6)
    save_file(earlier.state_dict(), tmp_path / "epoch0.safetensors")
    probe_set = photographs(labels=mostly_right(network))
    expected, _ = slow_measurement(network, normalised(probe_set), probe_set.labels, members("layer"), [earlier])
    rewound = measure(network, probe_set, reset="rewind", donor=tmp_path / "epoch0.safetensors", **QUIET)
    assert rewound.record["model"]["donor"].startswith(f"given: the file {tmp_path / 'epoch0.safetensors'}, SHA-256 ")
    given = measure(network, probe_set, donor=earlier, **QUIET)
    for found in (rewound, given):
        np.testing.assert_allclose(found.per_image["cosine"], expected["cosine"], rtol=0, atol=1e-5)
        assert found.summary()["covers"] == "images", "there is no chance but in the choice of images"
    assert rewound.record["notes"][1:] == ["one trial instead of 3: all trials of the reset 'rewind' are the same"]
    assert given.record["notes"][1:] == ["one trial instead of 3: all trials with one given donor are the same"]


def test_measure__says_where_fresh_values_come_from():
    network = two_layers()
    note = "fresh values come from each module's own reset_parameters"
    given = measure(network, PIXELS, trials=1, **QUIET)
    assert given.record["notes"][1].startswith(note)
    assert given.record["model"]["donor"] == given.summary()["donor"] == "each module's own reset_parameters"
    of_function = replace(open_model(network), initialiser="none: py:nets:f has no parameter `pretrained`")
    (said,) = (text for text in measure(of_function, PIXELS, trials=1, **QUIET).record["notes"] if note in text)
    assert said.startswith(f"{note} (py:nets:f has no parameter `pretrained`); if ")
    declared = open_model(network, mean=(0.0,) * 3, std=(1.0,) * 3, input_size=(3, 2, 2))
    model = replace(declared, build=build_two_layers, initialiser="two_layers()")
    built = measure(model, PIXELS, trials=1, **QUIET)
    assert ([n for n in built.record["notes"] if "hardly differ" not in n], built.record["model"]["donor"]) == (
        [],
        "two_layers()",
    )


def test_measure__keeps_registered_resets_and_distances(own_reset):
    @own_reset("add_one", random=False)
    def add_one(draw):
        return {name: value + 1 for name, value in draw.trained.items()}

    with registered(DISTANCES):

        @distance("largest_change", upper=1.0)
        def largest_change(p, q):
            return (p - q).abs().amax(dim=1)

        found = measure(two_layers(), PIXELS, reset="add_one", distances=["largest_change", "l2"], **QUIET)
        everything = measure(two_layers(), PIXELS, **QUIET)
    assert list(found.per_image) == ["cosine", "largest_change", "l2", "cosine_matched"]
    assert found.cells["delta_norm"].tolist() == [pytest.approx(math.sqrt(104)), pytest.approx(math.sqrt(27))]
    assert {"largest_change", "l2"} <= set(found.to_pandas())
    assert "js" not in found.cells
    assert (found.cells["largest_change"] <= found.cells["l2"]).all()
    assert list(everything.per_image) == [*DISTANCES, "largest_change", "cosine_matched"]


def test_measure__of_distances_one_name_or_several_with_commas_will_do():
    assert list(measure(two_layers(), PIXELS, distances="l2", **QUIET).per_image)[:-1] == ["cosine", "l2"]
    assert list(measure(two_layers(), PIXELS, distances="l1,cosine", **QUIET).per_image)[:-1] == ["cosine", "l1"]


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"reset": "rerandomise"}, ProtocolError, "There is no reset 'rerandomise'. Did you mean 'rerandomize'"),
        ({"distances": ["cosin"]}, ProtocolError, "There is no distance 'cosin'. Did you mean 'cosine'"),
        ({"dtype": "float23"}, ProtocolError, "Unknown dtype 'float23'. Did you mean 'float32'"),
        ({"group": "blocks"}, LayerError, "Unknown group 'blocks'. Did you mean 'block'"),
        ({"types": "convolution"}, LayerError, "Unknown layer type 'convolution'"),
        ({"types": "norm"}, LayerError, "no layer of type norm. Its types are: linear"),
        ({"layers": "4"}, LayerError, "No layer matches '4'"),
        ({"device": "gpu"}, ProtocolError, "The device 'gpu' cannot be used: Expected .*Available here: 'auto'"),
        ({"device": "meta"}, ProtocolError, "The device 'meta' cannot be used"),
        ({"device": "cuda:99"}, ProtocolError, "The device 'cuda:99' cannot be used"),
        ({"n_images": 0}, ProtocolError, "n_images must be .* at least 1; got 0"),
        ({"trials": 0}, ProtocolError, "trials must be .* at least 1; got 0"),
        ({"batch_size": 0}, ProtocolError, "batch_size must be .* at least 1; got 0"),
        ({"level": 0}, ProtocolError, "level must be between 0 and 1"),
        ({"reset": "rewind"}, ProtocolError, "'rewind' needs the checkpoint"),
        ({"reset": "zero", "donor": two_layers()}, ProtocolError, "'zero' takes no values from one"),
        ({"donor": small_network()}, ModelError, "The donor is not of the architecture of"),
        ({"donor": "nowhere.pth"}, CheckpointError, "no file nowhere.pth"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).eval()}, ModelError, "one number per image"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(13, 2)).eval()}, ModelError,
         r"cannot run on one image of 3 channels, 2 x 2 pixels \(RuntimeError: .*set that size: open_model"),
        ({"model": nn.Flatten().eval()}, LayerError, "none, it has no parameters"),
        ({"model": "timm:resnet5O?pretrained=false"}, ModelError, "timm has no model 'resnet5O'"),
        ({"model": 5}, ModelError, "got int"),
        ({"model": SMALL, "images": "nowhere"}, ProbeError, "No such file or folder: 'nowhere'"),
        ({"model": SMALL, "images": photographs(2)}, ProbeError, r"\(3, 12, 12\) .* but \(3, 2, 2\) are asked"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_measure__what_makes_no_sense_is_said(settings, error, text):
    with pytest.raises(error, match=text) as raised:
        measure(**{"model": two_layers(), "images": PIXELS, **QUIET, **settings})
    assert isinstance(raised.value, LayercritError)


def test_measure__a_module_without_initialiser_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.eye(12))

        def forward(self, x):
            return x @ self.scale

    network = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(12, 3)).eval()
    with pytest.raises(ModelError, match=r"no reset_parameters method, .*: 1 \(Scale\)\. Open the model by reference"):
        measure(network, PIXELS, **QUIET)
    assert measure(network, PIXELS, reset="permute", **QUIET).summary()["cells"] == {"ok": 6}
    assert measure(network, PIXELS, layers="2", **QUIET).summary()["cells"] == {"ok": 3}


def test_measure__settings_are_checked_before_images_are_decoded():
    class Never:
        shape = (4, 3, 2, 2)

        def __array__(self, *_):
            raise AssertionError("images were read before the settings were found to be wrong")

    for wrong in ({"layers": "4"}, {"group": "blocks"}, {"device": "meta"}, {"reset": "rewind"}, {"dtype": "float23"}):
        with pytest.raises(LayercritError):
            measure(two_layers(), Never(), **wrong, **QUIET)


def test_measure__on_trial_is_shown_what_is_finished():
    shown = []
    found = measure(two_layers(), PIXELS, trials=3, on_trial=lambda so_far: shown.append(so_far()), **QUIET)
    assert [one.cells["trial"].nunique() for one in shown] == [1, 2, 3]
    assert [len(one.record["trial_seeds"]) for one in shown] == [1, 2, 3]
    pd.testing.assert_frame_equal(shown[-1].cells, found.cells)
    for index, one in enumerate(shown, 1):
        assert np.array_equal(one.per_image["cosine"], found.per_image["cosine"][:, :index])
        assert one.record["notes"] is not found.record["notes"], "what is shown must not change later"


def test_measure__on_trial_builds_a_measurement_only_when_asked(monkeypatch):
    built = []
    monkeypatch.setattr(sampling, "Measurement", lambda *parts: built.append(parts) or Measurement(*parts))
    kept = []
    found = measure(two_layers(), PIXELS, trials=3, on_trial=kept.append, **QUIET)
    assert len(built) == 1
    later = [so_far() for so_far in kept]
    assert [one.cells["trial"].nunique() for one in later] == [1, 2, 3], "each is of the trials up to its own"
    pd.testing.assert_frame_equal(later[-1].cells, found.cells)


def test_layercrit__measure_is_the_function_whenever_it_is_asked_for():
    """Also after its module has been imported, and when asked for again."""
    lines = "import layercrit, layercrit.measuring\nfor _ in range(2):\n    assert callable(layercrit.measure)"
    ran = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
