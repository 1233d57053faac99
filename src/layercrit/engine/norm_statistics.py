"""Running statistics of normalisation layers beside a reset: those of training, initial ones, or estimated anew.

A reset changes what the normalisation layers after it are given. Their running statistics stay those of training, as in
the published study, so that part of what a reset does is a mismatch of statistics. To see how much, the statistics can
be reset as well, or estimated again for the changed network.
"""

from collections import ChainMap
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from typing_extensions import override

from layercrit.engine.functional_form import BATCH_NORM
from layercrit.engine.graph import WeightGraph, speed_up
from layercrit.engine.graph_replay import GraphReplay, Suffix, call
from layercrit.engine.subject import Change, Subject
from layercrit.errors import ModelError
from layercrit.layers import Layer

__all__ = ["N_IMAGES", "NormStatistics"]

N_IMAGES = 128
"""Images on which statistics are estimated again, or all of the probe set if it has fewer."""

_WHOLE = Layer("", "", (), (), 0)  # stands for the trained network, in which nothing but statistics changes

_Statistics = tuple[Tensor, Tensor]  # mean and variance, (n_channels,) each


class NormStatistics:
    """What becomes of the running statistics of one network's normalisation layers beside its resets.

    ``reset``: those of the first normalisation layer that reset parameters reach (their own, where they are such a
    layer's) become what they are before training: mean 0, variance 1. ``reestimate``: those of all normalisation
    layers that the reset reaches become the mean and variance of what these are given by the changed network, one layer
    after the other, so that each is given what the re-estimated ones before it make.

    Attributes:
        n_images: how many images statistics are estimated on; 0 if none are, or the network has none.

    Args:
        how: ``reset`` or ``reestimate``.
        subject: the network.
        n_images: of the probe set.
        notes: the list to which notes for the user are added.
    """

    def __init__(self, how: str, subject: Subject, n_images: int, notes: list[str]) -> None:
        has_statistics = any(name.endswith("running_mean") for name, _ in subject.network.named_buffers())
        self.n_images = min(n_images, N_IMAGES) if how == "reestimate" and has_statistics else 0
        self._how, self._subject, self._notes = how, subject, notes
        self._estimating: _EstimatingReplay | None = None
        self._names: dict[str, tuple[str, ...]] = {}  # layer -> names of the statistics that its reset replaces

    @property
    def are_estimated(self) -> bool:
        """Whether there are statistics, and they are estimated."""
        return self._how == "reestimate" and self._estimating is not None

    def layers_with_statistics(self, graph: WeightGraph | None) -> list[Layer]:
        """Return the subject's layers, each with the statistics that its reset replaces among its buffers.

        Where statistics are estimated, a first layer stands for the whole network.

        Args:
            graph: the exported network; None if it cannot be exported.

        Raises:
            ModelError: it cannot be told which statistics a reset reaches.
        """
        self._check(graph)
        if graph is None or not _norms(graph.graph.nodes):
            self._note("the network has no running statistics of normalisation layers: norm_statistics changes nothing")
            return self._subject.layers
        statistics = [name for norm in _norms(graph.graph.nodes) for name in _names_of(graph, norm)]
        whole = replace(_WHOLE, buffers=tuple(dict.fromkeys(statistics)))
        # a set as one: its members share nothing with other sets, for the statistics differ
        own = [replace(layer, members=()) for layer in self._subject.layers]
        layers = [whole, *own] if self._how == "reestimate" else own
        self._estimating = _EstimatingReplay(_fast(graph, self._subject.device), layers)
        reached = self._estimating.norms_below if self._how == "reestimate" else self._estimating.first_norms
        self._names = {
            layer.name: tuple(
                dict.fromkeys(name for norm in reached(layer) for name in self._estimating.names_of(norm))
            )
            for layer in layers
        }
        return [
            replace(layer, buffers=tuple(dict.fromkeys((*layer.buffers, *self._names[layer.name])))) for layer in layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what becomes of the statistics, as plain data."""
        return {"how": self._how, "n_images": self.n_images if self.are_estimated else None}

    def with_trained(self, change: Change) -> Change:
        """Return a change with the trained statistics written out."""
        return self._with(change, {})

    def complete(
        self, changes: Mapping[int, Sequence[Change]], batches: Iterable[tuple[Tensor, int]]
    ) -> dict[int, list[Change]]:
        """Return some trials' changes with the statistics that go with them.

        Args:
            changes: trial -> its changes.
            batches: normalised images and how many of them count, from the first of the probe set on.
        """  # fmt: skip
        if self._estimating is None:
            return {trial: list(of_trial) for trial, of_trial in changes.items()}
        if self._how == "reset":
            return {trial: [self._with(change, self._initial(change)) for change in of_trial]
                    for trial, of_trial in changes.items()}  # fmt: skip
        found = self._estimate(list(changes.values()), batches)
        return {
            trial: [self._with(change, found.get((place, change.layer.name), {})) for change in of_trial]
            for place, (trial, of_trial) in enumerate(changes.items())
        }

    def of_trained_network(self, batches: Iterable[tuple[Tensor, int]]) -> Change:
        """Return the change that estimates the trained network's statistics again, and nothing else."""
        change = Change(_WHOLE, {}, 1.0)
        return self._with(change, self._estimate([[change]], batches)[0, _WHOLE.name])

    # --- parts ------------------------------------------------------------------------------------------------------

    def _check(self, graph: WeightGraph | None) -> None:
        """Make sure that all running statistics are those of batch normalisations, each of which runs once.

        Raises:
            ModelError: they are not.
        """
        kept = {name for name, _ in self._subject.network.named_buffers() if name.endswith("running_mean")}
        used = [] if graph is None else [_names_of(graph, norm)[0] for norm in _norms(graph.graph.nodes)]
        twice = [name for name in used if used.count(name) > 1]
        read = set() if graph is None else {name for names in graph.names.values() for name in names}
        if graph is None and kept:
            reason = "the network cannot be exported, so that it is not known which statistics a reset reaches"
        elif twice:
            reason = f"the normalisation layer of {twice[0]!r} runs more than once for an image"
        elif other := sorted((kept & read) - {name for norm in used for name in _tied(graph, norm)}):
            reason = f"{other[0]!r} is not read by a batch normalisation of torch"
        else:
            return
        raise ModelError(
            f"The statistics of {self._subject.model.reference!r} cannot be replaced beside a reset ({reason}). Leave "
            "them as trained: --norm-statistics trained (norm_statistics='trained')."
        )

    def _with(self, change: Change, statistics: Mapping[str, Tensor]) -> Change:
        tensors = dict(self._subject.network.named_buffers(remove_duplicate=False))
        names = self._names.get(change.layer.name, ())
        return replace(change, values=change.values | {n: tensors[n].detach() for n in names} | dict(statistics))

    def _initial(self, change: Change) -> dict[str, Tensor]:
        tensors = dict(self._subject.network.named_buffers(remove_duplicate=False))
        names = self._names[change.layer.name]
        means = set(names[::2])  # names come in pairs
        return {name: (torch.zeros_like if name in means else torch.ones_like)(tensors[name]) for name in names}

    def _estimate(
        self, changes: Sequence[Sequence[Change]], batches: Iterable[tuple[Tensor, int]]
    ) -> dict[tuple[int, str], dict[str, Tensor]]:
        """Return place of a trial and name of a layer -> its statistics."""
        assert self._estimating is not None  # noqa: S101 - only called where there are statistics
        prepared = [
            {
                c.layer.name: self._estimating.prepare(c.layer, self._with(c, {}).values)
                for c in of_trial
                if c.delta_norm
            }
            for of_trial in changes
        ]
        chosen, n_left = [], self.n_images
        for images, n in batches:
            chosen.append((images, min(n, n_left)))
            n_left -= n
            if n_left <= 0:
                break
        places = [(place, layer.name) for layer in self._estimating.layers
                  for place, of_trial in enumerate(prepared) if layer.name in of_trial]  # fmt: skip
        return dict(zip(places, self._estimating.estimate(chosen, *prepared), strict=True))

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


class _EstimatingReplay(GraphReplay):
    """The exported network as it is, which estimates the statistics below a reset on several batches at once."""

    def norms_below(self, layer: Layer) -> list[fx.Node]:
        """Return all normalisations that a layer's reset reaches."""
        return _norms(step.node for step in self._suffix((layer,)).steps)

    def first_norms(self, layer: Layer) -> list[fx.Node]:
        """Return the first normalisation that each of a layer's parameters reaches."""
        found: dict[fx.Node, None] = {}
        for source in self._source((layer,)).drawn:
            reached = {source}
            for node in self._nodes:
                if node.op == "call_function" and not reached.isdisjoint(node.all_input_nodes):
                    reached.add(node)
                    if node.target is BATCH_NORM:
                        found[node] = None
                        break
        return list(found)

    def names_of(self, norm: fx.Node) -> tuple[str, str]:
        """Return the names of a normalisation's running mean and variance."""
        return _names_of(self._weight_graph, norm)

    def estimate(
        self, batches: Sequence[tuple[Tensor, int]], *prepared: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the statistics below each reset, name -> value, in the order of `sweep`.

        All batches run side by side: their values at one point of the network are in memory at a time.

        Args:
            batches: normalised images and how many of them count.
            prepared: as for `sweep`.
        """
        counts = [n for _, n in batches]
        n_resets = sum(map(len, prepared))
        sweeps = [self._run(images, *prepared) for images, _ in batches]
        for _, items in zip(range(n_resets), zip(*sweeps, strict=True), strict=False):
            yield self._statistics([suffix for _, suffix in items], counts)

    def _statistics(
        self, suffixes: Sequence[Generator[tuple[fx.Node, Tensor], _Statistics, None]], counts: Sequence[int]
    ) -> dict[str, Tensor]:
        """Run one reset's suffixes, one for each batch, from normalisation to normalisation."""
        found: dict[str, Tensor] = {}
        with torch.inference_mode():
            asked = [next(suffix, None) for suffix in suffixes]
            while asked[0] is not None:
                norm = asked[0][0]
                given = [one[1][:n] for one, n in zip(asked, counts, strict=True) if one is not None]
                statistics = _moments(given)
                found |= dict(zip(self.names_of(norm), statistics, strict=True))
                asked = [_send(suffix, statistics) for suffix in suffixes]
        return found

    @override
    def _run_suffix(
        self, suffix: Suffix, prepared: Mapping[fx.Node, Any], before: ChainMap[fx.Node, Any]
    ) -> Generator[tuple[fx.Node, Tensor], _Statistics, None]:
        """Run what a reset changes; yield each normalisation with what it is given, and be sent its statistics."""
        drawn = dict(prepared)
        values = before.new_child(drawn)
        for step in suffix.steps:
            node: Any = step.node
            if node.target is BATCH_NORM:
                drawn[node.args[3]], drawn[node.args[4]] = yield node, values[node.args[0]]
            drawn[node] = call(node, step.target, values.__getitem__)
            for dead in step.forget:
                del drawn[dead]


def _send(
    suffix: Generator[tuple[fx.Node, Tensor], _Statistics, None], statistics: _Statistics
) -> tuple[fx.Node, Tensor] | None:
    try:
        return suffix.send(statistics)
    except StopIteration:
        return None


def _moments(batches: Sequence[Tensor]) -> _Statistics:
    """Return mean and variance of each channel over all images and positions, ``(n_channels,)`` each.

    Args:
        batches: ``(n_images, n_channels, ...)`` each.
    """
    means, variances, counts = [], [], []
    for batch in batches:
        # without running statistics it returns those of the batch, three times as fast as torch.var_mean
        mean, variance = torch.batch_norm_update_stats(batch, None, None, 0.0)
        means.append(mean.double())
        variances.append(variance.double())
        counts.append(batch.numel() // batch.shape[1])
    shares = torch.tensor(counts, dtype=torch.float64, device=means[0].device) / sum(counts)
    mean = shares @ torch.stack(means)
    variance = shares @ (torch.stack(variances) + (torch.stack(means) - mean).square())
    return mean.to(batches[0].dtype), variance.to(batches[0].dtype)


def _norms(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.target is BATCH_NORM]


def _names_of(graph: WeightGraph, norm: fx.Node) -> tuple[str, str]:
    """Return the names of a normalisation's running mean and variance."""
    mean, variance = (value if value.op == "placeholder" else value.args[0] for value in norm.args[3:5])  # type: ignore[union-attr]
    return graph.names[mean][0], graph.names[variance][0]  # type: ignore[index]


def _fast(graph: WeightGraph, device: torch.device) -> WeightGraph:
    """Return a graph rewritten for speed in which normalisations are as they were, or the graph if it cannot be."""
    try:
        return speed_up(graph, torch.float32, device, fold_norms=False)
    except RuntimeError:
        return graph


def _tied(graph: WeightGraph | None, name: str) -> tuple[str, ...]:
    """Return all names of a tensor."""
    assert graph is not None  # noqa: S101 - only called for names in it
    return next(names for names in graph.names.values() if name in names)
