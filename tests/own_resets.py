"""Resets and a distance of a user, which study files import by the name of this module."""

import os

import torch

from layercrit.distances import distance
from layercrit.resets import reset


@distance("least", upper=1.0)
def least(p, q):
    """1 minus the smallest ratio of two probabilities of a class."""
    return 1 - (torch.minimum(p, q) / torch.maximum(p, q)).amin(dim=1)


@reset("unlucky", random=True)
def unlucky(draw):
    """Fails for some draws."""
    if draw.layer.name == "3" and torch.rand((), generator=draw.generator) < 0.5:
        raise RuntimeError("out of luck")
    return {name: value * 2 for name, value in draw.trained.items()}


@reset("half", random=True, donor="checkpoint")
def half(draw):
    """Takes about half of the values from the donor."""
    mixed = {}
    for name, value in draw.trained.items():
        taken = torch.rand(value.shape, generator=draw.generator) < 0.5
        mixed[name] = torch.where(taken, draw.donor[name], value)
    return mixed


@reset("break", random=False)
def break_(draw):
    """Layer '3' becomes infinite, layer '5' stays as it is, layer '1' is negated."""
    factor = {"1": -1.0, "3": torch.inf, "5": 1.0}[draw.layer.name]
    return {name: value * factor for name, value in draw.trained.items()}


@reset("deadly", random=False)
def deadly(draw):
    """Ends the process."""
    os._exit(3)
