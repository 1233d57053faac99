"""How texts, tables and numbers are printed on a terminal."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from layercrit.foreign_text import visible
from layercrit.verbosity import is_quiet

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "bar",
    "json_rows",
    "notice",
    "number",
    "percent",
    "plain",
    "print_table",
    "print_warnings",
    "say",
    "say_damaged",
    "visible_lines",
]

_LISTED = 10  # damaged rows that are named


def say(line: object = "", *, err: bool = False) -> None:
    """Print one line, on stderr if asked: what names in it would do to the terminal is shown instead."""
    click.echo(visible(line), err=err)


def notice(line: object) -> None:
    """Print one line on stderr that is neither a result nor about something that went wrong; not with ``--quiet``."""
    if not is_quiet():
        say(line, err=True)


def visible_lines(text: str) -> str:
    """Return the text of an error for a terminal.

    Only those of its line breaks stay that an indent follows, as in our own lists, so that no name in it can pass for a
    line of its own.
    """
    return "\n  ".join(map(visible, text.split("\n  ")))


def number(value: float) -> str:
    """Return a number as tables show it; a dash for NaN."""
    return "-" if value != value else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as a percentage; a dash where it is not known."""
    return "-" if value is None or value != value else f"{100 * value:.1f}%"


def bar(value: float, width: int = 20) -> str:
    """Return a share in [0, 1] as a bar of at most ``width`` characters that stdout can write; nothing for NaN."""
    if value != value:
        return ""
    share = min(1.0, max(0.0, value))
    try:
        "█▏▎▍▌▋▊▉".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "#" * round(width * share)
    eighths = round(8 * width * share)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def plain(text: object) -> Any:
    """Return text that rich shows as it is: names may contain what rich or the terminal would act upon."""
    from rich.text import Text

    return Text(visible(text))


def say_damaged(rows: Sequence[str]) -> None:
    """Say on stderr which rows of a study's file are damaged."""
    for row in rows[:_LISTED]:
        say(f"damaged and left out: {row}", err=True)
    if more := rows[_LISTED:]:
        say(f"damaged and left out: {len(more)} more rows", err=True)
    if rows:
        say(
            "`layercrit study run` measures what is damaged anew; a study that was imported or merged is to be made "
            "again.",
            err=True,
        )


def print_warnings(warnings: Iterable[str], err: bool = False) -> None:
    """Print what puts the numbers below it in doubt."""
    for text in warnings:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {visible(text)}.\n", err=err)


def print_table(table: Any) -> None:
    """Print a rich table on stdout; nothing is cut off in a file or a pipe."""
    from rich.console import Console

    class OnStdout(Console):
        def on_broken_pipe(self) -> None:
            raise  # the error that rich handles, which the command line reports itself

    console = OnStdout()
    if not console.is_terminal:
        console = OnStdout(width=200)
    console.print(table)


def json_rows(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return the rows of a table as plain data for JSON: what is not finite is None."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return rows
