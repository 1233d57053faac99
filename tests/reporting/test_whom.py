"""What the report shows by class, by right and wrong predictions and by image, in its data and in a real browser."""

import base64
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from browser import needs_browser, opened_browser, opened_page, violations
from layercrit.comparison import compare
from layercrit.probes.probe_set import ProbeSet
from layercrit.reporting.page import write_page
from layercrit.reporting.reports import report
from layercrit.reporting.whom import picture, whom_data
from layercrit.study.tables import load_study
from seen_images import LAYERS, seen

HOSTILE = '<img src=x onerror="window.ran = 1">\'"&amp;</script>${title}'


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return seen(tmp_path_factory.mktemp("seen"), names={0: "ant", 1: HOSTILE, 2: "cat"})[0]


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as opened:
        yield opened


def page_of(study, path, models=("base",), thumbnails=False):
    return write_page(study, compare(study), path, models, thumbnails)


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])["whom"]


def test_page__has_criticality_by_class(study, tmp_path):
    (found,) = data_of(page_of(study, tmp_path / "r.html"))
    table = study.by_class("base").astype({"class": str, "layer": str}).set_index(["class", "layer"])
    assert (found["of"], found["n_classes"]) == ("label", 3)
    assert sorted(one["name"] for one in found["classes"]) == sorted(["ant", HOSTILE, "cat"])
    for place, one in enumerate(found["classes"]):
        assert one["n_images"] == 8
        for column in ("criticality", "low", "high"):
            expected = [table.loc[(one["name"], layer), column] for layer in LAYERS]
            np.testing.assert_allclose(found[column][place], expected, rtol=0, atol=5e-5)
    images = study.images_of("base")
    accuracy = {one["name"]: one["accuracy"] for one in found["classes"]}
    assert accuracy["ant"] == pytest.approx(images.correct[images.labels == 0].mean(), abs=5e-5)


def test_page__has_right_and_wrong_predictions(study, tmp_path):
    (found,) = data_of(page_of(study, tmp_path / "r.html", ["other"]))
    table = study.by_correctness("other")
    assert (found["correctness"]["n_correct"], found["correctness"]["n_wrong"]) == (18, 6)
    for column in ("correct", "wrong", "difference", "low", "high"):
        np.testing.assert_allclose(found["correctness"][column], table[column], rtol=0, atol=5e-5)


def test_page__without_thumbnails_has_no_pixel_and_no_name_of_an_image(study, tmp_path):
    """Known answer: every picture that the option would add, and every image's name, is absent without it."""
    with_them = page_of(study, tmp_path / "with.html", thumbnails=True)
    (moved,) = [one["moved"] for one in data_of(with_them)]
    without = page_of(study, tmp_path / "without.html").read_text(encoding="utf-8")
    assert len(moved["pictures"]) > 8
    for one in moved["pictures"]:
        assert one["picture"] in with_them.read_text(encoding="utf-8")
        assert one["picture"].partition(",")[2] not in without
    assert "data:image" not in without
    for name in study.images_of("base").names:
        assert name not in without
    assert data_of(tmp_path / "without.html")[0]["moved"] is None


def test_report__thumbnails_are_off_unless_asked_for(tmp_path):
    study = seen(tmp_path / "study")[0]
    page = report(study, figures=["classes"], formats=["svg"]).page
    assert "data:image" not in page.read_text(encoding="utf-8")
    page = report(study, figures=["classes"], formats=["svg"], thumbnails=True).page
    assert "data:image/png" in page.read_text(encoding="utf-8")


def test_page__thumbnails_are_those_of_the_images_moved_most_and_least(study):
    comparison = compare(study)
    (found,) = whom_data(study, comparison, ["base"], ["base", "other"], thumbnails=True)
    moved, probe_set = found["moved"], ProbeSet.load(study.folder / "probe_set")
    for place, layer in enumerate(LAYERS):
        expected = study.extreme_images("base", layer, 4)
        sides = {"most": expected.iloc[:4], "least": expected.iloc[4:].iloc[::-1]}
        for side, rows in sides.items():
            shown = [(moved["pictures"][i], value) for i, value in moved[side][place]]
            assert [value for _, value in shown] == pytest.approx(rows["criticality"].to_list(), abs=5e-5)
            assert [one["label"] for one, _ in shown] == rows["label"].to_list()
            for (one, _), position in zip(shown, rows["position"], strict=True):
                pixels = Image.open(io.BytesIO(base64.b64decode(one["picture"].partition(",")[2])))
                assert np.array_equal(np.asarray(pixels).transpose(2, 0, 1), probe_set.images[position])
    pictures = [one["picture"] for one in moved["pictures"]]
    assert len(set(pictures)) == len(pictures), "each is there once"


def test_page__number_of_thumbnails_is_bounded(study, monkeypatch):
    monkeypatch.setattr("layercrit.reporting.whom._MOST_PICTURES", 10)
    found = whom_data(study, compare(study), ["base", "other"], ["base", "other"], thumbnails=True)
    for one in found:
        assert len(one["moved"]["pictures"]) <= 5
        assert max(map(len, one["moved"]["most"])) <= 1


@pytest.mark.parametrize(
    ("channels", "size", "form"), [(1, 28, "png"), (3, 300, "jpeg"), (4, 64, "jpeg"), (2, 8, "png")]
)
def test_picture__is_small(channels, size, form):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, size, size // 2), dtype=np.uint8)
    text = picture(pixels)
    assert text.startswith(f"data:image/{form};base64,")
    assert len(text) < 4_000
    image = Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2])))
    assert max(image.size) == min(size, 56)
    assert image.mode == ("L" if channels < 3 else "RGB")


def test_page__images_that_are_not_there_any_more(tmp_path):
    study = seen(tmp_path / "study")[0]
    shutil.rmtree(tmp_path / "study" / "probe_set")
    (found,) = data_of(page_of(load_study(study.folder), tmp_path / "r.html", thumbnails=True))
    assert found["of"] == "prediction"
    assert found["moved"] is None
    assert found["correctness"] is None


@needs_browser
def test_page__section_in_a_browser(browser, study, tmp_path):
    path = page_of(study, tmp_path / "r.html", ["base", "other"], thumbnails=True)
    with opened_page(browser, path) as page:
        assert page.is_visible("#whom")
        assert page.is_visible("#whom-link")
        page.select_option("#whom-model", label="Other")
        rows = page.locator("#whom-plot .ytick text").all_text_contents()
        assert all(re.search(r" \(\d+ images?\)$", row) for row in rows)
        page.locator("#whom-details summary").click()
        page.locator("#whom-table tbody tr").nth(2).wait_for()  # it is drawn once the details are open
        assert page.locator("#whom-table tbody tr").count() == 3
        assert HOSTILE in page.inner_text("#whom-table")
        assert page.evaluate("() => window.ran") is None
        assert "18 images that the trained network names right" in page.inner_text("#right-about")
        page.select_option("#layer", index=3)
        assert "reset of fc" in page.inner_text("#moved-title")
        assert page.locator("#moved-most img").count() == page.locator("#moved-least img").count() == 4
        assert page.evaluate("() => [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert violations(page) == []


@needs_browser
def test_page__section_is_hidden_where_nothing_is_known(browser, study, tmp_path):
    with opened_page(browser, page_of(study, tmp_path / "r.html", [])) as page:
        assert not page.is_visible("#whom")
        assert not page.is_visible("#whom-link")


def test_page__says_what_intervals_are_for(study, tmp_path):
    text = html.unescape(page_of(study, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Each interval is for its square alone: of many, some miss." in text
