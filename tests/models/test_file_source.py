import pytest
import torch

from layercrit.errors import CheckpointError
from layercrit.models.checkpoints import read_checkpoint
from layercrit.models.file_source import record_file, weight_file
from training_runs import write_run


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
