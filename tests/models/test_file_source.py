import argparse
import datetime
import enum
import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from cifar_networks import IMAGES, MEAN, STD, WEIGHTS, needs_real_files
from layercrit import open_model
from layercrit.errors import CheckpointError, ModelError
from layercrit.models.checkpoints import read_checkpoint
from layercrit.models.file_source import record_file, weight_file
from layercrit.models.references import without_weights
from layercrit.resets import get_reset, given_donor
from training_runs import write_run

FAMILY = Path(str(files("layercrit"))) / "family"
SMALL = "py:layercrit.demo:small_resnet?mean=(0.286,)&std=(0.353,)&input_size=(1,28,28)"


@pytest.fixture
def run(tmp_path):
    """A finished training run in the folder ``tmp_path / "run"``."""
    values = {"w": torch.zeros(2)}
    return write_run(tmp_path / "run", {0: values, 5: values, 12345: values}, "timm:resnet18", values)


def test_weight_file__files_are_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "w.pth"
    for made in (False, True):
        if made:
            path.touch()
        assert weight_file(path) == weight_file(str(path)) == weight_file("~/w.pth") == path


def test_weight_file__the_one_file_of_a_folder(run, tmp_path):
    assert weight_file(run) == weight_file(f"{run}/") == run / "model.safetensors"
    (run / "other.safetensors").touch()
    assert weight_file(run) == run, "which of the two is not said"
    with pytest.raises(CheckpointError, match="is a directory; expected one weight file"):
        read_checkpoint(weight_file(run))
    assert weight_file(tmp_path) == tmp_path


def test_weight_file__epochs_of_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run)
    for epoch, name in [("0", "0000"), ("5", "0005"), ("0005", "0005"), ("12345", "12345")]:
        assert weight_file(f"{run}@epoch={epoch}") == run / "epochs" / f"epoch-{name}.safetensors"
    assert weight_file("~/run@epoch=5") == weight_file(run).parent / "epochs" / "epoch-0005.safetensors"
    assert weight_file("../run@epoch=5").resolve() == weight_file(f"{run}@epoch=5")


def test_weight_file__what_has_that_very_name_goes_first(run):
    file = run.with_name("run@epoch=5")
    file.touch()
    assert weight_file(f"{run}@epoch=5") == file
    other = run.with_name("run@epoch=0")
    other.mkdir()
    (other / "w.safetensors").touch()
    assert weight_file(f"{run}@epoch=0") == other / "w.safetensors"
    inside = write_run(run.parent / "a@epoch=1", {3: {"w": torch.zeros(1)}})
    assert weight_file(f"{inside}@epoch=3") == inside / "epochs" / "epoch-0003.safetensors"


@pytest.mark.parametrize("number", ["6", "-1", "last", "", "5.0", "\u0665", "9" * 200])
def test_weight_file__no_such_epoch(run, number):
    with pytest.raises(CheckpointError, match=r"run did not keep the weights of epoch '.*it kept: 0, 5, 12345\.$"):
        weight_file(f"{run}@epoch={number}")


def test_weight_file__no_training_run(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"no training folder .*/runn\. In its dir.*Did you mean 'run'\?"):
        weight_file(tmp_path / "runn@epoch=0")
    with pytest.raises(
        CheckpointError, match=r"epoch '0'\. Epochs that it kept: none, it is not the folder of a training run"
    ):
        weight_file(f"{tmp_path}@epoch=0")
    with pytest.raises(CheckpointError, match=r"There is no training folder .*model.safetensors"):
        weight_file(run / "model.safetensors@epoch=0")


def test_weight_file__a_run_that_has_not_finished(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"run has no final weights yet.* such as .*/run@epoch=12345\."):
        weight_file(run)
    assert weight_file(f"{run}@epoch=5").is_file()


def test_weight_file__what_no_file_can_be_named(tmp_path):
    long = tmp_path / ("x" * 5000)
    assert weight_file(long) == long
    with pytest.raises(CheckpointError, match=r"cannot be read: .*File name too long"):
        read_checkpoint(weight_file(long))


def test_record_file(run, tmp_path):
    assert record_file(tmp_path / "w.pth") == tmp_path / "w.json"
    assert record_file(run / "model.safetensors") == run / "model.json"
    epoch = run / "epochs" / "epoch-0005.safetensors"
    assert record_file(epoch) == run / "model.json"
    assert record_file(epoch.with_name("best.safetensors")) == epoch.with_name("best.json")
    epoch.with_suffix(".json").touch()
    assert record_file(epoch) == epoch.with_suffix(".json")


# Files as training scripts write them: the network that opens is the trained one, bit for bit and by its accuracy


class Schedule(enum.Enum):
    COSINE = "cosine"


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def untrained(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def averaged(state):
    """As ``torch.optim.swa_utils.AveragedModel`` saves it."""
    return {**under("module.", state), "n_averaged": torch.tensor(3)}


def lightning(state):
    return {
        "epoch": 5,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **under("model.", state),
            "criterion.weight": torch.ones(10),
            "train_acc.total": torch.tensor(9),
        },
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {
            "root": Path("/data"),
            "args": argparse.Namespace(schedule=Schedule.COSINE, started=datetime.datetime(2024, 1, 1)),
            "norm_layer": torch.nn.BatchNorm2d,
        },
    }


WRITTEN = {
    "plain": (lambda s: s, "", 0),
    "counters-as-floats": (lambda s: {name: tensor.float() for name, tensor in s.items()}, "", 0),
    "average": (averaged, "", 1),
    "lightning": (lightning, "", 2),
    "compiled-in-parallel": (lambda s: {"model": under("module._orig_mod.", s), "step": np.float64(3)}, "", 0),
    "fsdp-inside": (
        lambda s: {f"_fsdp_wrapped_module.{name.replace('.', '._orig_mod.', 1)}": tensor for name, tensor in s.items()},
        "",
        1,
    ),
    "timm-average": (lambda s: {"state_dict": untrained(s), "state_dict_ema": s}, "&key=state_dict_ema", 0),
    "teacher": (lambda s: {**under("student.", untrained(s)), **under("teacher.", s)}, "&prefix=teacher.", 1),
    "numbered": (lambda s: {"model": {**under("0.", untrained(s)), **under("1.", s)}}, "&prefix=1.", 1),
    "bare-beside-average": (lambda s: {**s, **under("ema.", untrained(s))}, "&prefix=", 1),
    "bare-with-average-inside": (lambda s: {**s, "ema": untrained(s)}, "&key=", 1),
    "odd-entries": (lambda s: {**s, "epoch": 3, "config": {"lr": 0.1}}, "", 1),
}


def trained(name="baseline"):
    return safetensors.torch.load_file(FAMILY / name / "model.safetensors")


def accuracy(model, path=FAMILY / "fashion-mnist-test.npz", n_images=500):
    """Share of right answers, of the network that was opened."""
    data = np.load(path)
    images = torch.from_numpy(data["images"][:n_images])
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        return float((model.classifier(images).argmax(1).numpy() == data["labels"][:n_images]).mean())


def same_network(model, state):
    opened = model.network.state_dict()
    return opened.keys() == state.keys() and all(torch.equal(opened[name], state[name]) for name in state)


@pytest.mark.parametrize("name", WRITTEN)
def test_file__opens_as_the_trained_network(tmp_path, name):
    write, options, n_notes = WRITTEN[name]
    state = trained()
    torch.save(write(state), tmp_path / "w.pth")
    model = open_model(f"file:{tmp_path}/w.pth?arch={SMALL}{options}")
    assert same_network(model, state)
    assert accuracy(model) == accuracy(open_model(f"file:{FAMILY / 'baseline'}")) > 0.85
    assert len(model.notes) == n_notes, model.notes
    assert not model.network.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_file__weights_in_half_precision(tmp_path, dtype):
    state = trained()
    torch.save({name: tensor.to(dtype) for name, tensor in state.items() if "num_" not in name}, tmp_path / "w.pth")
    model = open_model(f"file:{tmp_path}/w.pth?arch={SMALL}")
    rounded = {name: tensor.to(dtype).float() for name, tensor in state.items() if "num_" not in name}
    assert all(torch.equal(model.network.state_dict()[name], tensor) for name, tensor in rounded.items())
    assert accuracy(model) == pytest.approx(accuracy(open_model(f"file:{FAMILY / 'baseline'}")), abs=0.02)


@pytest.mark.parametrize(
    "name", ["timm-average", "teacher", "numbered", "bare-beside-average", "bare-with-average-inside"]
)
def test_file__several_networks_are_not_chosen_among(tmp_path, name):
    torch.save(WRITTEN[name][0](trained()), tmp_path / "w.pth")
    with pytest.raises(CheckpointError):
        open_model(f"file:{tmp_path}/w.pth?arch={SMALL}")


def test_file__the_other_network_is_the_other_one(tmp_path):
    other = trained("simclr")
    torch.save({**under("student.", trained()), **under("teacher.", other)}, tmp_path / "w.pth")
    model = open_model(f"file:{tmp_path}/w.pth?arch={SMALL}&prefix=teacher")
    assert same_network(model, other)
    assert accuracy(model) == accuracy(open_model(f"file:{FAMILY / 'simclr'}"))


def test_given_donor__files_with_something_beside_the_network(tmp_path):
    torch.save(averaged(trained("simclr")), tmp_path / "w.pth")
    donor = given_donor(tmp_path / "w.pth", get_reset("rewind"), open_model(f"file:{FAMILY / 'baseline'}"), [])
    assert all(torch.equal(donor.values[name], tensor) for name, tensor in trained("simclr").items())
    assert "left over beside the network 'module.', and not used: 'n_averaged'" in donor.origin


@needs_real_files
@pytest.mark.parametrize("wrap", [None, averaged, lightning], ids=["published", "average", "lightning"])
def test_file__published_network(tmp_path, wrap, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    path, published = WEIGHTS, read_checkpoint(WEIGHTS).tensors
    published = {name.removeprefix("module."): tensor for name, tensor in published.items()}
    if wrap is not None:
        path = tmp_path / "w.pth"
        torch.save(wrap(published), path)
    model = open_model(f"file:{path}?arch=py:cifar_networks:ResNet20", mean=MEAN, std=STD, input_size=(3, 32, 32))
    opened = model.network.state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in published.items())
    if wrap is None:  # the others are the same network
        assert accuracy(model, IMAGES, 2000) == pytest.approx(0.8175, abs=0.002)


# Architectures that the file names


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Weights for a network of the user's in ``w.safetensors``; a function returns them with a record of their arch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)  # another test's
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef small(width=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, width))\n"
    )
    weights = {"1.weight": torch.ones(5, 12), "1.bias": torch.zeros(5)}

    def write(arch):
        write_run(tmp_path / "run", {0: weights}, arch, weights)
        safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
        (tmp_path / "w.json").write_text(json.dumps({"arch": arch}))

    yield write
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize("file", ["run", "run@epoch=0", "w.safetensors"])
@pytest.mark.parametrize(
    "arch",
    [
        "py:os:system?command=touch PWNED",
        "py:layercrit.demo:copy_family?folder=PWNED",
        "py:layercrit.models.own_networks:import_here?module=my_nets",
        "py:my_nets:small",
    ],
)
@pytest.mark.parametrize("use", [open_model, without_weights])
def test_file__code_that_a_file_names_is_not_run(named, tmp_path, file, arch, use):
    named(arch)
    name = re.escape(f"'file:{file}?arch={arch.partition('?')[0]}'")
    with pytest.raises(ModelError, match=f"code that a file names is not run. If you know .*: {name}"):
        use(f"file:{file}")
    assert not Path("PWNED").exists()
    assert "my_nets" not in sys.modules


def test_file__a_function_that_the_user_names_gets_the_options_of_the_file(named):
    named("py:my_nets:small?width=5&mean=(0.5,0.5,0.5)&input_size=(3,2,2)")
    for file in ("run", "run@epoch=0", "w.safetensors"):
        model = open_model(f"file:{file}?arch=py:my_nets:small")
        assert (model.architecture, model.mean) == ("py:my_nets:small?width=5", (0.5,) * 3)
    assert open_model("file:run?arch=py:my_nets:small&mean=(0.1,0.1,0.1)").mean == (0.1,) * 3
    assert open_model("file:run?arch=py:my_nets:small?width=5&input_size=(3,2,2)").mean == (0.0,) * 3
    with pytest.raises(ModelError, match="no module 'others'"):
        open_model("file:run?arch=py:others:small")


# Paths with a question mark


@pytest.mark.parametrize("name", ["what?.pth", "a?b=c.pth", "why?/w.pth"])
@pytest.mark.parametrize("options", ["", f"?arch={SMALL}"])
def test_file__question_mark_in_a_path(tmp_path, name, options):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(trained(), path)
    for reference in (f"file:{path}{options}", f"{path}{options}"):
        with pytest.raises((ModelError, CheckpointError), match=r"question mark.*options.*(rename|link)") as caught:
            open_model(reference)
        assert str(path.relative_to(tmp_path)).partition("/")[0] in str(caught.value)
    with pytest.raises(ModelError, match="question mark"):
        open_model(f"hf:{path}{options}")
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    assert same_network(open_model(f"file:{link}?arch={SMALL}"), trained())


def test_file__question_mark_hint_only_where_it_is_the_reason(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        open_model(f"file:{tmp_path}/missing.pth?arch={SMALL}")
    assert "question mark" not in str(caught.value)
    torch.save(trained(), tmp_path / "w.pth")
    with pytest.raises(ModelError) as caught:
        open_model(f"file:{tmp_path}/w.pth?arch")
    assert "question mark" not in str(caught.value)
