import gc
import math
import os
import signal
import time
from pathlib import Path

import hypothesis
import pytest
import torch

SLOW = Path(__file__).with_name("slow_tests.txt")
SHARED = "seconds of a shared fixture"  # property of a test: the longest set-up of a fixture that others use too
_seconds = {}  # of fixtures that several tests share


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Three workers for two cores: slow tests wait for processes, a browser or a scheduler. For fast ones, two."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    n_cores = os.cpu_count() or 1
    return n_cores if config.option.markexpr == "not slow" else math.ceil(1.5 * n_cores)


def pytest_configure(config):
    # Several workers share the cores, and more threads than cores wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also those of the processes that tests start
    # Workers of studies have a thread a core all the same; one that waits for the others is to leave its core to them.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    """Mark what `slow_tests.py` has found to take long; the others are the fast loop. What waits most begins first."""
    items.sort(key=lambda item: item.path.name != "test_slurm.py")  # else all workers wait for a scheduler at the end
    slow = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leave what is imported to itself: looking through it for garbage took a seventh of the tests' time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            _seconds[fixturedef] = time.perf_counter() - start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    definitions = [one for found in item._fixtureinfo.name2fixturedefs.values() for one in found]
    item.user_properties.append((SHARED, max((_seconds.get(one, 0.0) for one in definitions), default=0.0)))
    return (yield)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt here and in the processes that the test starts.

    A shell makes what it runs in the background ignore SIGINT, and the children of that inherit it.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD")  # a command that is interrupted changes all of them
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
