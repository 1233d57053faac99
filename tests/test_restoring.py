"""What a measurement leaves behind: nothing."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from layercrit.errors import LayerError, ModelError, ProbeError, ProtocolError
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.resets import RESETS, reset
from small_subjects import (
    PIXELS,
    QUIET,
    SIZE,
    assert_same_cells,
    photographs,
    registered,
    small_network,
    two_layers,
)


@pytest.fixture
def own_reset():
    with registered(RESETS):
        yield reset


class Troubled(nn.Module):
    """Raises at one call of its forward; may write to its own parameters and buffers, which keeps it off the graph."""

    def __init__(self, call=None, error=None, writes=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.call, self.error, self.writes = call, error, writes
        self.seen = []  # a list, for the exporter takes back what a forward assigns

    def forward(self, images):
        if self.writes:
            self.calls += 1
            self.head.weight.data.clamp_(-0.01, 0.01)
        self.seen.append(len(images))
        if len(self.seen) == self.call:
            raise self.error
        return self.head(self.body(images).mean(dim=(2, 3)))


def troubled(**trouble):
    network = Troubled(**trouble).eval()
    network.body[0].weight.requires_grad_(False)
    network.body.register_forward_hook(lambda module, inputs, output: None)
    network.head.register_forward_pre_hook(lambda module, inputs: None)
    return network


def state_of(network):
    """Everything that a measurement must leave as it was, tensors as bytes."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "values": {name: (t.detach().numpy().tobytes(), id(t)) for name, t in tensors.items()},
        "requires_grad": {name: p.requires_grad for name, p in network.named_parameters()},
        "training": [m.training for m in network.modules()],
        "hooks": [[dict(h) for n, h in sorted(vars(m).items()) if "hooks" in n] for m in network.modules()],
        "attributes": [sorted(vars(m)) for m in network.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
    }


def interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("writes", [False, True], ids=["pure", "writing"])
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, None),
        ({"dtype": "reference", "reset": "permute"}, None),
        ({"layers": "nothing*"}, LayerError),
        ({"reset": "rewind"}, ProtocolError),
        ({"images": "nowhere"}, ProbeError),
        ({"on_trial": interrupt}, KeyboardInterrupt),
    ],
    ids=["finished", "reference", "layers", "donor", "images", "on_trial"],
)
def test_measure__leaves_everything_as_it_was(writes, settings, error):
    network = troubled(writes=writes)
    before = state_of(network)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        measure(network, **{"images": photographs(4), "types": "all", "batch_size": 2, **QUIET, **settings})
    assert_same_state(network, before)


def assert_same_state(network, before):
    after = state_of(network)
    for what, value in before.items():
        assert after[what] == value, f"{what} changed"


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("writes", [False, True], ids=["pure", "writing"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=["Ctrl-C", "exception"])
def test_measure__an_exception_in_the_forward_leaves_everything_as_it_was(error, writes, call):
    """Whether the pass is watched, exported, recorded or replayed when it is cut short."""
    network = troubled(call=call, error=error("the network's own"), writes=writes)
    before = state_of(network)
    raised = found = None
    try:
        found = measure(network, photographs(4), **QUIET)
    except (error, ModelError) as caught:
        raised = caught
    assert_same_state(network, before)
    if raised is not None:
        assert "the network's own" in str(raised)
        assert call == 1 or not isinstance(raised, ModelError), "only the first pass tells whether images fit"
    elif len(network.seen) >= call:
        notes = found.record["notes"]
        assert any("cannot be exported (ValueError: the network's own)" in note for note in notes)


def test_measure__an_exception_in_the_midst_of_a_trial_leaves_everything_as_it_was(own_reset):
    @own_reset("failing", random=True)
    def failing(draw):
        if draw.layer.name == "head":
            raise ZeroDivisionError
        return {name: value + 1 for name, value in draw.trained.items()}

    network = troubled()
    before = state_of(network)
    with pytest.raises(ZeroDivisionError):
        measure(network, photographs(4), reset="failing", **QUIET)
    assert_same_state(network, before)


def test_measure__leaves_the_global_random_states_to_others(own_reset):
    """A reset of the user's may draw from them; afterwards they are as before."""

    @own_reset("global", random=True)
    def drawing(draw):
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return {name: torch.rand_like(value) + noise for name, value in draw.trained.items()}

    network = two_layers()
    before = state_of(network)
    measure(network, PIXELS, reset="global", **QUIET)
    assert_same_state(network, before)


@pytest.mark.parametrize("opened", [False, True], ids=["a module", "a Model"])
def test_measure__a_network_in_training_mode_is_measured_in_evaluation_mode(opened):
    network, probe_set = small_network(), photographs(5)
    expected = measure(network, probe_set, **QUIET)
    model = open_model(network, input_size=(3, SIZE, SIZE))
    network.train()
    before = state_of(network)
    found = measure(model if opened else network, probe_set, **QUIET)
    assert_same_state(network, before)
    assert_same_cells(found, expected, atol=0)


def test_measure__weights_changed_since_are_seen():
    """Nothing of a measurement is kept for the next one."""
    network, probe_set = small_network(), photographs(5)
    first = measure(network, probe_set, **QUIET)
    with torch.no_grad():
        network.fc.weight.mul_(0.1)
    second = measure(network, probe_set, **QUIET)
    assert (second.cells["cosine"] < first.cells["cosine"]).all()
    assert first.record["model"]["sha256"] != second.record["model"]["sha256"]
