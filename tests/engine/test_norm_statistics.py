"""Running statistics of normalisation layers beside a reset, against a slow twin that runs the network as it is."""

import inspect
from functools import cache
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from layercrit.engine import norm_statistics
from layercrit.engine.exports import graph_of
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.norm_statistics import NormStatistics
from layercrit.engine.subject import Change
from layercrit.errors import ModelError, ProtocolError
from layercrit.layer_sets import sets_of
from layercrit.layers import find_layers, select_layers
from layercrit.measuring import measure
from layercrit.models.outputs import logits_of
from layercrit.protocol import NORM_STATISTICS, SETS
from layercrit.resets import RESETS, reset
from layercrit.restoring import holding
from small_subjects import QUIET, Block, fresh, photographs, registered, small_network
from tiny_networks import ARCHITECTURES, case, seeded

N = 10


SIGNATURE = inspect.signature(F.batch_norm)


class Normalisations(TorchFunctionMode):
    """Answers every batch normalisation of a pass by ``answer(number of the call, its arguments)``."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.n_calls = answer, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.batch_norm:
            return function(*args, **(kwargs or {}))
        self.n_calls += 1
        return self.answer(self.n_calls - 1, SIGNATURE.bind(*args, **kwargs).arguments)


def normalised(args, mean, variance):
    given, weight, bias = args["input"], args.get("weight"), args.get("bias")
    shape = (1, -1, *[1] * (given.ndim - 2))
    scaled = (given - mean.view(shape)) / (variance.view(shape) + args["eps"]).sqrt()
    return scaled if weight is None else scaled * weight.view(shape) + bias.view(shape)


def moments(given):
    by_channel = given.transpose(0, 1).flatten(1).double()
    return by_channel.mean(dim=1).float(), by_channel.var(dim=1, correction=0).float()


def twin(network, values, images, how, n_estimated):
    """Logits of the changed network, whose statistics are those of training, initial, or of its own first images."""
    parameters, first = dict(network.named_parameters()), images[:n_estimated]
    clean, found = {}, {}

    def remember(number, args):
        clean[number] = args["input"].clone()
        return F.batch_norm(**args)

    def is_reached(number, args, names):
        own = any(args.get(kind) is parameters[name] for kind in ("weight", "bias") for name in names)
        return own or not torch.equal(args["input"], clean[number])

    def estimate(number, args):
        if is_reached(number, args, values):
            found[number] = moments(args["input"])
        return use(number, args)

    def use(number, args):
        return normalised(args, *found[number]) if number in found else F.batch_norm(**args)

    def reset_first(name):
        seen = []

        def look(number, args):
            if not seen and is_reached(number, args, [name]):
                seen.append(number)
                n_channels = args["input"].shape[1]
                found[number] = torch.zeros(n_channels), torch.ones(n_channels)
            return F.batch_norm(**args)

        with holding(network, {name: values[name]}), Normalisations(look):
            network(first)

    with torch.no_grad():
        if how != "trained":
            with Normalisations(remember):
                network(first)
        if how == "reset":
            for name in values:
                reset_first(name)
        with holding(network, values):
            if how == "reestimate":
                with Normalisations(estimate):
                    network(first)
            with Normalisations(use):
                return logits_of(network(images))


@pytest.fixture
def bent():
    """A reset that is no draw: values that the twin knows as well."""
    with registered(RESETS):

        @reset("bent", random=False)
        def bent(draw):
            """Each value bent."""
            return {name: bend(value) for name, value in draw.trained.items()}

        yield


def bend(value):
    return 0.3 - 0.8 * value.sin()


def expected(network, how, n_estimated=N, names=None, images=None):
    """Criticality of each layer, by the twin."""
    images = torch.tensor(photographs(N).images).float() / 255 if images is None else images
    parameters = dict(network.named_parameters())
    found = {}
    for name in names or [name for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        own = {key: bend(value) for key, value in parameters.items() if key.rpartition(".")[0] == name}
        p, q = (twin(network, values, images, how, n_estimated).softmax(dim=1).double() for values in ({}, own))
        if how != "trained":  # the trained network keeps its statistics
            with torch.no_grad():
                p = network(images).softmax(dim=1).double()
        found[name] = float(1 - F.cosine_similarity(p, q).mean())
    return found


def measured(network, how, **settings):
    settings = {"dtype": "reference", "reset": "bent", "batch_size": 4, **settings}
    table = measure(network, photographs(N), norm_statistics=how, **settings, **QUIET).to_pandas()
    return dict(zip(table["layer"], table["criticality"], strict=True))


class PreActivation(nn.Module):
    """Normalises before it convolves: what a reset changes reaches several normalisations past one another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.bn1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.bn3, self.fc = nn.BatchNorm1d(5, affine=False), nn.Linear(5, 6)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(x)))
        return 4 * self.fc(self.bn3(x.mean(dim=(2, 3))))


def lively(build):
    """A network whose statistics are neither 0 and 1 nor those of the images."""

    def built():
        network = build().eval()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.1, 0.6)
        return network

    return fresh(built, 2)


NETWORKS = {
    "residual": small_network,
    "pre-activation": lambda: lively(PreActivation),
    "shortcut with a normalisation": lambda: lively(lambda: nn.Sequential(
        Block(3, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 6))),
}  # fmt: skip


@pytest.mark.parametrize("how", ["trained", "reset", "reestimate"])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.usefixtures("bent")
def test_measure__norm_statistics(build, how):
    network = build()
    wanted = expected(network, how)
    assert measured(network, how) == pytest.approx(wanted, abs=2e-6)
    assert measured(network, how, dtype="float32") == pytest.approx(wanted, abs=2e-5)
    assert measured(network, how, batch_size=10) == pytest.approx(wanted, abs=2e-6)
    if how == "trained":
        assert wanted != pytest.approx(expected(network, "reset"), abs=1e-3)
        assert wanted != pytest.approx(expected(network, "reestimate"), abs=1e-3)


@pytest.mark.usefixtures("bent")
def test_measure__statistics_of_the_first_images(monkeypatch):
    monkeypatch.setattr(norm_statistics, "N_IMAGES", 6)  # a batch of 4 and half of another one
    network = small_network()
    wanted = expected(network, "reestimate", n_estimated=6)
    assert measured(network, "reestimate") == pytest.approx(wanted, abs=2e-6)
    assert wanted != pytest.approx(expected(network, "reestimate"), abs=1e-4)


@pytest.mark.usefixtures("bent")
def test_measure__statistics_of_a_normalisation_that_is_reset():
    network = lively(PreActivation)
    for how in ("reset", "reestimate"):
        wanted = expected(network, how, names=["bn1", "bn2"])
        assert measured(network, how, types="norm") == pytest.approx(wanted, abs=2e-6)


def test_measure__statistics_make_up_for_a_scale():
    """What is fed into a normalisation may be scaled: with statistics of its own nothing is left of that."""
    network = lively(lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.0), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6)
    ))  # fmt: skip
    with registered(RESETS):

        @reset("doubled", random=False)
        def doubled(draw):
            """Twice the trained values."""
            return {name: 2 * value for name, value in draw.trained.items()}

        options = {"reset": "doubled", "layers": "0", "dtype": "reference", **QUIET}
        found = {how: measure(network, photographs(N), norm_statistics=how, **options)
                 for how in ("trained", "reestimate")}  # fmt: skip
    shift = found["reestimate"].record["norm_statistics"]["shift"]
    moved = {how: result.to_pandas()["criticality"][0] for how, result in found.items()}
    assert moved["reestimate"] == pytest.approx(shift, abs=1e-6)
    assert abs(moved["trained"] - shift) > 1e-3


def test_measure__statistics_of_the_trained_network():
    """The shift is what the network predicts as in training, with the statistics of the batch, against as it is."""
    network = small_network()
    result = measure(network, photographs(N), trials=1, dtype="reference", norm_statistics="reestimate", **QUIET)
    images = torch.tensor(photographs(N).images).float() / 255
    with torch.no_grad():
        before = network(images).softmax(dim=1)
        statistics = {name: value.clone() for name, value in network.named_buffers()}
        after = network.train()(images).softmax(dim=1)
        network.eval()
        for name, value in network.named_buffers():
            value.copy_(statistics[name])
    assert result.record["norm_statistics"] == {
        "how": "reestimate",
        "n_images": N,
        "shift": pytest.approx(float(1 - F.cosine_similarity(before, after).mean()), abs=1e-6),
    }
    assert any("without any reset this alone moves predictions by" in note for note in result.record["notes"])


@pytest.mark.parametrize("how", ["reset", "reestimate"])
def test_measure__leaves_the_network_as_it_was(how):
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure(network, photographs(N), trials=2, norm_statistics=how, **QUIET)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network.training


@pytest.mark.parametrize("how", ["reset", "reestimate"])
def test_measure__a_network_without_statistics(how):
    network = fresh(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(400, 6)), 0)
    plain = measure(network, photographs(N), trials=2, **QUIET)
    other = measure(network, photographs(N), trials=2, norm_statistics=how, **QUIET)
    np.testing.assert_array_equal(other.per_image["cosine"], plain.per_image["cosine"])
    assert any("no running statistics" in note for note in other.record["notes"])
    assert not any("no running statistics" in note for note in plain.record["notes"])


def test_measure__batches_suit_the_images_that_are_run_again():
    """Of 250 images, 128 are run once more: in one batch, not in two."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 6))
    options = {"trials": 1, "dtype": "reference", **QUIET}
    images = photographs(250)
    sizes = {how: measure(small_network(), images, norm_statistics=how, **options).record["protocol"]["batch_size"]
             for how in NORM_STATISTICS}  # fmt: skip
    assert sizes == {"trained": 125, "reset": 125, "reestimate": 128}
    found = measure(fresh(lambda: plain, 0), images, norm_statistics="reestimate", **options)
    assert found.record["protocol"]["batch_size"] == 125


class Undecided(nn.Module):
    """Cannot be exported: what it computes depends on the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 6)

    def forward(self, x):
        x = self.bn(self.conv(x)).mean(dim=(2, 3))
        return self.fc(x if x.sum() > 0 else -x) if x.isfinite().all() else self.fc(x * 0)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.bn, self.fc = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 6),
        )

    def forward(self, x):
        return self.fc(self.bn(self.other(self.bn(self.one(x)))).mean(dim=(2, 3)))


class ByHand(nn.Module):
    """Keeps statistics that no operator of torch tells of."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)
        self.register_buffer("running_mean", torch.full((4, 1, 1), 0.1))

    def forward(self, x):
        return self.fc((self.conv(x) - self.running_mean).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Undecided, "cannot be exported"), (Shared, "runs more than once"), (ByHand, "not read by a batch normalisation")],
)
def test_measure__statistics_that_cannot_be_replaced(build, reason):
    network = fresh(build, 0).eval()
    for how in ("reset", "reestimate"):
        with pytest.raises(ModelError, match=f"{reason}.*--norm-statistics trained"):
            measure(network, photographs(N), trials=1, norm_statistics=how, **QUIET)
    measure(network, photographs(N), trials=1, **QUIET)


def test_measure__unknown_statistics():
    with pytest.raises(ProtocolError, match="Did you mean 'reestimate'"):
        measure(small_network(), photographs(N), norm_statistics="re-estimate", **QUIET)


# --- the sweep of architectures, and sets of layers -------------------------------------------------------------------

WITH_STATISTICS = [
    *("resnet50", "vgg16_bn", "densenet121", "efficientnet_b0", "mobilenetv3_large_100", "regnety_008"),
    "torchvision_resnet18",
]
N_ESTIMATED, N_SWEPT = 5, 6  # in batches of 3


@cache
def architecture(name):
    """Return a network as if trained, with values to reset to and images, and its graph for half of them."""
    build, size = ARCHITECTURES[name]
    made = case(build, N_SWEPT, 3, size, size)
    norms = [m for m in made.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with seeded(2), torch.no_grad():
        for norm in norms:
            norm.momentum, norm.eps = 1.0, 0.1  # a channel that is nearly constant would blow up rounding
        made.network.train()(made.images)
        for norm in norms:  # statistics near those of the images, as training leaves them
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn(norm.num_features)
            norm.running_var *= 0.8 + 0.4 * torch.rand(norm.num_features)
        logits = logits_of(made.network.eval()(made.images))
        for parameter in [m for m in made.network.modules() if isinstance(m, nn.Linear)][-1].parameters():
            parameter /= logits.std()
    return made, graph_of(made.network, made.images[: N_SWEPT // 2])[0]


def probabilities(name, units, how, dtype):
    """Return name of each unit, and None for no reset -> ``(n_images, n_classes)``, as the engine runs the network."""
    made, graph = architecture(name)
    subject = SimpleNamespace(network=made.network, layers=units, device=torch.device("cpu"))
    batches = [(images, len(images)) for images in made.images.split(N_SWEPT // 2)]
    statistics = NormStatistics(how, subject, N_SWEPT, [])
    replay = GraphReplay(graph, statistics.layers_with_statistics(graph))
    replay = replay if dtype == "reference" else replay.in_mode(dtype, subject.device)
    changes = statistics.complete({0: [Change(unit, made.values(unit), 1.0) for unit in units]}, batches)[0]
    prepared = {one.layer.name: replay.prepare(one.layer, one.values) for one in changes}
    swept = [dict(replay.sweep(images, prepared)) for images, _ in batches]
    return {unit: torch.cat([of_batch[unit] for of_batch in swept]).softmax(dim=1) for unit in swept[0]}


def probabilities_by_twin(name, units, how):
    made, _ = architecture(name)
    wanted = {one.name: twin(made.network, made.values(one), made.images, how, N_ESTIMATED) for one in units}
    return {unit: logits.softmax(dim=1) for unit, logits in wanted.items()}


def assert_as_by_twin(name, units, monkeypatch):
    """The engine predicts what the twin does, and each kind of statistics makes another prediction."""
    monkeypatch.setattr(norm_statistics, "N_IMAGES", N_ESTIMATED)
    by_twin = {how: probabilities_by_twin(name, units, how) for how in NORM_STATISTICS}
    for how, dtype, atol in (("reset", "float32", 2e-4), ("reestimate", "reference", 1e-4)):
        found = probabilities(name, units, how, dtype)
        assert list(found) == [*by_twin[how], None]
        for unit, wanted in by_twin[how].items():
            np.testing.assert_allclose(found[unit], wanted, rtol=0, atol=atol, err_msg=f"{how} {unit}")
    for how, other in combinations(by_twin.values(), 2):
        assert max(float((how[unit.name] - other[unit.name]).abs().max()) for unit in units) > 0.01


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_complete__architectures(name, monkeypatch):
    made, _ = architecture(name)
    conv, norm = ([one for one in made.layers if one.type == kind] for kind in ("conv", "norm"))
    units = [conv[0], conv[len(conv) // 2], norm[len(norm) // 3]]
    assert_as_by_twin(name, sorted(units, key=lambda unit: unit.depth), monkeypatch)


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("group", ["layer", "conv+norm"])
def test_complete__sets(group, sets, monkeypatch):
    made, _ = architecture("resnet50")
    layers = find_layers(made.network, made.images, group)
    units = select_layers(layers, group=group, patterns="conv1,layer2.0.downsample.0,layer3.1.conv2")
    assert len(units) == 3
    assert_as_by_twin("resnet50", sets_of(units, sets), monkeypatch)


@pytest.mark.parametrize("group", ["block", "stage"])
def test_complete__groups(group, monkeypatch):
    made, _ = architecture("resnet50")
    assert_as_by_twin("resnet50", select_layers(made.layers, types="all", group=group)[1:4], monkeypatch)


@pytest.mark.parametrize("sets", ["pairs", "all-but-one"])
@pytest.mark.parametrize("how", NORM_STATISTICS)
@pytest.mark.usefixtures("bent")
def test_measure__sets_and_norm_statistics(how, sets):
    network, images = lively(PreActivation), torch.tensor(photographs(N).images).float() / 255
    units = sets_of(select_layers(find_layers(network, images)), sets)
    parameters = dict(network.named_parameters())
    wanted = {}
    for unit in units:
        values = {name: bend(parameters[name].detach()) for name in unit.parameters}
        p, q = network(images).detach().softmax(dim=1), twin(network, values, images, how, N).softmax(dim=1)
        wanted[unit.name] = float(1 - F.cosine_similarity(p.double(), q.double()).mean())
    assert measured(network, how, sets=sets) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("how", ["reset", "reestimate"])
@pytest.mark.parametrize("name", ["convnext_tiny", "vit_tiny", "transformers_vit"])
def test_complete__kinds_are_the_same_where_there_are_no_statistics(name, how):
    made, graph = architecture(name)
    assert not any(name.endswith("running_mean") for name, _ in made.network.named_buffers())
    units = select_layers(made.layers)[1::4]
    plain, images = GraphReplay(graph, units), made.images[: N_SWEPT // 2]
    trained = dict(plain.sweep(images, {unit.name: plain.prepare(unit, made.values(unit)) for unit in units}))
    found = probabilities(name, units, how, "reference")
    assert list(found) == list(trained)
    for unit, logits in trained.items():
        assert torch.equal(found[unit][: len(images)], logits.softmax(dim=1)), unit
        assert unit is None or not torch.equal(logits, trained[None])
