"""What corrupted and adversarial images change: the numbers and the picture of docs/images.md.

Run by: python benchmarks/images.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import layercrit
from layercrit.demo import copy_family
from layercrit.probes import ProbeSet
from layercrit.probes.corruptions import CORRUPTIONS

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHOWN = (1, 3, 5)  # severities in the picture
MODEL, SEVERITY, N_IMAGES, TRIALS = "baseline", 3, 200, 5
ATTACKS = ("attack:pgd(norm=linf, eps=8/255):", "attack:pgd(norm=l2, eps=1.5):")


def measured(model: str, images: str) -> layercrit.Measurement:
    found = layercrit.measure(model, images, trials=TRIALS, n_images=N_IMAGES, progress=False)
    print(
        f"{found.record['predictions']['top1_accuracy']:6.1%}  {images.rpartition(':')[0] or 'as they are'}", flush=True
    )
    return found


def difference(one: layercrit.Measurement, other: layercrit.Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Differences in criticality of each layer, paired by draw, and half-widths over draws."""
    of_trials = (one.per_image["cosine"] - other.per_image["cosine"]).mean(axis=2)  # (n_layers, n_trials)
    deviation = of_trials.std(axis=1, ddof=1) / np.sqrt(TRIALS)
    return of_trials.mean(axis=1), stats.t.ppf(0.975, TRIALS - 1) * deviation


def draw(
    changes: list[str], clean: layercrit.Measurement, found: list[layercrit.Measurement], pixels: ProbeSet
) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(10, 9), height_ratios=(1, 1.5), layout="constrained")
    columns = [
        np.concatenate([pixels.images[0, 0], *(pixels.corrupted(kind, one).images[0, 0] for one in SHOWN)])
        for kind in CORRUPTIONS
    ]
    axes[0].imshow(np.concatenate(columns, axis=1), cmap="gray", vmin=0, vmax=255)
    axes[0].set_xticks(28 * np.arange(len(columns)) + 14, list(CORRUPTIONS), rotation=30, ha="right")
    axes[0].set_yticks(28 * np.arange(1 + len(SHOWN)) + 14, ["clean", *(f"severity {one}" for one in SHOWN)])
    layers = list(clean.to_pandas()["layer"])
    values = np.array([difference(one, clean)[0] for one in found])
    limit = float(np.abs(values).max())
    image = axes[1].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes[1].set_yticks(range(len(changes)), [change.partition(":")[2].rstrip(":") for change in changes])
    axes[1].set_xticks(range(len(layers)), layers, rotation=90)
    axes[1].set_title("criticality on these images minus that on clean ones")
    figure.colorbar(image, ax=axes[1])
    figure.savefig(DOCS / "images.png", dpi=80)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "family"
    if not folder.exists():
        copy_family(folder)
    images, model = str(folder / "fashion-mnist-test.npz"), f"file:{folder / 'models' / MODEL}"
    changes = [*(f"corrupt:{kind}@{SEVERITY}:" for kind in CORRUPTIONS), *ATTACKS]
    clean, *found = [measured(model, change + images) for change in ("", *changes)]
    layers = clean.to_pandas()
    for change, one in zip(changes, found, strict=True):
        mean, half = difference(one, clean)
        rank = stats.spearmanr(layers["criticality"], one.to_pandas()["criticality"]).statistic
        listed = ", ".join(f"{layers['layer'][i]} {mean[i]:+.2f} +- {half[i]:.2f}" for i in np.argsort(-abs(mean))[:4])
        whole = one.summary()["criticality"]["mean"] - clean.summary()["criticality"]["mean"]
        print(f"{change:36s} mean {whole:+.3f}, rank correlation {rank:.2f}: {listed}")
    preprocessing = layercrit.open_model(model).preprocessing
    draw(changes, clean, found, ProbeSet.from_source(images, preprocessing, n_images=1))


if __name__ == "__main__":
    main()
