"""What a long measurement on the command line keeps on disk while it runs."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from layercrit.cli.printing import notice, say
from layercrit.counts import counted
from layercrit.errors import LayercritError

if TYPE_CHECKING:
    from layercrit.measurement import Measurement

__all__ = ["Saver"]

_SECONDS_BETWEEN_SAVES = 60.0


class Saver:
    """Saves finished trials to disk during a long measurement, and those before an interruption of the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unsaved: Callable[[], Measurement] | None = None
        self.last = time.monotonic()

    def keep(self, so_far: "Callable[[], Measurement]") -> None:
        """Remember the measurement so far; build and save it once a minute."""
        self.unsaved = so_far
        if time.monotonic() - self.last > _SECONDS_BETWEEN_SAVES:
            self.save(so_far(), quietly=True)

    def save(self, measurement: "Measurement", quietly: bool = False) -> None:
        """Save a measurement, if need be in another folder than the one asked for."""
        self.unsaved, self.last = None, time.monotonic()
        try:
            measurement.save(self.folder)
        except LayercritError as error:
            elsewhere = Path(tempfile.mkdtemp(prefix="layercrit-"))
            measurement.save(elsewhere)
            raise LayercritError(f"{error}\n  The measurement is saved in {elsewhere} instead.") from error
        if not quietly:
            from layercrit.measurement_files import FILES

            notice(f"Saved in {self.folder}: {', '.join(name for name in FILES if (self.folder / name).is_file())}")
            notice(f"For a page to explore: `layercrit report {self.folder}`.")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Save the trials that were finished before an interruption, if there was one."""
        if kind is not None and self.unsaved is not None:
            measurement = self.unsaved()
            trials = measurement.cells["trial"].nunique()
            self.save(measurement, quietly=True)
            say(
                f"Stopped; {counted(trials, 'finished trial')} saved in {self.folder}. Run the same command again to "
                "resume.",
                err=True,
            )
