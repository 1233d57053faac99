"""The command line as a whole: its commands, and how errors are reported."""

import sys
import traceback

import click

from layercrit.cli.demo import demo_command
from layercrit.cli.measure import layers_command, measure_command, show_command
from layercrit.cli.report import report_command
from layercrit.cli.study import study
from layercrit.cli.tables import compare_command, export_command, import_command
from layercrit.cli.train import methods_command, train_command
from layercrit.cli.zoo import zoo
from layercrit.errors import LayercritError

__all__ = ["cli", "main"]

# Everything that imports torch is imported inside the commands, so that `layercrit --help` answers at once.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="layercrit")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show the traceback of an error, for a bug report.")
def cli(show_traceback: bool) -> None:
    """Which layers of a trained vision model do its decisions depend on?

    Each layer's parameters are reset to random values while the rest stays trained, and the same images are run again:
    how far the predictions move is the layer's criticality, from 0 (auxiliary) to 1 (critical).
    """


for command in (
    measure_command,
    layers_command,
    show_command,
    demo_command,
    train_command,
    methods_command,
    study,
    compare_command,
    report_command,
    import_command,
    export_command,
    zoo,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; every error is reported in one clear message and a non-zero exit code."""
    debug = "--traceback" in sys.argv[1:]
    try:
        sys.exit(cli(standalone_mode=False))  # None, or the code that a command or an option such as --help exits with
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as `head` does
        sys.exit(141)
    except LayercritError as error:
        _complain(str(error), debug)
        sys.exit(1)
    except Exception as error:
        _complain(f"{type(error).__name__}: {error}\nThis is a bug in layercrit. Run again with "
                  "`layercrit --traceback ...` and report what it prints.", debug)  # fmt: skip
        sys.exit(70)


def _complain(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"Error: {text}", err=True)
