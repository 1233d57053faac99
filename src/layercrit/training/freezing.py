"""Training with part of the network left as it was drawn."""

from dataclasses import dataclass

from torch import nn

from layercrit.errors import TrainingError
from layercrit.training.methods import Inputs, Learner, Method, Supervised, method

__all__ = ["FrozenRandom"]


@method(
    "frozen_random",
    category="freezing",
    changes="spatial convolutions stay at their random initial values",
    paper="Gavrikov & Keuper 2023, arXiv 2301.11360",
)
@dataclass(frozen=True)
class FrozenRandom(Method):
    """Only convolutions of 1x1, normalisation and the classifier learn; all larger kernels stay random."""

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Switch off the gradients of every convolution with a kernel larger than one pixel.

        Raises:
            TrainingError: the network has none, so that nothing would be frozen.
        """
        spatial = [m for m in network.modules() if isinstance(m, nn.Conv2d) and max(map(int, m.kernel_size)) > 1]
        if not spatial:
            raise TrainingError("frozen_random: the network has no convolution larger than 1x1 that could be frozen.")
        for convolution in spatial:
            convolution.requires_grad_(False)
        return Supervised(network, inputs)
