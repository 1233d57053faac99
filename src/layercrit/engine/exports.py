"""Export each architecture once: a study measures many models of one architecture, each with weights of its own."""

import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from layercrit.engine.graph import WeightGraph, export_graph, named_tensors
from layercrit.engine.replay import ReadLogits
from layercrit.models.outputs import logits_of

__all__ = ["graph_of"]

_TENSORS_AND_PARTS = {"_parameters", "_buffers", "_modules"}
_PLAIN_TYPES = {type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device}
_GLOBAL_HOOKS: Any = nn.modules.module
_SHARED = (type, types.FunctionType, types.BuiltinFunctionType)

_N_KEPT = 16

_kept: list[tuple[Any, WeightGraph]] = []  # the last architectures: description, and graph without values


def graph_of(
    network: nn.Module, images: Tensor, read_logits: ReadLogits = logits_of, *, anew: bool = False
) -> tuple[WeightGraph, bool]:
    """Return the network's graph as `export_graph` does, and whether it is that of a network before.

    The exporter sees shapes and formats of weights but no values. So networks have the same graph whose modules have
    the same types, settings and weights' shapes. Where one of them has a setting whose equality cannot be told, as an
    object of some other class, the network is exported. Variables of a module's file that its forward reads are taken
    to stay the same.

    Args:
        network: as for `export_graph`.
        images: likewise.
        read_logits: likewise.
        anew: export it in any case.
    """
    tensors = named_tensors(network)
    description = _description(network, tensors, images) if read_logits is logits_of else None
    known = next((graph for one, graph in _kept if one == description), None)
    if anew:
        _kept[:] = [(one, graph) for one, graph in _kept if one != description]
    elif known is not None:
        values = {node: tensors[names[0]] for node, names in known.names.items()}
        return WeightGraph(known.graph, known.images, known.logits, known.names, values), True
    found = export_graph(network, images, read_logits)
    # a constant of the graph that is no parameter or buffer has the value that it has in this network
    if description is not None and all(names[0] in tensors for names in found.names.values()):
        _kept.insert(0, (description, WeightGraph(found.graph, found.images, found.logits, found.names, {})))
        del _kept[_N_KEPT:]
    return found, False


def _description(network: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Any:
    """Return what decides which graph a network has, None if it cannot be told; equal descriptions are equal graphs."""
    if _GLOBAL_HOOKS._global_forward_hooks or _GLOBAL_HOOKS._global_forward_pre_hooks:
        return None
    first: dict[int, str] = {}  # tied tensors and modules that are used twice are told by their first name
    weights = [
        (name, first.setdefault(id(tensor), name), type(tensor), tensor.requires_grad, *_layout(tensor))
        for name, tensor in tensors.items()
    ]
    try:
        modules = [
            (name, first.setdefault(id(module), name), type(module), _settings(module))
            for name, module in network.named_modules(remove_duplicate=False)
        ]
        classes = {type(module): _class_settings(type(module)) for module in network.modules()}
    except (TypeError, RecursionError):
        return None
    return _layout(images), weights, modules, classes


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _class_settings(kind: type[nn.Module]) -> list[Any]:
    """Return what the code of a class is and what plain values it reads from itself."""
    forward = kind.forward
    return [forward, _comparable(getattr(forward, "__defaults__", None)), _plain_values(kind)]


def _plain_values(kind: type) -> list[Any]:
    return [
        (one, name, _comparable(value))
        for one in kind.__mro__
        if one.__module__ != nn.Module.__module__
        for name, value in vars(one).items()
        if type(value) in _PLAIN_TYPES
    ]


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, _comparable(value)) for name, value in vars(module).items() if name not in _TENSORS_AND_PARTS]


def _comparable(value: object) -> Any:
    """Return something that is equal for values that a module's code cannot tell apart.

    Raises:
        TypeError: this cannot be told of such a value.
    """
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return kind, repr(value)  # 1, 1.0 and True are equal, but not the same setting
    if isinstance(value, enum.Enum):
        return kind, _comparable(value.value)
    if isinstance(value, functools.partial) and kind is functools.partial:
        return kind, _comparable(value.func), _comparable(value.args), _comparable(value.keywords)
    if isinstance(value, _SHARED) and getattr(value, "__closure__", None) is None:
        return value
    if kind in (list, tuple):
        return kind, [_comparable(item) for item in cast(Iterable[object], value)]
    if kind in (set, frozenset):
        return kind, sorted(repr(_comparable(item)) for item in cast(Iterable[object], value))
    if kind in (dict, OrderedDict):
        return kind, [(_comparable(key), _comparable(item)) for key, item in cast(dict[Any, Any], value).items()]
    # an object of Python's, such as a configuration: what it has is in its dictionary and in its class
    if kind.__basicsize__ == _Plain.__basicsize__ and hasattr(value, "__dict__") and not hasattr(kind, "__getattr__"):
        return kind, _comparable(vars(value)), _plain_values(kind)
    raise TypeError(kind)


class _Plain:
    """Its objects have a dictionary and no other memory."""
