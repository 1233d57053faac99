"""The user's own networks: given as objects, or made by a function, ``py:package.module:factory``."""

import copy
import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercrit.errors import ModelError, first_line, near
from layercrit.models.hubs import timm_input
from layercrit.models.model import INPUT, Model, structure
from layercrit.models.sources import ModelSource, explained, model_source, written
from layercrit.probes.images import Preprocessing
from layercrit.restoring import copied
from layercrit.seeds import drawing

__all__ = ["given_model", "import_here"]

_ONLY_GIVEN = "none: the network was given as an object"


def given_model(network: nn.Module) -> Model:
    """Return the model of a network given as an object: the network itself, or a copy if it is in training mode.

    Raises:
        ModelError: it is in training mode and cannot be copied.
    """
    name = f"module:{type(network).__module__}.{type(network).__qualname__}"
    _check_plain(name, network)  # before anything else is asked of it
    if any(module.training for module in network.modules()):
        try:
            network = copied(network).eval()
        except ModelError as error:
            raise ModelError(f"{name} is in training mode; call .eval() first. {error}") from error
    build, initialiser = _rebuild(network)
    # not the class's name: a network that is wrapped, or defined in a script, gets the same draws as before
    return _described(name, f"module:{structure(network)}", network, build, initialiser)


def _rebuild(network: nn.Module) -> tuple[Callable[[], nn.Module] | None, str]:
    """Find how the library that a network comes from builds it anew, where it offers a way."""
    config = getattr(network, "config", None)
    if config is not None and hasattr(type(network), "_from_config"):  # transformers
        return partial(type(network), copy.deepcopy(config)), f"{type(network).__name__}(config)"
    return None, _ONLY_GIVEN


def _check_plain(name: str, network: nn.Module) -> None:
    """Make sure that a network's parameters are tensors that torch lets us exchange.

    Raises:
        ModelError: it is of TorchScript, or quantised.
    """
    for place, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name} is a TorchScript module{f' at {place!r}' * bool(place)}: its layers cannot be reset. Give the "
                "network from which it was made, with its weights: network.load_state_dict(script.state_dict())."
            )
    for key, value in network.state_dict().items():
        if nn.parameter.is_lazy(value):
            raise ModelError(
                f"{name} has a parameter {key!r} without a shape, of a lazy module. Run the network once on images of "
                "its size, then load the trained weights."
            )
        if not isinstance(value, torch.Tensor) or value.is_quantized:
            raise ModelError(
                f"{name} keeps {key!r} as {type(value).__name__}, not as plain numbers, like a quantised network: its "
                "layers cannot be reset. Give the network before it was quantised."
            )


def _described(
    reference: str, architecture: str, network: nn.Module, build: Callable[[], nn.Module] | None, initialiser: str
) -> Model:
    """A model of any network: with timm's own settings if it has them, else 224 x 224 pixels, not normalised."""
    settings = getattr(network, "pretrained_cfg", None)
    if isinstance(settings, dict):
        mean, std, shape = timm_input(network, {})
        # with other classes, it was trained on other images than those that timm's settings are of
        own = getattr(network, "num_classes", None) == settings.get("num_classes")
        undeclared = () if own else ("mean", "std")
        return Model(
            reference, architecture, network.eval(), mean, std, shape, build, initialiser, undeclared=undeclared
        )
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    channels = 1 if first is not None and first.in_channels == 1 else 3
    mean, std, shape = (0.0,) * channels, (1.0,) * channels, Preprocessing(channels=channels)
    return Model(reference, architecture, network.eval(), mean, std, shape, build, initialiser, undeclared=INPUT)


@model_source("py")
class _Factories(ModelSource):
    """The network that your own function returns; modules in the current directory can be imported."""

    forms = ("py:PACKAGE.MODULE:FACTORY",)

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        """Call a user's factory.

        ``build`` is the factory where it has a parameter ``pretrained``, which is then passed, or where the reference
        says ``pretrained=false``; otherwise what it returns may be trained, and calling it again would not give fresh
        weights.
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
                raise ModelError(
                    f"{name}{signature} cannot be called with {call.keywords} ({error}). Change the options of the "
                    "reference."
                ) from error
            with explained(name, options):
                network = call()
        if not isinstance(network, nn.Module):
            raise ModelError(f"{name} returned {type(network).__name__}; expected a torch.nn.Module.")
        _check_plain(name, network)
        architecture = f"{name}{written(options)}"
        if not switch and pretrained:
            why = f"none: {name} has no parameter `pretrained`, with which it could be asked for an untrained network"
            return _described(name, architecture, network, None, why)
        build = partial(factory, **options, pretrained=False) if switch else call
        return _described(name, architecture, network, build, f"{rest}{written(build.keywords)}")


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Inside, modules of the current directory can be imported, as under ``python -m``."""
    before = list(sys.path)
    with suppress(FileNotFoundError):  # where it was deleted, so no module is in it
        sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _here() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "the current folder, which was deleted,"


def import_here(module: str) -> None:
    """Import a user's module, from the current directory or from the installed packages."""
    with _importing_from_here():
        importlib.import_module(module)


def _factory(rest: str) -> Callable[..., Any]:
    """Import ``package.module:name``."""
    module_name, colon, attribute = rest.partition(":")
    if not colon or not attribute:
        raise ModelError(f"'py:{rest}' names no function; expected py:package.module:factory.")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f"'py:{rest}' cannot be imported ({error}). Install what it needs.") from error
        parent, _, last = error.name.rpartition(".")
        package = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        matches = difflib.get_close_matches(last, [found.name for found in pkgutil.iter_modules(package)])
        raise ModelError(
            f"'py:{rest}': there is no module {error.name!r}, neither in {_here()} nor among the installed packages."
            + (f" {near(last, matches)}" if matches else "")
        ) from error
    except Exception as error:  # the user's own code, run by importing it
        raise ModelError(f"'py:{rest}' cannot be imported ({first_line(error)}).") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ModelError(
            f"'py:{rest}': the module {module_name} has no function or class {attribute!r}. {near(attribute, names)}"
        )
    return factory  # type: ignore[no-any-return]
