import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

import layercrit
from layercrit.errors import StudyError
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.probes.probe_set import ProbeSet
from layercrit.statistics import estimate, estimate_mean_over_layers
from layercrit.study.file import read_study_file
from layercrit.study.published import import_published
from layercrit.study.running import run_study
from layercrit.study.store import CellRow, FailureRow, ModelRow, PlanRow, Store
from layercrit.study.tables import load_study
from published_results import LAYERS, MODELS, measured, rows_of, write_models, write_table
from running_jobs import Inline, Killed
from small_studies import N_LAYERS, OPTIONS, write_study

LIMITS = ["criticality", "low", "high"]


CHOSEN, N_CHOSEN = "conv1,layer1.1.*,fc", 5


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two models under a reset with chance and one without, run."""
    folder = tmp_path_factory.mktemp("ran")
    protocol = {"resets": ["zero", "rerandomize"], "level": 0.8, "layers": CHOSEN}
    path = write_study(folder, trials=3, n_images=12, protocol=protocol)
    run_study(read_study_file(path), folder / "study", executor=Inline(), progress=False)
    return load_study(folder / "study")


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """A study of random per-image distances: models a and b, three layers, three trials, five images."""
    return random_study(tmp_path_factory.mktemp("random"))


def random_study(folder, statuses=None, resets=("rerandomize",), record=None):
    """Statuses: (model, layer, trial) -> what is not ok."""
    generator = np.random.default_rng(1)
    with Store(folder, create=True) as store, store.transaction():
        store.put_models([ModelRow(name, f"py:{name}", record={"random_trials": {"zero": False}}) for name in "ab"])
        for reset in resets:
            for model in "ab":
                for depth, layer in enumerate(["conv1", "conv2", "fc"]):
                    for trial in range(1 if reset == "zero" else 3):
                        key = json.dumps([model, layer, reset, trial])
                        status = (statuses or {}).get((model, layer, trial), "ok")
                        values = generator.random((3, 5)).astype(np.float32)
                        per_image = dict(zip(("cosine", "cosine_matched", "l1"), values, strict=True))
                        means = {name: float(v.mean()) if status == "ok" else math.nan for name, v in per_image.items()}
                        store.put_plan([PlanRow(model, layer, reset, trial, key, "conv", layer, depth, 9, 0.5)])
                        kept = per_image if status == "ok" else None
                        store.put_cells([CellRow(key, status, 1, 1.5, 5, means, kept)])
        store.put_meta("study", {"protocol": {"trials": 3, "level": 0.9, **(record or {})}})
    return load_study(folder)


def blobs(study, model, reset, layer, name):
    """Per-image values ``(n_trials, n_images)`` of a layer's cells that are ok, as they lie on disk."""
    cells = study.cells[(study.cells["model"] == model) & (study.cells["reset"] == reset)]
    cells = cells[(cells["layer"] == layer) & (cells["status"] == "ok")].sort_values("trial")
    with Store(study.folder) as store:
        return np.array([store.per_image([key])[key][name] for key in cells["key"]])


# Slow twins


def check_layers(study, random_trials):
    table = study.to_pandas()
    for row in table.to_dict("records"):
        place = row["model"], row["reset"], row["layer"]
        for name, columns in (
            ("cosine", [*LIMITS, "sd_trials", "covers"]),
            ("cosine_matched", ["criticality_matched", "matched_low", "matched_high"]),
        ):
            expected = estimate(
                blobs(study, *place, name), level=study.level, random_trials=random_trials[row["reset"]]
            )
            wanted = [expected.mean, expected.low, expected.high, expected.sd_trials]
            np.testing.assert_allclose([row[c] for c in columns if c != "covers"], wanted[: len(columns)], atol=1e-12)
            assert "covers" not in columns or row["covers"] == expected.covers
        assert row["n_trials"] == len(blobs(study, *place, "cosine"))
    return table


def check_means(study, random_trials):
    table = study.by_model()
    for row in table.to_dict("records"):
        cells = study.cells[(study.cells["model"] == row["model"]) & (study.cells["reset"] == row["reset"])]
        layers = [layer for layer, of in cells.groupby("layer", sort=False) if (of["status"] == "ok").all()]
        stacked = np.array([blobs(study, row["model"], row["reset"], layer, "cosine") for layer in layers])
        expected = estimate_mean_over_layers(stacked, level=study.level, random_trials=random_trials[row["reset"]])
        wanted = [expected.mean, expected.low, expected.high]
        np.testing.assert_allclose([row[name] for name in LIMITS], wanted, atol=1e-12)
        assert (row["covers"], row["n_layers"]) == (expected.covers, len(layers))
        stacked = np.array([blobs(study, row["model"], row["reset"], layer, "cosine_matched") for layer in layers])
        assert row["criticality_matched"] == pytest.approx(stacked.mean(dtype=np.float64), abs=1e-9)
    return table


def test_to_pandas__agrees_with_estimates_from_the_blobs(random):
    table = check_layers(random, {"rerandomize": True})
    places = [(model, layer) for model in "ab" for layer in ("conv1", "conv2", "fc")]
    assert list(zip(table["model"], table["layer"], strict=True)) == places
    assert table["l1"][0] == pytest.approx(blobs(random, "a", "rerandomize", "conv1", "l1").mean(), abs=1e-6)
    assert set(table["covers"]) == {"trials and images"}
    assert set(table["status"]) == {"ok"}
    assert set(table["n_images"]) == {5}


def test_to_pandas__sd_of_trials_is_that_of_the_comparison(random):
    own = random.to_pandas().set_index(["model", "layer"])["sd_trials"]
    compared = random.compare().to_pandas().set_index(["model", "layer"])["sd_trials"]
    assert own.min() > 0
    np.testing.assert_allclose(own, compared.reindex(own.index), atol=1e-6)


def test_by_model__agrees_with_estimates_from_the_blobs(random):
    table = check_means(random, {"rerandomize": True})
    assert table["model"].to_list() == ["a", "b"]
    assert set(table["n_trials"]) == {3}
    assert "record" not in table


def test_tables__cells_that_are_not_ok_are_left_out(tmp_path):
    bad = {("a", "conv2", 1): "not_finite", **{("b", "fc", trial): "unchanged" for trial in range(3)}}
    study = random_study(tmp_path, bad | {("b", "conv1", 0): "unchanged", ("b", "conv1", 1): "not_finite"})
    table = study.to_pandas().set_index(["model", "layer"])
    assert table.loc[("a", "conv2"), "status"] == "not_finite 1/3"
    assert table.loc[("b", "fc"), "status"] == "unchanged 3/3"
    assert table.loc[("b", "conv1"), "status"] == "unchanged 1/3, not_finite 1/3"
    assert table["n_trials"].to_list() == [3, 2, 3, 1, 3, 0]
    expected = estimate(blobs(study, "a", "rerandomize", "conv2", "cosine"), level=0.9)
    assert table.loc[("a", "conv2"), LIMITS].to_list() == [expected.mean, expected.low, expected.high]
    assert table.loc[("b", "fc"), [*LIMITS, "criticality_matched", "l1"]].isna().all()
    assert table.loc[("b", "fc"), "covers"] == "nothing"
    assert table.loc[("b", "fc"), "depth"] == 2
    assert check_means(study, {"rerandomize": True})["n_layers"].to_list() == [2, 1]


def test_tables__no_layer_is_whole(tmp_path):
    study = random_study(tmp_path, {("a", layer, 0): "not_finite" for layer in ("conv1", "conv2", "fc")})
    means = study.by_model().set_index("model")
    assert means.index.to_list() == ["a", "b"]
    assert means.loc["a", LIMITS].isna().all()
    assert means.loc["b", LIMITS].notna().all()


def test_tables__a_reset_without_chance_covers_images(tmp_path):
    study = random_study(tmp_path, resets=("rerandomize", "zero"), record={"resets": ["zero", "rerandomize"]})
    chance = {"rerandomize": True, "zero": False}
    table = check_layers(study, chance)
    assert set(table.loc[table["reset"] == "zero", "covers"]) == {"images"}
    means = check_means(study, chance)
    assert means[["model", "reset", "n_trials"]].to_numpy().tolist() == [
        ["a", "rerandomize", 3], ["a", "zero", 1], ["b", "rerandomize", 3], ["b", "zero", 1]
    ]  # fmt: skip
    assert study.resets == ["zero", "rerandomize"]
    assert set(study.of_reset()["reset"]) == {"zero"}
    assert set(study.of_reset("rerandomize")["reset"]) == {"rerandomize"}


def test_tables__imported_means(tmp_path):
    table, models = write_table(tmp_path / "t.csv", rows_of()), write_models(tmp_path / "m.csv")
    study = import_published(table, tmp_path / "study", models)
    values = {(r["model_id"], r["layer"], int(float(r["trial"]))): 1 - float(r["pred_cos_sim"]) for r in rows_of()}
    for row in study.to_pandas().to_dict("records"):
        of_layer = np.array([[values[row["model"], row["layer"], trial]] for trial in range(3)])
        expected = estimate(of_layer)
        assert [row[name] for name in LIMITS] == pytest.approx([expected.mean, expected.low, expected.high], abs=1e-12)
        assert row["covers"] == "trials"
        assert math.isnan(row["criticality_matched"])
    for row in study.by_model().to_dict("records"):
        of_model = np.array([[[values[row["model"], layer, trial]] for trial in range(3)] for layer in LAYERS])
        expected = estimate_mean_over_layers(of_model)
        assert [row[name] for name in LIMITS] == pytest.approx([expected.mean, expected.low, expected.high], abs=1e-12)
    assert study.by_model()["model"].to_list() == list(MODELS)


def test_tables__are_copies(random):
    for read in (random.to_pandas, random.by_model):
        table = read()
        table["criticality"] = 7
        assert (read()["criticality"] < 1).all()


# A study that was run


def test_tables__of_a_study_that_was_run(ran):
    chance = {"rerandomize": True, "zero": False}
    assert len(check_layers(ran, chance)) == 2 * 2 * N_CHOSEN
    assert set(check_means(ran, chance)["n_layers"]) == {N_CHOSEN}
    assert ran.level == 0.8


@pytest.mark.parametrize("reset", ["rerandomize", "zero"])
def test_tables__are_those_of_measure(ran, reset):
    probe_set = ProbeSet.load(ran.folder / "probe_set")
    model = open_model(f"file:{ran.folder.parent / 'm1.safetensors'}?{OPTIONS}", input_size=(1, 8, 8))
    settings = {"trials": 3, "reset": reset, "dtype": "float32", "device": "cpu", "level": 0.8, "layers": CHOSEN}
    expected = measure(model, probe_set, **settings, progress=False)
    table = ran.to_pandas()
    table = table[(table["model"] == "m1") & (table["reset"] == reset)].reset_index(drop=True)
    wanted = expected.to_pandas()
    assert set(wanted.columns) <= set(table.columns)
    pd.testing.assert_frame_equal(table[wanted.columns], wanted, rtol=0, atol=1e-9, check_dtype=False)
    means = ran.by_model()
    row = means[(means["model"] == "m1") & (means["reset"] == reset)].iloc[0]
    summary = expected.summary()
    limits = [summary["criticality"][name] for name in ("mean", "low", "high")]
    assert row[LIMITS].to_list() == pytest.approx(limits, abs=1e-9)
    assert row["criticality_matched"] == pytest.approx(summary["criticality_matched"]["mean"], abs=1e-9)
    for name in ("chance", "temperature", "top1_accuracy"):
        assert row[name] == pytest.approx(summary[name], abs=1e-9)


def test_progress__of_a_study_that_was_run(ran):
    progress = ran.progress()
    assert progress["state"].to_list() == ["done", "done"]
    assert progress["n_planned"].to_list() == progress["n_done"].to_list() == [4 * N_CHOSEN] * 2
    assert ran.seconds_left() == 0


def test_progress__trials_not_begun_are_planned(tmp_path):
    path = write_study(tmp_path, trials=3, n_images=4)
    with pytest.raises(Killed):
        run_study(read_study_file(path), tmp_path / "study", executor=Inline(stop_after=3), progress=False)
    progress = load_study(tmp_path / "study").progress().set_index("model")
    assert progress.loc["m0", ["state", "n_planned", "n_done"]].to_list() == ["left", 3 * N_LAYERS, N_LAYERS]
    assert progress.loc["m1", "state"] == "not opened"
    assert math.isnan(progress.loc["m1", "n_planned"])


# How far a study is


def begun(folder, failures=(), n_models=4, finished="2026-01-01T00:01:40+00:00", resets=("rerandomize",)):
    """Two layers and two trials planned for each model; m0 has all cells, m1 one trial, the others were not opened.

    An earlier run took an hour for the first trial of m0, the last one 100 seconds for the four other cells.
    """
    with Store(folder, create=True) as store, store.transaction():
        store.put_models([ModelRow(f"m{i}", f"py:m{i}", record={} if i < 2 else None) for i in range(n_models)])
        earlier = store.put_run("2025-12-31T00:00:00+00:00", {})
        last = store.put_run("2026-01-01T00:00:00+00:00", {})
        for model, trials in (("m0", 2), ("m1", 1)):
            for trial in range(trials):
                for depth, layer in enumerate(["conv", "fc"]):
                    key = json.dumps([model, layer, trial])
                    store.put_plan([PlanRow(model, layer, "rerandomize", trial, key, "conv", layer, depth, 9, 0.5)])
                    if finished is not None:
                        first = (model, trial) == ("m0", 0)
                        run, at = (earlier, "2025-12-31T01:00:00+00:00") if first else (last, finished)
                        store.put_cells([CellRow(key, "ok", 1, 1.0, 4, {"cosine": 0.5}, None, None, 1.0, at)], run)
        for model, trial, error in failures:
            store.put_failure(FailureRow(model, "rerandomize", trial, error, "Traceback", "2026-01-01"))
        protocol = {"trials": 2, "resets": list(resets)}
        store.put_meta("study", {"name": "begun", "protocol": protocol, "measured": {}})
    return load_study(folder)


def test_progress__states(tmp_path):
    study = begun(tmp_path, failures=[("m2", 0, "no such file"), ("m2", 1, "another")])
    table = study.progress()
    assert table["model"].to_list() == ["m0", "m1", "m2", "m3"]
    assert table["state"].to_list() == ["done", "left", "failed", "not opened"]
    assert table["n_planned"].fillna(-1).to_list() == [4, 4, -1, -1]
    assert table["n_done"].to_list() == [4, 2, 0, 0]
    assert table["n_failed"].to_list() == [0, 0, 2, 0]
    assert table["error"].to_list()[2] == "no such file"
    assert repr(study) == "<Study begun: 4 models, 6 cells, 2 failed trials>"


def test_seconds_left__at_the_speed_of_the_last_run(tmp_path):
    # the last run took 100 s for 4 cells; m1 lacks 2, and m2 and m3 are taken to have 4 each
    assert begun(tmp_path / "a").seconds_left() == pytest.approx(10 * 100 / 4)
    # what failed is not tried again unasked: nothing of m2, half of m3
    failures = [("m2", 0, "x"), ("m2", 1, "x"), ("m3", 1, "x")]
    assert begun(tmp_path / "b", failures).seconds_left() == pytest.approx(4 * 100 / 4)


def test_seconds_left__resets_without_chance_have_one_trial(tmp_path):
    study = begun(tmp_path, n_models=2, resets=("rerandomize", "zero"))
    assert study.planned == {"m0": 8, "m1": 8}  # no model was opened for zero yet
    with Store(tmp_path) as store, store.transaction():
        store.put_record("m0", {"random_trials": {"rerandomize": True, "zero": False}})
    study = load_study(tmp_path)
    assert study.planned == {"m0": 6, "m1": 6}
    assert study.seconds_left() == pytest.approx(6 * 100 / 4)


def test_seconds_left__not_known(tmp_path, random):
    assert begun(tmp_path, finished=None).seconds_left() is None
    assert random.seconds_left() is None  # no run at all


# Little to show


def test_load_study__a_store_without_anything(tmp_path):
    Store(tmp_path, create=True).close()  # a run that ended while images were decoded
    study = load_study(tmp_path)
    assert study.to_pandas().empty
    assert study.by_model().empty
    assert study.progress().empty
    assert study.seconds_left() is None
    assert study.resets == []
    assert study.level == 0.95
    assert repr(study) == f"<Study {tmp_path.name}: 0 models, 0 cells>"
    with pytest.raises(StudyError, match="has no finished cell"):
        study.of_reset()


def test_load_study__models_without_cells(tmp_path):
    study = measured(tmp_path, [], models=[ModelRow("a", "py:a", None, None, 0.5), ModelRow("b", "py:b", "c")])
    assert study.to_pandas().empty
    means = study.by_model()
    assert means["model"].to_list() == ["a", "b"]
    assert means["category"].to_list() == [None, "c"]
    assert means["documented_accuracy"].fillna(-1).to_list() == [0.5, -1]
    assert means["criticality"].isna().all()
    assert study.progress()["state"].to_list() == ["not opened", "not opened"]


def test_load_study__no_study(tmp_path):
    with pytest.raises(StudyError, match=r"There is no study in .*nowhere.*layercrit study run"):
        load_study(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_of_reset__refuses(random, tmp_path):
    with pytest.raises(StudyError, match=r"has no reset 'zeros'\. Known: 'rerandomize'"):
        random.of_reset("zeros")
    places = itertools.product("ab", ("conv1", "conv2", "fc"), range(3))
    study = random_study(tmp_path, dict.fromkeys(places, "unchanged"))
    with pytest.raises(StudyError, match="has no finished cell"):
        study.of_reset()
    assert study.to_pandas()["criticality"].isna().all()


def test_load_study__is_what_the_package_offers():
    assert layercrit.load_study is load_study


def test_per_image__is_what_was_kept(random):
    found = random.per_image("b", "fc", distance="l1")
    with Store(random.folder) as store:
        keys = [json.dumps(["b", "fc", "rerandomize", trial]) for trial in range(3)]
        expected = [store.per_image([key])[key]["l1"] for key in keys]
    assert found.shape == (3, 5)
    assert np.array_equal(found, np.stack(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "c", "layer": "fc"}, "no measured model 'c'"),
        ({"model": "a", "layer": "fd"}, "no measured layer 'fd'. Did you mean 'fc'"),
        ({"model": "a", "layer": "fc", "distance": "l2"}, "No per-image distances 'l2' were kept. Did you mean 'l1'"),
        ({"model": "a", "layer": "fc", "reset": "zero"}, "no reset 'zero'"),
    ],
)
def test_per_image__unknown_names(random, arguments, message):
    with pytest.raises(StudyError, match=message):
        random.per_image(**arguments)


def test_per_image__of_imported_results_is_empty(tmp_path):
    study = import_published(write_table(tmp_path / "t.csv", rows_of()), tmp_path / "study")
    assert study.per_image(next(iter(MODELS)), LAYERS[0]).shape == (0, 0)


# In a notebook


def test_repr_html__facts_ranking_and_models(ran):
    html = ran._repr_html_()
    means = ran.by_model()
    first = means[means["reset"] == ran.resets[0]]
    for row in first.to_dict("records"):
        assert f"{row['criticality']:.3f} <span" in html
    for fact in ("models", "cells", "resets", "trials", "images", "warnings"):
        assert f">{fact}</th><td" in html
    assert html.count("<img") == 1
    assert "zero, rerandomize" in html


def test_repr_html__a_study_under_way(tmp_path):
    html = begun(tmp_path, failures=[("m2", 0, "no such file")])._repr_html_()
    for fact in ("6 of 8", "trials that failed", "m2: no such file", "models not opened yet"):
        assert fact in html
    assert html.count("<img") == 1


def test_repr_html__trials_are_those_that_were_measured(tmp_path):
    once = [{"model": "a", "layer": "fc", "trial": 0, "cosine": 0.5, "reset": "zero"}]
    one = measured(tmp_path / "one", once, record={"protocol": {"trials": 3}})
    assert '>trials</th><td style="text-align:left">1</td>' in one._repr_html_()
    more = [{"model": "a", "layer": "fc", "trial": trial, "cosine": 0.5} for trial in range(2)]
    several = measured(tmp_path / "several", once + more, record={"protocol": {"trials": 3}})
    assert '>trials</th><td style="text-align:left">1 to 2</td>' in several._repr_html_()


def test_repr_html__nothing_is_measured(tmp_path):
    Store(tmp_path, create=True).close()
    html = load_study(tmp_path)._repr_html_()
    assert "0 models" in html
    assert "<img" not in html
