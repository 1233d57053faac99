import random

import pandas as pd
import pytest

from layercrit.errors import LayercritError, StudyError
from layercrit.locks import hold
from layercrit.study.file import read_study_file
from layercrit.study.repair import repair_study
from layercrit.study.running import run_study
from layercrit.study.store import FILE, Store
from layercrit.study.tables import load_study
from running_jobs import CHANGING, Inline, write_small

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
    n_kept, damaged = repair_study(copy)
    assert n_kept == len(cells)
    assert damaged.read_bytes() == content
    pd.testing.assert_frame_equal(measured_again(copy), cells)
    with Store(copy) as store:
        assert [run["run"] for run in store.runs()] == [1, 2]
        assert len(store._rows("SELECT DISTINCT run FROM cells")) == 1, "nothing was measured twice"


def test_repair__a_sound_study_is_the_same_afterwards(measured, tmp_path):
    folder, cells = measured
    copy = copied(folder, tmp_path, (folder / FILE).read_bytes())
    for n_before in range(2):
        assert repair_study(copy)[0] == len(cells)
        pd.testing.assert_frame_equal(load_study(copy).cells.drop(columns=CHANGING), cells)
        assert len(list(copy.glob("*.damaged-*"))) == n_before + 1


@pytest.mark.parametrize("content", [b"", b"no database at all, " * 1000])
def test_repair__nothing_can_be_read(measured, tmp_path, content):
    copy = copied(measured[0], tmp_path, content)
    if not content:
        assert repair_study(copy)[0] == 0
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


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits__end_in_the_right_numbers_or_an_error_with_a_way_out(measured, tmp_path, seed):
    """Whatever a disk does to a study, no wrong number is read from it, and what is lost is measured anew."""
    folder, cells = measured
    generator = random.Random(seed)
    content = bytearray((folder / FILE).read_bytes())
    for _ in range(1 + seed % 4 * 5):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    copy = copied(folder, tmp_path, content)
    try:
        read = load_study(copy)
        left = cells[cells["key"].isin(read.cells["key"])].reset_index(drop=True)
        if len(left):  # else there are not even the columns of distances
            pd.testing.assert_frame_equal(read.cells.drop(columns=CHANGING), left)
        assert len(left) == len(cells) or read.damaged
        read.by_model(), read.progress(), read.seconds_left()
        again = measured_again(copy)
    except LayercritError:
        try:
            repair_study(copy)
        except LayercritError as error:
            assert "Nothing of" in str(error)  # noqa: PT017
            return
        again = measured_again(copy)
    pd.testing.assert_frame_equal(again, cells)
