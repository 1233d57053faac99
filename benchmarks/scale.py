"""What it costs to share a study among workers: efficiency, overhead, idle workers, many stores; and what kills lose.

Networks have random weights and images random pixels: only times are of interest. Figures are printed, none is a test.

efficiency  trials a second of two workers against one, after start-up: local processes, shards, SLURM, Ray
overhead    what a task costs beside its work
dealing     idle share of up to 1,000 workers, simulated on the times that tasks took; would splitting trials help?
stores      opening and comparing a study of 100 shards
kills       random kills of whatever runs: cells that were lost, tables that differ (only with --kills)
"""

import argparse
import contextlib
import heapq
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import executor_jobs
import running_jobs
from layercrit.study.executors import Answer, Event, Executor, Finished, Place, Start, Task, no_answer
from layercrit.study.file import StudyFile, read_study_file
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.ranks import Shard
from layercrit.study.running import run_study
from layercrit.study.shards import store_folders
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from layercrit.study.tasks import deal, first_tasks
from small_studies import write_study

ONE = Place("cpu", 1)
N_SHARDS = 100
WORKERS = (16, 100, 1000)
N_MODELS, N_TRIALS = 50, 20  # of the simulated study
RUNS = 12  # of the study on whose times it is simulated
PARTS = {"2 parts": (0.5, 0.5), "4 parts": (0.25,) * 4, "parts of 70, 20 and 10%": (0.7, 0.2, 0.1)}  # of their layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"efficiency": efficiency, "overhead": overhead, "dealing": dealing, "stores": stores, "kills": kills}
    parser.add_argument("--only", choices=parts, action="append", help="one part instead of all but the kills")
    parser.add_argument("--way", action="append", help="of efficiency or kills, one instead of all")
    parser.add_argument("--trials", type=int, default=30, help="of each of two models, in efficiency and dealing")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only or [name for name in parts if name != "kills"]:
            figures[name] = parts[name](Path(scratch) / name, arguments)
            print(f"\n{name}\n{table(name, figures[name])}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


# --- efficiency -------------------------------------------------------------------------------------------------------


def efficiency(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return way -> trials a second of one worker and of two, and of two workers that share nothing."""
    path = write_study(folder, 2, arguments.trials, arguments.images, images={"input_size": [1, 28, 28], "resize": 28})
    found: dict[str, Any] = {"apart": {"one": None, "two": apart(path, folder)}}
    for way, run in ways().items():
        if arguments.way and way not in arguments.way:
            continue
        rates = {}
        for n_workers, word in ((1, "one"), (2, "two")):
            out = folder / f"{way} {n_workers}"
            run(path, out, n_workers)
            rates[word] = trials_a_second(out, n_workers)
        found[way] = rates | {"efficiency": rates["two"] / rates["one"] / 2}
        print(f"  {way}: {found[way]}", flush=True)
    return found


def apart(path: Path, folder: Path) -> float:
    """Return the trials a second of two processes that run a study each: what this machine gives two workers."""
    context = multiprocessing.get_context("spawn")
    outs = [folder / f"apart {number}" for number in range(2)]
    processes = [context.Process(target=run_here, args=(path, out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(trials_a_second(out, 1) for out in outs)


def run_here(path: Path, out: Path, shard: str | None = None) -> None:
    """Run a study, or a shard of it, with one worker."""
    run_study(
        read_study_file(path), out, progress=False, executor=LocalProcesses([ONE]),
        shard=None if shard is None else Shard.parse(shard),
    )  # fmt: skip


def ways() -> dict[str, Callable[[Path, Path, int], None]]:
    """Return the ways to share a study that can be had here, by name."""
    found: dict[str, Callable[[Path, Path, int], None]] = {"local processes": run_local, "shards": run_shards}
    if shutil.which("sbatch"):
        found["SLURM"] = run_slurm
    with contextlib.suppress(ImportError):
        import ray  # noqa: F401

        found["Ray"] = run_ray
    return found


def run_local(path: Path, out: Path, n_workers: int) -> None:
    run_study(read_study_file(path), out, progress=False, executor=LocalProcesses([ONE] * n_workers))


def run_shards(path: Path, out: Path, n_workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    shards = [f"{number}/{n_workers}" for number in range(1, n_workers + 1)]
    processes = [context.Process(target=run_here, args=(path, out, shard)) for shard in shards]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def run_slurm(path: Path, out: Path, n_workers: int) -> None:
    """Submit the study to a SLURM of its own, and wait until it is finished."""
    import slurm_cluster
    from layercrit.study.slurm import submit_study
    from layercrit.study.slurm_job import Resources
    from layercrit.study.slurm_states import job_states

    with slurm_cluster.running_cluster() as cluster:
        os.environ.update(cluster.environment)
        submit_study(path, out, n_workers, Resources(60, cpus=1))
        while any(job.is_alive for job in job_states(out)):
            time.sleep(1)
        assert all(job.state == "finished" for job in job_states(out)), job_states(out)


def run_ray(path: Path, out: Path, n_workers: int) -> None:
    import ray_jobs
    from layercrit.study.ray_workers import RayWorkers

    with ray_jobs.two_nodes() as cluster:
        executor = RayWorkers(cluster.address, n_workers=n_workers, device="cpu")
        run_study(read_study_file(path), out, progress=False, executor=executor)


def trials_a_second(out: Path, n_workers: int) -> float:
    """Return the speed from when every worker has finished a trial to when one has none left."""
    cells = load_study(out).cells
    ends = cells.groupby(["model", "trial"])["finished"].max().map(datetime.fromisoformat)
    seconds = sorted(end.timestamp() for end in ends)
    return (len(seconds) - 2 * n_workers + 1) / (seconds[-n_workers] - seconds[n_workers - 1])


# --- overhead ---------------------------------------------------------------------------------------------------------


def overhead(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return way -> milliseconds that a task costs which does nothing, after start-up."""
    found = {"local processes": {"ms": idle_task(LocalProcesses([ONE]))}}
    with contextlib.suppress(ImportError):
        import ray_jobs
        from layercrit.study.ray_workers import RayWorkers

        with ray_jobs.two_nodes() as cluster:
            for name, address in (("Ray", cluster.address), ("Ray Client", cluster.client_address)):
                found[name] = {"ms": idle_task(RayWorkers(address, n_workers=1, device="cpu"))}
    return found


def idle_task(executor: Executor) -> float:
    tasks = [Task(f"{number}", "model", partial(executor_jobs.say, number)) for number in range(300)]
    ends = [time.perf_counter() for event in executor.run(tasks, executor_jobs.start) if isinstance(event, Finished)]
    return 1e3 * (ends[-1] - ends[50]) / (len(ends) - 51)


# --- dealing ----------------------------------------------------------------------------------------------------------


def dealing(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return number of workers -> idle share, with shards that are dealt and with workers that take the next task.

    On the times of single trials of a study that was run several times: as they were in its first run, in which equal
    work takes longer when something else uses the machine, and the least of all runs, layer by layer, which is nearer
    to the work itself. And the same for a queue of parts of trials, with the time that the study takes against that
    with whole trials: every part would need the pass of the trained network, which a trial needs once.
    """
    path = write_study(folder, 2, arguments.trials, arguments.images, images={"input_size": [1, 28, 28], "resize": 28})
    for number in range(RUNS):
        run_local(path, folder / f"out{number}", 1)
    runs = [load_study(folder / f"out{number}").cells.set_index("key") for number in range(RUNS)]
    seconds = pd.concat([cells["seconds"] for cells in runs], axis=1)
    trials = [runs[0]["model"], runs[0]["trial"]]
    passes_after = runs[0]["flops_after"].groupby(trials).sum().mean()
    times = {"first run": seconds.iloc[:, 0], f"least of {RUNS} runs": seconds.min(axis=1)}
    found: dict[str, Any] = {}
    for name, of_cells in times.items():
        measured = of_cells.groupby(trials).sum().to_numpy()
        found |= {
            f"{name}: {key}": row for key, row in dealt(folder / name, measured, passes_after, arguments.seed).items()
        }
    return found


def dealt(folder: Path, measured: npt.NDArray[np.float64], passes_after: float, seed: int) -> dict[str, Any]:
    """Return what `dealing` does, for one set of times of trials, in seconds."""
    generator = np.random.default_rng(seed)
    study = named_study(folder / "named", N_MODELS, N_TRIALS)
    tasks = first_tasks(study)
    seconds = dict(zip((task.name for task in tasks), generator.choice(measured, len(tasks)), strict=True))
    found = {}
    for n_workers in WORKERS:
        shares = [deal(tasks, Shard(number, n_workers)) for number in range(n_workers)]
        names = [task.name for share in shares for task in share]
        busy = [sum(seconds[task.name] for task in share) for share in shares]
        queue = queued([seconds[task.name] for task in tasks], n_workers)
        found[str(n_workers)] = {
            "shards": idle_share(busy),
            "queue": idle_share(queue),
            "time": 1.0,
            "repeated": len(names) - len(set(names)),
            "left": len(set(seconds) - set(names)),
        }
    for name, shares_of_trial in PARTS.items():  # the largest first, of all trials
        times = [
            share_of_trial(share, passes_after) * generator.choice(measured, len(tasks)) for share in shares_of_trial
        ]
        parts = queued(np.concatenate(times), WORKERS[-1])
        split = {"queue": idle_share(parts), "time": max(parts) / max(queue)}
        found[f"{WORKERS[-1]}, trials in {name}"] = split
    return found


def share_of_trial(share: float, passes_after: float) -> float:
    """Return which share of a trial's time it takes to reset a share of its layers, after one pass without a reset."""
    return (1 + share * passes_after) / (1 + passes_after)


def queued(seconds: Iterable[float], n_workers: int) -> list[float]:
    """Return the seconds that each worker is busy if whoever is free takes the next task."""
    busy = [0.0] * n_workers
    for task in seconds:
        heapq.heapreplace(busy, busy[0] + task)
    return busy


def idle_share(busy: Sequence[float]) -> float:
    return 1 - sum(busy) / (len(busy) * max(busy))


def named_study(folder: Path, n_models: int, n_trials: int) -> StudyFile:
    models = [{"reference": "file:m0.safetensors?" + running_jobs.ARCHITECTURE, "name": f"model{number}"}
              for number in range(n_models)]  # fmt: skip
    return read_study_file(write_study(folder, 1, n_trials, models=models, study={"baseline": "model0"}))


# --- stores -----------------------------------------------------------------------------------------------------------


def stores(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of opening and of comparing a study of 100 shards, and how many cells it has."""
    path = running_jobs.write_small(folder, n_models=N_MODELS, trials=N_TRIALS, n_images=arguments.images)
    study = read_study_file(path)
    out = folder / "out"
    for number in range(N_SHARDS):
        run_study(study, out, progress=False, executor=running_jobs.Inline(), shard=Shard(number, N_SHARDS))
    started = time.perf_counter()
    found = load_study(out)
    opened = time.perf_counter()
    found.compare()
    compared = time.perf_counter()
    return {f"{N_SHARDS} shards": {"cells": len(found.cells), "open": opened - started, "compare": compared - opened}}


# --- kills ------------------------------------------------------------------------------------------------------------


def kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return way -> kills, committed cells that were gone afterwards, and studies whose tables differ at the end."""
    generator = random.Random(arguments.seed)
    path = running_jobs.write_small(folder, n_models=2, trials=4, protocol={"batch_size": 8})
    running_jobs.run(path, folder / "whole")
    expected = running_jobs.tables(folder / "whole")
    found = {}
    for way, (share, killed) in ways_to_die().items():
        if arguments.way and way not in arguments.way:
            continue
        n_kills = n_lost = n_differing = n_studies = 0
        while n_kills < share * arguments.kills:
            out = folder / f"{way} {n_studies}"
            known: set[str] = set()
            for n_now in killed(path, out, generator):
                n_kills += n_now
                cells = cells_in(out)
                n_lost += len(known - cells)
                known = cells
            n_studies += 1
            running_jobs.run(path, out) if way == "main process" else None
            n_differing += differs(out, expected)
            print(f"  {way}: {n_kills} kills, {n_studies} studies, {n_lost} lost, {n_differing} differ", flush=True)
        found[way] = {"kills": n_kills, "studies": n_studies, "lost": n_lost, "differing": n_differing}
    return found


def ways_to_die() -> dict[str, tuple[float, Callable[[Path, Path, random.Random], Iterator[int]]]]:
    """Return way -> its share of the kills, and what runs a study to its end and yields how many were killed."""
    found = {"main process": (0.4, kill_main), "shards": (0.4, kill_shards), "workers": (0.18, kill_workers)}
    if shutil.which("sbatch"):
        found["jobs of SLURM"] = (0.01, kill_jobs)
    with contextlib.suppress(ImportError):
        import ray  # noqa: F401

        found["nodes of Ray"] = (0.01, kill_nodes)
    return found


class LosingNodes(Executor):
    """Workers on a Ray cluster of which a node is lost at each of some events."""

    is_remote = True

    def __init__(self, cluster: Any, at: Sequence[int]) -> None:
        self.cluster, self.at, self.n_lost = cluster, set(at), 0

    def run(self, tasks: Sequence[Task], start: Start, answer: Answer = no_answer) -> Iterator[Event]:
        import ray_jobs
        from layercrit.study.ray_workers import RayWorkers

        executor = RayWorkers(self.cluster.address, n_workers=2, device="cpu", attempts=10)
        for number, event in enumerate(executor.run(tasks, start, answer)):
            if number in self.at:
                self.cluster.remove_node(self.cluster.list_all_nodes()[-1], allow_graceful=False)
                ray_jobs.add_node(self.cluster)
                self.n_lost += 1
            yield event


def cells_in(out: Path) -> set[str]:
    found: set[str] = set()
    for own in store_folders(out).values():
        with Store(own) as store:
            found |= store.keys()
    return found


def differs(out: Path, expected: Any) -> bool:
    try:
        running_jobs.assert_same_tables(running_jobs.tables(out), expected)
    except AssertionError as error:
        print(f"  {out.name}: {str(error).splitlines()[0]}", flush=True)
        return True
    return False


def forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layercrit.study.running", "torch._dynamo", "torch.export", "timm", "running_jobs"])
    return context


def kill_main(path: Path, out: Path, generator: random.Random) -> Iterator[int]:
    """Kill a run again and again, at some moment of its life."""
    for _ in range(10):
        process = forks().Process(target=running_jobs.run_slowly, args=(path, out, 0.01))
        process.start()
        process.join(generator.uniform(0, 1.5))
        process.kill()
        process.join()
        yield int(process.exitcode != 0)


def kill_shards(path: Path, out: Path, generator: random.Random) -> Iterator[int]:
    """Run three shards at the same time, one of which is killed and started again, until all are finished."""
    shards = ["1/3", "2/3", "3/3"]
    processes: dict[str, Any] = {}
    n_kills = 0
    while True:
        for shard in shards:
            if shard not in processes or processes[shard].exitcode not in (None, 0):
                processes[shard] = forks().Process(target=running_jobs.run_slowly, args=(path, out, 0.01, shard))
                processes[shard].start()
        alive = [shard for shard in shards if processes[shard].exitcode is None]
        if not alive:
            return
        victim = processes[generator.choice(alive)]
        victim.join(generator.uniform(0, 1.0))
        if n_kills < 15:
            victim.kill()
            victim.join()
            n_kills += victim.exitcode != 0
            yield int(victim.exitcode != 0)


def kill_workers(path: Path, out: Path, generator: random.Random) -> Iterator[int]:
    """Kill workers of local processes at random events of a run."""
    executor = running_jobs.KillingWorkers([ONE] * 2, sorted(generator.sample(range(12), 4)), attempts=10)
    running_jobs.run(path, out, executor)
    yield len(executor.killed)


def kill_jobs(path: Path, out: Path, generator: random.Random) -> Iterator[int]:
    """Cancel the jobs of a submitted study at random moments, and submit it again."""
    import slurm_cluster
    from layercrit.study.slurm import submit_study
    from layercrit.study.slurm_job import Resources
    from layercrit.study.slurm_states import job_states

    with slurm_cluster.running_cluster() as cluster:
        os.environ.update(cluster.environment)
        for n_submitted in range(4):
            (number, *_) = {job.job.partition("_")[0] for job in submit_study(path, out, 2, Resources(60, cpus=1))}
            if n_submitted < 3:
                time.sleep(generator.uniform(1, 12))
                alive = sum(job.is_alive for job in job_states(out))
                cluster.ask("scancel", "--signal=KILL", "--full", number, check=False)
                cluster.ask("scancel", number, check=False)
                yield alive
            while any(job.is_alive for job in job_states(out)):
                time.sleep(0.5)


def kill_nodes(path: Path, out: Path, generator: random.Random) -> Iterator[int]:
    """Take a node away from a Ray cluster at random events of a run, and give it another."""
    import ray_jobs

    with ray_jobs.two_nodes() as cluster:
        losing = LosingNodes(cluster, sorted(generator.sample(range(1, 12), 2)))
        running_jobs.run(path, out, losing)
        yield losing.n_lost


# --- tables -----------------------------------------------------------------------------------------------------------


def table(name: str, figures: dict[str, Any]) -> str:
    """Return figures as a Markdown table."""
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    lines = [f"| {name} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [
        f"| {row} | {' | '.join(number(values.get(column)) for column in columns)} |" for row, values in figures.items()
    ]
    return "\n".join(lines)


def number(value: Any) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"


def markdown(results: dict[str, Any]) -> str:
    """Return the tables for the docs."""
    return "\n\n".join(table(name, figures) for name, figures in results.items())


if __name__ == "__main__":
    main()
