import itertools
import json
import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test, spearmanr

from layercrit.comparison import about_models, accuracy_of, compare
from layercrit.errors import StudyError
from layercrit.study.published import import_published
from layercrit.study.store import ModelRow
from layercrit.study.tables import load_study
from published_results import LAYERS, MODELS, RELEASED, measured, released, rows_of, write_models, write_table


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    table, models = write_table(folder / "t.csv", rows_of()), write_models(folder / "m.csv")
    return import_published(table, folder / "study", models)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "study"
    return import_published(RELEASED / "results.csv", folder, RELEASED / "models.csv")


def cells(models, layers, trials=2, **means):
    """Cells of a study; the cosine distance rises with model, layer and trial unless it is given."""
    return [
        {"model": model, "layer": layer, "trial": trial, "cosine": 0.1 + 0.1 * i + 0.05 * j + 0.01 * trial, **means}
        for i, model in enumerate(models) for j, layer in enumerate(layers) for trial in range(trials)
    ]  # fmt: skip


def leaves(expected, found, path=""):
    """Pairs of what is expected and found at every leaf of nested mappings."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            yield from leaves(value, found[key], f"{path}/{key}")
    else:
        yield path, expected, found


# The released table


@released
def test_compare__every_figure_of_the_published_study(whole):
    expected = json.loads((RELEASED / "expected.json").read_text())
    found = compare(whole).to_dict()
    checked = list(leaves(expected, found))
    assert len(checked) > 100
    for path, wanted, value in checked:
        if isinstance(wanted, float):
            assert value == pytest.approx(wanted, rel=1e-9, abs=1e-12), path
        else:
            assert value == wanted, path
    for key in ("category", "model", "layer"):
        name = f"mean_criticality_percent_by_{key}"
        assert found[name].keys() == expected[name].keys()
    assert found["left_out"] == ["resnet50_frozen_random"]


@released
def test_compare__a_model_without_accuracy_is_in_no_correlation(whole):
    everyone = compare(whole, leave_out=[])
    assert len(everyone.models) == 51
    assert everyone.correlations["n"][0] == 50
    assert any("accuracy is not known: resnet50_frozen_random." in note for note in everyone.notes)


@released
def test_compare__loads_and_compares_within_two_seconds(whole):
    compare(whole)  # imports
    started = time.process_time()
    compare(load_study(whole.folder)).to_dict()
    assert time.process_time() - started < 2


# Slow twins


def test_compare__tables_agree_with_a_loop(small):
    comparison = compare(small)
    names = [name for name in MODELS if name != "frozen"]
    assert comparison.criticality.index.to_list() == names
    assert comparison.criticality.columns.to_list() == list(LAYERS)
    values = {(r["model_id"], r["layer"], int(float(r["trial"]))): 1 - float(r["pred_cos_sim"]) for r in rows_of()}
    for name, layer in itertools.product(names, LAYERS):
        of_cell = [values[name, layer, trial] for trial in range(3)]
        mean = sum(of_cell) / 3
        assert comparison.criticality.loc[name, layer] == pytest.approx(mean, abs=1e-12)
        spread = math.sqrt(sum((value - mean) ** 2 for value in of_cell) / 2)
        assert comparison.sd_trials.loc[name, layer] == pytest.approx(spread, abs=1e-12)
        of_baseline = sum(values["tv_resnet50", layer, trial] for trial in range(3)) / 3
        assert comparison.difference.loc[name, layer] == pytest.approx(mean - of_baseline, abs=1e-12)
        assert comparison.depth.loc[name, layer] == LAYERS.index(layer)
    for name in names:
        row = comparison.criticality.loc[name].to_list()
        mass = sum(index / 5 * value for index, value in enumerate(row)) / sum(row)
        assert comparison.models.loc[name, "centre_of_mass"] == pytest.approx(mass, abs=1e-12)
        assert comparison.models.loc[name, "criticality"] == pytest.approx(sum(row) / 6, abs=1e-12)
        assert comparison.stages.loc[name].to_list() == pytest.approx([row[0], sum(row[1:5]) / 4, row[5]], abs=1e-12)
    assert comparison.stages.columns.to_list() == ["model.conv1", "model.layer1", "model.fc"]
    a, b = (comparison.models.loc[name, "criticality"] for name in ("model_a", "model_b"))
    assert comparison.categories.loc["augmentation"].to_list() == [2, pytest.approx((a + b) / 2)]
    assert comparison.layers["criticality"].to_list() == pytest.approx(comparison.criticality.mean().to_list())


def ranks(values):
    return [1 + sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


def spearman(x, y):
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def kendall(x, y):
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    untied = [sum(sign[which] != 0 for sign in signs) for which in (0, 1)]
    return float(sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1]))


def test_compare__correlations_agree_with_their_formulas(tmp_path):
    accuracies = {"a": 0.7, "b": 0.8, "c": 0.8, "d": 0.6, "e": 0.9, "f": 0.65, "g": 0.75}
    generator = np.random.default_rng(4)
    made = [
        {"model": name, "layer": "fc", "trial": trial, "cosine": generator.random()}
        for name in accuracies for trial in (0, 1)
    ]  # fmt: skip
    models = [
        ModelRow(name, name, "even" if i % 2 else "odd", name, a) for i, (name, a) in enumerate(accuracies.items())
    ]
    comparison = compare(measured(tmp_path / "study", made, models=models))
    found = comparison.correlations.set_index("method")
    for without in (None, "even", "odd"):
        some = comparison.models[comparison.models["category"] != without]
        x, y = some["criticality"].to_list(), some["accuracy"].to_list()
        for method, formula in (("spearman", spearman), ("kendall", kendall)):
            rows = found.loc[method]
            row = rows[[name is without or name == without for name in rows["without"]]].iloc[0]
            assert row["statistic"] == pytest.approx(formula(x, y), abs=1e-12)
            assert row["n"] == len(some)
            assert 0 < row["pvalue"] <= 1
    dictionary = comparison.to_dict()
    assert dictionary["spearman_all"]["n"] == 7
    assert dictionary["spearman_without_adversarial"] is None
    assert [row["without"] for row in dictionary["correlations"]] == [None, None, "even", "even", "odd", "odd"]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3, 4], [2, 1, 4, 3]),
        ([1, 1, 2, 3, 3], [5, 4, 4, 4, 1]),
        ([0.3, 0.1, 0.1, 0.9, 0.4, 0.4], [0.7, 0.7, 0.8, 0.75, 0.6, 0.7]),
    ],
    ids=["three in order", "four", "ties", "more ties"],
)
def test_correlations__p_value_of_few_models_is_over_all_their_orders(tmp_path, x, y):
    def size(other):
        return abs(spearmanr(x, other).statistic)

    exact = permutation_test((y,), size, permutation_type="pairings", n_resamples=np.inf, alternative="greater")
    names = [f"m{i}" for i in range(len(x))]
    made = [
        {"model": name, "layer": "fc", "trial": t, "cosine": v / 10}
        for name, v in zip(names, x, strict=True)
        for t in (0, 1)
    ]
    models = [ModelRow(name, name, None, name, v / 10) for name, v in zip(names, y, strict=True)]
    found = compare(measured(tmp_path / "study", made, models=models)).correlations.set_index("method").loc["spearman"]
    assert abs(found["statistic"]) == pytest.approx(size(y), abs=1e-12)
    assert found["pvalue"] == pytest.approx(exact.pvalue, abs=1e-12)


def test_correlations__p_value_of_many_models_is_scipy_s(tmp_path):
    generator = np.random.default_rng(6)
    x, y = generator.random(9), generator.random(9)
    names = [f"m{i}" for i in range(9)]
    made = [{"model": name, "layer": "fc", "trial": 0, "cosine": v} for name, v in zip(names, x, strict=True)]
    models = [ModelRow(name, name, None, name, v) for name, v in zip(names, y, strict=True)]
    found = compare(measured(tmp_path / "study", made, models=models)).correlations.set_index("method").loc["spearman"]
    assert found["pvalue"] == pytest.approx(spearmanr(np.float32(x), y).pvalue, abs=1e-6)


def test_compare__no_correlation_of_two_models_or_of_one_accuracy(tmp_path):
    two = compare(measured(tmp_path / "two", cells("ab", ["fc"])))
    assert two.correlations["statistic"].isna().all()
    assert two.to_dict()["spearman_all"] == {"statistic": None, "pvalue": None, "n": 2}
    same = compare(measured(tmp_path / "same", cells("abcd", ["fc"])))  # all have 0.5
    assert same.correlations["statistic"].isna().all()


# Which accuracy


def with_accuracies(folder, documented, measured_ones):
    models = [
        ModelRow(name, name, None, name, one, {"predictions": {"top1_accuracy": other}})
        for name, one, other in zip("abc", documented, measured_ones, strict=True)
    ]
    return measured(folder, cells("abc", ["fc"]), models=models)


@pytest.mark.parametrize(
    ("documented", "measured_ones", "kind", "known"),
    [
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "documented", [0.1, 0.2, 0.3]),
        ([0.1, None, 0.3], [0.4, 0.5, 0.6], "measured", [0.4, 0.5, 0.6]),
        ([0.1, None, 0.3], [0.4, None, 0.6], "documented", [0.1, None, 0.3]),
        ([None, None, 0.3], [0.4, None, 0.6], "measured", [0.4, None, 0.6]),
        ([None, None, None], [None, None, None], "documented", [None, None, None]),
    ],
)
def test_compare__accuracy(tmp_path, documented, measured_ones, kind, known):
    study = with_accuracies(tmp_path / "study", documented, measured_ones)
    comparison = compare(study)
    assert comparison.accuracy == kind == accuracy_of(study.models)[0]
    dictionary = comparison.to_dict()
    assert [dictionary["models"][name]["accuracy"] for name in "abc"] == known
    told = [note for note in comparison.notes if "accuracy" in note]
    if None not in known:
        assert told == []
    elif any(known):
        assert told == [f"Not in the correlations, since their {kind} accuracy is not known: b."]
    else:
        assert told == ["No accuracy is known, so there are no correlations with it."]


# Baseline and what is left out


def test_compare__baseline(small):
    assert compare(small).baseline == "tv_resnet50"
    against = compare(small, baseline="model_c")
    assert against.baseline == "model_c"
    assert (against.difference.loc["model_c"] == 0).all()
    assert against.models.loc["model_c", "difference"] == 0


def test_compare__no_baseline(tmp_path):
    comparison = compare(measured(tmp_path / "study", cells("ab", ["fc"])))
    assert comparison.baseline is None
    assert comparison.difference is None
    assert comparison.models["difference"].isna().all()
    assert comparison.to_pandas()["difference"].isna().all()
    assert comparison.to_dict()["difference_by_model_and_layer"] is None


def test_compare__the_studys_own_baseline_left_out(small):
    comparison = compare(small, leave_out=["baseline"])
    assert comparison.difference is None
    assert any("no differences to the baseline tv_resnet50" in note for note in comparison.notes)


def test_compare__leave_out_categories_and_models(small):
    assert compare(small).left_out == ("frozen",)
    assert compare(small, leave_out=[]).left_out == ()
    comparison = compare(small, leave_out=["augmentation", "frozen"])
    assert comparison.left_out == ("model_a", "model_b", "frozen")
    assert comparison.models.index.to_list() == ["tv_resnet50", "model_c"]
    assert "model_a" not in comparison.to_dict()["models"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"baseline": "model_d"}, r"has no model 'model_d'\. Did you mean 'model_"),
        ({"baseline": "frozen"}, r"baseline 'frozen' is left out or has no finished cell.*tv_resnet50, model_a"),
        ({"leave_out": ["freezin"]}, r"no model or category 'freezin' .* Did you mean 'freezing'"),
        ({"leave_out": ["baseline", "augmentation", "contrastive", "freezing"]}, r"No model of the study .* is left"),
        ({"reset": "zero"}, r"has no reset 'zero'\. Known: 'rerandomize'"),
    ],
)  # fmt: skip
def test_compare__refuses(small, options, text):
    with pytest.raises(StudyError, match=text):
        compare(small, **options)


def test_compare__what_is_no_study_is_refused(small):
    for given in (small.folder, str(small.folder), small.models):
        with pytest.raises(StudyError, match=r"compare takes a study, not a (\w*Path|str|DataFrame)\. .*load_study"):
            compare(given)


# Models that differ in their layers


def test_compare__wrappers_before_names_are_no_difference(tmp_path):
    made = cells(["plain"], ["conv1", "layer1.0.conv1", "fc"]) + cells(
        ["wrapped"], ["module.model.conv1", "module.model.layer1.0.conv1", "module.model.fc"]
    )
    for cell in made[6:]:
        cell["stage"] = cell["layer"].removesuffix(".0.conv1")
    study = measured(tmp_path / "study", made)
    comparison = compare(study, baseline="wrapped")
    assert comparison.criticality.columns.to_list() == ["conv1", "layer1.0.conv1", "fc"]
    assert comparison.layers["stage"].to_list() == ["conv1", "layer1", "fc"]
    assert comparison.difference.loc["plain"].to_list() == pytest.approx([0.0, 0.0, 0.0])
    assert not any("differ in their layers" in note for note in comparison.notes)


def test_compare__only_common_layers_and_a_note(tmp_path):
    made = (
        cells(["a"], ["conv1", "extra", "fc"]) + cells(["b"], ["conv1", "fc"]) + cells(["c"], ["conv1", "extra", "fc"])
    )
    comparison = compare(measured(tmp_path / "study", made))
    assert comparison.criticality.columns.to_list() == ["conv1", "fc"]
    assert comparison.models.loc["a", "criticality"] == pytest.approx((0.105 + 0.205) / 2)
    assert comparison.depth.loc["a"].to_list() == [0, 1]
    note = (
        "The models differ in their layers, which are paired by name, wherever in the network they lie: compared are "
        "the 2 that all models have. Left out: 1 of the 3 layers of a, c (extra)."
    )
    assert note in comparison.notes


def test_compare__a_prefix_that_not_all_names_carry_stays(tmp_path):
    made = cells(["a"], ["backbone.conv1", "fc"]) + cells(["b"], ["backbone.conv1"])
    assert compare(measured(tmp_path / "study", made)).criticality.columns.to_list() == ["backbone.conv1"]


def test_compare__no_common_layer(tmp_path):
    study = measured(tmp_path / "study", cells(["a"], ["conv1"]) + cells(["b"], ["stem"]))
    with pytest.raises(StudyError, match=r"no layer in common \(a: conv1; b: stem\)"):
        compare(study)


# What is missing


def test_compare__cells_that_are_not_ok_are_named_and_in_no_mean(tmp_path):
    made = cells("ab", ["conv1", "conv2", "fc"])
    made[2] |= {"status": "not_finite", "cosine": math.nan}
    comparison = compare(measured(tmp_path / "study", made, record={"baseline": "a"}))
    assert comparison.criticality.loc["a"].isna().to_list() == [False, True, False]
    assert comparison.models.loc["a", "criticality"] == pytest.approx((0.105 + 0.205) / 2)
    assert comparison.models["n_layers"].to_list() == [2, 3]
    assert comparison.models.loc["b", "difference"] == pytest.approx(0.1)  # over conv1 and fc
    note = "a: its means are over 2 of 3 layers; left out, since cells are not ok (1 not_finite): conv2."
    assert note in comparison.notes
    dictionary = comparison.to_dict()
    assert dictionary["difference_by_model_and_layer"]["b"]["conv2"] is None
    json.dumps(dictionary, allow_nan=False)


def test_compare__missing_trials_and_failures_are_named(tmp_path):
    made = cells(["a"], ["conv1", "fc"]) + cells(["b"], ["conv1", "fc"], trials=1)
    models = [ModelRow(name, name) for name in "abc"]
    failures = [("b", 1, "ModelError: out of memory"), ("c", 0, "no such file")]
    comparison = compare(measured(tmp_path / "study", made, models=models, failures=failures))
    assert comparison.models.index.to_list() == ["a", "b"]
    assert list(comparison.notes[:4]) == [
        "Not compared, since they have no cell that is ok: c.",
        "Measured in fewer than the 2 trials of the study: b (1).",
        "Failed: b, trial 1 (ModelError: out of memory).",
        "Failed: c, trial 0 (no such file).",
    ]
    about_others = compare(measured(tmp_path / "left", made, models=models, failures=failures), leave_out=["b", "c"])
    assert not any("b" in note.split() or "Failed" in note for note in about_others.notes)


def test_compare__one_trial_is_enough_without_chance(tmp_path):
    comparison = compare(measured(tmp_path / "study", cells("ab", ["fc"], trials=1), random_trials=False))
    assert not any("trials" in note for note in comparison.notes)
    assert comparison.sd_trials.isna().all(axis=None)
    assert comparison.to_dict()["mean_of_cell_std_percent"] is None


def test_compare__nothing_finished(tmp_path):
    study = measured(tmp_path / "study", [], models=[ModelRow("a", "a")])
    with pytest.raises(StudyError, match="has no finished cell"):
        compare(study)


def test_compare__one_layer_has_no_centre_and_no_criticality_none_either(tmp_path):
    assert compare(measured(tmp_path / "one", cells("a", ["fc"]))).models["centre_of_mass"].isna().all()
    untouched = [cell | {"cosine": 0.0} for cell in cells("a", ["conv1", "fc"])]
    assert compare(measured(tmp_path / "zero", untouched)).models["centre_of_mass"].isna().all()


# Caution about peaked predictions


def test_compare__caution(tmp_path, small):
    assert "how peaked" in compare(small).caution
    one_category = [ModelRow(name, name, "same") for name in "ab"]
    assert compare(measured(tmp_path / "one", cells("ab", ["fc"]), models=one_category)).caution is None
    matched = compare(measured(tmp_path / "matched", cells("ab", ["fc"], cosine_matched=0.3)))
    assert matched.caution is None
    assert matched.models["criticality_matched"].to_list() == pytest.approx([0.3, 0.3])
    some = [cell | {"cosine_matched": 0.3 if cell["model"] == "a" else math.nan} for cell in cells("ab", ["fc"])]
    assert compare(measured(tmp_path / "some", some)).caution is not None


# Tables


def test_to_pandas__one_row_per_model_and_layer(small):
    comparison = compare(small)
    table = comparison.to_pandas()
    assert len(table) == 4 * len(LAYERS)
    for row in table.to_dict("records"):
        place = row["model"], row["layer"]
        assert row["criticality"] == comparison.criticality.loc[place]
        assert row["difference"] == comparison.difference.loc[place]
        assert row["sd_trials"] == comparison.sd_trials.loc[place]
        assert row["depth"] == comparison.depth.loc[place]
        assert row["stage"] == comparison.layers.loc[row["layer"], "stage"]
        assert row["category"] == MODELS[row["model"]][0]


def test_to_dict__is_plain_json(small):
    comparison = compare(small, leave_out=[])
    again = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert (again["rows"], again["models_in_file"], again["models_in_figures"]) == (90, 5, 5)
    assert again["models"]["frozen"]["accuracy"] is None
    assert again["models"]["frozen"]["n_layers"] == 6
    assert again["criticality_by_model_and_stage"]["model_a"].keys() == {"model.conv1", "model.layer1", "model.fc"}
    assert repr(comparison) == "<Comparison of 5 models over 6 layers, baseline tv_resnet50>"


def test_compare__is_what_the_study_offers(small):
    pd.testing.assert_frame_equal(
        small.compare(baseline="model_a").difference, compare(small, baseline="model_a").difference
    )


def test_about_models__adversarially_trained_ones_stand_by_norm_and_eps_among_themselves(tmp_path):
    budgets = {"base": (None, None), "linf 8": ("linf", 8.0), "l2 3": ("l2", 3.0), "mix": (None, None),
               "linf 4": ("linf", 4.0), "l2 10": ("l2", 10.0)}  # fmt: skip
    models = [ModelRow(name, name, attack_norm=norm, eps=eps) for name, (norm, eps) in budgets.items()]
    study = measured(tmp_path, cells(budgets, ["conv1", "fc"]), models=models)
    table = about_models(study, compare(study))
    assert table["model"].to_list() == ["base", "l2 3", "l2 10", "mix", "linf 4", "linf 8"]
    assert table["eps"].fillna(0).to_list() == [0, 3, 10, 0, 4, 8]
    means = study.by_model().set_index("model")
    assert table["low"].to_list() == means.loc[table["model"], "low"].to_list()


def test_compare__says_where_number_formats_differ(tmp_path):
    cells = [{"model": model, "layer": layer, "trial": 0, "cosine": 0.5} for model in "abc" for layer in ("x", "y")]
    for name, formats in (("one", "float32"), ("two", "bfloat16")):
        models = [
            ModelRow(model, f"py:{model}", "others", model, 0.5, {"dtype": formats if model == "b" else "float32"})
            for model in "abc"
        ]
        told = [note for note in compare(measured(tmp_path / name, cells, models=models)).notes if "formats" in note]
        assert bool(told) == (name == "two")
    assert "(bfloat16: b; float32: a, c)" in told[0]
