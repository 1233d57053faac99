"""The report of a study: figures for papers, and a page to explore, made from the same tables."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from layercrit.categories import ADVERSARIAL
from layercrit.cell_columns import WHOLE
from layercrit.comparison import Comparison, about_models, compare, estimates_of, has_sets
from layercrit.conditions import conditions_of
from layercrit.epoch_map import EpochMap
from layercrit.errors import LayercritError, ProbeError, StudyError, first_line, near
from layercrit.figures.accuracy import criticality_against_accuracy
from layercrit.figures.bars import criticality_bars
from layercrit.figures.budget import criticality_against_budget
from layercrit.figures.categories import labels_of, shown
from layercrit.figures.class_maps import class_map
from layercrit.figures.depth import criticality_over_depth
from layercrit.figures.heat_maps import difference_map, heat_map, module_criticality_map, spread_map
from layercrit.figures.rankings import ranking
from layercrit.figures.style import check_formats, save_figure, svg_of
from layercrit.layers import layer_labels
from layercrit.progress_bar import Bar
from layercrit.proxies.of_study import StudyProxies
from layercrit.registry import Registry, summary_of
from layercrit.reporting.page import write_page
from layercrit.reporting.whom import class_table
from layercrit.study.module_tables import load_study_module_criticality
from layercrit.study.status import has_modules
from layercrit.study.tables import Study
from layercrit.wrappers import wrapper_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "Drawn", "FigureKind", "Report", "Tables", "figure", "report", "save_figures"]

_UNFINISHED = ".writing-"  # before the name of a file that is being written
_LONGEST = 100  # bytes of a model's name in that of a file; some file systems take no more than 143 in all


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        figures: name of a figure -> its files, one a format.
        left_out: name of a figure -> why it could not be plotted.
        comparison: what the figures and the page show.
    """

    page: Path
    figures: dict[str, list[Path]]
    left_out: dict[str, str]
    comparison: Comparison


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


def report(
    study: Study,
    out: str | Path | None = None,
    *,
    figures: Sequence[str] | None = None,
    formats: Sequence[str] = ("pdf", "png", "svg"),
    baseline: str | None = None,
    leave_out: Sequence[str] | None = None,
    reset: str | None = None,
    profiles: Sequence[str] | None = None,
    thumbnails: bool = False,
    progress: bool = False,
    probe_set: str | None = None,
    norm_statistics: str | None = None,
    epoch: int | None = None,
    epoch_maps: Sequence[EpochMap] = (),
    proxies: StudyProxies | str | Path | None = None,
) -> Report:
    """Write ``report.html``, one self-contained page, and the figures in every format.

    Args:
        study: finished or not.
        out: the folder to write to; files of an earlier report are replaced. None: the study's own folder.
        figures: names of those to plot, of `FIGURES`; None: all that can be plotted.
        formats: of ``pdf``, ``png`` and ``svg``.
        baseline: the model that the others are compared with; None: the study's own, if it names one.
        leave_out: as in `layercrit.compare`.
        reset: as in `layercrit.compare`.
        profiles: models that get a figure of their own, and of which the page shows criticality by class; None: the
            baseline, or the first model without one.
        thumbnails: whether the page has small pictures of the images that each layer's reset moves most and least. The
            page then shows images of the probe set, which may be private, to all who get it.
        progress: whether a progress bar is shown on a terminal.
        probe_set: as in `layercrit.compare`, for the figures and what the page shows first; readers of the page can
            switch to all conditions of the study.
        norm_statistics: likewise.
        epoch: likewise.
        epoch_maps: maps over the epochs of training runs, such as those of `layercrit.epoch_map.measure_epochs`, which
            the page shows beside those of the study's own epochs.
        proxies: what `layercrit.proxies.of_study.measure_study_proxies` returned, or the folder that it was saved in,
            to be plotted on the page.

    Raises:
        StudyError: a name is unknown, a figure that was asked for cannot be plotted, or a file cannot be written.
        ProtocolError: a format is unknown.

    Examples:
        >>> import layercrit
        >>> report = layercrit.report(layercrit.load_study("layercrit-demo/study"), "paper", figures=["ranking"])
        >>> report.page.name, [path.name for path in report.figures["ranking"]]
        ('report.html', ['ranking.pdf', 'ranking.png', 'ranking.svg'])
    """
    for name in figures or ():
        FIGURES.find(name)
    check_formats(formats)
    folder = study.folder if out is None else Path(out).expanduser()
    compare_under = partial(
        compare, study, baseline=baseline, leave_out=None if leave_out is None else list(leave_out), reset=reset
    )
    comparison = compare_under(probe_set=probe_set, norm_statistics=norm_statistics, epoch=epoch)
    others = _others(study, comparison, compare_under)
    # few studies have several conditions, or module criticality: nobody need be told that these figures are left out
    rare = {"conditions": bool(others), "module_criticality": has_modules(study.folder, study.record)}
    usual = [name for name in FIGURES if rare.get(name, True)]
    asked = usual if figures is None else list(dict.fromkeys(figures))
    tables = replace(_tables(study, comparison, profiles), others=others)
    written: dict[str, list[Path]] = {}
    left_out: dict[str, str] = {}
    pictures: list[tuple[str, list[bytes]]] = []
    with Bar(progress) as bar:
        for done, name in enumerate(asked):
            bar.drawn(name, done, len(asked) + 1)
            try:
                drawn = _drawn(name, tables)
            except StudyError as error:
                if figures is not None:
                    raise
                left_out[name] = str(error)
                continue
            written[name] = _saved(drawn, folder / "figures", formats)
            if FIGURES[name].on_page:
                pictures.append((FIGURES[name].summary or name, [svg_of(one) for _, one in drawn]))
        bar.drawn("report.html", len(asked), len(asked) + 1)
        page = write_page(
            study,
            comparison,
            folder / "report.html",
            list(tables.profiles),
            thumbnails,
            others,
            epoch_maps,
            proxies,
            pictures,
        )
    return Report(page, written, left_out, comparison)


def _others(study: Study, comparison: Comparison, compare_under: Callable[..., Comparison]) -> list[Comparison]:
    """Return the comparisons under the other conditions of which something is measured."""
    measured = study.models[study.models["model"].isin(study.of_reset(comparison.reset)["model"])]
    found = []
    for condition in conditions_of(measured):
        if condition != comparison.condition:
            with contextlib.suppress(StudyError):  # only models that are left out were measured under it
                found.append(compare_under(**vars(condition)))
    return found


def save_figures(
    study: Study, folder: str | Path, figures: Sequence[str], formats: Sequence[str] = ("png",)
) -> dict[str, list[Path]]:
    """Write those of some figures of `FIGURES` that can be plotted; return the name of each with its files.

    Raises:
        StudyError: the study has no finished cell, or the folder cannot be written to.
    """
    tables = _tables(study, compare(study), None)
    written = {}
    for name in figures:
        try:
            drawn = _drawn(name, tables)
        except StudyError:
            continue
        written[name] = _saved(drawn, Path(folder), formats)
    return written


def _tables(study: Study, comparison: Comparison, profiles: Sequence[str] | None) -> Tables:
    models = about_models(study, comparison)
    known = models["model"].to_list()
    own = study.models.set_index("model")["variant_of"]
    variants = {own[name]: name for name in known if isinstance(own[name], str)}
    profiles = None if profiles is None else [name if name in known else variants.get(name, name) for name in profiles]
    for name in profiles or ():
        if name not in known:
            raise StudyError(f"The model {name!r} is not compared, so it has no profile. {near(name, known)}")
    rows = estimates_of(study, comparison)
    shapes = rows.drop_duplicates("layer").set_index("layer")["shape"].reindex(comparison.layers.index)
    labels = layer_labels({str(layer): shape if isinstance(shape, str) else None for layer, shape in shapes.items()})
    chosen = [comparison.baseline or known[0]] if profiles is None else profiles
    files = _file_names(study.models["model"])  # of all, so that a model's does not depend on who is left out
    return Tables(comparison, models, rows, labels, {name: files[name] for name in chosen}, study)


def _file_names(models: Iterable[str]) -> dict[str, str]:
    """Return model -> its name in file names, all different even on file systems that ignore case."""
    plain = {name: re.sub(r"[^\w.=+-]", "-", name).encode()[:_LONGEST].decode(errors="ignore") for name in models}
    found: dict[str, str] = {}
    taken = set[str]()
    for name in sorted(plain, key=lambda name: plain[name] != name):  # a name that can stay does
        numbered = (f"{plain[name]}-{n}" for n in itertools.count(2))
        found[name] = next(one for one in itertools.chain([plain[name]], numbered) if one.casefold() not in taken)
        taken.add(found[name].casefold())
    return found


def _drawn(name: str, tables: Tables) -> list[tuple[str, "Figure"]]:
    if not tables.comparison.criticality.notna().any(axis=None):
        raise StudyError(
            "No layer of any model has only cells that are ok, so no criticality is known. Measure the models again."
        )
    function = FIGURES[name].function
    try:
        drawn = [(str(file), one) for file, one in function(tables)]
        for _, one in drawn if _is_foreign(function) else []:
            one.draw_without_rendering()  # what fails only when it is saved, fails here
    except Exception as error:  # the code of others raises what it likes
        if isinstance(error, LayercritError) or not _is_foreign(function):
            raise
        raise StudyError(f"The {FIGURES.in_words(name)} failed ({first_line(error)}).") from error
    return drawn


def _is_foreign(function: FigureFunction) -> bool:
    """Return whether a figure comes from a plug-in or the user."""
    return not function.__module__.startswith("layercrit.")


def _saved(drawn: Iterable[tuple[str, "Figure"]], folder: Path, formats: Iterable[str]) -> list[Path]:
    """Save figures, each file under its name only once it is complete."""
    distinct = list(dict.fromkeys(formats))
    try:
        return [
            path.replace(folder / path.name.removeprefix(_UNFINISHED))
            for name, figure in drawn
            for path in save_figure(figure, folder / f"{_UNFINISHED}{name}", distinct)
        ]
    except OSError as error:
        raise StudyError(
            f"{folder} cannot be written to ({error.strerror}). Name another folder with --out."
        ) from error


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
