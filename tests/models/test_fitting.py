"""Weights of a file, matched with an architecture."""

import pytest
import torch
from torch import nn

from layercrit.errors import CheckpointError
from layercrit.models.fitting import fit_to


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)


@pytest.fixture
def state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().state_dict()


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# Matching names


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "_orig_mod.", "network.", "backbone.", "module.model.", "module._orig_mod.model."],
)
def test_fit_to__wrappers(state, prefix):
    wrapped = {prefix + name: tensor for name, tensor in reversed(state.items())}
    assert same(fit_to(wrapped, state, "w.pth"), state)


def test_fit_to__prefix_that_only_some_names_have_stays(state):
    names = list(state)
    partly = {("module." if name == names[0] else "") + name: tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"1 missing: 'conv.weight' \(similar: 'module.conv.weight'\)"):
        fit_to(partly, state, "w.pth")


def test_fit_to__prefix_that_belongs_to_the_architecture_stays(state):
    expected = {f"model.{name}": tensor for name, tensor in state.items()}
    assert same(fit_to({f"module.{name}": tensor for name, tensor in expected.items()}, expected, "w.pth"), expected)


def test_fit_to__loads_strictly(state):
    network = Net()
    assert network.load_state_dict(fit_to(state, network.state_dict(), "w.pth"), strict=True)
    assert same(network.state_dict(), state)


def test_fit_to__returns_copies(state):
    fitted = fit_to(state, state, "w.pth")
    fitted["fc.bias"].add_(1)
    assert not torch.equal(fitted["fc.bias"], state["fc.bias"])


def test_fit_to__differences_are_listed(state):
    other = dict(state)
    other["head.weight"], other["extra"] = other.pop("fc.weight"), torch.zeros(1)
    other["fc.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        fit_to(other, state, "w.pth for timm:net")
    assert str(caught.value) == (
        "w.pth for timm:net: the weights do not fit. 1 missing: 'fc.weight' (similar: 'head.weight'). "
        "2 unexpected: 'head.weight', 'extra'. "
        "1 of another shape or type: 'fc.bias' is (7,) float32 in the file, (5,) float32 expected. "
        "Check the architecture and its options (such as num_classes), or rename the tensors first."
    )


def test_fit_to__long_differences_are_counted(state):
    many = {f"layer{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(CheckpointError, match=r"9 missing: .*20 unexpected: 'layer0', .*'layer7' and 12 more\."):
        fit_to(many, {**state, "x": torch.zeros(1)}, "w.pth")


def test_fit_to__empty(state):
    with pytest.raises(CheckpointError, match="8 missing"):
        fit_to({}, state, "w.pth")


def test_fit_to__old_files_without_num_batches_tracked(state):
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert same(fit_to(old, state, "w.pth"), state)


def test_fit_to__precision_is_that_of_the_architecture(state):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        fitted = fit_to(other, state, "w.pth")
        assert [t.dtype for t in fitted.values()] == [t.dtype for t in state.values()]
        assert torch.equal(fitted["fc.weight"], state["fc.weight"].to(dtype).to(torch.float32))


def test_fit_to__integers_are_no_weights(state):
    with pytest.raises(CheckpointError, match=r"'fc.bias' is \(5,\) int64 in the file, \(5,\) float32 expected"):
        fit_to({**state, "fc.bias": torch.zeros(5, dtype=torch.int64)}, state, "w.pth")
