"""The files that a measurement is saved in, and what they must hold to be read again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from layercrit.errors import LayercritError
from layercrit.foreign_files import read_json

__all__ = ["FILES", "FORMAT", "IMAGES", "check_together", "move_files", "read_record"]

FILES = ("cells.parquet", "criticality.png", "criticality.svg", "images.parquet", "interactions.csv",
         "interactions.png", "interactions.svg", "layers.csv", "measurement.json")  # fmt: skip
"""Names of the files that a measurement is saved in; not every one has all."""

IMAGES = "images.parquet"
# What a record has in any case, and what is in it.
_INNER = {
    "protocol": ("level", "reset"), "model": ("reference",), "probe_set": ("n_images", "source"),
    "predictions": ("chance", "temperature", "top1_accuracy"),
    **dict.fromkeys(("random_trials", "backend", "dtype", "notes", "versions"), ()),
}  # fmt: skip
FORMAT = 1  # of the files; raised when their layout changes
# What backends were called, under "road", in the first files.
_FORMER_BACKENDS = {"graph": "exported graph", "recorded": "recorded outputs", "plain": "plain"}


def move_files(files: Path, folder: Path) -> None:
    """Move the files of one folder into another."""
    for file in sorted(files.iterdir()):
        file.replace(folder / file.name)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a folder says of a measurement.

    Raises:
        LayercritError: it has the format of another version.
        OSError, ValueError, KeyError: it cannot be read, or lacks something.
    """
    record: dict[str, Any] = read_json(folder / "measurement.json")
    if record["format"] != FORMAT:
        raise LayercritError(
            f"The measurement in {folder} has format {record['format']}; this version reads {FORMAT}. "
            "Read it with the version of layercrit that wrote it (see versions in measurement.json)."
        )
    if "road" in record:
        record["backend"] = _FORMER_BACKENDS[record.pop("road")]
    _check_whole(record)
    return record


def _check_whole(record: Mapping[str, Any]) -> None:
    """Check that the record has what every measurement has and that is read only later."""
    for key, inner in _INNER.items():
        if key not in record:
            raise ValueError(f"measurement.json has no {key!r}")
        if missing := [name for name in inner if name not in record[key]]:
            raise ValueError(f"measurement.json has no {missing[0]!r} in {key!r}")


def check_together(record: Mapping[str, Any], cells: pd.DataFrame) -> None:
    """Check that two files are of one measurement; if `save` was interrupted, one may be a trial ahead."""
    seeds, recorded = set(cells["seed"]), set(record["trial_seeds"])
    together = (
        list(cells["layer"].unique()) == list(record["layers"])
        and set(cells["model"]) == {record["model"]["reference"]}
        and (seeds <= recorded or seeds >= recorded)
    )
    if not together:
        raise ValueError("cells.parquet and measurement.json are of different measurements")
