"""Write docs/family.md from what `layercrit demo` left: how each model was trained, and how critical its layers are.

layercrit demo --out DIR && python benchmarks/family.py DIR
"""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from layercrit.toml import tomllib

DOCS = Path(__file__).parents[1] / "docs"
HEAD = """# The demo family: one network, fifteen ways to train it

<!-- Written by benchmarks/family.py from the files of `layercrit demo`; do not edit. -->

A small residual network with bottleneck blocks and BatchNorm ({n_parameters:,} parameters, {n_layers} convolutions and
linear layers), trained on Fashion-MNIST from the same initial weights on images in the same order; only the method
differs. `layercrit study example fashion` prints the study file, and `layercrit train --study fashion.toml` trains the
models again. Accuracy is on the 10,000 test images. Time is wall time on one core of a machine that did other work at
the same time, so it is a rough guide. Criticality is the mean over layers, {n_trials} trials on {n_images} test images.
`models/baseline-epochs` is the baseline's recipe once more, with the weights after some epochs; it is not in the table,
but in [Epochs](epochs.md).

![Criticality of each layer of each model](family.png)

| model | method | epochs | top-1 accuracy | time | criticality | 95% interval | temperature-matched |
|---|---|---|---|---|---|---|---|
"""


def main(folder: Path) -> None:
    table = pd.read_csv(folder / "models.csv").set_index("model")
    lines = []
    records = {path.parent.name: json.loads(path.read_text()) for path in (folder / "models").glob("*/model.json")}
    for name, row in table.iterrows():
        record = records[str(name)]
        lines.append(
            f"| {name} | `{record['method']}` | {record['epochs']} | {record['top1_accuracy']:.1%} "
            f"| {record['seconds'] / 60:.1f} min | {row['criticality']:.3f} | {row['low']:.3f} to {row['high']:.3f} "
            f"| {row['criticality_matched']:.3f} |"
        )
    layers = pd.read_csv(folder / "layers.csv")
    study = tomllib.loads((folder / "fashion.toml").read_text(encoding="utf-8"))
    head = HEAD.format(
        n_parameters=next(iter(records.values()))["n_parameters"],
        n_layers=layers["layer"].nunique(),
        n_trials=int(table["n_trials"].iloc[0]),
        n_images=study["images"]["n_images"],
    )
    findings = (folder / "findings.txt").read_text(encoding="utf-8")
    text = head + "\n".join(lines) + "\n\n## What it shows, and what it does not\n\n" + findings
    (DOCS / "family.md").write_text(text, encoding="utf-8")
    shutil.copyfile(folder / "figures" / "criticality.png", DOCS / "family.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
