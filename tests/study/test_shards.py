"""Studies that several processes share: each has a store of its own, and together they are one study."""

import contextlib
import json
import random
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner

from forked import FORKS
from layercrit import locks
from layercrit.cli.root import cli
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.opening import open_replay
from layercrit.errors import StudyError
from layercrit.study import peers
from layercrit.study.executors import Failed
from layercrit.study.file import read_study_file
from layercrit.study.merging import merge_studies
from layercrit.study.planning import plan_study
from layercrit.study.ranks import Shard
from layercrit.study.shards import Shards, is_study, shard_folder, store_folders
from layercrit.study.store import FILE
from layercrit.study.tables import load_study
from layercrit.study.tasks import deal, first_tasks, places_of
from running_jobs import (
    ARCHITECTURE,
    LAYERS,
    Inline,
    Killed,
    assert_same_tables,
    make_stores,
    run,
    run_shard,
    run_slowly,
    tables,
    write_model,
    write_small,
)

N_CELLS = 2 * 4 * len(LAYERS)


@pytest.fixture
def study(tmp_path):
    return write_small(tmp_path / "study", n_models=2, trials=4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def whole(study, tmp_path):
    """The tables of the study where one process measures all of it."""
    run(study, tmp_path / "whole")
    return tables(tmp_path / "whole")


# dealing


@pytest.mark.parametrize("of", [1, 2, 3, 7, 8, 100])
def test_deal__every_task_once_and_shards_of_one_size(study, of):
    tasks = first_tasks(read_study_file(study))
    dealt = [deal(tasks, Shard(number, of)) for number in range(of)]
    assert sorted(task.name for share in dealt for task in share) == sorted(task.name for task in tasks)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_deal__keeps_models_together(tmp_path):
    models = [{"reference": f"file:m0.safetensors?{ARCHITECTURE}", "name": f"n{i}"} for i in range(12)]
    tasks = first_tasks(
        read_study_file(write_small(tmp_path, n_models=1, trials=5, models=models, study={"baseline": "n0"}))
    )
    for of in (3, 5, 12):
        opened = [len({task.affinity for task in deal(tasks, Shard(number, of))}) for number in range(of)]
        assert sum(opened) <= 12 + of - 1, "more than at the borders of shards"


def test_deal__depends_on_names_only(study):
    tasks = first_tasks(read_study_file(study))
    shuffled = random.Random(0).sample(tasks, len(tasks))
    by_model = sorted(shuffled, key=lambda task: places_of(task)[0][2])
    assert {t.name for t in deal(by_model, Shard(0, 2))} == {t.name for t in deal(tasks, Shard(0, 2))}


# one study


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shards__together_are_the_whole_study(study, folder, whole, of):
    reports = [run_shard(study, folder, f"{number}/{of}") for number in range(1, of + 1)]

    assert sum(report.n_measured for report in reports) == N_CELLS
    assert_same_tables(tables(folder), whole)
    assert set(store_folders(folder)) == set(range(1, of + 1))
    assert not (folder / FILE).exists()


def test_shards__each_writes_its_own_store_only(study, folder):
    run_shard(study, folder, "1/2")
    before = (shard_folder(folder, 1) / FILE).read_bytes()
    run_shard(study, folder, "2/2")
    assert (shard_folder(folder, 1) / FILE).read_bytes() == before


def test_shards__are_not_in_write_ahead_mode(study, folder):
    run_shard(study, folder, "1/2")
    connection = sqlite3.connect(shard_folder(folder, 1) / FILE)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


@pytest.mark.parametrize(
    "starts",
    [
        ["1/2", "2/2", "1/3", "2/3", "3/3"],
        ["2/3", "1/2", "2/2"],
        ["1/4", "2/4", "3/4", "1/1"],
        ["2/2", None],
        [None, "1/2", "2/2"],
        ["3/8", "1/3", "8/8", None],
    ],
    ids=str,
)
def test_shards__another_number_of_them_repeats_nothing(study, folder, whole, starts):
    measured = 0
    for shard in starts:
        measured += (run(study, folder) if shard is None else run_shard(study, folder, shard)).n_measured
    assert measured == N_CELLS
    assert_same_tables(tables(folder), whole)


def test_shards__go_on_after_an_interruption(tmp_path, folder):
    """A shard ends after any number of events; the next start has another number of shards."""
    study, events = write_small(tmp_path / "study", n_models=2, trials=2), Inline()
    run(study, tmp_path / "whole")
    whole = tables(tmp_path / "whole")
    run_shard(study, folder / "all", "1/2", events)
    for stop_after in range(len(events.events)):
        here = folder / f"{stop_after}"
        with pytest.raises(Killed):
            run_shard(study, here, "1/2", Inline(stop_after))
        n_before = len(load_study(here).cells) if is_study(here) else 0
        n_measured = sum(run_shard(study, here, f"{n}/3").n_measured for n in (1, 2, 3))
        assert n_before + n_measured == N_CELLS / 2
        assert_same_tables(tables(here), whole)


def test_shards__images_are_decoded_once(study, folder, monkeypatch):
    from layercrit.probes.probe_set import ProbeSet

    decoded = []
    from_source = ProbeSet.from_source.__func__
    monkeypatch.setattr(
        ProbeSet, "from_source", classmethod(lambda cls, *a, **k: decoded.append(a) or from_source(cls, *a, **k))
    )
    for shard in ("1/3", "2/3", "3/3", "1/2"):
        run_shard(study, folder, shard)
    assert len(decoded) == 1


def test_shards__a_model_is_known_from_another_shard(study, folder, monkeypatch):
    """Its predictions and number format are found once, in whichever shard is first."""
    run_shard(study, folder, "1/8")
    (opened,) = load_study(folder).cells["model"].unique()
    predicted = []
    from layercrit.engine import session

    predict = session.predict
    monkeypatch.setattr(session, "predict", lambda *a, **k: predicted.append(k["model"]) or predict(*a, **k))
    for number in range(2, 9):
        run_shard(study, folder, f"{number}/8")
    assert not any(opened in reference for reference in predicted)


def test_shards__merge_into_one_store(study, folder, tmp_path, whole):
    for shard in ("1/2", "2/2"):
        run_shard(study, folder, shard)
    merge_studies([folder], tmp_path / "one")
    assert (tmp_path / "one" / FILE).exists()
    cells = load_study(tmp_path / "one").cells
    np.testing.assert_array_equal(cells["cosine"], whole[0]["cosine"])


def test_plan_study__counts_what_shards_have(study, folder):
    run_shard(study, folder, "1/2")
    plan = plan_study(read_study_file(study), folder)
    assert plan.to_dict()["n_done"] == N_CELLS // 2


# planned precision


PLANNED = {"trials": None, "half_width": 0.05, "pilot": 4, "max_trials": 9}


def test_shards__plan_together_after_the_pilot_of_all(tmp_path, folder):
    path = write_small(tmp_path / "study", protocol=PLANNED)
    run(path, tmp_path / "whole")
    processes = [FORKS.Process(target=run_shard, args=(path, folder, f"{n}/3")) for n in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    one, other = load_study(tmp_path / "whole"), load_study(folder)
    assert [_trials(study) for study in (one, other)] == [_trials(one)] * 2
    assert _trials(one).keys() == {("m0", "rerandomize"), ("m1", "rerandomize")}
    assert_same_tables(tables(folder), tables(tmp_path / "whole"))


def test_shards__take_more_images_together(tmp_path, folder, monkeypatch):
    """Where the plan has more images than the pilot, whichever shard makes it."""
    monkeypatch.setattr("layercrit.precision._FEWEST_IMAGES", 3)
    monkeypatch.setattr("layercrit.precision._SD_IMAGES", 0.0001)
    path = write_small(tmp_path / "study", protocol=PLANNED | {"half_width": 0.2})
    run(path, tmp_path / "whole")
    (n_images,) = load_study(tmp_path / "whole").cells["n_images"].unique()
    assert n_images > 3

    with ThreadPoolExecutor() as threads:
        shards = [threads.submit(run_shard, path, folder, f"{number}/3") for number in (1, 2, 3)]
    assert [shard.result().failures for shard in shards] == [[], [], []]

    assert (load_study(folder).progress()["state"] == "done").all()
    assert_same_tables(tables(folder), tables(tmp_path / "whole"))


def test_shards__say_what_failed_after_the_pilot_again(tmp_path, folder):
    path = write_small(tmp_path / "study", n_models=1, protocol=PLANNED | {"half_width": 0.01})
    failed = [run(path, folder, Failing(trial=5)).failures for _ in range(2)]
    assert 5 in [row.trial for row in failed[0]]
    assert failed[1] == failed[0]


def _trials(study):
    return {key: {name: layer.trials for name, layer in plan.layers.items()} for key, plan in study.plans.items()}


def test_shards__of_a_pilot_do_not_wait_for_nobody(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(peers, "_PATIENCE", 0.2)
    path = write_small(tmp_path / "study", protocol=PLANNED)
    with pytest.raises(StudyError, match=r"nobody runs shard 2 of 2\. Run these"):
        run_shard(path, folder, "1/2")
    assert len(load_study(folder).cells) == 4 * len(LAYERS)


# failures


class Failing(Inline):
    """Fails every task of a trial."""

    def __init__(self, trial):
        super().__init__()
        self.trial = trial

    def _run(self, tasks, start, answer):
        bad = [task for task in tasks if any(trial == self.trial for _, _, trial in places_of(task))]
        yield from super()._run([task for task in tasks if task not in bad], start, answer)
        yield from (Failed(task, "OSError: gone", "") for task in bad)


def test_shards__failures_of_all_are_known_to_all(study, folder, whole):
    for shard in ("1/2", "2/2"):
        report = run_shard(study, folder, shard, Failing(trial=1))
        assert [(row.trial, row.error) for row in report.failures] == [(1, "OSError: gone")]
    assert [row.model for row in load_study(folder).failures] == ["m0", "m1"]

    again = [run_shard(study, folder, f"{number}/3") for number in (1, 2, 3)]

    assert [report.n_measured for report in again] == [0, 0, 0]
    assert sum(report.n_retryable for report in again) == 2
    assert sum(len(report.failures) for report in again) == 2

    retried = [run_shard(study, folder, f"{number}/3", retry=True) for number in (1, 2, 3)]

    assert sum(report.n_measured for report in retried) == 2 * len(LAYERS)
    assert load_study(folder).failures == ()
    assert_same_tables(tables(folder), whole)


def test_shards__a_retry_is_of_its_own_trials(study, folder):
    for shard in ("1/2", "2/2"):
        run_shard(study, folder, shard, Failing(trial=1))
    run_shard(study, folder, "1/2", retry=True)
    (left,) = load_study(folder).failures
    assert left.model not in set(load_study(folder).cells.query("trial == 1")["model"])

    run_shard(study, folder, "2/8", retry=True)  # which has other trials than the second of two

    assert load_study(folder).failures == (left,)


# changes between runs


def test_shards__a_changed_model_is_measured_anew(study, folder, tmp_path):
    for shard in ("1/2", "2/2"):
        run_shard(study, folder, shard)
    write_model(study.parent / "m1.safetensors", 7)

    report = [run_shard(study, folder, f"{number}/3") for number in (1, 2, 3)]

    run(study, tmp_path / "fresh")
    assert sum(one.n_measured for one in report) == N_CELLS // 2
    assert_same_tables(tables(folder), tables(tmp_path / "fresh"))


def test_shards__other_settings_hide_what_was_measured_before(tmp_path, folder):
    path = write_small(tmp_path / "study", trials=4)
    for shard in ("1/2", "2/2"):
        run_shard(path, folder, shard)
    write_small(tmp_path / "study", trials=4, protocol={"seed": 1})

    run_shard(path, folder, "1/2")

    cells = load_study(folder).cells
    assert len(cells) == N_CELLS // 2
    run(path, tmp_path / "fresh")
    assert set(cells["key"]) < set(load_study(tmp_path / "fresh").cells["key"])


def test_shards__that_disagree_about_a_model_say_so(tmp_path, folder):
    """Two machines that see different files under one name: what one of them measured is not shown."""
    path = write_small(tmp_path / "study", n_models=1, trials=4)
    run_shard(path, folder, "1/2")
    write_model(path.parent / "m0.safetensors", 7)
    run_shard(path, folder, "2/2")

    found = load_study(folder)

    assert len(found.cells) == 2 * len(LAYERS)
    assert "shards 2 and 1 have different weights; what shard 1 measured of it is left out" in found.warnings[0]


def test_shards__of_unlike_processors_agree_on_a_number_format(tmp_path, folder, monkeypatch):
    """`auto` chooses another one in each shard; run again, all take that of the first."""
    path = write_small(tmp_path / "study", n_models=1, trials=4, protocol={"dtype": "auto"})
    elsewhere = tmp_path / "elsewhere"  # as if both began at the same time
    for shard, mode, out in (("1/2", "reference", folder), ("2/2", "float32", elsewhere)):
        monkeypatch.setattr(
            ReplayHolder,
            "_fastest",
            lambda self, images, mode=mode: open_replay(self._subject.network, self._subject.layers, images, mode),
        )
        run_shard(path, out, shard)
    shutil.copytree(shard_folder(elsewhere, 2), shard_folder(folder, 2))
    assert "different number formats" in load_study(folder).warnings[0]

    for shard in ("1/2", "2/2"):
        run_shard(path, folder, shard)

    assert load_study(folder).conflicts == ()
    assert len(load_study(folder).cells) == 4 * len(LAYERS)
    run(write_small(tmp_path / "study", n_models=1, trials=4, protocol={"dtype": "reference"}), tmp_path / "one")
    np.testing.assert_array_equal(load_study(folder).cells["cosine"], load_study(tmp_path / "one").cells["cosine"])


def test_shards__damaged_cells_are_measured_anew(study, folder, whole):
    for shard in ("1/2", "2/2"):
        run_shard(study, folder, shard)
    file = shard_folder(folder, 1) / FILE
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE cells SET seconds = seconds + 1 WHERE rowid = 2")
    assert "shard 1" in load_study(folder).damaged[0]

    report = [run_shard(study, folder, shard) for shard in ("1/3", "2/3", "3/3")]

    assert sum(one.n_measured for one in report) == 1
    assert_same_tables(tables(folder), whole)


# processes that run at the same time


@contextlib.contextmanager
def running(folder, number, study, shard, **changes):
    about = peers.about_run(read_study_file(study), None if shard is None else Shard.parse(shard)) | changes
    with locks.hold(shard_folder(folder, number), about=about):
        yield  # before it has a store: it may wait for others that it was started with


@pytest.mark.parametrize(
    ("number", "theirs", "ours", "words"),
    [
        (1, "1/2", "1/2", "is being run by process"),
        (1, "1/2", None, "as shard 1/2. A study is run by one process or in shards"),
        (0, None, "1/2", "as the whole study. A study is run by one process or in shards"),
        (1, "1/2", "2/3", "runs as shard 1/2 .* this process is shard 2/3: all shards"),
    ],
)
def test_shards__that_do_not_go_together(study, folder, monkeypatch, number, theirs, ours, words):
    shard = None if ours is None else Shard.parse(ours)
    with running(folder, number, study, theirs), pytest.raises(StudyError, match=words):
        _in_another_process(study, folder, shard, monkeypatch)


def _in_another_process(study, folder, shard, monkeypatch):
    run(study, folder, shard=shard)


def test_shards__of_another_study_file(study, folder, tmp_path):
    other = write_small(tmp_path / "other", trials=3)
    with running(folder, 1, other, "1/2"), pytest.raises(StudyError, match=r"shard 1/2 of .* another study file"):
        run_shard(study, folder, "2/2")


@pytest.mark.parametrize("package", ["torch", "layercrit"])
def test_shards__under_other_versions(study, folder, package):
    versions = peers.versions() | {package: "0.0.1"}
    with (
        running(folder, 1, study, "1/2", versions=versions),
        pytest.raises(StudyError, match=rf"different versions: {package} 0\.0\.1 on .*Install the same"),
    ):
        run_shard(study, folder, "2/2")


def test_shards__in_folders_that_are_not_the_same(study, folder, tmp_path, monkeypatch):
    """Ranks of one start on machines whose disks are their own."""
    monkeypatch.setattr(peers, "_PATIENCE", 0.2)
    first, second = (Shard(number, 2, origin="SLURM_PROCID", start="srun 7.0") for number in (0, 1))
    run(study, folder, shard=first)
    with pytest.raises(StudyError, match=r"does not see in .* what shard 1/2 has written there"):
        run(study, tmp_path / "elsewhere", shard=second)
    run(study, folder, shard=second)
    assert len(load_study(folder).cells) == N_CELLS


def test_shards__of_an_earlier_start_do_not_count(study, folder, monkeypatch):
    monkeypatch.setattr(peers, "_PATIENCE", 0.2)
    run(study, folder, shard=Shard(0, 2, origin="SLURM_PROCID", start="srun 7.0"))
    with pytest.raises(StudyError, match="does not see"):
        run(study, folder, shard=Shard(1, 2, origin="SLURM_PROCID", start="srun 7.1"))


def test_shards__can_be_read_while_they_are_made_and_written(tmp_path):
    """By a process that finds a store at any moment of its life: being created, in a transaction, given up."""
    writer = FORKS.Process(target=make_stores, args=(tmp_path, 40))
    writer.start()
    n_read = n_found = 0
    while writer.exitcode is None:
        with Shards(tmp_path) as shards:
            n_found = max(n_found, shards.n_cells())
            n_read += bool(shards.runs())
    assert writer.exitcode == 0
    assert n_read > 5
    assert n_found > 0


@pytest.mark.slow
def test_shards__at_the_same_time_and_killed(study, folder, whole):
    """Processes of three shards, of which one after the other is killed at some moment and started again."""
    generator = random.Random(0)
    processes = {}
    deadline = time.monotonic() + 300
    n_killed = 0
    while time.monotonic() < deadline:
        for shard in ("1/3", "2/3", "3/3"):
            if shard not in processes or processes[shard].exitcode not in (None, 0):
                processes[shard] = FORKS.Process(target=run_slowly, args=(study, folder, 0.2, shard))
                processes[shard].start()
        if all(process.exitcode == 0 for process in processes.values()):
            break
        time.sleep(generator.uniform(0, 1))
        if n_killed < 4:
            victim = generator.choice(list(processes.values()))
            victim.kill()
            victim.join()
            n_killed += victim.exitcode != 0
    assert n_killed
    assert_same_tables(tables(folder), whole)


def test_status__of_shards(study, folder):
    run_shard(study, folder, "1/2")
    with running(folder, 2, study, "2/2"):
        result = CliRunner().invoke(cli, ["study", "status", str(folder), "--json"])
    status = json.loads(result.stdout)
    assert status["n_done"] == N_CELLS // 2
    assert [one["shard"] for one in status["running"]] == [2]


def test_stores_of_a_copied_study_are_found(study, folder, tmp_path, whole):
    for shard in ("1/2", "2/2"):
        run_shard(study, folder, shard)
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    assert_same_tables(tables(tmp_path / "copy"), whole)
