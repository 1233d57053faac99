"""Decode the images that are drawn from a source: in the order of a seed, without those that cannot be read."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import numpy as np
from PIL import Image

from layercrit.errors import ProbeError
from layercrit.probes.images import Pixels, Preprocessing, decoded, decoded_bytes, read_header
from layercrit.probes.pixels import PixelStore
from layercrit.probes.sources import ImageSource, Item
from layercrit.seeds import image_order_seed

__all__ = ["Draw", "Progress", "check_settings", "order_of"]

_LARGE = 2**28  # bytes of an image, decoded, or of files read ahead
Progress = Callable[[int, int], None]  # called with the number of images decoded so far, and of those wanted


def order_of(n_items: int, seed: int) -> list[int]:
    """Return the numbers below ``n_items`` in the order of ``seed``.

    Sorted by the raw words of the bit generator, which NumPy promises never to change, unlike its permutations.
    """
    words = np.random.PCG64(image_order_seed(seed)).random_raw(n_items)
    return [int(index) for index in np.argsort(words, kind="stable")]


def check_settings(n_images: int | None, max_unreadable: float, n_threads: int | None) -> None:
    """Check what a draw is asked for.

    Raises:
        ProbeError: a number is not positive, or a share not in [0, 1].
    """
    if n_images is not None and n_images < 1:
        raise ProbeError(f"n_images must be a positive number, or None for all images; got {n_images}.")
    if not 0 <= max_unreadable <= 1:
        raise ProbeError(f"max_unreadable must be a share in [0, 1]; got {max_unreadable}.")
    if n_threads is not None and n_threads < 1:
        raise ProbeError(f"n_threads must be a positive number, or None; got {n_threads}.")


@dataclass
class Draw:
    """A draw in progress: decodes images in order, and counts those that cannot be read.

    Attributes:
        kept: index in the source of each image in the store.
        skipped: name and reason of each unreadable image, in the order of the draw.
        unchanged: index in the source of each image that its corruptions leave as it is.
    """

    source: ImageSource
    preprocessing: Preprocessing
    seed: int
    max_unreadable: float
    n_threads: int
    progress: Progress | None
    kept: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)

    def fill(self, store: PixelStore, order: Sequence[int]) -> None:
        """Put the first readable images of ``order`` into ``store``, as many as it holds or as there are."""
        tried = 0
        while len(self.kept) < len(store) and tried < len(order):
            candidates = order[tried : tried + len(store) - len(self.kept)]
            tried += len(candidates)
            self._try(store, candidates)
            self._check_share(len(store), len(order))
        if not self.kept:
            raise ProbeError(f"No image in '{self.source.description}' can be read: {self._examples()}.")

    def _try(self, store: PixelStore, candidates: Sequence[int]) -> None:
        """Decode ``candidates`` behind the images in ``store``, and close the gaps that unreadable ones leave."""
        first = len(self.kept)
        slots = {index: first + position for position, index in enumerate(candidates)}
        n_written = 0
        reasons: dict[int, str] = {}
        # Sorted, so that shards are read from front to back whatever the order of the draw.
        for item, pixels in self._decoded(sorted(candidates)):
            if isinstance(pixels, str):
                reasons[item.index] = pixels
                continue
            store.write(slots[item.index], pixels)
            n_written += 1
            if self.progress is not None:
                self.progress(first + n_written, len(store))
        for index in candidates:
            if index in reasons:
                self.skipped.append(f"{self.source.name(index)}: {reasons[index]}")
                continue
            if slots[index] != len(self.kept):
                store.move(slots[index], len(self.kept))
            self.kept.append(index)

    def _decoded(self, indices: Sequence[int]) -> Iterator[tuple[Item, Pixels | str]]:
        """Yield images in order with their pixels, or with the reason why there are none."""
        waiting: deque[tuple[Item, Future[Pixels | str]]] = deque()
        n_bytes, one_large = 0, RLock()
        with ThreadPoolExecutor(self.n_threads, thread_name_prefix="layercrit-decode") as pool:
            for item in self.source.read(indices):
                waiting.append((item, pool.submit(self._pixels_or_reason, item, one_large)))
                n_bytes += _encoded_bytes(item)
                while len(waiting) > 4 * self.n_threads or (n_bytes > _LARGE and waiting):
                    done, future = waiting.popleft()
                    n_bytes -= _encoded_bytes(done)
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _pixels_or_reason(self, item: Item, one_large: RLock) -> Pixels | str:
        """Return the pixels of an image, corrupted if that is asked for, or why it has none."""
        clean = _pixels_or_reason(item.content, self.preprocessing, one_large)
        if isinstance(clean, str) or not self.source.corruptions:
            return clean
        pixels = clean
        for corruption in self.source.corruptions:
            pixels = corruption(pixels, self.seed, self.source.name(item.index))
        if np.array_equal(pixels, clean):
            self.unchanged.append(item.index)
        return pixels

    def _check_share(self, n_wanted: int, n_items: int) -> None:
        n_tried = min(n_wanted + len(self.skipped), n_items)  # when each failure so far will have been replaced
        if len(self.skipped) / n_tried > self.max_unreadable:
            raise ProbeError(
                f"{len(self.skipped)} of {n_tried} images of '{self.source.description}' are unreadable, more than "
                f"max_unreadable={self.max_unreadable:g} allows: {self._examples()}. Repair or remove them, or raise "
                "max_unreadable."
            )

    def _examples(self) -> str:
        more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
        return "; ".join(self.skipped[:3]) + more


def _encoded_bytes(item: Item) -> int:
    return len(item.content) if isinstance(item.content, bytes) else 0


def _pixels_or_reason(
    content: Path | bytes | Image.Image | Pixels | Exception, model: Preprocessing, one_large: RLock
) -> Pixels | str:
    """Return the pixels ``(channels, height, width)`` of one image, or why it has none.

    Args:
        content: the image.
        model: how it becomes pixels.
        one_large: held while a large image is decoded, so that many of them do not fill the memory.
    """
    if isinstance(content, Exception):
        return f"{content}"
    try:
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content)
            return model.at_size(image) if content.shape[:2] == (model.height, model.width) else model(image)
        if isinstance(content, Image.Image):
            return model(content)
        n_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        with one_large if n_bytes > _LARGE else nullcontext():
            image = read_header(content)
            with one_large if decoded_bytes(image) > _LARGE else nullcontext():
                return model(decoded(image))
    except MemoryError:
        raise
    except Exception as error:  # decoders answer damaged files with errors of almost any type
        return f"{error}" or type(error).__name__
