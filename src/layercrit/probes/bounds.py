"""How much memory images may take: told from what a file says of itself, before anything is unpacked."""

from layercrit.errors import ProbeError
from layercrit.machine import available_memory

__all__ = ["DEFLATED", "LARGEST_IMAGE", "LARGEST_TEXT", "check_room", "check_unpacking"]

LARGEST_IMAGE = 2**30  # bytes of one image, as a file and decoded; Pillow's own limit of pixels is below it
LARGEST_TEXT = 2**24  # bytes of one label or of what describes one image
_SHARE = 0.75  # of the memory available; the rest is for the measurement
DEFLATED = 1032  # bytes that one byte of deflate, in zip and gzip, can stand for


def check_room(n_bytes: int, what: str, instead: str) -> None:
    """Check that there is enough memory for ``n_bytes``.

    Raises:
        ProbeError: there is not; the text says what ``what`` takes, what there is, and what to do ``instead``.
    """
    available = available_memory()
    if available is not None and n_bytes > _SHARE * available:
        raise ProbeError(
            f"{what} would take {n_bytes / 2**30:.3g} GiB of memory, more than {_SHARE:.0%} of the "
            f"{available / 2**30:.3g} GiB available. {instead}"
        )


def check_unpacking(n_bytes: int, packed: int, most: int = DEFLATED) -> None:
    """Check that ``packed`` bytes, each standing for ``most`` at most, can contain ``n_bytes``.

    Raises:
        ValueError: they cannot.
    """
    if n_bytes > most * packed:
        raise ValueError(f"{packed:,} packed bytes cannot contain the {n_bytes:,} that are promised")
