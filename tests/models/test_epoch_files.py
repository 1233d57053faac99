"""Checkpoints of any training, by epoch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layercrit.errors import CheckpointError, LayercritError
from layercrit.models.epoch_files import as_epoch_of, epoch_files
from layercrit.models.references import open_model
from training_runs import write_run

ARCH = "py:conditioned_studies:network"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("epoch_7.pt", 7), ("epoch-0012.safetensors", 12), ("epoch=12-step=300.ckpt", 12), ("check_90.pth.tar", 90),
        ("resnet18-Epoch3.pth", 3), ("net_ep05.bin", 5), ("0.pt", 0), ("v2 epoch.4 of 9.pt", 4),
    ],
)  # fmt: skip
def test_epoch_files__the_epoch_in_a_name(folder, name, epoch):
    touch(name)
    assert epoch_files([name]) == {epoch: Path(name)}


def test_epoch_files__all_ways_to_name_them_are_equal(folder):
    touch("ckpt/epoch_0.pt", "ckpt/epoch_2.pt", "ckpt/epoch_10.pt", "ckpt/best.pt", "ckpt/log 3.txt")
    expected = {epoch: Path(f"ckpt/epoch_{epoch}.pt") for epoch in (0, 2, 10)}
    for given in (
        "ckpt/epoch_*.pt", "ckpt", Path("ckpt"), "ckpt/epoch_10.pt, ckpt/epoch_0.pt,ckpt/epoch_2.pt",
        "2=ckpt/epoch_2.pt,0=ckpt/epoch_0.pt,10=ckpt/epoch_10.pt", list(expected.values()),
        {str(epoch): str(path) for epoch, path in reversed(expected.items())},
    ):  # fmt: skip
        found = epoch_files(given)
        assert list(found.items()) == list(expected.items()), given
    whole = epoch_files(f"{folder}/*/epoch_*.pt")
    assert list(whole) == [0, 2, 10]
    assert epoch_files("5=ckpt/best.pt,ckpt/epoch_0.pt") == {0: Path("ckpt/epoch_0.pt"), 5: Path("ckpt/best.pt")}


def test_epoch_files__names_with_commas_and_equals_signs(folder):
    touch("a,b/epoch=1,loss=0.3.ckpt", "3=x.pt")
    assert epoch_files("a,b/epoch=1,loss=0.3.ckpt") == {1: Path("a,b/epoch=1,loss=0.3.ckpt")}
    assert epoch_files("3=x.pt") == {3: Path("3=x.pt")}, "a file of this name is meant, not the file x.pt"


def test_epoch_files__folder_of_a_training_run(folder):
    run = write_run(folder / "run", {n: {"w": torch.zeros(1)} for n in (0, 3)})
    assert epoch_files(run) == {n: run / "epochs" / f"epoch-{n:04d}.safetensors" for n in (0, 3)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a/epoch_2.pt,b/epoch_2.pt", ["Two files are of epoch 2", "a/epoch_2.pt", "b/epoch_2.pt"]),
        ("2=a/epoch_2.pt,2=b/epoch_2.pt", ["Two files are of epoch 2"]),
        ("a/epoch_3.pt", ["no file a/epoch_3.pt", "epoch_2.pt", "'0,2,5'"]),
        ("c/epoch_*.pt", ["No file is named like c/epoch_*.pt"]),
        ("7=a/none.pt", ["no file a/none.pt for epoch 7"]),
        ("a/best.pt", ["no number", "5=a/best.pt"]),
        ("a/r18-9.pt", ["several numbers (18, 9)", "5=a/r18-9.pt"]),
        ("a", ["a/r18-9.pt has several numbers (18, 9)"]),
        ("empty", ["No weight file in empty has an epoch in its name", "best.pt"]),
        ({3: "a/none.pt"}, ["no file a/none.pt for epoch 3"]),
        ([], ["no weight file"]),
    ],
)
def test_epoch_files__mistakes_name_the_way_out(folder, given, words):
    touch("a/epoch_2.pt", "b/epoch_2.pt", "a/best.pt", "a/r18-9.pt", "empty/best.pt")
    with pytest.raises(CheckpointError) as raised:
        epoch_files(given)
    for word in words:
        assert word in str(raised.value), raised.value


def test_as_epoch_of__opens_the_file_as_the_model(folder):
    """Architecture, normalisation, size, key and prefix are those of the model, whatever kind its reference is of."""
    network = open_model(f"{ARCH}?seed=1").network
    state = {name: value + 1 for name, value in network.state_dict().items()}
    torch.save({"ema": {f"net.{name}": value for name, value in state.items()}, "model": {}}, "epoch_1.pt")
    save_file(network.state_dict(), "last.safetensors")
    Path("last.json").write_text(f'{{"arch": "{ARCH}?mean=(0.5,)&input_size=(3,2,2)"}}')
    models = {
        f"file:last.safetensors?arch={ARCH}": ((0.5,) * 3, (3, 2, 2)),
        f"file:last.safetensors?arch={ARCH}&key=ema&prefix=net.&mean=(0.2,0.2,0.2)": ((0.2,) * 3, (3, 2, 2)),
        f"{ARCH}?seed=5&mean=(0.1,0.2,0.3)&pretrained=false": ((0.1, 0.2, 0.3), (3, 224, 224)),
    }
    for model, (mean, size) in models.items():
        opened = open_model(as_epoch_of(model, Path("epoch_1.pt")))
        assert all(torch.equal(opened.network.state_dict()[name], value) for name, value in state.items()), model
        shape = opened.preprocessing
        assert (opened.mean, (shape.channels, shape.height, shape.width)) == (mean, size), model
    with pytest.raises(LayercritError, match="does not say its architecture"):
        as_epoch_of("file:epoch_1.pt", Path("epoch_1.pt"))
