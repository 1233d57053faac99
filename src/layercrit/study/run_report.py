"""What a run of a study did."""

from dataclasses import dataclass, field
from pathlib import Path

from layercrit.study.rows import FailureRow

__all__ = ["RunReport"]


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        folder: the study's.
        n_measured: cells measured now.
        n_known: cells that were there already.
        n_equal: those of them that were measured now, as another condition or model has equal ones.
        n_retryable: failures of earlier runs that were not tried again.
        failures: everything that is not measured, and why.
        modules_failed: model -> why its module criticality, which the study file asks for, could not be measured; with
            the key "" what concerns all models.
        seconds: how long the run took.
    """

    folder: Path
    n_measured: int = 0
    n_known: int = 0
    n_equal: int = 0
    n_retryable: int = 0
    failures: list[FailureRow] = field(default_factory=list)
    modules_failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
