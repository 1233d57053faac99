"""What do proxies cost, in trials of the exact measurement, and how well do they rank layers?

    python benchmarks/proxies.py --json benchmarks/results/proxies.json    # about half an hour on two cores
    python benchmarks/proxies.py --only cost

Cost: ResNet-50 with random weights, 64 random images of 224 x 224 pixels, all proxies as `layercrit proxies` takes them
by default, against one trial of `layercrit measure --dtype float32` on the same images. Seconds are of the CPU, opening
the model left out on the exact side only.

Ranks: the family of the demo (a study, as `layercrit demo` leaves it, is given with --study, or else measured), and,
where the files of ../shared/real are, ResNet-20 and ResNet-56 as their author trained them on CIFAR-10: exact values of
5 trials on 500 images, proxies on 200 of them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

import layercrit
from layercrit.demo import copy_family
from layercrit.proxies import measure_proxies
from layercrit.proxies.formulas import PROXIES
from layercrit.proxies.of_study import measure_study_proxies
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cifar_networks import IMAGES, MEAN, REAL, STD, WEIGHTS, Block

WEIGHTS_56 = REAL / "resnet56-4bfd9763.th"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cost", "family", "real"))
    parser.add_argument("--study", type=Path, help="a finished study of the demo's family")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = {"cost": cost, "family": lambda: family(arguments.study), "real": real}
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    results: dict[str, Any] = {**known, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__.split("+")[0]}
    for name, measure in measured.items():
        if arguments.only in (None, name):
            results[name] = measure()
            print(json.dumps(results[name], indent=1), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


def cost(arch: str = "resnet50", n_images: int = 64) -> dict[str, Any]:
    torch.manual_seed(0)
    model = layercrit.open_model(timm.create_model(arch).eval(), input_size=(3, 224, 224))
    pixels = np.random.default_rng(0).integers(0, 256, (n_images, 224, 224, 3), dtype=np.uint8)
    how: dict[str, Any] = {"progress": False, "device": "cpu"}
    measure_proxies(model, pixels[:1], hessian_images=1, trials=1, **how)  # a first run in a process also imports
    started = time.process_time()
    found = measure_proxies(model, pixels, **how)
    seconds = time.process_time() - started
    started = time.process_time()
    exact = layercrit.measure(model, pixels, trials=1, dtype="float32", distances="cosine", **how)
    trial = time.process_time() - started - exact.record["seconds_opening"]
    costs = found.costs.set_index("proxy")["seconds"].to_dict()
    return {
        "arch": arch,
        "n_images": n_images,
        "layers": len(found.about),
        "hessian_images": found.record["hessian_images"],
        "trials": found.record["protocol"]["trials"],
        "seconds": round(seconds, 1),
        "exact_trial": round(trial, 1),
        "of_proxies": costs,
    }


def family(study: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        if study is None:
            study = Path(scratch) / "study"
            run_study(read_study_file(copy_family(Path(scratch))), study)
        found = measure_study_proxies(study, n_images=200, hessian_images=16, progress=False)
    return {"models": len(found.agreements), "sentence": found.sentence.partition(": ")[2], "ranks": ranks(found)}


def real() -> dict[str, Any]:
    networks = {"ResNet-20": (3, WEIGHTS), "ResNet-56": (9, WEIGHTS_56)}
    return {name: cifar(n, weights) for name, (n, weights) in networks.items() if weights.is_file()}


def cifar(n_blocks: int, weights: Path) -> dict[str, Any]:
    images, network = np.load(IMAGES), CifarResNet(n_blocks).eval()
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    model = layercrit.open_model(network, mean=MEAN, std=STD, input_size=(3, 32, 32))
    how: dict[str, Any] = {"labels": images["labels"], "progress": False, "device": "cpu"}
    exact = layercrit.measure(model, images["images"], n_images=500, trials=5, distances="cosine", **how)
    agreement = measure_proxies(model, images["images"], n_images=200, trials=5, hessian_images=16, **how).against(
        exact
    )
    return {"sentence": agreement.sentence, "ranks": ranks(agreement), "layers": len(agreement.by_layer)}


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2, with ``n_blocks`` blocks a stage."""

    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for number, (before, width) in enumerate(pairwise((16, 16, 32, 64)), 1):
            first = Block(before, width, 1 if number == 1 else 2)
            blocks = [first, *(Block(width, width, 1) for _ in range(n_blocks - 1))]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        logits: torch.Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))
        return logits


def ranks(found: Any) -> dict[str, list[float | None]]:
    """Return proxy -> Spearman with its limits, and its difference from the best null with its limits."""
    columns = ["spearman", "spearman_low", "spearman_high", "difference", "difference_low", "difference_high"]
    rows = {row["proxy"]: [row[column] for column in columns] for row in found.table.to_dict("records")}
    return {name: [None if value != value else round(value, 4) for value in row] for name, row in rows.items()}


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of docs/benchmarks.md."""
    parts = [f"{results['cores']} cores, torch {results['torch']}."]
    if found := results.get("cost"):
        second, rest = (found["of_proxies"][name] for name in ("second_order", "fisher"))  # the two share no pass
        share = second / (second + rest)
        parts.append(
            f"{found['arch']}, {found['layers']} layers, {found['n_images']} images, {found['trials']} draws: all "
            f"proxies take {found['seconds']:.0f} s of CPU, one exact trial {found['exact_trial']:.0f} s: "
            f"{found['seconds'] / found['exact_trial']:.1f} trials, of which the second order "
            f"on {found['hessian_images']} images takes {share:.0%}."
        )
    columns = {"family": results["family"]} if "family" in results else {}
    columns |= results.get("real", {})
    if columns:
        names = [
            f"{results['family']['models']} models of the family" if name == "family" else name for name in columns
        ]
        lines = [f"| Spearman (95 % interval) | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for proxy in PROXIES.values():
            cells = [_cell(one["ranks"][proxy.name]) for one in columns.values()]
            lines.append(f"| {proxy.label}{' (null)' if proxy.null else ''} | {' | '.join(cells)} |")
        parts += [
            "\n".join(lines),
            *(f"{name}: {one['sentence']}" for name, one in zip(names, columns.values(), strict=True)),
        ]
    return "\n\n".join(parts)


def _cell(row: list[float | None]) -> str:
    value, low, high = row[:3]
    return "" if value is None else f"{value:.2f} ({low:.2f} to {high:.2f})" if low is not None else f"{value:.2f}"


if __name__ == "__main__":
    main()
