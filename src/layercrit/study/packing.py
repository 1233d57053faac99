"""Per-image values of cells as the bytes that a study's file keeps."""

import json
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from layercrit.foreign_files import parse_json

__all__ = ["pack", "unpack"]


def pack(values: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """Return named float32 arrays of one shape as compressed bytes.

    Bytes of equal significance are put side by side before zlib sees them: exponents compress, mantissas hardly do.
    """
    shapes = {array.shape for array in values.values()}
    header = json.dumps({"names": list(values), "shape": list(shapes.pop()) if shapes else []}).encode()
    stacked = np.stack([array.astype("<f4", copy=False) for array in values.values()]) if values else np.empty(0, "<f4")
    planes = np.ascontiguousarray(stacked).view(np.uint8).reshape(-1, 4).T
    return len(header).to_bytes(4, "little") + header + zlib.compress(planes.tobytes(), level=1)


def unpack(data: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Return what `pack` was given.

    Raises:
        ValueError: the bytes are damaged.
    """
    end = 4 + int.from_bytes(data[:4], "little")
    header = parse_json(data[4:end])
    try:
        planes = np.frombuffer(zlib.decompress(data[end:]), np.uint8).reshape(4, -1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    stacked = planes.T.copy().view("<f4").reshape(len(header["names"]), *header["shape"])
    return dict(zip(header["names"], stacked, strict=True))
