import argparse
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import gzip
import hashlib
import io
import os
import pathlib
import pickle
import random
import sys
import tarfile
import types
import typing
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dill
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals

from layercrit.errors import CheckpointError
from layercrit.models import pickles, unpickling
from layercrit.models.checkpoints import foreign_globals, hash_tensors, read_checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)


class RunsCode:
    """Unpickled without restriction, it creates the file at ``marker``."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.fixture(autouse=True, params=["torch's reader", "our own"])
def reader(request, monkeypatch):
    """Either way of reading pickles, whatever the version of torch."""
    if request.param == "torch's reader" and not unpickling._TORCH_IS_SAFE:
        pytest.skip("not used with this version of torch")
    monkeypatch.setattr(unpickling, "_TORCH_IS_SAFE", request.param == "torch's reader")


def allowed_elsewhere(*classes):
    """What others have allowed torch to load; older versions have no such list."""
    known = getattr(torch.serialization, "safe_globals", None)
    return known(list(classes)) if known else contextlib.nullcontext()


@pytest.fixture
def state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().state_dict()


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-was-run"


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


# Files that can be read


def test_read_checkpoint__safetensors(tmp_path, state):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.path == path
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.tensors[name], state[name]) for name in state)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert foreign_globals(path) == []


def test_read_checkpoint__safetensors_under_another_name(tmp_path, state):
    path = tmp_path / "w.bin"
    safetensors.torch.save_file(state, path)
    assert read_checkpoint(path).tensors.keys() == state.keys()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("module", [pickle, dill], ids=["pickle", "dill"])
def test_read_checkpoint__torch_save(tmp_path, state, zipped, module):
    path = saved(tmp_path / "w.pth", state, pickle_module=module, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    assert same(read_checkpoint(path).tensors, state)
    assert foreign_globals(path) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {
            "epoch": 3,
            "arch": "resnet50",
            "model": "resnet50",
            "state_dict": s,
            "best_acc1": torch.tensor(7.0),
        },
        lambda s: {"model_state_dict": s, "loss": 0.5, "acc": None},
        lambda s: {"resnet": s, "head": {"weight": torch.zeros(2, 2)}},
        lambda s: {"a": {"b": {"c": s}}, "list": [s, s]},
        lambda s: {"state_dict": s, "model": s},
        lambda s: {"state_dict": {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in s.items()}},
        lambda s: {"state_dict": s, "names": collections.Counter("abc"), "sizes": {torch.Size([1])}},
    ],
    ids=["bare", "moco", "optics", "simclr", "nested", "same-twice", "parameters", "other-data"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_checkpoint__finds_weights_by_type(tmp_path, state, wrap, zipped):
    path = saved(tmp_path / "w.pth.tar", wrap(state), _use_new_zipfile_serialization=zipped)
    tensors = read_checkpoint(path).tensors
    assert same(tensors, state)
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_read_checkpoint__never_takes_an_optimiser_state(tmp_path):
    network = nn.Linear(2, 2, bias=False)
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    state = network.state_dict()
    assert len(optimiser.state_dict()["state"][0]) > len(state)
    path = saved(tmp_path / "w.pth", {"optimizer": optimiser.state_dict(), "state_dict": state})
    assert same(read_checkpoint(path).tensors, state)


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Options:
    """Of a training script: its code is not there where the file is read."""

    lr: float = 0.1
    mode: Mode = Mode.FAST

    def __setstate__(self, state):
        raise AssertionError("the code of the file's author was run")


@dataclasses.dataclass(slots=True)
class Slotted:
    lr: float = 0.1


class Config(dict):
    """A dictionary with attributes, as yacs, EasyDict and mmengine have."""

    def __init__(self, entries):
        super().__init__(entries)
        self.frozen = True


class Path313:
    """What a path is pickled as under Python 3.13."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return type(self), self.parts


Path313.__module__, Path313.__qualname__ = "pathlib._local", "PosixPath"


class History(list):
    pass


Shape = collections.namedtuple("Shape", "height width")

BESIDE = {
    "namespace": argparse.Namespace(lr=0.1, data=Path("/data"), mode=Mode.FAST),
    "simple-namespace": types.SimpleNamespace(a=1),
    "paths-of-3.13": Path313("/", "data"),
    "paths": [Path("/data"), pathlib.PureWindowsPath("c:/data"), pathlib.PurePosixPath("a")],
    "enum": Mode.FAST,
    "times": [
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
        datetime.date(2024, 1, 1),
        datetime.timedelta(1),
    ],
    "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), uuid.UUID(int=5), 1 + 2j, range(3), slice(1, 2)],
    "containers": [
        collections.defaultdict(list, a=[1]),
        collections.deque([1, 2], maxlen=3),
        frozenset({1}),
        Shape(32, 32),
        History([1, 2]),
    ],
    "numpy": [np.float64(76.1), np.arange(5.0), np.float32, np.dtype("int8"), np.random.RandomState(1), np.bool_(True)],
    "types": [int, type(None), typing.Any, int | None, list[int]],
    "dataclass": Options(),
    "slotted": Slotted(),
    "config": Config({"lr": 0.1, "model": Config({"name": "resnet50", "sizes": [1, 2]})}),
    "functions-of-torch": {
        "act": nn.functional.relu,
        "make": functools.partial(nn.functional.gelu, approximate="tanh"),
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_read_checkpoint__stand_ins_for_objects_beside_the_weights(tmp_path, state, name, zipped, monkeypatch):
    if sys.version_info < (3, 13) or "3.13" in name:
        monkeypatch.setitem(sys.modules, "pathlib._local", types.SimpleNamespace(PosixPath=Path313))
    content = {"hyper_parameters": {"x": BESIDE[name]}, "acc": np.float64(76.1), "state_dict": state}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=zipped)
    allowed = set(torch.serialization.get_safe_globals())
    assert same(read_checkpoint(path).tensors, state)
    assert any(found.endswith("multiarray.scalar") for found in foreign_globals(path))
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_plain_globals__cover_all_that_torch_allows_and_no_module():
    assert [name for name in _get_allowed_globals() if not pickles._PLAIN_GLOBAL.fullmatch(name)] == []
    for name in ("torch.nn.modules.linear.Linear", "torch.load", "torch.hub.load", "builtins.eval", "os.system"):
        assert not pickles._PLAIN_GLOBAL.fullmatch(name)
        assert not pickles.is_data(name)


def test_read_checkpoint__classes_of_networks_among_the_options(tmp_path, state):
    options = {"norm_layer": nn.BatchNorm2d, "make": functools.partial(nn.LayerNorm, eps=1e-6), "act": nn.GELU()}
    path = saved(tmp_path / "w.pth", {"hyper_parameters": options, "state_dict": state})
    assert same(read_checkpoint(path).tensors, state)


def test_read_checkpoint__two_threads_do_not_share_stand_ins(tmp_path, state):
    path = saved(tmp_path / "w.pth", {"options": Options(), "state_dict": state})
    with ThreadPoolExecutor(4) as threads:
        assert all(same(one.tensors, state) for one in threads.map(read_checkpoint, [path] * 12))


# Entries that are no tensors


def test_read_checkpoint__odd_entries_are_named(tmp_path, state):
    odd = {"epoch": 3, "config": Config({"lr": 0.1}), "optimizer": {"lr": 0.1}, "fc._extra_state": None, 7: "seven"}
    checkpoint = read_checkpoint(saved(tmp_path / "w.pth", {**state, **odd}))
    assert same(checkpoint.tensors, state)
    assert checkpoint.odd == {
        "epoch": "int",
        "config": "OrderedDict",
        "optimizer": "dict",
        "fc._extra_state": "NoneType",
        "7": "str",
    }
    assert read_checkpoint(saved(tmp_path / "w.pth", state)).odd == {}


def test_read_checkpoint__odd_entries_that_hold_weights_are_rivals(tmp_path, state):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    path = saved(tmp_path / "w.pth", {**state, "ema": averaged})
    with pytest.raises(CheckpointError, match="more than one set"):
        read_checkpoint(path)
    assert same(read_checkpoint(path, "ema").tensors, averaged)


def test_read_checkpoint__a_few_numbers_are_no_rival(tmp_path):
    """A network of two tensors beside two scores."""
    small = nn.Linear(2, 2).state_dict()
    scores = {"loss": torch.tensor(0.5), "accuracy": torch.tensor(0.9)}
    path = saved(tmp_path / "w.pth", {"model": small, "scores": scores, **scores})
    assert same(read_checkpoint(path).tensors, small)


# Several sets of weights


def test_read_checkpoint__moving_average_beside_the_weights(tmp_path, state):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    path = saved(tmp_path / "w.pth", {"state_dict": state, "ema": {"module": averaged, "decay": 0.9}, "epoch": 1})
    with pytest.raises(
        CheckpointError, match=r"more than one set.*'state_dict' \(9 tensors\), 'ema.module' \(9 tensors\)"
    ):
        read_checkpoint(path)
    assert same(read_checkpoint(path, key="state_dict").tensors, state)
    assert same(read_checkpoint(path, key="ema.module").tensors, averaged)
    with pytest.raises(CheckpointError, match=r"no weights under key 'ema.modul'.*Did you mean 'ema.module'"):
        read_checkpoint(path, key="ema.modul")


def test_read_checkpoint__average_of_parameters_only_is_a_rival_too(tmp_path, state):
    averaged = {name: tensor for name, tensor in state.items() if "running" not in name and "num_" not in name}
    path = saved(tmp_path / "w.pth", {"model": state, "model_ema": averaged})
    with pytest.raises(CheckpointError, match="more than one set"):
        read_checkpoint(path)


@pytest.mark.parametrize("network", [Net(), nn.Sequential(Net())], ids=["whole", "nested"])
def test_read_checkpoint__whole_network_beside_weights_is_a_rival(tmp_path, state, network):
    """Its values cannot be read, but it may be what the user means."""
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    path = saved(tmp_path / "w.pth", {"model": network, "ema": averaged, "epoch": 3})
    with pytest.raises(CheckpointError, match=r"more than one set.*'model' \(.*tensors\), 'ema' \(9.*key='ema'"):
        read_checkpoint(path)
    assert same(read_checkpoint(path, key="ema").tensors, averaged)
    with pytest.raises(CheckpointError, match="no weights under key 'model'"):
        read_checkpoint(path, key="model")


def test_read_checkpoint__key_of_a_bare_file(tmp_path, state):
    with pytest.raises(
        CheckpointError, match=r"no weights under key 'state_dict'. It has: 'the whole file' \(9 tensors\)"
    ):
        read_checkpoint(saved(tmp_path / "w.pth", state), key="state_dict")


# Files that would run code


def hostile_files(folder, marker, state):
    """Name -> file that creates ``marker`` when unpickled without restriction (or is a whole pickled module)."""
    bomb = RunsCode(marker)
    command = f"touch {marker}"
    bodies = {
        "zip": ({"state_dict": state, "x": bomb}, {}),
        "zip-bare": (bomb, {}),
        "legacy": ({"state_dict": state, "x": bomb}, {"_use_new_zipfile_serialization": False}),
        "zip-in-key": ({**state, "z": [bomb]}, {}),
        "module-zip": (Net(), {}),
        "module-legacy": (Net(), {"_use_new_zipfile_serialization": False}),
        "linear": (nn.Linear(2, 2), {}),
        "function": ({"state_dict": state, "f": np.savez}, {}),
        "partial": ({"state_dict": state, "f": functools.partial(open, str(marker), "w")}, {}),
        "lambda-dill": ({"state_dict": state, "f": lambda x: x + 1}, {"pickle_module": dill}),
        "protocol-4": ({"state_dict": state, "x": bomb}, {"pickle_protocol": 4}),
        "protocol-5-legacy": (bomb, {"pickle_protocol": 5, "_use_new_zipfile_serialization": False}),
    }
    files = {name: saved(folder / f"{name}.pth", body, **options) for name, (body, options) in bodies.items()}
    raw = {
        "plain-pickle": pickle.dumps(bomb),
        "plain-pickle-0": pickle.dumps(bomb, protocol=0),
        "os-system": b"cos\nsystem\n(V" + command.encode() + b"\ntR.",
        "inst": b"(V" + command.encode() + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nV" + command.encode() + b"\no.",
        "stack-global-by-memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x9400h\x00h\x01\x93V"
        + command.encode()
        + b"\n\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "second-pickle": pickle.dumps(119547037146038801333356, 2) + pickle.dumps(1001, 2) + pickle.dumps(bomb, 2),
    }
    for name, content in raw.items():
        files[name] = folder / f"{name}.pth"
        files[name].write_bytes(content)
    return files


NAMED = {
    "zip": "io.open",
    "zip-bare": "io.open",
    "legacy": "io.open",
    "zip-in-key": "io.open",
    "module-zip": "test_checkpoints.Net",
    "module-legacy": "test_checkpoints.Net",
    "linear": "torch.nn.modules.linear.Linear",
    "function": "numpy.savez",
    "partial": "io.open",
    "lambda-dill": "dill._dill._create_function",
    "protocol-4": "io.open",
    "protocol-5-legacy": "io.open",
    "plain-pickle": "io.open",
    "plain-pickle-0": "io.open",
    "os-system": "os.system",
    "inst": "os.system",
    "obj": "os.system",
    "stack-global-by-memo": "os.system",
    "extension": "copyreg.extension_1",
    "second-pickle": "io.open",
}


@pytest.mark.parametrize("name", NAMED)
def test_read_checkpoint__code_is_refused_and_named(tmp_path, marker, state, name):
    path = hostile_files(tmp_path, marker, state)[name]
    with pytest.raises(CheckpointError, match=r"more than plain weights.*runs no code") as caught:
        read_checkpoint(path)
    assert NAMED[name] in str(caught.value)
    assert NAMED[name] in " ".join(foreign_globals(path))
    assert not marker.exists(), "the file's code was run"


def test_hostile_files__do_run_code_without_restriction(tmp_path, marker, state):
    """The tests above prove something only if these files would create the marker."""
    files = hostile_files(tmp_path, marker, state)
    assert set(files) == set(NAMED)
    for name in ("zip", "legacy", "protocol-4"):
        torch.load(files[name], weights_only=False)
        assert marker.exists()
        marker.unlink()
    for name in ("plain-pickle", "plain-pickle-0", "os-system", "inst", "obj", "stack-global-by-memo"):
        pickle.loads(files[name].read_bytes())
        assert marker.exists()
        marker.unlink()


class Gadget:
    """A class of a third party that acts when it is called, made, filled or given a state."""

    def __new__(cls, *arguments):
        made = super().__new__(cls)
        made.path = arguments and arguments[0]
        return made

    def act(self, *_):
        Path(self.path).touch()

    __init__ = __setstate__ = __setitem__ = append = extend = act


class Called(Gadget):
    def __reduce__(self):
        return Gadget, (self.path,)


class Built(Gadget):
    def __reduce_ex__(self, protocol):
        return Gadget, (self.path,), {"a": 1}


class Filled(Gadget):
    def __reduce_ex__(self, protocol):
        return Gadget, (self.path,), None, iter([1, 2]), iter([("a", 1)])


def gadget(kind, marker):
    made = kind.__new__(kind, str(marker))
    assert not marker.exists()
    return made


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [Called, Built, Filled])
def test_read_checkpoint__objects_of_others_do_not_act(tmp_path, marker, state, kind, zipped):
    content = {"x": gadget(kind, marker), "state_dict": state}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=zipped)
    with allowed_elsewhere(Gadget), contextlib.suppress(CheckpointError):
        assert same(read_checkpoint(path).tensors, state)
        assert kind is not Filled, "with entries of both kinds, there is no stand-in for it"
    assert not marker.exists(), "the file's code was run"
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists(), "the test proves something only if the object would act"


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\nVtouch\ntR(V%s\ntR.",  # what getattr returned is called
        b"cfunctools\npartial\n(cpathlib\nPosixPath\nV%s\ntR)R.",
        b"cfunctools\nreduce\n(cbuiltins\ngetattr\n(Va\nVb\nttR.",
        b"c__main__\nGadget\n(V%s\ntR.",
        b"ctorch.hub\nload\n(V%s\ntR.",
        b"csubprocess\nPopen\n(V%s\ntR.",
        b"ccode\nInteractiveConsole\n)R.",
    ],
    ids=["getattr", "partial", "reduce", "class", "torch", "popen", "console"],
)
def test_read_checkpoint__nothing_named_is_imported_or_called(tmp_path, marker, pickled):
    path = tmp_path / "w.pth"
    path.write_bytes(pickled % str(marker).encode() if b"%s" in pickled else pickled)
    before = set(sys.modules)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not marker.exists()
    assert not {"code", "torch.hub.load"} & (set(sys.modules) - before)


class Hiding:
    """Pickled as an ordered dictionary with attributes in place of its methods."""

    def __init__(self, entries):
        self.entries = entries

    def __reduce__(self):
        attributes = dict.fromkeys(["items", "values", "keys", "get", "__iter__", "__len__"], 7)
        return collections.OrderedDict, (), attributes, None, iter(self.entries.items())


def test_read_checkpoint__attributes_that_hide_methods(tmp_path, state):
    path = saved(tmp_path / "w.pth", Hiding({"state_dict": Hiding(state), "x": 1}))
    assert same(read_checkpoint(path).tensors, state)
    with pytest.raises(CheckpointError, match="contains no weights"):
        read_checkpoint(saved(tmp_path / "w.pth", Hiding({"x": 1})))


def test_read_checkpoint__classes_allowed_for_torch_elsewhere_are_refused_as_well(tmp_path, marker, state):
    path = hostile_files(tmp_path, marker, state)["zip"]
    with allowed_elsewhere(open), pytest.raises(CheckpointError, match=r"io\.open"):
        read_checkpoint(path)
    assert not marker.exists()


def test_read_checkpoint__stand_ins_cannot_be_called_into_tensors(tmp_path, state):
    """A stand-in that poses as a weight is no tensor, so nothing is taken for weights."""
    path = saved(tmp_path / "w.pth", {name: argparse.Namespace(data=tensor) for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match=r"contains no weights.*'conv.weight' \(argparse.Namespace\)"):
        read_checkpoint(path)


# Files that are something else, or broken


def zip_with(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def old_tar(state):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"\x80\x02N."))
    return buffer.getvalue()


WEIGHTS = {"w": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(10)}
BROKEN = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "html": (b"\n <!DOCTYPE html><html>quota exceeded", r"web page.*begins with b'\\n <!DOCTYPE html>"),
    "xml": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "gzip": (gzip.compress(torch_bytes(WEIGHTS)), "compressed archive.*Unpack it first"),
    "cut-zip": (torch_bytes(WEIGHTS)[:-200], "damaged or truncated: it begins as a zip archive"),
    "cut-zip-short": (torch_bytes(WEIGHTS)[:100], "damaged or truncated"),
    "cut-legacy": (torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False)[:-50], "cannot be read as weights"),
    "cut-legacy-pickle": (
        torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False)[:150],
        "cannot be read as weights",
    ),
    "json": (b'{"error": "not found"}', r"cannot be read as weights.*begins with b'\{\"error"),
    "text": (b"config: resnet50\nlr: 0.1\n", "cannot be read as weights"),
    "noise": (bytes(random.Random(0).randbytes(5000)), "cannot be read as weights"),
    "other-zip": (zip_with({"readme.txt": "hello"}), "without a data.pkl.*readme.txt"),
    "npz": (zip_with({"w.npy": "hello"}), "without a data.pkl.*w.npy"),
    "empty-zip": (zip_with({}), "without a data.pkl.*nothing"),
    "zip-bomb": (zip_with({"a/data.pkl": bytes(10**7)}, zipfile.ZIP_DEFLATED), "compressed zip archive"),
    "torchscript": (zip_with({"m/data.pkl": b"\x80\x02}.", "m/constants.pkl": b"\x80\x02)."}), "TorchScript archive"),
    "only-pickle": (zip_with({"a/data.pkl": b"\x80\x02}."}), "contains no weights|cannot be read as weights"),
    "broken-pickle": (zip_with({"a/data.pkl": b"\x80\x02zzzz"}), "cannot be read as weights"),
    "tar": (old_tar(WEIGHTS), "cannot be read as weights"),
    "pickled-dict": (pickle.dumps({"a": 1}, protocol=2), "cannot be read as weights"),
    "no-tensors": (
        torch_bytes({"epoch": 3, "net": {}}),
        r"contains no weights.*a mapping of 2: 'epoch' \(int\), 'net' \(dict",
    ),
    "list": (torch_bytes([torch.zeros(2)]), "contains no weights.*one list"),
    "tensor": (torch_bytes(torch.zeros(2)), "contains no weights.*one Tensor"),
    "mixed": (torch_bytes({"w": torch.zeros(2), "n": 1}), r"contains no weights.*'w' \(Tensor\), 'n' \(int\)"),
    "integer-names": (torch_bytes({0: torch.zeros(2)}), "contains no weights"),
    "sparse": (torch_bytes({"w": torch.eye(3).to_sparse()}), "'w' as a sparse, quantised or meta tensor"),
    "valueless": (torch_bytes({"w": torch.zeros(2, device="meta")}), "'w' as a sparse, quantised or meta tensor"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, which will drop such tensors
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [torch.qint8, torch.quint8, torch.qint32, "per channel"])
def test_read_checkpoint__quantised(tmp_path, kind, zipped):
    values, ones = torch.ones(4, 2), torch.ones(4)
    if kind == "per channel":
        quantised = torch.quantize_per_channel(values, ones, ones.long(), 0, torch.qint8)
    else:
        quantised = torch.quantize_per_tensor(values, 0.1, 0, kind)
    content = {"plain": ones, "w": quantised, "last": ones}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="'w' as a sparse, quantised or meta tensor"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("name", BROKEN)
def test_read_checkpoint__broken(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[:20],
        lambda b: b[:4],
        lambda b: (10**18).to_bytes(8, "little") + b[8:],
        lambda b: b[:8] + b"x" + b[9:],
        lambda b: b.replace(b"F32", b"Q99"),
        lambda b: b.replace(b"[10]", b"[11]"),
    ],
    ids=["last-byte", "header", "length", "huge-header", "no-json", "unknown-type", "wrong-shape"],
)
def test_read_checkpoint__broken_safetensors(tmp_path, damage):
    path = tmp_path / "w.safetensors"
    path.write_bytes(damage(safetensors.torch.save(WEIGHTS)))
    with pytest.raises(CheckpointError, match="damaged or truncated: it cannot be read as safetensors"):
        read_checkpoint(path)


def test_read_checkpoint__recursive_mapping(tmp_path, state):
    content = {"state_dict": state}
    content["self"] = content
    path = saved(tmp_path / "w.pth", content)
    assert same(read_checkpoint(path).tensors, state)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_checkpoint__tensor_beyond_its_storage(tmp_path, zipped):
    """A file may claim more numbers than it holds; nothing outside may be read."""

    def enlarge(pickled):
        assert pickled.count(b"K\x07K\x03\x86") == 1
        return pickled.replace(b"K\x07K\x03\x86", b"K\xf7K\x03\x86")  # shape (7, 3) becomes (247, 3)

    whole = torch_bytes({"w": torch.zeros(7, 3)}, _use_new_zipfile_serialization=zipped)
    if zipped:
        archive = zipfile.ZipFile(io.BytesIO(whole))
        members = {name: archive.read(name) for name in archive.namelist()}
        members = {name: enlarge(data) if name.endswith("data.pkl") else data for name, data in members.items()}
    path = tmp_path / "w.pth"
    path.write_bytes(zip_with(members) if zipped else enlarge(whole))
    with pytest.raises(CheckpointError, match=r"cannot be read as weights.*storage"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_read_checkpoint__random_damage_never_leaks_another_error(tmp_path, container):
    generator = random.Random(container)
    if container == "safetensors":
        whole = safetensors.torch.save(WEIGHTS)
    else:
        whole = torch_bytes(WEIGHTS, _use_new_zipfile_serialization=container == "zip")
    path = tmp_path / "w.bin"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 5)):
            damaged[generator.randrange(min(len(damaged), 700))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        try:
            read_checkpoint(path)
        except CheckpointError:
            continue


def test_read_checkpoint__missing(tmp_path, state):
    saved(tmp_path / "resnet50.pth", state)
    with pytest.raises(CheckpointError, match=r"no file .*resnet5O.pth.*Did you mean 'resnet50.pth'"):
        read_checkpoint(tmp_path / "resnet5O.pth")
    with pytest.raises(CheckpointError, match=r"The directory .*nowhere does not exist"):
        read_checkpoint(tmp_path / "nowhere" / "w.pth")


def test_read_checkpoint__directory(tmp_path, state):
    saved(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=r"is a directory.*It contains: a.pth"):
        read_checkpoint(tmp_path)


def test_read_checkpoint__pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is a device or a pipe, which might never end"):
            read_checkpoint(path)


def test_read_checkpoint__impossible_path(tmp_path):
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(tmp_path / name)


def test_read_checkpoint__home(tmp_path, state, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "w.pth", state)
    assert same(read_checkpoint("~/w.pth").tensors, state)
    assert foreign_globals("~/w.pth") == []


def test_foreign_globals__not_a_weight_file(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="web page"):
        foreign_globals(path)


# Hashes


def slow_hash(named):
    """The documented definition, byte by byte through NumPy and Python."""
    digest = hashlib.sha256()
    for name in sorted(named):
        array = named[name].numpy()
        digest.update(f"{name!r} torch.{array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def test_hash_tensors__is_sha256_of_names_types_shapes_and_bytes(state):
    named = {**state, "none": torch.zeros(0, 3), "bool": torch.tensor([True, False]), "strided": torch.eye(4)[:, ::2]}
    assert hash_tensors(named) == slow_hash(named)


def test_hash_tensors__order_of_names_does_not_matter(state):
    assert hash_tensors(dict(reversed(state.items()))) == hash_tensors(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "fc.bias": s["fc.bias"].nextafter(torch.tensor(9.0))},
        lambda s: {**s, "fc.weight": s["fc.weight"].reshape(4, 5)},
        lambda s: {**s, "fc.bias": s["fc.bias"].view(torch.int32)},
        lambda s: {("fc.Bias" if name == "fc.bias" else name): tensor for name, tensor in s.items()},
        lambda s: {name: tensor for name, tensor in s.items() if name != "fc.bias"},
    ],
    ids=["value", "shape", "dtype", "name", "fewer"],
)
def test_hash_tensors__changes_with(state, change):
    assert hash_tensors(change(state)) != hash_tensors(state)


def test_hash_tensors__half_precision(state):
    assert hash_tensors({"w": torch.ones(3, dtype=torch.bfloat16)}) != hash_tensors({"w": torch.ones(3)})
