"""How many layers are chosen: down a ranking to a share of the parameters, or to so many bits in the mean."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from layercrit.advice.actions import Action
from layercrit.errors import AdviceError

__all__ = ["bits_within", "chosen_within", "share_in_words"]


def share_in_words(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.3g}%"


def chosen_within(
    sizes: npt.ArrayLike, action: Action, budget: float, n_parameters: int, ratio: float = 1.0
) -> npt.NDArray[np.bool_]:
    """Return which knobs of a ranking are chosen, ``(n_knobs,)``.

    Where the least critical for their size come first, as many as it takes to reach the budget; where the most critical
    do, each that still fits into it.

    Args:
        sizes: parameters of each knob in the order of the ranking, ``(n_knobs,)``.
        action: what is done to them.
        budget: share of all parameters.
        n_parameters: how many there are, those of layers included that were not measured.
        ratio: share of a chosen knob's parameters that counts.

    Raises:
        AdviceError: the budget cannot be met.
    """
    shares = ratio * np.asarray(sizes, np.float64) / max(1, n_parameters)
    if not action.highest_first:
        reached = np.cumsum(shares)
        if not len(shares) or reached[-1] < budget - 1e-9:
            most = float(reached[-1]) if len(shares) else 0.0
            if not most:
                raise AdviceError(
                    f"A budget of {share_in_words(budget)} cannot be met: no layer can be {action.done}. Measure more "
                    "layers; where channels are coupled with layers left as they are, ask for --of weights."
                )
            raise AdviceError(
                f"A budget of {share_in_words(budget)} cannot be met: all layers that were measured, {action.done}"
                f"{'' if ratio == 1 else f' by {share_in_words(ratio)} each'}, make up {share_in_words(most)} of the "
                f"parameters. Give at most {share_in_words(most)}"
                f"{'' if ratio == 1 else ', or another ratio'}, or measure more layers."
            )
        return np.asarray(np.arange(len(shares)) <= int(np.argmax(reached >= budget - 1e-9)))
    chosen, left = np.zeros(len(shares), np.bool_), budget + 1e-9
    for place, share in enumerate(shares):
        if share <= left:
            chosen[place], left = True, left - share
    if not chosen.any():
        least = float(shares.min()) if len(shares) else 1.0
        raise AdviceError(
            f"A budget of {share_in_words(budget)} cannot be met: the smallest layer that was measured has "
            f"{share_in_words(least)} of the parameters. Give at least that much."
        )
    return chosen


def bits_within(
    criticality: npt.ArrayLike, sizes: npt.ArrayLike, bits: Sequence[int], budget: float, n_unmeasured: int
) -> npt.NDArray[np.int64]:
    """Return the bits of each knob: down from the most, where that raises the sum of scores least for what it saves.

    The score of a knob at b bits is its criticality times the variance of rounding, which falls fourfold with each bit.
    Among all choices of the same or a smaller size, none has a smaller sum. Layers that were not measured keep the most
    bits.

    Args:
        criticality: of each knob, ``(n_knobs,)``.
        sizes: its parameters, ``(n_knobs,)``.
        bits: the choices.
        budget: bits for a parameter in the mean, those of layers included that were not measured.
        n_unmeasured: parameters of layers that were not measured.

    Raises:
        AdviceError: the budget cannot be met.
    """
    choices = sorted(set(bits), reverse=True)
    criticality, sizes = np.asarray(criticality, np.float64), np.asarray(sizes, np.float64)
    total = sizes.sum() + n_unmeasured
    steps = sorted(
        (c * (4.0**-lower - 4.0**-upper) / max(1.0, size) / (upper - lower), place, level + 1)
        for place, (c, size) in enumerate(zip(criticality, sizes, strict=True))
        for level, (upper, lower) in enumerate(pairwise(choices))
    )
    chosen, used = np.zeros(len(sizes), np.int64), choices[0] * total
    for _, place, level in steps:  # of one knob, in this order too: each step down raises the score more
        if used <= budget * total + 1e-6:
            break
        chosen[place] = level
        used -= sizes[place] * (choices[level - 1] - choices[level])
    if used > budget * total + 1e-6:
        raise AdviceError(
            f"A budget of {budget:g} bits for a parameter cannot be met: with {choices[-1]} bits in every layer that "
            f"was measured, and {choices[0]} in the others, it is {used / max(1.0, total):.3g}. Give at least that, or "
            "fewer bits to choose from."
        )
    return np.array(choices, np.int64)[chosen]
