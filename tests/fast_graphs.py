"""How tests run a rewritten graph and compare it with the plain way."""

import pytest
import torch
from torch import Tensor

from layercrit.engine import onednn
from layercrit.engine.graph import WeightGraph, speed_up
from layercrit.engine.graph_replay import GraphReplay
from tiny_networks import Case

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Measured, over all networks of these tests: 2e-6 and 0.02 of the largest logit.
RELATIVE = {"float32": 1e-5, "bfloat16": 0.04}


def targets(weight_graph: WeightGraph) -> list[object]:
    return [node.target for node in weight_graph.graph.nodes if node.op == "call_function"]


def with_plain_linears(exported: WeightGraph) -> WeightGraph:
    """Rewrite for float32 as on processors where fused linear layers do not pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "linears_pay", lambda dtype: False)
        return speed_up(exported, torch.float32, CPU)


def sweep(opened: GraphReplay, made: Case) -> dict[str | None, Tensor]:
    prepared = {layer.name: opened.prepare(layer, made.values(layer)) for layer in made.layers}
    return dict(opened.sweep(made.images, prepared))


def assert_near(got: dict[str | None, Tensor], expected: dict[str | None, Tensor], relative: float) -> None:
    assert list(got) == list(expected)
    for name in expected:
        error = float((got[name] - expected[name]).abs().max() / expected[name].abs().max())
        assert error <= relative, f"error {error:.1e} after a reset of {name}"
