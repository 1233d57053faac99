"""The figures of a study by name: how one is registered, and those that come with layercrit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from layercrit.categories import ADVERSARIAL
from layercrit.cell_columns import WHOLE
from layercrit.comparison import Comparison, has_sets
from layercrit.errors import ProbeError, StudyError
from layercrit.figures.accuracy import criticality_against_accuracy
from layercrit.figures.bars import criticality_bars
from layercrit.figures.budget import criticality_against_budget
from layercrit.figures.categories import labels_of, shown
from layercrit.figures.class_maps import class_map
from layercrit.figures.depth import criticality_over_depth
from layercrit.figures.heat_maps import difference_map, heat_map, module_criticality_map, spread_map
from layercrit.figures.rankings import ranking
from layercrit.registry import Registry, summary_of
from layercrit.reporting.whom import class_table
from layercrit.study.module_tables import load_study_module_criticality
from layercrit.study.tables import Study
from layercrit.wrappers import wrapper_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "Drawn", "FigureFunction", "FigureKind", "Tables", "figure"]


@dataclass(frozen=True)
class Tables:
    """What figures are plotted from.

    Attributes:
        comparison: of the models.
        models: one row per model, as `about_models` returns it.
        rows: one row per model and layer, as `estimates_of` returns it.
        labels: name of a layer -> its label in figures.
        profiles: the models that have a figure of their own -> their names in its file names.
        study: the study.
        others: the comparisons under the study's other conditions.
    """

    comparison: Comparison
    models: pd.DataFrame
    rows: pd.DataFrame
    labels: dict[str, str]
    profiles: dict[str, str]
    study: Study
    others: Sequence[Comparison] = ()

    @property
    def stages(self) -> dict[str, str]:
        """Name of a layer -> its stage, where that is known."""
        stages = self.comparison.layers["stage"].dropna()
        wrapper = wrapper_of(stages)
        return {str(layer): str(stage).removeprefix(wrapper) for layer, stage in stages.items()}

    def grid(self, values: "pd.Series[float]") -> pd.DataFrame:
        """Return values, one per row of ``rows``, as models x layers."""
        table = values.set_axis(pd.MultiIndex.from_frame(self.rows[["model", "layer"]])).unstack("layer")  # noqa: PD010
        return table.reindex(index=self.comparison.criticality.index, columns=self.comparison.criticality.columns)


Drawn = Iterator[tuple[str, "Figure"]]
"""Names of files without their format, each with what is in it."""

FigureFunction = Callable[[Tables], Drawn]


@dataclass(frozen=True)
class FigureKind:
    """A registered figure.

    Attributes:
        name: what it is called on the command line.
        function: plots it.
        on_page: whether the page shows it as it is; the page has its own form of most figures.
        summary: one line for tables.
    """

    name: str
    function: FigureFunction
    on_page: bool
    summary: str


FIGURES = Registry[FigureKind]("figure", StudyError, "layercrit.figures", summary=lambda figure: figure.summary)
"""All figures by name, filled by `figure` and by installed plug-ins."""


def figure(name: str, *, on_page: bool = False) -> Callable[[FigureFunction], FigureFunction]:
    """Register a function that plots a figure of a study; the first line of its docstring says what it shows.

    It is passed `Tables` and yields pairs: the name of a file without its format, which is ``name`` or begins with it,
    and a matplotlib figure. Where the study has not what it shows, it raises a `StudyError` that says so.

    Args:
        name: what it is called on the command line.
        on_page: whether the page shows it, too, as a picture.

    Raises:
        StudyError: the name is taken or not valid.

    Examples:
        >>> import layercrit
        >>> @layercrit.figure("means")
        ... def means(tables):
        ...     '''Mean criticality of each model.'''
        ...     axes = tables.models.plot.barh(x="label", y="criticality")
        ...     yield "means", axes.figure
        >>> report = layercrit.report(layercrit.load_study("layercrit-demo/study"), "own", figures=["means"])
        >>> [path.name for path in report.figures["means"]]
        ['means.pdf', 'means.png', 'means.svg']
    """

    def register(function: FigureFunction) -> FigureFunction:
        FIGURES[name] = FigureKind(name, function, on_page, summary_of(function))
        return function

    return register


# --- figures ----------------------------------------------------------------------------------------------------------


@figure("criticality")
def _criticality(tables: Tables) -> Drawn:
    """Heat map of models and layers."""
    values = tables.comparison.criticality
    yield "criticality", heat_map(values, tables.models, layer_labels=tables.labels, stages=tables.stages)


@figure("difference")
def _difference(tables: Tables) -> Drawn:
    """Heat map of differences to the baseline."""
    values = tables.comparison.difference
    if values is None:
        raise StudyError("There is no baseline to compare the models with. Name one with --baseline.")
    if not values.notna().any(axis=None):
        raise StudyError(
            f"No layer of the baseline {tables.comparison.baseline} has only cells that are ok. Name another baseline."
        )
    yield "difference", difference_map(values, tables.models, layer_labels=tables.labels, stages=tables.stages)


@figure("conditions")
def _conditions(tables: Tables) -> Drawn:
    """Heat map of the study's conditions and layers, means over the models that all of them have."""
    comparisons = [one for one in (tables.comparison, *tables.others) if one.condition is not None]
    conditions = [one.condition for one in comparisons if one.condition is not None]
    if len(conditions) < 2:
        raise StudyError(
            "The study has one condition only: one probe set, one kind of norm statistics, and no epochs. Name several "
            "in the study file."
        )
    names = [condition.label(conditions) for condition in conditions]
    layers = tables.comparison.criticality.columns
    about = tables.study.models.set_index("model")
    own = about["variant_of"].fillna(about.index.to_series()).to_dict()
    of_each = [one.criticality.rename(index=own) for one in comparisons]
    common = sorted(set.intersection(*(set(values.index) for values in of_each)))
    if not common:
        raise StudyError("No model is compared under all conditions of the study, so their means cannot be.")
    values = pd.DataFrame([one.loc[common].mean().reindex(layers) for one in of_each], index=names)
    measured = [about["top1_accuracy"].loc[one.criticality.index].rename(index=own) for one in comparisons]
    accuracies = [one.loc[common].mean() for one in measured]
    rows = pd.DataFrame({"model": names, "label": None, "category": None, "accuracy": accuracies})
    yield "conditions", heat_map(values, rows, layer_labels=tables.labels, stages=tables.stages, rows="conditions")


@figure("spread")
def _spread(tables: Tables) -> Drawn:
    """Heat maps of the standard deviation over trials and of the half-width of the interval."""
    half = tables.grid(tables.rows["half_width"].where(tables.rows["status"].isin(WHOLE)))
    wanted = {
        "spread": (tables.comparison.sd_trials, "SD over trials"),
        "half_width": (half, "half-width of the interval"),
    }
    known = {name: one for name, one in wanted.items() if one[0].notna().any(axis=None)}
    if not known:
        raise StudyError("There is only one trial, so neither a spread over trials nor an interval is known.")
    for name, (values, quantity) in known.items():
        yield (
            name,
            spread_map(values, tables.models, quantity=quantity, layer_labels=tables.labels, stages=tables.stages),
        )


@figure("accuracy")
def _accuracy(tables: Tables) -> Drawn:
    """Mean criticality against accuracy, with rank correlations."""
    if not tables.models[["accuracy", "criticality"]].notna().all(axis=1).any():
        raise StudyError("No accuracy is known. Give it in the study file, or labels with the images.")
    rows = tables.comparison.correlations
    wanted = rows["without"].isna() | (rows["without"] == ADVERSARIAL)
    yield "accuracy", criticality_against_accuracy(tables.models, correlations=rows[wanted])


@figure("budget")
def _budget(tables: Tables) -> Drawn:
    """Mean criticality against the budget of adversarial training, by norm."""
    if not tables.models[["attack_norm", "eps", "criticality"]].notna().all(axis=1).any():
        raise StudyError("No model has a budget of adversarial training. Give attack_norm and eps in the study file.")
    yield "budget", criticality_against_budget(tables.models, baseline=tables.comparison.baseline)


@figure("depth")
def _depth(tables: Tables) -> Drawn:
    """Criticality over depth, a line for each category."""
    if tables.comparison.layers["stage"].isna().any() and has_sets(tables.study):
        raise StudyError("Sets of layers of several stages have no depth. Leave the figure out, or measure each layer.")
    values = tables.comparison.criticality
    labels, baseline = tables.labels, tables.comparison.baseline
    yield (
        "depth",
        criticality_over_depth(values, tables.models, stages=tables.stages, layer_labels=labels, baseline=baseline),
    )


@figure("profile")
def _profile(tables: Tables) -> Drawn:
    """Bars of one model's layers, with intervals."""
    about = tables.models.assign(title=labels_of(tables.models)).set_index("model")
    for model, file in tables.profiles.items():
        rows = tables.rows[tables.rows["model"] == model].sort_values("depth")
        rows = rows.assign(label=[shown(tables.labels[layer]) for layer in rows["layer"]])
        mean, chance = about.loc[[model], ["criticality", "chance"]].to_numpy(dtype="float64")[0]
        yield f"profile-{file}", criticality_bars(rows, title=about["title"][model], mean=mean, chance=chance)


@figure("classes")
def _classes(tables: Tables) -> Drawn:
    """Heat map of one model's layers and the classes of images, like classes next to each other."""
    titles = dict(zip(tables.models["model"], labels_of(tables.models), strict=True))
    for model, file in tables.profiles.items():
        try:
            table, of, accuracy = class_table(tables.study, tables.comparison, model)
        except ProbeError as error:
            raise StudyError(str(error)) from error
        title = titles[model] if of == "label" else f"{titles[model]}, by predicted class"
        yield (
            f"classes-{file}",
            class_map(table, title=title, accuracy=accuracy, layer_labels=tables.labels, stages=tables.stages),
        )


@figure("ranking")
def _ranking(tables: Tables) -> Drawn:
    """Models by their mean criticality, with intervals."""
    yield "ranking", ranking(tables.models, baseline=tables.comparison.baseline)


@figure("module_criticality", on_page=True)
def _module_criticality(tables: Tables) -> Drawn:
    """Heat map of models and modules, by module criticality."""
    condition = tables.comparison.condition
    probe_set = None if condition is None else condition.probe_set
    values = load_study_module_criticality(tables.study, probe_set=probe_set).values(list(tables.models["model"]))
    if values.isna().all(axis=None):
        raise StudyError("None of the models that are compared has module criticality. Measure these: --models.")
    yield (
        "module_criticality",
        module_criticality_map(values, tables.models, layer_labels=tables.labels, stages=tables.stages),
    )
