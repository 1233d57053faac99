"""The command that says which layers to freeze, fine-tune, prune or quantise."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import NewPath, folder_for, is_study_folder
from layercrit.cli.printing import bar, notice, number, plain, print_table, say
from layercrit.cli.registered import complete_files
from layercrit.errors import AdviceError, LayercritError

# Everything that imports torch is imported inside the functions, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.advice import Advice
    from layercrit.measurement import Measurement

__all__ = ["advise_command"]

_ACTIONS = ("freeze", "finetune", "prune", "quantise")
_FORMATS = ("table", "json", "list", "regex", "peft", "torch-pruning", "nncf", "groups")


def _budget(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return float(value.removesuffix("%")) / 100 if value.endswith("%") else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number or a percentage, such as 0.3 or 30%.") from None


def _bits(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers, such as 8,4.") from None


@click.command("advise", short_help="Say which layers to freeze, fine-tune, prune, quantise.")
@click.argument("source", metavar="DIR|MODEL")
@click.option("--for", "action", required=True, type=click.Choice(_ACTIONS), help="What is to be done to layers.")
@click.option(
    "--budget",
    callback=_budget,
    metavar="SHARE|BITS",
    help="Share of the parameters, such as 0.3 or 30%: frozen or removed at least, fine-tuned at most; of quantise, "
    "the bits of a parameter in the mean, at most. [default: freeze 50%, finetune 25%, prune 25%, quantise 6]",
)
@click.option("--model", metavar="NAME", help="Which model, where DIR is a study. [default: its only one]")
@click.option("--reset", metavar="NAME", help="One of the study's resets. [default: its first]")
@click.option(
    "--of",
    "unit",
    type=click.Choice(["channels", "weights"]),
    default="channels",
    show_default=True,
    help="What prune removes. Channels that are added up can only be removed together: their layers are chosen as one.",
)
@click.option("--ratio", type=float, default=0.5, show_default=True, help="Share of a chosen layer that prune removes.")
@click.option(
    "--bits", callback=_bits, default="8,4", show_default=True, metavar="N,...", help="Bits that quantise chooses from."
)
@click.option(
    "--images",
    metavar="SOURCE",
    shell_complete=complete_files,
    help="Measure MODEL on these images first, and save that as `measure` does.",
)
@click.option("--trials", type=int, default=10, show_default=True, help="Random draws per layer, with --images.")
@click.option("--n-images", type=int, default=1000, show_default=True, help="Images at most, with --images.")
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    default="table",
    show_default=True,
    help="For other programs: regex matches the names of the chosen layers; peft, torch-pruning and nncf are arguments "
    "of these libraries as JSON (nncf: the layers that stay as they are); groups are an optimizer's parameter groups.",
)
@click.option("--out", type=NewPath(path_type=Path, dir_okay=False), metavar="FILE", help="Write to FILE instead.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Plot the profile, too.")
def advise_command(
    source: str,
    action: str,
    budget: float | None,
    model: str | None,
    reset: str | None,
    unit: str,
    ratio: float,
    bits: list[int],
    images: str | None,
    trials: int,
    n_images: int,
    form: str,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Say which layers to freeze, fine-tune, prune or quantise.

    DIR is a measurement or a study; a MODEL is measured first, on --images.
    """
    from layercrit.advice import advise, check_advice

    _check_options(action, images)
    check_advice(action, budget, bits, ratio)
    if (model, reset) != (None, None) and (images is not None or not is_study_folder(source)):
        raise click.UsageError("--model and --reset choose from a study, and this is none.")
    layers = source if images is None else _measure(source, images, trials, n_images)
    found = advise(
        layers,
        action,
        budget,
        knobs="channels" if action == "prune" and unit == "channels" else None,
        bits=bits,
        ratio=ratio,
        model=model,
        reset=reset,
    )
    if form == "table" and out is None:
        _show(found)
    else:
        text = found.to("json" if form == "table" else form)
        for line in found.in_words():
            notice(line)
        _write(text, out)
    if plot is not None:
        try:
            found.plot().savefig(plot, dpi=200)
        except (OSError, ValueError) as error:  # ValueError: no such file format
            raise AdviceError(f"The figure cannot be written to {plot} ({error}). Name another file.") from error
        notice(plot)


def _check_options(action: str, images: str | None) -> None:
    """Refuse options that would say nothing."""
    context = click.get_current_context()
    for option, belongs in (("ratio", action == "prune"), ("unit", action == "prune"), ("bits", action == "quantise"),
                            ("trials", images is not None), ("n_images", images is not None)):  # fmt: skip
        if not belongs and context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            with_what = {"bits": "--for quantise", "trials": "--images", "n_images": "--images"}.get(
                option, "--for prune"
            )
            name = {"unit": "of", "n_images": "n-images"}.get(option, option)
            raise click.UsageError(f"--{name} goes only with {with_what}.")


def _measure(model: str, images: str, trials: int, n_images: int) -> "Measurement":
    """Measure a model and save that, where `layercrit measure` would."""
    from layercrit.measuring import measure

    folder = folder_for(model, None)
    if (folder / "measurement.json").exists():
        raise LayercritError(
            f"{folder} already contains a measurement of {model}. Run `layercrit advise {folder}` to use it, or "
            "measure anew into another folder with `layercrit measure --out`."
        )
    measurement = measure(model, images, trials=trials, n_images=n_images)
    measurement.save(folder)
    notice(f"Saved in {folder}")
    return measurement


def _write(text: str, out: Path | None) -> None:
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdviceError(f"{out} cannot be written ({error.strerror}). Name another file with --out.") from error
    notice(out)


def _show(advice: "Advice") -> None:
    """Print the ranking."""
    import pandas as pd

    for line in advice.in_words():
        say(line)
    say()
    table = advice.to_pandas()
    own = [name for name in ("ratio", "bits") if name in table]
    shown = FittedTable(otherwise="--format json")
    shown.add_column("")
    shown.add_column("layer")
    for column in ("criticality", "interval", "parameters", "place", *own):
        shown.add_column(column, "right", leaves={"parameters": 2, "place": 4}.get(column))
    shown.add_column("", leaves=1)
    shown.add_column("why", wraps=True, leaves=3)
    for row in table.to_dict("records"):
        interval = "-" if row["low"] != row["low"] else f"{row['low']:.3f} - {row['high']:.3f}"
        places = {row["rank_low"], row["rank_high"]}
        place = "-" if pd.isna(row["rank"]) else " to ".join(map(str, sorted(places)))
        about = {"ratio": f"{row.get('ratio', 0):g}", "bits": str(row.get("bits"))}
        shown.add_row(
            advice.action.done.split()[0] if row["chosen"] else "",
            plain(row["layer"]),
            number(row["criticality"]),
            interval,
            f"{row['n_parameters']:,}",
            place,
            *(about[name] for name in own),
            bar(row["criticality"]),
            plain(row["reason"]),
        )
    print_table(shown)
