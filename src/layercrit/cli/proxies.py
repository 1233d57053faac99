"""The command `proxies`: cheap proxies for the criticality of layers, and how well they rank them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import NewPath, check_free, default_folder, is_study_folder, refuse_options
from layercrit.cli.printing import json_rows, notice, number, plain, print_table, say
from layercrit.cli.registered import ModelCommand, RegisteredOption, complete_files
from layercrit.cli.saver import Saver
from layercrit.counts import counted
from layercrit.errors import LayercritError
from layercrit.protocol import DEFAULTS, GROUPS

# Everything that imports torch is imported inside the command, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    import pandas as pd

    from layercrit.proxies.agreement import Agreement
    from layercrit.proxies.of_study import StudyProxies
    from layercrit.proxies.values import Proxies

__all__ = ["proxies_command"]

_OF_MODEL = ("images", "against", "measure_too", "layers", "types", "group", "seed", "labels", "classes")
_OF_STUDY = ("models", "probe_set")


@click.command("proxies", cls=ModelCommand, short_help="Rank the layers of MODEL cheaply, by proxies.")
@click.argument("model", metavar="MODEL|STUDY")
@click.option(
    "--images", metavar="SOURCE", shell_complete=complete_files, help="As for `layercrit measure`; needed for a MODEL."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder that `layercrit measure` wrote, of the same model and reset: how well do the proxies rank its "
    "layers?",
)
@click.option("--measure", "measure_too", is_flag=True, help="Measure these exact values at once, on the same images.")
@click.option("--k", type=int, metavar="K", help="How many layers are lowest, and highest. [default: a quarter]")
@click.option(
    "--initial",
    metavar="FILE|DIR@epoch=0",
    help="The weights before training, for the distance from the start. Models of a study that are training runs have "
    "their own.",
)
@click.option("--trials", type=int, metavar="N", help="Draws of the reset. [default: 3]")
@click.option("--n-images", type=int, default=64, show_default=True, help="Images, at most.")
@click.option(
    "--hessian-images",
    type=int,
    default=8,
    show_default=True,
    help="Images of the second order, which costs a Hessian-vector product a layer and image; 0: leave it out.",
)
@click.option(
    "--radius", type=float, default=0.1, show_default=True, help="Of the worst case, as a share of the norm of a layer."
)
@click.option("--layers", default=DEFAULTS.layers, show_default=True, metavar="GLOB,...", help="Names of layers.")
@click.option("--types", default=DEFAULTS.types, show_default=True, metavar="TYPE,...", help="Types of layers.")
@click.option("--group", default=DEFAULTS.group, show_default=True, type=click.Choice(GROUPS), help="What is reset at "
              "once.")  # fmt: skip
@click.option(
    "--reset",
    cls=RegisteredOption,
    registry="layercrit.resets:RESETS",
    metavar="NAME",
    help="What replaces a layer's parameters; by default rerandomize, and of a study its first.",
)
@click.option("--from", "donor", metavar="FILE|MODEL", help="Where new values come from, as for `layercrit measure`.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Seed of draws, images and drawn labels.")
@click.option("--device", default=DEFAULTS.device, show_default=True)
@click.option("--level", type=float, metavar="SHARE", help="Confidence level of the intervals. [default: 0.95]")
@click.option("--labels", default="auto", show_default=True, metavar="FILE|COLUMN|none",
              help="Labels of the loss; none: draw them from the model's predictions.")  # fmt: skip
@click.option("--classes", metavar="FILE", help="The names of the model's classes, one per line.")
@click.option("--models", metavar="NAME,...", help="Of a STUDY, the models that are wanted. [default: all]")
@click.option("--probe-set", metavar="NAME", help="Of a STUDY with several, its images. [default: the first]")
@click.option("--out", type=NewPath(path_type=Path), metavar="DIR", help="Where to save. [default: "
              "layercrit-proxies-MODEL]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the proxies in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@click.pass_context
def proxies_command(
    context: click.Context,
    /,
    model: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    models: str | None,
    **asked: Any,
) -> None:
    """Say cheaply which layers of MODEL may be critical, and how well each proxy ranks them.

    With a STUDY, a folder of `layercrit study run`: over its models, against the criticality that it measured.
    """
    folder = out or default_folder("layercrit-proxies", model)
    of_study = is_study_folder(model)
    refuse_options(context, _OF_MODEL if of_study else _OF_STUDY, of_study)
    begun, done = (folder / "measurement").is_dir(), (folder / "against.json").exists()
    is_interrupted = asked["measure_too"] and begun and not done  # while exact values were measured
    for file in ("proxies.json", "proxies.csv"):
        check_free(folder / file, overwrite or is_interrupted)
    if of_study:
        _of_study(model, folder, as_json, None if models is None else models.split(","), asked)
    else:
        _of_model(model, folder, as_json, overwrite, asked)


def _of_model(model: str, folder: Path, as_json: bool, overwrite: bool, asked: dict[str, Any]) -> None:
    from layercrit.proxies.agreement import check_level, check_ranks
    from layercrit.proxies.values import measure_proxies

    if asked["images"] is None:
        raise click.UsageError("Missing option '--images': a MODEL needs images, such as a folder of photographs.")
    if asked["against"] is not None and asked["measure_too"]:
        raise click.UsageError("--against names exact values, and --measure measures them: give one of the two.")
    if asked["against"] is None and not asked["measure_too"] and (asked["k"], asked["level"]) != (None, None):
        raise click.UsageError("--k and --level are about exact values: give some with --against, or --measure.")
    against, measure_too = asked.pop("against"), asked.pop("measure_too")
    k, level = asked.pop("k"), asked.pop("level")
    asked.pop("probe_set")
    shared = {name: value for name, value in asked.items() if value is not None}
    found = measure_proxies(model, **shared)
    files = found.save(folder)
    exact: Any = against
    if measure_too:
        names = list(found.about["layer"])
        check_ranks(k, len(names), names)  # before the work, as what follows asks for it
        check_level(DEFAULTS.level if level is None else level)
        settings = {n: v for n, v in shared.items() if n not in ("initial", "radius", "hessian_images")}
        exact = _measured(model, folder / "measurement", overwrite, settings)
    agreement = None
    if exact is not None:
        how = {} if level is None else {"level": level}
        agreement = found.against(exact, k=k, **how)
        files += agreement.save(folder)
    if as_json:
        costs = json_rows(found.costs)
        about = {"model": model, "record": found.record, "layers": json_rows(found.layers), "costs": costs}
        click.echo(
            json.dumps(
                {**about, **({} if agreement is None else agreement.to_dict()), "folder": str(folder)}, allow_nan=False
            )
        )
        return
    print_table(_layer_table(found, agreement))
    for line in _about(found):
        say(line)
    if agreement is not None:
        say()
        print_table(_agreement_table(agreement.table, "proxies against exact criticality", agreement.level))
        say(agreement.sentence)
        say(f"k = {agreement.k} of {len(agreement.by_layer)} layers, of which chance would name "
            f"{agreement.k / len(agreement.by_layer):.0%}; intervals: {agreement.resampled}")  # fmt: skip
    notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")


def _measured(model: str, folder: Path, overwrite: bool, settings: dict[str, Any]) -> Path:
    """Measure exact values; those that are there are gone on with, or replaced."""
    from layercrit.measurement import Measurement
    from layercrit.measuring import measure

    is_there = (folder / "measurement.json").exists()
    known = Measurement.load(folder) if is_there and not overwrite else None
    folder.mkdir(parents=True, exist_ok=True)
    with Saver(folder) as saver:
        measured = measure(model, resume=known, on_trial=saver.keep, distances="cosine", **settings)
    return measured.save(folder)


def _of_study(study: str, folder: Path, as_json: bool, models: list[str] | None, asked: dict[str, Any]) -> None:
    from layercrit.figures.style import save_figure
    from layercrit.proxies.of_study import measure_study_proxies

    settings = {name: value for name, value in asked.items() if name not in _OF_MODEL and value is not None}
    found = measure_study_proxies(study, models=models, **settings)
    files = [*found.save(folder), *save_figure(found.plot(), folder / "proxies")]
    if as_json:
        about = {"study": study, "against": json_rows(found.table), "by_model": json_rows(found.by_model)}
        said = {"best_null": found.best_null, "sentence": found.sentence, "failed": dict(found.failed)}
        click.echo(json.dumps({**about, **said, "folder": str(folder)}, allow_nan=False))
    else:
        title = f"{study}: means over {len(found.agreements)} models"
        print_table(_agreement_table(found.table, title, found.level))
        say(found.sentence)
        say(f"labels of the loss: {_labels_of(found)}")
    for model, text in found.failed.items():
        say(f"left out: {model}: {text}", err=True)
    if not as_json:
        notice(f"Saved in {folder}: {', '.join(path.name for path in files)}")
    if found.failed:
        raise LayercritError(f"{len(found.failed)} of the study's models have no proxies; the others are saved.")


def _labels_of(found: "StudyProxies") -> str:
    return "; ".join(dict.fromkeys(str(one.record["labels"]) for one in found.proxies.values()))


def _layer_table(found: "Proxies", agreement: "Agreement | None") -> Any:
    """Return the values of the proxies, a row per layer; blank where one does not apply."""
    from layercrit.models.sources import short_name

    title = plain(f"{short_name(found.record['model']['reference'])}: proxies of criticality")
    shown = FittedTable(title)
    exact = {} if agreement is None else agreement.by_layer.set_index("layer")["exact"].to_dict()
    names = [name for name in found.samples if not found.layers[name].isna().all()]
    shown.add_column("layer")
    if exact:
        shown.add_column("criticality", "right")
    for i, name in enumerate(names):  # the last leaves first, the first stays
        shown.add_column(name.replace("_", " "), "right", leaves=-i if i else None)
    for row in found.layers.to_dict("records"):
        cells = [number(exact.get(row["layer"], float("nan")))] if exact else []
        cells += ["" if row[name] != row[name] else f"{row[name]:.3g}" for name in names]
        shown.add_row(plain(row["layer"]), *cells)
    return shown


def _about(found: "Proxies") -> list[str]:
    record, costs = found.record, found.costs
    blank = [name for name in found.samples if found.layers[name].isna().all()]
    lines = [
        "",
        f"gradients: {record['labels']}, {counted(record['probe_set']['n_images'], 'image')}; "
        f"{counted(record['protocol']['trials'], 'draw')} of {record['protocol']['reset']}; "
        f"{record['seconds']:.1f} s in all",
    ]
    kinds = costs[costs["seconds"] > 0].groupby(
        ["forward", "backward", "layer_passes", "hessian_products", "seconds"], sort=False
    )
    for (forward, backward, layers, products, seconds), of_kind in kinds["proxy"]:
        parts = [f"{forward} forward", f"{backward} backward", f"{layers} of each layer alone",
                 f"{products} Hessian-vector products"]  # fmt: skip
        passes = ", ".join(part for part in parts if not part.startswith("0 "))
        names = ", ".join(name.replace("_", " ") for name in of_kind)
        lines.append(f"cost: {names}: {passes}; {seconds:.1f} s")
    if blank:
        lines.append(f"blank: {', '.join(name.replace('_', ' ') for name in blank)}"
                     + (" (distance needs --initial)" if "distance" in blank else ""))  # fmt: skip
    return [*lines, *(f"note: {note}" for note in record["notes"])]


def _agreement_table(table: "pd.DataFrame", title: str, level: float) -> Any:
    """Return rank correlations, the highest first; nulls are marked."""
    shown = FittedTable(plain(title))
    interval = f"{100 * level:g}% interval"
    shown.add_column("proxy", wraps=True)
    shown.add_column("")
    for column, leaves in (("layers", 2), ("Spearman", None), (interval, None), ("Kendall", 1), (interval, 1),
                           ("k lowest", 3), ("k highest", 3), ("minus best null", None), (interval, None)):  # fmt: skip
        shown.add_column(column, "right", leaves=leaves)
    for row in table.to_dict("records"):
        cells = [row["label"], "null" if row["null"] else "", str(row["n_layers"])]
        cells += [_signed(row["spearman"]), _limits(row, "spearman"), _signed(row["kendall"]), _limits(row, "kendall")]
        cells += ["-" if row[name] != row[name] else f"{row[name]:.0%}" for name in ("lowest", "highest")]
        shown.add_row(*cells, _signed(row.get("difference", float("nan"))), _limits(row, "difference"),
                      style="dim" if row["null"] else "")  # fmt: skip
    return shown


def _signed(value: float) -> str:
    return "-" if value != value else f"{value:+.2f}"


def _limits(row: dict[Any, Any], name: str) -> str:
    low, high = (row.get(f"{name}_{end}", float("nan")) for end in ("low", "high"))
    return "-" if low != low else f"{low:+.2f} to {high:+.2f}"
