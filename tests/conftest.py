import os

import torch


def pytest_configure(config):
    # Workers of pytest-xdist share the cores; more threads than cores would wait for each other.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
