import hashlib
import json

import pandas as pd
import pytest

from layercrit.comparison import compare
from layercrit.conditions import Condition
from layercrit.errors import StudyError
from layercrit.study.file import read_study_file
from layercrit.study.merging import merge_studies
from layercrit.study.published import import_published
from layercrit.study.running import run_study
from layercrit.study.store import FILE, CellRow, ModelRow, PlanRow, Store
from layercrit.study.tables import load_study
from published_results import MODELS, PREDICTED, measured, rows_of, write_models, write_table
from running_jobs import Inline
from small_studies import N_LAYERS, OPTIONS, write_study

OTHERWISE = ["run", "seconds", "finished"]  # columns of cells that differ from run to run


def run(path, folder):
    run_study(read_study_file(path), folder, executor=Inline(), progress=False)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two models and two trials, run at once."""
    folder = tmp_path_factory.mktemp("whole")
    return load_study(run(write_study(folder, trials=2, n_images=8), folder / "study"))


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The same study on two machines: one model each."""
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"machine{seed}")
        models = [{"reference": f"file:m{seed}.safetensors?{OPTIONS}", "name": f"m{seed}"}]
        section = {"baseline": "m0" if seed == 0 else None}
        path = write_study(folder, trials=2, n_images=8, models=models, study=section)
        folders.append(run(path, folder / "study"))
    return folders


def assert_same_tables(found, expected):
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas())
    machines = ["reference"]
    pd.testing.assert_frame_equal(found.by_model().drop(columns=machines), expected.by_model().drop(columns=machines))
    columns = [name for name in expected.cells.columns if name not in OTHERWISE]
    pd.testing.assert_frame_equal(found.cells[columns], expected.cells[columns])
    with Store(found.folder) as one, Store(expected.folder) as other:
        keys = expected.cells["key"].to_list()
        ones, others = one.per_image(keys), other.per_image(keys)
    assert len(ones) == len(keys)
    for key, values in others.items():
        assert all((ones[key][name] == values[name]).all() for name in values)


def state(folder):
    """Every file below a folder and what is in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made(folder, names, layers=("conv1", "fc"), trials=(0, 1), cosine=0.25, **options):
    """A study in a moment."""
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": cosine}
        for model in names for layer in layers for trial in trials
    ]  # fmt: skip
    return measured(folder, cells, **options)


# Parts of one study


def test_merge_studies__other_models_on_two_machines(whole, halves, tmp_path):
    before = [state(folder) for folder in halves]
    merged = merge_studies(halves, tmp_path / "merged")
    assert [state(folder) for folder in halves] == before, "a source was changed"
    assert_same_tables(merged, whole)
    assert_same_tables(load_study(tmp_path / "merged"), whole)
    assert merged.record["baseline"] == "m0"
    assert merged.record["notes"] == []
    assert merged.record["probe_set"]["sha256"] == whole.record["probe_set"]["sha256"]
    assert merged.progress()["state"].to_list() == ["done", "done"]
    assert merged.seconds_left() is None
    assert [run["run"] for run in merged.runs] == [1, 2]
    assert merged.cells.groupby("model")["run"].unique().map(list).to_dict() == {"m0": [1], "m1": [2]}
    assert compare(merged).models["difference"].to_list() == compare(whole).models["difference"].to_list()


def test_merge_studies__other_trials_on_two_machines(whole, halves, tmp_path):
    one_trial = run(write_study(tmp_path, n_models=2, trials=1, n_images=8), tmp_path / "one")
    merged = merge_studies([one_trial, whole.folder], tmp_path / "merged")
    assert_same_tables(merged, whole)
    assert len(merged.cells) == 4 * N_LAYERS  # those in both once
    assert set(merged.cells["run"]) == {1, 2}
    assert merged.record["notes"] == []
    assert merged.record["protocol"]["trials"] == 2
    # and a merged one again
    again = merge_studies([merged.folder, halves[0]], tmp_path / "again")
    assert_same_tables(again, whole)
    assert again.record["notes"] == []


def test_merge_studies__other_resets_of_one_model(tmp_path):
    for reset in ("rerandomize", "zero"):
        path = write_study(tmp_path / reset, 1, trials=2, n_images=8, protocol={"resets": [reset]})
        run(path, tmp_path / reset / "study")
    merged = merge_studies([tmp_path / reset / "study" for reset in ("zero", "rerandomize")], tmp_path / "merged")
    both = write_study(tmp_path / "both", 1, 2, n_images=8, protocol={"resets": ["zero", "rerandomize"]})
    whole = load_study(run(both, tmp_path / "both" / "study"))
    assert_same_tables(merged, whole)
    assert merged.resets == whole.resets == ["zero", "rerandomize"]
    assert merged.models["record"][0]["random_trials"] == {"rerandomize": True, "zero": False}
    assert set(merged.by_model()["covers"]) == {"trials and images", "images"}


def test_merge_studies__what_is_planned_but_measured_elsewhere(tmp_path):
    made(tmp_path / "a", "a", trials=[0])
    made(tmp_path / "b", "a", trials=[1])
    for folder, trial, key in (("a", 1, None), ("b", 0, "a key of other settings")):
        with Store(tmp_path / folder) as store, store.transaction():
            for depth, layer in enumerate(["conv1", "fc"]):
                place = ["a", layer, "rerandomize", trial]
                store.put_plan([PlanRow(*place, key or json.dumps(place), "conv", layer, depth, 9, 0.5)])
    assert len(load_study(tmp_path / "a").cells) == len(load_study(tmp_path / "b").cells) == 2
    for order in ("ab", "ba"):
        merged = merge_studies([tmp_path / folder for folder in order], tmp_path / f"merged {order}")
        assert len(merged.cells) == 4
        assert merged.progress()["state"].to_list() == ["done"]


def test_merge_studies__failures_that_were_measured_elsewhere_are_none(tmp_path):
    models = [ModelRow(name, f"py:{name}") for name in "ab"]
    failures = [("a", 1, "out of memory"), ("b", 0, "no such file")]
    made(tmp_path / "a", "a", trials=[0], models=models, failures=failures)
    made(tmp_path / "b", "a", trials=[1])
    merged = merge_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert [(f.model, f.trial, f.error) for f in merged.failures] == [("b", 0, "no such file")]
    assert merged.failures[0].details == "Traceback ..."
    assert merged.progress()["state"].to_list() == ["done", "failed"]


def test_merge_studies__runs_keep_their_cells(tmp_path):
    for number, folder in enumerate("ab"):
        made(tmp_path / folder, folder)
        with Store(tmp_path / folder) as store, store.transaction():
            store.put_run("2026-01-01", {"machine": f"idle {folder}"})
            run = store.put_run("2026-01-02", {"machine": f"machine {folder}"})
            key = f"key of {folder}"
            store.put_plan([PlanRow(folder, "extra", "rerandomize", 0, key, "conv", "extra", 2, 9, 0.5)])
            store.put_cells([CellRow(key, "ok", 1, 1.5, 4, {"cosine": 0.1 + number})], run)
    merged = merge_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    machines = {run["run"]: run["machine"] for run in merged.runs}
    assert list(machines.values()) == ["idle a", "machine a", "idle b", "machine b"]
    extra = merged.cells[merged.cells["layer"] == "extra"]
    assert extra["run"].map(machines).to_list() == ["machine a", "machine b"]
    assert merged.cells["run"].isna().sum() == 8  # those of no run


# One's own models among published ones


def test_merge_studies__published_and_measured(whole, tmp_path):
    table, models = write_table(tmp_path / "t.csv", rows_of()), write_models(tmp_path / "m.csv")
    layers = list(dict.fromkeys(whole.cells["layer"]))
    rows = rows_of(layers=[f"model.{layer}" for layer in layers])
    write_table(table, rows)
    published = import_published(table, tmp_path / "published", models)
    merged = merge_studies([published.folder, whole.folder], tmp_path / "merged")
    assert merged.models["model"].to_list() == [*MODELS, "m0", "m1"]
    assert len(merged.cells) == len(published.cells) + len(whole.cells)
    layers_found = merged.to_pandas().set_index("model")
    for source in (published, whole):
        for model, of_model in source.to_pandas().groupby("model"):
            columns = ["layer", "criticality", "low", "high", "covers", "n_trials"]
            found = layers_found.loc[model, columns].reset_index(drop=True)
            pd.testing.assert_frame_equal(found, of_model[columns].reset_index(drop=True))
    told = " ".join(merged.record["notes"])
    assert "Published results: each cell has only means over images" in told
    assert f"different images ({published.folder}: not known; {whole.folder}: 8 of images.npz, SHA-256 " in told
    assert "differ in their protocol" not in told  # the published one does not tell its own
    comparison = compare(merged)
    assert comparison.baseline == "tv_resnet50"
    assert comparison.criticality.columns.to_list() == layers
    assert comparison.models.index.to_list() == ["tv_resnet50", "model_a", "model_b", "model_c", "m0", "m1"]
    assert comparison.left_out == ("frozen",)
    assert any("used different images" in note for note in comparison.notes)
    assert not any("differ in their layers" in note for note in comparison.notes)


def test_merge_studies__notes_about_protocols(tmp_path):
    settings = {"dtype": "float32", "seed": 0, "level": 0.9, "trials": 2, "group": "layer"}
    made(tmp_path / "a", "a", record={"protocol": settings, "notes": ["one", "both"], "baseline": "a"})
    other = settings | {"dtype": "bfloat16", "seed": 1, "level": 0.8, "trials": 5}
    record = {"protocol": other, "notes": ["both", "two"], "baseline": "b", "leave_out": ["b"]}
    made(tmp_path / "b", "b", record=record)
    merged = merge_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    told = "The merged studies differ in their protocol (dtype, seed)."
    assert merged.record["notes"] == ["one", "both", "two", told]
    assert merged.record["protocol"] == {"trials": 5, "group": "layer", "level": 0.9, "resets": []}
    assert merged.level == 0.9
    assert (merged.record["baseline"], merged.record["leave_out"]) == ("a", ["b"])
    assert merged.record["name"] == "merged"
    assert merged.record["merged"] == [str(tmp_path / "a"), str(tmp_path / "b")]


# Names of probe sets


def on_images(folder, probe_sets, *, named=True, told=True):
    """A study of one model, called like the folder: name of a probe set -> its hash, or attack and hash.

    Args:
        named: whether the study names its probe sets.
        told: whether it says what they are, as one does that was neither imported nor merged of different ones.
    """
    models, about = [], {}
    for name, content in probe_sets.items():
        attack, sha256 = content if isinstance(content, tuple) else ("", content)
        record = {"sha256": folder.name, "dtype": "float32", "random_trials": {"rerandomize": True}}
        record |= {"probe_set": f"{sha256} attacked" if attack else sha256} if sha256 else {}
        variant = f"{folder.name} ({name})" if models else folder.name
        models.append(
            ModelRow(variant, "py:a", record=record, variant_of=folder.name if models else None,
                     probe_set=name if named else None)
        )  # fmt: skip
        about[name] = {"sha256": sha256, "n_images": 4, "source": f"{attack and f'attack:{attack}:'}{name}.npz"}
    record = {"name": folder.name, "probe_set": next(iter(about.values()))} if told else {"name": folder.name}
    record |= {"probe_sets": about} if told and named else {}
    made(folder, [row.model for row in models], models=models, record=record)
    return folder


def names_of(study):
    return dict(zip(study.models["model"], study.models["probe_set"], strict=True))


@pytest.mark.parametrize("order", [("own", "several"), ("several", "own")])
@pytest.mark.parametrize("told", [True, False], ids=["of the study", "of its models"])
def test_merge_studies__the_same_images_with_and_without_a_name(tmp_path, order, told):
    studies = {
        "own": on_images(tmp_path / "own", {"images": "aa"}, named=False, told=told),
        "several": on_images(tmp_path / "several", {"clean": "aa", "noisy": "bb"}),
    }
    keys = {name: set(load_study(folder).cells["key"]) for name, folder in studies.items()}
    merged = merge_studies([studies[name] for name in order], tmp_path / "merged")
    assert names_of(merged) == {"own": "clean", "several": "clean", "several (noisy)": "noisy"}
    assert set(merged.cells["key"]) == keys["own"] | keys["several"]
    notes = " ".join(merged.record["notes"])
    assert "different images" not in notes
    assert "own: images clean" in notes
    assert list(merged.record["probe_sets"]) == ["clean", "noisy"]
    assert merged.record["probe_set"]["sha256"] == "aa"
    shown = compare(merged)
    assert shown.criticality.index.to_list() == list(order)
    assert not any("Not compared" in note for note in shown.notes)
    noisy = compare(merged, probe_set="noisy")
    assert noisy.criticality.index.to_list() == ["several (noisy)"]
    assert "Not compared, since they were not measured under this condition (images noisy): own." in noisy.notes
    left = compare(merged, probe_set="noisy", leave_out=["own"])
    assert not any("Not compared" in note for note in left.notes)


def test_merge_studies__a_named_study_beside_one_without_a_name_has_one_condition(tmp_path):
    named = on_images(tmp_path / "named", {"clean": "aa"})
    merged = merge_studies([on_images(tmp_path / "own", {"i": "aa"}, named=False), named], tmp_path / "merged")
    assert merged.conditions == [Condition("clean")]
    assert merged.record["notes"] == []


def test_merge_studies__other_images_without_a_name(tmp_path):
    """They are called like their study, unless another probe set is."""
    studies = [
        on_images(tmp_path / "own", {"images": "cc"}, named=False),
        on_images(tmp_path / "twin", {"images": "cc"}, named=False),
        on_images(tmp_path / "noisy", {"images": "dd"}, named=False),
        on_images(tmp_path / "several", {"clean": "aa", "noisy": "bb"}),
    ]
    merged = merge_studies(studies, tmp_path / "merged")
    assert names_of(merged) == {
        "own": "own", "twin": "own", "noisy": "noisy 2", "several": "clean", "several (noisy)": "noisy",
    }  # fmt: skip
    notes = " ".join(merged.record["notes"])
    assert f"The images of {tmp_path / 'own'} have no name. No study has a name for the same images: they are " in notes
    assert "called 'own'" in notes
    assert "None" not in notes
    assert list(compare(merged).criticality.index) == ["own", "twin"]
    assert any(note.endswith("(images own): noisy, several.") for note in compare(merged).notes)
    assert merged.record["probe_sets"]["noisy 2"]["sha256"] == "dd"


def test_merge_studies__published_beside_named_images(tmp_path):
    """What no study tells of images is not taken for the same, whether or not they have a name."""
    published = on_images(tmp_path / "published", {"images": ""}, named=False, told=False)
    unknown = on_images(tmp_path / "unknown", {"clean": ""}, told=False)
    merged = merge_studies([unknown, published], tmp_path / "merged")
    assert names_of(merged) == {"unknown": "clean", "published": "not known"}
    assert "It is not known what they are: they are called 'not known'." in " ".join(merged.record["notes"])
    assert "probe_set" not in merged.record


def test_merge_studies__attacked_images_are_not_those_before_the_attack(tmp_path):
    several = {"weak": ("pgd(eps=1)", "aa"), "strong": ("pgd(eps=2)", "aa"), "clean": "aa"}
    studies = [
        on_images(tmp_path / "own", {"images": "aa"}, named=False),
        on_images(tmp_path / "attacked", {"images": ("pgd(eps=2)", "aa")}, named=False),
        on_images(tmp_path / "several", several),
    ]
    merged = merge_studies(studies, tmp_path / "merged")
    assert (names_of(merged)["own"], names_of(merged)["attacked"]) == ("clean", "strong")


def test_merge_studies__one_name_for_other_images(tmp_path):
    studies = [on_images(tmp_path / "a", {"clean": "aa"}), on_images(tmp_path / "b", {"clean": "bb"})]
    merged = merge_studies(studies, tmp_path / "merged")
    assert "used different images" in " ".join(merged.record["notes"])
    assert "probe_sets" not in merged.record


def test_compare__a_study_merged_before_every_probe_set_had_a_name(tmp_path):
    models = [ModelRow("a", "py:a", record=PREDICTED), ModelRow("b", "py:b", record=PREDICTED, probe_set="clean")]
    study = made(tmp_path / "old", "ab", models=models)
    found = compare(study)
    assert found.condition.label(study.conditions) == "images without a name"
    assert "Not compared, since they were not measured under this condition (images without a name): b." in found.notes


def test_compare__a_category_that_another_condition_has(tmp_path):
    models = [ModelRow("a", "py:a", category="x", record=PREDICTED, probe_set="clean"),
              ModelRow("b", "py:b", category="y", record=PREDICTED, probe_set="dark")]  # fmt: skip
    study = made(tmp_path / "study", "ab", models=models)
    found = compare(study, leave_out=["y"])
    assert (list(found.criticality.index), found.left_out) == (["a"], ())
    assert not any("Not compared" in note for note in found.notes)


# Refused


def rows(sha256, **more):
    return [ModelRow("a", "py:a", record={"sha256": sha256, "probe_set": "p", "dtype": "float32", **more})]


@pytest.mark.parametrize("other", [{"sha256": "2"}, {"sha256": "1", "probe_set": "q"}, {"sha256": "1", "dtype": "x"}])
def test_merge_studies__one_name_two_models(tmp_path, other):
    made(tmp_path / "a", "a", trials=[0], models=rows("1"))
    made(tmp_path / "b", "a", trials=[1], models=rows(**other))
    with pytest.raises(StudyError, match=r"a and .*b both have a model 'a', with different weights, .* another name"):
        merge_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_studies__one_trial_under_two_settings(tmp_path):
    made(tmp_path / "a", "a", models=rows("1"))
    with Store(tmp_path / "b", create=True) as store, store.transaction():
        store.put_models(rows("1"))
        store.put_plan([PlanRow("a", "fc", "rerandomize", 1, "of another seed", "linear", "fc", 1, 9, 0.5)])
        store.put_cells([CellRow("of another seed", "ok", 7, 1.5, 4, {"cosine": 0.5})])
    with pytest.raises(
        StudyError, match=r"both measured trial 1 of 'a', reset 'rerandomize', under different settings"
    ):
        merge_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_studies__refuses(tmp_path):
    for one in ("a", tmp_path / "a", [tmp_path / "a"]):
        with pytest.raises(StudyError, match="Expected two or more studies to merge, got 1"):
            merge_studies(one, tmp_path / "out")
    made(tmp_path / "a", "a")
    made(tmp_path / "b", "b")
    with pytest.raises(StudyError, match="two or more studies to merge, got 1"):
        merge_studies([tmp_path / "a"], tmp_path / "merged")
    with pytest.raises(StudyError, match=r"b already contains a study.*--out"):
        merge_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "b")
    with pytest.raises(StudyError, match=r"There is no study in .*c: "):
        merge_studies([tmp_path / "a", tmp_path / "c"], tmp_path / "merged")
    assert not (tmp_path / "merged" / FILE).exists()
