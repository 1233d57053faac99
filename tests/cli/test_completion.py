"""What Tab completes, and that a shell can use it."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete, get_completion_class

from layercrit.cli.registered import RegisteredOption, _names_in
from layercrit.cli.root import cli
from layercrit.models.zoo.fetching import ZOO
from layercrit.pitfalls import PITFALLS
from layercrit.registry import _origin
from layercrit.training.methods import METHODS

BIN = Path(sys.executable).parent
VARIABLE = "_LAYERCRIT_COMPLETE"


def completed(line):
    *words, last = line.split(" ")
    return [item.value for item in ShellComplete(cli, {}, "layercrit", VARIABLE).get_completions(words, last)]


LINES = [
    ("co", ["compare"]),
    ("study s", ["schema", "status", "submit"]),
    ("measure m --reset re", ["rerandomize", "rewind"]),
    ("measure m --distances cosine,l", ["cosine,l1", "cosine,l2"]),
    ("measure m --norm-statistics re", ["reset", "reestimate"]),
    ("report d --figures criticality,d", ["criticality,difference", "criticality,depth"]),
    ("export d --format p", ["parquet", "published-csv"]),
    ("measure m --track t", ["tensorboard", "trackio"]),
    ("train --method bar", ["barlow_twins"]),
    ("methods pix", ["pixmix"]),
    ("zoo show resnet50.b", ["resnet50.b1k_in1k", "resnet50.b2k_in1k"]),
    ("pitfalls few", ["few-trials"]),
    ("advise d --for f", ["freeze", "finetune"]),
    ("measure m --half", ["--half-width"]),
    ("measure m --images some/fol", ["some/fol"]),  # for which the shell completes files
]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_completion__names(line, expected):
    assert completed(line) == expected


def test_completion__names_are_those_of_the_registries():
    options = {one.registry for command in commands_in(cli) for one in command.params
               if isinstance(one, RegisteredOption) and one._custom_shell_complete is None}  # fmt: skip
    assert len(options) > 4
    for registry in options:
        module, _, name = registry.partition(":")
        own = [key for key, entry in getattr(import_module(module), name).items() if _is_own(entry)]
        assert sorted(_names_in(module)) == sorted(own), registry
    assert sorted(_names_in("layercrit.training")) == sorted(name for name, one in METHODS.items() if _is_own(one))
    assert completed("zoo show ") == list(ZOO)
    assert completed("pitfalls ") == list(PITFALLS)


def commands_in(group):
    for command in group.commands.values():
        yield from commands_in(command) if isinstance(command, click.Group) else [command]


def _is_own(entry):
    """Whether it is not one that another test registers."""
    origin = _origin(entry) or _origin(getattr(entry, "write", None))
    return origin is None or origin[0].startswith("layercrit.")


@pytest.mark.parametrize(("shell", "part"), [("zsh", "compdef _layercrit_completion layercrit"),
                                             ("fish", "complete --no-files --command layercrit")])  # fmt: skip
def test_completion__source_of_other_shells(shell, part):
    source = get_completion_class(shell)(cli, {}, "layercrit", VARIABLE).source()
    assert part in source
    assert f"{VARIABLE}={shell}_complete" in source


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs Bash")
def test_completion__bash():
    script = f"""
        eval "$({VARIABLE}=bash_source layercrit)"
        COMP_WORDS=(layercrit measure m --reset no) COMP_CWORD=4
        _layercrit_completion layercrit
        echo "${{COMPREPLY[@]}}"
        complete -p layercrit
    """
    path = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["/bin/bash", "--norc", "-c", script], env=os.environ | path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["noise", "complete -o nosort -F _layercrit_completion layercrit"], done.stderr


def test_completion__does_not_wait_for_torch():
    code = (
        "import sys; from click.shell_completion import ShellComplete; from layercrit.cli.root import cli; "
        f"shell = ShellComplete(cli, {{}}, 'layercrit', {VARIABLE!r}); "
        "[shell.get_completions(line.split(' ')[:-1], line.split(' ')[-1]) for line in sys.argv[1:]]; "
        "print('torch' in sys.modules)"
    )
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *(line for line, _ in LINES)]
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
