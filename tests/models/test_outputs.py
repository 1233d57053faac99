"""What a network returns: which part of it are the logits, probabilities, and networks without a head."""

import collections
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from layercrit.demo import small_resnet
from layercrit.errors import ModelError
from layercrit.measuring import measure
from layercrit.models.outputs import logits_of, missing_head, reader_of
from layercrit.models.references import open_model

LOGITS = torch.arange(6.0).view(2, 3)
OTHER = torch.ones(2, 4)
MAP = torch.ones(2, 3, 4, 4)


@dataclass
class Output:
    logits: object
    hidden: object = None


Named = collections.namedtuple("Named", "aux logits")


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        [LOGITS],
        (MAP, LOGITS),
        (None, {"not": "looked into"}, LOGITS),
        {"logits": LOGITS},
        {"aux": OTHER, "logits": LOGITS},
        {"out": LOGITS},
        {"pred": LOGITS, "maps": MAP},
        {"hidden": MAP, "out": LOGITS, "aux": OTHER},
        collections.OrderedDict(logits=LOGITS),
        Output(LOGITS),
        Output(LOGITS, hidden=OTHER),
        Named(OTHER, LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_logits_of__accepts(output):
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (MAP, r"returned a tensor \(2, 3, 4, 4\); expected logits of shape \(n_images, n_classes\)"),
        (torch.ones(3), r"returned a tensor \(3,\)"),
        ((MAP, None), r"returned tuple with \[0\] \(2, 3, 4, 4\), \[1\] NoneType"),
        ((), "returned tuple with nothing"),
        ((LOGITS, OTHER), r"\[0\] \(2, 3\), \[1\] \(2, 4\): several of them could be logits"),
        ([LOGITS, LOGITS], "several of them could be logits"),
        ({"features": LOGITS}, r"returned dict with 'features' \(2, 3\); none is named"),
        ({"logits": MAP, "aux": OTHER}, "expected logits of shape"),
        (Output(None), "returned Output"),
        (None, "returned NoneType; expected logits .* as a tensor, in a tuple, list or mapping, or as .logits"),
        (3.5, "returned float"),
        (np.ones((2, 3)), "returned ndarray"),
        (torch.ones(2, 1), "one number per image; expected logits of at least 2 classes"),
    ],
)
def test_logits_of__refuses(output, message):
    with pytest.raises(ModelError, match=message) as refusal:
        logits_of(output)
    assert "output=" in str(refusal.value) or "one number" in message


@pytest.mark.parametrize(
    ("chosen", "output"),
    [
        (1, (OTHER, LOGITS)),
        (-1, (OTHER, LOGITS)),
        ("scores", {"features": OTHER, "scores": LOGITS}),
        ("hidden", Output(OTHER, hidden=LOGITS)),
        ("logits", LOGITS),
        (lambda returned: returned["deep"][0], {"deep": [LOGITS]}),
    ],
)
def test_reader_of__takes_what_was_chosen(chosen, output):
    assert reader_of(chosen)(output) is LOGITS


@pytest.mark.parametrize(
    ("chosen", "output", "message"),
    [
        (2, (OTHER, LOGITS), "output=2 is no position"),
        (0, LOGITS, "output=0 is no position"),
        ("score", {"features": OTHER, "scores": LOGITS}, "Did you mean 'scores'"),
        ("scores", Output(LOGITS), "no part named 'scores'"),
        (0, (MAP, LOGITS), "expected logits of shape"),
        (lambda returned: 3, LOGITS, "expected logits of shape"),
    ],
)
def test_reader_of__refuses_what_is_not_there(chosen, output, message):
    with pytest.raises(ModelError, match=message):
        reader_of(chosen)(output)


@pytest.mark.parametrize("chosen", [True, 1.5, ["logits"]])
def test_reader_of__refuses_what_names_nothing(chosen):
    with pytest.raises(ModelError, match="must be a position, a name, a function or 'probabilities'"):
        open_model("py:layercrit.demo:small_resnet", output=chosen)


# measured: each output against the same network that returns its logits


class Returning(nn.Module):
    """A trained network whose output is changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = trained(), change

    def forward(self, images):
        return self.change(self.net(images), images)


def trained():
    from importlib.resources import files

    return open_model(f"file:{files('layercrit') / 'family' / 'baseline'}").network


IMAGES = torch.randint(0, 256, (24, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)).numpy()


def criticalities(change, **options):
    opened = open_model(Returning(change).eval(), mean=(0.286,), std=(0.353,), input_size=(1, 28, 28), **options)
    found = measure(opened, IMAGES, trials=1, dtype="float32", progress=False)
    return found.to_pandas()["criticality"].to_numpy(), found


@pytest.fixture(scope="module")
def right():
    return criticalities(lambda logits, images: logits)[0]


def features(images):
    return images.flatten(1)[:, :192]


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, images: (features(images), logits),
        lambda logits, images: (logits, logits.flip(1)),
        lambda logits, images: {"features": features(images), "scores": logits},
        lambda logits, images: {"pooler_output": features(images)},
    ],
    ids=["features first", "two heads", "mapping", "features only"],
)
def test_measure__refuses_an_output_that_leaves_a_choice(change):
    with pytest.raises(ModelError, match="output="):
        criticalities(change)


@pytest.mark.parametrize(
    ("change", "output"),
    [
        (lambda logits, images: (features(images), logits), 1),
        (lambda logits, images: {"features": features(images), "scores": logits}, "scores"),
        (lambda logits, images: {"all": [features(images), logits]}, lambda returned: returned["all"][1]),
    ],
    ids=["position", "name", "function"],
)
def test_measure__takes_the_output_that_was_chosen(change, output, right):
    found, measurement = criticalities(change, output=output)
    assert np.array_equal(found, right)
    assert measurement.record["model"]["n_classes"] == 10
    assert measurement.record["model"]["output"] != "logits"


@pytest.mark.parametrize("output", [None, "probabilities"])
def test_measure__probabilities_are_measured_as_probabilities(output, right):
    found, measurement = criticalities(lambda logits, images: logits.softmax(dim=1), output=output)
    assert np.allclose(found, right, atol=1e-5)
    assert measurement.record["model"]["output"] == "logits, probabilities"
    assert any("probabilities" in note for note in measurement.record["notes"]) == (output is None)


def test_measure__log_probabilities_are_logits(right):
    found, measurement = criticalities(lambda logits, images: logits.log_softmax(dim=1))
    assert np.allclose(found, right, atol=1e-5)
    assert measurement.record["model"]["output"] == "logits"


def test_measure__probabilities_beside_features(right):
    found, measurement = criticalities(lambda logits, images: (features(images), logits.softmax(dim=1)), output=1)
    assert np.allclose(found, right, atol=1e-5)
    assert measurement.record["model"]["output"] == "1, probabilities"


def test_measure__refuses_probabilities_that_are_none():
    with pytest.raises(ModelError, match="does not return probabilities"):
        criticalities(lambda logits, images: logits, output="probabilities")


# networks without a head


def without_head(network, name):
    network.set_submodule(name, nn.Identity())
    return network.eval()


def late_norm():
    """A classifier whose logits are normalised once more."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 5), nn.BatchNorm1d(5)).eval()


HEADLESS = {
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=0).eval(), 96),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=0).eval(), 160),
    "timm vgg": (lambda: timm.create_model("test_vgg" if timm.is_model("test_vgg") else "vgg11", num_classes=0), 224),
    "torchvision resnet": (lambda: without_head(torchvision.models.resnet18(), "fc"), 64),
    "torchvision vgg": (lambda: without_head(torchvision.models.vgg11(), "classifier.6"), 64),
    "torchvision vit": (lambda: without_head(torchvision.models.vit_b_16(image_size=32), "heads.head"), 32),
    "norm last": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), Mean()).eval(), 16),
}
WITH_HEAD = {
    "timm resnet": (lambda: timm.create_model("test_resnet").eval(), 96),
    "timm vit": (lambda: timm.create_model("test_vit").eval(), 160),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet").eval(), 96),
    "torchvision squeezenet": (lambda: torchvision.models.squeezenet1_1().eval(), 64),
    "torchvision vgg": (lambda: torchvision.models.vgg11().eval(), 64),
    "demo": (small_resnet, 28),
    "norm after a classifier": (late_norm, 4),
    "identity after a classifier": (lambda: Classified().eval(), 4),
}


class Classified(nn.Module):
    """A classifier whose last activation is none."""

    def __init__(self):
        super().__init__()
        self.body, self.output = late_norm()[:4], nn.Identity()
        nn.init.constant_(self.body[-1].bias, -9.0)  # below 0 whatever the weights, as logits may be

    def forward(self, images):
        return self.output(self.body(images))


class Mean(nn.Module):
    def forward(self, maps):
        return maps.mean(dim=2)


def reason_of(build, size):
    network = build().eval()
    images = torch.zeros(1, 1 if build is small_resnet else 3, size, size)
    with torch.no_grad():
        logits = network(images)
    return missing_head(network, images, logits)


@pytest.mark.parametrize("name", HEADLESS)
def test_missing_head__is_noticed(name):
    assert reason_of(*HEADLESS[name])


@pytest.mark.parametrize("name", WITH_HEAD)
def test_missing_head__is_not_made_up(name):
    assert reason_of(*WITH_HEAD[name]) is None


def test_measure__refuses_a_network_without_head_unless_told():
    network = timm.create_model("test_resnet", num_classes=0).eval()
    images = np.zeros((4, 3, 32, 32), np.uint8)
    images[1::2] = 200
    with pytest.raises(ModelError, match="no classification head"):
        measure(network, images, trials=1, progress=False)
    found = measure(open_model(network, output="logits", input_size=(3, 32, 32)), images, trials=1, progress=False)
    assert found.record["model"]["output"] == "logits"
