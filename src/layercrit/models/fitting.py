"""Match the tensors of a file with those of an architecture; what does not fit, or is left over, is listed."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layercrit.errors import CheckpointError, near
from layercrit.models.checkpoints import Checkpoint
from layercrit.models.renames import BESIDE, RENAMES, Renames
from layercrit.wrappers import wrapper_of

__all__ = ["Fit", "fit", "fit_to"]

_LISTED = 8  # names shown of each kind of difference
_COMPARED = 500  # unexpected names that are searched for one like a missing name


@dataclass(frozen=True)
class Fit:
    """The weights of a file for an architecture.

    Attributes:
        tensors: under the architecture's names, in its order, ready for ``load_state_dict(strict=True)``.
        notes: sentences on what was read under other names and what was left over; most files need none.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Reading:
    """A way to read the names of a file as those of an architecture.

    Attributes:
        names: name after renaming -> name in the file.
        format: the format that was renamed, in words; empty if none was.
        prefix: what stands before the names of the network: ``""``, or ending in a dot.
        others: prefixes under which the file has all names of the network as well.
        complete: whether no name of the network is missing.
    """

    names: Mapping[str, str]
    format: str
    prefix: str
    others: tuple[str, ...] = ()
    complete: bool = True

    def inside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the prefix, which is cut off, without those of other networks inside it."""
        deeper = tuple(other for other in self.others if other.startswith(self.prefix))
        start = len(self.prefix)
        return {
            new[start:]: tensors[old]
            for new, old in self.names.items()
            if new.startswith(self.prefix) and not (deeper and new.startswith(deeper)) and new[start:] not in BESIDE
        }


def fit(checkpoint: Checkpoint, expected: Mapping[str, Tensor], source: str, prefix: str | None = None) -> Fit:
    """Match a file with an architecture: every name and every shape; what stands beside the network is left over.

    A prefix that stands before all expected names, such as ``module.``, is cut off. What is outside it, such as a loss
    or a counter, is left over, and said; inside it, no name may be unknown. Names of known formats are replaced where
    those of the file do not fit as they are (`layercrit.models.renames`). Three differences are allowed, since none
    can change a prediction: ``num_batches_tracked``, absent from files before PyTorch 0.4.1 and unused in evaluation,
    may be missing (the architecture's own value is used); floating-point tensors are cast to the expected precision;
    and whole numbers may be stored as another type.

    Args:
        checkpoint: the file.
        expected: the architecture's ``state_dict()``.
        source: the file and architecture in words; errors begin with it.
        prefix: what the names of the network begin with, for files that hold several; ``""`` for nothing.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes or number types differ (all are counted, and the
            first of each kind named), or several networks fit.
    """
    reading = _reading(checkpoint.tensors, expected, source, prefix)
    inside = reading.inside(checkpoint.tensors)
    left_over = _left_over(reading, checkpoint.tensors, inside)
    tensors = _checked(inside, expected, source, () if reading.complete else left_over, checkpoint.odd)
    notes = [f"{source}: its names were read as those of {reading.format}."] if reading.format else []
    told = _grouped(left_over, reading)
    told += [f"{name!r} ({kind}, not a tensor)" for name, kind in checkpoint.odd.items()]
    if told:
        where = f" beside the network {reading.prefix!r}" if reading.prefix else ""
        notes.append(f"{source}: left over{where}, and not used: {_shortened(told)}.")
    if checkpoint.objects:
        notes.append(f"{source}: objects beside the weights were not loaded: {_shortened(checkpoint.objects)}.")
    return Fit(tensors, tuple(notes))


def fit_to(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Match tensors with those of an architecture as `fit` does, but with nothing left over.

    Args:
        tensors: tensors by name.
        expected: the architecture's ``state_dict()``.
        source: what they are, in words; errors begin with it.

    Returns:
        tensors under the expected names, in the expected order, ready for ``load_state_dict(strict=True)``.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes or number types differ; all are counted, and the
            first of each kind named.
    """
    reading = _reading(tensors, expected, source, None)
    inside = reading.inside(tensors)
    return _checked(inside, expected, source, _left_over(reading, tensors, inside))


def _left_over(reading: _Reading, tensors: Iterable[str], inside: Iterable[str]) -> list[str]:
    """The file's names of tensors that are not those of the network."""
    used = {reading.names[f"{reading.prefix}{new}"] for new in inside}
    return [name for name in tensors if name not in used]


def _reading(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, prefix: str | None
) -> _Reading:
    """Find how the names are to be read: under the first format and prefix that have all names of the network."""
    needed = {name for name in expected if not _is_counter(name)}
    closest, most = None, len(needed) // 2
    lines = "\n".join(tensors)
    for format_ in (Renames(of=""), *(other for other in RENAMES if other.applies_to(lines))):
        names = format_.new_names(tensors)
        counts = _prefixes(names, needed)
        covering = [_Reading(names, format_.of, start) for start, count in counts.items() if count == len(needed)]
        if one := _chosen(covering, tensors, expected, source, prefix):
            return replace(one, others=tuple(other.prefix for other in covering if other != one))
        for start, count in counts.items():
            if count > most and prefix is None:
                closest, most = _Reading(names, format_.of, start, complete=False), count
    names = {name: name for name in tensors}
    if prefix is None:
        return closest or _Reading(names, "", wrapper_of(tensors), complete=False)
    if not any(name.startswith(_dotted(prefix)) for name in tensors):
        starts = dict.fromkeys(name.partition(".")[0] + "." for name in tensors if "." in name)
        raise CheckpointError(f"{source}: no name in the file begins with {prefix!r}. {near(_dotted(prefix), starts)}")
    names = {name: name for name in tensors if name.startswith(_dotted(prefix))}
    return _Reading(names, "", _dotted(prefix), complete=False)


def _prefixes(names: Iterable[str], needed: set[str]) -> Counter[str]:
    """Count, for everything that stands before a needed name, how many of the needed names it stands before."""
    counts: Counter[str] = Counter() if needed else Counter({"": 0})
    for name in names:
        start = 0
        while True:
            if name[start:] in needed:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1
            if not start:
                break
    return counts


def _chosen(
    covering: Sequence[_Reading],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    prefix: str | None,
) -> _Reading | None:
    """Choose among the networks of a file that have all names: the one named, or the only one of the right shapes."""
    if prefix is not None:
        start = _dotted(prefix)
        exact = [one for one in covering if one.prefix == start]
        covering = exact or [one for one in covering if start and one.prefix.startswith(start)]
    if len(covering) < 2:
        return covering[0] if covering else None
    insides = {one.prefix: one.inside(tensors) for one in covering}
    fitting = [
        one
        for one in covering
        if all(
            name not in insides[one.prefix] or insides[one.prefix][name].shape == expected[name].shape
            for name in expected
        )
    ]
    first = (fitting or covering)[0]
    if all(_same(insides[first.prefix], insides[one.prefix], expected) for one in fitting):
        return first
    shown = ", ".join(repr(one.prefix) for one in fitting)
    raise CheckpointError(
        f"{source}: the file holds {len(fitting)} networks that fit, whose names begin with {shown}. Choose one in the "
        f"model's reference, with prefix={fitting[-1].prefix}, or save it alone."
    )


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    """Whether two networks have the same values, as where one is stored under two names."""
    return all(torch.equal(first[name], second[name]) for name in names if name in first and name in second)


def _dotted(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _checked(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    outside: Sequence[str] = (),
    odd: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors as the architecture stores them; names `outside` are unexpected as well.

    Raises:
        CheckpointError: see `fit`.
    """
    fitted: dict[str, Tensor | None] = {
        name: _stored_as(tensors[name], value) if name in tensors else value.detach().clone()
        for name, value in expected.items()
        if name in tensors or _is_counter(name)
    }
    missing = [name for name in expected if name not in fitted]
    unexpected = [*(name for name in tensors if name not in expected), *outside]
    differing = [name for name, value in fitted.items() if value is None]
    differences = [
        _listing("missing", missing, lambda name: f"{name!r}{_nearest(name, unexpected)}"),
        _listing(
            "not a tensor", [name for name in odd or {} if missing], lambda name: f"{name!r} ({(odd or {})[name]})"
        ),
        _listing("unexpected", unexpected, repr),
        _listing("of another shape or type", differing, lambda name: _difference(name, tensors[name], expected[name])),
    ]
    if missing or unexpected or differing:
        raise CheckpointError(
            f"{source}: the weights do not fit. {' '.join(filter(None, differences))} "
            "Check the architecture and its options (such as num_classes), or rename the tensors first."
        )
    return {name: value for name, value in fitted.items() if value is not None}


def _stored_as(tensor: Tensor, like: Tensor) -> Tensor | None:
    """A copy of a tensor in another's number type; None if that changes whole numbers, or the shapes differ."""
    if tensor.shape != like.shape:
        return None
    if tensor.dtype == like.dtype or (tensor.is_floating_point() and like.is_floating_point()):
        return tensor.detach().to(dtype=like.dtype, copy=True)
    if like.is_floating_point() or like.is_complex() or tensor.is_complex():
        return None
    whole = tensor.detach().to(like.dtype)
    return whole if torch.equal(whole.to(tensor.dtype), tensor) else None


def _difference(name: str, tensor: Tensor, like: Tensor) -> str:
    words = f"{name!r} is {_words(tensor)} in the file, {_words(like)} expected"
    counted = tensor.shape == like.shape and tensor.is_floating_point() and _is_counter(name)
    return f"{words} (not a whole number; a counter may as well be deleted)" if counted else words


def _words(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    alike = [other for other in candidates if other.rpartition(".")[2] == last] or candidates
    matches = difflib.get_close_matches(name, alike[:_COMPARED], n=1, cutoff=0.6)
    return f" (similar: {matches[0]!r})" if matches else ""


def _listing(kind: str, names: Sequence[str], words: Callable[[str], str]) -> str:
    """One sentence that counts differences of a kind and shows the first; empty when there are none."""
    shown = [words(name) for name in names[:_LISTED]]
    return f"{len(names)} {kind}: {_shortened(shown, len(names))}." if names else ""


def _shortened(entries: Sequence[str], count: int | None = None) -> str:
    more = (count or len(entries)) - _LISTED
    return ", ".join(entries[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _grouped(names: Iterable[str], reading: _Reading) -> list[str]:
    """Names by what they begin with up to where the network's prefix ends or differs: ``'teacher.' (122 tensors)``."""
    kept, own = set(reading.names.values()), reading.prefix.split(".")
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        same = next((i for i, (part, mine) in enumerate(zip(parts, own, strict=False)) if part != mine), len(own))
        group = ".".join(parts[: same + 1]) + "."
        groups.setdefault(group if name in kept else f"...{parts[-1]}", []).append(name)
    return [
        repr(members[0]) if len(members) == 1 else f"{group!r} ({len(members)} tensors)"
        for group, members in groups.items()
    ]
