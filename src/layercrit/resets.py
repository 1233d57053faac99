"""What a reset does to a layer's parameters, and where fresh values come from."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layercrit.computed_weights import has_hooks, made_plain, owner_of, settle
from layercrit.errors import ModelError, ProtocolError
from layercrit.layers import Layer
from layercrit.models.checkpoints import hash_tensors, read_checkpoint
from layercrit.models.file_source import weight_file
from layercrit.models.fitting import fit
from layercrit.models.model import Model
from layercrit.registry import Registry, summary_of
from layercrit.restoring import copied
from layercrit.seeds import drawing, layer_seed, seed_of

__all__ = [
    "RESETS",
    "Donor",
    "Draw",
    "Reset",
    "check_draws",
    "donor_values",
    "draw_values",
    "get_reset",
    "given_donor",
    "own_initialiser",
    "reset",
    "seed_of",
]


# whose matrices their reset_parameters draws
_DRAWN_BY_TORCH = (
    nn.modules.conv._ConvNd,
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
)


@dataclass(frozen=True)
class Draw:
    """What a reset gets to make a layer's new values from.

    Attributes:
        layer: the layer to be reset.
        trained: a copy of its trained values on the CPU, parameter name -> tensor.
        donor: a copy of the same layer's values in the trial's donor (a freshly initialised network, or for ``rewind``
            the checkpoint). Empty for resets that need none.
        generator: random numbers of this trial and layer.
    """

    layer: Layer
    trained: Mapping[str, Tensor]
    donor: Mapping[str, Tensor]
    generator: torch.Generator


ResetFunction = Callable[[Draw], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reset:
    """A registered reset.

    Attributes:
        name: its name on the command line and in tables.
        function: makes the new values.
        random: whether trials differ.
        donor: where ``Draw.donor`` comes from: ``initialiser`` (a fresh network), ``checkpoint`` (a file), or None.
        summary: one line for tables.
    """

    name: str
    function: ResetFunction
    random: bool
    donor: str | None
    summary: str


RESETS = Registry[Reset]("reset", ProtocolError, "layercrit.resets", summary=lambda reset: reset.summary)
"""All resets by name, filled by `reset` and by installed plug-ins."""


def reset(name: str, *, random: bool, donor: str | None = None) -> Callable[[ResetFunction], ResetFunction]:
    """Register a reset under a name, for `measure`, the command line and the tables.

    Args:
        name: the name.
        random: whether trials differ. A reset that is not random is run once, whatever the number of trials.
        donor: ``initialiser`` if the function reads the values of a freshly initialised network from ``draw.donor``,
            ``checkpoint`` if it reads those of a file, None if it reads neither.

    Raises:
        ProtocolError: the name is taken by another function, or is not valid.

    Example:
        >>> @reset("negate", random=False)
        ... def negate(draw):
        ...     '''The layer's values with their signs flipped.'''
        ...     return {name: -value for name, value in draw.trained.items()}
        >>> RESETS["negate"].summary
        "The layer's values with their signs flipped."
        >>> del RESETS["negate"]
    """

    def register(function: ResetFunction) -> ResetFunction:
        RESETS[name] = Reset(name, function, random, donor, summary_of(function))
        return function

    return register


def get_reset(name: str) -> Reset:
    """Return a registered reset.

    Raises:
        ProtocolError: no reset has this name.
    """
    return RESETS.find(name)


@reset("rerandomize", random=True, donor="initialiser")
def rerandomize(draw: Draw) -> Mapping[str, Tensor]:
    """A fresh draw from the architecture's own initialiser (Zhang et al. 2022, section 3; Gavrikov et al. 2024)."""
    return draw.donor


@reset("zero", random=False)
def zero(draw: Draw) -> Mapping[str, Tensor]:
    """All values 0."""
    return {name: torch.zeros_like(value) for name, value in draw.trained.items()}


@reset("permute", random=True)
def permute(draw: Draw) -> Mapping[str, Tensor]:
    """The layer's own trained values in random order, each parameter tensor by itself."""
    return {
        name: value.flatten()[torch.randperm(value.numel(), generator=draw.generator)].view_as(value)
        for name, value in draw.trained.items()
    }


@reset("rewind", random=False, donor="checkpoint")
def rewind(draw: Draw) -> Mapping[str, Tensor]:
    """The layer's values in an earlier checkpoint of the same training run (Zhang et al. 2022: re-initialisation)."""
    return draw.donor


def draw_values(
    how: Reset, layer: Layer, network: nn.Module, donor: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the new values of a layer's parameters, and of the buffers that belong to them, for one trial.

    Args:
        how: the reset.
        layer: the layer.
        network: the trained network.
        donor: all parameters and the layers' buffers of the trial's donor; empty where the reset needs none.
        seed: the trial's seed. Random numbers of a layer are drawn under a seed hashed from it and the layer's name,
            so that they do not depend on which other layers are reset.

    Raises:
        ProtocolError: the reset function left out a parameter or returned another shape.
    """
    trained = {name: network.get_parameter(name).detach().cpu().clone() for name in layer.parameters}
    mine = {name: donor[name].clone() for name in layer.parameters} if donor else {}
    generator = torch.Generator().manual_seed(layer_seed(seed, layer.name))
    values = dict(how.function(Draw(layer, trained, mine, generator)))
    for name, value in trained.items():
        if name not in values or values[name].shape != value.shape:
            got = f"shape {tuple(values[name].shape)}" if name in values else "nothing"
            raise ProtocolError(
                f"The reset {how.name!r} returned {got} for {name!r} of layer {layer.name!r}; "
                f"expected a tensor of shape {tuple(value.shape)}. Return a value for every name in draw.trained."
            )
    values = {name: values[name].detach().to(trained[name].dtype) for name in trained}
    return values | _buffers_for(values, layer, network, donor)


def _buffers_for(
    values: Mapping[str, Tensor], layer: Layer, network: nn.Module, donor: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the layer's buffers that belong to its new values: the donor's, or else found anew."""
    if donor and all(torch.equal(values[name], donor[name]) for name in layer.parameters):
        return {name: donor[name].clone() for name in layer.buffers}
    found: dict[str, Tensor] = {}
    for owner in dict.fromkeys(owner_of(name) for name in layer.buffers):
        module, prefix = copied(network.get_submodule(owner)).cpu(), f"{owner}." if owner else ""
        with torch.no_grad():
            for name, value in values.items():
                if owner_of(name) == owner:
                    module.get_parameter(name.removeprefix(prefix)).copy_(value)
            settle(module)
        mine = (name for name in layer.buffers if owner_of(name) == owner)
        found |= {name: module.get_buffer(name.removeprefix(prefix)).detach().clone() for name in mine}
    return found


def donor_values(model: Model, layers: Iterable[Layer], seed: int) -> dict[str, Tensor]:
    """Return all parameters of a freshly initialised network of the model's architecture, and the layers' buffers.

    The network is built again under the seed if the model knows how; otherwise a copy of it is re-initialised
    module by module, children before their parents as in construction, by the modules' own ``reset_parameters``.

    Raises:
        ModelError: nothing initialises some parameters of ``layers``, or the rebuilt network differs.
    """
    needed = _needed(layers)
    values = _values(_fresh(model, needed, seed), needed)
    if unlike := _unlike(values, model, needed):
        raise ModelError(
            f"The network that {model.initialiser} builds is not that of {model.reference!r}: {len(unlike)} "
            f"parameters are missing or have another shape, the first is {unlike[0]!r}. "
            "Give a donor of the same architecture."
        )
    return values


def own_initialiser(model: Model, layers: Iterable[Layer]) -> str:
    """Say in words what draws fresh values where no donor is given; equal texts mean equal values under a seed."""
    if model.build is not None:
        return model.initialiser
    computed = any(has_hooks(model.network.get_submodule(owner_of(name))) for name in _needed(layers))
    return "each module's own reset_parameters" + ", then its weights' normalisation or pruning" * computed


def check_draws(model: Model, layers: Iterable[Layer]) -> None:
    """Make sure that fresh values are drawn: matrices of PyTorch's own layers differ between two seeds.

    Those that their initialiser sets to one value, or to zeros and ones, need not; nor does what is not trained.

    Raises:
        ModelError: some do not differ, as when a factory sets a seed of its own or loads trained weights; it names one.
    """
    needed = _needed(layers)
    one, other = (_fresh(model, needed, seed) for seed in (0, 1))
    values, again = _values(one, needed), _values(other, needed)
    same = [
        name
        for name, parameter in one.named_parameters(remove_duplicate=False)
        if name in needed and parameter.requires_grad and parameter.ndim > 1 and name in again
        if isinstance(one.get_submodule(owner_of(name)), _DRAWN_BY_TORCH)
        if torch.equal(values[name], again[name]) and len(torch.unique(values[name])) > 2
    ]
    if same:
        raise ModelError(
            f"{own_initialiser(model, layers)} of {model.reference!r} gives {same[0]!r}"
            f"{f' and {len(same) - 1} more' if len(same) > 1 else ''} the same values under two seeds, so a "
            "reset would not be a draw. If it sets a seed or loads trained weights, let it do neither when its weights "
            "are to be fresh; or give a freshly initialised donor with --from (donor=...), or leave these layers out "
            "with --layers (layers=...)."
        )


def _fresh(model: Model, needed: Collection[str], seed: int) -> nn.Module:
    with drawing(seed), torch.no_grad():
        network = model.build() if model.build is not None else _reinitialised(model.network, needed)
        settle(network)
    return network


@dataclass(frozen=True)
class Donor:
    """A donor that the user gave, the same for every trial.

    Attributes:
        values: parameter name -> value on the CPU.
        origin: what it is, in words, with its hash.
        sha256: hash of its values, hexadecimal.
    """

    values: Mapping[str, Tensor]
    origin: str
    sha256: str


def given_donor(
    donor: nn.Module | str | Path | None, how: Reset, model: Model, layers: Iterable[Layer]
) -> Donor | None:
    """Return the donor that the user gave, checked against the model; None where none was given and none is needed.

    Args:
        donor: a network of the model's architecture, a path that `weight_file` accepts, or None.
        how: the reset.
        model: the trained model.
        layers: what will be reset; a network need only have their parameters.

    Raises:
        ProtocolError: the reset needs a donor and none was given, or the other way round.
        ModelError: the network lacks a parameter or has it in another shape.
        CheckpointError: the file cannot be read or does not fit the architecture.
    """
    if donor is None:
        if how.donor == "checkpoint":
            raise ProtocolError(
                f"The reset {how.name!r} needs the checkpoint that its values come from: "
                "give a weight file, or DIR@epoch=0 of a training run, with --from (donor=...)."
            )
        return None
    if how.donor is None:
        raise ProtocolError(
            f"A donor was given, but the reset {how.name!r} takes no values from one. Omit --from (donor=...), "
            f"or choose one of {', '.join(name for name, other in RESETS.items() if other.donor)}."
        )
    if not isinstance(donor, nn.Module):
        checkpoint = read_checkpoint(weight_file(donor))
        fitted = fit(checkpoint, model.network.state_dict(), f"{donor} for {model.reference}")
        origin = " ".join([f"given: the file {donor}, SHA-256 {checkpoint.sha256}", *fitted.notes])
        return Donor(fitted.tensors, origin, hash_tensors(fitted.tensors))
    needed = _needed(layers)
    values = _values(donor, needed)
    if unlike := _unlike(values, model, needed):
        wanted = tuple(_tensors(model.network)[unlike[0]].shape)
        found = f"has it in the shape {tuple(values[unlike[0]].shape)}" if unlike[0] in values else "lacks it"
        raise ModelError(
            f"The donor is not of the architecture of {model.reference!r}: expected a parameter {unlike[0]!r} of shape "
            f"{wanted}, the donor {found}{f'; {len(unlike)} parameters differ' if len(unlike) > 1 else ''}. "
            "Give a network of the same architecture."
        )
    sha256 = hash_tensors(values)
    return Donor(values, f"given: a network {type(donor).__name__}, SHA-256 {sha256}", sha256)


def _needed(layers: Iterable[Layer]) -> set[str]:
    """Return the names of all parameters and buffers that resets of the layers replace."""
    return {name for layer in layers for name in (*layer.parameters, *layer.buffers)}


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(network.named_buffers(remove_duplicate=False))}


def _values(network: nn.Module, needed: Collection[str]) -> dict[str, Tensor]:
    """Return all parameters of a network and the needed ones of its buffers, on the CPU."""
    return {
        name: tensor.detach().cpu()
        for name, tensor in _tensors(network).items()
        if isinstance(tensor, nn.Parameter) or name in needed
    }


def _unlike(values: Mapping[str, Tensor], model: Model, needed: Iterable[str]) -> list[str]:
    """Return the needed values that are missing, or have another shape than in the model."""
    trained = _tensors(model.network)
    return sorted(name for name in needed if name not in values or values[name].shape != trained[name].shape)


def _reinitialised(network: nn.Module, needed: Collection[str]) -> nn.Module:
    donor = copied(network).cpu()
    modules = list(_children_first(donor))
    compute_again = made_plain(donor)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.fill_(math.nan)  # which is left where no initialiser writes
    for module in modules:
        initialise = _initialiser_of(module)
        if initialise is not None:
            initialise()
    compute_again()
    values = _tensors(donor)
    if left := [name for name in values if name in needed and values[name].isnan().any()]:
        raise ModelError(_not_drawn(donor, left))
    return donor


def _initialiser_of(module: nn.Module) -> Callable[[], object] | None:
    initialise = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return initialise if callable(initialise) else None


def _not_drawn(donor: nn.Module, left: Iterable[str]) -> str:
    """Say which parameters no initialiser has written, with the ways out."""
    owners = {name: donor.get_submodule(name.rpartition(".")[0]) for name in left}
    without = {
        f"{name.rpartition('.')[0] or 'the network itself'} ({type(module).__name__})": None
        for name, module in owners.items()
        if _initialiser_of(module) is None
    }
    if without:
        text = (
            "These modules own parameters to be reset but have no reset_parameters method, so fresh values cannot be "
            f"drawn: {', '.join(list(without)[:8])}{' ...' if len(without) > 8 else ''}. "
        )
    else:
        names = [f"{name!r} ({type(module).__name__})" for name, module in owners.items()]
        text = (
            "These parameters are to be reset, but their modules' reset_parameters does not write them, or reads "
            f"their trained values: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. "
        )
    return text + "Open the model by reference (timm:, torchvision:, hf:, py:), or give a freshly initialised donor."


def _children_first(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """Yield each module below and including one, once, in the order in which they were built."""
    seen = set() if seen is None else seen
    for child in module.children():
        if child not in seen:
            yield from _children_first(child, seen)
    seen.add(module)
    yield module
