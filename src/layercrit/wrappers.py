"""The prefixes that wrappers around a network put before the names of its parameters and layers."""

from collections.abc import Iterable

__all__ = ["WRAPPER_PREFIXES", "wrapper_of"]

WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.", "network.", "backbone.")
"""Prefixes of parameter names: data parallelism, Lightning, ``torch.compile`` and common usage."""


def wrapper_of(names: Iterable[str]) -> str:
    """Return the prefix that wrappers put before all of some names, such as ``model.``; empty if there is none."""
    found, inner = "", list(names)
    while shared := next((w for w in WRAPPER_PREFIXES if inner and all(name.startswith(w) for name in inner)), ""):
        found, inner = found + shared, [name.removeprefix(shared) for name in inner]
    return found
