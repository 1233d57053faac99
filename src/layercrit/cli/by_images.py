"""The option --by: criticality by class, by right and wrong predictions, and by image, of a measurement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.printing import bar, number, plain, print_table, say

# Everything that imports torch is imported inside the functions, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    import pandas as pd

    from layercrit.measurement import Measurement

__all__ = ["by_option", "rows_by", "save_by", "show_by"]

_WAYS = ("class", "prediction", "correctness", "image")
_MOST_ROWS, _EACH = 300, 3  # rows that are printed whole; else so many of each layer, at either end


def by_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option --by."""
    return click.option(
        "--by",
        type=click.Choice(_WAYS),
        help="Criticality by class (label), by predicted class, for images that the trained network names right and "
        "wrong, or by image; without new runs.",
    )(command)


def table_by(measurement: "Measurement", by: str) -> "pd.DataFrame":
    """Return the table of a choice of --by."""
    if by == "image":
        return measurement.by_image()
    if by == "correctness":
        return measurement.by_correctness()
    return measurement.by_class("label" if by == "class" else "prediction")


def rows_by(measurement: "Measurement", by: str) -> list[dict[str, Any]]:
    """Return the rows of a choice of --by as plain data for JSON."""
    rows: list[dict[str, Any]] = json.loads(table_by(measurement, by).to_json(orient="records", double_precision=15))
    return rows


def show_by(measurement: "Measurement", by: str) -> None:
    """Print the table of a choice of --by; of a long one the rows at both ends of each layer."""
    table = table_by(measurement, by)
    kept = table if len(table) <= _MOST_ROWS or by == "correctness" else _ends(table)
    level = f"{100 * measurement.record['protocol']['level']:g}%"
    titles = {"class": "By class", "prediction": "By predicted class", "image": "By image",
              "correctness": "Images that the trained network names right, and wrong"}  # fmt: skip
    shown = FittedTable(titles[by])
    columns = {
        "correctness": (f"right ({table['n_correct'].iloc[0]})", f"wrong ({table['n_wrong'].iloc[0]})", "difference",
                        f"{level} interval") if by == "correctness" else (),
        "image": ("image", "label", "prediction", "criticality", "SD over trials", ""),
    }.get(by, ("class", "images", "criticality", f"{level} interval", ""))  # fmt: skip
    shown.add_column("layer")
    names, leaves = ("", "class", "image", "label", "prediction"), {"": 1, "SD over trials": 2, "prediction": 3}
    for column in columns:
        shown.add_column(column, "left" if column in names else "right", leaves=leaves.get(column))
    for row in kept.to_dict("records"):
        shown.add_row(plain(row["layer"]), *_cells(row, by))
    say()
    print_table(shown)
    if len(kept) < len(table):
        say()
        say(f"{len(kept)} of {len(table):,} rows: of each layer the {_EACH} highest and lowest")
    if by != "correctness":
        return
    say("difference: right minus wrong")


def _cells(row: dict[Any, Any], by: str) -> list[Any]:
    interval = "-" if row.get("low", 0) != row.get("low", 0) else f"{row.get('low', 0):.3f} - {row.get('high', 0):.3f}"
    if by == "correctness":
        return [number(row["correct"]), number(row["wrong"]), f"{row['difference']:+.3f}", interval]
    if by == "image":
        about = [plain("-" if row[name] != row[name] else row[name]) for name in ("image", "label", "prediction")]
        return [*about, number(row["criticality"]), number(row["sd_trials"]), bar(row["criticality"])]
    return [plain(row["class"]), str(row["n_images"]), number(row["criticality"]), interval, bar(row["criticality"])]


def _ends(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return of each layer the rows of highest and lowest criticality, the highest first."""
    import pandas as pd

    groups = table.sort_values("criticality", ascending=False, kind="stable").groupby(
        "layer", observed=True, sort=False
    )
    ends = pd.concat([groups.head(_EACH), groups.tail(_EACH)])
    ends = ends[~ends.index.duplicated()].sort_values("criticality", ascending=False, kind="stable")
    order = {layer: place for place, layer in enumerate(table["layer"].unique())}
    return ends.sort_values("layer", key=lambda layers: layers.astype(str).map(order), kind="stable")


def save_by(measurement: "Measurement", by: str, folder: Path) -> list[Path]:
    """Write the table of a choice of --by into a folder, and the heat map of classes; return the files."""
    from layercrit.figures.style import save_figure
    from layercrit.foreign_text import write_csv

    path = folder / f"by_{by}.csv"
    write_csv(table_by(measurement, by), path)
    if by not in ("class", "prediction"):
        return [path]
    figure = measurement.plot_classes("label" if by == "class" else "prediction")
    return [path, *save_figure(figure, folder / f"by_{by}")]
