import contextlib
import json
import random
import urllib.error
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
import transformers
from PIL import Image
from torch import nn
from torchvision import models as torchvision_models
from torchvision.transforms.v2.functional import center_crop

from layercrit.errors import CheckpointError, ModelError
from layercrit.models.hubs import _agrees_with_hf, timm_input, torchvision_input
from layercrit.models.references import is_here, open_model
from layercrit.probes.images import Preprocessing

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 6,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and empty caches of the hubs in a temporary directory."""

    def refuse(url, *arguments, **options):
        raise urllib.error.URLError(f"no network for {url}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if hasattr(
        transformers.utils.hub, "TRANSFORMERS_CACHE"
    ):  # of older versions, which read the constant when imported
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture
def drawn():
    """Build something under a seed of its own."""

    def build(factory, seed=11):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return factory()

    return build


def cached_on_hub(cache, repository, files):
    """Lay out files as huggingface_hub stores a downloaded repository."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def photograph(height=150, width=190):
    """Smooth colours with edges, so that another filter or a shifted crop changes pixels."""
    generator = np.random.default_rng(8)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) * 255 / (height + width)], axis=2)
    blocks = generator.integers(0, 120, (height // 10, width // 10, 3)).repeat(10, axis=0).repeat(10, axis=1)
    return Image.fromarray(((smooth + blocks) % 256).astype(np.uint8))


def seen_by_network(image, mean, std, preprocessing):
    """What a model's network is given for an image: the pixels of its preprocessing, normalised."""
    model = open_model(nn.Identity().eval(), mean=mean, std=std)
    pixels = torch.from_numpy(preprocessing(image))[None].to(torch.float32).div(255)  # (1, channels, height, width)
    return pixels.sub(model.classifier.mean).div(model.classifier.std)[0]


# timm


def test_timm__fresh(drawn):
    model = open_model("timm:test_resnet?pretrained=false")
    assert model.reference == "timm:test_resnet?pretrained=false"
    assert model.architecture == "timm:test_resnet"
    assert model.initialiser == "timm.create_model('test_resnet', pretrained=False)"
    assert model.preprocessing == Preprocessing(3, 160, 160, 168, "bilinear")
    assert not any(module.training for module in model.network.modules())
    assert model.n_classes == 1000
    assert same_state(model.network, drawn(lambda: timm.create_model("test_resnet"), seed=0))
    assert same_state(drawn(model.build), drawn(lambda: timm.create_model("test_resnet")))


def test_timm__seed():
    first, again, other = (open_model(f"timm:test_vit?pretrained=false&seed={seed}") for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.architecture == "timm:test_vit"


def test_timm__weights_from_the_cache(tmp_path, drawn):
    trained = drawn(lambda: timm.create_model("test_resnet"))
    content = safetensors.torch.save(trained.state_dict())
    cached_on_hub(tmp_path / "hub", "timm/test_resnet.r160_in1k", {"model.safetensors": content})
    model = open_model("timm:test_resnet.r160_in1k")
    assert same_state(model.network, trained)
    assert same_state(open_model("timm:test_resnet").network, trained)
    assert model.architecture == "timm:test_resnet"
    assert not same_state(model.build(), trained)
    with pytest.raises(
        ModelError, match=r"was trained on 1000 classes; with num_classes=10 its last layer would be ran"
    ):
        open_model("timm:test_resnet?num_classes=10")


def test_timm__offline():
    with pytest.raises(ModelError, match=r"timm:test_resnet: its files are neither cached.*HF_HOME.*pretrained=false"):
        open_model("timm:test_resnet")


def test_timm__options():
    model = open_model("timm:test_vit?pretrained=false&num_classes=7&img_size=96&global_pool=avg")
    assert model.architecture == "timm:test_vit?global_pool=avg&img_size=96&num_classes=7"
    assert model.n_classes == 7
    assert (model.preprocessing.height, model.preprocessing.width, model.preprocessing.resize) == (96, 96, 101)
    assert model.build().num_classes == 7


def test_timm__grey(drawn):
    grey = "timm:test_resnet?pretrained=false&in_chans=1"
    with pytest.raises(ModelError, match=r"mean has 3 values .* expected one for each of 1 channels"):
        open_model(grey)
    model = open_model(f"{grey}&mean=(0.2,)&std=(0.3,)")
    assert (model.mean, model.std, model.preprocessing.channels) == ((0.2,), (0.3,), 1)
    assert model.n_classes == 1000


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("timm:resnet5O", r"timm has no model 'resnet5O'. Did you mean 'resnet50'"),
        ("timm:resnet5O", r"A network of your own is py:MODULE:FUNCTION; .*'\?arch=py:MODULE:FUNCTION'"),
        ("timm:resnet50.a1_in1", r"timm has no weights 'resnet50.a1_in1'. Did you mean 'resnet50.a1_in1k'"),
        ("timm:resnet18?pretrained=false&num_clases=3", r"unexpected keyword.*\{'num_clases': 3\}.*'num_classes'"),
        ("timm:resnet18?pretrained=false&num_classes=x", r"could not be opened.*\{'num_classes': 'x'\}"),
        ("timm:resnet18?checkpoint_path=x.pth", "option 'checkpoint_path' would load other weights. Use 'file:PATH"),
        ("timm:test_vit?seed=none", "seed must be a whole number .*; got None"),
    ],
)
def test_timm__refuses(reference, message):
    with pytest.raises(ModelError, match=message):
        open_model(reference)


def test_timm__architecture_without_published_weights():
    name = next(n for n in timm.list_models("resnet*") if not timm.list_pretrained(f"{n}.*"))
    with pytest.raises(ModelError, match=f"timm publishes no weights of '{name}'. Add"):
        open_model(f"timm:{name}")


def timm_settings():
    """One network's worth of settings for each way that timm prepares images for its published weights."""
    ways = {}
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name).to_dict()
        data = timm.data.resolve_data_config(pretrained_cfg=config)
        way = (data["input_size"], data["crop_pct"], data["interpolation"], data["crop_mode"])
        if max(data["input_size"]) <= 320:
            ways.setdefault(way, (name, config))
    return ways.values()


def test_timm_input__is_timms_own_evaluation_transform_for_all_published_weights():
    image, n_compared = photograph(), 0
    for name, config in timm_settings():
        network = nn.Identity()
        network.pretrained_cfg = config
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
        if network.pretrained_cfg.get("crop_mode") == "border":
            continue
        mean, std, preprocessing = timm_input(network, {})
        assert torch.equal(seen_by_network(image, mean, std, preprocessing), transform(image)), name
        n_compared += 1
    assert n_compared > 30


@pytest.mark.parametrize(
    "settings",
    [{"crop_mode": "border"}, {"crop_mode": "center", "input_size": (3, 224, 192)}],
    ids=["border", "center-not-square"],
)
def test_timm_input__without_counterpart(settings):
    network = nn.Identity()
    network.pretrained_cfg = {"input_size": (3, 224, 224), **settings}
    with pytest.raises(
        ModelError, match=r"crop mode '(border|center)' at 224 x (224|192), which layercrit does not support"
    ):
        timm_input(network, {})


# hf-hub


HUB_CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 12,
    "pretrained_cfg": {
        "num_classes": 12,
        "input_size": [3, 64, 64],
        "crop_pct": 1.0,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_mode": "center",
        "first_conv": "conv1.0",
        "classifier": "fc",
    },
}


def test_hf_hub__from_the_cache(tmp_path, drawn):
    trained = drawn(lambda: timm.create_model("test_resnet", num_classes=12))
    files = {
        "config.json": json.dumps(HUB_CONFIG).encode(),
        "model.safetensors": safetensors.torch.save(trained.state_dict()),
    }
    cached_on_hub(tmp_path / "hub", "someone/net", files)
    model = open_model("hf-hub:someone/net")
    assert same_state(model.network, trained)
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.preprocessing == Preprocessing(3, 64, 64, 64, "bilinear")
    assert (model.reference, model.architecture, model.n_classes) == ("hf-hub:someone/net", "timm:test_resnet", 12)
    assert model.build().num_classes == 12
    assert not same_state(open_model("hf-hub:someone/net?pretrained=false").network, trained)


def test_hf_hub__offline():
    with pytest.raises(ModelError, match="hf-hub:someone/net: its files are neither cached"):
        open_model("hf-hub:someone/net")


# torchvision


def torch_cache(tmp_path, weights, content):
    path = tmp_path / "torch" / "hub" / "checkpoints" / Path(weights.url).name
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    return path


def test_torchvision__fresh(drawn):
    model = open_model("torchvision:squeezenet1_1:none?num_classes=5")
    assert (model.architecture, model.n_classes) == ("torchvision:squeezenet1_1?num_classes=5", 5)
    assert model.initialiser == "torchvision.models.get_model('squeezenet1_1', weights=None)"
    assert same_state(model.network, open_model("torchvision:squeezenet1_1?pretrained=false&num_classes=5").network)
    assert same_state(drawn(model.build), drawn(lambda: torchvision_models.squeezenet1_1(num_classes=5)))
    assert not model.network.training


@pytest.mark.parametrize("suffix", ["", ":DEFAULT", ":IMAGENET1K_V1"])
def test_torchvision__weights_from_the_cache(tmp_path, drawn, suffix):
    trained = drawn(torchvision_models.squeezenet1_1)
    torch_cache(tmp_path, torchvision_models.SqueezeNet1_1_Weights.DEFAULT, trained.state_dict())
    model = open_model(f"torchvision:squeezenet1_1{suffix}")
    assert same_state(model.network, trained)
    assert model.preprocessing == Preprocessing(3, 224, 224, 256, "bilinear")
    assert model.mean == (0.485, 0.456, 0.406)
    assert not same_state(model.build(), trained)


def test_torchvision__code_in_the_cache_is_not_run(tmp_path):
    marker = tmp_path / "code-was-run"

    class RunsCode:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = torch_cache(tmp_path, torchvision_models.SqueezeNet1_1_Weights.DEFAULT, {"x": RunsCode()})
    with pytest.raises(CheckpointError, match=r"more than plain weights: .*call _?io\.open"):
        open_model("torchvision:squeezenet1_1")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_torchvision__weights_of_other_classes(tmp_path, drawn):
    weights = torchvision_models.SqueezeNet1_1_Weights.DEFAULT
    torch_cache(tmp_path, weights, drawn(torchvision_models.squeezenet1_1).state_dict())
    with pytest.raises(ModelError, match=r"could not be opened .*expected value 1000 but got 5"):
        open_model("torchvision:squeezenet1_1?num_classes=5")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:resnet19", "A network of your own is py:MODULE:FUNCTION"),
        ("torchvision:deeplabv3_resnet50", "torchvision has no classifier 'deeplabv3_resnet50'"),
        ("torchvision:resnet50:IMAGENET1K_V3", "has no weights 'IMAGENET1K_V3'. Did you mean 'IMAGENET1K_V[12]'"),
        (
            "torchvision:squeezenet1_1",
            "torchvision:squeezenet1_1: its files are neither cached.*no network.*TORCH_HOME",
        ),
        ("torchvision:squeezenet1_1:none?num_clases=5", "could not be opened .*Did you mean 'num_classes'"),
    ],
)
def test_torchvision__refuses(reference, message):
    with pytest.raises(ModelError, match=message):
        open_model(reference)


def test_torchvision_input__is_torchvisions_own_transform_for_all_classifiers():
    image, compared = photograph(), set()
    for name in torchvision_models.list_models(module=torchvision_models):
        for weights in torchvision_models.get_model_weights(name):
            mean, std, preprocessing = torchvision_input(weights)
            if preprocessing not in compared and preprocessing.height <= 320:
                assert torch.equal(seen_by_network(image, mean, std, preprocessing), weights.transforms()(image)), (
                    weights
                )
                compared.add(preprocessing)
    assert len(compared) > 5


# transformers


@pytest.fixture
def vit(tmp_path, drawn):
    """A tiny classifier saved to a folder, and the folder."""
    network = drawn(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY_VIT))).eval()
    network.save_pretrained(tmp_path / "vit")
    return network, tmp_path / "vit"


def test_hf__folder(vit, drawn):
    network, folder = vit
    model = open_model(f"hf:{folder}")
    assert same_state(model.network, network)
    assert model.architecture.startswith("hf:ViTForImageClassification-")
    assert model.preprocessing == Preprocessing(3, 32, 32, 32, "bilinear")
    assert (model.mean, model.std, model.n_classes) == ((0.0,) * 3, (1.0,) * 3, 6)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.classifier(images), network(images / 255).logits)
    built = drawn(model.build, seed=12)
    assert not same_state(built, network)
    assert same_state(built, drawn(model.build, seed=12))


def test_hf__exports(vit):
    classifier = open_model(f"hf:{vit[1]}").classifier
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(classifier, (images,))
        assert torch.equal(exported.module()(images), classifier(images))


def test_hf__home_and_fresh(vit, monkeypatch):
    network, folder = vit
    monkeypatch.setenv("HOME", str(folder.parent))
    fresh = open_model("hf:~/vit?pretrained=false")
    assert not same_state(fresh.network, network)
    assert fresh.sha256 == open_model("hf:~/vit?pretrained=false").sha256
    assert fresh.architecture == open_model("hf:~/vit").architecture
    assert open_model("hf:~/vit?pretrained=false&num_labels=4").n_classes == 4


def test_hf__from_the_cache(vit, tmp_path):
    network, folder = vit
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    cached_on_hub(tmp_path / "hub", "someone/vit", {path.name: path.read_bytes() for path in folder.iterdir()})
    model = open_model("hf:someone/vit")
    assert same_state(model.network, network)
    assert model.mean == (0.5,) * 3


def test_hf__cached_without_its_processor_is_refused(vit, tmp_path):
    _, folder = vit
    cached_on_hub(tmp_path / "hub", "someone/vit", {path.name: path.read_bytes() for path in folder.iterdir()})
    with pytest.raises(
        ModelError, match=r"hf:someone/vit \(no folder here, so a repository of the hub\): its files are neither cached"
    ):
        open_model("hf:someone/vit")


def test_hf__half_precision_is_opened_in_single(vit):
    network, folder = vit
    network.to(torch.float16).save_pretrained(folder)
    model = open_model(f"hf:{folder}")
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert {p.dtype for p in model.build().parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (("ViTImageProcessor", {"size": {"height": 30, "width": 40}}), Preprocessing(3, 30, 40, (30, 40), "bilinear")),
        (
            ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "resample": 3}),
            Preprocessing(3, 224, 224, 256, "bicubic", crop_offset="rounded down"),
        ),
        (
            ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "resample": 3}),
            Preprocessing(3, 384, 384, (384, 384), "bicubic"),
        ),
        (
            ("BitImageProcessor", {}),
            Preprocessing(3, 224, 224, 224, "bicubic", crop_offset="rounded down"),
        ),
        (("DeiTImageProcessor", {}), Preprocessing(3, 224, 224, (256, 256), "bicubic")),
        (
            ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "do_normalize": False}),
            Preprocessing(3, 224, 224, (224, 224)),
        ),
        (("ViTImageProcessor", {"do_rescale": False}), Preprocessing(3, 224, 224, (224, 224))),
    ],
    ids=["vit", "convnext", "convnext-384", "bit", "deit", "factor", "not-rescaled"],
)
def test_hf__processor(vit, processor, expected):
    """What the network is given is, up to resampling on other hardware types, what the processor gives."""
    _, folder = vit
    name, settings = processor
    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(folder)
    model = open_model(f"hf:{folder}")
    assert model.preprocessing == expected
    image = photograph(400, 500)
    theirs = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0])
    ours = seen_by_network(image, model.mean, model.std, model.preprocessing)
    assert ((theirs - ours).abs() * torch.tensor(model.std).view(-1, 1, 1)).mean() < 0.003


def crops_alike(processor, model, height, width):
    """Whether the network is given, up to resampling, what the processor gives for an image of this size."""
    image = photograph(400, 400).crop((0, 0, width, height))
    theirs = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0])
    ours = seen_by_network(image, model.mean, model.std, model.preprocessing)
    return ((theirs - ours).abs() * torch.tensor(model.std).view(-1, 1, 1)).mean() < 0.003


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("CLIPImageProcessor", {}),
        ("ViTImageProcessor", {}),
        ("BitImageProcessor", {"size": {"shortest_edge": 235}}),  # 11 pixels more than its crop
        ("DeiTImageProcessor", {"size": {"height": 255, "width": 263}}),  # 31 and 39 more
    ],
)
def test_hf__crops_the_pixels_that_the_processor_crops(vit, name, settings, backend):
    """Torchvision rounds offsets of 43.5, 59.5 and 63.5 up, transformers down, in both kinds of processor."""
    if not hasattr(transformers, name + backend):
        pytest.skip("transformers before version 5 has no such processors")
    _, folder = vit
    getattr(transformers, name)(**settings).save_pretrained(folder)
    model = open_model(f"hf:{folder}")
    processor = getattr(transformers, name + backend)(**settings)
    resize = model.preprocessing.resize
    shorter = resize if isinstance(resize, int) else 256  # which is then not resized
    for longer in (311, 343, 344, 345, 346, 347, 351):
        assert crops_alike(processor, model, shorter, longer)
        assert crops_alike(processor, model, longer, shorter)


def test_hf__crops_as_processors_do_that_round(vit, monkeypatch):
    """As torchvision's crop, which some processors of transformers 4 call."""
    if not hasattr(transformers, "BitImageProcessorPil"):
        pytest.skip("before version 5, transformers gives crops other arguments")
    _, folder = vit
    kind = transformers.BitImageProcessor
    kind().save_pretrained(folder)
    monkeypatch.setattr(
        kind, "center_crop", lambda self, image, size, **_: center_crop(image, [size.height, size.width])
    )
    model = open_model(f"hf:{folder}")
    assert model.preprocessing == Preprocessing(3, 224, 224, 224, "bicubic")
    assert all(crops_alike(kind(), model, 224, longer) for longer in range(311, 315))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LevitImageProcessor", {}),
        ("EfficientNetImageProcessor", {}),
        ("MobileViTImageProcessor", {}),
        ("PoolFormerImageProcessor", {"size": {"shortest_edge": 384}}),
    ],
)
def test_hf__processor_without_counterpart(vit, name, settings):
    _, folder = vit
    getattr(transformers, name)(**settings).save_pretrained(folder)
    with pytest.raises(ModelError, match=f"{name} prepares images in a way that layercrit does not support"):
        open_model(f"hf:{folder}")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": Preprocessing(3, 224, 224, 257, "bilinear", crop_offset="rounded down")},
        {"shape": Preprocessing(3, 224, 224, 256, "bilinear")},
        {"mean": (0.5, 0.502, 0.5)},
        {"std": (0.5, 0.5, 0.505)},
    ],
    ids=["resize", "crop", "mean", "std"],
)
def test_agrees_with_hf__notices_small_differences(change):
    processor = transformers.MobileNetV2ImageProcessor()
    shape = Preprocessing(3, 224, 224, 256, "bilinear", crop_offset="rounded down")
    right = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "shape": shape}
    assert _agrees_with_hf(processor, **right)
    assert not _agrees_with_hf(processor, **{**right, **change})


def test_hf__untrained_classifier_is_refused(vit):
    network, folder = vit
    network.vit.save_pretrained(folder / "backbone")
    with pytest.raises(ModelError, match=r"has no trained values for \['classifier.bias', 'classifier.weight'\]"):
        open_model(f"hf:{folder / 'backbone'}")


def test_hf__pickled_weights_are_not_read(vit):
    network, folder = vit
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model.safetensors"):
        open_model(f"hf:{folder}")


def test_hf__code_of_a_repository_is_not_run(vit, tmp_path):
    _, folder = vit
    marker = tmp_path / "code-was-run"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Net: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="could not be opened"):
        open_model(f"hf:{folder}")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "hf:someone/nothing",
            r"hf:someone/nothing \(no folder here, so a repository of the hub\): its files are neither cached",
        ),
        ("hf:{folder}?num_label=4", "has no option 'num_label'. Did you mean 'num_labels'"),
        ("hf:{folder}?num_labels=4", "could not be opened"),
        ("hf:{folder}/nowhere", "its files are neither cached|could not be opened"),
    ],
)
def test_hf__refuses(vit, reference, message):
    with pytest.raises(ModelError, match=message):
        open_model(reference.format(folder=vit[1]))


# All


@pytest.mark.parametrize(
    "reference",
    [
        "timm:test_vit?pretrained=false",
        "torchvision:squeezenet1_1:none",
        "hf:{folder}",
        "timm:resnet5O",
        "hf:{folder}?x=1",
    ],
)
def test_sources__leave_random_states_alone(vit, reference):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = states()
    with contextlib.suppress(ModelError):
        open_model(reference.format(folder=vit[1]))
    assert states() == before


# What is on this machine


def test_is_here__timm_on_the_hub(tmp_path):
    assert not is_here("timm:test_resnet")
    cached_on_hub(tmp_path / "hub", "timm/test_resnet.r160_in1k", {"config.json": b"{}"})
    assert not is_here("timm:test_resnet"), "its configuration is not its weights"
    cached_on_hub(tmp_path / "hub", "timm/resnet50.a1_in1k", {"model.safetensors": b""})
    cached_on_hub(tmp_path / "hub", "timm/resnet18.a1_in1k", {"pytorch_model.bin": b""})
    assert is_here("timm:resnet50.a1_in1k")
    assert is_here("timm:resnet18.a1_in1k")
    assert not is_here("timm:resnet50.a2_in1k")


def test_is_here__timm_from_an_address(tmp_path):
    assert not is_here("timm:resnet50.a1_in1k")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet50_a1_0-14fe96d1.pth").touch()
    assert is_here("timm:resnet50.a1_in1k")
    assert not is_here("timm:resnet50.a2_in1k")


def test_is_here__timm_without_weights():
    assert is_here("timm:" + next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}.*")))


def test_is_here__torchvision(tmp_path):
    weights = torchvision_models.ResNet50_Weights
    assert not is_here("torchvision:resnet50")
    torch_cache(tmp_path, weights.IMAGENET1K_V2, {})
    assert is_here("torchvision:resnet50"), "the default weights"
    assert is_here("torchvision:resnet50:DEFAULT")
    assert is_here("torchvision:resnet50:IMAGENET1K_V2")
    assert not is_here("torchvision:resnet50:IMAGENET1K_V1")
    assert is_here("torchvision:resnet50:none")
    with pytest.raises(ModelError, match=r"resnet50 has no weights 'IMAGENET1K_V3'\. Did you mean 'IMAGENET"):
        is_here("torchvision:resnet50:IMAGENET1K_V3")


def test_is_here__hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "nets").mkdir()
    for kind in ("hf", "hf-hub"):
        assert not is_here(f"{kind}:someone/net")
    cached_on_hub(tmp_path / "hub", "someone/net", {"model.safetensors": b""})
    for kind in ("hf", "hf-hub"):
        assert is_here(f"{kind}:someone/net")
        assert not is_here(f"{kind}:someone/other")
    assert is_here(f"hf:{tmp_path / 'nets'}")
    assert is_here("hf:~/nets")


@pytest.mark.parametrize("kind", ["py", "file"])
def test_is_here__what_never_comes_from_a_network(kind):
    assert is_here(f"{kind}:anything")
