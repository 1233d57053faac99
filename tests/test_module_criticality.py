"""Module criticality: known answers, a slow twin, and what cannot be asked."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from layercrit.cli import cli
from layercrit.errors import CheckpointError, LayercritError, LayerError, ModelError, ProbeError, ProtocolError
from layercrit.models.references import open_model
from layercrit.module_criticality import measure_module_criticality
from layercrit.module_paths import ModulePaths
from layercrit.probes.probe_set import ProbeSet
from layercrit.seeds import drawing, layer_seed, trial_seed
from running_jobs import small_network
from training_runs import write_run

N = 24
HOW = {"progress": False, "draws": 3, "n_a": 5, "n_s": 9, "tolerance": 1.2}
OPTIONS = "arch=py:running_jobs:small_network&input_size=(3,2,2)"


def pixels():
    return np.random.default_rng(0).integers(0, 256, (N, 3, 2, 2), dtype=np.uint8)


LABELS = np.random.default_rng(1).integers(0, 3, N)


def trained(seed=0, steps=60):
    """Initial weights, and a network that was trained from them on the images for a moment."""
    with drawing(seed):
        network = small_network()
    initial = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    images = torch.from_numpy(pixels()).float() / 255
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images), torch.from_numpy(LABELS)).backward()
        optimizer.step()
    return initial, network.eval()


@pytest.fixture(scope="module")
def networks():
    return trained()


def measured(networks, **settings):
    initial, network = networks
    settings = {"initial": initial, "labels": LABELS, **HOW, **settings}
    return measure_module_criticality(network, pixels(), **settings)


@pytest.fixture(scope="module")
def found(networks):
    return measured(networks)


# --- known answers ----------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """A network whose cross-entropy with class 0 is 0.1 + 1/2 ||theta - theta_trained||^2 for every image."""

    def __init__(self, n, distance=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(n))
        self.register_buffer("best", torch.ones(n))
        with torch.no_grad():
            self.theta += distance / n**0.5

    def forward(self, x):
        loss = 0.1 + 0.5 * (self.theta - self.best).square().sum()
        other = torch.log(torch.expm1(loss)) + 0 * x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(other), other], dim=1)


@pytest.mark.parametrize("left", [0.1, 0.4])
def test_measure_module_criticality__quadratic_loss(left):
    """mu = k (d^2 / (2 eps) - 1) at a = 1 - 2 eps / d^2."""
    k, d = 400, 4.0
    allowed = left * d**2 / 2
    found = measure_module_criticality(
        open_model(Quadratic(k), output="logits"), pixels()[:4], initial=Quadratic(k, d), labels=[0] * 4, types="all",
        excess=allowed, draws=40, progress=False,
    )  # fmt: skip
    (row,) = found.to_pandas().to_dict("records")
    assert row["a"] == pytest.approx(1 - left)
    assert row["distance"] == pytest.approx(d, rel=1e-5)
    assert row["module_criticality"] == pytest.approx(k * (d**2 / (2 * allowed) - 1), rel=0.02)
    assert row["low"] <= k * (d**2 / (2 * allowed) - 1) <= row["high"]
    assert found.summary()["loss"] == pytest.approx(0.1, rel=1e-4)


class SharedQuadratic(nn.Module):
    """As `Quadratic`, but half of theta's share of the loss comes from each of two modules that have it in common."""

    def __init__(self, n, distance=0.0):
        super().__init__()
        self.one, self.other = nn.Linear(n, 1, bias=False), nn.Linear(n, 1, bias=False)
        self.other.weight = self.one.weight
        with torch.no_grad():
            self.one.weight.fill_(1 + distance / n**0.5)

    def forward(self, x):
        loss = 0.1 + 0.25 * ((self.one.weight - 1).square().sum() + (self.other.weight - 1).square().sum())
        other = torch.log(torch.expm1(loss)) + 0 * x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(other), other], dim=1)


def test_measure_module_criticality__modules_that_share_a_parameter_are_one():
    """k parameters of one module, and not twice as many of two."""
    k, d, allowed = 400, 4.0, 1.6
    found = measure_module_criticality(
        open_model(SharedQuadratic(k), output="logits"), pixels()[:4], initial=SharedQuadratic(k, d), labels=[0] * 4,
        excess=allowed, draws=20, n_a=6, progress=False,
    )  # fmt: skip
    (row,) = found.to_pandas().to_dict("records")
    assert (row["layer"], row["n_parameters"]) == ("one + other", k)
    assert row["distance"] == pytest.approx(d, rel=1e-5)
    assert row["module_criticality"] == pytest.approx(k * (d**2 / (2 * allowed) - 1), rel=0.03)
    assert found.summary()["n_modules"] == 1


def test_measure_module_criticality__initial_values_do_as_well():
    initial, network = trained()
    with torch.no_grad():
        network[3].weight.zero_()  # nothing of layer 1 reaches the output
    table = measured((initial, network), tolerance=1.01).to_pandas().set_index("layer")
    assert table.loc["1", "module_criticality"] == 0
    assert table.loc["1", "a"] == 0


def test_measure_module_criticality__a_module_that_was_not_trained(networks):
    _, network = networks
    initial = copy.deepcopy(networks[0])
    initial[3].load_state_dict(network[3].state_dict())
    found = measured((initial, network))
    row = found.to_pandas().set_index("layer").loc["3"]
    assert (row["module_criticality"], row["status"], row["n_points"]) == (0, "unchanged", 0)
    with pytest.raises(ProtocolError, match="No point of the grid was evaluated for '3'"):
        found.plot("3")
    nothing = measured((network, network))
    assert nothing.summary()["sum"] == 0
    assert nothing.summary()["n_evaluations"] == 0


def test_measure_module_criticality__more_noise_than_the_grid_has(networks):
    table = measured(networks, s_range=(1e-4, 1e-3)).to_pandas()
    assert (table["edge"] == "largest s").all()
    assert (table["low"] == 0).all()
    none = measured(networks, s_range=(50.0, 100.0))
    assert none.to_pandas()["module_criticality"].isna().all()
    assert set(none.to_pandas()["edge"]) == {"smallest s"}
    assert none.summary()["sum"] is None
    assert none.plot() is not None


def test_measure_module_criticality__kept_points_are_not_evaluated_again(networks, tmp_path, monkeypatch):
    kept = tmp_path / "points.json"
    first = measured(networks, keep_points=kept, surface="3")
    monkeypatch.setattr(ModulePaths, "_excesses", lambda *_: pytest.fail("it evaluated"))
    again = measured(networks, keep_points=kept, surface="3")
    pd.testing.assert_frame_equal(again.to_pandas(), first.to_pandas())
    pd.testing.assert_frame_equal(again.points, first.points)
    for other in ({"seed": 1}, {"level": 0.9}, {"n_s": 8}, {"initial": trained(seed=5)[0]}):
        with pytest.raises(pytest.fail.Exception, match="it evaluated"):
            measured(networks, keep_points=kept, **other)
    initial, network = networks
    models = [
        open_model(network, input_size=(3, 2, 2), mean=(0.5,) * 3, std=(0.2,) * 3),
        open_model(network, input_size=(3, 2, 2), output=lambda scores: 2 * scores),
        replace(open_model(network, input_size=(3, 2, 2)), architecture="py:other"),
    ]
    for model in models:
        with pytest.raises(pytest.fail.Exception, match="it evaluated"):
            measured((initial, model), keep_points=kept)


# --- the slow twin ----------------------------------------------------------------------------------------------------


def slowly(networks, layer, n_a=5, n_s=9, draws=3, tolerance=1.2, seed=0):
    """The definition at every point of the grid: a copy of the network, its layer overwritten, run as a whole."""
    initial, network = networks
    images, labels = torch.from_numpy(pixels()).float() / 255, torch.from_numpy(LABELS)
    start, end = (dict(one.named_parameters(prefix=layer)) for one in
                  (initial.get_submodule(layer), network.get_submodule(layer)))  # fmt: skip
    distance = sum((end[name] - start[name]).square().sum() for name in end).sqrt().item()
    k = sum(value.numel() for value in end.values())
    unit = (sum(value.square().sum() for value in end.values()) / k).sqrt().item()
    architecture = open_model(network).architecture
    with torch.no_grad():
        allowed = tolerance * F.cross_entropy(network(images), labels).item()
        smallest = np.inf
        for a in np.linspace(0, 1, n_a):
            noises = np.geomspace(1e-3, 10, n_s)
            losses = []
            for s in noises:
                of_draws = []
                for draw in range(draws):
                    own = layer_seed(trial_seed(seed, architecture, "module criticality", draw), layer)
                    generator = torch.Generator().manual_seed(own)
                    twin = copy.deepcopy(network)
                    for name, value in twin.named_parameters():
                        if name in end:
                            normal = torch.randn(value.shape, generator=generator)
                            value.copy_((1 - a) * start[name] + a * end[name] + s * unit * normal)
                    of_draws.append(F.cross_entropy(twin(images), labels).item())
                losses.append(np.mean(of_draws))
            losses = np.array(losses)
            kept = losses <= allowed
            if not kept[0]:
                continue
            last = len(noises) - 1 if kept.all() else int(kept.argmin()) - 1
            largest = noises[last]
            if last + 1 < len(noises):
                share = (allowed - losses[last]) / (losses[last + 1] - losses[last])
                largest = np.sqrt(noises[last] ** 2 + share * (noises[last + 1] ** 2 - noises[last] ** 2))
            smallest = min(smallest, (a / (largest * unit)) ** 2 * distance**2)
    return smallest


@pytest.mark.parametrize(("seed", "tolerance"), [(0, 1.2), (1, 1.2), (0, 20)])
def test_measure_module_criticality__slow_twin(networks, seed, tolerance):
    table = measured(networks, seed=seed, tolerance=tolerance).to_pandas()
    assert list(table["layer"]) == ["1", "3", "5"]
    assert ((table["a"] > 0) & (table["a"] < 1)).all() == (tolerance == 20)  # also on the way
    for layer, value in zip(table["layer"], table["module_criticality"], strict=True):
        assert value == pytest.approx(slowly(networks, layer, seed=seed, tolerance=tolerance), rel=1e-3), layer


def test_measure_module_criticality__what_it_does_not_depend_on(networks, found):
    expected = found.to_pandas()
    again = measured(networks)
    pd.testing.assert_frame_equal(again.to_pandas(), expected)
    pd.testing.assert_frame_equal(measured(networks, batch_size=7).to_pandas(), expected, rtol=1e-3)
    pd.testing.assert_frame_equal(measured(networks, dtype="reference").to_pandas(), expected, rtol=1e-3)
    alone = measured(networks, layers="3").to_pandas()
    pd.testing.assert_frame_equal(alone, expected[expected["layer"] == "3"].reset_index(drop=True), rtol=1e-3)
    other = measured(networks, seed=5).to_pandas()
    assert (other["module_criticality"] != expected["module_criticality"]).all()


def test_measure_module_criticality__small_parts(networks, found, monkeypatch):
    monkeypatch.setattr("layercrit.engine.losses._BYTES_OF_VALUES", 500)
    pd.testing.assert_frame_equal(measured(networks).to_pandas(), found.to_pandas(), rtol=1e-3)


def test_measure_module_criticality__limits(networks, found):
    table = found.to_pandas()
    assert (table["low"] <= table["module_criticality"]).all()
    assert (table["module_criticality"] <= table["high"]).all()
    assert found.summary()["covers"] == "draws and images"
    single = measured(networks, draws=1)
    assert single.to_pandas()[["low", "high"]].isna().all(axis=None)
    assert single.summary()["covers"] == "nothing"
    wider = measured(networks, level=0.99).to_pandas()
    assert (wider["low"] <= table["low"]).all()
    assert (wider["high"] >= table["high"]).all()


def test_measure_module_criticality__whole_grid_of_one_module(networks, found):
    complete = measured(networks, surface="3")
    points = complete.points.groupby("layer").size()
    assert points["3"] == 5 * 9
    assert points["5"] == found.points.groupby("layer").size()["5"] < 45
    columns = ["module_criticality", "low", "high", "a", "s"]
    pd.testing.assert_frame_equal(complete.to_pandas()[columns], found.to_pandas()[columns])
    texts = [text.get_text() for text in complete.plot().axes[0].texts]
    assert "3" in texts[-2] or any(text.endswith(": 3") for text in texts)


# --- nothing is left behind -------------------------------------------------------------------------------------------


def state_of(network):
    values = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    gradients = [value.requires_grad for value in network.parameters()]
    rng = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    return values, (modes, hooks, gradients), rng


def assert_same_state(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]
    assert torch.equal(one[2][0], other[2][0])
    assert one[2][1:] == other[2][1:]


def test_measure_module_criticality__leaves_everything_as_it_was(networks):
    initial, network = (copy.deepcopy(one) for one in networks)
    network.train()
    before = state_of(network), state_of(initial)
    measured((initial, network))
    assert_same_state(state_of(network), before[0])
    assert_same_state(state_of(initial), before[1])


@pytest.mark.parametrize("where", ["layercrit.module_paths.draw_values", "layercrit.engine.losses.F.cross_entropy"])
def test_measure_module_criticality__leaves_everything_as_it_was_after_an_exception(networks, monkeypatch, where):
    initial, network = (copy.deepcopy(one) for one in networks)
    network.train()
    before, calls = state_of(network), []

    def interrupted(*_, **__):
        calls.append(1)
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured((initial, network))
    assert calls
    assert_same_state(state_of(network), before)


# --- what cannot be asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"labels": "none"}, ProbeError, r"needs labels, and they were left out.*worst-case.*measure"),
        ({"labels": "auto"}, ProbeError, r"needs labels, and .* has none"),
        ({"initial": None}, ProtocolError, r"weights before training.*--initial"),
        ({"tolerance": 1.0}, ProtocolError, "must be above 1; got 1.0"),
        ({"tolerance": float("nan")}, ProtocolError, "must be above 1"),
        ({"excess": 0.0}, ProtocolError, "excess must be a positive number"),
        ({"draws": 0}, ProtocolError, "draws must be a whole number of at least 1"),
        ({"n_a": 1}, ProtocolError, "n_a must be a whole number of at least 2"),
        ({"n_s": 2.5}, ProtocolError, "n_s must be"),
        ({"s_range": (1.0, 0.1)}, ProtocolError, "the smaller one first; got 1 and 0.1"),
        ({"s_range": (0.0, 1.0)}, ProtocolError, "two positive numbers"),
        ({"dtype": "bfloat16"}, ProtocolError, "not for module criticality"),
        ({"level": 1.0}, ProtocolError, "level"),
        ({"surface": "33"}, LayerError, r"no module '33'.*'3'"),
        ({"layers": "nope"}, LayerError, "No layer matches"),
    ],
)
def test_measure_module_criticality__what_cannot_be_asked(networks, settings, error, text):
    with pytest.raises(error, match=text):
        measured(networks, **settings)


def test_measure_module_criticality__a_loss_of_nothing(networks):
    network = copy.deepcopy(networks[1])
    with torch.no_grad():
        network[5].weight *= 1e4
        network[5].bias *= 1e4
    images = torch.from_numpy(pixels()).float() / 255
    labels = network(images).argmax(dim=1).numpy()
    with pytest.raises(ProtocolError, match=r"leaves no room for any change.*--excess"):
        measured((networks[0], network), labels=labels)
    assert measured((networks[0], network), labels=labels, excess=0.1).summary()["allowed_loss"] > 0.09


def test_measure_module_criticality__initial_weights_of_another_architecture(networks, tmp_path):
    network = networks[1]
    longer = nn.Sequential(*copy.deepcopy(networks[0]), nn.ReLU(), nn.Linear(3, 3))  # has all layers of the model, too
    with pytest.raises(ModelError, match=r"not of the architecture.*'7\.bias' in the initial network"):
        measured((longer, network))
    with pytest.raises(ModelError, match="not of the architecture"):
        measured((nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), network))
    wider = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ModelError, match="not of the architecture"):
        measured((wider, network))
    save_file(longer.state_dict(), tmp_path / "longer.safetensors")
    with pytest.raises(CheckpointError):
        measured(networks, initial=tmp_path / "longer.safetensors")
    with pytest.raises(LayercritError):
        measured(networks, initial=tmp_path / "missing.safetensors")


# --- training runs, files and the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    initial, network = (one.state_dict() for one in networks)
    write_run(folder / "run", {0: initial}, final=network)
    save_file(initial, folder / "initial.safetensors")
    save_file(network, folder / "trained.safetensors")
    np.savez(folder / "images.npz", images=pixels(), labels=LABELS)
    return folder


def test_measure_module_criticality__initial_weights_of_the_own_run(folder):
    images = str(folder / "images.npz")
    own = measure_module_criticality(f"file:{folder}/run?{OPTIONS}", images, **HOW)
    for initial in (f"{folder}/run@epoch=0", folder / "initial.safetensors",
                    f"file:{folder}/initial.safetensors?{OPTIONS}"):  # fmt: skip
        given = measure_module_criticality(f"file:{folder}/trained.safetensors?{OPTIONS}", images, initial=initial,
                                           **HOW)  # fmt: skip
        pd.testing.assert_frame_equal(given.to_pandas(), own.to_pandas())
    with pytest.raises(ProtocolError, match="no training run that kept its epoch 0"):
        measure_module_criticality(f"file:{folder}/trained.safetensors?{OPTIONS}", images, **HOW)


def test_measure_module_criticality__a_probe_set(networks, found):
    opened = open_model(networks[1], input_size=(3, 2, 2))
    probe_set = ProbeSet.from_source(pixels(), opened.preprocessing, labels=LABELS)
    given = measure_module_criticality(networks[1], probe_set, initial=networks[0], **HOW)
    pd.testing.assert_frame_equal(given.to_pandas(), found.to_pandas(), rtol=1e-3)


def test_save__files(found, tmp_path):
    files = found.save(tmp_path / "out")
    assert [path.name for path in files] == [
        f"module-criticality{end}" for end in (".csv", "-points.csv", ".json", ".png", ".svg")
    ]
    pd.testing.assert_frame_equal(
        pd.read_csv(files[0], dtype={"layer": str})[["layer", "a", "low"]], found.to_pandas()[["layer", "a", "low"]]
    )
    record = json.loads(files[2].read_text())
    assert record["sum"] == pytest.approx(found.to_pandas()["module_criticality"].sum())
    assert record["measured"]["n_points_of_grid"] == 45
    assert len(record["modules"]) == 3
    (tmp_path / "file").touch()
    with pytest.raises(LayercritError, match="cannot be written"):
        found.save(tmp_path / "file" / "out")


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_module_criticality_command(folder, tmp_path):
    asked = ("module-criticality", f"file:{folder}/run?{OPTIONS}", "--images", folder / "images.npz", "--draws", "3",
             "--n-a", "5", "--n-s", "9", "--tolerance", "1.2", "--out", tmp_path / "out")  # fmt: skip
    shown = invoke(*asked)
    assert shown.exit_code == 0, shown.output
    assert "no bound" in shown.output
    assert f"of the whole grid's {5 * 9 * 3 * 3:,}" in shown.output
    assert "There is" in str(invoke(*asked).exception)
    printed = json.loads(invoke(*asked, "--overwrite", "--json").stdout)
    expected = measure_module_criticality(f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), **HOW)
    assert [row["module_criticality"] for row in printed["modules"]] == pytest.approx(
        expected.to_pandas()["module_criticality"].tolist()
    )
    assert (tmp_path / "out" / "module-criticality.png").stat().st_size > 1000
    assert invoke(*asked, "--overwrite", "--excess", "0.1").exit_code == 2
    without = invoke(*asked, "--overwrite", "--labels", "none")
    assert isinstance(without.exception, ProbeError)
