"""Trackers of one's own: what they are passed, and that nothing of theirs can change or stop a run."""

import threading
import time

import pandas as pd
import pytest
from click.testing import CliRunner

from layercrit.cli.root import cli
from layercrit.errors import LayercritError, TrackingError
from layercrit.locks import hold
from layercrit.measurement import Measurement
from layercrit.study.tables import load_study
from layercrit.trackers import TRACKERS, Tracker, Tracking, metric_of, plain_name, tracker, tracking
from running_jobs import ARCHITECTURE, Inline, assert_same_tables, tables, write_small
from tracked_runs import Failing, Gone, Recorded, register


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("layercrit.study.running.LocalProcesses", lambda places: Inline())
    forget = register()
    yield
    forget()


def call(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if isinstance(result.exception, LayercritError):
        raise result.exception
    return result


@pytest.fixture
def plain(tmp_path):
    """The tables of a run without trackers."""
    path = write_small(tmp_path)
    assert call("study", "run", path, "--out", tmp_path / "plain").exit_code == 0
    return tables(tmp_path / "plain")


# what they are passed


def test_tracker__is_passed_all_of_a_study(tmp_path):
    path = write_small(tmp_path, study={"name": "small"})
    result = call("study", "run", path, "--out", tmp_path / "out", "--track", "recorded", "--json")
    assert result.exit_code == 0
    assert result.stderr.count("recorded: in a list") == 1
    found = load_study(tmp_path / "out")
    begin, *middle, last, end = Recorded.calls
    _, name, config, folder = begin
    assert (name, folder) == ("small", tmp_path / "out" / "tracking")
    assert config["study"] == "small"
    assert config["protocol"]["trials"] == 2
    assert list(config["models"]) == ["m0", "m1"]
    assert config["versions"]["layercrit"]
    values = [one[1] for one in middle if one[0] == "config"]
    assert {one["probe_set"]["sha256"] for one in values} == {found.record["probe_set"]["sha256"]}
    rows = pd.DataFrame([one[1] for one in middle if one[0] == "cell"])
    assert list(rows["cosine"]) == list(found.cells.set_index("key").loc[rows["key"], "cosine"])
    assert len(rows) == 12
    progress = [one[1:] for one in middle if one[0] == "progress"]
    assert progress == sorted(progress)
    assert progress[-1] == (12, 12)
    _, summary, layers, figures = last
    means = found.by_model().set_index("model")["criticality"]
    assert summary == {f"mean_criticality/{model}": mean for model, mean in means.items()}
    assert list(layers["criticality"]) == list(found.to_pandas()["criticality"])
    assert list(figures) == ["criticality", "ranking"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures.values())
    assert end == ("end", True)


def test_tracker__is_passed_all_of_a_measurement(tmp_path):
    write_small(tmp_path)
    reference = f"file:{tmp_path / 'm0.safetensors'}?{ARCHITECTURE}&input_size=(3,2,2)"
    given = ["--images", tmp_path / "images.npz", "--out", tmp_path / "out", "--trials", "3"]
    assert call("measure", reference, *given, "--track", "recorded", "--json").exit_code == 0
    found = Measurement.load(tmp_path / "out")
    assert [one[0] for one in Recorded.calls if one[0] != "progress"] == [
        "begin", *["cell"] * 9, "config", "result", "end"
    ]  # fmt: skip
    cells = {(one[1]["layer"], one[1]["trial"]): one[1]["cosine"] for one in Recorded.calls if one[0] == "cell"}
    assert cells == {(row["layer"], row["trial"]): row["cosine"] for row in found.cells.to_dict("records")}
    _, summary, layers, figures = Recorded.calls[-2]
    assert list(summary.values()) == [found.summary()["criticality"]["mean"]]
    assert list(layers["layer"]) == ["1", "3", "5"]
    assert figures["criticality"].is_file()
    (config,) = (one[1] for one in Recorded.calls if one[0] == "config")
    assert config["probe_set"]["sha256"] == found.record["probe_set"]["sha256"]


def test_tracker__several_at_once_and_one_named_twice(tmp_path):
    path = write_small(tmp_path, n_models=1)
    names = [part for name in ("recorded", "minimal", "recorded") for part in ("--track", name)]
    assert call("study", "run", path, "--out", tmp_path / "out", *names).exit_code == 0
    assert [one[0] for one in Recorded.calls].count("begin") == 1
    assert [one[0] for one in Recorded.calls].count("cell") == 6


def test_tracker__is_told_of_a_run_that_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("layercrit.study.running.LocalProcesses", lambda places: Stopped())
    result = call("study", "run", write_small(tmp_path), "--out", tmp_path / "out", "--track", "recorded")
    assert result.exit_code != 0
    assert Recorded.calls[-1] == ("end", False)
    assert [one[0] for one in Recorded.calls].count("result") == 0
    assert [one[0] for one in Recorded.calls].count("cell") == len(load_study(tmp_path / "out").cells) == 3


class Stopped(Inline):
    """Ctrl-C after the first task."""

    def _run(self, tasks, start, answer):
        yield from super()._run(tasks[:1], start, answer)
        raise KeyboardInterrupt


def test_tracker__of_a_study_that_another_process_runs_is_left_alone(tmp_path):
    path = write_small(tmp_path, n_models=1)
    with hold(tmp_path / "out"), pytest.raises(LayercritError, match="is being run by"):
        call("study", "run", path, "--out", tmp_path / "out", "--track", "recorded")
    assert Recorded.calls == []


# what goes wrong


@pytest.mark.parametrize(("name", "made"), [("failing", Failing), ("gone", Gone)])
def test_tracker__one_that_fails_changes_nothing_and_is_said_once(tmp_path, plain, name, made):
    names = ["--track", name, "--track", "recorded"]
    result = call("study", "run", tmp_path / "study.toml", "--out", tmp_path / "out", *names)
    assert result.exit_code == 0
    assert result.stderr.count("No space left on device") == 1
    assert f"warning: the tracker {name} failed (OSError" in result.stderr
    assert len(made.calls) == 1 if made is Gone else len(made.calls) > 12  # without a run there is nothing to log to
    assert Recorded.calls[-1] == ("end", True)
    assert_same_tables(tables(tmp_path / "out"), plain)


@pytest.mark.parametrize("method", ["begin", "cell", "end"])
def test_tracker__one_that_hangs_delays_nothing(tmp_path, plain, monkeypatch, method):
    monkeypatch.setattr(tracking, "_SECONDS_BEGINNING", 0.2)
    monkeypatch.setattr(tracking, "_SECONDS_ENDING", 0.5)
    free = threading.Event()

    class Hanging(Recorded):
        """Waits until the test is over."""

    setattr(Hanging, method, lambda self, *_: free.wait())
    tracker("hanging")(Hanging)
    started = time.monotonic()
    try:
        result = call("study", "run", tmp_path / "study.toml", "--out", tmp_path / "out", "--track", "hanging")
    finally:
        TRACKERS.pop("hanging")
        free.set()
    assert result.exit_code == 0
    assert "the tracker hanging is still at work" in result.stderr
    assert time.monotonic() - started < 30
    assert_same_tables(tables(tmp_path / "out"), plain)


def test_tracker__one_that_exits_ends_nothing(tmp_path, plain):
    class Exiting(Recorded):
        """Calls sys.exit."""

        def cell(self, row):
            raise SystemExit(3)

    tracker("exiting")(Exiting)
    try:
        result = call("study", "run", tmp_path / "study.toml", "--out", tmp_path / "out", "--track", "exiting")
    finally:
        TRACKERS.pop("exiting")
    assert result.exit_code == 0
    assert "the tracker exiting failed (SystemExit)" in result.stderr
    assert Exiting.calls[-1] == ("end", True)
    assert_same_tables(tables(tmp_path / "out"), plain)


def test_tracker__unknown_name_before_anything_is_measured(tmp_path):
    path = write_small(tmp_path, n_models=1)
    with pytest.raises(TrackingError, match=r"There is no tracker 'tensorbord'\. Did you mean 'tensorboard'\?"):
        call("study", "run", path, "--out", tmp_path / "out", "--track", "recorded", "--track", "tensorbord")
    assert not (tmp_path / "out").exists()
    assert Recorded.calls == []


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy"),
                                              ("tensorboard", "tensorboard"), ("trackio", "trackio")])  # fmt: skip
def test_tracker__a_missing_library_is_named_before_anything_is_measured(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)  # as if it were not installed
    monkeypatch.setattr("layercrit.trackers.libraries.find_spec", lambda name: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = write_small(tmp_path, n_models=1)
    with pytest.raises(TrackingError, match=rf"needs {module}, which cannot be imported .*`pip install {name}`"):
        call("study", "run", path, "--out", tmp_path / "out", "--track", "recorded", "--track", name)
    assert not (tmp_path / "out").exists()
    assert Recorded.calls == []


# from Python


def test_tracking__in_python(tmp_path):
    said = []
    with Tracking(["recorded"], tmp_path / "files", "mine", {"a": 1}, said.append) as running:
        running.cell({"n_done": 1, "n_planned": 2})
    assert said == ["recorded: in a list"]
    assert Recorded.calls == [
        ("begin", "mine", {"a": 1}, tmp_path / "files"), ("cell", {"n_done": 1, "n_planned": 2}), ("progress", 1, 2),
        ("end", True),
    ]  # fmt: skip


def test_tracker__needs_begin_cell_and_end():
    class Without(Tracker):
        def begin(self, name, config, folder):
            return None

    with pytest.raises(TypeError, match="abstract"):
        Without()


# names


def test_metric_of__every_cell_has_its_own():
    row = {"model": "m", "layer": "layer1.0", "reset": "rerandomize"}
    assert metric_of(row) == "criticality/m/layer1.0"
    assert metric_of({**row, "reset": "zero"}) == "criticality/m/layer1.0/zero"
    assert metric_of({"model": "m", "reset": "zero"}, "mean_criticality") == "mean_criticality/m/zero"
    assert metric_of({**row, "model": "\udcff"}).encode()


@pytest.mark.parametrize("name", ["criticality/file:m*?a=1/fc", "a//b", "a/../b", "/a", "a/", "x" * 300, "."])
def test_plain_name__mlflow_takes_it_and_it_is_unlike_others(name):
    validate = pytest.importorskip("mlflow.utils.validation")._validate_metric_name
    validate(plain_name(name))
    other = f"{name[:-1]}~" if len(name) < 300 else name + "x"
    assert plain_name(name) != plain_name(other)
    assert plain_name(name) == plain_name(name)
    assert len(plain_name(name)) <= 250


def test_plain_name__leaves_what_is_plain():
    assert plain_name("criticality/resnet50.a1_in1k/layer1.0.conv1") == "criticality/resnet50.a1_in1k/layer1.0.conv1"
