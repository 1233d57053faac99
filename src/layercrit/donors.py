"""Where new values come from: fresh draws of the architecture's initialiser, a checkpoint, another model."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layercrit.computed_weights import has_hooks, made_plain, owner_of, settle
from layercrit.errors import ModelError
from layercrit.layers import Layer
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.file_source import read_weights, weight_file
from layercrit.models.fitting import fit
from layercrit.models.model import Model
from layercrit.models.references import open_model
from layercrit.models.sources import MODEL_SOURCES
from layercrit.restoring import copied
from layercrit.seeds import drawing

__all__ = ["Donor", "check_draws", "donor_values", "is_reference", "own_initialiser", "read_donor"]

# whose matrices their reset_parameters draws
_DRAWN_BY_TORCH = (
    nn.modules.conv._ConvNd,
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
)


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


def read_donor(donor: nn.Module | str | Path, model: Model, layers: Iterable[Layer]) -> Donor:
    """Return the values of a donor that the user gave, checked against the model.

    Args:
        donor: a network of the model's architecture, a model reference such as ``timm:resnet50.a1_in1k``, or a path
            that `weight_file` accepts.
        model: the trained model.
        layers: what will be reset; a network need only have their parameters.

    Raises:
        ModelError: the donor is something else, the network lacks a parameter or has it in another shape, or the
            reference cannot be opened.
        CheckpointError: the file cannot be read or does not fit the architecture.
    """
    if isinstance(donor, nn.Module):
        values = _checked(donor, model, layers)
        sha256 = hash_tensors(values)
        return Donor(values, f"given: a network {type(donor).__name__}, SHA-256 {sha256}", sha256)
    if is_reference(donor):
        opened = open_model(str(donor))
        values = _checked(opened.network, model, layers)
        origin = " ".join([f"given: the model {opened.reference}, SHA-256 {opened.sha256}", *opened.notes])
        return Donor(values, origin, hash_tensors(values))
    if not isinstance(donor, str | Path):
        raise ModelError(
            f"A donor is a network, a model reference or a weight file, not a {type(donor).__name__}. Load tensors "
            "into a network of the model's architecture (load_state_dict), or save them (safetensors.torch.save_file)."
        )
    checkpoint = read_weights(weight_file(donor))
    fitted = fit(checkpoint, model.network.state_dict(), f"{donor} for {model.reference}")
    origin = " ".join([f"given: the file {donor}, SHA-256 {checkpoint.sha256}", *fitted.notes])
    return Donor(fitted.tensors, origin, hash_tensors(fitted.tensors))


def is_reference(donor: str | Path) -> bool:
    """Whether a donor is a model reference rather than a path, which begins with no kind of model: ``./file:x``."""
    kind, colon, _ = str(donor).partition(":")
    return isinstance(donor, str) and bool(colon) and kind in MODEL_SOURCES


def _checked(network: nn.Module, model: Model, layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Return the values of a donor's network.

    Raises:
        ModelError: it lacks a parameter of the layers or has it in another shape; the text says which.
    """
    needed = _needed(layers)
    values = _values(network, needed)
    if unlike := _unlike(values, model, needed):
        wanted = tuple(_tensors(model.network)[unlike[0]].shape)
        found = f"has it in the shape {tuple(values[unlike[0]].shape)}" if unlike[0] in values else "lacks it"
        raise ModelError(
            f"The donor is not of the architecture of {model.reference!r}: expected a parameter {unlike[0]!r} of shape "
            f"{wanted}, the donor {found}{f'; {len(unlike)} parameters differ' if len(unlike) > 1 else ''}. "
            "Give a network of the same architecture."
        )
    return values


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
