"""Layers whose output channels can only be removed together, such as those that a residual sum adds up."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from layercrit.errors import AdviceError, first_line
from layercrit.models.model import Model
from layercrit.restoring import undisturbed

__all__ = ["coupled_layers"]


def coupled_layers(model: Model) -> tuple[dict[str, str], list[str]]:
    """Return which layers lose the same channels when one of them is pruned, and which cannot be pruned at all.

    The dependencies are found by Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) on a copy of the network.

    Returns:
        convolutional or linear layer -> the first layer (in depth order) whose channels are coupled with its own;
        and the layers that end in the network's output, whose channels are the classes.

    Raises:
        AdviceError: Torch-Pruning is not installed, or cannot follow the network.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise AdviceError(
            "Which layers share their channels is found by Torch-Pruning, which is not installed. Install "
            "layercrit[action], or ask for the weights of each layer on its own: --of weights (knobs=None)."
        ) from error
    with undisturbed():
        network = copy.deepcopy(model.classifier.network).eval().cpu()
        images = model.classifier.normalise(model.black_image.to(model.classifier.mean.device)).cpu()
        used, last = _used_layers(network, images, model)
        try:
            graph = torch_pruning.DependencyGraph().build_dependency(network, images)
            groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
        except Exception as error:  # it follows gradients, and raises whatever goes wrong there
            raise AdviceError(
                f"Torch-Pruning cannot follow {model.reference} ({first_line(error)}). Ask for the weights of each "
                "layer on its own: --of weights (knobs=None)."
            ) from error
    coupled: dict[str, str] = {}
    outputs = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels)
    for group in groups:
        members = {dependency.target.name.split(" ")[0] for dependency, _ in group if dependency.handler in outputs}
        of_group = [name for name in used if name in members]
        coupled |= dict.fromkeys(of_group, next(iter(of_group), ""))
    return coupled, [name for name in used if coupled.get(name, name) in {coupled.get(one, one) for one in last}]


def _used_layers(network: nn.Module, images: Tensor, model: Model) -> tuple[list[str], list[str]]:
    """Return the convolutional and linear layers in the order of their use, and those whose output are the logits."""
    outputs: dict[str, Any] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.setdefault(name, output)

        return hook

    hooks = [
        module.register_forward_hook(remember(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    with torch.inference_mode():
        logits = model.read_logits(network(images))
    for hook in hooks:
        hook.remove()
    last = [name for name, output in outputs.items() if output.data_ptr() == logits.data_ptr()]
    return list(outputs), last or list(outputs)[-1:]
