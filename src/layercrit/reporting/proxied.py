"""Proxies of a study's models against their criticality, as the page plots them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from layercrit.comparison import Comparison, layers_as_compared
from layercrit.errors import StudyError
from layercrit.foreign_files import read_json
from layercrit.proxies.of_study import StudyProxies, hashes_of
from layercrit.study.tables import Study

__all__ = ["proxies_data", "read_proxies"]

_FILE = "against.json"


def read_proxies(folder: str | Path) -> dict[str, Any]:
    """Return what `StudyProxies.to_dict` gave, from a folder that ``layercrit proxies STUDY`` wrote.

    Raises:
        StudyError: there is nothing of the kind, or it is damaged.
    """
    path = Path(folder).expanduser() / _FILE
    try:
        found = _checked(read_json(path))
    except OSError as error:
        raise StudyError(
            f"There are no proxies of a study in {folder} ({error.strerror or error}). Make them with `layercrit "
            "proxies STUDY --out DIR`, and name that folder."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path} is not what `layercrit proxies STUDY` writes ({error}). Run that again with --overwrite."
        ) from error
    return found


def _checked(found: Any) -> dict[str, Any]:
    """Return what a file has, if it is what the page needs.

    Raises:
        ValueError: it is not; so do KeyError, TypeError and AttributeError say.
    """
    texts = [found["sentence"], found["reset"], *found["hashes"]]
    for name, key, others in (("table", ["proxy"], {"label", "null"}), ("by_layer", ["model", "layer"], set[str]())):
        rows = found[name]
        if not rows:
            raise ValueError(f"{name!r} has no rows")
        if any(not {*key, *others} <= row.keys() for row in rows):
            raise ValueError(f"rows of {name!r} lack some of {', '.join(sorted({*key, *others}))}")
        keys = [tuple(row[one] for one in key) for row in rows]
        texts += [text for own in keys for text in own]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{name!r} has two rows of the same {' and '.join(key)}")
    texts += [row["label"] for row in found["table"]]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"a name is {wrong[0]!r}; expected text")
    for row in found["by_layer"]:
        found["hashes"][row["model"]].keys()
    return dict(found)


def proxies_data(
    study: Study, comparison: Comparison, proxies: StudyProxies | Mapping[str, Any] | None, places: Sequence[str]
) -> dict[str, Any] | None:
    """Return what the page plots of proxies.

    Args:
        study: finished or not.
        comparison: of its models; layers and criticality are its.
        proxies: of the study, or what `read_proxies` returned.
        places: all models in the order of the page.

    Raises:
        StudyError: the proxies are not of these models on these images, or of another reset.
    """
    if proxies is None:
        return None
    told = proxies.to_dict() if isinstance(proxies, StudyProxies) else proxies
    _check_origin(study, comparison, told, places)
    rows = pd.DataFrame(told["by_layer"])
    rows = rows[rows["model"].isin(places)]
    layers = list(comparison.criticality.columns)
    rows = layers_as_compared(rows, layers)
    known = [one for one in told["table"] if one["proxy"] in rows and rows[one["proxy"]].notna().any()]
    by_model = {
        str(model): own.drop_duplicates("layer").set_index("layer").reindex(layers)
        for model, own in rows.groupby("model", sort=False)
    }
    return {
        "sentence": f"{told['sentence']} Of the {len(places)} models of this page, {len(by_model)} have proxies.",
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
        "exact": [[_number(value) for value in comparison.criticality.loc[model]] for model in by_model],
    }


def _check_origin(study: Study, comparison: Comparison, told: Mapping[str, Any], places: Sequence[str]) -> None:
    """Refuse proxies that were held against another reset, or that are of other models, weights or images."""
    again = f"Make them with `layercrit proxies {study.folder} --reset '{comparison.reset}' --out DIR`"
    if told["reset"] != comparison.reset:
        raise StudyError(
            f"The proxies were held against criticality under the reset {told['reset']!r}, and the page shows that "
            f"under {comparison.reset!r}. {again}, or show that reset with --reset."
        )
    own = hashes_of(study.models)
    compared = [model for model in told["hashes"] if model in places]
    if not compared:
        listed = ", ".join(map(repr, list(told["hashes"])[:3]))
        raise StudyError(
            f"The proxies are of the models {listed}, and none of these is among those of the page. {again}, or name "
            "the folder that was made of this study and condition."
        )
    for model in compared:
        for what in ("images", "weights"):
            if told["hashes"][model].get(what) != own[model][what]:
                raise StudyError(f"The proxies of {model!r} are those of other {what} than this study's. {again}.")


def _number(value: Any) -> float | None:
    """Return a number of six digits, as JSON can hold it; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
