import platform
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import layercrit.study.worker as worker_module
from forked import FORKS, forked_workers, server
from layercrit.engine.session import Session
from layercrit.errors import ProbeError, StudyError
from layercrit.locks import holder
from layercrit.measuring import measure
from layercrit.probes.probe_set import ProbeSet
from layercrit.study.executors import Failed, Finished, Message
from layercrit.study.file import read_study_file
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.running import run_study
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from layercrit.study.worker import Measured, Planned, Progressed
from running_jobs import (
    ARCHITECTURE,
    LAYERS,
    PLACE,
    Inline,
    Killed,
    KillingWorkers,
    assert_same_tables,
    check_store,
    children_of,
    forgotten,
    is_running,
    n_parts,
    run,
    run_slowly,
    run_with_workers,
    tables,
    write_model,
    write_pixels,
    write_small,
)
from small_studies import N_LAYERS, write_study
from training_runs import write_run

N_CELLS = 2 * 2 * len(LAYERS)  # of `write_small`


@pytest.fixture
def study(tmp_path):
    return write_small(tmp_path / "study")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run of `write_small` gives; keys are of the content, so that it is so in every folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(write_small(folder), folder / "out")
    return tables(folder / "out")


@pytest.fixture
def own():
    """What a study file says to know the resets and distances of `own_resets`, in this test only."""
    with forgotten("own_resets"):
        yield {"imports": ["own_resets"]}


@pytest.fixture
def each_batch_a_part(monkeypatch):
    monkeypatch.setattr(worker_module, "_SECONDS_BETWEEN_PARTS", 0.0)


@pytest.fixture
def batches(monkeypatch):
    """Every (trial, first image) that resets are run on."""
    found = []
    run_batch = Session.run_batch

    def counted(self, draws, start):
        found.extend((trial, start) for trial in draws.seeds)
        return run_batch(self, draws, start)

    monkeypatch.setattr(Session, "run_batch", counted)
    return found


def measured(executor):
    """The tasks of a run that measured something."""
    return [event.task.name for event in executor.events if isinstance(getattr(event, "content", None), Measured)]


# values


@pytest.mark.parametrize(("dtype", "batch_size"), [("float32", "auto"), ("reference", 7)])
def test_run_study__finds_what_measure_finds(tmp_path, folder, dtype, batch_size):
    path = write_small(tmp_path, trials=3, n_images=24, protocol={"seed": 4, "dtype": dtype, "batch_size": batch_size})

    report = run(path, folder)

    assert (report.n_measured, report.n_known, report.failures) == (18, 0, [])
    _assert_equal_to_measure(path, folder, dtype=dtype, batch_size=batch_size, seed=4, trials=3)


def test_run_study__finds_what_measure_finds_in_a_residual_network(tmp_path, folder):
    path = write_study(tmp_path, n_models=1, trials=2, images={"n_images": 15}, protocol={"seed": 1, "batch_size": 8})

    assert run(path, folder).n_measured == 2 * N_LAYERS

    _assert_equal_to_measure(path, folder, seed=1, trials=2, n_images=15, batch_size=8, dtype="float32")


def _assert_equal_to_measure(path, folder, **settings):
    study = load_study(folder)
    with Store(folder) as store:
        for entry in read_study_file(path).models:
            found = study.cells[study.cells["model"] == entry.name].reset_index(drop=True)
            size = load_study(folder).record["probe_set"]["preprocessing"]
            reference = f"{entry.reference}&input_size=({size['channels']},{size['height']},{size['width']})"
            expected = measure(reference, path.parent / "images.npz", progress=False, **settings)
            per_image = store.per_image(found["key"].to_list())
            assert list(found["layer"]) == list(expected.cells["layer"])
            assert list(found["trial"]) == list(expected.cells["trial"])
            assert list(found["seed"]) == list(expected.cells["seed"])
            for name in expected.cells.columns.drop(["model", "seed"]).intersection(found.columns):
                if expected.cells[name].dtype.kind == "f":
                    np.testing.assert_allclose(found[name], expected.cells[name], rtol=1e-6, atol=1e-6, err_msg=name)
                else:
                    assert list(found[name]) == list(expected.cells[name]), name
            for name, values in expected.per_image.items():  # (n_layers, n_trials, n_images)
                stacked = np.stack([per_image[key][name] for key in found["key"]])
                np.testing.assert_allclose(stacked, values.reshape(stacked.shape), rtol=0, atol=1e-6, err_msg=name)
            row = study.to_pandas()
            row = row[row["model"] == entry.name].reset_index(drop=True)
            np.testing.assert_allclose(row["criticality"], expected.to_pandas()["criticality"], rtol=0, atol=1e-6)
            known = study.models.set_index("model")["record"][entry.name]["predictions"]
            numbers = {name: value for name, value in known.items() if name not in ("n_classes", "classes")}
            assert numbers == pytest.approx(expected.record["predictions"], rel=1e-5)


def test_run_study__writes_down_what_it_was_about(study, folder):
    report = run(study, folder)

    found = load_study(folder)
    assert read_study_file(folder / "study.toml") == read_study_file(study)
    assert found.record["probe_set"]["sha256"] == ProbeSet.load(folder / "probe_set").sha256
    assert found.record["protocol"]["trials"] == 2
    assert found.record["baseline"] == "m0"
    assert [record["machine"] for record in found.runs] == [platform.node()]
    assert "torch" in found.runs[0]["versions"]
    assert report.folder == folder
    assert report.seconds > 0


# nothing twice, nothing mixed in


def test_run_study__measures_nothing_twice(study, folder, batches):
    run(study, folder)
    expected = tables(folder)
    batches.clear()

    report = run(study, folder)

    assert (report.n_measured, report.n_known) == (0, N_CELLS)
    assert batches == []
    assert_same_tables(tables(folder), expected)


def test_run_study__more_trials_and_models_only_add(tmp_path, folder):
    run(write_small(tmp_path / "small", n_models=1, trials=1), folder)
    first = tables(folder)[0]
    larger = write_small(tmp_path / "small", n_models=2, trials=3)

    report = run(larger, folder)

    run(larger, tmp_path / "fresh")
    assert (report.n_known, report.n_measured) == (3, 15)
    assert_same_tables(tables(folder), tables(tmp_path / "fresh"))
    cells = tables(folder)[0]
    kept = cells[cells["key"].isin(first["key"])].reset_index(drop=True)
    assert (kept["cosine"] == first["cosine"]).all()


def test_run_study__fewer_trials_and_models_show_no_others(tmp_path, folder):
    run(write_small(tmp_path / "study", n_models=2, trials=3), folder)
    smaller = write_small(tmp_path / "study", n_models=2, trials=2)
    (tmp_path / "study" / "m1.safetensors").unlink()

    report = run(smaller, folder)

    run(smaller, tmp_path / "fresh")
    assert (report.n_known, report.n_measured, report.n_equal) == (6, 0, 0)
    assert_same_tables(tables(folder), tables(tmp_path / "fresh"))


def test_run_study__the_same_weights_under_another_name_are_known(tmp_path, folder):
    path = write_small(tmp_path)
    write_model(tmp_path / "m1.safetensors", 0)

    report = run(path, folder)

    assert (report.n_measured, report.n_known, report.n_equal) == (6, 6, 6)
    cells = load_study(folder).cells.set_index("model")
    assert list(cells.loc["m0", "cosine"]) == list(cells.loc["m1", "cosine"])


def _with_donor(folder, **sections):
    """Write a study of one model that has a donor."""
    models = [{"reference": f"file:m0.safetensors?{ARCHITECTURE}", "donor": "d0.safetensors"}]
    folder.mkdir(exist_ok=True)
    write_model(folder / "d0.safetensors", 10)
    return write_small(folder, n_models=1, **{"models": models, **sections})


CHANGES = {  # name -> (what the study says before, what it says after, what is done to its files)
    "weights": ({}, {}, lambda folder: write_model(folder / "m0.safetensors", 7)),
    "normalisation": ({}, {"models": [{"reference": f"file:m0.safetensors?{ARCHITECTURE}&mean=(0.2,0.2,0.2)"}]}, None),
    "reset": ({}, {"protocol": {"resets": ["permute"]}}, None),
    "donor": (
        {"protocol": {"resets": ["rewind"]}},
        {"protocol": {"resets": ["rewind"]}},
        lambda folder: write_model(folder / "d0.safetensors", 11),
    ),
    "seed": ({}, {"protocol": {"seed": 1}}, None),
    "pixels": ({}, {}, lambda folder: write_pixels(folder / "images.npz", seed=1)),
    "number of images": ({}, {"images": {"n_images": 20}}, None),
    "labels": ({}, {"images": {"labels": False}}, None),
    "dtype": ({}, {"protocol": {"dtype": "reference"}}, None),
    "distances": ({}, {"protocol": {"distances": ["l1"]}}, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_run_study__other_content_makes_other_cells(tmp_path, folder, change):
    before, after, act = CHANGES[change]
    first = run(_with_donor(tmp_path, **before), folder)
    expected = tables(folder)
    path = _with_donor(tmp_path, **after)
    if act:
        act(tmp_path)

    report = run(path, folder)

    run(path, tmp_path / "fresh")
    assert (report.n_measured, report.n_known) == (first.n_measured, 0)
    assert_same_tables(tables(folder), tables(tmp_path / "fresh"))
    assert not set(expected[0]["key"]) & set(tables(folder)[0]["key"])
    assert run(_with_donor(tmp_path, **before), folder).n_measured == 0, "what was measured before is still there"
    assert_same_tables(tables(folder), expected)


def test_run_study__a_changed_model_leaves_the_others_as_they_are(study, folder):
    run(study, folder)
    write_model(study.parent / "m1.safetensors", 7)

    report = run(study, folder)

    run(study, study.parent / "fresh")
    assert (report.n_measured, report.n_known) == (N_CELLS // 2, N_CELLS // 2)
    assert_same_tables(tables(folder), tables(study.parent / "fresh"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"protocol": {"batch_size": 5}}),
        ({}, {"protocol": {"level": 0.9}}),
        ({}, {"study": {"baseline": "m1", "name": "another"}}),
        ({}, {"protocol": {"types": "linear"}}),
        ({"protocol": {"distances": ["l1", "l2"]}}, {"protocol": {"distances": ["l2", "l1", "cosine"]}}),
    ],
)
def test_run_study__what_changes_no_number_makes_no_cell(tmp_path, folder, before, after):
    run(write_small(tmp_path, **before), folder)

    report = run(write_small(tmp_path, **after), folder)

    assert (report.n_measured, report.n_known) == (0, N_CELLS)


def test_run_study__labels_that_are_not_there_make_no_difference(tmp_path, folder):
    path = write_small(tmp_path, images={"labels": True})
    np.savez(tmp_path / "images.npz", images=np.load(tmp_path / "images.npz")["images"])
    run(path, folder)
    replaced = path.read_text().replace("labels = true", "labels = false")
    path.write_text(replaced)

    assert run(path, folder).n_measured == 0


def test_run_study__more_layers_only_add(tmp_path, folder):
    run(write_small(tmp_path, protocol={"layers": "1,5"}), folder)
    path = write_small(tmp_path)

    report = run(path, folder)

    run(path, tmp_path / "fresh")
    assert (report.n_known, report.n_measured) == (8, 4)
    assert_same_tables(tables(folder), tables(tmp_path / "fresh"))


@pytest.mark.parametrize("what", ["weights", "donor", "pixels"])
def test_run_study__never_shows_two_contents_at_once(tmp_path, folder, what, own):
    """However far the run after a change gets, the cells are all of before, or all of after."""
    path = _with_donor(tmp_path, study=own, protocol={"resets": ["half", "zero"]})
    run(path, tmp_path / "before")
    before = set(tables(tmp_path / "before")[0]["key"])
    if what == "pixels":
        write_pixels(tmp_path / "images.npz", seed=9)
    else:
        write_model(tmp_path / {"weights": "m0.safetensors", "donor": "d0.safetensors"}[what], 7)
    whole = Inline()
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    run(path, tmp_path / "after", whole)
    after = set(tables(tmp_path / "after")[0]["key"])

    for stop_after in range(len(whole.events)):
        shutil.copytree(tmp_path / "before", tmp_path / f"{stop_after}")
        with pytest.raises(Killed):
            run(path, tmp_path / f"{stop_after}", Inline(stop_after))
        keys = set(load_study(tmp_path / f"{stop_after}").cells["key"])
        assert keys <= before or keys <= after, f"after {stop_after} events"


# the images


@pytest.fixture
def decoded(monkeypatch):
    """The sources that were decoded."""
    found = []
    from_source = ProbeSet.from_source.__func__

    def counted(cls, source, *arguments, **settings):
        found.append(source)
        return from_source(cls, source, *arguments, **settings)

    monkeypatch.setattr(ProbeSet, "from_source", classmethod(counted))
    return found


def test_run_study__decodes_images_once(study, folder, decoded):
    for _ in range(3):
        run(study, folder)

    assert len(decoded) == 1


@pytest.mark.parametrize("harm", ["flipped", "shortened", "no pixels", "nothing"])
def test_run_study__decodes_damaged_images_anew(study, folder, decoded, harm):
    run(study, folder)
    pixels = folder / "probe_set" / "images.npy"
    content = bytearray(pixels.read_bytes())
    if harm == "flipped":
        content[-5] ^= 1
        pixels.write_bytes(content)
    elif harm == "shortened":
        pixels.write_bytes(content[:-5])
    else:
        for path in [pixels] if harm == "no pixels" else list(pixels.parent.iterdir()):
            path.unlink()

    report = run(study, folder)

    assert len(decoded) == 2
    assert (report.n_measured, report.n_known) == (0, N_CELLS)


def test_run_study__needs_the_source_no_more(study, folder, decoded):
    run(study, folder)
    (study.parent / "images.npz").unlink()

    assert run(study, folder).n_known == N_CELLS
    assert len(decoded) == 1


def test_run_study__takes_no_images_that_were_asked_for_in_another_way(tmp_path, folder, decoded, monkeypatch):
    """A run that ends between saving other images and saying so leaves images that nobody asked for."""
    path = write_small(tmp_path)
    other = path.with_name("other.toml")
    other.write_text(path.read_text().replace("[protocol]", "[protocol]\nseed = 3"))
    run(path, folder)
    expected = tables(folder)
    save = ProbeSet.save

    def killed(self, where):
        save(self, where)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ProbeSet, "save", killed)
        with pytest.raises(Killed):
            run(other, folder)

    report = run(path, folder)

    assert (report.n_measured, report.n_known) == (0, N_CELLS)
    assert_same_tables(tables(folder), expected)


def test_run_study__images_that_cannot_be_read_are_said(study, folder):
    (study.parent / "images.npz").write_bytes(b"no archive")

    with pytest.raises(ProbeError, match=r"images\.npz"):
        run(study, folder)
    assert holder(folder) is None
    write_pixels(study.parent / "images.npz")
    assert run(study, folder).n_measured == N_CELLS


# resets and distances


OPTIONS = ["noise(scale=0.5)", "noise", "moments(per=channel)", "donor"]


def test_run_study__resets_with_options(tmp_path, folder):
    """Each is a reset of its own: its cells have its name, and what `measure` gives; a second run knows them all."""
    path = _with_donor(tmp_path, protocol={"resets": ["noise( scale = .5 )", *OPTIONS]})
    report = run(path, folder)
    study = load_study(folder)
    assert report.n_measured == len(LAYERS) * (2 + 2 + 2 + 1)
    names = ["noise(scale=0.5)", "noise(scale=1)", "moments(per=channel)", "donor"]
    assert study.resets == names
    assert study.cells["key"].is_unique
    for name in names:
        donor = tmp_path / "d0.safetensors" if name == "donor" else None
        expected = measure(
            f"file:{tmp_path}/m0.safetensors?{ARCHITECTURE}&input_size=(3,2,2)", tmp_path / "images.npz",
            reset=name, trials=2, donor=donor, dtype="float32", device="cpu", progress=False,
        ).cells.sort_values(["depth", "trial"])  # fmt: skip
        found = study.cells[study.cells["reset"] == name].sort_values(["depth", "trial"])
        np.testing.assert_allclose(found["cosine"], expected["cosine"], atol=1e-6)
        assert list(found["seed"]) == list(expected["seed"])
    assert list(study.of_reset("noise(scale=.50)")["reset"].unique()) == ["noise(scale=0.5)"]
    assert study.compare(reset="noise( scale=0.5 )", baseline="m0").reset == "noise(scale=0.5)"
    with pytest.raises(StudyError, match=r"has no reset 'noise\(scale=2\)'"):
        study.of_reset("noise(scale=2)")
    assert run(path, folder).n_measured == 0


def test_run_study__resumes_resets_with_options(tmp_path, folder):
    path = _with_donor(tmp_path, protocol={"resets": OPTIONS})
    whole = Inline()
    run(path, tmp_path / "whole", whole)
    for stop_after in (1, len(whole.events) // 2):
        with pytest.raises(Killed):
            run(path, folder, Inline(stop_after))
    assert run(path, folder).n_measured > 0
    assert_same_tables(tables(folder), tables(tmp_path / "whole"))


def test_run_study__rewinds_to_several_epochs_of_the_own_run(tmp_path, folder):
    """The map epoch x layer after Zhang et al. is a study with one reset for each epoch."""
    states = {}
    for epoch in (0, 1, 2):
        write_model(tmp_path / "state.safetensors", 10 + epoch)
        states[epoch] = load_file(tmp_path / "state.safetensors")
    write_run(tmp_path / "run", states, arch=ARCHITECTURE.removeprefix("arch="), final=states[2])
    resets = [f"rewind(epoch={epoch})" for epoch in states]
    models = [{"reference": f"file:run?{ARCHITECTURE}"}]
    alone = {"n_models": 1, "study": {"baseline": None}}
    run(write_small(tmp_path, models=models, protocol={"resets": resets}, **alone), folder)
    cells = load_study(folder).cells
    assert list(cells["reset"].unique()) == resets
    assert set(cells["status"][cells["reset"] == "rewind(epoch=2)"]) == {"unchanged"}
    for epoch in (0, 1):
        donor = {"reference": f"file:run?{ARCHITECTURE}", "donor": f"run@epoch={epoch}"}
        other = tmp_path / f"{epoch}"
        run(write_small(tmp_path, models=[donor], protocol={"resets": ["rewind"]}, **alone), other)
        found = cells["cosine"][cells["reset"] == f"rewind(epoch={epoch})"]
        np.testing.assert_array_equal(found, load_study(other).cells["cosine"])


def test_run_study__several_resets(tmp_path, folder):
    resets = ["rerandomize", "zero", "rewind"]
    path = _with_donor(tmp_path, trials=3, protocol={"resets": resets})

    report = run(path, folder)

    study = load_study(folder)
    assert report.n_measured == len(LAYERS) * (3 + 1 + 1)
    counts = study.cells.groupby("reset")["trial"].nunique()
    assert dict(counts) == {"rerandomize": 3, "zero": 1, "rewind": 1}
    record = study.models["record"][0]
    assert record["random_trials"] == {"rerandomize": True, "zero": False, "rewind": False}
    assert record["donor"]["zero"] is None
    assert "d0.safetensors" in record["donor"]["rewind"]
    assert "d0.safetensors" not in record["donor"]["rerandomize"]
    assert [note for note in record["notes"] if "one trial" in note] == [
        "one trial instead of 3: all trials of the reset 'zero' are the same",
        "one trial instead of 3: all trials of the reset 'rewind' are the same",
    ]
    for entry in read_study_file(path).models:
        for reset in resets:
            settings = {"donor": tmp_path / "d0.safetensors"} if reset == "rewind" else {}
            expected = measure(
                f"{entry.reference}&input_size=(3,2,2)",
                tmp_path / "images.npz",
                trials=3,
                reset=reset,
                dtype="float32",
                progress=False,
                **settings,
            )
            found = study.cells[(study.cells["model"] == entry.name) & (study.cells["reset"] == reset)]
            np.testing.assert_allclose(found["cosine"], expected.cells["cosine"], rtol=0, atol=1e-6)
            assert found["cosine"].max() > 0.01


def test_run_study__knows_resets_and_distances_of_the_users(tmp_path, folder, own):
    sections = {"study": own, "protocol": {"resets": ["break"], "distances": ["least"]}}
    path = write_small(tmp_path, n_models=1, **sections)

    run(path, folder)

    cells = load_study(folder).cells.set_index("layer")
    assert dict(cells["status"]) == {"1": "ok", "3": "not_finite", "5": "unchanged"}
    assert 0 < cells.loc["1", "least"] < 1
    assert cells.loc[["3", "5"], ["cosine", "least", "cosine_matched"]].isna().all(axis=None)
    with Store(folder) as store:
        assert list(store.per_image(list(cells["key"]))) == [cells.loc["1", "key"]]
    assert run(path, folder).n_known == 3, "cells that are not ok are measured, too"


# failures


def test_run_study__a_broken_model_does_not_stop_the_others(tmp_path, folder):
    path = write_small(tmp_path, n_models=3)
    whole = (tmp_path / "m1.safetensors").read_bytes()
    (tmp_path / "m1.safetensors").write_bytes(whole[:100])

    report = run(path, folder)

    assert report.n_measured == N_CELLS
    assert [(f.model, f.reset, f.trial) for f in report.failures] == [
        ("m1", "rerandomize", 0),
        ("m1", "rerandomize", 1),
    ]
    assert all(f.error.startswith("CheckpointError: ") and "m1.safetensors" in f.error for f in report.failures)
    assert "in open_model" in report.failures[0].details
    assert load_study(folder).failures == tuple(report.failures)
    assert set(load_study(folder).cells["model"]) == {"m0", "m2"}

    (tmp_path / "m1.safetensors").write_bytes(whole)
    left = Inline()
    report = run(path, folder, left)
    assert (report.n_measured, report.n_known, report.n_retryable, len(report.failures)) == (0, N_CELLS, 2, 2)
    assert not [name for name in left.tasks if "m1" in name]

    report = run(path, folder, retry=True)
    assert (report.n_measured, report.n_known, report.n_retryable, report.failures) == (6, N_CELLS, 0, [])
    run(path, tmp_path / "fresh")
    assert_same_tables(tables(folder), tables(tmp_path / "fresh"))


def test_run_study__a_failure_is_replaced_by_the_next_one(tmp_path, folder):
    path = write_small(tmp_path, n_models=1, trials=1)
    (tmp_path / "m0.safetensors").write_bytes(b"")
    first = run(path, folder).failures

    (tmp_path / "m0.safetensors").unlink()
    path.write_text(path.read_text().replace("m*", "m0"))
    write_model(tmp_path / "m0.safetensors", 0)
    study = read_study_file(path)
    (tmp_path / "m0.safetensors").unlink()
    second = run_study(study, folder, retry=True, progress=False, executor=Inline()).failures

    assert len(first) == len(second) == 1
    assert first[0].error != second[0].error


def test_run_study__one_trial_may_fail(tmp_path, folder, own):
    sections = {"study": own, "protocol": {"resets": ["unlucky"]}}
    path = write_small(tmp_path, n_models=2, trials=6, **sections)

    report = run(path, folder)

    failed = {(f.model, f.trial) for f in report.failures}
    assert 0 < len(failed) < 12
    assert {f.error for f in report.failures} == {"RuntimeError: out of luck"}
    cells = load_study(folder).cells
    done = set(zip(cells["model"], cells["trial"], strict=True))
    assert done | failed == {(model, trial) for model in ("m0", "m1") for trial in range(6)}
    assert not done & failed
    assert report.n_measured == len(cells) == 3 * len(done)


def test_run_study__other_settings_try_failures_again(tmp_path, folder, own):
    path = write_small(tmp_path, n_models=2, protocol={"resets": ["unlucky"]}, study=own)
    n_failed = len(run(path, folder).failures)
    assert n_failed

    report = run(write_small(tmp_path, n_models=2), folder)

    assert (report.n_retryable, report.failures) == (0, [])


def test_run_study__a_model_that_predicts_nan_fails(tmp_path, folder):
    path = write_small(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "m1.safetensors")
    state["5.bias"][1] = torch.nan
    save_file(state, tmp_path / "m1.safetensors")

    report = run(path, folder)

    assert report.n_measured == 6
    assert {f.model for f in report.failures} == {"m1"}
    assert all("itself predicts NaN" in f.error for f in report.failures)
    assert check_store(folder) == 6


def test_run_study__failures_are_printed_once_for_each_model(tmp_path, folder, capsys):
    path = write_small(tmp_path, trials=3)
    (tmp_path / "m1.safetensors").write_bytes(b"")

    run_study(read_study_file(path), folder, executor=Inline())

    assert capsys.readouterr().err.count("failed: CheckpointError") == 1


@pytest.mark.parametrize("where", ["a file", "read-only"])
def test_run_study__a_folder_that_cannot_be_used_is_said(study, tmp_path, where):
    folder = tmp_path / "there"
    if where == "a file":
        folder.write_text("")
    else:
        folder = tmp_path / "images.npz" / "inside"
        (tmp_path / "images.npz").write_text("")

    with pytest.raises(StudyError, match="cannot be used"):
        run(study, folder)


# interruptions in this process: after every event


@pytest.fixture(scope="module")
def nines(tmp_path_factory):
    """As `uninterrupted`, in three batches: two parts, and the rest."""
    folder = tmp_path_factory.mktemp("nines")
    run(write_small(folder, protocol={"batch_size": 9}), folder / "out")
    return tables(folder / "out")


@pytest.mark.parametrize("stop_after", range(20))
def test_run_study__goes_on_after_an_interruption(tmp_path, folder, each_batch_a_part, nines, stop_after):
    path = write_small(tmp_path, protocol={"batch_size": 9})
    first, second = Inline(stop_after), Inline()
    with pytest.raises(Killed):
        run(path, folder, first)
    n_whole = len(LAYERS) * len(measured(first))
    assert check_store(folder) == n_whole

    report = run(path, folder, second)

    assert (report.n_known, report.n_measured) == (n_whole, N_CELLS - n_whole)
    assert_same_tables(tables(folder), nines)
    assert n_parts(folder) == 0


def test_run_study__the_events_of_a_run_are_as_many_as_are_interrupted_above(tmp_path, folder, each_batch_a_part):
    path = write_small(tmp_path, n_models=2, protocol={"batch_size": 9})
    whole = Inline()
    run(path, folder, whole)

    kinds = [type(getattr(event, "content", event)).__name__ for event in whole.events]

    assert kinds == ["Planned", "Progressed", "Progressed", "Measured", "Finished"] * 4


def test_run_study__gets_ahead_however_often_it_is_interrupted(tmp_path, folder, each_batch_a_part, batches):
    """Each run ends after its first batch: no batch is run a second time."""
    path = write_small(tmp_path, n_models=1, protocol={"batch_size": 5})

    n_runs = 0
    while check_store(folder) < 6:
        n_runs += 1
        # the tasks that are done give a plan and an end; the next gives a plan and a part
        n_done = check_store(folder) // 3
        with pytest.raises(Killed):
            run(path, folder, Inline(2 * n_done + 2))

    assert n_runs == 10
    run(path, tmp_path / "whole", Inline())
    assert sorted(batches[:10]) == [(trial, start) for trial in (0, 1) for start in (0, 5, 10, 15, 20)]
    assert len(batches) == 20
    assert_same_tables(tables(folder), tables(tmp_path / "whole"))
    assert n_parts(folder) == 0


@pytest.mark.parametrize(("first", "second"), [(5, 16), (16, 7), (7, 1), (1, 24)])
def test_run_study__goes_on_with_another_batch_size(tmp_path, folder, each_batch_a_part, uninterrupted, first, second):
    with pytest.raises(Killed):
        run(write_small(tmp_path, protocol={"batch_size": first}), folder, Inline(2))
    assert n_parts(folder) == 1

    run(write_small(tmp_path, protocol={"batch_size": second}), folder)

    assert_same_tables(tables(folder), uninterrupted, atol=1e-6)


# kill -9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_run_study__loses_nothing_by_kill_9(tmp_path, seed):
    """Six kills at random moments of a study, from the first import on; then it is finished."""
    path = write_small(tmp_path, n_models=2, trials=3, protocol={"batch_size": 8})
    generator = np.random.default_rng(seed)
    folder = tmp_path / "out"
    started = time.monotonic()
    _killed(path, folder, None)
    length = time.monotonic() - started
    run(path, tmp_path / "whole")
    assert_same_tables(tables(folder), tables(tmp_path / "whole"))
    folder = tmp_path / "killed"

    found = [0]
    for seconds in generator.uniform(0, length / 2, 6):
        _killed(path, folder, seconds)
        found.append(check_store(folder))

    assert found == sorted(found), "cells were lost"
    report = run(path, folder)
    assert report.n_known == found[-1]
    assert_same_tables(tables(folder), tables(tmp_path / "whole"))
    assert n_parts(folder) == 0


def _killed(path, folder, seconds):
    """Run a study in a process that is killed after some time; with None, in one that may finish."""
    process = FORKS.Process(target=run_slowly, args=(path, folder, 0.02))
    process.start()
    if seconds is not None:
        process.join(seconds)
        process.kill()
    process.join()
    assert process.exitcode == (0 if seconds is None else -9 if process.exitcode else 0)


@pytest.mark.slow
def test_run_study__workers_vanish_with_a_killed_run(tmp_path):
    path = write_small(tmp_path, n_models=2, trials=5, n_images=200, protocol={"batch_size": 2})
    folder, generator = tmp_path / "out", np.random.default_rng(0)
    found = 0
    parent_of_all, address = server()
    others = set(children_of(parent_of_all))
    for _ in range(2):
        process = FORKS.Process(target=run_with_workers, args=(path, folder, 2, address))
        process.start()
        deadline = time.monotonic() + 60
        while check_store(folder, n_images=200) == found and process.exitcode is None:
            assert time.monotonic() < deadline, "nothing is measured"
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 0.5))
        workers = set(children_of(parent_of_all)) - {process.pid, *others}
        process.kill()
        process.join()
        found = check_store(folder, n_images=200)
        deadline = time.monotonic() + 10
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "workers outlive their run"
            time.sleep(0.05)
        assert workers or process.exitcode == 0

    report = run(path, folder)

    run(write_small(tmp_path / "quickly", n_models=2, trials=5, n_images=200), tmp_path / "whole")
    assert report.n_known == found
    assert_same_tables(tables(folder), tables(tmp_path / "whole"), atol=1e-6)
    assert n_parts(folder) == 0


# workers


@pytest.mark.slow
def test_run_study__a_killed_worker_is_replaced(tmp_path, folder):
    path = write_small(tmp_path, n_models=2, trials=3, protocol={"resets": ["rerandomize", "zero"]})
    executor = KillingWorkers([PLACE, PLACE], at=[2])

    with forked_workers():
        report = run(path, folder, executor)

    run(path, tmp_path / "whole")
    assert len(executor.killed) == 1
    assert (report.n_known + report.n_measured, report.failures) == (24, [])
    assert_same_tables(tables(folder), tables(tmp_path / "whole"), atol=1e-6)
    assert n_parts(folder) == 0


@pytest.mark.slow
def test_run_study__a_deadly_reset_is_a_failure(tmp_path, folder, own):
    path = write_small(tmp_path, n_models=1, study=own, protocol={"resets": ["deadly", "zero"]})

    with forked_workers():
        report = run(path, folder, LocalProcesses([PLACE], attempts=1))

    assert [(f.model, f.reset, f.details) for f in report.failures] == [("m0", "deadly", "")]
    assert "died once (exit code 3)" in report.failures[0].error
    assert report.n_measured == 3


# the lock


def test_run_study__a_folder_is_run_by_one_process_at_a_time(study, folder):
    process = FORKS.Process(target=run_slowly, args=(study, folder, 60.0))
    process.start()
    deadline = time.monotonic() + 30
    while not (folder / "study.toml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)

    assert holder(folder).startswith(f"process {process.pid} on {platform.node()}, since 20")
    with pytest.raises(StudyError, match=rf"is being run by process {process.pid} on {platform.node()}, since 20"):
        run(study, folder)

    process.kill()
    process.join()
    assert holder(folder) is None
    assert run(study, folder).n_measured > 0
    assert check_store(folder) == N_CELLS


def test_run_study__lets_go_of_the_folder_after_an_error(study, folder):
    with pytest.raises(Killed):
        run(study, folder, Inline(1))

    assert holder(folder) is None
    assert run(study, folder).n_measured == N_CELLS


# events


def test_run_study__keeps_what_workers_say_as_they_say_it(study, folder, each_batch_a_part):
    """When an event is asked for, the one before is in the store."""
    seen = []

    class Looking(Inline):
        def _run(self, tasks, start, answer):
            for event in super()._run(tasks, start, answer):
                yield event
                content = getattr(event, "content", event)
                with Store(folder) as store:
                    if isinstance(content, Progressed):
                        seen.append(store.parts(content.task)[-1].stop == content.part.stop)
                    elif isinstance(content, Measured):
                        seen.append(len(store.known([cell.key for cell in content.cells])) == len(LAYERS))
                        assert store.parts(content.task) == []

    study.write_text(study.read_text().replace('device = "cpu"', 'device = "cpu"\nbatch_size = 10'))
    run(study, folder, Looking())

    assert seen == [True] * 12


def test_inline__says_what_local_processes_say(study, folder):
    executor = Inline()
    run(study, folder, executor)

    assert {type(event) for event in executor.events} == {Planned, Message, Finished}
    assert Failed not in map(type, executor.events)
