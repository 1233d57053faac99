"""Feature criticality: known answers, a slow twin, and what cannot be asked."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn import functional as F

from cifar_networks import IMAGES, MEAN, STD, WEIGHTS, ResNet20, needs_real_files
from layercrit.cli import cli
from layercrit.errors import LayercritError, LayerError, ModelError, ProtocolError
from layercrit.feature_criticality import measure_feature_criticality
from layercrit.models.references import open_model
from layercrit.seeds import drawing, seed_of
from running_jobs import small_network, tied_network
from test_module_criticality import LABELS, OPTIONS, assert_same_state, pixels, state_of, trained

HOW = {"progress": False, "steps": 5, "restarts": 2}
L2 = {"norm": "l2", "eps": 0.1}
FEW = pixels()[:5]


@pytest.fixture(scope="module")
def network():
    return trained()[1]


def measured(network, images=None, **settings):
    return measure_feature_criticality(network, pixels() if images is None else images, **{**HOW, **settings})


def rows_of(found):
    return {row["layer"]: row for row in found.to_pandas().to_dict("records")}


# --- known answers ----------------------------------------------------------------------------------------------------


class Passing(nn.Module):
    """Three convolutions that each multiply what they are given, and a linear layer; all in one row."""

    def __init__(self, *factors):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1, groups=3, bias=False) for _ in factors))
        for layer, factor in zip(self.layers, factors, strict=True):
            nn.init.constant_(layer.weight, factor)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.layers(x).flatten(1))


@pytest.mark.parametrize("ball", [{}, L2])
def test_measure_feature_criticality__identity_and_scale(ball):
    """What is passed on moves as the normalised input does, also at the limits of pixels; a factor is just that."""
    with drawing(0):
        network = open_model(Passing(1, 1, -2.5).eval(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    images = pixels()
    images[:8] //= 16  # many pixels are nearer to black than eps
    found = measured(network, images, **ball)
    table = found.to_pandas().set_index("layer")
    assert table["feature_criticality"][:3].to_numpy() == pytest.approx([1, 1, 2.5], rel=1e-6)
    assert table["before"].tolist() == ["input", "layers.0", "layers.1", "layers.2"]
    assert table["n_elements"].tolist() == [12, 12, 12, 3]
    assert set(table["status"]) == {"ok"}
    assert table.loc["layers.0", "largest_change"] == pytest.approx(found.record["largest_change_of_input"], rel=1e-6)


def test_measure_feature_criticality__change_of_the_input():
    """Away from black and white: eps in every value for Linf, and eps in all for L2, divided by the deviation."""
    with drawing(0):
        network = open_model(Passing(1).eval(), mean=(0.5,) * 3, std=(0.2,) * 3)
    images = 64 + pixels() // 2
    found = measured(network, images, eps="8/255")
    assert found.summary()["largest_change_of_input"] == pytest.approx(8 / 255 / 0.2 * 12**0.5 / 12, rel=1e-4)
    found = measured(network, images, **L2)
    assert found.summary()["largest_change_of_input"] == pytest.approx(0.1 / 0.2 / 12, rel=1e-4)


@pytest.mark.parametrize("ball", [{}, L2])
def test_measure_feature_criticality__linear_layer(ball):
    """L2: eps times the largest singular value; Linf: the largest norm over the corners of the ball."""
    with drawing(3):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3)).eval()
    images = 64 + pixels()[:6] // 2
    table = measured(network, images, steps=60, restarts=8, **ball).to_pandas().set_index("layer")
    first = network[1].weight.detach().double()
    for layer, weight in (("1", first), ("2", network[2].weight.detach().double() @ first)):
        if ball:
            largest = 0.1 * torch.linalg.matrix_norm(weight, 2)
        else:
            corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 12).double()
            largest = 4 / 255 * (corners @ weight.T).norm(dim=1).max()
        expected = float(largest) / len(weight)
        assert expected * 0.97 < table.loc[layer, "largest_change"] < expected * 1.0001, layer


def test_measure_feature_criticality__a_layer_that_does_not_move(network):
    network = copy.deepcopy(network)
    with torch.no_grad():
        network[3].weight.zero_()
    found = rows_of(measured(network))
    assert (found["3"]["feature_criticality"], found["3"]["status"]) == (0, "ok")
    assert (found["5"]["largest_change"], found["5"]["status"]) == (0, "nothing_before")
    assert np.isnan(found["5"]["feature_criticality"])


# --- the slow twin ----------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Convolutions with normalisation and a residual sum, written in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.conv2(x).relu_()
        y += x
        return self.fc(y.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def convolutions():
    with drawing(0):
        network = Convolutions()
        network.bn1.running_mean.normal_(0, 0.1)
    return network.eval()


def slowly(network, layer, norm, eps, *, steps=5, restarts=2, seed=0):
    """The formula, one image at a time through the whole network, whose output is read by a hook."""
    seen = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _, __, output: seen.append(output.clone()))

    def features(x):
        seen.clear()
        network(x)
        return torch.cat([output.flatten() for output in seen])

    largest = []
    for number, image in enumerate(torch.from_numpy(FEW).float() / 255):
        x, found = image[None], 0.0
        for restart in range(restarts):
            name = f"array (5, 3, 2, 2)[{number}]"
            generator = torch.Generator().manual_seed(seed_of(seed, "feature criticality", restart, name))
            if norm == "linf":
                delta = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
            else:
                normal = torch.randn(x.shape, generator=generator)
                delta = eps * torch.rand((), generator=generator) ** (1 / 12) * normal / normal.norm()
            delta = torch.where((x + delta < 0) | (x + delta > 1), -delta, delta)
            for step in range(steps + 1):
                delta = ((x + delta).clamp(0, 1) - x).requires_grad_()
                with allow_mutation_on_saved_tensors():  # the network writes to what its gradient needs
                    change = (features(x + delta) - features(x).detach()).norm()
                    found = max(found, change.item())
                    (slope,) = torch.autograd.grad(change, delta)
                length = 2 * eps * (1 - step / steps)
                with torch.no_grad():
                    if norm == "linf":
                        delta = (delta + length * slope.sign()).clamp(-eps, eps)
                    else:
                        delta = delta + length * slope / slope.norm().clamp_min(1e-30)
                        delta = delta * min(1.0, eps / float(delta.norm()))
        largest.append(found / features(x).numel())
    hook.remove()
    return sum(largest) / len(largest)


@pytest.mark.parametrize("ball", [{"norm": "linf", "eps": 4 / 255}, L2])
def test_measure_feature_criticality__slow_twin(network, convolutions, ball):
    for one in (network, convolutions):
        before = None
        for layer, row in rows_of(measured(one, FEW, types="all", **ball)).items():
            expected = slowly(one, layer, **ball)
            assert row["largest_change"] == pytest.approx(expected, rel=1e-3), layer
            if before is not None:
                assert row["feature_criticality"] == pytest.approx(expected / before, rel=2e-3), layer
            before = expected


class Waves(nn.Module):
    """Its second layer is full of local maxima, so that the last step is not the best one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(torch.sin(6 * self.one(x.flatten(1))))


def test_measure_feature_criticality__the_best_step_counts():
    with drawing(0):
        network = Waves().eval()
    found = rows_of(measured(network, FEW, eps=0.5, steps=3, restarts=1))["two"]["largest_change"]
    assert found == pytest.approx(slowly(network, "two", "linf", 0.5, steps=3, restarts=1), rel=1e-3)


# --- what feeds a layer, and what its output is -----------------------------------------------------------------------


def test_measure_feature_criticality__layers_behind_a_residual_sum_are_named(convolutions):
    found = measured(convolutions)
    table = found.to_pandas().set_index("layer")
    assert table["status"].to_dict() == {"conv1": "ok", "conv2": "ok", "fc": "other_paths"}
    (note,) = [note for note in found.summary()["notes"] if "other_paths" in note]
    assert "1 of 3 layers depend on the image not only by way of the layer before" in note
    assert note.endswith("(group='block')")
    assert not any("other_paths" in note for note in measured(convolutions, layers="conv*").summary()["notes"])


@needs_real_files
def test_measure_feature_criticality__residual_sums_of_a_published_network():
    kept = torch.load(WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    network = ResNet20().eval()
    network.load_state_dict({name.removeprefix("module."): value for name, value in kept.items()})
    model = open_model(network, mean=MEAN, std=STD, input_size=(3, 32, 32))
    how = {"n_images": 2, "steps": 1, "restarts": 1}
    table = measured(model, str(IMAGES), **how).to_pandas()
    doubtful = table["layer"][table["status"] == "other_paths"].tolist()
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert doubtful == [*(f"{block}.conv1" for block in blocks[1:]), "linear"]
    found = measured(model, str(IMAGES), group="block", **how)
    assert found.to_pandas()["layer"].tolist() == ["conv1", *blocks, "linear"]
    assert set(found.to_pandas()["status"]) == {"ok"}
    assert (found.to_pandas()["feature_criticality"] > 0).all()
    assert not any("other_paths" in note for note in found.summary()["notes"])


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1)) for _ in "ab"))
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.flatten(1))


def test_measure_feature_criticality__groups():
    with drawing(0):
        network = Blocks().eval()
    table = measured(network, FEW, group="block").to_pandas()
    assert table["layer"].tolist() == ["stem", "blocks.0", "blocks.1", "fc"]
    assert table["output"].tolist() == table["layer"].tolist()
    assert table["status"].tolist() == ["ok", "ok", "other_paths", "other_paths"]  # the sums are outside of the blocks
    expected = slowly(network, "blocks.1", "linf", 4 / 255)
    assert table["largest_change"][2] == pytest.approx(expected, rel=1e-3)
    with_norm = measured(Convolutions().eval(), group="conv+norm").to_pandas()
    assert with_norm["layer"][0] == "conv1+bn1"
    assert with_norm["output"][0] == "bn1"


class Attention(nn.Module):
    """Tokens come first in what attention returns; a parameter belongs to no module that is called by itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2)
        self.position = nn.Parameter(torch.randn(4, 1, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x.flatten(2).permute(2, 0, 1)) + self.position
        return self.fc(self.attention(x, x, x)[0].mean(dim=0))


def test_measure_feature_criticality__outputs_of_other_modules_and_layouts():
    with drawing(0):
        network = Attention().eval()
    table = measured(network, types="all").to_pandas().set_index("layer")
    assert table["status"].to_dict() == {
        "embed": "ok",
        "position": "no_output",
        "attention.in_proj": "ok",
        "attention.out_proj": "same_output",
        "fc": "ok",
    }
    assert table["n_elements"].dropna().tolist() == [32, 32, 32, 3]
    assert table.loc["attention.in_proj", "before"] == "embed"
    assert table.loc["attention.out_proj", "output"] == "attention"
    assert table.loc["attention.out_proj", "feature_criticality"] == 1
    alone = measured(network, types="all", batch_size=1).to_pandas().set_index("layer")
    pd.testing.assert_frame_equal(alone, table, rtol=1e-3)  # images are the second dimension


def test_measure_feature_criticality__modules_called_twice_and_tied_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.fc = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.fc(self.one(self.one(x.flatten(1)).relu_()))

    with drawing(0):
        twice, tied = Twice().eval(), tied_network().eval()
    row = rows_of(measured(twice, FEW))["one"]
    assert row["n_elements"] == 24
    assert row["largest_change"] == pytest.approx(slowly(twice, "one", "linf", 4 / 255), rel=1e-3)
    found = rows_of(measured(tied, FEW))
    assert [row["n_elements"] for row in found.values()] == [12, 12, 3]
    assert found["3"]["largest_change"] == pytest.approx(slowly(tied, "3", "linf", 4 / 255), rel=1e-3)


def test_measure_feature_criticality__no_gradient():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.three(self.two(self.one(x.flatten(1)).detach()))

    with drawing(0):
        found = rows_of(measured(Rounded().eval()))
    assert {name: row["status"] for name, row in found.items()} == {
        "one": "ok",
        "two": "no_gradient",
        "three": "no_gradient",
    }
    assert np.isnan(found["two"]["largest_change"])


# --- what it does not depend on, and leaves alone ---------------------------------------------------------------------


def test_measure_feature_criticality__what_it_does_not_depend_on(network):
    expected = measured(network).to_pandas()
    pd.testing.assert_frame_equal(measured(network).to_pandas(), expected)
    pd.testing.assert_frame_equal(measured(network, batch_size=7).to_pandas(), expected, rtol=1e-4)
    alone = measured(network, layers="3").to_pandas()  # relative to the layer before, which is not chosen
    pd.testing.assert_frame_equal(alone, expected[expected["layer"] == "3"].reset_index(drop=True))
    other = measured(network, seed=3, steps=1).to_pandas()["largest_change"]
    assert (other != measured(network, steps=1).to_pandas()["largest_change"]).any()
    once = measured(network, restarts=1).to_pandas()
    assert (once["largest_change"] <= expected["largest_change"]).all()
    assert (once["largest_change"] == once["smallest_restart"]).all()


@pytest.mark.parametrize("training", [False, True])  # where it is copied
def test_measure_feature_criticality__leaves_everything_as_it_was(convolutions, training, monkeypatch):
    network = copy.deepcopy(convolutions).train(training)
    network.conv1.weight.requires_grad_(False)
    network.conv2.register_forward_hook(lambda *_: None)
    state = state_of(network)

    def check():
        assert_same_state(state_of(network), state)
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all("forward" not in vars(module) for module in network.modules())

    measured(network)
    check()

    def interrupted(*_, **__):
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("layercrit.feature_criticality.stepped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(network)
    check()


# --- what cannot be asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"eps": 0}, r"eps must be a positive number.*got 0\. At 0 no image changes"),
        ({"eps": -0.1}, "eps must be"),
        ({"eps": "4/0"}, "eps must be .*got '4/0'"),
        ({"eps": "four"}, "eps must be"),
        ({"eps": float("inf")}, "eps must be"),
        ({"eps": 4}, "4 in Linf would allow any image.*write 4/255"),
        ({"norm": "l1"}, "Unknown norm 'l1'"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"restarts": 1.5}, "restarts must be"),
        ({"step_size": "0/255"}, "step_size must be a positive number"),
    ],
)
def test_measure_feature_criticality__what_cannot_be_asked(network, settings, text):
    with pytest.raises(ProtocolError, match=text):
        measured(network, **settings)


def test_measure_feature_criticality__layers_that_are_not_there(network):
    with pytest.raises(LayerError, match="No layer matches 'conv'"):
        measured(network, layers="conv")


def test_measure_feature_criticality__not_finite(network):
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(12, 4), nn.Linear(4, 3)
            self.register_buffer("seen", torch.tensor(float(pixels()[5].sum()) / 255, dtype=torch.float64))

        def forward(self, x):
            is_one = ((x.double().sum(dim=(1, 2, 3)) - self.seen).abs() < 0.01)[:, None]
            return self.two(self.one(x.flatten(1)) / torch.where(is_one, 0.0, 1.0)).nan_to_num(0.0, 1.0, -1.0)

    with drawing(0):
        network = Overflowing().eval()
    assert rows_of(measured(network, layers="one"))["one"]["status"] == "ok"
    with pytest.raises(
        ModelError, match=r"output of 'two' is NaN or infinite at step . from '.*\[5\]'.*--layers.*--eps"
    ):
        measured(network)


def test_measure_feature_criticality__a_network_that_cannot_be_differentiated():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise NotImplementedError("no gradient of mine")

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_network()

        def forward(self, x):
            return self.inner(Once.apply(x))

    with drawing(0), pytest.raises(ModelError, match=r"No gradient of the layers .*no gradient of mine"):
        measured(Mine().eval())


# --- the command line -------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_feature_criticality_command(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "trained.safetensors")
    np.savez(tmp_path / "images.npz", images=pixels(), labels=LABELS)
    asked = ("feature-criticality", f"file:{tmp_path}/trained.safetensors?{OPTIONS}", "--images",
             tmp_path / "images.npz", "--eps", "8/255", "--steps", "5", "--restarts", "2")  # fmt: skip
    out = tmp_path / "out"
    shown = invoke(*asked, "--out", out)
    assert shown.exit_code == 0, shown.output
    assert "lower bound" in shown.output
    assert "by at most 8/255 in linf" in shown.output
    assert "There is" in str(invoke(*asked, "--out", out).exception)
    printed = json.loads(invoke(*asked, "--out", out, "--overwrite", "--json").stdout)
    expected = measured(asked[1], str(tmp_path / "images.npz"), eps="8/255").to_pandas()
    values = [row["feature_criticality"] for row in printed["layers"]]
    assert values == pytest.approx(expected["feature_criticality"].tolist())
    assert json.loads((out / "feature-criticality.json").read_text())["norm"] == "linf"
    assert list(pd.read_csv(out / "feature-criticality.csv")["feature_criticality"]) == pytest.approx(values)
    assert {path.suffix for path in out.glob("feature-criticality.*")} == {".csv", ".json", ".png", ".svg"}
    assert isinstance(invoke(*asked, "--out", out, "--overwrite", "--eps", "0").exception, ProtocolError)
    attacked = [*asked[:3], f"attack:pgd(norm=linf, eps=4/255, steps=2):{asked[3]}", "--out", tmp_path / "attacked"]
    shown = invoke(*attacked, "--json")
    assert any("the images are adversarial" in note for note in json.loads(shown.stdout)["notes"])
    assert (tmp_path / "attacked" / "images").is_dir()


def test_save__nothing_to_plot(tmp_path):
    with drawing(0):
        network = Attention().eval()
    found = measured(network, types="other", layers="position")
    assert [path.suffix for path in found.save(tmp_path)] == [".csv", ".json"]


def test_save__a_folder_that_cannot_be_written(network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayercritError, match=r"feature criticality cannot be written to .*--out"):
        measured(network, FEW).save(tmp_path / "file")
