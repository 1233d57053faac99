import torch

import layercrit


@layercrit.reset("dropout", random=True)
def dropout(draw, *, share: float = 0.5):
    """A ``share`` of the trained values, drawn at random, becomes 0."""
    return {
        name: value * (torch.rand(value.shape, generator=draw.generator) >= share)
        for name, value in draw.trained.items()
    }
