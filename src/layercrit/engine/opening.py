"""Choose the backend for a network: the fastest that reproduces the network's own logits.

`GraphReplay` runs the exported network node by node. `RecordedReplay` runs the module itself, where every module call
that ended before the reset layer was first used returns its recorded output. `PlainReplay` swaps the weights and runs
the whole network.
"""

from collections.abc import Callable, Sequence
from itertools import islice

from torch import Tensor, nn

from layercrit.engine.exports import graph_of
from layercrit.engine.graph import WeightGraph
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.recorded_replay import RecordedReplay
from layercrit.engine.replay import Mode, PlainReplay, ReadLogits, Replay
from layercrit.errors import ModelError, first_line
from layercrit.layers import Layer
from layercrit.machine import is_out_of_memory
from layercrit.models.outputs import logits_of

__all__ = ["open_replay", "reopen"]

# Error of logits, relative to the largest, that two ways to compute the same network in float32 may differ by.
_ROUNDING = 1e-4
# Total variation between softmax outputs, mean over images, beyond which a fast mode is not just rounded but broken.
_BROKEN: dict[Mode, float] = {"float32": 1e-3, "bfloat16": 0.5}


def open_replay(
    network: nn.Module,
    layers: Sequence[Layer],
    images: Tensor,
    mode: Mode,
    read_logits: ReadLogits = logits_of,
    layers_of: Callable[[WeightGraph | None], Sequence[Layer]] | None = None,
) -> Replay:
    """Return the fastest replay that reproduces the network's own logits, for its trained weights and for others.

    The exported graph must do so bit for bit for ``reference``, and up to rounding for the fast modes. (They differ
    where a network runs another kernel than the exporter writes down, as ``nn.MultiheadAttention`` does.)

    Args:
        network: in evaluation mode; it takes normalised images.
        layers: what may be reset, in depth order.
        images: a batch of normalised images; its shape is the one that sweeps will have.
        mode: one of `MODES`. Backends other than the exported graph have ``reference`` only.
        read_logits: takes the logits out of what the network returns.
        layers_of: what may be reset in place of ``layers``, given the exported network, or None where there is none.
    """
    whole = Layer("", "", tuple(name for name, _ in network.named_parameters()), (), 0)
    own = PlainReplay(network, [whole], read_logits=read_logits)
    rounding = 0.0 if mode == "reference" else _ROUNDING
    for anew in (False, True):
        try:
            weight_graph, is_shared = graph_of(network, images, read_logits, anew=anew)
        except Exception as error:  # torch.export documents no base class for what it raises
            if is_out_of_memory(error):
                raise
            reason = f"the network cannot be exported ({first_line(error)})"
            break
        try:
            agrees = _agrees(GraphReplay(weight_graph, [whole]), own, images, rounding)
            reason = "the exported network does not reproduce the network's own logits"
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _check_still_runs(own, images)
            agrees, reason = False, f"the exported network cannot be run ({first_line(error)})"
        if agrees:
            layers = layers if layers_of is None else layers_of(weight_graph)
            return _in_mode(GraphReplay(weight_graph, layers), mode, images)
        if not is_shared:
            break
    layers = layers if layers_of is None else layers_of(None)
    recorded = RecordedReplay(network, layers, f"recorded outputs instead of an exported graph: {reason}", read_logits)
    both = f"{reason}, and recorded outputs give other logits"
    plain = PlainReplay(network, layers, f"the plain backend, without reuse: {both}", read_logits)
    return recorded if _agrees(recorded, plain, images) else plain


def _check_still_runs(own: PlainReplay, images: Tensor) -> None:
    """Make sure that the network itself still runs.

    Raises:
        ModelError: it does not, as when it keeps tensors in a cache outside it, which the exporter filled with such as
            have no values.
    """
    try:
        float(own.logits(images).sum())  # which tensors without values do not have
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The network cannot be run on {len(images)} images, or not again after torch.export has run it "
            f"({first_line(error)}). If its code keeps tensors between calls, as under functools.lru_cache, let it "
            f"clear what it keeps, and in a new process run it once on {len(images)} images before it is measured: "
            "then these tensors have values."
        ) from error


def _agrees(replay: Replay, plain: PlainReplay, images: Tensor, rounding: float = 0.0) -> bool:
    """Return whether a replay gives the plain backend's logits, also when weights are moved a little.

    The trained weights alone would not do: a weight that the exporter took for a constant, or a value that the
    network keeps between calls, shows only when weights change.
    """
    parameters = dict(plain.network.named_parameters(remove_duplicate=False))
    moved = {
        layer.name: {name: _moved(parameters[name].detach()) for name in layer.parameters} for layer in plain.layers
    }
    prepared = {layer.name: replay.prepare(layer, moved[layer.name]) for layer in plain.layers}
    # the logits of the trained weights, which end a sweep, would show nothing more
    sweeps = islice(replay.sweep(images, prepared), len(moved)), islice(plain.sweep(images, moved), len(moved))
    for (_, got), (_, expected) in zip(*sweeps, strict=True):
        expected_finite = expected.nan_to_num()  # where the network itself overflows, both must
        if (got.nan_to_num() - expected_finite).abs().max() > rounding * expected_finite.abs().max():
            return False
    return True


def _moved(parameter: Tensor) -> Tensor:
    is_number = parameter.is_floating_point() or parameter.is_complex()
    return parameter * 1.015625 + 0.001 if is_number else parameter  # else a table of indices, or a mask


def reopen(replay: GraphReplay, images: Tensor, mode: Mode) -> GraphReplay:
    """Return a replay of the same network and layers in another mode, without exporting and checking it again."""
    return _in_mode(GraphReplay(replay.exported, replay.layers), mode, images)


def _in_mode(reference: GraphReplay, mode: Mode, images: Tensor) -> GraphReplay:
    """Return the replay in another mode, or in the next slower one that works."""
    attempts: dict[Mode, list[Mode]] = {"reference": [], "float32": ["float32"], "bfloat16": ["bfloat16", "float32"]}
    reasons: list[str] = []
    for attempt in attempts[mode]:
        try:
            fast = reference.in_mode(attempt, images.device)
            logits = fast.logits(images)
        except Exception as error:  # an operator that does not know this number format raises what it likes
            if is_out_of_memory(error):
                raise
            reasons.append(f"{attempt} fails ({first_line(error)})")
            continue
        change = logits.softmax(dim=1) - reference.logits(images).softmax(dim=1)
        distance = float(change.abs().sum(dim=1).mean() / 2)
        if distance <= _BROKEN[attempt]:
            break
        reasons.append(f"{attempt} moves predictions too far (total variation {distance:.2g})")
    else:
        fast = reference
    if reasons:
        fast.note = f"{fast.mode} instead of {mode}: {'; '.join(reasons)}"
    return fast
