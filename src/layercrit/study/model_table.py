"""The table of a study's models, put together from what its stores keep of each."""

import pandas as pd

from layercrit.protocol import DEFAULTS
from layercrit.study.shards import StoredStudy

__all__ = ["models_table"]

_MODEL_NUMBERS = ("documented_accuracy", "eps", "top1_accuracy", "chance", "temperature")
_MODEL_COLUMNS = ["model", "reference", "category", "label", "attack_norm", *_MODEL_NUMBERS,
                  "architecture", "dtype", "sha256", "variant_of", "epoch", "probe_set", "norm_statistics",
                  "record"]  # fmt: skip


def models_table(store: StoredStudy) -> pd.DataFrame:
    """Return one row per model, with what is known of it; see `layercrit.study.tables.Study`."""
    rows = []
    for row in store.models():
        record = row.record or {}
        known = {**record, **record.get("predictions", {}), **vars(row), "label": row.label or row.model}
        known["norm_statistics"] = row.norm_statistics or DEFAULTS.norm_statistics
        rows.append([record if name == "record" else known.get(name) for name in _MODEL_COLUMNS])
    # else pandas makes None NaN in columns of texts
    table = pd.DataFrame(rows, columns=_MODEL_COLUMNS, dtype=object)
    return table.astype(dict.fromkeys((*_MODEL_NUMBERS, "epoch"), "float64"))
