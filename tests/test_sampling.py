"""Measuring for a half-width: what is run, what the intervals are, and going on after an interruption."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from layercrit.engine.graph_replay import GraphReplay
from layercrit.errors import LayercritError, ProtocolError
from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.precision import Components
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.reporting.methods_section import methods_section
from layercrit.statistics import estimate
from small_subjects import fresh

PIXELS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (300, 3, 2, 2), dtype=np.uint8))
ASKED = {"half_width": 0.08, "pilot": 5, "max_trials": 60, "dtype": "float32", "progress": False}


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def network():
    """Linear layers '1', '3' and '5', as sure of themselves as trained ones."""
    made = fresh(build, 1)
    with torch.no_grad():
        made[5].weight.mul_(20)
    return made


@pytest.fixture(scope="module")
def planned():
    return measure(network(), PIXELS, **ASKED)


def same(found, expected):
    assert found.cells.equals(expected.cells)
    for name, values in expected.per_image.items():
        np.testing.assert_array_equal(found.per_image[name], values, err_msg=name)
    assert found.to_pandas().equals(expected.to_pandas())


# what is measured


def test_measure__for_a_half_width_gives_the_cells_that_fixed_trials_give(planned):
    counts = planned.to_pandas().set_index("layer")["n_trials"]
    assert counts.min() >= 5
    assert counts.nunique() > 1, "layers need unlike numbers of trials, or this shows nothing"
    n_images = planned.record["probe_set"]["n_images"]

    fixed = measure(network(), PIXELS, trials=int(counts.max()), n_images=n_images, dtype="float32", progress=False)

    for index, (layer, n) in enumerate(counts.items()):
        for name, values in fixed.per_image.items():
            np.testing.assert_allclose(planned.per_image[name][index, :n], values[index, :n], atol=1e-6, err_msg=name)
            assert np.isnan(planned.per_image[name][index, n:]).all()
        own, others = (m.cells[m.cells["layer"] == layer].iloc[:n] for m in (planned, fixed))
        assert own["seed"].to_list() == others["seed"].to_list()
        np.testing.assert_allclose(own["cosine"], others["cosine"], atol=1e-6)


def test_measure__for_a_half_width_gives_every_layer_an_interval_no_wider(planned):
    """The slow twin of each interval: the pilot's mean components, at the numbers that were run."""
    table = planned.to_pandas().set_index("layer")

    assert (table["status"] == "ok").all()
    for index, layer in enumerate(table.index):
        n = table["n_trials"][layer]
        values = planned.per_image["cosine"][index, :n].astype(np.float64)
        components = Components.of(values[:5], random_trials=True)
        half_width = float(components.half_width(n, values.shape[1], 0.95))
        assert half_width <= 0.08
        assert table["criticality"][layer] == pytest.approx(values.mean())
        assert table["low"][layer] == pytest.approx(max(values.mean() - half_width, 0))
        assert table["high"][layer] == pytest.approx(min(values.mean() + half_width, 1))
        if n > 5:
            assert float(components.half_width(n - 1, values.shape[1], 0.95)) > 0.08, "one trial less would do"


def test_measure__intervals_at_the_matched_temperature_rest_on_its_own_components(planned):
    """What was planned is about the cosine at the model's own temperature."""
    table = planned.to_pandas().set_index("layer")

    for index, layer in enumerate(table.index):
        n = table["n_trials"][layer]
        values = planned.per_image["cosine_matched"][index, :n].astype(np.float64)
        half_width = float(Components.of(values[:5], random_trials=True).half_width(n, values.shape[1], 0.95))
        assert table["matched_low"][layer] == pytest.approx(max(values.mean() - half_width, 0))
        assert table["matched_high"][layer] == pytest.approx(min(values.mean() + half_width, 1))


def test_measure__means_over_layers_count_each_layer_with_its_own_trials(planned):
    summary, table = planned.summary(), planned.to_pandas()
    common = planned.per_image["cosine"][:, :5].mean(axis=0)

    assert summary["n_trials_in_mean"] == 5
    assert summary["fewest_trials"] == table["n_trials"].min() < table["n_trials"].max() == summary["n_trials"]
    assert f"{summary['fewest_trials']} to {summary['n_trials']} trials" in repr(planned)
    assert f">{summary['fewest_trials']} to {summary['n_trials']}<" in planned._repr_html_()
    assert summary["criticality"]["mean"] == pytest.approx(table["criticality"].mean(), rel=1e-6)
    expected = estimate(common)
    width = summary["criticality"]["high"] - summary["criticality"]["low"]
    assert width == pytest.approx(expected.high - expected.low, rel=1e-6)
    assert summary["precision"]["not_reached"] == []


def test_measure__after_the_pilot_runs_no_more_of_the_trained_network_than_it_needs(monkeypatch):
    """Layers that have enough are run no more, and the trained network's logits are asked for once a batch."""
    visited = []
    sweep = GraphReplay.sweep

    def watched(self, images, *prepared):
        for name, logits in sweep(self, images, *prepared):
            visited.append((sum(map(len, prepared)), len(prepared), name))
            yield name, logits

    monkeypatch.setattr(GraphReplay, "sweep", watched)

    found = measure(network(), PIXELS, **ASKED, batch_size=50)

    n_batches = -(-found.record["probe_set"]["n_images"] // 50)
    resets = [name for n, _, name in visited if n and name is not None]
    for layer, cells in found.cells.groupby("layer"):
        assert resets.count(layer) == len(cells) * n_batches
    assert sum(name is None for n, _, name in visited if n) == n_batches
    assert max(n for _, n, _ in visited) > 1, "trials after the pilot are run together"


def test_measure__says_which_layers_the_cap_stops():
    found = measure(network(), PIXELS, **ASKED | {"half_width": 0.02, "max_trials": 8})

    table = found.to_pandas().set_index("layer")
    missed = table.index[table["half_width"] > 0.02]
    assert len(missed)
    assert set(table.index[table["status"] == "not_reached"]) >= set(missed)
    assert found.summary()["precision"]["not_reached"] == list(table.index[table["status"] == "not_reached"])
    assert found.summary()["n_layers_in_mean"] == len(table), "such layers are whole"
    notes = [note for note in found.record["notes"] if "instead of 0.02" in note]
    assert len(notes) == len(found.summary()["precision"]["not_reached"])
    assert found.plot() is not None


@pytest.mark.parametrize("reset", ["zero"])
def test_measure__of_a_reset_that_is_not_random_plans_images_only(reset):
    found = measure(network(), PIXELS, **ASKED, reset=reset)

    assert (found.to_pandas()["n_trials"] == 1).all()
    assert found.summary()["covers"] == "images"
    assert any("new images only" in note for note in found.record["notes"])


def test_measure__on_one_image_plans_trials_on_that_image():
    found = measure(network(), PIXELS[:1], **ASKED | {"max_trials": 20})

    assert found.summary()["covers"] == "trials"
    assert (found.to_pandas()["n_trials"] >= 5).all()


def test_measure__takes_more_images_where_the_pilots_are_too_few(monkeypatch):
    monkeypatch.setattr("layercrit.precision._FEWEST_IMAGES", 4)
    monkeypatch.setattr("layercrit.precision._SD_IMAGES", 0.001)

    found = measure(network(), PIXELS, **ASKED)

    n_images = found.record["probe_set"]["n_images"]
    assert found.plan.n_pilot_images == 4
    assert 4 < n_images == found.plan.n_images
    fixed = measure(network(), PIXELS, trials=5, n_images=n_images, dtype="float32", progress=False)
    np.testing.assert_allclose(found.per_image["cosine"][:, :5], fixed.per_image["cosine"], atol=1e-6)


def test_measure__with_layers_that_are_all_certain_ends_after_the_pilot():
    still = network()
    with torch.no_grad():
        still[5].weight.zero_()

    found = measure(still, PIXELS, **ASKED, layers="1,3")

    assert found.plan.trials() == {}
    assert (found.to_pandas()["criticality"].abs() < 1e-6).all()
    assert (found.to_pandas()["status"] == "ok").all()


def test_measure__leaves_the_model_and_the_random_state_as_they_were():
    subject = network()
    weights, state = copy.deepcopy(subject.state_dict()), torch.get_rng_state()

    measure(subject, PIXELS, **ASKED)

    assert all(torch.equal(weights[name], value) for name, value in subject.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_measure__does_not_depend_on_the_batch_size(planned):
    found = measure(network(), PIXELS, **ASKED, batch_size=7)

    assert found.to_pandas()["n_trials"].equals(planned.to_pandas()["n_trials"])
    np.testing.assert_allclose(found.per_image["cosine"], planned.per_image["cosine"], atol=1e-6)


# time


def test_measure__for_a_time_too_short_for_the_pilot_keeps_what_it_bought():
    found = measure(network(), PIXELS, minutes=1e-6, pilot=5, progress=False)

    assert found.cells["trial"].nunique() == 1
    assert found.plan is None
    assert any("1 of the 5 trials of the pilot" in note for note in found.record["notes"])


def test_measure__for_a_time_plans_the_smallest_half_width_that_it_allows():
    found = measure(network(), PIXELS, minutes=0.05, pilot=5, max_trials=30, dtype="float32", progress=False)

    assert found.plan is not None
    assert found.plan.half_width < 0.5
    table = found.to_pandas()
    assert (table.loc[table["status"] == "ok", "half_width"] <= found.plan.half_width).all()
    assert found.record["seconds"] < 15


# bad input


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"half_width": 0}, "half_width"),
        ({"half_width": -0.05}, "half_width"),
        ({"half_width": 1}, "half_width"),
        ({"half_width": float("nan")}, "half_width"),
        ({"half_width": True}, "half_width"),
        ({"half_width": "0.05"}, "half_width"),
        ({"minutes": 0}, "minutes"),
        ({"minutes": -1}, "minutes"),
        ({"half_width": 0.05, "minutes": 1}, "minutes"),
        ({"half_width": 0.05, "pilot": 2}, "pilot"),
        ({"half_width": 0.05, "max_trials": 5}, "max_trials"),
        ({"half_width": 0.05, "trials": 5}, "trials"),
        ({"half_width": 0.05, "interval": "betting"}, "betting"),
        ({"interval": "students"}, "students"),
    ],
)
def test_measure__refuses_what_cannot_be_planned(settings, word):
    with pytest.raises(ProtocolError, match=word):
        measure(network(), PIXELS, progress=False, **settings)


# going on


class _StopError(Exception):
    pass


def stopped(n_calls, folder, images=PIXELS, **settings):
    """Measure until so many calls of ``on_trial``, and return what is saved of it."""
    calls = []

    def on_trial(so_far):
        calls.append(so_far)
        if len(calls) == n_calls:
            so_far().save(folder)
            raise _StopError

    with pytest.raises(_StopError):
        measure(network(), images, on_trial=on_trial, **settings)
    return Measurement.load(folder)


@pytest.mark.parametrize("n_calls", [1, 4, 6])
def test_resume__gives_what_an_uninterrupted_measurement_gives(n_calls, planned, tmp_path, monkeypatch):
    monkeypatch.setattr("layercrit.precision._BYTES_OF_DRAWS", 2000)  # several groups after the pilot
    part = stopped(n_calls, tmp_path, **ASKED)
    assert not part.record["complete"]
    assert (part.plan is None) == (n_calls < 6)

    found = measure(network(), PIXELS, resume=part, **ASKED)

    assert found.record["complete"]
    np.testing.assert_allclose(found.per_image["cosine"], planned.per_image["cosine"], rtol=0, atol=1e-6)
    done = part.cells["trial"].nunique()
    np.testing.assert_array_equal(found.per_image["cosine"][:, :done], part.per_image["cosine"])
    assert found.to_pandas()["n_trials"].equals(planned.to_pandas()["n_trials"])
    if part.plan is not None:
        assert found.record["precision"] == part.record["precision"], "the plan is fixed once"


def test_resume__runs_nothing_again(tmp_path, monkeypatch):
    part = stopped(3, tmp_path, trials=5, dtype="float32", progress=False)
    drawn = []
    from layercrit.engine.session import Session

    draws = Session.draws
    monkeypatch.setattr(Session, "draws", lambda self, trials: drawn.extend(trials) or draws(self, trials))

    found = measure(network(), PIXELS, trials=5, dtype="float32", progress=False, resume=part)

    assert drawn == [3, 4]
    same(found, measure(network(), PIXELS, trials=5, dtype="float32", progress=False))


def test_resume__of_what_is_no_measurement_is_refused(tmp_path):
    with pytest.raises(ProtocolError, match=r"a measurement, not a str\. .*Measurement\.load"):
        measure(network(), PIXELS, trials=4, resume=str(tmp_path), progress=False)


def test_resume__with_more_trials_adds_them(tmp_path):
    few = measure(network(), PIXELS, trials=2, dtype="float32", progress=False)
    few.save(tmp_path)

    found = measure(network(), PIXELS, trials=4, dtype="float32", progress=False, resume=Measurement.load(tmp_path))

    same(found, measure(network(), PIXELS, trials=4, dtype="float32", progress=False))


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"reset": "zero"}, "reset"),
        ({"distances": ["l1"]}, "distances"),
        ({"n_images": 20}, "n_images"),
        ({"half_width": 0.2}, "half_width"),
        ({"layers": "1,3"}, "layers"),
    ],
)
def test_resume__of_another_measurement_is_refused(other, word, planned):
    with pytest.raises(ProtocolError, match=word):
        measure(network(), PIXELS, resume=planned, **ASKED | other)


def test_resume__of_more_trials_than_asked_for_is_refused():
    how = {"dtype": "float32", "progress": False}
    three = measure(network(), PIXELS[:8], trials=3, **how)
    with pytest.raises(
        ProtocolError, match=r"has 3 trials, more than the 2 asked for. Ask for 3 or more .*--overwrite"
    ):
        measure(network(), PIXELS[:8], trials=2, resume=three, **how)


def test_resume__says_of_the_last_run_alone_that_the_time_was_up():
    found = None
    for _ in range(3):
        found = measure(network(), PIXELS, minutes=1e-9, pilot=10, dtype="float32", progress=False, resume=found)
    assert found.record["precision"] is None
    assert [note.split(":")[0] for note in found.record["notes"] if "time was up" in note] == [
        "the time was up after 3 of the 10 trials of the pilot"
    ]


def test_resume__with_other_weights_or_images_is_refused(planned):
    changed = network()
    with torch.no_grad():
        changed[1].weight[0, 0] += 1
    with pytest.raises(ProtocolError, match="sha256"):
        measure(changed, PIXELS, resume=planned, **ASKED)
    with pytest.raises(ProtocolError, match="images"):
        measure(network(), 255 - PIXELS, resume=planned, **ASKED)


# files and texts


def test_save__keeps_unlike_numbers_of_trials(planned, tmp_path):
    planned.save(tmp_path)

    found = Measurement.load(tmp_path)

    same(found, planned)
    assert found.summary() == planned.summary()
    assert json.loads((tmp_path / "measurement.json").read_text())["precision"]["half_width"] == 0.08


def test_methods_section__has_the_numbers_of_the_measurement(planned, tmp_path):
    counts = planned.to_pandas()["n_trials"]

    text = methods_section(planned)

    assert methods_section(planned.save(tmp_path / "saved")) == text
    with pytest.raises(LayercritError, match="takes a measurement or its folder, not a Series"):
        methods_section(counts)
    for part in (f"{counts.min()} to {counts.max()}", "half-width of 0.08", "pilot of 5 trials", "95%", "Stein"):
        assert part in text, part
    assert f"{planned.plan.n_images:,} images" in text


def test_methods_section__of_fixed_trials_names_no_pilot():
    found = measure(network(), PIXELS, trials=4, n_images=20, interval="betting", progress=False)

    text = methods_section(found)

    assert "4 trials" in text
    assert "betting" in text
    assert "(seed 0)" in text, "with which others draw the same images"
    assert "pilot" not in text
    assert found.summary()["covers"] == "trials"


def test_methods_section__of_a_probe_set_that_was_drawn_by_itself():
    drawn = ProbeSet.from_array(PIXELS, Preprocessing(3, 2, 2), n_images=20, seed=3)
    text = methods_section(measure(network(), drawn, trials=2, progress=False))
    assert "(seed 3 of the probe set)" in text


@pytest.mark.parametrize(
    ("reset", "says"),
    [
        ("noise(scale=0.25)", "replaced by their own values plus normal noise of 0.25 times the root mean square"),
        ("moments(per=channel)", "replaced by normal draws with their own mean and standard deviation, per channel,"),
        ("permute", "replaced by their own values in random order,"),
    ],
)
def test_methods_section__says_what_the_reset_does(reset, says):
    found = measure(network(), PIXELS, trials=2, n_images=20, reset=reset, progress=False)
    assert says in methods_section(found)
