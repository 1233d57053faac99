"""How the tests of running studies run them: here, in a process that is killed, or with workers; and what they make.

Network, resets and distance are named in study files, and found by processes that know nothing of the tests.
"""

import contextlib
import multiprocessing
import platform
import sqlite3
import sys
import time
import traceback
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn

from forked import forked_workers
from layercrit import locks
from layercrit.distances import DISTANCES
from layercrit.resets import RESETS
from layercrit.seeds import drawing
from layercrit.study.executors import Executor, Failed, Finished, Message, Place, Question
from layercrit.study.file import read_study_file
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.ranks import Shard
from layercrit.study.rows import CellRow
from layercrit.study.running import run_study
from layercrit.study.shards import open_study, shard_folder
from layercrit.study.store import FILE, Store
from layercrit.study.tables import load_study
from layercrit.study.worker import Planned
from small_studies import write_study

ARCHITECTURE = "arch=py:running_jobs:small_network"
PLACE = Place("cpu", 1)
CHANGING = ["run", "seconds", "finished"]  # columns of cells that differ from run to run


def small_network():
    """From images ``(n_images, 3, 2, 2)`` to 3 classes; resets change the layers '1', '3' and '5'."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def batch_statistics():
    """The same with a normalisation that has no running statistics."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))


def tied_network():
    """The layers '1' and '3' have one weight."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 3))
    network[3].weight = network[1].weight
    return network


LAYERS = ["1", "3", "5"]


def write_model(path, seed):
    """Write weights with which the network is as sure of itself as a trained one."""
    with drawing(seed):
        network = small_network()
    state = network.state_dict()
    state["5.weight"] *= 20
    save_file(state, path)


def write_pixels(path, n_images=24, seed=0):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (n_images, 3, 2, 2), dtype=np.uint8)
    np.savez(path, images=pixels, labels=generator.integers(0, 3, n_images))


def write_small(folder, n_models=2, trials=2, n_images=24, models=None, images=None, **sections):
    """Write a study of `small_network`, as `small_studies.write_study` does of another one."""
    models = models or [{"reference": f"file:m*.safetensors?{ARCHITECTURE}"}]
    images = images if isinstance(images, list) else {"input_size": [3, 2, 2]} | (images or {})
    path = write_study(folder, 0, trials, n_images, models=models, images=images, **sections)  # the weights follow
    for seed in range(n_models):
        write_model(path.parent / f"m{seed}.safetensors", seed)
    write_pixels(path.parent / "images.npz", n_images)
    return path


@contextlib.contextmanager
def forgotten(module):
    """Take out again what a module that is imported inside registers."""
    from small_subjects import registered  # not above: workers need not import what that imports

    with registered(RESETS), registered(DISTANCES):
        yield
    sys.modules.pop(module, None)


# running


class Killed(BaseException):
    """The run ends here."""


def conversation(work, answer):
    """What a task says, and the plan of which it asks what is left, once that is answered."""
    reply = None
    with contextlib.suppress(StopIteration):
        while True:
            said = work.send(reply)
            reply = None
            if not isinstance(said, Question):
                yield said
                continue
            reply = answer(said.content)
            if isinstance(said.content, Planned):
                yield said.content


class Inline(Executor):
    """Runs tasks in this process, one after the other; ``stop_after`` events the run is over.

    Attributes:
        tasks: names of those that were begun.
        events: those that happened, and the plans of which tasks asked what was left.
    """

    def __init__(self, stop_after=None, place=PLACE):
        self.stop_after, self.place = stop_after, place
        self.tasks, self.events = [], []

    def run(self, tasks, start, answer):
        events = self._run(tasks, start, answer)
        while True:
            if self.stop_after == len(self.events):
                raise Killed
            event = next(events, None)
            if event is None:
                return
            self.events.append(event)
            if not isinstance(event, Planned):
                yield event

    def _run(self, tasks, start, answer):
        work = start(self.place)
        for task in tasks:
            self.tasks.append(task.name)
            try:
                for said in conversation(work(task), partial(answer, task)):
                    yield said if isinstance(said, Planned) else Message(task, said)
            except Exception as error:
                yield Failed(task, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
            else:
                yield Finished(task)


class KillingWorkers(LocalProcesses):
    """Processes of which one is killed from outside at each of some events."""

    def __init__(self, places, at, **settings):
        super().__init__(places, **settings)
        self.at, self.killed = set(at), []

    def run(self, tasks, start, answer):
        for number, event in enumerate(super().run(tasks, start, answer)):
            if number in self.at:
                victim = next(one for one in multiprocessing.active_children() if isinstance(one, ForkServerProcess))
                victim.kill()
                self.killed.append(victim.pid)
            yield event


def run(path, folder, executor=None, **settings):
    return run_study(read_study_file(path), folder, progress=False, executor=executor or Inline(), **settings)


def make_stores(folder, n_stores):
    """Be a process that makes the stores of shards, one after the other, and puts a cell into each at a time."""
    for number in range(1, n_stores + 1):
        with Store(shard_folder(folder, number), create=True, shared=True) as store:
            for cell in range(5):
                with store.transaction():
                    store.put_run("2026-01-01T00:00:00+00:00", {})
                    store.put_cells([CellRow(f"{number} {cell}", "ok", 0, 0.0, 1, {"cosine": 0.0})])
                    time.sleep(0.002)


def run_shard(path, folder, shard, executor=None, **settings):
    return run(path, folder, executor, shard=Shard.parse(shard), **settings)


class Slow(Inline):
    """Waits a little after every event."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def _run(self, tasks, start, answer):
        for event in super()._run(tasks, start, answer):
            yield event
            time.sleep(self.seconds)


def run_slowly(path, folder, seconds, shard=None):
    """Be a process that is killed: give a part after every batch, and wait a little after every event."""
    import layercrit.study.worker as worker

    torch.set_num_threads(1)
    worker._SECONDS_BETWEEN_PARTS = 0
    run(path, folder, Slow(seconds), shard=None if shard is None else Shard.parse(shard))


def run_on(name, study, folder, seconds, shard):
    """Be a process on a machine with a name of its own, which says every second that it is there."""
    locks._BEAT = 1
    platform.node = lambda: name
    run_slowly(study, folder / "out", seconds, shard)


def write_rows(path, number, *, begun=None):
    """Be a process that gives all rows one number, and the next one, and so on; or that never ends the first change."""
    connection = sqlite3.connect(path, isolation_level=None)
    while True:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("PRAGMA cache_size = 10")  # pages are written before the change ends
        connection.execute("UPDATE rows SET number = ?, filler = zeroblob(1000)", (number,))
        if begun is not None:
            begun.set()
            time.sleep(600)
        connection.execute("COMMIT")
        number += 1
        time.sleep(0.03)


def run_with_workers(path, folder, n_workers, address):
    """Be a process with workers, for a process that kills this one; ``address`` is that of its server."""
    with forked_workers(address):
        run(path, folder, LocalProcesses([PLACE] * n_workers))


# looking at results


def tables(folder):
    """Everything that a study found: its cells with their keys, its tables, the values of each image, the records."""
    study = load_study(folder)
    cells = study.cells.drop(columns=CHANGING)
    with open_study(folder) as stored:
        per_image = stored.per_image(cells["key"].to_list())
    records = {}
    for model, record in zip(study.models["model"], study.models["record"], strict=True):
        of_resets = {name: {reset: record[name][reset] for reset in study.resets} for name in ("content", "donor")}
        records[model] = {
            k: v for k, v in record.items() if k not in ("notes", "predictions", "random_trials")
        } | of_resets
    return cells, study.to_pandas(), study.by_model().drop(columns="reference"), per_image, records


def assert_same_tables(found, expected, atol=0.0):
    """Two results of `tables` are the same, within ``atol`` where they are no keys, names or counts.

    Values at the matched temperature may differ ten times as much: they are those of larger logits.
    """
    for one, other in zip(found[:3], expected[:3], strict=True):
        matched = [column for column in other if "matched" in column]
        for columns, factor in ((matched, 10), (other.columns.drop(matched), 1)):
            pd.testing.assert_frame_equal(one[columns], other[columns], rtol=0, atol=factor * atol)
    assert found[3].keys() == expected[3].keys()
    for key, values in expected[3].items():
        assert found[3][key].keys() == values.keys()
        for name, per_image in values.items():
            close = atol * (10 if "matched" in name else 1)
            np.testing.assert_allclose(found[3][key][name], per_image, rtol=0, atol=close, err_msg=name)
    assert found[4] == expected[4]


def check_store(folder, n_layers=3, n_images=24):
    """Make sure that a store holds nothing but whole cells of whole trials; return how many."""
    if not (Path(folder) / FILE).exists():
        return 0
    connection = sqlite3.connect(Path(folder) / FILE)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    with Store(folder) as store:
        cells = store.cells()
        assert set(cells.groupby(["model", "reset", "trial"]).size()) <= {n_layers}
        per_image = store.per_image(cells["key"].to_list())
        assert set(per_image) == set(cells.loc[cells["status"] == "ok", "key"])
        assert {len(values) for found in per_image.values() for values in found.values()} <= {n_images}
        if len(cells):
            assert (cells["n_images"] == n_images).all()
            assert cells.groupby(["model", "reset", "layer", "trial"]).size().eq(1).all()
    return len(cells)


def n_parts(folder):
    connection = sqlite3.connect(Path(folder) / FILE)
    (n,) = connection.execute("SELECT count(*) FROM parts").fetchone()
    connection.close()
    return n


def children_of(process):
    """Process ids of the children of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
