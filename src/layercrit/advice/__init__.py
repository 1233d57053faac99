"""What to do with criticality: which layers to freeze, fine-tune, prune or quantise, and how sure that is."""

from layercrit.advice.actions import ACTIONS
from layercrit.advice.advice import Advice, advise, check_advice
from layercrit.advice.coupling import coupled_layers
from layercrit.advice.formats import FORMATS

__all__ = ["ACTIONS", "FORMATS", "Advice", "advise", "check_advice", "coupled_layers"]
