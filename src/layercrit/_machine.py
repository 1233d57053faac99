"""What this machine offers: devices, memory, number formats, versions."""

import contextlib
import platform
from importlib import metadata

import torch

from layercrit.errors import ProtocolError
from layercrit.probes import ProbeSet


def find_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is a GPU if there is one.

    Raises:
        ProtocolError: it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ProtocolError(f"The device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def choose_batch_size(asked: int | str, probe_set: ProbeSet, device: torch.device) -> int:
    """Return how many images to run at once."""
    if isinstance(asked, int):
        return min(asked, probe_set.n_images)
    height, width = probe_set.preprocessing.height, probe_set.preprocessing.width
    at_224 = 16 if device.type == "cpu" else 256  # measured: benchmarks/replay.py --batch-sizes
    return max(1, min(at_224 * 224 * 224 // (height * width), 512, probe_set.n_images))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16 products, rather than emulating them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; torch has no class of its own for this on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = ("layercrit", "torch", "torchvision", "timm", "transformers", "numpy", "pillow")
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {"python": platform.python_version(), **found}
