"""The command that plots the figures of a study or a measurement, and writes its page."""

import json
from pathlib import Path
from typing import Any

import click

from layercrit.cli.model_options import NewPath
from layercrit.cli.printing import notice, print_warnings, say, say_damaged
from layercrit.cli.registered import RegisteredOption
from layercrit.cli.tables import comparison_options

# Everything that imports torch is imported inside the command, so that `layercrit --help` answers at once.

__all__ = ["report_command"]


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


@click.command("report", short_help="Write the page and figures of a study or a measurement.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="STUDY|MEASUREMENT")
@click.option("--out", type=NewPath(path_type=Path), metavar="DIR", help="Where to write. [default: that folder]")
@click.option(
    "--figures",
    default="all",
    show_default=True,
    cls=RegisteredOption,
    registry="layercrit.reporting.study_figures:FIGURES",
    callback=_names,
    metavar="NAME,...",
    help="Figures to plot.",
)
@click.option(
    "--format",
    "formats",
    default="pdf,png,svg",
    show_default=True,
    callback=_names,
    metavar="NAME,...",
    help="File formats of the figures.",
)
@comparison_options
@click.option(
    "--model",
    "profiles",
    multiple=True,
    metavar="MODEL",
    help="A model to plot the profile of, and criticality by class; may be given several times. [default: the "
    "baseline]",
)
@click.option(
    "--thumbnails",
    is_flag=True,
    help="Show in the page, of the same models, the images that each layer's reset moves most and least, as small "
    "pictures. Leave it out where the images are private: who gets the page sees them.",
)
@click.option(
    "--proxies",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder that `layercrit proxies STUDY` wrote: plot its proxies on the page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def report_command(
    folder: Path,
    out: Path | None,
    figures: list[str],
    formats: list[str],
    profiles: tuple[str, ...],
    thumbnails: bool,
    proxies: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Plot figures, and write report.html: one page to explore, which works offline.

    Give the folder of a study, or that of a measurement, which becomes the page of one model.
    """
    from layercrit.measurement import Measurement
    from layercrit.reporting.reports import report
    from layercrit.study.of_measurement import open_result

    found = open_result(folder)
    if isinstance(found, Measurement):
        out = out or folder
        print_warnings(found.record.get("warnings", []), err=True)
    else:
        print_warnings(found.warnings, err=True)
        say_damaged(found.damaged)
    written = report(
        found,
        out,
        figures=None if figures == ["all"] else figures,
        formats=formats,
        profiles=profiles or None,
        thumbnails=thumbnails,
        proxies=proxies,
        progress=True,
        **asked,
    )
    if as_json:
        listed = {name: [str(path) for path in paths] for name, paths in written.figures.items()}
        click.echo(json.dumps({"page": str(written.page), "figures": listed, "left_out": written.left_out}))
        return
    for name, reason in written.left_out.items():
        notice(f"note: no figure {name}: {reason}")
    for paths in written.figures.values():
        for path in paths:
            say(path)
    say(written.page)
    notice(f"Open {written.page} in a browser.")
