"""Processes of their own, forked from one that has imported everything: each new interpreter would import for seconds.

What is about the interpreter itself (its environment at the start, hash seeds, what is imported) starts a real one.
"""

import atexit
import contextlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
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


def layercrit(*arguments, cwd, env=None, prepare=None, timeout=300):
    """Run the command in a forked process, as ``subprocess.run`` runs it in a new one.

    Args:
        arguments: of the command.
        cwd: folder it runs in.
        env: the environment instead of this process's.
        prepare: called in the process before the command.
        timeout: seconds after which it is killed.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        environment = dict(os.environ if env is None else env)
        process = FORKS.Process(target=_be_layercrit, args=(arguments, str(cwd), environment, prepare, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _be_layercrit(arguments, cwd, environment, prepare, out, err):
    import torch

    from layercrit.cli.root import main

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", closefd=False)) for number in (1, 2))
    sys.argv = ["layercrit", *arguments]
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


@contextlib.contextmanager
def forked_workers():
    """Let the workers of studies be forked, too."""
    context = SimpleNamespace(get_context=lambda method: FORKS, parent_process=multiprocessing.parent_process)
    before, local_processes.multiprocessing = local_processes.multiprocessing, context
    try:
        yield
    finally:
        local_processes.multiprocessing = before


def server():
    """Process id of the process that all are forked from, whose children they are."""
    multiprocessing.forkserver.ensure_running()
    return multiprocessing.forkserver._forkserver._forkserver_pid
