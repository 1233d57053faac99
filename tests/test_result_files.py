"""The files of a result: where its record is, all else is there."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from layercrit.cli import cli
from layercrit.errors import LayercritError
from layercrit.feature_criticality import measure_feature_criticality
from layercrit.result_files import KeptRows, write_result
from layercrit.worst_case import measure_worst_case
from test_module_criticality import LABELS, OPTIONS, pixels, trained

TABLE = pd.DataFrame({"layer": ["a", "b"], "value": [1.5, 2.5]})


def write(folder, plot, value=1):
    return write_result(folder, "worst-case", "worst case", {".csv": TABLE}, {"value": value}, plot)


def figure():
    from matplotlib.figure import Figure

    return Figure()


def raising(error):
    def plot():
        raise error

    return plot


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_result__returns_what_it_writes(tmp_path):
    written = write(tmp_path / "out", figure)
    assert sorted(path.name for path in written) == names(tmp_path / "out")
    assert names(tmp_path / "out") == ["worst-case.csv", "worst-case.json", "worst-case.png", "worst-case.svg"]
    assert json.loads((tmp_path / "out" / "worst-case.json").read_text()) == {"value": 1}


def test_write_result__the_record_of_one_that_was_interrupted_is_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, raising(KeyboardInterrupt()))
    assert names(tmp_path) == ["worst-case.csv"]
    write(tmp_path, figure)
    assert len(names(tmp_path)) == 4
    with pytest.raises(KeyboardInterrupt):  # and so is that of the result which it was to replace
        write(tmp_path, raising(KeyboardInterrupt()), value=2)
    assert "worst-case.json" not in names(tmp_path)


def test_write_result__a_picture_that_cannot_be_drawn_loses_no_numbers(tmp_path):
    with pytest.raises(RuntimeError, match="no font"):
        write(tmp_path, raising(RuntimeError("no font")))
    assert names(tmp_path) == ["worst-case.csv", "worst-case.json"]


# --- rows of an unfinished measurement --------------------------------------------------------------------------------


@contextmanager
def interrupted_after(monkeypatch, n_rows):
    """As by Ctrl-C, once so many rows are kept; yields the names of the layers whose rows were."""
    names, add = [], KeptRows.add

    def add_then_interrupt(self, name, row):
        add(self, name, row)
        names.append(name)
        if len(names) == n_rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptRows, "add", add_then_interrupt)
        yield names


def test_kept_rows__of_the_same_measurement_only(tmp_path):
    file = tmp_path / "out" / "kept.json"
    row = {"layer": "a", "value": 0.1 + 0.2, "other": math.nan, "n": 3, "none": None}
    KeptRows(file, {"of": (1, "x")}).add("a", row)
    again = KeptRows(file, {"of": [1, "x"]})
    assert again.known.keys() == {"a"}
    assert repr(again.known["a"]) == repr(row), "to the last digit"
    again.add("b", {})
    assert KeptRows(file, {"of": [1, "x"]}).known.keys() == {"a", "b"}
    assert not KeptRows(file, {"of": [1, "y"]}).known
    assert not KeptRows(None, {}).known


@pytest.mark.parametrize("content", ["", "{", "[]", '{"of": {}}', '{"of": {}, "rows": {"a": {}, "b": 1}}'])
def test_kept_rows__a_damaged_file_keeps_nothing(content, tmp_path):
    (tmp_path / "kept.json").write_text(content)
    assert not KeptRows(tmp_path / "kept.json", {}).known


def test_kept_rows__a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayercritError, match=r"Finished layers cannot be kept in .*--out"):
        KeptRows(tmp_path / "file" / "kept.json", {}).add("a", {})


MEASURES = {"worst-case": (measure_worst_case, {"steps": 4}), "feature-criticality": (measure_feature_criticality, {})}


@pytest.mark.parametrize("name", MEASURES)
def test_measures__go_on_after_an_interruption(name, tmp_path, monkeypatch):
    measure, asked = MEASURES[name]
    network, kept = trained()[1], tmp_path / "kept.json"

    def measured(**more):
        return measure(network, pixels(), labels=LABELS, progress=False, **asked, **more).to_pandas()

    whole = measured()
    with pytest.raises(KeyboardInterrupt), interrupted_after(monkeypatch, 2) as first:
        measured(keep_rows=kept)
    with interrupted_after(monkeypatch, None) as rest:
        pd.testing.assert_frame_equal(measured(keep_rows=kept), whole, check_exact=True)
    assert [*first, *rest] == list(whole["layer"])
    with interrupted_after(monkeypatch, None) as anew:
        measured(keep_rows=kept, restarts=3)
    assert anew == list(whole["layer"]), "more restarts give other numbers"


@pytest.mark.parametrize("command", MEASURES)
def test_commands__go_on_after_an_interruption(command, tmp_path, monkeypatch):
    save_file(trained()[1].state_dict(), tmp_path / "m.safetensors")
    np.savez(tmp_path / "images.npz", images=pixels(), labels=LABELS)
    asked = (command, f"file:{tmp_path}/m.safetensors?{OPTIONS}", "--images", tmp_path / "images.npz")

    def invoke(out):
        return CliRunner().invoke(cli, [*map(str, asked), "--out", str(tmp_path / out)])

    with interrupted_after(monkeypatch, 2) as first:
        assert invoke("out").exit_code != 0
    assert not (tmp_path / "out" / f"{command}.json").exists()
    with interrupted_after(monkeypatch, None) as rest:
        shown = invoke("out")
    assert shown.exit_code == 0, shown.output
    assert len(first) == 2
    assert rest
    assert not set(first) & set(rest)
    assert invoke("whole").exit_code == 0
    tables = [(tmp_path / out / f"{command}.csv").read_text() for out in ("out", "whole")]
    assert tables[0] == tables[1]
    assert not list((tmp_path / "out").glob("*kept*"))
