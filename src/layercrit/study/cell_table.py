"""The table of a study's measured cells, put together from the rows that its stores keep."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from layercrit.study.rows import ModelRow, PlanRow

__all__ = ["ABOUT_LAYER", "cells_table", "mean_names"]

ABOUT_LAYER = ("type", "stage", "depth", "n_parameters", "shape", "flops_after")  # of all its cells
_CELL_COLUMNS = ("model", "layer", *ABOUT_LAYER, "reset", "trial", "seed", "status", "delta_norm", "n_images", "key",
                 "seconds", "finished", "run", "raw")  # fmt: skip


def cells_table(
    models: Sequence[ModelRow], plan: Sequence[PlanRow], measured: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """Return the table of planned cells that are measured; see `Store.cells` and `Store.measured`."""
    position = {row.model: place for place, row in enumerate(models)}
    plan = [row for row in plan if row.model in position and row.key in measured]
    plan.sort(key=lambda row: (position[row.model], row.reset, row.depth, row.trial))
    found = [{**measured[row.key], **vars(row)} for row in plan]
    rows = [[cell[name] for name in (*_CELL_COLUMNS, "means")] for cell in found]
    table = pd.DataFrame(rows, columns=[*_CELL_COLUMNS, "means"])
    means = pd.DataFrame([json.loads(text) for text in table.pop("means")], index=table.index, dtype=np.float64)
    # from the rows: where only some are None, the table has NaN in their place
    seeds, raws = ([row[_CELL_COLUMNS.index(name)] for row in rows] for name in ("seed", "raw"))
    table["seed"] = pd.array([None if seed is None else int(seed) for seed in seeds], dtype="UInt64")
    table["raw"] = pd.Series([None if raw is None else json.loads(raw) for raw in raws], dtype=object)
    return pd.concat([table.drop(columns="raw"), means, table[["raw"]]], axis=1)


def mean_names(cells: pd.DataFrame) -> list[str]:
    """Return which columns of a table from `Store.cells` are means over images."""
    return [name for name in cells.columns if name not in _CELL_COLUMNS]
