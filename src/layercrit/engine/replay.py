"""Run resets fast: everything before the reset layer is computed once a batch, everything after it anew.

Three roads lead to the same logits. `GraphReplay` runs the exported network node by node. `RecordedReplay` runs the
module itself, where every module call that ended before the reset layer was first used returns its recorded output.
`PlainReplay` swaps the weights and runs the whole network.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from layercrit.engine.graph import (
    IN_PLACE,
    KEEPS_INPUT,
    WeightGraph,
    alike,
    export_graph,
    speed_up,
)
from layercrit.errors import ProtocolError, first_line
from layercrit.layers import Layer
from layercrit.machine import is_out_of_memory
from layercrit.models.model import logits_of
from layercrit.restoring import holding

__all__ = ["MODES", "GraphReplay", "Mode", "PlainReplay", "RecordedReplay", "Replay", "open_replay", "reopen"]

Mode = Literal["reference", "float32", "bfloat16"]
MODES = ("reference", "float32", "bfloat16")

Values = Mapping[str, Tensor]

# Error of logits, relative to the largest, that two ways to compute the same network in float32 may differ by.
_ROUNDING = 1e-4
# Total variation between softmax outputs, mean over images, beyond which a fast mode is not just rounded but broken.
_BROKEN: dict[Mode, float] = {"float32": 1e-3, "bfloat16": 0.5}


class Replay(ABC):
    """One network, ready to answer for one batch shape what it predicts after each of many resets.

    Attributes:
        layers: the layers that can be reset, in depth order.
        mode: ``reference`` (float32, the network's own operators, bit for bit the plain way), ``float32`` (folded and
            fused) or ``bfloat16`` (likewise, stored and multiplied in bfloat16).
        road: ``graph``, ``recorded`` or ``plain``.
        note: one line that says why a slower road or mode than asked was taken; empty if none was.
        flops_per_image: of one forward pass, two per multiply-add; 0 where it is not known.
    """

    road: str
    flops_per_image = 0.0

    def __init__(self, layers: Sequence[Layer], mode: Mode = "reference", note: str = "") -> None:
        self.layers = list(layers)
        self.mode = mode
        self.note = note

    @abstractmethod
    def prepare(self, layer: Layer, values: Values) -> Any:
        """Turn a layer's drawn parameter values (name -> tensor) into what `sweep` takes; done once a trial.

        Of parameters that are tied to each other, the value under the first of their names in the layer counts.
        """

    @abstractmethod
    def sweep(self, images: Tensor, prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        """Yield (layer name, logits after its reset) in depth order, and at last (None, logits of the trained network).

        Args:
            images: normalised images ``(n_images, channels, height, width)``, of the shape the replay was opened for.
            prepared: layer name -> what `prepare` returned. Logits are ``(n_images, n_classes)``, float32.
        """

    def logits(self, images: Tensor) -> Tensor:
        """Return the trained network's logits, ``(n_images, n_classes)``."""
        ((_, logits),) = self.sweep(images, {})
        return logits

    def flops_after(self) -> dict[str, float] | None:
        """Return for each layer the share of the forward pass's FLOPs that its reset makes run anew, in [0, 1]."""
        return None


def open_replay(network: nn.Module, layers: Sequence[Layer], images: Tensor, mode: Mode) -> Replay:
    """Return the fastest replay that gives the network's own logits, for its trained weights and for others.

    The exported graph must do so bit for bit for ``reference``, and up to rounding for the fast modes. (They differ
    where a network runs another kernel than the exporter writes down, as ``nn.MultiheadAttention`` does.)

    Args:
        network: evaluation mode; takes normalised images, and its output is anything that `logits_of` understands.
        layers: what may be reset, in depth order.
        images: a batch of normalised images; its shape is the one that sweeps will have.
        mode: one of `MODES`. The other roads than the graph's know ``reference`` only.
    """
    try:
        weight_graph = export_graph(network, images)
    except Exception as error:  # torch.export documents no base class for what it raises
        if is_out_of_memory(error):
            raise
        reason = f"the network does not export ({first_line(error)})"
    else:
        whole = Layer("", "", tuple(name for name, _ in network.named_parameters()), (), 0)
        rounding = 0.0 if mode == "reference" else _ROUNDING
        if _agrees(GraphReplay(weight_graph, [whole]), PlainReplay(network, [whole]), images, rounding):
            return _in_mode(GraphReplay(weight_graph, layers), mode, images)
        reason = "the exported network does not reproduce the network's own logits"
    recorded = RecordedReplay(network, layers, f"recorded outputs instead of a graph: {reason}")
    plain = PlainReplay(network, layers, f"the plain way, no reuse: {reason}, and recorded outputs do not either")
    return recorded if _agrees(recorded, plain, images) else plain


def _agrees(replay: Replay, plain: "PlainReplay", images: Tensor, rounding: float = 0.0) -> bool:
    """Return whether a replay gives the plain way's logits, also when weights are moved a little.

    The trained weights alone would not do: a weight that the exporter took for a constant, or a value that the
    network keeps between calls, shows only when weights change.
    """
    parameters = dict(plain.network.named_parameters(remove_duplicate=False))
    moved = {
        layer.name: {name: parameters[name].detach() * 1.015625 + 0.001 for name in layer.parameters}
        for layer in plain.layers
    }
    prepared = {layer.name: replay.prepare(layer, moved[layer.name]) for layer in plain.layers}
    # the logits of the trained weights, which end a sweep, would show nothing more
    sweeps = islice(replay.sweep(images, prepared), len(moved)), islice(plain.sweep(images, moved), len(moved))
    for (_, got), (_, expected) in zip(*sweeps, strict=True):
        expected_finite = expected.nan_to_num()  # where the network itself overflows, both must
        if (got.nan_to_num() - expected_finite).abs().max() > rounding * expected_finite.abs().max():
            return False
    return True


def reopen(replay: "GraphReplay", images: Tensor, mode: Mode) -> "GraphReplay":
    """Return a replay of the same network and layers in another mode, without exporting and checking it again."""
    return _in_mode(GraphReplay(replay.exported, replay.layers), mode, images)


def _in_mode(reference: "GraphReplay", mode: Mode, images: Tensor) -> "GraphReplay":
    """Return the replay in another mode, or in the next slower one that works."""
    attempts: dict[Mode, list[Mode]] = {"reference": [], "float32": ["float32"], "bfloat16": ["bfloat16", "float32"]}
    reasons: list[str] = []
    for attempt in attempts[mode]:
        try:
            fast = reference.in_mode(attempt, images.device)
            logits = fast.logits(images)
        except RuntimeError as error:  # an operator that does not know this number format
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


# --- the graph road -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """Run one node, then forget the values that nothing later reads."""

    node: fx.Node
    target: Callable[..., Any]
    forget: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Suffix:
    """What one layer's reset changes.

    Attributes:
        sources: placeholder -> the name under which the layer's value for it is drawn.
        static: nodes below them that depend on weights alone.
        steps: what an image needs.
        frontier: the clean values that the steps read.
    """

    sources: dict[fx.Node, str]
    static: list[fx.Node]
    steps: list[_Step]
    frontier: list[fx.Node]


@dataclass(frozen=True)
class _Visit:
    """The moment of a sweep at which all clean values that a layer's suffix reads are there."""

    layer: Layer
    forget: tuple[fx.Node, ...]


class GraphReplay(Replay):
    """The exported network, run node by node; a reset runs only the descendants of its layer."""

    road = "graph"

    def __init__(
        self,
        weight_graph: WeightGraph,
        layers: Sequence[Layer],
        mode: Mode = "reference",
        exported: WeightGraph | None = None,
    ) -> None:
        super().__init__(layers, mode)
        self._weight_graph = weight_graph
        self.exported = exported or weight_graph  # as it was before it was rewritten for speed
        self._nodes: list[fx.Node] = list(weight_graph.graph.nodes)
        self._dynamic = weight_graph.dynamic_nodes()
        self._suffixes = {layer.name: self._plan_suffix(layer) for layer in layers}
        self._schedules: dict[frozenset[str], list[_Step | _Visit]] = {}
        flops = _flops(self._dynamic)
        self.flops_per_image = flops / self._shape[0]
        self._flops_after = {
            name: _flops(step.node for step in suffix.steps) / max(1, flops) for name, suffix in self._suffixes.items()
        }
        read = {a for node in self._dynamic for a in node.all_input_nodes} | {weight_graph.logits}
        with torch.inference_mode():
            cache: dict[fx.Node, Any] = {}
            self._static = {node: self._static_value(node, cache) for node in read - self._dynamic}

    def in_mode(self, mode: Mode, device: torch.device) -> "GraphReplay":
        """Return a replay of the same network and layers in a fast mode."""
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        return GraphReplay(speed_up(self.exported, dtype, device), self.layers, mode, self.exported)

    @override
    def prepare(self, layer: Layer, values: Values) -> dict[fx.Node, Any]:
        suffix = self._suffixes[layer.name]
        # kernels are chosen by requires_grad, too, even where no gradient is computed: F.linear of strided inputs
        cache: dict[fx.Node, Any] = {
            node: values[name].detach().requires_grad_(self._weight_graph.values[node].requires_grad)
            for node, name in suffix.sources.items()
        }
        with torch.inference_mode():
            for node in suffix.static:
                cache[node] = _call(node, node.target, partial(self._static_value, cache=cache))
        read = {a for step in suffix.steps for a in step.node.all_input_nodes}
        return {node: value for node, value in cache.items() if node in read}

    @override
    def sweep(self, images: Tensor, prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        if images.shape != self._shape:
            raise ProtocolError(
                f"The images have shape {tuple(images.shape)}, but the network was exported for {tuple(self._shape)}. "
                "Fill up the last batch, or open another replay."
            )
        key = frozenset(prepared)
        if key not in self._schedules:
            self._schedules[key] = self._schedule([layer for layer in self.layers if layer.name in key])
        clean: dict[fx.Node, Any] = {self._weight_graph.images: images}
        values = ChainMap(clean, self._static)
        for event in self._schedules[key]:
            with torch.inference_mode():
                if isinstance(event, _Step):
                    clean[event.node] = _call(event.node, event.target, values.__getitem__)
                else:
                    logits = self._run_suffix(self._suffixes[event.layer.name], prepared[event.layer.name], clean)
            if isinstance(event, _Visit):
                yield event.layer.name, logits
            for node in event.forget:
                del clean[node]
        yield None, values[self._weight_graph.logits]

    @override
    def flops_after(self) -> dict[str, float]:
        return self._flops_after

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = self._weight_graph.images.meta["val"].shape
        return shape

    def _run_suffix(self, suffix: _Suffix, prepared: dict[fx.Node, Any], clean: dict[fx.Node, Any]) -> Any:
        drawn = dict(prepared)
        values = ChainMap(drawn, clean, self._static)
        for step in suffix.steps:
            drawn[step.node] = _call(step.node, step.target, values.__getitem__)
            for node in step.forget:
                del drawn[node]
        return values[self._weight_graph.logits]

    def _static_value(self, node: fx.Node, cache: dict[fx.Node, Any]) -> Any:
        """Compute a static node from the trained weights, unless the cache has its value."""
        if node not in cache:
            if node.op == "placeholder":
                return self._weight_graph.values[node]
            cache[node] = _call(node, node.target, partial(self._static_value, cache=cache))
        return cache[node]

    def _plan_suffix(self, layer: Layer) -> _Suffix:
        sources = {
            node: next(name for name in layer.parameters if name in names)
            for node, names in self._weight_graph.names.items()
            if not set(names).isdisjoint(layer.parameters)
        }
        changed = set(sources)
        for node in self._nodes:
            if node.op == "call_function" and any(a in changed for a in node.all_input_nodes):
                changed.add(node)
        static = [node for node in self._nodes if node in changed and node not in self._dynamic and node not in sources]
        order = [node for node in self._nodes if node in changed and node in self._dynamic]
        read = {a for node in order for a in node.all_input_nodes if a in self._dynamic}
        frontier = [node for node in self._nodes if node in read and node not in changed]
        forget = _last_uses([(node, node.all_input_nodes) for node in order], keep={self._weight_graph.logits})
        steps = []
        for node, dead in zip(order, forget, strict=True):
            mine = tuple(a for a in dead if a in changed and a in self._dynamic)
            steps.append(_Step(node, _in_place(node, mine), mine))
        return _Suffix(sources, static, steps, frontier)

    def _schedule(self, layers: Sequence[Layer]) -> list[_Step | _Visit]:
        """Order one sweep: run the clean network just far enough for each layer in turn, then to its end."""
        events: list[tuple[fx.Node | Layer, list[fx.Node]]] = []
        done = {self._weight_graph.images}

        def advance(wanted: Sequence[fx.Node]) -> None:
            needed, stack = set[fx.Node](), list(wanted)
            while stack:
                node = stack.pop()
                if node in self._dynamic and node not in done and node not in needed:
                    needed.add(node)
                    stack.extend(node.all_input_nodes)
            for node in self._nodes:
                if node in needed:
                    events.append((node, node.all_input_nodes))
                    done.add(node)

        for layer in layers:
            frontier = self._suffixes[layer.name].frontier
            if not self._suffixes[layer.name].steps:
                frontier = [self._weight_graph.logits]  # the network's output does not depend on this layer
            advance(frontier)
            events.append((layer, frontier))
        advance([self._weight_graph.logits])
        forget = _last_uses(events, keep={self._weight_graph.logits})
        schedule: list[_Step | _Visit] = []
        for (event, _), dead in zip(events, forget, strict=True):
            mine = tuple(a for a in dead if a in self._dynamic)
            schedule.append(_Visit(event, mine) if isinstance(event, Layer) else _Step(event, event.target, mine))  # type: ignore[arg-type]
        return schedule


def _call(node: fx.Node, target: Any, look_up: Callable[[fx.Node], Any]) -> Any:
    return target(*map_arg(node.args, look_up), **map_arg(node.kwargs, look_up))


def _flops(nodes: Iterable[fx.Node]) -> float:
    return float(sum(node.meta.get("flops", 0) for node in nodes))


def _last_uses(events: Sequence[tuple[Any, Sequence[fx.Node]]], keep: set[fx.Node]) -> list[list[fx.Node]]:
    """Return for each event the nodes that it is the last to read."""
    last = {node: index for index, (_, read) in enumerate(events) for node in read}
    made = {event: index for index, (event, _) in enumerate(events)}
    for node, index in made.items():
        last.setdefault(node, index)  # read by nothing: forget it at once
    forget: list[list[fx.Node]] = [[] for _ in events]
    for node, index in last.items():
        if node not in keep and isinstance(node, fx.Node):
            forget[index].append(node)
    return forget


def _in_place(node: fx.Node, dead: tuple[fx.Node, ...]) -> Callable[..., Any]:
    """Return the node's target, or the variant that writes over an input which nothing else reads any more.

    Safe only where no other node can see that input's memory: its maker returned fresh memory and so did every reader.
    """
    target: Any = node.target
    variant, position = IN_PLACE.get(target, (None, 0))
    if variant is None:
        return target  # type: ignore[no-any-return]
    victim = node.args[position]
    if not isinstance(victim, fx.Node) or victim not in dead or node.args.count(victim) > 1 or not alike(victim, node):
        return target  # type: ignore[no-any-return]
    if all(other.target in KEEPS_INPUT for other in [victim, *victim.users]):
        return variant
    return target  # type: ignore[no-any-return]


# --- the other roads ------------------------------------------------------------------------------------------------


def _run(network: nn.Module, values: Values, images: Tensor) -> Tensor:
    with torch.no_grad(), holding(network, values):
        return logits_of(network(images))


class PlainReplay(Replay):
    """The plain way: swap the weights, run the whole network."""

    road = "plain"

    def __init__(self, network: nn.Module, layers: Sequence[Layer], note: str = "") -> None:
        super().__init__(layers, "reference", note)
        self.network = network

    @override
    def prepare(self, layer: Layer, values: Values) -> Values:
        return dict(values)

    @override
    def sweep(self, images: Tensor, prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        for layer in self.layers:
            if layer.name in prepared:
                yield layer.name, _run(self.network, prepared[layer.name], images)
        yield None, _run(self.network, {}, images)


@dataclass
class _Call:
    """One call of a module during the recorded pass; times are counted in calls and parameter uses."""

    module: nn.Module
    start: int
    end: int = -1
    output: Any = None
    following: int = 0  # index of the first call that starts after this one ended


class _DivergedError(Exception):
    """The network called other modules than in the recorded pass."""


class RecordedReplay(PlainReplay):
    """The module itself, where calls that ended before the reset layer was first used return their recorded output."""

    road = "recorded"

    @override
    def sweep(self, images: Tensor, prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        recording = _Recording(self.network)
        clean = recording.record(images)
        for layer in self.layers:
            if layer.name in prepared:
                yield layer.name, recording.replay(layer, prepared[layer.name], images)
        yield None, clean


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """All module calls of one forward pass with their outputs, and when each parameter was first used."""

    supports_higher_order_operators = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network = network
        self.calls: list[_Call] = []
        self.first_use: dict[int, int] = {}
        self._parameters = {id(p) for p in network.parameters()}
        self._time = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self._parameters:
                self.first_use.setdefault(id(leaf), self._tick())
        return func(*args, **(kwargs or {}))

    def record(self, images: Tensor) -> Tensor:
        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            record = _Call(module, self._tick())
            self.calls.append(record)
            output = forward(*args, **kwargs)
            record.output = _copy(output)
            record.end = self._tick()
            record.following = len(self.calls)
            return output

        with self, _calls_go_through(self.network, call):
            return _run(self.network, {}, images)

    def replay(self, layer: Layer, values: Values, images: Tensor) -> Tensor:
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        # a parameter whose use was not seen: nothing is reused
        first_use = min(self.first_use.get(id(parameters[name]), 0) for name in layer.parameters)
        upcoming = 0

        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal upcoming
            if upcoming >= len(self.calls) or self.calls[upcoming].start > first_use:
                return forward(*args, **kwargs)
            record = self.calls[upcoming]
            if record.module is not module:
                raise _DivergedError
            if record.end < first_use and record.output is not None:
                upcoming = record.following
                return _copy(record.output)
            upcoming += 1
            return forward(*args, **kwargs)

        try:
            with _calls_go_through(self.network, call):
                return _run(self.network, values, images)
        except _DivergedError:
            return _run(self.network, values, images)

    def _tick(self) -> int:
        self._time += 1
        return self._time


def _copy(output: Any) -> Any:
    """Copy the tensors of a module's output, for what follows may write to them; None if it holds anything opaque."""
    leaves, structure = pytree.tree_flatten(output)
    if not all(isinstance(leaf, (Tensor, int, float, bool, str, type(None))) for leaf in leaves):
        return None
    return pytree.tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


@contextlib.contextmanager
def _calls_go_through(network: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let every call of a submodule be answered by ``call(module, its forward, *args, **kwargs)`` for a while."""
    modules = [m for m in network.modules() if m is not network and not isinstance(m, torch.jit.ScriptModule)]
    before = [(m, m.__dict__.get("forward")) for m in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = partial(call, module, module.forward)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
