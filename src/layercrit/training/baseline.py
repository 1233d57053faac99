"""Standard training, which the other methods are compared with."""

from dataclasses import dataclass

from layercrit.training.methods import Method, method

__all__ = ["Baseline"]


@method(
    "baseline",
    category="baseline",
    changes="nothing: SGD, cross-entropy, crops and flips",
    paper="He et al. 2016, arXiv 1512.03385",
)
@dataclass(frozen=True)
class Baseline(Method):
    """SGD with momentum on cross-entropy, with random crops and flips (He et al. 2016, section 3.4)."""
