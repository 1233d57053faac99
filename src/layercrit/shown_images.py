"""The images that a model was shown: their names and labels, and what the trained network predicts for each."""

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import ProbeError, near

__all__ = ["Groups", "GroupsOf", "ShownImages", "pack_classes", "unpack_classes"]

GroupsOf = str | Sequence[object] | npt.NDArray[np.generic]
"""What puts images into groups: ``"label"``, ``"prediction"`` (of the trained network), or a value for each image."""

_WAYS = ("label", "prediction")


@dataclass(frozen=True, eq=False)
class Groups:
    """Images in groups, such as classes.

    Attributes:
        codes: the place of each image's group in ``names``, ``(n_images,)``.
        names: what each group is called.
        numbers: number of each class among the model's outputs; None where groups are not classes.
    """

    codes: npt.NDArray[np.int64]
    names: tuple[str, ...]
    numbers: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class ShownImages:
    """What is known of the images on which a model was measured, in the order of the probe set.

    Attributes:
        names: where each image was found; None where that was not kept.
        labels: class number of each image, ``(n_images,)``; None without labels.
        predictions: the most probable class of each image for the trained network, ``(n_images,)``; None where that was
            not kept.
        class_names: class number -> name, where classes have names.
        why_unknown: why names or predictions are None, for errors.
    """

    names: tuple[str, ...] | None
    labels: npt.NDArray[np.int64] | None
    predictions: npt.NDArray[np.int64] | None
    class_names: Mapping[int, str] = field(default_factory=dict)
    why_unknown: str = "this was measured by an earlier version of layercrit"

    def name_of(self, number: int) -> str:
        """Return the name of a class, or its number as text where it has none."""
        return self.class_names.get(number, str(number))

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the trained network names each image's label, ``(n_images,)``.

        Raises:
            ProbeError: labels or predictions are not known.
        """
        return np.asarray(self._known("label") == self._known("prediction"))

    def groups(self, of: GroupsOf) -> Groups:
        """Put the images into groups.

        Args:
            of: by what.

        Raises:
            ProbeError: that is not known, or there is not one value for each image.
        """
        if isinstance(of, str):
            numbers, codes = np.unique(self._known(of), return_inverse=True)
            names = tuple(self.name_of(int(number)) for number in numbers)
            return Groups(codes, names, tuple(map(int, numbers)))
        return groups_of_values(of)

    def accuracy_by(self, of: GroupsOf) -> dict[str, float]:
        """Return of each group the share of its images that the trained network names right.

        It is empty where that is not known, and where groups are what the network predicts.
        """
        if self.labels is None or self.predictions is None or (isinstance(of, str) and of == "prediction"):
            return {}
        groups = self.groups(of)
        shares = np.bincount(groups.codes, self.correct) / np.bincount(groups.codes)
        return dict(zip(groups.names, shares.tolist(), strict=True))

    def to_pandas(self, n_images: int) -> pd.DataFrame:
        """Return one row per image: ``image``, ``label`` and ``prediction`` (names of classes) and ``correct``.

        What is not known is missing; an image without a name has its position.
        """
        columns: dict[str, object] = {"image": self.names or [str(number) for number in range(n_images)]}
        for column, numbers in (("label", self.labels), ("prediction", self.predictions)):
            named = [None] * n_images if numbers is None else [self.name_of(int(number)) for number in numbers]
            columns[column] = pd.Categorical(named)
        known = self.labels is not None and self.predictions is not None
        columns["correct"] = pd.array(self.correct if known else [None] * n_images, dtype="boolean")
        return pd.DataFrame(columns)

    def write(self, path: Path) -> None:
        """Write a Parquet file with a row per image."""
        columns: dict[str, object] = {"image": list(self.names or ())}
        for column, numbers in (("label", self.labels), ("prediction", self.predictions)):
            if numbers is not None:
                columns[column] = numbers
                columns[f"{column}_name"] = [self.class_names.get(int(number)) for number in numbers]
        pd.DataFrame(columns).to_parquet(path, index=False, compression="zstd")

    @classmethod
    def read(cls, path: Path, n_images: int) -> "ShownImages":
        """Read what `write` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or not of so many images.
        """
        table = pd.read_parquet(path)
        if len(table) != n_images:
            raise ValueError(f"{path.name} has {len(table)} images, not {n_images}")
        numbers: dict[str, npt.NDArray[np.int64]] = {}
        class_names: dict[int, str] = {}
        for column in _WAYS:
            if column in table:
                numbers[column] = table[column].to_numpy(np.int64)
                pairs = table[[column, f"{column}_name"]].dropna().drop_duplicates()
                class_names |= {int(number): str(name) for number, name in pairs.itertuples(index=False)}
        return cls(tuple(table["image"]), numbers.get("label"), numbers.get("prediction"), class_names)

    def _known(self, what: str) -> npt.NDArray[np.int64]:
        if what not in _WAYS:
            raise ProbeError(
                f"Images cannot be put into groups by {what!r}. {near(what, _WAYS)} Or pass a value for each image."
            )
        found = self.labels if what == "label" else self.predictions
        if found is not None:
            return found
        if what == "label" and self.names is not None:
            raise ProbeError(
                "The images have no labels that are classes of the model. Take the classes that the trained network "
                "predicts, of='prediction' (--by prediction); or measure with labels (labels=FILE, --labels FILE); or "
                "pass the class of each image: of=[...], in the order of the probe set."
            )
        raise ProbeError(
            f"The {what}s of single images are not known: {self.why_unknown}. Measure it again, into another folder "
            "(--out); or pass the class of each image: of=[...], in the order of the probe set."
        )


def groups_of_values(values: Sequence[object] | npt.NDArray[np.generic]) -> Groups:
    """Put images into groups by a value for each, such as a class or where it was taken."""
    given = np.asarray(values)
    if given.ndim != 1 or (given.dtype.kind == "f" and not np.isfinite(given).all()):
        raise ProbeError(
            f"The groups of images have the shape {given.shape} of {given.dtype}: expected one value for each image, "
            "(n_images,), in the order of the probe set, none of them NaN."
        )
    found, codes = np.unique(given.astype(str) if given.dtype.kind == "O" else given, return_inverse=True)
    return Groups(codes.reshape(-1), tuple(map(str, found)), None)


def pack_classes(classes: npt.NDArray[np.integer]) -> str:
    """Return class numbers ``(n_images,)`` as text for JSON, some 10 bits an image for a thousand classes."""
    return base64.b64encode(zlib.compress(classes.astype("<i4").tobytes(), 9)).decode()


def unpack_classes(text: str) -> npt.NDArray[np.int64]:
    """Return what `pack_classes` was given.

    Raises:
        ValueError: the text is damaged.
    """
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<i4").astype(np.int64)
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"packed classes are damaged ({error})") from error
