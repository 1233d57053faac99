"""Ways to read more into the numbers than they say, and which of them apply to a measurement or a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layercrit.comparison import estimates_of
from layercrit.errors import LayercritError, near
from layercrit.protocol import DEFAULTS

if TYPE_CHECKING:
    import pandas as pd

    from layercrit.comparison import Comparison
    from layercrit.measurement import Measurement
    from layercrit.study.tables import Study

__all__ = ["PITFALLS", "Pitfall", "pitfall", "pitfalls_of_comparison", "pitfalls_of_measurement"]

_WIDE = 0.1  # half-width of a layer's interval from which on a few trials say little about it
_MOVED = 0.05  # difference between a mean and its temperature-matched value from which on confidence is part of it
_ALIKE = 1e-6  # standard deviation over trials of draws that are all the same
_OFF = 1e-3  # criticality of a layer whose reset does something


@dataclass(frozen=True)
class Pitfall:
    """One way to read more into the numbers than they say.

    Attributes:
        name: as the command line has it.
        title: in one sentence.
        text: what happens, and what to do about it, in a few sentences.
    """

    name: str
    title: str
    text: str


PITFALLS: Mapping[str, Pitfall] = {
    one.name: one
    for one in (
        Pitfall(
            "confidence",
            "The cosine depends on confidence.",
            "It compares softmax outputs, and these are flatter in models trained with label smoothing, mixup or a "
            "sigmoid loss: their predictions before and after a reset are similar even if the layer mattered. Look at "
            "the temperature-matched values and at top-1 agreement before you interpret a difference as reliance on "
            "layers.",
        ),
        Pitfall(
            "chance-level",
            "An unrelated prediction does not give 1.",
            "Predictions for different images are somewhat similar, too. A layer whose criticality is near 1 minus "
            "their mean cosine leaves nothing of the decision, and how far two such layers lie apart says nothing "
            "about which one matters more.",
        ),
        Pitfall(
            "few-trials",
            "Few trials hide how much depends on the draw.",
            "Random draws of one layer can have very different effects, far more than other images have. Where the "
            "interval is wide, add trials before you add images, or ask for a half-width; and do not rank layers whose "
            "intervals overlap.",
        ),
        Pitfall(
            "training-seed",
            "Another training seed is another network.",
            "Intervals and tests account for new draws and new images, never for a new training run. Train the "
            "baseline with two seeds or more, and treat differences smaller than those between them as within seed "
            "noise.",
        ),
        Pitfall(
            "first-layers",
            "The first layer is nearly always critical.",
            "All that the network sees passes through it, and no shortcut leads around it. So a critical first layer "
            "tells nothing about how a network was trained: compare it with the same layer of the baseline rather than "
            "with other layers.",
        ),
        Pitfall(
            "donor",
            "A reset is as random as the initialiser.",
            "New values come from the architecture's own initialiser, and have its scale, not that of the trained "
            "ones. Where it sets a constant, as 0 for the last norm of a residual branch, a layer scale or a bias, all "
            "trials are the same and the reset removes what it was to randomise. Compare with the resets permute, "
            "moments and zero.",
        ),
        Pitfall(
            "architectures",
            "Means of different layers are different means.",
            "A model's criticality is the mean over its layers, so models of different architectures differ in it "
            "because they consist of different layers. Compare layer by layer within one architecture; between two, at "
            "most the shape over depth.",
        ),
    )
}


def pitfall(name: str) -> Pitfall:
    """Return a pitfall by its name.

    Raises:
        LayercritError: there is none of that name.
    """
    if name not in PITFALLS:
        raise LayercritError(f"There is no pitfall {name!r}. {near(name, list(PITFALLS))}")
    return PITFALLS[name]


def pitfalls_of_measurement(measurement: "Measurement") -> list[Pitfall]:
    """Return what readers of one model's numbers may fall into."""
    summary, layers = measurement.summary(), measurement.to_pandas()
    cells = measurement.cells[measurement.cells["status"] == "ok"].groupby("layer")["cosine"]
    ok = layers[layers["status"] == "ok"]
    mean, matched, chance = (summary[name] for name in ("criticality", "criticality_matched", "chance"))
    random = bool(measurement.record["random_trials"])
    found = {
        "confidence": mean is not None and matched is not None and abs(mean["mean"] - matched["mean"]) > _MOVED,
        "chance-level": chance is not None and bool((ok["criticality"] >= 1 - chance).any()),
        "few-trials": random and _wide(ok["half_width"]),
        "first-layers": _all_layers(measurement.record["protocol"])
        and len(ok) > 1
        and ok["criticality"].idxmax() == layers.index[0],
        "donor": random and _constant(cells.std().to_numpy(), cells.mean().to_numpy()),
    }
    return [PITFALLS[name] for name in PITFALLS if found.get(name)]


def pitfalls_of_comparison(study: "Study", comparison: "Comparison") -> list[Pitfall]:
    """Return what readers of a comparison of models may fall into.

    Args:
        study: the models are its.
        comparison: of them.
    """
    models, values = comparison.models, comparison.criticality
    several = len(models) > 1
    cells = study.cells[study.cells["model"].isin(models.index)]
    chance = study.models.set_index("model")["chance"].reindex(models.index)
    rows = estimates_of(study, comparison)
    random = rows["covers"].isin(["nothing", "trials", "trials and images"])
    means = comparison.layers["criticality"]
    first_is_most = _all_layers(study.record.get("protocol", {})) and len(means) > 1 and means.argmax() == 0
    found = {
        "confidence": several and not _matched_agrees(models),
        "chance-level": bool((values.max(axis=1) >= 1 - chance).any()),
        "few-trials": _wide(rows.loc[random & (rows["status"] == "ok"), "half_width"]),
        "training-seed": several and _within_seed_noise(models),
        "first-layers": first_is_most,
        "donor": bool(random.any()) and _constant(comparison.sd_trials.to_numpy(), values.to_numpy()),
        "architectures": len(set(cells.groupby("model")["layer"].agg(frozenset))) > 1,
    }
    return [PITFALLS[name] for name in PITFALLS if found.get(name)]


def _wide(half_widths: "pd.Series[float]") -> bool:
    """Return whether some interval of a random reset is wide, or missing."""
    return bool((half_widths.isna() | (half_widths > _WIDE)).any())


def _all_layers(protocol: Mapping[str, Any]) -> bool:
    """Return whether every layer is reset by itself, so that the first row of a table is the network's first layer."""
    return bool(protocol.get("layers", DEFAULTS.layers) == DEFAULTS.layers and protocol.get("sets", "each") == "each")


def _constant(spread: np.ndarray, values: np.ndarray) -> bool:
    """Return whether draws of some layer are all alike, though they do something."""
    return bool(((spread < _ALIKE) & (values > _OFF)).any())


def _matched_agrees(models: "pd.DataFrame") -> bool:
    """Return whether no model's mean moves much at the matched temperature; False where that is not known."""
    return bool(((models["criticality"] - models["criticality_matched"]).abs() <= _MOVED).all())


def _within_seed_noise(models: "pd.DataFrame") -> bool:
    """Return whether some model differs from the baselines by no more than they do from each other, or may do so."""
    is_baseline = models["category"] == "baseline"
    baselines, others = models["criticality"][is_baseline], models["criticality"][~is_baseline]
    if len(baselines) < 2:
        return True
    return bool(((others - baselines.mean()).abs() <= baselines.max() - baselines.min()).any())
