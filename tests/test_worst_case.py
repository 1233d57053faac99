"""The worst case of a module: known answers, a slow twin, and what cannot be asked."""

import copy
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from layercrit.attacks import attacked
from layercrit.cli import cli
from layercrit.errors import ModelError, ProbeError, ProtocolError
from layercrit.models.references import open_model
from layercrit.probes.probe_set import ProbeSet
from layercrit.seeds import drawing, layer_seed, trial_seed
from layercrit.worst_case import measure_worst_case
from test_module_criticality import LABELS, OPTIONS, assert_same_state, pixels, state_of, trained

HOW = {"progress": False, "steps": 4, "restarts": 2}


@pytest.fixture(scope="module")
def network():
    return trained()[1]


def measured(network, **settings):
    return measure_worst_case(network, pixels(), **{"labels": LABELS, **HOW, **settings})


# --- known answers ----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A network whose cross-entropy with class 0 is 2 + g theta for every image."""

    def __init__(self, g):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, len(g)))
        self.register_buffer("g", torch.tensor(g))

    def forward(self, x):
        loss = 2 + self.g @ self.theta
        other = torch.log(torch.expm1(loss)) + 0 * x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(other), other], dim=1)


@pytest.mark.parametrize("g", [[0.3, -0.2, 0.5, 0.1], [1.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("radius", [0.1, 0.5])
def test_measure_worst_case__linear_loss(g, radius):
    """max over ||D|| <= r ||theta|| of g D = r ||theta|| ||g||, which is its first order, too."""
    network = Linear(g)
    found = measure_worst_case(open_model(network, output="logits"), pixels()[:4], labels=[0] * 4, types="all",
                               radius=radius, progress=False)  # fmt: skip
    (row,) = found.to_pandas().to_dict("records")
    expected = radius * float((network.theta.norm() * network.g.norm()).detach())
    assert row["worst_case"] == pytest.approx(expected, rel=1e-4)
    assert row["smallest_restart"] == pytest.approx(expected, rel=0.05)  # turns from a random start towards g
    assert row["first_order"] == pytest.approx(expected, rel=1e-4)
    assert row["radius"] == pytest.approx(radius * float(network.theta.detach().norm()))


class Shared(nn.Module):
    """The cross-entropy with class 0 is 2 + (g + h) theta; two modules have theta, which is one parameter."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("g", torch.tensor([0.3, -0.2, 0.5, 0.1]))
        self.register_buffer("h", torch.tensor([0.1, 0.4, -0.5, 0.2]))

    def forward(self, x):
        loss = 2 + self.one(self.g) + self.other(self.h)
        other = torch.log(torch.expm1(loss)) + 0 * x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(other), other], dim=1)


def test_measure_worst_case__modules_that_share_a_parameter_are_one():
    """r ||theta|| ||g + h||, and not that of each."""
    with drawing(0):
        network = Shared()
    found = measure_worst_case(open_model(network, output="logits"), pixels()[:4], labels=[0] * 4, progress=False)
    (row,) = found.to_pandas().to_dict("records")
    assert (row["layer"], row["n_parameters"]) == ("one + other", 4)
    expected = 0.1 * float((network.one.weight.norm() * (network.g + network.h).norm()).detach())
    assert row["worst_case"] == pytest.approx(expected, rel=1e-4)
    assert "layers that share parameters are one: one + other" in found.record["notes"]


def test_measure_worst_case__a_layer_that_the_output_ignores(network):
    network = copy.deepcopy(network)
    with torch.no_grad():
        network[3].weight.zero_()
    table = measured(network).to_pandas().set_index("layer")
    assert table.loc["1", "worst_case"] == 0
    assert table.loc["1", "first_order"] == 0
    assert table.loc["1", "status"] == "ok"
    assert table.loc["5", "worst_case"] > 0


def test_measure_worst_case__a_layer_of_zeros(network, tmp_path):
    network = copy.deepcopy(network)
    with torch.no_grad():
        network[3].weight.zero_()
        network[3].bias.zero_()
    row = measured(network).to_pandas().set_index("layer").loc["3"]
    assert row["status"] == "no_norm"
    assert np.isnan(row["worst_case"])
    alone = measured(network, layers="3")
    assert [path.name for path in alone.save(tmp_path)] == ["worst-case.csv", "worst-case.json"]  # nothing to plot


def test_measure_worst_case__small_changes_are_of_the_first_order(network):
    table = measured(network, radius=1e-4).to_pandas()
    np.testing.assert_allclose(table["worst_case"], table["first_order"], rtol=0.02)
    wide = measured(network, radius=0.2).to_pandas()
    assert (wide["worst_case"] > table["worst_case"]).all()


# --- the slow twin ----------------------------------------------------------------------------------------------------


def slowly(network, layer, objective, *, radius=0.1, steps=4, restarts=2, seed=0, step_size=None):
    """Ascent through the whole network, whose module is overwritten in every step; the best value of each restart."""
    images, labels = torch.from_numpy(pixels()).float() / 255, torch.from_numpy(LABELS)
    with torch.no_grad():
        clean = network(images)
    twin = copy.deepcopy(network)
    mine = list(twin.get_submodule(layer).parameters())
    trained = nn.utils.parameters_to_vector(mine).detach()
    largest = radius * trained.norm()
    step_size = 2.5 / steps if step_size is None else step_size

    def value_and_slope(change):
        nn.utils.vector_to_parameters(trained + change, mine)
        logits = twin(images)
        if objective == "loss":
            value = F.cross_entropy(logits, labels) - F.cross_entropy(clean, labels)
        else:
            value = (1 - F.cosine_similarity(clean.softmax(1), logits.softmax(1))).mean()
        return value.item(), torch.cat([part.flatten() for part in torch.autograd.grad(value, mine)])

    architecture, found = open_model(network).architecture, []
    for restart in range(restarts):
        change = torch.zeros_like(trained)
        if restart or objective == "cosine":
            own = layer_seed(trial_seed(seed, architecture, "worst case", restart), layer)
            generator = torch.Generator().manual_seed(own)
            normal = torch.cat([torch.randn(one.shape, generator=generator).flatten() for one in mine])
            change = (0.1 + 0.9 * torch.rand((), generator=generator)) * largest * normal / normal.norm()
        values = []
        for _ in range(steps + 1):
            value, slope = value_and_slope(change)
            values.append(value)
            change = change + step_size * largest * slope / slope.norm()
            change = change * min(1.0, float(largest / change.norm()))
        found.append(max(values))
    return found


@pytest.mark.parametrize("objective", ["loss", "cosine"])
@pytest.mark.parametrize("export", [True, False])
def test_measure_worst_case__slow_twin(network, objective, export, monkeypatch):
    """With the exported network, and, where there is none, through the whole of the network."""
    if not export:

        def refuse(*_, **__):
            raise RuntimeError("no graph")

        monkeypatch.setattr("layercrit.engine.opening.graph_of", refuse)
    found = measured(network, objective=objective)
    assert (found.record["backend"] == "exported graph") == export
    for row in found.to_pandas().to_dict("records"):
        expected = slowly(network, row["layer"], objective)
        assert row["worst_case"] == pytest.approx(max(expected), rel=1e-3), row["layer"]
        assert row["smallest_restart"] == pytest.approx(min(expected), rel=1e-3), row["layer"]
        assert np.isnan(row["first_order"]) == (objective == "cosine")


class Convolutions(nn.Module):
    """Convolutions with normalisation and a residual sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc((x + F.relu(self.conv2(x))).mean(dim=(2, 3)))


def test_measure_worst_case__convolutions_and_normalisation():
    with drawing(0):
        network = Convolutions()
        network.bn1.running_mean.normal_(0, 0.1)
        network.fc.weight.data *= 4
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of gradients that are read as numbers
        table = measured(network, types="all").to_pandas()
    assert list(table["layer"]) == ["conv1", "bn1", "conv2", "fc"]
    for row in table.to_dict("records"):
        assert row["worst_case"] == pytest.approx(max(slowly(network, row["layer"], "loss")), rel=1e-3), row["layer"]


# --- what it does not depend on, and leaves alone ---------------------------------------------------------------------


def test_measure_worst_case__what_it_does_not_depend_on(network, monkeypatch):
    expected = measured(network).to_pandas()
    pd.testing.assert_frame_equal(measured(network).to_pandas(), expected)
    pd.testing.assert_frame_equal(measured(network, batch_size=7).to_pandas(), expected, rtol=1e-3)
    alone = measured(network, layers="3").to_pandas()
    pd.testing.assert_frame_equal(alone, expected[expected["layer"] == "3"].reset_index(drop=True), rtol=1e-3)
    monkeypatch.setattr("layercrit.engine.differentiable_suffix._BYTES_OF_PREFIX", 0)
    pd.testing.assert_frame_equal(measured(network, batch_size=7).to_pandas(), expected, rtol=1e-3)
    other = measured(network, objective="cosine").to_pandas()["worst_case"]
    assert (measured(network, objective="cosine", seed=3).to_pandas()["worst_case"] != other).all()


def test_measure_worst_case__prefix_is_run_once(network, monkeypatch):
    from layercrit.engine.graph_replay import GraphReplay

    calls = []
    before = GraphReplay.before
    monkeypatch.setattr(GraphReplay, "before", lambda *given: calls.append(given[1].name) or before(*given))
    measured(network, batch_size=12)
    assert sorted(calls) == ["1", "1", "3", "3", "5", "5"]  # once a batch and module


def test_measure_worst_case__leaves_everything_as_it_was(network, monkeypatch):
    network = copy.deepcopy(network).train()
    state = state_of(network)
    measured(network)
    assert_same_state(state_of(network), state)
    assert all(parameter.grad is None for parameter in network.parameters())

    def interrupted(*_, **__):
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("layercrit.ascent._random", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(network)
    assert_same_state(state_of(network), state)


# --- labels and attacks -----------------------------------------------------------------------------------------------


def test_measure_worst_case__without_labels(network):
    found = measured(network, labels="none")
    assert found.summary()["objective"] == "cosine"
    assert found.summary()["loss"] is None
    assert found.to_pandas()["worst_case"].between(0, 1).all()
    pd.testing.assert_frame_equal(found.to_pandas(), measured(network, objective="cosine").to_pandas())
    for labels in ("none", "auto"):
        with pytest.raises(ProbeError, match=r"The loss needs labels.*--objective cosine"):
            measured(network, labels=labels, objective="loss")


def test_measure_worst_case__adversarial_images(network, tmp_path):
    np.savez(tmp_path / "images.npz", images=pixels(), labels=LABELS)
    source, attack = str(tmp_path / "images.npz"), "pgd(norm=linf, eps=8/255, steps=3)"
    found = measure_worst_case(network, source, attack=attack, keep_images=tmp_path / "kept", **HOW)
    opened = open_model(network, input_size=(3, 2, 2))
    same = attacked(ProbeSet.from_source(source, opened.preprocessing), opened, attack)
    given = measure_worst_case(network, same, **HOW)
    assert found.summary()["loss"] == pytest.approx(given.summary()["loss"], rel=1e-4)
    assert found.summary()["loss"] > measure_worst_case(network, source, **HOW).summary()["loss"]
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    again = measure_worst_case(network, source, attack=attack, keep_images=tmp_path / "kept", **HOW)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == kept
    pd.testing.assert_frame_equal(again.to_pandas(), found.to_pandas())
    with pytest.raises(ProbeError, match="no attack 'fgsm'"):
        measure_worst_case(network, source, attack="fgsm", **HOW)
    with pytest.raises(ProtocolError, match="path of images"):
        measure_worst_case(network, pixels(), labels=LABELS, attack=attack, **HOW)


# --- what cannot be asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"radius": 0}, "radius must be a positive number.*got 0.*nothing changes"),
        ({"radius": -0.1}, "radius must be"),
        ({"radius": float("nan")}, "radius must be"),
        ({"objective": "los"}, "Unknown objective 'los'. Did you mean 'loss'"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"restarts": 1.5}, "restarts must be"),
        ({"step_size": 0.0}, "step_size must be a positive number"),
    ],
)
def test_measure_worst_case__what_cannot_be_asked(network, settings, text):
    with pytest.raises(ProtocolError, match=text):
        measured(network, **settings)


def test_measure_worst_case__nan_on_the_way(network):
    with pytest.raises(ModelError, match=r"ascent on '1' reached NaN or infinity at step .*--step-size.*--radius"):
        measured(network, radius=1e38, layers="1")


class Cut(nn.Module):
    """Its first layer has no gradient: what it returns is cut off."""

    def __init__(self, cut):
        super().__init__()
        self.cut, self.one, self.two = cut, nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.two(self.cut(self.one(x.flatten(1))))


@pytest.mark.parametrize("cut", [torch.detach, lambda x: (64 * x).round() / 64], ids=["detached", "rounded"])
@pytest.mark.parametrize("objective", ["loss", "cosine"])
def test_measure_worst_case__no_gradient(cut, objective):
    with drawing(0):
        network = Cut(cut).eval()
    table = measured(network, objective=objective, restarts=1).to_pandas().set_index("layer")
    assert list(table["status"]) == ["no_gradient", "ok"]
    assert table.loc["one", ["worst_case", "smallest_restart", "first_order"]].isna().all()
    assert table.loc["two", "worst_case"] > 0


# --- the command line -------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_worst_case_command(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "trained.safetensors")
    np.savez(tmp_path / "images.npz", images=pixels(), labels=LABELS)
    asked = ("worst-case", f"file:{tmp_path}/trained.safetensors?{OPTIONS}", "--images", tmp_path / "images.npz",
             "--steps", "4", "--out", tmp_path / "out")  # fmt: skip
    shown = invoke(*asked)
    assert shown.exit_code == 0, shown.output
    assert "lower bound" in shown.output
    assert "There is" in str(invoke(*asked).exception)
    printed = json.loads(invoke(*asked, "--overwrite", "--json").stdout)
    expected = measure_worst_case(f"file:{tmp_path}/trained.safetensors?{OPTIONS}", str(tmp_path / "images.npz"), **HOW)
    values = [row["worst_case"] for row in printed["modules"]]
    assert values == pytest.approx(expected.to_pandas()["worst_case"].tolist())
    assert json.loads((tmp_path / "out" / "worst-case.json").read_text())["objective"] == "loss"
    assert list(pd.read_csv(tmp_path / "out" / "worst-case.csv")["worst_case"]) == pytest.approx(values)
    assert {path.suffix for path in (tmp_path / "out").glob("worst-case.*")} == {".csv", ".json", ".png", ".svg"}
    (axes,) = expected.plot().axes
    assert axes.get_xlabel() == "rise of the loss, nats, mean over 24 images"
    without = invoke(*asked, "--overwrite", "--labels", "none", "--json")
    assert json.loads(without.stdout)["objective"] == "cosine"
    assert isinstance(invoke(*asked, "--overwrite", "--radius", "0").exception, ProtocolError)
