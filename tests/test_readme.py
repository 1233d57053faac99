"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from layercrit.demo import copy_family

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    copy_family(folder / "layercrit-demo")
    return folder


def test_readme__example_prints_what_is_shown(demo, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    printed = io.StringIO()
    monkeypatch.chdir(demo)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    numbers = re.compile(r"\d\.\d+")
    assert numbers.sub("#", printed.getvalue()).split() == numbers.sub("#", shown).split()
    for mine, theirs in zip(numbers.findall(printed.getvalue()), numbers.findall(shown), strict=True):
        assert float(mine) == pytest.approx(float(theirs), abs=0.002)  # other processors round otherwise


def test_readme__ci_runs_the_test_command():
    commands = re.findall(r"^    pip install uv && (.*)$", README, re.MULTILINE)
    (test_command,) = [command for command in commands if command.endswith("pytest")]
    assert test_command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme__every_file_it_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
