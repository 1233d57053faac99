"""The command that explains how not to read the numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from layercrit.cli.printing import say
from layercrit.cli.registered import complete_pitfalls

# Everything that imports torch or pandas is imported inside the commands, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.pitfalls import Pitfall

__all__ = ["pitfalls_command", "say_pitfalls"]


@click.command("pitfalls", short_help="Explain what to bear in mind before quoting a number.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_pitfalls)
def pitfalls_command(names: tuple[str, ...]) -> None:
    """Explain what to bear in mind before a number is quoted: all pitfalls, or those named.

    The tables of other commands name those that apply to them.
    """
    import textwrap

    from layercrit.pitfalls import PITFALLS, pitfall

    for one in [pitfall(name) for name in names] or PITFALLS.values():
        say(f"{one.name}: {one.title}")
        for line in textwrap.wrap(one.text, 96, initial_indent="  ", subsequent_indent="  "):
            say(line)
        say()


def say_pitfalls(applying: Sequence["Pitfall"]) -> None:
    """Name the pitfalls that apply to the table above, and where to read about them."""
    if applying:
        names = " ".join(one.name for one in applying)
        say(f"before you quote a number: `layercrit pitfalls {names}`")
