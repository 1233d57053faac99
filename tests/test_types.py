"""What type checkers see of layercrit in a user's file: every public name, with types that refuse a wrong use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import layercrit

ROOT = Path(__file__).parents[1]
USER_FILE = Path(__file__).with_name("user_file.py")

WRONG = {
    'layercrit.measure("timm:resnet18", "photos", trials="5")': "arg-type",
    'layercrit.measure("timm:resnet18")': "call-arg",
    'layercrit.meassure("timm:resnet18", "photos")': "attr-defined",
    'layercrit.load_study("study").by_modell()': "attr-defined",
    'words: str = layercrit.open_model("timm:resnet18")': "assignment",
    'layercrit.train("baseline", "timm:resnet18", 3, "run")': "arg-type",
    'layercrit.advise("study", "prune", knobs="weights")': "arg-type",
    '@layercrit.distance("mine", upper=1.0)\ndef mine(p: str) -> str: ...': "arg-type",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """File and line -> what mypy finds there, in the user's file and in one that is wrong in every statement."""
    wrong = tmp_path_factory.mktemp("types") / "wrong.py"
    wrong.write_text("import layercrit\n" + "\n".join(WRONG) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", str(USER_FILE), str(wrong)]
    environment = os.environ | {"MYPYPATH": str(Path(layercrit.__file__).parents[1])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert not done.stderr, done.stderr
    found = re.findall(r"^(?:.*/)?(\w+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return {(file, int(line)): text for file, line, text in found}


@pytest.mark.slow
def test_user_file__has_no_error(errors):
    assert {place: text for place, text in errors.items() if place[0] != "wrong.py"} == {}


@pytest.mark.slow
def test_wrong_use__is_an_error(errors):
    lines = ["import layercrit", *"\n".join(WRONG).split("\n")]
    for statement, code in WRONG.items():
        line = lines.index(statement.split("\n")[0]) + 1
        assert f"[{code}]" in errors.get(("wrong.py", line), ""), f"{statement}: {errors}"


def test_user_file__uses_every_name():
    text = USER_FILE.read_text(encoding="utf-8")
    for name in layercrit.__all__:
        assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is not used"
