"""The report of a study: figures for papers, and a page to explore, made from the same tables."""

import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.comparison import Comparison, about_models, compare, estimates_of
from layercrit.conditions import conditions_of
from layercrit.epoch_map import EpochMap
from layercrit.errors import LayercritError, StudyError, first_line, near, shown
from layercrit.figures.style import check_formats, save_figure, svg_of
from layercrit.layers import layer_labels
from layercrit.measurement import Measurement
from layercrit.named_options import name_list
from layercrit.progress_bar import Bar
from layercrit.proxies.of_study import StudyProxies
from layercrit.reporting.page import write_page
from layercrit.reporting.study_figures import FIGURES, FigureFunction, Tables
from layercrit.study.of_measurement import open_result, study_of
from layercrit.study.status import has_modules
from layercrit.study.tables import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "report", "save_figures"]

_UNFINISHED = ".writing-"  # before the name of a file that is being written
_COMPARING = ("accuracy", "budget", "criticality", "depth", "difference", "ranking")  # figures that compare models
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


def report(
    study: Study | Measurement | str | Path,
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
        study: finished or not; or a measurement, as a study of one model; or the folder of either.
        out: the folder to write to; files of an earlier report are replaced. None: the study's own folder, or the one
            that is given; a measurement does not know its own.
        figures: names of those to plot, of `FIGURES`; None: all that can be plotted, of one model those that do not
            compare models.
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
        StudyError: a name is unknown, a figure that was asked for cannot be plotted, or a file cannot be written; or
            of a measurement, there is no ``out``, or something is asked for that only a study has: other models,
            resets and conditions to choose from, and the pixels of images.
        ProtocolError: a format is unknown.

    Examples:
        >>> import layercrit
        >>> report = layercrit.report(layercrit.load_study("layercrit-demo/study"), "paper", figures=["ranking"])
        >>> report.page.name, [path.name for path in report.figures["ranking"]]
        ('report.html', ['ranking.pdf', 'ranking.png', 'ranking.svg'])
    """
    figures = None if figures is None else name_list(figures)
    formats, profiles = name_list(formats), None if profiles is None else name_list(profiles)
    for name in figures or ():
        FIGURES.find(name)
    check_formats(formats)
    if isinstance(study, str | Path):
        out = study if out is None else out
        study = open_result(study)
    condition: dict[str, Any] = {"probe_set": probe_set, "norm_statistics": norm_statistics, "epoch": epoch}
    which: dict[str, Any] = {"baseline": baseline, "leave_out": leave_out and name_list(leave_out), "reset": reset}
    with _opened(study, out, {**which, **condition, "thumbnails": thumbnails or None}) as (study, folder):
        compare_under = partial(compare, study, **which)
        comparison = compare_under(**condition)
        others = _others(study, comparison, compare_under)
        asked = _usual(study, comparison, others) if figures is None else list(dict.fromkeys(figures))
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


@contextlib.contextmanager
def _opened(
    study: Study | Measurement, out: str | Path | None, asked: Mapping[str, object]
) -> Iterator[tuple[Study, Path]]:
    """Give what is to be shown as a study, and the folder to write to.

    Args:
        study: what is to be shown.
        out: the folder, if one is named.
        asked: what only a study has; None: it is not asked for.
    """
    if isinstance(study, Study):
        yield study, study.folder if out is None else Path(out).expanduser()
        return
    if not isinstance(study, Measurement):
        raise StudyError(f"A report is on a study, a measurement, or the folder of either; got {shown(study)}.")
    if out is None:
        raise StudyError("A measurement does not know its folder. Name the folder to write to: out=DIR.")
    if names := [name for name, value in asked.items() if value is not None]:
        raise StudyError(
            f"{names[0]} is for studies; a measurement is of one model under one condition, without the pixels of "
            "images. Leave it out, or run a study."
        )
    with tempfile.TemporaryDirectory() as scratch:
        yield study_of(study, Path(scratch)), Path(out).expanduser()


def _usual(study: Study, comparison: Comparison, others: Sequence[Comparison]) -> list[str]:
    """Return the figures that are plotted where none is named, or tried: of the others nobody need be told."""
    are = {
        "conditions": bool(others),
        "module_criticality": has_modules(study.folder, study.record),
        **dict.fromkeys(_COMPARING, len(comparison.models) > 1),
    }
    return [name for name in FIGURES if are.get(name, True)]


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
