"""What a notebook shows of a result: escaped, small, legible on any background, and loaded from nowhere."""

import base64
import io
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from layercrit.figures.bars import criticality_bars
from layercrit.notebook_html import Column, result_html

HOSTILE = "<script>alert(1)</script>\"' onerror=x &amp; \x1b[2J\u202e"
COLUMNS = [Column("layer"), Column("criticality", "bar"), Column("share", "percent"), Column("n", "number", "trials")]
ALLOWED = {"div", "strong", "table", "tbody", "thead", "tr", "th", "td", "img", "details", "summary", "span", "p"}


def layers(n, name="layer{}"):
    rows = [(name.format(i), "conv", i / n, i / n, i / n, "ok", i / n, 3) for i in range(n)]
    return pd.DataFrame(rows, columns=["layer", "type", "criticality", "low", "high", "status", "share", "n"])


def elements(html):
    """Tags with their attributes; every tag must be closed in order."""
    found, opened = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))
            if tag != "img":
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Reader().feed(html)
    assert not opened
    return found


def test_result_html__escapes_all_texts():
    table = layers(3, HOSTILE)
    html = result_html(HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, table, [*COLUMNS, Column("type", title=HOSTILE)],
                       criticality_bars(layers(3), title=HOSTILE))  # fmt: skip
    assert {tag for tag, _ in elements(html)} <= ALLOWED
    assert {name for _, attributes in elements(html) for name in attributes} <= {"style", "scope", "alt", "src"}
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_result_html__loads_nothing_and_stays_small():
    table = layers(160, "features.denseblock{}.denselayer.conv1")
    html = result_html("DenseNet", {}, "160 layers", table, COLUMNS, criticality_bars(table, title="DenseNet"))
    (picture,) = [attributes for tag, attributes in elements(html) if tag == "img"]
    head, _, data = picture["src"].partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert 1000 < image.width <= 1600
    colors = {color for _, color in image.convert("RGB").getcolors(256)}
    assert {(0, 114, 178), (255, 255, 255)} <= colors, "the bars are not in their colour"
    assert len(html) < 150_000
    assert "://" not in html.replace(data, "")


def test_result_html__shows_no_folders_of_this_machine():
    facts = {"images": "8 of /home/me/private/val", "first failure": "there is no '/home/me/w.pt'", "of": "a/b 1/2"}
    html = result_html("file:/home/me/own/w.pt", facts, "3 layers", layers(3), COLUMNS)
    assert "home" not in html
    for shown in ("<strong>file:w.pt</strong>", "8 of val", "there is no &#x27;w.pt&#x27;", "a/b 1/2"):
        assert shown in html


def test_result_html__takes_text_and_background_of_the_theme():
    html = result_html("a", {"b": "c"}, "d", layers(3), COLUMNS)
    colors = {found for _, attributes in elements(html) for found in re.findall(r"#\w+", attributes.get("style", ""))}
    (bar,) = colors
    red, green, blue = ((c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for c in to_rgb(bar))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # WCAG 2.2, as the contrasts below
    assert 1.05 / (luminance + 0.05) > 3, "on white"
    assert (luminance + 0.05) / 0.05 > 3, "on black"
    assert not re.search(r"(ground|color):", html.replace(f"background:{bar}", ""))


def test_result_html__cells_by_kind():
    table = pd.DataFrame({"layer": ["a", None], "criticality": [0.25, float("nan")], "share": [0.5, 1.0], "n": [3, 4]})
    html = result_html("t", {"empty": "", "known": 0}, "2 layers", table, COLUMNS)
    cells = [re.sub("<[^>]+>", "", cell).strip() for cell in re.findall("<td.*?</td>", html)]
    assert cells == ["0", "a", "0.250", "50.0%", "3", "-", "-", "100.0%", "4"]
    assert "width:1.50em" in html
    assert "empty" not in html
    assert ">trials</th>" in html


@pytest.mark.parametrize(("n", "said"), [(300, None), (301, "and 1 more"), (4000, "and 3,700 more")])
def test_result_html__long_tables_are_cut(n, said):
    html = result_html("t", {}, "layers", layers(n), COLUMNS)
    assert html.count("<tr>") == 1 + 300
    assert (said is None) == ("more" not in html)
    assert said is None or said in html
