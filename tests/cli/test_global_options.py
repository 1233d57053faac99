"""The options of every command, colours, and the help that lists the commands."""

import io
import logging
import os
import re
import sys

import click
import pytest

import layercrit
from layercrit.cli.printing import notice, print_table, print_warnings
from layercrit.cli.root import cli, main
from layercrit.progress_bar import Bar
from layercrit.verbosity import is_quiet, quiet

UNTRAINED = "timm:test_resnet?pretrained=false&num_classes=7"
NOTICE = "Settings and paper of a method"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["layercrit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def commands_in(group, name="layercrit"):
    yield name, group
    for command in group.commands.values() if isinstance(group, click.Group) else ():
        yield from commands_in(command, f"{name} {command.name}")


COMMANDS = dict(commands_in(cli))


# --- how much is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-q", "methods"], ["methods", "--quiet"]])
def test_quiet__results_only(arguments, monkeypatch, capsys):
    assert call(monkeypatch, "methods") == 0
    loud = capsys.readouterr()
    assert NOTICE in loud.err
    assert call(monkeypatch, *arguments) == 0
    assert capsys.readouterr() == (loud.out, "")
    assert not is_quiet(), "it ends with the command"


def test_quiet__errors_are_printed(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "-q", "show", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("Error: There is no measurement in")


def test_quiet__bars_and_notices(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with quiet():
        assert (os.environ["HF_HUB_DISABLE_PROGRESS_BARS"], os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"]) == (
            "1",
            "0",
        )
        with Bar(shown=True) as bar:
            bar.measured(1, 2)
            bar.say("a line")
        notice("another")
    assert capsys.readouterr() == ("", "")
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    with Bar(shown=True) as bar:
        bar.say("a line")
    notice("another")
    printed = capsys.readouterr().err
    assert "a line" in printed
    assert "another" in printed


def test_verbose__logs_to_stderr(monkeypatch, capsys):
    logger = logging.getLogger("layercrit")
    before = logger.level, logger.handlers, logger.propagate
    assert call(monkeypatch, "layers", UNTRAINED) == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    assert call(monkeypatch, "layers", UNTRAINED, "-v") == 0
    told = capsys.readouterr()
    assert told.out == plain.out
    (line,) = told.err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO layercrit\.models\.references: opened timm:test_resnet.*: ResNet with "
                        r"\d+ parameters", line)  # fmt: skip
    assert (logger.level, logger.handlers, logger.propagate) == before


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [(["methods"], []), (["-v", "methods"], ["INFO"]), (["methods", "-vv"], ["DEBUG", "INFO"]),
     (["-v", "methods", "-vv"], ["DEBUG", "INFO"])],
)  # fmt: skip
def test_verbose__details_if_asked_and_each_line_once(arguments, levels, monkeypatch, capsys):
    def log(name):
        for level in (logging.DEBUG, logging.INFO):
            logging.getLogger("layercrit.somewhere").log(level, "\x1b[31mhostile\nError: no")
        raise layercrit.LayercritError("stopped here")

    monkeypatch.setattr("layercrit.training.get_method", log)
    assert call(monkeypatch, *arguments, "baseline") == 1
    printed = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^[\d:]+ ", "", line) for line in printed] == [
        *(rf"{level} layercrit.somewhere: \x1b[31mhostile\nError: no" for level in levels), "Error: stopped here",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["-q", "-v", "methods"], ["-v", "methods", "-q"], ["methods", "-vq"]])
def test_quiet_and_verbose__exclude_each_other(arguments, monkeypatch, capsys):
    assert call(monkeypatch, *arguments) == 2
    assert "--quiet and --verbose exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_commands__take_the_global_options(name):
    flags = [flag for one in COMMANDS[name].params if isinstance(one, click.Option) for flag in one.opts]
    assert len(flags) == len(set(flags)), "an option of its own hides a global one"
    assert {"-q", "--quiet", "-v", "--verbose", "--traceback"} <= set(flags)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands__out_is_no_empty_text(name):
    for one in COMMANDS[name].params:
        if one.name == "out":
            with pytest.raises(click.BadParameter, match=r"it is empty; name a folder or a file"):
                one.type_cast_value(click.Context(COMMANDS[name]), "")


# --- version ----------------------------------------------------------------------------------------------------------


def test_version__of_all_that_matters(monkeypatch, capsys):
    import torch

    assert call(monkeypatch, "--version") == 0
    expected = rf"layercrit {re.escape(layercrit.__version__)} \(Python 3\.\d+\.\w+, torch {re.escape(torch.__version__.split('+')[0])}.*, device (cpu|cuda:0, .+)\)\n"  # noqa: E501
    assert re.fullmatch(expected, capsys.readouterr().out)


def test_version__where_torch_is_broken(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "layercrit.machine", None)
    assert call(monkeypatch, "--version") == 0
    assert f"layercrit {layercrit.__version__} (Python" in (printed := capsys.readouterr().out)
    assert "torch cannot be imported: ModuleNotFoundError" in printed


# --- colours ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("variables", "is_terminal", "coloured"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, True, False), ({}, False, False),
     ({"NO_COLOR": ""}, True, True)],
)  # fmt: skip
def test_colours__on_a_terminal_unless_unwanted(variables, is_terminal, coloured, monkeypatch):
    from rich.table import Table

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | variables).items():
        monkeypatch.setenv(name, value)
    stdout = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)

    def show(folder):
        table = Table(style="red")
        table.add_column("[green]a[/green]")
        print_table(table)
        print_warnings(["take care"])
        raise layercrit.LayercritError("enough")

    monkeypatch.setattr("layercrit.measurement.Measurement.load", show)
    assert call(monkeypatch, "show", "x") == 1
    colours = re.findall(r"\x1b\[[\d;]*3\d[\d;]*m", stdout.getvalue())
    assert bool(colours) == coloured
    assert ("\x1b[33" in stdout.getvalue()) == coloured, "the warning"


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, click.Group)])
def test_help__summaries_of_commands_fit(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, *name.split()[1:], "--help") == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    for command in COMMANDS[name].commands:
        (line,) = [line for line in lines if line.startswith(f"  {command} ")]
        assert line.endswith("."), f"the summary of {name} {command} does not fit: {line}"
        assert not line.endswith("..."), f"the summary of {name} {command} is cut: {line}"
