"""What a reset does to a layer's parameters: the registry of resets, and how they are applied."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from layercrit.computed_weights import owner_of, settle
from layercrit.donors import Donor, check_draws, donor_values, own_initialiser, read_donor
from layercrit.errors import ProtocolError, shown
from layercrit.layers import Layer
from layercrit.models.file_source import training_run
from layercrit.models.model import Model
from layercrit.named_options import AtLeast, Option, checked_options, options_of, split_name, with_options
from layercrit.registry import Registry, summary_of
from layercrit.restoring import copied
from layercrit.seeds import layer_seed, seed_of

__all__ = [
    "RESETS",
    "AtLeast",
    "Donor",
    "Draw",
    "Reset",
    "check_draws",
    "donor_values",
    "draw_values",
    "epoch_of_run",
    "get_reset",
    "given_donor",
    "own_initialiser",
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
        channel_axes: parameter name -> the axis of its output channels, where that is not the first.
    """

    layer: Layer
    trained: Mapping[str, Tensor]
    donor: Mapping[str, Tensor]
    generator: torch.Generator
    channel_axes: Mapping[str, int] = field(default_factory=dict)


ResetFunction = Callable[..., Mapping[str, Tensor]]
"""Makes new values from a `Draw`; its keyword-only parameters are the reset's options."""


@dataclass(frozen=True)
class Reset:
    """A registered reset, or one with a choice of its options.

    Attributes:
        name: its name on the command line and in tables, with its options: ``noise(scale=0.5)``.
        function: makes the new values.
        random: whether trials differ.
        donor: where ``Draw.donor`` comes from: ``initialiser`` (a fresh network), ``checkpoint`` (an earlier one of the
            same training run), ``model`` (another model), or None.
        summary: one line for tables.
        branch: whether a unit's parameters are, for this reset, those that end the residual branches in it.
        declared: the options it has.
        options: their values.
    """

    name: str
    function: ResetFunction
    random: bool
    donor: str | None
    summary: str
    branch: bool = False
    declared: Mapping[str, Option] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Its name without options, from which seeds are hashed: trials of all scales of noise share their draws."""
        return self.name.partition("(")[0]


RESETS = Registry[Reset]("reset", ProtocolError, "layercrit.resets", summary=lambda reset: reset.summary)
"""All resets by name, filled by `reset` and by installed plug-ins."""


def reset(
    name: str, *, random: bool, donor: str | None = None, branch: bool = False
) -> Callable[[ResetFunction], ResetFunction]:
    """Register a reset under a name, for `measure`, the command line and the tables.

    The function's keyword-only parameters are options, which stand in the name: ``shrink(by=0.5)``. Each is annotated
    as `layercrit.named_options.options_of` says. The name in tables has all of them, but those that are None.

    Args:
        name: the name.
        random: whether trials differ. A reset that is not random is run once, whatever the number of trials.
        donor: ``initialiser`` if the function reads the values of a freshly initialised network from ``draw.donor``,
            ``checkpoint`` if it reads those of an earlier checkpoint of the same training run (whose option ``epoch``,
            if it has one, says which), ``model`` if it reads those of another model, None if it reads none.
        branch: whether ``draw.trained`` has, in place of the unit's parameters, those that end its residual branches:
            were they 0, so would be the branches. Units without one get no reset.

    Raises:
        ProtocolError: the name is taken by another function or not valid, or an option is not declared as it must be.

    Examples:
        >>> import layercrit
        >>> @layercrit.reset("negate", random=False)
        ... def negate(draw):
        ...     '''The layer's values with their signs flipped.'''
        ...     return {name: -value for name, value in draw.trained.items()}
    """

    def register(function: ResetFunction) -> ResetFunction:
        try:
            declared = options_of(function)
        except (TypeError, NameError) as error:
            raise ProtocolError(f"The reset {name!r} cannot be registered: {error}.") from error
        RESETS[name] = Reset(name, function, random, donor, summary_of(function), branch, declared)
        return function

    return register


def get_reset(name: str) -> Reset:
    """Return a registered reset with the options that its name has.

    Args:
        name: such as ``rerandomize``, ``noise(scale=0.5)``, or ``noise`` for its options' default values. Equal options
            give equal names: ``noise( scale = .50 )`` is ``noise(scale=0.5)``.

    Raises:
        ProtocolError: no reset has this name, or an option is unknown, missing or out of range.
    """
    base, given = split_name(name, "reset", ProtocolError)
    found = RESETS.find(base)
    if not found.declared and not given:
        return found
    options = checked_options(f"The reset {base!r}", given, found.declared, ProtocolError)
    return replace(
        found, name=with_options(base, options), function=partial(found.function, **options), options=options
    )


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
def rewind(draw: Draw, *, epoch: Annotated[int | None, AtLeast(0)] = None) -> Mapping[str, Tensor]:
    """The layer's values in an earlier checkpoint of its training run, such as ``epoch=0`` (Zhang et al. 2022)."""
    return draw.donor


@reset("noise", random=True)
def noise(draw: Draw, *, scale: Annotated[float, AtLeast(0)] = 1.0) -> Mapping[str, Tensor]:
    """The trained values plus normal noise, ``scale`` times the root mean square of each parameter tensor."""
    return {
        name: value + scale * value.abs().double().square().mean().sqrt() * _normal(value, draw.generator)
        for name, value in draw.trained.items()
    }


@reset("moments", random=True)
def moments(draw: Draw, *, per: Literal["tensor", "channel"] = "tensor") -> Mapping[str, Tensor]:
    """A fresh normal draw with the own mean and SD of each tensor, or with ``per=channel`` of each output channel."""
    drawn = {}
    for name, value in draw.trained.items():
        # a bias has one value a channel, whose SD is 0: per channel, it stays
        axes = [axis for axis in range(value.ndim) if per == "tensor" or axis != draw.channel_axes.get(name, 0)]
        wide = value.to(torch.promote_types(value.dtype, torch.float64))
        centre, spread = wide, torch.zeros(())
        if axes or not value.ndim:
            centre = wide.mean(dim=axes, keepdim=True)
            spread = (wide - centre).abs().square().mean(dim=axes, keepdim=True).sqrt()
        drawn[name] = centre + spread * _normal(value, draw.generator)
    return drawn


@reset("skip", random=False, branch=True)
def skip(draw: Draw) -> Mapping[str, Tensor]:
    """The residual branches of a block are left out: its output is its shortcut."""
    return {name: torch.zeros_like(value) for name, value in draw.trained.items()}


@reset("donor", random=False, donor="model")
def donor(draw: Draw) -> Mapping[str, Tensor]:
    """The layer's values in another model of the same architecture."""
    return draw.donor


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers in the shape of a tensor."""
    dtype = like.dtype if like.is_floating_point() or like.is_complex() else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=dtype)


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
        ProtocolError: the reset function returned no mapping, left out a parameter, or returned no tensor or another
            shape for it.
    """
    trained = {name: network.get_parameter(name).detach().cpu().clone() for name in layer.parameters}
    mine = {name: donor[name].clone() for name in layer.parameters} if donor else {}
    generator = torch.Generator().manual_seed(layer_seed(seed, layer.name))
    returned = how.function(Draw(layer, trained, mine, generator, _channel_axes(layer, network)))
    if not isinstance(returned, Mapping):
        raise ProtocolError(
            f"The reset {how.name!r} returned {type(returned).__name__} for layer {layer.name!r}; expected names of "
            "parameters with tensors, such as a dict. Return a value for every name in draw.trained."
        )
    for name, value in trained.items():
        if (got := _misfit(returned, name, value)) is not None:
            raise ProtocolError(
                f"The reset {how.name!r} returned {got} for {name!r} of layer {layer.name!r}; "
                f"expected a tensor of shape {tuple(value.shape)}. Return a value for every name in draw.trained."
            )
    values = {name: returned[name].detach().to(trained[name].dtype) for name in trained}
    return values | _buffers_for(values, layer, network, donor)


def _misfit(returned: Mapping[str, Any], name: str, trained: Tensor) -> str | None:
    """Return what a reset returned for a parameter if it does not fit, in words."""
    if name not in returned:
        return "nothing"
    value = returned[name]
    if not isinstance(value, Tensor):
        return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return None if value.shape == trained.shape else f"shape {tuple(value.shape)}"


def _channel_axes(layer: Layer, network: nn.Module) -> dict[str, int]:
    """Return parameter -> axis of the output channels where it is not the first, as of a transposed convolution."""
    return {
        name: 1
        for name in layer.parameters
        if network.get_parameter(name).ndim > 1
        and isinstance(network.get_submodule(owner_of(name)), nn.modules.conv._ConvTransposeNd)
    }


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


def given_donor(
    donor: nn.Module | str | Path | None, how: Reset, model: Model, layers: Iterable[Layer]
) -> Donor | None:
    """Return the donor that the user gave, checked against the model; None where none was given and none is needed.

    Args:
        donor: as for `layercrit.donors.read_donor`, or None. Where the reset names an epoch, the training run.
        how: the reset.
        model: the trained model.
        layers: what will be reset; a network need only have their parameters.

    Raises:
        ProtocolError: the reset needs a donor and none was given, or the other way round.
        ModelError: the network lacks a parameter or has it in another shape.
        CheckpointError: the file cannot be read or does not fit the architecture, or the run did not keep the epoch.
    """
    if how.donor == "checkpoint" and how.options.get("epoch") is not None:
        return read_donor(epoch_of_run(how, model.reference, donor), model, layers)
    if donor is not None and how.donor is None:
        raise ProtocolError(
            f"A donor was given, but the reset {how.name!r} takes no values from one. Omit --from (donor=...), "
            f"or choose one of {', '.join(name for name, other in RESETS.items() if other.donor)}."
        )
    if donor is not None:
        return read_donor(donor, model, layers)
    if how.donor == "checkpoint":
        raise ProtocolError(
            f"The reset {how.name!r} needs the checkpoint that its values come from: "
            "give a weight file, or DIR@epoch=0 of a training run, with --from (donor=...)."
        )
    if how.donor == "model":
        raise ProtocolError(
            f"The reset {how.name!r} needs the model that its values come from: give a reference such as "
            "timm:resnet50.a1_in1k, or a weight file, with --from (donor=...)."
        )
    return None


def epoch_of_run(how: Reset, reference: str, donor: nn.Module | str | Path | None) -> str:
    """Return ``DIR@epoch=N`` of the epoch that a reset such as ``rewind(epoch=3)`` names.

    Args:
        how: the reset.
        reference: of the model, whose own run is meant where no donor is given.
        donor: the training run: its folder, or a weight file of it.

    Raises:
        ProtocolError: there is no such run.
    """
    where = donor if donor is not None else reference if reference.startswith("file:") else ""
    run = None if isinstance(where, nn.Module) else training_run(where)
    if run is None:
        got = f"{shown(str(donor))} is none" if donor is not None else f"{reference!r} is no model of one"
        raise ProtocolError(
            f"The reset {how.name!r} needs the training run that its values come from, with the epochs that it kept: "
            f"{got}. Give the folder of the run with --from (donor=...), as `layercrit train` leaves it."
        )
    return f"{run}@epoch={how.options['epoch']}"
