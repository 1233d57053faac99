"""The figures of proxies: a panel for each, in the order of the table, nulls in grey; models as marks."""

import numpy as np
import pandas as pd
import pytest

from figure_checks import NASTY, lines, written
from layercrit.errors import ProtocolError
from layercrit.figures.proxies import proxy_ranks, proxy_scatter
from layercrit.figures.style import save_figure

NAN = float("nan")
EXACT = np.array([0.9, 0.1, 0.5, 0.7])


def table(*rows):
    return pd.DataFrame(
        rows, columns=["proxy", "label", "null", "n_layers", "spearman", "spearman_low", "spearman_high"]
    )


TABLE = table(
    ("fisher", "output change", False, 4, 0.8, 0.61, 0.9),
    ("obd", "OBD", False, 3, 0.5, NAN, NAN),
    ("depth", "depth", True, 4, -0.2, -0.4, 0.1),
    ("distance", "distance", False, 0, NAN, NAN, NAN),
)


def values():
    return pd.DataFrame(
        {
            "exact": EXACT,
            "fisher": [1e-3, 1e-2, 0.1, 10.0],
            "obd": [1.0, 2.0, 3.0, NAN],
            "depth": np.arange(4.0),
            "distance": NAN,
        }
    )


def test_proxy_scatter__a_panel_per_proxy_in_the_order_of_the_table():
    figure = proxy_scatter(values(), TABLE, title="a model")
    assert written(figure, "proxy") == ["output change", "OBD", "depth"]  # a proxy of no layer has no panel
    assert written(figure, "correlation") == [
        "rho = 0.80 (0.61 to 0.90)",
        "rho = 0.50, 3 layers",
        "rho = -0.20 (-0.40 to 0.10)".replace("-", "\u2212"),
    ]
    first, second, null = figure.axes
    np.testing.assert_array_equal(lines(first, "layer")[0].get_xydata(), np.stack([values()["fisher"], EXACT], axis=1))
    assert len(lines(second, "layer")[0].get_xydata()) == 3
    assert first.get_xscale() == "log"
    assert second.get_xscale() == null.get_xscale() == "linear"
    assert all("$" not in label.get_text() for label in first.get_xticklabels())
    colors = [lines(one, "layer")[0].get_color() for one in figure.axes]
    assert colors[0] == colors[1] != colors[2]


def test_proxy_scatter__any_names_and_files(tmp_path):
    rows = [("fisher", name, False, 4, 0.1, 0.0, 0.2) for name in NASTY]
    figure = proxy_scatter(values(), table(*rows), title=NASTY[0])
    assert len(written(figure, "proxy")) == len(NASTY)
    assert [path.suffix for path in save_figure(figure, tmp_path / "scatter")] == [".png", ".svg"]


def test_proxy_ranks__marks_of_models_and_means():
    by_model = pd.DataFrame({"proxy": ["fisher", "fisher", "depth", "obd"], "spearman": [0.7, 0.9, -0.2, NAN]})
    figure = proxy_ranks(by_model, TABLE, title="a study")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["output change", "OBD", "depth"]
    np.testing.assert_array_equal(lines(axes, "model")[0].get_xydata(), [[0.7, 0], [0.9, 0]])
    assert [line.get_xydata()[0].tolist() for line in lines(axes, "mean")] == [[0.8, 0], [0.5, 1], [-0.2, 2]]
    assert [list(line.get_xdata()) for line in lines(axes, "interval")] == [[0.61, 0.9], [-0.4, 0.1]]


def test_proxy_figures__what_cannot_be_plotted():
    with pytest.raises(ProtocolError, match="no column 'spearman_low'"):
        proxy_scatter(values(), TABLE.drop(columns="spearman_low"), title="")
    with pytest.raises(ProtocolError, match="No proxy applies to any layer"):
        proxy_scatter(values(), TABLE.iloc[3:], title="")
    with pytest.raises(ProtocolError, match="No proxy can be ranked"):
        proxy_ranks(pd.DataFrame({"proxy": [], "spearman": []}), TABLE.iloc[3:], title="")
