"""What a notebook shows of a study: how far it is, the ranking of its models, and their table."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layercrit.counts import counted
from layercrit.figures.rankings import ranking
from layercrit.notebook_html import Column, result_html

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["study_html"]

_COLUMNS = (
    Column("model"),
    Column("category"),
    Column("criticality", "bar", "mean criticality"),
    Column("low", "number"),
    Column("high", "number"),
    Column("top1_accuracy", "percent", "top-1 accuracy"),
    Column("n_layers", "number", "layers"),
    Column("n_trials", "number", "trials"),
)


def study_html(
    name: str,
    record: Mapping[str, Any],
    resets: Sequence[str],
    means: "pd.DataFrame",
    progress: "pd.DataFrame",
    warnings: Sequence[str],
) -> str:
    """Return a study as HTML; of several resets, the figure and the table are those of the first.

    Args:
        name: of the study.
        record: as in `layercrit.study.tables.Study`, and all else as its methods return it.
        resets: of which there are cells.
        means: one row per model and reset.
        progress: one row per model.
        warnings: what puts numbers in doubt.
    """
    probe_set, baseline = record.get("probe_set"), record.get("baseline")
    trials = means["n_trials"].dropna()
    done, planned = int(progress["n_done"].sum()), int(progress["n_planned"].sum())
    own = means[means["reset"] == resets[0]] if resets else means.head(0)
    failed = progress[progress["n_failed"] > 0]
    own = own.astype({"n_layers": "Int64", "n_trials": "Int64"})
    facts = {
        "models": len(progress),
        "cells": f"{done:,}" + (f" of {planned:,}" if planned > done else ""),
        "trials that failed": int(failed["n_failed"].sum()) or "",
        "first failure": "" if failed.empty else f"{failed['model'].iloc[0]}: {failed['error'].iloc[0]}",
        "models not opened yet": int((progress["state"] == "not opened").sum()) or "",
        "resets": ", ".join(resets),
        "trials": " to ".join(map(str, sorted({int(trials.min()), int(trials.max())}))) if len(trials) else "",
        "images": f"{probe_set['n_images']:,} of {probe_set['source']}" if probe_set else "",
        "warnings": " ".join(warnings),
    }
    heading = counted(len(own), "model") + (f", reset {resets[0]}" if len(resets) > 1 else "")
    measured = own["criticality"].notna().any()
    figure = ranking(own, baseline=baseline if baseline in set(own["model"]) else None) if measured else None
    return result_html(name, facts, heading, own, _COLUMNS, figure)
