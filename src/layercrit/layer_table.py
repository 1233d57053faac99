"""From cells to the table of layers: one row per layer, with estimates, means over its trials and its status."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from layercrit.statistics import Estimate

__all__ = ["estimate_columns", "layer_table"]


def layer_table(
    cells: pd.DataFrame, estimates: pd.DataFrame, *, by: Sequence[str], about: Sequence[str], means: Sequence[str]
) -> pd.DataFrame:
    """Return one row per layer, in the order of the cells.

    Args:
        cells: one row per (layer, trial), with ``status``, ``n_images`` and the columns named below.
        estimates: one row per layer, indexed by ``by``; see `estimate_columns`.
        by: the columns that name a layer, such as ``("model", "reset", "layer")``.
        about: columns with the same value in all cells of a layer.
        means: columns to average over the layer's cells that are ok.

    Returns:
        the columns ``by``, ``about``, those of ``estimates``, ``means``, and then ``top1_agreement`` (1 minus the mean
        ``top1``, which it replaces), ``n_trials`` (how many are ok), ``n_images`` and ``status``: ``ok``,
        or which share of the trials was left out and why, such as ``not_finite 1/3``.
    """
    groups = cells.groupby(list(by), sort=False)
    ok = cells[cells["status"] == "ok"].groupby(list(by))
    table = groups[list(about)].first().join(estimates).join(ok[list(means)].mean())
    if "top1" in table:
        table["top1_agreement"] = 1 - table.pop("top1")
    table["n_trials"] = ok.size().reindex(table.index, fill_value=0)
    table["n_images"] = groups["n_images"].max()
    is_bad = cells["status"].ne("ok").groupby([cells[column] for column in by]).transform("any")
    bad = cells[is_bad].groupby(list(by))["status"].agg(_status)  # of few layers: one by one, this takes long
    table["status"] = bad.reindex(table.index, fill_value="ok")
    return table.reset_index()


def estimate_columns(critical: Estimate | None, matched: Estimate | None) -> dict[str, Any]:
    """Return the columns of estimates of a layer or a model; NaN where there is none.

    Args:
        critical: the estimate of criticality.
        matched: that of criticality at the model's matched temperature.
    """
    return {
        "criticality": np.nan if critical is None else critical.mean,
        "low": np.nan if critical is None else critical.low,
        "high": np.nan if critical is None else critical.high,
        "half_width": np.nan if critical is None else (critical.high - critical.low) / 2,
        "sd_trials": np.nan if critical is None else critical.sd_trials,
        "covers": "nothing" if critical is None else critical.covers,
        "criticality_matched": np.nan if matched is None else matched.mean,
        "matched_low": np.nan if matched is None else matched.low,
        "matched_high": np.nan if matched is None else matched.high,
    }


def _status(statuses: pd.Series) -> str:
    bad = statuses[statuses != "ok"]
    return ", ".join(f"{status} {n}/{len(statuses)}" for status, n in bad.value_counts().items())
