"""The command that writes a report, called as the command line calls it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from forked import layercrit
from layercrit.cli.report import report_command
from layercrit.cli.root import cli, main
from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.reporting.study_figures import FIGURES
from layercrit.study.store import FILE, ModelRow
from published_results import PREDICTED, measured
from small_subjects import PIXELS, two_layers


def call(*arguments):
    result = CliRunner().invoke(report_command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def study(tmp_path):
    """The folder of a study without budgets; its baseline is `a`, and `c d` is left out."""
    generator = np.random.default_rng(0)
    names = ("a", "b", "c d")
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": float(generator.uniform(0.1, 0.9))}
        for model in names for layer in ("conv1", "fc") for trial in (0, 1)
    ]  # fmt: skip
    models = [ModelRow(name, f"py:{name}", None, None, 0.5, PREDICTED) for name in names]
    measured(tmp_path / "study", cells, models=models, record={"baseline": "a", "leave_out": ["c d"]})
    return tmp_path / "study"


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file() and path.name != FILE}


def test_report__in_a_process_of_its_own(study):
    result = layercrit("report", "study", "--format", "png", cwd=study.parent)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    assert printed[0] == "study/figures/criticality.png"
    assert printed[-1] == "study/report.html"
    assert {study.parent / line for line in printed} == files_in(study)
    assert result.stderr.splitlines() == [
        "note: no figure budget: No model has a budget of adversarial training. "
        "Give attack_norm and eps in the study file.",
        "Open study/report.html in a browser.",
    ]


def test_report__json_is_all_of_stdout_and_lists_the_same(study):
    result = call(study, "--figures", " all ,", "--format", "png", "--json")
    printed = json.loads(result.stdout)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert list(printed) == ["page", "figures", "left_out"]
    rare = ("budget", "conditions", "module_criticality")  # the study has one condition, and no module criticality
    usual = [name for name in FIGURES if name not in rare]
    assert [*printed["figures"], *printed["left_out"]] == [*usual, "budget"]
    listed = [printed["page"], *(path for paths in printed["figures"].values() for path in paths)]
    assert {Path(path) for path in listed} == files_in(study)


def test_report__some_figures_and_formats_in_another_place(study, tmp_path):
    out = tmp_path / "out"
    result = call(study, "--figures", " ranking, ,profile,", "--format", "png , svg", "--out", out)
    expected = [out / "figures" / f"{name}.{one}" for name in ("ranking", "profile-a") for one in ("png", "svg")]
    assert result.stdout.splitlines() == [str(path) for path in [*expected, out / "report.html"]]
    assert result.stderr == f"Open {out / 'report.html'} in a browser.\n"
    assert files_in(study) == set()


def test_report__a_model_for_each_profile(study):
    result = call(study, "--figures", "profile", "--format", "png", "--model", "c d", "--model", "b", "--leave-out", "")
    assert [Path(line).name for line in result.stdout.splitlines()] == [
        "profile-c-d.png", "profile-b.png", "report.html"
    ]  # fmt: skip


def test_report__baseline_reset_and_who_is_left_out(study):
    arguments = ("--baseline", "b", "--leave-out", "a", "--leave-out", "c d", "--reset", "rerandomize")
    assert call(study, *arguments, "--figures", "profile", "--format", "png").exit_code == 0
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "1 model, 2 layers, 2 trials of the reset rerandomize on 4 images; differences are relative to b<" in page


@pytest.mark.parametrize(("leave_out", "n_models"), [([], 2), (["--leave-out", ""], 3)], ids=["its own", "nobody"])
def test_report__who_the_study_leaves_out(study, leave_out, n_models):
    call(study, "--figures", "", *leave_out)
    assert f">{n_models} models, 2 layers" in (study / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--figures", "all,rankin"], 1, "Error: There is no figure 'all'."),
        (["--figures", "ranking,rankin"], 1, "Error: There is no figure 'rankin'. Did you mean 'ranking'?"),
        (["--figures", "budget"], 1, "Error: No model has a budget of adversarial training."),
        (["--format", "png,jpg"], 1, "Error: Figures cannot be saved in the format 'jpg'. Did you mean 'png'?"),
        (["--baseline", "c d"], 1, "Error: The baseline 'c d' is left out"),
        (["--leave-out", "e"], 1, "has no model or category 'e' to leave out. Known: 'a', 'b', 'c d'."),
        (["--reset", "zero"], 1, "has no reset 'zero'. Known: 'rerandomize'."),
        (
            ["--model", "a", "--model", "x"],
            1,
            "Error: The model 'x' is not compared, so it has no profile. Known: 'a', 'b'",
        ),
        (["--out", f"study/{FILE}"], 1, "cannot be written to (Not a directory). Name another folder with --out."),
        (["--figure", "ranking"], 2, "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_report__mistakes_end_in_one_message(study, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(study.parent)
    monkeypatch.setattr(sys, "argv", ["layercrit", "report", "study", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == code
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert files_in(study) == set()


@pytest.fixture
def measurement(tmp_path):
    found = measure(two_layers(), PIXELS, trials=2, name="mine", device="cpu", progress=False)
    return found.save(tmp_path / "measured")


def test_report__of_a_measurement_goes_into_its_folder(measurement, tmp_path):
    result = call(measurement, "--format", "png")
    names = ("spread", "half_width", "profile-mine", "classes-mine")
    files = [measurement / "figures" / f"{name}.png" for name in names]
    assert result.stdout.splitlines() == [*map(str, files), str(measurement / "report.html")]
    assert result.stderr == f"Open {measurement / 'report.html'} in a browser.\n"
    elsewhere = call(measurement, "--figures", "ranking", "--format", "png", "--out", tmp_path / "out")
    assert elsewhere.stdout.splitlines() == [
        str(tmp_path / "out" / "figures" / "ranking.png"), str(tmp_path / "out" / "report.html")
    ]  # fmt: skip
    assert Measurement.load(measurement).to_pandas()["layer"].to_list() == ["1", "3"]


def test_report__of_a_measurement_there_is_no_baseline(measurement, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layercrit", "report", str(measurement), "--baseline", "b"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "Error: baseline is for studies; a measurement is of one model" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_report__no_study(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["layercrit", "report", folder])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert f"Error: There is no study or measurement in {folder}. Give the folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help__lists_every_figure_and_what_it_shows():
    result = CliRunner().invoke(cli, ["report", "--help"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for name, figure in FIGURES.items():
        assert f"{name}: {figure.summary.removesuffix('.')}" in text
    for default in ("all", "pdf,png,svg"):
        assert f"[default: {default}]" in text
