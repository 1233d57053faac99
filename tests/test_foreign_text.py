import csv

import pandas as pd
import pytest

from layercrit.foreign_text import encodable, guarded, unguarded, visible, write_csv

FORMULAS = ["=1+1", "+1", "-x", "@SUM(A1)", "\tx", "\r=x", "=", "'=1", "''+x", "-0.5"]
HARMLESS = ["layer1.0.conv1", "", "'", "'x", "0.10", "a=b", " =1", "x-1", "名前"]


@pytest.mark.parametrize("text", FORMULAS)
def test_guarded__begins_like_no_formula_and_can_be_undone(text):
    assert guarded(text) == f"'{text}"
    assert unguarded(guarded(text)) == text


@pytest.mark.parametrize("text", HARMLESS)
def test_guarded__leaves_other_texts_alone(text):
    assert guarded(text) == unguarded(text) == text


def test_encodable__only_what_utf_8_lacks_changes():
    data = {"a\udcff": ["é", ("x\udc80",), 1, None, 0.5], "b": {"c": "\U0001f9ea"}}
    assert encodable(data) == {r"a\udcff": ["é", [r"x\udc80"], 1, None, 0.5], "b": {"c": "\U0001f9ea"}}


def test_write_csv__names_are_texts_and_numbers_are_numbers(tmp_path):
    names = ["0.1", "0.10", "1e3", *FORMULAS, "a,b", 'a"b', None]
    table = pd.DataFrame({"layer": names, "criticality": [-0.5, float("nan"), *([0.25] * (len(names) - 2))]})
    table["whole"] = pd.array([-1, None, *([2] * (len(names) - 2))], dtype="Int64")
    write_csv(table, tmp_path / "layers.csv")
    rows = list(csv.DictReader((tmp_path / "layers.csv").open(newline="", encoding="utf-8")))
    assert [unguarded(row["layer"]) for row in rows[:-1]] == names[:-1]
    assert all(row["layer"] == "" or row["layer"][0] not in "=+-@\t\r" for row in rows)
    assert [row["criticality"] for row in rows[:3]] == ["-0.5", "", "0.25"]
    assert [row["whole"] for row in rows[:3]] == ["-1", "", "2"]
    assert (tmp_path / "layers.csv").read_text().splitlines()[1] == '"0.1",-0.5,-1'
    assert table["layer"][3] == "=1+1", "the table itself stays as it is"


@pytest.mark.parametrize("text", ["layer1.0", "名前 é ✓", "a b", ""])
def test_visible__what_can_be_seen_stays(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\t", r"a\nb\r\t"),
        ("\x9b31m", r"\x9b31m"),  # one character that begins an escape sequence
        ("\u202etxt\u2066", r"\u202etxt\u2066"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("\udcff", r"\udcff"),  # of a file name that is no UTF-8
        ("\u2028", r"\u2028"),
        ("\U000e0041", r"\U000e0041"),
    ],
    ids=ascii,
)
def test_visible__what_acts_on_a_terminal_is_shown(text, shown):
    assert visible(text) == shown
