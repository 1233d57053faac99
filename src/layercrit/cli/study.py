"""Commands about whole studies: run, plan, status, merge."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.exit_codes import ExitCode
from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.model_options import NewPath
from layercrit.cli.printing import (
    notice,
    number,
    percent,
    plain,
    print_table,
    print_warnings,
    say,
    say_damaged,
    visible_lines,
)
from layercrit.cli.registered import RegisteredOption, missing_plug_ins_named
from layercrit.cli.tracking import track_option, tracked_study
from layercrit.counts import counted, duration
from layercrit.errors import StudyError
from layercrit.foreign_text import visible

# Everything that imports torch is imported inside the commands, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from layercrit.study.planning import StudyPlan
    from layercrit.study.run_report import RunReport
    from layercrit.study.store import FailureRow
    from layercrit.study.tables import Study

__all__ = ["study"]

_FILE = click.argument("file", type=click.Path(path_type=Path), metavar="STUDY.toml")
_OUT = click.option(
    "--out",
    type=NewPath(path_type=Path),
    metavar="DIR",
    help="The study's folder. [default: named like the file, without .toml, in the current directory]",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
_LISTED = 15  # models, shards or jobs shown of those that are alike


@click.group()
def study() -> None:
    """Measure many models under one protocol."""


@study.command("run")
@_FILE
@_OUT
@click.option(
    "--workers",
    type=int,
    metavar="N",
    help="Processes that measure, here or on the cluster. [default: one for each GPU, else one]",
)
@click.option(
    "--on",
    cls=RegisteredOption,
    registry="layercrit.study.ray_workers:EXECUTORS",
    metavar="NAME[:ADDRESS]",
    help="Measure elsewhere than in processes of this machine. Ray's workers are by default one for each GPU, else one "
    "for each node.",
)
@click.option("--retry", is_flag=True, help="Retry the trials that failed before.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Measure the I-th of N shares of the study, beside other processes that measure the others. [default: as "
    "srun, a job array of SLURM, mpirun or torchrun say, else all]",
)
@track_option
@_JSON
def run_command(
    file: Path,
    out: Path | None,
    workers: int | None,
    on: str | None,
    retry: bool,
    shard: str | None,
    trackers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure what is missing from a study. Run it again to resume after an interruption.

    STUDY.toml may also be the folder of a study that was started before. Module criticality, if the file has a section
    for it, comes after all cells; shards leave it out.
    """
    import layercrit.study.ray_workers  # noqa: F401 - registers ray
    from layercrit.study.executors import executor_on
    from layercrit.study.file import read_study_file
    from layercrit.study.ranks import Shard, rank_of
    from layercrit.study.running import run_study
    from layercrit.study.tables import load_study

    own = rank_of(os.environ) if shard is None else Shard.parse(shard)
    if own is not None and own.of == 1:
        own = None
    if on is not None and own is not None:
        raise StudyError(
            f"This process is to measure {own.in_words()}, and to use the executor {on!r}, which deals the study to "
            f"its own workers. Start one process with --on {on}; with --shard 1/1 where a launcher says otherwise."
        )
    folder = _folder_of(file, out)
    _keep_own_file(folder)
    with missing_plug_ins_named(lambda: _versions(folder)):
        read = read_study_file(file)
    if own is not None:
        notice(f"{own.in_words()}")
    executor = None if on is None else executor_on(on, read, folder, workers)
    try:
        with tracked_study(trackers, read, folder, own) as on_cell:
            report = run_study(
                read, folder, n_workers=workers, retry=retry, executor=executor, shard=own, on_cell=on_cell
            )
    except KeyboardInterrupt:
        say(f"Stopped. What has been measured is kept in {folder}; run the same command again to resume.", err=True)
        raise
    if own is not None and not as_json:
        say(f"shard {own}: {_did(report)}")
        notice(f"Saved in {folder}; next: `layercrit study status {folder}`.")
        if read.module_criticality is not None:
            notice(f"Module criticality, once all shards are finished: `layercrit module-criticality {folder}`.")
        _end_run(report)
        return
    found = load_study(folder)
    if as_json:
        click.echo(json.dumps({**_status(found), "measured_now": report.n_measured, "seconds": report.seconds}))
    else:
        _show_means(found)
        go_on = f"; next: `layercrit report {folder}`, or `layercrit compare {folder}`" if len(found.cells) else ""
        say(_did(report))
        if (about := _modules(found)) is not None and about["measured"]:
            _show_module_criticality(folder, about)
        notice(f"Saved in {folder}{go_on}.")
    _say_unreadable(found)
    _end_run(report)


def _did(report: "RunReport") -> str:
    equal = f" (of which {report.n_equal} equal cells measured now)" if report.n_equal else ""
    measured = counted(report.n_measured, "cell")
    return f"{measured} measured, {report.n_known} were already there{equal} ({duration(report.seconds)})."


def _end_run(report: "RunReport") -> None:
    if report.failures:
        _show_failures(report.failures)
        say("Fix the causes, then run again with --retry.", err=True)
    if report.modules_failed:
        say("module criticality could not be measured:", err=True)
        for model, why in report.modules_failed.items():
            click.echo(visible_lines(f"  {visible(model)}{': ' * bool(model)}{why}"), err=True)
        say(f"Fix the causes, then: `layercrit module-criticality {report.folder}`.", err=True)
    if report.failures or report.modules_failed:
        raise click.exceptions.Exit(ExitCode.ERROR)


@study.command("plan", short_help="Estimate cells, downloads and time; measure nothing.")
@_FILE
@click.option("--out", type=NewPath(path_type=Path), metavar="DIR", help="The study's folder, to count what is done.")
@_JSON
def plan_command(file: Path, out: Path | None, as_json: bool) -> None:
    """Estimate what a study would cost: cells, FLOPs, downloads, and time of the forward passes. Measures nothing."""
    from layercrit.study.file import read_study_file
    from layercrit.study.planning import plan_study

    found = plan_study(read_study_file(file), _folder_of(file, out))
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    _show_plan(found)


@study.command("status", short_help="Show how much is done, left and failed.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@_JSON
def status_command(folder: Path, as_json: bool) -> None:
    """Show how much of a study is done, left and failed, and how long the rest will take."""
    from layercrit.study.shards import is_study
    from layercrit.study.slurm_states import job_states
    from layercrit.study.tables import load_study

    jobs = [{**vars(job), "log": str(job.log)} for job in job_states(folder)]
    if jobs and not is_study(folder):
        click.echo(json.dumps({"folder": str(folder), "jobs": jobs})) if as_json else _show_jobs(jobs)
        return
    found = load_study(folder)
    status = {**_status(found), "jobs": jobs}
    if as_json:
        click.echo(json.dumps(status, allow_nan=False))
        return
    print_warnings(found.warnings)
    _show_progress(found.progress())
    left = f", about {duration(status['seconds_left'])} left" if status["seconds_left"] else ""
    known = " planned so far" if status["not_opened"] else ""
    say(f"{status['n_done']} of {status['n_planned']} cells{known} are done{left}")
    if (about := status["module_criticality"]) is not None:
        _show_module_criticality(folder, about)
    _show_running(status["running"])
    _show_jobs(status["jobs"])
    _say_unreadable(found)
    say_damaged(found.damaged)
    if found.failures:
        _show_failures(found.failures)


@study.command("merge", short_help="Merge studies that several machines measured.")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR DIR...")
@click.option("--out", required=True, type=NewPath(path_type=Path), metavar="DIR", help="The folder of the new study.")
def merge_command(folders: tuple[Path, ...], out: Path) -> None:
    """Merge studies: parts that several machines measured, or your own models and published ones."""
    from layercrit.study.merging import merge_studies

    merged = merge_studies(folders, out)
    for note in merged.record["notes"]:
        notice(f"note: {note}")
    say(f"{counted(len(merged.models), 'model')}, {counted(len(merged.cells), 'cell')}.")
    notice(f"Saved in {out}.")


@study.command("repair", short_help="Save what can be read of a malformed study.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def repair_command(folder: Path) -> None:
    """Save what can be read of a study whose file SQLite calls malformed; the damaged file is kept beside it.

    A study of which nothing is damaged stays as it is.
    """
    from layercrit.study.repair import repair_study

    repaired = repair_study(folder)
    if repaired.damaged is None:
        say(f"Nothing is damaged: {counted(repaired.n_kept, 'cell')}.")
        return
    say_damaged(repaired.lost)
    say(f"{counted(repaired.n_kept, 'cell')} kept; the damaged file is {repaired.damaged}.")
    notice(f"Next: `layercrit study run {folder}`.")


@study.command("example", short_help="Print a commented study file to start from.")
@click.argument("name", type=click.Choice(["paper", "fashion"]))
def example_command(name: str) -> None:
    """Print a commented study file to start from: the paper's study, or that of the demo's networks."""
    from layercrit.demo import example_study

    click.echo(example_study(name), nl=False)


@study.command("schema", short_help="Print the JSON Schema of study files.")
def schema_command() -> None:
    """Print the JSON Schema of study files, for completion and checks in editors."""
    from layercrit.study.schema import study_schema

    click.echo(json.dumps(study_schema(), indent=2))


def _folder_of(file: Path, out: Path | None) -> Path:
    """Return the study's folder; by default that of a study that was started before, or one named like the file."""
    from layercrit.study.shards import is_study

    if out is not None:
        return out
    if file.is_dir():
        return file
    begun = file.name == "study.toml" and is_study(file.parent)
    return file.absolute().parent if begun else Path(file.stem)


def _keep_own_file(folder: Path) -> None:
    """Refuse a folder in which a run would overwrite a study file that somebody wrote with the resolved one."""
    from layercrit.study.shards import is_study

    if (folder / "study.toml").exists() and not is_study(folder):
        raise StudyError(
            f"{folder} contains a study.toml but no study yet, and a run would replace that file. Give the file "
            "itself, and another folder with --out."
        )


def _versions(folder: Path) -> dict[str, str]:
    """Return the versions under which a study was run before, if it was."""
    from layercrit.study.shards import is_study, open_study

    if not is_study(folder):
        return {}
    with open_study(folder) as store:
        return {name: version for run in store.runs() for name, version in run.get("versions", {}).items()}


def _status(found: "Study") -> dict[str, Any]:
    """Return how far a study is, as plain data."""
    from layercrit.study.shards import holders

    progress = found.progress()
    return {
        "name": found.record.get("name"),
        "folder": str(found.folder),
        "models": json.loads(progress.to_json(orient="records")),
        "n_planned": int(progress["n_planned"].sum()),
        "n_done": int(progress["n_done"].sum()),
        "not_opened": int((progress["state"] == "not opened").sum()),
        "warnings": found.warnings,
        "damaged": list(found.damaged),
        "failures": [vars(failure) for failure in found.failures],
        "seconds_left": found.seconds_left(),
        "module_criticality": _modules(found),
        "running": [{"shard": number or None, "by": who} for number, who in holders(found.folder).items()],
    }


def _modules(found: "Study") -> "Mapping[str, Any] | None":
    """Return how far module criticality is, as plain data; None where there is none and none is asked for."""
    from layercrit.study.status import has_modules

    if not has_modules(found.folder, found.record):
        return None
    from layercrit.study.module_tables import how_far  # which imports torch

    return how_far(found)


def _show_module_criticality(folder: Path, about: "Mapping[str, Any]") -> None:
    """Say, in a line, how many models have module criticality.

    Args:
        folder: of the study.
        about: what `layercrit.study.module_tables.how_far` returns.
    """
    left_out = f", {len(about['left_out'])} left out" if about["left_out"] else ""
    if about["mistake"]:
        say(f"module criticality: {about['mistake']}")
    elif about["measured"]:
        say(f"module criticality of {counted(len(about['measured']), 'model')}{left_out}")
    else:
        how = f"`layercrit study run {folder}` measures it after the cells, or `layercrit module-criticality {folder}`"
        say(f"module criticality of no model yet{left_out}: {how}")


def _n_shown(n: int) -> int:
    """Return how many of a list are shown: all, where the line that says how many more there are would be the last."""
    return n if n <= _LISTED + 1 else _LISTED


def _show_running(running: list[dict[str, Any]]) -> None:
    n_shown = _n_shown(len(running))
    for one in running[:n_shown]:
        of_shard = f"shard {one['shard']}, " if one["shard"] else ""
        say(f"running: {of_shard}{one['by']}")
    if len(running) > n_shown:
        say(f"and {len(running) - n_shown} more shards")
    if not running:
        say("not running")


def _show_jobs(jobs: list[dict[str, Any]]) -> None:
    """Show the jobs of SLURM, those that are alike as one line."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs:
        alike.setdefault((job["state"], job["said"] if job["state"] != "running" else ""), []).append(job)
    for (state, words), some in alike.items():
        n_shown = _n_shown(len(some))
        listed = ", ".join(f"{job['job']}{' on ' + job['node'] if job['node'] else ''}" for job in some[:n_shown])
        more = f" and {len(some) - n_shown} more" if len(some) > n_shown else ""
        of_words = f" ({words})" if words else ""
        say(f"jobs {state}: {listed}{more}{visible(of_words)}")


def _show_means(found: "Study") -> None:
    level = f"{100 * found.level:g}%"
    means = found.by_model()
    print_warnings(found.warnings)
    title = f"{found.record.get('name', found.folder.name)}: mean criticality over all layers of each model"
    table = FittedTable(plain(title), otherwise="`layercrit export`")  # --json has no means
    several = len(found.resets) > 1
    table.add_column("model")
    table.add_column("category", leaves=1)
    if several:
        table.add_column("reset")
    for column in ("mean criticality", f"{level} interval", "matched", "top-1 accuracy", "layers", "trials"):
        table.add_column(column, "right", leaves={"layers": 2, "trials": 3}.get(column))
    for row in means.dropna(subset="criticality").to_dict("records"):
        interval = "-" if row["low"] != row["low"] else f"{row['low']:.3f} - {row['high']:.3f}"
        table.add_row(
            plain(row["model"]),
            plain(row["category"] or "-"),
            *[plain(row["reset"])] * several,
            number(row["criticality"]),
            interval,
            number(row["criticality_matched"]),
            percent(row["top1_accuracy"]),
            str(int(row["n_layers"])),
            str(int(row["n_trials"])),
        )
    if table.row_count:
        print_table(table)


def _say_unreadable(found: "Study") -> None:
    if unreadable := found.record.get("probe_set", {}).get("skipped"):
        say(f"left out: {counted(len(unreadable), 'unreadable image')}, such as {unreadable[0]}", err=True)


def _show_plan(found: "StudyPlan") -> None:
    table = FittedTable()
    table.add_column("architecture")
    for column in ("models", "layers", "cells", "done", "to download"):
        table.add_column(column, "right", leaves=1 if column == "done" else None)
    good = found.models[found.models["mistake"] == ""]
    for name, models in good.groupby("architecture", sort=False):
        table.add_row(
            plain(str(name)),
            str(len(models)),
            str(models["n_layers"].iloc[0]),
            f"{models['n_cells'].sum():,}",
            f"{models['n_done'].sum():,}",
            _size(int(models["download"].sum())),
        )
    if table.row_count:
        print_table(table)
    total, done = int(found.models["n_cells"].sum()), int(found.models["n_done"].sum())
    say(
        f"{counted(len(found.models), 'model')}, {counted(total, 'cell')}, {total - done:,} left, "
        f"{counted(found.n_images, 'image')} each"
    )
    if found.precision:
        say(found.precision)
    if found.flops:
        ratio = found.flops_plain / found.flops
        say(f"{found.flops:.3g} FLOPs left; without reuse {found.flops_plain:.3g}, {ratio:.1f} times as many")
        say(
            f"the forward passes alone take about {duration(found.seconds)} in one worker at this machine's speed, "
            "timed on one in float32; fused and bfloat16 replays usually take a third to a half of that"
        )
        say(
            "on top come starting workers, opening each model (some seconds each), drawing resets and comparing "
            "outputs: in a small study, most of the time"
        )
    if found.module_criticality:
        say(found.module_criticality)
    if found.images_mistake:
        click.echo(visible_lines(f"the images cannot be used: {found.images_mistake}"), err=True)
    for row in found.models[found.models["mistake"] != ""].to_dict("records"):
        click.echo(visible_lines(f"cannot be planned: {visible(row['model'])}: {row['mistake']}"), err=True)


def _show_progress(progress: "pd.DataFrame") -> None:
    table = FittedTable()
    table.add_column("model")
    table.add_column("state")
    table.add_column("cells", "right")
    for state, models in progress.groupby("state", sort=False):
        n_shown = _n_shown(len(models))
        for row in models.head(n_shown).to_dict("records"):
            planned = "?" if row["n_planned"] != row["n_planned"] else f"{row['n_planned']:.0f}"
            table.add_row(plain(row["model"]), str(state), f"{row['n_done']} of {planned}")
        if len(models) > n_shown:
            table.add_row(f"and {len(models) - n_shown} more", str(state), "")
    print_table(table)


def _show_failures(failures: "list[FailureRow] | tuple[FailureRow, ...]") -> None:
    """List failures on stderr, those of one model for one reason once."""
    trials: dict[tuple[str, str, str], list[int]] = {}
    for failure in failures:
        trials.setdefault((failure.model, failure.reset, failure.error), []).append(failure.trial)
    say(f"{counted(len(failures), 'trial')} failed:", err=True)
    for (model, reset, error), numbers in trials.items():
        which = f"{'trial' if len(numbers) == 1 else 'trials'} {', '.join(map(str, numbers))}"
        click.echo(visible_lines(f"  {visible(model)}, {visible(reset)}, {which}: {error}"), err=True)


def _size(n_bytes: int) -> str:
    return "-" if n_bytes == 0 else f"{n_bytes / 1e6:,.0f} MB"
