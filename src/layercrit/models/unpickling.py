"""Read what a pickled weight file holds: tensors, mappings, lists, and inert stand-ins in place of all other objects.

``torch.load(weights_only=True)`` does this from torch 2.10 on. Before 2.6 a file could run code in spite of it
(CVE-2025-32434), and before 2.10 corrupt memory (CVE-2026-24747), so under older versions files are read here, with
nothing but our own constructors. Nothing that a file names is imported. It can have made what the tables of this module
hold, and stand-ins; tensors are views of the file's bytes, whose bounds are checked.
"""

import io
import pickle
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from layercrit.models.pickles import Inert, is_plain, python_3_name, stand_in

__all__ = ["read_pickled", "unpickle"]

_TORCH_IS_SAFE = torch.__version__ >= "2.10"
_TORCH_LOAD = torch.load  # which `checkpoints.loading_safely` replaces for a while
_LOADING = threading.Lock()

_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # what a file begins with that torch.save wrote before 1.6

_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
_QUANTISED = {
    f"Q{name}": getattr(torch, f"q{name.lower()}") for name in ("Int8", "UInt8", "Int32", "UInt4x2", "UInt2x4")
}


def read_pickled(data: bytes, named: Mapping[str, str]) -> object:
    """Return what a file of ``torch.save``, zip or legacy, holds; tensors are on the CPU.

    Args:
        data: the file's bytes.
        named: the functions and classes that get stand-ins, as `pickles.imports_of` returns them. It has looked at the
            archive already.

    Raises:
        Exception: the bytes are damaged, or no such file; whatever the parser meets first.
    """
    if not _TORCH_IS_SAFE:
        return unpickle(data, named)
    with _allowing_only([(stand_in(name, use), name) for name, use in named.items()]):
        return _TORCH_LOAD(io.BytesIO(data), map_location="cpu", weights_only=True)


@contextmanager
def _allowing_only(stand_ins: list[Any]) -> Iterator[None]:
    """Inside, torch takes the stand-ins for the classes that a file names, and none that was allowed elsewhere."""
    with _LOADING:  # torch keeps one list for the whole process
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(stand_ins)
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def unpickle(data: bytes, named: Mapping[str, str]) -> object:
    """Return the same as `read_pickled`, of the same arguments and with the same errors, without torch's own reader.

    A tensor that has no plain values, as a sparse or quantised one, is a tensor on the device ``meta``.
    """
    return _zipped(data, named) if data.startswith(b"PK") else _legacy(data, named)


def _zipped(data: bytes, named: Mapping[str, str]) -> object:
    """The content of a zip archive: a pickle, and the bytes of each storage as a file of its own."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers begin with their most significant byte")
        storages: dict[str, Tensor] = {}

        def storage_of(key: str, *_: object) -> Tensor:
            if key not in storages:
                storages[key] = _bytes(archive.read(f"{folder}data/{key}"))
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(pickled)), named, storage_of).load()


def _legacy(data: bytes, named: Mapping[str, str]) -> object:
    """The content of the older format: five pickles, then length and bytes of each storage."""
    stream = io.BytesIO(data)
    storages: dict[str, Tensor] = {}
    n_bytes = 0  # of all storages

    def storage_of(key: str, dtype: torch.dtype, n: int, view: tuple[str, int, int] | None = None) -> Tensor:
        nonlocal n_bytes
        if key not in storages:
            n_bytes += n * dtype.itemsize
            if n_bytes > len(data):
                raise pickle.UnpicklingError(f"storages of {n_bytes} bytes together are larger than the file")
            storages[key] = _bytes(bytes(n * dtype.itemsize))  # what it holds follows the pickles
        whole = storages[key]
        return whole if view is None else whole[view[1] * dtype.itemsize :][: view[2] * dtype.itemsize]

    def read() -> object:
        return _Unpickler(stream, named, storage_of).load()

    if read() != _MAGIC or read() != _LEGACY_VERSION:
        raise pickle.UnpicklingError("it does not begin with the magic number of torch.save")
    system: Any = read()
    if not system["little_endian"]:
        raise pickle.UnpicklingError("its numbers begin with their most significant byte")
    content, keys = read(), read()
    if not isinstance(keys, list):
        raise pickle.UnpicklingError("it has no list of storages")
    for key in keys:
        stream.read(8)  # how many numbers; the pickle said it
        held = stream.read(storages[key].numel())
        if len(held) < storages[key].numel():
            raise pickle.UnpicklingError("a storage is cut off")
        storages[key].copy_(_bytes(held))
    return content


def _bytes(held: bytes) -> Tensor:
    """Return bytes as a tensor of their own, ``(n_bytes,)``."""
    return torch.frombuffer(bytearray(held), dtype=torch.uint8) if held else torch.empty(0, dtype=torch.uint8)


# --- what a file can have made --------------------------------------------------------------------------------------


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    """Return a view of a storage, which must not reach beyond it."""
    size, stride = tuple(size), tuple(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (all(size) and last >= len(storage)):
        raise pickle.UnpicklingError(f"a tensor reaches beyond its storage of {len(storage)} numbers")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _tensor_v2(
    storage: Tensor, offset: int, size: Any, stride: Any, _grad: object, _hooks: object, lazily: object = None
) -> Tensor:
    if lazily:
        raise pickle.UnpicklingError("a tensor is to be conjugated or negated")
    return _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: Tensor, offset: int, size: Any, stride: Any, grad: object, hooks: object, dtype: Any, lazily: object = None
) -> Tensor:
    return _tensor_v2(storage.view(dtype), offset, size, stride, grad, hooks, lazily)


def _first(data: object, *_: object) -> object:
    return data


def _no_values(*_: object) -> Tensor:
    return torch.empty(0, device="meta")


def _of_type(function: Any, _type: object, arguments: Any, _state: object) -> object:
    """A tensor of a class of its own, which it is not made of here."""
    if function not in _MAKES.values():
        raise pickle.UnpicklingError("a tensor is made by something else than torch")
    return function(*arguments)


_MAKES: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}
_NAMED_VALUES: dict[str, object] = {
    **{f"torch.{name}Storage": dtype for name, dtype in (_STORAGES | _QUANTISED).items()},
    **{f"torch.storage.{name}Storage": torch.uint8 for name in ("Untyped", "_Untyped", "Typed", "_Typed")},
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _Unpickler(pickle._Unpickler):
    """Python's own machine for pickles, in which a file reaches nothing but what is named above and stand-ins."""

    stack: list[Any]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, named: Mapping[str, str], storage_of: Callable[..., Tensor]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._named, self._storage_of = named, storage_of
        self._given: dict[str, Any] = {}
        self._n_copied, self._most_copied = 0, len(stream.getbuffer())

    def find_class(self, module: str, name: str) -> Any:
        dotted = python_3_name(module, name)
        if dotted in _NAMED_VALUES:
            return _NAMED_VALUES[dotted]
        if dotted not in self._given:
            if dotted in _MAKES:
                found: Any = _MAKES[dotted]
            elif dotted.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
                found = _no_values
            elif dotted in self._named or is_plain(dotted):
                found = stand_in(dotted, self._named.get(dotted, "object"))
            else:
                raise pickle.UnpicklingError(f"{dotted} is no data")
            self._given[dotted] = found
        return self._given[dotted]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _place, n, *view = pid
        if kind not in ("storage", b"storage") or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no storage of plain numbers")
        storage = self._storage_of(str(key), dtype, n, *view)
        return _no_values() if dtype in _QUANTISED.values() else storage.view(dtype)

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it refers to the extension {code}")

    def _called(self, function: Any, arguments: Any) -> object:
        if not any(function is one for one in self._given.values()):
            raise pickle.UnpicklingError("it calls what is no class or function")
        # a reference to a long list takes two bytes, and what is made of it, such as a tuple, a copy of it all
        self._n_copied += sum(len(one) for one in arguments if isinstance(one, list | tuple | dict | set))
        if self._n_copied > self._most_copied:
            raise pickle.UnpicklingError("it makes many objects of the same long one")
        return function(*arguments)

    def _filled(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise pickle.UnpicklingError(f"it fills what is no {kind.__name__}")
        return self.stack[-1]

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], arguments)

    def _instantiate(self, kind: Any, arguments: Any) -> None:  # of INST and OBJ
        self.append(self._called(kind, arguments))

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], [*arguments, *keywords.values()])

    def load_build(self) -> None:
        state = self.stack.pop()
        built: Any = self.stack[-1]
        if isinstance(built, Inert):
            built.held.append(state)
        elif isinstance(built, OrderedDict) and isinstance(state, dict) and "_metadata" in state:
            setattr(built, "_metadata", state["_metadata"])  # noqa: B010, versions of a network's modules, for load_state_dict
        # attributes of anything else are left out

    def load_bytearray8(self) -> None:  # pickle makes one as long as the file says before it reads, and this alone
        n_bytes = int.from_bytes(self.read(8), "little")
        held = self.read(n_bytes)
        if len(held) < n_bytes:
            raise pickle.UnpicklingError("a byte array is cut off")
        self.append(bytearray(held))

    def load_append(self) -> None:
        item = self.stack.pop()
        self._filled(list).append(item)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._filled(list).extend(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._filled(set).update(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._filled(dict)[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._filled(dict).update(zip(items[::2], items[1::2], strict=True))

    for _opcode, _loads in {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_reduce,
        pickle.NEWOBJ_EX: load_newobj_ex,
        pickle.BUILD: load_build,
        pickle.BYTEARRAY8: load_bytearray8,
        pickle.APPEND: load_append,
        pickle.APPENDS: load_appends,
        pickle.ADDITEMS: load_additems,
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
    }.items():
        dispatch[_opcode[0]] = _loads
