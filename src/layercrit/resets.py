"""What a reset does to a layer's parameters, and where fresh values come from."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layercrit.errors import ModelError, ProtocolError
from layercrit.layers import Layer
from layercrit.models.checkpoints import hash_tensors, read_checkpoint
from layercrit.models.file_source import weight_file
from layercrit.models.fitting import fit
from layercrit.models.model import Model
from layercrit.registry import Registry, summary_of
from layercrit.seeds import drawing, layer_seed, seed_of

__all__ = [
    "RESETS",
    "Donor",
    "Draw",
    "Reset",
    "donor_values",
    "draw_values",
    "get_reset",
    "given_donor",
    "reset",
    "seed_of",
]


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
    """Return the new values of a layer's parameters for one trial.

    Args:
        how: the reset.
        layer: the layer.
        network: the trained network.
        donor: all parameters of the trial's donor; may be empty where the reset needs none.
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
    return {name: values[name].detach().to(trained[name].dtype) for name in trained}


def donor_values(model: Model, layers: Iterable[Layer], seed: int) -> dict[str, Tensor]:
    """Return all parameters of a freshly initialised network of the model's architecture.

    The network is built again under the seed if the model knows how; otherwise a copy of it is re-initialised
    module by module, children before their parents as in construction, by the modules' own ``reset_parameters``.

    Raises:
        ModelError: a module that owns parameters of ``layers`` has no initialiser, or the rebuilt network differs.
    """
    needed = {name for layer in layers for name in layer.parameters}
    with drawing(seed), torch.no_grad():
        donor = model.build() if model.build is not None else _reinitialised(model.network, needed)
    values = _parameters(donor)
    if unlike := _unlike(values, model, needed):
        raise ModelError(
            f"The network that {model.initialiser} builds is not that of {model.reference!r}: {len(unlike)} "
            f"parameters are missing or have another shape, the first is {unlike[0]!r}. "
            "Give a donor of the same architecture."
        )
    return values


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
    values = _parameters(donor)
    if unlike := _unlike(values, model, {name for layer in layers for name in layer.parameters}):
        wanted = tuple(model.network.get_parameter(unlike[0]).shape)
        found = f"has it in the shape {tuple(values[unlike[0]].shape)}" if unlike[0] in values else "lacks it"
        raise ModelError(
            f"The donor is not of the architecture of {model.reference!r}: expected a parameter {unlike[0]!r} of shape "
            f"{wanted}, the donor {found}{f'; {len(unlike)} parameters differ' if len(unlike) > 1 else ''}. "
            "Give a network of the same architecture."
        )
    sha256 = hash_tensors(values)
    return Donor(values, f"given: a network {type(donor).__name__}, SHA-256 {sha256}", sha256)


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in network.named_parameters(remove_duplicate=False)}


def _unlike(values: Mapping[str, Tensor], model: Model, needed: Iterable[str]) -> list[str]:
    """Return the needed parameters that are missing from the values, or have another shape than in the model."""
    trained = dict(model.network.named_parameters(remove_duplicate=False))
    return sorted(name for name in needed if name not in values or values[name].shape != trained[name].shape)


def _reinitialised(network: nn.Module, needed: set[str]) -> nn.Module:
    donor = copy.deepcopy(network).cpu()
    without = []
    for name, module in _children_first(donor):
        own = {f"{name}.{child}" if name else child for child, _ in module.named_parameters(recurse=False)}
        initialise = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(initialise):
            initialise()
        elif own & needed:
            without.append(f"{name or 'the network itself'} ({type(module).__name__})")
    if without:
        raise ModelError(
            "These modules own parameters to be reset but have no reset_parameters method, so fresh values cannot be "
            f"drawn: {', '.join(without[:8])}{' ...' if len(without) > 8 else ''}. "
            "Open the model by reference (timm:, torchvision:, hf:, py:), or give a freshly initialised donor."
        )
    return donor


def _children_first(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module below and including one, once, in the order in which they were built."""
    seen = set() if seen is None else seen
    for child_name, child in module.named_children():
        if child not in seen:
            yield from _children_first(child, f"{name}.{child_name}" if name else child_name, seen)
    seen.add(module)
    yield name, module
