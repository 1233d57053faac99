"""Reading pickled weight files without torch's unpickler: the same tensors, and nothing that a file could misuse."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from layercrit.errors import CheckpointError
from layercrit.models import unpickling
from layercrit.models.checkpoints import loading_safely, read_checkpoint
from layercrit.models.unpickling import unpickle

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *([torch.uint16, torch.uint64] if torch.__version__ >= "2.6" else []),  # which older ones cannot save
]


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(found, expected):
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_unpickle__tensors_of_all_types_and_layouts(zipped):
    numbers = torch.arange(24) % 2
    table = numbers.reshape(4, 6).float()
    content = {
        **{str(dtype): numbers.to(dtype) for dtype in DTYPES},
        "transposed": table.T,
        "part": table[1:, 2:4],
        "row": table[2],
        "number": torch.tensor(7.5),
        "none": torch.zeros(0, 3),
        "channels-last": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.arange(3.0)),
    }
    found = unpickle(torch_bytes(content, _use_new_zipfile_serialization=zipped), {})
    assert list(found) == list(content)
    for name, expected in content.items():
        assert_same(found[name], expected.detach())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_unpickle__tensors_that_share_memory_still_do(zipped):
    whole = torch.arange(6.0)
    found = unpickle(torch_bytes([whole, whole[2:4]], _use_new_zipfile_serialization=zipped), {})
    found[0][2] = 9
    assert found[1].tolist() == [9, 3]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_unpickle__what_training_scripts_keep(protocol):
    optimiser = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    content = {"epoch": 3, "loss": [0.5, None], "done": (True, "ü", b"\0"), "best": {1, 2}, "big": 2**80}
    kept = {**content, "optimiser": optimiser.state_dict(), "random": torch.get_rng_state()}
    found = unpickle(torch_bytes(kept, pickle_protocol=protocol), {})
    if protocol < 4:  # sets are made by a function of builtins, which is none of ours
        del content["best"]
        if protocol < 3:  # and so are bytes
            content["done"] = content["done"][:2]
            found["done"] = found["done"][:2]
    assert {name: found[name] for name in content} == content
    assert found["optimiser"] == optimiser.state_dict()
    assert_same(found["random"], kept["random"])


def test_unpickle__versions_of_modules_are_kept():
    state = nn.BatchNorm2d(2).state_dict()
    assert unpickle(torch_bytes(state), {})._metadata == state._metadata


FLOATS = b"ctorch\nFloatStorage\n"
STORAGE = b"(Vstorage\n" + FLOATS + b"V0\nVcpu\nI4\ntQ"  # four numbers, by name
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"I%d\n(I%d\nt(I%d\ntI00\nNtR"
MISUSES = {
    "entry of a tensor": (TENSOR % (0, 4, 1) + b"I1000000\nF1.0\ns.", "fills what is no dict"),
    "entries of a storage": (STORAGE + b"(I1000000\nF1.0\nu.", "fills what is no dict"),
    "entry of a type": (FLOATS + b"Va\nI1\ns.", "fills what is no dict"),
    "end of a tensor": (TENSOR % (0, 4, 1) + b"I1\na.", "fills what is no list"),
    "ends of a tensor": (TENSOR % (0, 4, 1) + b"(I1\ne.", "fills what is no list"),
    "a tensor is called": (TENSOR % (0, 4, 1) + b")R.", "calls what is no class or function"),
    "a type is called": (FLOATS + b")R.", "calls what is no class or function"),
    "a text is called": (b"Va\n)R.", "calls what is no class or function"),
    "a made object is called": (b"ccollections\nOrderedDict\n)R)R.", "calls what is no class or function"),
    "of another type by a text": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(Vprint\nN)NtR.",
        "made by something else than torch",
    ),
    "too long": (TENSOR % (0, 5, 1), "beyond its storage"),
    "too far apart": (TENSOR % (0, 2, 9), "beyond its storage"),
    "too late": (TENSOR % (3, 2, 1), "beyond its storage"),
    "before its memory": (TENSOR % (-1, 2, 1), "beyond its storage"),
    "backwards": (TENSOR % (3, 2, -1), "beyond its storage"),
    "negative size": (TENSOR % (0, -2, 1), "beyond its storage"),
    "storage that is not there": (TENSOR.replace(b"V0\n", b"V7\n") % (0, 1, 1), "data/7"),
    "file of another name": (TENSOR.replace(b"V0\n", b"V../../secret\n") % (0, 1, 1), "secret"),
    "no storage": (b"(Vmodule\nNNNNtQ.", "no storage of plain numbers"),
    "unknown function": (b"cos\nsystem\n(Vtrue\ntR.", "os.system is no data"),
    "extension": (b"\x82\x01.", "extension 1"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_unpickle__misuse_is_refused(name):
    pickled, message = MISUSES[name]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a/data.pkl", pickled if pickled.endswith(b".") else pickled + b".")
        members.writestr("a/data/0", torch.arange(4.0).numpy().tobytes())
    with pytest.raises(Exception, match=message):
        unpickle(archive.getvalue(), {})


def test_unpickle__the_base_of_the_misuses_is_right():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a/data.pkl", TENSOR % (1, 3, 1) + b".")
        members.writestr("a/data/0", torch.arange(4.0).numpy().tobytes())
    assert unpickle(archive.getvalue(), {}).tolist() == [1, 2, 3]


def test_unpickle__attributes_of_a_tensor_are_left_out():
    pickled = TENSOR % (0, 4, 1) + b"}(Vdata\nVgrad\nub."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a/data.pkl", pickled)
        members.writestr("a/data/0", torch.arange(4.0).numpy().tobytes())
    assert unpickle(archive.getvalue(), {}).tolist() == [0, 1, 2, 3]


def test_unpickle__a_legacy_storage_larger_than_the_file():
    data = torch_bytes([torch.zeros(200)], _use_new_zipfile_serialization=False)
    assert data.count(b"K\xc8") == 2  # size of the storage, and of the tensor
    with pytest.raises(pickle.UnpicklingError, match="larger than the file"):
        unpickle(data.replace(b"K\xc8", b"J\xff\xff\xff\x7f", 1), {})


def peak_memory(function):
    """Call a function that cannot read a file, and return what it says and the most bytes that Python held."""
    tracemalloc.start()
    try:
        with pytest.raises((pickle.UnpicklingError, EOFError)) as raised:
            function()
        return str(raised.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_unpickle__legacy_storages_that_are_together_larger_than_the_file():
    data = torch_bytes([torch.zeros(25_000) for _ in range(3)], _use_new_zipfile_serialization=False)
    good = unpickle(data, {})
    assert [len(tensor) for tensor in good] == [25_000] * 3
    cut = data[:-150_000]  # each of them fits, and the three do not
    said, peak = peak_memory(lambda: unpickle(cut, {}))
    assert "storages of 200000 bytes together are larger than the file" in said
    assert peak < 5 * len(cut)


@pytest.mark.parametrize("opcode", ["BYTEARRAY8", "BINBYTES8", "BINUNICODE8", "BINBYTES", "BINUNICODE", "LONG4"])
def test_unpickle__texts_longer_than_the_file(opcode):
    code = getattr(pickle, opcode)
    length = struct.pack("<Q", 2**32) if opcode.endswith("8") else struct.pack("<I", 2**28)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a/data.pkl", b"\x80\x05" + code + length + b"abc.")
    _, peak = peak_memory(lambda: unpickle(archive.getvalue(), {}))
    assert peak < 1_000_000


def test_unpickle__many_copies_of_a_long_list():
    pickled = b"](" + b"K\x01" * 5000 + b"eq\x000(" + b"ctorch\nSize\nh\x00\x85R" * 400 + b"l."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a/data.pkl", pickled)
    said, peak = peak_memory(lambda: unpickle(archive.getvalue(), {}))
    assert said == "it makes many objects of the same long one"
    assert peak < 1_000_000


def test_unpickle__a_byte_array():
    content = {"b": bytearray(b"abc"), "long": bytearray(100_000), "none": bytearray()}
    assert unpickle(torch_bytes(content, pickle_protocol=5), {}) == content


def test_read_checkpoint__does_not_use_torchs_readers_where_they_are_not_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickling, "_TORCH_IS_SAFE", False)
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(2)}, path)
    for owner, name in ((unpickling, "_TORCH_LOAD"), (torch.jit, "load"), (torch._C, "PyTorchFileReader")):
        monkeypatch.setattr(owner, name, None)
    assert read_checkpoint(path).tensors["w"].tolist() == [1, 1]


class RunsCode:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_loading_safely__libraries_that_unpickle(tmp_path):
    good, bad, marker = tmp_path / "good.pth", tmp_path / "bad.pth", tmp_path / "code-was-run"
    torch.save({"w": torch.ones(2)}, good)
    torch.save({"w": torch.ones(2), "x": RunsCode(marker)}, bad)
    with loading_safely():
        assert torch.load(good, map_location="cpu", weights_only=False)["w"].tolist() == [1, 1]
        with pytest.raises(CheckpointError, match="more than plain weights"):
            torch.load(bad, weights_only=False)
        assert not marker.exists()
        with ThreadPoolExecutor(1) as others:  # is not ours to restrict
            others.submit(torch.load, bad, weights_only=False).result()
        assert marker.exists()
    marker.unlink()
    torch.load(bad, weights_only=False)
    assert marker.exists()
