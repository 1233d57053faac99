import json
import sys

import pandas as pd
import pytest
import torch
from torch import nn

import layercrit
from layercrit.advice import advise, coupled_layers
from layercrit.demo import small_resnet
from layercrit.errors import AdviceError
from small_subjects import SmallNetwork


def opened(network, size, n_channels=3):
    return layercrit.open_model(network.eval(), input_size=(n_channels, size, size))


def test_coupled_layers__are_those_that_a_sum_adds_up():
    """The stem and the second convolution of both blocks of stage 1; that of stage 2 and its shortcut."""
    pytest.importorskip("torch_pruning")
    network = SmallNetwork()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()

    knobs, fixed = coupled_layers(opened(network, 12))

    assert fixed == ["fc"]
    together = {}
    for layer, knob in knobs.items():
        together.setdefault(knob, []).append(layer)
    assert sorted(map(sorted, together.values())) == [
        ["fc"],
        ["layer1.0.conv1"],
        ["layer1.0.conv2", "layer1.1.conv2", "stem"],
        ["layer1.1.conv1"],
        ["layer2.0.conv1"],
        ["layer2.0.conv2", "layer2.0.shortcut"],
    ]
    assert knobs["layer1.1.conv2"] == "stem"  # the first in depth order names the knob
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in network.modules())


def test_coupled_layers__advice_is_what_torch_pruning_can_do():
    """Each chosen layer loses half of its channels, and no other layer loses any."""
    torch_pruning = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    network = small_resnet().eval()
    knobs, fixed = coupled_layers(opened(network, 28, 1))
    sizes = {name: module.weight for name, module in network.named_modules()
             if isinstance(module, nn.Conv2d | nn.Linear)}  # fmt: skip
    rows = pd.DataFrame({"layer": list(sizes), "criticality": [0.1 + 0.8 * (".conv3" not in name) for name in sizes],
                         "n_parameters": [weight.numel() for weight in sizes.values()], "status": "ok"})  # fmt: skip
    rows["low"] = rows["high"] = rows["criticality"]
    advice = advise(rows, "prune", 0.3, knobs=knobs, fixed=fixed)
    before = {name: len(weight) for name, weight in sizes.items()}

    ratios = {network.get_submodule(name): ratio for name, ratio in json.loads(advice.to("torch-pruning")).items()}
    torch_pruning.pruner.BasePruner(
        network, torch.zeros(1, 1, 28, 28), importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.0, pruning_ratio_dict=ratios,
    ).step()  # fmt: skip

    after = {name: len(network.get_submodule(name).weight) for name in before}
    assert [name for name in before if after[name] == before[name] // 2] == advice.chosen
    assert all(after[name] == before[name] for name in before if name not in advice.chosen)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_coupled_layers__without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)

    with pytest.raises(AdviceError, match=r"layercrit\[action\].*--of weights"):
        coupled_layers(opened(SmallNetwork(), 12))


def test_coupled_layers__a_network_that_torch_pruning_cannot_follow():
    pytest.importorskip("torch_pruning")

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("no gradients here")
            return self.fc(self.conv(x).mean((2, 3)))

    with pytest.raises(AdviceError, match=r"cannot follow.*no gradients here"):
        coupled_layers(opened(Detached(), 8))
