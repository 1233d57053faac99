"""Seeds: hashed from names, and the generators that draw under them."""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from layercrit.errors import ModelError
from layercrit.restoring import rng_untouched

__all__ = ["drawing", "seed_generators", "seed_of"]


def seed_of(*words: str | int) -> int:
    """Return the first 8 bytes of the SHA-256 of some words, as a number in [0, 2^64).

    Hashing keeps seeds apart where sums of integers collide: trial 1 of study 2 is not trial 2 of study 1.
    """
    text = json.dumps(words, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@contextmanager
def drawing(seed: object) -> Iterator[None]:
    """Draw what is built inside under ``seed``; PyTorch's, NumPy's and Python's generators are then as before.

    Raises:
        ModelError: The seed is no whole number from 0 to 2**64 - 1.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ModelError(f"seed is {seed!r}, expected a whole number from 0 to 2**64 - 1.")
    with rng_untouched():
        seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed PyTorch's generator of the CPU, NumPy's and Python's, which nobody puts back."""
    # torch.manual_seed would seed the accelerators as well; fresh weights and views are drawn on the CPU.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
