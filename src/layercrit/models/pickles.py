"""What a pickled weight file would import, read from its opcodes alone: nothing is executed."""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from layercrit.errors import CheckpointError, first_line

__all__ = ["INERT_GLOBALS", "imports_of"]

# What torch itself writes into a file of plain tensors; none of it runs code that a file's author can choose.
_PLAIN_GLOBAL = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
    r"|torch(\.\w+)*\.\w*(Tensor|Storage)|torch\.(Size|device|per_(tensor|channel)_\w+)"
    r"|torch\.(bool|bits|b?float|b?complex|q?u?int)\w*|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
)

# Data that training scripts leave beside the weights: command-line options, metrics and paths.
INERT_GLOBALS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)

_LEGACY_PICKLES = 5  # a legacy file holds: magic number, version, system, the object, storage keys; raw bytes follow
_LISTED = 8  # members of an archive that are shown


def imports_of(path: Path, data: bytes) -> list[str]:
    """List the functions and classes, beyond plain data, that unpickling a file would import, without running any.

    Args:
        path: the file, for error messages.
        data: its bytes.

    Returns:
        dotted names in alphabetical order; none for a file of plain tensors.

    Raises:
        CheckpointError: it is a zip archive that ``torch.save`` did not write.
    """
    found: set[str] = set()
    for stream in _pickle_streams(path, data):
        names = _globals_of(stream)
        if names is None:  # no pickle, or no longer one: torch.load, restricted as well, says what is wrong
            break
        found.update(names)
    return sorted(name for name in found if not _PLAIN_GLOBAL.fullmatch(name))


def _pickle_streams(path: Path, data: bytes) -> Iterator[io.BytesIO]:
    """Yield each pickle of a file, positioned at its start: the members of a zip archive, or a sequence."""
    if data.startswith(b"PK"):
        yield from (io.BytesIO(pickled) for pickled in _zipped_pickles(path, data))
        return
    stream = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES):
        yield stream


def _zipped_pickles(path: Path, data: bytes) -> list[bytes]:
    """The pickles inside a zip archive of ``torch.save``; any other archive is refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            compressed = sum(member.file_size for member in members) > len(data)
            pickles = [] if compressed else [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    except Exception as error:  # damaged bytes raise whatever the parser meets first
        raise CheckpointError(
            f"{path} is damaged or truncated: it begins as a zip archive of torch.save but cannot be opened as one "
            f"({first_line(error)}). It is {len(data)} bytes long. Download it again."
        ) from error
    if compressed:
        raise CheckpointError(
            f"{path} is a compressed zip archive; torch.save writes uncompressed ones. Unpack it, or save it again."
        )
    names = [member.filename.rpartition("/")[2] for member in members]
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive: it contains a program, not only weights. If you trust it, load it with "
            "torch.jit.load and save its state_dict()."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip archive without a data.pkl, so torch.save did not write it. "
            f"It contains: {', '.join(member.filename for member in members[:_LISTED]) or 'nothing'}."
        )
    return pickles


def _globals_of(stream: io.BytesIO) -> list[str] | None:
    """The dotted names that the pickle at the stream's position would import, read from its opcodes alone.

    Returns:
        the names in order of appearance; None where the bytes are not a whole pickle.
    """
    names: list[str] = []
    memo: dict[object, str] = {}
    pushed = ["?", "?"]  # the last two strings pushed: what STACK_GLOBAL takes as module and name
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(pushed))
            elif opcode.name.startswith("EXT"):
                names.append(f"copyreg.extension_{argument}")
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif opcode.name.endswith("PUT"):
                memo[argument] = pushed[-1]
            elif opcode.name.endswith("GET"):
                pushed = [pushed[-1], memo.get(argument, "?")]
            elif isinstance(argument, str):
                pushed = [pushed[-1], argument]
    except (ValueError, IndexError):
        return None
    return names
