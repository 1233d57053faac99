"""Differences between models and categories, against plain loops over the study's own numbers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layercrit.comparison import compare
from layercrit.contrasts import benjamini_hochberg, contrasts_of_samples, crossed_contrasts, holm
from layercrit.differences import differences
from layercrit.errors import StudyError
from layercrit.study.merging import merge_studies
from layercrit.study.published import import_published
from layercrit.study.store import ModelRow, Store
from layercrit.study.tables import load_study
from published_results import LAYERS, MODELS, RELEASED, measured, released, rows_of, write_models, write_table

CATEGORIES = ("baseline", "augmentation", "augmentation", "contrastive")
NAMES = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "fc")


def cells_of(models, seed=0):
    """Three trials of each layer of some models, whose values differ."""
    generator = np.random.default_rng(seed)
    cells = []
    for model in models:
        for layer in NAMES:
            middle = generator.uniform(0.3, 0.7)
            values = middle + generator.normal(0, 0.02, 3)
            cells += [
                {"model": model, "layer": layer, "trial": t, "cosine": value, "cosine_matched": 0.9 * value}
                for t, value in enumerate(values)
            ]
    return cells


def model_rows(names, categories):
    known = {"random_trials": {"rerandomize": True}, "probe_set": "p"}
    return [ModelRow(name, f"py:{name}", one, None, 0.5, known) for name, one in zip(names, categories, strict=True)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A study of four models, with distances of every image."""
    names = ("m0", "m1", "m2", "m3")
    return measured(
        tmp_path_factory.mktemp("small"), cells_of(names), models=model_rows(names, CATEGORIES),
        record={"baseline": "m0"}, n_images=12, noise=0.2,
    )  # fmt: skip


@pytest.fixture
def means(tmp_path):
    """An imported study, of which means are known alone."""
    table = write_table(tmp_path / "t.csv", rows_of())
    return import_published(table, tmp_path / "study", write_models(tmp_path / "m.csv"))


def crossed(study, weights, layer, distance="cosine"):
    """The contrast of models by name -> weight, of the distances of single images."""
    values = np.stack([study.per_image(model, layer, distance=distance) for model in weights])
    return crossed_contrasts(values, np.array([list(weights.values())]))


def check(rows, expected_of):
    assert len(rows)
    for row in rows.to_dict("records"):
        expected = expected_of(row["layer"])
        actual = [row[name] for name in ("difference", "low", "high", "p_value")]
        wanted = [expected.mean[0], expected.low[0], expected.high[0], expected.p_value[0]]
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-9)


# --- what is compared -------------------------------------------------------------------------------------------------


def test_differences__each_model_and_the_baseline(small):
    found = differences(small)
    comparison = compare(small)
    assert list(found.summary()["first"]) == ["m1", "m2", "m3"]
    assert set(found.table["second"]) == {"m0"}
    expected = pd.concat([comparison.difference.loc[name] for name in ("m1", "m2", "m3")])
    np.testing.assert_allclose(found.table["difference"], expected, atol=1e-6)
    assert list(found.table["layer"]) == 3 * list(comparison.criticality.columns)
    assert list(found.table["stage"].unique()) == ["conv1", "layer1", "fc"]
    assert set(found.table["covers"]) == {"trials and images"}
    for model in ("m1", "m3"):
        check(
            found.table[found.table["first"] == model],
            lambda layer, model=model: crossed(small, {model: 1, "m0": -1}, layer),
        )


def test_differences__all_pairs_and_named_ones(small):
    every = differences(small, pairs="all", family="pair").table
    listed = every[["first", "second"]].drop_duplicates().to_numpy().tolist()
    assert listed == [["m0", "m1"], ["m0", "m2"], ["m0", "m3"], ["m1", "m2"], ["m1", "m3"], ["m2", "m3"]]
    named = differences(small, pairs=[("m2", "m1"), ("m3", "m1")], family="pair").table
    turned = every[(every["first"] == "m1") & (every["second"] == "m2")]
    of_named = named[named["first"] == "m2"]
    np.testing.assert_allclose(of_named["difference"], -turned["difference"])
    np.testing.assert_allclose(of_named["low"], -turned["high"])
    np.testing.assert_allclose(of_named["p_value"], turned["p_value"], rtol=1e-9)


def test_differences__at_the_matched_temperature(small):
    found = differences(small, pairs=[("m1", "m3")], matched=True)
    check(found.table, lambda layer: crossed(small, {"m1": 1, "m3": -1}, layer, "cosine_matched"))


def test_differences__categories_of_these_models(small):
    found = differences(small, between="categories", pairs=[("augmentation", "baseline")])
    check(found.table, lambda layer: crossed(small, {"m1": 0.5, "m2": 0.5, "m0": -1}, layer))
    assert any("hold for these models" in note for note in found.notes)


def test_differences__categories_and_new_models(small):
    found = differences(small, between="categories", unit="models")
    assert list(found.summary()["first"]) == ["augmentation", "augmentation", "baseline"]
    assert found.table["p_value"].isna().all(), "a category of one model says nothing of its kind"
    assert set(found.table["covers"]) == {"nothing"}
    assert any("hold for new models" in note for note in found.notes)


def test_differences__new_models_is_welchs_test_over_models(means):
    cells = means.cells.assign(model=means.cells["model"])
    of_model = cells.groupby(["model", "layer"])["cosine"].mean()
    table = differences(means, between="categories", unit="models", leave_out=[]).table
    assert table["p_value"].isna().all(), "one category of two models"
    study = measured(
        means.folder.parent / "more",
        [{"model": m, "layer": la, "trial": t, "cosine": of_model[m, la] + 0.001 * t}
         for m in MODELS for la in LAYERS for t in (0, 1)],
        models=[ModelRow(name, name, category) for name, category in zip(MODELS, "aabbb", strict=True)],
    )  # fmt: skip
    found = differences(study, between="categories", unit="models").table
    names = list(MODELS)
    for row in found.to_dict("records"):
        values = [of_model[name, row["layer"]] + 0.0005 for name in names]
        expected = stats.ttest_ind(values[:2], values[2:], equal_var=False)
        assert row["p_value"] == pytest.approx(expected.pvalue, rel=1e-4)
        assert row["covers"] == "models"


# --- what intervals respect -------------------------------------------------------------------------------------------


def test_differences__of_means_is_welchs_test_over_trials(means):
    found = differences(means, baseline="tv_resnet50")
    cells = means.cells.set_index(["model", "layer"])["cosine"].sort_index()
    for row in found.table.to_dict("records"):
        samples = cells[row["first"], row["layer"]], cells["tv_resnet50", row["layer"]]
        expected = stats.ttest_ind(*samples, equal_var=False)
        limits = expected.confidence_interval()
        assert row["p_value"] == pytest.approx(expected.pvalue)
        np.testing.assert_allclose((row["low"], row["high"]), np.clip(limits, -1, 1))
        assert row["covers"] == "trials"
    assert any("it is not known whether draws were shared" in note for note in found.notes)


def test_differences__other_seeds_are_not_paired(small, tmp_path):
    cells = [cell | {"seed": cell["trial"]} for cell in cells_of(["again"], seed=1)]
    again = measured(tmp_path / "again", cells, models=model_rows(["again"], ["baseline"]), n_images=12, noise=0.2)
    both = merge_studies([small.folder, again.folder], tmp_path / "both")
    found = differences(both, pairs=[("again", "m0"), ("m1", "m0")])
    cells = both.cells.set_index(["model", "layer"])["cosine"].sort_index()
    rows = found.table[found.table["first"] == "again"]
    check(rows, lambda layer: contrasts_of_samples([cells["again", layer], cells["m0", layer]], np.array([[1, -1]])))
    assert set(rows["covers"]) == {"trials"}
    assert set(found.table.loc[found.table["first"] == "m1", "covers"]) == {"trials and images"}


def drawn_models(folder, trials_of, *, seeds=lambda model, trial: 2**63 + trial, probe_sets=None, **more):
    """A study of models on two layers: model -> number of its trials; seeds and probe sets as given."""
    generator = np.random.default_rng(3)
    cells = [
        {"model": model, "layer": layer, "trial": trial, "seed": seeds(model, trial),
         "cosine": generator.uniform(0.3, 0.7)}
        for model, n_trials in trials_of.items() for layer in ("x", "y") for trial in range(n_trials)
    ]  # fmt: skip
    about = {"random_trials": {"rerandomize": more.get("random_trials", True)}}
    probe_sets = dict.fromkeys(trials_of, "p") | (probe_sets or {})
    rows = [
        ModelRow(model, model, model[0], None, 0.5, about | {"probe_set": probe_sets[model]}) for model in trials_of
    ]
    return measured(folder, cells, models=rows, noise=0.2, n_images=12, **more)


def means_of(study):
    """Return (model, layer) -> mean of each trial."""
    return study.cells.groupby(["model", "layer"])["cosine"].apply(np.array)


@pytest.mark.parametrize("first", [0, 2])
def test_differences__of_models_with_more_trials_those_in_common_count(tmp_path, first):
    """Draws are known by their seeds: those of b are the first or the last three of a."""
    study = drawn_models(tmp_path, {"a": 5, "b": 3}, seeds=lambda model, trial: 100 + trial + first * (model == "b"))
    found = differences(study, pairs=[("a", "b")])
    places = {"a": slice(first, first + 3), "b": slice(3)}
    common = {model: {la: study.per_image(model, la)[rows] for la in ("x", "y")} for model, rows in places.items()}
    check(
        found.table,
        lambda layer: crossed_contrasts(np.stack([common["a"][layer], common["b"][layer]]), np.array([[1, -1]])),
    )
    assert set(found.table["covers"]) == {"trials and images"}
    assert any("over the trials that both sides have" in note for note in found.notes)


def test_differences__of_draws_that_are_known_not_to_be_shared_are_independent(tmp_path):
    study = drawn_models(tmp_path, {"a": 4, "b": 4}, seeds=lambda model, trial: 100 + trial + 50 * (model == "b"))
    found = differences(study, pairs=[("a", "b")])
    for row in found.table.to_dict("records"):
        expected = stats.ttest_ind(*(means_of(study)[model, row["layer"]] for model in "ab"), equal_var=False)
        assert row["p_value"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert [note for note in found.notes if "independent" in note] == [
        "Some models do not share their draws, as those of different architectures never do, or were shown other "
        "images: the trials of the two sides are treated as independent, and intervals hold for new trials on the same "
        "images."
    ]


@pytest.mark.parametrize("other", ["q", None])
def test_differences__of_other_images_trials_are_paired_alone(tmp_path, other):
    study = drawn_models(tmp_path, {"a": 4, "b": 4}, probe_sets={"b": other})
    found = differences(study, pairs=[("a", "b")])
    for row in found.table.to_dict("records"):
        expected = stats.ttest_rel(*(means_of(study)[model, row["layer"]] for model in "ab"))
        assert row["p_value"] == pytest.approx(expected.pvalue, rel=1e-6)
        assert row["covers"] == "trials"
    assert any("on the same images" in note for note in found.notes)


def test_differences__a_reset_without_chance_needs_no_seeds(tmp_path):
    study = drawn_models(tmp_path, {"a": 1, "b": 1}, seeds=lambda model, trial: ord(model), random_trials=False)
    found = differences(study, pairs=[("a", "b")])
    for row in found.table.to_dict("records"):
        one, other = (study.per_image(model, row["layer"])[0].astype(float) for model in "ab")
        assert row["p_value"] == pytest.approx(stats.ttest_rel(one, other).pvalue, rel=1e-5)
        assert row["covers"] == "images"


def test_differences__models_that_share_draws_are_one_sample_beside_others(tmp_path):
    seeds = {"b1": 500}
    study = drawn_models(
        tmp_path, {"a1": 4, "a2": 4, "b1": 4, "b2": 4}, seeds=lambda model, trial: 1000 + seeds.get(model, 0) + trial
    )
    row, *_ = differences(study, between="categories", pairs=[("a", "b")]).table.to_dict("records")
    means = means_of(study)
    together = (means["a1", "x"] + means["a2", "x"]) / 2 - means["b2", "x"] / 2  # trial by trial
    expected = contrasts_of_samples([together, -means["b1", "x"] / 2], np.array([[1, 1]]))
    assert row["difference"] == pytest.approx(expected.mean[0])
    assert row["p_value"] == pytest.approx(expected.p_value[0])


def test_differences__draws_of_one_number_may_be_the_same_within_a_category(means):
    found = differences(means, between="categories", pairs=[("augmentation", "contrastive")]).table
    cells = means.cells.set_index(["model", "layer"])["cosine"].sort_index()
    for row in found.to_dict("records"):
        augmentation = np.mean([cells[name, row["layer"]] for name in ("model_a", "model_b")], axis=0)
        expected = stats.ttest_ind(augmentation, cells["model_c", row["layer"]], equal_var=False)
        assert row["p_value"] == pytest.approx(expected.pvalue)


def test_differences__error_rate_of_categories_whose_models_share_draws(tmp_path):
    """A draw that moves all models of a category alike is not taken for as many draws as there are models."""
    generator = np.random.default_rng(4)
    layers = [f"l{i}" for i in range(300)]
    names = [f"a{i}" for i in range(8)] + ["b"]
    common = generator.normal(0, 0.05, (300, 4))
    cells = [
        {"model": name, "layer": layer, "trial": t, "seed": (7000 if name == "b" else 0) + t,
         "cosine": 0.5 + (common[i, t] if name != "b" else generator.normal(0, 0.05))}
        for name in names for i, layer in enumerate(layers) for t in range(4)
    ]  # fmt: skip
    study = measured(tmp_path, cells, models=model_rows(names, [name[0] for name in names]), noise=0.01)
    table = differences(study, between="categories", pairs=[("a", "b")]).table
    assert (table["p_value"] < 0.05).mean() < 0.09
    assert ((table["low"] < 0) & (table["high"] > 0)).mean() > 0.9


def test_differences__one_model_without_images_costs_no_other_its(tmp_path):
    study = drawn_models(tmp_path, {"a": 3, "b": 3, "c": 3})
    keys = tuple(study.cells.loc[study.cells["model"] == "c", "key"])
    with Store(tmp_path) as store, store.transaction():
        of_keys = f"key IN ({','.join('?' * len(keys))})"
        store._connection.execute(f"UPDATE cells SET per_image = NULL, checksum = NULL WHERE {of_keys}", keys)
    table = differences(load_study(tmp_path), pairs=[("a", "b"), ("a", "c")]).table
    assert dict(table.groupby("second")["covers"].first()) == {"b": "trials and images", "c": "trials"}


def test_differences__cells_that_are_not_ok_are_left_out(tmp_path):
    generator = np.random.default_rng(0)
    cells = [{"model": m, "layer": la, "trial": t, "cosine": generator.uniform(0.2, 0.8)}
             for m in "abc" for la in ("x", "y") for t in range(3)]  # fmt: skip
    cells[0] |= {"status": "not_finite", "cosine": float("nan")}
    study = measured(tmp_path, cells, models=model_rows("abc", ("k", "k", "l")), noise=0.05)
    pair = differences(study, pairs=[("a", "b")]).table.set_index("layer")
    assert pair.loc["x", ["difference", "low", "p_value", "p_holm"]].isna().all()
    assert pair.loc["x", "covers"] == "nothing"
    assert not pair.loc["x", "significant"]
    assert pair.loc["y", "p_holm"] == pair.loc["y", "p_value"], "one test alone"
    categories = differences(study, between="categories", pairs=[("k", "l")]).table.set_index("layer")
    check(categories.loc[["x"]].reset_index(), lambda layer: crossed(study, {"b": 1, "c": -1}, layer))
    (note,) = (note for note in differences(study, between="categories").notes if "fewer of its models" in note)
    assert note.startswith("On 1 of 2 layers")
    assert note.endswith(": x.")


def test_differences__one_trial_has_no_interval(tmp_path):
    study = measured(tmp_path, [{"model": m, "layer": "x", "trial": 0, "cosine": 0.3} for m in "ab"], noise=0.1)
    (row,) = differences(study, pairs=[("a", "b")]).table.to_dict("records")
    assert row["covers"] == "nothing"
    assert np.isnan(row["p_value"])


# --- control of many tests --------------------------------------------------------------------------------------------


def test_differences__families(small):
    every, each = (differences(small, pairs="all", family=family).table for family in ("all", "pair"))
    np.testing.assert_array_equal(every["p_holm"], holm(every["p_value"].to_numpy()))
    np.testing.assert_array_equal(every["p_bh"], benjamini_hochberg(every["p_value"].to_numpy()))
    for _, rows in each.groupby(["first", "second"]):
        np.testing.assert_array_equal(rows["p_holm"], holm(rows["p_value"].to_numpy()))
    assert (every["p_holm"] >= each["p_holm"]).all()
    np.testing.assert_array_equal(every["significant"], every["p_holm"] <= 0.05)
    np.testing.assert_array_equal(each["significant_bh"], each["p_bh"] <= 0.05)


def test_differences__alpha_and_words(small):
    found = differences(small, alpha=0.5)
    table = found.table
    assert found.sentence() == (
        f"{(table['p_holm'] <= 0.5).sum()} of {len(table)} differences to m0 are significant at the "
        f"family-wise error rate 0.5 (Holm), {(table['p_bh'] <= 0.5).sum()} at the false discovery rate 0.5 "
        "(Benjamini-Hochberg)."
    )
    each = differences(small, alpha=0.5, family="pair")
    assert "at the family-wise error rate 0.5 within each pair (Holm)" in each.sentence()
    assert list(found.summary().columns) == [
        "first",
        "second",
        "difference",
        "n_tested",
        "n_significant",
        "n_significant_bh",
    ]
    assert found.summary()["n_significant"].sum() == table["significant"].sum()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"pairs": [("m1", "m7")]}, "compares no model 'm7'. Did you mean"),
        ({"pairs": [("m1", "m0")], "between": "categories"}, "compares no category 'm1'"),
        ({"unit": "models"}, "The unit 'models' is for categories"),
        ({"baseline": "nobody"}, "has no model 'nobody'"),
    ],
)
def test_differences__refuses(small, asked, text):
    with pytest.raises(StudyError, match=text):
        differences(small, **asked)


def test_differences__refuses_without_a_baseline_or_matched_values(tmp_path, means):
    cells = [{"model": m, "layer": "x", "trial": t, "cosine": 0.5} for m in "ab" for t in (0, 1)]
    study = measured(tmp_path / "s", cells)
    with pytest.raises(StudyError, match=r"names no baseline to compare with\. Name one, or give pairs"):
        differences(study)
    with pytest.raises(StudyError, match="no temperature-matched values"):
        differences(means, matched=True)


# --- the published results --------------------------------------------------------------------------------------------


@released
@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")  # SciPy's, where trials hardly differ
def test_released__how_many_differences_to_the_baseline_are_significant(tmp_path):
    """Of 49 models x 54 layers at three trials, by Welch's tests of each model's layers."""
    study = import_published(RELEASED / "results.csv", tmp_path / "study")
    found = differences(study)
    raw = pd.read_csv(RELEASED / "results.csv")
    raw["criticality"] = 1 - raw["pred_cos_sim"]
    of_model = {
        name: own.pivot_table("criticality", "trial", "layer") for name, own in raw.groupby("model_id")
    }  # each (n_trials, n_layers)
    p_values = np.concatenate([
        stats.ttest_ind(own, of_model["tv_resnet50"], equal_var=False).pvalue
        for model, own in of_model.items() if model not in ("tv_resnet50", "resnet50_frozen_random")
    ])  # fmt: skip
    assert len(p_values) == len(found.table) == 2646
    assert (p_values < 0.05).sum() == (found.table["p_value"] < 0.05).sum() == 1232
    order = np.sort(p_values)
    n_holm = next(i for i, p in enumerate(order) if p > 0.05 / (2646 - i))
    n_bh = max(i + 1 for i, p in enumerate(order) if p <= 0.05 * (i + 1) / 2646)
    assert (found.table["significant"].sum(), found.table["significant_bh"].sum()) == (n_holm, n_bh) == (93, 893)
    assert found.sentence().startswith(
        "93 of 2,646 differences to tv_resnet50 are significant at the family-wise error rate"
    )
