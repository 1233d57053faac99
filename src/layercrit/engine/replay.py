"""The interface of backends that predict after resets, and the plain one, which swaps the weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from layercrit.layers import Layer
from layercrit.models.outputs import logits_of
from layercrit.restoring import holding

__all__ = ["MODES", "Mode", "PlainReplay", "ReadLogits", "Replay", "Values"]

Mode = Literal["reference", "float32", "bfloat16"]
MODES = ("reference", "float32", "bfloat16")

Values = Mapping[str, Tensor]
ReadLogits = Callable[[object], Tensor]  # takes the logits out of what a network returned


class Replay(ABC):
    """One network, prepared to predict batches of one shape after each of many resets.

    Attributes:
        layers: the layers that can be reset, in depth order.
        mode: ``reference`` (float32, the network's own operators, bit for bit the plain backend), ``float32`` (folded
            and fused) or ``bfloat16`` (likewise, stored and multiplied in bfloat16).
        backend: ``exported graph``, ``recorded outputs`` or ``plain``.
        note: one line that says why the backend or mode is slower than requested; empty if it is not.
    """

    backend: str

    def __init__(self, layers: Sequence[Layer], mode: Mode = "reference", note: str = "") -> None:
        self.layers = list(layers)
        self.mode = mode
        self.note = note

    @abstractmethod
    def prepare(self, layer: Layer, values: Values, shared: dict[Any, Any] | None = None) -> Any:
        """Turn a layer's drawn parameter values (name -> tensor) into what `sweep` takes; done once a trial.

        Of parameters that are tied to each other, the value under the first of their names in the layer counts.

        Args:
            layer: the layer, or a set of them.
            values: all its values.
            shared: what sets with the very same tensors among their values have in common is kept here, so that it is
                made and held once. Empty before a trial's first call, and to be dropped after its last.
        """

    @abstractmethod
    def sweep(self, images: Tensor, *prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        """Yield (layer name, logits after its reset), and at last (None, logits of the trained network).

        Layers come in depth order; a set may come after sets of its members and others, with which it shares what is
        computed. What a layer's resets share is computed once for all trials, and nothing that is not needed for an
        item is computed before it: who does not need the trained network's logits stops before them.

        Args:
            images: normalised images ``(n_images, channels, height, width)``, of the shape the replay was opened for.
            prepared: for each trial, layer name -> what `prepare` returned. A layer's trials come in this order. Logits
                are ``(n_images, n_classes)``, float32.
        """

    def logits(self, images: Tensor) -> Tensor:
        """Return the trained network's logits, ``(n_images, n_classes)``."""
        ((_, logits),) = self.sweep(images, {})
        return logits


class PlainReplay(Replay):
    """The plain backend: swap the weights, run the whole network."""

    backend = "plain"

    def __init__(
        self, network: nn.Module, layers: Sequence[Layer], note: str = "", read_logits: ReadLogits = logits_of
    ) -> None:
        super().__init__(layers, "reference", note)
        self.network, self._read_logits = network, read_logits

    @override
    def prepare(self, layer: Layer, values: Values, shared: dict[Any, Any] | None = None) -> Values:
        return dict(values)

    @override
    def sweep(self, images: Tensor, *prepared: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        for layer in self.layers:
            for of_trial in prepared:
                if layer.name in of_trial:
                    yield layer.name, self.run(of_trial[layer.name], images)
        yield None, self.run({}, images)

    def run(self, values: Values, images: Tensor) -> Tensor:
        """Return the logits of one forward pass with some values in place of the trained ones."""
        with torch.no_grad(), holding(self.network, values):
            # an input of its own, for some networks write to theirs
            return self._read_logits(self.network(images.clone()))
