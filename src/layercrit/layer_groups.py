"""Which layers belong together: blocks and stages by their names; attention, MLPs, convolution and norm by dataflow."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from statistics import mean

from layercrit.watchers import Operation

__all__ = ["LayersOfParameters", "Structure", "block_of", "blocks_of", "stage_of"]

LayersOfParameters = Mapping[int, Sequence[str]]
"""Id of a parameter -> the names of the layers that it belongs to."""

_WITH_ADDEND = {"addmm", "baddbmm", "addbmm", "addmv"}  # whose first argument is added, not multiplied
_PRODUCTS = {*_WITH_ADDEND, "bmm", "convolution", "linear", "matmul", "mm", "mv", "_trilinear"}
_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
_FUSED_ATTENTION = "_scaled_dot_product"  # what the names of torch's fused kernels begin with
_ADDITIONS = {"add", "add_"}
_ACTIVATIONS = {
    *("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "_prelu_kernel", "relu", "relu6"),
    *("sigmoid", "silu", "softplus", "tanh", "threshold"),
}  # fmt: skip
_OF_SHAPE = {
    *("_reshape_alias", "_to_copy", "_unsafe_view", "alias", "clone", "copy_", "detach", "dropout", "expand"),
    *("permute", "reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
}  # fmt: skip


# --- blocks and stages, by name -------------------------------------------------------------------------------------


def blocks_of(names: Iterable[str]) -> set[str]:
    """Return the names of the modules that are blocks, given those of all convolutions and linear layers."""
    held = Counter[str]()  # numbered module -> how many convolutions and linear layers it holds, or is
    for name in names:
        held.update(_numbered_ancestors(f"{name}."))
    siblings: dict[str, list[bool]] = {}
    for name, n in held.items():
        siblings.setdefault(name.rstrip("0123456789"), []).append(n >= 2)
    # most siblings: the one numbered squeeze-and-excitation module of a block is no block of its own
    large = {name for name in held if held[name] >= 2 and mean(siblings[name.rstrip("0123456789")]) > 0.5}
    return {name for name in large if not any(other.startswith(f"{name}.") for other in large)}


def block_of(name: str, blocks: set[str]) -> str:
    """Return the block that a layer is in, or the layer's own name."""
    return next((ancestor for ancestor in _numbered_ancestors(name) if ancestor in blocks), name)


def stage_of(name: str, blocks: set[str]) -> str:
    """Return the next numbered module around a layer's block, or the network's outermost child."""
    block = block_of(name, blocks)
    return next(iter(_numbered_ancestors(block)), block.split(".")[0])


def _numbered_ancestors(name: str) -> list[str]:
    """Return the ancestors of a name whose last component ends in a digit, deepest first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if parts[n - 1][-1].isdigit()]


# --- attention, MLPs, convolutions with their norms: by what flows where ----------------------------------------------


@dataclass(frozen=True)
class _Part:
    """An attention or an MLP: the operations that multiply by weights, and the names of all its layers."""

    weighted: frozenset[int]
    layers: frozenset[str]


class Structure:
    """What the operators of a forward pass tell about its layers.

    An operation is *weighted* if it multiplies what comes from the image by parameters; a *product* if it multiplies
    two things that come from the image. Attention is a product of which one factor comes from a softmax, or one of
    torch's fused kernels.

    Args:
        operations: of a forward pass, from `layercrit.watchers.Dataflow`.
        layers_of: as above.
        types: layer -> its type, one of `layercrit.layers.LAYER_TYPES`, in depth order.
        pointwise: the linear layers, and the convolutions of one pixel.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        layers_of: LayersOfParameters,
        types: Mapping[str, str],
        pointwise: AbstractSet[str],
    ) -> None:
        self._operations, self._layers_of, self._types, self._pointwise = operations, layers_of, types, pointwise
        self._weighted, self._attentions, self._products = set[int](), set[int](), set[int]()
        self._origins: list[frozenset[int]] = []  # the nearest of these that each operation's inputs come from, or 0
        self._readers: dict[int, list[int]] = {}
        of_softmax = set[int]()
        for place, one in enumerate(operations):
            before = [p for p in one.inputs if operations[p].needs_image]
            self._origins.append(frozenset[int]().union(*(self._origin(p) for p in before)))
            for p in set(one.inputs):
                self._readers.setdefault(p, []).append(place)
            factors = one.inputs[-2:] if one.operator in _WITH_ADDEND else one.inputs
            multiplied = [p for p in factors if operations[p].needs_image]
            if one.operator.startswith(_FUSED_ATTENTION):
                self._attentions.add(place)
            elif one.operator in _PRODUCTS and len(multiplied) > 1:
                (self._products if of_softmax.isdisjoint(multiplied) else self._attentions).add(place)
            elif one.operator in _PRODUCTS and multiplied and len(factors) > 1:
                self._weighted.add(place)
            if one.operator in _SOFTMAX or (place not in self._attentions and not of_softmax.isdisjoint(before)):
                of_softmax.add(place)

    def _origin(self, place: int) -> frozenset[int]:
        return frozenset([place]) if place == 0 or self._is_knot(place) else self._origins[place]

    def _is_knot(self, place: int) -> bool:
        return place in self._weighted or place in self._attentions or place in self._products

    def groups(self, kind: str) -> dict[str, str]:
        """Return layer -> name of its group, of the layers that are in one.

        Args:
            kind: ``attention``, ``mlp`` or ``conv+norm``.
        """
        if kind == "conv+norm":
            return self._convolutions_with_norms()
        parts = self._attention_parts if kind == "attention" else self._mlps
        return dict(chain.from_iterable(self._named(part, kind) for part in parts))

    # --- attention ------------------------------------------------------------------------------------------------

    @cached_property
    def _attention_parts(self) -> list[_Part]:
        parts: list[_Part] = []
        for attention in sorted(self._attentions):
            weighted, layers = self._before(attention)
            near = self._module_around([name for p in weighted for name in self._layers(p)] or list(layers))
            weighted |= self._preparations(weighted, near)
            weighted |= set(self._projections(attention, weighted, near))
            layers |= {name for p in weighted for name in self._layers(p)}
            same = [part for part in parts if part.layers & layers]
            parts = [part for part in parts if part not in same]
            parts.append(
                _Part(
                    frozenset(weighted).union(*(part.weighted for part in same)),
                    frozenset(layers).union(*(part.layers for part in same)),
                )
            )
        return parts

    def _before(self, attention: int) -> tuple[set[int], set[str]]:
        """Return the weighted operations that queries, keys and values come from, and the layers on the way."""
        weighted, layers, seen = set[int](), set[str](), set[int]()
        left = list(self._operations[attention].inputs)
        while left:
            place = left.pop()
            if place in seen or place == 0 or place in self._attentions:
                continue
            seen.add(place)
            one = self._operations[place]
            if place in self._weighted:
                weighted.add(place)
                if self._is_of_scores(place):
                    left.extend(one.inputs)
            elif one.parameter is not None:
                layers.update(self._layers_of.get(one.parameter, ()))
            elif not self._is_residual(place):
                left.extend(one.inputs)
        return weighted, layers

    def _module_around(self, names: Sequence[str]) -> str:
        """Return the module that holds some layers, and around it, if it is but one layer with a norm, the next one."""
        module = _common_module(names)
        inside = [self._types[name] for name in self._types if module and name.startswith(f"{module}.")]
        single = (
            len(inside) > 1 and set(inside) <= {"conv", "linear", "norm"} and len(inside) - inside.count("norm") == 1
        )
        return module.rpartition(".")[0] if single else module

    def _is_of_scores(self, place: int) -> bool:
        """Return whether a weighted operation mixes what attention multiplies with, as talking heads do."""
        return all(p in self._products or (p in self._weighted and self._is_of_scores(p)) for p in self._origins[place])

    def _is_residual(self, place: int) -> bool:
        """Return whether two paths through the network meet here, neither of which comes from a product."""
        one = self._operations[place]
        added = [self._origin(p) for p in one.inputs if self._operations[p].needs_image]
        apart = one.operator in _ADDITIONS and len(added) > 1 and added[0] != added[1]
        return apart and not any(origins & self._products for origins in added)

    def _preparations(self, weighted: set[int], module: str) -> set[int]:
        """Return the operations of a module that only others of it read, as convolutions before keys and values."""
        found = set[int]()
        left = list(weighted)
        while left:
            origins = self._origins[left.pop()]
            for place in origins & self._weighted - weighted - found:
                inside = module and all(name.startswith(f"{module}.") for name in self._layers(place))
                if inside and self._next(place) <= weighted | found:
                    found.add(place)
                    left.append(place)
        return found

    def _projections(self, attention: int, weighted: set[int], module: str) -> Iterator[int]:
        """Yield the weighted operations on an attention's output: right after it, or within its module."""
        for place in self._next(attention) & self._weighted:
            others = self._origins[place] - {attention}
            if any(p not in self._weighted or not self._origins[p] <= weighted for p in others):
                continue
            inside = all(name.startswith(f"{module}.") for name in self._layers(place)) and module
            if inside or self._is_right_after(place, attention):
                yield place

    def _is_right_after(self, place: int, earlier: int) -> bool:
        """Return whether one operation's inputs are an earlier one's output, in another shape at most."""
        left = [p for p in self._operations[place].inputs if self._operations[p].needs_image]
        while left:
            before = left.pop()
            if before == earlier:
                continue
            if self._operations[before].operator not in _OF_SHAPE:
                return False
            left.extend(p for p in self._operations[before].inputs if self._operations[p].needs_image)
        return True

    # --- MLPs -----------------------------------------------------------------------------------------------------

    @cached_property
    def _mlps(self) -> list[_Part]:
        """Linear layers or convolutions of one pixel, an activation, another one, and the sum with a residual."""
        of_attention = frozenset[int]().union(*(part.weighted for part in self._attention_parts))
        found = []
        for last in sorted(self._weighted - of_attention):
            first = self._origins[last]
            if not first <= self._weighted - of_attention or not first:
                continue
            gated = len({self._origins[place] for place in first}) == 1  # all read the same
            if gated and all(map(self._is_pointwise, {*first, last})) and self._joins_residual(last):
                between = self._between(first, last)
                if any(self._operations[p].operator.rstrip("_") in _ACTIVATIONS for p in between):
                    layers = {name for p in (*first, *between, last) for name in self._layers(p)}
                    found.append(_Part(first | {last}, frozenset(layers)))
        return found

    def _is_pointwise(self, place: int) -> bool:
        names = [name for name in self._layers(place) if self._types[name] in ("conv", "linear")]
        return bool(names) and all(name in self._pointwise for name in names)

    def _joins_residual(self, last: int) -> bool:
        """Return whether an operation's output is added to what does not come from it."""
        left, seen = [last], set[int]()
        while left:
            for reader in self._readers.get(left.pop(), ()):
                if reader in seen:
                    continue
                seen.add(reader)
                others = self._origins[reader] - {last}
                if not others and not self._is_knot(reader):
                    left.append(reader)
                elif self._operations[reader].operator in _ADDITIONS:
                    added = [self._origin(p) for p in self._operations[reader].inputs]
                    if frozenset([last]) in added and any(origins and last not in origins for origins in added):
                        return True
        return False

    def _between(self, first: frozenset[int], last: int) -> set[int]:
        """Return the operations on the way from some to a later one."""
        found, left = set[int](), list(self._operations[last].inputs)
        while left:
            place = left.pop()
            if place not in first and place not in found and self._operations[place].needs_image:
                found.add(place)
                left.extend(self._operations[place].inputs)
        return found

    # --- convolutions with their norms -------------------------------------------------------------------------------

    def _convolutions_with_norms(self) -> dict[str, str]:
        following: dict[str, set[str]] = {}  # norm -> the convolutions that it follows, or other origins
        for place, one in enumerate(self._operations):
            for norm in self._layers(place) if one.needs_image else ():
                if self._types[norm] == "norm" and place not in self._weighted:
                    following.setdefault(norm, set()).update(self._followed(place, norm))
        norms: dict[str, list[str]] = {}
        for norm in self._types:
            before = following.get(norm, set())
            if len(before) == 1 and self._types.get(next(iter(before))) == "conv":
                norms.setdefault(next(iter(before)), []).append(norm)
        groups: dict[str, str] = {}
        for convolution, own in norms.items():
            holder = convolution.rpartition(".")[0]
            name = "+".join([convolution, *(norm.removeprefix(f"{holder}.") if holder else norm for norm in own)])
            groups |= dict.fromkeys([convolution, *own], name)
        return groups

    def _followed(self, place: int, norm: str) -> set[str]:
        """Return the layers that a norm's operation follows, no other norm between; "" stands for anything else."""
        found, left, seen = set[str](), [place], set[int]()
        while left:
            for before in self._operations[left.pop()].inputs:
                if before in seen or not self._operations[before].needs_image:
                    continue
                seen.add(before)
                names = set(self._layers(before)) - {norm}
                if before in self._weighted:
                    found |= names
                elif names or before == 0 or self._is_knot(before):
                    found.add("")
                else:
                    left.append(before)
        return found

    # --- names ----------------------------------------------------------------------------------------------------

    def _layers(self, place: int) -> list[str]:
        """Return the layers whose parameters an operation reads, be it after others on parameters alone."""
        found, left = dict[str, None](), list(self._operations[place].inputs)
        while left:
            one = self._operations[left.pop()]
            if not one.needs_image:
                left.extend(one.inputs)
                found |= dict.fromkeys(self._layers_of.get(one.parameter, ()) if one.parameter is not None else ())
        return list(found)

    def _next(self, place: int) -> set[int]:
        """Return the weighted operations, attentions and products that read what comes from one."""
        found, left, seen = set[int](), [place], set[int]()
        while left:
            for reader in self._readers.get(left.pop(), ()):
                if self._is_knot(reader):
                    found.add(reader)
                elif reader not in seen:
                    seen.add(reader)
                    left.append(reader)
        return found

    def _named(self, part: _Part, kind: str) -> Iterator[tuple[str, str]]:
        """Yield layer and name of the group: its module's, and all that is in it, where that has nothing else."""
        module = _common_module(list(part.layers))
        inside = [name for name in self._types if module and name.startswith(f"{module}.")]
        if inside and all(name in part.layers for name in inside if self._types[name] in ("conv", "linear")):
            yield from ((name, module) for name in inside)
        else:
            name = f"{module}.{kind}" if module else kind
            yield from ((layer, name) for layer in part.layers)


def _common_module(names: Sequence[str]) -> str:
    """Return the innermost module that holds all of some layers; empty for the network itself."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
