"""Weight files as models: which file a path means, and which architecture its weights belong to."""

import re
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercrit.errors import CheckpointError, ModelError, first_line
from layercrit.foreign_files import read_json
from layercrit.models.checkpoints import Checkpoint, look_beside, read_checkpoint
from layercrit.models.fitting import fit
from layercrit.models.model import INPUT, Model
from layercrit.models.sources import ModelSource, model_source, open_reference, parse
from layercrit.seeds import Undrawn

__all__ = ["epochs_of", "named_by_user", "read_weights", "record_file", "training_run", "weight_file"]

# The functions that a file may name: others, of layercrit too, can do more than make a network.
_PY_OF_FILES = ("py:layercrit.demo:small_resnet",)

_UNDRAWN = ("timm", "torchvision")  # their networks compute nothing of fresh weights, which a user's might

_EPOCH = re.compile(r"epoch-(\d+)\.safetensors")  # weights that a training run kept on its way


@model_source("file")
class _WeightFiles(ModelSource):
    """A weight file for an architecture, or the weights of a training run, final or after N epochs."""

    forms = ("file:PATH?arch=REFERENCE", "file:FOLDER", "file:FOLDER@epoch=N")

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        path = weight_file(rest)
        key, prefix = options.pop("key", None), options.pop("prefix", None)
        checkpoint = read_weights(path, None if key is None else str(key))
        architecture = _architecture(rest, path, options)
        with Undrawn() if parse(architecture)[0].kind in _UNDRAWN else nullcontext():
            model = open_reference(architecture, {**options, "pretrained": False})
        fitted = fit(checkpoint, model.network.state_dict(), f"{path} for {model.architecture}", prefix)
        model.network.load_state_dict(fitted.tensors)
        # a library's mean and std of an architecture are those of its own weights, not of this file
        unsaid = {*model.undeclared, "mean", "std"} - parse(architecture)[2].keys()
        undeclared = tuple(name for name in INPUT if name in unsaid)
        return replace(model, undeclared=undeclared, notes=(*model.notes, *fitted.notes))

    def architecture(self, rest: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        for of_weights in ("key", "prefix"):
            options.pop(of_weights, None)
        source, rest, own = parse(_architecture(rest, weight_file(rest), options))
        return source.architecture(rest, own | options)


def weight_file(path: str | Path) -> Path:
    """Return the weight file that a path means.

    A path that exists comes first: a file is itself, and a folder means the one ``.safetensors`` file in it, such as
    the final weights of a training run. ``FOLDER@epoch=5`` means the weights of the training run in that folder after
    5 epochs, and ``@epoch=0`` its initial weights: ``FOLDER/epochs/epoch-0005.safetensors``.

    Args:
        path: a file, a folder, or ``FOLDER@epoch=N``; a leading ``~`` is the home directory.

    Returns:
        the file. Whether it exists is left to `read_checkpoint`, unless it is that of an epoch.

    Raises:
        CheckpointError: the training run did not keep that epoch, or has no final weights yet.
    """
    path = Path(path).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError:
        return path
    if is_folder:
        inside = sorted(path.glob("*.safetensors"))
        if not inside and (kept := epochs_of(path)):
            raise CheckpointError(
                f"{path} has no final weights yet: training has not finished. Finish it, or name one of the epochs "
                f"that it kept, such as {path}@epoch={max(kept)}."
            )
        return inside[0] if len(inside) == 1 else path
    folder, of_epoch, number = str(path).rpartition("@epoch=")
    if exists or not of_epoch:
        return path
    if not Path(folder).is_dir():
        raise CheckpointError(f"There is no training folder {folder}. {look_beside(Path(folder))}")
    kept = epochs_of(Path(folder))
    if re.fullmatch(r"[0-9]{1,9}", number) and int(number) in kept:
        return kept[int(number)]
    listed = ", ".join(map(str, sorted(kept))) or "none, it is not the folder of a training run"
    raise CheckpointError(f"{folder} did not keep the weights of epoch {number!r}. Epochs that it kept: {listed}.")


def read_weights(path: Path, key: str | None = None) -> Checkpoint:
    """Read a weight file; if it is of an epoch of a training run, it must be the one that the run has kept.

    Args:
        path: the file.
        key: as for `read_checkpoint`.

    Raises:
        CheckpointError: as `read_checkpoint`, or the run's record has another hash for this epoch.
    """
    checkpoint = read_checkpoint(path, key)
    recorded = _recorded_hash(path)
    if recorded not in (None, checkpoint.sha256):
        raise CheckpointError(
            f"{path} is not the file that its training run kept: its SHA-256 is {checkpoint.sha256}, but "
            f"{record_file(path)} has {recorded}. Copy the run's folder again, or train it again; or copy the file out "
            "of this folder to measure it as it is."
        )
    return checkpoint


def _recorded_hash(path: Path) -> str | None:
    """Return the hash of a kept epoch's file in the record of its run; None where there is none."""
    epoch = _EPOCH.fullmatch(path.name)
    if not epoch or path.parent.name != "epochs":
        return None
    try:
        found = read_json(record_file(path))["kept_sha256"].get(str(int(epoch[1])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no record, or one of an earlier version
        return None
    return found if isinstance(found, str) else None


def epochs_of(folder: Path) -> dict[int, Path]:
    """Return the files of the epochs that a training run has kept, by their number."""
    found = ((_EPOCH.fullmatch(path.name), path) for path in (folder / "epochs").glob("*.safetensors"))
    return {int(match[1]): path for match, path in found if match}


def training_run(donor: str | Path) -> Path | None:
    """Return the folder of the training run that a path or a reference ``file:...`` belongs to, if it kept epochs.

    Args:
        donor: the run's folder, its final weights, or those of an epoch: ``DIR@epoch=N`` or the file itself.

    Returns:
        the folder, or None where there is no such run.
    """
    text = str(donor)
    if text.startswith("file:"):
        text = text.removeprefix("file:").partition("?")[0]
    path = Path(text).expanduser()
    with suppress(OSError, CheckpointError):  # no path, or a folder whose final weights are not there yet
        if not path.is_file():
            folder = path if path.is_dir() else Path(str(path).rpartition("@epoch=")[0])
        elif _EPOCH.fullmatch(path.name) and path.parent.name == "epochs":
            folder = path.parent.parent
        else:  # the folder means its one weight file
            folder = path.parent if weight_file(path.parent) == path else path
        return folder if epochs_of(folder) else None
    return None


def initial_of_run(reference: str) -> str | None:
    """Return ``DIR@epoch=0`` for a model reference of a training run that kept its initial weights; else None."""
    run = training_run(reference) if reference.startswith("file:") else None
    return f"{run}@epoch=0" if run is not None and 0 in epochs_of(run) else None


def named_by_user(path: Path, architecture: str) -> str:
    """Return the reference of weights for an architecture that the user has named, not only the file beside them.

    Args:
        path: a file or a folder.
        architecture: a model reference. A function of Python is repeated in what is returned, without its options.
    """
    function = _own_function(architecture)
    return f"file:{path}" if function is None else f"file:{path}?arch={function}"


def record_file(weights: Path) -> Path:
    """Return the JSON file that records where weights come from, their architecture as ``"arch"``; it may be missing.

    It has the name of the weight file and lies beside it; for epochs of a training run, it is the run's ``model.json``.
    """
    beside = weights.with_suffix(".json")
    of_run = _EPOCH.fullmatch(weights.name) and weights.parent.name == "epochs" and not beside.exists()
    return weights.parent.parent / "model.json" if of_run else beside


def _architecture(rest: str, path: Path, options: dict[str, Any]) -> str:
    """Take the reference of the architecture out of the options, or else out of the record of the file."""
    given = options.pop("arch", None)
    if given is None:
        architecture = str(_recorded_architecture(path))
        function = _own_function(architecture)
        if function:
            raise ModelError(
                f"file:{rest}: {record_file(path)} names Python code as the architecture, {function}, and code that a "
                f"file names is not run. If you know and trust it, name it yourself: 'file:{rest}?arch={function}' "
                f"(behind other options '&arch={function}')."
            )
    else:
        architecture = str(given)
        if architecture == _own_function(architecture):  # the record has its options, where it is of the same function
            with suppress(ModelError):
                recorded = str(_recorded_architecture(path))
                architecture = recorded if _own_function(recorded) == architecture else architecture
    if architecture.startswith("file:"):
        raise ModelError(
            f"file:{rest} names {architecture!r} as its architecture; expected one without weights, such as "
            "'timm:resnet50'."
        )
    return architecture


def _own_function(architecture: str) -> str | None:
    """Return the ``py:MODULE:FUNCTION`` of a reference, which only a user may name; None for all other references."""
    name = architecture.partition("?")[0]
    return name if name.startswith("py:") and name not in _PY_OF_FILES else None


def _recorded_architecture(path: Path) -> object:
    """The entry ``"arch"`` of the JSON file that goes with a weight file."""
    record = record_file(path)
    try:
        return read_json(record)["arch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        of_epoch = record.parent != path.parent
        instead = (
            f"wait for training to finish and write {record}"
            if of_epoch and not record.exists()
            else f'put a {record.name} with an entry "arch" {f"into {record.parent}" if of_epoch else "beside it"}'
        )
        raise ModelError(
            f"file:{path} does not say its architecture. Add '?arch=timm:NAME', or for a network of your own "
            f"'?arch=py:MODULE:FUNCTION', or {instead} ({first_line(error)})."
        ) from error
