"""The command about the worst case: which change of a module, of a given size, raises a model's loss most."""

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
    from layercrit.worst_case import WorstCase

__all__ = ["worst_case_command"]


@click.command("worst-case", cls=ModelCommand, short_help="Find the worst change of each module of MODEL.")
@click.argument("model")
@images_and_layers(n_images=500)
@click.option("--radius", default=0.1, show_default=True,
              help="Norm that a change may have, in units of that of the module's parameters.")  # fmt: skip
@click.option("--objective", default="auto", show_default=True, type=click.Choice(("auto", "loss", "cosine")),
              help="What is raised: the loss with the labels, or 1 - cosine of the predictions, which needs none. "
              "auto: the loss, if there are labels.")  # fmt: skip
@click.option("--attack", metavar="pgd(...)",
              help="Adversarial images in place of the clean ones, such as 'pgd(norm=linf, eps=4/255)'.")  # fmt: skip
@click.option("--steps", default=10, show_default=True, help="Gradient steps of a restart.")
@click.option("--step-size", type=float, metavar="SHARE", help="Length of a step in radii. [default: 2.5 / steps]")
@click.option("--restarts", default=2, show_default=True, help="Starts, all but the first at random.")
def worst_case_command(
    model: str, images: str, out: Path | None, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Find the change of each module of MODEL, of a given size, that raises the loss most."""
    from layercrit.worst_case import measure_worst_case

    folder = folder_for(model, out)
    check_free(folder / "worst-case.json", overwrite)
    kept = folder / "worst-case-kept-rows.json"
    found = measure_worst_case(model, images, keep_images=folder / "images", keep_rows=kept, **settings)
    files = found.save(folder)
    kept.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "folder": str(folder)}, allow_nan=False))
        return
    _show(found)
    notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")


def _show(found: "WorstCase") -> None:
    from layercrit.models.sources import short_name

    summary = found.summary()
    print_warnings(summary["warnings"])
    shown = FittedTable(plain(short_name(summary["model"])))
    for name in ("module", "type", "worst case", "least restart", "first order", "norm", ""):
        left = name in ("module", "type", "")
        shown.add_column(name, "left" if left else "right", leaves={"type": 1, "norm": 2}.get(name))
    for row in found.to_pandas().to_dict("records"):
        numbers = (number(row[name]) for name in ("worst_case", "smallest_restart", "first_order", "norm"))
        remark = plain("" if row["status"] == "ok" else row["status"])
        shown.add_row(plain(row["layer"]), plain(row["type"]), *numbers, remark)
    print_table(shown)
    raised = "loss above the trained network's, in nats" if summary["objective"] == "loss" else "1 - cosine"
    say()
    say(f"raised: {raised}, mean over {counted(summary['n_images'], 'image')}; changes of at most "
        f"{summary['relative_radius']:g} times a module's norm")  # fmt: skip
    if summary["loss"] is not None:
        say(f"trained network: loss {summary['loss']:.4g} nats, top-1 accuracy {percent(summary['top1_accuracy'])}")
    say(
        f"{counted(summary['restarts'], 'restart')} of {counted(summary['steps'], 'step')}: what they found is a lower "
        "bound of the maximum"
    )
    for note in summary["notes"]:
        say(f"note: {note}")
