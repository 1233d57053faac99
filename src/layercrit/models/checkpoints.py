"""Read weight files safely: no code in a file is ever run.

A file is read into memory once, so its hash is that of exactly the bytes that were parsed. Before a pickle is loaded,
its opcodes are scanned (nothing is executed), and the file is refused if it would call anything but classes of data;
then ``torch.load(weights_only=True)``, or under an older torch our own reader, builds the tensors, and inert stand-ins
in place of all other objects.
"""

import hashlib
import stat
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from layercrit.errors import CheckpointError, first_line, near
from layercrit.models.pickles import Inert, imports_of, is_data, is_inert
from layercrit.models.unpickling import read_pickled

__all__ = ["Checkpoint", "foreign_globals", "hash_tensors", "loading_safely", "look_beside", "read_checkpoint"]

_LISTED = 8  # names shown of each kind of difference


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file.

    Attributes:
        path: the file.
        tensors: name -> tensor on the CPU, as in the file.
        sha256: SHA-256 of the file's bytes, hexadecimal.
        odd: entries between the tensors that are none: name -> type, such as ``{"epoch": "int"}``.
        objects: classes of other packages whose objects the file holds anywhere, by dotted name; none was imported.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    odd: Mapping[str, str] = field(default_factory=dict)
    objects: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read the weights of a ``.safetensors`` file or of a file written by ``torch.save`` (zip or legacy format).

    The weights are found by type: of all mappings from names to tensors, at any depth of nested mappings with string
    keys (so optimiser states, keyed by integers, are not entered), the one with the most tensors. Most of its entries
    must be tensors; those that are not are kept as `Checkpoint.odd`. If another has at least half as many tensors, as a
    moving average of the weights or a whole pickled network has, the choice is left to ``key``.

    Args:
        path: the file; a leading ``~`` is the home directory.
        key: which mapping to take, such as ``"state_dict_ema"``; nested keys are joined by dots.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not a weight file, would run code, or contains no set
            of weights or several.
    """
    path = Path(path).expanduser()
    data = _read_bytes(path)
    is_safetensors = path.suffix == ".safetensors" or _starts_like_safetensors(data)
    content, objects = (_parse_safetensors(path, data), ()) if is_safetensors else _parse_torch(path, data)
    chosen = _choose(path, content, key)
    tensors = {name: value for name, value in chosen.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{path} contains {name!r} as a sparse, quantised or meta tensor; expected plain values. "
                "Save the weights of the dense float model."
            )
    odd = {str(name): _kind(value) for name, value in chosen.items() if name not in tensors}
    return Checkpoint(path, {name: tensor.detach() for name, tensor in tensors.items()}, _sha256(data), odd, objects)


def foreign_globals(path: str | Path) -> list[str]:
    """List the functions and classes, beyond plain data, that unpickling a file would import, without running any.

    Returns:
        dotted names in alphabetical order; empty for a file of plain tensors and for ``.safetensors``.

    Raises:
        CheckpointError: the file is missing, empty, or not a weight file.
    """
    path = Path(path).expanduser()
    data = _read_bytes(path)
    return [] if _starts_like_safetensors(data) else list(imports_of(path, data))


def hash_tensors(named: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hexadecimal) over names, dtypes, shapes and bytes, in alphabetical order of the names."""
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_bytes(path: Path) -> bytes:
    """Read a file, refusing what people often have in place of a weight file."""
    try:
        mode = path.stat().st_mode
        endless = not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
        data = b"" if endless else path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}. {look_beside(path)}") from error
    except IsADirectoryError as error:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:_LISTED]) or "nothing"
        raise CheckpointError(f"{path} is a directory; expected one weight file. It contains: {inside}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if endless:
        raise CheckpointError(f"{path} is a device or a pipe, which might never end; expected a weight file.")
    if not data:
        raise CheckpointError(f"{path} is empty (0 bytes): the download did not finish. Download it again.")
    shown = f"It is {len(data)} bytes long and begins with {data[:60]!r}."
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves. {shown} Run 'git lfs pull' in its repository."
        )
    if data[:512].lstrip().startswith(b"<"):
        raise CheckpointError(
            f"{path} is a web page (HTML or XML), not a weight file. {shown} The server answered with a page, "
            "as Google Drive does for large files. Download the file in a browser."
        )
    if data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        raise CheckpointError(f"{path} is a compressed archive, not a weight file. {shown} Unpack it first.")
    return data


def look_beside(path: Path) -> str:
    """Say what is in the directory of a missing file."""
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either."
    return f"In its directory: {near(path.name, sorted(entry.name for entry in path.parent.iterdir()))}"


def _starts_like_safetensors(data: bytes) -> bool:
    """Whether the first 8 bytes can be the length of a JSON header that follows them."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data)


def _parse_safetensors(path: Path, data: bytes) -> object:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # damaged bytes raise whatever the parser meets first
        raise CheckpointError(
            f"{path} is damaged or truncated: it cannot be read as safetensors ({first_line(error)}). "
            f"It is {len(data)} bytes long. Download it again."
        ) from error


def _parse_torch(path: Path, data: bytes) -> tuple[object, tuple[str, ...]]:
    """The content of a file, and the classes of other packages that its stand-ins are for."""
    named = imports_of(path, data)
    if acting := [name for name in named if not is_inert(name)]:
        raise _more_than_weights(path, acting)
    objects = tuple(name for name in named if not is_data(name))
    try:
        content = read_pickled(data, named)
    except Exception as error:  # damaged or hostile bytes raise whatever the unpickler meets first
        if objects:
            raise _more_than_weights(path, objects) from error
        raise CheckpointError(
            f"{path} cannot be read as weights written by torch.save ({first_line(error)}). It is {len(data)} bytes "
            f"long and begins with {data[:16]!r}: damaged, truncated, or in another format. Download it again, or save "
            "model.state_dict() with torch.save or safetensors."
        ) from error
    if objects and all(isinstance(found, Inert) for found in _tensor_mappings(content).values()):
        raise _more_than_weights(path, objects)
    return content, objects


_LOADING = threading.Lock()


@contextmanager
def loading_safely() -> Iterator[None]:
    """Inside, what this thread loads with ``torch.load``, as timm and torchvision do, runs no code.

    Raises:
        CheckpointError: inside, where a file is loaded that `read_checkpoint` would refuse to read.
    """
    with _LOADING:  # torch has one function for the whole process
        load, thread = torch.load, threading.get_ident()

        def load_safely(file: Any, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return load(file, *arguments, **options)
            return _parse_torch(Path(file), _read_bytes(Path(file)))[0]

        torch.load = load_safely  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.load = load


def _more_than_weights(path: Path, names: Sequence[str]) -> CheckpointError:
    shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return CheckpointError(
        f"{path} contains more than plain weights: loading it would import and call {shown}. "
        "layercrit runs no code from a weight file, and a pickled module needs its author's code. If you trust "
        "the file, load it where that code is installed, and save model.state_dict(), preferably with safetensors."
    )


def _choose(path: Path, content: object, key: str | None) -> Mapping[object, object]:
    """Pick the weights among the mappings of a file; the rule is documented at `read_checkpoint`."""
    mappings = _tensor_mappings(content)
    sizes = {name: _n_tensors(value) for name, value in mappings.items()}
    shown = ", ".join(
        f"{name or 'the whole file'!r} ({f'{value.origin}, ' if isinstance(value, Inert) else ''}{sizes[name]} tensors)"
        for name, value in mappings.items()
    )
    readable = {name: value for name, value in mappings.items() if isinstance(value, Mapping)}
    if not readable:
        raise CheckpointError(
            f"{path} contains no weights: expected a mapping from names to tensors, at the top level or nested. It "
            f"contains {_describe(content)}."
        )
    if key is not None:
        if key not in readable:
            named = near(key, filter(None, readable))
            raise CheckpointError(f"{path} has no weights under key {key!r}. It has: {shown}. {named}")
        return readable[key]
    most = max(sizes.values())
    rivals = [name for name, size in sizes.items() if size * 2 >= most]
    if len(rivals) > 1 or rivals[0] not in readable:
        first = next((name for name in rivals if name in readable), max(readable, key=lambda name: sizes[name]))
        raise CheckpointError(
            f"{path} contains more than one set of weights: {shown}. Choose one with key=, such as key={first!r}."
        )
    return readable[rivals[0]]


def _tensor_mappings(content: object) -> dict[str, Mapping[object, object] | Inert]:
    """All mappings of which most entries are named tensors, by their dotted path; the outermost first.

    Whole networks that were pickled are among them as their stand-ins: they have tensors, which cannot be read.
    """
    found: dict[str, Mapping[object, object] | Inert] = {}
    pending: deque[tuple[str, object]] = deque([("", content)])
    seen: set[int] = set()  # a pickle can hold a mapping that contains itself
    while pending:
        path, value = pending.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Inert) and not is_data(value.origin) and _n_tensors(value):
            found[path] = value
        if not isinstance(value, dict):
            continue
        items = dict.items(value)  # a file may have given the object another attribute `items`
        tensors = [item for name, item in items if isinstance(name, str) and isinstance(item, Tensor)]
        if 2 * len(tensors) > len(items) and any(tensor.dim() for tensor in tensors):
            found[path] = dict(items)
        if all(isinstance(name, str) for name, _ in items):
            pending.extend((f"{path}.{name}" if path else name, item) for name, item in items)
    return found


def _n_tensors(value: object) -> int:
    """The number of tensors in a mapping; of an object, at any depth of what it was made of."""
    if isinstance(value, Mapping):
        return sum(isinstance(item, Tensor) for item in value.values())
    pending, seen, n_tensors = [value], {id(value)}, 0
    while pending:
        inside = pending.pop()
        n_tensors += isinstance(inside, Tensor)
        if isinstance(inside, Inert):
            parts: list[object] = inside.held
        else:
            parts = list(dict.values(inside)) if isinstance(inside, dict) else []
            parts += inside if isinstance(inside, list | tuple) else []
        pending += [part for part in parts if id(part) not in seen]
        seen.update(map(id, parts))
    return n_tensors


def _kind(value: object) -> str:
    return value.origin if isinstance(value, Inert) else type(value).__name__


def _describe(content: object) -> str:
    """Describe the content of a file in which no weights were found."""
    if not isinstance(content, dict):
        return f"one {_kind(content)}"
    entries = [f"{name!r} ({_kind(value)})" for name, value in list(dict.items(content))[:_LISTED]]
    return f"a mapping of {len(content)}: {', '.join(entries)}{', ...' if len(content) > _LISTED else ''}"
