"""Labels of images, and the numbers of classes that they stand for."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from layercrit.errors import ProbeError, near, shown
from layercrit.foreign_files import parse_json

__all__ = [
    "Classes",
    "Labels",
    "as_numpy",
    "class_numbers",
    "former_classes",
    "imagenet_names",
    "integer_label",
    "labels_of",
    "names_in_order",
]

Kind = Literal["numbers", "names", "imagenet", "positions"]
_IMAGENET = 1000  # classes of ImageNet-1k
_EXAMPLES = 3
_NO_LABEL = {"?", "-", "n/a", "na", "none", "null", "nil", "missing", "unknown", "unlabeled", "unlabelled"}
_PLAIN_NAMES = "plain names, one per line, in the order of the model's outputs (no JSON, no numbers before the names)"


@dataclass(frozen=True)
class Classes:
    """What the labels of a source are, judged on all of its images.

    Attributes:
        origin: where they come from, in words.
        kind: ``numbers``: integers as stored; ``names``: names that are integers, such as those of folders;
            ``imagenet``: numbers that WordNet ids have in ImageNet-1k; ``positions``: positions of sorted names.
        values: the labels that images have, each once, ascending.
        n_classes: how many classes there are; None where the source does not say or labels are absolute numbers.
        empty: names of classes without images.
    """

    origin: str
    kind: Kind = "numbers"
    values: tuple[int, ...] = ()
    n_classes: int | None = None
    empty: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Classes":
        """Return what `dataclasses.asdict` and JSON made of it."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def fit(self, n_classes: int) -> Literal["as they are", "in sorted order", "not"]:
        """Return how the labels become those of a model with ``n_classes`` outputs.

        Names of folders and WordNet ids say which class comes first, but not how many a model has: they count in sorted
        order where there are as many with images as outputs, as torchvision's ``ImageFolder`` numbers them.
        """
        named = self.kind in ("imagenet", "positions")
        if self.kind == "imagenet" and n_classes > max(_IMAGENET, len(self.values)):
            return "not"
        absolute = n_classes == _IMAGENET if self.kind == "imagenet" else n_classes == self.n_classes
        return "in sorted order" if named and not absolute and n_classes == len(self.values) else "as they are"

    def mistake(self, n_classes: int) -> str | None:
        """Return what is wrong with the labels for a model with ``n_classes`` outputs, in words; None: nothing."""
        if not self.values:
            return None
        first, last = self.values[0], self.values[-1]
        from_one = self.kind == "names" and self.values == tuple(range(1, last + 1)) and last > 1
        if from_one and n_classes != last + 1:
            return f"{self.origin} begin at 1, and end at {last}, while the model's {n_classes} outputs count from 0"
        if self.kind != "positions" and (first < 0 or last >= n_classes):
            return f"label {first if first < 0 else last} of the source is not in 0 to {n_classes - 1}"
        known = len(self.values) if self.kind == "imagenet" and n_classes != _IMAGENET else self.n_classes
        if known not in (None, n_classes):
            return f"the source has {known} classes, the model {n_classes}"
        return None


@dataclass(frozen=True)
class Labels:
    """The labels of all images of a source.

    Attributes:
        numbers: the class of each image, None for an image without one.
        classes: what these numbers are.
        names: label -> name of its class, where classes have names.
    """

    numbers: Sequence[int | None]
    classes: Classes
    names: Mapping[int, str] = field(default_factory=dict)

    def of(self, images: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the numbers of some images, each of which has a label, ``(n_images,)``."""
        found = np.array([self.numbers[index] for index in images], np.int64)
        found.flags.writeable = False
        return found

    def renumbered(self, names: Sequence[str], where: str) -> "Labels":
        """Return the labels with each class numbered by the place of its name in ``names``.

        A class without a name is looked up by its number; integers none of which is listed are places already. WordNet
        ids, too, are looked up as such.

        Args:
            names: the classes in the order of the model's outputs.
            where: what lists them, for errors.

        Raises:
            ProbeError: a class is not among them.
        """
        places = {name: place for place, name in enumerate(names)}
        used = {label: self.names.get(label, str(label)) for label in self.classes.values}
        unnamed = self.classes.kind == "numbers" and not self.names and places.keys().isdisjoint(used.values())
        known = range(len(names)) if unnamed else places
        missing = [name for label, name in used.items() if (label if unnamed else name) not in known]
        if unnamed and not missing:
            return replace(self, names=dict(enumerate(names)), classes=replace(self.classes, n_classes=len(names)))
        if missing:
            raise ProbeError(
                f"{where} lists {len(names)} classes, but not {missing[0]!r}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} of the images. "
                f"{near(missing[0], places)} List all classes: {_PLAIN_NAMES}."
            )
        numbers = [None if label is None else places[used[label]] for label in self.numbers]
        classes = Classes(f"places in {where}, {self.classes.origin}", "numbers", _values(numbers), len(names))
        return Labels(numbers, classes, dict(enumerate(names)))


def labels_of(
    values: Sequence[Any] | npt.NDArray[Any], origin: str, name: Callable[[int], str], *, are_names: bool = False
) -> Labels:
    """Return the labels that were stored for all images of a source.

    Args:
        values: integers, also as floats or texts such as 3.0, or names of classes; None, NaN or an empty text for
            images without a label.
        origin: where they are stored, in words.
        name: returns where an image is, for errors.
        are_names: whether texts are names even where they read as integers of both signs, such as those of folders.

    Raises:
        ProbeError: they are neither all integers nor all names, or texts are class numbers and some are negative.
    """
    listed = values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind in "iuU" else list(values)
    listed = [None if isinstance(value, str) and not value.strip() else value for value in listed]
    texts = {value for value in listed if isinstance(value, str)}
    if (
        not texts
        or any(map(_is_fraction, texts))
        or not all(value is None or isinstance(value, str) for value in listed)
    ):
        whole = map(_as_integer, listed)
        numbers = [None if value is None else integer_label(value, name(i)) for i, value in enumerate(whole)]
        return Labels(numbers, Classes(origin, "numbers", _values(numbers)))
    if not are_names:
        _refuse_among_numbers(listed, name)
    label_of, kind = class_numbers(sorted(texts))
    words = {"names": "the integers", "imagenet": "ImageNet-1k's numbers of the WordNet ids",
             "positions": "positions of the sorted names"}[kind]  # fmt: skip
    numbers = [None if value is None else label_of[value] for value in listed]
    n_classes = len(texts) if kind == "positions" else None
    names = {number: text for text, number in label_of.items()}
    return Labels(numbers, Classes(f"{words} in {origin}", kind, _values(numbers), n_classes), names)


def _refuse_among_numbers(labels: Sequence[str | None], name: Callable[[int], str]) -> None:
    """Refuse negative integers and marks of no label among class numbers.

    As names, they would make all labels places in sorted order.
    """
    texts = {label.strip() for label in labels if label is not None}
    numbers = sorted(text for text in texts if re.fullmatch(r"[0-9]+", text))
    negative = {text for text in texts if re.fullmatch(r"-[0-9]+", text)}
    marks = {text for text in texts if text.casefold() in _NO_LABEL}
    wrong = negative or (marks if texts - marks == set(numbers) else set())  # beside other names, a mark is a name
    if not numbers or not wrong or texts == {"-1", "1"}:  # which are usual names of two classes
        return
    first = next(i for i, label in enumerate(labels) if label is not None and label.strip() in wrong)
    what = "is negative" if negative else "is no number"
    names = "negative numbers are names of classes" if negative else "all of these are names of classes"
    raise ProbeError(
        f"Labels such as '{numbers[0]}' are class numbers, which count from 0, but the label of '{name(first)}' is "
        f"{shown(labels[first])}, which {what}. Correct it, remove the image, or ignore the labels with "
        f"labels='none' (--labels none). If {names}, put a word before all of them, such as 'class "
        f"{min(negative, default=numbers[0])}'."
    )


def class_numbers(names: Sequence[str]) -> tuple[dict[str, int], Kind]:
    """Return the number of each class of a sorted list of names, and what these numbers are."""
    if names and all(re.fullmatch(r"[0-9]{1,18}", name) for name in names):
        return {name: int(name) for name in names}, "names"
    if names and all(re.fullmatch(r"n\d{8}", name) for name in names):
        numbers = _imagenet_numbers()
        if set(names) <= numbers.keys():
            return {name: numbers[name] for name in names}, "imagenet"
    return {name: i for i, name in enumerate(names)}, "positions"


def _as_integer(label: Any) -> Any:
    """Return a whole float or text as an integer, None for NaN: so tables have integers where one is missing."""
    if isinstance(label, str):
        text = label.strip()
        if text.casefold() == "nan":
            return None
        return int(text.partition(".")[0]) if re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", text) else label
    if isinstance(label, float | np.floating):
        number = float(label)
        if math.isnan(number):
            return None
        return int(number) if number.is_integer() and abs(number) <= 2**53 else number
    return label


def integer_label(value: object, name: str) -> int:
    """Return ``value`` as an integer, given as Python's, NumPy's or torch's.

    Raises:
        ProbeError: it is none, or beyond 64 bits.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # which values have an index is the question
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_) or not -(2**63) <= number < 2**63:
        raise ProbeError(
            f"Labels must be integers, the model's class numbers, but that of '{name}' is {shown(value)}. Give "
            "integers, or ignore the labels with labels='none' (--labels none)."
        )
    return number


@cache
def _imagenet_numbers() -> Mapping[str, int]:
    from timm.data.imagenet_info import ImageNetInfo

    names = ImageNetInfo().label_names()
    return {name: number for number, name in enumerate(names)}


def imagenet_names() -> dict[int, str]:
    """Return what the classes of ImageNet-1k are called: number -> WordNet id and word, such as n01440764 tench."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return {
        number: f"{name} {info.index_to_description(number).partition(',')[0]}"
        for name, number in _imagenet_numbers().items()
    }


def _values(numbers: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(sorted({number for number in numbers if number is not None}))


def _is_fraction(text: str) -> bool:
    """Return whether a text is a number, but no integer of 64 bits; `integer_label` says what is wrong with it."""
    return re.fullmatch(r"\s*[+-]?(\d{19,}|\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+|nan|inf)\s*", text) is not None


def names_in_order(classes: str | Path | Sequence[str]) -> tuple[list[str], str]:
    """Return the names of classes in the order of a model's outputs, and in words what lists them.

    Args:
        classes: the path of a text file with one name per line, or the names.

    Raises:
        ProbeError: the file cannot be read, or a name is missing or there twice.
    """
    if not isinstance(classes, str | Path):
        names, where = list(classes), "classes"
    else:
        path, where = Path(classes).expanduser(), f"'{classes}'"
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is no file")
            text = path.read_text(encoding="utf-8-sig")
            if _is_json(text):
                raise OSError("it is JSON")
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeError(
                f"The classes {where} cannot be read ({error}). Give a text file of {_PLAIN_NAMES}."
            ) from error
        names = text.splitlines()
        while names and not names[-1].strip():
            names.pop()
    names = [str(name).strip() for name in names]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or "" in names or twice:
        wrong = f"{twice[0]!r} is there twice" if twice else "an empty line" if names else "nothing"
        raise ProbeError(
            f"{where} must list every class once, one name per line, in the order of the model's outputs: {wrong}."
        )
    return names, where


def _is_json(text: str) -> bool:
    """Return whether a text is a list or a mapping in JSON, on one line or several."""
    try:
        return text.lstrip()[:1] in ("[", "{") and isinstance(parse_json(text), list | dict)
    except ValueError:
        return False


def as_numpy(values: npt.ArrayLike | torch.Tensor) -> npt.NDArray[Any]:
    """Return an array, a list or a tensor on any device as an array."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


def former_classes(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the labels are, of a probe set that was saved when only their origin and number were kept."""
    if about["labels"] is None:
        return None
    origin, n_classes = about["label_origin"], about["n_classes"]
    kind = "imagenet" if "ImageNet" in origin else "names" if "integers" in origin else "numbers"
    return {"origin": origin, "kind": kind, "values": sorted({*about["labels"]}), "n_classes": n_classes}
