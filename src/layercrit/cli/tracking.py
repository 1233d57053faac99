"""The option --track: what is passed to experiment trackers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layercrit.cli.printing import notice
from layercrit.cli.registered import RegisteredOption
from layercrit.errors import LayercritError

# Everything that imports torch is imported inside the functions, so that `layercrit --help` answers at once.
if TYPE_CHECKING:
    from layercrit.measurement import Measurement
    from layercrit.study.file import StudyFile
    from layercrit.study.ranks import Shard
    from layercrit.study.tables import Study
    from layercrit.trackers.callbacks import OnCell
    from layercrit.trackers.tracking import Tracking

__all__ = ["pass_measurement", "track_option", "tracked_measurement", "tracked_study"]

_FOLDER = "tracking"  # in the run's own
_MEAN = "mean_criticality"
_FIGURES = ("criticality", "ranking")
_COLUMNS = ("model", "reset", "layer", "type", "depth", "criticality", "low", "high", "criticality_matched", "n_trials",
            "status")  # fmt: skip

track_option = click.option(
    "--track",
    "trackers",
    multiple=True,
    cls=RegisteredOption,
    registry="layercrit.trackers:TRACKERS",
    metavar="NAME",
    help="Show the run in an experiment tracker; may be given several times.",
)


@contextlib.contextmanager
def tracked_study(
    names: Sequence[str], study: "StudyFile", folder: Path, shard: "Shard | None" = None
) -> "Iterator[OnCell | None]":
    """Pass the study that runs in this context to trackers.

    Args:
        names: of the trackers.
        study: what is measured.
        folder: the study's.
        shard: the share of the study that is measured; each has a run of its own in a tracker.

    Returns:
        the callback for `layercrit.study.running.run_study`; None where there is no tracker.
    """
    from layercrit.locks import is_free
    from layercrit.study.shards import shard_folder

    own = shard_folder(folder, 0 if shard is None else shard.number + 1)
    if not names or not is_free(own):  # another process runs it, so that this one will be refused
        yield None
        return
    from layercrit.study.tables import load_study

    config = {
        "study": study.name,
        "protocol": study.protocol.to_dict() | {"resets": list(study.resets), "n_images": study.n_images},
        "norm_statistics": list(study.norm_statistics),
        "images": [images.source for images in study.images],
        "models": {entry.name: entry.reference for entry in study.models},
    }
    name = study.name if shard is None else f"{study.name} shard {shard}"
    with _open(names, own, name, config) as tracking:
        is_first = True

        def on_cell(row: Mapping[str, Any]) -> None:
            nonlocal is_first
            if is_first:
                tracking.config(_probe_set_of(folder))
            is_first = False
            tracking.cell(row)

        yield on_cell
        tracking.config(_probe_set_of(folder))
        found = load_study(folder)
        if shard is None or found.progress()["state"].isin(["done", "failed"]).all():  # the last shard passes on all
            _pass_result(tracking, found, own)


@contextlib.contextmanager
def tracked_measurement(
    names: Sequence[str], model: str, settings: Mapping[str, Any], folder: Path
) -> "Iterator[Tracking | None]":
    """Pass the measurement that runs in this context to trackers; `pass_measurement` tells them what was found."""
    if not names:
        yield None
        return
    called = settings.get("name") or model
    with _open(names, folder, called, {"protocol": dict(settings), "models": {model: model}}) as tracking:
        yield tracking


def pass_measurement(tracking: "Tracking", measurement: "Measurement", folder: Path) -> None:
    """Pass a measurement that is finished and saved to trackers."""
    from layercrit.trackers.tracker import metric_of

    tracking.config({"probe_set": measurement.record["probe_set"]})
    record, mean = measurement.record, measurement.summary()["criticality"]
    about = {"model": record["model"]["reference"], "reset": record["protocol"]["reset"]}
    layers = measurement.to_pandas().assign(**about)
    summary = {} if mean is None else {metric_of(about, _MEAN): mean["mean"]}
    tracking.result(summary, layers[list(_COLUMNS)], {"criticality": folder / "criticality.png"})


def _pass_result(tracking: "Tracking", found: "Study", folder: Path) -> None:
    """Pass what a study found to trackers."""
    from layercrit.reporting.reports import save_figures
    from layercrit.trackers.tracker import metric_of

    if found.cells.empty:
        return
    tracking.progress(len(found.cells), int(found.progress()["n_planned"].sum()))
    try:
        figures = save_figures(found, folder / _FOLDER / "figures", _FIGURES)
    except LayercritError as error:
        figures = {}
        notice(f"note: no figures for the trackers: {error}")
    means = found.by_model().dropna(subset="criticality")
    summary = {
        metric_of({"model": row["model"], "reset": row["reset"]}, _MEAN): row["criticality"]
        for row in means.to_dict("records")
    }
    layers = found.to_pandas()[list(_COLUMNS)]
    tracking.result(summary, layers, {name: path for name, (path,) in figures.items()})


def _probe_set_of(folder: Path) -> dict[str, Any]:
    from layercrit.study.shards import open_study

    with open_study(folder) as store:
        return {"probe_set": store.meta("study", {}).get("probe_set", {})}


def _open(names: Sequence[str], folder: Path, name: str, config: Mapping[str, Any]) -> "Tracking":
    from layercrit.machine import versions
    from layercrit.trackers import Tracking

    config = {**config, "versions": versions()}
    return Tracking(names, folder / _FOLDER, name, config, notice)
