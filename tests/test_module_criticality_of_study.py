"""Module criticality over the models of a study: what it is of each, what is kept, and who has none."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from layercrit.cli import cli
from layercrit.errors import LayercritError, ProtocolError, StudyError
from layercrit.module_criticality import ModuleCriticality, measure_module_criticality
from layercrit.module_criticality.kept_points import KeptPoints
from layercrit.module_paths import ModulePaths
from layercrit.path_search import Excess
from layercrit.reporting.exports import export
from layercrit.reporting.reports import report
from layercrit.study.module_criticality import measure_study_module_criticality
from layercrit.study.module_tables import load_study_module_criticality
from layercrit.study.planning import plan_study
from layercrit.study.tables import load_study
from running_jobs import Inline, run, write_small
from test_module_criticality import LABELS, pixels, trained
from training_runs import write_run

HOW = {"progress": False, "draws": 2, "n_a": 4, "n_s": 6, "tolerance": 1.3}
ARCH = "arch=py:running_jobs:small_network&input_size=(3,2,2)"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study of two training runs and a plain file, measured once; its folder."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        initial, network = trained(seed)
        write_run(folder / f"run{seed}", {0: initial.state_dict()}, final=network.state_dict())
    save_file(trained(2)[1].state_dict(), folder / "plain.safetensors")
    save_file(trained(2)[0].state_dict(), folder / "before.safetensors")
    models = [
        {"name": "m0", "reference": f"file:../run0?{ARCH}", "category": "baseline"},
        {"name": "m1", "reference": f"file:../run1?{ARCH}", "category": "augmentation"},
        {"name": "plain", "reference": f"file:../plain.safetensors?{ARCH}", "category": "augmentation"},
    ]
    path = write_small(folder / "study", trials=1, models=models)
    np.savez(path.parent / "images.npz", images=pixels(), labels=LABELS)
    run(path, folder / "out", Inline())
    return folder / "out"


@pytest.fixture
def study(measured, tmp_path):
    """The study, as if it were in a folder of its own: results are kept there."""
    return replace(load_study(measured), folder=measured), tmp_path / "kept"


def measure(study, **settings):
    opened, folder = study
    return measure_study_module_criticality(opened, folder=folder, **{**HOW, **settings})


def test_measure_study_module_criticality__is_that_of_each_model_on_the_images_of_the_study(study, measured):
    found = measure(study)
    assert list(found.found) == ["m0", "m1"]
    for number, name in enumerate(["m0", "m1"]):
        run_folder = measured.parent / f"run{number}"
        alone = measure_module_criticality(f"file:{run_folder}?{ARCH}", pixels(), labels=LABELS, **HOW)
        own = found.table[found.table["model"] == name].drop(columns="model").reset_index(drop=True)
        names = ["layer", "module_criticality", "low", "high", "a", "s", "distance", "edge", "status"]
        pd.testing.assert_frame_equal(own[names], alone.to_pandas()[names], rtol=1e-5)
        row = found.by_model.set_index("model").loc[name]
        assert row["sum"] == pytest.approx(own["module_criticality"].sum())
        assert (row["n_modules_in_sum"], row["n_images"], row["left_out"]) == (3, len(LABELS), "")


def test_measure_study_module_criticality__who_has_no_initial_weights_is_blank_and_not_zero(study, measured):
    found = measure(study)
    assert list(found.left_out) == ["plain"]
    assert "kept its epoch 0" in found.left_out["plain"]
    row = found.by_model.set_index("model").loc["plain"]
    assert math.isnan(row["sum"])
    assert "kept its epoch 0" in row["left_out"]
    assert found.values(["m0", "plain"]).loc["plain"].isna().all()
    given = measure(study, models=["plain"], initial=str(measured.parent / "before.safetensors"))
    assert list(given.found) == ["m0", "m1", "plain"]  # with what was there
    assert not given.left_out


def test_measure_study_module_criticality__who_is_named_and_has_none_is_refused_before_anything(study, monkeypatch):
    monkeypatch.setattr(ModulePaths, "_excesses", lambda *_: pytest.fail("it measured"))
    with pytest.raises(StudyError, match="of 'plain' cannot be measured, so nothing was: it is no training run"):
        measure(study, models=["m0", "plain"])
    with pytest.raises(StudyError, match=r"has no model 'm9'. Did you mean"):
        measure(study, models=["m9"])
    opened, folder = study
    none = opened.models[opened.models["model"] == "plain"]
    with pytest.raises(StudyError, match="of 'plain' cannot be measured"):
        measure((replace(opened, models=none), folder))
    unopened = opened.models.assign(record=[{}] * len(opened.models))
    with pytest.raises(StudyError, match="the study has not measured it yet"):
        measure((replace(opened, models=unopened), folder))


def test_measure_study_module_criticality__what_is_there_is_not_measured_again(study, monkeypatch):
    first = measure(study)
    monkeypatch.setattr(ModulePaths, "_excesses", lambda *_: pytest.fail("it measured"))
    pd.testing.assert_frame_equal(measure(study).table, first.table)
    folder = study[1]
    stored = pd.read_parquet(folder / "modules.parquet")
    pd.testing.assert_frame_equal(stored, first.table, check_dtype=False)
    assert set(pd.read_csv(folder / "models.csv")["model"]) == {"m0", "m1", "plain"}
    for asked in ({"draws": 3}, {"tolerance": 1.5}, {"n_images": 10}):
        with pytest.raises(
            StudyError, match=r"images than asked for now \((draws|tolerance|images, n_images)\). Nothing was measured"
        ):
            measure(study, **asked)


def test_measure_study_module_criticality__goes_on_after_an_interruption(study, monkeypatch):
    """In the middle of the second model; no point of the grid is evaluated twice, and the numbers are the same."""
    whole = measure((study[0], study[1].with_name("whole")))
    plain, asked, left = ModulePaths._excesses, [], [3]

    def counted(self, points):
        if list(study[1].glob("*/of.json")):  # the first model is whole
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        asked.append(sum(map(len, points.values())))
        return plain(self, points)

    monkeypatch.setattr(ModulePaths, "_excesses", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(study)
    assert len(list(study[1].glob("*/kept-points.json"))) == 1
    again = measure(study)
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert sum(asked) == whole.table["n_points"].sum()
    assert not list(study[1].glob("*/kept-points-*.json"))


def test_measure_study_module_criticality__settings_of_all_models_are_the_same(study, monkeypatch):
    measure(study)
    with monkeypatch.context() as patch:
        patch.setattr(ModulePaths, "_excesses", lambda *_: pytest.fail("it measured"))
        with pytest.raises(
            StudyError, match=r"of 'm0' in .* \(draws\), so that .* Nothing was .* all models with --over"
        ):
            measure(study, models=["m1"], draws=3, overwrite=True)
    both = measure(study, draws=3, overwrite=True)
    assert {one.record["n_draws"] for one in both.found.values()} == {3}


def test_measure_study_module_criticality__a_model_that_cannot_be_measured_does_not_stop_the_others(study, measured):
    wrong = {"1.weight": trained()[0].state_dict()["1.weight"]}
    save_file(wrong, study[1].with_name("wrong.safetensors"))
    found = measure(study, initial=str(study[1].with_name("wrong.safetensors")))
    assert list(found.found) == ["m0", "m1"]
    assert "wrong.safetensors" in found.left_out["plain"]


def test_load_study_module_criticality__of_other_weights_is_left_out(study):
    measure(study)
    opened, folder = study
    records = [{**record, "sha256": "0" * 64} if name == "m1" else record
               for name, record in zip(opened.models["model"], opened.models["record"], strict=True)]  # fmt: skip
    found = load_study_module_criticality(replace(opened, models=opened.models.assign(record=records)), folder)
    assert list(found.found) == ["m0"]
    assert "other weights" in found.left_out["m1"]
    with pytest.raises(StudyError, match="Measure it with `layercrit module-criticality"):
        load_study_module_criticality(opened, folder / "nowhere")


# --- the page and the command -----------------------------------------------------------------------------------------


def test_module_criticality_command__of_a_study_and_the_page(measured, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(cli, ["module-criticality", str(measured), *map(str, arguments)])

    how = ("--draws", 2, "--n-a", 4, "--n-s", 6, "--tolerance", 1.3)
    assert (
        report(load_study(measured), tmp_path / "none", formats=["svg"])
        .left_out.keys()
        .isdisjoint({"module_criticality"})
    )
    with pytest.raises(StudyError, match="Measure it with `layercrit module-criticality"):
        report(load_study(measured), tmp_path / "asked", figures=["module_criticality"])
    shown = invoke(*how)
    assert shown.exit_code == 0, shown.output
    assert "for ranking networks of one architecture" in shown.output
    assert "plain: left out: it is no training run" in shown.output
    printed = json.loads(invoke(*how, "--json").stdout)
    assert printed["folder"] == str(measured / "module-criticality")
    assert [row["model"] for row in printed["models"]] == ["m0", "m1", "plain"]
    assert printed["models"][2]["sum"] is None
    assert len(printed["modules"]) == 6
    written = report(load_study(measured), tmp_path / "report", formats=["svg"])
    assert "module_criticality" in written.figures
    assert "by module criticality" in written.page.read_text(encoding="utf-8")
    for option in (("--images", "x.npz"), ("--surface", "1"), ("--layers", "1")):
        assert f"{option[0]} goes with a MODEL" in invoke(*option).output
    elsewhere = invoke(*how, "--models", "m0", "--out", tmp_path / "elsewhere")
    assert "Saved in" in elsewhere.output
    assert "the page shows it" in shown.output
    assert "the page shows it" not in elsewhere.output
    alone = CliRunner().invoke(cli, ["module-criticality", f"file:{measured.parent}/run0?{ARCH}", "--models", "m0"])
    assert "--models goes with a STUDY" in alone.output
    missing = CliRunner().invoke(cli, ["module-criticality", f"file:{measured.parent}/run0?{ARCH}"])
    assert "Missing option '--images'" in missing.output


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_module_criticality__saved_and_loaded_is_the_same_bit_for_bit(tmp_path):
    initial, network = trained()
    found = measure_module_criticality(network, pixels(), initial=initial, labels=LABELS, **{**HOW, "draws": 1})
    odd = {"1": "=1+1", "3": "0.10", "5": "nan"}
    table, points = (one.assign(layer=one["layer"].map(odd)) for one in (found.table, found.points))
    table.loc[0, ["module_criticality", "high", "a"]] = math.nan, math.inf, math.nan
    ModuleCriticality(table, points, {**found.record, "surface": "=1+1"}).save(tmp_path)
    loaded = ModuleCriticality.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.table, table, check_exact=True)
    pd.testing.assert_frame_equal(loaded.points, points, check_exact=True)
    assert loaded.record["asked"] == found.record["asked"]
    with pytest.raises(LayercritError, match="There is no module criticality in"):
        ModuleCriticality.load(tmp_path / "nowhere")
    (tmp_path / "module-criticality.csv").write_text('"layer"\n"1"\n')
    with pytest.raises(LayercritError, match=r"is damaged .*lack"):
        ModuleCriticality.load(tmp_path)


def test_kept_points__of_the_same_measurement_only(tmp_path):
    path = tmp_path / "folder" / "points.json"
    points = [("fc", (1, 2), Excess(0.5, -math.inf, math.nan)), ("fc", (0, 0), Excess(1 / 3, 0.1, 0.2))]
    kept = KeptPoints(path, {"seed": 0, "s_range": (0.1, 1)})
    kept.add(points[:1])
    kept.add(points[1:])
    again = KeptPoints(path, {"seed": 0, "s_range": [0.1, 1]}).known["fc"]
    assert list(again) == [(1, 2), (0, 0)]
    assert again[0, 0] == Excess(1 / 3, 0.1, 0.2)
    assert math.isnan(again[1, 2].high)
    other = KeptPoints(path, {"seed": 1})
    assert other.known == {}
    other.add(points[:1])
    assert list(KeptPoints(path, {"seed": 1}).known["fc"]) == [(1, 2)]
    assert KeptPoints(path, {"seed": 0, "s_range": [0.1, 1]}).known["fc"].keys() == again.keys()  # still
    for rows in ("[[1]]", "[[Infinity, 1, 0, 0, 0]]"):
        path.write_text(f'{{"measurements": [{{"of": {{"seed": 1}}, "points": {{"fc": {rows}}}}}]}}')
        assert KeptPoints(path, {"seed": 1}).known == {}
    (tmp_path / "file").touch()
    with pytest.raises(LayercritError, match="cannot be kept in"):
        KeptPoints(tmp_path / "file" / "points.json", {}).add(points)


# --- what changed since, and what is damaged --------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A study of two training runs in a folder that a test may change; ``again`` runs it anew from a changed file."""
    for seed in (0, 1):
        initial, network = trained(seed)
        write_run(tmp_path / f"run{seed}", {0: initial.state_dict()}, final=network.state_dict())

    def again(options=ARCH):
        models = [{"name": f"m{seed}", "reference": f"file:../run{seed}?{options}", "category": "baseline"}
                  for seed in (0, 1)]  # fmt: skip
        shutil.rmtree(tmp_path / "study", ignore_errors=True)
        path = write_small(tmp_path / "study", trials=1, models=models)
        np.savez(path.parent / "images.npz", images=pixels(), labels=LABELS)
        run(path, tmp_path / "out", Inline())
        return load_study(tmp_path / "out"), tmp_path / "out" / "module-criticality"

    return again


def result_of(folder, model):
    return next(folder.glob(f"{model}-*/module-criticality.json"))


def test_measure_study_module_criticality__another_normalisation_is_another_result(own):
    first = measure(own())
    other = own(f"{ARCH}&mean=(0.5,0.5,0.5)&std=(0.2,0.2,0.2)")
    with pytest.raises(StudyError, match="m0: the study has it with other normalisation now"):
        load_study_module_criticality(other[0])
    with pytest.raises(StudyError, match=r"asked for now \(normalisation\)"):
        measure(other)
    assert (measure(other, overwrite=True).by_model["loss"] != first.by_model["loss"]).all()


def test_measure_study_module_criticality__models_on_different_images_are_in_no_table(own):
    study = own()
    measure(study, models=["m0"], n_images=10)
    with pytest.raises(StudyError, match=r"of 'm0' in .* than asked for now \(n_images\).* Nothing was measured"):
        measure(study, models=["m1"], n_images=24)
    assert not list(study[1].glob("m1-*"))
    with pytest.raises(StudyError, match=r"of 'm0' in .* than asked for now \(n_images\).* Nothing was measured"):
        measure(study, models=["m1"], n_images=24, overwrite=True)
    other = study[1].with_name("other")
    measure((study[0], other), models=["m1"], n_images=24)
    shutil.copytree(other, study[1], dirs_exist_ok=True)
    with pytest.raises(StudyError, match=r"of 'm0' and of 'm1' in .* is of other settings \(n_images\)"):
        load_study_module_criticality(study[0])


def test_measure_study_module_criticality__a_damaged_result_is_left_out_and_measured_again(own, tmp_path):
    study = own()
    whole = measure(study)
    for text in ("{", '{"measured": 3}', '{"measured": {"model": "x"}}'):
        result_of(study[1], "m0").write_text(text)
        found = load_study_module_criticality(study[0])
        assert "is damaged" in found.left_out["m0"]
    assert "module_criticality" in report(study[0], tmp_path / "report", formats=["svg"]).figures
    pd.testing.assert_frame_equal(measure(study).table, whole.table)
    result_of(study[1], "m1").with_name("of.json").write_text("[]")
    pd.testing.assert_frame_equal(measure(study, overwrite=True).table, whole.table)


def test_measure_study_module_criticality__initial_weights_by_reference_are_read(study):
    file = study[1].with_name("initial.safetensors")
    save_file(trained(2)[0].state_dict(), file)
    asked = {"models": ["plain"], "initial": f"file:{file}?{ARCH}"}
    first = measure(study, **asked)
    save_file(trained(3)[0].state_dict(), file)
    with pytest.raises(StudyError, match=r"asked for now \(initial weights\)"):
        measure(study, **asked)
    assert (measure(study, **asked, overwrite=True).by_model["sum"] != first.by_model["sum"]).any()


def test_measure_study_module_criticality__weights_that_the_study_has_not_measured(own, tmp_path, monkeypatch):
    study = own()
    for seed in (0, 1):
        save_file(trained(5)[1].state_dict(), tmp_path / f"run{seed}" / "model.safetensors")
    monkeypatch.setattr(ModulePaths, "_excesses", lambda *_: pytest.fail("it measured"))
    with pytest.raises(StudyError, match="m0: it has other weights now than those that the study measured"):
        measure(study)


def test_measure_study_module_criticality__a_damaged_epoch_0_and_reasons_that_are_kept(own, tmp_path):
    study = own()
    (tmp_path / "run1" / "epochs" / "epoch-0000.safetensors").write_bytes(b"xx")
    assert "epoch-0000" in measure(study).left_out["m1"]
    assert "epoch-0000" in measure(study, models=["m0"]).left_out["m1"]


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ({"n_images": 0}, ProtocolError, "n_images must be a whole number of at least 1; got 0"),
        ({"models": []}, StudyError, "No model is named"),
        ({"tol": 3}, ProtocolError, "no setting 'tol' of module criticality.*'tolerance'"),
        ({"layers": "1"}, StudyError, r"layers of the study in .* is '\*'"),
        ({"tolerance": 0.5, "overwrite": True}, ProtocolError, "must be above 1; got 0.5"),
    ],
)
def test_measure_study_module_criticality__what_cannot_be_asked(study, asked, error, text):
    with pytest.raises(error, match=text):
        measure(study, **asked)
    assert not study[1].exists()


# --- a study file that asks for it ------------------------------------------------------------------------------------

ASKED = {name: value for name, value in HOW.items() if name != "progress"}
M0 = {"name": "m0", "reference": f"file:../run0?{ARCH}", "category": "baseline"}


@pytest.fixture
def asking(measured, tmp_path):
    """Writes a study file of the module's training runs that asks for module criticality; returns its path."""

    def write(section=None, models=(M0,), images=None, **others):
        runs = measured.parent
        models = [{**one, "reference": one["reference"].replace("file:..", f"file:{runs}")} for one in models]
        section = {**ASKED, **(section or {})}
        path = write_small(
            tmp_path / "asking",
            0,
            1,
            24,
            models,
            images,
            module_criticality=section,
            study={"baseline": "m0"},
            **others,
        )
        np.savez(path.parent / "images.npz", images=pixels(), labels=LABELS)
        return path

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def here(monkeypatch):
    """Run tasks in this process."""
    monkeypatch.setattr("layercrit.study.running.LocalProcesses", lambda places: Inline())


def test_run_study__measures_the_module_criticality_that_its_file_asks_for(asking, out, study, monkeypatch):
    path = asking()
    report_of_run = run(path, out, Inline())
    assert (report_of_run.failures, report_of_run.modules_failed) == ([], {})
    found = load_study_module_criticality(load_study(out))
    pd.testing.assert_frame_equal(found.table, measure(study, models=["m0"]).table)
    monkeypatch.setattr(ModulePaths, "_excesses", lambda *_: pytest.fail("it measured"))
    assert run(path, out, Inline()).modules_failed == {}  # all is there
    assert run(out, out, Inline()).modules_failed == {}  # by the file in the folder as well
    as_asked = measure_study_module_criticality(out, progress=False)
    pd.testing.assert_frame_equal(as_asked.table, found.table)


def test_run_study__module_criticality_that_fails_loses_nothing_else(asking, out, measured, here, monkeypatch):
    def fails(self, points):
        raise RuntimeError("no memory")

    path = asking()
    monkeypatch.setattr(ModulePaths, "_excesses", fails)
    shown = invoke("study", "run", path, "--out", out)
    assert shown.exit_code == 1
    assert "3 cells measured" in shown.output
    assert "could not be measured:\n  m0: RuntimeError: no memory\n" in shown.output
    assert f"Fix the causes, then: `layercrit module-criticality {out}`" in shown.output
    status = invoke("study", "status", out).output
    assert f"module criticality of no model yet, 1 left out: `layercrit study run {out}`" in status
    monkeypatch.undo()
    monkeypatch.setattr("layercrit.study.running.LocalProcesses", lambda places: Inline())
    again = invoke("study", "run", path, "--out", out, "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["module_criticality"] == {
        "asked": True, "measured": ["m0"], "left_out": {}, "mistake": ""
    }  # fmt: skip
    assert "module criticality of 1 model\n" in invoke("study", "status", out).output
    changed = run(asking({"draws": 3}), out, Inline())
    assert "of other settings, weights or images than asked for now (draws)" in changed.modules_failed[""]
    assert "it is of other settings than the study file asks for (draws)" in invoke("study", "status", out).output
    assert invoke("module-criticality", out, "--overwrite").exit_code == 0  # with the settings of the file
    assert load_study_module_criticality(load_study(out)).found["m0"].record["n_draws"] == 3


def test_run_study__a_shard_leaves_module_criticality_out_and_says_so(asking, out, here):
    shown = invoke("study", "run", asking(), "--out", out, "--shard", "1/2")
    assert f"once all shards are finished: `layercrit module-criticality {out}`" in shown.output
    invoke("study", "run", asking(), "--out", out, "--shard", "2/2")
    assert not (out / "module-criticality").exists()
    assert invoke("module-criticality", out).exit_code == 0
    assert list(load_study_module_criticality(load_study(out)).found) == ["m0"]


def test_run_study__module_criticality_without_labels_is_refused_before_anything(asking, out):
    path = asking()
    np.savez(path.parent / "images.npz", images=pixels())
    executor = Inline()
    with pytest.raises(StudyError, match=r"needs labels, and the images of .*images.npz' have none"):
        run(path, out, executor)
    assert executor.tasks == []


def test_run_study__module_criticality_of_a_model_that_cannot_be_opened(asking, out, tmp_path):
    initial, network = trained(3)
    write_run(tmp_path / "broken", {0: initial.state_dict()}, final=network.state_dict())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"xx")
    broken = {"name": "broken", "reference": f"file:{tmp_path}/broken?{ARCH}"}
    done = run(asking({"models": ["m0", "broken"]}, [M0, broken]), out, Inline())
    assert {failure.model for failure in done.failures} == {"broken"}
    assert done.modules_failed == {"broken": "the study has not measured it yet (`layercrit study run`)"}
    assert list(load_study_module_criticality(load_study(out)).found) == ["m0"]


def test_module_criticality_command__takes_what_is_not_given_from_the_study_file(asking, out, here, capsys):
    run(asking({"n_images": 10}), out, Inline())
    folder = out / "elsewhere"
    shown = invoke("module-criticality", out, "--excess", 0.1, "--draws", 1, "--out", folder)
    assert "[module_criticality] in the study file says: n_images = 10, n_a = 4, n_s = 6" in shown.output
    asked = load_study_module_criticality(load_study(out), folder).found["m0"].record["asked"]
    assert (asked["excess"], asked["tolerance"], asked["draws"], asked["n_a"]) == (0.1, 1.01, 1, 4)


def test_run_study__module_criticality_on_another_probe_set(asking, out):
    first = {"name": "clean", "source": "images.npz", "n_images": 24, "input_size": [3, 2, 2], "resize": 0}
    second = {"name": "noisy", "source": "corrupt:brightness@1"}
    path = asking({"probe_set": "noisy", "models": ["m0"]}, images=[first, second])
    assert run(path, out, Inline()).modules_failed == {}
    found = load_study_module_criticality(load_study(out), probe_set="noisy")
    assert list(found.found) == ["m0 (noisy)"]
    files = export(load_study(out), "csv")
    assert {"module_criticality.csv", "module_criticality_by_model.csv"} <= {path.name for path in files}


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_export__has_the_tables_of_module_criticality(measured, tmp_path, name):
    study = load_study(measured)
    found = measure_study_module_criticality(study, **HOW)
    files = {path.stem: path for path in export(study, name, tmp_path)}
    read = pd.read_parquet if name == "parquet" else pd.read_csv
    modules, models = read(files["module_criticality"]), read(files["module_criticality_by_model"])
    assert modules["module_criticality"].to_list() == pytest.approx(found.table["module_criticality"].to_list())
    assert models["model"].to_list() == ["m0", "m1", "plain"]
    of_one = export(study, name, tmp_path / "by", by="correctness")
    assert [path.name for path in of_one] == [f"by_correctness.{name}"]


def test_plan_study__says_what_module_criticality_costs(asking):
    words = plan_study(asking()).module_criticality
    assert "module criticality of 1 model, 3 modules in all" in words
    assert f"at most {3 * 4 * 6 * 2} evaluations" in words
