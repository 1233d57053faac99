"""What does module criticality cost, and how much of the grid does its search leave out?

    python benchmarks/module_criticality.py [--initial FILE] [--json FILE]

On the demo family's run with kept epochs (23 modules), 200 images, 10 draws, a grid of 11 x 21, opening included.
"""

import argparse
import json
import os
import platform
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from layercrit.module_criticality import measure_module_criticality

FAMILY = files("layercrit") / "family"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--initial", help="weights before training; by default those that the family comes with")
    parser.add_argument("--n-images", type=int, default=200)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clock, cpu = time.perf_counter(), time.process_time()
    found = measure_module_criticality(
        f"file:{FAMILY / 'baseline-epochs'}",
        str(FAMILY / "fashion-mnist-test.npz"),
        initial=arguments.initial,
        n_images=arguments.n_images,
        draws=arguments.draws,
        progress=False,
    )
    summary = found.summary()
    results = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0],
        "n_images": arguments.n_images,
        "draws": arguments.draws,
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **{name: summary[name] for name in ("n_modules", "n_evaluations", "n_evaluations_of_grid")},
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))
    print(f"seconds={results['seconds']:.1f}")


def markdown(results: dict[str, Any]) -> str:
    """Return the sentence of docs/benchmarks.md."""
    n, n_of_grid = results["n_evaluations"], results["n_evaluations_of_grid"]
    return (
        f"{results['cores']} cores, torch {results['torch']}: {results['n_modules']} modules, {results['n_images']} "
        f"images, {results['draws']} draws in {results['seconds']:.0f} s ({results['cpu_seconds']:.0f} s of CPU); "
        f"{n:,} evaluations, {n / n_of_grid:.0%} of the whole grid's {n_of_grid:,}."
    )


if __name__ == "__main__":
    main()
