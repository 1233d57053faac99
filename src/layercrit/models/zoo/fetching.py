"""The zoo: published checkpoints under one identifier each, read safely and kept in one format.

What is known about a checkpoint is declared in ``zoo.toml``: where its files are, how their names become those of the
architecture, how its images are normalised, its category, documented accuracy, licence and citation. `fetch_entry`
downloads the files, reads them without running any code (`layercrit.models.checkpoints`), and keeps the weights as
``ID.safetensors`` with their provenance in ``ID.json``; ``zoo:ID`` opens these and nothing else, and never downloads.
"""

import fnmatch
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock
from torch import Tensor

import layercrit.models.hubs  # noqa: F401 - it registers the kinds of references that name the architectures
from layercrit.counts import counted
from layercrit.errors import CheckpointError, ModelError, ZooError, near
from layercrit.foreign_files import read_json
from layercrit.machine import versions
from layercrit.models.checkpoints import Checkpoint, read_checkpoint
from layercrit.models.fitting import fit_to
from layercrit.models.model import Model
from layercrit.models.sources import Progress, open_reference
from layercrit.models.zoo.downloads import Fetched, check_file, fetch
from layercrit.models.zoo.entries import ZooEntry, read_zoo
from layercrit.seeds import Undrawn

__all__ = ["ZOO", "fetch_entry", "find_entries", "find_entry", "is_fetched", "open_entry", "open_zoo_file"]


class _Zoo(Mapping[str, ZooEntry]):
    """All entries by identifier, read when first asked for."""

    @cached_property
    def _entries(self) -> dict[str, ZooEntry]:
        return read_zoo(resources.files(__package__).joinpath("zoo.toml").read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> ZooEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


ZOO: Mapping[str, ZooEntry] = _Zoo()
"""The published checkpoints by identifier, in the order of ``zoo.toml``."""


def find_entry(name: str) -> ZooEntry:
    """Return the entry of an identifier.

    Raises:
        ZooError: there is no such entry.
    """
    if name not in ZOO:
        raise ZooError(f"The zoo has no model {name!r}. {near(name, ZOO)} `layercrit zoo list` shows all.")
    return ZOO[name]


def find_entries(pattern: str) -> list[ZooEntry]:
    """Return the entries whose identifier matches a shell pattern such as ``robust_*``, in the zoo's order.

    Raises:
        ZooError: no identifier matches.
    """
    found = [entry for name, entry in ZOO.items() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise ZooError(f"The zoo has no model {pattern!r}. {near(pattern, ZOO)} `layercrit zoo list` shows all.")
    return found


def open_zoo_file(entry: ZooEntry, paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """Read the published files of an entry, without running any code, as weights of its architecture.

    Args:
        entry: the entry whose files they are.
        paths: the files in the order of ``entry.files``.

    Returns:
        tensors by the architecture's names, in its order, ready for ``load_state_dict(strict=True)``.

    Raises:
        CheckpointError: a file is unreadable or unsafe, the names or shapes do not match exactly after the rules, two
            tensors have one name, or a value is not finite.
    """
    return _converted(entry, _read(entry, paths))


def _read(entry: ZooEntry, paths: Sequence[str | Path]) -> list[Checkpoint]:
    if len(paths) != len(entry.files):
        wanted = "\n".join(f"  {file.address}" for file in entry.files)
        raise CheckpointError(
            f"zoo:{entry.id} consists of {counted(len(entry.files), 'file')}, but {len(paths)} were given. Give the "
            f"files from these addresses, in this order:\n{wanted}"
        )
    return [read_checkpoint(path, file.key) for path, file in zip(paths, entry.files, strict=True)]


def _converted(entry: ZooEntry, checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """Join the files by the entry's rules and match them with the architecture; `open_zoo_file` says what raises."""
    joined: dict[str, Tensor] = {}
    for file, checkpoint in zip(entry.files, checkpoints, strict=True):
        if checkpoint.odd:
            shown = ", ".join(f"{name!r} ({kind})" for name, kind in [*checkpoint.odd.items()][:5])
            raise CheckpointError(
                f"zoo:{entry.id}: {len(checkpoint.odd)} entries between the weights of {checkpoint.path} are no "
                f"tensors, such as {shown}. The file's layout has changed since the zoo's rules were written."
            )
        tensors = file.renamed(checkpoint.tensors)
        if twice := sorted(joined.keys() & tensors.keys()):
            raise CheckpointError(
                f"zoo:{entry.id}: {len(twice)} names are in more than one of its files, such as {twice[0]!r}, so it is "
                "unclear which values to use. Check the order of the files."
            )
        joined |= tensors
    source = f"zoo:{entry.id} from {', '.join(str(checkpoint.path) for checkpoint in checkpoints)}"
    fitted = fit_to(joined, _places(entry.architecture), f"{source} for {entry.architecture}")
    broken = [name for name, tensor in fitted.items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} tensors contain NaN or infinity, such as {broken[0]!r}. Download the files again."
        )
    return fitted


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum with such a value is not finite either, and summing is far faster than looking at each.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


@functools.cache
def _places(architecture: str) -> dict[str, Tensor]:
    """The tensors of an architecture, those of parameters without values; nearly all entries share one architecture."""
    with Undrawn():
        state = open_reference(architecture, {"pretrained": False}).network.state_dict()
    return {name: tensor.to("meta") if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _untrained(entry: ZooEntry, options: Mapping[str, Any]) -> Model:
    """The entry's architecture with fresh weights, and with the entry's normalisation and image geometry."""
    model = open_reference(entry.architecture, {**options, "pretrained": False})
    return replace(
        model, reference=f"zoo:{entry.id}", mean=entry.mean, std=entry.std, preprocessing=entry.preprocessing
    )


def is_fetched(entry: ZooEntry) -> bool:
    """Whether the weights of an entry and their provenance are in the cache; their hash is checked when opened."""
    return entry.path.is_file() and entry.provenance_path.is_file()


def fetch_entry(
    entry: ZooEntry | str, *, given: Sequence[str | Path] | None = None, progress: Progress | None = None
) -> Path:
    """Download and convert an entry's weights, unless they are cached intact.

    The SHA-256 of each published file is recorded the first time, and enforced from then on. Downloaded files
    are removed once they are converted or refused; the part of an interrupted download is kept.

    Args:
        entry: what to download, or its identifier.
        given: files that were downloaded by other means, in the order of ``entry.files``; works offline, and replaces
            cached weights.
        progress: called as bytes arrive.

    Returns:
        the converted file.

    Raises:
        ZooError: a file cannot be downloaded, or is not the one it was the first time.
        CheckpointError: see `open_zoo_file`.
    """
    if isinstance(entry, str):
        entry = find_entry(entry)
    raw = entry.path.parent / "raw" / entry.id
    try:
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.path.with_suffix(".lock")):
            if given is None and is_fetched(entry) and _damage(entry) is None:
                return entry.path
            hashes = [known or file.sha256 for known, file in zip(_recorded(entry, "sha256"), entry.files, strict=True)]
            paths = [Path(path) for path in given] if given is not None else _fetched(entry, raw, hashes, progress)
            try:
                _convert(entry, paths, hashes)
            finally:
                shutil.rmtree(raw, ignore_errors=True)
    except OSError as error:
        raise ZooError(
            f"{entry.path.parent} cannot be written ({error.strerror or error}). Free some space, or choose another "
            "folder with LAYERCRIT_CACHE."
        ) from error
    return entry.path


def _fetched(entry: ZooEntry, folder: Path, hashes: Sequence[str | None], progress: Progress | None) -> list[Path]:
    paths = []
    sizes = _recorded(entry, "size")
    for number, (file, sha256, size) in enumerate(zip(entry.files, hashes, sizes, strict=True)):
        words = entry.id if len(entry.files) == 1 else f"{entry.id} ({number + 1} of {len(entry.files)})"
        report = None if progress is None else lambda done, total, words=words: progress(words, done, total)
        size = size if isinstance(size, int) else None  # the record may have been edited
        paths.append(fetch(file.address, folder / str(number), size=size, sha256=sha256, progress=report).path)
    return paths


def _convert(entry: ZooEntry, paths: Sequence[Path], hashes: Sequence[str | None]) -> None:
    """Convert the published files and store the result; each file is moved into place complete, the provenance last."""
    checkpoints = _read(entry, paths)
    sources = []
    for file, checkpoint, expected in zip(entry.files, checkpoints, hashes, strict=True):
        fetched = Fetched(checkpoint.path, checkpoint.path.stat().st_size, checkpoint.sha256)
        try:
            check_file(fetched, file.address, None, expected)
        except ZooError as error:
            if not entry.provenance_path.exists():
                raise
            raise ZooError(
                f"{error} Or the file used the first time was wrong: its hash is in "
                f"{entry.provenance_path}. To start over, delete that file and run again."
            ) from error
        sources.append({**asdict(file), "size": fetched.size, "sha256": fetched.sha256})
    tensors = _converted(entry, checkpoints)
    partial = entry.path.with_suffix(".partial")
    try:
        safetensors.torch.save_file(tensors, partial, metadata={"format": "pt"})
        provenance = {
            "id": entry.id,
            "arch": entry.architecture,
            "sha256": read_checkpoint(partial).sha256,
            "files": sources,
            "licence": entry.licence,
            "citation": asdict(entry.citation),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        partial.replace(entry.path)
        partial.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        partial.replace(entry.provenance_path)
    finally:
        partial.unlink(missing_ok=True)


def _provenance(entry: ZooEntry) -> dict[str, Any] | None:
    """What was recorded when the entry was downloaded; None if nothing was, or if it is unreadable."""
    try:
        provenance = read_json(entry.provenance_path)
    except (OSError, ValueError):
        return None
    return provenance if isinstance(provenance, dict) else None


def _recorded(entry: ZooEntry, key: str) -> list[Any]:
    """What was recorded of each published file the first time; None where nothing was."""
    files = (_provenance(entry) or {}).get("files", [])
    known = {file.get("address"): file.get(key) for file in files if isinstance(file, dict)}
    return [known.get(file.address) for file in entry.files]


def _damage(entry: ZooEntry) -> str | None:
    """Say what is wrong with the cached weights; None if nothing is."""
    try:
        _stored(entry)
    except CheckpointError as error:
        return str(error)
    return None


def _stored(entry: ZooEntry) -> dict[str, Tensor]:
    """The cached weights, checked against the hash that was recorded with them."""
    checkpoint = read_checkpoint(entry.path)
    expected = (_provenance(entry) or {}).get("sha256")
    if checkpoint.sha256 != expected:
        raise CheckpointError(
            f"{entry.path} has changed since it was written: its SHA-256 is {checkpoint.sha256}, "
            f"{entry.provenance_path.name} says {expected}. Download it again with `layercrit zoo fetch {entry.id}`."
        )
    return checkpoint.tensors


def open_entry(entry: ZooEntry, options: dict[str, Any]) -> Model:
    """Open a downloaded entry, or with ``pretrained`` false its architecture with fresh weights.

    Raises:
        ModelError: the weights are not cached.
        CheckpointError: they have changed since they were downloaded.
    """
    pretrained = options.pop("pretrained", True)
    if pretrained and not is_fetched(entry):
        raise ModelError(
            f"The weights of zoo:{entry.id} are not downloaded ({entry.path}). Download them with "
            f"`layercrit zoo fetch {entry.id}`, or add '?pretrained=false' for an untrained network."
        )
    if not pretrained:
        return _untrained(entry, options)
    with Undrawn():
        model = _untrained(entry, options)
    tensors = fit_to(_stored(entry), model.network.state_dict(), f"{entry.path} for {model.architecture}")
    model.network.load_state_dict(tensors)
    return model
