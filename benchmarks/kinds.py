"""What does it cost to ask in other ways whether a network needs its layers?

    python benchmarks/kinds.py [--json FILE]

On a bundled network of 23 layers, 500 images in 3 trials, opening included. Sets of layers: every kind of `--sets`, and
beside it the same resets where no two sets share anything: each runs what comes after its first member by itself. Norm
statistics: every kind of `--norm-statistics`, and all of them together against `trained` alone.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import layercrit
from layercrit.engine.graph_replay import GraphReplay
from layercrit.layers import Layer
from layercrit.protocol import NORM_STATISTICS, SETS

FAMILY = files("layercrit") / "family"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-images", type=int, default=500)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    n_images, trials = arguments.n_images, arguments.trials
    measured(n_images, 1, sets="each")  # a first run in a process also imports, and makes kernels
    statistics = []
    for how in NORM_STATISTICS:
        statistics.append({"norm_statistics": how, **measured(n_images, trials, norm_statistics=how)})
        print(f"{how:14} {statistics[-1]['seconds']:7.1f} s, {statistics[-1]['cpu_seconds']:7.1f} of CPU", flush=True)
    sets = []
    for kind in SETS:
        shared = measured(n_images, trials, sets=kind)
        with_sharing, GraphReplay._parts = GraphReplay._parts, _apart  # type: ignore[method-assign]
        apart = measured(n_images, trials, sets=kind)
        GraphReplay._parts = with_sharing  # type: ignore[method-assign]
        sets.append({"sets": kind, **shared, "apart": apart})
        print(
            f"{kind:14} {shared['n_sets']:4} sets {shared['seconds']:7.1f} s; apart {apart['seconds']:7.1f} s",
            flush=True,
        )
    results = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__.partition("+")[0],
        "n_images": arguments.n_images,
        "trials": arguments.trials,
        "sets": sets,
        "norm_statistics": statistics,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"statistics_ratio={statistics_ratio(statistics):.2f}")
    print(f"seconds_of_pairs={sets[SETS.index('pairs')]['seconds']:.1f}")


def statistics_ratio(statistics: Sequence[dict[str, Any]]) -> float:
    """Return the CPU time of all kinds of norm statistics together, in that of ``trained`` alone."""
    return sum(one["cpu_seconds"] for one in statistics) / statistics[0]["cpu_seconds"]


def measured(n_images: int, trials: int, **settings: Any) -> dict[str, Any]:
    """Return how many sets there are, and the seconds that measuring them took, on the clock and of CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = layercrit.measure(
        f"file:{FAMILY / 'baseline'}",
        str(FAMILY / "fashion-mnist-test.npz"),
        n_images=n_images,
        trials=trials,
        progress=False,
        **settings,
    )
    return {
        "n_sets": len(found.record["layers"]),
        "seconds": round(time.perf_counter() - clock, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def _apart(replay: GraphReplay, base: Sequence[Layer], sets: Sequence[Layer]) -> Iterator[Any]:
    for one in sets:
        yield one.name, replay._suffix(replay._members[one.name])


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of docs/benchmarks.md."""
    rows = [
        f"| `{one['sets']}` | {one['n_sets']} | {one['seconds']:.0f} | {one['cpu_seconds']:.0f} "
        f"| {one['apart']['seconds']:.0f} | {one['apart']['cpu_seconds']:.0f} |"
        for one in results["sets"]
    ]
    head = [
        f"{results['cores']} cores, torch {results['torch']}: {results['n_images']} images, {results['trials']} trials",
        "",
        "| `--sets` | sets | seconds | of CPU | seconds, nothing shared | of CPU |",
        "|---|---|---|---|---|---|",
    ]
    of_statistics = [
        f"| `{one['norm_statistics']}` | {one['seconds']:.1f} | {one['cpu_seconds']:.1f} |"
        for one in results["norm_statistics"]
    ]
    ratio = statistics_ratio(results["norm_statistics"])
    statistics = [
        "",
        "| `--norm-statistics` | seconds | of CPU |",
        "|---|---|---|",
        *of_statistics,
        f"| all three, in `trained` alone | | {ratio:.2f} |",
    ]
    return "\n".join([*head, *rows, *statistics])


if __name__ == "__main__":
    main()
