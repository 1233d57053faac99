"""The cost of a reset: the floating-point operations of a forward pass that depend on each layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layercrit.layers import Layer
from layercrit.restoring import holding
from layercrit.watchers import Influence, in_single_operators

__all__ = ["count_flops"]


def count_flops(network: nn.Module, layers: Sequence[Layer], images: Tensor) -> tuple[float, dict[str, float]]:
    """Count the FLOPs of a forward pass, and the share of them that must run again after a reset of each layer.

    One forward pass is watched; nothing is exported. Products and convolutions count, two FLOPs per multiply-add.

    Args:
        network: in evaluation mode.
        layers: what may be reset.
        images: one small batch that the network accepts, ``(n_images, channels, height, width)``.

    Returns:
        FLOPs of one image, and for each layer's name a share in [0, 1].
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    weights = [(parameters[name], 1 << place) for place, layer in enumerate(layers, 1) for name in layer.parameters]
    watch = Influence([(images, 1), *weights])
    with torch.no_grad(), holding(network, {}), in_single_operators(), watch:
        network(images)
    dynamic = [(influence, flops) for influence, flops in watch.flops if influence & 1]
    total = sum(flops for _, flops in dynamic)
    after = {
        layer.name: sum(flops for influence, flops in dynamic if influence >> place & 1) / max(1, total)
        for place, layer in enumerate(layers, 1)
    }
    return total / len(images), after
