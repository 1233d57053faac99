"""What a command that a job scheduler ends leaves on a real terminal, and on the disk."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from rich.live import Live

from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.progress_bar import Bar
from layercrit.study.tables import load_study
from running_jobs import ARCHITECTURE, CHANGING, run, write_small

pty = pytest.importorskip("pty")
HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"
MANY = 3000  # trials: more than are run before the end


@pytest.fixture(autouse=True)
def ended_by_signals():
    """What a process ignores, those that it starts ignore, too; another test may have left it so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended_while_measuring(command, folder, end):
    """Run a command on a terminal of its own and end it at 1 % or more; return its exit code and what it wrote."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "layercrit", *command], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    os.close(theirs)
    written, is_sent, deadline = b"", False, time.monotonic() + 200
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    data = os.read(ours, 2**16)
                except OSError:  # nobody is left to write
                    break
                if not data:
                    break
                written += data
            if not is_sent and re.search(rb"measuring[^%]* [1-9]\d*%", written):
                is_sent = True
                end(process.pid, signal.SIGTERM)
        return process.wait(60), written
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def assert_left_in_order(code, written):
    assert code == 128 + signal.SIGTERM
    assert written.rindex(SHOWN) > written.rindex(HIDDEN), "the cursor is there again"
    assert b"Ended by SIGTERM." in written
    for trouble in (b"leaked", b"Traceback", b"Exception ignored"):
        assert trouble not in written


def assert_same_cells(found, expected):
    order = ["layer", "trial", "seed", *(["model"] if "model" in found else [])]
    one, other = (
        cells.drop(columns=CHANGING, errors="ignore").sort_values(order).reset_index(drop=True)
        for cells in (found, expected)
    )
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_measure__ended_while_measuring(tmp_path, monkeypatch):
    write_small(tmp_path, n_models=1)
    model, images = f"file:m0.safetensors?{ARCHITECTURE}&input_size=(3,2,2)", "images.npz"
    command = ["measure", model, "--images", images, "--trials", str(MANY), "--dtype", "float32", "--out", "result"]
    code, written = ended_while_measuring(command, tmp_path, os.kill)
    assert_left_in_order(code, written)
    n_kept = int(re.search(rb"(\d+) finished trials? saved in result", written)[1])
    assert 3 <= n_kept < MANY
    kept = Measurement.load(tmp_path / "result").cells
    assert set(kept["trial"]) == set(range(n_kept))
    monkeypatch.chdir(tmp_path)
    unstopped = measure(model, images, trials=3, dtype="float32", progress=False).cells
    assert_same_cells(kept[kept["trial"] < 3], unstopped)


@pytest.mark.slow
@pytest.mark.parametrize("end", [os.kill, os.killpg], ids=["the command", "its workers as well"])
def test_study__ended_while_workers_measure(tmp_path, end):
    command = ["study", "run", write_small(tmp_path, trials=MANY).name, "--out", "out", "--workers", "1"]
    code, written = ended_while_measuring(command, tmp_path, end)
    assert_left_in_order(code, written)
    assert b"What has been measured is kept in out" in written
    study = load_study(tmp_path / "out")
    assert study.damaged == ()
    kept = study.cells
    assert 9 <= len(kept) < 2 * 3 * MANY
    run(write_small(tmp_path / "again", trials=3), tmp_path / "unstopped")
    unstopped = load_study(tmp_path / "unstopped").cells
    assert_same_cells(kept[kept["trial"] < 3], unstopped[unstopped["key"].isin(kept["key"])])


def test_bar__ended_while_it_is_begun(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    refresh = Live.refresh

    def end(self):
        monkeypatch.setattr(Live, "refresh", refresh)
        raise KeyboardInterrupt

    monkeypatch.setattr(Live, "refresh", end)
    with pytest.raises(KeyboardInterrupt), Bar(shown=True):
        pass
    written = capsys.readouterr().err.encode()
    assert written.rindex(SHOWN) > written.rindex(HIDDEN)
