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
    """

    name: str
    done: str
    highest_first: bool
    budget: float
    budget_in_words: str


ACTIONS = {
    action.name: action
    for action in (
        Action("freeze", "frozen", False, 0.5, "at least {} of the parameters frozen"),
        Action("finetune", "fine-tuned", True, 0.25, "at most {} of the parameters fine-tuned"),
        Action("prune", "pruned", False, 0.25, "at least {} of the parameters removed"),
        Action("quantise", "quantised to fewer bits", False, 6.0, "at most {} bits for a parameter in the mean"),
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
