import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from layercrit.errors import StudyError
from layercrit.study import store_file
from layercrit.study.rows import COLUMNS
from layercrit.study.store import (
    FILE,
    CellRow,
    FailureRow,
    ModelRow,
    PartRow,
    PlanRow,
    Store,
)
from layercrit.study.store_file import SCHEMA

LARGEST = 2**64 - 1


def plan_row(model="a", layer="conv1", reset="rerandomize", trial=0, key=None, depth=0):
    key = key or f"{model}/{layer}/{reset}/{trial}"
    return PlanRow(model, layer, reset, trial, key, "conv", "stem", depth, 144, 0.5)


def cell(key, **changes):
    values = {"cosine": 0.25, "l1": 0.5}
    return replace(CellRow(key, "ok", 7, 1.5, 3, values, None, None, 0.125, "2025-01-02T03:04:05+00:00"), **changes)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path, create=True) as opened:
        yield opened


def filled(store, models=("a", "b"), layers=("conv1", "fc"), trials=2):
    """Plan all cells of some models, and measure them."""
    plan = [
        plan_row(model, layer, trial=trial, depth=depth)
        for model in models
        for depth, layer in enumerate(layers)
        for trial in range(trials)
    ]
    with store.transaction():
        store.put_models([ModelRow(model, f"file:{model}") for model in models])
        store.put_plan(plan)
        store.put_cells([cell(row.key) for row in plan])
    return plan


def pragma(path, name):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


# --- the file -------------------------------------------------------------------------------------------------------


def test_store__is_marked_as_a_studys(store):
    assert pragma(store.path, "application_id") == int.from_bytes(b"lcrt", "big")
    assert pragma(store.path, "user_version") == SCHEMA == 5
    assert pragma(store.path, "journal_mode") == "wal"


def test_store__opened_again_holds_what_was_committed(tmp_path):
    with Store(tmp_path / "deep" / "study", create=True) as store:
        filled(store)
        before = store.cells()
    with Store(tmp_path / "deep" / "study") as store:
        pd.testing.assert_frame_equal(store.cells(), before)
    with Store(tmp_path / "deep" / "study", create=True) as store:
        assert len(store.cells()) == 8


def test_store__closing_leaves_one_file(tmp_path):
    with Store(tmp_path, create=True) as store:
        filled(store)
        assert {path.name for path in tmp_path.iterdir()} > {FILE, f"{FILE}-wal"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_store__in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Store("~/study", create=True).close()
    assert (tmp_path / "study" / FILE).is_file()


def test_store__missing(tmp_path):
    with pytest.raises(StudyError, match=rf"There is no study in {tmp_path}: cells.sqlite is missing\. Give the fold"):
        Store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "measurement.json").touch()
    with pytest.raises(
        StudyError, match=r"`layercrit measure` wrote .* name that model in a study file, .*Give the folder"
    ):
        Store(tmp_path)


def test_store__folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"file/cells.sqlite cannot be created \(.*\)\. Name another folder"):
        Store(tmp_path / "file", create=True)


def test_store__other_sqlite_file(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE cells (x)")
    content = (tmp_path / FILE).read_bytes()
    for create in (False, True):
        with pytest.raises(
            StudyError, match=r"is an SQLite file, but not that of a layercrit study\. Name another folder"
        ):
            Store(tmp_path, create=create)
    assert (tmp_path / FILE).read_bytes() == content


def test_store__newer_file(tmp_path):
    Store(tmp_path, create=True).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(StudyError, match=r"has schema version 6, but .* up to 5\. Install the newer"):
        Store(tmp_path)


def test_store__file_of_the_first_schema(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_file, "MIGRATIONS", store_file.MIGRATIONS[:1])
        patch.setattr(store_file, "SCHEMA", 1)
        Store(tmp_path, create=True).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        record = '{"road": "graph", "dtype": "float32"}'
        connection.execute("INSERT INTO models VALUES ('a', 0, 'file:a', 'mine', 'A', 0.5, ?)", [record])
        connection.execute("INSERT INTO models VALUES ('b', 1, 'file:b', NULL, NULL, NULL, NULL)")
        connection.execute("INSERT INTO plan VALUES ('a', 'fc', 'zero', 0, 'k', 'linear', 'fc', 0, 7, 0.5)")
        connection.commit()
    with Store(tmp_path) as store:
        assert store.models() == [
            ModelRow("a", "file:a", "mine", "A", 0.5, {"dtype": "float32", "backend": "exported graph"}),
            ModelRow("b", "file:b"),
        ]
        assert store.plan() == [PlanRow("a", "fc", "zero", 0, "k", "linear", "fc", 0, 7, 0.5)]


def test_put_plan__shape(store):
    row = PlanRow("a", "fc", "zero", 0, "k", "linear", "fc", 0, 7, 0.5, "10x64")
    with store.transaction():
        store.put_plan([row])
    assert store.plan() == [row]


def test_store__older_file_is_migrated(tmp_path, monkeypatch):
    with Store(tmp_path, create=True) as store:
        filled(store)
        before = store.cells()
    step = "ALTER TABLE models ADD COLUMN note TEXT; UPDATE models SET note = 'of ' || model;"
    monkeypatch.setattr(store_file, "MIGRATIONS", (*store_file.MIGRATIONS, step))
    monkeypatch.setattr(store_file, "SCHEMA", SCHEMA + 1)
    for _ in range(2):
        with Store(tmp_path) as store:
            pd.testing.assert_frame_equal(store.cells(), before)
            assert store._rows("SELECT note FROM models ORDER BY position") == [("of a",), ("of b",)]
    assert pragma(tmp_path / FILE, "user_version") == SCHEMA + 1
    with Store(tmp_path / "new", create=True) as store:
        assert "note" in [row[1] for row in store._rows("PRAGMA table_info(models)")]


def test_store__failing_migration_changes_nothing(tmp_path, monkeypatch):
    Store(tmp_path, create=True).close()
    step = "ALTER TABLE models ADD COLUMN note TEXT; UPDATE missing SET x = 1;"
    with monkeypatch.context() as patch:
        patch.setattr(store_file, "MIGRATIONS", (*store_file.MIGRATIONS, step))
        patch.setattr(store_file, "SCHEMA", SCHEMA + 1)
        with pytest.raises(StudyError, match="no such table: missing"):
            Store(tmp_path)
    with Store(tmp_path) as store:
        assert "note" not in [row[1] for row in store._rows("PRAGMA table_info(models)")]


def test_store__no_sqlite_file(tmp_path):
    (tmp_path / FILE).write_bytes(b"no database at all, " * 100)
    with pytest.raises(StudyError, match=r"cells.sqlite cannot be used \(file is not a database\).*if the file is dam"):
        Store(tmp_path)


def test_store__damaged_file(tmp_path):
    with Store(tmp_path, create=True) as store:
        filled(store, layers=[f"layer{n}" for n in range(200)])
        roots = [page for (page,) in store._rows("SELECT rootpage FROM sqlite_master WHERE rootpage > 0")]
    content = bytearray((tmp_path / FILE).read_bytes())
    for page in roots:  # all tables, but not the schema
        content[4096 * (page - 1) : 4096 * page] = b"\x55" * 4096
    (tmp_path / FILE).write_bytes(content)
    with Store(tmp_path) as store:
        for read in (store.cells, store.models, store.plan, store.runs, lambda: store.known(["a"])):
            with pytest.raises(StudyError, match=r"cannot be used \(.*malformed.*\).*start over in another folder"):
                read()


def test_store__full_disk(store):
    plan = filled(store)
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    large = {"cosine": np.random.default_rng(0).random(100_000, dtype=np.float32)}

    def write():
        with store.transaction():
            store.put_failure(FailureRow("a", "zero", 0, "error", "details", "now"))
            store.put_cells([cell("large", per_image=large)])

    with pytest.raises(StudyError, match=r"cannot be used \(.*full.*\)\. If the disk is full, free some space"):
        write()
    assert store.known([*(row.key for row in plan), "large"]) == {row.key for row in plan}
    assert store.failures() == []
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    with store.transaction():  # and it goes on where there is room again
        store.put_cells([cell("large", per_image=large)])
    assert store.known(["large"]) == {"large"}


# --- transactions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, BrokenPipeError])
def test_transaction__rolls_back_wholly(store, error):
    filled(store)

    def write():
        with store.transaction():
            store.put_models([ModelRow("c", "file:c")])
            store.put_plan([plan_row("c")])
            store.put_cells([cell("c/conv1/rerandomize/0")])
            store.put_part("task", part(0, 1))
            store.put_meta("study", {"name": "x"})
            store.put_run("now", {})
            raise error

    with pytest.raises(error):
        write()
    assert [row.model for row in store.models()] == ["a", "b"]
    assert len(store.plan()) == len(store.cells()) == 8
    assert (store.parts("task"), store.meta("study"), store.runs()) == ([], None, [])
    with store.transaction():
        store.put_meta("study", {"name": "y"})
    assert store.meta("study") == {"name": "y"}


WRITER = """
import sys, time
from layercrit.store import CellRow, ModelRow, PlanRow, Store
store = Store(sys.argv[1], create=True)
with store.transaction():
    store.put_models([ModelRow("a", "file:a")])
for trial in range(10**6):
    with store.transaction():
        store.put_plan([PlanRow("a", layer, "zero", trial, f"{layer}{trial}", None, None, 0, 1, 0.5) for layer in "xy"])
        store.put_cells([CellRow(f"x{trial}", "ok", trial, 1.0, 1, {"cosine": 0.5})])
        if sys.argv[2] == str(trial):
            print("inside", flush=True)
            time.sleep(60)
        store.put_cells([CellRow(f"y{trial}", "ok", trial, 1.0, 1, {"cosine": 0.5})])
    print(trial, flush=True)
"""


@pytest.fixture
def writing(tmp_path):
    """Start another process that writes, and stops inside a transaction; end it without mercy."""
    started = []

    def start(stop_in):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(stop_in)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_transaction__a_killed_process_leaves_the_last_committed_state(tmp_path, writing):
    process = writing(3)
    assert [process.stdout.readline().strip() for _ in range(4)] == ["0", "1", "2", "inside"]
    with Store(tmp_path) as store:
        assert len(store.cells()) == 6, "readers see what is committed while another process is inside a transaction"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Store(tmp_path) as store:
        assert store.cells()["key"].to_list() == ["x0", "y0", "x1", "y1", "x2", "y2"]
        assert len(store.plan()) == 6
        with store.transaction():
            store.put_cells([cell("x3")])
        assert store.known(["x3"]) == {"x3"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_store__many_read_while_one_writes(tmp_path, writing):
    process = writing(10**6)
    process.stdout.readline()
    n_before = 0
    for _ in range(30):
        with Store(tmp_path) as store:
            cells = store.cells()
        assert len(cells) % 2 == 0, "a reader saw half a transaction"
        assert len(cells) >= n_before
        n_before = len(cells)
    assert n_before > 2


# --- facts, models, plan --------------------------------------------------------------------------------------------


def test_meta__any_plain_data(store):
    assert store.meta("study") is None
    assert store.meta("study", {}) == {}
    facts = {"name": "é\"'\n\x00", "trials": 3, "seed": LARGEST, "level": 0.1, "none": None, "list": [1, [True]]}
    for value in (facts, {}):
        with store.transaction():
            store.put_meta("study", value)
        assert store.meta("study") == value


def test_runs__in_order(store):
    with store.transaction():
        numbers = [store.put_run(f"at {n}", {"machine": f"m{n}"}) for n in range(3)]
    assert numbers == [1, 2, 3]
    assert store.runs()[1:] == [
        {"run": 2, "started": "at 1", "machine": "m1"},
        {"run": 3, "started": "at 2", "machine": "m2"},
    ]


def test_put_models__round_trip_in_order(store):
    models = [
        ModelRow("z", "zoo:z", "adversarial_training", "Z é", 0.7615, {"sha256": "0" * 64, "notes": ["x"]}),
        ModelRow("a", "file:/a?arch=py:m:f", attack_norm="l2", eps=0.5),
    ]
    with store.transaction():
        store.put_models(models)
    assert store.models() == models


def test_put_models__keeps_what_is_known_under_the_same_name_and_reference(store):
    filled(store, ("a", "b", "c"))
    with store.transaction():
        for model in "abc":
            store.put_record(model, {"of": model})
            store.put_failure(FailureRow(model, "zero", 0, "error", "details", "now"))
        store.put_models([ModelRow("c", "file:c", "baseline"), ModelRow("a", "file:other")])
    assert store.models() == [ModelRow("c", "file:c", "baseline", record={"of": "c"}), ModelRow("a", "file:other")]
    assert {row.model for row in store.plan()} == {"c"}
    assert [row.model for row in store.failures()] == ["c"]
    assert len(store.known([f"{model}/fc/rerandomize/0" for model in "abc"])) == 3, "cells that are measured stay"


def test_put_plan__new_keys_win(store):
    filled(store, ("a",), ("conv1",), 1)
    with store.transaction():
        store.put_plan([plan_row("a", key="other")])
    assert [row.key for row in store.plan()] == ["other"]
    assert store.cells().empty


def test_plan__by_model_reset_trial_and_depth(store):
    rows = [
        plan_row(model, layer, reset, trial, depth=depth)
        for model in "ab"
        for reset in ("rerandomize", "zero")
        for trial in (0, 1, 2, 10)
        for depth, layer in enumerate(["z", "y"])
    ]
    with store.transaction():
        store.put_plan(np.random.default_rng(1).permutation(np.array(rows, object)))
    assert store.plan() == rows


@pytest.mark.parametrize(
    ("which", "left"),
    [
        ((), []),
        (("a",), ["b00", "b01", "b10", "b11"]),
        (("a", "1"), ["a00", "a01", "b00", "b01", "b10", "b11"]),
        (("a", "1", 0), ["a00", "a01", "a11", "b00", "b01", "b10", "b11"]),
    ],
)
def test_clear_plan__of_what(store, which, left):
    rows = [plan_row(m, reset=r, trial=t, key=f"{m}{r}{t}") for m in "ab" for r in "01" for t in (0, 1)]
    with store.transaction():
        store.put_plan(rows)
        store.clear_plan(*which)
    assert [row.key for row in store.plan()] == left


# --- cells ----------------------------------------------------------------------------------------------------------


def test_cells__joins_plan_models_and_measurements(store):
    """Models in the study's order, then depth and trials; cells not planned or not measured are not there."""
    with store.transaction():
        run = store.put_run("now", {})
        store.put_models([ModelRow("z", "zoo:z"), ModelRow("a", "zoo:a")])
        store.put_plan([plan_row(m, la, trial=t, depth=d) for m in "az" for d, la in enumerate("yx") for t in (1, 0)])
        store.put_cells([cell(f"{m}/{la}/rerandomize/{t}") for m in "az" for la in "xy" for t in (0, 1)][1:], run)
        store.put_cells([cell("stray")])
    cells = store.cells()
    found = list(zip(cells["model"], cells["layer"], cells["trial"], strict=True))
    assert found == [(m, la, t) for m in "za" for la in "yx" for t in (0, 1) if (m, la, t) != ("a", "x", 0)]
    assert list(cells.columns) == [
        "model", "layer", "type", "stage", "depth", "n_parameters", "shape", "flops_after", "reset", "trial",
        "seed", "status", "delta_norm", "n_images", "key", "seconds", "finished", "run", "cosine", "l1", "raw",
    ]  # fmt: skip
    first = cells.iloc[0].to_dict()
    assert first == {
        "model": "z", "layer": "y", "type": "conv", "stage": "stem", "depth": 0, "n_parameters": 144,
        "shape": None, "flops_after": 0.5, "reset": "rerandomize", "trial": 0, "seed": 7, "status": "ok",
        "delta_norm": 1.5,
        "n_images": 3, "key": "z/y/rerandomize/0", "seconds": 0.125, "finished": "2025-01-02T03:04:05+00:00",
        "run": run, "cosine": 0.25, "l1": 0.5, "raw": None,
    }  # fmt: skip


def test_cells__one_measurement_for_all_who_plan_it(store):
    with store.transaction():
        store.put_models([ModelRow("a", "file:a"), ModelRow("b", "file:b")])
        store.put_plan([plan_row("a", key="same"), plan_row("b", key="same")])
        store.put_cells([cell("same")])
    assert store.cells()["model"].to_list() == ["a", "b"]


def test_cells__of_an_empty_study(store):
    cells = store.cells()
    assert cells.empty
    assert {"model", "seed", "status", "raw"} <= set(cells.columns)


def test_put_cells__never_overwrites(store):
    filled(store, ("a",), ("conv1",), 1)
    with store.transaction():
        store.put_cells([cell("a/conv1/rerandomize/0", status="nan", seed=8, means={"cosine": 1.0})])
    (row,) = store.cells().to_dict("records")
    assert (row["status"], row["seed"], row["cosine"]) == ("ok", 7, 0.25)


def test_put_cells__seeds_to_the_last_bit(store):
    seeds = [None, LARGEST, 2**63, 2**53 + 1, 0]
    with store.transaction():
        store.put_models([ModelRow("a", "file:a")])
        store.put_plan([plan_row(trial=trial) for trial in range(len(seeds))])
        store.put_cells([cell(f"a/conv1/rerandomize/{trial}", seed=seed) for trial, seed in enumerate(seeds)])
    found = store.cells()["seed"]
    assert found.dtype == "UInt64"
    assert [None if seed is pd.NA else int(seed) for seed in found] == seeds


def test_put_cells__means_that_are_no_numbers(store):
    means = [{"cosine": float("nan"), "l1": 0.1}, {"cosine": float("inf"), "l1": np.float32(0.5)}, {"cosine": 0.25}]
    with store.transaction():
        store.put_models([ModelRow("a", "file:a")])
        store.put_plan([plan_row(trial=trial) for trial in range(3)])
        store.put_cells([cell(f"a/conv1/rerandomize/{trial}", means=of_cell) for trial, of_cell in enumerate(means)])
    cells = store.cells()
    np.testing.assert_array_equal(cells["cosine"], [np.nan, np.nan, 0.25])
    np.testing.assert_array_equal(cells["l1"], [0.1, 0.5, np.nan])
    assert cells["cosine"].dtype == cells["l1"].dtype == np.float64


def test_put_cells__published_rows_as_they_stood(store):
    raw = {"layer": "fc", "pred_cos_sim": "0.99999999999999999", "é": None}
    with store.transaction():
        store.put_models([ModelRow("a", "a"), ModelRow("b", "file:b")])
        store.put_plan([plan_row(), plan_row("b")])
        store.put_cells([CellRow("a/conv1/rerandomize/0", "ok", None, None, None, {"cosine": 0.5}, raw=raw)])
        store.put_cells([cell("b/conv1/rerandomize/0")])  # beside a measured one
    row, measured = store.cells().to_dict("records")
    assert row["raw"] == raw
    assert measured["raw"] is None
    assert pd.isna([row[name] for name in ("seed", "delta_norm", "n_images", "seconds", "finished", "run")]).all()


def test_per_image__of_those_that_have_any(store):
    values = {"cosine": np.float32([0.5, np.nan, 1e-40]), "top1": np.float32([0, 1, 0])}
    with store.transaction():
        store.put_cells([cell("with", per_image=values), cell("without")])
    found = store.per_image(["without", "with"])
    assert list(found) == ["with"]
    with pytest.raises(StudyError, match="study repair"):
        store.per_image(["with", "not found by its key"])
    for name, expected in values.items():
        np.testing.assert_array_equal(found["with"][name], expected)
    assert store.keys_with_images() == {"with"}


def test_per_image__damaged(store):
    with store.transaction():
        store.put_cells([cell("key", per_image={"cosine": np.ones(1000, np.float32)})])
        (blob,) = store._rows("SELECT per_image FROM cells")[0]
        store._connection.execute("UPDATE cells SET per_image = ?", (blob[:-4] + b"\0\0\0\0",))
    with pytest.raises(StudyError, match=r"Per-image values in the study's file .*Restore cells.sq"):
        store.per_image(["key"])


def test_known__more_keys_than_sqlite_takes_at_once(store):
    with store.transaction():
        store.put_cells([cell(f"key {n}") for n in range(0, 40_000, 4)])
    found = store.known(f"key {n}" for n in range(40_000))
    assert found == {f"key {n}" for n in range(0, 40_000, 4)}
    assert store.known([]) == set()


# --- parts and failures ---------------------------------------------------------------------------------------------


def part(start, stop, value=0.0):
    return PartRow(start, stop, 0.5, {"cosine": np.full((2, stop - start), value, np.float32)})


def cosine(row):
    return vars(row)["values"]["cosine"]


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ([], []),
        ([(0, 4), (4, 8)], [(0, 4), (4, 8)]),
        ([(4, 8), (0, 4), (8, 9)], [(0, 4), (4, 8), (8, 9)]),
        ([(0, 4), (8, 12)], [(0, 4)]),
        ([(4, 8)], []),
        ([(0, 4), (3, 8), (4, 6)], [(0, 4)]),
    ],
    ids=["none", "whole", "any order", "gap", "no beginning", "overlap"],
)
def test_parts__up_to_the_first_gap(store, kept, found):
    with store.transaction():
        for number, (start, stop) in enumerate(kept):
            store.put_part("task", part(start, stop, number))
        store.put_part("other", part(8, 12))
    parts = store.parts("task")
    assert [(row.start, row.stop) for row in parts] == found
    for row in parts:
        np.testing.assert_array_equal(cosine(row), cosine(part(row.start, row.stop, kept.index((row.start, row.stop)))))
        assert row.seconds == 0.5


def test_parts__measured_again_and_dropped(store):
    with store.transaction():
        for task in ("task", "other"):
            store.put_part(task, part(0, 4))
        store.put_part("task", part(0, 2, 1.0))
    (row,) = store.parts("task")
    assert (row.stop, cosine(row).tolist()) == (2, [[1.0, 1.0]] * 2)
    with store.transaction():
        store.drop_parts("task")
    assert store.parts("task") == []
    assert len(store.parts("other")) == 1


def test_failures__in_the_order_of_the_study(store):
    rows = [FailureRow(m, r, t, f"e{t}", "Traceback …", "now") for m in "za" for r in "01" for t in (0, 1, 10)]
    with store.transaction():
        store.put_models([ModelRow("z", "file:z"), ModelRow("a", "file:a")])
        for row in rows[::-1]:
            store.put_failure(replace(row, error="first time"))
            store.put_failure(row)
    assert store.failures() == rows
    with store.transaction():
        store.drop_failures("z", "1", 10)
        store.drop_failures("a", "0")
    assert store.failures() == [*rows[:5], *rows[9:]]
    with store.transaction():
        store.drop_failures("a")
    assert store.failures() == rows[:5]


# --- damage ---------------------------------------------------------------------------------------------------------

DAMAGE = {
    "a mean": "UPDATE cells SET means = replace(means, '0.25', '0.75') WHERE key = 'a/fc/rerandomize/1'",
    "a number": "UPDATE cells SET delta_norm = delta_norm + 1 WHERE key = 'a/fc/rerandomize/1'",
    "no JSON": "UPDATE cells SET means = 'x' || means WHERE key = 'a/fc/rerandomize/1'",
    "no UTF-8": "UPDATE cells SET status = CAST(x'6fff' AS TEXT) WHERE key = 'a/fc/rerandomize/1'",
    "another type": "UPDATE cells SET n_images = 'three' WHERE key = 'a/fc/rerandomize/1'",
    "a seed": "UPDATE cells SET seed = '-7' WHERE key = 'a/fc/rerandomize/1'",
    "values of images": "UPDATE cells SET per_image = substr(per_image, 2) WHERE key = 'a/fc/rerandomize/1'",
    "a plan": "UPDATE plan SET depth = 9 WHERE key = 'a/fc/rerandomize/1'",
}


def damaged(folder, statement, *, sealed=True):
    """Fill a store and change it as a disk does. Not ``sealed``: its rows are of before there were checksums."""
    with Store(folder, create=True) as store:
        filled(store)
        with store.transaction():
            store.put_cells([cell("with", per_image={"cosine": np.ones(3, np.float32)})])
            store._connection.execute(
                "UPDATE cells SET per_image = (SELECT per_image FROM cells WHERE key = 'with'), "
                "checksum = NULL WHERE key = 'a/fc/rerandomize/1'"
            )
            columns = ", ".join(COLUMNS["cells"])
            store._connection.execute(
                f"UPDATE cells SET checksum = checksum({columns}) WHERE key = 'a/fc/rerandomize/1'"
            )
        before = store.cells()
        assert len(before) == 8
        if not sealed:
            for table in COLUMNS:
                store._connection.execute(f"UPDATE {table} SET checksum = NULL")
        store._connection.execute(statement)
    return before


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged__row_is_left_out_and_named_and_the_rest_is_as_it_was(tmp_path, what):
    before = damaged(tmp_path, DAMAGE[what])
    with Store(tmp_path) as store:
        after = store.cells()
        named = list(store.damaged)
        known = store.known(before["key"])
    pd.testing.assert_frame_equal(after, before[before["key"] != "a/fc/rerandomize/1"].reset_index(drop=True))
    assert len(named) == 1
    for part in ("a", "fc", "rerandomize", "1"):
        assert part in named[0]
    assert ("a/fc/rerandomize/1" in known) == (what == "a plan")


@pytest.mark.parametrize("what", ["no JSON", "no UTF-8", "another type", "a seed", "values of images"])
def test_damaged__rows_of_before_there_were_checksums(tmp_path, what):
    before = damaged(tmp_path, DAMAGE[what], sealed=False)
    with Store(tmp_path) as store:
        assert set(store.cells()["key"]) == set(before["key"]) - {"a/fc/rerandomize/1"}


@pytest.mark.parametrize("table", COLUMNS)
def test_damaged__no_table_is_trusted(tmp_path, table):
    column = {"meta": "value", "runs": "record", "parts": "seconds", "failures": "error"}.get(table, "key")
    column = {"models": "label", "cells": "seconds"}.get(table, column)
    with Store(tmp_path, create=True) as store:
        filled(store, models=["a"], layers=["fc"], trials=1)
        with store.transaction():
            store.put_meta("study", {"name": "x"})
            store.put_run("now", {})
            store.put_part("task", part(0, 1))
            store.put_failure(FailureRow("a", "zero", 0, "error", "details", "now"))
        store._connection.execute(f"UPDATE {table} SET {column} = 'other'")

        def read():
            store.damaged.clear()
            found = [store.cells(), store.meta("study"), store.runs(), store.parts("task"), store.failures()]
            return found, list(store.damaged)

        assert len(read()[1]) == 1
        with store.transaction():
            store.drop_damaged()
        assert read()[1] == [], "what was damaged is gone, so that it can be made anew"
        with store.transaction():
            filled_again = [ModelRow("a", "file:a")]
            store.put_models(filled_again)
            store.put_plan([plan_row("a", "fc")])
            store.put_cells([cell("a/fc/rerandomize/0")])
        assert len(store.cells()) == 1


def test_copy_cells__leaves_damaged_ones(tmp_path):
    before = damaged(tmp_path / "one", DAMAGE["a mean"])
    with Store(tmp_path / "one") as one, Store(tmp_path / "two", create=True) as two:
        two.copy_cells(one)
        assert two.known(before["key"]) == set(before["key"]) - {"a/fc/rerandomize/1"}


# --- a disk that cannot be written ----------------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch):
    """No file can be written, as far as a store can tell; SQLite itself would notice on such a disk."""
    monkeypatch.setattr(store_file, "_is_writable", lambda path: False)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}


def test_read_only__opens_and_touches_nothing(tmp_path, request):
    with Store(tmp_path, create=True) as store:
        filled(store)
        before = store.cells()
    there = content_of(tmp_path)
    request.getfixturevalue("read_only")
    with Store(tmp_path) as store:
        pd.testing.assert_frame_equal(store.cells(), before)
        with pytest.raises(StudyError, match="readonly"), store.transaction():
            store.put_meta("x", 1)
    assert content_of(tmp_path) == there


def test_read_only__what_stands_in_the_log_alone_is_read(tmp_path, request, writing):
    process = writing(3)
    while process.stdout.readline().strip() != "inside":
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / f"{FILE}-wal").stat().st_size > 0
    (tmp_path / f"{FILE}-shm").unlink()  # as on a disk to which the study was copied
    there = content_of(tmp_path)
    request.getfixturevalue("read_only")
    with Store(tmp_path) as store:
        assert store.cells()["key"].to_list() == ["x0", "y0", "x1", "y1", "x2", "y2"]
    assert content_of(tmp_path) == there


def test_read_only__a_file_of_an_older_schema(tmp_path, request, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_file, "MIGRATIONS", store_file.MIGRATIONS[:3])
        patch.setattr(store_file, "SCHEMA", 3)
        Store(tmp_path, create=True).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("INSERT INTO models (model, position, reference) VALUES ('a', 0, 'file:a')")
        connection.commit()
    there = content_of(tmp_path)
    request.getfixturevalue("read_only")
    with Store(tmp_path) as store:
        assert store.models() == [ModelRow("a", "file:a")]
    assert content_of(tmp_path) == there


def test_store__on_a_disk_without_a_write_ahead_log(tmp_path, monkeypatch):
    class Refusing(sqlite3.Connection):
        def execute(self, query, *values):
            if query == "PRAGMA journal_mode = WAL":
                raise sqlite3.OperationalError("locking protocol")
            return super().execute(query, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **options: connect(*given, factory=Refusing, **options))
    with Store(tmp_path, create=True) as store:
        filled(store)
        assert store._rows("PRAGMA journal_mode") == [("delete",)]
        with Store(tmp_path) as reader:
            assert len(reader.cells()) == 8


def test_read_only__while_another_process_is_about_to_create_it(tmp_path, monkeypatch):
    """Who reads sees a file's kind, version and tables of one moment, even if it is created between two questions."""

    class Creating(sqlite3.Connection):
        def execute(self, query, *values):
            if query == "PRAGMA user_version" and not creators:
                monkeypatch.setattr(store_file.sqlite3, "connect", connect)
                creators.append(threading.Thread(target=lambda: Store(tmp_path, create=True).close()))
                creators[0].start()
                creators[0].join(0.5)
            return super().execute(query, *values)

    creators = []
    (tmp_path / FILE).touch()
    connect = sqlite3.connect
    monkeypatch.setattr(store_file.sqlite3, "connect", partial(connect, factory=Creating))

    with Store(tmp_path, read_only=True) as opened:
        assert opened.models() == []

    creators[0].join()
    assert pragma(tmp_path / FILE, "user_version") == SCHEMA
