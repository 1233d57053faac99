"""The zoo: declarations, every published format, hostile and broken files, the cache, and accuracies."""

import collections
import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zipfile
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path

import dill
import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from torch import nn

from layercrit.categories import CATEGORIES
from layercrit.errors import CheckpointError, LayercritError, ModelError, ZooError
from layercrit.models.references import open_model
from layercrit.models.zoo import accuracy
from layercrit.models.zoo import fetching as zoo
from layercrit.models.zoo.accuracy import check_accuracy
from layercrit.models.zoo.entries import Citation, ZooFile, read_zoo
from layercrit.models.zoo.fetching import ZOO, fetch_entry, find_entries, is_fetched, open_zoo_file
from layercrit.probes.images import Preprocessing
from layercrit.toml import tomllib
from zoo_files import LEGACY, WRITERS, classic, full_state, head, light_state, prefixed, resnet50_shapes

TEXT = resources.files("layercrit").joinpath("models/zoo/zoo.toml").read_text(encoding="utf-8")
FAMILIES = {name: table["family"] for name, table in tomllib.loads(TEXT)["models"].items()}
ENTRY = "resnet50_pixmix_90ep"  # one file, its weights under state_dict, as most have it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no network: whatever is fetched must be given."""
    monkeypatch.setenv("LAYERCRIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "fetch", lambda address, *_, **__: pytest.fail(f"{address} was asked for over the net"))
    return tmp_path / "cache" / "zoo"


@pytest.fixture(scope="module")
def state():
    return light_state()


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-was-run"


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def files_in(cache):
    """What the cache holds, but for locks, which are empty and stay."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


# What is declared


def test_zoo__has_the_51_models_of_the_study():
    assert len(ZOO) == 51
    counts = collections.Counter(entry.category for entry in ZOO.values())
    assert counts == {
        "training_recipes": 10,
        "baseline": 1,
        "adversarial_training": 15,
        "augmentation": 18,
        "contrastive": 6,
        "freezing": 1,
    }
    assert set(counts) == set(CATEGORIES)
    assert [name for name, entry in ZOO.items() if entry.documented_accuracy is None] == ["resnet50_frozen_random"]
    assert {entry.architecture for entry in ZOO.values()} == {"timm:resnet50"}
    assert {entry.preprocessing for entry in ZOO.values()} == {Preprocessing()}
    assert all(entry.id == name for name, entry in ZOO.items())


def test_zoo__facts_of_single_models():
    assert ZOO["resnet50_moco_v3_100ep"].documented_accuracy == 0.6891
    assert ZOO["robust_resnet50_linf_eps4.0"].files[0].address.endswith("/resnet50_linf_eps4.0.ckpt")
    plain = {name for name, entry in ZOO.items() if entry.mean == (0, 0, 0) and entry.std == (1, 1, 1)}
    assert plain == {"resnet50_simclrv2", "resnet50_diffusionnoise_fixed_nonoise"}
    assert {ZOO[name].mean for name in ZOO if name not in plain} == {(0.485, 0.456, 0.406)}
    assert [len(ZOO[name].files) for name in ("resnet50_dino", "resnet50_swav", "tv_resnet50")] == [2, 2, 1]
    assert ZOO["tv2_resnet50"].files[0].sha256 == "11ad3fa6"


def test_zoo__no_two_models_share_a_file():
    addresses = [file.address for entry in ZOO.values() for file in entry.files]
    assert len(set(addresses)) == len(addresses) == 53


def test_find_entries__patterns():
    assert [entry.id for entry in find_entries("resnet50_pixmix_*")] == [
        "resnet50_pixmix_90ep",
        "resnet50_pixmix_180ep",
    ]
    assert len(find_entries("robust_*_l2_*")) == 10
    assert [entry.id for entry in find_entries("*")] == list(ZOO)


def test_find_entries__unknown():
    with pytest.raises(ZooError, match=r"no model 'resnet50_dinno'. Did you mean 'resnet50_dino'.*layercrit zoo list"):
        find_entries("resnet50_dinno")


SMALL = """
[defaults]
architecture = "timm:resnet50"
mean = [0, 0, 0]
std = [1, 1, 1]
licence = "MIT"
files = [{}]
citation = {authors = "A and B", title = "T", year = 2020}
[families.f]
category = "freezing"
[models.m]
family = "f"
label = "M"
addresses = ["https://example.org/m.pth"]
"""


def test_read_zoo__families_and_defaults():
    entry = read_zoo(SMALL)["m"]
    assert (entry.category, entry.licence, entry.documented_accuracy) == ("freezing", "MIT", None)
    assert entry.files == (ZooFile("https://example.org/m.pth"),)
    assert read_zoo(SMALL + 'licence = "BSD"')["m"].licence == "BSD"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[models.m]", "[models.m", "cannot be read.*It needs the tables"),
        ("[families.f]", "[family.f]", "cannot be read .*'families'"),
        ('family = "f"', 'family = "g"', "'m' is not valid: KeyError: 'g'"),
        ('label = "M"', "", "'m' is not valid.*label"),
        ('label = "M"', 'label = "M"\neps = 1.0', "'m' is not valid.*attack_norm None and eps 1.0"),
        ('label = "M"', 'label = "M"\neps = 1.0\nattack_norm = "L2"', "'m' is not valid.*attack_norm 'L2'"),
        ('label = "M"', 'label = "M"\nlable = 1', "'m' is not valid.*lable"),
        ('"freezing"', '"frozen"', "unknown category 'frozen'. Did you mean 'freezing'"),
        ("[models.m]", '[models."../m"]', "identifier cannot name a file"),
        ("[0, 0, 0]", "[0, 0]", "mean no. 3 is missing"),
        ("[1, 1, 1]", "[1, 0, 1]", "std no. 2 must be more than 0; got 0"),
        ('label = "M"', 'label = "M"\ntop1_percent = 761', "documented_accuracy must be at most 1; got 7.61"),
        ('["https://example.org/m.pth"]', "[]", "0 addresses, 1 files and 0 hashes"),
        ("https://example.org/m.pth", "file:///etc/passwd", "is not a file's address"),
        ("https://example.org/m.pth", "hf:a/b/../c", "is not a file's address"),
        ("files = [{}]", 'files = [{strap = ["a"]}]', "unknown key 'files no. 1.strap'"),
        ("files = [{}]", "files = [{strip = [1]}]", "files no. 1.strip no. 1 must be text; got 1"),
        ("files = [{}]", 'files = [{rename = [["(", ""]]}]', "'m' is not valid: .*unterminated"),
        ("files = [{}]", 'files = [{rename = [["a", "\\\\2"]]}]', "invalid group reference"),
        ("year = 2020", "yeer = 2020", "citation.year is missing; unknown key 'citation.yeer'"),
    ],
)
def test_read_zoo__wrong(old, new, message):
    assert SMALL.count(old) == 1
    with pytest.raises(ZooError, match=message):
        read_zoo(SMALL.replace(old, new))


WRONG = ["3", "0.5", "true", "'text'", "''", "[1]", "['x']", "[['x']]", "[3, 3]", "{x = 1}", "nan", "-1", "[]"]


@pytest.mark.parametrize("value", WRONG)
def test_read_zoo__values_of_a_wrong_type_are_told_in_our_words(value):
    """Of each key of a model, and of each rule of a file."""
    lines = {line.partition(" ")[0]: line for line in SMALL.splitlines() if " = " in line}
    rules = ("key", "keep", "drop", "strip", "rename")
    for key, given in {
        **dict.fromkeys([*lines, "category", "attack_norm", "eps", "top1_percent", "sha256"], value),
        **{f"files{rule}": f"[{{{rule} = {value}}}]" for rule in rules},
    }.items():
        key = "files" if key.startswith("files") else key
        text = "".join(line + "\n" for line in SMALL.splitlines() if line != lines.get(key)) + f"{key} = {given}\n"
        try:
            read_zoo(text)
        except ZooError as error:
            told = str(error)
        else:
            told = ""
        assert not re.search("Input should|pydantic|Extra inputs|Unexpected keyword|of another form", told), told


def test_bibtex():
    assert Citation("A. B and C. D", "On {X}", 2020, "2001.00001").bibtex("key") == (
        "@misc{key,\n  author = {A. B and C. D},\n  title = {On {X}},\n  year = {2020},\n"
        "  eprint = {2001.00001},\n  archivePrefix = {arXiv},\n}"
    )
    assert "eprint" not in Citation("A", "T", 2020).bibtex("key")


# Rules


def test_renamed__rules_apply_in_the_documented_order():
    file = ZooFile(
        "https://example.org/x",
        keep=("m.", "n."),
        drop=("m.drop*",),
        strip=("m.", "n."),
        rename=(("^a", "b"), ("^b$", "c")),
    )
    named = {name: torch.zeros(1) for name in ("m.a", "m.drop.a", "other", "n.x", "m.n.y")}
    assert list(file.renamed(named)) == ["c", "x", "y"]
    assert file.rules() == [
        "keep only names that begin with 'm.' or 'n.'",
        "drop names like 'm.drop*'",
        "cut 'm.' off the beginning",
        "cut 'n.' off the beginning",
        "replace '^a' by 'b'",
        "replace '^b$' by 'c'",
    ]


def test_renamed__two_tensors_of_one_name():
    file = ZooFile("https://example.org/x", strip=("module.",))
    with pytest.raises(CheckpointError, match=r"'module.w' and 'w' would both be named 'w'"):
        file.renamed({"module.w": torch.zeros(1), "w": torch.ones(1)})


# Every published format


def test_writers__cover_every_family():
    assert {name.partition("-")[0] for name in WRITERS} == set(FAMILIES.values())


@pytest.mark.parametrize("name", WRITERS)
def test_open_zoo_file__published_format(tmp_path, state, name):
    paths = WRITERS[name](tmp_path, state)
    for entry in (ZOO[model] for model, family in FAMILIES.items() if family == name.partition("-")[0]):
        assert same(open_zoo_file(entry, paths), state)
        break  # entries of a family share their rules


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()))
def test_zoo__models_of_a_family_share_their_rules(family):
    members = [ZOO[model] for model, its in FAMILIES.items() if its == family]
    rules = {tuple(replace(file, address="", sha256=None) for file in entry.files) for entry in members}
    assert len(rules) == 1


@pytest.mark.parametrize(
    ("model", "writer"),
    [
        ("robust_resnet50_l2_eps3", "robust-older"),
        ("resnet50_trained_on_SIN", "stylized"),
        ("resnet50_dino", "dino"),
        ("resnet50_simclrv2", "simclrv2"),
    ],
)
def test_fetch_entry__whole_way_with_a_number_of_its_own_in_every_place(tmp_path, cache, model, writer):
    state = full_state()
    paths = WRITERS[writer](tmp_path, state)
    assert fetch_entry(ZOO[model], given=paths) == cache / f"{model}.safetensors"
    assert files_in(cache) == [f"{model}.json", f"{model}.safetensors"]
    for path in paths:
        path.unlink()
    opened = open_model(f"zoo:{model}")
    assert same(opened.network.state_dict(), state)
    assert (opened.mean, opened.std) == (ZOO[model].mean, ZOO[model].std)
    assert opened.preprocessing == Preprocessing()
    assert not opened.network.training


def test_open_zoo_file__old_files_do_not_count_batches(tmp_path, state):
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    [path] = WRITERS["stylized"](tmp_path, old)
    read = open_zoo_file(ZOO["resnet50_trained_on_SIN"], [path])
    assert list(read) == list(state)
    assert all(torch.equal(read[name], tensor) for name, tensor in old.items())


def test_open_zoo_file__finite_values_whose_sum_is_not(tmp_path, state):
    large = {**state, "fc.bias": torch.full((1000,), 3e38)}
    [path] = WRITERS["stylized"](tmp_path, large)
    assert torch.equal(open_zoo_file(ZOO["resnet50_trained_on_SIN"], [path])["fc.bias"], large["fc.bias"])


def test_open_zoo_file__wrong_number_of_files(tmp_path, state):
    paths = WRITERS["dino"](tmp_path, state)
    with pytest.raises(
        CheckpointError, match=r"consists of 2 files, but 1 were given.*\n.*pretrain.pth\n.*linearweights"
    ):
        open_zoo_file(ZOO["resnet50_dino"], paths[:1])


def test_open_zoo_file__files_in_the_wrong_order(tmp_path, state):
    paths = WRITERS["dino"](tmp_path, state)
    with pytest.raises(CheckpointError, match=r"no weights under key 'state_dict'"):
        open_zoo_file(ZOO["resnet50_dino"], paths[::-1])


# Hostile and broken files


class Calls:
    """Unpickled without restriction, it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Restores:
    """Unpickled without restriction, it runs a method of its class."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        Path(state["path"]).touch()


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def repacked(content, change):
    """The zip archive of a torch file after ``change`` of its list of members (name, bytes)."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes(content))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in change(members):
            archive.writestr(name, data)
    return buffer.getvalue()


def pushed(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def legacy_with(position, pickled):
    """A legacy file of which one of the five pickles (magic, version, system, object, keys) is another one."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, collections.OrderedDict(), []]
    pickles = [pickle.dumps(part, protocol=2) for part in parts]
    pickles[position] = pickled
    return b"".join(pickles)


def enlarged(members):
    """A tensor of shape (7, 3) that claims to be of shape (247, 3)."""
    return [(name, data.replace(b"K\x07K\x03\x86", b"K\xf7K\x03\x86")) for name, data in members]


def nested(depth):
    content = {}
    for _ in range(depth):
        content = {"x": content}
    return content


def script_bytes():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def runs_code(marker, state):
    """Name -> what makes a file that creates ``marker`` when read without restriction, and what the error names."""
    touch = f"touch {marker}"
    shell, evil = Calls(os.system, touch), Calls(eval, f"open({str(marker)!r}, 'w')")
    good = {"state_dict": prefixed("module.", state)}
    argument = b"V" + touch.encode() + b"\n"
    decoy = pushed("collections") + pushed("OrderedDict")
    return {
        "reduce-zip": (lambda: torch_bytes({**good, "x": shell}), r"posix\.system"),
        "reduce-legacy": (lambda: torch_bytes({**good, "x": shell}, **LEGACY), r"posix\.system"),
        "reduce-protocol-4": (lambda: torch_bytes({**good, "x": shell}, pickle_protocol=4), r"posix\.system"),
        "reduce-dill": (lambda: torch_bytes({**good, "x": shell}, pickle_module=dill), r"posix\.system"),
        "eval": (lambda: torch_bytes({**good, "x": evil}), "eval"),
        "exec-protocol-0": (lambda: pickle.dumps(Calls(exec, f"open({str(marker)!r}, 'w')"), 0), "exec"),
        "setstate-legacy": (lambda: torch_bytes(Restores(str(marker)), **LEGACY), r"test_fetching\.Restores"),
        "as-a-weight": (lambda: torch_bytes({"state_dict": {**good["state_dict"], "module.fc.bias": evil}}), "eval"),
        "as-a-key": (lambda: torch_bytes({**good, (evil,): 1}), "eval"),
        "global-dotted": (
            lambda: b"\x80\x04" + pushed("os") + pushed("path.os.system") + b"\x93(" + argument + b"tR.",
            "system",
        ),
        "global-of-torch": (
            lambda: b"\x80\x04" + pushed("torch.hub") + pushed("os.system") + b"\x93(" + argument + b"tR.",
            r"torch\.hub\.os\.system",
        ),
        "getattr": (lambda: b"c__builtin__\ngetattr\n(cos\npath\nVos\ntR.", r"os\.path"),
        "inst": (lambda: b"(" + argument + b"ios\nsystem\n.", r"os\.system"),
        "obj": (lambda: b"(cos\nsystem\n" + argument + b"o.", r"os\.system"),
        "stack-global-decoy": (
            lambda: b"\x80\x04" + pushed("os") + pushed("system") + decoy + b"00\x93(" + argument + b"tR.",
            r"os\.system",
        ),
        "stack-global-memo": (
            lambda: (
                b"\x80\x04" + pushed("os") + b"\x94" + pushed("system") + b"\x9400h\x00h\x01\x93(" + argument + b"tR."
            ),
            r"os\.system",
        ),
        "legacy-object": (lambda: legacy_with(3, pickle.dumps(shell, 2)), r"posix\.system"),
        "legacy-magic": (lambda: legacy_with(0, pickle.dumps(shell, 2)), r"posix\.system"),
        "legacy-keys": (lambda: legacy_with(4, pickle.dumps(shell, 2)), r"posix\.system"),
    }


def refused(marker, state):
    """Name -> what makes a file that must not be taken for weights, and what the error says."""
    good = {"state_dict": prefixed("module.", state)}
    command = pickle.dumps(Calls(os.system, f"touch {marker}"), 2)
    weights, bias = good["state_dict"], state.get("fc.bias")

    def with_bias(value):
        return torch_bytes({"state_dict": {**weights, "module.fc.bias": value}})

    short = {name: tensor for name, tensor in weights.items() if name != "module.fc.bias"}
    looped = {"epoch": 1}
    looped["state_dict"] = looped
    return {
        "html": (lambda: b"<!DOCTYPE html><html><title>Quota exceeded</title>", "web page"),
        "xml": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        "lfs-pointer": (
            lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS pointer",
        ),
        "empty": (lambda: b"", "is empty"),
        "gz": (lambda: gzip.compress(torch_bytes(good)), "compressed archive"),
        "tar": (lambda: tar_bytes(), "cannot be read as weights"),
        "text": (lambda: b"404: Not Found", "cannot be read as weights"),
        "noise": (lambda: random.Random(3).randbytes(10_000), "cannot be read as weights"),
        "json": (lambda: json.dumps({"error": "Repository not found"}).encode(), "cannot be read as weights"),
        "module-zip": (lambda: torch_bytes(nn.Linear(2, 2)), r"torch\.nn\.modules\.linear\.Linear"),
        "module-legacy": (lambda: torch_bytes(nn.Linear(2, 2), **LEGACY), r"torch\.nn\.modules\.linear\.Linear"),
        "module-in-a-dict": (
            lambda: torch_bytes({"model": nn.BatchNorm2d(2), "epoch": 3}),
            r"torch\.nn\.modules\.batchnorm",
        ),
        "torchscript": (lambda: script_bytes(), "TorchScript archive"),
        "lambda-dill": (
            lambda: torch_bytes({**good, "f": eval("lambda x: x", {})}, pickle_module=dill),
            r"dill\._dill\._create_function",
        ),
        "extension-1": (lambda: b"\x80\x02\x82\x01.", r"copyreg\.extension_1"),
        "extension-4": (lambda: b"\x80\x02\x84\x01\x00\x00\x00.", r"copyreg\.extension_1"),
        "second-pickle-in-zip": (
            lambda: repacked(good, lambda m: [*m, ("archive/more.pkl", command)]),
            r"posix\.system",
        ),
        "pickle-outside-zip": (lambda: repacked(good, lambda m: [*m, ("../../evil.pkl", command)]), r"posix\.system"),
        "same-member-twice": (
            lambda: repacked(good, lambda m: [(n, command if n.endswith("data.pkl") else d) for n, d in [*m, *m]]),
            "cannot be|damaged|posix",
        ),
        "persistent-id": (lambda: b"\x80\x02(" + b"Vstorage\ncos\nsystem\nV0\nVcpu\nK\x01tQ.", r"os\.system"),
        "recursion": (lambda: torch_bytes({"x": nested(300)}), "contains no weights"),
        "contains-itself": (lambda: torch_bytes(looped), "contains no weights"),
        "deep-pickle": (lambda: b"\x80\x02" + b"(" * 100_000 + b".", "cannot be read as weights"),
        "deep-tuples": (lambda: b"\x80\x02)" + b"\x85" * 200_000 + b".", "cannot be read as weights"),
        "claims-a-huge-string": (
            lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
            "cannot be read as weights",
        ),
        "claims-a-huge-int": (
            lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
            "cannot be read as weights",
        ),
        "claims-a-huge-tensor": (
            lambda: repacked({"w": torch.zeros(7, 3)}, enlarged),
            "cannot be read as weights.*storage",
        ),
        "claims-a-huge-header": (lambda: struct.pack("<Q", 2**62) + b"{" + bytes(100), "cannot be read as weights"),
        "claims-a-huge-storage": (
            lambda: torch_bytes({"w": torch.zeros(7)}, **LEGACY).replace(b"K\x07", b"J\xff\xff\xff\x7f", 1),
            "cannot be read as weights",
        ),
        "zip-bomb": (
            lambda: zipped({"archive/data.pkl": bytes(10**7)}, zipfile.ZIP_DEFLATED),
            "compressed zip archive",
        ),
        "other-zip": (lambda: zipped({"weights.npy": b"x"}), "without a data.pkl"),
        "string-under-key": (
            lambda: torch_bytes({"state_dict": "resnet50", "w": weights}),
            "no weights under key 'state_dict'",
        ),
        "integer-names": (
            lambda: torch_bytes({"state_dict": dict(enumerate(weights.values()))}),
            "contains no weights",
        ),
        "no-tensors": (lambda: torch_bytes({"state_dict": {}, "epoch": 3}), "contains no weights"),
        "sparse": (lambda: torch_bytes({"state_dict": {"w": torch.eye(3).to_sparse()}}), "sparse, quantised"),
        "on-no-device": (lambda: torch_bytes({"state_dict": {"w": torch.zeros(2, device="meta")}}), "meta tensor"),
        "wrong-shape": (lambda: with_bias(torch.zeros(999)), r"'fc.bias' is \(999,\) float32 in the file"),
        "wrong-number-of-classes": (
            lambda: torch_bytes(
                {
                    "state_dict": {
                        **weights,
                        "module.fc.weight": torch.zeros(10, 2048),
                        "module.fc.bias": torch.zeros(10),
                    }
                }
            ),
            "2 of another shape",
        ),
        "wrong-kind": (lambda: with_bias(torch.zeros(1000, dtype=torch.int64)), "'fc.bias' is .* int64 in the file"),
        "missing": (lambda: torch_bytes({"state_dict": short}), "1 missing: 'fc.bias'"),
        "extra": (
            lambda: torch_bytes({"state_dict": {**weights, "module.fc2.bias": bias}}),
            "1 unexpected: 'fc2.bias'",
        ),
        "only-the-backbone": (
            lambda: torch_bytes({"state_dict": {n: t for n, t in weights.items() if ".fc." not in n}}),
            "2 missing: 'fc.weight'",
        ),
        "another-architecture": (
            lambda: torch_bytes({"state_dict": nn.Linear(3, 3).state_dict()}),
            "missing.*2 unexpected",
        ),
        "odd-entry": (
            lambda: torch_bytes({"state_dict": {**weights, "epoch": 3}}),
            r"1 entries .* no tensors, such as 'epoch' \(int\)",
        ),
        "same-name-twice": (
            lambda: torch_bytes({"state_dict": {**weights, "fc.bias": bias}}),
            "would both be named 'fc.bias'",
        ),
        "nan": (
            lambda: with_bias(torch.full((1000,), torch.nan)),
            "1 tensors contain NaN or infinity, such as 'fc.bias'",
        ),
        "infinite": (lambda: with_bias(torch.full((1000,), torch.inf)), "NaN or infinity"),
    }


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


CODE = list(runs_code("marker", {}))
BROKEN = list(refused("marker", {}))


def check_refusal(path, message, cache, marker):
    with pytest.raises(CheckpointError, match=message):
        fetch_entry(ZOO[ENTRY], given=[path])
    assert not marker.exists(), "the file's code was run"
    assert files_in(cache) == []
    assert not is_fetched(ZOO[ENTRY])
    with pytest.raises(ModelError, match="are not downloaded"):
        open_model(f"zoo:{ENTRY}")


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:.*torch.jit", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", CODE)
def test_fetch_entry__code_is_never_run(tmp_path, cache, state, marker, name):
    make, message = runs_code(marker, state)[name]
    path = tmp_path / "published.pth"
    path.write_bytes(make())
    check_refusal(path, message, cache, marker)


@pytest.mark.parametrize("other", [Restores, lambda _: nn.BatchNorm2d(2)], ids=["restores", "module"])
def test_open_zoo_file__objects_of_other_packages_beside_the_weights_do_not_act(tmp_path, state, marker, other):
    content = {"x": other(str(marker)), "state_dict": prefixed("module.", state)}
    (tmp_path / "published.pth").write_bytes(torch_bytes(content))
    tensors = open_zoo_file(ZOO[ENTRY], [tmp_path / "published.pth"])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    assert not marker.exists(), "the file's code was run"
    torch.load(tmp_path / "published.pth", weights_only=False)
    assert marker.exists() == (other is Restores)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_runs_code__these_files_do_run_code_without_restriction(tmp_path, state, marker):
    """The test above proves something only if these files would create the marker."""
    for name, (make, _) in runs_code(marker, state).items():
        if name in ("getattr", "legacy-magic", "legacy-object", "legacy-keys"):
            continue  # of these, the parts alone; what they consist of is shown by the others
        content = make()
        if content.startswith(b"PK") or b"state_dict" in content or name == "setstate-legacy":
            torch.load(io.BytesIO(content), weights_only=False, pickle_module=dill if "dill" in name else pickle)
        else:
            pickle.loads(content)
        assert marker.exists(), f"{name} is harmless"
        marker.unlink()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings(
    "ignore:Duplicate name", "ignore:.*torch.jit", "ignore:.*parse invariants", "ignore:.*sparse"
)
@pytest.mark.parametrize("name", BROKEN)
def test_fetch_entry__broken_or_unsafe_files_are_refused(tmp_path, cache, state, marker, name):
    make, message = refused(marker, state)[name]
    path = tmp_path / "published.pth"
    path.write_bytes(make())
    check_refusal(path, message, cache, marker)


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_fetch_entry__cut_off_anywhere(tmp_path, cache, state, marker, container):
    if container == "safetensors":
        whole = safetensors.torch.save({"w": torch.zeros(3000), "v": torch.zeros(5)})
    else:
        whole = torch_bytes(classic(state), _use_new_zipfile_serialization=container == "zip")
    path = tmp_path / "published.pth"
    generator = random.Random(container)
    for length in [1, 7, 8, 9, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(25))]:
        path.write_bytes(whole[:length])
        check_refusal(path, "damaged|truncated|cannot be read as weights", cache, marker)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe", "is a device or a pipe"),
        ("folder", "is a directory"),
        ("link-to-folder", "is a directory"),
        ("link-to-nothing", "There is no file"),
        ("link-to-itself", "cannot be read"),
        ("missing", "There is no file"),
        ("nul\0byte", "cannot be read"),
        ("link-to-a-device", "is a device or a pipe"),
    ],
)
def test_fetch_entry__things_that_are_no_files(tmp_path, cache, marker, name, message):
    path = tmp_path / name
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link-to-folder").symlink_to("folder")
    (tmp_path / "link-to-nothing").symlink_to("nothing")
    (tmp_path / "link-to-itself").symlink_to("link-to-itself")
    (tmp_path / "link-to-a-device").symlink_to("/dev/zero")
    check_refusal(path, message, cache, marker)


def test_fetch_entry__same_name_in_both_files(tmp_path, cache, state):
    paths = WRITERS["dino"](tmp_path, state)
    torch.save(dict(state), paths[0])
    with pytest.raises(CheckpointError, match=r"2 names are in more than one of its files, such as 'fc.bias'"):
        fetch_entry(ZOO["resnet50_dino"], given=paths)
    assert files_in(cache) == []


def test_fetch_entry__second_file_is_hostile(tmp_path, cache, state, marker):
    paths = WRITERS["dino"](tmp_path, state)
    torch.save({"state_dict": head(state), "best_acc": Calls(os.system, f"touch {marker}")}, paths[1])
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        fetch_entry(ZOO["resnet50_dino"], given=paths)
    assert not marker.exists()
    assert files_in(cache) == []


def test_fetch_entry__two_sets_of_weights(tmp_path, cache, state):
    torch.save({"state_dict": dict(state), "ema": {n: t + 1 for n, t in state.items()}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"more than one set of weights: 'state_dict'.*'ema'"):
        fetch_entry(ZOO["resnet50_noisymix"], given=[tmp_path / "w.pth"])
    assert files_in(cache) == []


def test_fetch_entry__a_refused_file_leaves_what_was_there(tmp_path, cache, state):
    fetch_entry(ZOO[ENTRY], given=WRITERS["pixmix"](tmp_path, state))
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="web page"):
        fetch_entry(ZOO[ENTRY], given=[tmp_path / "bad.pth"])
    assert same(open_model(f"zoo:{ENTRY}").network.state_dict(), state)


# The cache


@pytest.fixture
def fetched(tmp_path, state):
    """The file that was given, after it was converted."""
    [path] = WRITERS["pixmix"](tmp_path, state)
    fetch_entry(ZOO[ENTRY], given=[path])
    return path


def test_fetch_entry__provenance(fetched, cache):
    provenance = json.loads((cache / f"{ENTRY}.json").read_text())
    assert provenance["arch"] == "timm:resnet50"
    assert provenance["sha256"] == sha256(cache / f"{ENTRY}.safetensors")
    [file] = provenance["files"]
    assert file["address"] == "gdrive:1_i45yvC88hos50QjkoD97OgbDGreKdp9"
    assert (file["size"], file["sha256"]) == (fetched.stat().st_size, sha256(fetched))
    assert (file["key"], file["strip"]) == ("state_dict", ["module."])
    assert provenance["date"].endswith("+00:00")
    assert provenance["versions"]["torch"] == metadata.version("torch")
    assert provenance["citation"]["arxiv"] == "2112.05135"
    assert open_model(f"file:{cache / ENTRY}.safetensors").n_classes == 1000


def sha256(path):
    return zoo.read_checkpoint(path).sha256


def test_fetch_entry__nothing_to_do_when_it_is_there(fetched, cache):
    before = (cache / f"{ENTRY}.safetensors").stat().st_mtime_ns
    assert fetch_entry(ZOO[ENTRY]) == cache / f"{ENTRY}.safetensors"
    assert (cache / f"{ENTRY}.safetensors").stat().st_mtime_ns == before


def test_open_zoo__changed_weights_are_noticed(fetched, cache):
    path = cache / f"{ENTRY}.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match=rf"has changed since it was written: .*layercrit zoo fetch {ENTRY}"):
        open_model(f"zoo:{ENTRY}")
    fetch_entry(ZOO[ENTRY], given=[fetched])
    assert open_model(f"zoo:{ENTRY}").n_classes == 1000


def test_open_zoo__without_provenance_it_counts_as_not_fetched(fetched, cache):
    (cache / f"{ENTRY}.json").unlink()
    assert not is_fetched(ZOO[ENTRY])
    with pytest.raises(ModelError, match="are not downloaded"):
        open_model(f"zoo:{ENTRY}")
    (cache / f"{ENTRY}.json").write_text("[]")
    with pytest.raises(CheckpointError, match="says None"):
        open_model(f"zoo:{ENTRY}")


def test_fetch_entry__another_file_than_the_first_time_is_refused(fetched, tmp_path, cache, state):
    other = {**state, "fc.bias": torch.zeros(1000)}
    torch.save(classic(other), tmp_path / "other.pth")
    with pytest.raises(
        ZooError,
        match=r"has SHA-256 .*, expected .*no longer, the file that was published.*To start over, delete",
    ):
        fetch_entry(ZOO[ENTRY], given=[tmp_path / "other.pth"])
    assert same(open_model(f"zoo:{ENTRY}").network.state_dict(), state)


def test_fetch_entry__hash_that_the_publisher_states(tmp_path, cache, state):
    [path] = WRITERS["torchvision2"](tmp_path, state)
    with pytest.raises(ZooError, match="expected 11ad3fa6"):
        fetch_entry(ZOO["tv2_resnet50"], given=[path])
    assert files_in(cache) == []


def test_fetch_entry__cache_that_cannot_be_written(tmp_path, monkeypatch, state):
    paths = WRITERS["pixmix"](tmp_path, state)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERCRIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ZooError, match=r"cannot be written \(Not a directory\).*LAYERCRIT_CACHE"):
        fetch_entry(ZOO[ENTRY], given=paths)


def test_fetch_entry__interrupted_before_the_end(tmp_path, cache, state, monkeypatch):
    """Stopped between weights and provenance, nothing is taken for fetched; the next time all is well."""
    paths = WRITERS["pixmix"](tmp_path, state)
    with monkeypatch.context() as broken:
        broken.setattr(zoo.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch_entry(ZOO[ENTRY], given=paths)
    assert files_in(cache) == [f"{ENTRY}.safetensors"]
    assert not is_fetched(ZOO[ENTRY])
    fetch_entry(ZOO[ENTRY], given=paths)
    assert open_model(f"zoo:{ENTRY}").n_classes == 1000


# References


def test_open_zoo__without_pretrained_weights_it_is_timms_network():
    ours, theirs = open_model("zoo:resnet50_simclrv2?pretrained=false&seed=4"), "timm:resnet50?pretrained=false&seed=4"
    timms = open_model(theirs)
    assert ours.sha256 == timms.sha256
    assert (ours.architecture, ours.initialiser) == (timms.architecture, timms.initialiser)
    assert ours.reference == "zoo:resnet50_simclrv2?pretrained=false&seed=4"
    assert (ours.mean, ours.std) == ((0.0,) * 3, (1.0,) * 3)
    assert list(ours.build().state_dict()) == list(resnet50_shapes())


def test_open_zoo__donors_are_the_same_for_all(fetched):
    trained, timms = open_model(f"zoo:{ENTRY}"), open_model("timm:resnet50?pretrained=false")
    assert (trained.architecture, trained.initialiser) == (timms.architecture, timms.initialiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        first = trained.build().state_dict()
        torch.manual_seed(9)
        second = timms.build().state_dict()
    assert same(first, second)


def test_open_zoo__unknown():
    with pytest.raises(ModelError, match=r"no model 'resnet50_dinno'. Did you mean 'resnet50_dino'"):
        open_model("zoo:resnet50_dinno")
    with pytest.raises(ModelError, match=r"no model '\.\./x'"):
        open_model("zoo:../x")


def test_open_zoo__not_fetched():
    with pytest.raises(ModelError, match=r"layercrit zoo fetch resnet50_dino`, or add '\?pretrained=false'"):
        open_model("zoo:resnet50_dino")


def test_open_zoo__options_that_do_not_fit_the_weights(fetched):
    with pytest.raises(CheckpointError, match="2 of another shape"):
        open_model(f"zoo:{ENTRY}?num_classes=10")


def test_zoo__is_read_when_first_asked():
    fresh = zoo._Zoo()
    assert vars(fresh) == {}
    assert "resnet50_dino" in fresh
    assert list(vars(fresh)) == ["_entries"]


# Accuracies


@pytest.fixture
def says_three(tmp_path):
    """Weights of a network that takes every image for class 3."""
    state = {name: tensor * 0 for name, tensor in light_state().items()}
    state["fc.bias"] = torch.zeros(1000)
    state["fc.bias"][3] = 1.0
    torch.save(classic(state), tmp_path / "w.pth")
    fetch_entry(ZOO[ENTRY], given=[tmp_path / "w.pth"])


@pytest.fixture
def images(tmp_path):
    """Four images, of which three are of class 3."""
    pixels = np.zeros((4, 224, 224, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.array([3, 3, 999, 3]))
    return tmp_path / "images.npz"


def test_check_accuracy(says_three, images):
    checked = check_accuracy(replace(ZOO[ENTRY], documented_accuracy=0.7), images, batch_size=3)
    expected = scipy.stats.binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert (checked.n_images, checked.top1_accuracy) == (4, 0.75)
    assert (checked.low, checked.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert checked.verdict == "agrees"
    assert check_accuracy(replace(ZOO[ENTRY], documented_accuracy=0.01), images, n_images=1).verdict == "differs"
    undocumented = check_accuracy(replace(ZOO[ENTRY], documented_accuracy=None), images, n_images=1)
    assert (undocumented.verdict, undocumented.n_images) == ("undocumented", 1)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (1, 1), (500, 1000), (7689, 10000)])
def test_wilson__against_scipy(right, n):
    expected = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert accuracy._wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_check_accuracy__without_labels(says_three):
    with pytest.raises(ZooError, match="has no labels, so no accuracy"):
        check_accuracy(ZOO[ENTRY], np.zeros((2, 224, 224, 3), np.uint8))


def test_check_accuracy__by_identifier(says_three, images):
    assert check_accuracy(ENTRY, images, n_images=1) == check_accuracy(ZOO[ENTRY], images, n_images=1)
    assert fetch_entry(ENTRY) == ZOO[ENTRY].path
    for call in (fetch_entry, lambda name: check_accuracy(name, images)):
        with pytest.raises(ZooError, match="Did you mean"):
            call(ENTRY + "s")


def test_check_accuracy__not_fetched(images):
    with pytest.raises(LayercritError, match="are not downloaded"):
        check_accuracy(ZOO["resnet50_dino"], images)
