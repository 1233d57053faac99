"""Tables for a terminal: where it is narrow, what matters least is left out, and numbers and names stay whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

__all__ = ["FittedTable"]

_GAP = 2  # characters between columns
_TEXT = 20  # characters to a line from which a text can be read
_FOLDED = 8  # characters to a line below which no name is folded


@dataclass(eq=False)
class _Column:
    header: str
    justify: Literal["left", "right"]
    wraps: bool
    leaves: int | None
    cells: "list[RenderableType]" = field(default_factory=list)

    def widths(self, console: "Console") -> tuple[int, int]:
        """Return the least width at which all is whole, and the width at which nothing is wrapped."""
        from rich.measure import Measurement

        unlimited = console.options.update(max_width=10_000)
        header = Measurement.get(console, unlimited, self.header)
        cells = [Measurement.get(console, unlimited, cell) for cell in self.cells]
        widest = max((cell.maximum for cell in cells), default=0)
        words = max((cell.minimum for cell in cells), default=0)
        least = max(words, min(widest, _TEXT)) if self.wraps else widest
        return max(header.minimum, least), max(header.maximum, widest)


class FittedTable:
    """A table that rich prints no wider than a terminal, without cutting numbers or names.

    Headers and texts are wrapped first; then columns are left out in the order that `add_column` gives, and a line
    below the table names them; last of all, names are folded. In a file or a pipe no column is left out.

    Args:
        title: stands above the table.
        otherwise: the option, or another command, that gives all columns anywhere.
    """

    def __init__(self, title: "str | Text | None" = None, *, otherwise: str = "--json") -> None:
        self.title, self.otherwise = title, otherwise
        self.columns: list[_Column] = []
        self.styles: list[str] = []

    def add_column(
        self, header: str, justify: Literal["left", "right"] = "left", *, wraps: bool = False, leaves: int | None = None
    ) -> None:
        """Add a column.

        Args:
            header: its name. A blank one is not named when it is left out: bars say again what a number says.
            justify: names and texts are on the left.
            wraps: whether it has texts, which can be read on several lines.
            leaves: place in the order in which columns are left out, those of one place together; None: it stays.
        """
        self.columns.append(_Column(header, justify, wraps, leaves))

    def add_row(self, *cells: "RenderableType", style: str = "") -> None:
        """Add a row, with a cell for each column."""
        for column, cell in zip(self.columns, cells, strict=True):
            column.cells.append(cell)
        self.styles.append(style)

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return len(self.styles)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[RenderableType]":
        """Yield the table as wide as there is room, and what was left out."""
        from rich.table import Table
        from rich.text import Text

        measured = {column: column.widths(console) for column in self.columns}
        least, natural = ({column: both[i] for column, both in measured.items()} for i in (0, 1))
        room = options.max_width
        kept = _kept(least, room) if console.is_terminal else self.columns
        widths = _widths({column: least[column] for column in kept}, natural, room)
        table = Table(title=self.title, title_justify="left", box=None, padding=0)
        for place, column in enumerate(kept):
            if place:  # a column that is the gap: versions of rich differ in how padding counts
                table.add_column(width=_GAP)
            table.add_column(column.header, justify=column.justify, width=widths[column], overflow="fold")
        for i, style in enumerate(self.styles):
            cells = [cell for column in kept for cell in ("", column.cells[i])]
            table.add_row(*cells[1:], style=style)
        yield table
        if names := list(dict.fromkeys(one.header for one in self.columns if one not in kept and one.header)):
            there = f"{self.otherwise} or {_total(least)} columns show them"
            yield Text(f"left out to fit: {', '.join(names)}; {there}", style="dim")


def _total(widths: "dict[_Column, int]") -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def _kept(least: "dict[_Column, int]", room: int) -> "Sequence[_Column]":
    """Return the columns that fit: those that leave first are left out until all do, and no more than it takes."""
    order = sorted({column.leaves for column in least if column.leaves is not None})
    gone: set[Any] = set()

    def fits(without: set[Any]) -> bool:
        return _total({column: width for column, width in least.items() if column.leaves not in without}) <= room

    for place in order:
        if fits(gone):
            break
        gone.add(place)
    for place in reversed(order):  # what left before a wide column may have room now
        if place in gone and fits(gone - {place}):
            gone.remove(place)
    return [column for column in least if column.leaves not in gone]


def _widths(least: "dict[_Column, int]", natural: "dict[_Column, int]", room: int) -> "dict[_Column, int]":
    """Return the widths of columns: room that is left goes to texts before headers; if there is none, names fold."""
    widths = dict(least)
    for column in sorted(widths, key=lambda one: not one.wraps):
        wanted, spare = natural[column] - widths[column], room - _total(widths)
        if wanted <= spare or (column.wraps and spare > 0):  # part of what a header lacks would only be blank
            widths[column] += min(wanted, spare)
    names = [column for column in widths if column.justify == "left" and widths[column] > _FOLDED]
    while _total(widths) > room and any(widths[column] > _FOLDED for column in names):
        widths[max(names, key=lambda one: widths[one])] -= 1
    return widths
