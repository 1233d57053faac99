"""Measurements beside studies: a folder of either is opened, and a measurement becomes a study of one model."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError
from layercrit.layer_sets import stages_of_sets
from layercrit.measurement import Measurement
from layercrit.protocol import DEFAULTS
from layercrit.study.rows import CellRow, ModelRow, PlanRow
from layercrit.study.shards import is_study
from layercrit.study.store import Store
from layercrit.study.tables import Study, load_study

__all__ = ["load_result", "open_result", "study_of"]

# what both say of a model
_ON_TOP = ("backend", "dtype", "notes", "predictions", "warnings")
_OF_MODEL = ("architecture", "mean", "n_parameters", "sha256", "std")
_ABOUT_CELL = ("model", "layer", "type", "depth", "n_parameters", "flops_after", "reset", "trial", "seed", "status",
               "delta_norm", "n_images")  # fmt: skip


def load_result(folder: str | Path) -> Measurement | Study | None:
    """Read what `layercrit.measure` or a study left in a folder; None if that is neither.

    Raises:
        LayercritError: it is damaged.
    """
    folder = Path(folder).expanduser()
    try:
        found, measured = is_study(folder), (folder / "measurement.json").is_file()
    except OSError:  # a reference of a model may be longer than a file name can be
        return None
    if found:
        return load_study(folder)
    return Measurement.load(folder) if measured else None


def open_result(folder: str | Path) -> Measurement | Study:
    """Read what `layercrit.measure` or a study left in a folder.

    Raises:
        LayercritError: it is damaged; as StudyError, it is neither.
    """
    found = load_result(folder)
    if found is None:
        raise StudyError(
            f"There is no study or measurement in {folder}. Give the folder that `layercrit study run`, `layercrit "
            "import` or `layercrit measure` wrote."
        )
    return found


def study_of(measurement: Measurement, folder: Path) -> Study:
    """Write the study of one model that a measurement is, and open it.

    Its numbers are those of the measurement. Of the images it knows names, labels and predictions, not the pixels.

    Args:
        measurement: of any reset and layers.
        folder: of the study, which must not be one yet; it is read as long as the study is used.
    """
    record, name = measurement.record, measurement.name
    protocol = dict(record["protocol"])
    reset, statistics = protocol.pop("reset"), protocol.pop("norm_statistics", DEFAULTS.norm_statistics)
    of_model = {
        **{key: record[key] for key in _ON_TOP if key in record},
        **{key: record["model"][key] for key in _OF_MODEL if key in record["model"]},
        "probe_set": record["probe_set"]["sha256"],
        "n_images": record["probe_set"]["n_images"],
        "shared": {layer: about["shared"] for layer, about in record["layers"].items() if "shared" in about},
        "random_trials": {reset: record["random_trials"]},
        "donor": {reset: record["model"].get("donor")},
    }
    model = ModelRow(
        name,
        record["model"]["reference"],
        record=of_model,
        norm_statistics=None if statistics == DEFAULTS.norm_statistics else statistics,
    )
    with Store(folder, create=True) as store, store.transaction():
        store.put_models([model])
        run = store.put_run(record.get("finished", ""), {"versions": record["versions"]})
        store.put_plan(_plan(measurement))
        store.put_cells(_cells(measurement), run)
        about = {"name": name, "protocol": {**protocol, "resets": [reset]}, "probe_set": record["probe_set"]}
        store.put_meta("study", about)
    plans = {} if measurement.plan is None else {(name, reset): measurement.plan}
    images = {} if measurement.images is None else {name: measurement.images}
    return replace(load_study(folder), plans=plans, shown=images)


def _plan(measurement: Measurement) -> Iterator[PlanRow]:
    layers = measurement.record["layers"]
    members = {name: about.get("members") or [name] * bool(about["parameters"]) for name, about in layers.items()}
    stages = stages_of_sets(members)
    for cell in measurement.cells.to_dict("records"):
        yield PlanRow(
            model=measurement.name,
            layer=cell["layer"],
            reset=cell["reset"],
            trial=cell["trial"],
            key=_key(cell),
            type=cell["type"],
            stage=stages[cell["layer"]],
            depth=cell["depth"],
            n_parameters=cell["n_parameters"],
            flops_after=cell["flops_after"],
            shape="x".join(map(str, layers[cell["layer"]]["shape"])),
        )


def _cells(measurement: Measurement) -> Iterator[CellRow]:
    place = {layer: number for number, layer in enumerate(measurement.record["layers"])}
    means = [name for name in measurement.cells.columns if name not in _ABOUT_CELL]
    for cell in measurement.cells.to_dict("records"):
        where = place[cell["layer"]], cell["trial"]
        yield CellRow(
            key=_key(cell),
            status=cell["status"],
            seed=int(cell["seed"]),
            delta_norm=cell["delta_norm"],
            n_images=cell["n_images"],
            means={name: cell[name] for name in means},
            per_image={name: values[where].copy() for name, values in measurement.per_image.items()}
            if cell["status"] == "ok"
            else None,
        )


def _key(cell: Mapping[Hashable, Any]) -> str:
    return f"{cell['layer']}, trial {cell['trial']}"
