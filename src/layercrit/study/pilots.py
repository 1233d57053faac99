"""What the pilot of a study found, and what was planned after it, as its store keeps them."""

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from layercrit.precision import Components, Cost, Pilot, PrecisionPlan
from layercrit.study.shards import StoredStudy

__all__ = ["pilots_of", "plans_of"]


def plans_of(kept: Sequence[Sequence[Any]] | None) -> dict[tuple[str, str], PrecisionPlan]:
    """Return model and reset -> its plan, as a study's store keeps them; none before there are any."""
    return {(str(model), str(reset)): PrecisionPlan.from_dict(plan) for model, reset, plan in kept or []}


def pilots_of(store: StoredStudy, n_pilot: int, planned: Container[tuple[str, str]]) -> dict[tuple[str, str], Pilot]:
    """Return model and reset -> what the pilot found.

    Args:
        store: of the study.
        n_pilot: trials of the pilot.
        planned: models and resets to leave out, since they have a plan.
    """
    cells = store.cells()
    cells = cells[cells["trial"] < n_pilot]
    random = {row.model: (row.record or {}).get("random_trials", {}) for row in store.models()}
    pilots = {}
    for (model, reset), of_model in cells.groupby(["model", "reset"], sort=False):
        if (str(model), str(reset)) in planned:
            continue
        random_trials = bool(random[str(model)].get(reset, True))
        components: dict[str, Components | None] = {}
        for layer, of_layer in of_model.groupby("layer", sort=False):
            keys = of_layer.loc[of_layer["status"] == "ok", "key"].to_list()
            values = [one["cosine"] for one in store.per_image(keys).values()]
            components[str(layer)] = Components.of_pilot(np.array(values), random_trials)
        layers = of_model.drop_duplicates("layer")
        after = layers["flops_after"].to_numpy(np.float64)
        after = after if np.isfinite(after).all() else np.ones(len(layers))
        trials = of_model.groupby("trial")["seconds"].sum()
        # drawing and packing are in the time of an image: they are not kept apart
        of_image = float(trials.mean()) / float(of_model["n_images"].max()) / (1 + after.sum())
        cost = Cost(trial=0.0, prefix=of_image, layers=np.zeros(len(layers)), evaluations=of_image * after)
        pilots[str(model), str(reset)] = Pilot(components, cost, random_trials)
    return pilots
