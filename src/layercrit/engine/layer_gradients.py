"""What a loss says of each layer, image by image: gradients of its parameters and outputs, and its curvature."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from layercrit.computed_weights import owner_of
from layercrit.engine.graph import named_tensors
from layercrit.engine.layer_outputs import floats_of, innermost, modules_called
from layercrit.engine.replay import ReadLogits, Values
from layercrit.layers import Layer
from layercrit.restoring import calls_answered
from layercrit.watchers import in_single_operators

__all__ = ["ImageGradients", "LayerGradients", "Loss", "OutputChange"]

Loss = Callable[[Tensor], Tensor]
"""The loss of one image, a scalar, of its logits ``(1, n_classes)``."""


@dataclass(frozen=True)
class OutputChange:
    """How a reset moves a layer's output on one image, where its input stays as it was.

    Attributes:
        weighted: the sum over units k of ``g_k^2 (Y'_k - Y_k)^2``, with g the gradient of the loss in the output Y.
        first_order: the sum over k of ``g_k (Y'_k - Y_k)``.
    """

    weighted: float
    first_order: float


@dataclass
class _Call:
    """One call of a module: what it read and returned, and the gradients of what it returned."""

    run: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


class LayerGradients:
    """A network whose loss is differentiated one image at a time, so that no result depends on other images.

    A layer's output is what the innermost module that holds all its parameters returns: a convolution's, say, or a
    block's. A module that is never called by itself, as those inside of ``nn.MultiheadAttention``, stands for the
    module around it. Where a module is called several times, its calls are added up.

    Args:
        network: in evaluation mode. It is left as it was, but for which parameters require gradients, and for what its
            own forward does; see `layercrit.restoring.untouched`.
        layers: the layers.
        blocks: names of modules of which input and output are compared.
        read_logits: takes the logits out of what the network returns.
        image: normalised, ``(1, channels, height, width)``, on which it is found which modules are called.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[Layer],
        blocks: Sequence[str],
        read_logits: ReadLogits,
        image: Tensor,
    ) -> None:
        self.network, self.layers = network, list(layers)
        self._read_logits = read_logits
        self._tensors = named_tensors(network)
        self._parameters = {  # of each layer, ties once
            layer.name: list(
                {
                    id(tensor): tensor
                    for name in layer.parameters
                    if (tensor := self._tensors[name]).is_floating_point() and tensor.numel()
                }.values()
            )
            for layer in layers
        }
        every = {id(tensor): tensor for tensors in self._parameters.values() for tensor in tensors}
        self._all = list(every.values())
        for parameter in network.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in every)
        modules = dict(network.named_modules(remove_duplicate=False))
        called = modules_called(network, lambda: self._logits(image.clone()))
        self.sites = {layer.name: self._sites(layer, modules, called) for layer in layers}
        self._sites_of_all = {site for sites in self.sites.values() for site in sites}
        self._blocks = {modules[name]: name for name in blocks}
        self._saving: Callable[[], AbstractContextManager[Any]] = nullcontext
        try:
            self.of_image(image, torch.sum)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            self._saving = allow_mutation_on_saved_tensors  # slower: what is written over is copied first

    def parameters(self, layer: Layer) -> Sequence[Tensor]:
        """Return the parameters of a layer that can have gradients; those that are tied to each other once."""
        return self._parameters[layer.name]

    def of_image(self, image: Tensor, loss: Loss) -> "ImageGradients":
        """Run an image forward and backward.

        Args:
            image: normalised, ``(1, channels, height, width)``.
            loss: its loss.
        """
        calls: dict[nn.Module, list[_Call]] = {}
        alike: dict[str, list[float]] = {}

        def answer(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            is_block = module in self._blocks
            if module not in self._sites_of_all and not is_block:
                return forward(*args, **kwargs)
            given = _copied((args, kwargs))  # before anything writes to them
            output = forward(*args, **kwargs)
            if is_block:
                alike.setdefault(self._blocks[module], []).append(_cosine(given, output))
            if module in self._sites_of_all:
                run = module if module is not self.network else self._logits
                calls.setdefault(module, []).append(_recorded(_Call(run, *given), output))
            return output

        started = time.perf_counter()
        with torch.enable_grad(), in_single_operators(), self._saving(), calls_answered(self.network, answer):
            logits = answer(self.network, self._logits, image.clone())
            value = loss(logits)
            seconds = time.perf_counter() - started
            gradients = self._gradients(value, create_graph=False)
        similar = {block: cosines[0] for block, cosines in alike.items() if len(cosines) == 1}
        return ImageGradients(self, float(value.detach()), gradients, calls, similar, seconds)

    def curvature(self, image: Tensor, loss: Loss, values: Sequence[Values]) -> list[float]:
        """Return for each layer ``1/2 D^T H D``, with D the change of its parameters and H the Hessian of the loss.

        One Hessian-vector product a layer: the gradient is differentiated once more, along D.

        Args:
            image: as in `of_image`.
            loss: its loss.
            values: new values of each layer's parameters; 0 where there are none.

        Raises:
            RuntimeError: some operator of the network has no second derivative.
        """
        with torch.enable_grad(), in_single_operators(), self._saving(), sdpa_kernel(SDPBackend.MATH):
            gradients = self._gradients(loss(self._logits(image.clone())), create_graph=True)
            _check_twice_differentiable(gradients.values())
            return [self._curvature(layer, new, gradients) for layer, new in zip(self.layers, values, strict=True)]

    def _curvature(self, layer: Layer, values: Values, gradients: Mapping[int, Tensor]) -> float:
        first_counts = reversed(list(values.items()))  # of tied ones
        changes = {id(self._tensors[name]): value - self._tensors[name].detach() for name, value in first_counts}
        own = [one for one in self._parameters[layer.name] if id(one) in changes and id(one) in gradients]
        slopes = [(gradients[id(one)] * changes[id(one)]).sum() for one in own]
        if not slopes or not (slope := torch.stack(slopes).sum()).requires_grad:
            return 0.0
        products = torch.autograd.grad(slope, own, retain_graph=True, allow_unused=True)
        found = zip(own, products, strict=True)
        return sum(
            0.5 * float((product * changes[id(one)]).sum(dtype=torch.float64))
            for one, product in found
            if product is not None
        )

    def _gradients(self, loss: Tensor, create_graph: bool) -> dict[int, Tensor]:
        """Return id of a parameter -> gradient; of those that the loss does not depend on there is none."""
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss, self._all, create_graph=create_graph, allow_unused=True)
        return {id(one): gradient for one, gradient in zip(self._all, found, strict=True) if gradient is not None}

    def _logits(self, image: Tensor) -> Tensor:
        return self._read_logits(self.network(image))

    # --- which modules stand for a layer ----------------------------------------------------------------------------

    def _sites(self, layer: Layer, modules: Mapping[str, nn.Module], called: set[nn.Module]) -> list[nn.Module]:
        """Return the modules whose output is the layer's: one, or one for each module that shares its parameters."""
        owners = {owner_of(name) for name in layer.parameters}
        if len(owners) == 1:
            own = {id(self._tensors[name]) for name in layer.parameters}
            owners = {owner_of(name) for name, tensor in self._tensors.items() if id(tensor) in own}
            paths = {innermost(owner, modules, called) for owner in owners}
        else:
            same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(one.split(".") for one in owners), strict=False))
            paths = {innermost(".".join(parts[0] for parts in same), modules, called)}
        outer = [one for one in paths if not any(_is_inside(one, other) for other in paths - {one})]
        return list({modules[path]: None for path in sorted(outer)})

    @contextmanager
    def holding(self, values: Values) -> Iterator[None]:
        """Let the network's tensors be others for a while, without copying them."""
        before: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            for name, value in values.items():
                tensor = self._tensors[name]
                if id(tensor) not in before:  # of tied ones, the first name given counts
                    before[id(tensor)] = (tensor, tensor.data)
                    tensor.data = value
            yield
        finally:
            for tensor, data in before.values():
                tensor.data = data


@dataclass(frozen=True)
class ImageGradients:
    """What a forward and a backward pass of one image leave.

    Attributes:
        owner: what ran them.
        loss: the image's loss.
        of_parameters: id of a parameter -> the gradient of the loss in it.
        alike: name of a block that was called once -> the cosine of its input and output; NaN unless there is one of
            each, of one shape.
        seconds_forward: how long the forward pass took.
    """

    owner: LayerGradients
    loss: float
    of_parameters: Mapping[int, Tensor]
    _calls: Mapping[nn.Module, list[_Call]]
    alike: Mapping[str, float]
    seconds_forward: float

    def pairs(self, layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter of a layer with the gradient of the loss in it, those that have one."""
        for parameter in self.owner.parameters(layer):
            if id(parameter) in self.of_parameters:
                yield parameter.detach(), self.of_parameters[id(parameter)]

    def output_change(self, layer: Layer, values: Values) -> OutputChange:
        """Run a layer again on its recorded input with other values, and weigh how its output moves."""
        weighted = first_order = 0.0
        with torch.no_grad(), in_single_operators(), self.owner.holding(values):
            for site in self.owner.sites[layer.name]:
                for call in self._calls.get(site, ()):
                    args, kwargs = _copied((call.args, call.kwargs))
                    after = floats_of(call.run(*args, **kwargs))
                    for place, gradient in call.gradients.items():
                        product = gradient * (after[place] - call.outputs[place])
                        weighted += float(product.square().sum(dtype=torch.float64))
                        first_order += float(product.sum(dtype=torch.float64))
        return OutputChange(weighted, first_order)


def _check_twice_differentiable(gradients: Iterable[Tensor]) -> None:
    """Raise RuntimeError where a function of the network's own says that its gradient has none.

    Its error would be raised only if it were reached, but it cuts what is behind it off from the gradients.
    """
    found = {gradient.grad_fn for gradient in gradients}
    stack = list(found)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function of its own is marked once_differentiable")
        following = {one for one, _ in node.next_functions} - found
        found |= following
        stack += following


def _recorded(call: _Call, output: Any) -> _Call:
    """Write down the output of a call, and have its gradients written down when they are known.

    They are those of the values before any operator writes to the output in place.
    """
    for place, tensor in enumerate(floats_of(output)):
        call.outputs.append(tensor.detach().clone())
        if tensor.requires_grad:
            tensor.register_hook(partial(call.gradients.__setitem__, place))  # type: ignore[no-untyped-call]
    return call


def _copied(given: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, given)


def _cosine(given: Any, output: Any) -> float:
    """Return the cosine of a block's input and output; NaN where it has several, or they differ in shape."""
    read, returned = floats_of(given)[:1], floats_of(output)
    if len(read) != 1 or not returned or read[0].shape != returned[0].shape:
        return float("nan")
    x, y = read[0].double().flatten(), returned[0].detach().double().flatten()
    return float((x * y).sum() / (x.norm() * y.norm()))


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
