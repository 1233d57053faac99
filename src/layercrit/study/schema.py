"""What a study file may contain: its tables, declared once for the reader and for the JSON Schema that editors use."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, create_model, field_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from layercrit.declarations import Declaration, expected, meanings
from layercrit.distances import DISTANCES
from layercrit.errors import StudyError, near
from layercrit.layer_sets import read_sets
from layercrit.layers import LAYER_TYPES
from layercrit.module_paths import Grid
from layercrit.probes.images import STANDARD, Interpolation, Preprocessing
from layercrit.protocol import DEFAULTS, GROUPS, KindOfStatistics, Protocol
from layercrit.registry import Registry
from layercrit.resets import RESETS

__all__ = [
    "METHOD_KEYS",
    "TABLES",
    "ImagesTable",
    "ModelTable",
    "ModuleCriticalityTable",
    "ProtocolTable",
    "StudyTable",
    "TrainingTable",
    "study_schema",
]

METHOD_KEYS = ("method", "settings", "epochs", "seed")
"""Keys that only models with a method may have."""

_Names = Annotated[list[str], Field(min_length=1)]
_Epochs = Annotated[int, Field(ge=1)]
_Settings = Annotated[dict[str, Any], Field(json_schema_extra={"properties": {"epochs": False}})]  # it stands beside
_Seed = Annotated[int, Field(ge=0, lt=2**64), expected("a whole number from 0 to 2**64 - 1")]


class StudyTable(Declaration):
    """What the study is called, and what its models are compared with."""

    name: str | None = None
    """the study's name; default: the file's, or that of its folder if the file is study.toml"""
    baseline: str | None = None
    """name of the model that the others are compared with"""
    leave_out: list[str] = Field([])
    """names of models or categories that comparisons leave out"""
    imports: list[str] = Field([])
    """modules to import first, for resets, distances, model sources and training methods of your own"""


class ImagesTable(Declaration):
    """The images that every model gets; several tables ``[[images]]`` are several probe sets, each with a name."""

    name: str | None = None
    """the name of the probe set, such as clean or fog, where there are several"""
    source: str
    """source of the images, anything that `layercrit measure --images` takes; relative to this file. Of a further probe
    set also `corrupt:KIND@SEVERITY` or `attack:pgd(...)` alone: of the images of the first one. What else a further
    probe set does not say is as in the first one"""
    n_images: int = Field(DEFAULTS.n_images, ge=1)
    """how many images to draw from the source"""
    labels: Annotated[bool | Annotated[str, Field(min_length=1)], expected("true, false, a file or a column")] = True
    """whether to use labels where there are some; or a file of labels, relative to this file, or a column, as for
    `layercrit measure --labels`"""
    classes: str | None = None
    """a text file with the names of the models' classes, one per line in the order of their outputs; relative to this
    file"""
    input_size: Annotated[list[int], Field(min_length=3, max_length=3), expected("[channels, height, width]")] = Field(
        [STANDARD.channels, STANDARD.height, STANDARD.width],
        json_schema_extra={"prefixItems": [{"enum": [1, 3]}], "items": {"type": "integer", "minimum": 1}},
    )
    """every model gets the same pixels: channels (3: RGB, 1: grey), height, width"""
    resize: (
        Annotated[
            Annotated[int, Field(ge=0)]
            | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)],
            expected("a whole number of pixels (0: none) or [height, width]"),
        ]
        | None
    ) = None
    """shorter side before the crop, or [height, width] to squash the image to; 0: the images keep their size.
    Default: 256 for 224 x 224 pixels, else the longer side of the crop"""
    interpolation: Interpolation = STANDARD.interpolation
    """how pixels are resized"""

    def preprocessing(self) -> Preprocessing:
        """Return how images become the pixels that every model gets.

        Raises:
            ProbeError: the numbers contradict each other or are out of range.
        """
        channels, height, width = self.input_size
        standard = STANDARD.resize if (height, width) == (STANDARD.height, STANDARD.width) else max(height, width)
        resize = standard if self.resize is None else self.resize
        squashed = (resize[0], resize[1]) if isinstance(resize, list) else resize or None
        return Preprocessing(channels, height, width, squashed, self.interpolation)


class ProtocolKeys(Declaration):
    """The settings of all measurements, like those of `layercrit measure`."""

    resets: list[str] = Field([DEFAULTS.reset])
    """what replaces a layer's parameters: names of resets, each of which is measured, with options in brackets if they
    have some, such as "noise(scale=0.5)" for the reset noise"""
    norm_statistics: Annotated[
        KindOfStatistics | Annotated[list[KindOfStatistics], Field(min_length=1)],
        expected("'trained', 'reset' or 'reestimate', or a list of these"),
    ] = Field(["trained"])
    """running statistics of normalisation layers beside a reset: `trained`, as published; `reset`; `reestimate`; or a
    list of these, each of which is measured"""
    epochs: Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], expected("'all' or a list of epochs")] = (
        Field([])
    )
    """epochs of training runs whose weights are measured beside the final ones: `all` that were kept, or a list"""
    distances: list[str] | None = None
    """names of distances between predictions; default: all that are registered. `cosine` is always among them"""

    @field_validator(
        *(one.name for one in fields(Protocol) if one.name not in ("sets", "norm_statistics")),
        mode="wrap",
        check_fields=False,
    )
    @classmethod
    def _as_of_a_measurement(cls, value: Any, handler: Any, info: ValidationInfo) -> Any:
        setting: dict[str, Any] = {str(info.field_name): value}
        Protocol(**setting)
        return handler(value)

    @field_validator("group", check_fields=False)
    @classmethod
    def _known_group(cls, group: str) -> str:
        if group not in GROUPS:
            raise StudyError(f"unknown group {group!r}. {near(group, GROUPS)}")
        return group

    @field_validator("sets", check_fields=False)
    @classmethod
    def _with_patterns(cls, sets: str | dict[str, str]) -> str | dict[str, str]:
        return read_sets(sets) if isinstance(sets, dict) else sets  # a file is read from the study's folder

    @field_validator("types", check_fields=False)
    @classmethod
    def _known_types(cls, types: str) -> str:
        known = [*LAYER_TYPES, "all"]
        if unknown := [name for name in map(str.strip, types.split(",")) if name not in known]:
            raise StudyError(f"unknown layer type {unknown[0]!r}. {near(unknown[0], known)}")
        return types


_SETTINGS: dict[str, Any] = {
    one.name: (one.type, Field(one.default, **one.metadata))
    for one in fields(Protocol)
    # which are lists and that of [images] here; and a time is for one model
    if one.name not in ("reset", "norm_statistics", "n_images", "minutes")
}
ProtocolTable = create_model("ProtocolTable", __base__=ProtocolKeys, __doc__=ProtocolKeys.__doc__, **_SETTINGS)


class ModuleCriticalityTable(Declaration):
    """Module criticality, measured once the cells are: the settings of `layercrit module-criticality` of a study."""

    models: Annotated[_Names, expected("a list of names of models")] | None = None
    """names of the models that are wanted; default: all that have weights from before training"""
    probe_set: str | None = None
    """the name of the images, where there are several probe sets; default: the first"""
    n_images: int = Field(1_000, ge=1)
    """how many of the probe set's images to use, the first ones"""
    initial: str | None = None
    """weights before training, of all models that are no training run which kept its epoch 0: a weight file, or
    DIR@epoch=0 of a training run, relative to this file; or a model reference"""
    tolerance: float = Field(1.01, gt=1, allow_inf_nan=False)
    """loss that is allowed, as a factor of the trained network's"""
    excess: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """loss above the trained network's, in nats, in place of `tolerance`"""
    draws: int = Field(10, ge=1)
    """draws of the noise"""
    n_a: int = Field(11, ge=2)
    """places on the path from initial to trained values"""
    n_s: int = Field(21, ge=2)
    """amounts of noise, evenly in their logarithm"""
    s_range: Annotated[
        list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=2, max_length=2),
        expected("two positive numbers, the smaller one first"),
    ] = Field([1e-3, 10.0])  # fmt: skip
    """smallest and largest standard deviation of the noise, in root mean squares of a module's parameters"""
    dtype: Literal["float32", "reference"] = "float32"
    """`float32` (folded and fused) or `reference` (the network's own operators)"""
    level: float = Field(DEFAULTS.level, gt=0, lt=1)
    """confidence level of the limits"""
    batch_size: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)], expected("'auto' or a whole number of at least 1")
    ] = DEFAULTS.batch_size  # type: ignore[assignment]
    """images run at once"""
    device: str = DEFAULTS.device
    """`auto` (a GPU if there is one), or any name that torch knows"""

    @field_validator("s_range")
    @classmethod
    def _rising(cls, s_range: list[float]) -> list[float]:
        Grid.of(2, 2, (s_range[0], s_range[1]))
        return s_range


class TrainingTable(Declaration):
    """How `layercrit train --study FILE` trains the models that have a `method`; a model's own keys take precedence."""

    arch: str
    """the architecture to train, a model reference without weights, such as 'timm:resnet18'"""
    data: str
    """source of the training images; relative to this file"""
    folder: str = "models"
    """folder of the trained models, each in its own folder; relative to this file"""
    epochs: _Epochs | None = None
    """passes over the training images; default: as many as each method says"""
    seed: _Seed = 0
    """seed of the initial weights and of all random numbers in training"""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """mixed precision of training; no: float32"""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """how the final weights are stored"""
    settings: _Settings = Field({})
    """settings of every method, such as { batch_size = 128 }"""


def _share(accuracy: float) -> float:
    if not 0 <= accuracy <= 1:
        hint = f" Did you mean {accuracy / 100:g}?" if 1 < accuracy <= 100 else ""
        raise StudyError(f"accuracy must be a share in [0, 1]; got {accuracy:g}.{hint}")
    return accuracy


class ModelTable(Declaration):
    """One model, by `reference` or trained by a `method`; or several, by a pattern or a `list`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [key]} for key in ("reference", "list", "method")],
            "dependentRequired": {"method": ["name"], **{key: ["method"] for key in METHOD_KEYS[1:]}},
        }
    )

    reference: str | None = None
    """a model reference, or a pattern such as zoo:*, timm:resnet50.* or file:runs/*/final.safetensors"""
    list: str | None = None
    """a CSV file with a column `reference` and any of these keys but those of training; or one reference per line"""
    method: str | None = None
    """the training method by which the study trains the model: `layercrit methods` lists them"""
    name: str | None = None
    """the model's name; for a model with a method also that of its folder"""
    category: str | None = None
    """category of its training method, such as adversarial_training; default: that of the zoo or of the method"""
    label: str | None = None
    """its name in figures"""
    accuracy: Annotated[float, AfterValidator(_share)] | None = Field(
        None, json_schema_extra={"minimum": 0, "maximum": 1}
    )
    """top-1 accuracy as its authors give it, a share in [0, 1]"""
    donor: str | None = None
    """where the values of the resets rewind and donor come from: a weight file, runs/a@epoch=0 of a training run, or a
    model reference. Default for a model with a method: its initial weights, for rewind"""
    attack_norm: str | None = None
    """norm of the perturbations of adversarial training, such as l2 or linf; default: as the zoo or the method says"""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """the largest of these perturbations, in the units in which its authors give it"""
    settings: _Settings = Field({})
    """settings of the method, such as { eps = 1.0 }"""
    epochs: _Epochs | None = None
    """passes over the training images"""
    seed: _Seed | None = None
    """seed of the initial weights and of all random numbers in training"""


TABLES: dict[str, type[Declaration]] = {
    "study": StudyTable,
    "images": ImagesTable,
    "protocol": ProtocolTable,
    "module_criticality": ModuleCriticalityTable,
    "training": TrainingTable,
    "models": ModelTable,
}
"""The sections of a study file, and what each may contain."""


def _named() -> tuple[tuple[str, str, Registry[Any]], ...]:
    """Return the keys whose values are names, each with its table and its registry."""
    from layercrit.training import METHODS  # which readers of study files need not wait for

    return (
        ("ProtocolTable", "resets", RESETS),
        ("ProtocolTable", "distances", DISTANCES),
        ("ModelTable", "method", METHODS),
    )


class _Plain(GenerateJsonSchema):
    """Without titles that repeat names, and without null, which TOML does not have."""

    schema_dialect = "https://json-schema.org/draft/2020-12/schema"

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        has_none = "default" in schema and schema["default"] is None
        return self.generate_inner(schema["schema"]) if has_none else super().default_schema(schema)


def study_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of study files: what can be known of one without opening what it names.

    Names of resets, distances and training methods are examples: a study file may import more.
    """
    sections: dict[str, Any] = {name: (table, None) for name, table in TABLES.items()}
    sections["images"] = (ImagesTable | list[ImagesTable], ...)
    sections["models"] = (list[ModelTable], Field(min_length=1, description="the models of the study"))
    document = create_model("StudyFile", __base__=Declaration, __doc__="A study file of layercrit.", **sections)
    trains = {"required": ["models"], "properties": {"models": {"contains": {"required": ["method"]}}}}
    schema = document.model_json_schema(schema_generator=_Plain)
    for kind in TABLES.values():
        for key, meaning in meanings(kind).items():
            schema["$defs"][kind.__name__]["properties"][key].setdefault("description", meaning)
    for table, key, registry in _named():
        declared = schema["$defs"][table]["properties"][key]
        declared.get("items", declared)["examples"] = list(registry)
    return {
        "$schema": _Plain.schema_dialect,
        **schema,
        "if": trains,
        "then": {"required": ["training"]},
    }
