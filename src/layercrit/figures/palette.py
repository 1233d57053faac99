"""Colours of marks: seen on white and on the page's dark background alike, and told apart."""

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "OTHERS",
    "PURPLE",
    "SKY",
    "contrast",
    "luminance",
    "readable_on",
]

# Blue and green are those of Okabe & Ito 2008 (jfly.uni-koeln.de/color). The others are as far from them, and from each
# other, as colours can be whose contrast to a light page and to a dark one is at least 3, as WCAG 2.2 asks of marks
# (1.4.11), seen with normal vision or any common colour blindness.
BLACK = "#000000"  # on dark pages, the colour of text
BLUE, ORANGE, PURPLE, GREEN, SKY = "#0072B2", "#C07800", "#B07CC0", "#009E73", "#0090FC"
OTHERS = ("#C01890", "#9C543C", "#783CFC", "#D80000", "#D854F0")
"""Further ones, where there are more kinds of things to be shown."""
GREY = "#8A8A8A"
"""Of what is of no kind."""


def luminance(color: npt.ArrayLike) -> float:
    """Return the relative luminance of WCAG 2.2, from 0 for black to 1 for white.

    Args:
        color: red, green and blue in [0, 1]; what follows is left out.
    """
    parts = np.asarray(color, np.float64)[:3]
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Return the contrast of two colours, red, green and blue in [0, 1], by WCAG 2.2: from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable_on(color: npt.ArrayLike) -> str:
    """Return black or white, whichever has more contrast to a colour, red, green and blue in [0, 1]."""
    return "black" if contrast(color, (0, 0, 0)) > contrast(color, (1, 1, 1)) else "white"
