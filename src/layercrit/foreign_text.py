"""Text from outside, such as names, labels and errors of others: what it must not do to a terminal or a spreadsheet."""

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["encodable", "guarded", "unguarded", "visible", "without_folders", "write_csv"]

# Spreadsheets take a cell that begins so for a formula. The apostrophe that guards it is itself guarded where it stands
# before such a cell, so that reading what was written gives the text back.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")

_FOLDERS = re.compile(r"""(?<![\w/.])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'"<>|:;,()]+[\\/])+(?=[^\\/\s])""")


def visible(text: object) -> str:
    r"""Return text on one line that does nothing to a terminal.

    Control characters, line breaks, marks that turn the direction of writing, and whatever else has no sign of its own
    are written as in Python, such as ``\x1b`` and ``\u202e``.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def encodable(data: Any) -> Any:
    r"""Return plain data whose texts can be written as UTF-8: what is none in file names becomes such as ``\udcff``."""
    if isinstance(data, str):
        return data.encode(errors="backslashreplace").decode()
    if isinstance(data, dict):
        return {encodable(key): encodable(value) for key, value in data.items()}
    return [encodable(value) for value in data] if isinstance(data, list | tuple) else data


def without_folders(text: object) -> str:
    """Return text with only the names of absolute paths, for what is passed on: where files are here is private."""
    return _FOLDERS.sub("", str(text))


def guarded(text: str) -> str:
    """Return a CSV cell that no spreadsheet takes for a formula: the text, if need be with an apostrophe before it."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(cell: str) -> str:
    """Return the text of which `guarded` made a cell; other cells are returned as they are."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_csv(table: "pd.DataFrame", path: Path) -> None:
    """Write a table as CSV: texts guarded and in quotes, so that a name such as ``0.10`` is told from a number."""
    texts = table.select_dtypes(include=["object", "string", "category"])
    safe = texts.map(lambda cell: guarded(cell) if isinstance(cell, str) else cell)
    table.assign(**{str(name): safe[name] for name in safe}).to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)
