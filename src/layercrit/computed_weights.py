"""Weights that a module computes from other tensors: weight and spectral normalisation, pruning, parametrizations.

PyTorch has two ways. ``weight_norm``, ``spectral_norm`` and ``prune`` of `torch.nn.utils` register a hook that computes
``weight``, then a plain tensor, before each forward; `torch.nn.utils.parametrize` puts a property in its place.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

__all__ = ["buffers_of_weights", "has_hooks", "made_plain", "owner_of", "settle"]

_POWER_ITERATIONS = 100  # after which the largest singular value of a random matrix is right to a few thousandths


def buffers_of_weights(module: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Return the names of the buffers from which a module computes weights, beside some of its parameters.

    They belong to the parameters' values: spectral normalisation divides by ``u`` x weight x ``v``, which is the norm
    only of the weight that ``u`` and ``v`` were found for. Masks of pruning are not among them.

    Args:
        module: a module of a network.
        parameters: names of parameters within the module, such as ``weight_orig`` or
            ``parametrizations.weight.original``.
    """
    asked = set(parameters)
    parametrized = {".".join(name.split(".")[:2]) for name in asked if name.startswith("parametrizations.")}
    hooks = [hook for hook in _hooks(module) if isinstance(hook, SpectralNorm) and f"{hook.name}_orig" in asked]
    return [
        *(f"{hook.name}_{vector}" for hook in hooks for vector in "uv"),
        *(name for name, _ in module.named_buffers() if ".".join(name.split(".")[:2]) in parametrized),
    ]


def has_hooks(module: nn.Module) -> bool:
    """Return whether one of the older functions computes a weight of a module."""
    return any(isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod) for hook in _hooks(module))


def owner_of(name: str) -> str:
    """Return the name of the module that has a parameter or buffer, be it below its parametrizations."""
    module, parametrized, _ = f".{name}".partition(".parametrizations.")
    return module.removeprefix(".") if parametrized else name.rpartition(".")[0]


def made_plain(network: nn.Module) -> Callable[[], None]:
    """Turn all computed weights of a network into plain parameters.

    Returns:
        what makes them computed again, from whatever the parameters are by then: as on construction, with the vectors
        of spectral normalisation drawn anew. Masks of pruning stay.
    """
    again: list[Callable[[], object]] = []
    for module in list(network.modules()):
        for hook in reversed(_hooks(module)):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
                again.insert(0, partial(WeightNorm.apply, module, hook.name, hook.dim))
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
                settings = (hook.n_power_iterations, hook.dim, hook.eps)
                again.insert(0, partial(SpectralNorm.apply, module, hook.name, *settings))
            elif isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                mask = module.get_buffer(f"{name}_mask")
                prune.remove(module, name)  # type: ignore[no-untyped-call]
                again.insert(0, partial(prune.custom_from_mask, module, name, mask))
        again += _without_parametrizations(module)

    def compute_again() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that the network uses the older functions
            for apply in again:
                apply()

    return compute_again


def settle(network: nn.Module) -> None:
    """Let the vectors of spectral normalisation follow their weights, as they do during training."""
    for module in network.modules():
        for hook in _hooks(module):
            if isinstance(hook, SpectralNorm):
                for _ in range(_POWER_ITERATIONS):
                    hook.compute_weight(module, do_power_iteration=True)
        for steps in getattr(module, "parametrizations", {}).values() if parametrize.is_parametrized(module) else ():
            if any(isinstance(step, _SpectralNorm) for step in steps):
                steps.train()
                for _ in range(_POWER_ITERATIONS):
                    steps()


def _hooks(module: nn.Module) -> list[Callable[..., object]]:
    return [] if isinstance(module, torch.jit.ScriptModule) else list(module._forward_pre_hooks.values())


def _without_parametrizations(module: nn.Module) -> list[Callable[[], object]]:
    if not parametrize.is_parametrized(module):
        return []
    # torch removes properties from the module's class, which a copy of the module shares with the network
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    again: list[Callable[[], object]] = []
    for name, steps in list(module.parametrizations.items()):  # type: ignore[operator, union-attr]
        is_parameter = any(True for _ in steps.parameters(recurse=False))
        parametrize.remove_parametrizations(module, name)
        value = getattr(module, name)
        if is_parameter and not isinstance(value, nn.Parameter):  # torch makes a buffer of it without gradients
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(value))
        again += [partial(_parametrized, module, name, step) for step in steps]
    return again


def _parametrized(module: nn.Module, name: str, step: nn.Module) -> None:
    if isinstance(step, _SpectralNorm):
        iterations = getattr(step, "n_power_iterations", 1)  # a vector needs none
        parametrizations.spectral_norm(module, name, iterations, step.eps, step.dim)
    else:
        parametrize.register_parametrization(module, name, step, unsafe=True)
