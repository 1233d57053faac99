"""The command line as a whole: its commands, and how errors are reported."""

import contextlib
import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import click

from layercrit.cli.advise import advise_command
from layercrit.cli.demo import demo_command
from layercrit.cli.doctor import doctor_command
from layercrit.cli.exit_codes import ExitCode
from layercrit.cli.feature_criticality import feature_criticality_command
from layercrit.cli.global_options import add_global_options, use_colours, version_option
from layercrit.cli.interruption import Interruption
from layercrit.cli.measure import layers_command, measure_command, show_command
from layercrit.cli.module_criticality import module_criticality_command
from layercrit.cli.pitfalls import pitfalls_command
from layercrit.cli.printing import visible_lines
from layercrit.cli.proxies import proxies_command
from layercrit.cli.report import report_command
from layercrit.cli.study import study
from layercrit.cli.submit import submit_command
from layercrit.cli.tables import compare_command, export_command, import_command
from layercrit.cli.train import methods_command, train_command
from layercrit.cli.worst_case import worst_case_command
from layercrit.cli.zoo import zoo
from layercrit.errors import DISK_FULL, LayercritError, UnfinishedPilotError
from layercrit.registry import PlugInWarning, plug_in_that_raised

__all__ = ["cli", "main"]

# Everything that imports torch is imported inside the commands, so that `layercrit --help` answers at once.


_FULL = (*DISK_FULL, errno.EIO)


class _ReaderGoneError(Exception):
    """Nobody reads what is printed any more, as behind ``| head``; click would end with another exit code."""


class _Commands(click.Group):
    def make_context(self, *given: Any, **options: Any) -> click.Context:
        with _reader_watched():
            return super().make_context(*given, **options)

    def invoke(self, context: click.Context) -> Any:
        with _reader_watched():
            return super().invoke(context)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands under headings, in the order in which one meets them."""
        width = max(map(len, self.commands))
        for heading, commands in _SECTIONS.items():
            with formatter.section(heading):
                rows = [(f"{one.name:<{width}}", one.get_short_help_str(formatter.width)) for one in commands]
                formatter.write_dl(rows)


@contextlib.contextmanager
def _reader_watched() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGoneError from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@version_option
@click.pass_context
def cli(context: click.Context, /) -> None:
    """Which layers of a trained vision model do its decisions depend on?

    Each layer's parameters are reset to random values while the rest stays trained, and the same images are run again:
    how far the predictions move is the layer's criticality, from 0 (auxiliary) to 1 (critical).
    """
    use_colours(context)


_SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Begin": (demo_command, doctor_command),
    "One model": (measure_command, layers_command, show_command, advise_command),
    "Other questions about its layers": (
        proxies_command,
        module_criticality_command,
        worst_case_command,
        feature_criticality_command,
    ),
    "Many models": (study, compare_command, report_command, pitfalls_command, export_command, import_command),
    "Get models": (train_command, methods_command, zoo),
}
study.add_command(submit_command)
for _commands in _SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)
add_global_options(cli)


def main() -> None:
    """Run the command line; every error is reported in one clear message and a non-zero exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no error
    interruption = Interruption()
    try:
        with interruption.possible(), _plain_warnings():
            code = _run("--traceback" in sys.argv[1:])
    except KeyboardInterrupt:  # while an error was reported
        code = ExitCode.INTERRUPTED
    while True:
        try:
            interruption.rule_out()
            break
        except KeyboardInterrupt:  # raised again although the command has ended: it is too late
            continue
    if code and interruption.cause:  # whatever was made of the exception on its way: C code has its own
        code = 128 + interruption.cause
    if code == ExitCode.INTERRUPTED:
        _print("Interrupted.")
    elif code and interruption.cause:
        _print(f"Ended by {interruption.cause.name}.")
    _flush()
    sys.exit(code)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, warnings of plug-ins are printed without the place in the code, which means nothing to who types."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, PlugInWarning):
                _print(f"Warning: {message}")
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _run(debug: bool) -> int:
    """Run the command, and return the exit code."""
    try:
        return cli(standalone_mode=False) or 0  # None, or the code that a command or an option such as --help ends with
    except click.ClickException as error:
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            error.show()
        for line in shown.getvalue().splitlines():
            _print(line.expandtabs(4))  # of click's lists
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return ExitCode.INTERRUPTED
    except _ReaderGoneError:
        return ExitCode.READER_GONE
    except UnfinishedPilotError as error:
        return _complain(str(error), debug, ExitCode.TRY_AGAIN)
    except LayercritError as error:
        return _complain(str(error), debug, ExitCode.ERROR)
    except Exception as error:
        if (text := _of_surroundings(error)) is not None:
            return _complain(text, debug, ExitCode.ERROR)
        if (plug_in := plug_in_that_raised(error)) is not None:
            return _complain(f"{type(error).__name__}: {error}\n  This is an error of the plug-in {plug_in}. Report it "
                             "there, with what `layercrit --traceback ...` prints.", debug, ExitCode.BUG)  # fmt: skip
        return _complain(f"{type(error).__name__}: {error}\n  This is a bug in layercrit. Run again with "
                         "`layercrit --traceback ...` and report what it prints.", debug, ExitCode.BUG)  # fmt: skip


def _of_surroundings(error: Exception) -> str | None:
    """Return what is wrong with the disk or the current folder, where that is what an error is about."""
    if isinstance(error, FileNotFoundError) and not _here():
        return "The current folder does not exist any more. Change to another one, such as `cd ~`, and run again."
    if isinstance(error, OSError) and error.errno in _FULL:
        what = "What the command prints" if error.filename is None else error.filename
        return (
            f"{what} cannot be written ({error.strerror}). Free some space, or let it go elsewhere. What was saved "
            "before is kept."
        )
    return None


def _here() -> bool:
    try:
        return os.path.isdir(os.getcwd())  # noqa: PTH109, PTH112
    except OSError:
        return False


def _complain(text: str, debug: bool, code: int) -> int:
    """Print an error, and return the exit code."""
    if debug:
        _print(traceback.format_exc().replace("\n", "\n  "))
    _print(f"Error: {text}")
    return code


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be full or closed as well
        click.echo(visible_lines(text), err=True)


def _flush() -> None:
    """Write what is left of the output; what cannot be written is dropped, else Python would fail at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), stream.fileno())
