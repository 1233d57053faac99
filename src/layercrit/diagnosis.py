"""What of an installation and its machine works, what is slower than it could be, and what is wrong."""

import contextlib
import getpass
import importlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from layercrit.counts import counted
from layercrit.errors import LayercritError, first_line

if TYPE_CHECKING:
    from torch import nn

# torch is imported inside the checks: a broken one is to be reported.

__all__ = ["EXTRAS", "Finding", "anonymous", "diagnose"]

EXTRAS = {
    "hf": "models and images of the Hugging Face hub",
    "corrupt": "fog, snow and other corruptions of images",
    "action": "which channels have to be pruned together",
    "train": "training",
    "track": "experiment trackers",
    "ray": "studies on a Ray cluster",
    "slurm": "studies as jobs of SLURM",
}
"""The extras of the package, apart from that of its tests, and what each is for."""

_SHOWN = ("torch", "torchvision", "timm", "numpy")  # of what layercrit requires; the others only if something is wrong
_GB = 1e9
_LITTLE_MEMORY, _LITTLE_SPACE, _NO_SPACE = 2 * _GB, 5 * _GB, 0.1 * _GB  # bytes
_SECONDS_TO_COUNT = 1.0  # the size of a cache
_SIZE = 8  # of images, in pixels
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, or a job of a cluster


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        topic: what it belongs to, such as ``machine``.
        name: what was looked at.
        state: ``ok``; ``note``: layercrit works, but slower or without something; ``problem``: something does not work.
        found: what was found.
        advice: what to do about it; empty where there is nothing to do.
    """

    topic: str
    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


def diagnose() -> Iterator[Finding]:
    """Yield what each check finds; what comes after a torch that cannot be imported is left out."""
    yield Finding("software", "Python", "ok", f"{platform.python_version()}, {platform.python_implementation()}")
    yield from _packages()
    yield from _extras()
    try:
        import torch  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        yield Finding("software", "import torch", "problem", f"it cannot be imported ({first_line(error)})",
                      "Install it anew, as its own page says for this system.")  # fmt: skip
        return
    yield from _imports()
    yield from _plug_ins()
    yield from _machine()
    yield from _devices()
    yield from _engine()
    yield from _measuring()
    yield from _places()


def anonymous(text: str) -> str:
    """Return text without the home directory and the name of the user, for a report that others read."""
    for home in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
        text = re.sub(re.escape(home) + r"(?![\w-])", "~", text, flags=re.IGNORECASE)
    with contextlib.suppress(Exception):  # what systems raise where a user has no name
        text = re.sub(rf"(?<![^\W_]){re.escape(getpass.getuser())}(?![^\W_])", "USER", text, flags=re.IGNORECASE)
    return text


# --- software ---------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Find the versions of layercrit and of what it requires."""
    yield Finding("software", "layercrit", "ok", metadata.version("layercrit"))
    for one in _requirements(None):
        wrong = _wrong(one)
        if wrong:
            yield Finding("software", one.name, "problem", wrong, f"pip install '{one.name}{one.specifier}'")
        elif one.name in _SHOWN:
            yield Finding("software", one.name, "ok", metadata.version(one.name))


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        needed = list(_requirements(extra))
        absent = [one.name for one in needed if _version(one) is None]
        wrong = [f"not installed: {', '.join(absent)}"] if absent else []
        wrong += [text for one in needed if one.name not in absent and (text := _wrong(one))]
        if wrong:
            found = f"without {purpose}; {'; '.join(wrong)}"
            yield Finding("software", f"[{extra}]", "note", found, f"pip install 'layercrit[{extra}]'")
        elif needed:
            names = ", ".join(f"{one.name} {metadata.version(one.name)}" for one in needed)
            yield Finding("software", f"[{extra}]", "ok", names)
        else:
            found = f"without {purpose}, which Python {platform.python_version()} is too old for"
            yield Finding("software", f"[{extra}]", "note", found)


def _requirements(extra: str | None) -> Iterator[Requirement]:
    """Yield what layercrit requires here, or what one of its extras adds."""
    for one in map(Requirement, metadata.requires("layercrit") or ()):
        always = one.marker is None or one.marker.evaluate({"extra": ""})
        if always if extra is None else not always and one.marker and one.marker.evaluate({"extra": extra}):
            yield one


def _version(one: Requirement) -> str | None:
    """Return the version of a package that is installed; None if it is not."""
    try:
        return metadata.version(one.name)
    except metadata.PackageNotFoundError:
        return None


def _wrong(one: Requirement) -> str:
    """Say what is wrong with an installed package; nothing if it meets a requirement."""
    version = _version(one)
    if version is None:
        return f"{one.name} is not installed"
    if one.specifier.contains(version, prereleases=True):
        return ""
    return f"{one.name} is {version}, expected {one.specifier}"


def _imports() -> Iterator[Finding]:
    """Import what does not fit torch where the two are of different releases."""
    for name in ("torchvision", "timm"):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            yield Finding("software", f"import {name}", "problem", f"it cannot be imported ({first_line(error)})",
                          f"Install the release of {name} that fits this torch.")  # fmt: skip
            return


def _plug_ins() -> Iterator[Finding]:
    """Import the plug-ins, as the registries do."""
    groups = [name for name in sorted(metadata.entry_points().groups) if name.startswith("layercrit.")]
    found = [one for group in groups for one in metadata.entry_points(group=group)]
    for one in found:
        by = "" if one.dist is None else f" of {one.dist.name} {one.dist.version}"
        try:
            one.load()
        except (Exception, SystemExit) as error:  # whatever the code of others raises
            yield Finding("software", "plug-in", "problem", f"{one.value}{by} ({one.group}): {first_line(error)}",
                          "Update or uninstall it; its entries are left out.")  # fmt: skip
        else:
            yield Finding("software", "plug-in", "ok", f"{one.value}{by} ({one.group})")
    if not found:
        yield Finding("software", "plug-ins", "ok", "none")


# --- machine ----------------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    import torch

    from layercrit.machine import available_memory

    yield Finding("machine", "system", "ok", f"{platform.platform()}, {platform.machine()}")
    cores, threads = _n_cores(), torch.get_num_threads()
    found = f"{cores} usable, torch uses {counted(threads, 'thread')}"
    if threads > cores:
        advice = f"Threads wait for each other: set OMP_NUM_THREADS={cores}."
    elif threads < cores and "OMP_NUM_THREADS" in os.environ:
        advice = f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}: unset it to use all of them."
    else:
        advice = ""
    yield Finding("machine", "cores", "note" if advice else "ok", found, advice)
    memory = available_memory()
    if memory is None:
        yield Finding("machine", "memory", "ok", "this system does not say")
    elif memory < _LITTLE_MEMORY:
        yield Finding("machine", "memory", "note", f"{memory / _GB:.1f} GB available",
                      "Close other programs, or lower --batch-size.")  # fmt: skip
    else:
        yield Finding("machine", "memory", "ok", f"{memory / _GB:.1f} GB available")


def _n_cores() -> int:
    """Return how many cores this process may keep busy: fewer than there are, in a container or a job."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # the latter where there is no limit: "max"
        quota, period = map(int, _QUOTA.read_text(encoding="ascii").split())
        n = min(n, max(1, round(quota / period)))
    return n


def _devices() -> Iterator[Finding]:
    import torch

    from layercrit.machine import find_device, multiplies_bfloat16, tells_of_bfloat16

    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        text = f"{about.name}, {about.total_memory / _GB:.0f} GB, compute capability {about.major}.{about.minor}"
        try:
            find_device(f"cuda:{number}")
        except LayercritError as error:
            yield Finding("machine", f"cuda:{number}", "problem", f"{text}: {error}",
                          "Install a torch that is built for this GPU and its driver.")  # fmt: skip
        else:
            yield Finding("machine", f"cuda:{number}", "ok", text)
    if not torch.cuda.device_count():
        yield _no_gpu()
    if torch.backends.mps.is_available():
        yield Finding("machine", "MPS", "note", "there; layercrit is not tested on it and takes the CPU unless asked",
                      "To try it: --device mps.")  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if multiplies_bfloat16(device):
        yield Finding("machine", "bfloat16", "ok", f"multiplied by the {_kind(device.type)}")
    elif not tells_of_bfloat16(device):
        release = torch.__version__.partition("+")[0]
        yield Finding("machine", "bfloat16", "note", f"torch {release} cannot tell; --dtype auto takes float32")
    else:
        yield Finding("machine", "bfloat16", "note",
                      f"emulated on this {_kind(device.type)}; --dtype auto takes float32")  # fmt: skip
    yield Finding("machine", "float16", "ok", "for `layercrit train --precision fp16`" if device.type == "cuda" else
                  "on GPUs only, for `layercrit train --precision fp16`")  # fmt: skip


def _kind(device: str) -> str:
    return {"cpu": "processor", "cuda": "GPU"}[device]


def _no_gpu() -> Finding:
    """Say why there is no GPU of CUDA: none in the machine, or one that torch cannot use."""
    import torch

    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia/version").exists():
        return Finding("machine", "GPU", "ok", "none: the processor measures")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return Finding("machine", "GPU", "note", "hidden by CUDA_VISIBLE_DEVICES", "Unset it to use the GPU.")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Finding("machine", "GPU", "problem", f"an NVIDIA driver is there, but torch, {built}, finds no GPU",
                   "Install a torch that is built for this driver (`nvidia-smi` shows its CUDA version).")  # fmt: skip


# --- engine -----------------------------------------------------------------------------------------------------------


def _engine() -> Iterator[Finding]:
    """Export a small network, replay it, and compare that with the network itself."""
    import torch

    from layercrit.engine import cudnn, onednn
    from layercrit.engine.opening import open_replay
    from layercrit.engine.replay import PlainReplay
    from layercrit.layers import find_layers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slower = "A slower backend measures. Install the release of torch that constraints.txt names, or report this."
    try:
        with _seeded():
            network, images = _small_network().to(device), torch.randn(4, 3, _SIZE, _SIZE, device=device)
        layers = find_layers(network, images)
        replay = open_replay(network, layers, images, "float32")
        plain = PlainReplay(network, layers).logits(images)
        difference = float((replay.logits(images) - plain).abs().max() / plain.abs().max())
    except Exception as error:  # whatever torch raises on this machine
        yield Finding("engine", "torch.export", "problem", f"a small network fails ({first_line(error)})", slower)
        return
    if difference > 1e-4:
        yield Finding("engine", "torch.export", "problem", f"logits differ by {difference:.1g} of the largest",
                      "Do not trust measurements here: report this with `layercrit doctor --json`.")  # fmt: skip
    elif replay.backend != "exported graph" or replay.note:
        yield Finding("engine", "torch.export", "note", replay.note or replay.backend, slower)
    else:
        yield Finding("engine", "torch.export", "ok", "a small network is exported and replayed as it is")
    if device.type == "cuda":
        works = {"convolutions": cudnn.convolutions_work(torch.float32, device)}
        name = "cuDNN"
    else:
        works = {"convolutions": onednn.convolutions_work(torch.float32),
                 "linear layers": onednn.linears_work(torch.float32)}  # fmt: skip
        name = "oneDNN"
    if missing := [what for what, does in works.items() if not does]:
        yield Finding("engine", name, "note", f"no fused {' and '.join(missing)}: measuring is slower")
    else:
        yield Finding("engine", name, "ok", f"fused {' and '.join(works)}")


def _measuring() -> Iterator[Finding]:
    """Measure a small network as `layercrit measure` does."""
    import torch

    from layercrit.measuring import measure

    try:
        with _seeded():
            images = torch.randint(256, (2, _SIZE, _SIZE, 3), dtype=torch.uint8).numpy()
            found = measure(_small_network(), images, trials=1, progress=False)
        known = found.to_pandas()["criticality"].between(0, 1)
    except Exception as error:  # whatever torch and the other packages raise on this machine
        yield Finding("engine", "measure", "problem", f"a small network fails ({first_line(error)})",
                      "Install the releases that constraints.txt names, or report this.")  # fmt: skip
        return
    if known.all():
        yield Finding("engine", "measure", "ok", f"the {len(known)} layers of a small network are measured")
    else:
        yield Finding("engine", "measure", "problem", f"{(~known).sum()} of {len(known)} layers of a small network "
                      "have no criticality", "Report this with `layercrit doctor --json`.")  # fmt: skip


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Inside, random numbers are always the same; afterwards they go on as if nothing had been drawn."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _small_network() -> "nn.Module":
    """Return a new network for images of ``_SIZE``."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * _SIZE**2, 5)
    ).eval()


# --- folders ----------------------------------------------------------------------------------------------------------


def _places() -> Iterator[Finding]:
    """Look at the folders that layercrit writes to."""
    import torch
    from huggingface_hub import constants

    from layercrit.models.zoo.downloads import cache_folder

    yield _place("current folder", Path.cwd(), "Name another folder with --out.")
    for name, path, variable in (
        ("cache", cache_folder(), "LAYERCRIT_CACHE"),
        ("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME"),
        ("torch cache", Path(torch.hub.get_dir()), "TORCH_HOME"),
    ):
        yield _place(name, path, f"Set {variable} to a folder that can be written.", size=True)
    if constants.HF_HUB_OFFLINE:
        yield Finding("folders", "network", "note", "HF_HUB_OFFLINE is set: nothing is downloaded from the hub")


def _place(name: str, path: Path, way_out: str, size: bool = False) -> Finding:
    """Say how much is in a folder, and whether it can be written and locked; it may not exist yet."""
    from layercrit.locks import has_locks, is_on_network

    there = next((one for one in (path, *path.parents) if one.is_dir()), None)
    parts = [str(path), _size_of(path) if path.is_dir() else "not there yet"] if size else [str(path)]
    try:
        if there is None:
            raise FileNotFoundError("no such disk")
        free = shutil.disk_usage(there).free
        parts.append(f"{free / _GB:.1f} GB free")
        locks = has_locks(there)
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or str(error)
        return Finding("folders", name, "problem", f"{', '.join(parts)}: it cannot be written ({why})", way_out)
    if free < _NO_SPACE:
        return Finding("folders", name, "problem", ", ".join(parts), f"Free some space. {way_out}")
    if not locks:
        parts.append("no file locks")
        return Finding("folders", name, "note", ", ".join(parts),
                       "A command that is killed leaves its lock: delete .lock-soft then.")  # fmt: skip
    parts += ["on a network"] * is_on_network(there)
    if free < _LITTLE_SPACE:
        return Finding("folders", name, "note", ", ".join(parts), "Models and images may need more space.")
    return Finding("folders", name, "ok", ", ".join(parts))


def _size_of(folder: Path) -> str:
    """Return how much is in a folder, as far as that can be counted in a second."""
    total, started = 0, time.monotonic()
    for where, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(where, file)).st_size  # noqa: PTH118
        if time.monotonic() - started > _SECONDS_TO_COUNT:
            return f"more than {total / _GB:.1f} GB in it"
    return f"{total / _GB:.1f} GB in it"
