"""The option --by of `layercrit measure` and `layercrit show`."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import layercrit
from layercrit.cli.root import cli
from layercrit.measurement import Measurement
from small_subjects import PIXELS, QUIET, two_layers

LABELS = [0, 1, 2, 0, 1, 0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    layercrit.measure(two_layers(), PIXELS, labels=LABELS, trials=3, distances=[], **QUIET).save(folder)
    return folder


def call(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("by", "method"),
    [("class", lambda m: m.by_class()), ("prediction", lambda m: m.by_class("prediction")),
     ("correctness", lambda m: m.by_correctness()), ("image", lambda m: m.by_image())],
)  # fmt: skip
def test_show__by_writes_the_table(saved, by, method):
    result = call("show", saved, "--by", by)
    assert result.exit_code == 0, result.output
    found, expected = pd.read_csv(saved / f"by_{by}.csv"), method(Measurement.load(saved))
    assert list(found.columns) == list(expected.columns)
    for column in expected.select_dtypes("float64"):
        np.testing.assert_allclose(found[column], expected[column], rtol=0, atol=1e-12)
        assert f"{expected[column].iloc[0]:.3f}" in result.stdout
    assert (saved / f"by_{by}.png").exists() == (by in ("class", "prediction"))


def test_show__json_has_every_row(saved):
    result = call("show", saved, "--by", "class", "--json")
    rows = json.loads(result.stdout)["by_class"]
    expected = Measurement.load(saved).by_class()
    assert [row["criticality"] for row in rows] == pytest.approx(expected["criticality"].to_list(), abs=1e-12)
    assert [row["low"] is None for row in rows] == expected["low"].isna().to_list()


def test_show__long_table_has_the_ends_of_each_layer(saved, monkeypatch):
    monkeypatch.setattr("layercrit.cli.by_images._MOST_ROWS", 5)
    monkeypatch.setattr("layercrit.cli.by_images._EACH", 1)
    result = call("show", saved, "--by", "class")
    table = Measurement.load(saved).by_class().sort_values("criticality", ascending=False)
    for layer in ("1", "3"):
        own = table[table["layer"] == layer]
        printed = [
            line.split()[1]
            for line in result.stdout.partition("By class")[2].splitlines()
            if line.startswith(f"{layer} ")
        ]
        assert printed == [own["class"].iloc[0], own["class"].iloc[-1]]
    assert any(line.startswith("4 of 6 rows") for line in result.stdout.splitlines())


def test_show__without_labels_names_the_way_out(tmp_path, monkeypatch):
    layercrit.measure(two_layers(), PIXELS, trials=1, distances=[], **QUIET).save(tmp_path)
    result = call("show", tmp_path, "--by", "class")
    assert isinstance(result.exception, layercrit.LayercritError)
    assert "--by prediction" in str(result.exception)
    assert call("show", tmp_path, "--by", "prediction").exit_code == 0


def test_show__names_of_classes_are_no_formulas(tmp_path):
    measurement = layercrit.measure(two_layers(), PIXELS, labels=LABELS, trials=2, distances=[], **QUIET)
    measurement.images.class_names[0] = "=1+1"
    measurement.save(tmp_path)
    assert call("show", tmp_path, "--by", "class").exit_code == 0
    with (tmp_path / "by_class.csv").open(newline="") as file:
        names = {row["class"] for row in csv.DictReader(file)}
    assert names == {"'=1+1", "1", "2"}


def test_measure__by_prints_the_table_after_that_of_layers(tmp_path):
    np.savez(tmp_path / "images.npz", images=PIXELS.permute(0, 2, 3, 1).numpy(), labels=np.array(LABELS))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    result = call(
        "measure", "py:small_subjects:build_two_layers", "--images", tmp_path / "images.npz", "--trials", 2, "--out",
        tmp_path / "out", "--distances", "cosine", "--classes", tmp_path / "classes.txt", "--by", "class",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    layers, _, classes = result.stdout.partition("By class")
    assert "mean criticality" in layers
    table = Measurement.load(tmp_path / "out").by_class()
    assert list(table["class"][:3]) == ["ant", "bee", "cat"]
    for row in table.to_dict("records"):
        assert f"{row['criticality']:.3f}" in classes
