"""Processes of their own, forked from one that has imported everything: each new interpreter would import for seconds.

What is about the interpreter itself (its environment at the start, hash seeds, what is imported) starts a real one.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from layercrit.study import local_processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torch._dynamo", "torch._functorch.aot_autograd", "torch.export._trace", "timm", "scipy.stats"),
        *("layercrit.study.running", "layercrit.cli.root", "layercrit.measuring", "layercrit.demo"),
        *("layercrit.figures.bars", "layercrit.reporting.reports", "matplotlib.backends.backend_agg"),
    ]
)
_SERVER = multiprocessing.forkserver._forkserver


def begin(*arguments, cwd, out, err, env=None, prepare=None):
    """Begin the command in a forked process, which writes to the files ``out`` and ``err``; see `layercrit`."""
    arguments = [str(argument) for argument in arguments]
    environment = dict(os.environ if env is None else env)
    heeds = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # the server may differ: another test began it
    process = FORKS.Process(target=_be_layercrit, args=(arguments, str(cwd), environment, prepare, out, err, heeds))
    process.start()
    return process


def layercrit(*arguments, cwd, env=None, prepare=None, timeout=300):
    """Run the command in a forked process, as ``subprocess.run`` runs it in a new one.

    Args:
        arguments: of the command.
        cwd: folder it runs in.
        env: the environment instead of this process's.
        prepare: called in the process before the command.
        timeout: seconds after which it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = begin(*arguments, cwd=cwd, out=out, err=err, env=env, prepare=prepare)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def without_network():
    """To be called in a forked process: from then on it can connect to nothing."""
    import socket

    def connect(*_):
        raise AssertionError("the network was used")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = connect


def with_forked_workers(address):
    """To be called in a forked process: from then on its workers are forked from the server at this address."""
    forked_workers(address).__enter__()


def _be_layercrit(arguments, cwd, environment, prepare, out, err, heeds_ctrl_c):
    import torch

    from layercrit.cli.root import main

    signal.signal(signal.SIGINT, signal.default_int_handler if heeds_ctrl_c else signal.SIG_IGN)
    atexit._clear()  # what was imported before the fork is of all processes
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["layercrit", *arguments]
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


@contextlib.contextmanager
def forked_workers(address=None):
    """Let the workers of studies be forked, too; in a process that is forked itself, from the server of its parent."""
    if address is not None:
        _SERVER._forkserver_address, _SERVER.ensure_running = address, lambda: None
    context = SimpleNamespace(get_context=lambda method: FORKS, parent_process=multiprocessing.parent_process)
    before, local_processes.multiprocessing = local_processes.multiprocessing, context
    try:
        yield
    finally:
        local_processes.multiprocessing = before


def server():
    """Process id of the process that all are forked from, whose children they are, and where it is spoken to."""
    _SERVER.ensure_running()
    return _SERVER._forkserver_pid, _SERVER._forkserver_address
