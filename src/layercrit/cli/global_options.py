"""The options that every command takes: how much is told beside results, tracebacks, and the version."""

import os

import click

from layercrit.cli.printing import say, visible_lines
from layercrit.errors import first_line
from layercrit.verbosity import logged, quiet

__all__ = ["add_global_options", "use_colours", "version_option"]

_TOLD = "layercrit.told"  # which of --quiet and --verbose was given, before the command's name or after it


def add_global_options(command: click.Command, *, hidden: bool = False) -> None:
    """Let a command take the global options, and those inside it, whose help does not repeat them."""
    command.params += [
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_quiet, hidden=hidden,
                     help="Print results, warnings about them, and errors; no progress bars and no notices."),
        click.Option(["-v", "--verbose"], count=True, expose_value=False, callback=_verbose, hidden=hidden,
                     help="Log on stderr what is being done; -vv: in detail."),
        click.Option(["--traceback"], is_flag=True, expose_value=False, hidden=hidden,
                     help="Show the traceback of an error, for a bug report."),
    ]  # fmt: skip
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        add_global_options(inner, hidden=True)


def _quiet(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        _tell(context, "--quiet")
        context.find_root().with_resource(quiet())


def _verbose(context: click.Context, parameter: click.Parameter, count: int) -> None:
    if count:
        _tell(context, "--verbose")
        context.find_root().with_resource(logged(_write, debug=count > 1))


def _write(line: str) -> None:
    click.echo(visible_lines(line), err=True)


def _tell(context: click.Context, option: str) -> None:
    if context.meta.setdefault(_TOLD, option) != option:
        raise click.UsageError("--quiet and --verbose exclude each other.", context)


def use_colours(context: click.Context) -> None:
    """Print without colours where the user has said so; click itself leaves them out where no terminal is."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        context.color = False


def _version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from importlib import metadata
    from platform import python_version

    about = [f"Python {python_version()}"]
    try:
        from layercrit.machine import find_device, name_of

        about += [f"torch {metadata.version('torch')}", f"device {name_of(find_device('auto'))}"]
    except Exception as error:  # whatever a broken installation raises
        about.append(f"torch cannot be imported: {first_line(error)}; `layercrit doctor` says more")
    say(f"layercrit {metadata.version('layercrit')} ({', '.join(about)})")
    context.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions of layercrit, Python and torch, and the device, and exit.",
)
