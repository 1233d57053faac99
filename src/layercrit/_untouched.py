"""Leave a model and the random state of the process as they were found."""

import contextlib
import random
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Restore training flags, parameters, buffers, and what replays put in place, whatever happens inside.

    Values are restored as well, for a network's own forward may write to them: some count calls, some clamp weights.
    """
    modules = [
        (m, m.training, m.__dict__.get("forward"), dict(m._parameters), dict(m._buffers)) for m in network.modules()
    ]
    flags = [(p, p.requires_grad) for p in network.parameters()]
    values = [(t, t.detach().clone()) for t in chain(network.parameters(), network.buffers())]
    try:
        yield
    finally:
        for module, training, forward, parameters, buffers in modules:
            module.training = training
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


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
