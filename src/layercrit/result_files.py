"""The files of a result about the layers of one model: tables, a record, and a figure."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.errors import LayercritError
from layercrit.figures.style import save_figure
from layercrit.foreign_text import encodable, write_csv
from layercrit.locks import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["write_result"]


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
