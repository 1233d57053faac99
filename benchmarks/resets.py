"""What the resets show on the bundled family: docs/resets.png, and the numbers of docs/resets.md.

python benchmarks/resets.py DIR [--models NAME,...] [--trials N] [--images N]

Studies in DIR: single layers under every reset, the donor being the baseline of the other seed, and blocks under
`rerandomize`, `zero` and `skip`. For each model, the criticality of its layers under a reset is correlated with that
under `rerandomize` (Spearman); printed are the mean over the models and a 95% interval of it for new models (Student's
t), or, for a single model, an interval for other layers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats

import layercrit
from layercrit.demo import copy_family
from layercrit.figures.heat_maps import heat_map
from layercrit.figures.style import save_figure
from layercrit.layers import layer_labels, stages_of
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study

DOCS = Path(__file__).parents[1] / "docs"
OF_LAYERS = [
    "rerandomize", "moments(per=tensor)", "moments(per=channel)", "permute", "zero",
    "noise(scale=0.25)", "noise(scale=0.5)", "noise(scale=1)", "noise(scale=2)", "donor",
]  # fmt: skip
OF_BLOCKS = ["rerandomize", "zero", "skip"]
STUDY = """
[images]
source = "fashion-mnist-test.npz"
n_images = {n_images}
input_size = [1, 28, 28]
resize = 0

[protocol]
trials = {trials}
dtype = "float32"
group = "{group}"
seed = {seed}
resets = {resets}
distances = ["cosine"]
"""


def measured(folder: Path, models: Sequence[str], name: str, **settings: object) -> "layercrit.Study":
    donor = "donor" in str(settings["resets"])
    tables = [
        f'[[models]]\nreference = "file:models/{model}"\n' + 'donor = "file:models/baseline-seed1"\n' * donor
        for model in models
    ]
    path = folder / f"{name}.toml"
    path.write_text(STUDY.format(**settings) + "\n".join(tables), encoding="utf-8")
    report = run_study(read_study_file(path), folder / name, n_workers=1)
    assert not report.failures, report.failures[0]
    return layercrit.load_study(folder / name)


def means(study: "layercrit.Study") -> pd.DataFrame:
    """Mean criticality, one row per model and reset, one column per layer; 0 where a reset changes nothing."""
    cells = study.cells.assign(cosine=study.cells["cosine"].where(study.cells["status"] != "unchanged", 0.0))
    order = list(dict.fromkeys(cells.sort_values("depth")["layer"]))
    return cells.pivot_table(index=["model", "reset"], columns="layer", values="cosine")[order]


def correlation(table: pd.DataFrame, one: str, other: str) -> str:
    """Return the mean over models of the rank correlation of two resets over layers, with its interval."""
    rhos = []
    for model in table.index.unique("model"):
        if (model, one) in table.index and (model, other) in table.index:
            both = table.loc[[(model, one), (model, other)]].dropna(axis=1)
            if np.ptp(both.to_numpy(), axis=1).all():  # a model's own layers as donors change nothing
                rhos.append(stats.spearmanr(*both.to_numpy()).statistic)
    if len(rhos) == 1:  # an interval for other layers instead (Fisher's z with the variance of Bonett & Wright 2000)
        z, half = np.arctanh(rhos[0]), 1.96 * ((1 + rhos[0] ** 2 / 2) / (len(table.columns) - 3)) ** 0.5
        return f"{rhos[0]:.2f} ({np.tanh(z - half):.2f} to {np.tanh(z + half):.2f}), one model"
    half = stats.t.ppf(0.975, len(rhos) - 1) * np.std(rhos, ddof=1) / len(rhos) ** 0.5
    return f"{np.mean(rhos):.2f} ({np.mean(rhos) - half:.2f} to {np.mean(rhos) + half:.2f}), {len(rhos)} models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", help="of the family, comma-separated [default: all]")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--images", type=int, default=500)
    arguments = parser.parse_args()
    copy_family(arguments.folder)
    family = sorted(path.name for path in (arguments.folder / "models").iterdir() if path.is_dir())
    models = arguments.models.split(",") if arguments.models else family
    settings = {"trials": arguments.trials, "n_images": arguments.images}
    of = {
        "layers": {"group": "layer", "seed": 0, "resets": json.dumps(OF_LAYERS)},
        "again": {"group": "layer", "seed": 1, "resets": '["rerandomize"]'},
        "blocks": {"group": "block", "seed": 0, "resets": json.dumps(OF_BLOCKS)},
    }
    layers, again, blocks = (
        means(measured(arguments.folder, models, name, **settings, **more)) for name, more in of.items()
    )
    again.index = again.index.set_levels(["rerandomize, other draws"], level="reset")
    table = pd.concat([layers, again])
    for reset in [*again.index.unique("reset"), *OF_LAYERS[1:]]:
        print(f"{reset}: mean {table.xs(reset, level='reset').mean(axis=None):.3f}; "
              f"rho with rerandomize {correlation(table, reset, 'rerandomize')}")  # fmt: skip
    print(f"rerandomize: mean {table.xs('rerandomize', level='reset').mean(axis=None):.3f}")
    within = blocks.loc[:, blocks.xs("skip", level="reset").notna().all()]
    for reset in OF_BLOCKS:
        mean = within.xs(reset, level="reset").mean(axis=None)
        print(f"blocks, {reset}: mean {mean:.3f}; rho with skip "
              + (correlation(within, reset, "skip") if reset != "skip" else "1"))  # fmt: skip
        print(within.xs(reset, level="reset").mean().round(3).to_dict())
    over_models = layers.groupby(level="reset").mean().loc[OF_LAYERS]
    rows = pd.DataFrame({"model": OF_LAYERS, "label": OF_LAYERS, "category": None, "accuracy": np.nan})
    names = list(over_models.columns)
    which = f"mean over {len(models)} models of the demo family" if len(models) > 1 else models[0]
    cells = layercrit.load_study(arguments.folder / "layers").cells
    shapes = dict(zip(cells["layer"], cells["shape"], strict=True))
    figure = heat_map(
        over_models, rows, title=f"Criticality of each layer, {which}",
        layer_labels=layer_labels(shapes), stages=stages_of(names),
    )  # fmt: skip
    (path,) = save_figure(figure, DOCS / "resets", formats=["png"])
    Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)  # half the size


if __name__ == "__main__":
    main()
