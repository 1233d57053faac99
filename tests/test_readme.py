"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from layercrit.demo import copy_family
from layercrit.study.file import read_study_file
from layercrit.training.methods import CATEGORIES, METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    copy_family(folder / "layercrit-demo")
    return folder


def test_readme__example_prints_what_is_shown(demo):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.chdir(demo), contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    numbers = re.compile(r"\d\.\d+")
    assert numbers.sub("#", printed.getvalue()).split() == numbers.sub("#", shown).split()
    for mine, theirs in zip(numbers.findall(printed.getvalue()), numbers.findall(shown), strict=True):
        assert float(mine) == pytest.approx(float(theirs), abs=0.002)  # other processors round otherwise


def test_readme__lists_every_method_in_its_family():
    rows = dict(re.findall(r"^\| (\w+) \| ((?:`\w+` ?)+)\|$", README, re.MULTILINE))
    assert list(rows) == list(CATEGORIES)
    for category, names in rows.items():
        expected = {name for name, method in METHODS.items() if method.category == category}
        assert set(re.findall(r"`(\w+)`", names)) == expected, category


def test_readme__the_study_file_that_trains_is_one(tmp_path):
    text = re.search(r"```toml\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    (tmp_path / "images" / "val").mkdir(parents=True)
    study = read_study_file(tmp_path / "study.toml")
    assert study.untrained() == ["plain", "pgd"]


def test_readme__ci_runs_the_test_command():
    commands = re.findall(r"^    pip install uv && (.*)$", README, re.MULTILINE)
    (test_command,) = [command for command in commands if command.endswith("pytest")]
    assert test_command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme__every_file_it_names_exists():
    for name in re.findall(r"`(src/layercrit/\w+\.py)`", README):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
