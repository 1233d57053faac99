"""Pass what a run finds to its trackers.

A tracker is an extra: what it raises is said once and changes no result, and it works in a thread of its own, so that a
server that does not answer delays nothing.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.errors import first_line
from layercrit.trackers.tracker import TRACKERS, Tracker

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Tracking"]

_SECONDS_BEGINNING = 10.0  # that a run waits for its trackers to begin; MLflow makes a database in 7
_SECONDS_ENDING = 60.0  # that a run waits at its end for what is still to be sent


class Tracking:
    """Passes what a run finds to its trackers; a context manager that ends them.

    Args:
        names: of the trackers.
        folder: where their files go; made where it is missing.
        name: of the study or the model.
        config: what is known before the run, as plain data.
        say: prints one line for the user; may be called by other threads.

    Raises:
        TrackingError: a name is unknown, or a library is missing; no tracker was begun then.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], object],
    ) -> None:
        made = {one: TRACKERS.find(one)() for one in dict.fromkeys(names)}
        self._feeds = [_Feed(one, made[one], say) for one in made]
        self._put("begin", name, config, Path(folder).expanduser().resolve())
        _wait([feed.has_begun for feed in self._feeds], _SECONDS_BEGINNING)

    def config(self, values: Mapping[str, Any]) -> None:
        """Pass on what became known of the run; see `Tracker.config`."""
        self._put("config", values)

    def cell(self, row: Mapping[str, Any]) -> None:
        """Pass on a cell; to be given as ``on_cell``."""
        self._put("cell", row)

    def progress(self, n_done: int, n_planned: int) -> None:
        """Pass on how many cells are done, of how many; that of each cell is passed on with it."""
        self._put("progress", n_done, n_planned)

    def result(self, summary: Mapping[str, float], layers: "pd.DataFrame", figures: Mapping[str, Path]) -> None:
        """Pass on what a finished run found; see `Tracker.result`."""
        self._put("result", summary, layers, figures)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._put("end", kind is None)
        _wait([feed.has_ended for feed in self._feeds], _SECONDS_ENDING)
        for feed in self._feeds:
            feed.leave()

    def _put(self, method: str, *given: Any) -> None:
        for feed in self._feeds:
            feed.calls.put((method, given))


class _Feed:
    """Calls the methods of one tracker, in a thread of its own."""

    def __init__(self, name: str, made: Tracker, say: Callable[[str], object]) -> None:
        self.name, self.tracker, self.say = name, made, say
        self.calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self.has_begun, self.has_ended = threading.Event(), threading.Event()
        self._unsaid: Mapping[str, Any] | None = None  # the last cell, while its progress is not logged
        self._has_warned = self._is_left = False
        threading.Thread(target=self._work, name=f"layercrit-{name}", daemon=True).start()

    def _work(self) -> None:
        try:
            self._work_until_end()
        finally:
            self.has_begun.set()
            self.has_ended.set()

    def _work_until_end(self) -> None:
        method, given = self.calls.get()
        works = self._try(self._begin, *given)  # else there is nothing to log to
        self.has_begun.set()
        while method != "end":
            method, given = self.calls.get()
            if not works:
                continue
            if method == "cell":
                (self._unsaid,) = given
            else:
                self._log_progress()
            self._try(getattr(self.tracker, method), *given)
            if self.calls.empty():
                self._log_progress()

    def _begin(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if where := self.tracker.begin(name, config, folder):
            self.say(f"{self.name}: {where}")

    def _log_progress(self) -> None:
        row, self._unsaid = self._unsaid, None
        if row is not None:
            self._try(self.tracker.progress, row["n_done"], row["n_planned"])

    def _try(self, call: Callable[..., object], *given: Any) -> bool:
        """Call something of the tracker's, and return whether it went well."""
        try:
            call(*given)
        except BaseException as error:  # SystemExit, too, would end the thread alone
            if not (self._has_warned or self._is_left):
                self._has_warned = True
                what = first_line(error) if isinstance(error, Exception) else type(error).__name__
                self.say(
                    f"warning: the tracker {self.name} failed ({what}). The run goes on; what {self.name} shows is "
                    "incomplete, and its further errors are not shown."
                )
            return False
        return True

    def leave(self) -> None:
        """Say so if the tracker is still at work."""
        if not self.has_ended.is_set():
            self._is_left = True
            self.say(
                f"warning: the tracker {self.name} is still at work {_SECONDS_ENDING:.0f} s after the run, so it is "
                "left incomplete; the results themselves are saved."
            )


def _wait(events: Sequence[threading.Event], seconds: float) -> None:
    """Wait until all events have happened, at most so long."""
    until = time.monotonic() + seconds
    for event in events:
        event.wait(max(0.0, until - time.monotonic()))
