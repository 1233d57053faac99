"""The command `layercrit advise`."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import layercrit
from layercrit.advice import advise
from layercrit.cli.root import cli
from layercrit.measurement import Measurement
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from running_jobs import Inline
from small_studies import OPTIONS, write_study
from small_subjects import PIXELS, QUIET, two_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    layercrit.measure(two_layers(), PIXELS, trials=3, distances=[], **QUIET).save(folder)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_study(read_study_file(write_study(folder / "own", n_images=8)), folder / "out", executor=Inline())
    return folder / "out"


def call(*arguments):
    result = CliRunner().invoke(cli, ["advise", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return result, str(result.exception)
    return result, result.stderr


def test_advise__of_a_measurement(saved):
    result, _ = call(saved, "--for", "freeze", "--budget", "30%")

    expected = advise(Measurement.load(saved), "freeze", 0.3)
    assert result.exit_code == 0
    for row in expected.to_pandas().to_dict("records"):
        (line,) = [line for line in result.stdout.splitlines() if "no." in line and row["layer"] in line.split()[:2]]
        assert line.startswith("frozen") == row["chosen"]
        assert f"{row['criticality']:.3f}" in line
        assert f"{row['low']:.3f} - {row['high']:.3f}" in line


@pytest.mark.parametrize("form", ["json", "list", "regex", "peft", "nncf", "groups"])
def test_advise__formats(saved, form):
    result, said = call(saved, "--for", "finetune", "--budget", 0.9, "--format", form)

    assert result.stdout == advise(Measurement.load(saved), "finetune", 0.9).to(form)
    assert "to be fine-tuned" in said


def test_advise__files(saved, tmp_path):
    call(saved, "--for", "quantise", "--bits", "8,2", "--out", tmp_path / "a.json", "--plot", tmp_path / "a.png")

    assert json.loads((tmp_path / "a.json").read_text())["bits"] == [8, 2]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for option in ("--out", "--plot"):
        result, said = call(saved, "--for", "freeze", option, tmp_path / "missing" / "a.png")
        assert result.exit_code != 0
        assert "cannot be written" in said


def test_advise__of_a_study(study):
    result, _ = call(study, "--for", "prune", "--of", "weights", "--model", "m1", "--format", "json")

    told, rows = json.loads(result.stdout), layercrit.load_study(study).to_pandas()
    assert told["model"] == "m1"
    of_table = {row["layer"]: row["criticality"] for row in told["table"]}
    assert of_table == pytest.approx(rows[rows["model"] == "m1"].set_index("layer")["criticality"].to_dict(), abs=1e-12)


def test_advise__channels_of_a_study_are_coupled(study):
    pytest.importorskip("torch_pruning")
    result, _ = call(study, "--for", "prune", "--model", "m0", "--budget", 0.1, "--format", "json")

    rows = {row["layer"]: row for row in json.loads(result.stdout)["table"]}
    assert rows["layer1.0.conv3"]["knob"] == rows["layer1.1.conv3"]["knob"] == "layer1.0.conv3"
    assert rows["layer1.0.conv3"]["rank"] == rows["layer1.1.conv3"]["rank"]
    assert rows["fc"]["rank"] is None
    assert "classes" in rows["fc"]["reason"]
    found = advise(study, "prune", 0.1, model="m0", knobs="channels", fixed="conv1").layers.set_index("layer")
    assert not found.loc[["conv1", "fc"], "chosen"].any()
    assert found.loc["conv1", "reason"] == "fixed: left as it is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{study}", "--for", "freeze"], "m0, m1. Name it with --model"),
        (["{study}", "--for", "freeze", "--model", "m2"], "no model 'm2'"),
        (["{study}", "--for", "freeze", "--model", "m0", "--reset", "zero"], "no reset 'zero'"),
        (["{saved}", "--for", "freeze", "--model", "m0"], "choose from a study"),
        (["{saved}", "--for", "freeze", "--budget", "much"], "not a number or a percentage"),
        (["{saved}", "--for", "freeze", "--budget", "130%"], "at most 1"),
        (["{saved}", "--for", "quantise", "--bits", "8;4"], "not a list of whole numbers"),
        (["nowhere", "--for", "freeze"], "--images to measure it on"),
        (["{saved}", "--for", "train"], "'train' is not one of"),
    ],
)
def test_advise__what_cannot_be(study, saved, arguments, message):
    result, said = call(*(one.format(study=study, saved=saved) for one in arguments))

    assert result.exit_code != 0
    assert message in said


def test_advise__measures_a_model_first(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = study.parent / "own" / "m0.safetensors"
    np.save(tmp_path / "images.npy", np.load(study.parent / "own" / "images.npz")["images"])
    reference = f"file:{weights}?{OPTIONS}"

    result, said = call(reference, "--for", "freeze", "--images", "images.npy", "--trials", 2, "--format", "json")
    (folder,) = tmp_path.glob("layercrit-*")

    assert json.loads(result.stdout)["chosen"] == advise(Measurement.load(folder), "freeze").chosen
    assert Measurement.load(folder).cells["trial"].nunique() == 2
    assert str(folder.name) in said
    again, said = call(reference, "--for", "freeze", "--images", "images.npy")
    assert again.exit_code != 0
    assert f"layercrit advise {folder.name}" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "freeze", "--ratio", "0.3"], "--ratio goes only with --for prune"),
        (["--for", "freeze", "--bits", "8,2"], "--bits goes only with --for quantise"),
        (["--for", "quantise", "--of", "weights"], "--of goes only with --for prune"),
        (["--for", "freeze", "--n-images", "5"], "--n-images goes only with --images"),
    ],
)
def test_advise__options_that_would_say_nothing(saved, options, message):
    result, said = call(saved, *options)

    assert result.exit_code == 2
    assert message in said


def test_advise__asks_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    for options in (["--budget", "30"], ["--model", "m"]):
        result, _ = call("nowhere.pt", "--for", "freeze", "--images", "nowhere", *options)
        assert result.exit_code != 0
        assert list(tmp_path.iterdir()) == []


def test_advise__a_reference_longer_than_a_file_name():
    result, said = call("timm:" + "x" * 300, "--for", "freeze")

    assert result.exit_code != 0
    assert "--images to measure it on" in said


def test_advise__of_sets_in_a_study(tmp_path):
    path = write_study(tmp_path / "own", n_models=1, n_images=4, protocol={"sets": "pairs", "layers": "conv1,fc"})
    run_study(read_study_file(path), tmp_path / "out", executor=Inline())

    _, said = call(tmp_path / "out", "--for", "freeze")

    assert "without `sets`" in said


def test_advise__channels_of_blocks(tmp_path):
    pytest.importorskip("torch_pruning")
    path = write_study(tmp_path / "own", n_models=1, n_images=4, protocol={"group": "block"})
    run_study(read_study_file(path), tmp_path / "out", executor=Inline())

    _, said = call(tmp_path / "out", "--for", "prune")

    assert "--of weights" in said
    assert call(tmp_path / "out", "--for", "prune", "--of", "weights")[0].exit_code == 0
