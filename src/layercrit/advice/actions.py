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
    "criticality was a poorer guide than the last layers first where layers are frozen and all others "
    "fine-tuned on noisy images: 73.9 % accuracy against 74.2 %, by chance 72.3 %, with none frozen 71.2 % "
    "(mean of 3 networks)"
)
_TUNED = (
    "criticality could not be told from the smallest layers first where layers are fine-tuned on noisy images "
    "and all others frozen: 73.4 % accuracy against 73.8 %, by chance 73.6 %, before it 48.0 % (mean of 3 "
    "networks)"
)
_PRUNED = (
    "criticality could not be told from the last layers first where channels are removed and nothing is "
    "trained afterwards: 32.1 % accuracy against 37.3 %, by chance 15.4 %, before it 85.8 % (mean of 6 "
    "networks); criticality could not be told from the largest layers first where channels are removed and the"
    " network is trained for a moment afterwards: 65.6 % accuracy against 65.6 %, by chance 59.0 %, before it "
    "86.4 % (mean of 3 networks); criticality could not be told from the largest layers first where half of "
    "the weights of layers are set to 0: 84.3 % accuracy against 83.5 %, by chance 63.2 %, before it 85.7 % "
    "(mean of 7 networks)"
)
_QUANTISED = (
    "criticality could not be told from the largest layers first where half of the parameters are rounded to 4"
    " bits: 85.5 % accuracy against 85.3 %, by chance 78.7 %, before it 85.7 % (mean of 7 networks)"
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
