import re
from pathlib import Path

import numpy as np
import pytest

from layercrit.counts import counted, counted_range

SOURCES = sorted((Path(__file__).parents[1] / "src" / "layercrit").rglob("*.py"))


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (2000, "2,000 layers"), (np.int64(1), "1 layer")]
)
def test_counted(n, text):
    assert counted(n, "layer") == text


@pytest.mark.parametrize(
    ("least", "most", "text"), [(10, 39, "10 to 39 trials"), (5, 5, "5 trials"), (1, 1, "1 trial")]
)
def test_counted_range(least, most, text):
    assert counted_range(least, most, "trial") == text


def test_counted__nothing_else_makes_plurals():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert path.name == "counts.py" or not re.search(r"""\} [\w ]+\(s\)|'s' \* \(|"s" \* \(""", text), path
