import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from figure_checks import check_layout
from layercrit.errors import ProtocolError
from layercrit.figures.bars import criticality_bars
from layercrit.figures.style import figure_style, printable, save_figure, text_width


def layers(n_layers: int, types: tuple[str, ...] = ("conv", "linear")) -> pd.DataFrame:
    values = np.random.default_rng(n_layers).uniform(0.1, 0.9, n_layers)
    return pd.DataFrame(
        {
            "layer": [f"layer{index // 8}.{index % 8}.conv" for index in range(n_layers)],
            "type": [types[index % len(types)] for index in range(n_layers)],
            "criticality": values,
            "low": values - 0.1,
            "high": values + 0.05,
            "status": "ok",
        }
    )


def intervals(axes: Axes) -> np.ndarray:
    """Return the ends of the error bars, ``(n_bars, 2, 2)`` as ((x, low), (x, high))."""
    (lines,) = (one for one in axes.collections if one.get_gid() == "intervals")
    return np.array(lines.get_segments())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def dashed(axes: Axes, style: str) -> list[float]:
    return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == style]


@pytest.mark.parametrize("n_layers", [1, 2, 6, 54, 120])
def test_criticality_bars__one_bar_and_interval_per_layer_in_order(n_layers: int) -> None:
    table = layers(n_layers).iloc[::-1]  # the order of the table counts, not its index
    (axes,) = criticality_bars(table, title="model").axes
    assert [bar.get_height() for bar in axes.patches] == table["criticality"].tolist()
    assert [round(bar.get_x() + bar.get_width() / 2, 9) for bar in axes.patches] == list(range(n_layers))
    assert [label.get_text() for label in axes.get_xticklabels()] == table["layer"].tolist()
    expected = [[[x, low], [x, high]] for x, (low, high) in enumerate(zip(table["low"], table["high"], strict=True))]
    np.testing.assert_array_equal(intervals(axes), expected)
    assert axes.spines["left"].get_bounds() == (0, 1)
    assert axes.get_ylabel() == "criticality (1 − mean cosine similarity)"  # noqa: RUF001


@pytest.mark.parametrize("n_layers", [1, 6, 54, 120])
@pytest.mark.parametrize("name", ["fc", "encoder.layers.encoder_layer_11.self_attention.out_proj"])
def test_criticality_bars__nothing_is_cut_off_or_overlaps(n_layers: int, name: str) -> None:
    table = layers(n_layers, ("conv", "linear", "conv+norm+linear", "embedding")).assign(
        layer=[f"{name}{index:03}" for index in range(n_layers)]
    )
    table.loc[0, "status"] = "unchanged 1/3"
    title = "hf:some-organisation/some-rather-long-name-patch16-224-in21k-finetuned"
    figure = criticality_bars(table, title=title, mean=0.97, chance=0.02)
    check_layout(figure)
    slot = figure.axes[0].get_window_extent().width / n_layers / figure.dpi * 72  # points
    assert all(1.16 * label.get_fontsize() <= slot for label in figure.axes[0].get_xticklabels())  # a line's height


def test_criticality_bars__labels_stand_instead_of_names() -> None:
    table = layers(4).assign(label=["[0.0] conv", "[0.0] conv", None, "$x$\t"])  # layers have names of their own
    names = [[label.get_text() for label in criticality_bars(some, title="model").axes[0].get_xticklabels()]
             for some in (table, table.iloc[::-1])]  # fmt: skip
    assert names[0] == ["[0.0] conv", "[0.0] conv", "layer0.2.conv", "$x$ "]
    assert names[1] == names[0][::-1]
    (axes,) = criticality_bars(table.assign(label=np.nan), title="model").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == table["layer"].tolist()
    with pytest.raises(ProtocolError, match="no column 'layer'"):
        criticality_bars(table.drop(columns="layer"), title="model")


def test_criticality_bars__longer_labels_have_room() -> None:
    long = criticality_bars(layers(4).assign(label="a label that is longer than any name of a layer"), title="model")
    check_layout(long)
    assert long.get_figheight() > criticality_bars(layers(4), title="model").get_figheight() + 1
    short = criticality_bars(layers(4).assign(layer=list("abcd")).assign(label=layers(4)["layer"]), title="model")
    assert short.get_figheight() == criticality_bars(layers(4), title="model").get_figheight()


def test_criticality_bars__types_have_colours_and_a_legend() -> None:
    table = layers(8, ("conv", "linear", "norm", "conv+norm"))
    (axes,) = criticality_bars(table, title="model").axes
    colors = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert len(set(colors)) == 4
    assert colors[:4] == colors[4:]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["conv", "linear", "norm", "conv+norm"]
    assert [to_hex(patch.get_facecolor()) for patch in legend.get_patches()] == colors[:4]


def test_criticality_bars__known_types_keep_their_colour_in_every_figure() -> None:
    (alone,) = criticality_bars(layers(1, ("linear",)), title="a").axes
    (among,) = criticality_bars(layers(3, ("new", "other", "linear")), title="b").axes
    assert alone.patches[0].get_facecolor() == among.patches[2].get_facecolor()


def test_criticality_bars__one_type_has_no_legend() -> None:
    (axes,) = criticality_bars(layers(6, ("conv",)), title="model").axes
    assert axes.get_legend() is None


def test_criticality_bars__layers_without_interval_have_no_error_bar() -> None:
    table = layers(5)
    table.loc[[1, 3], ["low", "high"]] = np.nan
    (axes,) = criticality_bars(table, title="model").axes
    assert intervals(axes)[:, 0, 0].tolist() == [0, 2, 4]
    table[["low", "high"]] = np.nan
    (axes,) = criticality_bars(table, title="model").axes
    assert len(intervals(axes)) == 0
    assert len(axes.patches) == 5


def test_criticality_bars__doubtful_layers_are_hatched() -> None:
    table = layers(4, ("conv",))
    table.loc[1, "status"] = "unchanged 1/3"
    table.loc[2, ["criticality", "low", "high", "status"]] = [np.nan, np.nan, np.nan, "non-finite 3/3"]
    (axes,) = criticality_bars(table, title="model").axes
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True, True, False]
    assert axes.patches[1].get_height() == table["criticality"][1]
    assert axes.patches[2].get_height() == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not all trials ok"]


def test_criticality_bars__levels_are_drawn_and_labelled() -> None:
    figure = criticality_bars(layers(6), title="model", mean=0.4321, chance=0.12)
    (axes,) = figure.axes
    assert dashed(axes, "--") == [0.4321]
    assert dashed(axes, ":") == [0.88]
    assert {"mean 0.43", "unrelated prediction 0.88"} <= set(texts(figure))
    assert {0, 1} <= set(dashed(axes, "-"))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_criticality_bars__unknown_levels_are_left_out(missing: float | None) -> None:
    figure = criticality_bars(layers(6), title="model", mean=missing, chance=missing)
    assert dashed(figure.axes[0], "--") == dashed(figure.axes[0], ":") == []
    assert not any("mean 0" in text or "unrelated" in text for text in texts(figure))


@pytest.mark.parametrize("mean", [0.50, 0.51, 0.52])
def test_criticality_bars__labels_of_near_levels_keep_their_order(mean: float) -> None:
    (axes,) = criticality_bars(layers(6), title="model", mean=mean, chance=0.49).axes
    heights = {text.get_text().split()[0]: text.xy[1] for text in axes.texts if hasattr(text, "xy")}
    assert (heights["mean"] > heights["unrelated"]) == (mean > 0.51)
    assert abs(heights["mean"] - heights["unrelated"]) > 0.05


NASTY = ["$x_1$", "a$b$c", r"\frac{", "_hidden", "cost$", "x^2_{y}", "tab\tbell\x07", "<&>\"'", "--", "Schicht-ä"]


@pytest.mark.parametrize("usetex", [False, True], ids=["plain", "user has TeX switched on"])
def test_criticality_bars__names_from_outside_are_shown_as_they_are(tmp_path: Path, usetex: bool) -> None:
    table = layers(len(NASTY)).assign(layer=NASTY, type=[name.strip("_") for name in NASTY])
    with mpl.rc_context({"text.usetex": usetex}):
        figure = criticality_bars(table, title="$\\alpha$ and {", mean=0.5)
        (png, svg) = save_figure(figure, tmp_path / "nasty")
    plain = [name.replace("\t", " ").replace("\x07", " ") for name in NASTY]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == plain
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [name.strip("_") for name in plain]
    assert "$\\alpha$ and {" in texts(figure)
    ET.parse(svg)
    Image.open(png).verify()
    figure.savefig(tmp_path / "by hand.png")  # outside our style, too
    assert all(not text.get_parse_math() for text in figure.findobj(Text) if text.get_text() in plain)


def test_criticality_bars__a_users_style_changes_nothing(tmp_path: Path) -> None:
    table = layers(6)
    (plain,) = save_figure(criticality_bars(table, title="model"), tmp_path / "plain", ["svg"])
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.figsize": (1, 1), "lines.linewidth": 9}):
        (styled,) = save_figure(criticality_bars(table, title="model"), tmp_path / "styled", ["svg"])
        assert mpl.rcParams["font.size"] == 30
    assert plain.read_bytes() == styled.read_bytes()


@pytest.mark.parametrize("column", ["layer", "type", "criticality", "low", "high", "status"])
def test_criticality_bars__missing_column_is_an_error(column: str) -> None:
    with pytest.raises(ProtocolError, match=rf"has no column '{column}'; it has .*Expected layer, type"):
        criticality_bars(layers(3).drop(columns=column), title="model")


def test_criticality_bars__no_rows_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="has no rows: expected one per layer"):
        criticality_bars(layers(3).iloc[:0], title="model")


def test_criticality_bars__repeated_layer_is_an_error() -> None:
    table = pd.concat([layers(3), layers(2)])
    with pytest.raises(ProtocolError, match=r"'layer0\.0\.conv' more than once: .*Select one model"):
        criticality_bars(table, title="model")


def test_criticality_bars__table_is_left_as_it_was() -> None:
    table = layers(5)
    before = table.copy(deep=True)
    criticality_bars(table, title="model", mean=0.5, chance=0.1)
    pd.testing.assert_frame_equal(table, before)


def test_printable__replaces_what_cannot_be_drawn() -> None:
    assert printable("a\tb\nc\x00d\u2028e\x7f Cé $x$") == "a b c d e  Cé $x$"
    assert printable(7) == "7"


def test_printable__letters_that_the_font_lacks_stay_apart():
    assert printable("é Ж ع") == "é Ж ع", "which the font has"
    assert printable("層1") == r"\u5c641"
    assert len({printable(name) for name in ("層", "畳", "한", "क", "🧪")}) == 5


@pytest.mark.parametrize("dpi", [72, 100, 200, 1000])
def test_text_width__is_that_of_the_drawn_text(dpi: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = Figure(dpi=dpi)
    with figure_style():
        for text, size, weight in (("layer4.2.conv3", 9, "normal"), ("$x_1$ & Cé", 9, "bold"), ("x" * 60, 4, "normal")):
            drawn = figure.text(0, 0, text, fontsize=size, fontweight=weight)
            box = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer())
            # a drawn text begins and ends on whole pixels, and each of its letters is fitted to them
            assert text_width(text, size, weight) == pytest.approx(box.width / dpi, rel=0.015, abs=2 / dpi)


def test_save_figure__files_open_and_have_the_stated_resolution(tmp_path: Path) -> None:
    figure = criticality_bars(layers(54), title="model")
    paths = save_figure(figure, str(tmp_path / "new" / "resnet50.a1_in1k"), ["png", "svg", "pdf"])
    assert [path.name for path in paths] == [f"resnet50.a1_in1k.{one}" for one in ("png", "svg", "pdf")]
    with Image.open(paths[0]) as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert image.size == pytest.approx(200 * figure.get_size_inches(), abs=1)
    assert ET.parse(paths[1]).getroot().tag.endswith("svg")
    assert paths[2].read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_save_figure__same_table_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    files = []
    for index in range(2):
        figure = criticality_bars(layers(12), title="model", mean=0.5, chance=0.1)
        files += save_figure(figure, tmp_path / f"{index}", [suffix]) + save_figure(
            figure, tmp_path / "again", [suffix]
        )
    contents = [path.read_bytes() for path in files]
    assert len(set(contents)) == 1
    assert b"dc:date" not in contents[0]
    assert b"CreationDate" not in contents[0]


def test_save_figure__unknown_format_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    figure = criticality_bars(layers(3), title="model")
    with pytest.raises(ProtocolError, match=r"cannot be saved in the format 'pgn'. Did you mean 'png'"):
        save_figure(figure, tmp_path / "figure", ["svg", "pgn"])
    assert not list(tmp_path.iterdir())


def test_figures__no_pyplot_and_settings_left_as_found(tmp_path: Path) -> None:
    """In a fresh interpreter, since pytest's plugins or other tests may have imported pyplot."""
    program = f"""
import sys
import layercrit.figures
assert not [name for name in sys.modules if name.startswith("matplotlib")], "matplotlib is imported too early"
import matplotlib, pandas
matplotlib.rcParams["font.size"] = 23
def settings():  # without the backend: to look at it chooses one, and imports pyplot
    return {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
table = pandas.DataFrame({{"layer": ["a", "b"], "type": "conv", "criticality": [0.1, 0.2], "low": 0.0, "high": 0.5,
                           "status": "ok"}})
figure = layercrit.figures.criticality_bars(table, title="t")
layercrit.figures.save_figure(figure, {str(tmp_path / "figure")!r})
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
