"""What a command that a job scheduler ends leaves on a real terminal, and on the disk."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from layercrit.measurement import Measurement
from layercrit.study.store import FILE
from layercrit.study.tables import load_study
from small_studies import OPTIONS, write_study

pty = pytest.importorskip("pty")
HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"


def ended_on_a_terminal(command, folder, is_time, end):
    """Run a command on a terminal of its own and end it when it is time; return its exit code and what it wrote."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "layercrit", *command], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, env=os.environ | {"TERM": "xterm"},
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
            if not is_sent and is_time(written):
                is_sent = True
                end(process.pid, signal.SIGTERM)
        return process.wait(10), written
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


@pytest.mark.slow
def test_measure__ended_while_measuring(tmp_path):
    write_study(tmp_path, n_models=1, n_images=16)
    command = ["measure", f"file:m0.safetensors?{OPTIONS}", "--images", "images.npz", "--trials", "300"]

    def has_trials(written):
        shares = re.findall(rb"(\d+)%", written.rpartition(b"measuring")[2])
        return any(int(share) >= 2 for share in shares)

    code, written = ended_on_a_terminal([*command, "--out", "result"], tmp_path, has_trials, os.kill)
    assert_left_in_order(code, written)
    n_kept = int(re.search(rb"(\d+) finished trial\(s\) are saved in result", written)[1])
    assert 2 <= n_kept < 300
    assert set(Measurement.load(tmp_path / "result").cells["trial"]) == set(range(n_kept))


@pytest.mark.slow
@pytest.mark.parametrize("end", [os.kill, os.killpg], ids=["the command", "its workers as well"])
def test_study__ended_while_workers_measure(tmp_path, end):
    path = write_study(tmp_path, n_models=2, trials=500, n_images=16)

    def has_cells(_):
        return (tmp_path / "out" / FILE).exists() and len(load_study(tmp_path / "out").cells) > 50

    command = ["study", "run", path.name, "--out", "out", "--workers", "2"]
    code, written = ended_on_a_terminal(command, tmp_path, has_cells, end)
    assert_left_in_order(code, written)
    assert b"What has been measured is kept in out" in written
    kept = load_study(tmp_path / "out")
    assert len(kept.cells) > 50
    assert kept.damaged == ()
    assert (kept.cells["status"] == "ok").all()
