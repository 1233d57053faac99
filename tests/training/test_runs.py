import csv
import errno
import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from layercrit.errors import TrainingError
from layercrit.training.runs import RunFolder

RECORD = {"method": "baseline", "top1_accuracy": 0.5}


def tensors(value=1.0):
    return {"weight": torch.full((2, 3), value), "n": torch.tensor(4)}


def state(number):
    return {"step": number, "learner": tensors(number), "about": "{}", "ema": None, "groups": [{"lr": 0.5}]}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def files(folder):
    return sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())


# --- what is written ------------------------------------------------------------------------------------------------


def test_save_epoch__keeps_values_types_and_shapes(folder):
    turned = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    saved = {"half": torch.ones(2).half(), "turned": turned, "slice": torch.arange(6)[1::2], "n": torch.tensor(3)}
    folder.save_epoch(7, saved)
    assert files(folder) == ["epochs/epoch-0007.safetensors"]
    loaded = load_file(folder.path / "epochs" / "epoch-0007.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert all(loaded[name].dtype == saved[name].dtype for name in saved)


def test_save_epoch__tied_tensors_are_written_twice(folder):
    network = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    network["b"].weight = network["a"].weight
    folder.save_epoch(0, network.state_dict())
    loaded = load_file(folder.path / "epochs" / "epoch-0000.safetensors")
    assert torch.equal(loaded["a.weight"], loaded["b.weight"])
    fresh = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    fresh.load_state_dict(loaded)
    assert torch.equal(fresh["b"].weight, network["a"].weight)


def test_save_log__is_a_row_an_epoch(folder):
    rows = [
        {"epoch": 1, "phase": "a, b", "top1_accuracy": None},
        {"epoch": 2, "phase": "x", "top1_accuracy": 0.25},
    ]
    folder.save_log([])
    folder.save_log(rows)
    read = list(csv.DictReader((folder.path / "log.csv").open(newline="")))
    assert read == [
        {"epoch": "1", "phase": "a, b", "top1_accuracy": ""}, {"epoch": "2", "phase": "x", "top1_accuracy": "0.25"}
    ]  # fmt: skip


def test_save_final__writes_the_record_last_and_removes_states(folder):
    folder.save_state(state(1), 1)
    (folder.path / "state" / ".step-00000002.pt.part").write_bytes(b"of a process that was killed")
    record = folder.save_final(tensors(), RECORD)
    assert files(folder) == ["model.json", "model.safetensors"]
    assert not (folder.path / "state").exists()
    sha256 = hashlib.sha256((folder.path / "model.safetensors").read_bytes()).hexdigest()
    assert folder.finished() == record == RECORD | {"sha256": sha256}
    assert json.loads((folder.path / "model.json").read_text()) == folder.finished()


def test_save_final__without_a_record_nothing_is_finished(folder, monkeypatch):
    folder.save_state(state(1), 1)
    with pytest.raises(TypeError):
        folder.save_final(tensors(), RECORD | {"no": object()})  # stands for a crash between the two files
    assert folder.weights.is_file()
    assert folder.finished() is None
    assert folder.load_state()[0]["step"] == 1


# --- power cuts -----------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_writes__a_crash_leaves_what_was_there(folder, monkeypatch, at):
    folder.save_epoch(0, tensors(1.0))
    folder.save_log([{"epoch": 1}])
    folder.save_state(state(1), 1)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}

    def cut(*_):
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync" if at == "fsync" else "pathlib.Path.replace", cut)
        for write in (
            lambda: folder.save_epoch(0, tensors(2.0)), lambda: folder.save_log([{"epoch": 2}]),
            lambda: folder.save_state(state(2), 2), lambda: folder.save_final(tensors(), RECORD),
        ):  # fmt: skip
            with pytest.raises(PowerCut):
                write()
    assert {path: path.read_bytes() for path in before} == before
    assert folder.finished() is None
    found, problems = folder.load_state()
    assert (found["step"], problems) == (1, []), "half a state is taken for one"
    folder.save_state(state(2), 2)
    folder.save_final(tensors(), RECORD)
    assert folder.finished() is not None
    assert not (folder.path / "state").exists()


def test_writes__data_are_on_the_disk_before_they_have_their_name(folder, monkeypatch):
    events = []
    monkeypatch.setattr("os.fsync", lambda file: events.append(("synced", os.fstat(file).st_size)))
    replace = type(folder.path).replace
    monkeypatch.setattr(type(folder.path), "replace", lambda a, b: (events.append(("named", b.name)), replace(a, b))[1])
    folder.save_log([{"epoch": 1}])
    assert events == [("synced", len("epoch\r\n1\r\n")), ("named", "log.csv")]


def test_writes__a_full_disk_is_one_clear_message(folder, monkeypatch):
    folder.save_epoch(0, tensors(1.0))
    kept = (folder.path / "epochs" / "epoch-0000.safetensors").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match=r"epoch-0000\.safetensors cannot be written \(No space left on device\)"):
        folder.save_epoch(0, tensors(2.0))
    assert files(folder) == ["epochs/epoch-0000.safetensors"]
    assert (folder.path / "epochs" / "epoch-0000.safetensors").read_bytes() == kept


# --- states ---------------------------------------------------------------------------------------------------------


def test_save_state__the_last_two_are_kept(folder):
    assert folder.last_state() == "No state was saved yet."
    for step in (5, 90, 100, 1000):  # whose names sort as their numbers
        folder.save_state(state(step), step)
        assert folder.load_state()[0]["step"] == step
        assert folder.last_state() == f"The last saved state is {folder.path}/state/step-{step:08d}.pt."
    assert files(folder) == ["state/step-00000100.pt", "state/step-00001000.pt"]


def test_load_state__returns_what_was_saved(folder):
    assert folder.load_state() == (None, [])
    folder.save_state(state(3), 3)
    found, problems = folder.load_state()
    assert problems == []
    assert torch.equal(found["learner"]["weight"], tensors(3)["weight"])
    assert {key: value for key, value in found.items() if key != "learner"} == {
        "step": 3, "about": "{}", "ema": None, "groups": [{"lr": 0.5}]
    }  # fmt: skip


def test_load_state__every_cut_and_every_flipped_bit_is_found(folder):
    folder.save_state(state(1), 1)
    folder.save_state(state(2), 2)
    path = folder.path / "state" / "step-00000002.pt"
    whole = path.read_bytes()
    generator = random.Random(0)
    damaged = [whole[: generator.randrange(len(whole))] for _ in range(30)]
    for _ in range(30):
        place = generator.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :])
    for content in [b"", *damaged]:
        path.write_bytes(content)
        found, problems = folder.load_state()
        assert found["step"] == 1
        assert problems == [f"{path} is damaged or incomplete, so it is skipped"]


def test_load_state__says_what_was_wrong_with_each(folder):
    folder.save_state(state(1), 1)
    folder.save_state(state(2), 2)
    first, second = (folder.path / "state" / f"step-0000000{step}.pt" for step in (1, 2))
    first.write_bytes(b"")
    second.write_bytes(hashlib.sha256(b"no state").digest() + b"no state")
    found, problems = folder.load_state()
    assert found is None
    assert [problem.partition(" ")[0] for problem in problems] == [str(second), str(first)]
    assert problems[0].startswith(f"{second} cannot be read (")
    second.unlink()
    second.mkdir()
    assert folder.load_state()[1][0] == f"{second} cannot be read (IsADirectoryError), so it is skipped"


# --- finished runs --------------------------------------------------------------------------------------------------


def test_finished__needs_weights_and_record(folder):
    assert folder.finished() is None
    folder.save_final(tensors(), RECORD)
    assert folder.finished()["top1_accuracy"] == 0.5
    folder.weights.unlink()
    assert folder.finished() is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"method": "baseline"}', b"\xff\xfe", b'"method"']
)
def test_finished__a_broken_record(folder, content):
    folder.save_final(tensors(), RECORD)
    folder.record.write_bytes(content)
    with pytest.raises(
        TrainingError, match=r"model\.json is not the record of a training run \(.*\)\. Choose another --out"
    ):
        folder.finished()
