"""The errors a user can meet: one base class, and messages that say what was wrong, what was given and what to do."""

import difflib
import errno
from collections.abc import Iterable

__all__ = [
    "DISK_FULL",
    "TRY_AGAIN",
    "AdviceError",
    "CheckpointError",
    "LayerError",
    "LayercritError",
    "ModelError",
    "ProbeError",
    "ProtocolError",
    "StudyError",
    "TrackingError",
    "TrainingError",
    "UnfinishedPilotError",
    "ZooError",
    "near",
]

DISK_FULL = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)]
"""Numbers of an `OSError` that say that a disk or a user's share of it is full; not every system has all of them."""

TRY_AGAIN = 75
"""Exit code of a command that can do its work later, and not yet: EX_TEMPFAIL of sysexits.h."""

_COMPARED = 5_000  # names that a wrong one is compared with, which takes a second
_ALIKE, _SURELY_ALIKE = 0.5, 0.65  # by `difflib`; between them, only names that begin alike make sense
_LISTED = 10  # names that are listed where none is near


class LayercritError(Exception):
    """Base class of every error that layercrit raises on purpose.

    Examples:
        >>> import layercrit
        >>> try:
        ...     layercrit.measure("tim:resnet50", "photos/")
        ... except layercrit.LayercritError as error:
        ...     print(type(error).__name__)
        ModelError
    """


class ModelError(LayercritError, ValueError):
    """A model cannot be opened, run or rebuilt."""


class CheckpointError(LayercritError, ValueError):
    """A weight file is unreadable, unsafe, or does not fit the architecture."""


class LayerError(LayercritError, ValueError):
    """A layer is unknown, or none is selected."""


class AdviceError(LayercritError, ValueError):
    """There is no advice of this kind, its budget cannot be met, or it cannot be written in a format."""


class ProbeError(LayercritError, ValueError):
    """Images or labels cannot be used as a probe set."""


class ProtocolError(LayercritError, ValueError):
    """The settings of a measurement make no sense."""


class StudyError(LayercritError, ValueError):
    """A study cannot be read, planned or run."""


class UnfinishedPilotError(StudyError):
    """A shard has nothing to do before others have run their share of the pilot, and none of these is being run."""


class TrackingError(LayercritError, ValueError):
    """An experiment tracker is unknown, or its library is missing."""


class TrainingError(LayercritError, ValueError):
    """A model cannot be trained as asked."""


class ZooError(LayercritError, ValueError):
    """A published checkpoint is unknown, or its file cannot be downloaded."""


def near(name: str, known: Iterable[str], limit: int = 5) -> str:
    """Return a sentence that suggests the names nearest to ``name``, or of which one begins the other; else lists some.

    Args:
        name: what was given.
        known: the names there are.
        limit: how many are suggested, and listed, though at least ten of these.
    """
    names = list(dict.fromkeys(known))
    alike = sorted(names, key=lambda other: abs(len(other) - len(name)))[:_COMPARED]
    spelt = {other.casefold(): other for other in reversed(alike)}
    given, whole = name.casefold(), [other.casefold() for other in names]
    sure = difflib.get_close_matches(given, spelt, n=limit, cutoff=_SURELY_ALIKE)
    close = difflib.get_close_matches(given, spelt, n=limit, cutoff=_ALIKE)
    matches = [spelt[one] for one in close if one in sure or one[:1] == given[:1]]
    if not matches and len(name) > 1:
        begun = [other.startswith(given) or (len(other) > 2 and given.startswith(other)) for other in whole]
        matches = [other for other, is_begun in zip(names, begun, strict=True) if is_begun][:limit]
    if matches:
        return "Did you mean " + " or ".join(repr(match) for match in matches) + "?"
    n_listed = max(limit, _LISTED)
    shown = ", ".join(repr(known_name) for known_name in names[:n_listed])
    more = f" and {len(names) - n_listed} more" if len(names) > n_listed else ""
    return f"Known: {shown}{more}." if names else "None is known."


def shown(value: object) -> str:
    """Return how Python writes a value, short enough to quote."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, short enough to quote."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
