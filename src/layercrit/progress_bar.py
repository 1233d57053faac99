"""The progress bar of long work, on a terminal and in a notebook."""

import html
import io
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layercrit.foreign_text import visible
from layercrit.verbosity import is_quiet

_SECONDS_BETWEEN_UPDATES, _WIDTH = 0.2, 90  # of a notebook's bar; letters


class Bar:
    """The progress bar: on stderr of a terminal, or below the cell of a notebook, and nowhere else.

    It is silent unless it was asked for.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown = shown and not is_quiet()
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not (shown and console.is_terminal) or console.is_jupyter,
            transient=True,
        )
        self._task = self._progress.add_task("opening", total=None)
        self._cell = _Cell(self._progress) if shown and console.is_jupyter else None

    def __enter__(self) -> "Bar":
        try:
            self._progress.start()
        except BaseException:  # a signal, once the cursor is hidden
            self._progress.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
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
