"""Leave a model and the random state of the process as they were found."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Restore every module's training flag, parameters, buffers, and what replays put in place, whatever happens."""
    before = [
        (m, m.training, dict(m._parameters), dict(m._buffers), m.__dict__.get("forward")) for m in network.modules()
    ]
    flags = [(p, p.requires_grad) for p in network.parameters()]
    try:
        yield
    finally:
        for module, training, parameters, buffers, forward in before:
            module.training = training
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if forward is None:
                module.__dict__.pop("forward", None)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def rng_untouched() -> Iterator[None]:
    """Restore the global random states of torch (CPU and GPUs), numpy and Python afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
