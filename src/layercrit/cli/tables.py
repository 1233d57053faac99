"""Commands about the tables of a study: import published ones, compare models, export."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import NewPath
from layercrit.cli.pitfalls import say_pitfalls
from layercrit.cli.printing import notice, number, percent, plain, print_table, print_warnings, say, say_damaged
from layercrit.cli.registered import RegisteredOption
from layercrit.counts import counted, counted_range
from layercrit.protocol import NORM_STATISTICS

# Everything that imports torch is imported inside the commands, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.comparison import Comparison
    from layercrit.study.tables import Study

__all__ = ["compare_command", "comparison_options", "export_command", "import_command", "show_comparison"]


_OTHERS = 5  # further conditions of a study that are listed
_FEWEST = 3  # models from which there is a rank correlation


def condition_options(command: Callable[..., Any], or_all: bool = False) -> Callable[..., Any]:
    """Add the options that choose one of a study's conditions, or, without any of them, perhaps all."""
    probe_set, statistics, weights = (
        f"[default: {first}{', or all without any such option' * or_all}]"
        for first in ("its first", "what the study names first", "their final weights")
    )
    for option in reversed(
        [
            click.option("--probe-set", metavar="NAME", help=f"One of the study's probe sets. {probe_set}"),
            click.option("--norm-statistics", type=click.Choice(NORM_STATISTICS),
                         help=f"Running statistics beside the reset. {statistics}"),
            click.option("--epoch", type=int, metavar="N",
                         help=f"An epoch of the models' training runs. {weights}"),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def comparison_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what of a study is compared, named like the arguments of `compare`."""
    command = condition_options(command)
    for option in reversed(
        [
            click.option("--baseline", metavar="MODEL",
                         help="The model that the others are compared with. [default: the study's own]"),
            click.option("--leave-out", multiple=True, metavar="NAME", callback=_left_out,
                         help="A model or category to leave out; may be given several times, '' for none. [default: "
                         "the study's own]"),
            click.option("--reset", metavar="NAME", help="One of the study's resets. [default: its first]"),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _left_out(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> list[str] | None:
    return [name for name in names if name] if names else None


@click.command("import", short_help="Read published results into a study.")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS.csv")
@click.option("--as", "layout", required=True, type=click.Choice(["published"]), help="The layout of the file.")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A CSV file with the columns model_id, category, label and imagenet_top1_percent. [default: those of the zoo]",
)
@click.option("--out", required=True, type=NewPath(path_type=Path), metavar="DIR", help="The folder of the new study.")
def import_command(results: Path, layout: str, models: Path | None, out: Path) -> None:
    """Read published results into a study, to compare, plot and export them like measured ones.

    The layout `published` is that of the raw results of Gavrikov et al. 2024: one row per model, layer and trial.
    """
    from layercrit.study.published import import_published

    study = import_published(results, out, models)
    say(
        f"{counted(len(study.models), 'model')}, {counted(len(study.cells), 'cell')} from "
        f"{study.record['origin']['source']}"
    )
    for note in study.record["notes"]:
        notice(f"note: {note}")
    notice(f"Saved in {out}. Next: `layercrit compare {out}`.")


@click.command("export", short_help="Write a study's tables for other programs.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--format",
    "name",
    required=True,
    cls=RegisteredOption,
    registry="layercrit.reporting.exports:FORMATS",
    metavar="NAME",
    help="The format to write.",
)
@click.option("--out", type=NewPath(path_type=Path), metavar="DIR", help="Where to write. [default: DIR/export]")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option(
    "--by",
    type=click.Choice(["class", "prediction", "correctness"]),
    help="Write criticality by class (label), by predicted class, or for images that the trained networks name right "
    "and wrong, instead; with the formats csv and parquet.",
)
@partial(condition_options, or_all=True)
def export_command(
    folder: Path, name: str, out: Path | None, overwrite: bool, by: str | None, **condition: Any
) -> None:
    """Write the tables of the study in DIR as files for other programs."""
    from layercrit.reporting.exports import export
    from layercrit.study.status import has_modules
    from layercrit.study.tables import load_study

    study = load_study(folder)
    say_damaged(study.damaged)
    for path in export(study, name, out, overwrite=overwrite, by=by, **condition):
        say(path)
    if by is None and has_modules(study.folder, study.record):
        from layercrit.study.module_tables import how_far  # which imports torch

        if mistake := how_far(study)["mistake"]:
            say(f"note: module criticality: {mistake}", err=True)


@click.command("compare")
@click.argument("folder", type=click.Path(path_type=Path), metavar="STUDY")
@comparison_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def compare_command(folder: Path, as_json: bool, **asked: Any) -> None:
    """Compare the models of a study, most critical first.

    Differences are relative to a baseline. The centre of mass says at which depth criticality lies: 0 is the first
    layer, 1 the last.
    """
    from layercrit.comparison import compare
    from layercrit.pitfalls import pitfalls_of_comparison
    from layercrit.study.tables import load_study

    study = load_study(folder)
    say_damaged(study.damaged)
    comparison = compare(study, **asked)
    compared = study.models["model"].isin(comparison.models.index)
    print_warnings(study.warnings_of(study.models[compared]), err=True)
    if comparison.condition and len(study.conditions) > 1:
        words = comparison.condition.label(study.conditions)
        others = [one.label(study.conditions) for one in study.conditions if one != comparison.condition]
        more = f"; and {len(others) - _OTHERS} more" if len(others) > _OTHERS else ""
        notice(f"note: {words}; there are also: {'; '.join(others[:_OTHERS])}{more}")
    if comparison.caution:
        say(f"note: {comparison.caution}", err=True)
    if as_json:
        names = [one.name for one in pitfalls_of_comparison(study, comparison)]
        click.echo(json.dumps({**comparison.to_dict(), "pitfalls": names}, allow_nan=False))
        return
    show_comparison(study, comparison)


def show_comparison(study: "Study", comparison: "Comparison") -> None:
    """Print the models, most critical first, categories, and correlations."""
    from layercrit.pitfalls import pitfalls_of_comparison

    print_table(_ranking(comparison))
    say()
    if len(comparison.categories):
        print_table(_categories(comparison))
        say()
    correlations = _correlations(comparison)
    if correlations.row_count:
        print_table(correlations)
        say()
    against = f"differences are relative to {comparison.baseline}" if comparison.baseline else "no baseline"
    trials = counted_range(comparison.origin["fewest_trials"], comparison.origin["trials"], "trial")
    say(
        f"{counted(len(comparison.models), 'model')}, {counted(len(comparison.layers), 'layer')}, "
        f"{trials}, reset {comparison.reset}; {against}"
    )
    if comparison.left_out:
        say(f"left out: {', '.join(comparison.left_out)}")
    for note in comparison.notes:
        say(f"note: {note}")
    say_pitfalls(pitfalls_of_comparison(study, comparison))


def _table(title: str, names: tuple[str, ...], numbers: tuple[str, ...]) -> Any:
    table = FittedTable(title)
    for column in names:
        table.add_column(column, leaves=1 if column == "category" and len(names) > 1 else None)
    for column in numbers:
        table.add_column(column, "right")
    return table


def _ranking(comparison: "Comparison") -> Any:
    models = comparison.models.sort_values("criticality", ascending=False)
    optional = {"matched": "criticality_matched", "difference": "difference"}
    shown = {title: column for title, column in optional.items() if models[column].notna().any()}
    columns = (f"{comparison.accuracy} accuracy", "criticality", *shown, "centre of mass")
    n_layers = counted(len(comparison.layers), "layer")
    title = f"Models by mean criticality over {n_layers}{' in common' * (len(models) > 1)}"
    table = _table(title, ("model", "category"), columns)
    for name, row in models.iterrows():
        signed = {column: f"{row[column]:+.3f}" if column == "difference" else number(row[column])
                  for column in shown.values()}  # fmt: skip
        table.add_row(
            plain(str(name)),
            plain(row["category"] or "-"),
            percent(row["accuracy"]),
            number(row["criticality"]),
            *signed.values(),
            number(row["centre_of_mass"]),
        )
    return table


def _categories(comparison: "Comparison") -> Any:
    table = _table("Categories", ("category",), ("models", "criticality"))
    for name, row in comparison.categories.sort_values("criticality", ascending=False).iterrows():
        table.add_row(plain(str(name)), str(int(row["n_models"])), number(row["criticality"]))
    return table


def _correlations(comparison: "Comparison") -> Any:
    title = f"Rank correlation of mean criticality with {comparison.accuracy} accuracy"
    table = _table(title, ("models",), ("n", "Spearman's rho", "p", "Kendall's tau-b", "p"))
    rows = comparison.correlations.to_dict("records")
    for spearman, kendall in zip(rows[::2], rows[1::2], strict=True):
        if spearman["n"] < _FEWEST:
            continue
        without = spearman["without"]
        cells = [text for row in (spearman, kendall) for text in (number(row["statistic"]), _pvalue(row["pvalue"]))]
        table.add_row(plain("all" if without is None else f"without {without}"), str(spearman["n"]), *cells)
    return table


def _pvalue(value: float) -> str:
    return "-" if value != value else f"{value:.2g}"
