"""What a release consists of: versions, the changelog, licences, what is built, and the files for the code's host."""

import os
import re
import subprocess
import sys
import zipfile
from datetime import date
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from hatchling import build
from packaging.version import Version

import layercrit
from layercrit.toml import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOST = ROOT / ".github"
WORKFLOWS = {path.stem: path for path in sorted((HOST / "workflows").glob("*.yml"))}
FORMS = sorted(path for path in (HOST / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TEXTS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "README.md", "CHANGELOG.md",
                                  ".github/pull_request_template.md")]  # fmt: skip
KINDS_OF_CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def parsed(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- versions and the changelog ---------------------------------------------------------------------------------------


def test_version__is_the_same_everywhere():
    assert parsed(ROOT / "CITATION.cff")["version"] == PROJECT["version"]
    assert str(Version(PROJECT["version"])) == PROJECT["version"]
    assert layercrit.__version__ == metadata.version("layercrit")


def faults_of_changelog(text, version):
    """What is not as Keep a Changelog has it, or is not about this version."""
    lines = text.splitlines()
    if lines[0] != "# Changelog":
        yield "no title"
    sections = [line[3:] for line in lines if line.startswith("## ")]
    if sections[0] != "Unreleased" and not sections[0].startswith(f"{version} - "):
        yield f"the top section is {sections[0]}"
    released = []
    for section in sections[sections[0] == "Unreleased" :]:
        found = re.fullmatch(r"(\d+\.\d+\.\d+\w*) - (\d{4}-\d\d-\d\d)", section)
        if found is None:
            yield f"not VERSION - YYYY-MM-DD: {section}"
        else:
            released.append((date.fromisoformat(found[2]), Version(found[1])))
    if released != sorted(released, reverse=True):
        yield "the newest version is not the first"
    if released and released[0][1] > Version(version):
        yield f"{released[0][1]} is newer than the package"
    yield from (f"not a kind of change: {line}" for line in lines
                if line.startswith("### ") and line[4:] not in KINDS_OF_CHANGES)  # fmt: skip
    yield from (f"too long: {line}" for line in lines if len(line) > 130)


def test_changelog__has_the_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert list(faults_of_changelog(text, PROJECT["version"])) == []


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ("## 1.2.0 - 2026-01-31\n### Added\n## 1.1.0 - 2025-01-31", None),
        ("## Unreleased\n### Added\n## 1.1.0 - 2025-01-31", None),
        ("## 1.1.0 - 2025-01-31", "the top section is"),
        ("## 1.2.0", "the top section is"),
        ("## Unreleased\n## 1.1.0 - 31.1.2025", "not VERSION"),
        ("## Unreleased\n## 1.1.0 - 2025-01-31\n## 1.2.0 - 2026-01-31", "the newest"),
        ("## Unreleased\n## 1.3.0 - 2025-01-31", "newer than the package"),
        ("## Unreleased\n### News", "not a kind of change"),
    ],
)
def test_changelog__faults_are_found(sections, fault):
    found = list(faults_of_changelog(f"# Changelog\n\n{sections}\n", "1.2.0"))
    assert (found == []) if fault is None else any(fault in one for one in found)


# --- licences ---------------------------------------------------------------------------------------------------------


def test_licences__works_of_others_are_named():
    assert PROJECT["license"] == "Apache-2.0 AND MIT"
    assert PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    assert not [one for one in PROJECT["classifiers"] if one.startswith("License")], "PEP 639: the expression says it"
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    text = (ROOT / "src" / "layercrit" / "family" / "README.md").read_text(encoding="utf-8")
    assert "Permission is hereby granted, free of charge" in text
    for part in ("fashion-mnist-test.npz", "Fashion-MNIST", "copyright 2017 Zalando SE", "MIT"):
        assert part in notice
        assert part in text


def test_licences__nothing_else_is_bundled():
    """Networks that layercrit trained, images that NOTICE names, and text of our own."""
    own = {".py", ".md", ".toml", ".js", ".css", ".html", ".json", ".typed", ".safetensors"}
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no checkout of git")
    others = [name for name in tracked.stdout.splitlines() if Path(name).suffix not in own]
    assert others == ["src/layercrit/family/fashion-mnist-test.npz"]
    minified = [path.name for path in (ROOT / "src").rglob("*.js") if max(map(len, path.open(encoding="utf-8"))) > 200]
    assert minified == [], "a library of others?"


# --- what is built ----------------------------------------------------------------------------------------------------


def test_wheel__is_the_same_wherever_and_whenever_it_is_built(tmp_path, monkeypatch):
    wheels = []
    for number, mode in enumerate((0o644, 0o600)):
        folder = tmp_path / f"copy{number}"
        (folder / "src" / "layercrit" / "family").mkdir(parents=True)
        for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "src/layercrit/__init__.py",
                     "src/layercrit/errors.py", "src/layercrit/family/README.md"):  # fmt: skip
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod(mode)
            os.utime(folder / name, (10**9 * (number + 1),) * 2)
        monkeypatch.chdir(folder)
        wheels.append(folder / build.build_wheel(str(folder)))
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = f"layercrit-{PROJECT['version']}.dist-info/licenses"
        assert {f"{inside}/LICENSE", f"{inside}/NOTICE", "layercrit/family/README.md"} <= set(wheel.namelist())


# --- the code's host --------------------------------------------------------------------------------------------------


def steps_of(workflow):
    return [step for job in parsed(WORKFLOWS[workflow])["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows__may_do_as_little_as_they_need(name):
    workflow = parsed(WORKFLOWS[name])
    assert workflow["permissions"] == {"contents": "read"}
    asked = {job: set(what.get("permissions", {})) for job, what in workflow["jobs"].items()}
    expected = {
        "tests": {},
        "docs": {"deploy": {"pages", "id-token"}},
        "release": {"upload": {"id-token"}, "release": {"contents", "id-token", "attestations"}},
    }
    assert {job: what for job, what in asked.items() if what} == expected[name]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
    for step in steps_of(name):
        used = step.get("uses", "")
        assert re.fullmatch(r"|(actions|astral-sh)/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1", used), used
        if used.startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "text from outside would be part of a command"


def test_workflows__test_the_oldest_and_the_newest_python():
    matrix = parsed(WORKFLOWS["tests"])["jobs"]["tests"]["strategy"]["matrix"]
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}
    oldest, newest = matrix["python"]
    assert PROJECT["requires-python"] == f">={oldest}"
    for page in ("README.md", "CONTRIBUTING.md", "docs/getting-started.md"):
        assert f"ith Python {oldest} or newer" in (ROOT / page).read_text(encoding="utf-8"), page
    assert Version(newest) > Version(oldest)


def test_workflows__the_documentation_is_built_with_its_plugins():
    config = re.search(r"^plugins:\n((?:[ ].*\n)+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    plugins = set(re.findall(r"^  - (\w+)", config[1], re.MULTILINE)) - {"search"}
    (command,) = [step["run"] for step in steps_of("docs") if "mkdocs build" in step.get("run", "")]
    assert set(re.findall(r"--with '?([a-z-]+)", command)) == {"mkdocs-material", *plugins}


def test_workflows__a_release_is_built_once_and_uploaded_by_a_job_that_runs_nothing_else():
    workflow = parsed(WORKFLOWS["release"])
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML takes `on` for true
    assert [step.get("run") for step in steps_of("release")].count(".ci/build") == 1
    upload = workflow["jobs"]["upload"]
    assert (upload["needs"], upload["environment"]) == ("build", "pypi")
    assert [step.get("run") for step in upload["steps"]] == [None, None]
    (publish,) = [step for step in steps_of("release") if step.get("uses", "").startswith("pypa/")]
    assert publish["with"] == {"attestations": True}, "to its default, with what the upload's identity proves"


@pytest.mark.parametrize(("tag", "top", "code"), [
    ("v0.1.0", "0.1.0 - 2026-11-30", 0), ("v0.2.0", "0.1.0 - 2026-11-30", 1), ("v0.1.0", "Unreleased", 1),
    ("v0.1.0", "0.1.0", 1), ("v0.1.0", "0.1.0 - soon", 1), ("v0.1.0", "0x1.0 - 2026-11-30", 1),
])  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="the release is built on Linux")
def test_workflows__a_tag_that_is_not_the_version_is_refused(tag, top, code, tmp_path):
    (check,) = [step["run"] for step in steps_of("release") if step.get("id") == "version"]
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {top}\n\n## 0.1.0 - 2020-01-01\n")
    variables = {"GITHUB_REF_NAME": tag, "GITHUB_OUTPUT": str(tmp_path / "output")}
    done = subprocess.run(["bash", "-e", "-c", check], cwd=tmp_path, env=os.environ | variables, check=False)
    assert done.returncode == code
    if code == 0:
        assert (tmp_path / "output").read_text() == "version=0.1.0\n"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms__ask_for_what_is_needed(path):
    form = parsed(path)
    assert {"name", "description", "labels", "body"} == set(form)
    asked = [one for one in form["body"] if one["type"] != "markdown"]
    assert all(re.fullmatch(r"[a-z]+", one["id"]) and one["attributes"]["label"] for one in asked)
    assert len({one["id"] for one in asked}) == len(asked)
    assert any(one.get("validations", {}).get("required") for one in asked)
    assert ("doctor" in {one["id"] for one in asked}) == (path.stem != "question")


def test_issue_forms__are_the_three():
    assert [path.stem for path in FORMS] == ["crash", "question", "wrong-number"]
    assert parsed(HOST / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": False}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_texts__link_to_files_that_exist(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_contributing__names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:tests|docs|\.ci)/[\w/.]+\w", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
