"""The maps over epochs of a study's models, and of other training runs, as the page shows them."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from layercrit.comparison import Comparison, layers_as_compared
from layercrit.conditions import Condition
from layercrit.epoch_map import EpochMap, Kind
from layercrit.study.tables import Study

__all__ = ["epochs_data"]

_REWIND = re.compile(r"rewind\(epoch=(\d+)\)")
_FRESH = "rerandomize"
_Row = tuple[str, pd.DataFrame, float | None]  # its name, its layers, and the accuracy of its network


def epochs_data(study: Study, comparison: Comparison, maps: Sequence[EpochMap] = ()) -> list[dict[str, Any]]:
    """Return every map over epochs that the page shows.

    A model of the study has one of fresh draws after each epoch, where the study measured its epochs, and one of going
    back to an epoch, where resets such as ``rewind(epoch=5)`` are among the study's.

    Args:
        study: finished or not.
        comparison: of its models; maps have its reset, its images and its norm statistics, and the final weights.
        maps: of training runs that need not be in the study.
    """
    layers = list(comparison.criticality.columns)
    found = [_map(name, kind, rows, layers) for name, kind, rows in _of_study(study, comparison)]
    for one in maps:
        table = layers_as_compared(one.to_pandas().assign(model=one.name), layers)
        for kind in one.kinds:
            rows: list[_Row] = []
            for (of, epoch), measurement in one.measurements.items():
                if of == kind:
                    own = table["epoch"].isna() if epoch is None else table["epoch"] == epoch
                    accuracy = measurement.record["predictions"].get("top1_accuracy") if kind == "trained" else None
                    rows.append((one.row_name(kind, epoch), table[(table["map"] == kind) & own], accuracy))
            found.append(_map(one.name, kind, rows, layers))
    return found


def _of_study(study: Study, comparison: Comparison) -> Iterator[tuple[str, Kind, list[_Row]]]:
    """Yield the label of a model, the kind of map, and its rows."""
    condition = comparison.condition or Condition()
    about = study.models[study.models["norm_statistics"] == condition.norm_statistics]
    about = about[
        about["probe_set"].isna() if condition.probe_set is None else about["probe_set"] == condition.probe_set
    ]
    about = about.assign(own=about["variant_of"].fillna(about["model"]))
    epochs_of_resets = {int(found[1]): reset for reset in study.resets if (found := _REWIND.fullmatch(reset))}
    if about["epoch"].isna().all() and not epochs_of_resets:
        return
    table = layers_as_compared(study.to_pandas(), list(comparison.criticality.columns))
    table.loc[table["status"].str.fullmatch(r"unchanged (\d+)/\1"), "criticality"] = 0.0  # every trial
    by_reset = dict(iter(table.groupby(["model", "reset"], sort=False, observed=True)))
    for _, versions in about.sort_values("epoch", na_position="first", kind="stable").groupby("own", sort=False):
        final = versions[versions["epoch"].isna()]
        if final.empty:
            continue
        model, label = str(final["model"].iloc[0]), str(final["label"].iloc[0])
        back: list[_Row] = [
            (EpochMap.row_name("rewound", epoch), by_reset[model, reset], None)
            for epoch, reset in [(None, _FRESH), *sorted(epochs_of_resets.items())]
            if (model, reset) in by_reset
        ]
        if any(name != EpochMap.row_name("rewound", None) for name, _, _ in back):
            yield label, "rewound", back
        after: list[_Row] = [
            (
                EpochMap.row_name("trained", None if math.isnan(row["epoch"]) else int(row["epoch"])),
                by_reset[row["model"], comparison.reset],
                row["top1_accuracy"],
            )
            for row in versions.to_dict("records")
            if (row["model"], comparison.reset) in by_reset
        ]
        if len(after) > 1:
            yield label, "trained", after


def _map(label: str, kind: Kind, rows: Sequence[_Row], layers: list[str]) -> dict[str, Any]:
    tables = [table.set_index("layer").reindex(layers) for _, table, _ in rows]
    return {
        "label": label,
        "kind": kind,
        "rows": [{"name": name, "accuracy": _number(accuracy)} for name, _, accuracy in rows],
        **{
            column: [[_number(value) for value in table[column]] for table in tables]
            for column in ("criticality", "low", "high")
        },
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)
