"""The callback on_cell: every new cell once, after it was committed, and errors that are seen but lose nothing."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from forked import forked_workers
from layercrit.cell_columns import CELL_COLUMNS
from layercrit.measuring import measure
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from running_jobs import LAYERS, PLACE, Inline, Killed, assert_same_tables, run, tables, write_small
from small_subjects import fresh

SO_FAR = ["n_done", "n_planned"]
ONLY_IN_FILE = ["run", "raw"]
BY = ["model", "reset", "layer", "trial"]


def assert_rows_are_cells(rows, cells):
    """Rows in any order are the study's cells, bit for bit."""
    found = pd.DataFrame(rows).drop(columns=SO_FAR).sort_values(BY, ignore_index=True)
    expected = cells.drop(columns=ONLY_IN_FILE).sort_values(BY, ignore_index=True)
    assert set(CELL_COLUMNS) <= set(found)
    found["seed"] = found["seed"].astype("UInt64")
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_exact=True)


# studies


@pytest.mark.parametrize("n_workers", [0, 2])
def test_run_study__every_cell_once_as_in_the_table(tmp_path, n_workers):
    rows = []
    executor = LocalProcesses([PLACE] * n_workers) if n_workers else Inline()
    with forked_workers():
        run(write_small(tmp_path), tmp_path / "out", executor, on_cell=rows.append)
    assert_rows_are_cells(rows, load_study(tmp_path / "out").cells)
    assert [row["n_done"] for row in rows] == list(range(1, 13))
    assert rows[-1]["n_planned"] == 12


def test_run_study__several_resets(tmp_path):
    rows = []
    path = write_small(tmp_path, protocol={"resets": ["rerandomize", "zero"]})
    run(path, tmp_path / "out", on_cell=rows.append)
    assert {row["reset"] for row in rows} == {"rerandomize", "zero"}
    assert_rows_are_cells(rows, load_study(tmp_path / "out").cells)
    assert rows[-1]["n_done"] == rows[-1]["n_planned"] == len(rows)


def test_run_study__a_resumed_run_has_new_cells_only(tmp_path):
    path, first, second = write_small(tmp_path), [], []
    with pytest.raises(Killed):
        run(path, tmp_path / "out", Inline(stop_after=6), on_cell=first.append)
    run(path, tmp_path / "out", on_cell=second.append)
    assert 0 < len(first) < 12
    assert_rows_are_cells([*first, *second], load_study(tmp_path / "out").cells)
    assert (second[-1]["n_done"], second[-1]["n_planned"]) == (12, 12)
    third = []
    run(path, tmp_path / "out", on_cell=third.append)
    assert third == []


def test_run_study__is_called_after_the_cell_was_committed(tmp_path):
    seen = []

    def look(row):
        with Store(tmp_path / "out") as store:
            seen.append(row["key"] in store.known([row["key"]]))

    run(write_small(tmp_path, n_models=1), tmp_path / "out", on_cell=look)
    assert seen == [True] * 6


def test_run_study__pilot_and_plan(tmp_path):
    rows = []
    path = write_small(
        tmp_path, n_models=1, trials=None, n_images=60, protocol={"half_width": 0.2, "pilot": 4, "max_trials": 12}
    )
    run(path, tmp_path / "out", on_cell=rows.append)
    cells = load_study(tmp_path / "out").cells
    last = {row["key"]: row for row in rows}
    assert set(cells["key"]) <= set(last)
    assert_rows_are_cells([last[key] for key in cells["key"]], cells)
    assert rows[-1]["n_done"] == rows[-1]["n_planned"] == len(cells)


def test_run_study__an_error_is_said_once_and_loses_nothing(tmp_path):
    path, seen = write_small(tmp_path), []
    run(path, tmp_path / "plain")

    def wrong(row):
        seen.append(row["key"])
        return row["no such column"]

    with pytest.warns(RuntimeWarning) as warned:
        report = run(path, tmp_path / "out", on_cell=wrong)
    assert len(warned) == 1
    assert "KeyError: 'no such column'" in str(warned[0].message)
    assert f"{__file__}, line {wrong.__code__.co_firstlineno + 2}" in str(warned[0].message)
    assert len(seen) == report.n_measured == 12
    assert_same_tables(tables(tmp_path / "out"), tables(tmp_path / "plain"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeWarning])
def test_run_study__what_ends_a_run_loses_no_cell(tmp_path, error):
    """Ctrl-C in a callback, and python -W error."""
    path, rows = write_small(tmp_path), []
    run(path, tmp_path / "plain")

    def stop(row):
        rows.append(row)
        raise KeyboardInterrupt if error is KeyboardInterrupt else ValueError

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(error):
            run(path, tmp_path / "out", on_cell=stop)
    assert len(rows) == 1
    assert set(load_study(tmp_path / "out").cells["layer"]) == set(LAYERS)
    run(path, tmp_path / "out")
    assert_same_tables(tables(tmp_path / "out"), tables(tmp_path / "plain"))


# one model


PIXELS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (60, 3, 2, 2), dtype=np.uint8))


def network():
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

    made = fresh(build, 1)
    with torch.no_grad():
        made[3].weight.mul_(20)
    return made


def test_measure__every_cell_once_as_in_the_table():
    rows = []
    found = measure(network(), PIXELS, trials=3, progress=False, on_cell=rows.append)
    cells = pd.DataFrame(rows).drop(columns=SO_FAR).sort_values(["depth", "trial"], ignore_index=True)
    pd.testing.assert_frame_equal(cells.astype({"seed": "uint64"}), found.cells, check_exact=True)
    assert [(row["n_done"], row["n_planned"]) for row in rows] == [(n, 6) for n in range(1, 7)]
    more = []
    measure(network(), PIXELS, trials=5, progress=False, resume=found, on_cell=more.append)
    assert {row["trial"] for row in more} == {3, 4}
    assert [(row["n_done"], row["n_planned"]) for row in more] == [(n, 10) for n in range(7, 11)]


def test_measure__for_a_half_width_the_last_cell_is_the_last_planned():
    rows = []
    asked = {"half_width": 0.1, "pilot": 5, "max_trials": 40, "dtype": "float32"}
    found = measure(network(), PIXELS, progress=False, on_cell=rows.append, **asked)
    assert rows[-1]["n_done"] == rows[-1]["n_planned"] == len(found.cells)


def test_measure__an_error_is_said_once_and_loses_nothing():
    def wrong(row):
        raise ValueError("mine")

    plain = measure(network(), PIXELS, trials=3, progress=False)
    with pytest.warns(RuntimeWarning, match="ValueError: mine") as warned:
        found = measure(network(), PIXELS, trials=3, progress=False, on_cell=wrong)
    assert len(warned) == 1
    assert found.cells.equals(plain.cells)
