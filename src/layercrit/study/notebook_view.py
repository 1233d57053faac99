"""What a notebook shows of a study: how far it is, the ranking of its models, and their table."""

from typing import TYPE_CHECKING

from layercrit.figures.rankings import ranking
from layercrit.notebook_html import Column, result_html

if TYPE_CHECKING:
    from layercrit.study.tables import Study

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


def study_html(study: "Study") -> str:
    """Return a study as HTML; of several resets, the figure and the table are those of the first."""
    means, resets = study.by_model(), study.resets
    protocol, probe_set = study.record.get("protocol", {}), study.record.get("probe_set", {})
    progress = study.progress()
    planned = int(progress["n_planned"].sum())
    done = f"{len(study.cells):,}" + (f" of {planned:,}" if planned > len(study.cells) else "")
    own = means[means["reset"] == resets[0]] if resets else means.head(0)
    own = own.astype({"n_layers": "Int64", "n_trials": "Int64"})
    facts = {
        "models": len(study.models),
        "cells": done,
        "trials that failed": len(study.failures) or "",
        "models not opened yet": int((progress["state"] == "not opened").sum()) or "",
        "resets": ", ".join(resets),
        "trials": protocol.get("trials", ""),
        "images": f"{probe_set['n_images']:,} of {probe_set.get('source', '?')}" if "n_images" in probe_set else "",
        "warnings": " ".join(study.warnings),
    }
    name = str(study.record.get("name", study.folder.name))
    heading = f"{len(own)} models" + (f", reset {resets[0]}" if len(resets) > 1 else "")
    measured = own["criticality"].notna().any()
    baseline = study.record.get("baseline")
    figure = ranking(own, baseline=baseline if baseline in set(own["model"]) else None) if measured else None
    return result_html(name, facts, heading, own, _COLUMNS, figure)
