"""The heat map of layers and classes: which classes are shown, in which order, and what is written about them."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from layercrit.errors import ProtocolError
from layercrit.figures.class_maps import class_map, classes_by_similarity


def table(values, counts=None, classes=None):
    """Rows as `by_class` returns them, of criticality ``(n_classes, n_layers)``."""
    values = np.asarray(values, float)
    classes = classes or [f"class {number}" for number in range(len(values))]
    counts = counts or [5] * len(values)
    rows = [
        {"layer": f"layer{layer}.conv", "class": name, "n_images": n, "criticality": row[layer]}
        for layer in range(values.shape[1])
        for name, n, row in zip(classes, counts, values, strict=True)
    ]
    return pd.DataFrame(rows)


def random_values(n_classes, n_layers=6, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (n_classes, n_layers))


def test_classes_by_similarity__only_permutes_the_classes():
    values = random_values(12)
    found = classes_by_similarity(table(values))
    assert sorted(found.index) == sorted(f"class {number}" for number in range(12))
    assert list(found.columns) == [f"layer{number}.conv" for number in range(6)]
    for name, row in found.iterrows():
        assert row.tolist() == values[int(name.split()[1])].tolist()


def test_classes_by_similarity__puts_like_classes_next_to_each_other():
    kinds = random_values(3, seed=1)
    values = (kinds[np.arange(15) % 3] + random_values(15, seed=2) / 50).clip(0, 1)
    order = [int(name.split()[1]) % 3 for name in classes_by_similarity(table(values)).index]
    assert sum(one != other for one, other in pairwise(order)) == 2


def test_classes_by_similarity__neighbours_are_as_like_as_the_best_order_of_the_tree_allows():
    """On a line the best order is that of the line, in one direction or the other."""
    values = np.linspace(0, 1, 9)[np.random.default_rng(3).permutation(9)][:, None]
    found = classes_by_similarity(table(values)).to_numpy().ravel()
    assert found.tolist() in (sorted(found), sorted(found, reverse=True))


def test_classes_by_similarity__keeps_those_that_are_least_like_the_mean():
    values = np.full((9, 4), 0.5) + random_values(9, 4) / 100
    values[[2, 7]] = [[0.1, 0.9, 0.1, 0.9], [0.9, 0.1, 0.9, 0.1]]
    assert sorted(classes_by_similarity(table(values), most=2).index) == ["class 2", "class 7"]


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_classes_by_similarity__few_classes(n_classes):
    assert len(classes_by_similarity(table(random_values(n_classes)))) == n_classes


def test_classes_by_similarity__what_is_not_known_counts_as_the_mean():
    values = random_values(5)
    values[:, 2], values[3, 1] = np.nan, np.nan
    found = classes_by_similarity(table(values))
    assert found["layer2.conv"].isna().all()
    assert len(found) == 5


def texts(figure, gid):
    return [text.get_text() for text in figure.axes[0].texts if text.get_gid() == gid]


def test_class_map__names_counts_and_accuracies():
    figure = class_map(table(random_values(3), counts=[5, 7, 9]), accuracy={"class 0": 0.5, "class 1": 1.0})
    about = dict(zip(texts(figure, "model"), texts(figure, "accuracy"), strict=True))
    assert about == {"class 0 (5)": "50.0", "class 1 (7)": "100.0", "class 2 (9)": "–"}  # noqa: RUF001
    assert "mean ± SD over classes" in [text.get_text() for text in figure.axes[0].texts]
    alike = class_map(table(random_values(3)))
    assert sorted(texts(alike, "model")) == ["class 0", "class 1", "class 2"]
    assert texts(alike, "accuracy") == []


def test_class_map__says_how_many_classes_are_left_out():
    figure = class_map(table(random_values(70, 3)))
    assert len(texts(figure, "model")) == 60
    assert texts(figure, "quantity") == ["criticality, 60 of 70 classes, least like the mean (%)"]


def test_class_map__names_from_outside_are_shown_as_they_are():
    hostile = ["$x^2$", "<b>bold</b>", "a" * 200]
    assert "$x^2$" in texts(class_map(table(random_values(3), classes=hostile)), "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns="n_images"), "no column 'n_images'"),
        (lambda rows: rows.iloc[:0], "no rows"),
        (lambda rows: pd.concat([rows, rows]), "more than once"),
    ],
)
def test_class_map__tables_that_do_not_fit(change, message):
    with pytest.raises(ProtocolError, match=message):
        class_map(change(table(random_values(3))))
