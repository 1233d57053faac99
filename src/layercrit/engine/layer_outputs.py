"""What each layer of a network returns, as a function of the image; the forward pass ends where it is known."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils import _pytree as pytree

from layercrit.computed_weights import owner_of
from layercrit.engine.subject import Subject
from layercrit.errors import ModelError, first_line
from layercrit.layers import Layer
from layercrit.machine import is_out_of_memory
from layercrit.restoring import calls_answered
from layercrit.watchers import in_single_operators

__all__ = ["LayerOutputs", "floats_of", "innermost", "modules_called"]

_ROUNDING = 0.05  # of the largest value: other batch sizes run through other kernels, some of which multiply in TF32


class _EndedError(BaseException):
    """Ends a forward pass; not an Exception, which a network's own code might catch."""


class LayerOutputs:
    """The outputs of a network's layers, all values of an image in one row, with gradients in the image.

    The output of a layer is what its module returns; of a group, what the module of its name returns, or, where there
    is none or it is never called, that of its last member. A module that is never called by itself, such as the
    projections inside ``nn.MultiheadAttention``, stands for the module around it. Of several tensors that a module
    returns, the first counts: attention's output, not its weights. Where it is called several times, all calls do.

    Args:
        subject: the network, in evaluation mode. No parameter of it requires a gradient any more; see
            `layercrit.restoring.untouched`.
        layers: in depth order.
        images: two normalised images, ``(2, channels, height, width)``, on which it is found what is called.

    Raises:
        ModelError: no gradient of an output can be computed.
    """

    def __init__(self, subject: Subject, layers: Sequence[Layer], images: Tensor) -> None:
        self._network, self._read_logits = subject.network, subject.model.read_logits
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)
        self._names = {module: name for name, module in self._network.named_modules()}
        modules = dict(self._network.named_modules(remove_duplicate=False))
        called = modules_called(self._network, lambda: self._logits(images[:1]))
        paths = {layer.name: _output_path(layer, modules, called) for layer in layers}
        every = {name for name, _ in self._network.named_parameters()}  # a network that is one layer returns its output
        self._sites = {
            layer.name: modules[paths[layer.name]]
            for layer in layers
            if paths[layer.name] or every <= set(layer.parameters)
        }
        self._saving: Callable[[], AbstractContextManager[Any]] = nullcontext
        one = self._differentiated(images[:1], subject.model.reference)
        with torch.no_grad():
            both = self._run(images, self._sites.values())
        self._n_calls = {module: len(outputs) for module, outputs in one.items()}
        self._mixed = {module for module in one if not _is_image_first(both[module], one[module])}

    def module_of(self, layer: str) -> str | None:
        """Return the name of the module whose output is a layer's; None: it has no output of its own."""
        return self._names[self._sites[layer]] if layer in self._sites else None

    def of(self, layer: str, images: Tensor) -> Tensor:
        """Return a layer's output ``(n_images, n_elements)`` of normalised images.

        Args:
            layer: the name of one that has an output.
            images: ``(n_images, channels, height, width)``.
        """
        site = self._sites[layer]
        if site in self._mixed and len(images) > 1:
            return torch.cat([self.of(layer, images[i : i + 1]) for i in range(len(images))])
        outputs = self._run(images, [site], until=site)[site]
        return torch.cat([output.reshape(len(images), -1) for output in outputs], dim=1)

    def saving(self) -> AbstractContextManager[Any]:
        """Return what outputs and their gradients are to be computed in."""
        return self._saving()

    def is_bypassed(self, layer: str, before: str, image: Tensor) -> bool:
        """Whether a layer's output depends on the image also by other ways than the output of another layer.

        Found by what autograd follows: that other output is cut off from the image.

        Args:
            layer: the name of one that has an output.
            before: that of the other one.
            image: normalised, ``(1, channels, height, width)``.
        """
        site = self._sites[layer]
        with torch.enable_grad():
            image = image.clone().requires_grad_()
            outputs = self._run(image, [site], until=site, cut=self._sites[before])[site]
        return any(output.requires_grad for output in outputs)

    def _differentiated(self, image: Tensor, model: str) -> dict[nn.Module, list[Tensor]]:
        """Return the outputs of all layers for one image, after making sure that they have gradients."""
        try:
            try:
                return self._outputs_with_gradients(image)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
            self._saving = allow_mutation_on_saved_tensors  # slower: what is written over is copied first
            return self._outputs_with_gradients(image)
        except Exception as error:  # a network's own code raises what it likes
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"No gradient of the layers of {model!r} in the image can be computed ({first_line(error)}), and "
                "feature criticality is found by following it. The forward pass must be differentiable."
            ) from error

    def _outputs_with_gradients(self, image: Tensor) -> dict[nn.Module, list[Tensor]]:
        with torch.enable_grad(), self.saving():
            image = image.clone().requires_grad_()
            outputs = self._run(image, self._sites.values())
            sums = [tensor.sum() for of_one in outputs.values() for tensor in of_one if tensor.requires_grad]
            if sums:
                torch.autograd.grad(torch.stack(sums).sum(), image)
        return {module: [tensor.detach() for tensor in of_one] for module, of_one in outputs.items()}

    def _run(
        self,
        images: Tensor,
        sites: Iterable[nn.Module],
        until: nn.Module | None = None,
        cut: nn.Module | None = None,
    ) -> dict[nn.Module, list[Tensor]]:
        """Run the network, and return what some modules returned.

        Args:
            images: normalised.
            sites: the modules.
            until: a module with whose last call the forward pass ends.
            cut: a module whose output is cut off from what it was computed of.
        """
        outputs: dict[nn.Module, list[Tensor]] = {site: [] for site in sites}

        def answer(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if module in outputs:
                outputs[module].extend(tensor.clone() for tensor in floats_of(output)[:1])  # before it is written to
                if module is until and len(outputs[module]) == self._n_calls[module]:
                    raise _EndedError
            return output if module is not cut else pytree.tree_map_only(Tensor, Tensor.detach, output)

        try:
            with in_single_operators(), calls_answered(self._network, answer):
                answer(self._network, self._logits, images)
        except _EndedError:
            pass
        return outputs

    def _logits(self, images: Tensor) -> Tensor:
        return self._read_logits(self._network(images.clone()))


def modules_called(network: nn.Module, run: Callable[[], object]) -> set[nn.Module]:
    """Return the modules of a network that are called while it runs, the network itself included."""
    called = {network}

    def answer(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        called.add(module)
        return forward(*args, **kwargs)

    with torch.no_grad(), in_single_operators(), calls_answered(network, answer):
        run()
    return called


def innermost(path: str, modules: Mapping[str, nn.Module], called: set[nn.Module]) -> str:
    """Return the path of the innermost module that is called and is, or holds, the module of a path."""
    while path and (path not in modules or modules[path] not in called):
        path = path.rpartition(".")[0]
    return path


def floats_of(output: Any) -> list[Tensor]:
    """Return the tensors of real numbers in what a module returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _output_path(layer: Layer, modules: Mapping[str, nn.Module], called: set[nn.Module]) -> str:
    if layer.name in modules and modules[layer.name] in called:
        return layer.name
    return innermost(owner_of(layer.parameters[-1]), modules, called)


def _is_image_first(both: Sequence[Tensor], one: Sequence[Tensor]) -> bool:
    """Whether the first half of what is returned for two images is what is returned for the first one alone."""
    for two, single in zip(both, one, strict=True):
        if two.numel() != 2 * single.numel() or not single.numel():
            return False
        first, alone = two.reshape(2, -1)[0].double(), single.flatten().double()
        if float((first - alone).abs().max()) > _ROUNDING * float(alone.abs().max()):
            return False
    return True
