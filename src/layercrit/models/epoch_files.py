"""Checkpoints of any training, by epoch: which file is of which, and how it is opened as the model that it became."""

import re
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path

from layercrit.errors import CheckpointError
from layercrit.models.checkpoints import look_beside
from layercrit.models.file_source import epochs_of
from layercrit.models.sources import parse, written

__all__ = ["EpochFiles", "as_epoch_of", "epoch_files"]

EpochFiles = str | Path | Iterable[str | Path] | Mapping[int, str | Path]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")  # of weight files in a folder
_NAMED = re.compile(r"(?:epoch|ep)[-_.= ]?([0-9]+)", re.IGNORECASE)
_GIVEN = re.compile(r"([0-9]+)=(.+)")
_LISTED = 8


def epoch_files(given: EpochFiles) -> dict[int, Path]:
    """Return the weight files of a training run by epoch, in order.

    A file's epoch is the number behind the word epoch in its name, as in ``epoch=12-step=300.ckpt``, or else the only
    number there. ``12=FILE`` says it where the name does not. Of a folder, the files count whose names have an epoch.

    Args:
        given: files, folders and patterns such as ``ckpt/epoch_*.pt``, comma-separated in a text; or epoch -> file.

    Raises:
        CheckpointError: there is no such file, a name has no epoch, or two files are of one epoch.
    """
    if isinstance(given, Mapping):
        pairs: Iterable[tuple[int, Path]] = ((int(epoch), Path(file).expanduser()) for epoch, file in given.items())
    else:
        pairs = (pair for text in _texts(given) for pair in _files_of(text))
    found: dict[int, Path] = {}
    for epoch, path in pairs:
        if not path.is_file():
            raise CheckpointError(f"There is no file {path} for epoch {epoch}. {look_beside(path)}")
        if found.setdefault(epoch, path) != path:
            raise CheckpointError(
                f"Two files are of epoch {epoch}: {found[epoch]} and {path}. Leave one out, or say which epochs they "
                f"are of: {epoch}={found[epoch]},...={path}."
            )
    if not found:
        raise CheckpointError("There is no weight file of any epoch. Expected some, such as 'ckpt/epoch_*.pt'.")
    return dict(sorted(found.items()))


def as_epoch_of(model: str, file: Path) -> str:
    """Return a reference to a weight file that is read as a model is: of its architecture, with its options.

    Args:
        model: reference of the trained model.
        file: weights of the same training.

    Raises:
        LayercritError: the reference is unknown, or a file's architecture is not given.
    """
    source, rest, options = parse(model)
    of_weights = {name: one for name, one in options.items() if source.kind == "file" and name in ("key", "prefix")}
    architecture, others = source.architecture(rest, dict(options))
    kept = {name: value for name, value in others.items() if name not in ("seed", "pretrained")}
    return f"file:{file}{written({**kept, **of_weights, 'arch': architecture})}"


def _texts(given: str | Path | Iterable[str | Path]) -> list[str]:
    if isinstance(given, Path):
        return [str(given)]
    if not isinstance(given, str):
        return [str(one) for one in given]
    whole = Path(given).expanduser()
    return [given] if whole.exists() else [text.strip() for text in given.split(",") if text.strip()]


def _files_of(text: str) -> Iterator[tuple[int, Path]]:
    """Yield the epochs and files that one text means."""
    path = Path(text).expanduser()
    said = _GIVEN.fullmatch(text)
    if said and not path.exists():
        yield int(said[1]), Path(said[2]).expanduser()
    elif path.is_dir():
        yield from _of_folder(path)
    elif not path.exists() and any(sign in text for sign in "*?["):
        found = sorted(glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
        files = [one for one in map(Path, found) if one.is_file()]
        if not files:
            raise CheckpointError(f"No file is named like {text}. {look_beside(path)}")
        yield from ((_epoch_in(one), one) for one in files)
    elif path.is_file():
        yield _epoch_in(path), path
    else:
        raise CheckpointError(
            f"There is no file {path}. {look_beside(path)} Expected epochs as 'all', as numbers such as '0,2,5', or as "
            "weight files: 'ckpt/epoch_*.pt', a folder, or '0=first.pt,5=last.pt'."
        )


def _of_folder(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield what a training run has kept, or else the weight files in a folder whose names have an epoch."""
    if kept := epochs_of(folder):
        yield from kept.items()
        return
    files = sorted(one for one in folder.iterdir() if one.suffix in _SUFFIXES and one.is_file())
    named = [one for one in files if _epochs_in(one)]
    if not named:
        there = ", ".join(one.name for one in files[:_LISTED]) or "no weight file"
        raise CheckpointError(
            f"No weight file in {folder} has an epoch in its name, such as epoch-5.pt. It contains: {there}. Say which "
            f"epochs they are of: 0={folder}/FILE,5={folder}/FILE."
        )
    yield from ((_epoch_in(one), one) for one in named)


def _epoch_in(file: Path) -> int:
    """Return the epoch in the name of a file."""
    found = _epochs_in(file)
    if len(found) != 1:
        numbers = f"several numbers ({', '.join(map(str, found))})" if found else "no number"
        raise CheckpointError(
            f"The name of {file} has {numbers}; expected one epoch, as in epoch-5.pt. Say which it is of: 5={file}."
        )
    return found[0]


def _epochs_in(file: Path) -> list[int]:
    """Return the numbers in the name of a file that may be its epoch."""
    name = file.name.removesuffix(file.suffix)
    return [int(number) for number in _NAMED.findall(name)[:1] or re.findall(r"[0-9]+", name)]
