"""The commands about one model: measure it, list its layers, show a measurement again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from layercrit.cli.by_images import by_option, rows_by, save_by, show_by
from layercrit.cli.epochs import measure_through_training
from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import NewPath, folder_for, number_or_auto
from layercrit.cli.pitfalls import say_pitfalls
from layercrit.cli.printing import bar, notice, number, percent, plain, print_table, print_warnings, say
from layercrit.cli.registered import ModelCommand, RegisteredOption, complete_files, missing_plug_ins_named
from layercrit.cli.saver import Saver
from layercrit.cli.tracking import pass_measurement, track_option, tracked_measurement
from layercrit.counts import counted, counted_range, counted_units
from layercrit.errors import LayercritError
from layercrit.protocol import DEFAULTS, DTYPES, GROUPS, INTERVALS, NORM_STATISTICS

# Everything that imports torch is imported inside the commands, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    import pandas as pd

    from layercrit.measurement import Measurement

__all__ = ["layers_command", "measure_command", "show_command"]

_STRONGEST = 8  # interactions that are printed
_NO_LABELS = "layercrit.no_labels"


def _selection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose layers."""
    for option in reversed(
        [
            click.option("--layers", default=DEFAULTS.layers, show_default=True, metavar="GLOB,...",
                         help="Glob patterns of layer names, such as 'layer1.*,fc'."),
            click.option("--types", default=DEFAULTS.types, show_default=True, metavar="TYPE,...",
                         help="Layer types: conv, linear, norm, embedding, other, or all."),
            click.option("--group", default=DEFAULTS.group, show_default=True,
                         type=click.Choice(GROUPS), help="What is reset at once."),
            click.option("--sets", default=DEFAULTS.sets, show_default=True, metavar="KIND|FILE",
                         help="Reset each of them on its own, or sets of them: all-but-one, cascade-up, cascade-down, "
                         "pairs, or a TOML file of named sets."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _no_labels(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Note what `_labels` looks for; two options for one value have other defaults in each version of click."""
    context.meta[_NO_LABELS] = asked


def _labels(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return "none" if context.meta.get(_NO_LABELS) else value


def _epochs(context: click.Context, parameter: click.Parameter, value: str | None) -> str | list[int] | None:
    if value is None:
        return value
    numbers = [text.strip() for text in value.split(",")]
    return [int(number) for number in numbers] if all(number.isdecimal() for number in numbers) else value


@click.command("measure", cls=ModelCommand, short_help="Measure the criticality of every layer of MODEL.")
@click.argument("model")
@click.option(
    "--images",
    required=True,
    cls=RegisteredOption,
    registry="layercrit.probes.kinds:IMAGE_SOURCES",
    more=("Corruptions:", "layercrit.probes.corruptions:CORRUPTIONS"),
    metavar="SOURCE",
    shell_complete=complete_files,
    help="A folder, .npz/.npy, .parquet, WebDataset .tar, Hugging Face data set on disk, MNIST files (of a folder: the "
    "t10k part), or KIND:NAME. A part of a source: 'SOURCE?split=test'. Corrupted: "
    "'corrupt:fog@3:SOURCE' (KIND@SEVERITY, 1 to 5). Adversarial: 'attack:pgd(norm=linf, eps=4/255, steps=10):SOURCE'. "
    "Kinds:",
)
@click.option("--trials", default=DEFAULTS.trials, show_default=True, help="Random draws per layer.")
@click.option("--n-images", default=DEFAULTS.n_images, show_default=True, help="Images drawn from SOURCE, at most.")
@click.option(
    "--half-width",
    type=float,
    metavar="H",
    help="Half-width of the interval that every layer is to have, such as 0.05. A pilot plans the trials of each layer "
    "and the images; recommended in place of --trials.",
)
@click.option("--minutes", type=float, metavar="M", help="The smallest half-width that can be had in this time.")
@click.option("--pilot", default=DEFAULTS.pilot, show_default=True, help="Trials of the pilot.")
@click.option(
    "--max-trials", default=DEFAULTS.max_trials, show_default=True, help="Most trials of a layer after a pilot."
)
@_selection
@click.option(
    "--reset",
    default=DEFAULTS.reset,
    show_default=True,
    cls=RegisteredOption,
    registry="layercrit.resets:RESETS",
    metavar="NAME",
    help="What replaces a layer's parameters; options in brackets, such as 'noise(scale=0.5)'.",
)
@click.option(
    "--norm-statistics",
    default=DEFAULTS.norm_statistics,
    show_default=True,
    type=click.Choice(NORM_STATISTICS),
    help="Running statistics of normalisation layers beside a reset: as trained, reset as well, or estimated again.",
)
@click.option(
    "--from",
    "donor",
    metavar="FILE|MODEL",
    help="Where the new values come from, for rewind and donor: a weight file, DIR@epoch=0 (the initial weights of a "
    "training run), or a model reference.",
)
@click.option(
    "--distances",
    cls=RegisteredOption,
    registry="layercrit.distances:DISTANCES",
    metavar="NAME,...",
    help="Distances to measure besides cosine; all of them by default.",
)
@click.option(
    "--seed", default=DEFAULTS.seed, show_default=True, help="Seed of the random draws and of the choice of images."
)
@click.option("--batch-size", default=str(DEFAULTS.batch_size), show_default=True, callback=number_or_auto)
@click.option(
    "--dtype",
    default=DEFAULTS.dtype,
    show_default=True,
    type=click.Choice(DTYPES),
    help="auto: bfloat16 where it is fast and accurate enough, else float32; the choice is reported.",
)
@click.option("--device", default=DEFAULTS.device, show_default=True)
@click.option("--level", default=DEFAULTS.level, show_default=True, help="Confidence level of the intervals.")
@click.option(
    "--interval",
    default=DEFAULTS.interval,
    show_default=True,
    type=click.Choice(INTERVALS),
    help="t: Student's, for new trials and images; betting: for new trials, assumes nothing but distances in [0, 1].",
)
@click.option(
    "--labels",
    default="auto",
    callback=_labels,
    show_default=True,
    metavar="FILE|COLUMN|none",
    help="Labels in place of those that SOURCE comes with: a .csv, .txt, .json or .npy file, or a column (of an .npz "
    "file: a key; of a .tar file: a suffix); none: ignore them.",
)
@click.option("--no-labels", is_flag=True, expose_value=False, callback=_no_labels, hidden=True)
@click.option(
    "--classes",
    metavar="FILE",
    help="The names of the model's classes (folders, labels), one per line in the order of its outputs.",
)
@click.option(
    "--epochs",
    callback=_epochs,
    metavar="all|N,...|FILE,...",
    help="Epochs that MODEL, a training run, has kept, or weight files of any training with the epoch in their names, "
    "such as 'ckpt/epoch_*.pt', or '0=first.pt,9=last.pt': measure how far each layer's way back to them moves the "
    "final network, and which layers matter in the network after each.",
)
@click.option(
    "--name", metavar="TEXT", help="What tables and figures call MODEL. [default: its reference, without folders]"
)
@click.option("--out", type=NewPath(path_type=Path), metavar="DIR", help="Where to save. [default: layercrit-MODEL]")
@click.option("--overwrite", is_flag=True, help="Replace a measurement that is already in DIR.")
@by_option
@track_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@click.pass_context
def measure_command(
    context: click.Context,
    /,
    model: str,
    images: str,
    out: Path | None,
    overwrite: bool,
    by: str | None,
    epochs: str | list[int] | None,
    trackers: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure the criticality of every layer of MODEL on images.

    Run the same command again to resume after an interruption.
    """
    from layercrit.measuring import measure

    names = ("trials", "pilot", "max_trials")
    given = {name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    is_planned = settings["half_width"] is not None or settings["minutes"] is not None
    if not is_planned and given & {"pilot", "max_trials"}:
        raise click.UsageError(
            "--pilot and --max-trials are limits of what --half-width or --minutes plan: give one of these, or "
            "--trials alone."
        )
    if is_planned and "trials" in given:
        raise click.UsageError(
            "--half-width and --minutes plan the trials: leave --trials out; the limits are --pilot and --max-trials."
        )
    folder = folder_for(model, out)
    if epochs is not None:
        if overwrite or by or trackers or settings["donor"] or settings["reset"] != DEFAULTS.reset:
            raise click.UsageError("--epochs goes with neither --reset, --from, --by, --track nor --overwrite.")
        measure_through_training(model, images, folder, epochs, settings, as_json)
        return
    earlier = None if overwrite else _earlier(folder, settings)
    saver = Saver(folder)
    with tracked_measurement(trackers, model, settings, folder) as tracking:
        on_cell = None if tracking is None else tracking.cell
        with saver, missing_plug_ins_named(lambda: {} if earlier is None else earlier.record["versions"]):
            measurement = measure(
                model, images, resume=earlier, on_trial=saver.keep, on_cell=on_cell, keep_images=folder / "images",
                **settings,
            )  # fmt: skip
        try:
            saver.save(measurement)  # before anything is printed, since that may fail
        finally:
            _show(measurement, as_json, folder, by)
        if tracking is not None:
            pass_measurement(tracking, measurement, folder)


@click.command("layers", cls=ModelCommand, short_help="List what would be reset in MODEL, in depth order.")
@click.argument("model")
@_selection
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def layers_command(model: str, layers: str, types: str, group: str, sets: str, as_json: bool) -> None:
    """List what would be reset in MODEL, in depth order, without measuring.

    "after" is the share of the forward pass's FLOPs that must be recomputed when the layer is reset.
    """
    from layercrit.measuring import list_layers

    found = list_layers(model, layers=layers, types=types, group=group, sets=sets).rename(columns={"layer": "name"})
    rows = found.to_dict("records")
    if as_json:
        click.echo(json.dumps({"model": model, "layers": rows}, allow_nan=False))
        return
    table = FittedTable(plain(model))
    for column in ("depth", "layer", "type", "shape", "parameters", "after"):
        left = column in ("layer", "type", "shape")
        table.add_column(column, "left" if left else "right", leaves={"type": 1, "shape": 2}.get(column))
    for row in rows:
        shape = " x ".join(str(n) for n in row["shape"])
        share = f"{100 * row['flops_after']:.1f}%"
        table.add_row(str(row["depth"]), plain(row["name"]), row["type"], shape, f"{row['n_parameters']:,}", share)
    print_table(table)
    say("after: share of the forward pass's FLOPs that is run again when the layer is reset")
    units = counted_units(len(found), sets)
    # sets share layers, so that sums over them would count parameters more than once
    of_parameters = "" if sets != "each" else f", {counted(int(found['n_parameters'].sum()), 'parameter')}"
    of_all = "layers" if sets == "each" else "sets"
    passes = f"{found['flops_after'].sum():.1f} forward passes"
    say(f"{units}{of_parameters}; one trial of all {of_all} costs {passes}")


@click.command("show", short_help="Print a saved measurement, and plot it again.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@by_option
@click.option("--methods", is_flag=True, help="Print a paragraph for a paper's methods section, and nothing else.")
def show_command(folder: Path, as_json: bool, by: str | None, methods: bool) -> None:
    """Print the table of a saved measurement, and plot its figure again."""
    from layercrit.figures.style import save_figure
    from layercrit.measurement import Measurement
    from layercrit.reporting.methods_section import methods_section

    measurement = Measurement.load(folder)
    if methods:
        say(methods_section(measurement))
        return
    _show(measurement, as_json, folder, by)
    try:
        for path in save_figure(measurement.plot(), folder / "criticality"):
            notice(path)
        for path in save_by(measurement, by, folder) if by else ():
            notice(path)
    except OSError as error:
        say(f"note: no figure was plotted, since {folder} cannot be written ({error.strerror})", err=True)


def _earlier(folder: Path, settings: dict[str, Any]) -> "Measurement | None":
    """Return the measurement in a folder that this one goes on with: an unfinished one, or one of fewer trials."""
    from layercrit.measurement import Measurement

    if not (folder / "measurement.json").exists():
        return None
    found = Measurement.load(folder)
    planned = settings["half_width"] is not None or settings["minutes"] is not None
    n_trials = found.cells["trial"].nunique()
    fewer = not planned and found.record["random_trials"] and n_trials < settings["trials"]
    if found.record.get("complete", True) and not fewer:
        raise LayercritError(
            f"{folder} already contains a measurement. Print it with `layercrit show {folder}`, "
            "name another folder with --out, or replace it with --overwrite."
        )
    return found


def _show(measurement: "Measurement", as_json: bool, folder: Path, by: str | None) -> None:
    from layercrit.pitfalls import pitfalls_of_measurement

    summary, table, has_pairs = measurement.summary(), measurement.to_pandas(), measurement.has_pairs
    applying = pitfalls_of_measurement(measurement)
    if as_json:
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        found = measurement.interactions().to_json(orient="records", double_precision=15) if has_pairs else "[]"
        more = {"interactions": json.loads(found)} if has_pairs else {}
        more |= {f"by_{by}": rows_by(measurement, by)} if by else {}
        more["pitfalls"] = [one.name for one in applying]
        click.echo(json.dumps({**summary, "layers": rows, "folder": str(folder), **more}, allow_nan=False))
        return
    print_warnings(summary["warnings"])
    print_table(_layer_table(table, summary))
    if has_pairs:
        print_table(_interaction_table(measurement.interactions(), summary))
    units = counted_units(summary["n_layers"], measurement.record["protocol"].get("sets", "each"))
    for line in _summary_lines(summary, units):
        say(line)
    say_pitfalls(applying)
    if by:
        show_by(measurement, by)


def _layer_table(table: "pd.DataFrame", summary: dict[str, Any]) -> Any:
    level = f"{100 * summary['level']:g}%"
    shown = FittedTable(plain(summary["name"]))
    shown.add_column("layer")
    shown.add_column("type", leaves=2)
    shown.add_column("criticality", "right")
    shown.add_column(f"{level} interval", "right")
    planned = summary["precision"] is not None
    for column in ("half-width", "trials") if planned else ():
        shown.add_column(column, "right", leaves=3)
    shown.add_column("", leaves=1)
    for column in ("matched", "top-1 agreement", *(["top-1 accuracy"] if "top1_accuracy" in table else []), "status"):
        leaves = {"top-1 accuracy": 4, "top-1 agreement": 5}.get(column)
        shown.add_column(column, "left" if column == "status" else "right", leaves=leaves)
    for row in table.to_dict("records"):
        interval = "-" if row["low"] != row["low"] else f"{row['low']:.3f} - {row['high']:.3f}"
        cells = [plain(row["layer"]), plain(row["type"]), number(row["criticality"]), interval]
        cells += [number(row["half_width"]), str(row["n_trials"])] if planned else []
        cells += [bar(row["criticality"]), number(row["criticality_matched"]), percent(row.get("top1_agreement"))]
        if "top1_accuracy" in table:
            cells.append(percent(row["top1_accuracy"]))
        status = plain(row["status"])
        status.stylize("" if row["status"] == "ok" else "yellow")
        shown.add_row(*cells, status)
    return shown


def _interaction_table(pairs: "pd.DataFrame", summary: dict[str, Any]) -> Any:
    """Return the strongest interactions as a table, those whose interval excludes 0 first."""
    excluded = (pairs["low"] > 0) | (pairs["high"] < 0)
    order = pairs.assign(excluded=excluded, size=pairs["interaction"].abs()).sort_values(
        ["excluded", "size"], ascending=False, kind="stable"
    )
    title = f"strongest of {len(pairs)} interactions; of {excluded.sum()} the interval excludes 0"
    shown = FittedTable(title)
    for column in ("layers", "interaction", f"{100 * summary['level']:g}% interval", "both", "each alone"):
        left = column == "layers"
        shown.add_column(column, "left" if left else "right", wraps=left)
    for row in order.head(_STRONGEST).to_dict("records"):
        interval = "-" if row["low"] != row["low"] else f"{row['low']:+.3f} to {row['high']:+.3f}"
        alone = f"{number(row['criticality_i'])}, {number(row['criticality_j'])}"
        found = "-" if row["interaction"] != row["interaction"] else f"{row['interaction']:+.3f}"
        shown.add_row(plain(f"{row['layer_i']} + {row['layer_j']}"), found, interval, number(row["criticality"]), alone)
    return shown


def _summary_lines(summary: dict[str, Any], units: str) -> list[str]:
    mean, matched = summary["criticality"], summary["criticality_matched"]
    lines = [""]
    if mean is not None:
        interval = "no interval: that needs at least two trials"
        if mean["low"] is not None:
            limits = f"{mean['low']:.3f} - {mean['high']:.3f}"
            interval = f"{100 * summary['level']:g}% interval {limits} for new {summary['covers']}"
        if summary["n_trials_in_mean"] < summary["n_trials"]:
            interval += f", from the {counted(summary['n_trials_in_mean'], 'trial')} that all layers have"
        lines.append(f"mean criticality {mean['mean']:.3f} ({interval})")
        if mean["low"] is not None and "trials" in summary["covers"]:
            lines.append(
                f"up to {summary['excluded_share']:.0%} of all draws may be unlike those of "
                f"{counted(summary['n_trials_in_mean'], 'trial')}; more trials leave less room"
            )
        if matched is not None and summary["temperature"] is not None:
            lines.append(
                f"temperature-matched {matched['mean']:.3f} (temperature {summary['temperature']:.3g}); "
                "compare models by this value where their training makes some more confident than others"
            )
    if summary["chance"] is not None:
        lines.append(f"an unrelated prediction would give {1 - summary['chance']:.3f}, not 1")
    if summary["top1_accuracy"] is not None:
        guessing = summary["guessing_accuracy"]
        than = "" if guessing is None else f"; always naming one class would give {100 * guessing:.1f}%"
        lines.append(f"top-1 accuracy before any reset {100 * summary['top1_accuracy']:.1f}%{than}")
    bad = {status: n for status, n in summary["cells"].items() if status != "ok"}
    if bad:
        counts = ", ".join(f"{n} {status}" for status, n in bad.items())
        left = summary["n_layers"] - summary["n_layers_in_mean"]
        of_cells = counted(sum(summary["cells"].values()), "cell")
        lines.append(f"left out: {counts} of {of_cells}; not in the mean: {counted(left, 'layer')}")
    if unreadable := summary["unreadable"]:
        lines.append(f"left out: {counted(len(unreadable), 'unreadable image')}, such as {unreadable[0]}")
    if summary["name"] != summary["model"]:
        lines.append(f"model: {summary['model']}")
    if summary["donor"] is not None:
        lines.append(f"new values from: {summary['donor']}")
    trials = counted_range(summary["fewest_trials"], summary["n_trials"], "trial")
    lines.append(
        f"{units}, {trials}, {counted(summary['n_images'], 'image')}; {summary['dtype']}, {summary['backend']} backend"
    )
    return [*lines, *(f"note: {note}" for note in summary["notes"])]
