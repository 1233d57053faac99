import signal

import pytest
import torch


def pytest_configure(config):
    # Several workers share the cores, and more threads than cores wait for each other.
    torch.set_num_threads(1)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt here and in the processes that the test starts.

    A shell makes what it runs in the background ignore SIGINT, and the children of that inherit it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
