"""The commands about studies: in a process of their own where processes matter, else in this one."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from functools import partial

import pytest
from click.testing import CliRunner

from forked import layercrit, server, with_forked_workers
from layercrit.cli.root import main
from layercrit.cli.study import study as group
from layercrit.errors import StudyError
from layercrit.locks import hold
from layercrit.study.schema import study_schema
from layercrit.study.store import FILE, ModelRow, Store
from layercrit.study.tables import load_study
from layercrit.verbosity import quiet
from published_results import measured
from running_jobs import Inline
from small_studies import N_LAYERS, OPTIONS, write_study, write_weights

MARKUP = "[red]x[/red]"


def call(*arguments):
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write(folder, **sections):
    """A study of one model that can be measured, and of one whose weights are damaged."""
    models = [{"reference": f"file:{name}.safetensors?{OPTIONS}", "name": name} for name in ("m0", "damaged")]
    models[0] |= {"name": MARKUP, "category": "[bold]"}
    path = write_study(folder, 1, trials=2, n_images=8, models=models, study={"baseline": MARKUP}, **sections)
    (folder / "damaged.safetensors").write_bytes(b"no weights")
    return path.rename(folder / "small.toml")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study run in a process of its own, with workers: its folder, and what the command gave."""
    folder = tmp_path_factory.mktemp("ran")
    write(folder)
    prepare = partial(with_forked_workers, server()[1])
    return folder / "small", layercrit("study", "run", "small.toml", "--json", cwd=folder, prepare=prepare)


@pytest.fixture
def here(monkeypatch):
    """Run tasks in this process."""
    monkeypatch.setattr("layercrit.study.running.LocalProcesses", lambda places: Inline())


# run


def test_run__json_is_all_of_stdout(ran):
    folder, result = ran
    printed = json.loads(result.stdout)
    assert [(m["model"], m["state"], m["n_done"], m["n_failed"]) for m in printed["models"]] == [
        (MARKUP, "done", 2 * N_LAYERS, 0), ("damaged", "failed", 0, 2)
    ]  # fmt: skip
    assert printed["measured_now"] == printed["n_done"] == len(load_study(folder).cells) == 2 * N_LAYERS
    assert printed["folder"] == "small"
    assert printed["running"] == []
    assert [failure["trial"] for failure in printed["failures"]] == [0, 1]


def test_run__failures_end_with_1_and_are_listed_once(ran):
    _, result = ran
    assert result.returncode == 1
    listed = [line for line in result.stderr.splitlines() if line.startswith("  damaged")]
    assert len(listed) == 1
    assert listed[0].startswith("  damaged, rerandomize, trials 0, 1: CheckpointError: ")
    assert "2 trials failed:" in result.stderr
    assert "--retry" in result.stderr
    assert "Traceback" not in result.stderr


def test_run__again_says_what_was_there_and_retry_tries_again(ran, here, tmp_path, monkeypatch):
    folder, _ = ran
    again = call("run", folder.parent / "small.toml", "--out", folder)
    assert again.exit_code == 1
    known = f"0 cells measured, {2 * N_LAYERS} were already there"
    assert known in again.stdout
    assert f"Saved in {folder}; next: `layercrit report {folder}`, or `layercrit compare {folder}`." in again.stderr
    lines = again.stdout.splitlines()
    assert lines[0].startswith(f"warning: {MARKUP}: top-1 accuracy"), "untrained networks guess"
    title = "small: mean criticality over all layers of each model"
    table = lines[[line.strip() for line in lines].index(title) :]
    assert table[2].startswith(f"{MARKUP}  [bold]")
    means = load_study(folder).by_model().set_index("model").loc[MARKUP]
    assert f"{means['criticality']:.3f}" in table[2].split()
    assert f"{means['low']:.3f} - {means['high']:.3f}" in table[2]
    assert f"{100 * means['top1_accuracy']:.1f}%" in table[2].split()
    assert table[2].split()[-2:] == [str(N_LAYERS), "2"]
    write_weights(folder.parent / "damaged.safetensors", 3)
    assert call("run", folder).exit_code == 1  # the folder, and nothing is tried unasked
    mended = call("run", folder, "--retry", "--json")
    assert mended.exit_code == 0
    assert "failed" not in mended.stderr
    printed = json.loads(mended.stdout)
    assert printed["measured_now"] == 2 * N_LAYERS
    assert printed["failures"] == []
    (folder.parent / "damaged.safetensors").write_bytes(b"no weights")


def test_run__its_table_says_which_reset_a_row_is_of(here, tmp_path):
    path = write_study(tmp_path, 1, trials=2, n_images=4, protocol={"resets": ["rerandomize", "zero"]})
    printed = call("run", path, "--out", tmp_path / "out").stdout
    means = load_study(tmp_path / "out").by_model()
    assert len(means) == 2
    for row in means.to_dict("records"):
        (line,) = (line for line in printed.splitlines() if line.split()[2:3] == [row["reset"]])
        assert f"{row['criticality']:.3f}" in line.split()


def test_run__names_the_folder_like_the_file(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "files", 1, trials=1, n_images=4)
    assert call("run", "files/study.toml").exit_code == 0
    assert load_study("study").models["model"].to_list() == ["m0"]
    again = call("run", "study/study.toml")  # that of a study that was started before
    assert f"{N_LAYERS} were already there" in again.stdout
    assert f"Saved in {tmp_path / 'study'};" in again.stderr
    with quiet():
        again = call("run", "study/study.toml")
    assert f"{N_LAYERS} were already there" in again.stdout
    assert "Saved in" not in again.output


def test_run__does_not_replace_a_study_file_that_somebody_wrote(here, tmp_path):
    path = write_study(tmp_path, 1, trials=1, n_images=4)
    text = path.read_text()
    for arguments in ([tmp_path], [path, "--out", tmp_path]):
        with pytest.raises(StudyError, match=r"contains a study\.toml but no study yet.*--out"):
            call("run", *arguments)
    assert path.read_text() == text
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_run_and_plan__mistakes_in_the_file(tmp_path, command, monkeypatch, capsys):
    path = write_study(tmp_path, 1, protocol={"trails": 3, "resets": ["zeros"]})
    monkeypatch.setattr(sys, "argv", ["layercrit", "study", command, str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert printed.out == ""
    assert "has 2 mistakes:" in printed.err
    assert "Did you mean 'trials'" in printed.err
    assert "Did you mean 'zero'" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_run_and_plan__no_file(tmp_path, command):
    with pytest.raises(StudyError, match=r"study file .*nowhere\.toml cannot be read"):
        call(command, tmp_path / "nowhere.toml")
    with pytest.raises(StudyError, match=r"study file .*study\.toml cannot be read"):
        call(command, tmp_path)


def test_run__held_by_another(tmp_path):
    path = write_study(tmp_path, 1)
    with hold(tmp_path / "out"), pytest.raises(StudyError, match="is being run by process"):
        call("run", path, "--out", tmp_path / "out")


# plan


def test_plan__says_what_it_costs(ran, tmp_path):
    folder, _ = ran
    new = call("plan", folder.parent / "small.toml", "--out", tmp_path / "new")
    assert new.exit_code == 0
    n_cells = 4 * N_LAYERS
    assert f"2 models, {n_cells} cells, {n_cells} left, 8 images each" in new.stdout.splitlines()
    assert "FLOPs left" in new.stdout
    assert "py:layercrit.demo:small_resnet" in new.stdout
    assert "the forward passes alone take about " in new.stdout
    assert "on top come starting workers, opening each model" in new.stdout
    assert "at most" not in new.stdout
    assert not (tmp_path / "new").exists()
    begun = json.loads(call("plan", folder, "--json").stdout)
    assert (begun["n_cells"], begun["n_done"], begun["n_images"]) == (n_cells, len(load_study(folder).cells), 8)
    assert [model["model"] for model in begun["models"]] == [MARKUP, "damaged"]


# status


def cells(models, layers=("conv1", "fc"), trials=2):
    return [
        {"model": model, "layer": layer, "trial": trial, "cosine": 0.25}
        for model in models for layer in layers for trial in range(trials)
    ]  # fmt: skip


def test_status__done_left_and_failed(tmp_path):
    models = [ModelRow(name, f"py:{name}") for name in (MARKUP, "b", "c")]
    failures = [("b", 0, "no such file"), ("b", 1, "no such file"), ("b", 2, "out of memory")]
    measured(tmp_path, cells([MARKUP]), models=models, failures=failures)
    result = call("status", tmp_path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        [MARKUP, "done", "4", "of", "4"], ["b", "failed", "0", "of", "?"], ["c", "not", "opened", "0", "of", "?"]
    ]  # fmt: skip
    assert lines[4:] == ["4 of 4 cells planned so far are done", "not running"]
    assert result.stderr.splitlines() == [
        "3 trials failed:",
        "  b, rerandomize, trials 0, 1: no such file",
        "  b, rerandomize, trial 2: out of memory",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE], "looking leaves traces"


def test_status__json(tmp_path):
    measured(tmp_path, cells("a"), models=[ModelRow("a", "py:a"), ModelRow("b", "py:b")])
    result = call("status", tmp_path, "--json")
    assert json.loads(result.stdout) == {
        "name": "made up",
        "folder": str(tmp_path),
        "models": [
            {"model": "a", "state": "done", "n_planned": 4, "n_done": 4, "n_failed": 0, "error": None},
            {"model": "b", "state": "not opened", "n_planned": None, "n_done": 0, "n_failed": 0, "error": None},
        ],
        "n_planned": 4,
        "n_done": 4,
        "not_opened": 1,
        "failures": [],
        "warnings": [],
        "damaged": [],
        "seconds_left": None,
        "module_criticality": None,
        "running": [],
        "jobs": [],
    }


def test_status__time_left(tmp_path, monkeypatch):
    measured(tmp_path, cells("a"))
    monkeypatch.setattr("layercrit.study.tables.Study.seconds_left", lambda study: 3 * 3600.0)
    assert "4 of 4 cells are done, about 3 h left" in call("status", tmp_path).stdout.splitlines()


def test_status__many_models_are_not_all_listed(tmp_path):
    measured(tmp_path, cells([f"m{number}" for number in range(20)]))
    lines = call("status", tmp_path).stdout.splitlines()
    assert "m14" in lines[15]
    assert lines[16].split() == ["and", "5", "more", "done"]


def test_status__a_line_more_than_are_listed_is_listed(tmp_path):
    measured(tmp_path, cells([f"m{number}" for number in range(16)]))
    lines = call("status", tmp_path).stdout.splitlines()
    assert "m15" in lines[16]
    assert not any(line.startswith("and ") for line in lines)


def test_status__while_another_process_runs_it(tmp_path):
    measured(tmp_path, cells("a"))
    with hold(tmp_path):
        lines = call("status", tmp_path).stdout.splitlines()
    assert lines[-1].startswith("running: process ")


def test_status__no_study_yet(tmp_path):
    with pytest.raises(StudyError, match="There is no study in"):
        call("status", tmp_path)
    with pytest.raises(StudyError, match="There is no study in"):
        call("status", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    Store(tmp_path, create=True).close()  # its images are being decoded
    assert "0 of 0 cells are done" in call("status", tmp_path).stdout
    assert json.loads(call("status", tmp_path, "--json").stdout)["models"] == []


def test_status__imports_no_torch(tmp_path):
    measured(tmp_path, cells("a"))
    code = (
        "import sys, layercrit.cli.root as c; import layercrit.comparison, layercrit.study.merging; "
        f"c.cli(['study', 'status', {str(tmp_path)!r}], standalone_mode=False); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "4 of 4 cells are done" in result.stdout
    assert result.stdout.endswith("False\n")


# merge, example, help


def test_merge__says_what_there_is_and_notes_on_stderr(tmp_path):
    measured(tmp_path / "a", cells("a"), record={"notes": ["a note"]})
    measured(tmp_path / "b", cells("bc"))
    result = call("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert result.exit_code == 0
    assert result.stdout == "3 models, 12 cells.\n"
    assert result.stderr == f"note: a note\nSaved in {tmp_path / 'both'}.\n"
    assert load_study(tmp_path / "both").models["model"].to_list() == ["a", "b", "c"]
    with pytest.raises(StudyError, match="already contains a study"):
        call("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert call("merge", tmp_path / "a", tmp_path / "b").exit_code == 2  # no --out


def test_repair__names_what_is_lost_and_what_is_next(ran, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copyfile(ran[0] / FILE, folder / FILE)
    with contextlib.closing(sqlite3.connect(folder / FILE)) as connection:
        ((key,),) = connection.execute("SELECT key FROM cells WHERE rowid = 1").fetchall()
        connection.execute("UPDATE cells SET status = 'other' WHERE rowid = 1")
        connection.commit()
    content = bytearray((folder / FILE).read_bytes())
    content[:16] = b"no longer SQLite"
    (folder / FILE).write_bytes(content)
    with pytest.raises(StudyError, match="study repair"):
        call("status", folder)
    result = call("repair", folder)
    left, lost = load_study(folder).cells, load_study(ran[0]).cells.set_index("key").loc[key]
    assert len(left) == len(load_study(ran[0]).cells) - 1
    assert key not in set(left["key"])
    assert f"the cell of {MARKUP}, {lost['layer']}, rerandomize, trial {lost['trial']}\n" in result.stderr
    assert result.stderr.count("damaged and left out") == 1
    assert result.stdout.startswith(f"{len(left)} cells kept; ")
    assert (folder / f"{FILE}.damaged-1").read_bytes() == content


def test_repair__nothing_is_damaged(ran, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copyfile(ran[0] / FILE, folder / FILE)
    result = call("repair", folder)
    assert result.exit_code == 0
    assert result.stdout == f"Nothing is damaged: {len(load_study(ran[0]).cells)} cells.\n"
    assert result.stderr == ""
    assert not list(folder.glob("*.damaged-*"))


def test_help__lists_the_commands():
    text = call("--help").stdout
    assert [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()] == [
        "example", "merge", "plan", "repair", "run", "schema", "status", "submit"
    ]  # fmt: skip
    assert call("example", "digit").exit_code == 2


def test_schema__prints_that_of_study_files():
    assert json.loads(call("schema").stdout) == study_schema()
