"""Plug-ins: an example package that adds one thing of each kind is installed, used, and removed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from layercrit.cli.root import cli
from layercrit.study.tables import load_study

PACKAGE = Path(__file__).parent / "plugin_package"
FAILING = """
    from layercrit.reporting import figure


    @figure("failing")
    def failing(tables):
        '''Nothing.'''
        yield "failing", 1 / 0
"""
STUDY = """
    [[images]]
    name = "clean"
    source = "gratings:4"
    input_size = [1, 28, 28]
    resize = 0

    [[images]]
    name = "dim"
    source = "corrupt:dimming@5"

    [protocol]
    trials = 2
    resets = ["dropout", "dropout(share=0.9)"]
    dtype = "reference"

    [[models]]
    reference = "perceptron:16"

    [[models]]
    reference = "perceptron:8?pretrained=false"
"""
IMAGES = ["--images", "gratings:4?cycles=2", "--reset", "dropout", "--out", "measured"]
COMMANDS = {
    "measure help": ["measure", "--help"],
    "study help": ["study", "run", "--help"],
    "report help": ["report", "--help"],
    "export help": ["export", "--help"],
    "train help": ["train", "--help"],
    "methods": ["methods", "--json"],
    "schema": ["study", "schema"],
    "measure": ["measure", "perceptron:16", *IMAGES, "--trials", "2", "--dtype", "reference", "--json"],
    "option": ["measure", "perceptron:16", "--images", "gratings:4?cylces=2", "--out", "option"],
    "unknown": ["measure", "perceptron:16", "--images", "gratigns:4", "--out", "unknown"],
    "broken": ["measure", "perceptron:16", "--images", "gratings:4", "--reset", "lab_broken", "--out", "broken"],
    "run": ["study", "run", "lab.toml", "--on", "inline", "--track", "lines", "--json"],
    "report": ["report", "lab", "--probe-set", "clean", "--format", "png", "--json"],
    "failing": ["report", "lab", "--figures", "failing"],
    "export": ["export", "lab", "--format", "names"],
    "train": ["train", "--method", "smooth", "--arch", "perceptron:8", "--data", "gratings:10", "--epochs", "1",
              "--out", "trained"],
}  # fmt: skip
PROGRAM = """
import importlib, json, pkgutil, sys
from click.testing import CliRunner
import layercrit

for found in pkgutil.walk_packages(layercrit.__path__, "layercrit."):
    if found.name != "layercrit.__main__":
        importlib.import_module(found.name)
said = {"imported": sorted(name for name in sys.modules if name.startswith(("layercrit_example", "lab_")))}
import torch
from layercrit.cli.root import cli
from layercrit_example.models import build

torch.save(build(16).state_dict(), "perceptron-16.pt")
for name, command in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(cli, command)
    said[name] = [result.exit_code, result.stdout, result.stderr + str(result.exception or "")]
print(json.dumps(said))
"""


def write_distribution(site, package, module, group, code):
    """Write what an installer would: a module, and metadata with its entry point."""
    (site / f"{module}.py").write_text(textwrap.dedent(code))
    about = site / f"{package.replace('-', '_')}-3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 3\n")
    (about / "entry_points.txt").write_text(f"[layercrit.{group}]\nanything = {module}\n")


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """A folder to work in; below it, the example is installed, beside plug-ins that fail."""
    folder = tmp_path_factory.mktemp("laboratory")
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]
    command = [*pip, *offline, "--target", str(folder / "site"), str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    write_distribution(folder / "site", "lab-broken", "lab_broken", "resets", "import a_package_that_is_missing")
    write_distribution(folder / "site", "lab-failing", "lab_failing", "figures", FAILING)
    (folder / "lab.toml").write_text(textwrap.dedent(STUDY))
    return folder


@pytest.fixture(scope="module")
def said(laboratory):
    """What the commands print there."""
    path = os.pathsep.join([str(laboratory / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)]
    done = subprocess.run(
        command, cwd=laboratory, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def printed(said):
    """What a command prints, if it succeeds."""

    def of(name):
        code, shown, complaints = said[name]
        assert code == 0, complaints
        return shown

    return of


# --- installed --------------------------------------------------------------------------------------------------------


def test_plug_ins__importing_layercrit_imports_none(said):
    """Otherwise one would be imported while the modules that it needs are half imported."""
    assert said["imported"] == []


HELP = {
    "measure help": (
        "dropout: A share of the trained values, drawn at random, becomes 0",
        "hellinger: Hellinger distance: the Euclidean one",
        "perceptron:NAME perceptron:WIDTH, with the weights in perceptron-WIDTH.pt.",
        "gratings: gratings:N, sine gratings of N orientations",
        "jpeg_compression, dimming.",
        "lines: Lines of JSON",
    ),
    "study help": ("ray: A Ray cluster", "inline: This process, one task after the other", "lines: Lines of JSON"),
    "report help": ("ranking: Models by their mean", "critical_share: Share of each model's layers"),
    "export help": ("latex: A table for papers", "names: The names of the models, one per line"),
    "train help": ("tv2, smooth.",),
}


@pytest.mark.parametrize("name", HELP)
def test_plug_ins__are_in_the_help(printed, name):
    text = " ".join(printed(name).split())
    for line in HELP[name]:
        assert line in text


def test_plug_ins__one_that_cannot_be_imported_is_named_and_spoils_nothing(said):
    _, _, complaints = said["measure help"]
    assert "lab_broken of the package lab-broken 3 could not be imported" in complaints
    assert "layercrit_example" not in complaints
    code, _, complaints = said["broken"]
    assert code == 1
    assert "There is no reset 'lab_broken'." in complaints
    assert "ModuleNotFoundError: No module named 'a_package_that_is_missing'" in complaints


def test_plug_ins__training_methods_are_listed(printed):
    changes = {method["name"]: method["changes"] for method in json.loads(printed("methods"))}
    assert changes["smooth"] == "smoothed labels"


def test_plug_ins__names_are_examples_in_the_schema(printed):
    tables = json.loads(printed("schema"))["$defs"]
    assert "dropout" in tables["ProtocolTable"]["properties"]["resets"]["items"]["examples"]
    assert "hellinger" in tables["ProtocolTable"]["properties"]["distances"]["items"]["examples"]
    assert "smooth" in tables["ModelTable"]["properties"]["method"]["examples"]


def test_plug_ins__model_images_reset_and_distance_in_a_measurement(printed, laboratory):
    rows = json.loads(printed("measure"))["layers"]
    assert [(row["layer"], row["status"]) for row in rows] == [("1", "ok"), ("3", "ok")]
    assert all(0 < row["hellinger"] < 1 for row in rows)
    record = json.loads((laboratory / "measured" / "measurement.json").read_text())
    assert record["versions"]["layercrit-example"] == "1.2"
    assert record["probe_set"]["source"] == "gratings:4?cycles=2"
    assert record["probe_set"]["labels"]
    assert "lab-failing" not in record["versions"]


def test_plug_ins__images_of_unknown_kinds_and_options(said):
    code, _, complaints = said["option"]
    assert code == 1
    assert "the kind of images 'gratings' of the package layercrit-example 1.2 has no option 'cylces'." in complaints
    code, _, complaints = said["unknown"]
    assert code == 1
    assert "there is no kind of images 'gratigns'. Did you mean 'gratings'?" in complaints


def test_plug_ins__in_a_study(printed, laboratory):
    assert json.loads(printed("run"))["measured_now"] == 2 * 2 * 2 * 2 * 2  # models, probe sets, resets, trials, layers
    study = load_study(laboratory / "lab")
    assert set(study.cells["status"]) == {"ok"}
    assert study.cells["hellinger"].between(0, 1).all()
    assert {run["versions"]["layercrit-example"] for run in study.runs} == {"1.2"}
    lines = (laboratory / "lab" / "tracking" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 32
    assert sum("criticality/16 (dim)/3/dropout(share=0.9)" in json.loads(line) for line in lines) == 2


def test_plug_ins__a_figure_is_drawn_and_on_the_page(printed, laboratory):
    written = json.loads(printed("report"))
    assert [Path(path).name for path in written["figures"]["critical_share"]] == ["critical_share.png"]
    page = (laboratory / "lab" / "report.html").read_text(encoding="utf-8")
    assert "<h3>Share of each model&#x27;s layers whose criticality is above 0.5.</h3>" in page
    assert page.count('src="data:image/svg+xml;base64,') == 1


def test_plug_ins__a_figure_that_fails_is_named_and_spoils_no_other(said, printed):
    written = json.loads(printed("report"))
    wanted = "The figure 'failing' of the package lab-failing 3 failed (ZeroDivisionError: division by zero)."
    assert written["left_out"]["failing"] == wanted
    assert {"critical_share", "ranking"} <= written["figures"].keys()
    code, _, complaints = said["failing"]
    assert code == 1
    assert wanted in complaints


def test_plug_ins__an_export_format(printed, laboratory):
    assert printed("export")
    names = (laboratory / "lab" / "export" / "names" / "models.txt").read_text().splitlines()
    assert len(names) == 4


def test_plug_ins__a_training_run(printed, laboratory):
    assert "top-1 accuracy" in printed("train")
    record = json.loads((laboratory / "trained" / "model.json").read_text())
    assert (record["method"], record["versions"]["layercrit-example"]) == ("smooth", "1.2")


# --- removed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (["study", "run", "lab"], "There is no reset 'dropout'"),
        (["measure", "perceptron:16", *IMAGES, "--trials", "3"], "There is no reset 'dropout'"),
    ],
    ids=["study", "measurement"],
)
def test_plug_ins__once_removed_an_error_names_the_package(said, laboratory, monkeypatch, command, wrong):
    monkeypatch.chdir(laboratory)
    refused = str(CliRunner().invoke(cli, command).exception)
    assert wrong in refused
    assert "made with plug-ins that are not installed here: layercrit-example 1.2. Install them" in refused


def test_plug_ins__once_removed_their_results_can_be_read(said, laboratory, monkeypatch):
    monkeypatch.chdir(laboratory)
    result = CliRunner().invoke(cli, ["compare", "lab", "--probe-set", "clean", "--reset", "dropout(share=0.9)"])
    assert result.exit_code == 0, result.exception
