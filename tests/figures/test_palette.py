"""Whether colours of marks are seen on every background, and told apart with any common colour blindness."""

import re
from importlib import resources
from itertools import combinations

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from layercrit.figures.categories import CATEGORY_COLORS
from layercrit.figures.palette import BLACK, GREY, OTHERS, contrast, luminance, readable_on
from layercrit.figures.squares import COLOR_MAPS

KNOWN = [color for color in CATEGORY_COLORS.values() if color != BLACK]
STYLE = (resources.files("layercrit.reporting") / "web" / "page.css").read_text(encoding="utf-8")
BACKGROUNDS = ["#fff", *re.findall(r"--(?:back|card): (#\w+);", STYLE)]
# How colours look to readers without one kind of cones, linear RGB (Machado, Oliveira & Fernandes 2009, severity 1).
SEEN = {
    "usual": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def oklab(color, seen):
    """A colour where equal distances look about equal (Ottosson 2020)."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)])
    red, green, blue = np.clip(np.asarray(seen) @ linear, 0, 1)
    cones = np.cbrt([
        0.4122 * red + 0.5363 * green + 0.0514 * blue,
        0.2119 * red + 0.6807 * green + 0.1074 * blue,
        0.0883 * red + 0.2817 * green + 0.6300 * blue,
    ])  # fmt: skip
    return np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]) @ cones


def test_luminance_and_contrast__of_known_colours():
    assert (luminance((0, 0, 0)), luminance((1, 1, 1))) == (0.0, pytest.approx(1.0))
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast(to_rgb("#767676"), to_rgb("white")) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_palette__is_seen_on_every_background(background):
    assert len(BACKGROUNDS) == 5
    for color in (*KNOWN, *OTHERS, GREY):
        assert contrast(to_rgb(color), to_rgb(background)) >= 3, color


@pytest.mark.parametrize("how", SEEN)
def test_palette__is_told_apart(how):
    for one, other in combinations((*KNOWN, *OTHERS), 2):
        assert np.linalg.norm(oklab(one, SEEN[how]) - oklab(other, SEEN[how])) > 0.055, (one, other)


@pytest.mark.parametrize("name", COLOR_MAPS.values())
def test_readable_on__every_colour_of_a_map(name):
    for color in colormaps[name](np.linspace(0, 1, 33)):
        assert contrast(color, to_rgb(readable_on(color))) >= 4.5
