"""The commands that train: one model by one method, or those of a study file; and the list of methods."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from layercrit.cli.exit_codes import ExitCode
from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import NewPath
from layercrit.cli.printing import notice, percent, plain, print_table, say
from layercrit.cli.registered import RegisteredOption, complete_methods
from layercrit.counts import counted, duration
from layercrit.verbosity import is_quiet

__all__ = ["methods_command", "train_command"]


def _epochs(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected epoch numbers such as '1,5,10'; got {value!r}.")
    return tuple(int(part) for part in parts)


def _settings(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"expected key=value; got {value!r}.")
        found[key.strip()] = text.strip()
    return found


@click.command("train", short_help="Train a model by a method, or those of a study.")
@click.argument("models", nargs=-1)
@click.option("--study", metavar="FILE", help="Train the models of a study file (all, or the MODELS named).")
@click.option(
    "--method",
    cls=RegisteredOption,
    registry="layercrit.training:METHODS",
    only_names=True,
    metavar="METHOD",
    help="Training method; `layercrit methods` says what each is:",
)
@click.option("--arch", metavar="MODEL", help="Architecture, such as timm:resnet18, with random initial weights.")
@click.option(
    "--data",
    metavar="SOURCE",
    help="Labelled images: a folder with train/ and val/, a folder of MNIST's files, .npz, "
    "'torchvision:CIFAR10?root=DIR', ...; a tenth is held out if there is no test split.",
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images. [default: the method's]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Seed of initial weights, order of images and views.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    callback=_settings,
    metavar="KEY=VALUE",
    help="Setting of the method; see `layercrit methods METHOD`.",
)
@click.option("--out", type=NewPath(path_type=Path), metavar="DIR", help="Folder of the run.")
@click.option(
    "--keep-epochs",
    default="",
    callback=_epochs,
    metavar="N,...",
    help="Epochs after which the weights are kept, in addition to the initial and the final ones.",
)
@click.option(
    "--input-size",
    type=int,
    nargs=3,
    metavar="C H W",
    help="Channels, height and width of the input. [default: size of the images if all are equal, else 3 224 224]",
)
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option(
    "--weights-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Format of the saved weights.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Data loading processes.")
@click.option(
    "--log",
    "trackers",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb"]),
    help="Additional logger; log.csv is always written.",
)
@click.option(
    "--download", is_flag=True, help="Let torchvision download the data set; otherwise nothing is downloaded."
)
@click.pass_context
def train_command(
    context: click.Context, /, models: tuple[str, ...], study: str | None, download: bool, keep_epochs: tuple[int, ...],
    device: str, workers: int, trackers: tuple[str, ...], **single: Any,
) -> None:  # fmt: skip
    """Train a model by a method, or the models of a study file.

    The same command resumes an interrupted run. Models trained with the same seed differ only in the method: initial
    weights and order of images are the same. The folder is a model reference, file:DIR, and file:DIR@epoch=0 is the
    model with its initial weights. For several GPUs or machines: accelerate launch -m layercrit train ...
    """
    given = [name for name in single if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    missing = [f"--{name}" for name in ("method", "arch", "data", "out") if single[name] is None]
    if study is not None and given:
        option = {"settings": "--set"}.get(given[0], f"--{given[0].replace('_', '-')}")
        raise click.UsageError(
            f"{option} cannot be combined with --study: the file defines how its models are trained."
        )
    if study is None and missing:
        raise click.UsageError(f"Missing {', '.join(missing)} (or give --study FILE).")
    if study is None and models:
        raise click.UsageError(f"Unexpected argument {models[0]!r}: names of models need --study.")

    from layercrit.progress_bar import Bar
    from layercrit.training import Options

    options = Options(keep_epochs=keep_epochs, device=device, n_workers=workers, trackers=trackers)
    leads = os.environ.get("RANK", "0") == "0"  # of several processes that train together, the one that prints
    try:
        with Bar(shown=leads) as bar:
            report = (
                _train_one(**single, download=download, options=options, bar=bar)
                if study is None
                else _train_models(study, models, download, options, bar)
            )
    except KeyboardInterrupt:
        if leads:
            say("Run the same command again to resume; at most the last minute of training is lost.", err=True)
        raise
    if leads:
        report()


def _train_one(
    method: str, arch: str, data: str, out: Path, epochs: int | None, settings: dict[str, str],
    input_size: tuple[int, int, int] | None, download: bool, bar: Any, **how: Any,
) -> Callable[[], None]:  # fmt: skip
    """Train one model, and return what reports on it."""
    from layercrit.training import get_method, open_training_data, train

    chosen = get_method(method, {**settings, **({} if epochs is None else {"epochs": epochs})})
    images = open_training_data(data, input_size=input_size, download=download)
    was_there = (out / "model.json").is_file()

    def show(done: Any) -> None:
        bar.trained("", **vars(done))

    trained = train(chosen, arch, images, out, progress=show, say=bar.say, **how)
    record = trained.record

    def report() -> None:
        if was_there:
            say(f"{out} already contains this run; nothing was trained.")
        top1 = f"{percent(trained.top1_accuracy)} top-1 accuracy on {record['data']['n_test']} held-out images"
        epochs = counted(record["epochs"], "epoch")
        say(f"{record['method']}: {top1} after {epochs} ({duration(record['seconds'])}).")
        notice(f"Saved in {out}: model.safetensors, model.json, log.csv, epochs.")
        reference = shlex.quote(trained.reference)
        notice(f"Next: layercrit measure {reference} --images SOURCE")

    return report


def _train_models(study: str, names: tuple[str, ...], download: bool, options: Any, bar: Any) -> Callable[[], None]:
    """Train the models of a study file, and return what reports on them."""
    from layercrit.study.training import train_models

    def show(name: str, done: Any) -> None:
        bar.trained(name, **vars(done))

    found = train_models(study, names, options=options, download=download, progress=show, say=bar.say)

    def report() -> None:
        rows = [
            [name, str(model.record["method"]), percent(model.top1_accuracy), duration(model.record["seconds"])]
            for name, model in found.trained.items()
        ]
        if rows:
            print_table(_table(["model", "method", "top-1 accuracy", "time"], rows, right=("top-1 accuracy", "time")))
        if found.failures:
            for name, reason in found.failures.items() if is_quiet() else ():  # else said when it happened
                say(f"{name} failed: {reason}", err=True)
            say(f"{len(found.failures)} could not be trained: {', '.join(found.failures)}.", err=True)
            sys.exit(ExitCode.ERROR)
        notice(f"Next: layercrit study run {shlex.quote(study)}")

    return report


@click.command("methods", short_help="List the training methods, or a method's settings.")
@click.argument("name", required=False, shell_complete=complete_methods)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods_command(name: str | None, as_json: bool) -> None:
    """List the training methods, or the settings of the one named NAME."""
    import dataclasses
    import json

    from layercrit.categories import CATEGORIES
    from layercrit.training import METHODS, get_method

    if name is not None:
        method = get_method(name)
        fields = dataclasses.fields(method)
        settings = {one.name: {"default": one.default, **_plain(one.metadata)} for one in fields}
        if as_json:
            click.echo(json.dumps({**_about(method), "settings": settings}, indent=2))
            return
        click.echo(f"{method.name} ({method.category}): {method.changes}\n{method.paper}\n")
        rows = [[key, str(value["default"]), _meaning(value)] for key, value in settings.items()]
        print_table(_table(["setting", "default", "meaning"], rows))
    elif as_json:
        click.echo(json.dumps([_about(cls) for cls in METHODS.values()], indent=2))
    else:
        rows = []
        for category in CATEGORIES:
            members = [cls for cls in METHODS.values() if cls.category == category]
            rows += [[category, "", ""], *([f"  {cls.name}", cls.changes, _authors(cls.paper)] for cls in members)]
        print_table(_table(["method", "what it changes", "paper"], rows))
        notice("")
        notice("Settings and paper of a method: layercrit methods NAME")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Any:
    table = FittedTable()
    for column in columns:
        wraps = column in ("meaning", "what it changes")
        table.add_column(column, "right" if column in right else "left", wraps=wraps)
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    return table


def _authors(paper: str) -> str:
    """Return authors and year of a paper alone."""
    found = re.match(r".*?\d{4}\b", paper)
    return found[0] if found else paper


def _about(method: Any) -> dict[str, str]:
    return {key: getattr(method, key) for key in ("name", "category", "changes", "paper")}


def _plain(metadata: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in metadata.items()}


def _meaning(setting: dict[str, Any]) -> str:
    limits = [f"from {setting['low']}"] * (setting["low"] is not None) + [f"to {setting['high']}"] * (
        setting["high"] is not None
    )
    choices = f"one of {', '.join(setting['choices'])}" if setting["choices"] else " ".join(limits)
    return f"{setting['text']} ({choices})" if choices else str(setting["text"])
