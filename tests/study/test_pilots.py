"""Studies for a half-width: a pilot of every model, one plan, and what is run after it."""

import contextlib

import numpy as np
import pytest

from layercrit.errors import StudyError
from layercrit.study.file import read_study_file
from layercrit.study.merging import merge_studies
from layercrit.study.pilots import plans_of
from layercrit.study.planning import plan_study
from layercrit.study.running import run_study
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from layercrit.toml import tomllib
from running_jobs import Inline
from small_studies import write_study

ASKED = {
    "trials": None,
    "half_width": 0.0009,
    "pilot": 4,
    "max_trials": 8,
    "layers": "layer1.0.conv1,layer1.0.conv2,layer3.0.conv3,layer3.1.conv2",
}
N_LAYERS = 4


def run(path, folder):
    return run_study(read_study_file(path), folder, progress=False, executor=Inline())


def plans_in(folder):
    with Store(folder) as store:
        return plans_of(store.meta("precision"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A study file and the folder of its finished study."""
    root = tmp_path_factory.mktemp("planned")
    path = write_study(root / "own", protocol=ASKED)
    run(path, root / "out")
    return path, root / "out"


def test_run__gives_each_layer_the_trials_that_were_planned(planned):
    _, folder = planned
    study, plans = load_study(folder), plans_in(folder)

    assert plans.keys() == {("m0", "rerandomize"), ("m1", "rerandomize")}
    counts = study.cells.groupby(["model", "layer"])["trial"].nunique()
    expected = {
        (model, layer): of_layer.trials for (model, _), plan in plans.items() for layer, of_layer in plan.layers.items()
    }
    assert counts.to_dict() == expected
    assert len(set(expected.values())) > 1, "layers need unlike numbers of trials, or this shows nothing"
    assert study.progress()["n_planned"].sum() == len(study.cells)
    assert (study.progress()["state"] == "done").all()
    assert len({plan.n_images for plan in plans.values()}) == 1


def test_run__gives_the_cells_that_fixed_trials_give(planned, tmp_path):
    _, folder = planned
    study = load_study(folder)
    fixed = write_study(tmp_path / "own", protocol=ASKED | {"trials": 8, "half_width": None})
    run(fixed, tmp_path / "out")

    both = study.cells.merge(
        load_study(tmp_path / "out").cells, on=["model", "layer", "trial"], suffixes=("", "_fixed")
    )

    assert len(both) == len(study.cells)
    assert (both["key"] == both["key_fixed"]).all(), "the pilot has all images here, so the cells are the same"
    np.testing.assert_allclose(both["cosine"], both["cosine_fixed"], atol=1e-6)


def test_tables__have_intervals_that_rest_on_the_pilot(planned):
    _, folder = planned
    study, plans = load_study(folder), plans_in(folder)

    half_widths = []
    for row in study.to_pandas().to_dict("records"):
        values = study.per_image(row["model"], row["layer"]).astype(np.float64)
        components = plans[row["model"], row["reset"]].layers[row["layer"]].components
        half_width = float(components.half_width(*values.shape, 0.95))
        assert row["low"] == pytest.approx(max(values.mean() - half_width, 0))
        assert row["high"] == pytest.approx(min(values.mean() + half_width, 1))
        assert row["status"] == ("ok" if half_width <= 0.0009 else "not_reached")
        half_widths.append(half_width)
    layers = study.to_pandas()
    assert set(layers["status"]) == {"ok", "not_reached"}
    missed = layers[layers["status"] == "not_reached"]
    (warning,) = (text for text in study.warnings if "half-width" in text)
    assert warning.startswith(f"{len(missed)} of {len(layers)} layers of all models miss")
    assert f"the half-width of 0.0009 that was asked for, with up to {max(half_widths):.3g} (" in warning


def test_tables__mean_over_layers_counts_each_with_its_own_trials(planned):
    _, folder = planned
    study = load_study(folder)

    for row in study.by_model().to_dict("records"):
        layers = study.to_pandas()
        own = layers[layers["model"] == row["model"]]
        assert row["criticality"] == pytest.approx(own["criticality"].mean())
        assert row["low"] < row["criticality"] < row["high"]
        assert row["n_trials"] == own["n_trials"].min() == 4
        assert row["n_layers"] == N_LAYERS
    comparison = study.compare()
    np.testing.assert_allclose(comparison.models["criticality"], study.by_model()["criticality"])
    assert any("4 to 8 trials" in note for note in comparison.notes)
    assert not any("fewer" in note for note in comparison.notes)


def test_run__again_measures_nothing_and_keeps_the_plan(planned):
    path, folder = planned
    before = [plan.to_dict() for plan in plans_in(folder).values()]

    report = run(path, folder)

    assert report.n_measured == 0
    assert [plan.to_dict() for plan in plans_in(folder).values()] == before


def test_run__resumes_after_an_interruption_in_each_stage(planned, tmp_path, monkeypatch):
    path, whole = planned
    expected = load_study(whole).cells

    from layercrit.study import running

    keep = running._Run._keep
    for stop_after in (2, 9):
        folder, calls = tmp_path / f"stopped{stop_after}", []

        def stopping(self, event, calls=calls, stop_after=stop_after):
            keep(self, event)
            calls.append(event)
            if len(calls) == 2 * stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(running._Run, "_keep", stopping)
        with contextlib.suppress(KeyboardInterrupt):
            run(path, folder)
        monkeypatch.setattr(running._Run, "_keep", keep)
        assert 0 < len(load_study(folder).cells) < len(expected)
        run(path, folder)
        found = load_study(folder).cells
        assert found["key"].to_list() == expected["key"].to_list()
        np.testing.assert_allclose(found["cosine"], expected["cosine"], atol=1e-6)


def test_run__gives_a_model_that_comes_later_the_images_of_the_others(planned, tmp_path):
    path = write_study(tmp_path / "own", n_models=1, protocol=ASKED)
    run(path, tmp_path / "out")
    before = plans_in(tmp_path / "out")["m0", "rerandomize"]

    write_study(tmp_path / "own", n_models=2, protocol=ASKED)
    run(path, tmp_path / "out")

    plans = plans_in(tmp_path / "out")
    assert plans["m0", "rerandomize"].to_dict() == before.to_dict()
    assert plans["m1", "rerandomize"].n_images == before.n_images


def test_run__with_another_half_width_plans_anew_and_measures_no_cell_again(planned, tmp_path):
    path = write_study(tmp_path / "own", n_models=1, protocol=ASKED)
    run(path, tmp_path / "out")
    n_before = len(load_study(tmp_path / "out").cells)

    write_study(tmp_path / "own", n_models=1, protocol=ASKED | {"half_width": 0.5})
    report = run(path, tmp_path / "out")

    assert report.n_measured == 0
    assert len(load_study(tmp_path / "out").cells) == 4 * N_LAYERS < n_before


def test_run__runs_the_pilot_again_on_more_images_where_it_had_too_few(tmp_path, monkeypatch):
    monkeypatch.setattr("layercrit.precision._FEWEST_IMAGES", 3)
    monkeypatch.setattr("layercrit.precision._SD_IMAGES", 0.0001)
    path = write_study(tmp_path / "own", protocol=ASKED | {"half_width": 0.0012})

    run(path, tmp_path / "out")

    study, plans = load_study(tmp_path / "out"), plans_in(tmp_path / "out")
    n_images = {plan.n_images for plan in plans.values()}.pop()
    assert {plan.n_pilot_images for plan in plans.values()} == {3}
    assert 3 < n_images <= 24
    assert set(study.cells["n_images"]) == {n_images}
    assert study.record["probe_set"]["n_images"] == n_images
    n_measured = len(study.cells)
    assert run(path, tmp_path / "out").n_measured == 0
    assert len(load_study(tmp_path / "out").cells) == n_measured


def test_plan__says_what_a_half_width_costs_before_and_after_the_pilot(planned, tmp_path):
    path, folder = planned
    study = read_study_file(path)

    before, after = plan_study(study, tmp_path / "nothing"), plan_study(study, folder)

    assert before.models["n_cells"].to_list() == [4 * N_LAYERS] * 2
    assert "pilot" in before.precision
    assert after.models["n_cells"].sum() == after.models["n_done"].sum() == len(load_study(folder).cells)
    assert "4 to 8 trials" in after.precision


def test_merge__keeps_the_plans(planned, tmp_path):
    other = write_study(tmp_path / "own", protocol=ASKED, study={"baseline": None}, models=[
        {"reference": "file:m0.safetensors?arch=py:layercrit.demo:small_resnet&mean=(0.305,)&std=(0.376,)",
         "name": "third"}])  # fmt: skip
    run(other, tmp_path / "out")
    _, folder = planned

    merged = merge_studies([folder, tmp_path / "out"], tmp_path / "merged")

    assert set(merged.plans) == {("m0", "rerandomize"), ("m1", "rerandomize"), ("third", "rerandomize")}
    own = load_study(folder).to_pandas()
    found = merged.to_pandas()
    for column in ("low", "high", "n_trials", "status"):
        assert found[found["model"] != "third"][column].to_list() == own[column].to_list()


def test_study_file__takes_a_half_width_and_writes_it_back(planned):
    path, folder = planned

    written = tomllib.loads((folder / "study.toml").read_text())["protocol"]

    assert {name: written[name] for name in ("half_width", "pilot", "max_trials")} == {
        "half_width": 0.0009, "pilot": 4, "max_trials": 8}  # fmt: skip
    assert read_study_file(folder).protocol == read_study_file(path).protocol


@pytest.mark.parametrize(
    "wrong", [{"half_width": 0}, {"half_width": 1.5}, {"pilot": 2}, {"trials": 5}, {"max_trials": 3}, {"minutes": 3}]
)
def test_study_file__refuses_what_cannot_be_planned(tmp_path, wrong):
    path = write_study(tmp_path, n_models=1, protocol=ASKED | wrong)

    with pytest.raises(StudyError, match=next(iter(wrong))):
        read_study_file(path)
