"""Files that nobody should be sent: pipes, headers that lie, archives of zeros."""

import io
import os
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from photographs import encoded, piece


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@contextmanager
def nobody_waits(path: Path) -> Iterator[None]:
    """Fail if somebody waits for a writer of a pipe, and let them go on."""
    waited = threading.Event()

    def let_go() -> None:
        waited.set()
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    timer = threading.Timer(10, let_go)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    assert not waited.is_set(), f"{path} was opened, and would have been waited for without end"


@contextmanager
def no_more_memory_than(n_bytes: int) -> Iterator[None]:
    """Fail if Python and NumPy take more at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def image_folder(folder: Path, n_images: int = 30) -> Path:
    folder.mkdir()
    for number in range(n_images):
        (folder / f"{number:02d}.png").write_bytes(encoded(piece(number, 8, 8), "PNG"))
    return folder


def npy(shape: tuple[int, ...], content: bytes = b"", dtype: str = "|u1") -> bytes:
    """A ``.npy`` file whose header promises ``shape``, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def zip_that_promises(path: Path, n_bytes: int) -> Path:
    """An ``.npz`` file of a few bytes whose directory and array promise ``n_bytes`` of zeros."""
    header = npy((n_bytes // 48, 4, 4, 3))
    npz(path, images=header + bytes(48))
    data = path.read_bytes()
    size = struct.pack("<I", len(header) + 48)
    path.write_bytes(data.replace(size, struct.pack("<I", len(header) + n_bytes)))
    return path


def tar_member(name: str, size: int, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member of a tar file whose header promises ``size`` bytes, whatever follows."""
    member = tarfile.TarInfo(name)
    member.type = kind
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else (2**96 + size).to_bytes(12, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * ord(" "))
    return bytes(header) + content + bytes(-len(content) % 512)


def whole(name: str, content: bytes) -> bytes:
    return tar_member(name, len(content), content)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG image whose header promises a size, with hardly any pixels, and with more chunks before them."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress(bytes(2**10)))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in (header, *chunks, pixels, (b"IEND", b""))]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sparse(path: Path, n_bytes: int, beginning: bytes = b"") -> Path:
    """A file of ``n_bytes``, of which nearly none are on the disk."""
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(n_bytes)
    return path


def nested(depth: int = 10**5) -> str:
    return "[" * depth


def images_of(probe_set: Any) -> dict[str, tuple[bytes, int | None]]:
    """The pixels and the label of each image, by name."""
    labels = [None] * probe_set.n_images if probe_set.labels is None else probe_set.labels.tolist()
    pixels = [image.tobytes() for image in probe_set.images]
    return dict(zip(probe_set.names, zip(pixels, labels, strict=True), strict=True))
