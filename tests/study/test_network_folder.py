"""Studies in a folder that two machines see over a network: here two mounts of SSHFS, which knows no common locks."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from forked import FORKS
from layercrit import locks
from layercrit.errors import StudyError
from layercrit.locks import is_on_network
from layercrit.study.shards import holders, open_study, shard_folder, store_folders
from running_jobs import assert_same_tables, check_store, run, run_on, run_shard, run_slowly, tables, write_small

SERVER = Path("/usr/lib/openssh/sftp-server")
N_MODELS, N_TRIALS = 2, 12


@contextlib.contextmanager
def mounted(folder, at, *options):
    """Show a folder at another place over SFTP, as another machine would see it."""
    at.mkdir()
    one, other = socket.socketpair()
    with one, other:
        server = subprocess.Popen([SERVER], stdin=one, stdout=one)
        client = subprocess.Popen(
            ["sshfs", "-f", "-o", "passive", *options, f"host:{folder}", at], stdin=other, stdout=other
        )
    try:
        deadline = time.monotonic() + 10
        while not at.is_mount():
            if client.poll() is not None or time.monotonic() > deadline:
                pytest.skip("no file system can be mounted here")
            time.sleep(0.05)
        yield at
    finally:
        subprocess.run(["fusermount3", "-u", "-z", at], check=False)
        for process in (client, server):
            process.kill()
            process.wait()


@pytest.fixture
def machines(tmp_path):
    """The study's folder as three machines see it; the third remembers nothing of a file, the others for 20 s."""
    if not (SERVER.exists() and shutil.which("sshfs") and os.access("/dev/fuse", os.R_OK | os.W_OK)):
        pytest.skip("needs SSHFS, an SFTP server, and /dev/fuse")
    (tmp_path / "disk").mkdir()
    with contextlib.ExitStack() as mounts:
        one, two = (mounts.enter_context(mounted(tmp_path / "disk", tmp_path / name)) for name in ("one", "two"))
        forgetful = ("-o", "dir_cache=no,attr_timeout=0,entry_timeout=0")
        three = mounts.enter_context(mounted(tmp_path / "disk", tmp_path / "three", *forgetful))
        yield SimpleNamespace(one=one, two=two, three=three)


@pytest.fixture
def study(tmp_path):
    """A study file, which has one path on all machines."""
    return write_small(tmp_path / "study", n_models=N_MODELS, trials=N_TRIALS)


@pytest.fixture
def whole(tmp_path, study):
    """The tables of the study where one process measures all of it, on a disk of its own."""
    run(study, tmp_path / "whole")
    return tables(tmp_path / "whole")


@pytest.mark.parametrize("shards", [["1/2", "2/2"], [None]], ids=["shards", "one store"])
def test_a_study_that_runs_while_another_machine_looks(machines, study, whole, shards):
    assert all(is_on_network(folder) for folder in vars(machines).values())
    processes = [
        FORKS.Process(target=run_on, args=(folder.name, study, folder, 0.02, shard))
        for folder, shard in zip((machines.one, machines.two), shards, strict=False)
    ]
    for process in processes:
        process.start()
    seen = [0]
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if store_folders(machines.three / "out"):
            with open_study(machines.three / "out") as found:
                seen.append(found.n_cells())
    assert {process.exitcode for process in processes} == {0}
    assert seen == sorted(seen)
    assert len(set(seen)) > 5, "it looked while they were at work"
    assert_same_tables(tables(machines.three / "out"), whole)


def test_a_shard_that_is_killed_goes_on_on_another_machine(machines, study, whole):
    n_kept = 0
    for kill, folder in enumerate((machines.one, machines.two, machines.one)):
        process = FORKS.Process(target=run_slowly, args=(study, folder / "out", 0.1, "1/1"))
        process.start()
        own = shard_folder(folder / "out", 1)
        deadline = time.monotonic() + 60
        while (n_cells := check_store(own)) < n_kept + 6 and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        n_kept = n_cells
    run_shard(study, machines.two / "out", "1/1")
    assert_same_tables(tables(machines.three / "out"), whole)


@pytest.mark.parametrize("shard", ["1/2", None], ids=["shard", "one store"])
def test_a_store_that_another_machine_writes_is_left_to_it(machines, study, whole, monkeypatch, shard):
    monkeypatch.setattr(locks, "_SILENCE", 4)
    process = FORKS.Process(target=run_on, args=("node7", study, machines.one, 0.05, shard))
    process.start()
    number = 0 if shard is None else 1
    out = machines.two / "out"
    deadline = time.monotonic() + 60
    while number not in holders(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "on node7, since" in holders(out)[number]
    with pytest.raises(StudyError, match=r"is being run by process .* on node7"):
        run(study, out) if shard is None else run_shard(study, out, shard)
    process.kill()
    process.join()
    run(study, out) if shard is None else run_shard(study, out, shard)
    if shard is not None:
        run_shard(study, out, "2/2")
    assert_same_tables(tables(out), whole)
