"""Published result tables: read into a study, and written again without loss.

The layout is that of the raw results of Gavrikov et al. 2024 (arXiv 2410.14470), one row per (model, layer, trial).
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from layercrit.errors import StudyError, near
from layercrit.foreign_text import guarded, unguarded
from layercrit.layers import Layer, find_layers, stages_of
from layercrit.models.references import open_model, without_weights
from layercrit.models.zoo.fetching import ZOO
from layercrit.study.rows import CellRow, ModelRow, PlanRow
from layercrit.study.shards import is_study
from layercrit.study.store import Store
from layercrit.study.tables import Study, load_study

__all__ = ["COLUMNS", "MODEL_COLUMNS", "import_published", "write_models", "write_published"]

COLUMNS = ("top1_acc", "top5_acc", "loss", "batch_acc", "layer", "pred_cos_sim", "pred_l1_err", "pred_l2_err",
           "pred_ce_loss", "trial", "recovered_acc", "model_id")  # fmt: skip
"""Columns of a published table. Accuracies are percentages, ``recovered_acc`` is a share. ``pred_ce_loss`` was
computed on logits instead of probabilities and means nothing: it is kept as it is, but neither used nor written for
measured cells."""

MODEL_COLUMNS = ("model_id", "category", "label", "imagenet_top1_percent")
"""Columns of the table of models beside it."""

_NAMES = ("layer", "model_id", "category", "label")  # the columns that are no numbers

_RESET = "rerandomize"  # what the published code does; its table does not say so
_MODULE_PREFIX = "model."  # what the published code has before the names of layers

_RELEASE_SHA256 = "ff568ea87b8ebeea49f4fa70e7b07cc7108b9d9308bb0d0deb197b6a9eb059b3"
_RELEASE_SOURCE = "paulgavrikov/layer_criticality at commit c123a9f, raw-results/results.csv"
_RELEASE_NAME = "How Do Training Methods Influence the Utilization of Vision Models?"
_RELEASE_IMAGES = 10_000
_BASELINE = "tv_resnet50"
_ANY_SIZE = (64, 64)  # of images; no shape of a layer depends on it
_LEFT_OUT = "freezing"  # the category that the paper's figures leave out

# The largest value of each column of means; the smallest is 0.
_LARGEST = {
    "top1_acc": 100.0,
    "top5_acc": 100.0,
    "loss": math.inf,
    "pred_cos_sim": 1.0,
    "pred_l1_err": 2.0,
    "pred_l2_err": math.sqrt(2),
    "recovered_acc": math.inf,
}
_ROUNDING = 1e-3  # means taken in low precision may lie this far outside


def import_published(results: str | Path, folder: str | Path, models: str | Path | None = None) -> Study:
    """Read a published table into a new study.

    Each row becomes a cell of the reset ``rerandomize``; the original row is kept, so that `write_published` gives the
    file back. A row without a number under ``pred_cos_sim`` becomes a cell with the status ``not_finite``. Names of
    layers stay as they are; their depth is the order in which the model's rows first name them. Models that are in the
    zoo get the types and shapes of layers of its architecture, and its budgets of adversarial training.

    Args:
        results: a CSV file with the columns `COLUMNS`, in any order.
        folder: the folder of the new study; one that already contains a study is refused.
        models: a CSV file with the columns `MODEL_COLUMNS`, for category, label and documented accuracy; None: those of
            the zoo. A model that is not in it has no category.

    Raises:
        StudyError: a file is missing or not such a table (the text names line and column), or the folder already
            contains a study.
    """
    results, folder = Path(results).expanduser(), Path(folder).expanduser()
    if is_study(folder):
        raise StudyError(f"{folder} already contains a study. Name another folder, or delete that study first.")
    data = _read(results)
    sha256 = hashlib.sha256(data).hexdigest()
    texts = _texts(results, data, COLUMNS)
    numbers = _numbers(results, texts)
    _check_trials(results, numbers)
    about = _from_zoo() if models is None else _from_table(Path(models).expanduser())
    record = {"origin": "published", "random_trials": {_RESET: True}}
    rows = []
    for name in dict.fromkeys(numbers["model_id"]):
        entry = ZOO.get(name)
        budget: dict[str, Any] = {} if entry is None else {"attack_norm": entry.attack_norm, "eps": entry.eps}
        rows.append(replace(about.get(name, ModelRow(name, name)), record=record, **budget))
    with Store(folder, create=True) as store, store.transaction():
        store.put_models(rows)
        plan = _plan(numbers, sha256, _layers_of_zoo(dict.fromkeys(numbers["model_id"])))
        store.put_plan(plan)
        store.put_cells(_cells(texts, numbers, [row.key for row in plan], _images(sha256)))
        store.put_meta("study", _record(results, sha256, numbers, rows))
    return load_study(folder)


def write_published(study: Study, path: str | Path) -> Path:
    """Write the cells of a study in the published layout.

    Published rows are written as they were and in their order, measured ones after them: ``pred_cos_sim`` is 1 minus
    the mean cosine distance, accuracies are percentages, layers have the prefix ``model.``, and what was not measured
    is empty. The layout knows one reset, so that only cells of ``rerandomize`` are written, and no status: cells that
    are not ok have no numbers.

    Raises:
        StudyError: the study has no cell of that reset, or the file cannot be written.
    """
    cells = study.cells[study.cells["reset"] == _RESET]
    if cells.empty:
        raise StudyError(
            f"The study in {study.folder} has no cell of the reset {_RESET!r}, the only one that the published layout "
            f"knows. Its resets: {', '.join(study.resets) or 'none'}. Choose another format."
        )
    published = cells["raw"].notna()
    rows = sorted(cells.loc[published, "raw"], key=lambda raw: int(raw["row"]))
    measured = _in_published_units(cells[~published])
    return _write_csv(Path(path).expanduser(), COLUMNS, [*rows, *measured.to_dict("records")])


def write_models(study: Study, path: str | Path) -> Path:
    """Write the table of models that goes with `write_published`.

    Raises:
        StudyError: the file cannot be written.
    """
    models = study.models
    rows = pd.DataFrame(
        {
            "model_id": models["model"],
            "category": models["category"].fillna(""),
            "label": models["label"],
            # 100 * 0.801 is 80.10000000000001
            "imagenet_top1_percent": [_text(round(100 * share, 10)) for share in models["documented_accuracy"]],
        }
    )
    return _write_csv(Path(path).expanduser(), MODEL_COLUMNS, rows.to_dict("records"))


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise StudyError(f"There is no file {path}. {near(path.name, sorted(beside))}") from error
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}). Expected a CSV file.") from error


def _texts(path: Path, data: bytes, columns: Sequence[str]) -> pd.DataFrame:
    """Return a CSV file's fields as they stand, under the number of the line in which each row ends."""
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = next(reader, [])
        _check_header(path, header, columns)
        rows = dict((reader.line_num, row) for row in reader if row)  # noqa: C402
    except (UnicodeDecodeError, csv.Error) as error:
        raise StudyError(f"{path} is not a CSV file in UTF-8 ({error}). Expected {', '.join(columns)}.") from error
    for line, row in rows.items():
        if len(row) != len(header):
            raise StudyError(
                f"{path}, line {line}, has {len(row)} fields where the header names {len(header)} columns. "
                "If the file is truncated, download it again."
            )
    if not rows:
        raise StudyError(f"{path} has a header but no rows. If the file is truncated, download it again.")
    texts = pd.DataFrame.from_dict(rows, orient="index", columns=header)
    return texts.assign(**{column: texts[column].map(unguarded) for column in _NAMES if column in texts})


def _check_header(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    unknown = [name for name in header if name not in columns]
    missing = [name for name in columns if name not in header]
    twice = sorted({name for name in header if list(header).count(name) > 1})
    if unknown or missing or twice:
        found = [
            *(f"column {name!r} is missing. {near(name, unknown)}" if unknown else f"column {name!r} is missing."
              for name in missing[:1]),
            *(f"column {name!r} is unknown. {near(name, columns)}" for name in unknown[:1]),
            *(f"column {name!r} appears twice." for name in twice[:1]),
        ]  # fmt: skip
        raise StudyError(f"{path}, line 1: {' '.join(found)} Expected {', '.join(columns)}.")


def _numbers(path: Path, texts: pd.DataFrame) -> pd.DataFrame:
    """Return the table with numbers in place of texts, NaN where a mean is empty or not finite."""
    numbers = texts[["model_id", "layer"]].copy()
    for column in ("model_id", "layer"):
        if (empty := texts[column].str.strip() == "").any():
            raise StudyError(f"{path}, line {texts.index[empty][0]}, column {column!r} is empty: expected a name.")
    for column, largest in _LARGEST.items():
        values = [_number(path, line, column, text) for line, text in texts[column].items()]
        numbers[column] = np.where(np.isfinite(values), values, math.nan)
        slack = 0.0 if math.isinf(largest) else _ROUNDING * largest
        if (wrong := (numbers[column] < -slack) | (numbers[column] > largest + slack)).any():
            line = texts.index[wrong][0]
            raise StudyError(
                f"{path}, line {line}, column {column!r} contains {texts.loc[line, column]!r}: expected a number from "
                f"0 to {largest:.4g}."
            )
    trials = [_number(path, line, "trial", text) for line, text in texts["trial"].items()]
    for line, trial in zip(texts.index, trials, strict=True):
        if not (0 <= trial < 2**31 and trial == math.floor(trial)):
            raise StudyError(
                f"{path}, line {line}, column 'trial' contains {texts.loc[line, 'trial']!r}: expected a whole number, "
                "0 or above."
            )
    return numbers.assign(trial=np.array(trials, dtype=np.int64))


def _number(path: Path, line: Any, column: str, text: str) -> float:
    try:
        return float(text) if text.strip() else math.nan
    except ValueError as error:
        raise StudyError(f"{path}, line {line}, column {column!r} contains {text!r}: expected a number.") from error


def _check_trials(path: Path, numbers: pd.DataFrame) -> None:
    """Make sure that each layer of a model has each of the model's trials, once."""
    cell = ["model_id", "layer", "trial"]
    if (again := numbers.duplicated(cell)).any():
        line = numbers.index[again][0]
        model, layer, trial = numbers.loc[line, cell]
        same = (numbers[cell] == numbers.loc[line, cell]).all(axis=1)
        raise StudyError(
            f"{path}, line {line}, column 'trial': model {model!r}, layer {layer!r} has trial {trial} already in line "
            f"{numbers.index[same][0]}. Expected each cell once; delete one of them."
        )
    of_model = numbers.groupby("model_id")["trial"].transform("nunique")
    of_layer = numbers.groupby(["model_id", "layer"])["trial"].transform("nunique")
    if (few := of_layer < of_model).any():
        line = numbers.index[few][0]
        model, layer = numbers.loc[line, ["model_id", "layer"]]
        rows = numbers[numbers["model_id"] == model]
        missing = sorted(set(rows["trial"]) - set(rows.loc[rows["layer"] == layer, "trial"]))
        others = [name for name in rows["layer"].unique() if name != layer]
        raise StudyError(
            f"{path}, line {line}, column 'trial': layer {layer!r} of model {model!r} lacks trial "
            f"{', '.join(map(str, missing))}, which other layers of the model have. {near(layer, others)} "
            "Expected every layer in every trial; complete the table, or correct the name."
        )


def _from_table(path: Path) -> dict[str, ModelRow]:
    """Return what a table of models says."""
    texts = _texts(path, _read(path), MODEL_COLUMNS)
    rows: dict[str, ModelRow] = {}
    for line, row in zip(texts.index, texts.to_dict("records"), strict=True):
        name, percent = row["model_id"], _number(path, line, "imagenet_top1_percent", row["imagenet_top1_percent"])
        if name in rows:
            raise StudyError(f"{path}, line {line}, column 'model_id': {name!r} appears twice. Delete one of them.")
        if percent < 0 or percent > 100:
            raise StudyError(
                f"{path}, line {line}, column 'imagenet_top1_percent' contains {percent}: expected 0 to 100, or "
                "nothing."
            )
        accuracy = None if math.isnan(percent) else percent / 100
        rows[name] = ModelRow(name, name, row["category"] or None, row["label"] or None, accuracy)
    return rows


def _from_zoo() -> dict[str, ModelRow]:
    return {
        name: ModelRow(name, name, entry.category, entry.label, entry.documented_accuracy)
        for name, entry in ZOO.items()
    }


# --- the study --------------------------------------------------------------------------------------------------------


def _layers_of_zoo(models: Iterable[str]) -> dict[str, dict[str, Layer]]:
    """Return model -> published name of a layer -> the layer, of those models that the zoo knows."""
    of_architecture: dict[str, dict[str, Layer]] = {}
    for entry in (ZOO[name] for name in models if name in ZOO):
        if entry.architecture not in of_architecture:
            network = open_model(without_weights(entry.architecture)).network.to("meta")  # for shapes, not numbers
            found = find_layers(network, torch.zeros(1, len(entry.mean), *_ANY_SIZE, device="meta"))
            of_architecture[entry.architecture] = {_MODULE_PREFIX + layer.name: layer for layer in found}
    return {name: of_architecture[ZOO[name].architecture] for name in models if name in ZOO}


def _plan(numbers: pd.DataFrame, sha256: str, layers: Mapping[str, Mapping[str, Layer]]) -> list[PlanRow]:
    """Return the planned cells, in the order of the rows.

    Args:
        numbers: the table.
        sha256: of the file.
        layers: model -> name -> layer, where they are known.
    """
    first = numbers.drop_duplicates(["model_id", "layer"])
    about = {}
    for model, names in first.groupby("model_id", sort=False)["layer"]:
        stages = stages_of(names.to_list())
        about.update({(model, layer): (stages[layer], depth) for depth, layer in enumerate(names)})
    plan = []
    for model, layer, trial in numbers[["model_id", "layer", "trial"]].itertuples(index=False, name=None):
        key = hashlib.sha256(json.dumps(["published", sha256, model, layer, trial]).encode()).hexdigest()
        stage, depth = about[model, layer]
        known = layers.get(model, {}).get(layer)
        kind, n_parameters, shape = (
            (None, None, None) if known is None else (known.type, known.n_parameters, "x".join(map(str, known.shape)))
        )
        plan.append(PlanRow(model, layer, _RESET, trial, key, kind, stage, depth, n_parameters, None, shape))
    return plan


def _cells(texts: pd.DataFrame, numbers: pd.DataFrame, keys: Sequence[str], n_images: int | None) -> Iterator[CellRow]:
    means = pd.DataFrame(
        {
            "cosine": (1 - numbers["pred_cos_sim"]).clip(0.0, 1.0),
            "l1": numbers["pred_l1_err"],
            "l2": numbers["pred_l2_err"],
            "loss": numbers["loss"],
            "top1_accuracy": numbers["top1_acc"] / 100,
            "top5_accuracy": numbers["top5_acc"] / 100,
            "recovered_accuracy": numbers["recovered_acc"],
        }
    )
    known = means["cosine"].notna()
    means[~known] = math.nan
    names, columns = means.columns.to_list(), texts.columns.to_list()
    rows = zip(keys, known, means.to_numpy().tolist(), texts.to_numpy().tolist(), strict=True)
    for row, (key, ok, of_cell, fields) in enumerate(rows):
        yield CellRow(
            key,
            "ok" if ok else "not_finite",
            seed=None,
            delta_norm=None,
            n_images=n_images,
            means=dict(zip(names, of_cell, strict=True)),
            raw={"row": row, **dict(zip(columns, fields, strict=True))},
        )


def _images(sha256: str) -> int | None:
    """Return over how many images the means of a file are; a table does not say."""
    return _RELEASE_IMAGES if sha256 == _RELEASE_SHA256 else None


def _record(path: Path, sha256: str, numbers: pd.DataFrame, rows: Sequence[ModelRow]) -> dict[str, Any]:
    is_release = sha256 == _RELEASE_SHA256
    names, n_images = {row.model for row in rows}, _images(sha256)
    record: dict[str, Any] = {
        "name": _RELEASE_NAME if is_release else path.stem,
        "origin": {"source": _RELEASE_SOURCE if is_release else path.name, "sha256": sha256, "rows": len(numbers)},
        "protocol": {"trials": int(numbers["trial"].nunique()), "level": 0.95, "resets": [_RESET]},
        "notes": [
            "Published results: each cell has only means over images, so intervals hold for new trials on the same "
            "images.",
            "The published column pred_ce_loss is left out: it was computed on logits instead of probabilities.",
        ],
    }
    if n_images is not None:
        record["protocol"]["n_images"] = n_images
    if _BASELINE in names:
        record["baseline"] = _BASELINE
    if any(row.category == _LEFT_OUT for row in rows):
        record["leave_out"] = [_LEFT_OUT]
    if unknown := [row.model for row in rows if row.category is None]:
        record["notes"].append(
            f"No category is known for {', '.join(unknown)}; a table of models gives them (--models FILE), such as the "
            "models.csv that is exported beside results.csv."
        )
    return record


# --- writing ----------------------------------------------------------------------------------------------------------


def _in_published_units(cells: pd.DataFrame) -> pd.DataFrame:
    """Return measured cells as published rows, all fields texts."""

    def mean(name: str) -> pd.Series:
        return cells[name] if name in cells else pd.Series(math.nan, cells.index)

    numbers = {
        "top1_acc": 100 * mean("top1_accuracy"),
        "top5_acc": 100 * mean("top5_accuracy"),
        "loss": mean("loss"),
        "pred_cos_sim": 1 - mean("cosine"),
        "pred_l1_err": mean("l1"),
        "pred_l2_err": mean("l2"),
        "trial": cells["trial"],
        "recovered_acc": mean("recovered_accuracy"),
    }
    texts = {column: [_text(value) for value in values] for column, values in numbers.items()}
    names = {"layer": _MODULE_PREFIX + cells["layer"], "model_id": cells["model"]}
    return pd.DataFrame({**texts, **names, "batch_acc": "", "pred_ce_loss": ""}, index=cells.index)


def _text(number: float) -> str:
    return "" if math.isnan(number) else repr(float(number))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[Any, Any]]) -> Path:
    """Write rows under a temporary name and rename the file, so that nobody reads half a file."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: guarded(text) if key in _NAMES else text for key, text in row.items()} for row in rows)
    beside = path.with_name(f".writing-{path.name}")
    try:
        beside.write_text(stream.getvalue(), encoding="utf-8", newline="")
        beside.replace(path)
    except OSError as error:
        raise StudyError(f"{path} cannot be written ({error.strerror}). Name another one.") from error
    return path
