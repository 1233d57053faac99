"""Where the pixels of a probe set are stored: in memory, in a temporary file, or in a file that is kept."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from layercrit.errors import DISK_FULL, ProbeError
from layercrit.probes.images import Pixels

_MANY_COPIES = 0.01  # share of the images from which on copies are mentioned


class KeptPixels:
    """uint8 images of one shape in a ``.npy`` file; a pickled copy, as for another process, reads the same file."""

    def __init__(self, path: Path) -> None:
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ProbeError(
                f"{path} cannot be read as images ({error}). Delete it to have them decoded again."
            ) from error
        self.shape: tuple[int, ...] = images.shape
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ProbeError(
                f"{path} contains {images.dtype} {self.shape}; expected uint8 (n_images, channels, height, width). "
                "Delete it to have the images decoded again."
            )
        self._images: Pixels = images
        self._path, self._offset = path, int(images.offset)

    def __reduce__(self) -> tuple[type["KeptPixels"], tuple[Path]]:
        return type(self), (self._path,)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Pixels:
        """Return a copy of images ``start`` to ``stop``; read, not mapped, so that no page stays with the process."""
        size = math.prod(self.shape[1:])
        flat = np.fromfile(self._path, np.uint8, count=(stop - start) * size, offset=self._offset + start * size)
        return flat.reshape(stop - start, *self.shape[1:])

    def first(self, n_images: int) -> Pixels:
        """Return a read-only view of the first images."""
        return self._images[:n_images]


class PixelStore:
    """uint8 images of one shape, in memory, or in a temporary file that is removed with this object.

    A pickled copy, as for another process, reads the same file and leaves its removal to the original.
    """

    def __init__(self, shape: tuple[int, ...], memory_limit: int) -> None:
        self.shape = shape
        in_memory = math.prod(shape) <= memory_limit
        self._array = np.zeros(shape if in_memory else 0, np.uint8)
        self._path = None if in_memory else self._temporary_file()

    def __len__(self) -> int:
        return self.shape[0]

    def _temporary_file(self) -> Path:
        if shutil.disk_usage(tempfile.gettempdir()).free < math.prod(self.shape):
            raise self._disk_full()
        handle, name = tempfile.mkstemp(prefix="layercrit-probes-")
        os.close(handle)
        weakref.finalize(self, _remove, Path(name), os.getpid())
        return Path(name)

    def write(self, slot: int, image: Pixels) -> None:
        """Put one image into ``slot``."""
        if self._path is None:
            self._array[slot] = image
            return
        try:
            # Written, not mapped: a full disk is then an error and not the death of the process.
            with self._path.open("r+b") as file:
                file.seek(slot * image.nbytes)
                file.write(image.data)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise self._disk_full() from error
            raise

    def read(self, start: int, stop: int) -> Pixels:
        """Return a copy of images ``start`` to ``stop``."""
        if self._path is None:
            return self._array[start:stop].copy()
        size = math.prod(self.shape[1:])
        flat = np.fromfile(self._path, np.uint8, count=(stop - start) * size, offset=start * size)
        return flat.reshape(stop - start, *self.shape[1:])

    def move(self, slot: int, to: int) -> None:
        """Copy the image in ``slot`` to another."""
        self.write(to, self.read(slot, slot + 1)[0])

    def first(self, n_images: int) -> Pixels:
        """Return a read-only view of the first images."""
        if self._path is not None:
            return np.memmap(self._path, np.uint8, mode="r", shape=(n_images, *self.shape[1:]))
        view = self._array[:n_images]
        view.flags.writeable = False
        return view

    def _disk_full(self) -> ProbeError:
        return ProbeError(
            f"There is not enough space in '{tempfile.gettempdir()}' for {len(self)} images, which need "
            f"{math.prod(self.shape) / 2**30:.3g} GiB. Use fewer images (n_images), set TMPDIR to a larger disk, or "
            "allow more in memory (memory_limit)."
        )


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it, where this object goes earlier
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
            path.unlink(missing_ok=True)


def about_copies(store: PixelStore, n_images: int) -> list[str]:
    """Return what the user should know where many of the first images equal one before them, in words."""
    step = max(1, 2**24 // math.prod(store.shape[1:]))
    seen: set[bytes] = set()
    for start in range(0, n_images, step):
        for image in store.read(start, min(start + step, n_images)):
            seen.add(hashlib.blake2b(image.data, digest_size=16).digest())
    n_same = n_images - len(seen)
    if n_same < _MANY_COPIES * n_images:
        return []
    return [
        f"{n_same:,} of the {n_images:,} images are copies of others, pixel by pixel: means weigh those images more, "
        "and intervals, which count copies as images, are too narrow"
    ]


def digest_of(store: PixelStore | KeptPixels, n_images: int, labels: npt.NDArray[np.int64] | None) -> str:
    """Return the hash of a probe set: of the pixels of its images, their shape, and their labels if there are any."""
    shape = (n_images, *store.shape[1:])
    digest = hashlib.sha256(json.dumps({"shape": shape, "labels": labels is not None}).encode())
    step = max(1, 2**24 // math.prod(store.shape[1:]))
    for start in range(0, n_images, step):
        digest.update(store.read(start, min(start + step, n_images)).data)
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
