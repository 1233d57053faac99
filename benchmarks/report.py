"""What a report of the 50-model study costs: time of the figures and of the page, its size, time to its first picture.

The study is the published one where its table is at hand (../shared/published), else one of the same shape. With
--with-images there is a second one besides, of as many cells, which has the distances of single images: its differences
are paired. Figures are printed, none is a test. The page is opened from disk in headless Chromium.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import CHROMIUM, opened_browser, opened_page
from layercrit.comparison import compare
from layercrit.figures.style import save_figure
from layercrit.reporting.page import write_page
from layercrit.reporting.reports import _tables
from layercrit.reporting.study_figures import FIGURES
from layercrit.study.published import import_published
from layercrit.study.store import ModelRow
from layercrit.study.tables import Study, load_study
from published_results import RELEASED, measured, rows_of, write_table

N_MODELS, N_LAYERS, N_TRIALS = 50, 54, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--with-images", type=int, default=0, metavar="N", help="also a study of N images a cell")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="save a picture of the top, with the heat map")
    parser.add_argument("--page", type=Path, metavar="FILE", help="of this page instead of that of the benchmark")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.page is None:
            folder = published(Path(scratch))
            time_figures(folder)
            page = time_page("published", folder)
            if arguments.with_images:
                time_page("with_images", with_images(Path(scratch), arguments.with_images))
        else:
            page = arguments.page
        if CHROMIUM is None:
            print("no Chromium is here, so the page is not opened")
        else:
            time_opening(page, arguments.rounds, arguments.screenshot)


def published(scratch: Path) -> Path:
    if RELEASED.is_dir():
        print("the published study")
        return import_published(RELEASED / "results.csv", scratch / "published", RELEASED / "models.csv").folder
    print("a study of the published one's shape")
    models = ["tv_resnet50", *(f"model-{number}" for number in range(1, N_MODELS))]
    layers = [f"model.layer{1 + number // 14}.{number % 14}.conv" for number in range(N_LAYERS)]
    table = write_table(scratch / "results.csv", rows_of(models, layers, N_TRIALS))
    return import_published(table, scratch / "published").folder


def with_images(scratch: Path, n_images: int) -> Path:
    cells = [
        {"model": f"model-{model}", "layer": f"layer{layer // 14}.{layer}", "trial": trial,
         "cosine": 0.1 + 0.8 * ((7 * model + 5 * layer + 3 * trial) % 100) / 100}
        for model in range(N_MODELS) for layer in range(N_LAYERS) for trial in range(N_TRIALS)
    ]  # fmt: skip
    about = {"random_trials": {"rerandomize": True}, "probe_set": "the same of all"}
    models = [
        ModelRow(f"model-{model}", f"py:{model}", f"kind {model % 5}", None, 0.5, about) for model in range(N_MODELS)
    ]
    study = measured(
        scratch / "images", cells, models=models, n_images=n_images, noise=0.09, record={"baseline": "model-0"}
    )
    return study.folder


def opened(folder: Path) -> tuple[Study, str]:
    """Return a study as a new process would read it, nothing computed yet, and the model that differences are to."""
    study = load_study(folder)
    return study, study.record.get("baseline") or "tv_resnet50"


def time_figures(folder: Path) -> None:
    """Time each figure in each format, and the tables that all of them show."""
    study, baseline = opened(folder)
    started = time.perf_counter()
    tables = _tables(study, compare(study, baseline=baseline), None)
    total = time.perf_counter() - started
    print(f"  tables: {total:.2f} s")
    by_format = dict.fromkeys(("pdf", "png", "svg"), total)
    for name, draw in FIGURES.items():
        started = time.perf_counter()
        drawn = list(draw(tables))
        drawing = time.perf_counter() - started
        saving = {}
        for one in by_format:
            started = time.perf_counter()
            for file, figure in drawn:
                save_figure(figure, folder / file, [one])
            saving[one] = time.perf_counter() - started
            by_format[one] += drawing + saving[one]
        total += drawing + sum(saving.values())
        print(f"  {name}: drawn {drawing:.2f} s, " + ", ".join(f"{one} {some:.2f} s" for one, some in saving.items()))
    print(f"figures_seconds={total:.3g}  (all of them as PDF, PNG and SVG)")
    for one, seconds in by_format.items():
        print(f"figures_{one}_seconds={seconds:.3g}")


def time_page(name: str, folder: Path) -> Path:
    study, baseline = opened(folder)
    started = time.perf_counter()
    comparison = compare(study, baseline=baseline)
    page = write_page(study, comparison, folder / "report.html")
    n_models, n_layers = comparison.criticality.shape
    print(f"page of {n_models} models and {n_layers} layers, {name}")
    print(f"{name}_page_seconds={time.perf_counter() - started:.3g}")
    print(f"{name}_page_megabytes={page.stat().st_size / 1e6:.3g}")
    return page


def time_opening(page: Path, rounds: int, screenshot: Path | None) -> None:
    """Open the page in fresh browser contexts; times are from the start of the navigation."""
    marks: dict[str, list[float]] = {"first_picture": [], "ready": []}
    with opened_browser() as browser:
        for _ in range(rounds + 1):  # the first one starts the browser's processes
            with opened_page(browser, page) as opened:
                first = "performance.getEntriesByName('first picture')[0].startTime"
                marks["first_picture"].append(opened.evaluate(first) / 1e3)
                marks["ready"].append(opened.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1e3)
                if screenshot:
                    heat_map = opened.locator("#map").bounding_box()
                    top = {"x": 0, "y": 0, "width": 1280, "height": heat_map["y"] + heat_map["height"] + 16}
                    opened.screenshot(path=screenshot, full_page=True, clip=top)
    for name, seconds in marks.items():
        some = seconds[1:] or seconds
        print(f"{name}_seconds={statistics.median(some):.3g}  ({min(some):.3g} to {max(some):.3g}, {len(some)} rounds)")


if __name__ == "__main__":
    main()
