import contextlib
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from layercrit.errors import CheckpointError, ModelError
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.model import Classifier, Model, structure
from layercrit.models.sources import explained, written
from layercrit.probes.images import Preprocessing
from layercrit.seeds import drawing


class Pooled(nn.Module):
    """Logits are the channel means: class c of an image is what its normalised channel c is on average."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


def model_of(network, **changes):
    values = {
        "reference": "test:model",
        "architecture": "test",
        "network": network.eval(),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "preprocessing": Preprocessing(height=8, width=9, resize=9),
        "build": None,
        "initialiser": "none",
    }
    return Model(**{**values, **changes})


# Classifier and Model


@pytest.mark.parametrize("channels", [1, 3])
def test_classifier__normalises_bit_for_bit_like_torchvision(channels):
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (13, 17, channels), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(image)
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 2)

    Classifier(Spy(), mean, std)(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])
    assert torch.equal(seen[0][0], expected)


def test_classifier__hand_computed_logits():
    """Channels of 0, 51 and 255 grey levels are 0, 0.2 and 1; minus mean 0.5 and divided by 0.5, 0.25 and 2."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    logits = Classifier(Pooled(), (0.5, 0.5, 0.5), (0.5, 0.25, 2.0))(images)
    assert torch.allclose(logits, torch.tensor([[-1.0, -1.2, 0.25]]))


def test_classifier__parameter_names_and_buffers():
    classifier = Classifier(nn.Linear(2, 2), (0.5,), (0.5,))
    assert list(classifier.state_dict()) == ["network.weight", "network.bias"]
    assert {name: tuple(buffer.shape) for name, buffer in classifier.named_buffers()} == {
        "mean": (1, 1, 1, 1),
        "std": (1, 1, 1, 1),
    }


def test_classifier__exports():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    classifier = Classifier(network, (0.5,) * 3, (0.5,) * 3).eval()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(classifier, (images,))
        assert torch.equal(exported.module()(images), classifier(images))


def test_model__classifier_shares_the_network():
    model = model_of(nn.Sequential(nn.Flatten(), nn.Linear(216, 7)))
    assert model.classifier.network is model.network
    assert not model.classifier.training
    assert model.classifier is model.classifier


def test_model__n_classes():
    assert model_of(nn.Sequential(nn.Flatten(), nn.Linear(216, 7))).n_classes == 7
    with pytest.raises(ModelError, match="expected logits"):
        _ = model_of(nn.Identity()).n_classes
    with pytest.raises(ModelError, match=r"cannot run on one image of 3 channels, 8 x 9 pixels .*input_size"):
        _ = model_of(nn.Sequential(nn.Flatten(), nn.Linear(217, 7))).n_classes


class Remembering(Pooled):
    """Counts its calls, draws, and keeps a table that it makes when it is first run."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.table = {}

    def forward(self, images):
        self.calls += 1
        torch.rand(1)
        return super().forward(images) * self.table.setdefault("scale", torch.ones(3, requires_grad=True))


def test_model__n_classes_leaves_the_network_as_it_was():
    network, state = Remembering(), torch.get_rng_state()
    assert model_of(network).n_classes == 3
    assert network.calls == 0
    assert not network.table["scale"].is_inference(), "such a tensor could not be trained with"
    assert torch.equal(torch.get_rng_state(), state)


def test_model__sha256_is_that_of_the_state():
    network = nn.BatchNorm2d(3)
    assert model_of(network).sha256 == hash_tensors(network.state_dict())
    before = model_of(network).sha256
    network.running_mean[0] = 1
    assert model_of(network).sha256 != before


# Helpers of sources


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def assert_untouched(before):
    torch_state, python_state, numpy_state = states()
    assert torch.equal(torch_state, before[0])
    assert python_state == before[1]
    assert all(np.array_equal(now, then) for now, then in zip(numpy_state, before[2], strict=True))


def draw():
    return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002


def test_drawing__same_seed_same_numbers_and_nothing_touched():
    before = states()
    with drawing(4):
        first = draw()
    assert_untouched(before)
    with drawing(4):
        assert draw() == first
    with drawing(5):
        assert all(now != then for now, then in zip(draw(), first, strict=True))
    with contextlib.suppress(KeyError), drawing(4):
        draw()
        raise KeyError
    assert_untouched(before)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1"])
def test_drawing__impossible_seed(seed):
    with pytest.raises(ModelError, match="seed must be a whole number from 0"), drawing(seed):
        pass


def test_explained__out_of_reach():
    text = r"timm:x: its files are neither cached.*ConnectionError: no route\).*HF_HOME.*pretrained=false"
    with pytest.raises(ModelError, match=text), explained("timm:x", {}):
        raise ConnectionError("no route\nto host")


def test_explained__unknown_option_has_near_names():
    text = r"timm:x could not be opened \(TypeError: unexpected\). Options given: \{'num_clases': 3\}. .*'num_classes'"
    with pytest.raises(ModelError, match=text), explained("timm:x", {"num_clases": 3}, ("num_classes", "img_size")):
        raise TypeError("unexpected")


def test_explained__own_errors_pass():
    with pytest.raises(CheckpointError, match="mine"), explained("timm:x", {}):
        raise CheckpointError("mine")


def test_structure__depends_on_shapes_only():
    assert structure(nn.Linear(2, 3)) == structure(nn.Linear(2, 3))
    assert structure(nn.Linear(2, 3)) != structure(nn.Linear(3, 2))
    assert len(structure(nn.Linear(2, 3))) == 8


def test_written__is_sorted():
    assert written({}) == ""
    assert written({"b": 1, "a": "x"}) == "?a=x&b=1"
