"""Tables of images: the columns that hold images and labels, and the bytes of an image in a row."""

from collections.abc import Iterable

from layercrit.probes.parts import words_of

__all__ = ["IMAGE_COLUMNS", "LABEL_COLUMNS", "like_labels", "stored_bytes", "unused_columns"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
_WORDS = ("y", "cls", "gt", "truth")
_BEGINNINGS = ("label", "class", "target", "categor")


def like_labels(name: str) -> bool:
    """Return whether a name, such as ``fine_label``, ``class_id`` or ``targets``, sounds like labels."""
    return any(word in _WORDS or word.startswith(_BEGINNINGS) for word in words_of(name))


def unused_columns(names: Iterable[str], what: str) -> list[str]:
    """Return a note on the columns (or ``what`` else they are) that sound like labels; none without any."""
    found = [name for name in names if like_labels(name)]
    if not found:
        return []
    listed = ", ".join(map(repr, found))
    return [f"{what} {listed}: looks like labels and is not used; to use it, give --labels {found[0]}"]


def stored_bytes(value: object) -> bytes | Exception:
    """Return the bytes of an image in a table, which may be wrapped in a struct, or replaced by a path."""
    stored = value.get("bytes") if isinstance(value, dict) else value
    return stored if isinstance(stored, bytes) else ValueError("the row holds no bytes of an image file")
