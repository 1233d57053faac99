"""Executors by name; those that there are have files of tests of their own."""

from importlib.metadata import EntryPoint

import pytest

from layercrit.errors import StudyError
from layercrit.registry import _READ
from layercrit.study.executors import EXECUTORS, error_text, executor, executor_on
from running_jobs import Inline


@pytest.fixture(autouse=True)
def registered():
    @executor("here")
    def here(rest, study, folder, n_workers):
        """This process."""
        return Inline(place=(rest, study, folder, n_workers))

    @executor("nothing")
    def nothing(rest, study, folder, n_workers):
        """Nothing."""

    yield
    del EXECUTORS["here"], EXECUTORS["nothing"]


@pytest.mark.parametrize(("where", "rest"), [("here", ""), ("here:", ""), ("here://host:1", "//host:1")])
def test_executor_on__passes_on_what_follows_the_name(where, rest):
    assert executor_on(where, "study", "folder", 3).place == (rest, "study", "folder", 3)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("hree", "There is no executor 'hree'. Did you mean 'here'"),
        ("nothing", "The executor 'nothing' made NoneType; expected an Executor"),
    ],
)
def test_executor_on__nothing_that_runs_tasks(where, message):
    with pytest.raises(StudyError, match=message):
        executor_on(where, None, None, None)


def test_executors__ray_is_one():
    import layercrit.study.ray_workers  # noqa: F401

    assert EXECUTORS.summaries()["ray"].startswith("A Ray cluster")


def test_error_text__names_the_plug_in_that_raised(monkeypatch):
    with pytest.raises(ZeroDivisionError) as raised:
        1 / 0  # noqa: B018
    assert error_text(raised.value) == "ZeroDivisionError: division by zero"
    monkeypatch.setitem(_READ, __name__.partition(".")[0], EntryPoint("lab", "lab.resets", "layercrit.resets"))
    assert error_text(raised.value) == "ZeroDivisionError: division by zero (raised by the plug-in lab.resets)"
