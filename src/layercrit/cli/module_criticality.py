"""The command about module criticality: how far back to its initial values each module of a model can go."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from layercrit.cli.model_options import check_free, folder_for, images_and_layers
from layercrit.cli.printing import notice, percent, plain, print_table, print_warnings, say
from layercrit.cli.registered import ModelCommand
from layercrit.counts import counted
from layercrit.protocol import DEFAULTS

# Everything that imports torch is imported inside the command, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.module_criticality import ModuleCriticality

__all__ = ["module_criticality_command"]


@click.command("module-criticality", cls=ModelCommand, short_help="Find how far back to its start each module can go.")
@click.argument("model")
@images_and_layers(n_images=1_000)
@click.option("--initial", metavar="FILE|MODEL",
              help="Weights before training: a weight file, DIR@epoch=0 of a training run, or a model reference. "
              "[default: those of the training run that MODEL is from]")  # fmt: skip
@click.option("--tolerance", default=1.01, show_default=True,
              help="Loss that is allowed, as a factor of the trained network's.")  # fmt: skip
@click.option("--excess", type=float, metavar="NATS", help="Loss above the trained network's, in place of --tolerance.")
@click.option("--draws", default=10, show_default=True, help="Draws of the noise.")
@click.option("--n-a", default=11, show_default=True, help="Places on the path from initial to trained values.")
@click.option("--n-s", default=21, show_default=True, help="Amounts of noise, evenly in their logarithm.")
@click.option("--s-range", nargs=2, type=float, default=(1e-3, 10.0), show_default=True, metavar="LOW HIGH",
              help="Smallest and largest SD of the noise, in root mean squares of a module's parameters.")  # fmt: skip
@click.option("--surface", metavar="LAYER", help="Evaluate the whole grid of this module, for its figure.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(("float32", "reference")))
@click.option("--level", default=DEFAULTS.level, show_default=True, help="Confidence level of the limits.")
@click.pass_context
def module_criticality_command(
    context: click.Context,
    /,
    model: str,
    images: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How far back to its initial values each module of MODEL can go, and with how much noise, at the same loss.

    Images need labels. 0: the initial values do as well as the trained ones.
    """
    from layercrit.module_criticality import measure_module_criticality

    given = context.get_parameter_source("tolerance") is not ParameterSource.DEFAULT
    if given and settings["excess"] is not None:
        raise click.UsageError("--excess takes the place of --tolerance: leave one of them out.")
    folder = folder_for(model, out)
    check_free(folder / "module-criticality.json", overwrite)
    found = measure_module_criticality(model, images, keep_images=folder / "images", **settings)
    files = found.save(folder)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "folder": str(folder)}, allow_nan=False))
        return
    _show(found)
    notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")


def _show(found: "ModuleCriticality") -> None:
    from rich.table import Table

    from layercrit.models.sources import short_name

    summary = found.summary()
    print_warnings(summary["warnings"])
    shown = Table(title=plain(short_name(summary["model"])), title_justify="left", box=None, pad_edge=False)
    shown.add_column("module", no_wrap=True)
    shown.add_column("type")
    for name in ("criticality", f"{100 * summary['level']:g}% limits", "a", "s", "distance", "points"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    for row in found.to_pandas().to_dict("records"):
        limits = "-" if row["low"] != row["low"] else f"{_number(row['low'])} - {_number(row['high'])}"
        remark = plain(row["status"] if row["status"] != "ok" else f"edge: {row['edge']}" if row["edge"] else "")
        remark.stylize("yellow")
        numbers = (row["module_criticality"], row["a"], row["s"], row["distance"])
        value, a, s, distance = map(_number, numbers)
        shown.add_row(
            plain(row["layer"]), plain(row["type"]), value, limits, a, s, distance, f"{row['n_points']}", remark
        )
    print_table(shown)
    for line in _lines(summary):
        say(line)


def _lines(summary: dict[str, Any]) -> list[str]:
    n, n_of_grid = summary["n_evaluations"], summary["n_evaluations_of_grid"]
    total = "-" if summary["sum"] is None else _number(summary["sum"])
    left_out = summary["n_modules"] - summary["n_modules_in_sum"]
    return [
        "",
        f"sum over modules {total}{f', {left_out} left out' if left_out else ''}: for ranking networks of one "
        "architecture, and no bound on anything",
        f"loss {summary['loss']:.4g} nats, {summary['allowed_loss']:.4g} allowed; top-1 accuracy "
        f"{percent(summary['top1_accuracy'])}",
        f"{counted(summary['n_draws'], 'draw')}, {counted(summary['n_images'], 'image')}; "
        + (
            "no limits: one draw or one image says nothing of others"
            if summary["covers"] == "nothing"
            else f"limits hold for new {summary['covers']}"
        ),
        f"{n:,} evaluations, {n / max(n_of_grid, 1):.0%} of the whole grid's {n_of_grid:,}",
        *(f"note: {note}" for note in summary["notes"]),
    ]


def _number(value: float) -> str:
    """Return a number in three digits; a dash for NaN."""
    return "-" if value != value else f"{value:.3g}"
