"""The tables of a study as files for other programs."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from layercrit.comparison import accuracy_of
from layercrit.conditions import under
from layercrit.errors import StudyError, near
from layercrit.foreign_text import write_csv
from layercrit.registry import Registry, summary_of
from layercrit.study.published import write_models, write_published
from layercrit.study.status import has_modules
from layercrit.study.tables import Study, load_study

__all__ = ["BY", "FORMATS", "Format", "cells_table", "export", "export_format"]

FormatFunction = Callable[[Study, Path], None]

# Columns that are whole numbers, or numbers, also where every value is missing.
_WHOLE = ("depth", "n_parameters", "trial", "n_images", "run", "n_layers", "n_trials")
_NUMBERS = ("flops_after", "delta_norm", "seconds")

_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
    }
)


@dataclass(frozen=True)
class Format:
    """A registered format.

    Attributes:
        name: what it is called on the command line.
        files: names of the files that it consists of.
        function: writes them into a folder.
        summary: one line for tables.
    """

    name: str
    files: tuple[str, ...]
    function: FormatFunction
    summary: str


FORMATS = Registry[Format]("format", StudyError, "layercrit.export_formats", summary=lambda known: known.summary)
"""All formats by name, filled by `export_format` and by installed plug-ins."""


def export_format(name: str, files: Sequence[str]) -> Callable[[FormatFunction], FormatFunction]:
    """Register a function that writes the named files of a study into a folder; its docstring is the summary.

    Examples:
        >>> import layercrit
        >>> @layercrit.export_format("names", files=["names.csv"])
        ... def write_names(study, folder):
        ...     '''The names of the models.'''
        ...     study.models[["model"]].to_csv(folder / "names.csv")
    """

    def register(function: FormatFunction) -> FormatFunction:
        FORMATS[name] = Format(name, tuple(files), function, summary_of(function))
        return function

    return register


def export(
    study: Study | str | Path,
    format: str,  # noqa: A002
    path: str | Path | None = None,
    *,
    overwrite: bool = False,
    by: str | None = None,
    probe_set: str | None = None,
    norm_statistics: str | None = None,
    epoch: int | None = None,
) -> list[Path]:
    """Write the tables of a study as files; with the formats ``csv`` and ``parquet`` those of module criticality, too.

    All files are written under temporary names and then renamed, so that nobody reads half a file.

    Args:
        study: finished or not, or its folder.
        format: one of `FORMATS`.
        path: the folder to write into; None for the folder ``export`` in that of the study.
        overwrite: whether to replace files that are there.
        by: write, in place of the format's own tables, criticality by ``class`` (the label), by ``prediction`` (the
            class that each trained network predicts) or by ``correctness``; with the formats ``csv`` and ``parquet``.
        probe_set: write only what was measured under one condition, that which `layercrit.comparison.compare` takes
            for these settings; None of the three: under all conditions.
        norm_statistics: likewise.
        epoch: likewise.

    Returns:
        The files.

    Raises:
        StudyError: the format is unknown or cannot represent the study, the study has no such condition, a file already
            exists, or the folder cannot be written.
        ProbeError: labels or predictions of single images are not known.

    Examples:
        >>> import layercrit
        >>> files = layercrit.export(layercrit.load_study("layercrit-demo/study"), "csv", "tables")
        >>> "models.csv" in {path.name for path in files}
        True
    """
    study = study if isinstance(study, Study) else load_study(study)
    chosen = FORMATS.find(format) if by is None else _format_by(FORMATS.find(format).name, by)
    asked: dict[str, Any] = {"probe_set": probe_set, "norm_statistics": norm_statistics, "epoch": epoch}
    if any(one is not None for one in asked.values()):
        study = _of_models(study, set(under(study.models, study.folder, **asked)[0]["model"]))
    chosen = chosen if by is not None else _with_module_criticality(chosen, study)
    folder = study.folder / "export" / format if path is None else Path(path).expanduser()
    files = [folder / name for name in chosen.files]
    if (there := [file.name for file in files if file.exists()]) and not overwrite:
        raise StudyError(
            f"{folder} already contains {', '.join(there)}. Name another folder (--out), or replace the files with "
            "--overwrite (overwrite=True)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            chosen.function(study, Path(scratch))
            for file in files:
                (Path(scratch) / file.name).replace(file)
    except OSError as error:
        raise StudyError(
            f"The study cannot be exported to {folder}: {error.strerror or error}. "
            "Free some space or name another folder (--out)."
        ) from error
    return files


def _of_models(study: Study, names: Set[str]) -> Study:
    """Return the study with nothing but some of its models."""
    return replace(
        study,
        models=study.models[study.models["model"].isin(names)].reset_index(drop=True),
        cells=study.cells[study.cells["model"].isin(names)].reset_index(drop=True),
        failures=tuple(row for row in study.failures if row.model in names),
        planned={model: n for model, n in study.planned.items() if model in names},
    )


def cells_table(study: Study) -> pd.DataFrame:
    """Return the cells of a study, and a row with the status ``failed`` for each trial that failed.

    ``error`` says why it failed. Such a row is of all layers of a model, so ``layer`` is missing in it.
    """
    failed = [
        {"model": row.model, "reset": row.reset, "trial": row.trial, "status": "failed", "error": row.error}
        for row in study.failures
    ]
    cells = _typed(study.cells.drop(columns="raw").assign(error=None))
    return pd.concat([cells, _typed(pd.DataFrame(failed))], ignore_index=True) if failed else cells


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose columns have their types even if they are empty."""
    types: dict[str, Any] = {}
    for column in table.columns:
        if column in _WHOLE:
            types[column] = "Int64"
        elif column in _NUMBERS:
            types[column] = "float64"
        elif table[column].dtype == object:
            types[column] = "string"
    return table.astype(types)


def _format_by(name: str, by: str) -> Format:
    """Return the format that has only the table of a choice of ``by``."""
    if by not in BY:
        raise StudyError(f"There is no table by {by!r}. {near(by, BY)}")
    if name not in _WRITE:
        raise StudyError(f"The format {name!r} has no table by {by}. Take csv or parquet.")

    def write(study: Study, folder: Path) -> None:
        table = pd.concat([BY[by](study, reset) for reset in study.resets], ignore_index=True)
        _WRITE[name]({f"by_{by}": table}, folder)

    return Format(name, (f"by_{by}.{name}",), write, f"The table by {by}.")


def _with_module_criticality(chosen: Format, study: Study) -> Format:
    """Return a format that writes the tables of module criticality as well, where the study has some."""
    if chosen.name not in _WRITE or not has_modules(study.folder, study.record):
        return chosen
    from layercrit.study.module_tables import load_study_module_criticality  # which imports torch

    found = []
    for probe_set in dict.fromkeys(study.models["probe_set"]):
        with suppress(StudyError):  # none was measured on these images, or what cannot be in one table
            found.append(load_study_module_criticality(study, probe_set=probe_set))
    if not found:
        return chosen
    tables = {
        "module_criticality": pd.concat([one.table for one in found], ignore_index=True),
        "module_criticality_by_model": pd.concat([one.by_model for one in found], ignore_index=True),
    }

    def write(study: Study, folder: Path) -> None:
        chosen.function(study, folder)
        _WRITE[chosen.name](tables, folder)

    return replace(chosen, files=(*chosen.files, *(f"{name}.{chosen.name}" for name in tables)), function=write)


BY: dict[str, Callable[[Study, str], pd.DataFrame]] = {
    "class": lambda study, reset: study.by_class(reset=reset),
    "prediction": lambda study, reset: study.by_class(of="prediction", reset=reset),
    "correctness": lambda study, reset: study.by_correctness(reset=reset),
}
"""Tables of a study in which images are put into groups: name -> the function that makes the one of a reset."""


def _tables(study: Study) -> dict[str, pd.DataFrame]:
    return {
        "cells": cells_table(study),
        "layers": _typed(study.to_pandas()),
        "models": _typed(study.by_model()),
    }


def _write_parquet(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")


def _write_csv(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    for name, table in tables.items():
        write_csv(table, folder / f"{name}.csv")


_WRITE = {"parquet": _write_parquet, "csv": _write_csv}


@export_format("parquet", ["cells.parquet", "layers.parquet", "models.parquet"])
def _parquet(study: Study, folder: Path) -> None:
    """Tables of cells, layers and models as Parquet, with the types of all columns."""
    _write_parquet(_tables(study), folder)


@export_format("csv", ["cells.csv", "layers.csv", "models.csv"])
def _csv(study: Study, folder: Path) -> None:
    """Tables of cells, layers and models as CSV."""
    _write_csv(_tables(study), folder)


@export_format("published-csv", ["results.csv", "models.csv"])
def _published_csv(study: Study, folder: Path) -> None:
    """The layout of the published results (percent; cells of the reset rerandomize only), and a table of models."""
    write_published(study, folder / "results.csv")
    write_models(study, folder / "models.csv")


@export_format("latex", ["models.tex"])
def _latex(study: Study, folder: Path) -> None:
    """A table for papers (package booktabs): category, accuracy and mean criticality of each model."""
    source = study.record.get("origin", {}).get("source")
    head = ["% written by layercrit; needs \\usepackage{booktabs}"]
    head += [f"% source: {_one_line(source)}"] if source else []
    tables = [_latex_table(study, reset) for reset in study.resets]
    (folder / "models.tex").write_text("\n".join([*head, *tables]) + "\n", encoding="utf-8")


def _latex_table(study: Study, reset: str) -> str:
    """Return the table of one reset, grouped by category, that of the baseline first."""
    level = 100 * study.record.get("protocol", {}).get("level", 0.95)
    models = study.by_model()
    models = models[models["reset"] == reset]
    kind, accuracy = accuracy_of(models)
    baseline = study.record.get("baseline")
    of_baseline = set(models.loc[models["model"] == baseline, "category"])
    models = models.assign(
        accuracy=accuracy,
        category=models["category"].fillna(""),
        other_group=~models["category"].isin(of_baseline),
        unknown=models["category"].isna(),
        other_model=models["model"] != baseline,
    ).sort_values(["other_group", "unknown", "category", "other_model", "label"])
    lines = [
        r"\begin{table}",
        rf"\caption{{Mean criticality over layers (reset: {_escaped(reset)}) with {level:g}\,\% intervals, "
        rf"and {kind} top-1 accuracy.}}",
        r"\begin{tabular}{llrl}",
        r"\toprule",
        r"Model & Category & Accuracy (\%) & Criticality \\",
    ]
    before = None
    for row in models.to_dict("records"):
        lines += [] if row["category"] == before else [r"\midrule"]
        before = row["category"]
        cells = (_escaped(row["label"]), _escaped(before) or "--", _percent(row["accuracy"]), _interval(row))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _percent(share: float) -> str:
    return "--" if math.isnan(share) else f"{100 * share:.1f}"


def _interval(row: Any) -> str:
    if math.isnan(row["criticality"]):
        return "--"
    limits = "" if math.isnan(row["low"]) else f" $[{row['low']:.3f}, {row['high']:.3f}]$"
    return f"${row['criticality']:.3f}${limits}"


def _escaped(text: str) -> str:
    """Return text as LaTeX prints it."""
    return _one_line(text).translate(_ESCAPES)


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
