"""Numbers with the word for what was counted, and durations: 1 layer, 3 layers, 5 min."""

from collections.abc import Mapping
from typing import Any

__all__ = ["counted", "counted_range", "counted_units", "duration"]


def counted(n: int, one: str) -> str:
    """Return a number with the singular or the plural of a word, which takes an s: ``1 layer``, ``2,000 images``."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"


def counted_range(least: int, most: int, one: str) -> str:
    """Return what `counted` does, of two numbers where these differ: ``10 to 39 trials``."""
    return counted(most, one) if least == most else f"{least:,} to {counted(most, one)}"


def counted_units(n_units: int, sets: str | Mapping[str, Any]) -> str:
    """Return how many units of reset there are: ``12 layers``, or ``12 sets of layers``.

    Args:
        n_units: how many.
        sets: as in `layercrit.protocol.Protocol`.
    """
    return counted(n_units, "layer") if sets == "each" else f"{counted(n_units, 'set')} of layers"


def duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
