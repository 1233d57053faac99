"""How a source says that its images are changed: ``corrupt:KIND@SEVERITY:SOURCE``, ``attack:pgd(...):SOURCE``."""

import re
from pathlib import Path
from typing import Literal

__all__ = ["begins_with", "is_change_alone", "plain_source", "split_change"]

Change = Literal["corrupt", "attack"]

_HOW = {"corrupt": "[^:]*", "attack": r"[^:()]*(?:\([^()]*\))?"}  # what stands between the colons
_ANY = "|".join(f"{change}:{how}" for change, how in _HOW.items())


def begins_with(change: Change, source: str | Path) -> bool:
    """Return whether a source is written as one of changed images, rightly or not, and is no path that exists."""
    return str(source).startswith(f"{change}:") and not Path(source).exists()


def split_change(change: Change, source: str | Path) -> tuple[str, str] | None:
    """Return how the images are changed, and the source behind it; None where it is not written like this."""
    found = re.fullmatch(f"{change}:({_HOW[change]}):(.+)", str(source), re.DOTALL)
    return None if found is None else (found[1], found[2])


def plain_source(source: str) -> tuple[str, str]:
    """Return what stands before a source, ``corrupt:...:`` and ``attack:...:``, and the source without it."""
    found = re.match(f"(?:(?:{_ANY}):)*", source)
    before = "" if found is None or Path(source).exists() else found[0]
    return before, source[len(before) :]


def is_change_alone(source: str) -> bool:
    """Return whether a text is a change without the images that are changed, ``corrupt:KIND@SEVERITY``."""
    return re.fullmatch(_ANY, source) is not None and not source.endswith(":")
