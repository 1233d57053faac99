"""What can be done to layers, and which of them come first."""

from dataclasses import dataclass

from layercrit.errors import AdviceError, near

__all__ = ["ACTIONS", "Action", "action_named"]


@dataclass(frozen=True)
class Action:
    """Something that is done to some layers and not to others.

    Attributes:
        name: as the command line has it.
        done: the participle, such as ``frozen``.
        highest_first: whether the most critical layers are chosen, rather than the least critical ones for their size.
        budget: the default: a share of parameters in (0, 1), or mean bits of a parameter.
        budget_in_words: what the budget is, with a gap for it.
        evidence: how good a guide criticality is for it, as ``benchmarks/regret.py`` measured.
    """

    name: str
    done: str
    highest_first: bool
    budget: float
    budget_in_words: str
    evidence: str


_FROZEN = (
    "criticality could not be told from the last layers first where layers are frozen and all others fine-tuned "
    "on noisy images: 73.5 % accuracy against 73.9 %, by chance 74.2 %, with none frozen 72.8 % (mean of 18 "
    "networks)"
)
_TUNED = (
    "criticality could not be told from the largest layers first where layers are fine-tuned on noisy images and "
    "all others frozen: 74.2 % accuracy against 74.1 %, by chance 75.1 %, before it 57.3 % (mean of 18 networks)"
)
_PRUNED = (
    "criticality could not be told from the last layers first where channels are removed and nothing is trained "
    "afterwards: 39.6 % accuracy against 41.3 %, by chance 16.0 %, before it 85.1 % (mean of 18 networks); "
    "criticality could not be told from the largest layers first where channels are removed and the network is "
    "trained for a moment afterwards: 71.2 % accuracy against 71.3 %, by chance 63.7 %, before it 85.1 % (mean of "
    "18 networks); criticality could not be told from the largest layers first where half of the weights of "
    "layers are set to 0: 84.0 % accuracy against 83.5 %, by chance 64.0 %, before it 85.1 % (mean of 18 "
    "networks)"
)
_QUANTISED = (
    "criticality could not be told from the largest layers first where half of the parameters are rounded to 4 "
    "bits: 85.0 % accuracy against 84.8 %, by chance 81.1 %, before it 85.1 % (mean of 18 networks)"
)

ACTIONS = {
    action.name: action
    for action in (
        Action("freeze", "frozen", False, 0.5, "at least {} of the parameters frozen", _FROZEN),
        Action("finetune", "fine-tuned", True, 0.25, "at most {} of the parameters fine-tuned", _TUNED),
        Action("prune", "pruned", False, 0.25, "at least {} of the parameters removed", _PRUNED),
        Action(
            "quantise", "quantised to fewer bits", False, 6.0, "at most {} bits for a parameter in the mean", _QUANTISED
        ),
    )
}


def action_named(name: str) -> Action:
    """Return an action.

    Raises:
        AdviceError: there is none of this name.
    """
    if name not in ACTIONS:
        raise AdviceError(f"There is no advice for {name!r}. {near(name, ACTIONS)}")
    return ACTIONS[name]
