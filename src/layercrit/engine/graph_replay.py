"""Run the exported network node by node: what comes before the reset layer once per batch, the rest again."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

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
class _Source:
    """What the resets of some layers write to, and what follows from weights alone.

    Attributes:
        drawn: placeholder -> the name under which the value for it is drawn.
        static: node below them that depends on weights alone -> the names of all values that change it.
        read: those of both that nodes which need an image read.
    """

    drawn: dict[fx.Node, str]
    static: dict[fx.Node, tuple[str, ...]]
    read: frozenset[fx.Node]


@dataclass(frozen=True)
class Suffix:
    """What an image needs after a reset of some layers.

    Attributes:
        steps: all nodes that depend on these layers.
        frontier: the values from before them that the steps read.
    """

    steps: list[_Step]
    frontier: list[fx.Node]


@dataclass(frozen=True)
class _Level:
    """A sweep over the network in which some layers are reset already: those that several sets begin with.

    Sets are read in depth order, and those that begin alike share what is computed up to where they part.

    Attributes:
        base: names of the layers that are reset; none: the trained network.
        events: what is run, and the resets that are visited on the way.
        rest: what is then run up to the logits.
        own: the name of the set of just these layers, if that is one, whose logits these are.
        frontier: the values from outside that this reads.
        names: of all sets that begin like this.
    """

    base: "_Names"
    events: list["_Step | _Visit"]
    rest: list[_Step]
    own: str | None
    frontier: list[fx.Node]
    names: frozenset[str]


@dataclass(frozen=True)
class _Visit:
    """The moment of a sweep at which all values that the next resets read are there.

    Attributes:
        below: of several sets that begin alike, the level; of a single one, its name and what follows its reset.
        forget: the values that nothing later reads.
    """

    below: "_Level | tuple[str, Suffix]"
    forget: tuple[fx.Node, ...]


_Names = tuple[str, ...]
_Prepared = Mapping[_Names, Mapping[fx.Node, Any]]
"""Names of the layers that are reset -> node -> value; of a set, and of what it shares with other sets."""


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
        self._members = {layer.name: layer.members or (layer,) for layer in layers}
        self._sources: dict[_Names, _Source] = {}
        self._suffixes: dict[_Names, Suffix] = {}
        for layer in layers:
            if not layer.members:
                self._suffix((layer,))
        begun = Counter(begin for members in self._members.values() for begin in _beginnings(members))
        self._shared = {begin for begin, n in begun.items() if n > 1}
        self._sweeps: dict[frozenset[str], _Level] = {}
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
    def prepare(self, layer: Layer, values: Values, shared: dict[Any, Any] | None = None) -> _Prepared:
        shared = {} if shared is None else shared
        members = self._members[layer.name]
        return {
            _names(some): self._prepared(some, values, shared)
            for some in (*(members[: len(begin)] for begin in _beginnings(members) if begin in self._shared), members)
        }

    def _prepared(self, layers: tuple[Layer, ...], values: Values, shared: dict[Any, Any]) -> Mapping[fx.Node, Any]:
        """Return node -> value of what resets of some layers change, as far as nodes that need an image read it."""
        source, names = self._source(layers), _names(layers)
        identity = (names, *(id(values[name]) for name in source.drawn.values()))
        if identity in shared:
            return cast(Mapping[fx.Node, Any], shared[identity])
        cache: dict[fx.Node, Any] = {}
        for node, name in source.drawn.items():
            # kernels are chosen by requires_grad, too, even where no gradient is computed: F.linear of strided inputs
            requires_grad = self._weight_graph.values[node].requires_grad
            cache[node] = shared.get((node, id(values[name])))
            if cache[node] is None:
                cache[node] = shared[node, id(values[name])] = values[name].detach().requires_grad_(requires_grad)
        with torch.inference_mode():
            for node, of in source.static.items():
                key = (node, *(id(values[name]) for name in of))
                if key not in shared:
                    shared[key] = call(node, node.target, partial(self._static_value, cache=cache))
                cache[node] = shared[key]
        found = {node: value for node, value in cache.items() if node in source.read}
        shared[identity] = found
        return found

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
        if key not in self._sweeps:
            self._sweeps[key] = self._level((), [layer for layer in self.layers if layer.name in key])
        return self._run_level(self._sweeps[key], {self._weight_graph.images: images}, {}, prepared)

    def _run_level(
        self,
        level: _Level,
        outside: dict[fx.Node, Any],
        drawn: Mapping[fx.Node, Any],
        prepared: Sequence[Mapping[str, _Prepared]],
    ) -> Iterator[tuple[str | None, Tensor]]:
        """Yield what a sweep yields, of the sets of a level.

        Args:
            level: which layers are reset, and what is to be run.
            outside: the values from outside; those that are computed are put beside them, and forgotten.
            drawn: what is prepared for the layers that are reset.
            prepared: for each trial, set -> what is prepared for it. One trial where layers are reset already.
        """
        values = ChainMap(outside, cast(dict[fx.Node, Any], drawn), self._static)
        for event in level.events:
            if isinstance(event, _Step):
                with torch.inference_mode():
                    outside[event.node] = call(event.node, event.target, values.__getitem__)
            else:
                for of_trial in prepared:
                    yield from self._visit(event.below, values, of_trial)
            for node in event.forget:
                del outside[node]
        if level.base and not any(level.own in of_trial for of_trial in prepared):
            return
        for step in level.rest:
            with torch.inference_mode():
                outside[step.node] = call(step.node, step.target, values.__getitem__)
            for node in step.forget:
                del outside[node]
        yield level.own, values[self._weight_graph.logits]

    def _visit(
        self,
        below: _Level | tuple[str, Suffix],
        values: ChainMap[fx.Node, Any],
        of_trial: Mapping[str, _Prepared],
    ) -> Iterator[tuple[str | None, Tensor]]:
        if isinstance(below, _Level):
            first = next((of_set for name, of_set in of_trial.items() if name in below.names), None)
            if first is not None:
                outside = {node: values[node] for node in below.frontier}
                yield from self._run_level(below, outside, first[below.base], [of_trial])
        elif below[0] in of_trial:
            name, suffix = below
            with torch.inference_mode():
                logits = self._run_suffix(suffix, of_trial[name][_names(self._members[name])], values)
            yield name, logits

    # --- gradients --------------------------------------------------------------------------------------------------

    def in_reference(self) -> "GraphReplay":
        """Return a replay of the same network and layers whose operators have gradients: those of the network."""
        return self if self.mode == "reference" else GraphReplay(self.exported, self.layers)

    def before(self, layer: Layer, images: Tensor) -> dict[fx.Node, Any]:
        """Return the values from before a layer that what follows it reads, for `after`."""
        wanted = self._suffix(self._members[layer.name]).frontier
        level = self._level((), [layer])
        values = ChainMap[fx.Node, Any]({self._weight_graph.images: images}, self._plain_static)
        with torch.no_grad():
            for event in level.events:
                if isinstance(event, _Step):
                    values[event.node] = call(event.node, event.node.target, values.__getitem__)
        return {node: values[node] for node in wanted}

    def after(self, layer: Layer, values: Values, before: Mapping[fx.Node, Any]) -> Tensor:
        """Return the logits with other values of a layer, ``(n_images, n_classes)``, with gradients for these.

        Args:
            layer: as for `prepare`.
            values: likewise; those of its buffers may be missing, which are then the trained ones.
            before: what `before` returned for the images.
        """
        members = self._members[layer.name]
        source = self._source(members)
        drawn = {node: values.get(name, self._weight_graph.values[node]) for node, name in source.drawn.items()}
        found = ChainMap[fx.Node, Any](dict(drawn), cast(dict[fx.Node, Any], before), self._plain_static)
        for node in [*source.static, *(step.node for step in self._suffix(members).steps)]:
            found[node] = call(node, node.target, found.__getitem__)
        logits: Tensor = found[self._weight_graph.logits]
        return logits

    @cached_property
    def _plain_static(self) -> dict[fx.Node, Any]:
        """The weights and the nodes that depend on them alone, as tensors that gradients can be computed through."""
        found: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self._nodes:
                if node.op == "placeholder" and node is not self._weight_graph.images:
                    found[node] = self._weight_graph.values[node].detach()
                elif node.op == "call_function" and node not in self._dynamic:
                    found[node] = call(node, node.target, found.__getitem__)
        return found

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = self._weight_graph.images.meta["val"].shape
        return shape

    def _run_suffix(self, suffix: Suffix, prepared: Mapping[fx.Node, Any], before: ChainMap[fx.Node, Any]) -> Any:
        drawn = dict(prepared)
        values = before.new_child(drawn)
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

    # --- plans ------------------------------------------------------------------------------------------------------

    def _source(self, layers: tuple[Layer, ...]) -> _Source:
        names = _names(layers)
        if names not in self._sources:
            reset = [name for one in layers for name in (*one.parameters, *one.buffers)]
            drawn = {
                node: next(name for name in reset if name in of_node)
                for node, of_node in self._weight_graph.names.items()
                if not set(of_node).isdisjoint(reset)
            }
            changed: dict[fx.Node, tuple[str, ...]] = {node: (name,) for node, name in drawn.items()}
            read = set[fx.Node]()
            for node in self._nodes:
                above = [a for a in node.all_input_nodes if a in changed]
                if node in self._dynamic:
                    read.update(above)
                elif above and node.op == "call_function":
                    changed[node] = tuple(dict.fromkeys(name for a in above for name in changed[a]))
            static = {node: of for node, of in changed.items() if node not in drawn}
            self._sources[names] = _Source(drawn, static, frozenset(read))
        return self._sources[names]

    def _changed(self, layers: tuple[Layer, ...]) -> set[fx.Node]:
        """Return all nodes whose values depend on some layers."""
        changed = set(self._source(layers).drawn)
        for node in self._nodes:
            if node.op == "call_function" and any(a in changed for a in node.all_input_nodes):
                changed.add(node)
        return changed

    def _first_use(self, layer: Layer) -> int:
        """Return the place of the first node that needs an image and depends on a layer."""
        changed = self._changed((layer,)) & self._dynamic
        return next((place for place, node in enumerate(self._nodes) if node in changed), len(self._nodes))

    def _suffix(self, layers: tuple[Layer, ...]) -> Suffix:
        names = _names(layers)
        if names not in self._suffixes:
            changed = self._changed(layers)
            order = [node for node in self._nodes if node in changed and node in self._dynamic]
            read = {a for node in order for a in node.all_input_nodes if a in self._dynamic}
            frontier = [node for node in self._nodes if node in read and node not in changed]
            forget = _last_uses([(node, node.all_input_nodes) for node in order], keep={self._weight_graph.logits})
            steps = []
            for node, dead in zip(order, forget, strict=True):
                mine = tuple(a for a in dead if a in changed and a in self._dynamic)
                steps.append(_Step(node, in_place(node, mine), mine))
            if not steps:  # the network's output does not depend on these layers
                frontier = [self._weight_graph.logits]
            self._suffixes[names] = Suffix(steps, frontier)
        return self._suffixes[names]

    def _level(self, base: tuple[Layer, ...], sets: Sequence[Layer]) -> _Level:
        """Plan one sweep: run the network just far enough for each reset in turn, then to its end.

        Args:
            base: the layers that are reset already.
            sets: those that begin with them.
        """
        mine = self._changed(base[-1:]) & self._dynamic if base else self._dynamic  # the rest is as it was outside
        given = dict.fromkeys([self._weight_graph.images] if not base else list[fx.Node]())
        done, events = set[fx.Node](), list[tuple[Any, list[fx.Node]]]()

        def advance(wanted: Sequence[fx.Node]) -> None:
            needed, stack = set[fx.Node](), list(wanted)
            while stack:
                node = stack.pop()
                if node not in self._dynamic or node in done or node in needed or node in given:
                    continue
                if node in mine:
                    needed.add(node)
                    stack.extend(node.all_input_nodes)
                else:
                    given[node] = None
            for node in self._nodes:
                if node in needed:
                    events.append((node, node.all_input_nodes))
                    done.add(node)

        own = next((one.name for one in sets if len(self._members[one.name]) == len(base)), None) if base else None
        for below in self._parts(base, [one for one in sets if one.name != own]):
            frontier = below.frontier if isinstance(below, _Level) else below[1].frontier
            advance(frontier)
            events.append((below, frontier))
        n_before = len(events)
        if own is not None or not base:
            advance([self._weight_graph.logits])
        forget = _last_uses(events, keep={self._weight_graph.logits})
        planned: list[Any] = []
        for (event, _), dead in zip(events, forget, strict=True):
            gone = tuple(a for a in dead if a in done or a in given)
            planned.append(
                _Step(event, cast(Any, event.target), gone) if isinstance(event, fx.Node) else _Visit(event, gone)
            )
        names = frozenset(one.name for one in sets)
        return _Level(_names(base), planned[:n_before], planned[n_before:], own, list(given), names)

    def _parts(self, base: tuple[Layer, ...], sets: Sequence[Layer]) -> Iterator[_Level | tuple[str, Suffix]]:
        """Yield what is run after a base: of sets that go on with the same layer a level, of others their suffix."""
        following: dict[str, list[Layer]] = {}
        for one in sets:
            following.setdefault(self._members[one.name][len(base)].name, []).append(one)
        groups = list(following.values())
        if any(one.members for one in sets):  # of which any may come first
            groups.sort(key=lambda group: self._first_use(self._members[group[0].name][len(base)]))
        for group in groups:
            members = self._members[group[0].name]
            if len(group) > 1:
                yield self._level(members[: len(base) + 1], group)
            else:
                yield group[0].name, self._suffix(members[len(base) :])


def _names(layers: Sequence[Layer]) -> _Names:
    return tuple(layer.name for layer in layers)


def _beginnings(members: tuple[Layer, ...]) -> Iterator[_Names]:
    """Yield the names of the first layers of a set, the first one alone, the first two, and so on."""
    names = _names(members)
    return (names[:n] for n in range(1, len(names) + 1))


def call(node: fx.Node, target: Any, look_up: Callable[[fx.Node], Any]) -> Any:
    """Call what a node calls, or what stands for it, with the values of its arguments."""
    return target(*map_arg(node.args, look_up), **map_arg(node.kwargs, look_up))


def _last_uses(events: Sequence[tuple[Any, Sequence[fx.Node]]], keep: set[fx.Node]) -> list[list[fx.Node]]:
    """Return for each event the nodes that it is the last to read."""
    last = {node: index for index, (_, read) in enumerate(events) for node in read}
    made = {event: index for index, (event, _) in enumerate(events) if isinstance(event, fx.Node)}
    for node, index in made.items():
        last.setdefault(node, index)  # read by nothing: forget it at once
    forget: list[list[fx.Node]] = [[] for _ in events]
    for node, index in last.items():
        if node not in keep:
            forget[index].append(node)
    return forget
