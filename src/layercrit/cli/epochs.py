"""The option --epochs: the maps over the epochs of a training, measured, saved and printed."""

import json
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.printing import notice, number, plain, print_table, say
from layercrit.counts import counted

# Everything that imports torch is imported inside the functions, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    import pandas as pd

    from layercrit.correlations import RankAgreement
    from layercrit.epoch_map import EpochMap

__all__ = ["measure_through_training", "show_epochs"]

_TITLES = {
    "rewound": "{}: layers set back to an epoch",
    "trained": "{}: fresh draws in the network after an epoch",
}


def measure_through_training(
    model: str, images: str, folder: Path, epochs: str | list[int], settings: dict[str, Any], as_json: bool
) -> None:
    """Measure the maps over epochs, print them and save them."""
    from layercrit.epoch_map import measure_epochs

    settings = {name: value for name, value in settings.items() if name not in ("reset", "donor")}
    found = measure_epochs(model, images, epochs=cast(Any, epochs), folder=folder, **settings)
    files = found.save(folder)
    if as_json:
        rows = json.loads(found.to_pandas().to_json(orient="records", double_precision=15))
        agreement = found.agreement().to_dict() if 0 in found.epochs else None
        shown = {"model": model, "rows": rows, "agreement": agreement, "folder": str(folder)}
        click.echo(json.dumps(shown, allow_nan=False))
        return
    show_epochs(found)
    notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")


def show_epochs(found: "EpochMap") -> None:
    """Print the maps, and how alike going back to epoch 0 and fresh draws order the layers."""
    for kind in found.kinds:
        print_table(_table(found.grid(kind), _TITLES[kind].format(found.name)))
    if "rewound" in found.kinds:
        say(_sentence(found.agreement()) if 0 in found.epochs else "note: no weights of epoch 0 are among them")


def _sentence(found: "RankAgreement") -> str:
    if isnan(found.rho):
        return f"epoch 0 and fresh draws: no rank correlation over {counted(found.n_layers, 'layer')}"
    limits = "" if isnan(found.low) else f" ({100 * found.level:g}% interval {found.low:.2f} to {found.high:.2f})"
    one = "" if isnan(found.one_draw) else f"; one draw with the mean of the others: {found.one_draw:.2f}"
    return (
        f"epoch 0 and fresh draws: Spearman's rho {found.rho:.2f} over {counted(found.n_layers, 'layer')}{limits}{one}"
    )


def _table(grid: "pd.DataFrame", title: str) -> Any:
    """Return a map with a row per layer and a column per epoch."""
    table = FittedTable(plain(title))
    table.add_column("layer")
    for i, name in enumerate(grid.index):  # the last but one leaves first, the first and the last stay
        table.add_column(str(name), "right", leaves=-i if 0 < i < len(grid) - 1 else None)
    for layer in grid.columns:
        table.add_row(plain(str(layer)), *(number(value) for value in grid[layer]))
    return table
