"""The files of a result about the layers of one model: tables, a record, a figure, and rows of an unfinished one."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.errors import LayercritError
from layercrit.figures.style import save_figure
from layercrit.foreign_files import read_json
from layercrit.foreign_text import encodable, write_csv
from layercrit.locks import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["KeptRows", "write_result"]


class KeptRows:
    """Rows of layers that are finished, in a file, with which an interrupted measurement goes on.

    Attributes:
        known: name of a layer -> its row.

    Args:
        path: of the file, which holds one measurement; its folder is made. None: rows are not kept.
        of: what identifies the measurement, as plain data: rows of another one are replaced.
    """

    def __init__(self, path: str | Path | None, of: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._of = json.loads(json.dumps(encodable(dict(of))))
        self.known: dict[str, dict[str, Any]] = {}
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
                kept = read_json(self._path)
                if kept["of"] == self._of:
                    self.known = {str(name): dict(row) for name, row in kept["rows"].items()}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep the row of a further layer.

        Raises:
            LayercritError: the file cannot be written.
        """
        self.known[name] = row
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps({"of": self._of, "rows": self.known}))
        except OSError as error:
            raise LayercritError(
                f"Finished layers cannot be kept in {self._path} ({error.strerror or error}). Free some space or name "
                "another folder (--out)."
            ) from error


def write_result(
    folder: str | Path,
    name: str,
    what: str,
    tables: Mapping[str, "pd.DataFrame"],
    about: Mapping[str, Any],
    plot: Callable[[], "Figure"] | None,
) -> list[Path]:
    """Write a result into a folder, which is made if need be, and return the files.

    The record is written last: where it is, all else is there, and who was interrupted before can run the same again.

    Args:
        folder: the folder.
        name: that all names of files begin with.
        what: what is written, for errors, such as ``worst case``.
        tables: how the name of a table's file goes on, such as ``.csv`` -> the table.
        about: what goes into ``NAME.json``.
        plot: returns the figure; None: there is nothing to plot.

    Raises:
        LayercritError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    record = folder / f"{name}.json"
    text = json.dumps(encodable(dict(about)), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # of a result that this one replaces
        for end, table in tables.items():
            write_csv(table, folder / f"{name}{end}")
        try:
            figures = [] if plot is None else save_figure(plot(), folder / name)
        except Exception as error:
            if not isinstance(error, OSError):  # what goes wrong with the picture must not lose the numbers
                write_whole(record, text + "\n")
            raise
        write_whole(record, text + "\n")
    except OSError as error:
        raise LayercritError(
            f"The {what} cannot be written to {folder} ({error.strerror or error}). Free some space or name another "
            "folder (--out), then save again."
        ) from error
    return [*(folder / f"{name}{end}" for end in tables), record, *figures]
