"""Arrays in ``.npy`` and ``.npz`` files: no pickles, and no memory for more than a file can contain."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile

from layercrit.errors import ProbeError, first_line
from layercrit.foreign_files import open_regular
from layercrit.probes.bounds import DEFLATED, check_room, check_unpacking

__all__ = ["opened", "unpacked"]

_DAMAGED = (OSError, EOFError, zipfile.BadZipFile, zlib.error)
_PLAIN = (1, 0)  # version of the format; later ones are for types with fields
_MOST = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATED}  # bytes that one packed byte can stand for


@contextmanager
def opened(path: Path) -> Iterator[npt.NDArray[Any] | NpzFile]:
    """Open a ``.npy`` file, memory-mapped, or an ``.npz`` file, to be read with `unpacked`.

    Raises:
        ProbeError: NumPy cannot read it, now or inside.
    """
    try:
        with open_regular(path) as file:
            beginning = file.read(npy.MAGIC_LEN)
        if beginning.startswith(npy.MAGIC_PREFIX) and beginning[-2:] != bytes(_PLAIN):
            raise ValueError("it is no plain array")  # the header of other versions may have gigabytes
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        with loaded if isinstance(loaded, NpzFile) else nullcontext():
            yield loaded
    except ProbeError:
        raise
    except ValueError as error:
        raise ProbeError(
            f"Cannot read '{path}' ({error}). If it is damaged, write it again. Pickled objects are refused, since "
            "loading them can run code: save plain uint8 arrays with numpy.save or numpy.savez."
        ) from error
    except Exception as error:  # of any type: NumPy's and zipfile's readers meet what they do not expect
        reason = error if isinstance(error, _DAMAGED) else first_line(error)
        raise ProbeError(f"Cannot read '{path}' ({reason}). If it is damaged, write it again.") from error


def unpacked(arrays: NpzFile, key: str, path: Path) -> npt.NDArray[Any]:
    """Return one of the arrays of an ``.npz`` file.

    Raises:
        ProbeError: there is not enough memory for it.
        ValueError: it is no array, or it has more or fewer bytes than its shape asks for.
    """
    if (packed := arrays.zip) is None:
        raise ValueError("it was closed")
    name = key if key in packed.namelist() else f"{key}.npy"
    member = packed.getinfo(name)
    if (most := _MOST.get(member.compress_type)) is not None:
        check_unpacking(member.file_size, min(member.compress_size, path.stat().st_size), most)
    with packed.open(name) as file:
        if npy.read_magic(file) != _PLAIN:
            raise ValueError(f"'{key}' is no plain array")
        shape, _, dtype = npy.read_array_header_1_0(file)
        promised, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if promised != there and not dtype.hasobject:
        raise ValueError(f"'{key}' promises {shape} {dtype} = {promised:,} bytes, but contains {there:,}")
    check_room(promised, f"'{key}' of '{path}'", "Save it with numpy.save: a .npy file is read in place.")
    array: npt.NDArray[Any] = arrays[key]
    return array
