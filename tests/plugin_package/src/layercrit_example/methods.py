from dataclasses import dataclass
from functools import partial

from torch.nn.functional import cross_entropy

import layercrit
from layercrit.training import Method, setting
from layercrit.training.methods import Supervised


@layercrit.method("smooth", category="training_recipes", changes="smoothed labels", paper="none: an example")
@dataclass(frozen=True)
class Smooth(Method):
    """Cross-entropy with labels that leave some probability to all classes."""

    smoothing: float = setting(0.1, "probability that is shared by all classes", low=0, high=1)

    def learner(self, network, inputs):
        """Return the learner around a network."""
        return Supervised(network, inputs, partial(cross_entropy, label_smoothing=self.smoothing))
