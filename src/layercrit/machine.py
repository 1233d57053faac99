"""This machine: devices, memory, number formats, versions."""

import contextlib
import functools
import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from layercrit.errors import ProtocolError

PACKAGES = ("layercrit", "torch", "torchvision", "timm", "transformers", "numpy", "pillow")
"""The packages that results depend on, apart from plug-ins."""

_BFLOAT16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # functions of torch.cpu
# What allocators of the CPU and of GPUs say, and oneDNN, whose other errors name a primitive descriptor.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED"
    r"|could not create a (memory object|primitive(?! descriptor))"
)


def find_device(name: str) -> torch.device:
    """Return the device of that name, with its number; ``auto`` is a GPU if there is one.

    Raises:
        ProtocolError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # which 'meta' cannot
    except (RuntimeError, AssertionError, TypeError) as error:
        usable = "'auto', 'cpu' and 'cuda'" if torch.cuda.is_available() else "'auto' and 'cpu'"
        reason = f"{error}".splitlines()[0]
        raise ProtocolError(f"The device {name!r} cannot be used: {reason}. Available here: {usable}.") from error
    return probe.device


def name_of(device: torch.device) -> str:
    """Return how a device is called, such as ``cpu`` or ``cuda:0, NVIDIA H100 80GB HBM3``."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def choose_batch_size(
    asked: int | str, n_images: int, height: int, width: int, device: torch.device, n_again: int = 0
) -> int:
    """Return how many images to run at once; ``auto`` divides the images into batches of nearly the same size.

    Args:
        asked: a number, or ``auto``.
        n_images: how many images there are.
        height: of an image, in pixels.
        width: likewise.
        device: what runs them.
        n_again: how many of them are also run on their own, so that their last batch should be nearly full, too.
    """
    if isinstance(asked, int):
        return min(asked, n_images)
    # On a CPU, activations of 16 images of 224 x 224 pixels stay in its cache. From 128 small images on, the calls that
    # a batch takes are a tenth of its time; more images would only take activations out of the cache. A GPU is kept
    # busy by 512.
    at_224, at_most = (16, 128) if device.type == "cpu" else (512, 4096)
    largest = min(max(1, at_224 * 224 * 224 // (height * width)), at_most, n_images)
    if n_again == 0:
        return math.ceil(n_images / math.ceil(n_images / largest))
    # what fills the last batches is run as well, and a batch's calls take the time of so many images
    calls = largest / 10
    return min(
        range(largest, largest // 2, -1),
        key=lambda size: sum(math.ceil(n / size) * (size + calls) for n in (n_images, n_again)),
    )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16 products, rather than emulating them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and any(getattr(torch.cpu, name)() for name in _BFLOAT16 if hasattr(torch.cpu, name))


def tells_of_bfloat16(device: torch.device) -> bool:
    """Return whether torch can tell what `multiplies_bfloat16` asks; torch 2.4 cannot for processors."""
    return device.type != "cpu" or any(hasattr(torch.cpu, name) for name in _BFLOAT16)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; torch has no class of its own for this on the CPU."""
    said = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    return said or isinstance(error, MemoryError)


def available_memory() -> int | None:
    """Return the bytes of memory that this process may still take; None where the system does not say."""
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container, or a job of a cluster
        with contextlib.suppress(OSError, ValueError):  # the latter where it has no limit: "max"
            limits.append(int((Path("/sys/fs/cgroup") / file).read_text(encoding="ascii")))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # what systems without it raise
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {"python": platform.python_version(), **found}


@functools.cache  # reading what is installed takes longer than a small measurement's trial
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
