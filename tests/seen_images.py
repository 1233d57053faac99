"""Studies as if they were measured, with the images that their models were shown."""

from dataclasses import replace

import numpy as np

from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.shown_images import pack_classes
from layercrit.study.store import ModelRow
from published_results import measured

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "fc")
NAMES = {0: "ant", 1: "bee", 2: "cat"}


def seen(folder, models=("base", "other"), layers=LAYERS, n_images=24, size=12, trials=3, labelled=True, names=None):
    """A study of models that were shown noise of three classes, and take every fourth image for another class.

    Args:
        folder: of the study.
        models: their names; the first is the baseline.
        layers: of each.
        n_images: in the probe set, a third of each class.
        size: of the images, in pixels.
        trials: of each layer.
        labelled: whether the images have labels.
        names: class number -> name.
    """
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (n_images, size, size, 3), dtype=np.uint8)
    labels = np.arange(n_images) % 3
    probe_set = ProbeSet.from_array(
        pixels, Preprocessing(height=size, width=size, resize=None), labels if labelled else None
    )
    probe_set = replace(probe_set, names_of_labels=NAMES if names is None else names)
    probe_set.save(folder / "probe_set")
    own = labels[[int(name.rpartition("[")[2][:-1]) for name in probe_set.names]]  # in the order of the draw
    predictions = np.where(np.arange(n_images) % 4 == 0, (own + 1) % 3, own)
    record = {
        "probe_set": probe_set.sha256,
        "n_images": n_images,
        "predictions": {"n_classes": 3, "classes": pack_classes(predictions)},
    }
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": float(generator.uniform(0.2, 0.8))}
        for model in models
        for layer in layers
        for trial in range(trials)
    ]
    rows = [ModelRow(name, f"py:{name}", "baseline", name.title(), 0.5, record) for name in models]
    about = {"baseline": models[0]}
    return measured(folder, cells, models=rows, record=about, noise=0.1, n_images=n_images), own, predictions
