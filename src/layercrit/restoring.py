"""Leave a model and the random state of the process as they were found."""

import contextlib
import copy
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from layercrit.errors import ModelError, first_line

_DEVICES_WITH_AUTOCAST = ("cpu", "cuda", *(["mps"] if torch.__version__ >= "2.5" else []), "xpu")
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)  # registries of parameters, hooks and the like
_one_at_a_time = threading.RLock()


def _in_a_fork() -> None:
    """Let a forked process begin with a lock of its own: the thread that may hold this one is not in it."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as in a process that has just started, one thread at a time; the caller's settings are then as before.

    Outside there may be autocast (which caches casts of the trained weights, so that no reset shows), inference mode,
    gradients switched off, another default dtype or device, or float32 products that are rounded to TF32 or bfloat16
    (for convolutions on GPUs the default of torch). Other threads wait: the random generators and the
    default dtype are the whole process's, and a reset writes to the network that another thread may have opened.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        for device in _DEVICES_WITH_AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))  # which switches gradients on, too
        if torch.empty(0).device.type != "cpu":  # get_default_device fails in torch 2.4 once the default was unset
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        stack.enter_context(_whole_float32())
        yield


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Multiply float32 as float32.

    Torch has two interfaces to this from 2.9 on. The older one sets both, but cannot be read where they disagree.
    """
    torch_backends: Any = torch.backends  # partly untyped
    cudnn, mkldnn = torch_backends.cudnn, torch_backends.mkldnn
    backends: tuple[Any, ...] = ()
    if hasattr(torch_backends, "fp32_precision"):
        backends = (torch_backends, cudnn, cudnn.conv, cudnn.rnn, torch_backends.cuda.matmul,
                    mkldnn, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)  # fmt: skip
    with contextlib.ExitStack() as before:
        for backend in backends:  # the last to be put back: the older interface sets them, too
            before.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        with contextlib.suppress(RuntimeError):
            before.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        with contextlib.suppress(RuntimeError):
            before.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield


@contextlib.contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Restore training flags, parameters, buffers, and what replays put in place, whatever happens inside.

    Values are restored too, since a network's own forward may write to them: some count calls, some clamp weights.
    """
    modules = [
        (m, m.training, m.__dict__.get("forward"), dict(m._parameters), dict(m._buffers)) for m in network.modules()
    ]
    flags = [(p, p.requires_grad) for p in network.parameters()]
    values = [(t, t.detach().clone()) for t in chain(network.parameters(), network.buffers())]
    try:
        with attributes_kept(network):  # tensors that a forward computes from the weights, such as weight_norm's
            yield
    finally:
        for module, training, forward, parameters, buffers in modules:
            module.training = training
            _put_back_forward(module, forward)
            _refill(module._parameters, parameters)
            _refill(module._buffers, buffers)
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        with torch.inference_mode():  # writes to tensors that were made in inference mode, too
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


@contextlib.contextmanager
def holding(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Load values, and put back afterwards, bit for bit, what they replace and what a forward does to buffers.

    Values are written in place: everything that refers to a parameter (a tied weight, a module registered under two
    names, ``nn.LSTM``) sees them, unlike with ``torch.func.functional_call``, which replaces the tensors by name.

    Args:
        network: the network. A forward pass inside may write to its buffers or replace them.
        values: name of a parameter or buffer -> value. Of parameters that are tied to each other, the first name given
            counts.
    """
    tensors: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    tensors |= dict(network.named_buffers(remove_duplicate=False))
    drawn = {id(tensors[name]): (tensors[name], value) for name, value in reversed(list(values.items()))}
    modules = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    registered = [(module, dict(module._buffers)) for module in modules]
    with torch.inference_mode():  # writes to tensors that were made in inference mode, too
        before = [(tensor, tensor.clone()) for tensor in (*network.buffers(), *(t for t, _ in drawn.values()))]
    try:
        with torch.inference_mode():
            for tensor, value in drawn.values():
                tensor.copy_(value)
        yield
    finally:
        for module, buffers in registered:
            _refill(module._buffers, buffers)
        with torch.inference_mode():
            for tensor, value in before:
                tensor.copy_(value)


def copied(network: nn.Module) -> nn.Module:
    """Return a deep copy, also of a network that keeps tensors which its forward computed from parameters.

    Raises:
        ModelError: it has something that cannot be copied, such as a lock.
    """
    attributes = [value for module in network.modules() for value in module.__dict__.values()]
    inside = [value for container in _containers(attributes) for value in _items(container)]
    computed = [value for value in (*attributes, *inside) if isinstance(value, Tensor) and not value.is_leaf]
    try:
        return copy.deepcopy(network, {id(tensor): tensor.detach().clone() for tensor in computed})
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # an object's own code
        raise ModelError(
            f"The network cannot be copied ({first_line(error)}), as is needed to draw fresh values and to go to "
            "another device. Keep such objects outside it. Or let nothing be copied: a reference that can build it "
            "(py:PACKAGE.MODULE:FACTORY), a donor (donor=..., --from), or a reset without fresh values, such as zero."
        ) from error


@contextlib.contextmanager
def attributes_kept(network: nn.Module) -> Iterator[None]:
    """Undo what tracing leaves in a network whose forward assigns to its attributes: tensors without values.

    So it is with lists and dictionaries among the attributes, in which some networks keep tensors for each shape.
    """
    before = [(module, dict(module.__dict__)) for module in network.modules()]
    own = [value for _, attributes in before for name, value in attributes.items() if name not in _OF_EVERY_MODULE]
    contents = [(container, copy.copy(container)) for container in _containers(own)]
    try:
        yield
    finally:
        for module, attributes in before:
            _refill(module.__dict__, attributes)
        for container, content in contents:
            if any(isinstance(value, FakeTensor | FunctionalTensor) for value in _items(container)):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _containers(values: Iterable[Any]) -> list[list[Any] | dict[Any, Any]]:
    """Return the lists and dictionaries among values, and those within them."""
    found: dict[int, Any] = {}
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, list | dict) and id(value) not in found:
            found[id(value)] = value
            left.extend(_items(value))
    return list(found.values())


def _items(container: list[Any] | dict[Any, Any]) -> Iterator[Any]:
    """Yield what is in a container, and what is in tuples there."""
    for value in container.values() if isinstance(container, dict) else container:
        yield from value if isinstance(value, tuple) else (value,)


@contextlib.contextmanager
def calls_answered(network: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Let every call of a submodule be answered by ``answer(module, its forward, *args, **kwargs)`` for a while."""
    modules = [m for m in network.modules() if m is not network and not isinstance(m, torch.jit.ScriptModule)]
    before = [(m, m.__dict__.get("forward")) for m in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = partial(answer, module, module.forward)
        yield
    finally:
        for module, forward in before:
            _put_back_forward(module, forward)


def _refill(registry: dict[str, Any], before: Mapping[str, Any]) -> None:
    registry.clear()
    registry.update(before)


def _put_back_forward(module: nn.Module, forward: Any) -> None:
    """Give a module back the forward that it had of its own, or, where that is None, that of its class."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
