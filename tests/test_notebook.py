"""The notebook about the published findings runs from the first cell to the last, and finds what is published."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from published_results import RELEASED, released

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "published_findings.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output.get("name") == "stdout")


def test_notebook__is_valid_and_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None


@released
@pytest.mark.slow
def test_notebook__finds_what_is_published(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERCRIT_PUBLISHED", str(RELEASED))
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):  # nothing is left outside of the test
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = json.loads(printed(cells[-1]))
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
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 7, "one each of criticality, difference, depth, accuracy, budget, and two of the spread"
