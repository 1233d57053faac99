"""What holds for every command: what it prints is harmless, and what ends it early is said and loses nothing."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from layercrit.cli import interruption, root
from layercrit.cli.root import main
from layercrit.cli.saver import Saver
from layercrit.measurement import Measurement
from layercrit.study import store_file
from layercrit.study.store import Store
from running_jobs import write_small

LAYERCRIT = Path(sys.executable).parent / "layercrit"
MODEL = "timm:test_resnet?pretrained=false&num_classes=7"
HOSTILE = "\x1b[31mred\x07\nError: no\u202eterces"
SHOWN = r"\x1b[31mred\x07\nError: no\u202eterces"


def call(monkeypatch, *arguments):
    """Run the command line in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["layercrit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A file of images in the current folder, which is empty else."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    np.savez("images.npz", images=pixels)
    return "images.npz"


@pytest.fixture
def as_before():
    """Signals have their handlers again after the test."""
    before = {number: signal.getsignal(number) for number in (*interruption._SIGNALS, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def go_on(seconds):
    """Run Python code, between whose steps signals are seen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        list(map(len, [""]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A saved measurement of a network whose layers have hostile names."""
    from torch import nn

    import layercrit

    network = nn.Sequential()
    network.add_module("flat", nn.Flatten())
    network.add_module(HOSTILE, nn.Linear(12, 4))
    network.add_module("=1+1", nn.Linear(4, 3))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=3.0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 2, 2), dtype=np.uint8)
    result = layercrit.measure(network.eval(), pixels, trials=2, progress=False)
    return result.save(tmp_path_factory.mktemp("measured") / "result")


# --- what cannot be printed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_output__any_encoding_can_be_printed_to(measured, monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert call(monkeypatch, "show", measured) == 0
    printed = stdout.buffer.getvalue().decode(encoding)
    mean = Measurement.load(measured).summary()["criticality"]["mean"]
    assert f"mean criticality {mean:.3f}" in printed
    assert ("█" in printed) == (encoding == "utf-8"), "bars are of characters that the encoding has"
    assert ("##" in printed) == (encoding != "utf-8")


class Broken(io.TextIOWrapper):
    """A stream that fails when it is written to."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 1),
        (BrokenPipeError(32, "Broken pipe"), 141),
        (OSError(5, "Input/output error"), 1),
        (UnicodeEncodeError("ascii", "x", 0, 1, "a stream of somebody's own"), 70),
    ],
    ids=["full", "closed pipe", "broken device", "unknown"],
)
def test_measure__is_saved_before_it_is_printed(images, monkeypatch, capsys, error, code):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    Path("result").mkdir()
    Path("result", "thesis.txt").touch()
    assert call(monkeypatch, "measure", MODEL, "--images", images, "--trials", "1", "--out", "result") == code
    assert Measurement.load("result").summary()["n_images"] == 8
    printed = capsys.readouterr().err
    files = "cells.parquet, criticality.png, criticality.svg, images.parquet, layers.csv, measurement.json"
    assert f"Saved in result: {files}\n" in printed
    assert "For a page to explore: `layercrit report result`." in printed


def test_measure__its_tables_are_saved_where_the_figure_cannot_be_plotted(images, monkeypatch, capsys):
    monkeypatch.setattr(Measurement, "plot", lambda self: 1 / 0)
    assert call(monkeypatch, "measure", MODEL, "--images", images, "--trials", "1", "--out", "result") == 70
    assert Measurement.load("result").summary()["n_images"] == 8
    assert "mean criticality" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["pitfalls"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_output__to_a_full_device_and_to_nobody(arguments, tmp_path):
    with Path("/dev/full").open("w") as full:
        told = subprocess.run([LAYERCRIT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert told.returncode == 1
    assert told.stderr.startswith("Error: What the command prints cannot be written (No space left on device)")
    assert told.stderr.count("\n") == 1, "Python has nothing to add at its end"
    reader, writer = os.pipe()
    os.close(reader)
    told = subprocess.run([LAYERCRIT, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (told.returncode, told.stderr) == (141, "")


# --- texts from outside ---------------------------------------------------------------------------------------------


def test_show__names_do_nothing_to_the_terminal(measured, monkeypatch, capsys):
    assert call(monkeypatch, "show", measured) == 0
    printed = capsys.readouterr().out
    assert SHOWN in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert not [line for line in printed.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["show", HOSTILE], 1), ([HOSTILE], 2), (["measure", HOSTILE, "--images", "x"], 1), (["study", HOSTILE], 2)],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors__do_nothing_to_the_terminal(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == code
    printed = capsys.readouterr().err
    assert "\\x1b[31mred" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert sum(line.startswith("Error") for line in printed.splitlines()) == 1


def test_errors__lists_of_a_missing_argument_are_set_apart(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layercrit", "study", "example"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "fashion" in said
    assert "\\" not in said, "a tab would be written out"


# --- what ends a command --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_measure__a_signal_keeps_finished_trials(images, monkeypatch, capsys, number):
    keep, save = Saver.keep, Measurement.save

    def keep_then_end(self, so_far):
        keep(self, so_far)
        if so_far().cells["trial"].nunique() == 2:
            signal.raise_signal(number)

    def save_while_asked_again(self, folder):
        signal.raise_signal(number)  # schedulers repeat themselves
        return save(self, folder)

    signal.signal(number, signal.SIG_DFL)  # under nohup, the command ignores SIGHUP
    monkeypatch.setattr(Saver, "keep", keep_then_end)
    monkeypatch.setattr(Measurement, "save", save_while_asked_again)
    arguments = ["measure", MODEL, "--images", images, "--trials", "50", "--out", "result"]
    assert call(monkeypatch, *arguments) == 128 + number
    printed = capsys.readouterr().err
    assert f"Ended by {number.name}." in printed
    assert "Traceback" not in printed
    assert 2 <= Measurement.load("result").summary()["n_trials"] < 50


@pytest.mark.usefixtures("as_before")
def test_signals__to_workers_as_well_end_the_command_all_the_same(measured, monkeypatch, capsys):
    """Schedulers end whole groups of processes, and torch raises in the main one when a worker of its dies."""

    def lose_worker(number, frame):
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    def train(folder):
        both = [signal.SIGTERM, signal.SIGCHLD]
        signal.signal(signal.SIGCHLD, lose_worker)
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)  # where both are raised
        try:
            (n for n in range(10**9))
        finally:
            list(range(1000))

    monkeypatch.setattr(Measurement, "load", train)
    assert call(monkeypatch, "show", measured) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip() == "Ended by SIGTERM."


@pytest.mark.usefixtures("interruptible", "as_before")
@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGTERM, 143, "Ended by SIGTERM."),
                                                      (signal.SIGINT, 130, "Interrupted.")])  # fmt: skip
def test_study__a_signal_while_sqlite_runs_a_checksum(tmp_path, monkeypatch, capsys, number, code, said):
    path, checksum = write_small(tmp_path), store_file.checksum

    def end(*values):
        signal.raise_signal(number)  # SQLite makes an error of its own of what is raised here
        return checksum(*values)

    monkeypatch.setattr(store_file, "checksum", end)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "study", "run", path, "--out", "out") == code
    assert capsys.readouterr().err.split("\n") == [
        "Stopped. What has been measured is kept in out; run the same command again to resume.", "", said, "",
    ]  # fmt: skip
    with Store("out") as left:
        assert (left.models(), left.meta("study")) == ([], None), "all of a transaction is kept, or nothing"


@pytest.mark.usefixtures("as_before")
def test_signals__whatever_native_code_makes_of_them(measured, monkeypatch, capsys):
    def load(folder):
        try:
            signal.raise_signal(signal.SIGTERM)
            list(map(len, [""]))
        except KeyboardInterrupt:
            raise ImportError("numpy.core.multiarray failed to import") from None

    monkeypatch.setattr(Measurement, "load", load)
    assert call(monkeypatch, "show", measured) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "Ended by SIGTERM."


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("ctrl_c", "number", "code", "said"),
    [
        (signal.default_int_handler, signal.SIGTERM, 143, "Ended by SIGTERM."),
        (signal.SIG_IGN, signal.SIGTERM, 143, "Ended by SIGTERM."),
        (signal.default_int_handler, signal.SIGINT, 130, "Interrupted."),
    ],
    ids=["", "in the background", "ctrl-c"],
)
def test_signals__while_an_object_is_freed(measured, monkeypatch, capsys, ctrl_c, number, code, said):
    """Python drops the exception that a signal raises there, so it must come again."""
    signal.signal(signal.SIGINT, ctrl_c)

    class Freed:
        def __del__(self):
            signal.raise_signal(number)
            list(map(len, [""]))

    def load(folder):
        Freed()
        go_on(10)
        pytest.fail("the signal was lost")

    monkeypatch.setattr(Measurement, "load", load)
    assert call(monkeypatch, "show", measured) == code
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.usefixtures("as_before")
def test_signals__native_code_clears_them(measured, monkeypatch, capsys):
    def load(folder):
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
                go_on(10)
                pytest.fail("the signal was lost")
        go_on(10)
        pytest.fail("the signal was lost")

    monkeypatch.setattr(Measurement, "load", load)
    assert call(monkeypatch, "show", measured) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "Ended by SIGTERM."


@pytest.mark.usefixtures("as_before")
def test_signals__saving_is_not_interrupted_again(measured, monkeypatch, capsys):
    saved = []

    def load(folder):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            go_on(4 * interruption._MOMENT)
            saved.append(folder)

    monkeypatch.setattr(Measurement, "load", load)
    assert call(monkeypatch, "show", measured) == 143
    assert len(saved) == 1


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["", "in the background"])
def test_signals__raised_again_when_the_command_has_ended(monkeypatch, capsys, ctrl_c):
    """The exit code says what ended it, and no traceback is shown."""
    signal.signal(signal.SIGINT, ctrl_c)

    def end(debug):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        go_on(0.003 * generator.random())
        return 130

    generator = np.random.default_rng(0)
    monkeypatch.setattr(interruption, "_MOMENT", 0.001)
    monkeypatch.setattr(root, "_run", end)
    for _ in range(200):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, ctrl_c)
        assert call(monkeypatch, "show") == 143
        go_on(0.003)
    assert capsys.readouterr().err == 200 * "Ended by SIGTERM.\n"


@pytest.mark.usefixtures("as_before", "interruptible")
def test_signals__ctrl_c_while_the_command_says_what_ended_it(measured, monkeypatch, capsys):
    say = root._print

    def impatient(text):
        signal.raise_signal(signal.SIGINT)
        say(text)

    monkeypatch.setattr(Measurement, "load", lambda folder: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(root, "_print", impatient)
    assert call(monkeypatch, "show", measured) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.usefixtures("as_before")
def test_signals__while_an_error_is_reported(tmp_path, monkeypatch, capsys):
    complain = root._complain

    def end(*given):
        signal.raise_signal(signal.SIGTERM)
        return complain(*given)

    monkeypatch.setattr(root, "_complain", end)
    assert call(monkeypatch, "show", tmp_path / "nothing") == 143
    assert capsys.readouterr().err.splitlines()[-1] == "Ended by SIGTERM."


@pytest.mark.usefixtures("as_before")
def test_signals__ignored_before_stay_ignored(measured, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    load = Measurement.load

    def hang_up(folder):
        signal.raise_signal(signal.SIGHUP)
        return load(folder)

    monkeypatch.setattr(Measurement, "load", hang_up)
    assert call(monkeypatch, "show", measured) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers are those of before"


@pytest.mark.parametrize("arguments", [["measure", MODEL, "--images", "x.npz"], ["study", "run", "study.toml"]])
def test_errors__a_folder_that_is_gone_is_no_bug(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert call(monkeypatch, *arguments) == 1
    assert "bug" not in capsys.readouterr().err


def test_measure__a_path_that_is_no_utf_8_loses_nothing(images, monkeypatch, capsys):
    import timm
    from safetensors.torch import save_file

    file = os.fsdecode(b"weights-\xff.safetensors")
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), "plain.safetensors")
    Path("plain.safetensors").rename(file)
    model = f"file:{file}?arch={MODEL}"
    assert call(monkeypatch, "measure", model, "--images", images, "--trials", "1", "--out", "result") == 0
    assert r"weights-\udcff.safetensors" in capsys.readouterr().out
    loaded = Measurement.load("result")
    assert loaded.summary()["model"].startswith(r"file:weights-\udcff.safetensors")
    assert len(loaded.cells) == loaded.summary()["n_layers"]
