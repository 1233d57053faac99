"""What Tab completes, and that a shell can use it."""

import os
import re
import select
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from shutil import which

import click
import pytest
from click.shell_completion import ShellComplete

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


def documented(shell):
    """The line that the documentation gives for a shell."""
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    return re.search(rf"^\| {shell}\b.*\| `(.*)` \|$", page, re.MULTILINE)[1].replace("\\|", "|")


def environment(home):
    path = os.pathsep.join(filter(None, sys.path))
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": path, "HOME": str(home), "TERM": "dumb"}


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs Bash")
def test_completion__bash(tmp_path):
    script = f"""
        {documented("Bash")}
        COMP_WORDS=(layercrit measure m --reset no) COMP_CWORD=4
        _layercrit_completion layercrit
        echo "${{COMPREPLY[@]}}"
        complete -p layercrit
    """
    shell = ["/bin/bash", "--norc", "-c", script]
    done = subprocess.run(shell, env=environment(tmp_path), capture_output=True, text=True)
    assert done.stdout.splitlines() == ["noise", "complete -o nosort -F _layercrit_completion layercrit"], done.stderr


@pytest.mark.skipif(not which("fish"), reason="fish is not here")
def test_completion__fish(tmp_path):
    file = tmp_path / ".config" / "fish" / "completions" / "layercrit.fish"
    file.parent.mkdir(parents=True)
    file.write_text(documented("Fish") + "\n")
    shell = ["fish", "-c", "complete -C 'layercrit measure m --reset no'"]
    done = subprocess.run(shell, env=environment(tmp_path), capture_output=True, text=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["noise"], done.stderr


@pytest.mark.skipif(not which("zsh"), reason="Zsh is not here")
def test_completion__zsh(tmp_path):
    """At a terminal, as Zsh completes nowhere else."""
    import pty  # not on Windows

    (tmp_path / ".zshrc").write_text(f"autoload -Uz compinit; compinit -u\n{documented('Zsh')}\nPS1='ready> '\n")
    mine, its = pty.openpty()
    shell = subprocess.Popen(["zsh", "-i"], stdin=its, stdout=its, stderr=its, env=environment(tmp_path), cwd=tmp_path,
                             start_new_session=True)  # fmt: skip
    try:
        read_until(mine, "ready> ")
        os.write(mine, b"layercrit measure m --reset no\t")
        read_until(mine, "noise")
    finally:
        os.close(its)
        shell.kill()
        shell.wait()
        os.close(mine)


def read_until(terminal, text, seconds=30):
    seen = ""
    while text not in seen:
        assert select.select([terminal], [], [], seconds)[0], f"{text!r} is not in {seen!r}"
        seen += os.read(terminal, 4096).decode()


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
