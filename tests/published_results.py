"""Result tables in the published layout: where the released one lies, small made-up ones, and studies made of cells."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from layercrit.shown_images import pack_classes
from layercrit.study.store import CellRow, FailureRow, ModelRow, PlanRow, Store
from layercrit.study.tables import load_study

PREDICTED = {"predictions": {"n_classes": 2, "classes": pack_classes(np.array([0, 0, 1, 1]))}}
"""What is known of a model that was shown four images, and predicts either of two classes for two of them."""

RELEASED = Path(__file__).resolve().parents[2] / "shared" / "published"
released = pytest.mark.skipif(
    not (RELEASED / "results.csv").is_file(), reason="the released table is not here (../shared/published)"
)

COLUMNS = ["top1_acc", "top5_acc", "loss", "batch_acc", "layer", "pred_cos_sim", "pred_l1_err", "pred_l2_err",
           "pred_ce_loss", "trial", "recovered_acc", "model_id"]  # fmt: skip
LAYERS = ("model.conv1", "model.layer1.0.conv1", "model.layer1.0.conv2", "model.layer1.1.conv1", "model.layer1.1.conv2",
          "model.fc")  # fmt: skip
MODELS = {
    "tv_resnet50": ("baseline", "Baseline", 76.15),
    "model_a": ("augmentation", "A, with a comma", 77.5),
    "model_b": ("augmentation", 'B "quoted"', 74.2),
    "model_c": ("contrastive", "Cé", 80.1),
    "frozen": ("freezing", "frozen", None),
}


def rows_of(models: Sequence[str] = tuple(MODELS), layers: Sequence[str] = LAYERS, trials: int = 3, seed: int = 0):
    """Rows of a table: column -> text."""
    generator = np.random.default_rng(seed)
    rows = []
    for model in models:
        for trial in range(trials):
            for layer in layers:
                top1, top5, cosine, l1, l2, share = generator.random(6)
                numbers = {"top1_acc": 100 * top1, "top5_acc": 100 * top5, "loss": 10 * share, "pred_cos_sim": cosine,
                           "pred_l1_err": 2 * l1, "pred_l2_err": l2, "pred_ce_loss": -1000 * share,
                           "trial": float(trial), "recovered_acc": share}  # fmt: skip
                texts = {name: repr(float(value)) for name, value in numbers.items()}
                rows.append({**texts, "batch_acc": "", "layer": layer, "model_id": model})
    return rows


def write_table(path: Path, rows, columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_models(path: Path, models=MODELS) -> Path:
    columns = ["model_id", "category", "label", "imagenet_top1_percent"]
    rows = [
        dict(zip(columns, (name, category, label, "" if percent is None else percent), strict=True))
        for name, (category, label, percent) in models.items()
    ]
    return write_table(path, rows, columns)


def measured(folder: Path, cells, *, models=None, failures=(), record=None, n_images=4, random_trials=True, noise=0.0):
    """A study as if it were measured.

    Args:
        cells: rows of model, layer, trial and means; optionally reset, status, stage, seed.
        models: rows for `ModelRow`; without them each model is in a category of its own name.
        failures: rows of model, trial, error.
        noise: how far the distances of single images lie around the cell's mean.
    """
    generator = np.random.default_rng(0)
    names = list(dict.fromkeys(cell["model"] for cell in cells))
    known = {"random_trials": {"rerandomize": random_trials}}
    models = models or [ModelRow(name, f"py:{name}", f"like_{name}", name, 0.5, known) for name in names]
    with Store(folder, create=True) as store, store.transaction():
        store.put_models(models)
        depths: dict[str, dict[str, int]] = {}
        for cell in cells:
            usual = {"reset": "rerandomize", "status": "ok", "stage": cell["layer"].split(".")[0]}
            cell = {**usual, "cosine_matched": math.nan, **cell}
            place = [cell.pop(name) for name in ("model", "layer", "reset", "trial")]
            of_model = depths.setdefault(place[0], {})
            depth = of_model.setdefault(place[1], len(of_model))
            key, status, stage = json.dumps(place), cell.pop("status"), cell.pop("stage")
            seed = cell.pop("seed", 2**63 + place[3])
            around = generator.uniform(-noise, noise, n_images)
            around -= around.mean()
            per_image = {name: (mean + around).astype(np.float32) for name, mean in cell.items()}
            store.put_plan([PlanRow(*place, key, "conv", stage, depth, 9, 0.5)])
            store.put_cells([CellRow(key, status, seed, 1.5, n_images, cell, per_image)])
        for model, trial, error in failures:
            store.put_failure(FailureRow(model, "rerandomize", trial, error, "Traceback ...", "2026-01-01"))
        store.put_meta("study", {"name": "made up", "protocol": {"trials": 2, "level": 0.95}, **(record or {})})
    return load_study(folder)
