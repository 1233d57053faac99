import pytest
import torch
from torch import nn

from layercrit.errors import ModelError
from layercrit.models.references import open_model


def _quantised(kind):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    wrapped = torch.ao.quantization.QuantWrapper(network)
    wrapped.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(wrapped, inplace=True)
    wrapped(torch.rand(2, 3, 8, 8))
    return torch.ao.quantization.convert(wrapped)


def _plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


UNCHANGEABLE = {
    "script": lambda: torch.jit.script(_plain()),
    "trace": lambda: torch.jit.trace(_plain(), torch.zeros(1, 3, 8, 8)),
    "frozen script": lambda: torch.jit.freeze(torch.jit.script(_plain())),
    "part of a network": lambda: nn.Sequential(torch.jit.script(_plain()), nn.Linear(5, 5)).eval(),
    "script in training mode": lambda: torch.jit.script(_plain().train()),
    "dynamically quantised": lambda: _quantised("dynamic"),
    "statically quantised": lambda: _quantised("static"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNCHANGEABLE)
def test_open_model__what_no_reset_can_reach_is_refused_before_anything_is_done(kind):
    network = UNCHANGEABLE[kind]()
    before = {name: str(value) for name, value in network.state_dict().items()}
    match = "TorchScript" if "script" in kind or kind in ("trace", "part of a network") else "quantised"
    with pytest.raises(ModelError, match=match):
        open_model(network, input_size=(3, 8, 8))
    assert {name: str(value) for name, value in network.state_dict().items()} == before
