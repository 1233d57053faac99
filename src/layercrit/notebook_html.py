"""How results show themselves in a notebook: facts, a figure and a table as HTML that asks nothing of any network."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from layercrit.figures.style import figure_style
from layercrit.foreign_text import visible, without_folders

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Column", "result_html"]

_MOST_ROWS = 300  # a notebook keeps its outputs in its file
_DPI, _WIDEST, _COLORS = 130, 1600, 64  # of the figure, in pixels: some tens of kilobytes
# Text and background are those of the notebook's theme; only the bars have a colour of their own, whose contrast is at
# least 3 with white and with black. Every style stands at its element: what notebooks are shown by may drop any other.
_LEFT, _RIGHT = (f"text-align:{side}" for side in ("left", "right"))
_BAR = "display:inline-block;height:0.7em;width:{:.2f}em;background:#0072B2"
_TABLE = "border-collapse:separate;border-spacing:0.7em 0.1em"
_BAR_WIDTH = 6.0  # em, of a share of 1


@dataclass(frozen=True)
class Column:
    """A column that is shown of a table.

    Attributes:
        name: in the table.
        kind: ``text``, ``number``, ``percent`` (of a share in [0, 1]), or ``bar``: a number in [0, 1] and a bar.
        title: what it is called; empty: its name.
    """

    name: str
    kind: Literal["text", "number", "percent", "bar"] = "text"
    title: str = ""

    @property
    def style(self) -> str:
        """How its cells are set."""
        return _RIGHT if self.kind in ("number", "percent") else _LEFT


def result_html(
    title: str,
    facts: Mapping[str, object],
    heading: str,
    table: "pd.DataFrame",
    columns: Sequence[Column],
    figure: "Figure | None" = None,
) -> str:
    """Return a result as HTML: its title, facts, the figure, and the table behind a heading that opens it.

    All texts are escaped, and of absolute paths only names are shown: notebooks are passed on. There
    is no script in it, and nothing that would be loaded.

    Args:
        title: such as the model's name; also the alternative text of the figure.
        facts: name -> value; those that are empty are left out.
        heading: what the rows of the table are.
        table: any table.
        columns: those of its columns that are shown.
        figure: is embedded as a picture.
    """
    about = "".join(
        f'<tr><th scope="row" style="{_LEFT}">{_text(name)}</th><td style="{_LEFT}">{_text(value)}</td></tr>'
        for name, value in facts.items()
        if str(value)
    )
    head = "".join(f'<th scope="col" style="{one.style}">{_text(one.title or one.name)}</th>' for one in columns)
    rows = table[[one.name for one in columns]].head(_MOST_ROWS).itertuples(index=False, name=None)
    body = "".join(f"<tr>{''.join(map(_cell, columns, row))}</tr>" for row in rows)
    more = f"<p>and {len(table) - _MOST_ROWS:,} more</p>" if len(table) > _MOST_ROWS else ""
    picture = "" if figure is None else f'<img alt="{_text(title)}" style="max-width: 100%" src="{_png(figure)}">'
    return (
        f'<div><strong>{_text(title)}</strong><table style="{_TABLE}"><tbody>{about}</tbody></table>{picture}'
        f'<details><summary>{_text(heading)}</summary><table style="{_TABLE}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{more}</details></div>"
    )


def _text(value: object) -> str:
    return escape(visible(without_folders(value)))


def _cell(column: Column, value: Any) -> str:
    if value is None or value != value:
        shown = "-"
    elif column.kind == "percent":
        shown = f"{value:.1%}"
    elif column.kind == "text" or not isinstance(value, float):
        shown = _text(value)
    else:
        shown = f"{value:.3f}"
        if column.kind == "bar":
            style = _BAR.format(_BAR_WIDTH * min(1.0, max(0.0, value)))
            shown += f' <span style="{style}"></span>'
    return f'<td style="{column.style}">{shown}</td>'


def _png(figure: "Figure") -> str:
    """Return a figure as the address of a picture that holds all of it."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    with figure_style():
        figure.savefig(drawn, format="png", dpi=min(_DPI, _WIDEST / figure.get_size_inches()[0]))
    few = Image.open(drawn).convert("RGB").quantize(_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode("ascii")
