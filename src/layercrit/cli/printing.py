"""How tables and numbers are printed on a terminal."""

from collections.abc import Iterable
from typing import Any

import click

__all__ = ["duration", "number", "percent", "plain", "print_table", "print_warnings"]


def duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def number(value: float) -> str:
    """Return a number as tables show it; a dash for NaN."""
    return "-" if value != value else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as a percentage; a dash where it is not known."""
    return "-" if value is None or value != value else f"{100 * value:.1f}%"


def plain(text: str) -> Any:
    """Return text that rich shows as it is: names may contain what rich would read as markup."""
    from rich.text import Text

    return Text(text)


def print_warnings(warnings: Iterable[str], err: bool = False) -> None:
    """Print what puts the numbers below it in doubt."""
    for text in warnings:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {text}.\n", err=err)


def print_table(table: Any) -> None:
    """Print a rich table on stdout; nothing is cut off in a file or a pipe."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
