"""The progress of long work: a bar on a terminal and in a notebook, now and then a line in a log."""

import html
import io
import random
import time
from typing import Any

from layercrit.counts import duration
from layercrit.foreign_text import visible
from layercrit.verbosity import is_quiet

_before = random.getstate()  # importing rich draws from Python's generator, whose numbers are the caller's
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: E402

random.setstate(_before)

_SECONDS_BETWEEN_UPDATES, _WIDTH = 0.2, 90  # of a notebook's bar; letters
_SOONEST, _LATEST = 30.0, 600.0  # seconds between two lines in a log, which come ever more rarely


class Bar:
    """The progress bar: on stderr of a terminal, or below the cell of a notebook; elsewhere, lines on stderr.

    A line says how far the work is after half a minute, then after as long again, and at last every ten minutes. It is
    silent unless it was asked for.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown = shown and not is_quiet()
        console = Console(stderr=True)
        self._on_terminal = shown and console.is_terminal and not console.is_jupyter
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not self._on_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("opening", total=None)
        self._cell = _Cell(self._progress) if shown and console.is_jupyter else None
        self._log = _Log(self) if shown and not self._on_terminal and self._cell is None else None

    def __enter__(self) -> "Bar":
        if not self._on_terminal:  # of which some releases of rich write an empty line at the end
            return self
        try:
            self._progress.start()
        except BaseException:  # a signal, once the cursor is hidden
            self._progress.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_terminal:
            self._progress.stop()
        if self._cell is not None:
            self._cell.clear()

    def decoded(self, n: int, wanted: int) -> None:
        """Show how many images are decoded."""
        self._update(description="decoding", completed=n, total=wanted)

    def attacked(self, n: int, n_images: int) -> None:
        """Show how many images are made adversarial."""
        self._show("attacking", n, n_images)

    def predicted(self, n: int, n_images: int) -> None:
        """Show how many images the trained network has classified."""
        self._show("predicting", n, n_images)

    def measured(self, done: float, total: float) -> None:
        """Show what share of the resets is done."""
        self._show("measuring", done, total)

    def fetched(self, name: str, done: int, total: int | None) -> None:
        """Show how many bytes of a file have arrived, in a bar without length if its size is unknown."""
        amount = f"{done / 1e6:.0f}" if total is None else f"{done / 1e6:.0f} of {total / 1e6:.0f}"
        self._update(description=f"{visible(name)} {amount} MB", completed=done, total=total)

    def drawn(self, name: str, done: int, wanted: int) -> None:
        """Show which figure is being plotted."""
        self._update(description=f"plotting {visible(name)}", completed=done, total=wanted)

    def trained(
        self, name: str, *, phase: str, epoch: int, epochs: int, step: int, steps: int, loss: float,
        accuracy: float | None,
    ) -> None:  # fmt: skip
        """Show how many steps of a training run are done, with the loss and the latest accuracy."""
        right = "" if accuracy is None else f" accuracy {accuracy:.1%}"
        text = f"{visible(name)} {phase} epoch {epoch}/{epochs} loss {loss:.3f}{right}".lstrip()
        self._update(description=text, completed=step, total=steps)

    def say(self, line: str) -> None:
        """Print a line above the bar; without a terminal, on stderr as it is."""
        if self._shown:
            self._progress.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)

    def _show(self, description: str, done: float, total: float) -> None:
        if self._progress.tasks[0].description != description:
            self._progress.reset(self._task, description=description)
        self._update(completed=done, total=total)

    def _update(self, **state: Any) -> None:
        self._progress.update(self._task, **state)
        if self._cell is not None:
            self._cell.show()
        if self._log is not None:
            task = self._progress.tasks[0]
            self._log.show(task.description, task.percentage if task.total else None)


class _Log:
    """Lines that say how far the work is, where nothing can be drawn."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._begun = self._said = time.monotonic()
        self._reached, self._since = 0.0, self._begun  # percent of the present work, and since when it goes on

    def show(self, doing: str, percentage: float | None) -> None:
        """Say what is being done and how far it is, if the last line is old enough."""
        now = time.monotonic()
        if percentage is None or percentage < self._reached:  # other work begins
            self._since = now
        self._reached = percentage or 0.0
        if now - self._said < min(_LATEST, max(_SOONEST, self._said - self._begun)):
            return
        self._said = now
        how_far = "" if percentage is None else f" {percentage:.0f}%"
        left = ""
        if percentage and percentage < 100:
            left = f", about {duration((now - self._since) * (100 / percentage - 1))} left"
        self._bar.say(f"{doing}{how_far} after {duration(now - self._begun)}{left}")


class _Cell:
    """The bar below a notebook's cell: one output, which is replaced and at the end emptied.

    It needs no widgets, as rich's own does, and so is shown wherever notebooks run.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._output: Any = None
        self._shown = float("-inf")  # when

    def show(self) -> None:
        """Show the state of the bar, a few times a second at most."""
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_UPDATES:
            return
        self._shown = now
        drawn = io.StringIO()
        Console(file=drawn, width=_WIDTH, color_system=None, force_jupyter=False).print(self._progress.get_renderable())
        self._replace(drawn.getvalue().rstrip())

    def clear(self) -> None:
        """Leave nothing of the bar."""
        if self._output is not None:
            self._replace("")

    def _replace(self, text: str) -> None:
        from IPython import display

        shown = {"text/plain": text, "text/html": text and f'<pre style="margin: 0">{html.escape(text)}</pre>'}
        if self._output is None:
            untyped: Any = display
            self._output = untyped.display(shown, raw=True, display_id=True)
        else:
            self._output.update(shown, raw=True)
