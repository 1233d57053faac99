"""Proxies of a study's models against their criticality, as the page plots them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from layercrit.comparison import Comparison, layers_as_compared
from layercrit.errors import StudyError
from layercrit.foreign_files import read_json
from layercrit.proxies.of_study import StudyProxies

__all__ = ["proxies_data", "read_proxies"]

_FILE = "against.json"


def read_proxies(folder: str | Path) -> dict[str, Any]:
    """Return what `StudyProxies.to_dict` gave, from a folder that ``layercrit proxies STUDY`` wrote.

    Raises:
        StudyError: there is nothing of the kind, or it is damaged.
    """
    path = Path(folder).expanduser() / _FILE
    try:
        found = read_json(path)
        for name, columns in (("table", {"proxy", "label", "null"}), ("by_layer", {"model", "layer", "exact"})):
            if any(not columns <= row.keys() for row in found[name]):
                raise ValueError(f"rows of {name!r} lack some of {', '.join(sorted(columns))}")
        str(found["sentence"])
    except OSError as error:
        raise StudyError(
            f"There are no proxies of a study in {folder} ({error.strerror or error}). Make them with `layercrit "
            "proxies STUDY --out DIR`, and name that folder."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path} is not what `layercrit proxies STUDY` writes ({error}). Run that again with --overwrite."
        ) from error
    return dict(found)


def proxies_data(
    proxies: StudyProxies | Mapping[str, Any] | None, comparison: Comparison, places: Sequence[str]
) -> dict[str, Any] | None:
    """Return what the page plots of proxies; None where there is nothing of the compared models.

    Args:
        proxies: of the study, or what `read_proxies` returned.
        comparison: of its models; layers are its.
        places: all models in the order of the page.
    """
    if proxies is None:
        return None
    told = proxies.to_dict() if isinstance(proxies, StudyProxies) else proxies
    rows = pd.DataFrame(told["by_layer"])
    rows = rows[rows["model"].isin(places)]
    if rows.empty:
        return None
    layers = list(comparison.criticality.columns)
    rows = layers_as_compared(rows, layers)
    known = [one for one in told["table"] if one["proxy"] in rows and rows[one["proxy"]].notna().any()]
    by_model = {str(model): own.set_index("layer").reindex(layers) for model, own in rows.groupby("model", sort=False)}
    return {
        "sentence": str(told["sentence"]),
        "proxies": [
            {
                "label": str(one["label"]),
                "null": bool(one["null"]),
                **{name: _number(one.get(name)) for name in ("spearman", "spearman_low", "spearman_high")},
                "values": [[_number(value) for value in own[one["proxy"]]] for own in by_model.values()],
            }
            for one in known
        ],
        "models": [places.index(model) for model in by_model],
        "exact": [[_number(value) for value in own["exact"]] for own in by_model.values()],
    }


def _number(value: Any) -> float | None:
    """Return a number of six digits, as JSON can hold it; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
