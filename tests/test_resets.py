import hashlib
import json
import re
import warnings
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from layercrit.errors import CheckpointError, ModelError, ProtocolError
from layercrit.layers import Layer, find_layers
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.resets import RESETS, AtLeast, check_draws, donor_values, draw_values, get_reset, given_donor, reset
from layercrit.restoring import holding
from small_subjects import PIXELS, QUIET, build_two_layers, fresh, two_layers
from training_runs import write_run


def network():
    """A convolution with normalisation, and a linear layer; every value is drawn, none is a plain 0 or 1."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in (*net.parameters(), net[1].running_mean, net[1].running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net


def layers_of(net):
    return {layer.name: layer for layer in find_layers(net, torch.rand(1, 3, 4, 4))}


@pytest.fixture
def registered():
    """Take out again what a test registers."""
    before = dict(RESETS)
    yield
    RESETS.clear()
    RESETS.update(before)


# what a reset does


@pytest.mark.parametrize("name", sorted(RESETS))
def test_draw_values__gives_every_parameter_a_value_and_leaves_the_network_as_it_was(name):
    net = network()
    donor = dict(network().named_parameters())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for layer in layers_of(net).values():
        values = draw_values(RESETS[name], layer, net, donor, 3)
        assert list(values) == list(layer.parameters)
        for key, value in values.items():
            assert value.shape == net.get_parameter(key).shape
            assert value.dtype == torch.float32
            assert not value.requires_grad
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} was changed by drawing"


@pytest.mark.parametrize("name", ["rerandomize", "rewind"])
def test_draw_values__takes_the_donors_values(name):
    net = network()
    donor = {key: torch.full_like(p, 7) for key, p in net.named_parameters()}
    values = draw_values(RESETS[name], layers_of(net)["0"], net, donor, 3)
    assert values.keys() == {"0.weight", "0.bias"}
    assert all((value == 7).all() for value in values.values())


def test_draw_values__zero_gives_zeros():
    net = network()
    values = draw_values(RESETS["zero"], layers_of(net)["4"], net, {}, 3)
    assert {key: value.abs().max() for key, value in values.items()} == {"4.weight": 0, "4.bias": 0}


def test_draw_values__permute_shuffles_each_tensor_by_itself_under_the_hashed_seed():
    net = network()
    values = draw_values(RESETS["permute"], layers_of(net)["0"], net, {}, 99)
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(json.dumps([99, "0"], separators=(",", ":")).encode()).digest()[:8], "big")
    )
    for key in ("0.weight", "0.bias"):
        trained = net.get_parameter(key).detach()
        twin = torch.stack([trained.reshape(-1)[i] for i in torch.randperm(trained.numel(), generator=generator)])
        assert torch.equal(values[key], twin.reshape(trained.shape))
        assert torch.equal(values[key].flatten().sort().values, trained.flatten().sort().values)
    assert not torch.equal(values["0.weight"], net[0].weight)


def test_draw_values__permute_depends_on_seed_and_layer_only():
    net = network()
    layers = layers_of(net)
    first, again, other_seed = (
        draw_values(RESETS["permute"], layers["4"], net, {}, seed)["4.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)


# noise and moments, number by number


def drawn(name, layer, seed=99, net=None):
    net = net or network()
    return draw_values(get_reset(name), layers_of(net)[layer], net, {}, seed)


def normal_numbers(layer, seed=99):
    """The generator that the draws of a layer come from."""
    text = json.dumps([seed, layer], separators=(",", ":"))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


@pytest.mark.parametrize("scale", [0.25, 1, 3])
def test_draw_values__noise_is_relative_to_the_root_mean_square_of_each_tensor(scale):
    net, generator = network(), normal_numbers("0")
    values = drawn(f"noise(scale={scale})", "0")
    for key in ("0.weight", "0.bias"):
        trained = net.get_parameter(key).detach()
        numbers = [float(x) for x in trained.flatten()]
        rms = (sum(x * x for x in numbers) / len(numbers)) ** 0.5
        z = torch.randn(trained.shape, generator=generator)
        twin = [x + scale * rms * float(one) for x, one in zip(numbers, z.flatten(), strict=True)]
        torch.testing.assert_close(values[key].flatten(), torch.tensor(twin))


def test_draw_values__noise_of_scale_0_is_exactly_the_trained_values():
    net = network()
    for layer in ("0", "1", "4"):
        for name, value in drawn("noise(scale=0)", layer).items():
            assert torch.equal(value, net.get_parameter(name))


@pytest.mark.parametrize("name", ["noise(scale=2)", "moments", "moments(per=channel)"])
def test_draw_values__of_zeros_are_zeros(name):
    net = network()
    with torch.no_grad():
        net[0].weight.zero_()
    assert (drawn(name, "0", net=net)["0.weight"] == 0).all()


def test_draw_values__noise_of_one_trial_is_the_same_for_every_scale():
    """Larger noise is more of the same, so that a curve over scales is smooth; trials and layers differ."""
    net = network()
    one, two, other = (drawn(name, "4", seed)["4.weight"] for name, seed in
                       (("noise(scale=1)", 1), ("noise(scale=2)", 1), ("noise(scale=1)", 2)))  # fmt: skip
    torch.testing.assert_close(two - net[4].weight, 2 * (one - net[4].weight))
    assert not torch.allclose(one, other)
    subjects = [measure(two_layers(), PIXELS, reset=f"noise(scale={s})", **QUIET) for s in (1, 2)]
    assert list(subjects[0].cells["seed"]) == list(subjects[1].cells["seed"])


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_draw_values__moments_draws_with_the_own_mean_and_deviation(per):
    net, generator = network(), normal_numbers("0")
    values = drawn(f"moments(per={per})", "0")
    for key in ("0.weight", "0.bias"):
        trained = net.get_parameter(key).detach().double().numpy()
        z = torch.randn(trained.shape, generator=generator).numpy()
        twin = np.empty_like(trained)
        for channel in range(len(trained)):
            of = trained if per == "tensor" else trained[channel]
            twin[channel] = of.mean() + of.std() * z[channel]
        torch.testing.assert_close(values[key].double().numpy(), twin, rtol=1e-6, atol=1e-6)
    if per == "channel":
        assert torch.equal(values["0.bias"], net[0].bias), "one number a channel has no deviation"
    else:
        assert not torch.allclose(values["0.bias"], net[0].bias)


def test_draw_values__moments_of_many_numbers_are_the_trained_ones():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 400)).eval()
    with torch.no_grad():
        net[1].weight.mul_(torch.linspace(0.1, 3, 400)[:, None]).add_(torch.linspace(-2, 2, 400)[:, None])
    for per, axis in (("tensor", None), ("channel", 1)):
        value = drawn(f"moments(per={per})", "1", net=net)["1.weight"].double().numpy()
        trained = net[1].weight.detach().double().numpy()
        n = trained.size if axis is None else 48
        np.testing.assert_allclose(value.mean(axis), trained.mean(axis), atol=5 * trained.std() / n**0.5)
        np.testing.assert_allclose(value.std(axis), trained.std(axis), rtol=5 / (2 * n) ** 0.5)


def test_draw_values__the_output_channels_of_a_transposed_convolution_are_its_second_axis():
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.Flatten(), nn.Linear(125, 5)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(5.0)[None, :, None, None].expand(3, 5, 2, 2))
    assert torch.equal(drawn("moments(per=channel)", "0", net=net)["0.weight"], net[0].weight), "deviation 0"
    assert not torch.allclose(drawn("moments", "0", net=net)["0.weight"], net[0].weight)


class OddNumbers(nn.Module):
    """A scalar, complex numbers and counts are parameters, too."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.phases = nn.Parameter(torch.ones(12, dtype=torch.complex64))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        return (x.flatten(1)[:, :12] * self.phases).real * self.scalar


@pytest.mark.parametrize("name", ["noise(scale=0)", "noise(scale=1)", "moments", "moments(per=channel)"])
def test_draw_values__of_every_number_format(name):
    net = nn.Sequential(OddNumbers(), nn.Linear(12, 3)).eval()
    layer = Layer("0", "other", ("0.scalar", "0.phases", "0.counts"), (12,), 16)
    values = draw_values(get_reset(name), layer, net, {}, 1)
    for key, value in values.items():
        assert value.dtype == net.get_parameter(key).dtype
        assert value.shape == net.get_parameter(key).shape
        if name == "noise(scale=0)":
            assert torch.equal(value, net.get_parameter(key))


def test_draw_values__what_a_reset_writes_to_never_reaches_network_or_donor(registered):
    @reset("spoil", random=False, donor="initialiser")
    def spoil(draw):
        for value in (*draw.trained.values(), *draw.donor.values()):
            value.fill_(-1)
        return draw.trained

    net, donor = network(), network()
    values = draw_values(RESETS["spoil"], layers_of(net)["4"], net, dict(donor.named_parameters()), 0)
    assert (values["4.weight"] == -1).all()
    for untouched in (net, donor):
        assert (untouched[4].weight > 0).all()


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda draw: {}, "nothing"),
        (lambda draw: {k: v[:1] for k, v in draw.trained.items()}, r"shape \(1, 16\)"),
        (lambda draw: {k: v.numpy() for k, v in draw.trained.items()}, "numpy.ndarray"),
        (lambda draw: dict.fromkeys(draw.trained), "NoneType"),
    ],
    ids=["left out", "other shape", "array", "None"],
)
def test_draw_values__a_reset_that_does_not_fit_is_named(registered, returned, got):
    reset("odd", random=False)(returned)
    net = network()
    with pytest.raises(ProtocolError, match=rf"'odd' returned {got} for '4.weight' .* expected .* \(5, 16\)"):
        draw_values(RESETS["odd"], layers_of(net)["4"], net, {}, 0)


@pytest.mark.parametrize(("returned", "got"), [(None, "NoneType"), (torch.ones(5, 16), "Tensor"), ([], "list")])
def test_draw_values__a_reset_without_a_mapping_is_named(registered, returned, got):
    reset("odd", random=False)(lambda draw: returned)
    net = network()
    with pytest.raises(ProtocolError, match=rf"'odd' returned {got} for layer '4'; expected names .* such as a dict"):
        draw_values(RESETS["odd"], layers_of(net)["4"], net, {}, 0)


# the registry


def test_reset__registers_a_function_with_its_summary(registered):
    @reset("halve", random=False)
    def halve(draw):
        """Half of each value.

        Not shown.
        """
        return {name: value / 2 for name, value in draw.trained.items()}

    entry = get_reset("halve")
    assert (entry.name, entry.random, entry.donor, entry.summary) == ("halve", False, None, "Half of each value.")
    assert entry.function is halve


def test_reset__a_taken_name_is_refused():
    with pytest.raises(ProtocolError, match=r"The reset 'zero' exists already \(All values 0\)"):
        reset("zero", random=False)(lambda draw: draw.trained)
    assert "trained" not in RESETS["zero"].function.__code__.co_varnames
    assert RESETS["zero"].summary == "All values 0."


@pytest.mark.parametrize(("name", "hint"), [("rerandomise", "mean 'rerandomize'"), ("qq", "Known: "), (3, "Known: ")])
def test_get_reset__an_unknown_name_gets_near_ones(name, hint):
    with pytest.raises(ProtocolError, match=f"There is no reset .*{hint}"):
        get_reset(name)


@pytest.mark.parametrize(
    ("given_name", "name", "random"),
    [
        ("noise", "noise(scale=1)", True),
        ("noise( scale = .50 )", "noise(scale=0.5)", True),
        ('moments(per="channel")', "moments(per=channel)", True),
        ("rewind()", "rewind", False),
        ("rewind(epoch=none)", "rewind", False),
        ("rewind(epoch=3)", "rewind(epoch=3)", False),
        ("rerandomize()", "rerandomize", True),
        ("skip", "skip", False),
        ("donor", "donor", False),
    ],
)
def test_get_reset__equal_options_have_one_name(given_name, name, random):
    found = get_reset(given_name)
    assert (found.name, found.random) == (name, random)
    assert get_reset(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nois(scale=1)", "There is no reset 'nois'. Did you mean 'noise'?"),
        ("noise(scal=1)", "The reset 'noise' has no option 'scal'. Did you mean 'scale'?"),
        ("noise(scale=-0.5)", "The reset 'noise': scale must be a finite number of at least 0; got -0.5."),
        ("noise(scale=nan)", "scale must be a finite number of at least 0; got 'nan'."),
        ("noise(scale=)", "is not written as noise(option=value, ...)"),
        ("noise(0.5)", "is not written as noise(option=value, ...)"),
        ("moments(per=chanel)", "per must be one of tensor, channel; got 'chanel'. Did you mean 'channel'?"),
        ("zero(x=1)", "The reset 'zero' has no option 'x'. It has none: leave the brackets out."),
    ],
)
def test_get_reset__refusals(name, message):
    with pytest.raises(ProtocolError) as caught:
        get_reset(name)
    assert message in str(caught.value)
    finished = []
    with pytest.raises(ProtocolError):
        measure(two_layers(), PIXELS, reset=name, on_trial=finished.append, **QUIET)
    assert not finished


def test_reset__options_are_those_of_the_signature(registered):
    @reset("shrink", random=False)
    def shrink(draw, *, by: Annotated[float, AtLeast(0)] = 0.5, only: Literal["weight", "all"] = "all"):
        """All values, ``by`` times smaller."""
        return {
            key: value if only not in (key.rpartition(".")[2], "all") else value * by
            for key, value in draw.trained.items()
        }

    net = network()
    found = drawn("shrink(only=weight, by=2)", "4")
    assert torch.equal(found["4.weight"], net[4].weight * 2)
    assert torch.equal(found["4.bias"], net[4].bias)
    assert get_reset("shrink").name == "shrink(by=0.5, only=all)"
    cells = measure(two_layers(), PIXELS, reset="shrink( by=1 )", **QUIET).cells
    assert set(cells["reset"]) == {"shrink(by=1, only=all)"}
    assert set(cells["status"]) == {"unchanged"}


def test_reset__an_option_of_another_kind_is_refused(registered):
    with pytest.raises(ProtocolError, match="'listed' cannot be registered: the option 'by' must be annotated as"):

        @reset("listed", random=False)
        def listed(draw, *, by: list[float]):
            """Its option is a list."""

    assert "listed" not in RESETS


def test_measure__noise_of_scale_0_changes_nothing():
    found = measure(two_layers(), PIXELS, reset="noise(scale=0)", **QUIET)
    assert set(found.cells["status"]) == {"unchanged"}
    assert set(found.cells["delta_norm"]) == {0.0}
    assert found.record["asked"]["reset"] == "noise(scale=0)"


def test_measure__more_noise_moves_predictions_more():
    means = [
        measure(two_layers(), PIXELS, reset=f"noise(scale={scale})", trials=20, layers="3", **QUIET)
        .cells["cosine"]
        .mean()
        for scale in (0.01, 0.1, 1)
    ]
    assert 0 < means[0] < means[1] < means[2]


# donors


NAMED = "arch=py:small_subjects:build_two_layers"  # which a run's record cannot do by itself


def saved_run(tmp_path, net):
    """A training run whose epochs add 0 and 3 to every value of the network."""
    states = {epoch: {key: value + epoch for key, value in net.state_dict().items()} for epoch in (0, 3)}
    arch = "py:small_subjects:build_two_layers?input_size=(3,2,2)"
    return write_run(tmp_path / "run", states, arch=arch, final=net.state_dict())


@pytest.mark.parametrize(
    "model",
    ["file:{0}", "file:{0}/model.safetensors", "file:{0}@epoch=0", "file:{0}/epochs/epoch-0003.safetensors"],
)  # fmt: skip
def test_measure__rewind_to_an_epoch_finds_the_models_own_run(tmp_path, model):
    folder = saved_run(tmp_path, two_layers())
    reference = f"{model.format(folder)}?{NAMED}"
    found = measure(reference, PIXELS, reset="rewind(epoch=3)", **QUIET)
    expected = measure(reference, PIXELS, reset="rewind", donor=f"{folder}@epoch=3", **QUIET)
    assert found.record["model"]["donor"] == expected.record["model"]["donor"]
    assert found.record["model"]["donor"].startswith(f"given: the file {folder}@epoch=3, SHA-256 ")
    np.testing.assert_array_equal(found.per_image["cosine"], expected.per_image["cosine"])
    assert set(found.cells["reset"]) == {"rewind(epoch=3)"}


@pytest.mark.parametrize("donor", ["{0}", "{0}@epoch=0", "{0}/epochs/epoch-0000.safetensors", "{0}/model.safetensors"])
def test_measure__rewind_to_an_epoch_of_a_given_run(tmp_path, donor):
    folder = saved_run(tmp_path, two_layers())
    found = measure(two_layers(), PIXELS, reset="rewind(epoch=3)", donor=donor.format(folder), layers="1", **QUIET)
    assert f"{folder}@epoch=3, SHA-256 " in found.record["model"]["donor"]
    n = sum(p.numel() for p in two_layers()[1].parameters())
    assert found.cells["delta_norm"][0] == pytest.approx(3 * n**0.5)


def test_measure__rewind_to_the_epoch_that_the_model_is_of_changes_nothing(tmp_path):
    folder = saved_run(tmp_path, two_layers())
    for epoch in (0, 3):
        model = f"file:{folder}@epoch={epoch}?{NAMED}"
        cells = measure(model, PIXELS, reset=f"rewind(epoch={epoch})", **QUIET).cells
        assert set(cells["status"]) == {"unchanged"}


def test_measure__an_epoch_that_the_run_did_not_keep_is_refused(tmp_path):
    folder, finished = saved_run(tmp_path, two_layers()), []
    with pytest.raises(CheckpointError, match=r"did not keep the weights of epoch '1'\. Epochs that it kept: 0, 3\."):
        measure(f"file:{folder}?{NAMED}", PIXELS, reset="rewind(epoch=1)", on_trial=finished.append, **QUIET)
    assert not finished


def test_measure__rewind_to_an_epoch_of_no_run_is_refused(tmp_path):
    save_file(two_layers().state_dict(), tmp_path / "alone.safetensors")
    finished = []
    for donor in (None, tmp_path / "alone.safetensors", tmp_path / "no", two_layers()):
        with pytest.raises(ProtocolError, match=r"'rewind\(epoch=3\)' needs the training run .* with --from"):
            measure(two_layers(), PIXELS, reset="rewind(epoch=3)", donor=donor, on_trial=finished.append, **QUIET)
    assert not finished


DONOR = "py:small_subjects:build_two_layers?input_size=(3,2,2)&seed=7"


@pytest.mark.parametrize("how", ["reference", "file", "network", "file reference"])
def test_measure__donor_gives_another_models_values(tmp_path, how):
    other = fresh(build_two_layers, 7)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    given_as = {
        "reference": DONOR,
        "file": str(tmp_path / "other.safetensors"),
        "network": other,
        "file reference": f"file:{tmp_path}/other.safetensors?arch={DONOR.replace('?', '&')}",
    }[how]
    network, found = two_layers(), {}
    measured = measure(network, PIXELS, reset="donor", donor=given_as, trials=4, **QUIET)
    with torch.no_grad():
        clean = network(PIXELS / 255).double().softmax(1)
        for layer in ("1", "3"):
            with holding(network, {f"{layer}.{p}": v for p, v in other.get_submodule(layer).named_parameters()}):
                after = network(PIXELS / 255).double().softmax(1)
            found[layer] = float((1 - F.cosine_similarity(clean, after)).mean())
    cells = measured.cells.set_index("layer")
    assert cells["cosine"].to_dict() == pytest.approx(found, abs=1e-6)
    assert len(cells) == 2, "one trial: all are the same"
    kind = {
        "reference": "the model py:",
        "file": "the file /",
        "network": "a network",
        "file reference": "the model file:",
    }
    assert measured.record["model"]["donor"].startswith(f"given: {kind[how]}")
    if how != "network":
        assert re.search("SHA-256 [0-9a-f]{64}", measured.record["model"]["donor"])


def test_measure__a_donor_of_another_architecture_is_refused(tmp_path):
    finished = []
    for donor, error in (("timm:test_vit?pretrained=false", ModelError), ("timm:no_such", ModelError)):
        with pytest.raises(error):
            measure(two_layers(), PIXELS, reset="donor", donor=donor, on_trial=finished.append, **QUIET)
    with pytest.raises(ProtocolError, match=r"'donor' needs the model .* with --from"):
        measure(two_layers(), PIXELS, reset="donor", on_trial=finished.append, **QUIET)
    assert not finished


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_donor_values__rebuilds_a_reference_under_the_seed(architecture):
    model = open_model(f"timm:{architecture}?pretrained=false&seed=4&num_classes=7")
    state = torch.get_rng_state()
    values = donor_values(model, [], 123)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        twin = timm.create_model(architecture, pretrained=False, num_classes=7)
    assert list(values) == [name for name, _ in twin.named_parameters()]
    for name, parameter in twin.named_parameters():
        assert torch.equal(values[name], parameter), f"{name} is not what timm.create_model draws"
    assert any(not torch.equal(values[name], p) for name, p in model.network.named_parameters())


class Attending(nn.Module):
    """Attention, whose own initialiser sets the bias of the linear layer that it holds."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, images):
        x = images.mean(dim=1)
        return self.head(self.attention(x, x, x)[0].mean(dim=1))


def shared_module():
    one = nn.Linear(3, 3)
    return nn.Sequential(one, nn.ReLU(), nn.Sequential(one, nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "factory",
    [lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 2)), Attending, shared_module],
    ids=["in a row", "attention", "shared"],
)
def test_donor_values__a_given_network_is_initialised_as_if_it_were_built_under_the_seed(factory):
    trained = factory().eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.fill_(5)
    values = donor_values(open_model(trained), [], 77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        twin = dict(factory().named_parameters())
    for name, parameter in twin.items():
        assert torch.equal(values[name], parameter), f"{name} is not what construction draws"
    assert all((p == 5).all() for p in trained.parameters())


class OwnInitialiser(nn.Module):
    """Holds parameters itself and initialises them, its children and itself, from its own method."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.linear = nn.Linear(3, 2)

    def reset_parameters(self):
        nn.init.constant_(self.scale, 3.0)
        nn.init.constant_(self.linear.weight, 4.0)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)) * self.scale)


def test_donor_values__a_parents_initialiser_has_the_last_word():
    values = donor_values(open_model(nn.Sequential(OwnInitialiser()).eval()), [], 0)
    assert (values["0.scale"] == 3).all()
    assert (values["0.linear.weight"] == 4).all()


class NoInitialiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 2)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)) * self.scale)


def test_donor_values__a_module_without_initialiser_is_named_when_it_is_to_be_reset():
    model = open_model(nn.Sequential(NoInitialiser()).eval())
    layers = layers_of(model.network)
    assert set(donor_values(model, [layers["0.linear"]], 0)) == {"0.scale", "0.linear.weight", "0.linear.bias"}
    with pytest.raises(ModelError, match=r"no reset_parameters .*: 0 \(NoInitialiser\)\. Open the model by reference"):
        donor_values(model, layers.values(), 0)


def test_donor_values__a_rebuilt_network_of_another_shape_is_refused():
    model = replace(open_model(network()), build=lambda: nn.Sequential(nn.Conv2d(3, 4, 5)), initialiser="my_factory()")
    with pytest.raises(ModelError, match=r"my_factory\(\) builds is not that of .* 3 parameters .* '0.weight'"):
        donor_values(model, [layers_of(model.network)[name] for name in ("0", "4")], 0)


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_given_donor__reads_a_file(tmp_path, as_path):
    net = network()
    other = {key: value + 1 for key, value in net.state_dict().items()}
    save_file({f"module.{key}": value for key, value in other.items()}, tmp_path / "epoch0.safetensors")
    path = as_path(tmp_path / "epoch0.safetensors")
    donor = given_donor(path, get_reset("rewind"), open_model(net), layers_of(net).values())
    assert torch.equal(donor.values["0.weight"], net[0].weight + 1)
    sha256 = hashlib.sha256((tmp_path / "epoch0.safetensors").read_bytes()).hexdigest()
    assert donor.origin == f"given: the file {path}, SHA-256 {sha256}"


def test_given_donor__reads_an_epoch_of_a_training_run(tmp_path):
    net = network()
    states = {epoch: {key: value + epoch for key, value in net.state_dict().items()} for epoch in (0, 3)}
    folder = write_run(tmp_path / "run", states, final=net.state_dict())
    model, layers = open_model(net), layers_of(net).values()
    for epoch in (0, 3):
        donor = given_donor(f"{folder}@epoch={epoch}", get_reset("rewind"), model, layers)
        assert torch.equal(donor.values["0.weight"], net[0].weight + epoch)
        assert donor.origin.startswith(f"given: the file {folder}@epoch={epoch}, SHA-256 ")
    assert torch.equal(given_donor(folder, get_reset("rewind"), model, layers).values["0.weight"], net[0].weight)
    with pytest.raises(CheckpointError, match=r"not keep the weights of epoch '1'\. Epochs that it kept: 0, 3\."):
        given_donor(f"{folder}@epoch=1", get_reset("rewind"), model, layers)


def test_given_donor__takes_a_network():
    net, other = network(), network()
    donor = given_donor(other, get_reset("rerandomize"), open_model(net), layers_of(net).values())
    assert all(torch.equal(donor.values[name], p) for name, p in other.named_parameters())
    assert donor.origin.startswith("given: a network Sequential, SHA-256 ")


def test_given_donor__none_is_fine_for_resets_that_need_none():
    net = network()
    for name in ("rerandomize", "zero", "permute"):
        assert given_donor(None, get_reset(name), open_model(net), []) is None


@pytest.mark.parametrize(
    ("how", "donor", "error", "text"),
    [
        ("rewind", None, ProtocolError,
         r"'rewind' needs the checkpoint .* give a weight file, or DIR@epoch=0 .* with --from"),
        ("zero", nn.Linear(2, 2), ProtocolError, r"'zero' takes no values .* choose one of rerandomize, rewind"),
        ("rewind", nn.Sequential(nn.Linear(2, 2)), ModelError,
         r"expected a parameter '0.bias' of shape \(4,\), the donor has it in the shape \(2,\); 6 parameters differ"),
        ("rewind", nn.Conv2d(3, 4, 3), ModelError, r"'0.bias' of shape \(4,\), the donor lacks it"),
        ("rewind", "nowhere/epoch0.pth", CheckpointError, r"no file nowhere/epoch0.pth"),
    ],
    ids=["none", "unwanted", "other shape", "other names", "no file"],
)  # fmt: skip
def test_given_donor__what_does_not_fit_is_said(how, donor, error, text):
    net = network()
    with pytest.raises(error, match=text):
        given_donor(donor, get_reset(how), open_model(net), layers_of(net).values())


def test_given_donor__a_file_with_other_names_is_refused(tmp_path):
    net = network()
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors for .*: the weights do not fit. 8 missing"):
        given_donor(tmp_path / "other.safetensors", get_reset("rewind"), open_model(net), [])


# weights that a module computes from other tensors


def pruned(module):
    return prune.l1_unstructured(module, "weight", 0.3)


def normed_twice(module):
    return parametrizations.spectral_norm(parametrizations.weight_norm(module))


COMPUTED = {
    "weight_norm": weight_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "pruned": pruned,
    "spectral_norm": spectral_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "normed twice": normed_twice,
    "orthogonal": parametrizations.orthogonal,
}
SPECTRAL = [name for name in COMPUTED if "spectral" in name or "twice" in name]


def computed(name, seed=1):
    """Two layers for `PIXELS` whose weights are computed; trained a little, so that they keep what autograd needs."""

    def build():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            how = COMPUTED[name]
            return nn.Sequential(nn.Flatten(), how(nn.Linear(12, 8)), nn.ReLU(), how(nn.Linear(8, 3)))

    def build_trained():
        network = build()
        optimizer = torch.optim.SGD(network.parameters(), 1.0)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(network(PIXELS / 255), torch.arange(6) % 3).backward()
            optimizer.step()
        network(PIXELS / 255)
        return network.eval()

    return build, fresh(build_trained, seed)


def effective_weight(network, name, values):
    with torch.no_grad(), holding(network, values):
        network(PIXELS / 255)
        return network.get_submodule(name).weight.detach().clone()


@pytest.mark.parametrize("name", ["weight_norm", "parametrized weight_norm", "pruned"])
def test_measure__a_module_whose_weights_are_computed_is_reset_as_the_architecture_is(name):
    build, network = computed(name)
    given = open_model(network, input_size=(3, 2, 2))
    by_reference = replace(given, build=lambda: build().eval(), initialiser="build()")
    found, expected = (measure(model, PIXELS, trials=3, **QUIET).cells for model in (given, by_reference))
    np.testing.assert_array_equal(found["cosine"], expected["cosine"])
    assert (found["cosine"] > 0.01).all()
    assert (found["status"] == "ok").all()


@pytest.mark.parametrize("mode", ["reference", "float32"])
@pytest.mark.parametrize("name", COMPUTED)
def test_measure__a_computed_weight_is_that_of_the_donor(name, mode):
    """The slow way: a copy of the network with what a module draws, in parameters and buffers."""
    _, network = computed(name)
    model = open_model(network, input_size=(3, 2, 2))
    cells = measure(model, PIXELS, trials=1, dtype=mode, **QUIET).cells
    found, seed = cells.set_index("layer")["cosine"], int(cells["seed"][0])
    layers = find_layers(network, PIXELS[:1] / 255)
    donor = donor_values(model, layers, seed)
    with torch.no_grad():
        clean = network(PIXELS / 255).softmax(1)
    for layer in layers:
        values = draw_values(get_reset("rerandomize"), layer, network, donor, seed)
        with torch.no_grad(), holding(network, values):
            after = network(PIXELS / 255).softmax(1)
        expected = 1 - F.cosine_similarity(clean, after).mean()
        assert found[layer.name] == pytest.approx(float(expected), abs=1e-5)
        assert found[layer.name] > 0.001


@pytest.mark.parametrize("how", ["rerandomize", "permute"])
@pytest.mark.parametrize("by_reference", [False, True], ids=["module", "reference"])
@pytest.mark.parametrize("name", SPECTRAL)
def test_draw_values__after_a_reset_the_spectral_norm_is_1(name, by_reference, how):
    build, network = computed(name)
    with torch.no_grad():  # as far from what is drawn as a trained network's vectors can be
        for buffer in network.buffers():
            buffer.copy_(F.normalize(torch.arange(float(buffer.numel())), dim=0))
    model = open_model(network, input_size=(3, 2, 2))
    if by_reference:
        model = replace(model, build=build, initialiser="build()")
    layers = find_layers(network, PIXELS[:1] / 255)
    donor = donor_values(model, layers, 3) if how == "rerandomize" else {}
    for layer in layers:
        values = draw_values(get_reset(how), layer, network, donor, 3)
        assert set(layer.buffers) <= set(values)
        norm = torch.linalg.matrix_norm(effective_weight(network, layer.name, values), 2)
        assert float(norm) == pytest.approx(1, abs=0.01)


def test_draw_values__an_orthogonal_weight_stays_orthogonal_and_is_drawn():
    _, network = computed("orthogonal")
    (layer, _) = find_layers(network, PIXELS[:1] / 255)
    drawn = []
    for seed in (3, 4):
        donor = donor_values(open_model(network), [layer], seed)
        values = draw_values(get_reset("rerandomize"), layer, network, donor, seed)
        drawn.append(effective_weight(network, "1", values))
        torch.testing.assert_close(drawn[-1] @ drawn[-1].T, torch.eye(8), atol=1e-5, rtol=0)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", COMPUTED)
def test_measure__leaves_computed_weights_as_they_were(name):
    _, network = computed(name)
    before = {layer: network.get_submodule(layer).weight.detach().clone() for layer in ("1", "3")}
    with torch.no_grad():
        logits = network(PIXELS / 255)
    measure(network, PIXELS, types="all", **QUIET)
    for layer, weight in before.items():
        assert torch.equal(network.get_submodule(layer).weight, weight)
    with torch.no_grad():
        assert torch.equal(network(PIXELS / 255), logits)


# initialisers that draw nothing, or not all


class Halved(nn.Linear):
    """Its initialiser makes new values from the trained ones."""

    def reset_parameters(self):
        if hasattr(self, "bias"):
            nn.init.uniform_(self.bias)
            self.weight.data.mul_(0.5)


class HalfDrawn(nn.Linear):
    """Its initialiser forgets the bias."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)


class Rotated(nn.Module):
    """Its initialiser forgets a complex parameter; beside it are counts, which are not trained."""

    def __init__(self):
        super().__init__()
        self.phases = nn.Parameter(torch.ones(12, dtype=torch.complex64))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
        self.linear = nn.Linear(12, 8)

    def reset_parameters(self):
        self.linear.reset_parameters()

    def forward(self, x):
        return self.linear((x * self.phases).real)


class Flagged(nn.Module):
    """What should be its initialiser is a setting."""

    def __init__(self):
        super().__init__()
        self.reset_parameters = True
        self.scale, self.linear = nn.Parameter(torch.ones(12)), nn.Linear(12, 8)

    def forward(self, x):
        return self.linear(x * self.scale)


class LowRank(nn.Module):
    """Adds a product of two matrices that have no initialiser of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.ones(1, 12))

    def forward(self, weight):
        return weight + self.a @ self.b


def adapted():
    layer = nn.Linear(12, 8)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Halved(12, 8), "'1.weight' (Halved)"),
        (lambda: HalfDrawn(12, 8), "'1.bias' (HalfDrawn)"),
        (adapted, "1.parametrizations.weight.0 (LowRank)"),
        (Rotated, "'1.phases' (Rotated)"),
        (Flagged, "1 (Flagged)"),
    ],
    ids=["halved", "half drawn", "adapted", "complex", "flag"],
)
def test_measure__a_parameter_that_its_initialiser_does_not_draw_is_named(build, named):
    network = nn.Sequential(nn.Flatten(), build(), nn.ReLU(), nn.Linear(8, 3)).eval()
    finished = []
    with pytest.raises(ModelError) as caught:
        measure(network, PIXELS, types="all", on_trial=finished.append, **QUIET)
    assert named in str(caught.value)
    assert not finished
    donor = fresh(lambda: nn.Sequential(nn.Flatten(), build(), nn.ReLU(), nn.Linear(8, 3)), 2)
    found = measure(network, PIXELS, layers="3", donor=donor, **QUIET)
    assert list(found.cells["status"]) == ["ok"], "the way out"


def own_seed():
    torch.manual_seed(0)
    return network()


def partly_trained():
    """As a factory that loads a trained backbone whatever it is asked for."""
    net = network()
    nn.init.xavier_uniform_(net[4].weight)
    return net


def one_and_the_same(cache=[]):  # noqa: B006 - it is to be kept
    if not cache:
        cache.append(network())
    return cache[0]


@pytest.mark.parametrize(
    ("build", "named"),
    [(own_seed, "'0.weight'"), (partly_trained, "'0.weight'"), (one_and_the_same, "'0.weight'")],
)
def test_check_draws__a_factory_that_draws_nothing_is_refused(build, named):
    trained = network()
    with torch.no_grad():
        trained[0].weight.add_(1)
    model = replace(open_model(trained, input_size=(3, 4, 4)), build=build, initialiser="my_factory()")
    pixels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    with pytest.raises(ModelError) as caught:
        measure(model, pixels, **QUIET)
    assert f"my_factory() of {model.reference!r} gives {named} " in str(caught.value)
    assert "the same values under two seeds" in str(caught.value)
    if build is partly_trained:
        assert (measure(model, pixels, layers="4", **QUIET).cells["status"] == "ok").all(), "the way out"


class Used(nn.Module):
    """Uses another module as it is to be used, beside one that is drawn."""

    def __init__(self, module, use):
        super().__init__()
        self.module, self.use, self.drawn = module, use, nn.Conv2d(3, 3, 1)

    def forward(self, images):
        x = self.drawn(images)
        return self.use(self.module, x.mean(dim=(2, 3)), x)


KINDS = {
    "linear": (lambda: nn.Linear(3, 5), lambda module, x, _: module(x)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 5), lambda module, x, _: module(x, x)),
    "convolution": (lambda: nn.ConvTranspose2d(3, 5, 2), lambda module, _, images: module(images).mean(dim=(2, 3))),
    "embedding": (lambda: nn.Embedding(4, 5), lambda module, x, _: module((x[:, 0] > 0).long())),
    "bag": (lambda: nn.EmbeddingBag(4, 5), lambda module, x, _: module((x > 0).long())),
    "attention": (lambda: nn.MultiheadAttention(3, 1), lambda module, x, _: module(x, x, x)[0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_check_draws__every_kind_of_matrix_that_torch_draws(kind):
    make, use = KINDS[kind]
    model = open_model(Used(make(), use).eval(), input_size=(3, 4, 4))
    layers = find_layers(model.network, torch.rand(2, 3, 4, 4))
    assert check_draws(replace(model, build=lambda: Used(make(), use), initialiser="build()"), layers) is None
    matrix = next(name for name, value in model.network.named_parameters() if value.ndim > 1)
    assert matrix.startswith("module.")

    def fixed():
        built = Used(make(), use)
        with torch.no_grad():
            value = built.get_parameter(matrix)
            value.copy_(torch.arange(float(value.numel())).view_as(value))
        return built

    with pytest.raises(ModelError) as caught:
        check_draws(replace(model, build=fixed, initialiser="fixed()"), layers)
    assert f"gives {matrix!r} the same values" in str(caught.value)


def test_measure__a_factory_that_builds_another_network_each_time_is_no_bug():
    trained, built = network(), []

    def build():
        built.append(network() if not built else nn.Sequential(nn.Conv2d(3, 4, 3)))
        return built[-1]

    model = replace(open_model(trained, input_size=(3, 4, 4)), build=build, initialiser="build()")
    finished = []
    with pytest.raises(ModelError, match=r"build\(\) builds is not that of"):
        measure(model, torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8), on_trial=finished.append, **QUIET)
    assert not finished


class Waves(nn.Module):
    """Adds positions that are always begun as the same waves, and trained."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.arange(4.0).view(2, 2).sin())

    def forward(self, images):
        return images + self.positions


def test_check_draws__what_is_constant_or_not_trained_need_not_be_drawn():
    def build():
        net = nn.Sequential(nn.Conv2d(3, 3, 3), Waves(), nn.Linear(2, 2), nn.Conv2d(3, 3, 1), nn.Linear(2, 2))
        net[0].weight.requires_grad_(False).copy_(torch.arange(81.0).view(3, 3, 3, 3))  # a filter by hand
        nn.init.zeros_(net[2].weight)
        nn.init.dirac_(net[3].weight)
        net[3].bias.copy_(torch.arange(3))
        return net

    with torch.no_grad():
        model = replace(open_model(build()), build=build, initialiser="build()")
    assert check_draws(model, find_layers(model.network, torch.rand(1, 3, 4, 4))) is None
