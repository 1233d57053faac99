"""The settings of a measurement, with the defaults of the library and the command line."""

import math
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from layercrit.errors import ProtocolError, near

__all__ = [
    "DEFAULTS",
    "DTYPES",
    "GROUPS",
    "INTERVALS",
    "MATCHED",
    "NORM_STATISTICS",
    "SETS",
    "KindOfStatistics",
    "Protocol",
]

MATCHED = "cosine_matched"
"""Column and key of the cosine distance between predictions at the model's matched temperature."""

KindOfStatistics = Literal["trained", "reset", "reestimate"]

NORM_STATISTICS: tuple[str, ...] = get_args(KindOfStatistics)
"""What becomes of the running statistics of normalisation layers beside a reset."""

INTERVALS = ("t", "betting")
"""The kinds of intervals: Student's t over trials and images, or betting on the means of trials."""

GROUPS = ("layer", "block", "stage", "attention", "mlp", "conv+norm")
"""What is reset as one: see `layercrit.layers.select_layers`."""

SETS = ("each", "all-but-one", "cascade-up", "cascade-down", "pairs")
"""The kinds of sets of layers: see `layercrit.layer_sets.sets_of`."""

DTYPES = ("auto", "reference", "float32", "bfloat16")


def _setting(default: Any, description: str, **limits: Any) -> Any:
    """Declare a setting: its default, its meaning, and its limits in the words of JSON Schema.

    The names in the metadata are pydantic's, so that study files declare the same without repeating it; this module
    does not import pydantic, since the command line's help reads it.
    """
    return field(default=default, metadata={"description": description, "json_schema_extra": limits})


@dataclass(frozen=True)
class Protocol:
    """The settings of a measurement.

    Raises:
        ProtocolError: a number is out of range or not a number, or the dtype is unknown.
    """

    trials: int = _setting(
        3,
        "random draws per layer. The paper took 3, which gives wide intervals (see the docs); take more if you can",
        minimum=1,
    )
    n_images: int = _setting(
        10_000, "images shown to the model, drawn from the source by `seed`; all if the source has fewer", minimum=1
    )
    layers: str = _setting("*", "shell-style patterns on layer names, comma-separated")
    types: str = _setting(
        "conv,linear",
        "types of layers that are reset, comma-separated; the paper's are convolutions and linear layers",
    )
    group: str = _setting(
        "layer",
        "reset each `layer` separately; or whole blocks or stages; or the attention of a block, its MLP, or a "
        "convolution with its normalisation as one",
        enum=GROUPS,
    )
    sets: str | dict[str, str] = _setting(  # noqa: RUF009 - its default is a text
        "each",
        "reset `each` layer on its own; or sets of them: all layers but one, cascades from the input up or from the "
        "output down, all pairs; or a TOML file of named sets, or a table: name = patterns on layer names",
        anyOf=[{"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}],
    )
    reset: str = _setting("rerandomize", "what replaces a layer's parameters")
    norm_statistics: str = _setting(
        "trained",
        "running statistics of normalisation layers beside a reset: as `trained` (as published), `reset` (mean 0, "
        "variance 1 in the first normalisation layer after the reset), or `reestimate` (estimated on images that the "
        "changed network is shown)",
        enum=NORM_STATISTICS,
    )
    seed: int = _setting(0, "seed of the study; seeds of trials and of the probe set are hashed from it")
    batch_size: int | str = _setting(
        "auto",
        "images run at once. `auto`: 16 at 224 x 224 on a CPU, where activations then stay in cache",
        anyOf=[{"type": "integer", "minimum": 1}, {"const": "auto"}],
    )
    dtype: str = _setting(
        "auto",
        "`reference` (the network's own operators), `float32` (folded and fused), `bfloat16`, or `auto`: bfloat16 "
        "where the processor multiplies it natively, the job is long, and a calibration batch shows an error in "
        "criticality of at most 0.02 per layer and 0.002 in the mean; otherwise float32",
        enum=DTYPES,
    )
    device: str = _setting("auto", "`auto` (a GPU if there is one), or any name that torch knows")
    level: float = _setting(0.95, "confidence level of intervals", exclusiveMinimum=0, exclusiveMaximum=1)
    interval: str = _setting(
        "t",
        "`t` (Student's, for new trials and new images), or `betting` (for new trials on the same images; assumes "
        "nothing but that distances lie in [0, 1], and needs some 70 trials to say much)",
        enum=INTERVALS,
    )
    half_width: float | None = _setting(
        None,
        "half-width of the interval that every layer is to have, such as 0.05: a pilot then plans the trials of each "
        "layer and the images, in place of `trials`, and `n_images` is the most images",
        exclusiveMinimum=0,
        exclusiveMaximum=1,
    )
    minutes: float | None = _setting(
        None, "time for the best half-width that can be had in it, in place of `half_width`", exclusiveMinimum=0
    )
    pilot: int = _setting(10, "trials of the pilot that `half_width` or `minutes` begin with", minimum=3)
    max_trials: int = _setting(200, "the most trials of a layer under `half_width` or `minutes`", minimum=3)

    def __post_init__(self) -> None:
        for name, words, smallest in (
            ("trials", "a whole number of at least 1", 1),
            ("n_images", "a whole number of at least 1", 1),
            ("pilot", "a whole number of at least 3, since fewer trials hardly tell how much they vary", 3),
            ("max_trials", "a whole number of at least 3", 3),
            ("batch_size", "'auto' or a whole number of at least 1", 1),
            ("seed", "a whole number", -math.inf),
        ):
            value = getattr(self, name)
            if name == "batch_size" and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < smallest:
                raise ProtocolError(f"{name} must be {words}; got {value!r}.")
            object.__setattr__(self, name, int(value))  # JSON knows no integers of NumPy
        if self.dtype not in DTYPES:
            raise ProtocolError(f"Unknown dtype {str(self.dtype)!r}. {near(str(self.dtype), DTYPES)}")
        if not isinstance(self.level, Real) or not 0 < self.level < 1:
            raise ProtocolError(f"level must be between 0 and 1, such as 0.95; got {self.level!r}.")
        object.__setattr__(self, "level", float(self.level))
        if self.norm_statistics not in NORM_STATISTICS:
            given = str(self.norm_statistics)
            raise ProtocolError(f"Unknown norm_statistics {given!r}. {near(given, NORM_STATISTICS)}")
        if self.interval not in INTERVALS:
            raise ProtocolError(f"Unknown interval {str(self.interval)!r}. {near(str(self.interval), INTERVALS)}")
        self._check_sets()
        self._check_precision()

    @property
    def is_planned(self) -> bool:
        """Whether a pilot plans the trials."""
        return self.half_width is not None or self.minutes is not None

    @property
    def first_trials(self) -> int:
        """The trials that are run before any plan: all of them, or the pilot's."""
        return self.pilot if self.is_planned else self.trials

    def _check_sets(self) -> None:
        if isinstance(self.sets, dict):
            if not self.sets or not all(isinstance(one, str) and one for item in self.sets.items() for one in item):
                raise ProtocolError(f"sets must be name = patterns on layer names; got {self.sets!r}.")
        elif self.sets not in SETS:
            raise ProtocolError(
                f"Unknown sets {self.sets!r}. {near(str(self.sets), SETS)} Named sets are read from a TOML file."
            )

    def _check_precision(self) -> None:
        for name, limit, such_as in (("half_width", 1.0, "0.05"), ("minutes", math.inf, "10")):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < limit:
                words = "above 0" if math.isinf(limit) else "between 0 and 1"
                raise ProtocolError(f"{name} must be {words}, such as {such_as}; got {value!r}.")
            object.__setattr__(self, name, float(value))
        if self.half_width is not None and self.minutes is not None:
            raise ProtocolError("half_width and minutes cannot both be given: the one follows from the other.")
        if self.is_planned and self.trials != type(self).trials:
            raise ProtocolError(
                f"trials is {self.trials}, but half_width or minutes plan the trials. Leave trials out; their limits "
                "are pilot and max_trials."
            )
        if self.is_planned and self.max_trials < self.pilot:
            raise ProtocolError(f"max_trials is {self.max_trials}, less than the {self.pilot} trials of the pilot.")
        if self.is_planned and self.interval != "t":
            raise ProtocolError(
                f"half_width and minutes plan Student's intervals, not {self.interval!r}. Leave the interval out; or "
                "give trials instead: betting takes some 65 to 90 of them for a half-width of 0.05."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


DEFAULTS = Protocol()
