"""Numbers with the word for what was counted, and durations: 1 layer, 3 layers, 5 min."""

__all__ = ["counted", "duration"]


def counted(n: int, one: str) -> str:
    """Return a number with the singular or the plural of a word, which takes an s: ``1 layer``, ``2,000 images``."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
