"""What the README shows is what happens."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_networks import ResNet20
from layercrit.demo import copy_family
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from layercrit.study.tables import load_study
from running_jobs import Inline

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


def test_readme__study_is_measured(tmp_path, monkeypatch):
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("study.toml").write_text(text, encoding="utf-8")
    Path("my_nets.py").write_text("from cifar_networks import ResNet20 as resnet20\n", encoding="utf-8")
    for name in ("plain", "pgd"):
        torch.save(ResNet20().state_dict(), f"{name}.pth")
    np.savez("images.npz", images=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    study = read_study_file(Path("study.toml"))
    few = replace(study, n_images=8, protocol=replace(study.protocol, trials=1))
    assert not run_study(few, "my-study", progress=False, executor=Inline()).failures
    found = load_study("my-study").by_model()
    assert found["model"].to_list() == ["plain", "pgd"]
    assert found["category"].to_list()[1] == "adversarial_training"


def test_readme__ci_runs_the_test_command():
    commands = re.findall(r"^    pip install uv && (.*)$", README, re.MULTILINE)
    (test_command,) = [command for command in commands if command.endswith("pytest")]
    assert test_command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme__every_file_it_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
