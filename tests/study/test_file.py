import json
import re
import sys
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercrit.errors import StudyError
from layercrit.models.sources import MODEL_SOURCES
from layercrit.models.zoo.fetching import ZOO
from layercrit.probes.images import STANDARD, Preprocessing
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.resets import RESETS, get_reset
from layercrit.study.entries import ModelEntry
from layercrit.study.file import StudyFile, read_study_file
from layercrit.study.store import Store
from small_studies import OPTIONS, write_study
from small_subjects import registered
from training_runs import write_run

ONE = "[images]\nsource = 'x.npz'\n"


def write(folder, text, **files):
    """Write a study file, and beside it empty weight files whose architecture is recorded."""
    for name in files.get("files", ()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        (folder / name).with_suffix(".json").write_text('{"arch": "timm:resnet18"}', encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def models_of(folder, *tables, files=("m0.pth", "m1.pth")):
    """Read a study of some [[models]] tables, given as TOML."""
    text = ONE + "".join(f"[[models]]\n{table}\n" for table in tables)
    return read_study_file(write(folder, text, files=files)).models


def said_of(path):
    """What reading a study file says of its mistakes, where it has some."""
    try:
        read_study_file(path)
    except StudyError as error:
        return str(error)
    return ""


def mistakes(path):
    """The mistakes that reading a study file names."""
    with pytest.raises(StudyError) as caught:
        read_study_file(path)
    first, *rest = str(caught.value).split("\n  - ")
    assert re.fullmatch(rf"{re.escape(str(path))} has {len(rest)} mistakes?:", first)
    return rest


# --- what a study file says -----------------------------------------------------------------------------------------


def test_read_study_file__every_key(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(
        tmp_path,
        """
        [study]
        name = "my study"
        baseline = "plain"
        leave_out = ["freezing", "other"]
        imports = ["json", "email.mime.text"]
        [images]
        source = "val"
        n_images = 500
        labels = false
        input_size = [1, 28, 20]
        resize = 32
        interpolation = "bicubic"
        [protocol]
        trials = 7
        layers = "layer1.*,fc"
        types = "conv, norm"
        group = "block"
        seed = 18446744073709551616
        batch_size = 8
        dtype = "float32"
        device = "cpu"
        level = 0.9
        resets = ["zero", "rewind", "zero"]
        distances = ["l1", "cosine"]
        [[models]]
        reference = "file:m0.pth?arch=timm:resnet18"
        name = "plain"
        category = "baseline"
        label = "Plain"
        accuracy = 0.7615
        donor = "epoch0.pth"
        [[models]]
        reference = "py:my.module:factory?width=3"
        name = "other"
        category = "freezing"
        donor = "epoch0.pth"
        """,
        files=["m0.pth", "epoch0.pth"],
    )
    donor = str(tmp_path / "epoch0.pth")
    plain = f"file:{tmp_path}/m0.pth?arch=timm:resnet18"
    assert read_study_file(path) == StudyFile(
        name="my study",
        models=(
            ModelEntry("plain", plain, "baseline", "Plain", 0.7615, donor),
            ModelEntry("other", "py:my.module:factory?width=3", "freezing", None, None, donor),
        ),
        source=str(tmp_path / "val"),
        n_images=500,
        labels=False,
        preprocessing=Preprocessing(1, 28, 20, 32, "bicubic"),
        protocol=Protocol(
            trials=7, layers="layer1.*,fc", types="conv, norm", group="block", reset="zero", seed=2**64, batch_size=8,
            dtype="float32", device="cpu", level=0.9,
        ),
        resets=("zero", "rewind"),
        distances=("cosine", "l1"),
        baseline="plain",
        leave_out=("freezing", "other"),
        imports=("json", "email.mime.text"),
    )  # fmt: skip


def test_read_study_file__defaults(tmp_path):
    path = write(tmp_path / "digits", ONE + "[[models]]\nreference = 'file:m0.pth'", files=["m0.pth"])
    assert read_study_file(path) == StudyFile(
        name="digits",
        models=(ModelEntry("m0", f"file:{tmp_path}/digits/m0.pth"),),
        source=str(tmp_path / "digits" / "x.npz"),
        n_images=10_000,
        labels=True,
        preprocessing=STANDARD,
        protocol=DEFAULTS,
        resets=("rerandomize",),
        distances=("cosine", "l1", "l2", "js", "top1"),
        baseline=None,
        leave_out=(),
        imports=(),
    )


def test_read_study_file__folder_and_name(tmp_path, monkeypatch):
    path = write_study(tmp_path / "digits")
    assert read_study_file(path.parent) == read_study_file(path) == read_study_file(str(path))
    assert read_study_file(path).name == "digits"
    path.rename(path.with_name("other.toml"))
    assert read_study_file(tmp_path / "digits" / "other.toml").name == "other"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_study_file("~/digits/other.toml").name == "other"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("", STANDARD),
        ("input_size = [3, 64, 96]", Preprocessing(3, 64, 96, 96)),
        ("input_size = [1, 224, 224]", Preprocessing(1, 224, 224, STANDARD.resize)),
        ("input_size = [1, 8, 8]\nresize = 0", Preprocessing(1, 8, 8, None)),
        ("resize = [224, 224]", replace(STANDARD, resize=(224, 224))),
        ("interpolation = 'nearest'", replace(STANDARD, interpolation="nearest")),
    ],
)
def test_read_study_file__preprocessing(tmp_path, images, expected):
    text = ONE + images + "\n[[models]]\nreference = 'zoo:resnet50_dino'"
    assert read_study_file(write(tmp_path, text)).preprocessing == expected


# --- models: patterns, lists, names ---------------------------------------------------------------------------------


def test_models__zoo(tmp_path):
    models = models_of(tmp_path, "reference = 'zoo:*'")
    assert [model.name for model in models] == list(ZOO)
    assert len(models) == 51
    for model in models:
        entry = ZOO[model.name]
        assert model.reference == f"zoo:{entry.id}"
        assert (model.category, model.label, model.accuracy) == (entry.category, entry.label, entry.documented_accuracy)


def test_models__zoo_with_other_words(tmp_path):
    table = "reference = 'zoo:resnet50_dino?mean=(0,0,0)'\nname = 'x'\nlabel = 'X'\ncategory = 'y'\naccuracy = 0.5"
    assert models_of(tmp_path, table) == (ModelEntry("x", "zoo:resnet50_dino?mean=(0,0,0)", "y", "X", 0.5),)


def test_models__timm(tmp_path):
    models = models_of(tmp_path, "reference = 'timm:test_resn*?num_classes=1000'\ncategory = 'tiny'")
    assert models == (
        ModelEntry("test_resnet.r160_in1k", "timm:test_resnet.r160_in1k?num_classes=1000", category="tiny"),
    )
    (model,) = models_of(tmp_path, "reference = 'timm:resnet50.a1_in1k'")
    assert model == ModelEntry("resnet50.a1_in1k", "timm:resnet50.a1_in1k")
    named = models_of(tmp_path, "reference = 'timm:resnet50.a*_in1k'")
    assert {"resnet50.a1_in1k", "resnet50.a2_in1k"} <= {model.name for model in named}


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("torchvision:resnet50:IMAGENET1K_V2", "resnet50:IMAGENET1K_V2"),
        ("hf:microsoft/resnet-50", "resnet-50"),
        ("hf-hub:timm/resnet50.a1_in1k?x=1", "resnet50.a1_in1k"),
        ("py:my.module:factory", "my.module:factory"),
    ],
)
def test_models__other_kinds(tmp_path, reference, name):
    assert models_of(tmp_path, f"reference = '{reference}'") == (ModelEntry(name, reference),)


def test_models__folder_of_transformers(tmp_path):
    (tmp_path / "nets" / "vit").mkdir(parents=True)
    assert models_of(tmp_path, "reference = 'hf:nets/vit?x=1'") == (ModelEntry("vit", f"hf:{tmp_path}/nets/vit?x=1"),)


def test_models__files(tmp_path):
    models = models_of(tmp_path, f"reference = 'file:m*.pth?{OPTIONS}'\ncategory = 'own'", files=["m1.pth", "m0.pth"])
    assert models == tuple(ModelEntry(m, f"file:{tmp_path}/{m}.pth?{OPTIONS}", "own") for m in ("m0", "m1"))
    (other,) = models_of(tmp_path, "reference = 'file:m?.pth?arch=timm:resnet18'", files=["m0.pth"])[1:]
    assert other.reference == f"file:{tmp_path}/m1.pth?arch=timm:resnet18"


@pytest.mark.parametrize(
    ("pattern", "files", "names"),
    [
        ("runs/*/final.pth", ["runs/b/final.pth", "runs/a/final.pth"], ["a", "b"]),
        ("runs/*/*.pth", ["runs/a/best.pth", "runs/a/last.pth", "runs/b/last.pth"], ["a-best", "a-last", "b-last"]),
        ("**/*.pth", ["m.pth", "runs/x/n.pth"], ["m", "n"]),
        ("v1.[01]", ["v1.0/w.safetensors", "v1.1/w.safetensors"], ["v1.0", "v1.1"]),
        ("m.[x].pth", ["m.[x].pth"], ["m.[x]"]),
    ],
)
def test_models__names_of_files(tmp_path, pattern, files, names):
    models = models_of(tmp_path, f"reference = 'file:{pattern}'", files=files)
    assert [model.name for model in models] == names


def test_models__epochs_of_training_runs(tmp_path):
    for name, epochs in (("a", [0, 5]), ("b-0.5", [0, 5]), ("c", [0])):
        write_run(tmp_path / "runs" / name, {epoch: {"w": torch.zeros(1)} for epoch in epochs}, "timm:resnet18")
    (model,) = models_of(tmp_path, "reference = 'file:runs/b-0.5@epoch=5'\ndonor = 'runs/b-0.5@epoch=0'")
    assert (model.name, model.reference) == ("b-0.5@epoch=5", f"file:{tmp_path}/runs/b-0.5@epoch=5")
    assert model.donor == f"{tmp_path}/runs/b-0.5@epoch=0"
    models = models_of(tmp_path, "reference = 'file:runs/*@epoch=0?mean=(0,0,0)'")
    assert [model.name for model in models] == ["a@epoch=0", "b-0.5@epoch=0", "c@epoch=0"]
    assert models[0].reference == f"file:{tmp_path}/runs/a@epoch=0?mean=(0,0,0)"
    assert again(read_study_file(tmp_path), tmp_path).models == models
    (tmp_path / "runs" / "x@epoch=0").mkdir()
    models = models_of(tmp_path, "reference = 'file:runs/*@epoch=0?arch=timm:resnet18'")
    assert [model.name for model in models] == ["x@epoch=0"], "folders that are really named so go first"
    text = (
        f"{ONE}[[models]]\nreference = 'file:runs/c@epoch=5'\n[[models]]\nreference = 'file:runs/*@epoch=5'\n"
        "[[models]]\nreference = 'zoo:resnet50_dino'\ndonor = 'runs/c@epoch=7'"
    )
    (tmp_path / "runs" / "x@epoch=0").rmdir()
    no_epoch = f"{tmp_path}/runs/c did not keep the weights of epoch '5'. Epochs that it kept: 0."
    nor_this = no_epoch.replace("epoch '5'", "epoch '7'")
    assert mistakes(write(tmp_path, text)) == [
        f"[[models]] no. 1: {no_epoch}",
        f"[[models]] no. 2: {no_epoch}",
        f"the donor of model 'resnet50_dino': {nor_this}",
    ]


def test_models__in_a_folder_whose_name_is_a_pattern(tmp_path):
    folder = tmp_path / "study[1]*"
    models = models_of(folder, "reference = 'file:m?.pth'", files=["m0.pth", "m1.pth"])
    assert [model.reference for model in models] == [f"file:{folder}/m0.pth", f"file:{folder}/m1.pth"]
    path = write(folder, read_study_file(folder).to_toml())
    assert read_study_file(path).models == models


def test_models__absolute_and_home_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home", "", files=["m0.pth", "m1.pth"])
    for place in ("~", f"{tmp_path}/home"):
        models = models_of(tmp_path / "study", f"reference = 'file:{place}/m0.pth'\ndonor = '{place}/m1.pth'")
        assert models == (ModelEntry("m0", f"file:{tmp_path}/home/m0.pth", donor=f"{tmp_path}/home/m1.pth"),)
    assert len(models_of(tmp_path / "study", "reference = 'file:~/*.pth'")) == 2


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_models__list_with_columns(tmp_path, mark):
    text = f"""{mark}label,reference,name,accuracy,donor,category
        A,file:m0.pth,a,0.5,m1.pth,own

        ,"file:m1.pth?mean=(0,0,0)",,,,
        """
    (tmp_path / "models.csv").write_text("\n".join(line.strip() for line in text.splitlines()), encoding="utf-8")
    first, second = models_of(tmp_path, "list = 'models.csv'\ncategory = 'other'\nlabel = 'L'")
    assert first == ModelEntry("a", f"file:{tmp_path}/m0.pth", "own", "A", 0.5, f"{tmp_path}/m1.pth")
    assert second == ModelEntry("m1", f"file:{tmp_path}/m1.pth?mean=(0,0,0)", "other", "L")


def test_models__plain_list(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "models.txt").write_text("# mine\nfile:m*.pth\n\n  zoo:resnet50_dino  \n")
    models = models_of(tmp_path, "list = 'lists/models.txt'\ncategory = 'x'")
    assert [(model.name, model.category) for model in models] == [("m0", "x"), ("m1", "x"), ("resnet50_dino", "x")]


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("val", "HERE/val"),
        ("../val/*.tar", "HERE/../val/*.tar"),
        ("/data/val", "/data/val"),
        ("~/val", "/home/me/val"),
        ("torchvision:CIFAR10?root=data", "torchvision:CIFAR10?root=HERE/data"),
        ("torchvision:CIFAR10?split=test&root=/data", "torchvision:CIFAR10?split=test&root=/data"),
        ("torchvision:CIFAR10?root=data&split=test", "torchvision:CIFAR10?root=HERE/data&split=test"),
        ("corrupt:fog@3:val", "corrupt:fog@3:HERE/val"),
        (
            "corrupt:fog@3:corrupt:snow@1:torchvision:X?root=data",
            "corrupt:fog@3:corrupt:snow@1:torchvision:X?root=HERE/data",
        ),
        (
            "attack:pgd(norm=linf, eps=4/255):corrupt:fog@3:val",
            "attack:pgd(norm=linf, eps=4/255):corrupt:fog@3:HERE/val",
        ),
    ],
)
def test_images__source_is_relative_to_the_study_file(tmp_path, monkeypatch, source, expected):
    monkeypatch.setenv("HOME", "/home/me")
    text = f"[images]\nsource = '{source}'\n[[models]]\nreference = 'zoo:resnet50_dino'"
    assert read_study_file(write(tmp_path, text)).source == expected.replace("HERE", str(tmp_path))


# --- imports --------------------------------------------------------------------------------------------------------


def test_imports__register_what_the_study_names(tmp_path, monkeypatch):
    (tmp_path / "my_study_parts.py").write_text(
        "from layercrit.models import model_source\nfrom layercrit.resets import reset\n"
        "@reset('negate', random=False)\ndef negate(draw):\n    '''Signs flipped.'''\n"
        "@model_source('mine')\ndef source(rest, options):\n    '''None.'''\n"
    )
    text = (
        ONE + "[study]\nimports = ['my_study_parts']\n[protocol]\nresets = ['negate']\n[[models]]\nreference='mine:x'"
    )
    path = write(tmp_path / "study", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        with registered(RESETS), registered(MODEL_SOURCES):
            study = read_study_file(path)
    finally:
        sys.modules.pop("my_study_parts", None)
    assert study.resets == ("negate",)
    assert study.models == (ModelEntry("x", "mine:x"),)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, r"'my_broken' cannot be imported \(ModuleNotFoundError: No module named 'my_broken'\)"),
        ("1 / 0", r"'my_broken' cannot be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_imports__that_fail(tmp_path, monkeypatch, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if code:
        (tmp_path / "my_broken.py").write_text(code)
    (found,) = mistakes(
        write(tmp_path, ONE + "[study]\nimports = ['my_broken']\n[[models]]\nreference = 'zoo:resnet50_dino'")
    )
    assert re.fullmatch(rf"\[study\] imports: {message}", found)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes__all_at_once(tmp_path):
    text = """
        [study]
        nme = "x"
        leave_out = ["freezin", 3]
        baseline = "m3"
        [image]
        [images]
        n_images = 0
        input_size = [3, 224]
        labels = 3
        [protocol]
        trials = 0
        seed = true
        level = 95
        dtype = "float23"
        group = "blok"
        types = "conv,linar"
        batch_size = 1.5
        resets = ["rerandomise"]
        distances = ["cosin"]
        [[models]]
        reference = "file:m0.pth"
        accuracy = 76.15
        """
    found = mistakes(write(tmp_path, text, files=["m0.pth"]))
    assert found == [
        "unknown section [image]. Did you mean 'images'?",
        "[study] leave_out no. 2 must be text; got 3",
        "[study] unknown key 'nme'. Did you mean 'name'?",
        found[3],
        "[images] n_images must be at least 1; got 0",
        "[images] labels must be true, false, a file or a column; got 3",
        "[images] input_size must be [channels, height, width]; got [3, 224]",
        "[protocol] trials must be a whole number of at least 1; got 0.",
        "[protocol] unknown layer type 'linar'. Did you mean 'linear'?",
        "[protocol] unknown group 'blok'. Did you mean 'block'?",
        "[protocol] seed must be a whole number; got True.",
        "[protocol] batch_size must be 'auto' or a whole number of at least 1; got 1.5.",
        "[protocol] Unknown dtype 'float23'. Did you mean 'float32' or 'bfloat16'?",
        "[protocol] level must be between 0 and 1, such as 0.95; got 95.",
        "[[models]] no. 1: accuracy must be a share in [0, 1]; got 76.15. Did you mean 0.7615?",
        found[15],
        found[16],
        "[study] baseline 'm3' is not one of the models. Did you mean 'm0'?",
    ]
    assert found[3].startswith("[images] source is missing: source of the images, anything that `layercrit measure")
    assert re.fullmatch(r"\[protocol\] .*'rerandomise'.*Did you mean 'rerandomize'.*", found[15])
    assert re.fullmatch(r"\[protocol\] .*'cosin'.*Did you mean 'cosine'.*", found[16])


@pytest.mark.parametrize(
    "text",
    [
        "models = 3",
        "[models]\nreference = 'zoo:resnet50_dino'",
        "[[study]]\nname = 'x'\n[[models]]\nreference = 'zoo:resnet50_dino'",
        "images = [1]",
        "images = []",
        "protocol = 'x'",
        "models = [1, 2]",
    ],
)
def test_mistakes__sections_of_another_form(tmp_path, text):
    found = mistakes(write(tmp_path, text))
    tables = r"one table \[\w+\]|\[\[models\]\] tables|a table \[images\], or tables \[\[images\]\]"
    assert any(re.match(rf"expected ({tables}), got ", mistake) for mistake in found)


ONE_OF_EACH_TYPE = ["3", "0.5", "true", "'text'", "[1]", "['x']", "{x = 1}", "1979-05-27", "nan", "-1", "''", "[]"]


@pytest.mark.parametrize("value", ONE_OF_EACH_TYPE)
def test_mistakes__values_of_a_wrong_type_are_nothing_worse(tmp_path, value):
    """Whatever stands in a study file, reading it ends well or with a StudyError."""
    keys = {
        "study": ["name", "baseline", "leave_out", "imports"],
        "images": ["source", "n_images", "labels", "classes", "input_size", "resize", "interpolation"],
        "protocol": [field.name for field in fields(Protocol)] + ["resets", "distances"],
        "models": ["reference", "list", "name", "category", "label", "accuracy", "donor", "eps"],
    }
    for section, names in keys.items():
        for name in names:
            head = f"[[{section}]]\nreference = 'file:m0.pth'\n" if section == "models" else f"[{section}]\n"
            head = head if name != "reference" else "[[models]]\n"
            rest = "" if section == "images" else ONE
            rest += "" if section == "models" else "[[models]]\nreference = 'file:m0.pth'\n"
            path = write(tmp_path, f"{head}{name} = {value}\n{rest}", files=["m0.pth"])
            assert not re.search("Input should|pydantic|Extra inputs|of another form", said_of(path)), "not our words"


def test_mistakes__everything_of_a_wrong_type_once(tmp_path):
    text = """
        [study]
        name = 3
        baseline = 3
        leave_out = "x"
        imports = "x"
        [images]
        source = 3
        n_images = "x"
        input_size = 3
        resize = "x"
        interpolation = 3
        [protocol]
        layers = 3
        resets = "x"
        distances = 3
        [[models]]
        reference = 3
        [[models]]
        list = 3
        """
    found = mistakes(write(tmp_path, text))
    assert len(found) == 14
    assert all(re.fullmatch(r".* must be (text|a list|a whole number.*|\[channels.*); got .*", text) for text in found)


def test_mistakes__many(tmp_path):
    text = ONE + "\n".join(f"[[models]]\nreference = 'zoo:none{n}'" for n in range(30))
    with pytest.raises(StudyError, match=r"has 30 mistakes:") as caught:
        read_study_file(write(tmp_path, text))
    assert str(caught.value).endswith("\n  ... and 10 more")


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([], "there are no models: add [[models]] tables with a reference each"),
        (["name = 'x'"], "[[models]] no. 1: expected exactly one of reference, list and method"),
        (["reference = 'zoo:*'\nlist = 'x'"], "[[models]] no. 1: expected exactly one of reference, list and method"),
        (["reference = 'zo:x'"], "[[models]] no. 1: 'zo:x' is no model reference. Did you mean 'zoo'?"),
        (["reference = 'resnet50'"], "[[models]] no. 1: 'resnet50' is no model reference."),
        (["reference = 'zoo:'"], "[[models]] no. 1: 'zoo:' is no model reference."),
        (["reference = 'zoo:resnet50_dinno'"], "The zoo has no model 'resnet50_dinno'. Did you mean 'resnet50_dino'"),
        (["reference = 'timm:resnet5O'"], "timm has no model 'resnet5O'. Did you mean 'resnet50'"),
        (["reference = 'timm:resnet50.a9_in1k'"], "timm has no weights 'a9_in1k' for resnet50. Did you mean '"),
        (["reference = 'timm:xyz*'"], "timm has no model that matches 'xyz*'"),
        (["reference = 'torchvision:resnet*'"], "patterns work only with zoo:, timm: and file:"),
        (["reference = 'file:m2.pth'"], "there is no file HERE/m2.pth. Did you mean 'm1.pth' or 'm0.pth'?"),
        (["reference = 'file:x*.pth'"], "no file matches HERE/x*.pth"),
        (
            ["reference = 'file:m*.pth'\nname = 'x'\nlabel = 'y'"],
            "'file:m*.pth' names 2 models, but label, name can be",
        ),
        (["reference = 'file:m0.pth'"] * 2, "two models are named 'm0': file:HERE/m0.pth and file:HERE/m0.pth; give"),
        (["reference = 'file:m0.pth'\naccuracy = -0.1"], "accuracy must be a share in [0, 1]; got -0.1."),
        (["reference = 'file:m0.pth'\naccuracy = nan"], "accuracy must be a share in [0, 1]; got nan."),
        (["reference = 'file:m0.pth'\neps = -1"], "eps must be at least 0; got -1"),
        (["reference = 'file:m0.pth'\naccuracy = 101"], "accuracy must be a share in [0, 1]; got 101."),
        (["reference = 'file:m0.pth'\ndonor = 'no'"], "the donor of model 'm0' is not a file: HERE/no"),
        (["list = 'no.csv'"], "[[models]] no. 1: the list HERE/no.csv cannot be read ("),
        (["list = 'm0.pth'"], "[[models]] no. 1: the list HERE/m0.pth names no models"),
    ],
)
def test_mistakes__of_models(tmp_path, tables, expected):
    text = ONE + "".join(f"[[models]]\n{table}\n" for table in tables)
    (found,) = mistakes(write(tmp_path, text, files=["m0.pth", "m1.pth"]))
    assert expected.replace("HERE", str(tmp_path)) in found


def test_mistakes__no_name_that_is_unlike_all(tmp_path):
    text = ONE + "[[models]]\nreference = 'torchvision:resnet50:DEFAULT?x*=1'\n[study]\nbaseline = 'zzz'"
    (found,) = mistakes(write(tmp_path, text))
    assert found == "[study] baseline 'zzz' is not one of the models. Known: 'resnet50:DEFAULT'."


def test_mistakes__in_a_list_with_columns(tmp_path):
    (tmp_path / "models.csv").write_text(
        "reference,acuracy,accuracy\nfile:m0.pth,,76.15\n,,0.5\n\nfile:m1.pth?mean=(0,0,0),,\nfile:m9.pth,,most\n"
    )
    found = mistakes(write(tmp_path, ONE + "[[models]]\nlist = 'models.csv'", files=["m0.pth", "m1.pth"]))
    assert found == [
        "models.csv: unknown column 'acuracy'. Did you mean 'accuracy'?",
        "models.csv line 3: there is no reference",
        "models.csv line 5: more values than columns. Put quotation marks around a reference that has commas",
        "models.csv line 2: accuracy must be a share in [0, 1]; got 76.15. Did you mean 0.7615?",
        "models.csv line 6: accuracy must be a number; got 'most'",
        f"models.csv line 6: there is no file {tmp_path}/m9.pth. Did you mean 'm1.pth' or 'm0.pth'?",
    ]


def test_mistakes__in_a_plain_list(tmp_path):
    (tmp_path / "models.txt").write_text("# mine\nzoo:resnet50_dino\nzo:x\n")
    (found,) = mistakes(write(tmp_path, ONE + "[[models]]\nlist = 'models.txt'"))
    assert found == "models.txt line 3: 'zo:x' is no model reference. Did you mean 'zoo'?"


def test_mistakes__reset_without_donors(tmp_path):
    text = ONE + "[protocol]\nresets = ['rewind']\n[[models]]\nreference = 'file:m*.pth'"
    assert mistakes(write(tmp_path, text, files=["m0.pth", "m1.pth"])) == [
        "model 'm0' has no donor, which the reset 'rewind' needs",
        "model 'm1' has no donor, which the reset 'rewind' needs",
    ]


def test_mistakes__unknown_names_to_compare(tmp_path):
    text = "[study]\nbaseline = 'm2'\nleave_out = ['m0', 'onw']\n" + ONE
    text += "[[models]]\nreference = 'file:m*.pth'\ncategory = 'own'"
    assert mistakes(write(tmp_path, text, files=["m0.pth", "m1.pth"])) == [
        "[study] baseline 'm2' is not one of the models. Did you mean 'm1' or 'm0'?",
        "[study] leave_out 'onw' is neither a category nor a model. Did you mean 'own'?",
    ]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("input_size = [2, 8, 8]", "channels must be 3 (RGB) or 1 (grey); got 2."),
        ("input_size = [3, 0, 8]", "Image sizes must be positive"),
        ("resize = -1", "resize must be a whole number of pixels (0: none) or [height, width]; got -1"),
        ("resize = ['x', 'y']", "[images] "),
        ("interpolation = 'bilinar'", "unknown interpolation 'bilinar'. Did you mean 'bilinear'"),
    ],
)
def test_mistakes__of_images(tmp_path, images, message):
    (found,) = mistakes(write(tmp_path, ONE + images + "\n[[models]]\nreference = 'zoo:resnet50_dino'"))
    assert found.startswith("[images] ")
    assert message in found


def test_read_study_file__a_mark_before_the_text_as_windows_writes_it(tmp_path):
    path = write(tmp_path, ONE + "\n[[models]]\nreference = 'zoo:resnet50_dino'")
    expected = read_study_file(path)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_study_file(path) == expected


def test_read_study_file__unreadable(tmp_path):
    with pytest.raises(StudyError, match=rf"The study file {tmp_path}/study.toml cannot be read \(.*No such file"):
        read_study_file(tmp_path)
    (tmp_path / "study.toml").write_bytes(b"\xff")
    with pytest.raises(StudyError, match=r"cannot be read .*utf-8"):
        read_study_file(tmp_path)
    (tmp_path / "study.toml").write_text("[study\n")
    with pytest.raises(StudyError, match=r"study.toml is not valid TOML: .*line 1"):
        read_study_file(tmp_path)


# --- written again --------------------------------------------------------------------------------------------------


def again(study, folder):
    path = write(folder, study.to_toml())
    return read_study_file(path)


def test_to_toml__read_again_is_the_same(tmp_path):
    path = write_study(
        tmp_path / "study",
        study={"name": "n", "leave_out": ["own"], "imports": ["json"]},
        images={"labels": False, "resize": [9, 9]},
        protocol={"resets": ["zero", "permute"], "distances": ["l1"], "batch_size": 4, "level": 1e-7, "seed": -3},
        models=[
            {"reference": f"file:m*.safetensors?{OPTIONS}", "category": "own"},
            {"reference": "zoo:*"},
            {"reference": "timm:resnet18.a1_in1k", "accuracy": 1},
        ],
    )
    study = read_study_file(path)
    assert len(study.models) == 54
    assert again(study, tmp_path / "study") == study
    assert again(study, tmp_path) == study, "paths are absolute"
    assert again(again(study, tmp_path), tmp_path).to_toml() == study.to_toml()


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "\"quoted\" 'text'",
        "back\\slash \\u0041",
        "line\nline\r\n\ttab",
        "\x00\x01\x1f\x7f\x80\x9f\u2028\ufeff",
        "é 数 😀",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ANY_TEXT, min_size=2, max_size=3, unique=True), st.lists(ANY_TEXT, min_size=3, max_size=3), st.floats(0, 1)
)
def test_to_toml__any_text(tmp_path_factory, names, texts, accuracy):
    folder = tmp_path_factory.getbasetemp() / "any text"
    folder.mkdir(exist_ok=True)
    name, category, label = texts
    study = replace(
        read_study_file(write(folder, ONE + "[[models]]\nreference = 'zoo:resnet50_dino'")),
        name=name,
        models=tuple(ModelEntry(name, "zoo:resnet50_dino", category, label, accuracy) for name in names),
        baseline=names[0],
        leave_out=tuple(names),
    )
    assert again(study, folder) == study


@pytest.mark.parametrize(("size", "said"), [([1, 8, 8], True), (None, False)])
def test_read_study_file__knows_whether_it_gives_the_size_of_images(tmp_path, size, said):
    assert read_study_file(write_study(tmp_path, images={"input_size": size})).says_input_size is said


def test_to_toml__says_everything(tmp_path):
    text = read_study_file(write_study(tmp_path)).to_toml()
    for key in ("name", "n_images", "labels", "input_size", "resize", "interpolation", "resets", "norm_statistics",
                "epochs", "distances"):  # fmt: skip
        assert re.search(rf"^{key} = ", text, re.MULTILINE), key
    for name, value in DEFAULTS.to_dict().items():
        others = ("reset", "norm_statistics", "n_images", "trials", "dtype", "device")
        if name not in others and value is not None:  # TOML has no null
            assert f"\n{name} = {json.dumps(value)}\n" in text


def test_read_study_file__what_may_be_the_baseline_is_not_called_unknown(tmp_path):
    path = write_study(tmp_path, models=[{"reference": "file:gone.safetensors", "name": "m0"}])
    with pytest.raises(StudyError, match="there is no file") as caught:
        read_study_file(path)
    assert "baseline" not in str(caught.value)


def test_read_study_file__a_folder_of_imported_results(tmp_path):
    Store(tmp_path, create=True).close()
    with pytest.raises(StudyError, match="was imported or merged, so it cannot be run"):
        read_study_file(tmp_path)


def test_mistakes__an_architecture_that_nobody_says_once_for_a_pattern(tmp_path):
    path = write_study(tmp_path, protocol={"trials": 0}, models=[{"reference": "file:m*.safetensors"}])
    found = mistakes(path)
    assert len(found) == 2, "the other mistake is told as well"
    assert "m0.safetensors does not say its architecture. Add '?arch=timm:NAME'" in found[1]


# resets with options


def resets_of(folder, resets, model, files=("m0.pth", "m1.pth")):
    text = f"{ONE}[protocol]\nresets = {json.dumps(resets)}\n[[models]]\n{model}\n"
    return write(folder, text, files=files)


def test_resets__are_named_alike_and_once(tmp_path):
    written = ["noise( scale = .5 )", "rerandomize", "noise(scale=0.50)", "noise", 'moments(per="channel")']
    study = read_study_file(resets_of(tmp_path, written, "reference = 'file:m0.pth'"))
    assert study.resets == ("noise(scale=0.5)", "rerandomize", "noise(scale=1)", "moments(per=channel)")
    assert study.protocol.reset == "noise(scale=0.5)"
    assert again(study, tmp_path).resets == study.resets


def test_resets__mistakes_of_options(tmp_path):
    wrong = ["noise(scale=-1)", "nois(scale=1)", "zero(x=1)", "noise(1)", "moments(per=chanel)"]
    found = mistakes(resets_of(tmp_path, [*wrong, "noise"], "reference = 'file:m0.pth'"))
    assert len(found) == len(wrong)
    assert all(one.startswith("[protocol] ") for one in found)
    assert "Did you mean 'noise'?" in found[1]


@pytest.mark.parametrize(
    ("model", "donor_for"),
    [
        ("reference = 'file:runs/a'", None),
        ("reference = 'file:runs/a@epoch=5'", None),
        ("reference = 'file:runs/a'\ndonor = 'runs/b'", None),
        ("reference = 'file:m0.pth'\ndonor = 'runs/b'", "runs/b"),
        ("reference = 'file:m0.pth'\ndonor = 'runs/b@epoch=0'", "runs/b@epoch=0"),
    ],
)
def test_resets__rewind_to_an_epoch_is_of_the_own_run_or_else_of_the_donor(tmp_path, model, donor_for):
    for name in "ab":
        state = {"w": torch.zeros(1)}
        write_run(tmp_path / "runs" / name, {0: state, 5: state}, "timm:resnet18", final=state)
    (entry,) = read_study_file(resets_of(tmp_path, ["rewind(epoch=5)"], model)).models
    assert entry.donor_for(get_reset("rewind(epoch=5)")) == (donor_for and f"{tmp_path}/{donor_for}")
    assert entry.donor_for(get_reset("zero")) is None
    (found,) = mistakes(resets_of(tmp_path, ["rewind(epoch=5)", "rewind(epoch=6)"], model))
    assert "did not keep the weights of epoch '6'. Epochs that it kept: 0, 5." in found


def test_resets__rewind_to_an_epoch_without_a_run(tmp_path):
    (found,) = mistakes(resets_of(tmp_path, ["rewind(epoch=5)"], "reference = 'file:m0.pth'"))
    assert found.startswith("model 'm0': The reset 'rewind(epoch=5)' needs the training run that its values come from")


def test_resets__a_donor_may_be_a_reference(tmp_path):
    path = resets_of(tmp_path, ["donor"], "reference = 'file:m0.pth'\ndonor = 'file:m1.pth?mean=(0,0,0)'")
    (entry,) = read_study_file(path).models
    assert entry.donor == entry.donor_for(get_reset("donor")) == f"file:{tmp_path}/m1.pth?mean=(0,0,0)"
    path = resets_of(tmp_path, ["donor"], "reference = 'file:m0.pth'\ndonor = 'timm:resnet18.a1_in1k'")
    assert read_study_file(path).models[0].donor == "timm:resnet18.a1_in1k"
    for donor, says in (
        ("file:no.pth", "there is no file"),
        ("timm:resnet1888", "timm has no model 'resnet1888'"),
        ("file:m?.pth", "must be one model; 'file:"),
    ):
        (found,) = mistakes(resets_of(tmp_path, ["donor"], f"reference = 'file:m0.pth'\ndonor = '{donor}'"))
        assert found.startswith("the donor of model 'm0'")
        assert says in found


def test_resets__rewind_and_donor_do_not_share_a_key(tmp_path):
    (found,) = mistakes(resets_of(tmp_path, ["rewind", "donor"], "reference = 'file:m0.pth'\ndonor = 'm1.pth'"))
    assert "rewind and donor would both take the key donor" in found
    (found,) = mistakes(resets_of(tmp_path, ["donor"], "reference = 'file:m0.pth'"))
    assert found == "model 'm0' has no donor, which the reset 'donor' needs"
