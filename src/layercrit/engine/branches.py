"""The residual branches of a network, and the parameters that end each: were these 0, a block would be its shortcut."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from layercrit.engine.exports import graph_of
from layercrit.engine.graph import WeightGraph
from layercrit.engine.replay import ReadLogits
from layercrit.layers import Layer
from layercrit.models.outputs import logits_of

__all__ = ["branch_ends"]

aten = torch.ops.aten

_MOST_IN_SHORTCUT = 1  # convolutions or linear layers, as the projection of a downsampling block
# 0 where their first argument is 0. What this says is checked by running, so the list may be generous.
_KEEP_ZERO = {
    *("view", "reshape", "_unsafe_view", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "flatten"),
    *("slice", "select", "index", "narrow", "unbind", "split", "split_with_sizes", "chunk", "roll", "flip", "repeat"),
    *("clone", "alias", "contiguous", "_to_copy", "to", "detach", "lift_fresh_copy", "dropout", "feature_dropout"),
    *("pad", "constant_pad_nd", "unfold", "im2col", "pixel_shuffle", "pixel_unshuffle", "mean", "sum", "neg", "div"),
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh", "hardswish"),
    *("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "upsample_bilinear2d", "upsample_nearest2d"),
}
_PRODUCTS = {"mul", "matmul", "mm", "bmm"}  # 0 where either factor is
_NORMS = {  # the positions of their weight and bias
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "rms_norm": (2, None),
    "_native_batch_norm_legit_no_training": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "native_batch_norm": (1, 2),
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
}
_KEEP_ZERO_ALONE = {"layer_norm", "group_norm", "rms_norm"}  # of norms without weight and bias


@dataclass(frozen=True)
class _Branch:
    """One term of a sum beside a shortcut.

    Attributes:
        result: the term.
        nodes: what is computed between the shortcut and the term, the term included.
        weights: placeholders of convolutions and linear layers that these read.
        of_shortcut: those that the shortcut itself reads.
        ends: placeholders that make the term 0 where they are 0; None: there are none such.
    """

    result: fx.Node
    nodes: Set[fx.Node]
    weights: Set[fx.Node]
    of_shortcut: Set[fx.Node]
    ends: Set[fx.Node] | None


def branch_ends(
    network: nn.Module,
    images: Tensor,
    units: Sequence[Layer],
    layers: Sequence[Layer],
    read_logits: ReadLogits = logits_of,
) -> dict[str, tuple[str, ...]]:
    """Return for each unit that consists of residual branches the parameters that end these.

    A residual branch is a term of a sum one of whose other terms is the shortcut: the value from which the branch is
    computed, or a projection of it with one convolution or linear layer at most, and fewer than the branch has. A
    unit consists of branches if each of its convolutions and linear layers is in one of them, or in the shortcut around
    it, and it has all of theirs. What ends a branch are the last parameters that the term is 0 without: the weight and
    bias of its last projection or normalisation, or its layer scale. That it is 0 without them is checked by running.

    Args:
        network: in evaluation mode.
        images: a small normalised batch, ``(n_images, channels, height, width)``.
        units: what is reset.
        layers: all layers of the network, which tell convolutions and linear layers from others.
        read_logits: takes the logits out of what the network returns.

    Returns:
        unit -> names of parameters; units that do not consist of residual branches are left out.

    Raises:
        Exception: whatever ``torch.export`` raises for a network that it cannot follow.
    """
    graph, _ = graph_of(network, images, read_logits)
    typed = {name for layer in layers if layer.type in ("conv", "linear") for name in layer.parameters}
    found = _Branches(graph, {node for node, names in graph.names.items() if typed.intersection(names)})
    chosen = {unit.name: found.of_unit(unit) for unit in units}
    zeroed = {node for branches in chosen.values() for branch in branches for node in branch.ends or ()}
    failed = _not_zero(graph, images, zeroed, [branch.result for of_unit in chosen.values() for branch in of_unit])
    parameters = dict(network.named_parameters(remove_duplicate=False))
    ends = {}
    for unit, branches in chosen.items():
        nodes = sorted({node for branch in branches for node in branch.ends or ()}, key=found.place.__getitem__)
        if nodes and failed.isdisjoint(branch.result for branch in branches):
            ends[unit] = tuple(next(name for name in graph.names[node] if name in parameters) for node in nodes)
    return ends


class _Branches:
    """Finds the residual branches of a graph.

    Attributes:
        place: node -> its position in topological order.

    Args:
        weight_graph: the network.
        weights: placeholders of convolutions and linear layers.
    """

    def __init__(self, weight_graph: WeightGraph, weights: Set[fx.Node]) -> None:
        self._graph = weight_graph
        self._weights = {node for node in weights if node.users}  # tied ones have a placeholder each; one is read
        self._dynamic = weight_graph.dynamic_nodes()
        self.place = {node: number for number, node in enumerate(weight_graph.graph.nodes)}
        self._sources = self._sources_of_all()

    def of_unit(self, unit: Layer) -> list[_Branch]:
        """Return the branches that a unit consists of, without those inside others; empty if it does not."""
        own = {node for node, names in self._graph.names.items() if not set(names).isdisjoint(unit.parameters)}
        weights = own & self._weights
        inside = [branch for branch in self.all if branch.weights <= weights]
        outermost = [one for one in inside if not any(one.result in other.nodes for other in inside if other != one)]
        covered = {node for branch in outermost for node in branch.weights | branch.of_shortcut}
        if not outermost or not weights <= covered or any(not branch.ends for branch in outermost):
            return []
        nodes = {node for branch in outermost for node in branch.nodes}
        ends = {node for branch in outermost for node in branch.ends or ()}
        # a parameter that something else reads, too, cannot be 0 for this unit alone
        shared = any(self._sources[node] & ends for node in self._dynamic - nodes if self._reads_weights(node))
        return [] if shared else outermost

    @cached_property
    def all(self) -> list[_Branch]:
        """All branches with a convolution or linear layer."""
        found = [branch for node in self._graph.graph.nodes if self._is_sum(node) for branch in self._beside(node)]
        return [branch for branch in found if branch.weights]

    def _sources_of_all(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """Return node -> the placeholders of weights that it reads, also by way of nodes that read weights alone."""
        sources: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self._graph.graph.nodes:
            static = [a for a in node.all_input_nodes if a not in self._dynamic]
            own = frozenset([node]) if node in self._graph.values else frozenset()
            sources[node] = own.union(*(sources[a] for a in static))
        return sources

    def _reads_weights(self, node: fx.Node) -> bool:
        return bool(self._sources[node])

    # --- sums -------------------------------------------------------------------------------------------------------

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether a node adds two values that depend on the image, and is not itself a mere term of such a sum."""
        if not self._adds(node):
            return False
        return not (len(node.users) == 1 and self._adds(next(iter(node.users))))

    def _adds(self, node: fx.Node) -> bool:
        dynamic = len(node.args) == 2 and all(isinstance(a, fx.Node) and a in self._dynamic for a in node.args)
        return node.target is aten.add.Tensor and dynamic and not node.kwargs

    def _terms(self, node: fx.Node) -> Iterator[fx.Node]:
        for argument in node.all_input_nodes:
            if self._adds(argument) and len(argument.users) == 1:
                yield from self._terms(argument)
            else:
                yield argument

    def _beside(self, total: fx.Node) -> Iterator[_Branch]:
        """Yield the terms of a sum beside its shortcut, if it has one."""
        terms = list(self._terms(total))
        before = {term: self._before(term) for term in terms}
        for shortcut in terms:
            others = [term for term in terms if term is not shortcut]
            if others and all(shortcut in before[term] for term in others):
                for term in others:
                    yield self._branch(term, self._between(shortcut, before[term]), frozenset())
                return
        common = set.intersection(*before.values())
        if len(terms) < 2 or not common:
            return
        start = max(common, key=self.place.__getitem__)
        nodes = {term: self._between(start, before[term]) for term in terms}
        if any(not self._starts_at(start, inside) for inside in nodes.values()):
            return
        n_weights = {term: self._n_products(inside) for term, inside in nodes.items()}
        shortcut, *others = sorted(terms, key=n_weights.__getitem__)
        if n_weights[shortcut] <= min(_MOST_IN_SHORTCUT, n_weights[others[0]] - 1):
            for term in others:
                yield self._branch(term, nodes[term], self._weights_of(nodes[shortcut]))

    def _before(self, node: fx.Node) -> set[fx.Node]:
        """Return a node and the nodes that depend on the image from which it is computed."""
        found, stack = {node}, [node]
        while stack:
            for argument in stack.pop().all_input_nodes:
                if argument in self._dynamic and argument not in found:
                    found.add(argument)
                    stack.append(argument)
        return found

    def _between(self, start: fx.Node, before: Set[fx.Node]) -> set[fx.Node]:
        """Return the nodes on the way from one node to another, without the first, given all before the other."""
        inside = {start}
        for node in sorted(before, key=self.place.__getitem__):
            if any(argument in inside for argument in node.all_input_nodes):
                inside.add(node)
        return inside - {start}

    def _starts_at(self, start: fx.Node, nodes: Set[fx.Node]) -> bool:
        """Whether some nodes depend on the image by way of one node only."""
        read = {argument for node in nodes for argument in node.all_input_nodes if argument in self._dynamic}
        return read - nodes <= {start}

    def _weights_of(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """Return the weight of each convolution and linear layer among some nodes, and their biases."""
        return frozenset().union(*(self._sources[node] for node in nodes)) & self._weights

    def _n_products(self, nodes: Iterable[fx.Node]) -> int:
        """Return how many convolutions and linear layers there are among some nodes, biases not counted."""
        return sum(self._graph.values[weight].ndim > 1 for weight in self._weights_of(nodes))

    def _branch(self, result: fx.Node, nodes: Set[fx.Node], of_shortcut: Set[fx.Node]) -> _Branch:
        return _Branch(result, nodes, self._weights_of(nodes), of_shortcut, self._ends(result, nodes))

    # --- what ends a branch -----------------------------------------------------------------------------------------

    def _ends(self, node: Any, nodes: Set[fx.Node]) -> frozenset[fx.Node] | None:
        """Return the parameters nearest to a node that make it 0 where they are 0; None where none do.

        Args:
            node: a node, or what stands in the place of one: a number, or None for a bias that is not there.
            nodes: those of the branch.
        """
        if not isinstance(node, fx.Node):
            return frozenset() if node is None else None
        if node in self._graph.values:
            value = self._graph.values[node]
            return frozenset([node]) if isinstance(value, nn.Parameter) and value.is_floating_point() else None
        if node.op != "call_function" or (node in self._dynamic and node not in nodes):
            return None
        arguments: list[Any] = list(node.args)
        name = "getitem" if node.target is operator.getitem else str(getattr(node.target, "overloadpacket", ""))
        name = name.removeprefix("aten.")
        if name in ("add", "sub"):
            return self._all_of(arguments[:2], nodes)
        if name in ("cat", "stack"):
            return self._all_of(arguments[0], nodes)
        if name in _PRODUCTS:
            either = [found for a in arguments[:2] if (found := self._ends(a, nodes)) is not None]
            return min(either, key=lambda found: sum(self._graph.values[one].numel() for one in found), default=None)
        if name in ("linear", "conv1d", "conv2d", "conv3d", "convolution"):
            return self._all_of(arguments[1:3], nodes)
        if name == "addmm":
            return self._all_of([arguments[0], arguments[2]], nodes)
        if name == "scaled_dot_product_attention":
            return self._ends(arguments[2], nodes)
        if name in _NORMS:
            weight, bias = (None if at is None or at >= len(arguments) else arguments[at] for at in _NORMS[name])
            if weight is not None:
                return self._all_of([weight, bias], nodes)
            return self._all_of([arguments[0], bias], nodes) if name in _KEEP_ZERO_ALONE else None
        return self._ends(arguments[0], nodes) if name in _KEEP_ZERO or name == "getitem" else None

    def _all_of(self, arguments: Iterable[Any], nodes: Set[fx.Node]) -> frozenset[fx.Node] | None:
        found = [self._ends(argument, nodes) for argument in arguments]
        return None if any(one is None for one in found) else frozenset().union(*(one for one in found if one))


def _not_zero(
    graph: WeightGraph, images: Tensor, zeroed: Set[fx.Node], results: Iterable[fx.Node]
) -> frozenset[fx.Node]:
    """Run the network with some parameters at 0, and return those of the results that are not 0 everywhere."""
    wanted, failed = set(results), set()
    values: Mapping[fx.Node, Any] = {
        **{node: torch.zeros_like(value) if node in zeroed else value for node, value in graph.values.items()},
        graph.images: images,
    }
    found = dict(values)
    with torch.no_grad():
        for node in graph.graph.nodes if wanted else ():
            if node.op == "call_function":
                found[node] = node.target(*map_arg(node.args, found.__getitem__), **map_arg(node.kwargs, found.get))
            if node in wanted and (found[node] != 0).any():  # NaN is not 0 either
                failed.add(node)
    return frozenset(failed)
