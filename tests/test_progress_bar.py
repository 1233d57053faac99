"""The progress bar in a notebook: one output that is replaced, and nothing of it afterwards."""

import itertools
import os
import random
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from layercrit import progress_bar
from layercrit.progress_bar import Bar

CELL = """
import layercrit.progress_bar
from layercrit.progress_bar import Bar

layercrit.progress_bar._SECONDS_BETWEEN_UPDATES = 0
with Bar(shown={shown}) as bar:
    bar.say("<model>: 3 layers")
    for done in range(100):
        bar.measured(done, 100)
print("done")
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Run cells in one kernel; return what each showed at the end, and the messages that led to it."""
    folder = str(tmp_path_factory.mktemp("kernel"))
    own = dict.fromkeys(("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"), folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(CELL.format(shown=s)) for s in (True, False)]
        )
        client, messages = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": folder}}), []
        process = client.process_message

        def keep(message, cell, index):
            messages.append((index, message["msg_type"], message["content"]))
            return process(message, cell, index)

        client.process_message = keep
        client.execute()
    return notebook.cells, messages


def test_bar__in_a_notebook_is_one_output_that_is_replaced(kernel):
    _, messages = kernel
    own = [(kind, content["data"]) for index, kind, content in messages if index == 0 and "data" in content]
    assert [kind for kind, _ in own[:3]] == ["display_data", "display_data", "update_display_data"]
    assert {kind for kind, _ in own[2:]} == {"update_display_data"}
    bars = [data["text/plain"] for _, data in own[1:]]
    assert bars[50].startswith("measuring ━━━")
    assert " 50% " in bars[50]
    assert "\x1b" not in "".join(bars)
    assert "<pre" in own[50][1]["text/html"]
    assert bars[-1] == own[-1][1]["text/html"] == ""


def test_bar__in_a_notebook_leaves_what_was_said(kernel):
    said, bar, printed = kernel[0][0]["outputs"]
    assert said["data"]["text/plain"] == "<model>: 3 layers\n"
    assert "&lt;model&gt;" in said["data"]["text/html"]
    assert set(bar["data"].values()) == {""}
    assert printed["text"] == "done\n"


def test_bar__in_a_notebook_is_silent_unless_asked_for(kernel):
    (printed,) = kernel[0][1]["outputs"]
    assert printed["text"] == "done\n"


def test_bar__without_a_terminal_prints_what_is_said_and_no_bar():
    code = CELL.format(shown=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("done\n", "<model>: 3 layers\n")


def test_bar__without_a_terminal_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    now = itertools.count(step=1.0)  # seconds
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(now))
    with Bar(shown=True) as bar:
        for done in range(4000):
            bar.measured(done, 4000)
        bar.measured(4000, 4000)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"measuring 1% after 30 s, about 6\d min left", lines[0])
    assert re.fullmatch(r"measuring [12]% after 60 s, about 6\d min left", lines[1])
    after = [int(re.search(r"after (\d+) min", line)[1]) for line in lines[2:]]
    assert after == [2, 4, 8, 16, 26, 36, 46, 56, 66]


def test_bar__in_a_log_knows_what_is_left_of_the_present_work(monkeypatch, capsys):
    now = itertools.count(step=1.0)
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(now))
    with Bar(shown=True) as bar:
        for done in range(20):
            bar.decoded(done, 20)
        for step in range(1, 21):
            bar.trained("", phase="train", epoch=1, epochs=1, step=step, steps=100, loss=2 - step / 100, accuracy=None)
    assert re.fullmatch(r"train epoch 1/1 loss 1\.\d+ 1\d% after 30 s, about [678]\d s left\n", capsys.readouterr().err)


@pytest.mark.parametrize("shown", [True, False])
def test_bar__says_nothing_of_short_work(shown, capsys):
    with Bar(shown) as bar:
        bar.decoded(1, 2)
        bar.fetched("x", 1, None)
    assert capsys.readouterr() == ("", "")


def test_import__draws_no_random_numbers():
    code = "import random; random.seed(0); import layercrit.progress_bar; print(random.random())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == random.Random(0).random(), "as importing rich alone does"
