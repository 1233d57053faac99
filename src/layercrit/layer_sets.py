"""Sets of layers that are reset together: all but one, cascades, pairs, or those that a file names."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercrit.errors import LayerError, near
from layercrit.foreign_text import encodable
from layercrit.layers import Layer, joined, stages_of
from layercrit.protocol import SETS
from layercrit.toml import tomllib

__all__ = ["NamedSets", "members_of", "read_sets", "sets_of", "stages_of_sets"]

NamedSets = Mapping[str, str]
"""Name of a set -> shell-style patterns on the names of its layers, comma-separated."""

_Members = tuple[str, list[Layer]]


def read_sets(sets: str | Path | Mapping[str, Any], folder: Path = Path()) -> str | dict[str, str]:
    """Return which sets are asked for: one of the known kinds as it is, or the named sets of a file.

    Args:
        sets: one of `layercrit.protocol.SETS`; or a TOML file of lines ``name = "patterns"``, such as
            ``early = "conv1,layer1.*"``, or a mapping of the same. Patterns may also be a list.
        folder: what the path of a file is relative to.

    Raises:
        LayerError: there is neither such a kind nor such a file, or a set is not made of patterns.
    """
    if isinstance(sets, str) and sets in SETS:
        return sets
    if isinstance(sets, Mapping):
        return _named(sets, "sets")
    path = folder / Path(sets).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a text in UTF-8"
        raise LayerError(
            f"Unknown sets {str(sets)!r}, and no such file can be read ({why}). {near(str(sets), SETS)} "
            'Or give a TOML file of named sets, with lines such as early = "conv1,layer1.*".'
        ) from error
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LayerError(
            f"{path} is not a TOML file of named sets ({error}). Write one set a line, such as "
            'early = "conv1,layer1.*".'
        ) from error
    return _named(content, str(path))


def sets_of(layers: Sequence[Layer], sets: str | NamedSets) -> list[Layer]:
    """Return the sets of some layers, each as one unit of reset; a single layer stays what it is.

    The members of a set get the values that they get where they are reset alone.

    Args:
        layers: what may be reset, in depth order, from `layercrit.layers.select_layers`; also blocks or other groups.
        sets: ``each``: every layer on its own. ``all-but-one``: all layers but one, for each in turn.
            ``cascade-up``: layers 1 to k, for each k; ``cascade-down``: layers k to the last, for each k. ``pairs``:
            every layer, and every two of them. Or name -> patterns on the names of layers.

    Raises:
        LayerError: a pattern has no match, or two sets are the same.

    Notes:
        Cascading resets from the top layer downwards: Adebayo et al. 2018 (arXiv 1810.03292), section 3. Joint resets
        of layers and blocks: Zhang, Bengio & Singer 2022 (JMLR 23), section 3.
    """
    if not isinstance(sets, str):
        found = list(_of_names(layers, sets))
    elif sets in _KINDS:
        found = list(_KINDS[sets](layers))
    else:
        raise LayerError(f"Unknown sets {sets!r}. {near(sets, SETS)}")
    units = [_unit(name, members) for name, members in found]
    return [replace(unit, depth=depth) for depth, unit in enumerate(units)]


def members_of(units: Iterable[Layer]) -> dict[str, list[str]]:
    """Return name -> names of the layers in it: those of a set, else its own; none where it has no parameter."""
    return {
        unit.name: [member.name for member in unit.members] or [unit.name] * bool(unit.parameters) for unit in units
    }


def stages_of_sets(members: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """Return name -> stage, as `layercrit.layers.stages_of` does; None for a set that is in several stages.

    Args:
        members: name -> names of the layers in it, as `members_of` returns it.
    """
    stages = stages_of(list(dict.fromkeys(name for names in members.values() for name in names)))
    of_units = {unit: {stages[name] for name in names} for unit, names in members.items()}
    return {unit: found.pop() if len(found) == 1 else None for unit, found in of_units.items()}


def _unit(name: str, members: list[Layer]) -> Layer:
    if len(members) == 1 and members[0].name == name:
        return members[0]
    return replace(joined(name, members), members=tuple(members))


# --- kinds ----------------------------------------------------------------------------------------------------------


def _each(layers: Sequence[Layer]) -> Iterator[_Members]:
    for layer in layers:
        yield layer.name, [layer]


def _all_but_one(layers: Sequence[Layer]) -> Iterator[_Members]:
    for left_out in layers:
        yield f"all but {left_out.name}", [layer for layer in layers if layer is not left_out]


def _cascade_up(layers: Sequence[Layer]) -> Iterator[_Members]:
    for end in range(1, len(layers) + 1):
        yield _range(layers[:end]), list(layers[:end])


def _cascade_down(layers: Sequence[Layer]) -> Iterator[_Members]:
    for start in range(len(layers)):
        yield _range(layers[start:]), list(layers[start:])


def _range(layers: Sequence[Layer]) -> str:
    return layers[0].name if len(layers) == 1 else f"{layers[0].name} ... {layers[-1].name}"


def _pairs(layers: Sequence[Layer]) -> Iterator[_Members]:
    for place, layer in enumerate(layers):
        yield layer.name, [layer]
        for other in layers[place + 1 :]:
            yield f"{layer.name} + {other.name}", [layer, other]


_KINDS: dict[str, Callable[[Sequence[Layer]], Iterator[_Members]]] = {
    "each": _each,
    "all-but-one": _all_but_one,
    "cascade-up": _cascade_up,
    "cascade-down": _cascade_down,
    "pairs": _pairs,
}


# --- named sets -----------------------------------------------------------------------------------------------------


def _named(content: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return name -> patterns, checked as far as that goes without a network."""
    if not content:
        raise LayerError(f'{where} names no set. Write one set a line, such as early = "conv1,layer1.*".')
    found = {}
    for name, given in content.items():
        patterns = given.split(",") if isinstance(given, str) else given
        right = isinstance(patterns, Sequence) and all(isinstance(one, str) and one.strip() for one in patterns)
        if not right or not patterns or not isinstance(name, str) or not name.strip():
            raise LayerError(
                f"The set {name!r} of {where} is {given!r}: expected a name, and the names of its layers or patterns, "
                'such as early = "conv1,layer1.*".'
            )
        found[encodable(name)] = ",".join(one.strip() for one in patterns)
    return found


def _of_names(layers: Sequence[Layer], sets: NamedSets) -> Iterator[_Members]:
    names = [layer.name for layer in layers]
    seen: dict[tuple[str, ...], str] = {}
    for name, patterns in sets.items():
        chosen: set[str] = set()
        for pattern in map(str.strip, patterns.split(",")):
            found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            matches = [pattern] if pattern in names else found
            if not matches:
                raise LayerError(
                    f"No layer that is to be reset matches {pattern!r} of the set {name!r}. {near(pattern, names)} "
                    "Layers are chosen with --layers, --types and --group before they are put into sets."
                )
            chosen.update(matches)
        members = [layer for layer in layers if layer.name in chosen]
        key = tuple(layer.name for layer in members)
        if key in seen:
            raise LayerError(
                f"The sets {seen[key]!r} and {name!r} are the same layers: {', '.join(key)}. Leave one of them out."
            )
        if name in names and key != (name,):
            raise LayerError(
                f"The set {name!r} has the name of a layer, but is {', '.join(key)}. Give it another name."
            )
        seen[key] = name
        yield name, members
