"""The conditions under which a study measures its models: probe set, norm statistics, and epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from layercrit.errors import StudyError, near
from layercrit.protocol import NORM_STATISTICS

__all__ = ["STATISTICS_IN_WORDS", "Condition", "StatisticsInWords", "conditions_of", "under"]


class StatisticsInWords(NamedTuple):
    """What becomes of running statistics beside a reset, in words.

    Attributes:
        label: behind "norm statistics".
        variant: behind the name of a model, of which this is a variant.
        sentence: a whole one.
    """

    label: str
    variant: str
    sentence: str


STATISTICS_IN_WORDS = {
    "trained": StatisticsInWords(
        "as trained",
        "trained statistics",
        "Running statistics of normalisation layers stayed as trained, too.",
    ),
    "reset": StatisticsInWords(
        "reset",
        "statistics reset",
        "Running statistics of the first normalisation layer after the reset were set to mean 0 and variance 1.",
    ),
    "reestimate": StatisticsInWords(
        "re-estimated",
        "statistics re-estimated",
        "Running statistics of all normalisation layers after the reset were estimated again, layer by layer, on "
        "images that the changed network was shown.",
    ),
}


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
            "probe_set": "images without a name" if self.probe_set is None else f"images {self.probe_set}",
            "norm_statistics": f"norm statistics {STATISTICS_IN_WORDS[self.norm_statistics].label}",
            "epoch": "final weights" if self.epoch is None else f"epoch {self.epoch}",
        }
        return ", ".join(text for name, text in parts.items() if len({getattr(one, name) for one in among}) > 1)

    def in_words(self) -> str:
        """Return what tells the condition from that of a study with only one; an empty text for such a study's."""
        statistics = f"norm statistics {STATISTICS_IN_WORDS[self.norm_statistics].label}"
        parts = [
            "" if self.probe_set is None else f"images {self.probe_set}",
            "" if self.norm_statistics == NORM_STATISTICS[0] else statistics,
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
