"""The commands about tables, called as the command line calls them."""

import json

import click
import pytest
from click.testing import CliRunner

from layercrit.cli.tables import compare_command, export_command, import_command
from layercrit.comparison import compare
from layercrit.errors import StudyError
from layercrit.pitfalls import PITFALLS
from layercrit.reporting.exports import FORMATS
from layercrit.study.store import ModelRow
from layercrit.study.tables import load_study
from published_results import MODELS, measured, rows_of, write_models, write_table


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def files(tmp_path):
    return write_table(tmp_path / "results.csv", rows_of()), write_models(tmp_path / "models.csv")


@pytest.fixture
def study(tmp_path, files):
    run(import_command, files[0], "--as", "published", "--models", files[1], "--out", tmp_path / "study")
    return tmp_path / "study"


def test_commands__are_click_commands():
    commands = (import_command, export_command, compare_command)
    assert all(isinstance(command, click.Command) for command in commands)
    assert [command.name for command in commands] == ["import", "export", "compare"]


def test_import__writes_a_study_and_says_what_it_is(tmp_path, files):
    result = run(import_command, files[0], "--as", "published", "--models", files[1], "--out", tmp_path / "new")
    assert result.exit_code == 0
    assert result.stdout == "5 models, 90 cells from results.csv\n"
    assert "new trials on the same images" in result.stderr
    assert f"layercrit compare {tmp_path / 'new'}" in result.stderr
    assert load_study(tmp_path / "new").models["model"].to_list() == list(MODELS)


def test_import__refuses_as_the_library_does(study, files):
    with pytest.raises(StudyError, match="already contains a study"):
        run(import_command, files[0], "--as", "published", "--models", files[1], "--out", study)
    assert run(import_command, files[0], "--as", "else", "--out", study).exit_code == 2


def test_export__prints_the_files(study, tmp_path, files):
    result = run(export_command, study, "--format", "published-csv", "--out", tmp_path / "out")
    assert result.stdout.split() == [str(tmp_path / "out" / name) for name in ("results.csv", "models.csv")]
    assert (tmp_path / "out" / "results.csv").read_bytes() == files[0].read_bytes()
    with pytest.raises(StudyError, match="--overwrite"):
        run(export_command, study, "--format", "published-csv", "--out", tmp_path / "out")
    again = run(export_command, study, "--format", "published-csv", "--out", tmp_path / "out", "--overwrite")
    assert again.exit_code == 0


def test_export__help_lists_every_format():
    text = run(export_command, "--help").stdout
    assert all(name in text for name in FORMATS)


def test_compare__json_is_all_of_stdout_and_equals_the_library(study):
    result = run(compare_command, study, "--baseline", "model_a", "--leave-out", "contrastive", "--json")
    expected = compare(load_study(study), baseline="model_a", leave_out=["contrastive"])
    said = json.loads(result.stdout)
    assert set(said.pop("pitfalls")) <= set(PITFALLS)
    assert said == json.loads(json.dumps(expected.to_dict()))
    assert result.stderr.startswith("note: The cosine depends on how peaked")


def test_compare__ranks_the_models(study):
    text = run(compare_command, study).stdout
    comparison = compare(load_study(study))
    ranked = comparison.models.sort_values("criticality", ascending=False).index
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ranked.to_list()
    best = comparison.models.loc[ranked[0]]
    for shown in (f"{best['criticality']:.3f}", f"{best['difference']:+.3f}", f"{best['centre_of_mass']:.3f}"):
        assert shown in lines[2].split()
    assert "4 models, 6 layers, 3 trials, reset rerandomize; differences are relative to tv_resnet50" in lines
    assert "left out: frozen" in lines
    assert "Rank correlation of mean criticality with documented accuracy" in text
    assert "without augmentation" not in text, "two models are too few for a correlation"
    assert any(line.startswith("note: Published results") for line in lines)


def test_compare__nobody_left_out(study):
    lines = run(compare_command, study, "--leave-out", "").stdout.splitlines()
    assert any(line.startswith("5 models, ") for line in lines)
    assert not any(line.startswith("left out") for line in lines)


def test_compare__names_and_categories_that_look_like_markup(tmp_path):
    name = "[bold]m[/red]"
    cells = [{"model": name, "layer": "fc", "trial": trial, "cosine": 0.25} for trial in (0, 1)]
    measured(tmp_path / "study", cells, models=[ModelRow(name, "py:m", "[link=x]c[/]", None, None, {})])
    result = run(compare_command, tmp_path / "study")
    assert name in result.stdout
    assert result.stdout.count("[link=x]c[/]") == 2  # in both tables; a correlation over one model is not shown
    assert "no baseline" in result.stdout
    assert result.stderr == ""


def test_compare__matched_values_are_shown_and_need_no_caution(tmp_path):
    cells = [
        {"model": name, "layer": "fc", "trial": trial, "cosine": 0.25, "cosine_matched": 0.375}
        for name in "ab" for trial in (0, 1)
    ]  # fmt: skip
    measured(tmp_path / "study", cells)
    result = run(compare_command, tmp_path / "study")
    assert "matched" in result.stdout
    assert "0.375" in result.stdout
    assert result.stderr == ""
