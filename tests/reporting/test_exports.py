import math
import re

import numpy as np
import pandas as pd
import pytest

from conditioned_studies import write
from layercrit.errors import StudyError
from layercrit.reporting.exports import FORMATS, cells_table, export, export_format
from layercrit.study.published import import_published
from layercrit.study.store import ModelRow
from layercrit.study.tables import load_study
from published_results import LAYERS, MODELS, measured, rows_of, write_models, write_table
from running_jobs import run
from seen_images import seen


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    table, models = write_table(folder / "t.csv", rows_of()), write_models(folder / "m.csv")
    return import_published(table, folder / "study", models)


@pytest.fixture
def partly_failed(tmp_path):
    cells = [
        {"model": "a", "layer": layer, "trial": trial, "cosine": 0.25, "loss": 1.5}
        for layer in ("conv1", "fc") for trial in (0, 1)
    ]  # fmt: skip
    cells[1] |= {"status": "not_finite", "cosine": math.nan, "loss": math.nan}
    failures = [("b", 0, "ModelError: out of memory")]
    models = [ModelRow("a", "py:a", None, None, 0.5, {"random_trials": {}}), ModelRow("b", "py:b")]
    return measured(tmp_path / "partly", cells, models=models, failures=failures)


READ = {"parquet": pd.read_parquet, "csv": pd.read_csv}


@pytest.mark.parametrize("name", READ)
def test_export__tables(imported, tmp_path, name):
    files = export(imported, name, tmp_path / "out")
    assert [file.name for file in files] == [f"{table}.{name}" for table in ("cells", "layers", "models")]
    cells, layers, models = (READ[name](file) for file in files)
    assert len(cells) == len(MODELS) * len(LAYERS) * 3
    assert len(layers) == len(MODELS) * len(LAYERS)
    assert models["model"].to_list() == list(MODELS)
    # exact: numbers lose no digit on the way
    assert cells["cosine"].to_list() == imported.cells["cosine"].to_list()
    assert layers["criticality"].to_list() == imported.to_pandas()["criticality"].to_list()
    assert models["low"].to_list() == imported.by_model()["low"].to_list()
    assert "raw" not in cells.columns


def test_export__parquet_has_types_where_no_value_is(imported, tmp_path):
    cells = pd.read_parquet(export(imported, "parquet", tmp_path)[0], dtype_backend="pyarrow")
    types = {name: str(cells[name].dtype).split("[")[0] for name in cells.columns}
    assert {types[name] for name in ("n_images", "n_parameters", "run", "trial")} == {"int64"}
    assert types["seed"] == "uint64"
    assert {types[name] for name in ("seconds", "delta_norm")} == {"double"}
    assert {types[name] for name in ("type", "finished", "error")} <= {"string", "large_string"}


@pytest.mark.parametrize("name", READ)
def test_export__failures_are_rows(partly_failed, tmp_path, name):
    cells = READ[name](export(partly_failed, name, tmp_path / "out")[0])
    assert cells["status"].to_list() == ["ok", "not_finite", "ok", "ok", "failed"]
    failed = cells.iloc[4]
    assert (failed["model"], failed["trial"], failed["error"]) == ("b", 0, "ModelError: out of memory")
    assert pd.isna(failed["layer"])
    assert cells["error"].isna().sum() == 4
    assert [int(seed) for seed in cells["seed"][:4]] == [2**63, 2**63 + 1, 2**63, 2**63 + 1]


def test_cells_table__of_a_study_where_everything_failed(tmp_path):
    failures = [("a", 0, "broken"), ("a", 1, "broken")]
    study = measured(tmp_path / "study", [], models=[ModelRow("a", "a")], failures=failures)
    assert cells_table(study)["status"].to_list() == ["failed", "failed"]
    for name in ("csv", "parquet", "latex"):
        assert all(file.exists() for file in export(study, name, tmp_path / "out"))


def test_export__published_layout_is_what_was_read(imported, tmp_path):
    results, models = export(imported, "published-csv", tmp_path / "out")
    assert (results.name, models.name) == ("results.csv", "models.csv")
    assert results.read_bytes() == (imported.folder.parent / "t.csv").read_bytes()
    assert models.read_bytes() == (imported.folder.parent / "m.csv").read_bytes()


def test_export__into_the_studys_folder_unless_said_otherwise(imported):
    assert [file.parent for file in export(imported, "latex")] == [imported.folder / "export" / "latex"]
    for name in FORMATS:  # both CSV formats have a models.csv
        export(imported, name, overwrite=name == "latex")


def test_export__of_a_folder(imported, tmp_path):
    ours = export(imported, "csv", tmp_path / "ours")
    for of in (imported.folder, str(imported.folder)):
        files = export(of, "csv", tmp_path / "own", overwrite=True)
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in ours]


# LaTeX


def body(text):
    return [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.count(" & ") == 3][1:]


def test_export__latex_is_grouped_by_category_with_the_baseline_first(imported, tmp_path):
    text = export(imported, "latex", tmp_path)[0].read_text()
    rows = body(text)
    assert [row[1] for row in rows] == ["baseline", "augmentation", "augmentation", "contrastive", "freezing"]
    assert text.count(r"\midrule") == 4
    of_model = imported.by_model().set_index("model").loc["tv_resnet50"]
    expected = f"${of_model['criticality']:.3f}$ $[{of_model['low']:.3f}, {of_model['high']:.3f}]$"
    assert rows[0] == ["Baseline", "baseline", "76.2", expected]
    assert rows[4][2] == "--"


def test_export__latex_has_the_baseline_before_others_of_its_category(tmp_path):
    cells = [{"model": name, "layer": "fc", "trial": 0, "cosine": 0.25} for name in "abc"]
    models = [ModelRow(name, name, "same", name, 0.5, {}) for name in "abc"]
    study = measured(tmp_path / "study", cells, models=models, record={"baseline": "b"})
    assert [row[0] for row in body(export(study, "latex", tmp_path)[0].read_text())] == ["b", "a", "c"]


def test_export__latex_has_one_table_for_each_reset(tmp_path):
    cells = [
        {"model": "a", "layer": "fc", "trial": trial, "reset": reset, "cosine": 0.25}
        for reset in ("rerandomize", "zero") for trial in (0, 1)
    ]  # fmt: skip
    text = export(measured(tmp_path / "study", cells), "latex", tmp_path)[0].read_text()
    assert re.findall(r"\(reset: (\w+)\)", text) == ["rerandomize", "zero"]


HOSTILE = r"""\input{/etc/passwd} & 5% of $x_1$ #2 {a} ~b ^c <d> | "e" \\"""


def test_export__latex_escapes_everything_from_outside(tmp_path):
    cells = [{"model": HOSTILE, "layer": "fc", "trial": trial, "cosine": 0.25} for trial in (0, 1)]
    models = [ModelRow(HOSTILE, HOSTILE, f"{HOSTILE}\n\n\\end{{table}}", None, 0.5, {})]
    record = {"origin": {"source": "a\n\\input{b}"}}
    text = export(measured(tmp_path / "study", cells, models=models, record=record), "latex", tmp_path)[0].read_text()
    escaped = (
        r"\textbackslash{}input\{/etc/passwd\} \& 5\% of \$x\_1\$ \#2 \{a\} \textasciitilde{}b \textasciicircum{}c "
        r"\textless{}d\textgreater{} \textbar{} \textquotedbl{}e\textquotedbl{} \textbackslash{}\textbackslash{}"
    )
    (line,) = (line for line in text.splitlines() if "passwd" in line)
    assert line.startswith(f"{escaped} & {escaped} \\textbackslash{{}}end\\{{table\\}} & 50.0 & ")
    commands = set(re.findall(r"\\[A-Za-z]+", "\n".join(row for row in text.splitlines() if not row.startswith("%"))))
    assert commands <= {r"\begin", r"\end", r"\caption", r"\toprule", r"\midrule", r"\bottomrule", r"\textbackslash",
                        r"\textasciitilde", r"\textasciicircum", r"\textless", r"\textgreater", r"\textbar",
                        r"\textquotedbl"}  # fmt: skip
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"% source: a \input{b}" in text.splitlines()


# What is refused


def test_export__unknown_format(imported, tmp_path):
    with pytest.raises(StudyError, match=r"There is no format 'parket'\. Did you mean 'parquet'"):
        export(imported, "parket", tmp_path)


def test_export__replaces_files_only_when_asked(imported, tmp_path):
    (tmp_path / "layers.csv").write_text("mine")
    with pytest.raises(StudyError, match=r"already contains layers\.csv.*--overwrite"):
        export(imported, "csv", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["layers.csv"]
    assert (tmp_path / "layers.csv").read_text() == "mine"
    export(imported, "csv", tmp_path, overwrite=True)
    assert len(pd.read_csv(tmp_path / "layers.csv")) == len(MODELS) * len(LAYERS)
    assert {file.name for file in tmp_path.iterdir()} == {"cells.csv", "layers.csv", "models.csv"}


def test_export__a_folder_that_cannot_be_made(imported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot be exported to .*Name another folder|cannot be exported to .*--out"):
        export(imported, "csv", tmp_path / "file" / "out")


def test_export__leaves_nothing_behind_when_it_fails(tmp_path):
    study = measured(tmp_path / "study", [{"model": "a", "layer": "fc", "trial": 0, "reset": "zero", "cosine": 0.5}])
    with pytest.raises(StudyError, match="no cell of the reset"):
        export(study, "published-csv", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_format__registers_a_format_of_ones_own(imported, tmp_path):
    @export_format("names", ["names.txt"])
    def names(study, folder):
        """The models' names."""
        (folder / "names.txt").write_text("\n".join(study.models["model"]))

    try:
        (path,) = export(imported, "names", tmp_path)
    finally:
        registered = FORMATS.pop("names")
    assert path.read_text().split() == list(MODELS)
    assert registered.summary == "The models' names."


# --- by class ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["class", "prediction", "correctness"])
def test_export__by_class_and_the_like(tmp_path, by):
    study = seen(tmp_path / "study")[0]
    expected = {"class": study.by_class, "prediction": lambda: study.by_class(of="prediction"),
                "correctness": study.by_correctness}[by]()  # fmt: skip
    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet}
    for name, reader in readers.items():
        (file,) = export(study, name, tmp_path / "out", by=by)
        assert file.name == f"by_{by}.{name}"
        found = reader(file)
        assert list(found.columns) == list(expected.columns)
        for column in expected.select_dtypes("float64"):
            np.testing.assert_allclose(found[column], expected[column], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "by", "message"), [("latex", "class", "Take csv or parquet"), ("csv", "clas", "Did you mean 'class'")]
)
def test_export__by_what_cannot_be_written(tmp_path, name, by, message):
    study = seen(tmp_path / "study")[0]
    with pytest.raises(StudyError, match=message):
        export(study, name, tmp_path / "out", by=by)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def under_conditions(tmp_path_factory):
    """Two models on two probe sets with two kinds of statistics."""
    path = write(tmp_path_factory.mktemp("conditions"))
    run(path, path.parent / "out")
    return load_study(path.parent / "out")


@pytest.mark.parametrize(
    ("asked", "models"),
    [
        ({}, [f"m{number}{variant}" for number in range(2)
              for variant in ("", " (dark)", " (statistics re-estimated)", " (dark, statistics re-estimated)")]),
        ({"probe_set": "dark"}, ["m0 (dark)", "m1 (dark)"]),
        ({"norm_statistics": "trained"}, ["m0", "m1"]),
        ({"probe_set": "dark", "norm_statistics": "reestimate"},
         ["m0 (dark, statistics re-estimated)", "m1 (dark, statistics re-estimated)"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("by", "file"), [(None, "cells.csv"), (None, "models.csv"), ("class", "by_class.csv")])
def test_export__of_one_condition(under_conditions, tmp_path, asked, models, by, file):
    export(under_conditions, "csv", tmp_path, by=by, **asked)
    found = pd.read_csv(tmp_path / file)
    assert sorted(found["model"].unique()) == sorted(models)
    if by is not None:
        whole = under_conditions.by_class(models)
        np.testing.assert_allclose(found["criticality"], whole["criticality"], rtol=0, atol=1e-12)


def test_export__no_such_condition(under_conditions, tmp_path):
    with pytest.raises(StudyError, match="Did you mean 'dark'"):
        export(under_conditions, "csv", tmp_path / "out", by="class", probe_set="drak")
    assert not (tmp_path / "out").exists()
