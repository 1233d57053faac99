"""What is measured and how: the settings of a measurement, with the defaults of the library and the command line."""

import math
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from layercrit.errors import ProtocolError, near

__all__ = ["DEFAULTS", "DTYPES", "MATCHED", "Protocol"]

MATCHED = "cosine_matched"
"""Column and key of the cosine distance between predictions at the model's matched temperature."""

DTYPES = ("auto", "reference", "float32", "bfloat16")


@dataclass(frozen=True)
class Protocol:
    """The settings of a measurement.

    Attributes:
        trials: random draws per layer. The paper took 3; its intervals are wide (see the docs), take more if you can.
        n_images: images asked about, drawn from the source by ``seed``; all of them if the source has fewer.
        layers: shell-style patterns on layer names, comma-separated.
        types: types of layers that are reset, comma-separated; the paper's are convolutions and linear layers.
        group: reset each ``layer`` by itself, or whole blocks or stages.
        reset: what replaces a layer's parameters.
        seed: of the study; seeds of trials and of the probe set are hashed from it.
        batch_size: images run at once. ``auto``: 16 at 224 x 224 on a CPU, where activations then stay in cache.
        dtype: ``reference`` (the network's own operators), ``float32`` (folded and fused), ``bfloat16``, or ``auto``:
            bfloat16 where the processor multiplies it natively, the job is long, and a calibration batch shows an
            error in criticality of at most 0.02 per layer and 0.002 in the mean; otherwise float32.
        device: ``auto`` (a GPU if there is one), or any name that torch knows.
        level: confidence level of intervals.

    Raises:
        ProtocolError: a number is out of range, or no number; or the dtype is unknown.
    """

    trials: int = 3
    n_images: int = 10_000
    layers: str = "*"
    types: str = "conv,linear"
    group: str = "layer"
    reset: str = "rerandomize"
    seed: int = 0
    batch_size: int | str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    level: float = 0.95

    def __post_init__(self) -> None:
        for name, expected, smallest in (
            ("trials", "a whole number of at least 1", 1),
            ("n_images", "a whole number of at least 1", 1),
            ("batch_size", "'auto' or a whole number of at least 1", 1),
            ("seed", "a whole number", -math.inf),
        ):
            value = getattr(self, name)
            if name == "batch_size" and value == "auto":
                continue
            if not isinstance(value, Integral) or int(value) < smallest:
                raise ProtocolError(f"{name} must be {expected}; got {value!r}.")
            object.__setattr__(self, name, int(value))  # JSON knows no integers of NumPy
        if self.dtype not in DTYPES:
            raise ProtocolError(f"Unknown dtype {str(self.dtype)!r}. {near(str(self.dtype), DTYPES)}")
        if not isinstance(self.level, Real) or not 0 < self.level < 1:
            raise ProtocolError(f"level must lie between 0 and 1, such as 0.95; got {self.level!r}.")
        object.__setattr__(self, "level", float(self.level))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


DEFAULTS = Protocol()
