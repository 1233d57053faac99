"""Let a network hold other weights for one forward pass."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def holding(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Load values into parameters, and put back afterwards, bit for bit, these and what a forward does to buffers.

    Values are written in place: whoever refers to a parameter (a tied weight, a module registered under two names,
    ``nn.LSTM``) sees them, which is not so when ``torch.func.functional_call`` exchanges the tensors by their names.

    Args:
        network: the network. A forward pass inside may write to its buffers or exchange them.
        values: parameter name -> value. Of parameters that are tied to each other, the first name given counts.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    drawn = {id(parameters[name]): (parameters[name], value) for name, value in reversed(list(values.items()))}
    modules = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    registered = [(module, dict(module._buffers)) for module in modules]
    with torch.inference_mode():  # writes to tensors that were made in inference mode, too
        before = [(tensor, tensor.clone()) for tensor in (*network.buffers(), *(p for p, _ in drawn.values()))]
    try:
        with torch.inference_mode():
            for parameter, value in drawn.values():
                parameter.copy_(value)
        yield
    finally:
        for module, buffers in registered:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.inference_mode():
            for tensor, value in before:
                tensor.copy_(value)
