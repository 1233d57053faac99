"""What a pickled weight file names beside tensors, read from its opcodes alone: nothing is executed.

Training scripts leave options, paths, enums and whole configurations beside the weights. None of their classes is
ever imported: each gets a stand-in that does nothing. Functions that a file would call, as ``os.system``, are refused.
"""

import _compat_pickle
import io
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layercrit.errors import CheckpointError, first_line

__all__ = ["Inert", "imports_of", "is_data", "is_inert", "is_plain", "python_3_name", "stand_in"]

# What torch itself writes into a file of plain tensors; none of it runs code that a file's author can choose.
_PLAIN_GLOBAL = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
    r"|torch(\.\w+)*\.\w*(Tensor|Storage)|torch\.(Size|device|per_(tensor|channel)_\w+)"
    r"|torch\.(bool|bits|b?float|b?complex|q?u?int)\w*|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
)

# Data of the standard library and of numpy, and how they are put together; and functions that options of networks name.
_DATA_GLOBAL = re.compile(
    r"argparse\.Namespace|types\.(SimpleNamespace|GenericAlias|UnionType|MappingProxyType)|pathlib(\._\w+)?\.(Pure)?(Posix|Windows)?Path"
    r"|collections\.(defaultdict|deque|ChainMap|UserDict|UserList)|functools\.(partial|reduce)|enum\.\w+"
    r"|builtins\.(object|type|int|float|bool|str|bytes|tuple|list|dict|frozenset|range|slice|getattr|Ellipsis)"
    r"|copyreg\._reconstructor|typing\.\w+|_?operator\.(getitem|or_)"
    r"|datetime\.\w+|zoneinfo\.[\w.]+|decimal\.Decimal|fractions\.Fraction|uuid\.(UUID|SafeUUID)|random\.Random"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\d*|float\d*|complex\d*|str_|bytes_|datetime64|timedelta64)"
    r"|numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)|numpy\.random\._pickle\.\w+"
    r"|torch\.(nn\.(functional|init)|_C\._nn)\.\w+|torch\.(strided|\w+_format|channels_last\w*)|pandas\.[\w.]+"
)

_CLASS = re.compile(r"(\w+\.)+_*[A-Z]\w*")  # PEP 8: classes alone begin with a capital letter

_LEGACY_PICKLES = 5  # a legacy file holds: magic number, version, system, the object, storage keys; raw bytes follow
_LISTED = 8  # members of an archive that are shown


class Inert:
    """Stand-in for an object that is not a tensor: keeps what the object was made of, and does nothing with it.

    Attributes:
        origin: the dotted name of the class or function that it stands for.
        held: the arguments and states that it was given.
    """

    origin = ""
    held: list[object]

    def __new__(cls, *arguments: object) -> "Inert":  # noqa: D102 - the class says it
        made = super().__new__(cls)
        made.held = list(arguments)
        return made

    def __setstate__(self, state: object) -> None:
        self.held.append(state)


def is_plain(name: str) -> bool:
    """Whether a dotted name is one that torch writes into files of plain tensors, such as ``torch.FloatStorage``."""
    return _PLAIN_GLOBAL.fullmatch(name) is not None


def is_data(name: str) -> bool:
    """Whether a dotted name is that of data known to be beside weights, such as ``pathlib.PosixPath``."""
    return _DATA_GLOBAL.fullmatch(name) is not None


def is_inert(name: str) -> bool:
    """Whether objects of a dotted name get a stand-in: known data, and classes that are not the standard library's.

    Nothing that is named is imported either way. Functions, and classes of the standard library that can act, such as
    ``subprocess.Popen``, are not: a file that calls them is no longer one of weights and options.
    """
    return is_data(name) or (
        _CLASS.fullmatch(name) is not None and name.partition(".")[0] not in sys.stdlib_module_names
    )


def python_3_name(module: str, name: str) -> str:
    """Return the dotted name that a global of a pickle has in Python 3, whichever Python wrote it."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def stand_in(name: str, use: str) -> type:
    """Return the class that stands for a dotted name.

    Args:
        name: the class or function that the file names.
        use: what the file fills its objects as, from `imports_of`: ``"mapping"``, ``"list"``, or else ``"object"``.
    """
    made: Any = {"mapping": OrderedDict, "list": list}.get(use)
    if made is None:
        return type(name.rpartition(".")[2], (Inert,), {"origin": name})
    # only mappings and lists are filled, so an object that is filled like one is one
    return type(name.rpartition(".")[2], (), {"__new__": lambda cls, *arguments: made()})


def imports_of(path: Path, data: bytes) -> dict[str, str]:
    """Find the functions and classes, beyond plain data, that unpickling a file would import, without running any.

    Args:
        path: the file, for error messages.
        data: its bytes.

    Returns:
        dotted name -> ``"mapping"`` or ``"list"`` if the file fills its objects with entries, else ``"object"``; in
        alphabetical order, and empty for a file of plain tensors.

    Raises:
        CheckpointError: it is a zip archive that ``torch.save`` did not write.
    """
    found: dict[str, str] = {}
    for stream in _pickle_streams(path, data):
        try:
            uses = _uses(stream)
        except (
            ValueError,
            IndexError,
        ):  # no pickle, or no longer one: who reads it, restricted too, says what is wrong
            break
        found |= {name: use for name, use in uses.items() if found.get(name, "object") == "object"}
    return {str(name): found[name] for name in sorted(found) if not is_plain(name)}


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


class _Of(str):
    """On the simulated stack: a global by its dotted name, or an object made with it; a plain ``str`` is a text."""


_MARK = _Of("(")
_MAKES = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"}
_FILLS = {"SETITEM": "mapping", "SETITEMS": "mapping", "APPEND": "list", "APPENDS": "list"}
_LEAVES_FIRST = {*_MAKES, *_FILLS, "BUILD", "ADDITEMS", "DUP", "MEMOIZE"}  # what they leave is, or is of, the lowest


def _uses(stream: io.BytesIO) -> dict[str, str]:
    """Follow the pickle at the stream's position on a stack of names; `imports_of` says what is returned.

    Raises:
        ValueError, IndexError: the bytes are not a whole pickle.
    """
    uses: dict[str, str] = {}
    memo: dict[object, str | None] = {}
    stack: list[str | None] = []  # names, texts and marks; None for everything else
    for opcode, argument, _ in pickletools.genops(stream):
        operation, taken = opcode.name, _take(stack, opcode)
        made: str | None = argument if isinstance(argument, str) else None
        if operation in ("GLOBAL", "INST"):
            made = _named(uses, *str(argument).split(" ", 1))
        elif operation == "STACK_GLOBAL":
            made = _named(uses, *(text or "?" for text in taken))
        elif operation.startswith("EXT"):
            made = _named(uses, "copyreg", f"extension_{argument}")
        elif operation == "MARK":
            made = _MARK
        elif operation in _LEAVES_FIRST:
            made = taken[0]
        elif operation.endswith("GET"):
            made = memo.get(argument)
        if operation.endswith("PUT"):
            memo[argument] = stack[-1]
        elif operation == "MEMOIZE":
            memo[len(memo)] = made
        elif operation in _FILLS and taken[0] in uses and isinstance(taken[0], _Of):
            uses[taken[0]] = _FILLS[operation]
        stack += [made] * len(opcode.stack_after)
    return uses


def _take(stack: list[str | None], opcode: pickletools.OpcodeInfo) -> list[str | None]:
    """Take off the stack what an opcode takes, lowest first, without the mark."""
    wanted = opcode.stack_before
    if not wanted:
        return []
    above: list[str | None] = []
    n_below = len(wanted)
    if pickletools.markobject in wanted:
        n_below = wanted.index(pickletools.markobject)
        while (top := stack.pop()) is not _MARK:
            above.append(top)
    if n_below > len(stack):
        raise IndexError("the pickle takes more than it has made")
    below = stack[len(stack) - n_below :]
    del stack[len(stack) - n_below :]
    return below + above[::-1]


def _named(uses: dict[str, str], module: str, name: str) -> _Of:
    """Note a global, under the name that it has in Python 3."""
    dotted = _Of(python_3_name(module, name))
    uses.setdefault(dotted, "object")
    return dotted
