"""Read weight files safely: no code in a file is ever run, and weights that do not fit are listed, not skipped.

A file is read into memory once, so its hash is that of exactly the bytes that were parsed. Before a pickle is loaded,
its opcodes are scanned (nothing is executed), and the file is refused if it names any global outside an allow-list of
plain data; then ``torch.load(weights_only=True)`` builds the tensors.
"""

import difflib
import hashlib
import io
import stat
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from layercrit.errors import CheckpointError, first_line, near
from layercrit.models.pickles import INERT_GLOBALS, imports_of
from layercrit.wrappers import WRAPPER_PREFIXES

__all__ = ["Checkpoint", "fit_to", "foreign_globals", "hash_tensors", "look_beside", "read_checkpoint"]

_LISTED = 8  # names shown of each kind of difference


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file.

    Attributes:
        path: the file.
        tensors: name -> tensor on the CPU, as in the file.
        sha256: SHA-256 of the file's bytes, hexadecimal.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str


class _Inert:
    """Stand-in for data that is not a tensor: accepts any arguments and state, keeps none, does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read the weights of a ``.safetensors`` file or of a file written by ``torch.save`` (zip or legacy format).

    The weights are found by type: of all mappings from names to tensors and nothing else, at any depth of nested
    mappings with string keys (so optimiser states, keyed by integers, are not entered), the one with the most tensors.
    If another has at least half as many, as a moving average of the weights has, the choice is left to ``key``.

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
    content = _parse_safetensors(path, data) if is_safetensors else _parse_torch(path, data)
    tensors = _choose(path, content, key)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{path} contains {name!r} as a sparse, quantised or meta tensor; expected plain values. "
                "Save the weights of the dense float model."
            )
    return Checkpoint(path, {name: tensor.detach() for name, tensor in tensors.items()}, _sha256(data))


def foreign_globals(path: str | Path) -> list[str]:
    """List the functions and classes, beyond plain data, that unpickling a file would import, without running any.

    Returns:
        dotted names in alphabetical order; empty for a file of plain tensors and for ``.safetensors``.

    Raises:
        CheckpointError: the file is missing, empty, or not a weight file.
    """
    path = Path(path).expanduser()
    data = _read_bytes(path)
    return [] if _starts_like_safetensors(data) else imports_of(path, data)


def fit_to(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Match the tensors of a file with those of an architecture: every name and every shape, nothing left over.

    Wrapper prefixes are removed first: as long as all names of the file start with the same one of
    `WRAPPER_PREFIXES`, and not all expected names do, it is cut off. Two differences are allowed, since neither can
    change a prediction: ``num_batches_tracked``, absent from files before PyTorch 0.4.1 and unused in evaluation, may
    be missing (the architecture's own value is used), and floating-point tensors are cast to the expected precision.

    Args:
        tensors: the file's tensors by name.
        expected: the architecture's ``state_dict()``.
        source: the file and architecture in words; errors begin with it.

    Returns:
        tensors under the expected names, in the expected order, ready for ``load_state_dict(strict=True)``.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes or number types differ; all are counted, and the
            first of each kind named.
    """
    tensors = _without_wrappers(tensors, expected)
    untracked = {n for n in expected if n not in tensors and n.rpartition(".")[2] == "num_batches_tracked"}
    missing = [name for name in expected if name not in tensors and name not in untracked]
    unexpected = [name for name in tensors if name not in expected]
    differing = [
        f"{name!r} is {_words(tensors[name])} in the file, {_words(value)} expected"
        for name, value in expected.items()
        if name in tensors and not _compatible(tensors[name], value)
    ]
    differences = [
        _listing("missing", [f"{name!r}{_nearest(name, unexpected)}" for name in missing]),
        _listing("unexpected", [repr(name) for name in unexpected]),
        _listing("of another shape or type", differing),
    ]
    if any(differences):
        raise CheckpointError(
            f"{source}: the weights do not fit. {' '.join(filter(None, differences))} "
            "Check the architecture and its options (such as num_classes), or rename the tensors first."
        )
    return {
        name: (value if name in untracked else tensors[name]).detach().to(dtype=value.dtype, copy=True)
        for name, value in expected.items()
    }


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


def _parse_torch(path: Path, data: bytes) -> object:
    foreign = [name for name in imports_of(path, data) if name not in INERT_GLOBALS]
    if foreign:
        raise CheckpointError(
            f"{path} contains more than plain weights: loading it would import and call {_shortened(foreign)}. "
            "layercrit runs no code from a weight file, and a pickled module needs its author's code. If you trust "
            "the file, load it where that code is installed, and save model.state_dict(), preferably with safetensors."
        )
    stand_ins: list[Any] = [(_Inert, name) for name in INERT_GLOBALS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile bytes raise whatever the unpickler meets first
        raise CheckpointError(
            f"{path} cannot be read as weights written by torch.save ({first_line(error)}). It is {len(data)} bytes "
            f"long and begins with {data[:16]!r}: damaged, truncated, or in another format. Download it again, or save "
            "model.state_dict() with torch.save or safetensors."
        ) from error


def _choose(path: Path, content: object, key: str | None) -> dict[str, Tensor]:
    """Pick the weights among the mappings of a file; the rule is documented at `read_checkpoint`."""
    mappings = _tensor_mappings(content)
    sizes = {name: len(tensors) for name, tensors in mappings.items()}
    shown = ", ".join(f"{name or 'the whole file'!r} ({size} tensors)" for name, size in sizes.items())
    if not mappings:
        raise CheckpointError(
            f"{path} contains no weights: expected a mapping from names to tensors and nothing else, at the top level "
            f"or nested. It contains {_describe(content)}."
        )
    if key is not None:
        if key not in mappings:
            named = near(key, filter(None, mappings))
            raise CheckpointError(f"{path} has no weights under key {key!r}. It has: {shown}. {named}")
        return mappings[key]
    most = max(sizes.values())
    rivals = [name for name, size in sizes.items() if size * 2 >= most]
    if len(rivals) > 1:
        raise CheckpointError(
            f"{path} contains more than one set of weights: {shown}. Choose one with key=, such as key={rivals[0]!r}."
        )
    return mappings[rivals[0]]


def _tensor_mappings(content: object) -> dict[str, dict[str, Tensor]]:
    """All mappings from names to tensors and nothing else, by their dotted path; the outermost first."""
    found: dict[str, dict[str, Tensor]] = {}
    pending: deque[tuple[str, object]] = deque([("", content)])
    seen: set[int] = set()  # a pickle can hold a mapping that contains itself
    while pending:
        path, value = pending.popleft()
        if not isinstance(value, Mapping) or id(value) in seen or not all(isinstance(name, str) for name in value):
            continue
        seen.add(id(value))
        if value and all(isinstance(item, Tensor) for item in value.values()):
            found[path] = dict(value)
        else:
            pending.extend((f"{path}.{name}" if path else name, item) for name, item in value.items())
    return found


def _describe(content: object) -> str:
    """Describe the content of a file in which no weights were found."""
    if not isinstance(content, Mapping):
        return f"one {type(content).__name__}"
    entries = [f"{name!r} ({type(value).__name__})" for name, value in list(content.items())[:_LISTED]]
    return f"a mapping of {len(content)}: {', '.join(entries)}{', ...' if len(content) > _LISTED else ''}"


def _without_wrappers(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut off the wrapper prefixes; the rule is documented at `fit_to`."""
    stripped = dict(tensors)
    while stripped:
        shared = [
            prefix
            for prefix in WRAPPER_PREFIXES
            if all(name.startswith(prefix) for name in stripped)
            and not all(name.startswith(prefix) for name in expected)
        ]
        if not shared:
            break
        stripped = {name.removeprefix(shared[0]): tensor for name, tensor in stripped.items()}
    return stripped


def _compatible(tensor: Tensor, value: Tensor) -> bool:
    same_kind = tensor.dtype == value.dtype or (tensor.is_floating_point() and value.is_floating_point())
    return tensor.shape == value.shape and same_kind


def _words(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _nearest(name: str, candidates: list[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (similar: {matches[0]!r})" if matches else ""


def _listing(kind: str, entries: list[str]) -> str:
    """One sentence that counts differences of a kind and shows the first; empty when there are none."""
    return f"{len(entries)} {kind}: {_shortened(entries)}." if entries else ""


def _shortened(entries: list[str]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more
