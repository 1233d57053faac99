"""The zoo's entries: what is declared about a published checkpoint, and how that is read and checked."""

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch import Tensor

from layercrit.categories import Category
from layercrit.declarations import STRICT, mistakes
from layercrit.errors import CheckpointError, ZooError
from layercrit.models.zoo.downloads import address_of, cache_folder
from layercrit.probes.images import Preprocessing
from layercrit.toml import tomllib

__all__ = ["Citation", "ZooEntry", "ZooFile", "read_zoo"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # names files in the cache as well


_Text = Annotated[str, Field(min_length=1)]
_Positive = Annotated[float, Field(gt=0)]


def _fetchable(address: str) -> str:
    if "@" in address_of(address).partition("//")[2].partition("/")[0]:
        raise ValueError("an address must have no user name and password; they would be shown and stored")
    return address


def _applicable(rule: tuple[str, str]) -> tuple[str, str]:
    re.sub(*rule, "")
    return rule


@dataclass(frozen=True)
class Citation:
    """The paper or page that describes how a model was trained.

    Attributes:
        authors: names, joined by "and".
        title: the paper's title.
        year: the year of its first version.
        arxiv: its arXiv number, or None.
    """

    authors: str
    title: str
    year: int
    arxiv: str | None = None

    def bibtex(self, key: str) -> str:
        """Return a BibTeX entry under ``key``."""
        lines = [f"author = {{{self.authors}}}", f"title = {{{self.title}}}", f"year = {{{self.year}}}"]
        if self.arxiv is not None:
            lines += [f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        return f"@misc{{{key},\n" + "".join(f"  {line},\n" for line in lines) + "}"


@dataclass(frozen=True)
class ZooFile:
    """One published file, and how the names in it become those of the architecture; rules apply in this order.

    Attributes:
        address: where it is, as `layercrit.models.zoo.downloads` describes.
        sha256: the first digits of its SHA-256, where the publisher states them.
        key: which mapping has the weights; None: the one that `read_checkpoint` finds.
        keep: only names that begin with one of these are kept; empty: all.
        drop: shell patterns; names that match one are dropped.
        strip: prefixes, each cut off once where a name begins with it.
        rename: pairs of regular expression and replacement.
    """

    address: Annotated[str, AfterValidator(_fetchable)]
    sha256: str | None = None
    key: str | None = None
    keep: tuple[_Text, ...] = ()
    drop: tuple[_Text, ...] = ()
    strip: tuple[_Text, ...] = ()
    rename: tuple[Annotated[tuple[str, str], AfterValidator(_applicable)], ...] = ()

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the rules to the tensors of the file.

        Raises:
            CheckpointError: two tensors get the same name.
        """
        result: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for name, tensor in tensors.items():
            if self.keep and not name.startswith(self.keep):
                continue
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.drop):
                continue
            new = self._new_name(name)
            if new in result:
                raise CheckpointError(
                    f"{self.address}: {origin[new]!r} and {name!r} would both be named {new!r}. "
                    "The file's layout has changed since the zoo's rules were written."
                )
            result[new], origin[new] = tensor, name
        return result

    def rules(self) -> list[str]:
        """Return the rules in words, one phrase each; empty if names stay unchanged."""
        told = [f"take the mapping {self.key!r}"] if self.key is not None else []
        told += [f"keep only names that begin with {' or '.join(map(repr, self.keep))}"] if self.keep else []
        told += [f"drop names like {pattern!r}" for pattern in self.drop]
        told += [f"cut {prefix!r} off the beginning" for prefix in self.strip]
        return told + [f"replace '{old}' by '{new}'" for old, new in self.rename]

    def _new_name(self, name: str) -> str:
        for prefix in self.strip:
            name = name.removeprefix(prefix)
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class ZooEntry:
    """One published checkpoint.

    Attributes:
        id: its identifier in the study's results.
        label: its name in the study's figures.
        category: one of `CATEGORIES`.
        documented_accuracy: ImageNet-1k top-1 accuracy in [0, 1] as the study gives it; None where it gives none.
        architecture: a model reference of the architecture.
        mean: mean of each channel, in units of pixels in [0, 1].
        std: standard deviation of each channel, in the same units.
        preprocessing: how the study prepares images.
        files: one, or the backbone's and the head's.
        licence: as the publisher states it, or "not stated".
        citation: who trained it, and how.
        attack_norm: norm of the perturbations of adversarial training, ``l2`` or ``linf``; None for other methods.
        eps: their largest norm, as its authors give it: for L2 in units of pixels in [0, 1], for Linf in 1/255 of that.
    """

    __pydantic_config__ = STRICT

    id: str
    label: str
    category: Category
    documented_accuracy: Annotated[float, Field(gt=0, le=1)] | None
    architecture: str
    mean: tuple[float, float, float]
    std: tuple[_Positive, _Positive, _Positive]
    preprocessing: Preprocessing
    files: tuple[ZooFile, ...]
    licence: str
    citation: Citation
    attack_norm: Literal["l2", "linf"] | None = None
    eps: Annotated[float, Field(ge=0)] | None = None

    @property
    def path(self) -> Path:
        """Where the converted weights are cached, whether they exist or not."""
        return cache_folder() / "zoo" / f"{self.id}.safetensors"

    @property
    def provenance_path(self) -> Path:
        """The record of what the converted weights were made from."""
        return cache_folder() / "zoo" / f"{self.id}.json"


_ENTRY = TypeAdapter(ZooEntry)


def read_zoo(text: str) -> dict[str, ZooEntry]:
    """Read and check declarations in the form of ``zoo.toml``, which explains it.

    Raises:
        ZooError: they are not TOML, or a key is unknown, missing, or of the wrong type.
    """
    try:
        declared = tomllib.loads(text)
        tables = {name: declared[name] for name in ("defaults", "families", "models")}
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ZooError(
            f"The zoo cannot be read ({error}). It needs the tables defaults, families and models."
        ) from error
    entries = {}
    for name, table in tables["models"].items():
        try:
            family = tables["families"][table["family"]] if "family" in table else {}
            merged = {**tables["defaults"], **family, **table}
            merged.pop("family", None)
            entries[name] = _entry(name, merged)
        except ValidationError as error:
            told = "; ".join(mistakes(error, ZooEntry.__dataclass_fields__))
            raise ZooError(f"The zoo's entry {name!r} is not valid: {told}.") from error
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise ZooError(f"The zoo's entry {name!r} is not valid: {type(error).__name__}: {error}.") from error
    return entries


def _entry(name: str, table: dict[str, Any]) -> ZooEntry:
    """Make an entry of a table that families and defaults have completed; what does not fit raises."""
    if not _NAME.fullmatch(name):
        raise ValueError("its identifier cannot name a file")
    addresses, rules, percent = table.pop("addresses"), table.pop("files"), table.pop("top1_percent", None)
    hashes = table.pop("sha256", [None] * len(addresses))
    if not len(addresses) == len(rules) == len(hashes):
        raise ValueError(f"{len(addresses)} addresses, {len(rules)} files and {len(hashes)} hashes")
    table |= {
        "id": name,
        "documented_accuracy": None if percent is None else round(percent / 100, 6),
        "preprocessing": {},
        "files": [
            {"address": address, "sha256": sha256, **rule}
            for address, sha256, rule in zip(addresses, hashes, rules, strict=True)
        ],
    }
    entry = _ENTRY.validate_json(
        json.dumps(table)
    )  # strict types take the lists of JSON for tuples, not those of Python
    if (entry.attack_norm is None) != (entry.eps is None):
        raise ValueError(f"attack_norm {entry.attack_norm!r} and eps {entry.eps!r}: expected l2 or linf and a number")
    return entry
