"""The progress bar of long work."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """The progress bar on stderr: silent where nobody watches."""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("opening", total=None)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def decoded(self, n: int, wanted: int) -> None:
        """Show how many images are decoded."""
        self._progress.update(self._task, description="decoding", completed=n, total=wanted)

    def start(self, total: float) -> None:
        """Begin with the resets."""
        self._progress.reset(self._task, description="measuring", completed=0, total=total)

    def advance(self, amount: float) -> None:
        """Count some work as done."""
        self._progress.advance(self._task, amount)

    @property
    def done(self) -> float:
        """How much work is done."""
        return self._progress.tasks[0].completed

    @done.setter
    def done(self, amount: float) -> None:
        self._progress.update(self._task, completed=amount)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False)
