"""The layers of a network: what is reset as one unit, with its name, type, order and group."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from layercrit.computed_weights import buffers_of_weights
from layercrit.errors import LayerError, near, shown
from layercrit.layer_groups import Structure, block_of, blocks_of, stage_of
from layercrit.protocol import GROUPS
from layercrit.restoring import holding
from layercrit.watchers import Dataflow, FirstUses, in_single_operators
from layercrit.wrappers import wrapper_of

__all__ = [
    "GROUPS",
    "LAYER_TYPES",
    "Group",
    "Layer",
    "Shared",
    "find_layers",
    "joined_where_shared",
    "layer_labels",
    "select_layers",
    "shared_parameters",
    "stages_of",
]

LAYER_TYPES = {
    "conv": "convolutions",
    "linear": "linear layers, attention projections, and other parameters that multiply their input as a matrix",
    "norm": "scale and shift of normalisation layers",
    "embedding": "lookup tables",
    "other": "everything else that is trained: position embeddings, class tokens, layer scales, bias tables",
}
Group = Literal["layer", "block", "stage", "attention", "mlp", "conv+norm"]

_BY_DATAFLOW = ("attention", "mlp", "conv+norm")

# Operators that multiply their input by a weight. They tell what a parameter is, whoever owns it.
_TYPE_OF_OPERATOR = {
    torch.ops.aten.convolution: "conv",
    **{
        getattr(torch.ops.aten, name): "linear"
        for name in (
            *("addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "mv", "_trilinear"),
            *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),  # kernels of evaluation mode
        )
    },
}
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Layer:
    """One unit of reset: a module with parameters, or a group of such modules (a block or a stage).

    Attributes:
        name: the module's name inside the network (``layer1.0.conv1``), or the group's (``layer1.0``).
        type: one of `LAYER_TYPES`; of a group, the types of its members joined by ``+``.
        parameters: names of the parameters that a reset replaces.
        shape: shape of the largest of them, such as ``(out_channels, in_channels, height, width)``.
        n_parameters: how many numbers a reset replaces.
        depth: position in the order in which the network first uses the layers, from 0.
        buffers: names of the buffers that a reset replaces with them, as the vectors of spectral normalisation.
        members: of a set of layers, these, in depth order: each gets the values that it gets where it is reset alone.
            Empty for a layer and for a group, whose values are drawn in one go.
        groups: of a layer, ``attention``, ``mlp`` or ``conv+norm`` and the name of the one that it belongs to, for each
            that it is in; None where `find_layers` was not asked for these.
    """

    name: str
    type: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    n_parameters: int
    depth: int = 0
    buffers: tuple[str, ...] = ()
    members: tuple["Layer", ...] = ()
    groups: tuple[tuple[str, str], ...] | None = None

    def to_dict(self) -> dict[str, object]:
        """Return it as plain data; of the members, their names."""
        kept = {name: value for name, value in vars(self).items() if name != "groups"}
        return kept | {"members": [member.name for member in self.members]}


@dataclass(frozen=True)
class Shared:
    """What a layer has in common with earlier ones, where a parameter belongs to both (tied weights).

    Attributes:
        first: the first of the layers that it shares parameters with, directly or by way of others.
        parameters: names of its parameters that no earlier layer has.
        n_parameters: how many numbers these are.
    """

    first: str
    parameters: tuple[str, ...]
    n_parameters: int


def find_layers(network: nn.Module, images: Tensor, group: str = "layer") -> list[Layer]:
    """Return all layers of a network in the order in which a forward pass first uses them.

    One forward pass is watched; the network is left as it was. Layers that the pass never uses come last.

    Args:
        network: the trained network, in evaluation mode.
        images: one small batch that the network accepts, ``(n_images, channels, height, width)``.
        group: for what `select_layers` is to group by. ``attention``, ``mlp`` and ``conv+norm`` are found by what
            flows where in a second forward pass, for each layer's ``groups``; others take no further pass.

    Returns:
        the layers, of all types. Every trainable parameter belongs to at least one of them; parameters tied between
        two modules belong to both modules' layers.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    watch = FirstUses(parameters.values(), _TYPE_OF_OPERATOR)
    with torch.no_grad(), holding(network, {}), watch:
        network(images)
    types = {name: watch.types[id(p)] for name, p in parameters.items() if id(p) in watch.types}
    layers = [layer for name, module in network.named_modules() for layer in _layers_of(name, module, types)]

    def first_use(layer: Layer) -> float:
        return min(watch.first_use.get(id(parameters[name]), float("inf")) for name in layer.parameters)

    layers.sort(key=first_use)  # stable: layers that are never used stay in the order of registration
    if group in _BY_DATAFLOW:
        layers = _with_groups(network, images, layers)
    return [replace(layer, depth=depth) for depth, layer in enumerate(layers)]


def _with_groups(network: nn.Module, images: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers with the attention, the MLP and the convolution with norm that they belong to."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    watch = Dataflow(images, parameters.values())
    with torch.no_grad(), holding(network, {}), in_single_operators(), watch:
        network(images)
    layers_of: dict[int, list[str]] = {}
    for layer in layers:
        for name in layer.parameters:
            layers_of.setdefault(id(parameters[name]), []).append(layer.name)
    pointwise = {layer.name for layer in layers if layer.type == "linear" or set(layer.shape[2:]) == {1}}
    found = Structure(watch.operations, layers_of, {one.name: one.type for one in layers}, pointwise)
    groups = {kind: found.groups(kind) for kind in _BY_DATAFLOW}
    return [
        replace(layer, groups=tuple((kind, of[layer.name]) for kind, of in groups.items() if layer.name in of))
        for layer in layers
    ]


def select_layers(
    layers: Sequence[Layer],
    *,
    types: Iterable[str] = ("conv", "linear"),
    patterns: str | Iterable[str] = "*",
    group: Group = "layer",
) -> list[Layer]:
    """Return the layers that are to be reset.

    Args:
        layers: all layers of the network, from `find_layers`.
        types: which types; see `LAYER_TYPES`, or ``all``.
        patterns: shell-style patterns on layer names, comma-separated or as a list: ``layer1.*,fc``.
        group: ``layer``: each on its own. ``block``: the selected layers of a block are reset together, a block being
            the smallest numbered module with two or more convolutions or linear layers, as do most modules
            numbered beside it (``layer1.0``, ``blocks.3``). ``stage``: likewise the next numbered module around the
            block (``layer1``), or the network's outermost child where there is none (``blocks``). ``attention``: the
            selected layers of an attention, from those that make queries, keys and values to the projection of its
            output, are reset together; ``mlp``: two linear layers (or convolutions of one pixel) with an activation
            between them, whose output is added to a residual; ``conv+norm``: a convolution and the normalisation that
            follows it, of whatever type. Such groups have the name of the module that holds just them, or of the
            innermost one around them with ``.attention`` or ``.mlp``. Layers in no group stay on their own.

    Raises:
        LayerError: a type or group is unknown, a pattern has no match, or nothing is selected.
    """
    wanted = _check_types(types)
    typed = [layer for layer in layers if layer.type in wanted]
    if not typed:
        raise LayerError(
            f"No layer is selected: the network has no layer of type {', '.join(sorted(wanted))}. "
            f"Its types are: {', '.join(sorted({layer.type for layer in layers})) or 'none, it has no parameters'}."
        )
    asked = _texts(patterns, "patterns of layers")
    if not asked:
        raise LayerError("No layer is selected: the list of patterns is empty. Give '*' for all layers.")
    chosen: set[str] = set()
    for pattern in asked:
        matches = [layer.name for layer in typed if fnmatch.fnmatchcase(layer.name, pattern)]
        if not matches:
            raise LayerError(_no_match(pattern, layers, typed, wanted))
        chosen.update(matches)
    selected = [layer for layer in typed if layer.name in chosen]
    if group not in GROUPS:
        raise LayerError(f"Unknown group {group!r}. {near(group, GROUPS)}")
    if group == "conv+norm":  # a normalisation is reset with the convolution that it follows, whatever the types
        with_norm = {_group_of(layer, group) for layer in selected if layer.type == "conv"} - {""}
        chosen.update(layer.name for layer in layers if layer.type == "norm" and _group_of(layer, group) in with_norm)
        selected = [layer for layer in layers if layer.name in chosen]
    if group in ("block", "stage"):
        blocks = blocks_of(layer.name for layer in layers if layer.type in ("conv", "linear"))
        selected = _merge(selected, partial(stage_of if group == "stage" else block_of, blocks=blocks))
    elif group != "layer":
        groups = {layer.name: _group_of(layer, group) or layer.name for layer in selected}
        selected = _merge(selected, groups.__getitem__)
    return [replace(layer, depth=depth) for depth, layer in enumerate(selected)]


def stages_of(names: Sequence[str]) -> dict[str, str]:
    """Return layer name -> stage, where only the names of a network's layers are known.

    The rule is that of ``group="stage"`` in `select_layers`, every layer treated as a convolution. A wrapper around the
    whole network is not a stage: ``model.conv1`` beside ``model.fc`` is a stage of its own.

    Example:
        >>> stages_of(["model.conv1", "model.layer1.0.conv1", "model.layer1.0.conv2"])["model.layer1.0.conv2"]
        'model.layer1'
    """
    wrapper = wrapper_of(names)
    bare = {name: name.removeprefix(wrapper) for name in names}
    blocks = blocks_of(bare.values())
    return {name: wrapper + stage_of(inner, blocks) for name, inner in bare.items()}


def layer_labels(shapes: Mapping[str, str | None]) -> dict[str, str]:
    """Return layer name -> a short label for figures: numbers of stage and block, the rest of the name, kernel size.

    Numbered parts of a network, such as ``layer1.0`` or ``stages.2.blocks.1``, become their numbers in brackets. If two
    labels would be equal, all names stay as they are; so do those of sets of layers, which contain spaces.

    Args:
        shapes: layer name -> shape of its weight, such as ``64x3x7x7``, or None; the kernel of a convolution
            is what follows the second number.

    Example:
        >>> layer_labels({"conv1": "64x3x7x7", "layer1.0.conv2": "64x64x3x3", "fc": "10x64"})
        {'conv1': 'conv1:7x7', 'layer1.0.conv2': '[1.0] conv2:3x3', 'fc': 'fc'}
    """
    wrapper = wrapper_of(shapes)
    labels = {  # the name of a set, such as `all but layer1.0.conv1`, says more than that of one layer
        name: name if " " in name else _label(name.removeprefix(wrapper), shape or "") for name, shape in shapes.items()
    }
    return labels if len(set(labels.values())) == len(labels) else {name: name for name in shapes}


def _label(name: str, shape: str) -> str:
    sizes = shape.split("x")
    kernel = "x".join(sizes[2:]) if len(sizes) > 3 else ""
    numbered = re.match(r"(.+\.\d+)\.(.+)", name)
    holder, rest = (numbered[1], numbered[2]) if numbered else ("", name)
    numbers = re.findall(r"(\d+)(?:\.|$)", holder)
    return (f"[{'.'.join(numbers)}] " if numbers else "") + rest + (f":{kernel}" if kernel else "")


def _layers_of(name: str, module: nn.Module, types: Mapping[str, str]) -> list[Layer]:
    prefix = f"{name}." if name else ""
    own = {
        f"{prefix}{child}": p
        for child, p in module.named_parameters(remove_duplicate=False)
        # torch.nn.utils.parametrize keeps the trained values of `weight` below a child of that name
        if "." not in child or child.startswith("parametrizations.")
    }
    if not own or name.endswith("parametrizations") or ".parametrizations." in f".{name}.":
        return []
    kind = _type_of(module, multiplies=not types.keys().isdisjoint(own))
    if kind != "other":
        return [_layer(name or type(module).__name__, kind, own, prefix, module)]
    units: dict[str, dict[str, nn.Parameter]] = {}
    for parameter in own:
        # a weight and its bias are one layer: attention's `in_proj_weight` and `in_proj_bias` are `in_proj`
        stem = re.sub(r"(^|[._])(weight|bias)$", "", parameter)
        weight = {f"{stem}_weight", f"{stem}.weight".removeprefix(".")}
        unit = parameter if weight.isdisjoint(own) else stem or type(module).__name__
        units.setdefault(unit, {})[parameter] = own[parameter]
    return [
        _layer(unit, next((types[p] for p in members if p in types), "other"), members, prefix, module)
        for unit, members in units.items()
    ]


def _type_of(module: nn.Module, multiplies: bool) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return "linear"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, _NORMS) or ("norm" in type(module).__name__.lower() and not multiplies):
        return "norm"
    return "other"


def _layer(name: str, kind: str, members: dict[str, nn.Parameter], prefix: str, module: nn.Module) -> Layer:
    largest = max(members.values(), key=lambda p: (p.ndim > 1, p.numel()))
    n_parameters = sum(p.numel() for p in members.values())
    buffers = buffers_of_weights(module, [parameter.removeprefix(prefix) for parameter in members])
    of_network = tuple(f"{prefix}{buffer}" for buffer in buffers)
    return Layer(name, kind, tuple(members), tuple(largest.shape), n_parameters, buffers=of_network)


def _texts(given: Iterable[str], what: str) -> list[str]:
    """Return texts that were given with commas between them, or as a list."""
    if not isinstance(given, Iterable):
        raise LayerError(f"Expected {what} as texts; got {shown(given)}. Leave them out for the usual ones.")
    texts: list[object] = [*given.split(",")] if isinstance(given, str) else list(given)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise LayerError(f"Expected {what} as texts; got {shown(wrong[0])}, a {type(wrong[0]).__name__}.")
    return [str(text).strip() for text in texts]


def _check_types(types: Iterable[str]) -> set[str]:
    names = _texts(types, "types of layers")
    for name in names:
        if name not in LAYER_TYPES and name != "all":
            raise LayerError(f"Unknown layer type {name!r}. {near(name, [*LAYER_TYPES, 'all'])}")
    return set(LAYER_TYPES) if "all" in names else set(names)


def _no_match(pattern: str, layers: Sequence[Layer], typed: Sequence[Layer], wanted: set[str]) -> str:
    others = [layer for layer in layers if fnmatch.fnmatchcase(layer.name, pattern)]
    if others:
        found = sorted({layer.type for layer in others} - wanted)
        return (
            f"No layer of type {', '.join(sorted(wanted))} matches {pattern!r}; "
            f"{len(others)} of type {', '.join(found)} would. Add the type with --types (types=...)."
        )
    return f"No layer matches {pattern!r}. {near(pattern, [layer.name for layer in typed])}"


def _group_of(layer: Layer, group: str) -> str:
    """Return the name of a layer's attention, MLP or convolution with norm; empty where it is in none."""
    if layer.groups is None:
        raise LayerError(
            f"Which layers make {group} was not looked for when they were found. Find them with "
            f"find_layers(network, images, group={group!r})."
        )
    return dict(layer.groups).get(group, "")


def _merge(layers: Sequence[Layer], group_name: Callable[[str], str]) -> list[Layer]:
    group_of = {layer.name: group_name(layer.name) for layer in layers}
    first = {group_of[layer.name]: layer.depth for layer in reversed(layers)}
    ordered = sorted(layers, key=lambda layer: (first[group_of[layer.name]], layer.depth))
    return [joined(name, list(members)) for name, members in groupby(ordered, key=lambda layer: group_of[layer.name])]


def joined(name: str, layers: Sequence[Layer]) -> Layer:
    """Return some layers, in depth order, as one unit of reset."""
    return Layer(
        name=name,
        type="+".join(dict.fromkeys(kind for layer in layers for kind in layer.type.split("+"))) or "none",
        parameters=tuple(dict.fromkeys(p for layer in layers for p in layer.parameters)),
        shape=max((layer.shape for layer in layers), key=lambda s: (len(s) > 1, torch.Size(s).numel()), default=()),
        n_parameters=sum(layer.n_parameters for layer in layers),
        depth=layers[0].depth if layers else 0,
        buffers=tuple(dict.fromkeys(b for layer in layers for b in layer.buffers)),
    )


def shared_parameters(layers: Sequence[Layer], network: nn.Module) -> dict[str, Shared]:
    """Return the layers that share parameters with an earlier one: name -> what they share.

    Args:
        layers: in depth order; sets of layers, which are meant to overlap, are left out.
        network: whose layers they are.
    """
    first: dict[str, str] = {}  # layer -> the first of those that it shares parameters with, itself at first
    own: dict[str, dict[nn.Parameter, str]] = {}
    owner: dict[nn.Parameter, str] = {}
    for layer in (one for one in layers if not one.members):
        mine = _distinct(layer.parameters, network)
        together = {first[owner[parameter]] for parameter in mine if parameter in owner}
        own[layer.name] = {parameter: name for parameter, name in mine.items() if parameter not in owner}
        first[layer.name] = min(together, key=list(first).index, default=layer.name)
        first |= {name: first[layer.name] for name, of in first.items() if of in together}
        owner |= dict.fromkeys(own[layer.name], layer.name)
    return {
        name: Shared(of, tuple(own[name].values()), sum(parameter.numel() for parameter in own[name]))
        for name, of in first.items()
        if of != name
    }


def joined_where_shared(layers: Sequence[Layer], network: nn.Module) -> list[Layer]:
    """Return the layers, those that share parameters as one: ``encode + decode``, with each parameter once.

    Args:
        layers: in depth order.
        network: whose layers they are.
    """
    shared = shared_parameters(layers, network)
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(shared[layer.name].first if layer.name in shared else layer.name, []).append(layer)
    found = []
    for depth, members in enumerate(groups.values()):
        one = joined(" + ".join(layer.name for layer in members), members) if len(members) > 1 else members[0]
        own = _distinct(one.parameters, network)
        n_parameters = sum(parameter.numel() for parameter in own)
        found.append(replace(one, parameters=tuple(own.values()), n_parameters=n_parameters, depth=depth))
    return found


def _distinct(names: Iterable[str], network: nn.Module) -> dict[nn.Parameter, str]:
    """Return the parameters of these names, each with the first of its names."""
    found: dict[nn.Parameter, str] = {}
    for name in names:
        found.setdefault(network.get_parameter(name), name)
    return found
