import contextlib
import math
import string
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layercrit.errors import ProtocolError
from layercrit.named_options import AtLeast, checked_options, name_list, options_of, split_name, with_options


def declares(
    subject,
    *,
    scale: Annotated[float, AtLeast(0)] = 1.0,
    steps: int = 3,
    exact: bool = False,
    kind: Literal["normal", "uniform"] = "normal",
    text: str = "a b",
    epoch: Annotated[int | None, AtLeast(0)] = None,
):
    """A function with an option of every kind."""


DECLARED = options_of(declares)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.floats(0, allow_infinity=False, allow_nan=False) | st.integers(0, 10**30).map(float),
        "steps": st.integers(),
        "exact": st.booleans(),
        "kind": st.sampled_from(["normal", "uniform"]),
        "text": st.text(max_size=20)
        | st.sampled_from(["true", "None", "lambda", "in", "x1", "1", "a, b=2)", "'", '"']),
        "epoch": st.none() | st.integers(0),
    },
)


def read(text):
    name, given_values = split_name(text, "reset", ProtocolError)
    return name, checked_options(f"The reset {name!r}", given_values, DECLARED, ProtocolError)


@given(VALUES)
@example({"scale": -0.0, "text": "\x00"})
@example({"scale": 5e-324, "text": "\\d\r\n"})
def test_with_options__what_is_written_is_read_again(values):
    text = with_options("noise", values)
    name, found = read(text)
    expected = {option.name: option.default for option in DECLARED.values()} | values
    assert name == "noise"
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in expected.items()}
    assert with_options(*read(text)) == with_options("noise", expected), "a name stays as it is once it is written"


@given(VALUES, st.randoms(use_true_random=False), st.sampled_from(["", " ", "\n "]))
def test_with_options__equal_options_give_equal_names(values, random, space):
    """Whatever the order, the spaces, and the way in which a number is written."""
    other = {"text": repr, "kind": repr, "exact": str, "epoch": str, "steps": str, "scale": "{:.17e}".format}
    pieces = [f"{space}{key}{space}={space}{other[key](value)}{space}" for key, value in values.items()]
    random.shuffle(pieces)
    assert with_options(*read(f"{space}noise({','.join(pieces)}){space}")) == with_options(
        *read(with_options("noise", values))
    )


@given(st.text(string.printable, max_size=30) | st.text(max_size=10).map("noise({})".format))
def test_split_name__any_text_is_read_or_refused(text):
    with contextlib.suppress(ProtocolError):
        name, values = split_name(text, "reset", ProtocolError)
        assert name in text
        assert all(isinstance(value, bool | int | float | str | None) for value in values.values())


@pytest.mark.parametrize(
    ("given_text", "values"),
    [
        ("noise", {}),
        ("noise()", {}),
        ("noise( scale = .5 )", {"scale": 0.5}),
        ("noise(scale=8/255, steps=-2)", {"scale": 8 / 255, "steps": -2}),
        ("noise(kind=uniform, exact=TRUE)", {"kind": "uniform", "exact": True}),
        ("noise(kind='uniform', text=\"true\")", {"kind": "uniform", "text": "true"}),
        ("noise(epoch=none,)", {"epoch": None}),
    ],
)
def test_split_name__forms(given_text, values):
    assert split_name(given_text, "reset", ProtocolError) == ("noise", values)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("noise", "noise(scale=1, steps=3, exact=false, kind=normal, text='a b')"),
        ("noise(epoch=0,scale=1e-9)", "noise(scale=1e-09, steps=3, exact=false, kind=normal, text='a b', epoch=0)"),
    ],
)
def test_with_options__names_have_every_option_but_those_that_are_none(written, canonical):
    assert with_options(*read(written)) == canonical


@pytest.mark.parametrize(
    "wrong",
    ["noise(1)", "noise(scale)", "noise(scale=)", "noise(scale=1, scale=1)", "noise(scale=1)(2)", "noise(**{})",
     "noise(scale=1+1)", "noise(scale=1/0)", "noise(scale=[1])", "noise(scale=f())", "noise(scale=-true)",
     "noise(scale=1j)", "noise(scale=b'1')", "noise(a.b=1)", "noise(scale=1;steps=2)", "noise(#)",
     f"noise(steps={'9' * 5000})", f"noise(scale={'-' * 5000}1)"],
)  # fmt: skip
def test_split_name__what_is_no_option_is_refused(wrong):
    with pytest.raises(ProtocolError, match=r"is not written as noise\(option=value, \.\.\.\)"):
        split_name(wrong, "reset", ProtocolError)


@pytest.mark.parametrize("name", ["noise(", "noise)", "(scale=1)", "1noise(scale=1)", "noise scale=1", "", 3, None])
def test_split_name__what_is_no_name_stays_whole(name):
    assert split_name(name, "reset", ProtocolError) == (name, {})


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"scal": 1}, "has no option 'scal'. Did you mean 'scale'?"),
        ({"scale": -1}, "scale must be a finite number of at least 0; got -1."),
        ({"scale": math.nan}, "scale must be a finite number of at least 0; got nan."),
        ({"scale": math.inf}, "scale must be a finite number of at least 0; got inf."),
        ({"scale": "nan"}, "scale must be a finite number of at least 0; got 'nan'."),
        ({"scale": 10**400}, "scale must be a finite number of at least 0; got 1000"),
        ({"scale": True}, "scale must be a finite number of at least 0; got True."),
        ({"scale": None}, "scale must be a finite number of at least 0; got None."),
        ({"steps": 1.0}, "steps must be a whole number; got 1.0."),
        ({"steps": False}, "steps must be a whole number; got False."),
        ({"exact": 1}, "exact must be true or false; got 1."),
        ({"kind": "unifrom"}, "kind must be one of normal, uniform; got 'unifrom'. Did you mean 'uniform'?"),
        ({"kind": 3}, "kind must be one of normal, uniform; got 3."),
        ({"text": 3}, "text must be text; got 3."),
        ({"epoch": -1}, "epoch must be a whole number of at least 0; got -1."),
    ],
)
def test_checked_options__refusals_say_what_is_expected(given_values, message):
    with pytest.raises(ProtocolError) as caught:
        checked_options("The reset 'noise'", given_values, DECLARED, ProtocolError)
    assert message in str(caught.value)


def test_checked_options__an_option_without_a_default_must_be_given():
    def needs(subject, *, scale: float):
        """Has no default."""

    with pytest.raises(ProtocolError, match=r"needs the option 'scale': a finite number, written as scale=\.\.\."):
        checked_options("The reset 'needs'", {}, options_of(needs), ProtocolError)
    assert checked_options("", {"scale": 2}, options_of(needs), ProtocolError) == {"scale": 2.0}


def test_checked_options__where_there_are_none_the_brackets_are_too_many():
    with pytest.raises(ProtocolError, match=r"has no option 'scale'\. It has none: leave the brackets out\."):
        checked_options("The reset 'zero'", {"scale": 1}, {}, ProtocolError)


def takes_a_list(subject, *, scales: list[float] = ()):
    """One annotation is of another kind."""


def takes_anything(subject, *, scale=1):
    """One option has no annotation."""


def takes_either(subject, *, scale: int | float = 1):
    """One option has two kinds."""


def takes_mixed(subject, *, scale: Literal[1, "a"] = 1):
    """Choices of two kinds."""


@pytest.mark.parametrize("function", [takes_a_list, takes_anything, takes_either, takes_mixed])
def test_options_of__other_annotations_are_refused(function):
    with pytest.raises(TypeError, match=r"'scales?' must be annotated as bool, int, float, str or a Literal"):
        options_of(function)


def test_name_list__a_text_is_one_name():
    assert name_list("ab") == ["ab"]
    assert name_list(name for name in "ab") == ["a", "b"]
    assert name_list(()) == []
