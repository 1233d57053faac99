"""Tables on a narrow terminal: those of all commands, whose numbers and names stay whole."""

import io
import re

import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from layercrit.cli.epochs import _table as epoch_table
from layercrit.cli.fitted_table import FittedTable
from layercrit.cli.printing import bar, plain
from layercrit.cli.proxies import _agreement_table
from layercrit.cli.root import cli
from layercrit.cli.study import _show_means
from layercrit.study.tables import load_study
from running_jobs import Inline
from small_studies import OPTIONS, write_study

LAYERS = "conv1,layer1.0.*,layer3.0.downsample.0,fc"
FEWER = "conv1,layer3.0.downsample.0,fc"
FEW = ("--n-images", "4", "--layers", LAYERS)


def printed(table, width, is_terminal=True):
    """Return the lines of a table on a terminal so wide."""
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None, _environ={})
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def left_out(lines):
    """Return the names of the columns that the line below a table says are left out."""
    found = re.search(r"left out to fit: (.*); ", " ".join(lines))
    return found[1].split(", ") if found else []


def missing(table, lines):
    """Return the cells that no line has beside the others of its row, which may be wrapped texts and columns left out.

    A column that is left out must be one that may be, and is named unless it has no name.
    """
    gone = left_out(lines)
    whole = [one for one in table.columns if not one.wraps and not (
        one.leaves is not None and (one.header in gone or not one.header))]  # fmt: skip
    found = []
    for i in range(table.row_count):
        cells = [str(column.cells[i]).strip() for column in whole]
        if not any(all(cell in line for cell in cells) for line in lines):
            found.append(cells)
    for column in table.columns:
        words = {word for cell in column.cells for word in str(cell).split()} if column.wraps else set()
        if column.header not in gone:
            found += [word for word in words if word not in " ".join(lines)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of two models that ran, measurements of one of them, and nothing that the tests change."""
    from layercrit.measuring import measure
    from layercrit.study.file import read_study_file
    from layercrit.study.running import run_study

    folder = tmp_path_factory.mktemp("study")
    models = [{"reference": f"file:m{i}.safetensors?{OPTIONS}", "name": f"trained-with-seed-{i}",
               "category": category} for i, category in enumerate(("baseline", "adversarial_training"))]  # fmt: skip
    sections = {"study": {"baseline": "trained-with-seed-0"}, "protocol": {"layers": LAYERS}}
    file = write_study(folder, n_images=8, models=models, **sections)
    run_study(read_study_file(file), folder / "out", executor=Inline())
    for name, more in (
        ("one", {"layers": LAYERS}),
        ("pairs", {"layers": FEWER, "sets": "pairs"}),
    ):
        measure(f"file:{folder}/m0.safetensors?{OPTIONS}&input_size=(1,8,8)", f"{folder}/images.npz", trials=2,
                progress=False, **more).save(folder / name)  # fmt: skip
    return folder


COMMANDS = [
    "show one", "show one --by class", "show one --by correctness", "show one --by image", "show pairs",
    "advise one --for freeze", "advise one --for prune --budget 1%", "advise one --for quantise",
    "advise out --for finetune --model trained-with-seed-0",
    "layers MODEL", "compare out", "study status out", "study plan study.toml",
    "zoo list", "methods", "methods a1", "proxies MODEL --images images.npz --hessian-images 1 --trials 2 --out p",
    "proxies MODEL --images images.npz --against one --n-images 8 --hessian-images 1 --trials 2 --out q",
    "worst-case MODEL --images images.npz --steps 1 --restarts 1 --out w",
    "feature-criticality MODEL --images images.npz --steps 1 --out f",
    "module-criticality MODEL --images images.npz --initial INITIAL --out c",
]  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """The tables that are made from now on."""
    made = []
    init = FittedTable.__init__

    def record(self, *arguments, **settings):
        init(self, *arguments, **settings)
        made.append(self)

    monkeypatch.setattr(FittedTable, "__init__", record)
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_commands__numbers_and_names_are_whole(command, folder, made, monkeypatch):
    monkeypatch.chdir(folder)
    for name, file in (("MODEL", "m0.safetensors"), ("INITIAL", "m1.safetensors")):
        command = command.replace(name, f"file:{file}?{OPTIONS}&input_size=(1,8,8)")
    arguments = command.split()
    if arguments[0] in ("worst-case", "feature-criticality", "module-criticality") or arguments[-1] == "p":
        arguments += FEW
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert_whole(made)


def test_study_run__numbers_and_names_are_whole(folder, made):
    _show_means(load_study(folder / "out"))
    assert_whole(made)


def assert_whole(tables):
    """Compare tables at 80 and 100 columns, and in a file, with their cells."""
    with_rows = [table for table in tables if table.row_count]
    assert with_rows
    for table in with_rows:
        for width in (80, 100):
            lines = printed(table, width)
            assert max(map(len, lines)) <= width
            assert missing(table, lines) == [], "\n".join(lines)
            assert "…" not in "".join(lines)
        lines = printed(table, 200, is_terminal=False)
        assert left_out(lines) == []
        cells = [str(cell).strip() for one in table.columns if not one.wraps for cell in one.cells]
        assert [cell for cell in cells if cell not in "\n".join(lines)] == []


def test_proxies__agreement_is_whole():
    numbers = {"n_layers": 23, "spearman": -0.51, "spearman_low": -0.72, "spearman_high": -0.13, "kendall": -0.34,
               "kendall_low": -0.55, "kendall_high": 0.06, "lowest": 0.25, "highest": 0.5, "difference": 0.12,
               "difference_low": -0.08, "difference_high": 0.31}  # fmt: skip
    rows = [{"label": "gradient norm", "null": False, **numbers}, {"label": "log parameters", "null": True, **numbers}]
    table = _agreement_table(pd.DataFrame(rows), "proxies against exact criticality", 0.95)
    lines = printed(table, 80)
    assert "Kendall" in left_out(lines)
    assert missing(table, lines) == []
    assert any("-0.51  -0.72 to -0.13" in line and "+0.12  -0.08 to +0.31" in line for line in lines)


def test_epochs__first_and_last_stay():
    grid = pd.DataFrame({f"layer1.{i}.downsample.0": [i + epoch / 1000 for epoch in range(20)] for i in range(2)})
    table = epoch_table(grid, "Rewound")
    lines = printed(table, 80)
    assert missing(table, lines) == []
    assert left_out(lines) == [str(epoch) for epoch in range(7, 19)]
    assert lines[2].split() == ["layer1.0.downsample.0", *(f"0.{epoch:03d}" for epoch in (*range(7), 19))]


def small_table():
    table = FittedTable("One network", otherwise="--format json")
    table.add_column("layer")
    table.add_column("type", leaves=2)
    table.add_column("top-1 agreement", "right")
    table.add_column("", leaves=1)
    table.add_column("why", wraps=True)
    for share in (0.25, 1.0):
        cells = ("layer1.0.downsample.0", "conv", f"{share:.3f}", bar(share), "the least critical one")
        table.add_row(*map(plain, cells))
    return table


@pytest.mark.parametrize(
    ("width", "header", "why_lines", "gone"),
    [
        (90, "layer                  type  top-1 agreement                        why", 1, []),
        (88, "layer                  type  agreement                        why", 1, []),
        (82, "layer                  type  agreement                        why", 2, []),
        (75, "layer                  type  top-1 agreement  why", 1, []),
        (57, "layer                  agreement  why", 1, ["type"]),
    ],
)
def test_fitted_table__bars_leave_first(width, header, why_lines, gone):
    lines = printed(small_table(), width)
    assert lines[0] == "One network"
    assert header in lines
    assert left_out(lines) == gone
    n_rows = 2
    assert sum(line.endswith(("the least critical", "one")) for line in lines) == why_lines * n_rows


def test_fitted_table__is_complete_in_a_file():
    lines = printed(small_table(), 58, is_terminal=False)
    assert left_out(lines) == []
    assert "█" in "".join(lines)
    assert sum("conv" in line for line in lines) == 2


def test_fitted_table__says_how_wide_the_terminal_is_to_be():
    table = small_table()
    said = " ".join(printed(table, 58)[-2:])
    needed = int(re.fullmatch(r"left out to fit: type; --format json or (\d+) columns show them", said)[1])
    assert "█" in "".join(printed(table, needed))
    assert "█" not in "".join(printed(table, needed - 1))


def test_fitted_table__what_left_before_a_wide_column_returns():
    table = FittedTable()
    for name, leaves in (("name", None), ("narrow", 1), ("wide", 2)):
        table.add_column(name, leaves=leaves)
    table.add_row("a" * 10, "b" * 10, "c" * 30)
    lines = printed(table, 40)
    assert (left_out(lines), missing(table, lines)) == (["wide"], [])


def test_fitted_table__names_fold_where_nothing_more_can_leave():
    name = "encoder.layers.11.attention.output.projection.dense.weight"
    table = FittedTable()
    table.add_column("layer")
    table.add_column("95% interval", "right")
    table.add_row(plain(name), "0.123 - 0.456")
    lines = printed(table, 40)
    assert "0.123 - 0.456" in lines[1]
    assert "".join(line.split()[0] for line in lines[1:]) == name


def test_fitted_table__numbers_never_fold_in_place_of_names():
    table = FittedTable()
    table.add_column("layer")
    table.add_column("95% interval", "right")
    table.add_row(plain("layer1.0.conv1"), "-1234.066 to -1234.423")
    lines = printed(table, 32)
    assert lines[1].endswith("  -1234.066 to -1234.423")
