"""Studies that ask their models under several conditions: probe sets, norm statistics, epochs of training runs."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from conditioned_studies import N, write, write_weights
from forked import forked_workers
from layercrit.comparison import compare
from layercrit.conditions import Condition, under
from layercrit.differences import condition_differences, differences
from layercrit.errors import StudyError
from layercrit.measuring import measure
from layercrit.study.file import read_study_file
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.merging import merge_studies
from layercrit.study.planning import plan_study
from layercrit.study.tables import load_study
from running_jobs import PLACE, Inline, Killed, run

CLEAN, DARK = Condition("clean"), Condition("dark")
REESTIMATED = Condition("clean", "reestimate")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    run(write(folder, study={"baseline": "m0"}), folder / "out")
    return load_study(folder / "out")


def test_run__every_model_under_every_condition(study):
    assert list(study.models["model"]) == [
        "m0", "m0 (dark)", "m0 (statistics re-estimated)", "m0 (dark, statistics re-estimated)",
        "m1", "m1 (dark)", "m1 (statistics re-estimated)", "m1 (dark, statistics re-estimated)",
    ]  # fmt: skip
    assert study.conditions == [CLEAN, DARK, REESTIMATED, Condition("dark", "reestimate")]
    assert len(study.cells) == 8 * 2 * 2
    assert (study.cells["status"] == "ok").all()
    assert set(study.progress()["state"]) == {"done"}


@pytest.mark.parametrize(
    ("condition", "images"),
    [(CLEAN, "clean"), (DARK, "dark"), (REESTIMATED, "clean")],
    ids=["clean", "dark", "reestimate"],
)
def test_compare__is_what_a_measurement_of_its_own_gives(study, condition, images):
    """The twin: each model measured alone, on these images and with these statistics."""
    found = compare(study, probe_set=condition.probe_set, norm_statistics=condition.norm_statistics)
    assert found.condition == condition
    assert json.loads(json.dumps(found.to_dict()))["condition"]["probe_set"] == condition.probe_set
    folder = study.folder.parent
    for place, model in enumerate(found.criticality.index):
        alone = measure(
            f"file:{folder}/m{place}.safetensors?arch=py:conditioned_studies:network&input_size=(3,2,2)",
            str(folder / f"{images}.npz"),
            trials=2,
            norm_statistics=condition.norm_statistics,
            progress=False,
        )
        expected = alone.to_pandas().set_index("layer")["criticality"]
        np.testing.assert_allclose(found.criticality.loc[model], expected, atol=1e-6)


def test_compare__names_mean_the_variant_under_the_condition(study):
    found = compare(study, probe_set="dark", baseline="m1")
    assert list(found.criticality.index) == ["m0 (dark)", "m1 (dark)"]
    assert found.baseline == "m1 (dark)"
    assert compare(study, probe_set="dark").baseline == "m0 (dark)"  # the study's own
    left = compare(study, norm_statistics="reestimate", leave_out=["m0"])
    assert list(left.criticality.index) == ["m1 (statistics re-estimated)"]
    assert left.left_out == ("m0 (statistics re-estimated)",)
    assert list(compare(study).criticality.index) == ["m0", "m1"]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"probe_set": "drak"}, "no probe set 'drak'. Did you mean 'dark'"),
        ({"norm_statistics": "reset"}, "no norm statistics 'reset'"),
        ({"epoch": 3}, "no epoch '3'"),
    ],
)
def test_compare__an_unknown_condition(study, asked, text):
    with pytest.raises(StudyError, match=text):
        compare(study, **asked)


def test_differences__under_one_condition(study):
    found = differences(study, probe_set="dark", pairs="all").table
    assert set(zip(found["first"], found["second"], strict=True)) == {("m0 (dark)", "m1 (dark)")}


def test_condition_differences__statistics_are_paired_by_draw_and_image(study):
    """Against the loop: the mean over trials and images of the difference in each."""
    found = condition_differences(study, norm_statistics="reestimate").table
    assert set(found["second"]) == {"m0", "m1"}
    assert set(found["covers"]) == {"trials and images"}
    for row in found.itertuples():
        one, other = (study.per_image(model, row.layer) for model in (row.first, row.second))
        assert row.first == f"{row.second} (statistics re-estimated)"
        assert row.difference == pytest.approx((one.astype(float) - other).mean(), abs=1e-9)


def test_condition_differences__probe_sets_are_paired_by_draw(study):
    found = condition_differences(study, probe_set="dark", leave_out=["m1"]).table
    assert set(found["covers"]) == {"trials"}
    for row in found.itertuples():
        one, other = (study.per_image(model, row.layer).mean(axis=1, dtype=float) for model in ("m0 (dark)", "m0"))
        change = one - other  # (n_trials,)
        half = 12.706204736 * change.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
        assert row.difference == pytest.approx(change.mean(), abs=1e-6)
        assert row.low == pytest.approx(max(-1, change.mean() - half), abs=1e-5)


def test_condition_differences__nothing_to_differ_from(study):
    with pytest.raises(StudyError, match=r"cannot differ from itself. Name another one: images dark; .*re-estimated"):
        condition_differences(study)


def test_run__again_measures_nothing_and_another_condition_only_itself(study, tmp_path):
    folder = study.folder.parent
    (folder / "study.toml").write_text((study.folder / "study.toml").read_text())  # as it was written down
    assert run(folder / "study.toml", study.folder).n_measured == 0
    more = write(folder, protocol={"norm_statistics": ["trained", "reestimate", "reset"]}, study={"baseline": "m0"})
    executor = Inline()
    report = run(more, study.folder, executor=executor)
    assert report.n_measured == 2 * 2 * 2 * 2
    after = load_study(study.folder)
    kept = after.cells.merge(study.cells, on="key")
    assert len(kept) == len(study.cells)
    pd.testing.assert_series_equal(kept["cosine_x"], kept["cosine_y"], check_names=False)


def test_read_study_file__one_condition_names_no_variants(tmp_path):
    path = write(tmp_path, protocol={"norm_statistics": "reestimate"},
                 images={"source": "clean.npz", "input_size": [3, 2, 2]})  # fmt: skip
    found = read_study_file(path)
    assert [(entry.name, entry.norm_statistics, entry.probe_set) for entry in found.models] == [
        ("m0", "reestimate", None), ("m1", "reestimate", None),
    ]  # fmt: skip


def test_read_study_file__what_a_probe_set_does_not_say_is_as_in_the_first(tmp_path):
    path = write(tmp_path, images=[
        {"name": "a", "source": "clean.npz", "n_images": 7, "labels": False, "input_size": [3, 2, 2]},
        {"name": "b", "source": "dark.npz"},
        {"name": "c", "source": "dark.npz", "n_images": 5, "labels": True},
    ])  # fmt: skip
    found = read_study_file(path)
    assert [(one.name, one.n_images, one.labels) for one in found.images] == [
        ("a", 7, False), ("b", 7, False), ("c", 5, True),
    ]  # fmt: skip
    (tmp_path / "again.toml").write_text(found.to_toml())
    assert read_study_file(tmp_path / "again.toml").images == found.images


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([{"name": "a", "source": "clean.npz"}, {"source": "dark.npz"}], "no. 2: has no name"),
        ([{"name": "a", "source": "clean.npz"}, {"name": "a", "source": "dark.npz"}], "two probe sets are named 'a'"),
        (
            [{"name": "a", "source": "clean.npz"}, {"name": "b", "source": "x", "input_size": [3, 4, 4]}],
            "'b' has other pixels",
        ),
    ],
)
def test_read_study_file__mistakes_in_probe_sets(tmp_path, images, text):
    with pytest.raises(StudyError, match=text):
        read_study_file(write(tmp_path, images=images))


def test_epochs__of_training_runs(tmp_path):
    """A training run's kept epochs are models of their own, under a condition each; others have none."""
    for number in (0, 2, 5):
        write_weights(tmp_path / "runs" / "one" / "epochs" / f"epoch-{number:04d}.safetensors", 10 + number)
    write_weights(tmp_path / "runs" / "one" / "one.safetensors", 99)
    models = [
        {"name": "one", "reference": "file:runs/one?arch=py:conditioned_studies:network"},
        {"name": "other", "reference": "file:m0.safetensors?arch=py:conditioned_studies:network"},
    ]
    images = {"source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]}
    path = write(tmp_path, protocol={"epochs": "all"}, models=models, images=images, study={"baseline": None})
    run(path, tmp_path / "out")
    study = load_study(tmp_path / "out")
    assert list(study.models["model"]) == ["one", "one (epoch 0)", "one (epoch 2)", "one (epoch 5)", "other"]
    assert [one.epoch for one in study.conditions] == [None, 0, 2, 5]
    found = compare(study, epoch=2)
    alone = measure(
        f"file:{tmp_path}/runs/one@epoch=2?arch=py:conditioned_studies:network&input_size=(3,2,2)",
        str(tmp_path / "clean.npz"), trials=2, progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(found.criticality.loc["one (epoch 2)"], alone.to_pandas()["criticality"], atol=1e-6)
    chosen = read_study_file(
        write(tmp_path, protocol={"epochs": [0, 3]}, models=models, images=images, study={"baseline": None})
    )
    assert [entry.epoch for entry in chosen.models] == [None, 0, None]
    with pytest.raises(StudyError, match="epochs: no model is the folder of a training run that kept one of these"):
        read_study_file(
            write(tmp_path, protocol={"epochs": [3]}, models=models, images=images, study={"baseline": None})
        )


def test_store__a_file_from_before_there_were_conditions(study, tmp_path):
    """Rows that an older version wrote, with checksums over fewer columns, are sound; damage to them still shows."""
    import contextlib
    import sqlite3

    from layercrit.study.migrations import MIGRATIONS, statements
    from layercrit.study.rows import ModelRow, checksum
    from layercrit.study.store import FILE, Store

    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as old:
        old.create_function("checksum", -1, checksum)
        for step in MIGRATIONS[:4]:
            for statement in statements(step):
                old.execute(statement)
        insert = "INSERT INTO models (model, position, reference, record) VALUES (?, ?, ?, ?)"
        old.executemany(insert, [("a", 0, "x", None), ("b", 1, "y", '{"sha256": "1"}'), ("c", 2, "z", None)])
        old.execute("UPDATE models SET reference = 'other' WHERE model = 'c'")  # without its checksum
        old.execute(f"PRAGMA application_id = {int.from_bytes(b'lcrt', 'big')}")
        old.execute("PRAGMA user_version = 4")
        old.commit()
    with Store(tmp_path) as store:
        assert store.models() == [ModelRow("a", "x"), ModelRow("b", "y", record={"sha256": "1"})]
        assert list(store.damaged) == ["a row of the table models (model c)"]
        with store.transaction():
            store.put_record("a", {"sha256": "2"})
            store.put_models([*store.models(), ModelRow("d", "v", variant_of="a", epoch=3, probe_set="fog")])
        assert [row.epoch for row in store.models()] == [None, None, 3]


ATTACK = "attack:pgd(norm=linf, eps=40/255, steps=3)"


def test_run__adversarial_images_are_made_once_on_each_model_and_kept(tmp_path):
    images = [
        {"name": "clean", "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]},
        {"name": "adversarial", "source": ATTACK},
        {"name": "dim", "source": "corrupt:brightness@5"},
    ]
    path = write(tmp_path, images=images, protocol={}, study={"baseline": "m0"})
    run(path, tmp_path / "out")
    study = load_study(tmp_path / "out")
    assert study.failures == ()
    kept = sorted((tmp_path / "out" / "adversarial").iterdir())
    assert len(kept) == 2
    times = [(one / "images.npy").stat().st_mtime_ns for one in kept]
    for name, source in (("adversarial", f"{ATTACK}:{tmp_path}/clean.npz"),
                         ("dim", f"corrupt:brightness@5:{tmp_path}/clean.npz")):  # fmt: skip
        found = compare(study, probe_set=name).criticality
        for place in range(2):
            alone = measure(
                f"file:{tmp_path}/m{place}.safetensors?arch=py:conditioned_studies:network&input_size=(3,2,2)",
                source, trials=2, progress=False,
            )  # fmt: skip
            np.testing.assert_allclose(found.loc[f"m{place} ({name})"], alone.to_pandas()["criticality"], atol=1e-6)
    assert study.models.set_index("model")["top1_accuracy"]["m0 (adversarial)"] < 0.5
    more = write(tmp_path, images=images, protocol={"trials": 3}, study={"baseline": "m0"})
    with forked_workers():
        assert run(more, tmp_path / "out", executor=LocalProcesses([PLACE] * 2)).n_measured == 2 * 3 * 2
    assert [(one / "images.npy").stat().st_mtime_ns for one in kept] == times, "the images were attacked again"
    table = load_study(tmp_path / "out").by_class("m0 (adversarial)")  # finds the images that the model was shown
    assert table["n_images"].groupby(table["layer"]).sum().eq(N).all()


class Elsewhere(Inline):
    is_remote = True


def test_run__adversarial_images_are_not_made_on_other_machines(tmp_path):
    path = write(tmp_path, protocol={}, images=[
        {"name": "clean", "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]},
        {"name": "adversarial", "source": ATTACK},
    ])  # fmt: skip
    with pytest.raises(StudyError, match="Run such a study here, in shards"):
        run(path, tmp_path / "out", executor=Elsewhere())


def begun(path, folder):
    """Run a study until it asks what is known of the first model, and read it then."""
    with pytest.raises(Killed):
        run(path, folder, executor=Inline(stop_after=0))
    return load_study(folder)


@pytest.mark.parametrize("change", ["statistics", "images"])
def test_run__a_condition_of_the_same_name_that_is_another_begins_anew(tmp_path, change):
    """Nothing is shown under a new condition that was measured under the old one, before any model is opened."""
    images = [
        {"name": "clean", "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]},
        {"name": "dim", "source": "corrupt:brightness@1"},
    ]
    run(write(tmp_path, images=images, protocol={"norm_statistics": "trained"}), tmp_path / "out")
    before = load_study(tmp_path / "out").cells
    if change == "images":
        images[1] = images[1] | {"source": "corrupt:brightness@5"}
    how = "reset" if change == "statistics" else "trained"
    path = write(tmp_path, images=images, protocol={"norm_statistics": how})
    kept = begun(path, tmp_path / "out").cells["model"].value_counts()
    assert dict(kept) == ({"m0": 4, "m1": 4} if change == "images" else {})
    assert run(path, tmp_path / "out").n_measured == (8 if change == "images" else 16)
    after = load_study(tmp_path / "out").cells
    changed = after[after["model"].str.endswith("(dim)")]
    assert not set(changed["key"]) & set(before["key"])


def test_run__a_study_from_before_there_were_sets_is_the_same(study):
    measured = study.record["measured"]
    assert "sets" not in measured
    assert "norm_statistics" not in measured


def test_run__probe_sets_of_unlike_sizes(tmp_path):
    images = [
        {"name": "few", "source": "clean.npz", "n_images": 5, "input_size": [3, 2, 2]},
        {"name": "many", "source": "dark.npz", "n_images": N, "labels": False},
    ]
    path = write(tmp_path, images=images, protocol={}, models=[
        {"reference": "file:m*.safetensors?arch=py:conditioned_studies:network", "accuracy": None}])  # fmt: skip
    plan = plan_study(read_study_file(path))
    assert plan.n_images == 5
    run(path, tmp_path / "out")
    study = load_study(tmp_path / "out")
    assert dict(study.cells.groupby("model")["n_images"].max()) == {"m0": 5, "m0 (many)": N, "m1": 5, "m1 (many)": N}


def test_read_study_file__a_documented_accuracy_is_that_on_the_first_probe_set(tmp_path):
    models = [{"name": "a", "reference": "file:m0.safetensors?arch=py:conditioned_studies:network", "accuracy": 0.9}]
    found = read_study_file(write(tmp_path, models=models, study={"baseline": None})).models
    assert {entry.name: entry.accuracy for entry in found} == {
        "a": 0.9, "a (dark)": None, "a (statistics re-estimated)": 0.9, "a (dark, statistics re-estimated)": None,
    }  # fmt: skip


def test_compare__a_combination_that_nobody_has(study):
    models = study.models[study.models["probe_set"].ne("dark") | study.models["norm_statistics"].eq("trained")]
    with pytest.raises(StudyError, match="nothing under the condition 'images dark, norm statistics re-estimated'"):
        under(models, study.folder, probe_set="dark", norm_statistics="reestimate")


def test_merge_studies__conditions(study, tmp_path):
    """Probe sets of one name are compared by their images; unlike conditions are said; what is alike is kept."""
    shutil.copytree(study.folder, tmp_path / "copy")
    merge_studies([study.folder, tmp_path / "copy"], tmp_path / "same")
    assert load_study(tmp_path / "same").record["probe_sets"] == study.record["probe_sets"]
    models = [{"name": "x", "reference": "file:m1.safetensors?arch=py:conditioned_studies:network"}]
    images = [
        {"name": "clean", "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]},
        {"name": "dark", "source": "corrupt:brightness@5"},
    ]
    path = write(tmp_path / "other", models=models, images=images, protocol={}, study={"baseline": None})
    run(path, tmp_path / "other" / "out")
    merge_studies([study.folder, tmp_path / "other" / "out"], tmp_path / "merged")
    merged = load_study(tmp_path / "merged")
    notes = " ".join(merged.record["notes"])
    assert "used different images" in notes
    assert "different conditions" in notes
    assert list(compare(merged, probe_set="dark").criticality.index) == ["m0 (dark)", "m1 (dark)", "x (dark)"]
