"""Open a trained network by reference, with its normalisation, its image geometry and a way to build it afresh.

A model reference is ``kind:name``, with options after a question mark: ``kind:name?option=value&option=value``.

=====================================  ===============================================================================
``timm:NAME``                          timm's published weights, such as ``timm:resnet50.a1_in1k``
``hf-hub:REPO``                        a timm model of a Hugging Face repository
``torchvision:NAME[:WEIGHTS]``         torchvision's weights; ``none`` for none, the default ones if left out
``hf:REPO`` or ``hf:FOLDER``           an image classifier of transformers, safetensors only, never code from the hub
``zoo:ID``                             published weights of the zoo, fetched before (`layercrit.models.zoo.fetching`)
``file:PATH?arch=REFERENCE``           a weight file for the architecture of another reference; ``key=`` chooses among
                                       several sets of weights; ``arch`` may instead stand in a JSON file beside it
``file:FOLDER``, ``...@epoch=N``       what a training run in a folder ended with, or had after N epochs
``py:PACKAGE.MODULE:FACTORY``          what a function of yours returns; the current directory can be imported from
=====================================  ===============================================================================

Options of every kind: ``mean``, ``std`` and ``input_size`` (see `open_model`), ``pretrained=false`` for fresh weights
and ``seed`` (default 0), under which those are drawn, so that equal references give equal weights. All other options
are passed on to the library's constructor, as ``num_classes=10`` is. Values are Python literals or plain words.
"""

import ast
import copy
import difflib
import importlib
import inspect
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercrit.errors import ModelError, first_line, near
from layercrit.models.checkpoints import fit_to, read_checkpoint, record_file, weight_file
from layercrit.models.hubs import timm_input
from layercrit.models.model import Model, structure
from layercrit.models.sources import MODEL_SOURCES, explained, model_source, written
from layercrit.models.zoo.fetching import find_entries
from layercrit.probes.images import Preprocessing
from layercrit.seeds import drawing

__all__ = ["open_model", "without_weights"]

_ONLY_GIVEN = "none: the network was given as an object"


def open_model(
    reference: str | nn.Module | Model,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Model:
    """Open a model, without changing any global random state or a given network.

    A network given as an object is used as it is when in evaluation mode, and copied when in training mode. Unless it
    is timm's and says otherwise, it is asked about 224 x 224 pixels in [0, 1] without normalisation.

    Args:
        reference: A model reference (see the module), a network, or an opened model.
        mean: Replaces the mean of each channel, in units of pixels in [0, 1].
        std: Replaces the standard deviation of each channel.
        input_size: Replaces ``(channels, height, width)``; images are then resized just so far that they cover it. A
            mean or standard deviation that is the same for all channels is kept for the new number of channels.

    Raises:
        ModelError: The reference is unknown, its weights are out of reach, or the arguments do not fit together.
        CheckpointError: A weight file is unreadable, unsafe, or does not fit.
    """
    if isinstance(reference, Model):
        model = reference
    elif isinstance(reference, nn.Module):
        model = _given(reference)
    elif isinstance(reference, str):
        model = _from_reference(reference)
    else:
        raise ModelError(
            f"A model was given as {type(reference).__name__}, expected a reference like 'timm:resnet50' or a network."
        )
    model = _with_input(model, mean, std, input_size)
    channels = model.preprocessing.channels
    for name, values in (("mean", model.mean), ("std", model.std)):
        if len(values) != channels:
            raise ModelError(
                f"{model.reference}: {name} has {len(values)} values {values}, expected one for each of {channels} "
                f"channels. Give {name}= with {channels}, or input_size= with another number of channels."
            )
    if not all(math.isfinite(m) for m in model.mean) or not all(math.isfinite(s) and s > 0 for s in model.std):
        raise ModelError(
            f"{model.reference}: mean {model.mean} and std {model.std} must be finite, and std above 0; they are in "
            "units of pixels in [0, 1]."
        )
    for name, parameter in model.network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"{model.reference}: {name!r} is {parameter.dtype}, expected torch.float32: call .float()."
            )
    return model


def _from_reference(reference: str, extra: Mapping[str, Any] | None = None) -> Model:
    """Open a reference; ``extra`` options win over those of its text."""
    kind, rest, options = _parsed(reference)
    options |= extra or {}
    mean, std, input_size = (options.pop(name, None) for name in ("mean", "std", "input_size"))
    model = MODEL_SOURCES[kind](rest, options)
    if not isinstance(model, Model):
        raise ModelError(f"The source of {kind!r} returned {type(model).__name__}, expected a layercrit Model.")
    return replace(_with_input(model, mean, std, input_size), reference=reference)


def _parsed(reference: str) -> tuple[str, str, dict[str, Any]]:
    """Split a reference into its kind, the text after that, and its options."""
    name, _, query = reference.partition("?")
    kind, _, rest = name.partition(":")
    if kind not in MODEL_SOURCES or not rest:
        raise ModelError(_unknown_reference(reference, name, kind))
    options: dict[str, Any] = {}
    for option in filter(None, query.split("&")):
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise ModelError(f"{reference!r}: option {option!r} is not written as name=value, or given twice.")
        options[key] = _literal(value)
    return kind, rest, options


def without_weights(reference: str, keep: Collection[str] = ()) -> str:
    """Return a reference to the same architecture, not trained; equal ones for models that differ in weights only.

    Args:
        reference: A model reference.
        keep: Which of the options that go with the weights stay: ``seed``, ``mean``, ``std``, ``input_size``.

    Raises:
        ModelError: The reference is unknown, or a file's architecture is not said.
    """
    kind, rest, options = _parsed(reference)
    if kind == "file":
        options.pop("key", None)
        architecture = str(options.pop("arch", None) or _recorded_architecture(weight_file(rest)))
        kind, rest, own = _parsed(architecture)
        options = own | options
    if kind in ("timm", "torchvision"):
        separator = "." if kind == "timm" else ":"
        rest = rest.partition(separator)[0]
    if kind == "zoo":
        (entry,) = find_entries(rest)
        kind, _, rest = entry.architecture.partition(":")
    of_weights = {"seed", "mean", "std", "input_size"} - set(keep)
    options = {name: value for name, value in options.items() if name not in of_weights}
    return f"{kind}:{rest}{written({**options, 'pretrained': False})}"


def _unknown_reference(reference: str, name: str, kind: str) -> str:
    text = f"{reference!r} is no model reference: expected kind:name, with a kind of {', '.join(MODEL_SOURCES)}."
    if kind in MODEL_SOURCES:
        return text
    if ":" in name:
        return f"{text} {near(kind, MODEL_SOURCES)}"
    if Path(name).expanduser().exists():
        return f"{text} Did you mean 'file:{name}?arch=timm:NAME'?"
    import timm

    return f"{text} Did you mean 'timm:{name}'?" if timm.is_model(name.partition(".")[0]) else text


def _literal(text: str) -> Any:
    """The value of an option: a Python literal, ``true``, ``false`` or ``none``, or else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _with_input(model: Model, mean: object, std: object, input_size: object) -> Model:
    """The model with another normalisation and image size; None leaves each as it is."""
    shape = model.preprocessing
    if input_size is not None:
        sizes = _numbers("input_size", input_size)
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ModelError(f"input_size is {input_size!r}, expected three whole numbers (channels, height, width).")
        channels, height, width = (int(size) for size in sizes)
        squash = isinstance(shape.resize, tuple)
        resize = (height, width) if squash else max(height, width)
        shape = replace(shape, channels=channels, height=height, width=width, resize=resize)
    means = model.mean if mean is None else _numbers("mean", mean)
    stds = model.std if std is None else _numbers("std", std)
    if input_size is not None:
        means, stds = (v[:1] * shape.channels if len(set(v)) == 1 else v for v in (means, stds))
    return replace(model, mean=means, std=stds, preprocessing=shape)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, Sequence) and values and all(isinstance(v, int | float) for v in values):
        return tuple(values)
    raise ModelError(f"{name} is {values!r}, expected a sequence of numbers.")


def _given(network: nn.Module) -> Model:
    """A model of a network that the caller holds."""
    name = f"module:{type(network).__module__}.{type(network).__qualname__}"
    if any(module.training for module in network.modules()):
        try:
            network = copy.deepcopy(network).eval()
        except RuntimeError as error:
            raise ModelError(
                f"{name} is in training mode and cannot be copied ({error}): call .eval() first."
            ) from error
    build, initialiser = _rebuild(network)
    return _described(name, f"{name}-{structure(network)}", network, build, initialiser)


def _rebuild(network: nn.Module) -> tuple[Callable[[], nn.Module] | None, str]:
    """Find how the library that a network comes from builds it afresh, if it is one that can be asked."""
    config = getattr(network, "config", None)
    if config is not None and hasattr(type(network), "_from_config"):  # transformers
        return partial(type(network), copy.deepcopy(config)), f"{type(network).__name__}(config)"
    return None, _ONLY_GIVEN


def _described(
    reference: str, architecture: str, network: nn.Module, build: Callable[[], nn.Module] | None, initialiser: str
) -> Model:
    """A model of any network: timm's own settings where it carries them, else plain pixels, 224 x 224."""
    if isinstance(getattr(network, "pretrained_cfg", None), dict):
        mean, std, shape = timm_input(network, {})
    else:
        mean, std, shape = (0.0,) * 3, (1.0,) * 3, Preprocessing()
    return Model(reference, architecture, network.eval(), mean, std, shape, build, initialiser)


@model_source("file")
def _open_file(rest: str, options: dict[str, Any]) -> Model:
    path = weight_file(rest)
    key = options.pop("key", None)
    checkpoint = read_checkpoint(path, None if key is None else str(key))
    architecture = str(options.pop("arch", None) or _recorded_architecture(path))
    if architecture.startswith("file:"):
        raise ModelError(f"file:{rest} names {architecture!r} as its architecture, expected one without weights.")
    model = _from_reference(architecture, {**options, "pretrained": False})
    tensors = fit_to(checkpoint.tensors, model.network.state_dict(), f"{path} for {model.architecture}")
    model.network.load_state_dict(tensors)
    return model


def _recorded_architecture(path: Path) -> object:
    """The entry ``"arch"`` of the JSON file that goes with a weight file."""
    record = record_file(path)
    try:
        return json.loads(record.read_text(encoding="utf-8"))["arch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        of_epoch = record.parent != path.parent
        instead = (
            f"wait until training has finished, which then writes {record}"
            if of_epoch and not record.exists()
            else f'put a {record.name} with an entry "arch" {f"into {record.parent}" if of_epoch else "beside it"}'
        )
        raise ModelError(
            f"file:{path} comes without its architecture: add '?arch=timm:NAME' (or another reference), or {instead} "
            f"({first_line(error)})."
        ) from error


@model_source("py")
def _open_python(rest: str, options: dict[str, Any]) -> Model:
    """Call a user's factory.

    ``build`` is the factory where it has a parameter ``pretrained``, which is then passed, or where the reference says
    ``pretrained=false``; otherwise what it returns may be trained, and calling it again would not give fresh weights.
    """
    pretrained, seed = options.pop("pretrained", True), options.pop("seed", 0)
    name = f"py:{rest}"
    with _importing_from_here(), drawing(seed):
        factory = _factory(rest)
        signature = inspect.signature(factory)
        switch = "pretrained" in signature.parameters
        call = partial(factory, **options, pretrained=pretrained) if switch else partial(factory, **options)
        try:
            signature.bind(**call.keywords)
        except TypeError as error:
            raise ModelError(f"{name}{signature} cannot be called with {call.keywords}: {error}.") from error
        with explained(name, options):
            network = call()
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name} returned {type(network).__name__}, expected a torch.nn.Module.")
    architecture = f"{name}{written(options)}"
    if not switch and pretrained:
        return _described(name, architecture, network, None, _ONLY_GIVEN)
    build = partial(factory, **options, pretrained=False) if switch else call
    return _described(name, architecture, network, build, f"{rest}{written(build.keywords)}")


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Inside, modules of the current directory can be imported, as under ``python -m``."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _factory(rest: str) -> Callable[..., Any]:
    """Import ``package.module:name``."""
    module_name, colon, attribute = rest.partition(":")
    if not colon or not attribute:
        raise ModelError(f"'py:{rest}' names no factory, expected py:package.module:factory.")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f"'py:{rest}' cannot be imported: {error}.") from error
        parent, _, last = error.name.rpartition(".")
        package = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        matches = difflib.get_close_matches(last, [found.name for found in pkgutil.iter_modules(package)])
        raise ModelError(
            f"'py:{rest}': there is no module {error.name!r}, neither in {Path.cwd()} nor among installed packages."
            + (f" {near(last, matches)}" if matches else "")
        ) from error
    except Exception as error:  # the user's own code, run by importing it
        raise ModelError(f"'py:{rest}' cannot be imported ({first_line(error)}).") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ModelError(f"'py:{rest}': {module_name} has no function or class {attribute!r}. {near(attribute, names)}")
    return factory  # type: ignore[no-any-return]
