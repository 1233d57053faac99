from dataclasses import replace
from functools import partial

import torch

import layercrit
from layercrit.seeds import drawing


def build(width):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(28 * 28, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    )


@layercrit.model_source("perceptron")
def open_perceptron(rest, options):
    """perceptron:WIDTH, with the weights in perceptron-WIDTH.pt."""
    width = int(rest)
    pretrained, seed = options.pop("pretrained", True), options.pop("seed", 0)
    with drawing(seed):
        network = build(width)
    if pretrained:
        network.load_state_dict(torch.load(f"perceptron-{width}.pt", weights_only=True))
    model = layercrit.open_model(network.eval(), input_size=(1, 28, 28))
    return replace(
        model, architecture=f"perceptron:{width}", build=partial(build, width), initialiser="torch's of nn.Linear"
    )
