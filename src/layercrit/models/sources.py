"""Where models come from: the registry of kinds of references, and what the kinds share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from layercrit.errors import LayercritError, ModelError, first_line, near
from layercrit.models.model import Model

__all__ = ["MODEL_SOURCES", "ModelSource", "explained", "model_source", "written"]

ModelSource = Callable[[str, dict[str, Any]], Model]
"""Opens a model from the text after ``kind:`` and the options; see `model_source`."""


MODEL_SOURCES: dict[str, ModelSource] = {}
"""The kinds of model references, filled by `model_source`."""


def model_source(kind: str) -> Callable[[ModelSource], ModelSource]:
    """Register a function that opens references ``kind:rest?options``.

    The function gets ``rest`` and a dictionary of options, which it may consume (``mean``, ``std`` and ``input_size``
    are dealt with outside), and returns a `Model`, whose ``reference`` is then replaced by the one asked for.
    """

    def register(source: ModelSource) -> ModelSource:
        MODEL_SOURCES[kind] = source
        return source

    return register


@contextmanager
def explained(what: str, options: Mapping[str, Any], usual: Sequence[str] = ()) -> Iterator[None]:
    """Turn any error of a library that opens ``what`` into a ModelError that says what to do.

    Args:
        what: The reference, with which the text begins.
        options: Options that were passed to the library.
        usual: Options it is known to take, for near names.

    Raises:
        ModelError: The library raised; errors of layercrit itself pass unchanged.
    """
    try:
        yield
    except LayercritError:
        raise
    except OSError as error:
        raise ModelError(
            f"{what}: its files were neither found on this machine nor fetched ({first_line(error)}). Open it once on "
            "a machine with network access and copy the cache here (HF_HOME, else ~/.cache/huggingface; TORCH_HOME, "
            "else ~/.cache/torch), or add '?pretrained=false' for an untrained network. HF_HUB_OFFLINE=1 saves waiting "
            "for a network that is not there."
        ) from error
    except Exception as error:  # a library raises what it likes at options and weights it does not know
        given = f" Options given: {options}." if options else ""
        strange = [near(name, usual) for name in options if usual and name not in usual]
        text = f"{what} could not be opened ({first_line(error)}).{given} {' '.join(strange)}"
        raise ModelError(text.rstrip()) from error


def written(options: Mapping[str, Any]) -> str:
    """Options as they stand in a reference, in alphabetical order."""
    return "?" + "&".join(f"{name}={options[name]}" for name in sorted(options)) if options else ""
