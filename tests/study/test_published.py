import csv
import hashlib
import math

import numpy as np
import pandas as pd
import pytest

from layercrit.errors import StudyError
from layercrit.models.zoo.fetching import ZOO
from layercrit.study.published import COLUMNS, import_published, write_models, write_published
from layercrit.study.tables import load_study
from published_results import (
    LAYERS,
    MODELS,
    RELEASED,
    measured,
    released,
    rows_of,
    write_table,
)
from published_results import (
    write_models as models_file,
)


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "results.csv", rows_of())


@pytest.fixture
def models(tmp_path):
    return models_file(tmp_path / "models.csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return import_published(
        RELEASED / "results.csv", tmp_path_factory.mktemp("released") / "study", RELEASED / "models.csv"
    )


# Import


def test_import_published__every_row_is_a_cell_in_our_units(tmp_path, table, models):
    study = import_published(table, tmp_path / "study", models)
    found = study.cells.set_index(["model", "layer", "trial"])
    assert len(found) == len(rows_of()) == len(MODELS) * len(LAYERS) * 3
    for row in rows_of():
        cell = found.loc[(row["model_id"], row["layer"], int(float(row["trial"])))]
        assert cell["cosine"] == 1 - float(row["pred_cos_sim"])
        assert cell["l1"] == float(row["pred_l1_err"])
        assert cell["l2"] == float(row["pred_l2_err"])
        assert cell["loss"] == float(row["loss"])
        assert cell["top1_accuracy"] == float(row["top1_acc"]) / 100
        assert cell["top5_accuracy"] == float(row["top5_acc"]) / 100
        assert cell["recovered_accuracy"] == float(row["recovered_acc"])
        assert {column: cell["raw"][column] for column in COLUMNS} == row
    assert not any("ce_loss" in column for column in study.cells.columns)


def test_import_published__what_a_table_does_not_say_is_not_made_up(tmp_path, table, models):
    cells = import_published(table, tmp_path / "study", models).cells
    assert set(cells["reset"]) == {"rerandomize"}
    assert set(cells["status"]) == {"ok"}
    for column in ("seed", "delta_norm", "n_images", "flops_after", "seconds", "finished"):
        assert cells[column].isna().all(), column
    unknown = cells[~cells["model"].isin(ZOO)]
    assert unknown["model"].nunique() == len(MODELS) - 1
    assert unknown[["type", "shape", "n_parameters"]].isna().all(axis=None)
    assert cells["key"].is_unique


def test_import_published__order_depth_and_stage(tmp_path, table, models):
    study = import_published(table, tmp_path / "study", models)
    assert study.models["model"].to_list() == list(MODELS)
    of_model = study.cells[(study.cells["model"] == "model_b") & (study.cells["trial"] == 1)]
    assert of_model["layer"].to_list() == list(LAYERS)
    assert of_model["depth"].to_list() == list(range(len(LAYERS)))
    assert of_model["stage"].to_list() == ["model.conv1", *["model.layer1"] * 4, "model.fc"]


def test_import_published__record(tmp_path, table, models):
    study = import_published(table, tmp_path / "study", models)
    assert study.record["name"] == "results"
    sha256 = hashlib.sha256(table.read_bytes()).hexdigest()
    assert study.record["origin"] == {"source": "results.csv", "sha256": sha256, "rows": len(study.cells)}
    assert study.record["protocol"] == {"trials": 3, "level": 0.95, "resets": ["rerandomize"]}
    assert (study.record["baseline"], study.record["leave_out"]) == ("tv_resnet50", ["freezing"])
    assert any("new trials on the same images" in note for note in study.record["notes"])
    assert study.by_model()["covers"].unique().tolist() == ["trials"]


def test_import_published__models_from_a_table(tmp_path, table, models):
    rows = import_published(table, tmp_path / "study", models).models.set_index("model")
    for name, (category, label, percent) in MODELS.items():
        assert (rows.loc[name, "category"], rows.loc[name, "label"]) == (category, label)
        accuracy = rows.loc[name, "documented_accuracy"]
        assert math.isnan(accuracy) if percent is None else accuracy == percent / 100


def test_import_published__models_from_the_zoo(tmp_path):
    table = write_table(tmp_path / "t.csv", rows_of(["resnet50_dino", "my_own"]))
    study = import_published(table, tmp_path / "study")
    rows = study.models.set_index("model")
    assert rows.loc["resnet50_dino", "category"] == ZOO["resnet50_dino"].category == "contrastive"
    assert rows.loc["resnet50_dino", "documented_accuracy"] == pytest.approx(0.7528)
    assert pd.isna(rows.loc["my_own", "category"])
    layers = study.to_pandas().set_index(["model", "layer"])
    assert list(layers.loc[("resnet50_dino", "model.layer1.0.conv2"), ["type", "shape", "n_parameters"]]) == [
        "conv", "64x64x3x3", 36864,
    ]  # fmt: skip
    assert layers.loc["my_own", "shape"].isna().all()
    assert rows.loc["my_own", "label"] == "my_own"
    assert any(note.startswith("No category is known for my_own; a table") for note in study.record["notes"])
    assert "baseline" not in study.record
    assert "leave_out" not in study.record


def test_import_published__budgets_from_the_zoo(tmp_path, models):
    names = ["robust_resnet50_linf_eps4.0", "robust_resnet50_l2_eps0", "tv_resnet50"]
    table = write_table(tmp_path / "t.csv", rows_of(names))
    for study in (import_published(table, tmp_path / "a"), import_published(table, tmp_path / "b", models)):
        rows = study.models.set_index("model")
        assert list(rows.loc[names[0], ["attack_norm", "eps"]]) == ["linf", 4.0]
        assert list(rows.loc[names[1], ["attack_norm", "eps"]]) == ["l2", 0.0]
        assert rows.loc["tv_resnet50", ["attack_norm", "eps"]].isna().all()


def test_import_published__columns_in_any_order_behind_a_byte_order_mark(tmp_path, table, models):
    shuffled = write_table(tmp_path / "shuffled.csv", rows_of(), COLUMNS[::-1])
    shuffled.write_bytes(b"\xef\xbb\xbf" + shuffled.read_bytes().replace(b"\n", b"\r\n"))
    study = import_published(shuffled, tmp_path / "study", models)
    assert write_published(study, tmp_path / "out.csv").read_bytes() == table.read_bytes()


@pytest.mark.parametrize("text", ["", "nan", "inf"])
def test_import_published__a_cell_without_a_cosine_is_not_ok(tmp_path, models, text):
    rows = rows_of()
    rows[4]["pred_cos_sim"] = text
    study = import_published(write_table(tmp_path / "t.csv", rows), tmp_path / "study", models)
    (bad,) = study.cells[study.cells["status"] != "ok"].to_dict("records")
    assert (bad["layer"], bad["status"], bad["trial"]) == (rows[4]["layer"], "not_finite", 0)
    assert all(math.isnan(bad[name]) for name in ("cosine", "l1", "l2", "loss", "top1_accuracy"))
    assert write_published(study, tmp_path / "out.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


# Tables that are refused


def changed(line, column, text):
    def change(rows):
        rows[line - 2][column] = text

    return change


def repeated(rows):
    rows.insert(7, dict(rows[2]))


def lacking(rows):
    del rows[9]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed(3, "pred_cos_sim", "high"), r"line 3, column 'pred_cos_sim' contains 'high': expected a number\."),
        (changed(3, "pred_cos_sim", "1.2"), r"line 3, column 'pred_cos_sim' contains '1\.2': .* from 0 to 1"),
        (changed(4, "pred_l1_err", "-0.5"), r"line 4, column 'pred_l1_err' contains '-0\.5': .* 0 to 2"),
        (changed(9, "top1_acc", "101"), r"line 9, column 'top1_acc' contains '101': .* 0 to 100"),
        (changed(5, "trial", "0.5"), r"line 5, column 'trial' contains '0\.5': expected a whole number"),
        (changed(5, "trial", "inf"), r"line 5, column 'trial' contains 'inf': expected a whole number"),
        (changed(5, "trial", ""), r"line 5, column 'trial' contains '': expected a whole number"),
        (changed(6, "layer", " "), r"line 6, column 'layer' is empty: expected a name"),
        (changed(6, "model_id", ""), r"line 6, column 'model_id' is empty"),
        (repeated, r"line 9, column 'trial': model 'tv_resnet50', layer 'model\.layer1\.0\.conv2' has trial 0 already "
                   r"in line 4"),
        (lacking, r"lacks trial 1, which other layers of the model have"),
        (changed(7, "layer", "model.fcc"), r"layer 'model\.fcc' of model 'tv_resnet50' lacks trial 1, 2, .*"
                                           r"Did you mean 'model\.fc'"),
        (list.clear, "has a header but no rows"),
    ],
)  # fmt: skip
def test_import_published__refuses(tmp_path, models, change, text):
    rows = rows_of()
    change(rows)
    with pytest.raises(StudyError, match=text):
        import_published(write_table(tmp_path / "t.csv", rows), tmp_path / "study", models)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("pred_cos_sim", "pred_cos", r"line 1: column 'pred_cos_sim' is missing\. Did you mean 'pred_cos'\?"),
        ("top1_acc,", "", r"line 1: column 'top1_acc' is missing\. Expected top1_acc, top5_acc"),
        ("top1_acc,", "top1_acc,top1_acc,", r"line 1: column 'top1_acc' appears twice"),
        ("top1_acc,", ",top1_acc,", r"line 1: column '' is unknown"),
        ("0,model_a", "0,model_a,7", r"line 20, has 13 fields where the header names 12 columns"),
        ("model_a", '"model_a', r"is not a CSV file in UTF-8 \("),
    ],
)
def test_import_published__refuses_files_of_another_shape(tmp_path, table, models, old, new, text):
    content = table.read_text()
    if old.startswith("0,"):
        lines = content.splitlines()
        lines[19] += ",7"
        content = "\n".join(lines)
    else:
        content = content.replace(old, new, 1)
    table.write_text(content)
    with pytest.raises(StudyError, match=text):
        import_published(table, tmp_path / "study", models)


def test_import_published__refuses_bytes_missing_files_and_directories(tmp_path, table, models):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(StudyError, match=r"binary.csv is not a CSV file in UTF-8"):
        import_published(tmp_path / "binary.csv", tmp_path / "study", models)
    with pytest.raises(StudyError, match=r"There is no file .*result\.csv\. Did you mean 'results\.csv'"):
        import_published(tmp_path / "result.csv", tmp_path / "study", models)
    with pytest.raises(StudyError, match=r"cannot be read \(Is a directory\)"):
        import_published(tmp_path, tmp_path / "study", models)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (("model_a", "x", "y", "1.0"), r"line 7, column 'model_id': 'model_a' appears twice"),
        (("other", "x", "y", "150"), r"line 7, column 'imagenet_top1_percent' contains 150\.0: expected 0 to 100"),
        (("other", "x", "y", "high"), r"line 7, column 'imagenet_top1_percent' contains 'high': expected a number"),
    ],
)
def test_import_published__refuses_tables_of_models(tmp_path, table, models, row, text):
    with models.open("a", newline="") as file:
        csv.writer(file).writerow(row)
    with pytest.raises(StudyError, match=text):
        import_published(table, tmp_path / "study", models)


def test_import_published__refuses_a_folder_that_holds_a_study(tmp_path, table, models):
    study = import_published(table, tmp_path / "study", models)
    with pytest.raises(StudyError, match="already contains a study"):
        import_published(table, tmp_path / "study", models)
    assert len(load_study(tmp_path / "study").cells) == len(study.cells)


# Export


def test_write_published__gives_the_file_back(tmp_path, table, models):
    study = import_published(table, tmp_path / "study", models)
    assert write_published(study, tmp_path / "again.csv").read_bytes() == table.read_bytes()
    again = import_published(tmp_path / "again.csv", tmp_path / "again", write_models(study, tmp_path / "m.csv"))
    kept = [name for name in study.cells.columns if name != "key"]
    pd.testing.assert_frame_equal(again.cells[kept], study.cells[kept])
    about = ["model", "category", "label", "documented_accuracy"]
    pd.testing.assert_frame_equal(again.models[about], study.models[about])


def test_write_published__rows_keep_the_order_of_the_file(tmp_path, models):
    rows = rows_of()
    np.random.default_rng(3).shuffle(rows)
    table = write_table(tmp_path / "t.csv", rows)
    study = import_published(table, tmp_path / "study", models)
    assert write_published(study, tmp_path / "again.csv").read_bytes() == table.read_bytes()


def test_write_published__names_with_commas_quotes_and_other_letters(tmp_path):
    names = ["a,b", 'q"uote', "é/ß", "=1+1"]
    table = write_table(tmp_path / "t.csv", rows_of(names))
    study = import_published(table, tmp_path / "study", models_file(tmp_path / "m.csv"))
    assert study.models["model"].to_list() == names
    again = write_published(study, tmp_path / "again.csv")
    assert again.read_text() == table.read_text().replace("=1+1", "'=1+1"), "no spreadsheet takes it for a formula"
    read = import_published(again, tmp_path / "read", models_file(tmp_path / "m.csv"))
    assert read.models["model"].to_list() == names
    assert write_published(read, tmp_path / "third.csv").read_bytes() == again.read_bytes()


def test_write_published__measured_cells(tmp_path):
    cells = [
        {"model": "m", "layer": layer, "trial": trial, "cosine": 0.1 + 0.2 * trial, "l1": 0.3, "l2": 0.2, "js": 0.1,
         "loss": 2.5, "top1_accuracy": 0.55, "top5_accuracy": 0.7, "recovered_accuracy": 0.9}
        for layer in ("conv1", "fc") for trial in (0, 1)
    ]  # fmt: skip
    cells[3] |= {"status": "not_finite", **dict.fromkeys(cells[3].keys() - {"model", "layer", "trial"}, math.nan)}
    cells.append({"model": "m", "layer": "fc", "trial": 0, "reset": "zero", "cosine": 0.9})
    study = measured(tmp_path / "study", cells)
    table = write_published(study, tmp_path / "out.csv")
    rows = list(csv.DictReader(table.open()))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 4, "cells of another reset are in a table that cannot name it"
    assert rows[1] == {
        "top1_acc": repr(100 * 0.55), "top5_acc": "70.0", "loss": "2.5", "batch_acc": "", "layer": "model.conv1",
        "pred_cos_sim": repr(1 - (0.1 + 0.2)), "pred_l1_err": "0.3", "pred_l2_err": "0.2", "pred_ce_loss": "",
        "trial": "1.0", "recovered_acc": "0.9", "model_id": "m",
    }  # fmt: skip
    assert (rows[3]["pred_cos_sim"], rows[3]["loss"], rows[3]["trial"]) == ("", "", "1.0")
    models = write_models(study, tmp_path / "models.csv")
    again = import_published(table, tmp_path / "again", models)
    assert write_published(again, tmp_path / "again.csv").read_bytes() == table.read_bytes()
    assert again.cells["cosine"].to_numpy() == pytest.approx([0.1, 0.1 + 0.2, 0.1, math.nan], nan_ok=True, abs=1e-15)


def test_write_published__without_labels(tmp_path):
    study = measured(tmp_path / "study", [{"model": "m", "layer": "fc", "trial": 0, "cosine": 0.25}])
    table = write_published(study, tmp_path / "out.csv")
    (row,) = csv.DictReader(table.open())
    assert (row["pred_cos_sim"], row["top1_acc"], row["loss"]) == ("0.75", "", "")
    assert (
        import_published(table, tmp_path / "again", write_models(study, tmp_path / "m.csv")).cells["cosine"][0] == 0.25
    )


def test_write_published__refuses_a_study_of_other_resets(tmp_path):
    cells = [{"model": "m", "layer": "fc", "trial": 0, "reset": "zero", "cosine": 0.25}]
    with pytest.raises(StudyError, match=r"no cell of the reset 'rerandomize'.*Its resets: zero"):
        write_published(measured(tmp_path / "study", cells), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_write_published__a_folder_that_is_not_there(tmp_path, table, models):
    study = import_published(table, tmp_path / "study", models)
    with pytest.raises(StudyError, match=r"cannot be written \(No such file or directory\)"):
        write_published(study, tmp_path / "nowhere" / "out.csv")


# The released table


@released
def test_released__export_is_the_file_byte_by_byte(whole, tmp_path):
    assert write_published(whole, tmp_path / "out.csv").read_bytes() == (RELEASED / "results.csv").read_bytes()


@released
def test_released__is_recognised(whole):
    assert whole.record["origin"]["source"].startswith("paulgavrikov/layer_criticality at commit c123a9f")
    assert set(whole.cells["n_images"]) == {10_000}
    assert (whole.record["baseline"], whole.record["leave_out"]) == ("tv_resnet50", ["freezing"])
    stages = list(dict.fromkeys(whole.cells["stage"]))
    assert stages == ["model.conv1", *(f"model.layer{n}" for n in (1, 2, 3, 4)), "model.fc"]


@released
def test_released__models_are_written_as_they_are_published(whole, tmp_path):
    ours = write_models(whole, tmp_path / "models.csv").read_text().splitlines()
    theirs = (RELEASED / "models.csv").read_text().splitlines()
    assert sorted(ours) == sorted(theirs)


@released
def test_released__the_zoo_knows_the_same_models(whole, tmp_path):
    from_zoo = import_published(RELEASED / "results.csv", tmp_path / "study").models.set_index("model")
    for row in whole.models.to_dict("records"):
        other = from_zoo.loc[row["model"]]
        assert other["category"] == row["category"]
        assert other["documented_accuracy"] == pytest.approx(row["documented_accuracy"], nan_ok=True)
