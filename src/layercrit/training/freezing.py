"""Training with part of the network frozen at its random initialisation."""

from dataclasses import dataclass

from torch import nn

from layercrit.errors import TrainingError
from layercrit.training.methods import Inputs, Learner, Method, Supervised, method

__all__ = ["FrozenRandom"]


@method(
    "frozen_random",
    category="freezing",
    changes="spatial convolutions frozen at their random initialisation",
    paper="Gavrikov & Keuper 2023, arXiv 2301.11360",
)
@dataclass(frozen=True)
class FrozenRandom(Method):
    """Only 1x1 convolutions, normalisation and the classifier are trained; larger kernels stay random."""

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with every convolution larger than 1x1 frozen.

        Raises:
            TrainingError: the network has none.
        """
        spatial = [m for m in network.modules() if isinstance(m, nn.Conv2d) and max(map(int, m.kernel_size)) > 1]
        if not spatial:
            raise TrainingError("frozen_random: the network has no convolution larger than 1x1 to freeze.")
        for convolution in spatial:
            convolution.requires_grad_(False)
        return Supervised(network, inputs)
