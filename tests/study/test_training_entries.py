import contextlib
import re
from typing import get_args

import pytest

from layercrit.errors import StudyError
from layercrit.seeds import drawing
from layercrit.study.entries import ModelEntry
from layercrit.study.file import read_study_file
from layercrit.study.planning import plan_study
from layercrit.study.running import run_study
from layercrit.study.schema import TrainingTable
from layercrit.study.store import Store
from layercrit.study.training_entries import Training, TrainingRun
from running_jobs import Inline, small_network, write_pixels
from training_runs import write_run

FUNCTION = "py:running_jobs:small_network"
ARCH = f"{FUNCTION}?input_size=(3,2,2)&mean=(0.5,0.5,0.5)"
TRAINING = f"[training]\narch = '{ARCH}'\ndata = 'digits'\n"


def write(folder, *models, training=TRAINING, more=""):
    """Write a study file of some [[models]] tables, given as TOML, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = "".join(f"[[models]]\n{model}\n" for model in models)
    path = folder / "study.toml"
    path.write_text(f"[images]\nsource = 'images.npz'\n{more}\n{training}{tables}", encoding="utf-8")
    return path


def mistakes(path):
    """The mistakes that reading a study file names."""
    with pytest.raises(StudyError) as caught:
        read_study_file(path)
    return str(caught.value).split("\n  - ")[1:]


def train(run, seed=0, epochs=(0, 3)):
    """Put fresh weights where a run would leave trained ones."""
    with drawing(seed):
        states = [small_network().state_dict() for _ in range(len(epochs) + 1)]
    write_run(run.folder, dict(zip(epochs, states, strict=False)), run.arch, states[-1])


# --- what is read ---------------------------------------------------------------------------------------------------


def test_training__every_key(tmp_path):
    path = write(
        tmp_path,
        "method = 'baseline'\nname = 'plain'",
        "method = 'robust_l2'\nname = 'pgd'\nsettings = {eps = 1.0, lr = 0.3}\nepochs = 12\nseed = 1\n"
        "category = 'mine'\nlabel = 'PGD'\naccuracy = 0.5\ndonor = 'w.pth'",
        "reference = 'zoo:resnet50_dino'",
        training=f"[training]\narch = '{ARCH}'\ndata = 'torchvision:MNIST?root=data'\nfolder = 'runs/a'\nepochs = 10\n"
        "seed = 18446744073709551615\nprecision = 'bf16'\nweights_dtype = 'float16'\n"
        "settings = {batch_size = 128, lr = 0.2}\n",
    )
    (tmp_path / "w.pth").touch()
    study = read_study_file(path)
    data = f"torchvision:MNIST?root={tmp_path}/data"
    assert study.training == Training(
        (
            TrainingRun("plain", "baseline", {"batch_size": 128, "lr": 0.2}, ARCH, data, tmp_path / "runs/a/plain", 10,
                        2**64 - 1, "bf16", "float16"),
            TrainingRun("pgd", "robust_l2", {"batch_size": 128, "lr": 0.3, "eps": 1.0}, ARCH, data,
                        tmp_path / "runs/a/pgd", 12, 1, "bf16", "float16"),
        ),
        path,
    )  # fmt: skip
    assert study.models[:2] == (
        ModelEntry("plain", f"file:{tmp_path}/runs/a/plain?arch={FUNCTION}", "baseline"),
        ModelEntry(
            "pgd", f"file:{tmp_path}/runs/a/pgd?arch={FUNCTION}", "mine", "PGD", 0.5, f"{tmp_path}/w.pth", "l2", 1.0
        ),
    )
    assert study.models[2].name == "resnet50_dino"


def test_training__defaults(tmp_path):
    study = read_study_file(write(tmp_path, "method = 'robust_l2'\nname = 'pgd 2.0'"))
    (run,) = study.training.runs
    folder = tmp_path / "models" / "pgd 2.0"
    expected = TrainingRun("pgd 2.0", "robust_l2", {}, ARCH, f"{tmp_path}/digits", folder, None, 0, "no", "float32")
    assert run == expected
    reference = f"file:{folder}?arch={FUNCTION}"
    assert study.models == (ModelEntry("pgd 2.0", reference, "adversarial_training", attack_norm="l2", eps=0.5),)


def test_training__a_study_without_methods(tmp_path):
    model = "reference = 'zoo:resnet50_dino'"
    study = read_study_file(write(tmp_path, model, training=""))
    assert study.training is None
    assert study.untrained() == []
    study.check_trained()
    assert read_study_file(write(tmp_path, model)).training.runs == ()


def test_training__donors_for_rewind(tmp_path):
    resets = "[protocol]\nresets = ['zero', 'rewind']\n"
    models = ["method = 'baseline'\nname = 'a'", "method = 'baseline'\nname = 'b'\ndonor = 'models/a@epoch=3'"]
    study = read_study_file(write(tmp_path, *models, more=resets))
    donors = [f"{tmp_path}/models/a@epoch=0", f"{tmp_path}/models/a@epoch=3"]
    assert [model.donor for model in study.models] == donors
    train(study.training.runs[0])
    assert [model.donor for model in read_study_file(tmp_path).models] == donors


def test_training__a_donor_that_was_not_kept(tmp_path):
    resets = "[protocol]\nresets = ['rewind']\n"
    path = write(tmp_path, "method = 'baseline'\nname = 'a'", more=resets)
    train(read_study_file(path).training.runs[0], epochs=(1, 2))
    assert mistakes(path) == [
        f"the donor of model 'a': {tmp_path}/models/a did not keep the weights of epoch '0'. Epochs that it kept: 1, 2."
    ]


def test_training__a_folder_of_transformers_as_architecture(tmp_path):
    (tmp_path / "vit").mkdir()
    path = write(tmp_path, "method = 'baseline'\nname = 'a'", training="[training]\narch = 'hf:vit?x=1'\ndata = '/d'\n")
    (run,) = read_study_file(path).training.runs
    assert (run.arch, run.data) == (f"hf:{tmp_path}/vit?x=1", "/d")


def test_to_toml__trained_models_are_files_like_others(tmp_path):
    study = read_study_file(write(tmp_path, "method = 'robust_l2'\nname = 'pgd'", "method = 'baseline'\nname = 'a'",
                                  more="[protocol]\nresets = ['rewind']\n"))  # fmt: skip
    for run in study.training.runs:
        train(run)
    text = study.to_toml()
    assert "[training]" not in text
    assert "method" not in text
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "study.toml").write_text(text, encoding="utf-8")
    read = read_study_file(again)
    assert read.models == study.models
    assert read.training is None
    assert read.to_toml() == text


# --- what is not trained yet ----------------------------------------------------------------------------------------


def test_untrained__until_weights_and_record_are_there(tmp_path):
    study = read_study_file(write(tmp_path, *(f"method = 'baseline'\nname = '{name}'" for name in "abc")))
    assert study.untrained() == ["a", "b", "c"]
    with pytest.raises(StudyError, match=r"^3 models are not trained yet: a, b, c\. Train them with: layercrit train"):
        study.check_trained()
    first, second, third = study.training.runs
    train(first)
    train(second)
    (second.folder / "model.safetensors").unlink()
    train(third)
    (third.folder / "model.json").unlink()
    assert study.untrained() == ["b", "c"]
    with pytest.raises(StudyError, match=rf"^2 models .*: b, c\. .* --study {tmp_path}/study.toml$"):
        study.check_trained()


def test_run_study__with_training(tmp_path):
    """The models are asked for first; once they are there, they are measured as weight files are."""
    folder = tmp_path / "my study"
    path = write(
        folder, "method = 'baseline'\nname = 'a'", "method = 'robust_l2'\nname = 'b'",
        more="n_images = 12\ninput_size = [3, 2, 2]\n[protocol]\nresets = ['rewind', 'zero']\n"
        "dtype = 'float32'\ndevice = 'cpu'\n",
    )  # fmt: skip
    write_pixels(folder / "images.npz", 12)
    study = read_study_file(path)
    train(study.training.runs[0], seed=0)
    for start in (plan_study, lambda study: run_study(study, tmp_path / "out", progress=False)):
        with pytest.raises(StudyError, match=rf"^1 model is not trained yet: b\. Train it with: .* --study '{path}'$"):
            start(study)
    assert not (tmp_path / "out").exists()
    train(study.training.runs[1], seed=1)
    plan = plan_study(study)
    assert list(plan.models["mistake"]) == ["", ""]
    report = run_study(study, tmp_path / "out", progress=False, executor=Inline())
    assert report.failures == []
    assert report.n_measured == plan.models["n_cells"].sum() > 0
    with contextlib.closing(Store(tmp_path / "out")) as store:
        rows = {row.model: row for row in store.models()}
    assert {name: row.category for name, row in rows.items()} == {"a": "baseline", "b": "adversarial_training"}
    for name, row in rows.items():
        assert row.record["donor"]["rewind"].startswith(f"given: the file {folder}/models/{name}@epoch=0, SHA-256 ")
    again = run_study(read_study_file(tmp_path / "out"), tmp_path / "out", progress=False, executor=Inline())
    assert (again.n_measured, again.n_known) == (0, report.n_measured)


# --- mistakes -------------------------------------------------------------------------------------------------------


A = "method = 'baseline'\nname = 'a'"


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (
            "[training]\ndata = 'x'\n",
            "[training] arch is missing: the architecture to train, a model reference without",
        ),
        ("[training]\narch = 'timm:resnet18'\n", "[training] data is missing: source of the training images"),
        (TRAINING + "epoch = 3\n", "[training] unknown key 'epoch'. Did you mean 'epochs'?"),
        (TRAINING + "epochs = 0\n", "[training] epochs must be at least 1; got 0"),
        (TRAINING + "epochs = 1.5\n", "[training] epochs must be a whole number; got 1.5"),
        (TRAINING + "seed = -1\n", "[training] seed must be a whole number from 0 to 2**64 - 1; got -1"),
        (TRAINING + "seed = 18446744073709551616\n", "[training] seed must be a whole number from 0 to 2**64 - 1; got"),
        (TRAINING + "precision = 'fp61'\n", "[training] unknown precision 'fp61'. Did you mean 'fp16'"),
        (
            TRAINING + "weights_dtype = 'float61'\n",
            "[training] unknown weights_dtype 'float61'. Did you mean 'float16'",
        ),
        (TRAINING + "settings = 3\n", "[training] settings must be a table; got 3"),
        (
            TRAINING + "settings = {batch = 3}\n",
            "no. 1: The method baseline has no setting 'batch'. Did you mean 'batch_",
        ),
        (TRAINING + "settings = {batch_size = 'x'}\n", "[[models]] no. 1: baseline: batch_size must be a whole number"),
        (
            TRAINING + "settings = {epochs = 3}\n",
            "[[models]] no. 1: epochs must be given next to settings, not in them",
        ),
        (TRAINING.replace(ARCH, "resnet18"), "[training] arch: 'resnet18' is no model reference."),
        (
            TRAINING.replace(ARCH, "timm:resnet1B"),
            "[training] arch: timm has no model 'resnet1B'. Did you mean 'resnet",
        ),
        (
            TRAINING.replace(ARCH, "timm:resnet18.*"),
            "[training] arch must be one model reference; 'timm:resnet18.*' nam",
        ),
        (TRAINING.replace(ARCH, "file:w.pth"), "[training] arch must be a model reference without weights, such as"),
        ("training = 3\n", "expected one table [training], got 3"),
        (
            "",
            "[[models]] no. 1: method needs a table [training] with the architecture (arch) and the images (data)",
        ),
    ],
)
def test_mistakes__of_the_training_table(tmp_path, training, expected):
    path = write(tmp_path, A, training=training)
    if training.startswith("training"):
        path.write_text(training + path.read_text().replace(training, ""))
    (found,) = mistakes(path)
    assert expected in found


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("method = 'baseline'", "[[models]] no. 1: a model with a method needs a name, which is also"),
        (f"{A}\nreference = 'zoo:resnet50_dino'", "no. 1: expected exactly one of reference, list and method"),
        (f"{A}\nlist = 'x'", "no. 1: expected exactly one of reference, list and method"),
        ("method = 'robust_l3'\nname = 'a'", "no. 1: There is no training method 'robust_l3'. Did you mean 'rob"),
        (f"{A}\nsettings = {{epss = 3}}", "[[models]] no. 1: The method baseline has no setting 'epss'."),
        (f"{A}\nsettings = {{lr = -1}}", "[[models]] no. 1: baseline: lr must be a number from 0; got -1."),
        (f"{A}\nsettings = {{epochs = 1}}", "[[models]] no. 1: epochs must be given next to settings, not in them"),
        (f"{A}\nsettings = 'x'", "[[models]] no. 1: settings must be a table; got 'x'"),
        (f"{A}\nepochs = 0", "[[models]] no. 1: epochs must be at least 1; got 0"),
        (f"{A}\nseed = -1", "[[models]] no. 1: seed must be a whole number from 0 to 2**64 - 1; got -1"),
        (f"{A}\nseed = true", "[[models]] no. 1: seed must be a whole number from 0 to 2**64 - 1; got True"),
        (f"{A}\naccuracy = 76", "[[models]] no. 1: accuracy must be a share in [0, 1]; got 76. Did you mean 0.76?"),
        (f"{A}\ndonor = 'no.pth'", "the donor of model 'a' is not a file: HERE/no.pth"),
        ("method = 3\nname = 'a'", "[[models]] no. 1: method must be text; got 3"),
        ("reference = 'zoo:resnet50_dino'\nseed = 1\nepochs = 2", "epochs, seed can be given only for a model with a"),
        ("list = 'x.csv'\nsettings = {}", "[[models]] no. 1: settings can be given only for a model with a method"),
    ],
)  # fmt: skip
def test_mistakes__of_a_model_with_a_method(tmp_path, model, expected):
    (found,) = mistakes(write(tmp_path, model, more="[study]\nbaseline = 'a'\n" if "name" in model else ""))
    assert expected.replace("HERE", str(tmp_path)) in found


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "/a", ".a", "a.", "a ", "~", "a?b", "a*", "a@epoch=0", "a\nb", "a:b"]
)
def test_mistakes__names_that_are_no_folder_names(tmp_path, name):
    (found,) = mistakes(write(tmp_path, f"method = 'baseline'\nname = '''{name}'''"))
    assert re.search(r"name must be fit for a folder .*; got ", found)
    good = [f"method = 'baseline'\nname = '{name}'" for name in ("a", "résnet 18_b", "pgd-eps=0.5", "v1.0+x,y")]
    assert len(read_study_file(write(tmp_path, *good)).training.runs) == 4


def test_mistakes__all_at_once(tmp_path):
    path = write(tmp_path, f"{A}\nepochs = 0", "method = 'basline'\nname = 'b/c'", A, A,
                 training="[training]\ndata = 'x'\nseed = -1\n", more="[study]\nbaseline = 'b'\n")  # fmt: skip
    found = mistakes(path)
    assert len(found) == 7
    assert all(mistake.startswith("two models are named 'a': ") for mistake in found[-2:])


def test_mistakes__a_trained_model_without_its_architecture(tmp_path):
    path = write(tmp_path, A, training=TRAINING.replace(ARCH, "timm:resnet18"))
    train(read_study_file(path).training.runs[0])
    (tmp_path / "models" / "a" / "model.json").write_text("{}")
    (found,) = mistakes(path)
    assert re.search(r"no. 1: file:.*/models/a/model.safetensors does not say its architecture", found)


def test_mistakes__of_a_list_with_columns_of_training(tmp_path):
    (tmp_path / "models.csv").write_text("reference,method\nzoo:resnet50_dino,baseline\n")
    (found,) = mistakes(write(tmp_path, "list = 'models.csv'"))
    assert found.startswith("models.csv: unknown column 'method'.")


@pytest.mark.parametrize("value", ["3", "0.5", "true", "'x'", "[1]", "{x = 1}", "1979-05-27", "nan", "-1", "''", "[]"])
def test_mistakes__values_of_a_wrong_type_are_nothing_worse(tmp_path, value):
    """Whatever stands in a study file, reading it ends well or with a StudyError."""
    keys = ["arch", "data", "folder", "epochs", "seed", "precision", "weights_dtype", "settings"]
    for key in keys:
        rest = "".join(line + "\n" for line in TRAINING.splitlines() if not line.startswith(f"{key} "))
        with contextlib.suppress(StudyError):
            read_study_file(write(tmp_path, A, training=f"{rest}{key} = {value}\n"))
    for key in ("method", "name", "settings", "epochs", "seed"):
        rest = "\n".join(line for line in A.splitlines() if not line.startswith(f"{key} "))
        with contextlib.suppress(StudyError):
            read_study_file(write(tmp_path, f"{rest}\n{key} = {value}"))


def test_choices_are_those_of_training():
    from layercrit.training.loop import PRECISIONS, WEIGHTS_DTYPES

    choices = {key: get_args(TrainingTable.model_fields[key].annotation) for key in ("precision", "weights_dtype")}
    assert choices == {"precision": PRECISIONS, "weights_dtype": tuple(WEIGHTS_DTYPES)}
