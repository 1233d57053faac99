"""The files of a result: where its record is, all else is there."""

import json

import pandas as pd
import pytest

from layercrit.result_files import write_result

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
