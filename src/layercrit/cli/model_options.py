"""Options that commands about one model and its images share, and where results go."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from layercrit.cli.registered import complete_files
from layercrit.errors import LayercritError
from layercrit.protocol import DEFAULTS, GROUPS

__all__ = [
    "NewPath",
    "check_free",
    "default_folder",
    "folder_for",
    "images_and_layers",
    "is_study_folder",
    "number_or_auto",
    "refuse_options",
]


class NewPath(click.Path):
    """A path to write to; the empty text, as of a variable that is not set, is none, and not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path that is named."""
        if not str(value):
            self.fail("it is empty; name a folder or a file, or '.' for the current folder.", param, ctx)
        return super().convert(value, param, ctx)


def number_or_auto(context: click.Context, parameter: click.Parameter, value: str) -> int | str:
    """Read an option that is a whole number or ``auto``."""
    if value == "auto":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"expected 'auto' or a whole number, got {value!r}.")
    return int(value)


def images_and_layers(n_images: int, *, or_study: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that say which images a model is shown, and which of its layers are meant.

    Args:
        n_images: the default of ``--n-images``.
        or_study: whether the command takes a study as well, which has its own images.
    """
    options = [
        click.option("--images", required=not or_study, metavar="SOURCE", shell_complete=complete_files,
                     help="As for `layercrit measure`" + ("; needed for a MODEL." if or_study else ".")),
        click.option("--n-images", default=n_images, show_default=True, help="Images drawn from SOURCE, at most."),
        click.option("--labels", default="auto", show_default=True, metavar="FILE|COLUMN|none",
                     help="Labels in place of those that SOURCE comes with, as for `layercrit measure`."),
        click.option("--classes", metavar="FILE", help="The names of the model's classes, one per line."),
        click.option("--layers", default=DEFAULTS.layers, show_default=True, metavar="GLOB,...",
                     help="Glob patterns of layer names, such as 'layer1.*,fc'."),
        click.option("--types", default=DEFAULTS.types, show_default=True, metavar="TYPE,...",
                     help="Layer types: conv, linear, norm, embedding, other, or all."),
        click.option("--group", default=DEFAULTS.group, show_default=True, type=click.Choice(GROUPS),
                     help="What is a module."),
        click.option("--seed", default=DEFAULTS.seed, show_default=True,
                     help="Seed of the random draws and of the choice of images."),
        click.option("--batch-size", default=str(DEFAULTS.batch_size), show_default=True, callback=number_or_auto),
        click.option("--device", default=DEFAULTS.device, show_default=True),
        click.option("--out", type=NewPath(path_type=Path), metavar="DIR",
                     help=f"Where to save. [default: layercrit-MODEL{', in the folder of a STUDY' * or_study}]"),
        click.option("--overwrite", is_flag=True, help="Replace the same kind of result in DIR."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout."),
    ]  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def default_folder(prefix: str, model: str) -> Path:
    """Return the folder for results of a model where none was named.

    It is called after what tables call the model, and after the folder of a file, since many are a model.safetensors.
    """
    from layercrit.models.sources import short_name

    of_file = Path(model.partition("?")[0].removeprefix("file:")).parent.name if model.startswith("file:") else ""
    return Path(f"{prefix}-" + re.sub(r"[^\w.-]+", "-", f"{of_file}-{short_name(model)}").strip("-."))


def folder_for(model: str, out: Path | None) -> Path:
    """Return the folder of a model's results, made if need be.

    Raises:
        LayercritError: it cannot be created.
    """
    folder = out or default_folder("layercrit", model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayercritError(
            f"The folder {folder} cannot be created: {error.strerror}. Name another one with --out."
        ) from error
    return folder


def check_free(file: Path, overwrite: bool) -> None:
    """Raise LayercritError where a result is there already, and is not to be replaced."""
    if file.exists() and not overwrite:
        raise LayercritError(
            f"There is {file} already. Name another folder with --out, or replace it with --overwrite."
        )


def is_study_folder(given: str) -> bool:
    """Whether what a command is given, a model or a folder, is the folder of a study."""
    from layercrit.study.shards import is_study

    try:
        return is_study(Path(given).expanduser())
    except OSError:  # a reference may be longer than names of files may be
        return False


def refuse_options(context: click.Context, names: Sequence[str], of_study: bool) -> None:
    """Raise UsageError where an option is given that says nothing of a study, or of a single model."""
    given = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if not given:
        return
    option = next(one.opts[0] for one in context.command.params if one.name == given[0])
    if of_study:
        raise click.UsageError(
            f"{option} goes with a MODEL, not with a STUDY: images and layers are those that it was run with."
        )
    raise click.UsageError(f"{option} goes with a STUDY, a folder that `layercrit study run` wrote.")
