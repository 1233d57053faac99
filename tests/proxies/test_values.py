"""Proxies of one model: formulas written out plainly, known answers, labels, blanks, restoration, errors."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layercrit.engine.subject import Subject
from layercrit.errors import CheckpointError, LayercritError, ModelError, ProtocolError
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.probes.probe_set import ProbeSet
from layercrit.protocol import Protocol
from layercrit.proxies import PROXIES
from layercrit.proxies.sweep import proxy_samples
from proxies_of_small_networks import QUIET, proxies_of
from small_subjects import (
    GROUPS,
    PIXELS,
    SIZE,
    SmallNetwork,
    fresh,
    mostly_right,
    normalised,
    photographs,
    small_network,
    two_layers,
)
from training_runs import write_run

N = 6
NAMES = GROUPS["layer"]


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture(scope="module")
def images(network):
    return photographs(N, mostly_right(network, N))


@pytest.fixture(scope="module")
def donors(network):
    """The donors of two trials, as a measurement draws them."""
    subject = Subject(Protocol(trials=2), open_model(network, input_size=(3, SIZE, SIZE)), None)
    return [{change.layer.name: change.values for change in subject.changes(trial)} for trial in range(2)]


@pytest.fixture(scope="module")
def found(network, images):
    return proxies_of(network, images, initial=small_network(6))


def losses(network, x, labels):
    return [F.cross_entropy(network(x[i : i + 1]), torch.tensor(labels[i : i + 1])) for i in range(len(x))]


def test_measure_proxies__gradients_by_plain_formulas(found, network, images):
    """One backward pass an image, and sums over the parameters of each layer."""
    table = found.layers.set_index("layer")
    assert list(table.index) == NAMES
    twin, start = copy.deepcopy(network), small_network(6)
    per_image = []
    for loss in losses(twin, normalised(images), images.labels):
        twin.zero_grad()
        loss.backward()
        per_image.append({name: p.grad.double() for name, p in twin.named_parameters()})
    for depth, name in enumerate(NAMES):
        own = [one for one, _ in network.get_submodule(name).named_parameters(prefix=name)]
        theta = torch.cat([network.get_parameter(one).detach().double().flatten() for one in own])
        g = torch.stack([torch.cat([grads[one].flatten() for one in own]) for grads in per_image])
        before = torch.cat([start.get_parameter(one).detach().double().flatten() for one in own])
        mean = g.mean(dim=0)
        expected = {
            "obd": 0.5 * float((theta.square() * g.square().mean(dim=0)).sum()),
            "taylor": abs(float((theta * mean).sum())),
            "snip": float((theta * mean).abs().sum()),
            "relative_gradient": float(mean.norm() / theta.norm()),
            "worst_case": 0.1 * float(theta.norm() * mean.norm()),
            "distance": float((theta - before).norm()) / math.sqrt(len(theta)),
            "log_parameters": math.log(len(theta)),
            "depth": depth,
            "weight_norm": float(theta.norm()),
        }
        for proxy, value in expected.items():
            assert table.loc[name, proxy] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, proxy)


def test_measure_proxies__output_changes_by_plain_formulas(found, network, images, donors):
    """The input of each layer is recorded, its output gets a gradient, and its module runs once more."""
    table, x = found.layers.set_index("layer"), normalised(images)
    for name in NAMES:
        weighted, slopes = np.zeros((2, N)), np.zeros((2, N))
        for i in range(N):
            twin, kept = copy.deepcopy(network), {}
            module = twin.get_submodule(name)

            def keep(_, inputs, output, kept=kept):
                kept["x"], kept["y"] = inputs[0].detach(), output
                output.retain_grad()

            handle = module.register_forward_hook(keep)
            losses(twin, x[i : i + 1], images.labels[i : i + 1])[0].backward()
            handle.remove()
            for trial in range(2):
                with torch.no_grad():
                    for one, value in donors[trial][name].items():
                        twin.get_parameter(one).copy_(value)
                    change = kept["y"].grad * (module(kept["x"]) - kept["y"])
                weighted[trial, i], slopes[trial, i] = change.square().sum(), change.sum()
        assert table.loc[name, "fisher"] == pytest.approx(weighted.mean(), rel=1e-3), name
        assert table.loc[name, "first_order"] == pytest.approx(np.abs(slopes.mean(axis=1)).mean(), rel=1e-2, abs=1e-4)
        assert table.loc[name, "gauss_newton"] == pytest.approx(0.5 * (slopes**2).mean(), rel=1e-2, abs=1e-5), name


def test_measure_proxies__second_order_by_differences_of_gradients(network, images, donors):
    """In float64 the gradient along D a little further is the second derivative; image i has draw i mod 2."""
    found = proxies_of(network, images, hessian_images=3).layers.set_index("layer")
    twin, x = copy.deepcopy(network).double(), normalised(images).double()
    for name in NAMES:
        own = list(donors[0][name])
        second = []
        for i in range(3):
            trained = {one: twin.get_parameter(one).detach().clone() for one in own}
            change = {one: donors[i % 2][name][one].double() - trained[one] for one in own}
            slopes = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    for one in own:
                        twin.get_parameter(one).copy_(trained[one] + step * change[one])
                twin.zero_grad()
                losses(twin, x[i : i + 1], images.labels[i : i + 1])[0].backward()
                slopes.append(sum(float((twin.get_parameter(one).grad * change[one]).sum()) for one in own))
            with torch.no_grad():
                for one in own:
                    twin.get_parameter(one).copy_(trained[one])
            second.append(0.5 * (slopes[0] - slopes[1]) / 2e-6)
        assert found.loc[name, "second_order"] == pytest.approx(np.mean(second), rel=2e-2, abs=1e-3), name


def test_measure_proxies__block_influence_by_plain_formula(found, network, images):
    """Of layer1's blocks; the block of layer2 changes the number of channels, and the stem and the head are in none."""
    table = found.layers.set_index("layer")["block_influence"]
    kept = {}
    twin = copy.deepcopy(network)
    for name in ("layer1.0", "layer1.1"):
        twin.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: kept.update({name: (x[0], y)}))
    with torch.no_grad():
        twin(normalised(images))
    for name, (x, y) in kept.items():
        cosine = F.cosine_similarity(x.flatten(1).double(), y.flatten(1).double()).mean()
        for conv in ("conv1", "conv2"):
            assert table[f"{name}.{conv}"] == pytest.approx(1 - float(cosine), rel=1e-5)
    assert table[["stem", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut", "fc"]].isna().all()


def test_proxy_samples__a_linear_network_with_squared_loss():
    """The loss is quadratic in one layer: its change is the first plus the second order, image by image."""

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 3)).eval()

    network = fresh(build, 1)

    def squared(logits, label):
        return 0.5 * (logits - F.one_hot(label, 3)).square().sum()

    model = open_model(network, input_size=(3, 2, 2))
    probe_set = ProbeSet.from_array(PIXELS.numpy().transpose(0, 2, 3, 1), model.preprocessing, np.arange(6) % 3)
    subject = Subject(Protocol(trials=1), model, None)
    found = proxy_samples(subject, probe_set, squared, hessian_images=6)
    x, labels = normalised(probe_set), torch.tensor(probe_set.labels)
    for row, change in enumerate(subject.changes(0)):
        twin = copy.deepcopy(network)
        with torch.no_grad():
            for name, value in change.values.items():
                twin.get_parameter(name).copy_(value)
            exact = [
                float(
                    squared(twin(x[i : i + 1]), labels[i : i + 1]) - squared(network(x[i : i + 1]), labels[i : i + 1])
                )
                for i in range(6)
            ]
        np.testing.assert_allclose(
            found["first_order"][row, 0] + found["second_order"][row], exact, rtol=1e-4, atol=1e-5
        )


def test_measure_proxies__an_unchanged_layer_has_0(network, images):
    """Its donor has the trained values; other proxies do not know of the reset."""
    donor = small_network(7)
    with torch.no_grad():
        donor.layer1[0].conv1.weight.copy_(network.layer1[0].conv1.weight)
    table = proxies_of(network, images, reset="donor", donor=donor).layers.set_index("layer")
    of_reset = ["fisher", "first_order", "gauss_newton", "second_order"]
    assert (table.loc["layer1.0.conv1", of_reset] == 0).all()
    assert (table.drop(index="layer1.0.conv1")[of_reset] != 0).all(axis=None)
    assert table.loc["layer1.0.conv1", "obd"] > 0
    assert (proxies_of(network, images, reset="noise(scale=0)").layers[of_reset] == 0).all(axis=None)


def test_measure_proxies__batch_size_changes_nothing(found, network, images):
    """Nothing of an image depends on which others there are, nor on how many."""
    few = proxies_of(network, images.first(2), initial=small_network(6))
    for name in ("fisher", "first_order", "gauss_newton", "obd", "taylor", "block_influence"):
        np.testing.assert_array_equal(few.samples[name], found.samples[name][..., :2], err_msg=name)
    np.testing.assert_array_equal(few.samples["second_order"], found.samples["second_order"])


def test_measure_proxies__drawn_labels(network, images):
    """Without labels, classes come from the predictions: the same under a seed, others under another."""
    given = proxies_of(network, images)
    assert given.record["labels"] == "labels of the images"
    one, again, other = (proxies_of(network, images, labels="none", seed=seed, hessian_images=0) for seed in (0, 0, 1))
    assert one.record["labels"] == "labels drawn from the model's predictions"
    np.testing.assert_array_equal(one.samples["obd"], again.samples["obd"])
    assert not np.array_equal(one.samples["obd"], other.samples["obd"])
    assert not np.array_equal(one.samples["obd"], given.samples["obd"])
    none = proxies_of(network, photographs(N), hessian_images=0)
    np.testing.assert_array_equal(none.samples["obd"], one.samples["obd"])


def test_measure_proxies__drawn_labels_follow_the_predictions():
    """A network that always says class 1 draws class 1: the loss is then its own cross-entropy, near 0."""
    network = two_layers()
    with torch.no_grad():
        network[3].bias.copy_(torch.tensor([0.0, 30.0, 0.0]))
    found = proxies_of(network, PIXELS, hessian_images=0)
    assert found.record["loss"] < 1e-6
    assert proxies_of(network, photographs_of_pixels(np.zeros(6, np.int64)), hessian_images=0).record["loss"] > 20


def photographs_of_pixels(labels):
    size = open_model(two_layers(), input_size=(3, 2, 2)).preprocessing
    return ProbeSet.from_array(PIXELS.numpy().transpose(0, 2, 3, 1), size, labels)


def test_measure_proxies__blank_where_one_does_not_apply(network, images):
    """Not 0: without initial weights, for layers in no branch, and where nothing is asked of the Hessian."""
    table = proxies_of(network, images, hessian_images=0).layers
    assert table["distance"].isna().all()
    assert table["second_order"].isna().all()
    table = proxies_of(network, images, reset="skip", group="block").layers.set_index("layer")
    assert list(table.index) == GROUPS["block"]
    assert table.loc[["stem", "fc"], ["fisher", "first_order", "second_order"]].isna().all(axis=None)
    assert (table.loc[["layer1.0", "layer1.1"], "fisher"] > 0).all()
    assert (table.loc["layer1.0", ["obd", "log_parameters"]] > 0).all()


def test_measure_proxies__a_block_is_changed_as_a_whole(network, images, donors):
    """Its output is that of the block's module, whose gradient is the next layer's input's."""
    found = proxies_of(network, images, group="block", hessian_images=0, trials=1)
    subject = Subject(Protocol(trials=1, group="block"), open_model(network, input_size=(3, SIZE, SIZE)), None)
    values = {change.layer.name: change.values for change in subject.changes(0)}["layer1.1"]
    twin, x = copy.deepcopy(network), normalised(images)
    kept = {}

    def keep(_, inputs, output):
        output.retain_grad()
        kept.update(x=inputs[0].detach(), y=output)

    handle = twin.layer1[1].register_forward_hook(keep)
    sum(losses(twin, x[:1], images.labels[:1])).backward()
    handle.remove()
    with torch.no_grad():
        for name, value in values.items():
            twin.get_parameter(name).copy_(value)
        y, gradient = kept["y"].detach(), kept["y"].grad
        expected = float((gradient * (twin.layer1[1](kept["x"]) - y)).square().sum())
    row = list(found.about["layer"]).index("layer1.1")
    assert found.samples["fisher"][row, 0, 0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_measure_proxies__leaves_the_model_as_it_was(images, fails, monkeypatch):
    network = small_network()
    network.train()
    network.fc.weight.requires_grad_(False)
    network.stem.weight.grad = torch.ones_like(network.stem.weight)
    before = copy.deepcopy(network.state_dict())
    attributes = {name: dict(vars(module)) for name, module in network.named_modules()}
    random = torch.get_rng_state()
    if fails:
        calls, whole = iter(range(100)), SmallNetwork.forward

        def forward(network, x):
            if next(calls) > 8:
                raise KeyboardInterrupt
            return whole(network, x)

        monkeypatch.setattr(SmallNetwork, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            proxies_of(network, images)
    else:
        proxies_of(network, images)
    assert network.training
    assert not network.fc.weight.requires_grad
    assert network.fc.bias.requires_grad
    assert (network.stem.weight.grad == 1).all()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for name, module in network.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert not module._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_measure_proxies__frozen_layers_and_inference_mode(network, images):
    """Neither what was frozen nor how the weights were made changes a value."""
    expected = proxies_of(network, images).layers
    frozen = small_network().requires_grad_(False)
    with torch.inference_mode():
        made = small_network()
        found = proxies_of(made, images).layers
    for table in (proxies_of(frozen, images).layers, found):
        np.testing.assert_array_equal(table.select_dtypes("number"), expected.select_dtypes("number"))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


class Rounded(torch.autograd.Function):
    """x, with a gradient that has none of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class Odd(nn.Module):
    """Two linear layers with some function between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(12, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x.flatten(1))))


def test_measure_proxies__without_second_derivative_only_that_is_blank():
    found = proxies_of(fresh(lambda: Odd(Rounded.apply).eval(), 0), PIXELS)
    assert found.layers["second_order"].isna().all()
    assert found.layers["fisher"].notna().all()
    assert found.record["hessian_images"] == 0
    assert any("no second derivative" in note for note in found.record["notes"])


def test_measure_proxies__a_reset_that_is_not_finite_is_blank():
    """Values that overflow leave the layer blank, with a note; the others stay."""
    network = two_layers()
    donor = copy.deepcopy(network)
    with torch.no_grad():
        donor[1].weight.fill_(3e38)
        donor[3].weight.mul_(2)
    found = proxies_of(network, PIXELS, reset="donor", donor=donor, hessian_images=0)
    table = found.layers.set_index("layer")
    assert math.isnan(table.loc["1", "fisher"])
    assert table.loc["3", "fisher"] > 0
    assert any("not finite for 1 layer," in note for note in found.record["notes"])


def test_measure_proxies__of_no_gradient():
    network = fresh(lambda: Odd(torch.relu).eval(), 0)
    network.forward = torch.no_grad()(network.forward)
    with pytest.raises(ModelError, match="No gradient of the loss reaches any layer"):
        proxies_of(network, PIXELS)
    with pytest.raises(ModelError, match="cannot be differentiated"):
        proxies_of(fresh(lambda: Odd(lambda x: torch.tensor(x.numpy() * 2)).eval(), 0), PIXELS)


@pytest.mark.parametrize("radius", [0, -0.1, math.nan, math.inf, "wide", True])
def test_measure_proxies__radius(radius):
    with pytest.raises(ProtocolError, match="radius must be above 0"):
        proxies_of(two_layers(), PIXELS, radius=radius)


@pytest.mark.parametrize("n", [-1, 1.5, "all", True])
def test_measure_proxies__hessian_images(n):
    with pytest.raises(ProtocolError, match="hessian_images must be a whole number"):
        proxies_of(two_layers(), PIXELS, hessian_images=n)


def test_measure_proxies__initial_weights(tmp_path):
    """Those of a run's epoch 0; of another architecture they are refused, as is an epoch that was not kept."""
    final, start = two_layers().state_dict(), fresh(two_layers, 3).state_dict()
    start = {name: value + 1 for name, value in final.items()}
    write_run(tmp_path / "run", {0: start, 1: final}, final=final)
    found = proxies_of(two_layers(), PIXELS, initial=f"{tmp_path}/run@epoch=0")
    np.testing.assert_allclose(found.layers["distance"], 1, rtol=1e-6)
    assert "epoch=0" in found.record["initial"]
    with pytest.raises(CheckpointError, match="did not keep the weights of epoch '3'"):
        proxies_of(two_layers(), PIXELS, initial=f"{tmp_path}/run@epoch=3")
    with pytest.raises(ModelError, match="not of the architecture"):
        proxies_of(two_layers(), PIXELS, initial=small_network())
    with pytest.raises(LayercritError):
        proxies_of(small_network(), photographs(3), initial=f"{tmp_path}/run@epoch=0")


def test_measure_proxies__draws_are_those_of_a_measurement(network, images):
    """So that both can be resampled together."""
    measured = measure(network, images, trials=2, dtype="reference", **QUIET)
    found = proxies_of(network, images)
    assert found.record["trial_seeds"] == measured.record["trial_seeds"]
    assert found.record["probe_set"]["sha256"] == measured.record["probe_set"]["sha256"]
    assert found.against(measured).best_null in {"log_parameters", "depth", "weight_norm"}


def test_against__another_model_or_reset(network, images, tmp_path):
    measured = measure(network, images, trials=1, dtype="reference", **QUIET)
    found = proxies_of(small_network(9), images, hessian_images=0)
    with pytest.raises(ProtocolError, match="of another model"):
        found.against(measured)
    zeroed = proxies_of(network, images, reset="zero", hessian_images=0)
    with pytest.raises(ProtocolError, match="--reset 'rerandomize'"):
        zeroed.against(measured)
    with pytest.raises(LayercritError, match="no measurement in"):
        found.against(tmp_path)
    folder = measured.save(tmp_path / "m")
    same = proxies_of(network, images, hessian_images=0, trials=1)
    for where in (folder, str(folder), folder / "measurement.json"):
        assert same.against(where, n_resamples=10).sentence
    with pytest.raises(ProtocolError, match="level must be between"):
        same.against(measured, level=95)


def test_save__writes_tables_and_record(found, tmp_path):
    files = found.save(tmp_path / "out")
    assert [path.name for path in files] == ["proxies.csv", "costs.csv", "proxies.json"]
    record = json.loads((tmp_path / "out" / "proxies.json").read_text())
    assert record["labels"] == "labels of the images"
    assert record["protocol"]["n_images"] == N
    (tmp_path / "file").write_text("")
    with pytest.raises(LayercritError, match="cannot be written"):
        found.save(tmp_path / "file" / "out")


def test_costs__count_passes(found):
    costs = found.costs.set_index("proxy")
    assert list(costs.index) == list(PROXIES)
    assert costs.loc["fisher", ["forward", "backward", "layer_passes", "hessian_products"]].tolist() == [N, N, 2 * N, 0]
    assert costs.loc["second_order", ["forward", "backward", "hessian_products"]].tolist() == [2, 2, 2 * len(NAMES)]
    assert costs.loc["block_influence", ["forward", "backward"]].tolist() == [N, 0]
    assert (costs.loc[["log_parameters", "depth", "weight_norm"], "seconds"] == 0).all()
    assert (costs.loc[["fisher", "second_order", "obd"], "seconds"] > 0).all()


class HalfDetached(nn.Module):
    """The first convolution's output is detached, so that no gradient reaches it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x)).detach()))
        return self.fc(x.mean((2, 3)))


def test_proxies__are_blank_where_no_gradient_comes(images):
    torch.manual_seed(0)
    found = proxies_of(HalfDetached().eval(), images, labels="none")

    table = found.layers.set_index("layer")
    needs = ["fisher", "first_order", "gauss_newton", "obd", "taylor", "snip", "relative_gradient", "worst_case"]
    assert table.loc["first", needs].isna().all()
    assert (table.loc[["second", "fc"], "obd"] > 0).all()
    assert np.isfinite(table.loc["first", ["log_parameters", "depth", "weight_norm"]].astype(float)).all()
    assert any("no gradient of the loss reaches first" in note for note in found.record["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"norm_statistics": "reset"}, "norm statistics 'reset'"), ({"donor": small_network(9)}, "Take new values from")],
)
def test_against__exact_values_that_were_asked_for_otherwise(network, images, change, message):
    settings = {"trials": 1, "reset": "donor"} if "donor" in change else {"trials": 1}
    own = {"donor": small_network(8)} if "donor" in change else {}
    found = proxies_of(network, images, hessian_images=0, **settings, **own)
    exact = measure(network, images, distances="cosine", progress=False, **settings, **change)

    with pytest.raises(ProtocolError, match=message):
        found.against(exact)


def test_against__one_draw_says_nothing_of_others(network, images):
    found = proxies_of(network, images, trials=1, hessian_images=0)

    agreement = found.against(measure(network, images, trials=1, distances="cosine", progress=False))

    assert agreement.table["spearman_low"].isna().all()
    assert "cannot be said" in agreement.sentence
