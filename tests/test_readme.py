"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from layercrit.demo import run_demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.chdir(folder):
        measurement, again = run_demo(Path("layercrit-demo"), say=lambda line: None)
    return folder, measurement, again


def test_readme__example_prints_what_is_shown(demo):
    folder, _, _ = demo
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    # Training rounds differently on other processors, so numbers may differ a little; layers and layout may not.
    numbers = re.compile(r"\d\.\d+")
    assert numbers.sub("#", printed.getvalue()).split() == numbers.sub("#", shown).split()
    for mine, theirs in zip(numbers.findall(printed.getvalue()), numbers.findall(shown), strict=True):
        assert float(mine) == pytest.approx(float(theirs), abs=0.15)


def test_readme__ci_runs_the_test_command():
    commands = re.findall(r"^    pip install uv && (.*)$", README, re.MULTILINE)
    (test_command,) = [command for command in commands if command.endswith("pytest")]
    assert test_command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme__every_file_it_names_exists():
    for name in re.findall(r"`(src/layercrit/\w+\.py)`", README):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_demo__learns_measures_and_can_be_repeated_from_its_files(demo):
    folder, measurement, again = demo
    summary = measurement.summary()
    assert summary["top1_accuracy"] > 0.9, "the demo's network did not learn the digits"
    assert summary["n_layers"] == 16
    assert summary["cells"] == {"ok": 80}
    assert 0.2 < summary["criticality"]["mean"] < 1 - summary["chance"]
    assert all(measurement.to_pandas()["status"] == "ok")
    reference = re.search(r"'(file:[^']+)'", again[0]).group(1)
    from layercrit import measure

    with contextlib.chdir(folder):
        repeated = measure(reference, "layercrit-demo/digits.npz", trials=1, progress=False)
    assert repeated.summary()["top1_accuracy"] == pytest.approx(summary["top1_accuracy"])
