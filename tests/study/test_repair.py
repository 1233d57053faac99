import contextlib
import random
import shutil
import sqlite3

import pandas as pd
import pytest

from layercrit.errors import LayercritError, StudyError
from layercrit.locks import hold
from layercrit.study import store_file
from layercrit.study.file import read_study_file
from layercrit.study.migrations import MIGRATIONS
from layercrit.study.repair import Repaired, _known_schema, repair_study
from layercrit.study.running import run_study
from layercrit.study.store import FILE, ModelRow, PlanRow, Store
from layercrit.study.tables import load_study
from running_jobs import CHANGING, Inline, assert_same_tables, tables, write_small

PAGE = 4096


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study of two models, and its cells without what differs from run to run."""
    folder = tmp_path_factory.mktemp("measured") / "study"
    write_small(folder.parent / "source", n_models=2, trials=3)
    run_study(read_study_file(folder.parent / "source" / "study.toml"), folder, executor=Inline(), progress=False)
    return folder, load_study(folder).cells.drop(columns=CHANGING)


def copied(folder, to, content):
    (to / "copy").mkdir()
    (to / "copy" / "study.toml").write_bytes((folder / "study.toml").read_bytes())
    (to / "copy" / FILE).write_bytes(content)
    return to / "copy"


def measured_again(folder):
    run_study(read_study_file(folder), folder, executor=Inline(), progress=False)
    return load_study(folder).cells.drop(columns=CHANGING)


def test_repair__keeps_what_can_be_read_and_the_next_run_measures_the_rest(measured, tmp_path):
    folder, cells = measured
    with Store(folder) as store:
        roots = dict(store._rows("SELECT name, rootpage FROM sqlite_master WHERE rootpage > 0"))
    content = bytearray((folder / FILE).read_bytes())
    for name in ("sqlite_autoindex_cells_1", "plan_by_key", "models"):
        content[PAGE * (roots[name] - 1) : PAGE * roots[name]] = b"\x55" * PAGE
    copy = copied(folder, tmp_path, content)
    with pytest.raises(StudyError, match=r"malformed.*`layercrit study repair .*copy`"):
        load_study(copy)
    repaired = repair_study(copy)
    assert (repaired.n_kept, repaired.lost) == (len(cells), ())
    assert repaired.damaged.read_bytes() == content
    pd.testing.assert_frame_equal(measured_again(copy), cells)
    with Store(copy) as store:
        assert [run["run"] for run in store.runs()] == [1, 2]
        assert len(store._rows("SELECT DISTINCT run FROM cells")) == 1, "nothing was measured twice"


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_repair__a_sound_study_stays_as_it_is(measured, tmp_path):
    folder, cells = measured
    copy = copied(folder, tmp_path, (folder / FILE).read_bytes())
    before = everything_in(copy)
    for _ in range(2):
        assert repair_study(copy) == Repaired(len(cells), (), None)
        assert everything_in(copy) == before


def killed(folder, tmp_path):
    """Return a copy of a study as a process leaves it that was killed once it had written to the log."""
    whole = copied(folder, tmp_path, (folder / FILE).read_bytes())
    copy = tmp_path / "killed"
    copy.mkdir()
    with Store(whole) as store:
        with store.transaction():
            store.put_meta("late", "news")
        for log in ("", "-wal"):
            shutil.copyfile(f"{whole / FILE}{log}", f"{copy / FILE}{log}")
    return copy


def test_repair__a_sound_log_stays_where_it_is(measured, tmp_path):
    """A process that was killed leaves it, and who reads the study next takes it in."""
    folder, cells = measured
    copy = killed(folder, tmp_path)
    before = everything_in(copy)
    assert repair_study(copy) == Repaired(len(cells), (), None)
    assert everything_in(copy) == before
    with Store(copy) as store:
        assert store.meta("late") == "news"


def test_repair__damage_that_one_sign_alone_tells(measured, tmp_path):
    folder, cells = measured
    key = cells["key"].iloc[0]
    damages = {
        "an index that has a row more than its table": [
            "PRAGMA writable_schema = ON",
            "CREATE TEMP TABLE kept AS SELECT * FROM sqlite_master WHERE name = 'plan_by_key'",
            "DELETE FROM sqlite_master WHERE name = 'plan_by_key'",
            "PRAGMA writable_schema = RESET",
            f"DELETE FROM plan WHERE key = '{key}'",
            "PRAGMA writable_schema = ON",
            "INSERT INTO sqlite_master SELECT * FROM kept",
        ],
        "a trigger, without which new cells get no checksum": ["DROP TRIGGER cells_checksum"],
        "a distance": [f"UPDATE cells SET delta_norm = delta_norm + 1 WHERE key = '{key}'"],
        "a fact": ["UPDATE meta SET value = '7' WHERE name = 'study'"],
    }
    for name, statements in damages.items():
        (tmp_path / name).mkdir()
        copy = copied(folder, tmp_path / name, (folder / FILE).read_bytes())
        with contextlib.closing(sqlite3.connect(copy / FILE, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)
        repaired = repair_study(copy)
        assert repaired.damaged is not None, name
        assert repair_study(copy).damaged is None, name


@pytest.mark.parametrize("content", [b"", b"no database at all, " * 1000])
def test_repair__nothing_can_be_read(measured, tmp_path, content):
    copy = copied(measured[0], tmp_path, content)
    if not content:
        assert repair_study(copy).n_kept == 0
        return
    with pytest.raises(StudyError, match=r"Nothing of .* can be read"):
        repair_study(copy)
    assert (copy / FILE).read_bytes() == content


def test_repair__no_study_and_one_that_is_running(measured, tmp_path):
    with pytest.raises(StudyError, match="There is no study in"):
        repair_study(tmp_path)
    copy = copied(measured[0], tmp_path, (measured[0] / FILE).read_bytes())
    with hold(copy), pytest.raises(StudyError, match="is being run by"):
        repair_study(copy)


def test_repair__a_file_of_something_else(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE cells (x)")
    content = (tmp_path / FILE).read_bytes()
    with pytest.raises(StudyError, match=r"Nothing of .* can be read"):
        repair_study(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def schema_pages(content):
    """The numbers of the pages in which SQLite looks for the schema."""
    cells = int.from_bytes(content[103:105], "big")
    assert content[100] == 5, "the schema fills more than one page"
    offsets = [int.from_bytes(content[at : at + 2], "big") for at in range(112, 112 + 2 * cells, 2)]
    return {
        1,
        int.from_bytes(content[108:112], "big"),
        *(int.from_bytes(content[at : at + 4], "big") for at in offsets),
    }


def flipped(content, generator, pages):
    content = bytearray(content)
    for _ in range(generator.choice([1, 6, 11, 16])):
        at = PAGE * (generator.choice(sorted(pages)) - 1) + generator.randrange(PAGE)
        content[at] ^= 1 << generator.randrange(8)
    return content


@pytest.mark.parametrize("seed", range(24))
def test_repair__no_damage_to_the_schema_costs_a_row(measured, tmp_path, seed):
    """What the file says of its tables, and of itself, is known without it."""
    folder, _ = measured
    content = (folder / FILE).read_bytes()
    pages = schema_pages(content)
    assert len(pages) == 3
    generator = random.Random(seed)
    content = bytearray(content) if seed < 4 else flipped(content, generator, pages)
    for page in pages if seed == 0 else [sorted(pages)[seed - 1]] if seed < 4 else []:
        content[PAGE * (page - 1) : PAGE * page] = b"\xff" * PAGE
    copy = copied(folder, tmp_path, content)
    repaired = repair_study(copy)
    assert repaired.lost == ()
    assert_same_tables(tables(copy), tables(folder))
    with Store(copy) as store, Store(folder) as before:
        assert store.plan() == before.plan()
        assert store.models() == before.models()
        assert store.runs() == before.runs()


def pages_of(cells, content):
    """Key of a cell -> number of the page that holds its row."""
    return {
        key: at // PAGE + 1
        for at in range(0, len(content), PAGE)
        if content[at] == 0x0D
        for key in cells["key"]
        if key.encode() in content[at : at + PAGE]
    }


@pytest.mark.parametrize("seed", range(20))
def test_repair__cells_on_whole_pages_come_back_and_lost_ones_are_named(measured, tmp_path, seed):
    folder, cells = measured
    before = (folder / FILE).read_bytes()
    after = flipped(before, random.Random(seed), range(1, len(before) // PAGE + 1))
    pages = pages_of(cells, before)
    assert len(pages) == len(cells)
    assert len(set(pages.values())) > 1
    whole = {key for key, page in pages.items() if before[PAGE * (page - 1) : PAGE * page]
             == after[PAGE * (page - 1) : PAGE * page]}  # fmt: skip
    copy = copied(folder, tmp_path, after)
    repaired = repair_study(copy)
    with Store(copy) as store, Store(folder) as sound:
        kept = store.known(cells["key"])
        assert whole <= kept
        assert repaired.n_kept == len(kept)
        rows = "SELECT key, status, seed, delta_norm, n_images, means, per_image, raw, seconds, finished FROM cells"
        assert set(store._rows(rows)) <= set(sound._rows(rows)), "bit for bit"
        planned = {row.key: row for row in store.plan()}
    for key in planned.keys() - kept:
        row = planned[key]
        assert f"the cell of {row.model}, {row.layer}, {row.reset}, trial {row.trial}" in repaired.lost


def test_repair__cells_that_no_other_page_leads_to(measured, tmp_path):
    """Above the pages with rows is one that SQLite goes through; without it each is found by itself."""
    folder, cells = measured
    with Store(folder) as store:
        ((root,),) = store._rows("SELECT rootpage FROM sqlite_master WHERE name = 'cells'")
    content = bytearray((folder / FILE).read_bytes())
    assert content[PAGE * (root - 1)] == 5
    content[PAGE * (root - 1) : PAGE * root] = b"\x55" * PAGE
    copy = copied(folder, tmp_path, content)
    repaired = repair_study(copy)
    assert (repaired.n_kept, repaired.lost) == (len(cells), ())
    assert_same_tables(tables(copy), tables(folder))


def test_repair__names_the_cells_of_a_page_that_is_gone(measured, tmp_path):
    folder, cells = measured
    content = bytearray((folder / FILE).read_bytes())
    pages = pages_of(cells, content)
    gone = pages[cells["key"].iloc[0]]
    content[PAGE * (gone - 1) : PAGE * gone] = b"\x55" * PAGE
    copy = copied(folder, tmp_path, content)
    repaired = repair_study(copy)
    lost = cells[cells["key"].map(pages) == gone]
    assert repaired.n_kept == len(cells) - len(lost)
    assert set(repaired.lost) == {
        f"the cell of {row.model}, {row.layer}, {row.reset}, trial {row.trial}" for row in lost.itertuples()
    }


@pytest.mark.parametrize("flips", [False, True], ids=["sound", "header damaged"])
def test_repair__tables_that_were_moved(measured, tmp_path, flips):
    folder, cells = measured
    copy = copied(folder, tmp_path, (folder / FILE).read_bytes())
    with contextlib.closing(sqlite3.connect(copy / FILE)) as connection:
        roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_master"))
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
        assert dict(connection.execute("SELECT name, rootpage FROM sqlite_master")) != roots
    if flips:
        (copy / FILE).write_bytes(b"no longer SQLite" + (copy / FILE).read_bytes()[16:])
    repaired = repair_study(copy)
    assert repaired.n_kept == len(cells)
    assert_same_tables(tables(copy), tables(folder))
    with Store(copy) as store, Store(folder) as before:
        assert store.runs() == before.runs()


def test_repair__rows_between_two_damaged_ones(measured, tmp_path):
    """On one page, SQLite stops at the first and, from the other end, at the last."""
    folder, cells = measured
    content = bytearray((folder / FILE).read_bytes())
    pages = pages_of(cells, content)
    page = next(page for page in pages.values() if list(pages.values()).count(page) > 2)
    start = PAGE * (page - 1)
    n_rows = int.from_bytes(content[start + 3 : start + 5], "big")
    for row in (0, n_rows - 1):
        at = start + int.from_bytes(content[start + 8 + 2 * row : start + 10 + 2 * row], "big")
        content[at : at + 2] = b"\xff\x7f"  # how long the row is
    copy = copied(folder, tmp_path, content)
    assert repair_study(copy).n_kept == len(cells) - 2


@pytest.mark.parametrize("flips", [False, True], ids=["sound", "first page damaged"])
def test_repair__what_is_only_in_the_log(measured, tmp_path, flips):
    """A process that was killed leaves rows that SQLite has not brought into the file yet."""
    folder, cells = measured
    copy = killed(folder, tmp_path)
    content = bytearray((copy / FILE).read_bytes())
    assert b"news" not in content
    if flips:
        content[:PAGE] = b"\xff" * PAGE
        (copy / FILE).write_bytes(content)
    assert repair_study(copy).n_kept == len(cells)
    with Store(copy) as store:
        assert store.meta("late") == "news"


def test_repair__takes_back_what_was_not_committed(measured, tmp_path):
    """Without a write-ahead log, a killed process leaves a file that is half written and a journal to undo that."""
    folder, _ = measured
    whole = copied(folder, tmp_path, (folder / FILE).read_bytes())
    copy = tmp_path / "killed"
    copy.mkdir()
    with contextlib.closing(sqlite3.connect(whole / FILE, isolation_level=None)) as connection:
        for statement in ("journal_mode = DELETE", "cache_size = 1", "synchronous = FULL"):
            connection.execute(f"PRAGMA {statement}")
        connection.execute("BEGIN")
        connection.execute("UPDATE cells SET status = 'gone', means = means || ' '")
        for log in ("", "-journal"):
            shutil.copyfile(f"{whole / FILE}{log}", f"{copy / FILE}{log}")
    assert b"gone" in (copy / FILE).read_bytes()
    repaired = repair_study(copy)
    assert repaired.lost == ()
    assert_same_tables(tables(copy), tables(folder))


def test_repair__a_file_of_the_first_schema(tmp_path, monkeypatch):
    """Its rows have no checksums, its tables fewer columns, and its schema grew after there were rows."""
    record = {"note": "x" * 500}
    with monkeypatch.context() as patch:
        patch.setattr(store_file, "MIGRATIONS", MIGRATIONS[:1])
        patch.setattr(store_file, "SCHEMA", 1)
        with Store(tmp_path, create=True) as store, store.transaction():
            for number in range(40):
                store._connection.execute(
                    "INSERT INTO models VALUES (?, ?, 'file:m.pth', NULL, NULL, 0.5, ?)",
                    (f"m{number}", number, f'{{"note": "{"x" * 500}"}}'),
                )
            store._connection.execute("INSERT INTO plan VALUES ('m0', 'fc', 'default', 0, 'k', NULL, NULL, 1, 2, 3.0)")
    Store(tmp_path).close()
    content = bytearray((tmp_path / FILE).read_bytes())
    content[:PAGE] = b"\xff" * PAGE
    (tmp_path / FILE).write_bytes(content)
    repair_study(tmp_path)
    with Store(tmp_path) as store:
        assert store.models() == [
            ModelRow(f"m{number}", "file:m.pth", documented_accuracy=0.5, record=record) for number in range(40)
        ]
        assert store.plan() == [PlanRow("m0", "fc", "default", 0, "k", None, None, 1, 2, 3.0)]


def test_known_schema__is_that_of_every_study(tmp_path):
    with Store(tmp_path, create=True) as store:
        roots = dict(store._rows("SELECT name, rootpage FROM sqlite_master WHERE rootpage > 0"))
    assert _known_schema(tmp_path)[1] == roots


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits__end_in_the_right_numbers_or_an_error_with_a_way_out(measured, tmp_path, seed):
    """Whatever a disk does to a study, no wrong number is read from it, and what is lost is measured anew."""
    folder, cells = measured
    before = (folder / FILE).read_bytes()
    copy = copied(folder, tmp_path, flipped(before, random.Random(seed), range(1, len(before) // PAGE + 1)))
    try:
        read = load_study(copy)
        left = cells[cells["key"].isin(read.cells["key"])].reset_index(drop=True)
        if len(left):  # else there are not even the columns of distances
            pd.testing.assert_frame_equal(read.cells.drop(columns=CHANGING), left)
        assert len(left) == len(cells) or read.damaged
        read.by_model(), read.progress(), read.seconds_left()
    except LayercritError as error:
        assert "layercrit study repair" in str(error)  # noqa: PT017
        repair_study(copy)
    if seed % 5 == 0:
        pd.testing.assert_frame_equal(measured_again(copy), cells)
