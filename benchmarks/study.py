"""What studies cost beside the measuring: the store, the workers, planning and looking at results.

Networks have random weights and images random pixels: only times are of interest. Figures are printed, none is a test.

store     what the running process spends on keeping a cell while the worker waits, against the time of the cell
workers   the same cells measured by one worker and by two
tables    planning a study of the whole zoo, and loading and comparing one of 8,262 published rows
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from layercrit.models.zoo.fetching import ZOO
from layercrit.study.executors import (
    Answer,
    Event,
    Executor,
    Finished,
    Message,
    Place,
    Question,
    Start,
    Task,
    no_answer,
)
from layercrit.study.file import StudyFile, read_study_file
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.planning import plan_study
from layercrit.study.published import import_published
from layercrit.study.running import run_study
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from layercrit.study.worker import Measured, Opening, Planned, Progressed

N_LAYERS, N_TRIALS = 54, 3  # of the published study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["store", "workers", "tables"], help="one part instead of all")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny network and one round, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.arch, arguments.images, arguments.trials, arguments.rounds = "test_resnet", 16, 2, 1
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in (("store", store), ("workers", workers), ("tables", tables)):
            if arguments.only in (None, name):
                figures |= part(Path(scratch) / name, arguments)
    for name, value in figures.items():
        print(f"{name}={value:.4g}")


def store(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Time what the running process does with each message, in one process, so that nothing else goes on meanwhile."""
    study = write_study(folder, arguments.arch, 1, arguments)
    shares, per_cell, cells = [], [], []
    for number in range(arguments.rounds):
        executor = Watched()
        report = run_study(study, folder / f"out{number}", progress=False, executor=executor)
        seconds = load_study(folder / f"out{number}").cells["seconds"]
        kept = executor.seconds[Progressed] + executor.seconds[Measured]
        shares.append(kept / seconds.sum())
        per_cell.append(1e3 * kept / report.n_measured)
        cells.append(1e3 * seconds.mean())
        size = (folder / f"out{number}" / "cells.sqlite").stat().st_size / report.n_measured
    print(
        f"\nstore: {arguments.arch}, {report.n_measured} cells of {arguments.images} images, {arguments.rounds} rounds"
    )
    print(
        f"  a cell {statistics.median(cells):.1f} ms, keeping it {statistics.median(per_cell):.2f} ms, {size:.0f} bytes"
    )
    share, in_parts = statistics.median(shares), put_parts(folder / "parts", arguments.images)
    print(f"  a part of {N_LAYERS} layers and {arguments.images} images {1e3 * in_parts:.1f} ms, once a second at most")
    return {"store_share": share, "store_ms_per_cell": statistics.median(per_cell), "store_ms_per_part": 1e3 * in_parts}


def put_parts(folder: Path, n_images: int) -> float:
    """Return the median time of keeping a part of a trial of a ResNet-50."""
    from layercrit.study.store import PartRow

    generator = np.random.default_rng(0)
    names = ("cosine", "l1", "l2", "js", "top1", "cosine_matched")
    values = {name: generator.random((N_LAYERS, n_images), dtype=np.float32) for name in names}
    seconds = []
    with Store(folder, create=True) as kept:
        for number in range(20):
            started = time.perf_counter()
            with kept.transaction():
                kept.put_part("task", PartRow(number * n_images, (number + 1) * n_images, 1.0, values))
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def workers(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure two models with one worker of one thread, one of two, and two of one; a trial's time is without opening.

    Trials that run while the other worker still starts are among them: take enough trials.
    """
    study = write_study(folder, arguments.arch, 2, arguments)
    places = {"1 x 1": [Place("cpu", 1)], "1 x 2": [Place("cpu", 2)], "2 x 1": [Place("cpu", 1)] * 2}
    trials: dict[str, list[float]] = {name: [] for name in places}
    whole: dict[str, list[float]] = {name: [] for name in places}
    for number in range(arguments.rounds):
        for name, some in places.items():
            executor = Timed(some)
            report = run_study(study, folder / f"{name} {number}", progress=False, executor=executor)
            trials[name] += executor.seconds
            whole[name].append(report.seconds)
    print(f"\nworkers: two of {arguments.arch}, {report.n_measured} cells, {arguments.rounds} rounds")
    for name, found in trials.items():
        print(f"  {name} threads: a trial {statistics.median(found):.2f} s ({min(found):.2f}-{max(found):.2f}), "
              f"all with start and opening {statistics.median(whole[name]):.1f} s")  # fmt: skip
    one, threads, two = (statistics.median(trials[name]) for name in places)
    return {"workers_efficiency": one / two, "workers_against_threads": 2 * threads / two}


def tables(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Plan the zoo; load and compare a study of published rows."""
    from published_results import rows_of, write_table

    folder.mkdir()
    np.savez(folder / "images.npz", images=np.zeros((1, 3, 224, 224), np.uint8))
    path = folder / "study.toml"
    path.write_text('[images]\nsource = "images.npz"\n[[models]]\nreference = "zoo:*"\n', encoding="utf-8")
    started = time.perf_counter()
    plan = plan_study(read_study_file(path))
    planning = time.perf_counter() - started
    layers = ["model.conv1", *(f"model.layer{n % 4 + 1}.{n // 4}.conv1" for n in range(N_LAYERS - 2)), "model.fc"]
    table = write_table(folder / "results.csv", rows_of(list(ZOO), layers, N_TRIALS))
    started = time.perf_counter()
    import_published(table, folder / "published")
    importing = time.perf_counter() - started
    started = time.perf_counter()
    study = load_study(folder / "published")
    loading = time.perf_counter() - started
    started = time.perf_counter()
    comparison = study.compare()
    comparison.to_pandas()
    comparing = time.perf_counter() - started
    print(f"\ntables: {len(plan.models)} models planned in {planning:.2f} s; {len(study.cells)} rows imported in "
          f"{importing:.2f} s, loaded in {loading:.2f} s, compared in {comparing:.2f} s")  # fmt: skip
    return {"plan_seconds": planning, "import_seconds": importing, "load_and_compare_seconds": loading + comparing}


# --- studies and executors ------------------------------------------------------------------------------------------


def write_study(folder: Path, arch: str, n_models: int, arguments: argparse.Namespace) -> StudyFile:
    """Write a study of models with random weights on random pixels."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.images, 3, 224, 224), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    options = "pretrained=false&input_size=(3,224,224)"
    models = "".join(
        f'[[models]]\nname = "m{seed}"\nreference = "timm:{arch}?{options}&seed={seed}"\n' for seed in range(n_models)
    )
    protocol = f'[protocol]\ntrials = {arguments.trials}\ndtype = "float32"\ndevice = "cpu"\n'
    path = folder / "study.toml"
    path.write_text(f'[images]\nsource = "images.npz"\n{protocol}{models}', encoding="utf-8")
    return read_study_file(path)


class Watched(Executor):
    """Runs tasks in this process, and times what the run does with each kind of message."""

    def __init__(self) -> None:
        self.seconds: dict[Any, float] = {Opening: 0.0, Planned: 0.0, Progressed: 0.0, Measured: 0.0}

    def run(self, tasks: Sequence[Task], start: Start, answer: Answer = no_answer) -> Iterator[Event]:
        work = start(Place("cpu", torch.get_num_threads()))
        for task in tasks:
            said, reply = work(task), None
            with contextlib.suppress(StopIteration):
                while True:
                    content = said.send(reply)
                    started = time.perf_counter()
                    if isinstance(content, Question):
                        content = content.content
                        reply = answer(task, content)
                    else:
                        reply = None
                        yield Message(task, content)
                    self.seconds[type(content)] += time.perf_counter() - started
            yield Finished(task)


class Timed(LocalProcesses):
    """Local processes; ``seconds`` are the times from an opened model to the end of the task, of each task."""

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__(places)
        self.seconds: list[float] = []

    def run(self, tasks: Sequence[Task], start: Start, answer: Answer = no_answer) -> Iterator[Event]:
        begun: dict[str, float] = {}
        for event in super().run(tasks, start, answer):
            begun.setdefault(event.task.name, time.perf_counter())
            if isinstance(event, Finished):
                self.seconds.append(time.perf_counter() - begun[event.task.name])
            yield event


if __name__ == "__main__":
    main()
