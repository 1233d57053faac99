import torch


def pytest_configure(config):
    # Several workers share the cores, and more threads than cores wait for each other.
    torch.set_num_threads(1)
