"""The command about module criticality: how far back to its initial values each module of a model can go.

Of a study: of each of its models that have these values.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import (
    check_free,
    folder_for,
    images_and_layers,
    is_study_folder,
    refuse_options,
)
from layercrit.cli.printing import json_rows, notice, percent, plain, print_table, print_warnings, say
from layercrit.cli.registered import ModelCommand
from layercrit.counts import counted
from layercrit.protocol import DEFAULTS

# Everything that imports torch is imported inside the command, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.module_criticality.values import ModuleCriticality
    from layercrit.study.module_tables import StudyModuleCriticality

__all__ = ["module_criticality_command"]

_OF_MODEL = ("images", "labels", "classes", "layers", "types", "group", "seed", "surface")
_OF_STUDY = ("models", "probe_set")


@click.command("module-criticality", cls=ModelCommand, short_help="Find how far back to its start each module can go.")
@click.argument("model", metavar="MODEL|STUDY")
@images_and_layers(n_images=1_000, or_study=True)
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
@click.option("--models", metavar="NAME,...", help="Of a STUDY, the models that are wanted. [default: all that have "
              "initial weights]")  # fmt: skip
@click.option("--probe-set", metavar="NAME", help="Of a STUDY with several, its images. [default: the first]")
@click.pass_context
def module_criticality_command(
    context: click.Context,
    /,
    model: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    models: str | None,
    probe_set: str | None,
    **settings: Any,
) -> None:
    """How far back to its initial values each module of MODEL can go, and with how much noise, at the same loss.

    Images need labels. 0: the initial values do as well as the trained ones.

    With a STUDY, a folder of `layercrit study run`: of each of its models that have initial weights, on its images.
    Options that are not given are as in [module_criticality] of its study file, if it has that. What was measured is
    kept in STUDY/module-criticality, and the same command goes on after an interruption.
    """
    has_tolerance = context.get_parameter_source("tolerance") is not ParameterSource.DEFAULT
    if has_tolerance and settings["excess"] is not None:
        raise click.UsageError("--excess takes the place of --tolerance: leave one of them out.")
    of_study = is_study_folder(model)
    refuse_options(context, _OF_MODEL if of_study else _OF_STUDY, of_study)
    if of_study:
        chosen = None if models is None else models.split(",")
        given = {name: value for name, value in settings.items()
                 if context.get_parameter_source(name) is not ParameterSource.DEFAULT}  # fmt: skip
        _of_study(model, out, overwrite, as_json, {"models": chosen, "probe_set": probe_set, **given})
    else:
        _of_model(model, out, overwrite, as_json, settings)


def _of_model(model: str, out: Path | None, overwrite: bool, as_json: bool, settings: dict[str, Any]) -> None:
    from layercrit.module_criticality.values import measure_module_criticality

    images = settings.pop("images")
    if images is None:
        raise click.UsageError("Missing option '--images': a MODEL needs images, such as a folder of photographs.")
    folder = folder_for(model, out)
    check_free(folder / "module-criticality.json", overwrite)
    kept = folder / "module-criticality-kept-points.json"
    found = measure_module_criticality(model, images, keep_images=folder / "images", keep_points=kept, **settings)
    files = found.save(folder)
    kept.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "folder": str(folder)}, allow_nan=False))
        return
    _show(found)
    notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")


def _of_study(study: str, out: Path | None, overwrite: bool, as_json: bool, given: dict[str, Any]) -> None:
    from layercrit.study.module_criticality import measure_study_module_criticality
    from layercrit.study.status import MODULES

    folder = Path(study) / MODULES if out is None else out
    try:
        found = measure_study_module_criticality(study, folder=folder, overwrite=overwrite, **given)
    except KeyboardInterrupt:
        say(f"Stopped. What was measured is kept in {folder}; run the same command again to go on.", err=True)
        raise
    by_model, modules = (json_rows(table) for table in (found.by_model, found.table))
    if as_json:
        about = {"study": study, "models": by_model, "modules": modules, "folder": str(folder)}
        click.echo(json.dumps(about, allow_nan=False))
        return
    _show_study(study, found)
    on_page = f"; the page shows it: `layercrit report {study}`" if out is None else ""
    notice(f"Saved in {folder}{on_page}")


def _show_study(study: str, found: "StudyModuleCriticality") -> None:
    table = found.table
    shown = FittedTable(plain(f"{study}: module criticality"))
    for name in ("model", "most critical module", "sum", "modules", "loss", "allowed"):
        left = name in ("model", "most critical module")
        shown.add_column(name, "left" if left else "right", leaves={"modules": 1, "allowed": 2, "loss": 2}.get(name))
    for row in found.by_model.to_dict("records"):
        if row["left_out"]:
            continue
        own = table[table["model"] == row["model"]].sort_values("module_criticality", na_position="first")
        numbers = (_number(row[name]) for name in ("loss", "allowed_loss"))
        of = f"{row['n_modules_in_sum']} of {row['n_modules']}"
        shown.add_row(plain(row["model"]), plain(own["layer"].iloc[-1]), _number(row["sum"]), of, *numbers)
    print_table(shown)
    say()
    say("sums over modules: for ranking networks of one architecture, and no bound on anything")


def _show(found: "ModuleCriticality") -> None:
    from layercrit.models.sources import short_name

    summary = found.summary()
    print_warnings(summary["warnings"])
    shown = FittedTable(plain(short_name(summary["model"])))
    shown.add_column("module")
    shown.add_column("type", leaves=1)
    for name in ("criticality", f"{100 * summary['level']:g}% limits", "a", "s", "distance", "points"):
        shown.add_column(name, "right", leaves={"points": 2, "distance": 3}.get(name))
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
