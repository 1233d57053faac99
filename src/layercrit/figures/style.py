"""The style that all figures share, the width of text in it, and how figures are saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.errors import ProtocolError, near

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_formats", "figure_style", "printable", "save_figure", "svg_of", "text_width"]

# Each format with the metadata that would hold the date.
_FORMATS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


# On top of matplotlib's defaults, so that a user's own style neither changes nor breaks a figure. Text from outside is
# never read as a formula.
_STYLE: dict[str, Any] = {
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.0,
    "text.hinting": "no_hinting",  # so that a text is as wide as `text_width` measures it, at any resolution
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "layercrit",
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Use matplotlib's defaults and our own style, and restore the user's settings afterwards.

    Every figure is built and saved in it, so that no figure depends on the user's own style.
    """
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def printable(text: object) -> str:
    r"""Return text on one line of characters that the font has.

    What XML forbids, such as control characters, becomes a space. Letters of scripts that the font lacks are written as
    in Python, such as ``\u540d``: boxes in their places would make all names alike.
    """
    return "".join(
        " " if not character.isprintable() else character if ord(character) in _signs() else _code(character)
        for character in str(text)
    )


@cache
def _signs() -> frozenset[int]:
    """Return the characters that the font has, both as normal and as bold."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    family = _STYLE["font.family"]
    normal, bold = (FT2Font(findfont(FontProperties(family=family, weight=weight))) for weight in ("normal", "bold"))
    return frozenset(normal.get_charmap().keys() & bold.get_charmap().keys())


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of one line of text in inches.

    Args:
        text: as it is shown, without formulas.
        size: of the font, in points.
        weight: ``normal`` or ``bold``.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)
    return float(width) / 72


def check_formats(formats: Sequence[str]) -> None:
    """Raise ProtocolError for a format in which figures cannot be saved."""
    for one in formats:
        if one not in _FORMATS:
            raise ProtocolError(f"Figures cannot be saved in the format {one!r}. {near(one, _FORMATS)}")


def save_figure(
    figure: "Figure", path_without_suffix: str | Path, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Save a figure once per format; the same figure gives the same bytes.

    Args:
        figure: as `criticality_bars` returns it.
        path_without_suffix: the format is appended after a dot, even if the name has dots of its own. Missing folders
            are created.
        formats: of ``png`` (200 dots per inch), ``svg`` and ``pdf``.

    Returns:
        The files written, in the order of ``formats``.

    Raises:
        ProtocolError: a format is unknown; nothing is written then.
    """
    check_formats(formats)
    base = Path(path_without_suffix)
    base.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in formats:
        path = base.with_name(f"{base.name}.{one}")
        with figure_style():
            figure.savefig(path, format=one, dpi=200, metadata=_FORMATS[one])
        paths.append(path)
    return paths


def svg_of(figure: "Figure") -> bytes:
    """Return a figure as `save_figure` writes it as SVG."""
    file = BytesIO()
    with figure_style():
        figure.savefig(file, format="svg", dpi=200, metadata=_FORMATS["svg"])
    return file.getvalue()
