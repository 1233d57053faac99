"""Each library's tracker, by the library itself: what its own reader finds is what the study's tables have.

Runs are processes of their own, without network, that begin with two trials and are resumed with three.
"""

import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from layercrit.study.tables import load_study
from layercrit.trackers.libraries import OLDEST_TRACKIO
from layercrit.trackers.tracker import metric_of
from running_jobs import assert_same_tables, run, tables, write_small
from tracked_runs import Server, track

pytestmark = pytest.mark.slow
TRACKED = ("tensorboard", "mlflow", "wandb")


def write(folder, trials):
    """Two models and two resets; in one cell the new values are the trained ones, so it is not ok."""
    path = write_small(folder, trials=trials, protocol={"resets": ["rerandomize", "zero"]}, study={"name": "small"})
    state = load_file(folder / "m1.safetensors")
    save_file({name: value * (not name.startswith("3")) for name, value in state.items()}, folder / "m1.safetensors")
    return path


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a study that was run and resumed with all three trackers, and what the two commands printed."""
    for name in TRACKED:
        pytest.importorskip(name)
    pytest.importorskip("sqlalchemy")
    folder = tmp_path_factory.mktemp("tracked")
    results = [track(write(folder, trials), folder / "out", *TRACKED) for trials in (2, 3)]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "warning: the tracker" not in result.stderr
    return folder / "out", results


def expected(folder):
    """Name of a metric -> trial -> criticality, of the cells that are ok."""
    found = defaultdict(dict)
    cells = load_study(folder).cells
    assert set(cells["status"]) == {"ok", "unchanged"}, "or this does not show what becomes of the others"
    for row in cells[cells["status"] == "ok"].to_dict("records"):
        found[metric_of(row)][row["trial"]] = row["cosine"]
    return dict(found)


def means(folder):
    return {metric_of(row, "mean_criticality"): row["criticality"] for row in load_study(folder).by_model().dropna(
        subset="criticality").to_dict("records")}  # fmt: skip


def test_tracked__tables_are_those_of_a_run_without_trackers(tracked, tmp_path):
    run(write(tmp_path, 3), tmp_path / "out")
    assert_same_tables(tables(tracked[0]), tables(tmp_path / "out"))


def test_tracked__nothing_is_written_beside_the_study(tracked):
    folder, _ = tracked
    assert list((folder.parent / "cwd").iterdir()) == []
    written = {path.name for path in (folder / "tracking").iterdir()}
    assert written == {"figures", "mlflow-artifacts", "mlflow-run-id", "mlflow.db", "tensorboard", "wandb",
                       "wandb-run-id"}  # fmt: skip


def test_tracked__says_where_to_look(tracked):
    folder, (first, _) = tracked
    place = folder / "tracking"
    assert f"`tensorboard --logdir {place / 'tensorboard'}`" in first.stderr
    assert f"`mlflow ui --backend-store-uri sqlite:///{place / 'mlflow.db'}`" in first.stderr
    assert f"no API key is configured (`wandb login`); upload with `wandb sync {place}/wandb/offline" in first.stderr


# TensorBoard


@pytest.fixture(scope="module")
def events(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tracked[0] / "tracking" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_tensorboard__cells(tracked, events):
    wanted = expected(tracked[0])
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("criticality/")]
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
    assert found == {
        tag: {step: float(np.float32(value)) for step, value in of_tag.items()} for tag, of_tag in wanted.items()
    }


def test_tensorboard__progress_and_result(tracked, events):
    folder, _ = tracked
    n_cells = len(load_study(folder).cells)
    last = events.Scalars("progress/n_done")[-1]
    assert (last.step, last.value) == (n_cells, n_cells)
    assert events.Scalars("progress/n_planned")[-1].value == n_cells
    for name, value in means(folder).items():
        assert events.Scalars(name)[-1].value == float(np.float32(value))
    for name in ("criticality", "ranking"):
        shown = Image.open(BytesIO(events.Images(f"figures/{name}")[-1].encoded_image_string))
        drawn = Image.open(folder / "tracking" / "figures" / f"{name}.png").convert("RGB")
        assert np.array_equal(np.asarray(shown), np.asarray(drawn))
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert load_study(folder).record["probe_set"]["sha256"] in texts["config/text_summary"]
    assert texts["layers/text_summary"].count("\n") == 1 + len(load_study(folder).to_pandas())


# MLflow


@pytest.fixture(scope="module")
def mlflow_run(tracked):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tracked[0] / 'tracking' / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "layercrit"]
    (found,) = client.search_runs([experiment.experiment_id])  # one, although it was resumed
    return client, found


def test_mlflow__cells(tracked, mlflow_run):
    client, one = mlflow_run
    found = {}
    for name in one.data.metrics:
        if name.startswith("criticality/"):
            found[name] = {value.step: value.value for value in client.get_metric_history(one.info.run_id, name)}
    assert found == expected(tracked[0])


def test_mlflow__progress_and_result(tracked, mlflow_run):
    folder, _ = tracked
    _, one = mlflow_run
    study = load_study(folder)
    assert (one.info.run_name, one.info.status) == ("small", "FINISHED")
    assert one.data.metrics["progress/n_done"] == one.data.metrics["progress/n_planned"] == len(study.cells)
    for name, value in means(folder).items():
        assert one.data.metrics[name] == value
    assert one.data.params["probe_set.sha256"] == study.record["probe_set"]["sha256"]
    assert one.data.params["protocol.trials"] == "2"  # which MLflow does not let be changed
    artifacts = Path(one.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(folder / "tracking" / "mlflow-artifacts")
    config = json.loads((artifacts / "config.json").read_text())
    assert config["protocol"]["trials"] == 3
    assert config["models"] == dict(zip(study.models["model"], study.models["reference"], strict=True))
    layers = pd.read_csv(artifacts / "layers.csv")
    np.testing.assert_array_equal(layers["criticality"], study.to_pandas()["criticality"])
    drawn = (folder / "tracking" / "figures" / "ranking.png").read_bytes()
    assert (artifacts / "figures" / "ranking.png").read_bytes() == drawn


def test_mlflow__the_users_server_goes_first(tmp_path):
    pytest.importorskip("sqlalchemy")
    own = f"sqlite:///{tmp_path / 'own.db'}"
    result = track(write(tmp_path, 2), tmp_path / "out", "mlflow", MLFLOW_TRACKING_URI=own, MLFLOW_EXPERIMENT_NAME="e")
    assert result.returncode == 0, result.stderr
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=own)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert found.data.metrics.keys() >= expected(tmp_path / "out").keys()
    assert not (tmp_path / "out" / "tracking" / "mlflow.db").exists()


def test_mlflow__a_server_that_is_gone_is_said_once(tmp_path):
    pytest.importorskip("mlflow")
    variables = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    result = track(write(tmp_path, 2), tmp_path / "out", "mlflow", **variables)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: the tracker mlflow failed") == 1
    run(tmp_path / "study.toml", tmp_path / "plain")
    assert_same_tables(tables(tmp_path / "out"), tables(tmp_path / "plain"))


# W&B


def records(path):
    """Yield the records of a .wandb file: W&B's messages in LevelDB's log format, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:  # of a block, too few for a header
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.fixture(scope="module")
def wandb_files(tracked):
    """The records of each of the two offline runs."""
    folders = sorted((tracked[0] / "tracking" / "wandb").glob("offline-run-*"))
    return [list(records(next(folder.glob("*.wandb")))) for folder in folders]


def history(of_file):
    """Return the logged rows as dicts."""
    for record in of_file:
        if record.WhichOneof("record_type") == "history":
            yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def test_wandb__cells(tracked, wandb_files):
    found = defaultdict(dict)
    for of_file in wandb_files:
        for row in history(of_file):
            for name in row:
                if name.startswith("criticality/"):
                    found[name][row["trial"]] = row[name]
    assert found == expected(tracked[0])


def test_wandb__is_one_run_with_config_and_result(tracked, wandb_files):
    folder, _ = tracked
    study = load_study(folder)
    assert len(wandb_files) == 2
    runs = [record.run for of_file in wandb_files for record in of_file if record.WhichOneof("record_type") == "run"]
    assert {(one.run_id, one.project, one.display_name) for one in runs} == {
        ((folder / "tracking" / "wandb-run-id").read_text(), "layercrit", "small")
    }
    config, summary = {}, {}
    for record in wandb_files[-1]:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        elif kind == "summary":
            summary |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                        for item in record.summary.update}  # fmt: skip
    assert config["protocol"]["trials"] == 3
    assert list(config["models"]) == ["m0", "m1"]
    for name, value in means(folder).items():
        assert summary[name] == value
    rows = list(history(wandb_files[-1]))
    assert [row["progress/n_done"] for row in rows if "progress/n_done" in row][-1] == len(study.cells)
    (result,) = (row for row in rows if any(name.startswith("layers") for name in row))
    assert {"figures/criticality", "figures/ranking"} <= {name.removesuffix("/path") for name in result}


def test_wandb__without_a_key_nothing_is_connected_to(tmp_path):
    pytest.importorskip("wandb")
    server = Server()
    result = track(write(tmp_path, 2), tmp_path / "out", "wandb", WANDB_BASE_URL=server.address)
    server.close()
    assert result.returncode == 0, result.stderr
    assert "wandb: offline, as no API key is configured" in result.stderr
    assert server.connections == []


@pytest.mark.parametrize("answers", [True, False])
def test_wandb__a_server_that_does_not_answer_makes_it_offline(tmp_path, answers):
    """One that takes the connection and says nothing, and one that is not there."""
    pytest.importorskip("wandb")
    server = Server()
    if not answers:
        server.close()
    variables = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40}
    result = track(write(tmp_path, 2), tmp_path / "out", "wandb", **variables)
    server.close()
    assert result.returncode == 0, result.stderr
    assert f"wandb: offline, as {server.address} does not answer; upload with `wandb sync " in result.stderr
    (file,) = (tmp_path / "out" / "tracking" / "wandb").glob("offline-run-*/*.wandb")
    assert sum(any(name.startswith("criticality/") for name in row) for row in history(list(records(file)))) == (
        sum(map(len, expected(tmp_path / "out").values()))
    )


def test_wandb__the_users_variables_go_first(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "own").mkdir()
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "own"), "WANDB_PROJECT": "p", "WANDB_NAME": "n",
                 "WANDB_RUN_ID": "r1"}  # fmt: skip
    result = track(write(tmp_path, 2), tmp_path / "out", "wandb", **variables)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "own" / "wandb").glob("offline-run-*/*.wandb")
    found = next(record.run for record in records(file) if record.WhichOneof("record_type") == "run")
    assert (found.run_id, found.project, found.display_name) == ("r1", "p", "n")


# Trackio


@pytest.fixture(scope="module")
def trackio_says(tmp_path_factory):
    """A study that was run and resumed with trackio, and a function that asks its command."""
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed: none that fits the versions of constraints.txt")
    if tuple(map(int, metadata.version("trackio").split(".")[:2])) < OLDEST_TRACKIO:
        pytest.skip(f"trackio {metadata.version('trackio')} is too old")
    folder = tmp_path_factory.mktemp("trackio")
    for trials in (2, 3):
        result = track(write(folder, trials), folder / "out", "trackio", options=["--json"])
        assert result.returncode == 0, result.stderr
        assert "warning: the tracker" not in result.stderr
        assert json.loads(result.stdout)["measured_now"]

    def ask(*words):
        command = [
            sys.executable,
            "-m",
            "trackio.cli",
            "get",
            *words,
            "--project",
            "layercrit",
            "--run",
            "small",
            "--json",
        ]
        place = os.environ | {"TRACKIO_DIR": str(folder / "out" / "tracking" / "trackio")}
        return json.loads(subprocess.run(command, env=place, capture_output=True, text=True, check=True).stdout)

    return folder / "out", ask


def test_trackio__cells(trackio_says):
    folder, ask = trackio_says
    for name, values in expected(folder).items():
        assert {one["step"]: one["value"] for one in ask("metric", "--metric", name)["values"]} == values


def test_trackio__config_progress_and_result(trackio_says):
    folder, ask = trackio_says
    study, about = load_study(folder), ask("run")
    assert about["config"]["probe_set"]["sha256"] == study.record["probe_set"]["sha256"]
    assert {"layers", "figures/criticality", "figures/ranking", *expected(folder), *means(folder)} <= set(
        about["metrics"]
    )
    assert ask("metric", "--metric", "progress/n_done")["values"][-1]["value"] == len(study.cells)
    for name, value in means(folder).items():
        assert ask("metric", "--metric", name)["values"][-1]["value"] == value
    assert list((folder.parent / "cwd").iterdir()) == []
