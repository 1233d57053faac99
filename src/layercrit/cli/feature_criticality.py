"""The command about feature criticality: how much farther than the layer before a layer moves on perturbed images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import check_free, folder_for, images_and_layers
from layercrit.cli.printing import notice, number, percent, plain, print_table, print_warnings, say
from layercrit.cli.registered import ModelCommand
from layercrit.counts import counted

# Everything that imports torch is imported inside the command, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.feature_criticality import FeatureCriticality

__all__ = ["feature_criticality_command"]


@click.command("feature-criticality", cls=ModelCommand, short_help="Find how far perturbed images move each layer.")
@click.argument("model")
@images_and_layers(n_images=200)
@click.option("--norm", default="linf", show_default=True, type=click.Choice(("linf", "l2")),
              help="Of perturbations: the largest change of a value, or over all values of an image.")  # fmt: skip
@click.option("--eps", default="4/255", show_default=True, metavar="NUMBER",
              help="Largest norm of a perturbation, for pixels in [0, 1].")  # fmt: skip
@click.option("--steps", default=10, show_default=True, help="Gradient steps of a restart.")
@click.option(
    "--step-size", metavar="NUMBER", help="Norm of the first step; the others fall linearly. [default: 2 eps]"
)
@click.option("--restarts", default=1, show_default=True, help="Random starts for each image; the best counts.")
def feature_criticality_command(
    model: str, images: str, out: Path | None, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Find how much farther than the layer before each layer of MODEL moves on perturbed images."""
    from layercrit.feature_criticality import measure_feature_criticality

    folder = folder_for(model, out)
    check_free(folder / "feature-criticality.json", overwrite)
    kept = folder / "feature-criticality-kept-rows.json"
    found = measure_feature_criticality(model, images, keep_images=folder / "images", keep_rows=kept, **settings)
    files = found.save(folder)
    kept.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "folder": str(folder)}, allow_nan=False))
        return
    _show(found)
    notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")


def _show(found: "FeatureCriticality") -> None:
    from layercrit.attacks import in_levels
    from layercrit.models.sources import short_name

    summary = found.summary()
    print_warnings(summary["warnings"])
    shown = FittedTable(plain(short_name(summary["model"])))
    names = ("layer", "type", "layer before", "")
    for name in ("layer", "type", "feature criticality", "largest change", "layer before", ""):
        shown.add_column(name, "left" if name in names else "right", leaves=1 if name == "type" else None)
    for row in found.to_pandas().to_dict("records"):
        change = row["largest_change"]
        shown.add_row(
            *(plain(row[name]) for name in ("layer", "type")),
            number(row["feature_criticality"]),
            "-" if change != change else f"{change:.3g}",
            plain(row["before"]),
            plain("" if row["status"] == "ok" else row["status"]),
        )
    print_table(shown)
    say()
    size = f"{in_levels(summary['eps'])} in {summary['norm']}"
    say(f"perturbed: {counted(summary['n_images'], 'image')}, by at most {size}; "
        f"largest change of the input {summary['largest_change_of_input']:.3g}; of a layer: norm of the change of its "
        "output / number of its elements")  # fmt: skip
    if summary["loss"] is not None:
        say(f"network without perturbation: loss {summary['loss']:.4g} nats, top-1 accuracy "
            f"{percent(summary['top1_accuracy'])}")  # fmt: skip
    say(
        f"{counted(summary['restarts'], 'restart')} of {counted(summary['steps'], 'step')}: what they found is a lower "
        "bound of each largest change"
    )
    for note in summary["notes"]:
        say(f"note: {note}")
