"""The tables of the module criticality of a study's models, put together from what is kept of each."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from layercrit.conditions import under
from layercrit.errors import LayercritError, StudyError
from layercrit.foreign_files import read_json
from layercrit.foreign_text import encodable, write_csv
from layercrit.locks import write_whole
from layercrit.module_criticality.values import ASKED, ModuleCriticality
from layercrit.study.image_tables import probe_set_of
from layercrit.study.status import MODULES, RESULT
from layercrit.study.tables import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "OF_ALL",
    "StudyModuleCriticality",
    "digests",
    "how_far",
    "load_study_module_criticality",
    "read_left_out",
    "read_result",
    "result_folder",
    "unlike_in",
    "unlike_the_study",
    "write_left_out",
]

OF_ALL = ("n_images", *ASKED)
"""Of what identifies a result: that which all models of a table have in common."""

_TABLE, _MODELS, _ABOUT = "modules", "models", "of-study.json"
_IDENTITY = {"weights", "initial weights", "architecture", "output", "normalisation", "images", *OF_ALL}


@dataclass(frozen=True, eq=False, repr=False)
class StudyModuleCriticality:
    """The module criticality of the models of a study.

    Attributes:
        folder: of the study.
        found: model -> its module criticality, in the order of the study.
        left_out: model -> why it has none.
    """

    folder: Path
    found: Mapping[str, ModuleCriticality]
    left_out: Mapping[str, str]

    @property
    def table(self) -> pd.DataFrame:
        """One row per model and module: ``model``, and the columns of `ModuleCriticality.to_pandas`."""
        parts = [one.to_pandas().assign(model=model) for model, one in self.found.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["model", *(name for name in table if name != "model")]]

    @property
    def by_model(self) -> pd.DataFrame:
        """One row per model, those left out last.

        ``sum`` is that of its modules, ``n_modules_in_sum`` of ``n_modules``, for ranking networks of one
        architecture; ``loss``, ``allowed_loss`` and ``top1_accuracy`` are those of the trained network; ``left_out``
        says why a model has none of these.
        """
        names = ["sum", "n_modules_in_sum", "n_modules", "loss", "allowed_loss", "top1_accuracy", "n_images"]
        rows: list[dict[str, Any]] = [
            {"model": model, **{name: one.summary()[name] for name in names}, "left_out": ""}
            for model, one in self.found.items()
        ]
        rows += [{"model": model, "left_out": why} for model, why in self.left_out.items()]
        table = pd.DataFrame(rows, columns=["model", *names, "left_out"])
        return table.astype({"sum": "float64", "n_modules_in_sum": "Int64", "n_modules": "Int64", "n_images": "Int64"})

    def values(self, models: Sequence[str] | None = None) -> pd.DataFrame:
        """Return module criticality as models x modules; NaN: not measured.

        Args:
            models: the rows; None: those of the study that have some.
        """
        table = self.table
        wide = table.set_index(["model", "layer"])["module_criticality"].unstack("layer")  # noqa: PD010
        return wide.reindex(index=list(self.found if models is None else models), columns=table["layer"].unique())

    def plot(self) -> "Figure":
        """Return the heat map of models and modules."""
        from layercrit.figures.heat_maps import module_criticality_map

        about = {"label": None, "category": None, "accuracy": math.nan}
        models = pd.DataFrame({"model": list(self.found)}).assign(**about)
        return module_criticality_map(self.values(), models, title=self.folder.name)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the tables of modules and of models as CSV and Parquet, and the figure; return the files.

        Raises:
            LayercritError: the folder cannot be written.
        """
        from layercrit.figures.style import save_figure

        folder = Path(folder).expanduser()
        files = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in ((_TABLE, self.table), (_MODELS, self.by_model)):
                files += [folder / f"{name}.csv", folder / f"{name}.parquet"]
                write_csv(table, files[-2])
                table.to_parquet(files[-1], index=False, compression="zstd")
            return [*files, *save_figure(self.plot(), folder / MODULES)]
        except OSError as error:
            raise LayercritError(
                f"The module criticality of the study cannot be written to {folder} ({error.strerror or error}). Free "
                "some space or name another folder (--out), then run it again: what has been measured is kept."
            ) from error

    def __repr__(self) -> str:
        return f"<StudyModuleCriticality of {self.folder}: {len(self.found)} models, {len(self.left_out)} left out>"


def how_far(study: Study) -> dict[str, Any]:
    """Return how far the module criticality of a study is, as plain data.

    ``asked`` is whether the study file asks for it, ``measured`` names the models that have it, ``left_out`` says why
    others have none, and ``mistake`` why there are no tables, or none of what is asked for.
    """
    of_file = study.record.get("module_criticality")
    about: dict[str, Any] = {"asked": of_file is not None, "measured": [], "left_out": {}, "mistake": ""}
    if not any((study.folder / MODULES).glob(f"*/{RESULT}")):
        return about | {"left_out": read_left_out(study.folder / MODULES)}
    try:
        found = load_study_module_criticality(study, probe_set=(of_file or {}).get("probe_set"))
    except StudyError as error:
        return about | {"mistake": str(error)}
    if of_file is not None:
        there = next(iter(found.found.values())).record["asked"]
        asked = {"excess": None, **of_file}
        if unlike := unlike_in(there, asked, there.keys() & asked.keys()):
            about["mistake"] = (
                f"it is of other settings than the study file asks for ({', '.join(sorted(unlike))}). Measure it "
                f"again: `layercrit module-criticality {study.folder} --overwrite`"
            )
    return about | {"measured": list(found.found), "left_out": dict(found.left_out)}


def load_study_module_criticality(
    study: Study, folder: str | Path | None = None, probe_set: str | None = None
) -> StudyModuleCriticality:
    """Return the module criticality that was measured of a study's models.

    Models that the study has measured with other weights, images or normalisation since are left out, and so are those
    whose results are damaged.

    Args:
        study: the study.
        folder: where the results are; None: ``module-criticality`` in the study's folder.
        probe_set: the name of the images; None: the study's first.

    Raises:
        StudyError: none was measured, or models were measured with different settings.
    """
    where = study.folder / MODULES if folder is None else Path(folder).expanduser()
    found: dict[str, ModuleCriticality] = {}
    identities: dict[str, Mapping[str, Any]] = {}
    why = read_left_out(where)
    left_out = dict[str, str]()
    digest_of = digests(study)
    for row in under(study.models, study.folder, probe_set=probe_set)[0].to_dict("records"):
        model, own = row["model"], result_folder(where, row["model"])
        if (own / RESULT).is_file():
            try:
                identity, one = read_result(own)
            except LayercritError as error:
                left_out[model] = str(error)
                continue
            if unlike := unlike_the_study(identity, row["record"], digest_of):
                left_out[model] = (
                    f"the study has it with other {unlike} now than when it was measured; measure it again"
                )
            else:
                identities[model], found[model] = identity, one
        elif model in why:
            left_out[model] = why[model]
    if not found:
        first = next(iter(left_out.items()), None)
        raise StudyError(
            f"No module criticality of the study in {study.folder} is in {where}. Measure it with `layercrit "
            f"module-criticality {study.folder}`.{'' if first is None else f' {first[0]}: {first[1]}'}"
        )
    (first_model, one_identity), *others = identities.items()
    for model, identity in others:
        if unlike := ", ".join(unlike_in(one_identity, identity, OF_ALL)):
            raise StudyError(
                f"The module criticality of {first_model!r} and of {model!r} in {where} is of other settings "
                f"({unlike}), and cannot be in one table. Measure all models with the same ones: `layercrit "
                f"module-criticality {study.folder} --overwrite`."
            )
    return StudyModuleCriticality(study.folder, found, left_out)


def digests(study: Study) -> Callable[[Mapping[str, Any], int], str | None]:
    """Return a function from a model's record and a number of images to the hash of the first of its images."""
    known: dict[tuple[Any, int], str | None] = {}

    def digest_of(record: Mapping[str, Any], n_images: int) -> str | None:
        what = record.get("probe_set"), n_images
        if what not in known:
            images = probe_set_of(study.folder, record)
            known[what] = None if images is None else images.first(n_images).sha256
        return known[what]

    return digest_of


def unlike_the_study(
    identity: Mapping[str, Any], record: Mapping[str, Any], digest_of: Callable[[Mapping[str, Any], int], str | None]
) -> str:
    """Return in what the study's model is another one now than that which was measured; empty where in nothing."""
    now = {
        "weights": record.get("sha256"),
        "architecture": record.get("architecture"),
        "normalisation": [record["mean"], record["std"]] if "mean" in record and "std" in record else None,
        "images": digest_of(record, identity["n_images"]),  # None: a merged study has them in its parts
    }
    known = {name: value for name, value in now.items() if value is not None or name == "weights"}
    return ", ".join(unlike_in(identity, known, known))


def unlike_in(one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the names of what is not the same in two identities."""
    return [name for name in names if one.get(name) != other.get(name)]


def read_result(folder: Path) -> tuple[Mapping[str, Any], ModuleCriticality]:
    """Return what a result is of, and the result.

    Raises:
        LayercritError: there is none, or a damaged one.
    """
    found = ModuleCriticality.load(folder)
    try:
        identity = read_json(folder / RESULT)
        if isinstance(identity, dict) and not _IDENTITY - identity.keys() and isinstance(identity["n_images"], int):
            return identity, found
        what = "is no record of what was measured"
    except (OSError, ValueError) as error:
        what = str(error)
    raise LayercritError(
        f"The module criticality in {folder} is damaged ({RESULT}: {what}). Measure it again: `layercrit "
        "module-criticality` of the study."
    )


def result_folder(where: Path, model: str) -> Path:
    """Return the folder of a model's result: readable, and its own on any file system."""
    readable = re.sub(r"[^A-Za-z0-9.=+-]+", "-", model).strip("-.")[:60]
    return where / f"{readable}-{hashlib.sha256(model.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def write_left_out(where: Path, left_out: Mapping[str, str]) -> None:
    """Keep why models have no result."""
    write_whole(where / _ABOUT, json.dumps(encodable({"left_out": left_out}), ensure_ascii=False))


def read_left_out(where: Path) -> dict[str, str]:
    """Return why models had no result when it was asked for last."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {str(model): str(why) for model, why in read_json(where / _ABOUT)["left_out"].items()}
    return {}
