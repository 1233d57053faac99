"""Seeds, hashed from names, and random generators seeded with them."""

import hashlib
import json
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from layercrit.errors import ModelError
from layercrit.restoring import rng_untouched

__all__ = [
    "Undrawn",
    "drawing",
    "image_order_seed",
    "layer_seed",
    "probe_set_seed",
    "seed_generators",
    "seed_of",
    "trial_seed",
]

_DRAWS = {
    *(nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_),
    *(Tensor.normal_, Tensor.uniform_),
}


def seed_of(*words: str | int) -> int:
    """Return the first 8 bytes of the SHA-256 of some words, as an integer in [0, 2^64).

    Hashing keeps seeds apart where sums of integers collide: trial 1 of study 2 is not trial 2 of study 1.
    """
    return _hashed(json.dumps(words, ensure_ascii=True, separators=(",", ":")))


def trial_seed(seed: int, architecture: str, reset: str, trial: int) -> int:
    """Return the seed of a trial, in [0, 2^64), from the seed of the study."""
    return seed_of(seed, architecture, reset, trial)


def layer_seed(trial_seed: int, layer: str) -> int:
    """Return the seed of a layer's random numbers in a trial, in [0, 2^64): no draw depends on other layers."""
    return seed_of(trial_seed, layer)


def probe_set_seed(seed: int) -> int:
    """Return the seed that a probe set is drawn by, in [0, 2^32), from the seed of the study."""
    return seed_of(seed, "probe set") % 2**32


def image_order_seed(probe_set_seed: int) -> int:
    """Return the seed of the order in which a probe set tries a source's images, in [0, 2^64)."""
    # `seed_of` would leave out the space, and so choose other images than all measurements so far.
    return _hashed(f'["probe set", {operator.index(probe_set_seed)}]')


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@contextmanager
def drawing(seed: object) -> Iterator[None]:
    """Draw what is built inside under ``seed``; PyTorch's, NumPy's and Python's generators are then as before.

    Raises:
        ModelError: the seed is not a whole number from 0 to 2**64 - 1.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ModelError(f"seed must be a whole number from 0 to 2**64 - 1; got {seed!r}.")
    with rng_untouched():
        seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed PyTorch's CPU generator, NumPy's and Python's, without restoring them afterwards."""
    # torch.manual_seed would seed the accelerators as well; fresh weights and views are drawn on the CPU.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


class Undrawn(TorchFunctionMode):
    """Inside, no random numbers are drawn into parameters: those of a network that trained ones are loaded into next.

    To draw a ResNet-50 takes longer than to read one. Nothing may be computed of the parameters before.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _DRAWS and isinstance(drawn := args[0] if args else named["tensor"], nn.Parameter):
            return drawn
        return func(*args, **named)
