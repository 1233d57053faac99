"""The conditions under which a study measures its models: probe set, norm statistics, and epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from layercrit.errors import StudyError, near
from layercrit.protocol import NORM_STATISTICS

__all__ = ["Condition", "conditions_of", "under"]

_LABELS = {"trained": "as trained", "reset": "reset", "reestimate": "re-estimated"}


@dataclass(frozen=True)
class Condition:
    """What is asked of a model beside the reset.

    Attributes:
        probe_set: name of the images that it is shown; None where there is only one probe set.
        norm_statistics: what becomes of running statistics of normalisation layers beside a reset.
        epoch: of its training run; None: its final weights.
    """

    probe_set: str | None = None
    norm_statistics: str = NORM_STATISTICS[0]
    epoch: int | None = None

    def label(self, among: Sequence["Condition"]) -> str:
        """Return what tells the condition from the others of a study, in words."""
        parts = {
            "probe_set": f"images {self.probe_set}",
            "norm_statistics": f"norm statistics {_LABELS[self.norm_statistics]}",
            "epoch": "final weights" if self.epoch is None else f"epoch {self.epoch}",
        }
        return ", ".join(text for name, text in parts.items() if len({getattr(one, name) for one in among}) > 1)

    def in_words(self) -> str:
        """Return what tells the condition from that of a study with only one; an empty text for such a study's."""
        parts = [
            "" if self.probe_set is None else f"images {self.probe_set}",
            f"norm statistics {_LABELS[self.norm_statistics]}" if self.norm_statistics != NORM_STATISTICS[0] else "",
            "" if self.epoch is None else f"epoch {self.epoch}",
        ]
        return ", ".join(part for part in parts if part)


def conditions_of(models: pd.DataFrame) -> list[Condition]:
    """Return all conditions in a table of models, `layercrit.study.tables.Study.models`, in its order."""
    return list(dict.fromkeys(_condition(row) for row in models.to_dict("records")))


def under(
    models: pd.DataFrame,
    folder: Path,
    *,
    probe_set: str | None = None,
    norm_statistics: str | None = None,
    epoch: int | None = None,
) -> tuple[pd.DataFrame, Condition]:
    """Return the rows of a table of models that are under one condition, and this condition.

    Args:
        models: as for `conditions_of`.
        folder: of the study, for errors.
        probe_set: its name; None: the study's first.
        norm_statistics: None: what the study names first.
        epoch: None: the final weights.

    Raises:
        StudyError: the study has nothing under this condition.
    """
    known = conditions_of(models)
    first = known[0] if known else Condition()
    wanted = Condition(
        first.probe_set if probe_set is None else probe_set,
        first.norm_statistics if norm_statistics is None else norm_statistics,
        epoch,
    )
    for name, words in (("probe_set", "probe set"), ("norm_statistics", "norm statistics"), ("epoch", "epoch")):
        asked, there = getattr(wanted, name), list(dict.fromkeys(getattr(one, name) for one in known))
        if asked not in there and known:
            listed = [str(one) for one in there if one is not None]
            raise StudyError(f"The study in {folder} has no {words} {str(asked)!r}. {near(str(asked), listed)}")
    if known and wanted not in known:
        raise StudyError(
            f"The study in {folder} has nothing under the condition {wanted.label([*known, wanted])!r}. Its "
            f"conditions: {'; '.join(one.label(known) for one in known)}."
        )
    return models[np.array([_condition(row) == wanted for row in models.to_dict("records")], dtype=bool)], wanted


def _condition(row: dict[Any, Any]) -> Condition:
    epoch = row["epoch"]
    return Condition(row["probe_set"], row["norm_statistics"], None if pd.isna(epoch) else int(epoch))
