"""The commands about published checkpoints: list, show, fetch, check."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.printing import say, visible_lines
from layercrit.cli.registered import complete_files, complete_zoo
from layercrit.counts import counted
from layercrit.errors import LayercritError, ZooError

# Everything that imports torch is imported inside the commands, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.models.zoo.accuracy import AccuracyCheck
    from layercrit.models.zoo.entries import ZooEntry

__all__ = ["zoo"]

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")


@click.group(short_help="Fetch the checkpoints of the published study.")
def zoo() -> None:
    """Published checkpoints: the 51 ResNet-50s of the paper, each opened as zoo:ID once it is fetched.

    They are kept in the folder LAYERCRIT_CACHE, by default ~/.cache/layercrit. Code in a downloaded file is never run.
    """


@zoo.command("list", short_help="List the models.")
@click.argument("pattern", default="*")
@click.option("--category", metavar="NAME", help="Only models of this category.")
@_JSON
def list_command(pattern: str, category: str | None, as_json: bool) -> None:
    """List the models whose identifier matches PATTERN, such as 'robust_*'."""
    from layercrit.categories import CATEGORIES
    from layercrit.errors import near
    from layercrit.models.zoo.fetching import find_entries

    if category is not None and category not in CATEGORIES:
        raise ZooError(f"There is no category {category!r}. {near(category, CATEGORIES, limit=len(CATEGORIES))}")
    entries = [entry for entry in find_entries(pattern) if category in (None, entry.category)]
    if as_json:
        click.echo(json.dumps({"models": [_as_data(entry) for entry in entries]}, allow_nan=False))
        return
    from layercrit.cli.printing import plain, print_table
    from layercrit.models.zoo.fetching import is_fetched

    table = FittedTable()
    for column in ("id", "category", "label", "top-1", "licence", "fetched"):
        leaves = {"label": 1, "licence": 2, "category": 3}.get(column)
        table.add_column(column, "right" if column == "top-1" else "left", wraps=column == "label", leaves=leaves)
    for entry in entries:
        fetched = "yes" if is_fetched(entry) else ""
        accuracy = _percent(entry.documented_accuracy)
        table.add_row(plain(entry.id), entry.category, plain(entry.label), accuracy, entry.licence, fetched)
    print_table(table)
    say(counted(len(entries), "model"))


@zoo.command("show", short_help="Show what is known about a model.")
@click.argument("name", metavar="ID", shell_complete=complete_zoo)
@_JSON
def show_command(name: str, as_json: bool) -> None:
    """Show all that is known about the model ID: files, how they are read, licence, citation."""
    from layercrit.models.zoo.fetching import find_entry, is_fetched

    entry = find_entry(name)
    if as_json:
        click.echo(json.dumps(_as_data(entry), allow_nan=False))
        return
    facts = {
        "reference": f"zoo:{entry.id}",
        "label": entry.label,
        "category": entry.category,
        "top-1": f"{_percent(entry.documented_accuracy)} on ImageNet-1k, as documented",
        "architecture": entry.architecture,
        "mean": ", ".join(f"{value:g}" for value in entry.mean),
        "std": ", ".join(f"{value:g}" for value in entry.std),
        "licence": entry.licence,
        "weights": f"{entry.path} ({'fetched' if is_fetched(entry) else 'not fetched'})",
    }
    for fact, value in facts.items():
        say(f"{fact:<13} {value}")
    for file in entry.files:
        say(f"file          {file.address}")
        for rule in file.rules() or ["names stay as they are"]:
            say(f"              - {rule}")
    click.echo(f"\n{entry.citation.bibtex(entry.id)}")


@zoo.command("fetch", short_help="Download models, and convert them to safetensors.")
@click.argument("names", nargs=-1, metavar="ID...", shell_complete=complete_zoo)
@click.option("--all", "everything", is_flag=True, help="Fetch every model (51 files of 100 to 300 MB).")
@click.option(
    "--from",
    "given",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file that you downloaded yourself, for example in a browser; once for each file of the model, in the order "
    "of `layercrit zoo show ID`. Nothing is downloaded then.",
)
def fetch_command(names: tuple[str, ...], everything: bool, given: tuple[Path, ...]) -> None:
    """Fetch the models ID, in which * and ? are wildcards, and convert them to safetensors.

    An interrupted download resumes where it stopped. If one model fails, the others are still fetched.
    """
    from layercrit.models.zoo.fetching import fetch_entry, find_entries
    from layercrit.progress_bar import Bar

    if bool(names) == everything:
        raise click.UsageError("Name the models to fetch, or all of them with --all.")
    patterns = ("*",) if everything else names
    entries = list(dict.fromkeys(entry for pattern in patterns for entry in find_entries(pattern)))
    if given and len(entries) != 1:
        raise click.UsageError(f"--from gives the files of one model, but {len(entries)} are named.")
    failures: list[str] = []
    for entry in entries:
        try:
            with Bar(shown=True) as bar:
                path = fetch_entry(entry, given=given or None, progress=bar.fetched)
        except LayercritError as error:
            if len(entries) == 1:
                raise
            failures.append(entry.id)
            click.echo(visible_lines(f"{entry.id}: {error}"), err=True)
        else:
            say(f"{entry.id}: {path}")
    if failures:
        raise ZooError(
            f"{len(failures)} of {len(entries)} models could not be fetched, see above: {', '.join(failures)}."
        )


@zoo.command("check", short_help="Compare a model's accuracy with the documented one.")
@click.argument("name", metavar="ID", shell_complete=complete_zoo)
@click.option(
    "--images",
    required=True,
    metavar="SOURCE",
    shell_complete=complete_files,
    help="Labelled images, as for `layercrit measure`; ImageNet's.",
)
@click.option("--n-images", default=10_000, show_default=True, help="Images drawn from SOURCE.")
@click.option("--batch-size", default=None, type=click.IntRange(min=1), help="[default: chosen for the device]")
@click.option("--device", default="auto", show_default=True)
@_JSON
def check_command(name: str, images: str, n_images: int, batch_size: int | None, device: str, as_json: bool) -> None:
    """Compare the top-1 accuracy of the model ID on labelled images with the documented one.

    They agree if the documented accuracy lies in the 95 % interval, which misses it for one in twenty correct models.
    """
    from layercrit.models.zoo.accuracy import check_accuracy
    from layercrit.models.zoo.fetching import find_entry

    entry = find_entry(name)
    size = "auto" if batch_size is None else batch_size
    checked = check_accuracy(entry, images, n_images=n_images, batch_size=size, device=device)
    click.echo(json.dumps(asdict(checked), allow_nan=False) if as_json else _in_words(checked))


def _as_data(entry: "ZooEntry") -> dict[str, Any]:
    """All that is known about an entry, as JSON can hold it."""
    from layercrit.models.zoo.fetching import is_fetched

    return {
        **asdict(entry),
        "bibtex": entry.citation.bibtex(entry.id),
        "rules": [file.rules() for file in entry.files],
        "path": str(entry.path),
        "fetched": is_fetched(entry),
    }


def _in_words(checked: "AccuracyCheck") -> str:
    measured = (
        f"zoo:{checked.id}: top-1 {_percent(checked.top1_accuracy)} on {counted(checked.n_images, 'image')} "
        f"(95% interval {_percent(checked.low)} - {_percent(checked.high)})"
    )
    if checked.documented_accuracy is None:
        return f"{measured}; no accuracy is documented"
    return f"{measured}; documented {_percent(checked.documented_accuracy)}: {checked.verdict}"


def _percent(value: float | None) -> str:
    """A share in percent, with two decimals as in the paper."""
    return "-" if value is None else f"{100 * value:.2f}%"
