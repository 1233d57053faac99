"""Model sources: the kinds of references, how a reference is read, and what the kinds have in common."""

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from layercrit.errors import LayercritError, ModelError, first_line, near
from layercrit.models.model import Model
from layercrit.models.outputs import PROBABILITIES, Output, reader_of
from layercrit.registry import Registry

__all__ = [
    "MODEL_SOURCES",
    "OWN_NETWORK",
    "ModelSource",
    "Progress",
    "explained",
    "model_source",
    "open_reference",
    "parse",
    "short_name",
    "with_input",
    "with_output",
    "written",
]

OWN_NETWORK = "A network of your own is py:MODULE:FUNCTION; for weights in a file, '?arch=py:MODULE:FUNCTION'."
"""What errors about an architecture that is not found suggest."""

Progress = Callable[[str, int, int | None], object]
"""Called with the name of a file, how many bytes have arrived, and how many there are if the server says so."""


class ModelSource(ABC):
    """A kind of model reference, ``kind:rest?options``; its docstring says in one line what it opens.

    Attributes:
        kind: what its references begin with; `model_source` sets it.
        forms: how they are written, such as ``("timm:NAME",)``.
    """

    kind: str
    forms: tuple[str, ...]

    @abstractmethod
    def open(self, rest: str, options: dict[str, Any]) -> Model:
        """Return the model of a reference, whose ``reference`` is then replaced by the one asked for.

        Args:
            rest: the text between ``kind:`` and the question mark.
            options: the reference's options, to be consumed; with ``pretrained`` false, the weights are fresh, drawn
                under ``seed``. The caller handles ``mean``, ``std``, ``input_size`` and ``output``.
        """

    def architecture(self, rest: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return ``kind:rest`` and options of the architecture, the same for models that differ only in weights."""
        return f"{self.kind}:{rest}", options

    def is_here(self, rest: str) -> bool:
        """Whether the trained weights are cached, or never downloaded at all."""
        return True

    def fetch(self, rest: str, progress: Progress | None = None) -> None:  # noqa: B027 - most have nothing to do
        """Download the trained weights, where opening the model does not do so."""


class _Function(ModelSource):
    """A function that opens models; nothing has to be downloaded for it."""

    def __init__(self, function: Callable[[str, dict[str, Any]], Model], kind: str) -> None:
        self.function, self.forms, self.__doc__ = function, (f"{kind}:NAME",), function.__doc__

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        return self.function(rest, options)


MODEL_SOURCES = Registry[ModelSource]("kind of model", ModelError, "layercrit.model_sources")
"""All kinds of model references, filled by `model_source` and by installed plug-ins."""

_WEIGHTS = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")  # ends of the names of weight files

_Source = TypeVar("_Source", bound=Callable[[str, dict[str, Any]], Model] | type[ModelSource])


def model_source(kind: str) -> Callable[[_Source], _Source]:
    """Register what opens references ``kind:rest?options``: a function, or a class of `ModelSource`.

    A function gets ``rest`` and a dictionary of options, as `ModelSource.open` does, and returns a `Model`. Its models
    are assumed to need no download, and to have the same architecture if their options differ only in weights and
    seed; a class can say otherwise.

    Raises:
        ModelError: the name is taken by another function or class, or is not valid.

    Examples:
        >>> import layercrit
        >>> @layercrit.model_source("family")
        ... def open_member(rest, options):
        ...     '''family:NAME, a network of the demo.'''
        ...     return layercrit.open_model(f"file:layercrit-demo/models/{rest}")
        >>> layercrit.open_model("family:pixmix").n_classes
        10
    """

    def register(source: _Source) -> _Source:
        opener = source() if isinstance(source, type) else _Function(source, kind)
        MODEL_SOURCES[kind] = opener
        opener.kind = kind
        return source

    return register


def open_reference(reference: str, extra: Mapping[str, Any] | None = None) -> Model:
    """Open a reference; ``extra`` options win over those of its text.

    Raises:
        ModelError: it is not a reference, or the model cannot be opened.
    """
    source, rest, options = parse(reference)
    options |= extra or {}
    mean, std, input_size, output = (options.pop(name, None) for name in ("mean", "std", "input_size", "output"))
    model = source.open(rest, options)
    if not isinstance(model, Model):
        raise ModelError(f"The source of {source.kind!r} returned {type(model).__name__}; expected a layercrit Model.")
    model = with_output(with_input(model, mean, std, input_size), output)
    return replace(model, reference=reference)


def parse(reference: str) -> tuple[ModelSource, str, dict[str, Any]]:
    """Split a reference into the source that opens it, the text after its kind, and its options.

    Raises:
        ModelError: it is not a reference; the message suggests near ones.
    """
    name, _, query = reference.partition("?")
    kind, _, rest = name.partition(":")
    named = reference.removeprefix(f"{kind}:") if kind in MODEL_SOURCES else reference
    if query and (path := _path_cut_at_its_question_mark(named)):
        raise ModelError(
            f"{reference!r}: the path {path!r} contains a question mark, with which the options of a reference begin. "
            "Rename it, or make a link to it that has none."
        )
    if kind not in MODEL_SOURCES or not rest:
        raise ModelError(_unknown_reference(reference, name, kind))
    options: dict[str, Any] = {}
    for option in filter(None, query.split("&")):
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise ModelError(f"{reference!r}: the option {option!r} is not written as name=value, or is given twice.")
        options[key] = value if key == "prefix" else _literal(value)  # such as 1., which is no number there
    return MODEL_SOURCES[kind], rest, options


def short_name(reference: str) -> str:
    """Return what figures and tables call a model: of a file its name, without folders; of others no input settings."""
    name, _, query = reference.partition("?")
    if name.startswith("file:") and (last := Path(name.removeprefix("file:")).name):
        while (suffix := Path(last).suffix) in _WEIGHTS and suffix != last:
            last = last.removesuffix(suffix)
        return last
    kept = [one for one in query.split("&") if one and one.partition("=")[0] not in ("mean", "std", "input_size")]
    return f"{name}?{'&'.join(kept)}" if kept else name


def _path_cut_at_its_question_mark(text: str) -> str | None:
    """The file or folder with a question mark in its name that a reference without its kind means, if there is one."""
    marks = [place for place, letter in enumerate(text) if letter == "?"]
    try:
        if not marks or Path(text[: marks[0]]).expanduser().exists():
            return None
        whole = (Path(text[:end]).expanduser() for end in [*marks[1:], len(text)])
        places = (place for path in whole for place in (path, *path.parents))
        return next((str(place) for place in places if "?" in str(place) and place.exists()), None)
    except (OSError, ValueError, RuntimeError):  # no path: too long, a null character, a home that is not known
        return None


def _unknown_reference(reference: str, name: str, kind: str) -> str:
    text = f"{reference!r} is not a model reference: expected kind:name, with a kind of {', '.join(MODEL_SOURCES)}."
    if kind in MODEL_SOURCES:
        return text
    if ":" in name:
        return f"{text} {MODEL_SOURCES.hint(kind)}"
    if (Path(name).expanduser() / "model.json").is_file():  # a training run, which knows its architecture
        return f"{text} Did you mean 'file:{name}'?"
    if (Path(name).expanduser() / "config.json").is_file():  # as transformers saves models
        return f"{text} Did you mean 'hf:{name}'?"
    if Path(name).expanduser().exists():
        return f"{text} Did you mean 'file:{name}?arch=timm:NAME'? {OWN_NETWORK}"
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


def with_input(model: Model, mean: object, std: object, input_size: object) -> Model:
    """Return the model with a normalisation and image size that somebody chose; None leaves each as it is.

    Raises:
        ModelError: they are not of the form that `open_model` takes.
    """
    shape = model.preprocessing
    if input_size is not None:
        sizes = _numbers("input_size", input_size)
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ModelError(f"input_size must be three whole numbers (channels, height, width); got {input_size!r}.")
        channels, height, width = (int(size) for size in sizes)
        squash = isinstance(shape.resize, tuple)
        resize = (height, width) if squash else max(height, width)
        shape = replace(shape, channels=channels, height=height, width=width, resize=resize)
    means = model.mean if mean is None else _numbers("mean", mean)
    if mean is not None and max(means) > 1:
        now, right = (",".join(f"{value / unit:.4g}" for value in means) for unit in (1, 255))
        raise ModelError(
            f"mean=({now}) is in units of 0 to 255, and pixels are in [0, 1] here: divide mean and std by 255, which "
            f"makes mean=({right})."
        )
    stds = model.std if std is None else _numbers("std", std)
    if input_size is not None:
        means, stds = (v[:1] * shape.channels if len(set(v)) == 1 else v for v in (means, stds))
    given = {"mean": mean, "std": std, "input_size": input_size}
    undeclared = tuple(name for name in model.undeclared if given[name] is None)
    return replace(model, mean=means, std=stds, preprocessing=shape, undeclared=undeclared)


def with_output(model: Model, output: Output | None) -> Model:
    """Return the model with another choice of what its logits are; None leaves it as it is.

    Raises:
        ModelError: it is not of the form that `open_model` takes.
    """
    if output is None:
        return model
    if output == PROBABILITIES:
        return replace(model, probabilities=True)
    reader_of(output)
    return replace(model, output=output)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if isinstance(values, Sequence) and values and all(isinstance(v, int | float) for v in values):
        return tuple(values)
    raise ModelError(f"{name} must be a sequence of numbers; got {values!r}.")


@contextmanager
def explained(what: str, options: Mapping[str, Any], usual: Sequence[str] = ()) -> Iterator[None]:
    """Turn any error of a library that opens ``what`` into a ModelError that says what to do.

    Args:
        what: the reference; the message begins with it.
        options: options that were passed to the library.
        usual: options it is known to take, for near names.

    Raises:
        ModelError: the library raised; errors of layercrit itself pass unchanged.
    """
    try:
        yield
    except LayercritError:
        raise
    except OSError as error:
        raise ModelError(
            f"{what}: its files are neither cached nor could they be downloaded ({first_line(error)}). Open it once on "
            "a machine with network access and copy the cache here (HF_HOME, else ~/.cache/huggingface; TORCH_HOME, "
            "else ~/.cache/torch), or add '?pretrained=false' for an untrained network. Offline, HF_HUB_OFFLINE=1 "
            "avoids waiting for a connection."
        ) from error
    except Exception as error:  # a library raises what it likes at options and weights it does not know
        given = f" Options given: {options}." if options else ""
        strange = [near(name, usual) for name in options if usual and name not in usual]
        text = f"{what} could not be opened ({first_line(error)}).{given} {' '.join(strange)}"
        raise ModelError(text.rstrip()) from error


def written(options: Mapping[str, Any]) -> str:
    """Options as written in a reference, in alphabetical order."""
    return "?" + "&".join(f"{name}={options[name]}" for name in sorted(options)) if options else ""
