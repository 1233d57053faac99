"""Proxies over the models of a study: how well each ranks the layers, in the mean over models."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtrit

from layercrit.conditions import under
from layercrit.correlations import spearman
from layercrit.counts import counted
from layercrit.errors import LayercritError, StudyError, near
from layercrit.foreign_text import encodable, write_csv
from layercrit.models.file_source import initial_of_run
from layercrit.named_options import name_list
from layercrit.progress_bar import Bar
from layercrit.proxies.agreement import Agreement, Exact, best_null, verdict
from layercrit.proxies.formulas import PROXIES
from layercrit.proxies.values import N_IMAGES, Proxies, measure_proxies
from layercrit.study.image_tables import distances_of, model_and_images
from layercrit.study.tables import Study, load_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StudyProxies", "hashes_of", "measure_study_proxies"]

_MEANS = ("spearman", "kendall", "difference")  # with intervals over models
_SHARES = ("lowest", "highest")


@dataclass(frozen=True, eq=False, repr=False)
class StudyProxies:
    """Proxies of the models of a study, set against the criticality that was measured.

    Attributes:
        folder: of the study.
        proxies: model -> its proxies.
        agreements: model -> how well they agree with its exact values.
        failed: model -> why it has none.
        level: confidence level of the intervals over models.
        reset: whose criticality it is.
        hashes: model -> the hashes of its ``images`` and ``weights``; None where one is not known.
    """

    folder: Path
    proxies: Mapping[str, Proxies]
    agreements: Mapping[str, Agreement]
    failed: Mapping[str, str]
    level: float
    reset: str
    hashes: Mapping[str, Mapping[str, str | None]]

    @property
    def by_model(self) -> pd.DataFrame:
        """One row per model and proxy, with the columns of `Agreement.table` that need no interval."""
        columns = ["proxy", "label", "null", "n_layers", "spearman", "kendall", *_SHARES]
        parts = [found.table[columns].assign(model=model) for model, found in self.agreements.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["model", *columns]]

    @property
    def by_layer(self) -> pd.DataFrame:
        """One row per model and layer: ``model``, and the columns of `Agreement.by_layer`."""
        parts = [found.by_layer.assign(model=model) for model, found in self.agreements.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["model", *(name for name in table if name != "model")]]

    @property
    def best_null(self) -> str | None:
        """The null whose mean Spearman over models is farthest from 0."""
        return best_null(self._means())

    @property
    def table(self) -> pd.DataFrame:
        """One row per proxy, the highest mean Spearman over models first.

        Columns are those of `Agreement.table`, means over the models in which the proxy can be ranked, ``n_models`` of
        them, with Student's interval for new models. The best null is the same in all models.
        """
        best, models = self.best_null, self.by_model
        if best is None:
            return self._means()
        sign = math.copysign(1, models.loc[models["proxy"] == best, "spearman"].mean())
        models["difference"] = [
            math.nan if row["proxy"] == best else row["spearman"] - sign * self._null_on(row, best)
            for row in models.to_dict("records")
        ]
        return self._means(models)

    @property
    def sentence(self) -> str:
        """Which proxies beat the best null, in words."""
        return f"Over {counted(len(self.agreements), 'model')}: {verdict(self.table, self.best_null, self.level)}"

    def plot(self) -> "Figure":
        """Return the figure: Spearman of each proxy in each model, and its mean."""
        from layercrit.figures.proxies import proxy_ranks

        title = f"{self.folder.name}: rank correlation of proxies with criticality"
        return proxy_ranks(self.by_model, self.table, title=title)

    def to_dict(self) -> dict[str, Any]:
        """Return the tables and what they say as plain data for JSON; None where a number is not known."""
        tables = {"table": self.table, "by_model": self.by_model, "by_layer": self.by_layer}
        rows = {name: json.loads(one.to_json(orient="records", double_precision=15)) for name, one in tables.items()}
        said = {"best_null": self.best_null, "level": self.level, "sentence": self.sentence, "reset": self.reset}
        return {**rows, **said, "hashes": {name: dict(one) for name, one in self.hashes.items()},
                "failed": dict(self.failed)}  # fmt: skip

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``against.csv`` (the table), ``by_model.csv``, and the proxies of each model in a folder of its own.

        ``against.json`` has all of these and the values by layer, for the page of a report.
        """
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(self.table, folder / "against.csv")
            write_csv(self.by_model, folder / "by_model.csv")
            text = json.dumps(encodable(self.to_dict()), ensure_ascii=False, allow_nan=False)
            (folder / "against.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LayercritError(
                f"The proxies cannot be written to {folder} ({error.strerror or error}). Free some space or name "
                "another folder (--out), then save again."
            ) from error
        for number, found in enumerate(self.proxies.values()):
            found.save(folder / f"model-{number:03d}")
        return [folder / "against.csv", folder / "by_model.csv", folder / "against.json"]

    def __repr__(self) -> str:
        return f"<StudyProxies of {self.folder}: {self.sentence}>"

    def _null_on(self, row: Mapping[Any, Any], best: str) -> float:
        """Return the null's Spearman in a model, on the layers to which a proxy applies."""
        values = self.agreements[row["model"]].by_layer
        known = np.isfinite(values[row["proxy"]])
        if known.sum() < 2:
            return math.nan
        return float(spearman(*(values.loc[known, name].to_numpy(np.float64)[None] for name in (best, "exact")))[0])

    def _means(self, models: pd.DataFrame | None = None) -> pd.DataFrame:
        """Return one row per proxy: means over models, with intervals."""
        models = self.by_model if models is None else models
        rows = []
        for name, proxy in PROXIES.items():
            own = models[(models["proxy"] == name) & models["spearman"].notna()]
            row: dict[str, Any] = {"proxy": name, "label": proxy.label, "null": proxy.null, "n_models": len(own)}
            row["n_layers"] = int(own["n_layers"].max()) if len(own) else 0
            for column in (one for one in _MEANS if one in models):
                largest = 2.0 if column == "difference" else 1.0
                row[column], *limits = _interval(own[column], self.level)
                row[f"{column}_low"], row[f"{column}_high"] = np.clip(limits, -largest, largest)
            row |= {column: float(own[column].mean()) for column in _SHARES}
            rows.append(row)
        table = pd.DataFrame(rows)
        return table.sort_values("spearman", ascending=False, kind="stable", na_position="last", ignore_index=True)


def _interval(values: "pd.Series[float]", level: float) -> tuple[float, float, float]:
    """Return the mean of some values and the limits of Student's interval for it; NaN where there is none."""
    known = values.dropna().to_numpy(np.float64)
    mean = float(known.mean()) if known.size else math.nan
    if known.size < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(known.size - 1, (1 + level) / 2) * known.std(ddof=1) / math.sqrt(known.size))
    return mean, mean - half, mean + half


def measure_study_proxies(
    study: Study | str | Path,
    *,
    models: Sequence[str] | None = None,
    reset: str | None = None,
    probe_set: str | None = None,
    trials: int | None = None,
    n_images: int = N_IMAGES,
    initial: str | None = None,
    k: int | None = None,
    level: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> StudyProxies:
    """Measure the proxies of a study's models on its images, and set them against the criticality that it measured.

    Args:
        study: the study, or its folder.
        models: names of those wanted; None: all that have cells, with their final weights and the study's first norm
            statistics.
        reset: its name; None for the study's only or first one.
        probe_set: its name; None: the study's first.
        trials: draws of the reset; None: as many as the study has, 3 at most.
        n_images: how many of the study's images to use, the first ones.
        initial: as for `measure_proxies`; None: a model that is a training run has its own initial weights.
        k: how many layers are lowest, and highest; None: a quarter of them.
        level: confidence level; None: the study's.
        progress: whether to show progress on a terminal.
        settings: ``donor``, ``radius``, ``hessian_images``, ``device``, as for `measure_proxies`.

    Raises:
        StudyError: there is no such study, model, reset or probe set, or no model could be opened.

    Examples:
        >>> import layercrit
        >>> found = layercrit.measure_study_proxies("layercrit-demo/study", models=["baseline", "pixmix"], n_images=8,
        ...                                         trials=1, hessian_images=0)
        >>> list(found.proxies)
        ['baseline', 'pixmix']
    """
    models = None if models is None else name_list(models)
    found = study if isinstance(study, Study) else load_study(study)
    level = found.level if level is None else level
    rows, _ = under(found.models, found.folder, probe_set=probe_set)
    cells = found.cells[found.cells["reset"] == found.of_reset(reset)["reset"].iloc[0]]
    names = [name for name in rows["model"] if name in set(cells["model"])]
    if unknown := [name for name in models or () if name not in names]:
        raise StudyError(f"The study in {found.folder} has no measured model {unknown[0]!r}. {near(unknown[0], names)}")
    proxies: dict[str, Proxies] = {}
    agreements, failed = dict[str, Agreement](), dict[str, str]()
    with Bar(progress) as bar:
        chosen = [row for row in rows.to_dict("records") if row["model"] in (models or names)]
        for number, row in enumerate(chosen):
            bar.measured(number, len(chosen))
            own = cells[cells["model"] == row["model"]]
            how = {
                "trials": min(3, own["trial"].nunique()) if trials is None else trials,
                "initial": initial or initial_of_run(str(row["reference"])),
                **settings,
            }
            try:
                one = _of_model(found, row, str(own["reset"].iloc[0]), n_images, how)
                agreements[row["model"]] = one.against(_exact(found, row, own), k=k, level=level, n_resamples=0)
            except LayercritError as error:
                failed[row["model"]] = str(error)
                bar.say(f"{row['model']}: {error}")
            else:
                proxies[row["model"]] = one
    if not agreements:
        first, text = next(iter(failed.items()), ("none", "it has no measured model"))
        raise StudyError(f"No model of the study in {found.folder} has proxies. The first, {first}: {text}")
    hashes = hashes_of(rows)
    return StudyProxies(
        found.folder,
        proxies,
        agreements,
        failed,
        float(level),
        str(cells["reset"].iloc[0]),
        {name: hashes[name] for name in proxies},
    )


def hashes_of(models: pd.DataFrame) -> dict[str, dict[str, str | None]]:
    """Return model -> the hashes of its ``images`` and ``weights``, of rows of a study's table of models."""
    return {
        str(row["model"]): {"images": row["record"].get("probe_set"), "weights": row["record"].get("sha256")}
        for row in models.to_dict("records")
    }


def _of_model(study: Study, row: Mapping[Any, Any], reset: str, n_images: int, how: Mapping[str, Any]) -> Proxies:
    model, probe_set = model_and_images(study.folder, row)
    protocol = study.record.get("protocol", {})
    asked = {name: protocol[name] for name in ("layers", "types", "group", "seed") if name in protocol}
    return measure_proxies(model, probe_set.first(n_images), reset=reset, progress=False, **asked, **how)


def _exact(study: Study, row: Mapping[Any, Any], cells: pd.DataFrame) -> Exact:
    """Return what a study measured of one model under one reset; resets that change nothing have 0."""
    layers, n_trials = list(dict.fromkeys(cells["layer"])), 1 + int(cells["trial"].max())
    distances: npt.NDArray[np.float32] = np.full(
        (len(layers), n_trials, int(cells["n_images"].max())), np.nan, np.float32
    )
    for number, (layer, values) in enumerate(distances_of(study.folder, cells)):
        own = cells[cells["layer"] == layer]
        distances[number, np.sort(own.loc[own["status"] == "ok", "trial"])] = values
        distances[number, own.loc[own["status"] == "unchanged", "trial"]] = 0
    seeds = cells.drop_duplicates("trial").sort_values("trial")["seed"]
    is_random = row["record"].get("random_trials", {}).get(cells["reset"].iloc[0], True)
    return Exact(tuple(layers), distances, row["record"]["probe_set"], tuple(map(int, seeds)), bool(is_random))
