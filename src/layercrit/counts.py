"""Numbers with the word for what was counted: 1 layer, 3 layers."""

__all__ = ["counted"]


def counted(n: int, one: str) -> str:
    """Return a number with the singular or the plural of a word, which takes an s: ``1 layer``, ``2,000 images``."""
    return f"{n:,} {one}{'s' * (n != 1)}"
