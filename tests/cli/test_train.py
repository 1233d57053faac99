"""`layercrit train` and `layercrit methods`: in this process, and in another one where signals matter."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from forked import begin
from layercrit.cli.root import cli, main
from layercrit.models.references import open_model
from layercrit.training import METHODS, get_method
from layercrit.training.methods import CATEGORIES
from training_images import ARCHITECTURE, write_images

STUDY = f"""
[images]
source = "stripes.npz"
input_size = [1, 12, 12]
resize = 0
[training]
arch = "{ARCHITECTURE}"
data = "stripes.npz"
epochs = 1
settings = {{ batch_size = 48 }}
[[models]]
name = "<plain>"
method = "baseline"
[[models]]
name = "smooth"
method = "baseline"
settings = {{ lr = 0.02 }}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with images and a study file."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "stripes.npz")
    (tmp_path / "small.toml").write_text(STUDY.replace("<plain>", "b plain"))
    return tmp_path


def arguments(**changes):
    """A command that trains a model in less than a second, with some options changed, or left out where None."""
    options = {"method": "baseline", "arch": ARCHITECTURE, "data": "stripes.npz", "epochs": "1", "out": "run",
               "device": "cpu"} | changes  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None]
    return ["train", "--set", "batch_size=48", *(part for pair in pairs for part in pair)]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command as the entry point does; return its exit code and what it printed."""

    def run(*command):
        monkeypatch.setattr(sys, "argv", ["layercrit", *command])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return stopped.value.code or 0, printed.out, printed.err

    return run


# --- one model ------------------------------------------------------------------------------------------------------


def test_train__tells_accuracy_place_and_what_to_do_next(here, call):
    code, out, err = call(*arguments())
    record = json.loads((here / "run" / "model.json").read_text())
    right = f"{100 * record['top1_accuracy']:.1f}% top-1 accuracy on 48 held-out images after 1 epoch"
    assert (code, out) == (0, f"baseline: {right} ({record['seconds']:.0f} s).\n")
    assert "Saved in run: model.safetensors, model.json, log.csv, epochs." in err
    assert "Next: layercrit measure file:run --images SOURCE" in err
    open_model("file:run")
    code, out, _ = call(*arguments())
    assert code == 0
    assert out.splitlines()[0] == "run already contains this run; nothing was trained."
    assert right in out


def test_train__options_reach_the_run(here, call):
    more = ["--set", "lr=0.05", "--set", "optimizer=adamw", "--set", "batch_size=32"]
    options = {
        "seed": "5",
        "epochs": "3",
        "keep_epochs": "1, 3",
        "weights_dtype": "float16",
        "out": "a run",
        "workers": "1",
    }
    code, out, err = call(*arguments(**options), *more, "--input-size", "1", "16", "20")
    assert code == 0, err
    record = json.loads((here / "a run" / "model.json").read_text())
    assert (record["seed"], record["epochs"], record["weights_dtype"]) == (5, 3, "float16")
    assert {name: record["settings"][name] for name in ("lr", "optimizer", "batch_size", "epochs")} == {
        "lr": 0.05, "optimizer": "adamw", "batch_size": 32, "epochs": 3
    }  # fmt: skip
    assert "input_size=(1,16,20)" in record["arch"]
    kept = sorted(path.name for path in (here / "a run" / "epochs").iterdir())
    assert kept == [f"epoch-000{epoch}.safetensors" for epoch in (0, 1, 3)]
    assert "after 3 epochs" in out
    assert "layercrit measure 'file:a run' --images" in err


def test_train__several_processes_speak_with_one_voice(here, call, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call(*arguments()) == (0, "", "")
    assert call("train", "--study", "small.toml", "--device", "cpu") == (0, "", "")
    assert (here / "models" / "smooth" / "model.json").is_file()


@pytest.mark.parametrize(
    ("changes", "more", "code", "text"),
    [
        ({"method": None, "out": None}, [], 2, "Missing --method, --out (or give --study FILE)."),
        ({"arch": None, "data": None}, [], 2, "Missing --arch, --data (or give --study FILE)."),
        ({}, ["plain"], 2, "Unexpected argument 'plain': names of models need --study."),
        ({"method": "basline"}, [], 1, "There is no training method 'basline'. Did you mean 'baseline'"),
        ({}, ["--set", "lr"], 2, "expected key=value; got 'lr'."),
        ({}, ["--set", "=3"], 2, "expected key=value; got '=3'."),
        ({}, ["--set", "learning_rate=3"], 1, "The method baseline has no setting 'learning_rate'."),
        ({}, ["--set", "lr=fast"], 1, "baseline: lr must be a number from 0; got 'fast'."),
        ({}, ["--set", "batch_size=1.5"], 1, "baseline: batch_size must be a whole number from 1; got '1.5'."),
        ({}, ["--set", "schedule=cosin"], 1, "must be one of cosine, step; got 'cosin'. Did you mean 'cosine'"),
        ({"epochs": "0"}, [], 2, "0 is not in the range x>=1"),
        ({"keep_epochs": "1,last"}, [], 2, "expected epoch numbers such as '1,5,10'; got '1,last'."),
        ({"seed": "-1"}, [], 2, "-1 is not in the range 0<=x<="),
        ({"seed": str(2**64)}, [], 2, "is not in the range"),
        ({"precision": "fp8"}, [], 2, "'fp8' is not one of 'no', 'bf16', 'fp16'"),
        ({"device": "abacus"}, [], 2, "'abacus' is not one of"),
        ({"data": "stripse.npz"}, [], 1, "Did you mean 'stripes.npz'"),
        ({"arch": "timm:resnet1"}, [], 1, "Did you mean 'resnet1"),
        ({"arch": "resnet18"}, [], 1, "timm:resnet18"),
        ({"arch": "file:run"}, [], 1, "refers to trained weights; expected an architecture, such as timm:resnet18."),
        ({"arch": "timm:vit_tiny_patch16_224"}, [], 1, "Try another --input-size"),
        ({}, ["--input-size", "2", "8", "8"], 1, "input_size must be channels (1 or 3), height and width; got 2 8 8."),
        ({"out": "stripes.npz"}, [], 1, "stripes.npz"),
        ({}, ["--set", "lr=1e30"], 1, "Try a lower lr, more warmup_epochs or a clip_norm: --set lr=..."),
        ({"study": "small.toml"}, [], 2, "--set cannot be combined with --study: the file defines how"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list | dict) else "",
)
def test_train__mistakes_are_one_clear_message(here, call, changes, more, code, text):
    found, out, err = call(*arguments(**changes), *more)
    assert text in " ".join(err.split())
    assert (found, out) == (code, "")
    assert "bug" not in err
    assert not (here / "run" / "model.json").exists()


def test_train__another_run_is_not_replaced(here, call):
    call(*arguments())
    before = (here / "run" / "model.safetensors").read_bytes()
    code, out, err = call(*arguments(seed="1"))
    assert (code, out) == (1, "")
    assert "Error: run contains another training run: seed is 0, but 1 was requested. Choose another --out" in err
    assert (here / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("interruptible")
def test_train__ctrl_c_and_the_same_command_goes_on(here):
    def begun():
        return begin(*arguments(epochs="500"), cwd=here, out=here / "printed", err=here / "said")

    process = begun()
    started = time.monotonic()
    while not list(here.glob("run/state/*.pt")):
        assert process.exitcode is None, (here / "said").read_text()
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert (here / "printed").read_text() == ""
    assert [line for line in (here / "said").read_text().splitlines() if line] == [
        "Run the same command again to resume; at most the last minute of training is lost.", "Interrupted."
    ]  # fmt: skip
    done = max(int(path.stem.removeprefix("step-")) for path in here.glob("run/state/*.pt"))

    (here / "said").unlink()
    process = begun()
    try:
        while not (here / "said").exists() or "\n" not in (here / "said").read_text():
            assert time.monotonic() - started < 180
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert (here / "said").read_text().partition("\n")[0] == f"Resuming run after {done} of 1000 steps."


# --- the models of a study file -------------------------------------------------------------------------------------


def test_train_study__trains_those_named_then_the_rest(here, call):
    code, out, err = call("train", "--study", "small.toml", "smooth", "--device", "cpu")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["model", "smooth"]
    code, out, err = call("train", "--study", "small.toml", "--device", "cpu", "--workers", "0", "--keep-epochs", "1")
    assert code == 0, err
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ["model", "method", "top-1", "accuracy", "time"]
    for name, row in (("b plain", table[1][1:]), ("smooth", table[2])):
        record = json.loads((here / "models" / name / "model.json").read_text())
        assert row[1:3] == ["baseline", f"{100 * record['top1_accuracy']:.1f}%"]
    assert "smooth: " in err
    assert "Next: layercrit study run small.toml" in err


def test_train_study__failures_end_with_1(here, call):
    text = (here / "small.toml").read_text().replace("lr = 0.02", "lr = 1e30")
    (here / "small.toml").write_text(text)
    code, out, err = call("train", "--study", "small.toml", "--device", "cpu")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["model", "b"]
    assert "smooth failed: The loss became " in err
    assert err.endswith("1 could not be trained: smooth.\n")
    assert "Next" not in err


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["smoth"], 1, "trains no model 'smoth'. Did you mean 'smooth'?"),
        (
            ["--epochs", "3"],
            2,
            "--epochs cannot be combined with --study: the file defines how its models are trained.",
        ),
        (["--seed", "0"], 2, "--seed cannot be combined with --study"),
        (["--set", "lr=1"], 2, "--set cannot be combined with --study"),
        (["--weights-dtype", "float16"], 2, "--weights-dtype cannot be combined with --study"),
        (["--input-size", "1", "8", "8"], 2, "--input-size cannot be combined with --study"),
        (["--out", "run"], 2, "--out cannot be combined with --study"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_study__mistakes(here, call, more, code, text):
    found, out, err = call("train", "--study", "small.toml", *more)
    assert text in err
    assert (found, out) == (code, "")
    assert not (here / "models").exists()


def test_train_study__file_with_mistakes(here, call):
    assert "cannot be read" in call("train", "--study", "smal.toml")[2]
    (here / "small.toml").write_text(STUDY.replace('method = "baseline"\nsettings', 'method = "basline"\nsettings'))
    code, _, err = call("train", "--study", "small.toml")
    assert code == 1
    assert "has 2 mistakes" in err
    assert "Did you mean 'baseline'" in err
    assert "name must be fit for a folder" in err


# --- methods --------------------------------------------------------------------------------------------------------


def printed(*command):
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_methods__lists_all_by_category():
    lines = printed("methods").splitlines()
    assert lines[0].split() == ["method", "what", "it", "changes", "paper"]
    categories = [line.strip() for line in lines[1:] if line.strip() in CATEGORIES and not line.startswith(" ")]
    assert categories == list(CATEGORIES)
    for name, cls in METHODS.items():
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert cls.changes.split()[0] in line
        assert line.rstrip()[-4:].isdecimal(), "the year of the paper is not shown"


def test_methods__json():
    listed = json.loads(printed("methods", "--json"))
    assert {one["name"]: one["category"] for one in listed} == {name: cls.category for name, cls in METHODS.items()}
    assert all(one["changes"] and one["paper"] for one in listed)


@pytest.mark.parametrize("name", METHODS)
def test_methods__settings_of_one(name):
    method = get_method(name)
    found = json.loads(printed("methods", name, "--json"))
    assert {key: one["default"] for key, one in found["settings"].items()} == method.changed()
    assert all(one["text"] for one in found["settings"].values())
    assert (found["name"], found["paper"]) == (name, method.paper)
    shown = printed("methods", name)
    assert shown.startswith(f"{name} ({method.category}): {method.changes}\n{method.paper}\n")
    rows = [line.split()[0] for line in shown.splitlines()[4:] if line.strip() and not line.startswith(" ")]
    assert rows == list(found["settings"])
    assert "learning rate schedule (one of cosine, step)" in shown


def test_methods__an_unknown_one(call):
    assert call("methods", "simclt") == (1, "", "Error: There is no training method 'simclt'. Did you mean 'simclr'?\n")


# --- help -----------------------------------------------------------------------------------------------------------


def test_help__lists_both_commands_without_torch():
    listed = " ".join(printed("--help").split())
    assert "methods List the training methods" in listed
    assert "train Train a model by a method, or those of a study." in listed
    code = """
import sys, layercrit.cli.root as c
for arguments in (["--help"], ["methods", "--help"]):
    c.cli(arguments, standalone_mode=False)
print("torch" in sys.modules or "rich" in sys.modules)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")


def test_help__of_train_lists_the_methods():
    shown = " ".join(printed("train", "--help").split())
    assert "The same command resumes an interrupted run." in shown
    assert f"{', '.join(METHODS)}." in shown
