import csv

import numpy as np
import pytest

import layercrit.study.training as training_module
from layercrit.errors import ProbeError, StudyError, TrainingError
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from layercrit.study.tables import load_study
from layercrit.study.training import train_models
from layercrit.training import Options
from running_jobs import Inline
from training_images import ARCHITECTURE, write_images

ON_CPU = Options(device="cpu")
TRAINING = f"""
[training]
arch = "{ARCHITECTURE}"
data = "stripes.npz"
epochs = 1
settings = {{ batch_size = 48 }}
"""
MODELS = {
    "plain": "method = 'baseline'",
    "frozen": "method = 'frozen_random'\nseed = 4\nepochs = 2",
    "smooth": "method = 'baseline'\nsettings = { lr = 0.02 }",
}


def write(folder, models=MODELS, training=TRAINING):
    tables = "".join(f"[[models]]\nname = '{name}'\n{table}\n" for name, table in models.items())
    write_images(folder / "stripes.npz", n_train=96, n_test=48)
    path = folder / "small.toml"
    path.write_text(f"""
[images]
source = "stripes.npz"
n_images = 16
input_size = [1, 12, 12]
resize = 0
[protocol]
layers = "conv1,fc"
trials = 2
resets = ["rerandomize", "rewind"]
{training}
{tables}
""")
    return path


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("model.*")}


def test_train_models__trains_what_is_missing_and_the_study_runs(tmp_path):
    study_file = write(tmp_path)
    seen, lines = [], []
    first = train_models(
        study_file, ["smooth"], options=ON_CPU, progress=lambda name, done: seen.append((name, done.step, done.steps)),
        say=lines.append,
    )  # fmt: skip
    assert list(first.trained) == ["smooth"]
    assert {name for name, *_ in seen} == {"smooth"}
    assert seen[-1] == ("smooth", 2, 2)
    assert lines == [f"smooth: {first.trained['smooth'].top1_accuracy:.1%} top-1 accuracy on the held-out images."]
    with pytest.raises(StudyError, match=r"2 models are not trained yet: plain, frozen"):
        run_study(read_study_file(study_file), tmp_path / "early", executor=Inline())

    before = written(tmp_path)
    seen.clear()
    report = train_models(study_file, options=ON_CPU, progress=lambda name, done: seen.append((name, done.epochs)))
    assert list(report.trained) == list(MODELS)
    assert report.failures == {}
    assert set(seen) == {("plain", 1), ("frozen", 2)}
    assert before.items() <= written(tmp_path).items(), "a finished model was written again"
    records = {name: model.record for name, model in report.trained.items()}
    assert {name: (one["method"], one["seed"], one["epochs"]) for name, one in records.items()} == {
        "plain": ("baseline", 0, 1), "frozen": ("frozen_random", 4, 2), "smooth": ("baseline", 0, 1)
    }  # fmt: skip
    assert records["smooth"]["settings"]["lr"] == 0.02
    assert {one["settings"]["batch_size"] for one in records.values()} == {48}
    initial = {name: one["initial_sha256"] for name, one in records.items()}
    assert initial["plain"] == initial["smooth"] != initial["frozen"]
    assert report.trained["plain"].folder == tmp_path / "models" / "plain"

    before = written(tmp_path)
    again = train_models(study_file, options=ON_CPU, progress=lambda *_: pytest.fail("something was trained again"))
    assert {name: model.record for name, model in again.trained.items()} == records
    assert written(tmp_path) == before

    study = run_study(read_study_file(study_file), tmp_path / "study", executor=Inline())
    assert (study.n_measured, study.failures) == (3 * 2 * (2 + 1), [])  # rewinding draws nothing, so one trial is all
    found = load_study(tmp_path / "study")
    assert set(found.cells["layer"]) == {"conv1", "fc"}
    accuracies = found.by_model().set_index("model")["top1_accuracy"]
    assert set(accuracies.index) == set(MODELS)


def test_train_models__the_accuracy_is_that_which_a_study_finds(tmp_path):
    study_file = write(tmp_path, {"plain": "method = 'baseline'\nepochs = 3"})
    images = write_images(tmp_path / "whole.npz")
    trained = train_models(study_file, options=ON_CPU).trained["plain"]
    text = study_file.read_text().replace('source = "stripes.npz"\nn_images = 16', 'source = "test.npz"\nn_images = 48')
    study_file.write_text(text)
    with np.load(images) as arrays:
        np.savez(tmp_path / "test.npz", images=arrays["test_images"], labels=arrays["test_labels"])
    run_study(read_study_file(study_file), tmp_path / "study", executor=Inline())
    found = load_study(tmp_path / "study").by_model()["top1_accuracy"].to_numpy()
    assert found == pytest.approx(trained.top1_accuracy)


def test_train_models__a_model_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    train = training_module.train

    def broken(method, arch, data, folder, **more):
        if folder.name == "frozen":
            raise MemoryError("out of memory")
        return train(method, arch, data, folder, **more)

    monkeypatch.setattr(training_module, "train", broken)
    models = {"wild": "method = 'baseline'\nsettings = { lr = 1e30 }\nepochs = 2", **MODELS}
    study_file = write(tmp_path, models)
    lines = []
    report = train_models(study_file, options=ON_CPU, say=lines.append)
    assert list(report.trained) == ["plain", "smooth"]
    assert list(report.failures) == ["wild", "frozen"]
    assert report.failures["wild"].startswith("The loss became ")
    assert report.failures["frozen"] == "MemoryError: out of memory"
    assert [line.partition(":")[0] for line in lines] == ["wild failed", "plain", "frozen failed", "smooth"]
    assert read_study_file(study_file).untrained() == ["wild", "frozen"]
    monkeypatch.undo()
    assert list(train_models(study_file, ["frozen"], options=ON_CPU).trained) == ["frozen"]


def test_train_models__an_architecture_that_cannot_be_built_fails_each(tmp_path):
    report = train_models(write(tmp_path, training=TRAINING.replace("num_classes=3", "num_classes=4")), options=ON_CPU)
    assert report.trained == {}
    assert list(report.failures) == list(MODELS)
    assert all("has 4 classes, but the data have 3" in text for text in report.failures.values())


def test_train_models__an_interruption_stops_it_and_it_goes_on(tmp_path):
    study_file = write(tmp_path, training=TRAINING.replace("epochs = 1", "epochs = 2"))

    def stop(name, done):
        if (name, done.epoch) == ("smooth", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_models(study_file, options=ON_CPU, progress=stop)
    assert read_study_file(study_file).untrained() == ["smooth"]
    lines = []
    report = train_models(study_file, options=ON_CPU, say=lines.append)
    assert list(report.trained) == list(MODELS)
    assert f"Resuming {tmp_path / 'models' / 'smooth'} after 2 of 4 steps." in lines
    assert len(list(csv.DictReader((tmp_path / "models" / "smooth" / "log.csv").open()))) == 2


def test_train_models__settings_that_changed_are_told_for_each_model(tmp_path):
    train_models(write(tmp_path), ["plain"], options=ON_CPU)
    report = train_models(write(tmp_path, {**MODELS, "plain": "method = 'baseline'\nseed = 2"}), options=ON_CPU)
    assert list(report.trained) == ["frozen", "smooth"]
    assert "contains another training run: seed is 0, but 2 was requested" in report.failures["plain"]


def test_train_models__names_given_twice_are_trained_once(tmp_path):
    lines = []
    train_models(write(tmp_path), ["plain", "plain"], options=ON_CPU, say=lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("models", "training", "names", "error", "text"),
    [
        (MODELS, TRAINING, ["plane"], TrainingError, r"trains no model 'plane'\. Did you mean 'plain'"),
        ({"x": "reference = 'zoo:resnet50_dino'"}, TRAINING, ["x"], TrainingError, r"no model with a method"),
        ({"x": "reference = 'zoo:resnet50_dino'"}, "", [], TrainingError, r"has no \[training\] table"),
        (MODELS, "", [], StudyError, r"method needs a table \[training\]"),
        (MODELS, TRAINING.replace("stripes", "strips"), [], ProbeError, r"No such file.*Did you mean 'stripes\.npz'"),
        ({"x": "method = 'basline'"}, TRAINING, [], StudyError, "Did you mean 'baseline'"),
    ],
)
def test_train_models__mistakes(tmp_path, models, training, names, error, text):
    path = write(tmp_path, models, training)
    if "zoo:" in str(models):
        path.write_text(path.read_text().replace(', "rewind"', ""))
    with pytest.raises(error, match=text):
        train_models(path, names)
    assert not (tmp_path / "models").exists()
