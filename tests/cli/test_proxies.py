"""The command `proxies`: what it prints and writes, of a model and of a study, and what it refuses."""

import json

import pandas as pd
import pytest
from click.testing import CliRunner

from layercrit.cli.root import cli
from layercrit.cli.saver import Saver
from layercrit.errors import LayercritError
from layercrit.measurement import Measurement
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from running_jobs import Inline
from small_studies import OPTIONS, write_study

FEW = ("--n-images", "6", "--hessian-images", "1", "--trials", "2")


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    sections = {"protocol": {"layers": "conv1,layer1.1.*,fc"}}
    run_study(read_study_file(write_study(folder, n_images=8, **sections)), folder / "out", executor=Inline())
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    model = f"file:{folder}/m0.safetensors?{OPTIONS}&input_size=(1,8,8)"
    return ("proxies", model, "--images", folder / "images.npz", "--layers", "conv1,layer1.1.*,fc", *FEW)


def test_proxies__of_a_model(asked, tmp_path):
    shown = invoke(*asked, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "gradients: labels of the images, 6 images; 2 draws of rerandomize" in shown.output
    assert "cost: fisher, first order, gauss newton: 6 forward, 6 backward, 12 of each layer alone" in shown.output
    assert "blank: distance (distance needs --initial)" in shown.output
    assert "beat" not in shown.output
    table = pd.read_csv(tmp_path / "out" / "proxies.csv")
    assert list(table["layer"]) == ["conv1", "layer1.1.conv1", "layer1.1.conv2", "layer1.1.conv3", "fc"]
    assert table["distance"].isna().all()
    drawn = invoke(*asked, "--labels", "none", "--out", tmp_path / "drawn")
    assert "gradients: labels drawn from the model's predictions" in drawn.output
    record = json.loads((tmp_path / "drawn" / "proxies.json").read_text())
    assert record["labels"] == "labels drawn from the model's predictions"


def test_proxies__measured_at_once_and_given(asked, tmp_path):
    """The nulls are in the table, and the folder of the one is what the other takes."""
    shown = invoke(*asked, "--measure", "--k", "2", "--out", tmp_path / "out", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    rows = {row["proxy"]: row for row in found["against"]}
    assert all(rows[name]["null"] for name in ("log_parameters", "depth", "weight_norm"))
    assert rows["fisher"]["spearman_low"] <= rows["fisher"]["spearman"] <= rows["fisher"]["spearman_high"]
    assert found["k"] == 2
    assert rows["distance"]["spearman"] is None
    assert json.loads((tmp_path / "out" / "against.json").read_text())["sentence"] == found["sentence"]
    assert {"against.csv", "proxies.png", "proxies.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}
    given = invoke(*asked, "--against", tmp_path / "out" / "measurement", "--k", "2", "--out", tmp_path / "again")
    assert given.exit_code == 0, given.output
    assert found["sentence"] in " ".join(given.output.split())
    assert "null" in given.output
    assert "k = 2 of 5 layers, of which chance would name 40%" in given.output


def test_proxies__interrupted_while_it_measures(asked, tmp_path, monkeypatch):
    """The same command goes on with the trials that are there."""
    out, keep = tmp_path / "out", Saver.keep

    def keep_then_interrupt(self, so_far):
        keep(self, so_far)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "keep", keep_then_interrupt)
        stopped = invoke(*asked, "--measure", "--out", out)
    assert stopped.exit_code != 0
    assert "1 finished trial saved" in stopped.output
    assert not Measurement.load(out / "measurement").record["complete"]
    measured = []
    monkeypatch.setattr(Saver, "keep", lambda self, so_far: measured.append(so_far))
    again = invoke(*asked, "--measure", "--out", out)
    assert again.exit_code == 0, again.output
    assert len(measured) == 1  # the other trial alone
    assert set(Measurement.load(out / "measurement").cells["trial"]) == {0, 1}
    assert (out / "against.json").is_file()
    assert "proxies.json already" in str(invoke(*asked, "--measure", "--out", out).exception)


@pytest.mark.parametrize("options", [("--layers", "conv1,fc"), ("--k", "9"), ("--level", "2")])
def test_proxies__what_cannot_be_compared_is_not_measured(asked, tmp_path, options):
    assert invoke(*asked, "--measure", *options, "--out", tmp_path).exit_code == 1
    assert not (tmp_path / "measurement").exists()


def test_proxies__overwrite_measures_anew(asked, tmp_path):
    few = ("--labels", "none", "--measure", "--out", tmp_path)
    assert invoke(*asked, *few).exit_code == 0
    assert invoke(*asked, "--trials", "1", *few, "--overwrite").exit_code == 0
    assert set(Measurement.load(tmp_path / "measurement").cells["trial"]) == {0}


def test_proxies__of_a_study(folder, tmp_path):
    shown = invoke("proxies", folder / "out", *FEW, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "Over 2 models: " in shown.output
    assert "labels of the loss: labels of the images" in shown.output
    assert {"against.csv", "by_model.csv", "proxies.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    found = json.loads(
        invoke("proxies", folder / "out", *FEW, "--models", "m1", "--out", tmp_path / "one", "--json").stdout
    )
    assert {row["model"] for row in found["by_model"]} == {"m1"}
    assert found["failed"] == {}


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--against", "x", "--measure"), 2, "give one of the two"),
        (("--models", "m0"), 2, "--models goes with a STUDY"),
        (("--radius", "0"), 1, "radius must be above 0"),
        (("--hessian-images", "-1"), 1, "hessian_images must be a whole number"),
        (("--measure", "--k", "9"), 1, "k must be a whole number from 1"),
        (("--initial", "nowhere.safetensors"), 1, "nowhere.safetensors"),
        (("--reset", "rerandomise"), 1, "Did you mean 'rerandomize'"),
    ],
)
def test_proxies__bad_input(asked, tmp_path, options, code, text):
    shown = invoke(*asked, "--out", tmp_path / "out", *options)
    assert shown.exit_code == (code if code == 2 else 1)
    assert text in shown.output + str(shown.exception)


def test_proxies__what_a_study_does_not_take(folder, asked, tmp_path):
    shown = invoke("proxies", folder / "out", "--images", folder / "images.npz")
    assert shown.exit_code == 2
    assert "--images goes with a MODEL" in shown.output
    shown = invoke("proxies", f"{asked[1]}&name={'x' * 5000}", "--images", folder / "images.npz", "--out", tmp_path)
    assert isinstance(shown.exception, LayercritError)  # of the model, whose name no file could have
    shown = invoke("proxies", asked[1], "--out", tmp_path)
    assert shown.exit_code == 2
    assert "Missing option '--images'" in shown.output
