"""The network under measurement: where it runs, which of its layers are reset, and to what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from layercrit.engine.branches import branch_ends
from layercrit.engine.flops import count_flops
from layercrit.errors import ModelError, ProtocolError, first_line
from layercrit.layer_sets import sets_of
from layercrit.layers import Group, Layer, find_layers, joined_where_shared, select_layers
from layercrit.machine import find_device
from layercrit.models.model import Classifier, Model, size_explained
from layercrit.models.outputs import are_probabilities, missing_head
from layercrit.protocol import Protocol
from layercrit.resets import check_draws, donor_values, draw_values, get_reset, given_donor, own_initialiser
from layercrit.restoring import copied
from layercrit.seeds import trial_seed
from layercrit.statistics import needed_trials


@dataclass(frozen=True)
class Change:
    """What one reset of one layer changes.

    Attributes:
        layer: the layer.
        values: name of a parameter or buffer -> new value, on the device of the network.
        delta_norm: Euclidean norm of new minus trained values; 0 where the reset changes nothing.
        status: of a cell for which nothing is measured, since the reset changes nothing.
    """

    layer: Layer
    values: dict[str, Tensor]
    delta_norm: float
    status: str = "unchanged"


class Subject:
    """The network under measurement.

    Attributes:
        model: as opened; where its outputs turned out to be probabilities, ``probabilities`` says so.
        device: where the network runs.
        network: in evaluation mode on that device; a copy where it was on another.
        layers: what is reset, in depth order.
        random_trials: whether trials differ.
        n_trials: as many as were requested, those of the pilot if it plans further ones, or one if all would be the
            same.
    """

    def __init__(self, protocol: Protocol, model: Model, donor: nn.Module | str | Path | None) -> None:
        self.model = model
        self.device = find_device(protocol.device)
        self.network = model.network.eval()
        if any(t.device != self.device for t in chain(self.network.parameters(), self.network.buffers())):
            self.network = copied(self.network).to(self.device)
        self._classifier = Classifier(self.network, model.mean, model.std)
        self.model, self._notes_of_output = self._with_clear_output(model)
        layers = self._all_layers(protocol.group)
        selected = select_layers(
            layers,
            types=protocol.types,
            patterns=protocol.layers,
            group=cast(Group, protocol.group),
        )
        self._reset = get_reset(protocol.reset)
        self._protocol = protocol
        without = set[str]()
        if self._reset.branch:
            selected, without = self._with_branches(selected, layers)
        self.layers = sets_of(selected, protocol.sets)
        self._notes_of_layers: list[str] = []
        self._without_branch = [
            unit.name for unit in self.layers if without & {unit.name, *(member.name for member in unit.members)}
        ]
        if self.layers and len(self._without_branch) == len(self.layers):
            raise ProtocolError(
                f"The reset {self._reset.name!r} leaves out residual branches, but each of the {len(self.layers)} sets "
                f"has a member that is none, such as {min(without)!r}. Name those that are with --layers (layers=...)."
            )
        self._given_donor = given_donor(donor, self._reset, model, self.layers)
        # A reset that draws its chance from the initialiser has none left once the donor is given.
        fixed = self._given_donor is not None and self._reset.donor == "initialiser"
        self.random_trials = self._reset.random and not fixed
        self.n_trials = needed_trials(protocol.first_trials, self.random_trials)

    @property
    def donor_in_words(self) -> str | None:
        """Where new values come from; None where the reset makes them from the trained ones."""
        if self._given_donor is not None:
            return self._given_donor.origin
        if self._reset.donor is None:
            return None
        return own_initialiser(self.model, self.layers)

    @property
    def donor_identity(self) -> str | None:
        """What identifies the donor's values, given the trial's seed: hash or initialiser; None without a donor."""
        return self.donor_in_words if self._given_donor is None else self._given_donor.sha256

    @cached_property
    def flops(self) -> tuple[float, dict[str, float]]:
        """FLOPs of one image, and layer name -> the share of them to run again after its reset; see `count_flops`."""
        return count_flops(self.network, self.layers, self.normalise(self.model.black_image))

    def join_shared(self) -> None:
        """Make layers that share parameters one, which is changed as a whole; a note says which they are."""
        before = {layer.name for layer in self.layers}
        self.layers = joined_where_shared(self.layers, self.network)
        if together := [layer.name for layer in self.layers if layer.name not in before]:
            self._notes_of_layers.append(f"layers that share parameters are one: {', '.join(together)}")

    def notes(self) -> list[str]:
        """Return what the user should know, in words."""
        notes = [*self.model.notes, *self._notes_of_output, *self._notes_of_layers]
        if self.n_trials < self._protocol.first_trials:
            which = "with one given donor" if self._reset.random else f"of the reset {self._reset.name!r}"
            images = ", so that half-widths are for new images only" if self._protocol.is_planned else ""
            notes.append(f"one trial instead of {self._protocol.first_trials}: all trials {which} are the same{images}")
        if self._reset.donor == "initialiser" and self._given_donor is None and self.model.build is None:
            why = self.model.initialiser.removeprefix("none: ")
            notes.append(
                f"fresh values come from each module's own reset_parameters ({why}); if the architecture has another "
                "initialiser, open the model by a reference that can build it anew, or give a donor"
            )
        if self._without_branch:
            few = ", ".join(self._without_branch[:5]) + " ..." * (len(self._without_branch) > 5)
            notes.append(
                f"{self._reset.name}: {len(self._without_branch)} of {len(self.layers)} units do not consist of "
                f"residual branches, so nothing is measured for them: {few}"
            )
        return notes

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return what the network is given for uint8 images ``(n_images, channels, height, width)`` on any device."""
        return self._classifier.normalise(pixels.to(self.device))

    def seed(self, trial: int) -> int:
        """Return the seed of a trial, in [0, 2^64)."""
        return trial_seed(self._protocol.seed, self.model.architecture, self._reset.base, trial)

    def changes(self, trial: int, layers: Sequence[Layer] | None = None) -> Iterator[Change]:
        """Yield what a trial does to each layer; all share the trial's donor, and no draw depends on the others."""
        seed = self.seed(trial)
        if self._given_donor is not None:
            donor = self._given_donor.values
        else:
            donor = donor_values(self.model, self.layers, seed) if self._reset.donor is not None else {}
        drawn: dict[str, tuple[dict[str, Tensor], Tensor]] = {}  # of what several sets share
        for layer in self.layers if layers is None else layers:
            if layer.name in self._without_branch:
                yield Change(layer, {}, 0.0, "no_branch")
                continue
            values, squares = dict[str, Tensor](), [torch.zeros((), dtype=torch.float64)]
            for member in layer.members or ([layer] if layer.parameters else []):
                if member.name not in drawn:
                    drawn[member.name] = self._drawn(member, donor, seed)
                own, change = drawn[member.name]
                values |= own
                squares.append(change)
            yield Change(layer, values, float(torch.stack(squares).sum().sqrt()))

    def _drawn(self, layer: Layer, donor: Mapping[str, Tensor], seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the new values on the device of the network, and the sum of the squares of what changes."""
        values = draw_values(self._reset, layer, self.model.network, donor, seed)
        squares = [
            (values[name].double() - self.model.network.get_parameter(name).detach().cpu().double()).square().sum()
            for name in layer.parameters
        ]
        return {name: value.to(self.device) for name, value in values.items()}, torch.stack(squares).sum()

    def check_draws(self) -> None:
        """Make sure that a reset to fresh values draws them; see `layercrit.donors.check_draws`.

        Raises:
            ModelError: it does not.
        """
        if self._reset.donor == "initialiser" and self._given_donor is None:
            check_draws(self.model, self.layers)

    def _with_branches(self, units: list[Layer], all_layers: Sequence[Layer]) -> tuple[list[Layer], set[str]]:
        """Return the units, each with what ends the residual branches that it consists of, and names of those without.

        Raises:
            ProtocolError: no unit does, or this cannot be told.
        """
        noise = torch.randint(0, 256, self.model.black_image.shape, generator=torch.Generator().manual_seed(0))
        images, name = self.normalise(noise.to(torch.uint8)), self._reset.name
        try:
            ends = branch_ends(self.network, images, units, all_layers, self.model.read_logits)
        except Exception as error:  # torch.export documents no base class for what it raises
            raise ProtocolError(
                f"The reset {name!r} looks for residual branches in the network's graph, and {self.model.reference!r} "
                f"cannot be exported ({first_line(error)}). Choose another reset, such as zero."
            ) from error
        if not ends:
            instead = "Reset whole blocks with --group block (group='block'), or choose another reset."
            raise ProtocolError(
                f"The reset {name!r} leaves out residual branches, but none of the {len(units)} units, such as "
                f"{units[0].name!r}, consists of such branches: of all the convolutions and linear layers beside "
                f"a shortcut. {instead if self._protocol.group == 'layer' else 'Choose another reset, such as zero.'}"
            )
        taken = [replace(unit, parameters=ends[unit.name], buffers=()) if unit.name in ends else unit for unit in units]
        return taken, {unit.name for unit in units if unit.name not in ends}

    def _with_clear_output(self, model: Model) -> tuple[Model, list[str]]:
        """Return the model with its output checked, and notes on it.

        Raises:
            ModelError: it seems to have no classification head.
        """
        black = model.black_image
        noise = torch.randint(0, 256, (2, *black.shape[1:]), generator=torch.Generator().manual_seed(0))
        with size_explained(self.model), torch.no_grad():
            logits = model.read_logits(self.network(self.normalise(torch.cat([black, noise.to(torch.uint8)]))))
            n_classes = logits.shape[1]
            reason = missing_head(self.network, self.normalise(black), logits) if model.output is None else None
        if reason is not None:
            raise ModelError(
                f"{model.reference!r} seems to have no classification head ({reason}), so that its {n_classes} outputs "
                "would be features, not logits. Open it with its head; if these are logits, say so: output='logits' "
                "(open_model(..., output='logits'), or '?output=logits' in a reference)."
            )
        if model.probabilities and not are_probabilities(logits.exp()):
            raise ModelError(
                f"{model.reference!r} does not return probabilities: output='probabilities' was asked for, but its "
                "outputs are not non-negative with a sum of 1. Leave it out."
            )
        if model.probabilities or not are_probabilities(logits):
            return model, []
        return replace(model, probabilities=True), [
            "the model's outputs are probabilities (non-negative, with a sum of 1), as after a softmax: their "
            "logarithms are taken as logits"
        ]

    def _all_layers(self, group: str) -> list[Layer]:
        """Find the layers on a black image, so that a wrong setting shows before any image is decoded."""
        with size_explained(self.model):
            return find_layers(self.network, self.normalise(self.model.black_image), group)
