"""The order in which layers are chosen, and which places in it are sure."""

from collections.abc import Mapping
from math import hypot

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["in_order", "knobs_of", "places_in_order", "ranked"]


def knobs_of(layers: pd.DataFrame, knobs: Mapping[str, str]) -> pd.DataFrame:
    """Return one row per knob: layers that can only be changed together, or a layer on its own.

    A knob is as critical as its most critical layer, whose interval it has: whatever harms that layer harms the knob.
    It was measured if all its layers were, those included that are not in the table.

    Args:
        layers: one row per layer, with ``layer``, ``criticality``, ``low``, ``high``, ``n_parameters``, and
            ``measured``.
        knobs: layer -> name of its knob; layers that are not named are knobs of their own.

    Returns:
        the same columns, indexed by ``knob``; ``layer`` is the one that decides.
    """
    knob = layers["layer"].map(lambda layer: knobs.get(layer, layer)).rename("knob")
    decides = layers.sort_values("criticality", ascending=False, na_position="first", kind="stable")
    rows = decides.groupby(knob.loc[decides.index], sort=False).nth(0)
    rows = rows.set_index(knob.loc[rows.index]).drop(columns=["n_parameters", "measured"])
    totals = layers.groupby(knob, sort=False).agg(n_parameters=("n_parameters", "sum"), measured=("measured", "all"))
    elsewhere = {knob for layer, knob in knobs.items() if layer not in set(layers["layer"])}
    totals["measured"] &= ~totals.index.isin(elsewhere)
    return totals.join(rows)


def ranked(knobs: pd.DataFrame, *, highest_first: bool) -> pd.DataFrame:
    """Return the measured knobs in the order in which they are chosen, with the places that each may have.

    The least critical are those with the least criticality for each of their parameters, since it takes a share of the
    parameters to meet a budget: one large layer costs less than many small ones that are each a little less critical.

    Two knobs separate where the interval of their difference excludes 0: its limits are made from those of the two
    (Zou & Donner 2008, equation 2, for independent estimates: draws are independent between layers, and what the same
    images do to both makes it wider than it need be). ``rank_low`` and ``rank_high`` are the places left by the knobs
    that separate from a knob, each pair at the level of the intervals; where an interval is not known, nothing
    separates.

    Args:
        knobs: as `knobs_of` returns them.
        highest_first: whether the most critical come first, of whatever size.
    """
    found = in_order(knobs[knobs["measured"]], highest_first=highest_first)
    values = found[["criticality", "low", "high"]].to_numpy(np.float64)
    if not highest_first:
        values = values / found[["n_parameters"]].to_numpy(np.float64).clip(1)
    before = [sum(_separate(values[other], one) for other in range(place)) for place, one in _places(values)]
    after = [
        sum(_separate(one, values[other]) for other in range(place + 1, len(values))) for place, one in _places(values)
    ]
    return found.assign(
        rank=range(1, len(found) + 1),
        rank_low=[1 + n for n in before],
        rank_high=[len(found) - n for n in after],
    )


def in_order(knobs: pd.DataFrame, *, highest_first: bool) -> pd.DataFrame:
    """Return knobs in the order in which they are chosen."""
    values, sizes = (knobs[name].to_numpy(np.float64) for name in ("criticality", "n_parameters"))
    return knobs.iloc[places_in_order(values, sizes, highest_first=highest_first)]


def places_in_order(
    criticality: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], *, highest_first: bool
) -> npt.NDArray[np.intp]:
    """Return the places of knobs in the order in which they are chosen, ``(n_knobs,)``.

    Args:
        criticality: of each knob, ``(n_knobs,)``.
        sizes: its parameters, ``(n_knobs,)``.
        highest_first: as for `ranked`.
    """
    return np.argsort(-criticality if highest_first else criticality / sizes.clip(1), kind="stable")


def _places(values: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return list(enumerate(values))


def _separate(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether the difference of two estimates (value, low, high) is not 0; not where a limit is unknown."""
    (lower, _, upper_limit), (higher, lower_limit, _) = sorted((one, other), key=lambda values: float(values[0]))
    return bool(higher - lower > hypot(upper_limit - lower, higher - lower_limit))
