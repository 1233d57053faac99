"""Compare many models: how critical their layers are, relative to a baseline, and against accuracy."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from layercrit.categories import ADVERSARIAL
from layercrit.common_layers import in_order_of_depth, means_of_cells, with_common_layers
from layercrit.compared_studies import (
    ComparedStudy,
    about_bad,
    about_formats,
    about_missing,
    about_other_conditions,
    listed_names,
)
from layercrit.conditions import Condition, under
from layercrit.correlations import rank_correlations
from layercrit.counts import counted
from layercrit.errors import StudyError, near
from layercrit.named_options import name_list
from layercrit.protocol import MATCHED
from layercrit.wrappers import wrapper_of

__all__ = [
    "Comparison",
    "about_models",
    "accuracy_of",
    "cells_of",
    "compare",
    "compare_models",
    "compared_rows",
    "estimates_of",
    "has_sets",
    "layers_as_compared",
]

_CAUTION = (
    "The cosine depends on how peaked a model's softmax is, and differently trained models are compared without "
    "temperature-matched values: part of a difference may be confidence, not reliance on layers."
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The models of a study under one reset, over the layers that all of them have.

    Tables of models x layers have a row per compared model in the order of the study and a column per layer in the
    order of depth. A layer some of whose cells are not ok is NaN there, left out of its model's means, and named in
    `notes`.

    Attributes:
        criticality: models x layers; 1 minus the mean cosine similarity over trials and images, in [0, 1].
        difference: models x layers, criticality minus that of the baseline; None without a baseline.
        sd_trials: models x layers, standard deviation (ddof 1) of criticality over trials; NaN with one trial.
        depth: models x layers, position of a layer among the compared ones, from 0.
        models: one row per model: ``label``, ``category``, ``accuracy`` (a share in [0, 1]), ``criticality`` (mean over
            layers), ``criticality_matched`` (the same at the matched temperature; NaN where not measured),
            ``difference`` (mean over layers that the baseline has too), ``centre_of_mass`` and ``n_layers``. The centre
            of mass is sum(share * criticality) / sum(criticality), with share = 0 for the first layer to 1 for the
            last: below 0.5, criticality sits in early layers.
        layers: one row per layer: ``stage`` and ``criticality`` (mean over models).
        categories: one row per category: ``n_models`` and ``criticality`` (mean over its models).
        stages: models x stages, mean criticality over the layers of a stage.
        correlations: of mean criticality with accuracy, over all models and without each category in turn, as
            `layercrit.correlations.rank_correlations` returns them.
        accuracy: ``documented`` (as the authors give it) or ``measured`` (top-1 on the probe set).
        reset: what replaced the parameters.
        baseline: name of the model that the others are compared with, or None.
        condition: probe set, norm statistics and epoch of the models; None where they are not all the same.
        left_out: names of models that were left out on request.
        caution: what to bear in mind about differences between categories, or None.
        notes: what else readers should know, in plain words.
        origin: where the cells come from: ``source`` and ``sha256`` (None for measured ones), ``rows``,
            ``models_in_file`` and ``trials``.
    """

    criticality: pd.DataFrame
    difference: pd.DataFrame | None
    sd_trials: pd.DataFrame
    depth: pd.DataFrame
    models: pd.DataFrame
    layers: pd.DataFrame
    categories: pd.DataFrame
    stages: pd.DataFrame
    correlations: pd.DataFrame
    accuracy: str
    reset: str
    baseline: str | None
    condition: Condition | None
    left_out: tuple[str, ...]
    caution: str | None
    notes: tuple[str, ...]
    origin: Mapping[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per (model, layer): ``criticality``, ``difference``, ``sd_trials``, ``category`` and so on."""
        n_models, n_layers = self.criticality.shape
        absent = np.full((n_models, n_layers), math.nan)
        return pd.DataFrame(
            {
                "model": np.repeat(self.criticality.index.to_numpy(), n_layers),
                "category": np.repeat(self.models["category"].to_numpy(), n_layers),
                "layer": np.tile(self.criticality.columns.to_numpy(), n_models),
                "stage": np.tile(self.layers["stage"].to_numpy(), n_models),
                "depth": self.depth.to_numpy().ravel(),
                "criticality": self.criticality.to_numpy().ravel(),
                "difference": (absent if self.difference is None else self.difference.to_numpy()).ravel(),
                "sd_trials": self.sd_trials.to_numpy().ravel(),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as one JSON object; None stands for what is not known.

        Values are in percent where the key ends in ``percent`` or contains ``percent_by``, else shares.
        """
        adversarial = ADVERSARIAL in set(self.categories.index)
        spread = pd.Series(self.sd_trials.to_numpy().ravel())
        percent = {
            f"mean_criticality_percent_by_{name}": _plain(100 * table["criticality"])
            for name, table in (("category", self.categories), ("model", self.models), ("layer", self.layers))
        }
        return {
            **self.origin,
            "models_in_figures": len(self.models),
            "layers": len(self.layers),
            **{f"{method}_all": self._correlation(None, method) for method in ("spearman", "kendall")},
            **{
                f"{method}_without_adversarial": self._correlation(ADVERSARIAL, method) if adversarial else None
                for method in ("spearman", "kendall")
            },
            "mean_of_cell_std_percent": _number(100 * spread.mean()),
            "max_of_cell_std_percent": _number(100 * spread.max()),
            **percent,
            "baseline": self.baseline,
            "reset": self.reset,
            "condition": None if self.condition is None else asdict(self.condition),
            "accuracy": self.accuracy,
            "correlations": [
                {"without": without, "method": method, **_plain(row)}
                for (without, method), row in self._correlation_rows()
            ],
            "models": {str(name): _plain(row) for name, row in self.models.iterrows()},
            "criticality_by_model_and_stage": {str(name): _plain(row) for name, row in self.stages.iterrows()},
            "difference_by_model_and_layer": None
            if self.difference is None
            else {str(name): _plain(row) for name, row in self.difference.iterrows()},
            "stage_by_layer": _plain(self.layers["stage"]),
            "left_out": list(self.left_out),
            "caution": self.caution,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        against = f", baseline {self.baseline}" if self.baseline else ""
        return f"<Comparison of {len(self.models)} models over {counted(len(self.layers), 'layer')}{against}>"

    def _correlation_rows(self) -> list[tuple[tuple[str | None, str], pd.Series]]:
        table = self.correlations
        keys = zip(table["without"], table["method"], strict=True)
        rows = table[["statistic", "pvalue", "n"]].astype({"n": object}).iterrows()
        return [(key, row) for key, (_, row) in zip(keys, rows, strict=True)]

    def _correlation(self, without: str | None, method: str) -> dict[str, Any]:
        rows = dict(self._correlation_rows())
        return {str(name): value for name, value in _plain(rows[without, method]).items()}


def compare(
    study: ComparedStudy,
    *,
    baseline: str | None = None,
    leave_out: Sequence[str] | None = None,
    reset: str | None = None,
    probe_set: str | None = None,
    norm_statistics: str | None = None,
    epoch: int | None = None,
) -> Comparison:
    """Compare the models of a study.

    Args:
        study: a `layercrit.study.tables.Study`, finished or not; models without a finished cell are named in the notes.
        baseline: the model that the others are compared with. None: the study's own, if it names one.
        leave_out: categories, or names of models. None: those that the study names; an empty list: none.
        reset: None for the study's only or first one.
        probe_set: which of the study's probe sets the models were shown; None: the first.
        norm_statistics: what became of running statistics beside the reset; None: what the study names first.
        epoch: of the models' training runs; None: their final weights.

    Raises:
        StudyError: this is no study, but such as its folder; a name is unknown, no model is left, or the models have no
            layer in common.

    Examples:
        >>> import layercrit
        >>> comparison = layercrit.compare(layercrit.load_study("layercrit-demo/study"))
        >>> comparison.baseline, comparison.models["criticality"].idxmax()
        ('baseline', 'baseline')
    """
    if not hasattr(study, "by_model"):
        raise StudyError(
            f"compare takes a study, not a {type(study).__name__}. Open the folder of one: layercrit.load_study(DIR)."
        )
    models, condition = under(
        study.models, study.folder, probe_set=probe_set, norm_statistics=norm_statistics, epoch=epoch
    )
    return compare_models(study, models, condition, baseline=baseline, leave_out=leave_out, reset=reset)


def compare_models(
    study: ComparedStudy,
    chosen_models: pd.DataFrame,
    condition: Condition | None,
    *,
    baseline: str | None = None,
    leave_out: Sequence[str] | None = None,
    reset: str | None = None,
) -> Comparison:
    """Compare some rows of a study's models as `compare` does; ``condition`` is what they have in common, if any."""
    # where a model is named, its variant under this condition is meant
    listed = list(chosen_models["model"])
    names = {str(of or name): str(name) for name, of in zip(listed, chosen_models["variant_of"], strict=True)}
    for name, of in zip(study.models["model"], study.models["variant_of"], strict=True):
        names.setdefault(str(name), names.get(str(of or name), str(name)))
    ok = study.of_reset(reset)
    used = str(ok["reset"].iloc[0])
    cells = study.cells[study.cells["reset"] == used]
    own = study.record.get("leave_out", [])
    left_out = _left_out(study, names, own if leave_out is None else name_list(leave_out))
    usable = set(ok["model"])
    compared = [name for name in listed if name not in left_out and name in usable]
    if not compared:
        raise StudyError(f"No model of the study in {study.folder} is left to compare. Leave out fewer models.")
    notes = [*study.record.get("notes", []), *about_missing(study, listed, cells, used, left_out)]
    if condition is not None:
        notes += about_other_conditions(study, chosen_models, condition, left_out)
    chosen, about_baseline = _baseline(study, names, baseline, compared)
    first = chosen or compared[0]  # names and order of layers are its
    cells, about_layers = with_common_layers(cells[cells["model"].isin(compared)], first)
    grid = means_of_cells(cells)
    layers = in_order_of_depth(cells, first)
    tables = {
        name: grid[name].unstack("layer").reindex(index=compared, columns=layers).rename_axis("model")  # noqa: PD010
        for name in ("cosine", MATCHED, "sd", "depth", "n_bad")
    }
    criticality = tables["cosine"]
    difference = None if chosen is None else criticality - criticality.loc[chosen]
    depth = tables["depth"].rank(axis=1, method="first").astype(int) - 1
    stages = grid["stage"].xs(first, level="model").reindex(layers)
    # sets of layers of several stages have no place between the first layer and the last
    places = depth * math.nan if has_sets(study) and stages.isna().any() else depth
    models, kind, about_accuracy = _models(study, criticality, tables[MATCHED], difference, places)
    unlike = len(set(models["category"])) > 1 and models["criticality_matched"].isna().any()
    return Comparison(
        criticality=criticality,
        difference=difference,
        sd_trials=tables["sd"],
        depth=depth,
        models=models,
        layers=pd.DataFrame({"stage": stages, "criticality": criticality.mean()}),
        categories=models.groupby("category").agg(
            n_models=("criticality", "size"), criticality=("criticality", "mean")
        ),
        stages=criticality.T.groupby(stages, sort=False).mean().T,
        correlations=rank_correlations(models),
        accuracy=kind,
        reset=used,
        baseline=chosen,
        condition=condition,
        left_out=tuple(name for name in listed if name in left_out),
        caution=_CAUTION if unlike else None,
        notes=(
            *about_layers,
            *notes,
            *about_baseline,
            *about_formats(study, compared),
            *about_bad(cells, tables["n_bad"]),
            *about_accuracy,
        ),
        origin=_origin(study, used, compared),
    )


def _left_out(study: ComparedStudy, names: Mapping[str, str], given: Sequence[str]) -> set[str]:
    """Return the models in a list of categories and models, under whichever conditions they were measured."""
    of_category = {str(name): list(members) for name, members in study.models.groupby("category")["model"]}
    known = {**{name: name for name in names.values()}, **names}
    found: set[str] = set()
    for name in given:
        if name not in known and name not in of_category:
            raise StudyError(
                f"The study in {study.folder} has no model or category {name!r} to leave out. "
                f"{near(name, [*of_category, *known])}"
            )
        found.update(of_category.get(name, []) if name not in known else [known[name]])
    return found


def _baseline(
    study: ComparedStudy, names: Mapping[str, str], asked: str | None, compared: Sequence[str]
) -> tuple[str | None, list[str]]:
    """Return the baseline, and a note where the study's own cannot be used."""
    known = [*dict.fromkeys([*names, *names.values()])]
    if asked is not None and asked not in known:
        raise StudyError(f"The study in {study.folder} has no model {asked!r}. {near(asked, known)}")
    asked = asked and names.get(asked, asked)
    if asked is not None and asked not in compared:
        raise StudyError(
            f"The baseline {asked!r} is left out or has no finished cell. Name another one; compared are: "
            f"{listed_names(compared)}."
        )
    own = study.record.get("baseline")
    own = own and names.get(own, own)
    if asked is None and own is not None and own not in compared:
        return None, [f"There are no differences to the baseline {own}, since it is left out or has no finished cell."]
    return asked or own, []


def _models(
    study: ComparedStudy,
    criticality: pd.DataFrame,
    matched: pd.DataFrame,
    difference: pd.DataFrame | None,
    depth: pd.DataFrame,
) -> tuple[pd.DataFrame, str, list[str]]:
    """Return the table of models, which accuracy is in it, and notes about that."""
    about = study.models.set_index("model").loc[criticality.index]
    kind, accuracy = accuracy_of(about)
    whole = criticality.notna() & matched.notna()
    weights = criticality.fillna(0.0)
    shares = depth / (depth.shape[1] - 1) if depth.shape[1] > 1 else depth * math.nan
    total = weights.sum(axis=1)
    table = pd.DataFrame(
        {
            "label": about["label"],
            "category": about["category"].astype(object).where(about["category"].notna(), None),
            "accuracy": accuracy,
            "criticality": criticality.mean(axis=1),
            "criticality_matched": matched.mean(axis=1).where((whole == criticality.notna()).all(axis=1)),
            "difference": math.nan if difference is None else difference.mean(axis=1),
            "centre_of_mass": (shares * weights).sum(axis=1, min_count=1) / total.where(total > 0),
            "n_layers": criticality.notna().sum(axis=1),
        }
    )
    unknown = accuracy.index[accuracy.isna()]
    if len(unknown) == len(accuracy):
        return table, kind, ["No accuracy is known, so there are no correlations with it."]
    if len(unknown):
        return (
            table,
            kind,
            [f"Not in the correlations, since their {kind} accuracy is not known: {listed_names(unknown)}."],
        )
    return table, kind, []


def has_sets(study: ComparedStudy) -> bool:
    """Return whether a study resets sets of layers, which may reach over several stages."""
    return bool(study.record.get("protocol", {}).get("sets", "each") != "each")


def accuracy_of(models: pd.DataFrame) -> tuple[str, pd.Series]:
    """Return which accuracy is known of all models, or of most of them, and its values, shares in [0, 1].

    It is ``documented`` (as the authors give it) or ``measured`` (top-1 on the probe set), the former where both are.

    Args:
        models: rows of `layercrit.study.tables.Study.models`.
    """
    choices = {"documented": models["documented_accuracy"], "measured": models["top1_accuracy"]}
    kind = max(choices, key=lambda name: int(choices[name].notna().sum()))
    return kind, choices[kind].astype("float64")


def about_models(study: ComparedStudy, comparison: Comparison) -> pd.DataFrame:
    """Return one row per compared model, for figures and tables, with everything known about it.

    Columns are those of `Comparison.models`, ``model`` (its name), ``low`` and ``high`` (limits of its mean; NaN where
    not all of its layers are compared), ``chance``, ``attack_norm`` and ``eps``. The order is that of the study, but
    for adversarially trained models, which are sorted by norm and eps among themselves.

    Args:
        study: the one that was compared.
        comparison: of its models.
    """
    means = study.by_model()
    means = means[means["reset"] == comparison.reset].set_index("model").reindex(comparison.models.index)
    whole = means["n_layers"] == comparison.models["n_layers"]
    table = comparison.models.assign(
        low=means["low"].where(whole),
        high=means["high"].where(whole),
        **{column: means[column] for column in ("chance", "attack_norm", "eps")},
    ).reset_index(names="model")
    trained = table["attack_norm"].notna() & table["eps"].notna()
    order = table.index.to_numpy().copy()
    order[trained] = table[trained].sort_values(["attack_norm", "eps"], kind="stable").index
    return table.loc[order].reset_index(drop=True)


def estimates_of(study: ComparedStudy, comparison: Comparison) -> pd.DataFrame:
    """Return those rows of `Study.to_pandas` that a comparison of the study compares, under its names of layers."""
    return compared_rows(study.to_pandas(), comparison)


def cells_of(study: ComparedStudy, comparison: Comparison) -> pd.DataFrame:
    """Return those cells of a study that a comparison of it compares, of any status, under its names of layers."""
    return compared_rows(study.cells, comparison)


def compared_rows(rows: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """Return those rows of any table of a study's models and layers that a comparison compares, as it names layers."""
    rows = rows[(rows["reset"] == comparison.reset) & rows["model"].isin(comparison.criticality.index)]
    return layers_as_compared(rows, list(comparison.criticality.columns))


def layers_as_compared(rows: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    """Return the rows of some layers, which models may have under names with a wrapper."""
    wanted = set(layers)
    names = {}
    for model, own in rows.groupby("model", sort=False, observed=True)["layer"].unique().items():
        wrapper = "" if wanted <= set(own) else wrapper_of(own)
        names.update({(model, name): name.removeprefix(wrapper) for name in own})
    rows = rows.assign(layer=[names[pair] for pair in zip(rows["model"], rows["layer"], strict=True)])
    return rows[rows["layer"].isin(wanted)].reset_index(drop=True)


def _origin(study: ComparedStudy, reset: str, compared: Sequence[str]) -> dict[str, Any]:
    cells = study.cells[study.cells["reset"] == reset]
    origin = study.record.get("origin", {})
    return {
        "source": origin.get("source"),
        "sha256": origin.get("sha256"),
        "rows": len(cells),
        "models_in_file": int(cells["model"].nunique()),
        "trials": int(cells["trial"].nunique()),
        "fewest_trials": int(cells[cells["model"].isin(compared)].groupby(["model", "layer"])["trial"].nunique().min()),
    }


# --- plain data -------------------------------------------------------------------------------------------------------


def _plain(values: pd.Series) -> dict[Hashable, Any]:
    """Return a column or row as JSON can hold it."""
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
