"""The notebooks run from the first cell to the last on any machine, and show what is stored in them.

`python tests/test_notebooks.py NAME ...` runs notebooks anew and stores what they show.
"""

import copy
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from layercrit.demo import copy_family
from published_results import RELEASED, released

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
FIRST_STEPS, OWN, PUBLISHED = names = ("first_steps", "own_training_methods", "published_findings")
INSTALL = "%pip install -q "
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?%?(?![\w.])")


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def executed(notebook, folder, **environment):
    """A copy of a notebook that was run in a folder, where layercrit is installed already."""
    notebook = copy.deepcopy(notebook)
    first = code_cells(notebook)[0]
    source, first.source = first.source, ""
    own = dict.fromkeys(("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"), str(folder))
    own |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **environment}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in own.items():
            patch.setenv(variable, value)
        client = NotebookClient(
            notebook, timeout=600, record_timing=False, coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )  # fmt: skip
        client.execute()
    first.source = source
    for cell in code_cells(notebook):
        cell.outputs = [_plain(one, folder) for one in cell.outputs if _lasts(one)]
    return notebook


def _lasts(output) -> bool:
    """Whether it is shown on any machine: no emptied progress bar, and no warning of another package."""
    return set(output.get("data", {"": "text"}).values()) != {""} and output.get("name") != "stderr"


def _plain(output, folder):
    """The output with paths from the notebook's folder on."""
    return nbformat.from_dict(json.loads(json.dumps(output).replace(f"{folder}/", "")))


def printed(cell) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output.get("name") == "stdout")


def texts(notebook):
    """What each cell shows as text."""
    return [
        "\n".join(
            output["text"] if output["output_type"] == "stream" else output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in code_cells(notebook)
    ]


def kinds(notebook):
    """How each cell shows it."""
    return [
        [sorted(output.get("data", {output.get("name"): ""})) for output in cell.outputs]
        for cell in code_cells(notebook)
    ]


def assert_same_texts(mine, stored, tolerance):
    """Compare texts: words are equal, and numbers within a tolerance (None: any)."""
    for text, expected in zip(texts(mine), texts(stored), strict=True):
        assert NUMBER.sub("#", text).split() == NUMBER.sub("#", expected).split()
        if tolerance is not None:
            numbers = [[float(one.rstrip("%")) for one in NUMBER.findall(words)] for words in (text, expected)]
            assert numbers[0] == pytest.approx(numbers[1], abs=tolerance), text


@pytest.mark.parametrize("name", names)
def test_notebook__opens_anywhere(name):
    notebook = read(name)
    nbformat.validate(notebook)
    first, *others = code_cells(notebook)
    assert first.source.startswith(INSTALL)
    assert "layercrit" in first.source
    assert not any(INSTALL in cell.source for cell in others)
    assert not any(".." in cell.source for cell in others), "a path out of the folder it was opened in"
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 700_000


@pytest.mark.parametrize("name", names)
def test_notebook__is_stored_as_it_was_run(name):
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells[1:]] == list(range(1, len(cells)))
    assert any("image/png" in output.get("data", {}) or "<img" in output.get("data", {}).get("text/html", "")
               for cell in cells for output in cell.outputs)  # fmt: skip
    assert not any(output["output_type"] == "error" for cell in cells for output in cell.outputs)
    shown = json.dumps([cell.outputs for cell in cells])
    for place in ("/tmp/", "site-packages", f"{Path.home()}/"):
        assert place not in shown


@pytest.mark.slow
def test_first_steps__shows_what_is_stored(tmp_path):
    stored = read(FIRST_STEPS)
    mine = executed(stored, tmp_path)
    assert kinds(mine) == kinds(stored)
    assert_same_texts(mine, stored, tolerance=0.03)


@pytest.mark.slow
def test_own_training_methods__shows_what_is_stored(tmp_path):
    """With less of everything than in the notebook, so that numbers are others; what is shown is the same in kind."""
    stored = read(OWN)
    quick = copy.deepcopy(stored)
    images = copy_family(tmp_path / "layercrit-demo").with_name("fashion-mnist-test.npz")
    with np.load(images) as every:
        few = {name: values[:500] for name, values in every.items()}
    np.savez(images, **few)  # which stay: the notebook copies what is missing
    for cell in code_cells(quick):
        for much, little in (
            ('"epochs": 8', '"epochs": 1'),
            ("trials = 4", "trials = 2"),
            ("_images = 150", "_images = 20"),
        ):
            cell.source = cell.source.replace(much, little)
    assert sum(one.source != other.source for one, other in zip(quick.cells, stored.cells, strict=True)) == 2
    mine = executed(quick, tmp_path)
    last = [[cell[-1:] for cell in kinds(one)] for one in (mine, stored)]  # before it, warnings of such poor networks
    assert last[0] == last[1]
    for notebook in (mine, stored):
        assert len(re.findall(r"^\S+ +top-1 accuracy \d+%$", "\n".join(texts(notebook)), re.MULTILINE)) == 3
    assert (tmp_path / "methods" / "report.html").is_file()


@released
@pytest.mark.slow
def test_published_findings__finds_what_is_published(tmp_path):
    stored = read(PUBLISHED)
    mine = executed(stored, tmp_path, LAYERCRIT_PUBLISHED=str(RELEASED))
    assert kinds(mine) == kinds(stored)
    assert_same_texts(mine, stored, tolerance=2e-3)
    found = json.loads(printed(code_cells(mine)[-1]))
    expected = json.loads((RELEASED / "expected.json").read_text(encoding="utf-8"))
    assert (found["models"], found["layers"]) == (expected["models_in_figures"], expected["layers"])
    for name in ("spearman_all", "spearman_without_adversarial"):
        assert found[name] == pytest.approx(expected[name]["statistic"], abs=1e-4)
    for category, percent in expected["mean_criticality_percent_by_category"].items():
        assert 100 * found[category] == pytest.approx(percent, abs=0.01)
    assert 100 * found["mean_sd_trials"] == pytest.approx(expected["mean_of_cell_std_percent"], abs=0.01)
    assert 100 * found["max_sd_trials"] == pytest.approx(expected["max_of_cell_std_percent"], abs=0.01)
    assert found["rank_l2_budget"] > 0.5
    assert found["rank_linf_budget"] > 0.5
    assert found["differences_tested"] == 49 * 54
    assert 0 < found["significant_differences"] < found["significant_differences_bh"] < found["differences_tested"] / 2
    pictures = [
        output for cell in code_cells(mine) for output in cell["outputs"] if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 6, "one each of criticality, difference, depth, accuracy, budget, and the spread"


@pytest.mark.slow
def test_published_findings__says_what_to_do_without_the_table(tmp_path):
    notebook = read(PUBLISHED)
    nowhere = "http://127.0.0.1:9"  # nothing listens there
    with pytest.raises(CellExecutionError) as refused:
        executed(notebook, tmp_path, https_proxy=nowhere, HTTPS_PROXY=nowhere, LAYERCRIT_PUBLISHED=str(tmp_path))
    assert refused.value.ename == "FileNotFoundError"
    assert "cannot be downloaded" in refused.value.evalue
    assert "results.csv yourself, and put it into this folder" in refused.value.evalue


if __name__ == "__main__":
    for one in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            run = executed(
                read(one), Path(scratch), **({"LAYERCRIT_PUBLISHED": str(RELEASED)} if one == PUBLISHED else {})
            )
        nbformat.write(run, NOTEBOOKS / f"{one}.ipynb")
