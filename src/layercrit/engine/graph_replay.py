"""Run the exported network node by node: what comes before the reset layer once per batch, the rest again."""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from typing_extensions import override

from layercrit.engine.cuda_graphs import SweepCaptures
from layercrit.engine.graph import WeightGraph, speed_up
from layercrit.engine.in_place import in_place
from layercrit.engine.replay import Mode, Replay, Values
from layercrit.errors import ProtocolError
from layercrit.layers import Layer

__all__ = ["GraphReplay", "Suffix", "call"]


@dataclass(frozen=True)
class _Step:
    """Run one node, then forget the values that nothing later reads."""

    node: fx.Node
    target: Callable[..., Any]
    forget: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Suffix:
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

    backend = "exported graph"

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
        self._captures = SweepCaptures()
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
                cache[node] = call(node, node.target, partial(self._static_value, cache=cache))
        read = {a for step in suffix.steps for a in step.node.all_input_nodes}
        return {node: value for node, value in cache.items() if node in read}

    @override
    def sweep(self, images: Tensor, *prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        if images.shape != self._shape:
            raise ProtocolError(
                f"The images have shape {tuple(images.shape)}, but the network was exported for {tuple(self._shape)}. "
                "Pad the last batch, or open another replay."
            )
        if images.device.type == "cuda" and self.mode != "reference":
            return self._captures.sweep(self._run, images, *prepared)
        return self._run(images, *prepared)

    def _run(self, images: Tensor, *prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        key = frozenset(name for of_trial in prepared for name in of_trial)
        if key not in self._schedules:
            self._schedules[key] = self._schedule([layer for layer in self.layers if layer.name in key])
        clean: dict[fx.Node, Any] = {self._weight_graph.images: images}
        values = ChainMap(clean, self._static)
        for event in self._schedules[key]:
            if isinstance(event, _Step):
                with torch.inference_mode():
                    clean[event.node] = call(event.node, event.target, values.__getitem__)
            else:
                name = event.layer.name
                for of_trial in prepared:
                    if name not in of_trial:
                        continue
                    with torch.inference_mode():
                        logits = self._run_suffix(self._suffixes[name], of_trial[name], clean)
                    yield name, logits
            for node in event.forget:
                del clean[node]
        yield None, values[self._weight_graph.logits]

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = self._weight_graph.images.meta["val"].shape
        return shape

    def _run_suffix(self, suffix: Suffix, prepared: dict[fx.Node, Any], clean: dict[fx.Node, Any]) -> Any:
        drawn = dict(prepared)
        values = ChainMap(drawn, clean, self._static)
        for step in suffix.steps:
            drawn[step.node] = call(step.node, step.target, values.__getitem__)
            for node in step.forget:
                del drawn[node]
        return values[self._weight_graph.logits]

    def _static_value(self, node: fx.Node, cache: dict[fx.Node, Any]) -> Any:
        """Compute a static node from the trained weights, unless the cache has its value."""
        if node not in cache:
            if node.op == "placeholder":
                return self._weight_graph.values[node]
            cache[node] = call(node, node.target, partial(self._static_value, cache=cache))
        return cache[node]

    def _plan_suffix(self, layer: Layer) -> Suffix:
        reset = (*layer.parameters, *layer.buffers)
        sources = {
            node: next(name for name in reset if name in names)
            for node, names in self._weight_graph.names.items()
            if not set(names).isdisjoint(reset)
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
            steps.append(_Step(node, in_place(node, mine), mine))
        return Suffix(sources, static, steps, frontier)

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


def call(node: fx.Node, target: Any, look_up: Callable[[fx.Node], Any]) -> Any:
    """Call what a node calls, or what stands for it, with the values of its arguments."""
    return target(*map_arg(node.args, look_up), **map_arg(node.kwargs, look_up))


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
