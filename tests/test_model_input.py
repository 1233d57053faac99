"""What a model is shown: defaults that it did not declare, the size of the images, and accuracies by guessing."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from cifar_networks import IMAGES, MEAN, STD, WEIGHTS, needs_real_files
from layercrit.cli.root import cli
from layercrit.engine.predictions import Predictions
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.probes.image_sizes import common_size
from layercrit.probes.opening import open_source
from layercrit.probes.probe_set import ProbeSet
from layercrit.statistics import p_of_guessing
from photographs import pieces
from tiny_networks import seeded

QUIET = {"trials": 1, "progress": False}


class TwoLayers(nn.Module):
    """A network for images of any size and one or three channels."""

    def __init__(self, channels=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(channels, 8, 3), nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


def folder_of(path, sizes, mode="RGB"):
    path.mkdir()
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path / f"{number:03}.png")
    return path


# the size of the images


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(20, 30)] * 40, (20, 30)), ([(20, 30)] * 39 + [(30, 20)], None), ([(9, 9)], (9, 9))],
)
def test_common_size__of_a_folder(tmp_path, sizes, expected):
    assert common_size(open_source(folder_of(tmp_path / "images", sizes))) == expected


def test_common_size__of_an_array_and_without_unreadable_images(tmp_path):
    assert common_size(open_source(np.zeros((3, 7, 9, 3), np.uint8))) == (7, 9)
    folder = folder_of(tmp_path / "images", [(20, 30)] * 3)
    (folder / "000.png").write_bytes(b"not an image")
    assert common_size(open_source(folder)) == (20, 30)


def shown_size(measurement):
    size = measurement.record["probe_set"]["preprocessing"]
    return size["channels"], size["height"], size["width"]


def test_measure__a_model_that_declares_no_size_gets_that_of_the_images(tmp_path):
    folder = folder_of(tmp_path / "images", [(20, 30)] * 6)
    found = measure(TwoLayers().eval(), folder, **QUIET)
    assert shown_size(found) == (3, 20, 30)
    assert any("20 x 30 pixels" in note and "mean 0" in note for note in found.record["notes"])
    assert found.record["model"]["undeclared"] == ["input_size", "mean", "std"]
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    same = measure(TwoLayers().eval(), pixels, **QUIET)
    assert np.allclose(found.to_pandas()["criticality"], same.to_pandas()["criticality"], atol=1e-6)


def test_measure__images_of_several_sizes_get_the_default_and_it_is_said(tmp_path):
    folder = folder_of(tmp_path / "images", [(20, 30), (40, 30), (25, 25)])
    found = measure(TwoLayers().eval(), folder, **QUIET)
    assert shown_size(found) == (3, 224, 224)
    assert any("224 x 224 pixels" in note and "differ in size" in note for note in found.record["notes"])


def test_measure__a_network_of_one_channel_gets_grey_images(tmp_path):
    folder = folder_of(tmp_path / "images", [(20, 30)] * 4, mode="L")
    assert shown_size(measure(TwoLayers(channels=1).eval(), folder, **QUIET)) == (1, 20, 30)


def test_measure__what_is_declared_is_no_default(tmp_path):
    folder = folder_of(tmp_path / "images", [(20, 30)] * 4)
    opened = open_model(TwoLayers().eval(), mean=MEAN, std=STD, input_size=(3, 16, 16))
    found = measure(opened, folder, **QUIET)
    assert shown_size(found) == (3, 16, 16)
    assert opened.undeclared == ()
    assert found.record["model"]["undeclared"] == []
    assert not any("does not say" in note for note in found.record["notes"])


def test_measure__only_what_is_missing_is_a_default(tmp_path):
    folder = folder_of(tmp_path / "images", [(20, 30)] * 4)
    found = measure(open_model(TwoLayers().eval(), input_size=(3, 16, 16)), folder, **QUIET)
    (note,) = (note for note in found.record["notes"] if "does not say" in note)
    assert "pixels" not in note
    assert "'?mean=(0.5,0.5,0.5)&std=(0.5,0.5,0.5)'" in note


def test_measure__a_probe_set_has_its_size():
    probe_set = ProbeSet.from_array(np.zeros((4, 12, 12, 3), np.uint8), open_model(TwoLayers(), input_size=(3, 12, 12))
                                    .preprocessing)  # fmt: skip
    found = measure(TwoLayers().eval(), probe_set, **QUIET)
    assert shown_size(found) == (3, 12, 12)
    assert any("probe set" in note for note in found.record["notes"])


def test_open_model__a_factory_and_a_transformers_folder_without_processor_declare_nothing(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    assert open_model("py:layercrit.demo:small_resnet").undeclared == ("input_size", "mean", "std")
    named = open_model("py:layercrit.demo:small_resnet?mean=(0.2,)&std=(0.3,)&input_size=(1,28,28)")
    assert named.undeclared == ()
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "hf")
    assert open_model(f"hf:{tmp_path / 'hf'}").undeclared == ("input_size", "mean", "std")
    given = open_model(f"hf:{tmp_path / 'hf'}", mean=MEAN, std=STD)
    assert (given.undeclared, given.mean) == (("input_size",), MEAN)
    assert open_model(timm.create_model("test_resnet").eval()).undeclared == ()
    assert open_model(timm.create_model("test_resnet", num_classes=7).eval()).undeclared == ("mean", "std")
    assert open_model("timm:test_resnet?pretrained=false").undeclared == ()
    torch.save(open_model("timm:test_resnet?pretrained=false").network.state_dict(), tmp_path / "weights.pth")
    reference = f"file:{tmp_path / 'weights.pth'}?arch=timm:test_resnet"
    assert open_model(reference).undeclared == ("mean", "std"), "timm's are those of its own weights"
    assert open_model(f"{reference}&mean=(0.1,0.1,0.1)").undeclared == ("std",)
    assert open_model("torchvision:resnet18:none").undeclared == ()


# guessing


@pytest.mark.parametrize(("n_right", "n_images", "share"), [(0, 50, 0.1), (5, 50, 0.1), (11, 50, 0.1), (50, 50, 0.9)])
def test_p_of_guessing__is_the_exact_binomial_test(n_right, n_images, share):
    expected = binomtest(n_right, n_images, share, alternative="greater").pvalue
    assert p_of_guessing(n_right, n_images, share) == pytest.approx(expected, rel=1e-9)


def labelled(accuracy, counts, network, images):
    """Labels of which a share is what the network says, the others wrong; of given classes where counts are given."""
    with torch.no_grad():
        said = network(torch.from_numpy(images).float() / 255).argmax(dim=1).numpy()
    wrong = np.arange(len(images)) >= round(accuracy * len(images))
    return np.where(wrong, (said + 1) % 5, said) if counts is None else np.repeat(np.arange(len(counts)), counts)


def warnings_with(labels, images):
    network = TwoLayers().eval()
    opened = open_model(network, mean=(0,) * 3, std=(1,) * 3, input_size=(3, 8, 8))
    return measure(opened, ProbeSet.from_array(images, opened.preprocessing, labels=labels), **QUIET).summary()


@pytest.fixture(scope="module")
def noise():
    """Images of which the network takes some for one class and some for another."""
    colours = np.random.default_rng(1).integers(0, 256, (60, 3, 1, 1), dtype=np.uint8)
    return np.broadcast_to(colours, (60, 3, 8, 8)).copy()


@pytest.mark.parametrize(("accuracy", "warned"), [(1.0, False), (0.0, True)])
def test_measure__warns_of_an_accuracy_no_better_than_guessing(accuracy, warned, noise):
    summary = warnings_with(labelled(accuracy, None, TwoLayers().eval(), noise), noise)
    assert summary["top1_accuracy"] == pytest.approx(accuracy)
    assert bool(summary["warnings"]) == warned


def test_predictions__always_the_largest_class_is_guessing_too():
    """75 % right is far above one class in ten, but no better than to name always a class that 75 % of images have."""
    from layercrit.engine.predictions import _against_guessing

    mostly = np.repeat([3, 4], [75, 25])
    assert _against_guessing(0.75, mostly, 10)["guessing_accuracy"] == 0.75
    assert _against_guessing(0.75, mostly, 10)["p_guessing"] > 0.4
    assert _against_guessing(0.95, mostly, 10)["p_guessing"] < 1e-6
    assert _against_guessing(1.0, np.array([3, 3, 3, 4]), 10) == {"guessing_accuracy": 0.75}, "too few to tell"
    only = np.full(20, 3)
    assert _against_guessing(1.0, only, 10) == {"guessing_accuracy": 0.1, "p_guessing": pytest.approx(1e-20, rel=1e-6)}


def test_predictions__without_labels_nothing_is_said(noise):
    assert warnings_with(None, noise)["warnings"] == []
    assert Predictions(10, None, 0.2, 0.1, None, None).warnings() == []


# published networks


@needs_real_files
def test_measure__a_published_network_without_its_settings(tmp_path, monkeypatch):
    """At 32 x 32 with its mean and SD it names 83 % right; left to defaults, all of them are said."""
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    stored = np.load(IMAGES)
    for label in range(10):
        (tmp_path / "cifar" / f"c{label}").mkdir(parents=True)
        for number, pixels in enumerate(stored["images"][stored["labels"] == label][:4]):
            Image.fromarray(pixels).save(tmp_path / "cifar" / f"c{label}" / f"{number:02}.png")
    reference = f"file:{WEIGHTS}?arch=py:cifar_networks:ResNet20"
    how = {**QUIET, "layers": "linear", "dtype": "float32"}
    left = measure(reference, tmp_path / "cifar", **how)
    assert shown_size(left) == (3, 32, 32)
    assert left.record["model"]["undeclared"] == ["input_size", "mean", "std"]
    told = measure(open_model(reference, mean=MEAN, std=STD), tmp_path / "cifar", **how)
    assert told.summary()["top1_accuracy"] > 0.75 > left.summary()["top1_accuracy"]
    assert told.summary()["warnings"] == []
    large = measure(open_model(reference, mean=MEAN, std=STD, input_size=(3, 96, 96)), tmp_path / "cifar", **how)
    assert large.summary()["top1_accuracy"] < 0.2
    assert len(large.summary()["warnings"]) == 1


def test_command__says_defaults_and_warnings_beside_the_table(tmp_path, monkeypatch, noise):
    from click.testing import CliRunner

    labels = labelled(0.0, None, TwoLayers().eval(), noise)
    np.savez(tmp_path / "noise.npz", images=noise, labels=labels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    arguments = ["measure", "py:test_model_input:TwoLayers", "--images", "noise.npz", "--trials", "1", "--out", "out"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("warning: top-1 accuracy 0.0% is no better than guessing")
    assert "8 x 8 pixels" in result.stdout
    assert "mean 0" in result.stdout
    assert "2 layers, 1 trial, " in result.stderr
    record = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert len(record["warnings"]) == len(record["summary"]["warnings"]) == 1


def small_network(channels, convolution):
    with seeded(3):
        first = [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()] if convolution else []
        return nn.Sequential(*first, nn.Flatten(), nn.Linear((4 if convolution else channels) * 64, 3)).eval()


@pytest.mark.parametrize("convolution", [True, False], ids=["convolution", "none"])
@pytest.mark.parametrize("kind", ["array", "tensor", "npy", "npz", "floats", "channels last"])
def test_measure__grey_images_without_an_axis_of_channels_are_those_with_one(kind, convolution, tmp_path):
    network, images = small_network(1, convolution), pieces(12, 8)[..., 0]  # (n_images, height, width)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images=images)
    given = {
        "array": images,
        "tensor": torch.from_numpy(images.copy()),
        "npy": tmp_path / "x.npy",
        "npz": tmp_path / "x.npz",
        "floats": images.astype(np.float32) / 255,
        "channels last": images[..., None],
    }[kind]
    settings = {"trials": 2, "progress": False, "device": "cpu"}
    expected = measure(network, images[:, None], **settings)
    sized = open_model(network, input_size=(1, 8, 8))
    for model in (network, sized):
        found = measure(model, given, **settings)
        assert found.per_image["cosine"].tolist() == expected.per_image["cosine"].tolist()
        assert found.record["probe_set"]["sha256"] == expected.record["probe_set"]["sha256"]
    assert (expected.per_image["cosine"] > 1e-3).any()


def test_measure__grey_images_for_a_network_of_three_channels_are_three_times_the_same():
    network, images = small_network(3, True), pieces(12, 8)[..., 0]
    settings = {"trials": 2, "progress": False, "device": "cpu"}
    grey = measure(network, images, **settings)
    coloured = measure(network, np.repeat(images[..., None], 3, axis=3), **settings)
    assert grey.per_image["cosine"].tolist() == coloured.per_image["cosine"].tolist()


# what is said before a measurement


@pytest.mark.parametrize(
    ("n_images", "settings", "said"),
    [
        (9, {}, "1 layer, 1 trial, 9 images of 3 x 20 x 20 pixels as they are; mean"),
        (5, {}, "1 layer, 1 trial, 5 images of 3 x 20 x 20 pixels as they are; mean"),
        (
            9,
            {"input_size": (3, 10, 10)},
            "1 layer, 1 trial, 9 images of 3 x 10 x 10 pixels, resized to 10 (bilinear); mean",
        ),
    ],
)
def test_measure__says_how_many_images_it_uses_and_what_becomes_of_them(tmp_path, capfd, n_images, settings, said):
    images = folder_of(tmp_path / "images", [(20, 20)] * 9)
    model = open_model(TwoLayers(), **settings)
    measure(model, str(images), trials=1, n_images=n_images, layers="fc")
    assert said in capfd.readouterr().err
