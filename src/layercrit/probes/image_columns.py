"""Tables of images: the columns that hold images and labels, and the bytes of an image in a row."""

__all__ = ["IMAGE_COLUMNS", "LABEL_COLUMNS", "stored_bytes"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")


def stored_bytes(value: object) -> bytes | Exception:
    """Return the bytes of an image in a table, which may be wrapped in a struct, or replaced by a path."""
    stored = value.get("bytes") if isinstance(value, dict) else value
    return stored if isinstance(stored, bytes) else ValueError("the row holds no bytes of an image file")
