"""The callback that a run calls with each cell that it has measured."""

import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from layercrit.errors import first_line

__all__ = ["Caller", "OnCell"]

OnCell = Callable[[Mapping[str, Any]], object]
"""Takes one row of the table of cells, with ``n_done`` and ``n_planned``: cells that are done, and that there are."""


class Caller:
    """Calls a callback of the user's; what it raises is said once, as a RuntimeWarning, and ends nothing.

    Under ``python -W error`` the warning ends the run. So does an exception that is no ``Exception``, such as
    KeyboardInterrupt.
    """

    def __init__(self, on_cell: OnCell) -> None:
        self._on_cell, self._failed = on_cell, False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Call it with a row."""
        try:
            self._on_cell(row)
        except Exception as error:
            if not self._failed:
                self._failed = True
                last = traceback.extract_tb(error.__traceback__)[-1]
                warnings.warn(
                    f"on_cell raised {first_line(error)} ({last.filename}, line {last.lineno}). The run goes on and "
                    "calls it for further cells; more of its errors are not shown.",
                    RuntimeWarning,
                    stacklevel=2,
                )
