"""The report of a study: which files it writes, what they show, and what it says where it cannot."""

import dataclasses
import html
import json
import re
import shutil

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import layercrit
from layercrit.comparison import Comparison, compare
from layercrit.errors import ProtocolError, StudyError
from layercrit.reporting.reports import Report, report
from layercrit.reporting.study_figures import FIGURES, figure
from layercrit.study.published import import_published
from layercrit.study.store import FILE, ModelRow, Store
from layercrit.study.tables import load_study
from published_results import LAYERS as PUBLISHED
from published_results import PREDICTED, measured, rows_of, write_models, write_table
from small_subjects import PIXELS, registered, two_layers

USUAL = [name for name in FIGURES if name not in ("conditions", "module_criticality")]  # of a study with one condition
LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "fc")
FILES = ("criticality", "difference", "spread", "half_width", "accuracy", "budget", "depth", "profile-base",
         "classes-base", "ranking")  # fmt: skip
MODELS = (("base", "baseline", None), ("mix", "augmentation", None), ("pgd1", "adversarial_training", 1.0),
          ("pgd4", "adversarial_training", 4.0))  # fmt: skip


def cells_of(models, layers=LAYERS, trials=2, seed=0, **more):
    generator = np.random.default_rng(seed)
    return [
        {"model": model, "layer": layer, "trial": trial, "cosine": float(generator.uniform(0.1, 0.9)), **more}
        for model in models for layer in layers for trial in range(trials)
    ]  # fmt: skip


def rows(*names, **more):
    return [ModelRow(name, f"py:{name}", **more) for name in names]


def whole(folder, **more):
    """A study of which every figure can be drawn; its baseline is `base`."""
    models = [
        ModelRow(name, f"py:{name}", category, name.title(), 0.5 + 0.05 * place, PREDICTED, eps and "l2", eps)
        for place, (name, category, eps) in enumerate(MODELS)
    ]
    cells = cells_of([name for name, _, _ in MODELS])
    return measured(folder, cells, models=models, **{"record": {"baseline": "base"}} | more)


def texts(path):
    """Return the texts of an SVG file, in the order in which they were drawn."""
    return re.findall("<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def filled(path):
    """Return the colours of the cells of a heat map in an SVG file, row by row."""
    group = re.search('<g id="values">(.*?)</g>', path.read_text(encoding="utf-8"), re.DOTALL)[1]
    return re.findall("fill: (#[0-9a-f]{6}); stroke: #ffffff", group)


def colours(values, name="viridis", end=1.0):
    """Return the colours of values in [0, end], or of differences in [-end, end]."""
    shares = np.ravel(values) / end
    return [to_hex(colour) for colour in colormaps[name]((shares + 1) / 2 if name == "PuOr" else shares)]


def names_in(path, wanted):
    return [text for text in texts(path) if text in wanted]


def data(page):
    """Return what the script of a page reads."""
    (found,) = re.findall('<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(found)


def facts(page):
    return html.unescape(re.search('id="facts">(.*?)<', page.read_text(encoding="utf-8"))[1])


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def svg(study, figure, **arguments):
    """Draw one figure and return its files."""
    return report(study, figures=[figure], formats=["svg"], **arguments).figures[figure]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report(whole(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def drawn_up(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("drawn_up") / "study").folder


@pytest.fixture
def study(drawn_up, tmp_path):
    return load_study(shutil.copytree(drawn_up, tmp_path / "study"))


# --- files ------------------------------------------------------------------------------------------------------------


def test_report__every_figure_in_every_format_in_the_studys_folder(written):
    folder = written.page.parent
    wanted = {f"{name}.{one}" for name in FILES for one in ("pdf", "png", "svg")}
    assert {path.name for path in (folder / "figures").iterdir()} == wanted
    assert {path.name for path in folder.iterdir()} == {"figures", "report.html", FILE}
    starts = {".pdf": b"%PDF", ".png": b"\x89PNG", ".svg": b"<?xml"}
    for path in (folder / "figures").iterdir():
        assert path.read_bytes().startswith(starts[path.suffix]), path.name


def test_report__says_what_was_written(written):
    assert isinstance(written, Report)
    assert [field.name for field in dataclasses.fields(written)] == ["page", "figures", "left_out", "comparison"]
    assert list(written.figures) == USUAL, "in the order of the registry"
    assert [path.name for path in written.figures["spread"]] == [
        f"{name}.{one}" for name in ("spread", "half_width") for one in ("pdf", "png", "svg")
    ]
    listed = {path for paths in written.figures.values() for path in paths}
    assert listed == set((written.page.parent / "figures").iterdir())
    assert written.page.name == "report.html"
    assert written.left_out == {}
    assert isinstance(written.comparison, Comparison)
    assert written.comparison.baseline == "base"


def test_report__another_place(study, tmp_path):
    before = files_in(study.folder)
    result = report(study, tmp_path / "a" / "b", figures=["ranking"], formats=["png"])
    assert set(files_in(tmp_path / "a" / "b")) == {"report.html", "figures/ranking.png"}
    assert result.page == tmp_path / "a" / "b" / "report.html"
    assert files_in(study.folder) == before


def test_report__some_figures_once_each_and_the_page(study):
    result = report(study, figures=["depth", "ranking", "depth"], formats=["svg", "svg"])
    assert {name: [path.name for path in paths] for name, paths in result.figures.items()} == {
        "depth": ["depth.svg"], "ranking": ["ranking.svg"]
    }  # fmt: skip
    assert result.page.is_file()


def test_report__a_text_is_one_name(study):
    result = report(study, figures="profile", formats="svg", profiles="mix", leave_out="base")
    assert [path.name for path in result.figures["profile"]] == ["profile-mix.svg"]


def test_report__profiles_of_nobody_in_a_place_below_the_home_folder(study, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = report(study, "~/new", figures=["ranking", "profile"], formats=["png"], profiles=[])
    assert result.figures["profile"] == []
    assert set(files_in(tmp_path / "home")) == {"new/figures/ranking.png", "new/report.html"}


def test_report__again_replaces_files_by_the_same_bytes(study):
    first = report(study, figures=["profile"])
    before = files_in(study.folder)
    for path in [first.page, *first.figures["profile"]]:
        path.write_bytes(b"of an earlier report" * 100_000)
    report(study, figures=["profile"])
    assert files_in(study.folder) == before


@pytest.mark.parametrize(("limit", "damaged"), [(4_000, "figures/ranking.png"), (100_000, "report.html")])
def test_report__no_room_leaves_the_file_before_as_it_was(study, limit, damaged):
    resource = pytest.importorskip("resource", reason="limits the size of files")
    report(study, figures=["ranking"], formats=["png"])
    before = files_in(study.folder)
    known = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, known[1]))
    try:
        with pytest.raises(StudyError, match=r"cannot be written.*\(File too large\)"):
            report(study, figures=["ranking"], formats=["png"], baseline="mix")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, known)
    assert len(before[damaged]) > limit, "the limit would not be met"
    assert files_in(study.folder)[damaged] == before[damaged]


@pytest.mark.parametrize("place", ["out", "out/figures", "out/figures/ranking.png", "out/report.html"])
def test_report__something_else_is_in_its_place(study, tmp_path, place):
    taken = tmp_path / place
    taken.parent.mkdir(parents=True, exist_ok=True)
    if taken.suffix:
        taken.mkdir()
    else:
        taken.write_text("precious")
    with pytest.raises(StudyError, match=r"cannot be written.*Name another folder with --out"):
        report(study, tmp_path / "out", figures=["ranking"], formats=["png"])
    assert taken.is_dir() or taken.read_text() == "precious"


# --- names that are unknown -------------------------------------------------------------------------------------------


def test_report__unknown_figure(study):
    with pytest.raises(StudyError, match=r"no figure 'rankings'\. Did you mean 'ranking'"):
        report(study, figures=["criticality", "rankings"])
    with pytest.raises(StudyError, match=r"no figure '\?'\. Known: 'criticality', 'difference'"):
        report(study, figures=["?"])
    assert set(files_in(study.folder)) == {FILE}, "nothing is drawn before all names are known"


def test_report__unknown_format_leaves_nothing_behind(study, tmp_path):
    with pytest.raises(ProtocolError, match=r"cannot be saved in the format 'pgn'\. Did you mean 'png'"):
        report(study, tmp_path / "out", formats=["svg", "pgn"])
    with pytest.raises(ProtocolError, match="cannot be saved in the format 'jpg'"):
        report(study, tmp_path / "out", figures=[], formats=["jpg"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "bas"}, "no model 'bas'. Did you mean 'base'"),
        ({"leave_out": ["augmentatoin"]}, "category 'augmentatoin'.*Did you mean 'augmentation'"),
        ({"reset": "rerandomise"}, "no reset 'rerandomise'. Did you mean 'rerandomize'"),
        ({"profiles": ["mix", "pgd"]}, "The model 'pgd' is not compared, so it has no profile. Did you mean 'pgd"),
        ({"profiles": ["mix"], "leave_out": ["augmentation"]}, "The model 'mix' is not compared"),
        ({"leave_out": ["baseline", "augmentation", "adversarial_training"]}, "No model .* is left to compare"),
    ],
)
def test_report__unknown_names_leave_nothing_behind(study, tmp_path, arguments, message):
    with pytest.raises(StudyError, match=message):
        report(study, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# --- what cannot be drawn ---------------------------------------------------------------------------------------------

CANNOT = {
    "difference": "no baseline to compare the models with. Name one with --baseline",
    "spread": "only one trial, so neither a spread over trials nor an interval",
    "accuracy": "No accuracy is known. Give it in the study file",
    "budget": "No model has a budget of adversarial training. Give attack_norm and eps",
    "classes": "The labels of single images are not known",
}


@pytest.fixture
def bare(tmp_path):
    """A study of one model, one layer and one trial, of which nothing else is known."""
    return measured(tmp_path / "bare", cells_of("a", ["fc"], trials=1), models=rows("a"))


def test_report__what_cannot_be_drawn_is_left_out_with_its_reason(tmp_path):
    study = measured(tmp_path / "bare", cells_of("ab", ["fc"], trials=1), models=rows("a", "b"))
    result = report(study, formats=["png"])
    assert {name: CANNOT[name] in reason for name, reason in result.left_out.items()} == dict.fromkeys(CANNOT, True)
    assert {name: [path.name for path in paths] for name, paths in result.figures.items()} == {
        "criticality": ["criticality.png"], "depth": ["depth.png"], "profile": ["profile-a.png"],
        "ranking": ["ranking.png"],
    }  # fmt: skip
    assert facts(result.page).startswith("2 models, 1 layer in common, 1 trial of")


def test_report__of_studies_with_other_numbers_of_images(tmp_path):
    study = measured(tmp_path, cells_of("ab", trials=1), n_images=20)
    cells = study.cells.assign(n_images=np.where(study.cells["model"] == "a", 20, 30))
    page = report(dataclasses.replace(study, cells=cells), tmp_path / "out", figures=["ranking"], formats=["png"]).page
    assert "of the reset rerandomize on 20 to 30 images" in facts(page)


def test_report__of_one_model_nothing_compares_models(bare):
    result = report(bare, formats=["png"])
    assert {name: [path.name for path in paths] for name, paths in result.figures.items()} == {
        "profile": ["profile-a.png"]
    }
    assert set(result.left_out) == {"spread", "classes"}
    assert facts(result.page).startswith("1 model, 1 layer, 1 trial of")
    asked = report(bare, figures=["criticality", "ranking"], formats=["png"])
    assert set(asked.figures) == {"criticality", "ranking"}


@pytest.fixture(scope="module")
def of_one_model():
    labels = [0, 1, 2, 0, 1, 0]
    return layercrit.measure(two_layers(), PIXELS, labels=labels, trials=3, name="mine", device="cpu", progress=False)


def test_report__of_a_measurement(of_one_model, tmp_path):
    result = report(of_one_model, tmp_path / "out", formats=["svg"])
    assert sorted(result.figures) == ["classes", "profile", "spread"]
    assert not result.left_out
    assert result.page == tmp_path / "out" / "report.html"
    assert facts(result.page) == "1 model, 2 layers, 3 trials of the reset rerandomize on 6 images"
    found = data(result.page)
    assert found["models"][0]["name"] == "mine"
    assert found["models"][0]["criticality"] == pytest.approx(of_one_model.summary()["criticality"]["mean"], abs=1e-6)
    (whom,) = found["whom"]
    expected = of_one_model.by_class()["criticality"]
    np.testing.assert_allclose(np.sort(np.ravel(whom["criticality"])), np.sort(expected), atol=1e-4)
    np.testing.assert_allclose(result.comparison.criticality.to_numpy()[0], of_one_model.to_pandas()["criticality"])


@pytest.mark.parametrize("asked", [
    {"baseline": "mine"}, {"leave_out": []}, {"reset": "rerandomize"}, {"probe_set": "a"},
    {"norm_statistics": "trained"}, {"epoch": 0}, {"thumbnails": True},
], ids=lambda asked: next(iter(asked)))  # fmt: skip
def test_report__of_a_measurement_there_is_nothing_to_choose(of_one_model, tmp_path, asked):
    with pytest.raises(StudyError, match=rf"^{next(iter(asked))} is for studies; .* Leave it out, or run a study"):
        report(of_one_model, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [None, 3])
def test_report__of_neither_a_study_nor_a_measurement(given, tmp_path):
    with pytest.raises(StudyError, match=rf"on a study, a measurement, or the folder of either; got {given}\."):
        report(given, tmp_path)


def test_report__of_a_measurement_needs_a_folder(of_one_model):
    with pytest.raises(StudyError, match=r"does not know its folder\. Name the folder to write to: out=DIR"):
        report(of_one_model)


def test_report__of_a_folder(of_one_model, bare, tmp_path):
    of_one_model.save(tmp_path / "measured")
    assert report(tmp_path / "measured", figures=[]).page == tmp_path / "measured" / "report.html"
    assert report(str(bare.folder), tmp_path / "out", figures=[]).comparison.models.index.to_list() == ["a"]
    with pytest.raises(StudyError, match="no study or measurement in"):
        report(tmp_path)


@pytest.mark.parametrize("figure", CANNOT)
def test_report__what_cannot_be_drawn_is_an_error_when_asked_for(bare, figure):
    with pytest.raises(StudyError, match=CANNOT[figure]):
        report(bare, figures=[figure], formats=["png"])
    assert set(files_in(bare.folder)) == {FILE}


def test_report__one_trial_that_tells_all_has_an_interval_but_no_spread(tmp_path):
    study = measured(tmp_path, cells_of("ab", trials=1), random_trials=False, noise=0.05, n_images=20)
    assert [path.name for path in svg(study, "spread")] == ["half_width.svg"]


def test_report__no_layer_whose_cells_are_all_ok(tmp_path):
    cells = cells_of("ab", ["fc"])
    for cell in cells[::2]:
        cell["status"] = "unchanged"
    study = measured(tmp_path, cells)
    result = report(study, formats=["png"])
    assert result.figures == {}
    assert set(result.left_out) == set(USUAL)
    assert all("only cells that are ok" in reason for reason in result.left_out.values())
    assert result.page.is_file()
    with pytest.raises(StudyError, match="No layer of any model has only cells that are ok"):
        report(study, figures=["ranking"])


def test_report__baseline_without_values(tmp_path):
    cells = cells_of("ab", ["fc"])
    cells[0]["status"] = "unchanged"
    with pytest.raises(StudyError, match="No layer of the baseline a has only cells that are ok"):
        svg(measured(tmp_path, cells), "difference", baseline="a")


def test_report__cells_that_are_not_ok_are_not_measured_in_any_map(tmp_path):
    cells = cells_of("ab", trials=3)
    cells[1]["status"] = "unchanged"  # two trials of conv1 of a are ok
    result = report(measured(tmp_path, cells), figures=["criticality", "spread", "profile"], formats=["svg"])
    maps = [*result.figures["criticality"], *result.figures["spread"]]
    assert [path.stem for path in maps] == ["criticality", "spread", "half_width"]
    for path in maps:
        assert "not measured" in texts(path), path.stem
    assert "not all trials ok" in texts(result.figures["profile"][0])


def test_report__everything_measured_has_no_hatched_cells(written):
    for name in ("criticality", "difference", "spread", "half_width"):
        assert "not measured" not in texts(written.page.parent / "figures" / f"{name}.svg"), name


def test_report__unfinished_study(tmp_path):
    cells = [cell for cell in cells_of("ab") if cell["model"] == "a" or cell["trial"] == 0]
    failures = [("c", 0, "no such file")]
    study = measured(tmp_path, cells, models=rows(*"abcd"), failures=failures)
    result = report(study, figures=["criticality", "ranking"], formats=["svg"])
    page = html.unescape(result.page.read_text(encoding="utf-8"))
    for note in (
        "Not compared, since they have no cell that is ok: c, d.",
        "Measured in fewer than the 2 trials of the study: b (1).",
        "Failed: c, trial 0 (no such file).",
    ):
        assert note in page
    assert names_in(result.figures["criticality"][0], "abcd") == ["a", "b"]


def test_report__study_without_any_finished_cell(tmp_path):
    study = measured(tmp_path, [], models=rows("a"))
    with pytest.raises(StudyError, match=r"has no finished cell\. Run it with `layercrit study run`"):
        report(study)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_report__baseline_in_figures_and_page(study, written):
    lined = ["budget", "depth", "ranking"]
    result = report(study, baseline="mix", figures=["difference", "profile", *lined], formats=["svg"])
    assert result.comparison.baseline == "mix"
    assert [path.name for path in result.figures["profile"]] == ["profile-mix.svg"]
    expected = compare(study, baseline="mix").difference
    assert 0.4 < expected.abs().max(axis=None) <= 0.5, "so that the scale ends at 0.5"
    # the baseline's category stands first
    assert filled(result.figures["difference"][0])[:4] == colours(expected.loc["base"], "PuOr", end=0.5)
    assert "differences are relative to mix" in facts(result.page)
    for path in (result.figures[name][0] for name in lined):
        of_base = written.page.parent / "figures" / path.name
        assert path.read_bytes() != of_base.read_bytes(), f"the line of the baseline in {path.name}"


def test_report__the_studys_own_baseline_and_who_is_left_out(tmp_path):
    study = whole(tmp_path, record={"baseline": "mix", "leave_out": ["adversarial_training"]})
    result = report(study, figures=["ranking", "profile"], formats=["svg"])
    assert (result.comparison.baseline, result.comparison.left_out) == ("mix", ("pgd1", "pgd4"))
    assert [path.name for path in result.figures["profile"]] == ["profile-mix.svg"]
    assert set(names_in(result.figures["ranking"][0], ("Base", "Mix", "Pgd1", "Pgd4"))) == {"Base", "Mix"}
    everyone = report(study, figures=["ranking"], formats=["svg"], leave_out=[])
    assert set(names_in(everyone.figures["ranking"][0], ("Base", "Mix", "Pgd1", "Pgd4"))) > {"Pgd1", "Pgd4"}


def test_report__who_is_left_out_is_in_no_figure_and_not_in_the_page(study):
    result = report(study, leave_out=["baseline"], formats=["svg"])  # a category
    assert [model["name"] for model in data(result.page)["models"]] == ["mix", "pgd1", "pgd4"]
    for path in (path for paths in result.figures.values() for path in paths):
        assert not {"Base", "baseline"} & set(texts(path)), path.name
    assert set(result.left_out) == {"difference"}
    assert [path.name for path in result.figures["profile"]] == ["profile-mix.svg"], "of the first model"


def test_report__reset_in_figures_and_page(tmp_path):
    cells = cells_of("ab") + cells_of("ab", seed=1, reset="zero")
    study = measured(tmp_path, cells)
    first, zero = (report(study, tmp_path / str(reset), reset=reset, figures=["criticality"], formats=["svg"])
                   for reset in (None, "zero"))  # fmt: skip
    assert (first.comparison.reset, zero.comparison.reset) == ("rerandomize", "zero")
    for result in (first, zero):
        expected = compare(study, reset=result.comparison.reset).criticality
        assert filled(result.figures["criticality"][0]) == colours(expected)
        assert f"of the reset {result.comparison.reset}" in facts(result.page)
    assert data(first.page) != data(zero.page)


def test_report__figures_and_page_show_the_same_numbers(written):
    values = written.comparison.criticality
    np.testing.assert_allclose(data(written.page)["measures"][0]["values"], values, atol=1e-6)
    assert filled(written.page.parent / "figures" / "criticality.svg") == colours(values)


def test_report__half_widths_are_those_of_the_studys_table(written):
    table = load_study(written.page.parent).to_pandas()
    half = (table["high"] - table["low"]) / 2
    assert 0.4 < half.max() <= 0.5, "so that the scale ends at 0.5"
    assert filled(written.page.parent / "figures" / "half_width.svg") == colours(half, "BuPu", end=0.5)


def test_report__accuracy_has_the_correlations_of_all_and_without_adversarial_training(tmp_path):
    models = [
        ModelRow(name, f"py:{name}", "adversarial_training" if name in "abc" else "augmentation", None, 0.1 * place)
        for place, name in enumerate("abcdef", 1)
    ]
    shown = texts(svg(measured(tmp_path, cells_of("abcdef"), models=models), "accuracy")[0])
    assert "without adversarial training:" in shown
    assert not any("without augmentation" in text for text in shown)


def test_report__labels_of_layers_in_the_published_layout(tmp_path):
    models = ("model_a", "model_b")  # not of the zoo: their shapes are put down here
    table = write_table(tmp_path / "results.csv", rows_of(models))
    import_published(table, tmp_path / "study", write_models(tmp_path / "models.csv"))
    with Store(tmp_path / "study") as store, store.transaction():
        shapes = dict(zip(PUBLISHED, ("64x3x7x7", *["64x64x1x1", "64x64x3x3"] * 2, "10x64"), strict=True))
        store.put_plan([dataclasses.replace(row, shape=shapes[row.layer]) for row in store.plan()])
    study = load_study(tmp_path / "study")
    result = report(study, figures=["criticality", "depth", "profile"], formats=["svg"])
    labels = ["conv1:7x7", "[1.0] conv1:1x1", "[1.0] conv2:3x3", "[1.1] conv1:1x1", "[1.1] conv2:3x3", "fc"]
    for paths in result.figures.values():
        shown = texts(paths[0])
        assert [text for text in dict.fromkeys(shown) if text in labels] == labels, paths[0].stem
        assert not any(text.startswith("model.") for text in shown), paths[0].stem
    assert "layer1" in texts(result.figures["depth"][0]), "stages stand without the wrapper"
    assert [layer["label"] for layer in data(result.page)["layers"]] == labels, "as in the page"


def test_report__models_of_which_one_is_wrapped(tmp_path):
    cells = cells_of("a") + cells_of("b", [f"model.{layer}" for layer in LAYERS], seed=1)
    for cell in cells:
        cell["stage"] = cell["layer"].rsplit(".", 2)[0]
    study = measured(tmp_path, cells)
    result = report(study, figures=["criticality", "spread", "profile"], formats=["svg"], profiles=["a", "b"])
    maps = [*result.figures["criticality"], *result.figures["spread"]]
    labels = ["conv1", "[1.0] conv1", "[1.0] conv2", "fc"]
    for path in [*maps, *result.figures["profile"]]:
        assert names_in(path, labels) == labels, path.stem
    for path in maps:
        assert "not measured" not in texts(path), path.stem


def test_report__stages_that_are_not_known(tmp_path):
    study = measured(tmp_path, cells_of("ab", stage=None))
    assert "None" not in texts(svg(study, "depth")[0])


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_profile__of_several_models_in_the_order_asked(study):
    paths = svg(study, "profile", profiles=["pgd1", "base", "pgd1"])
    assert [path.name for path in paths] == ["profile-pgd1.svg", "profile-base.svg"]
    assert [names_in(path, ("Pgd1", "Base")) for path in paths] == [["Pgd1"], ["Base"]]


def test_profile__shows_mean_and_unrelated_prediction(tmp_path):
    model = ModelRow("a", "py:a", record={"predictions": {"chance": 0.25}})
    study = measured(tmp_path, cells_of("a"), models=[model])
    mean = compare(study).models["criticality"].iloc[0]
    assert {f"mean {mean:.2f}", "unrelated prediction 0.75"} <= set(texts(svg(study, "profile")[0]))


def test_profile__layers_stand_in_the_models_own_order(tmp_path):
    study = measured(tmp_path, cells_of("a") + cells_of("b", LAYERS[::-1]))
    first, second = svg(study, "profile", profiles=["a", "b"])
    labels = ["conv1", "[1.0] conv1", "[1.0] conv2", "fc"]
    assert names_in(first, labels) == labels
    assert names_in(second, labels) == labels[::-1]


NAMES = {
    "a/b": "a-b-2",
    "a:b": "a-b-3",
    "a-b": "a-b",
    "..": "..",
    "../../up": "..-..-up",
    'it\'s "q"': "it-s--q-",
    "back\\slash\n": "back-slash-",
    "Größe ε=8": "Größe-ε=8",
    "vit": "vit",
    "Vit": "Vit-2",
    "x" * 300 + "1": "x" * 100,
    "x" * 300 + "2": "x" * 100 + "-2",
    "é" * 200: "é" * 50,
    "e" + "é" * 200: "e" + "é" * 49,
}


def test_profile__names_of_files(tmp_path):
    folder = tmp_path / "study"
    study = measured(folder, cells_of(NAMES, ["fc"]), models=rows(*NAMES))
    paths = svg(study, "profile", profiles=list(NAMES))
    assert [path.name for path in paths] == [f"profile-{file}.svg" for file in NAMES.values()]
    assert {path.resolve() for path in paths} == {path.resolve() for path in (folder / "figures").iterdir()}
    assert set(tmp_path.iterdir()) == {folder}
    assert len({path.read_bytes() for path in paths}) == len(NAMES), "each has its own model's values"


def test_profile__name_of_a_file_does_not_depend_on_who_else_is_shown(tmp_path):
    study = measured(tmp_path, cells_of(["a/b", "a:b"]))
    (path,) = svg(study, "profile", profiles=["a:b"], leave_out=["a/b"])
    assert path.name == "profile-a-b-2.svg"


def test_profile__very_long_names_and_labels_make_no_huge_picture(tmp_path):
    layers = ["l" * 3_000, "fc"]
    study = measured(tmp_path, cells_of("a", layers), models=[ModelRow("a", "py:a", label="y" * 3_000)])
    result = report(study, formats=["png"])
    for path in (path for paths in result.figures.values() for path in paths):
        with Image.open(path) as image:
            assert max(image.size) < 3_000, path.name


# --- registry ---------------------------------------------------------------------------------------------------------


def test_figures__each_says_in_a_line_what_it_shows():
    assert list(FIGURES) == [
        "criticality", "difference", "conditions", "spread", "accuracy", "budget", "depth", "profile", "classes",
        "ranking", "module_criticality",
    ]  # fmt: skip
    for name, summary in FIGURES.summaries().items():
        assert re.fullmatch(r"[A-Z].+\.", summary), name


def test_report__figures_on_the_page_that_say_the_same_are_all_there(study):
    with registered(FIGURES):
        for name in ("one", "two"):

            @figure(name, on_page=True)
            def _(tables, name=name):
                """Say what another one says."""
                yield name, Figure()

        page = report(study, figures=["one", "two"], formats=["svg"]).page.read_text(encoding="utf-8")
    assert page.count("<h3>Say what another one says.</h3>") == page.count('<img class="further"') == 2


SCRIPTS = {  # a word, and a format: each format's writer sees two scripts
    "Chinese": ("层", "png"),
    "Japanese": ("畳み込み", "svg"),
    "Korean": ("합성곱", "pdf"),
    "Arabic": ("طبقة", "png"),
    "Hindi": ("परत", "svg"),
    "emoji": ("🧪🔬", "pdf"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("script", SCRIPTS)
def test_report__names_in_any_script(tmp_path, script):
    """No figure warns of signs that its font lacks; names differ in the figures where they differ."""
    text, file_format = SCRIPTS[script]
    cells = [{"model": model, "layer": layer, "trial": trial, "stage": text, "cosine": 0.1 + 0.2 * trial}
             for model in (text, 2 * text) for layer in (f"{text}.0", f"{text}.1") for trial in range(2)]  # fmt: skip
    models = [ModelRow(name, f"py:{text}", text, f"{name} label", 0.5 + 0.1 * n, None, "l2", 1.0 + n)
              for n, name in enumerate((text, text + text))]  # fmt: skip
    study = measured(tmp_path, cells, models=models, record={"name": text, "baseline": text})
    found = report(study, formats=[file_format])
    assert {"criticality", "depth", "accuracy", "ranking", "profile", "budget"} <= set(found.figures)
    assert text in found.page.read_text(encoding="utf-8")
