"""The command that checks the installation and the machine."""

import json

import click

from layercrit.cli.exit_codes import ExitCode
from layercrit.cli.printing import say
from layercrit.counts import counted
from layercrit.foreign_text import visible

# Everything that imports torch is imported inside the command, so that `layercrit --help` answers at once.

__all__ = ["doctor_command"]

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}
_WIDTH = 15  # of the names


@click.command("doctor")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object for a bug report; in it, your home folder is ~ and your user name USER.",
)
@click.pass_context
def doctor_command(context: click.Context, /, as_json: bool) -> None:
    """Check this installation and this machine.

    Each line is ok, a note (layercrit works, but slower or without something) or a problem, with what to do. With a
    problem, the exit code is 1.
    """
    from layercrit.diagnosis import anonymous, diagnose

    found, topic = [], ""
    for finding in diagnose():
        found.append(finding)
        if as_json:
            continue
        if finding.topic != topic:
            topic = finding.topic
            say(topic)
        state = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
        click.echo(f"  {state} {visible(finding.name):<{_WIDTH}} {visible(finding.found)}")
        if finding.advice:
            say(f"{'':<{_WIDTH + 12}}{finding.advice}")
    counts = {state: sum(one.state == state for one in found) for state in _COLOURS}
    if as_json:
        rows = [{name: anonymous(text) for name, text in vars(one).items()} for one in found]
        click.echo(json.dumps({"counts": counts, "findings": rows}, indent=2))
    else:
        say(", ".join(f"{n} ok" if state == "ok" else counted(n, state) for state, n in counts.items()))
    context.exit(ExitCode.ERROR if counts["problem"] else ExitCode.DONE)
