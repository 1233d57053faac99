"""The tables ``[images]`` of a study file, and the probe sets that they name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercrit.declarations import read_table
from layercrit.errors import LayercritError
from layercrit.probes.changes import is_change_alone, plain_source
from layercrit.probes.images import STANDARD, Preprocessing
from layercrit.probes.kinds import named_kind
from layercrit.probes.labelling import is_label_file
from layercrit.study.schema import ImagesTable

__all__ = ["Images", "absolute_source", "images_tables", "pixels_of", "probe_sets_of"]


@dataclass(frozen=True)
class Images:
    """One probe set of a study file.

    Attributes:
        name: its name; None where it is the only one.
        source: where the images come from.
        n_images: how many images to draw.
        labels: whether to use labels; or the file or the column that has them.
        classes: the file with the names of classes in the order of the models' outputs, or None.
    """

    name: str | None
    source: str
    n_images: int
    labels: bool | str
    classes: str | None


def images_tables(tables: Sequence[Any], mistakes: list[str]) -> list[ImagesTable]:
    """Return the tables ``[[images]]``; what a further one does not say is as in the first.

    Args:
        tables: as they were written.
        mistakes: mistakes are added here.
    """
    if not tables or not all(isinstance(table, dict) for table in tables):
        mistakes.append(f"expected a table [images], or tables [[images]], got {tables!r}")
        return [read_table(ImagesTable, {}, "", [])]
    found: list[ImagesTable] = []
    for number, table in enumerate(tables, 1):
        inherited = {key: value for key, value in tables[0].items() if key not in ("name", "source")}
        where = "[images]" if len(tables) == 1 else f"[[images]] no. {number}:"
        found.append(read_table(ImagesTable, inherited | table, where, mistakes))
        if len(tables) > 1 and not table.get("name"):
            mistakes.append(f"{where} has no name, which each of several probe sets needs")
    return found


def probe_sets_of(
    tables: Sequence[ImagesTable], pixels: Preprocessing, folder: Path, mistakes: list[str]
) -> Iterator[Images]:
    """Yield the probe sets that tables name, paths in them absolute.

    Args:
        tables: one or more.
        pixels: how the images of the first become pixels, as those of all must.
        folder: what paths are relative to.
        mistakes: mistakes are added here.
    """
    first, names = tables[0], list[str | None]()
    for table in tables:
        if len(tables) > 1 and table.name in names:
            mistakes.append(f"two probe sets are named {table.name!r}; give one of them another name")
        if table is not first and pixels_of(table, mistakes) != pixels:
            mistakes.append(
                f"the probe set {table.name!r} has other pixels (input_size, resize, interpolation) than the "
                "first: all must have the same. Leave these keys out"
            )
        names.append(table.name)
        of_first = table is not first and is_change_alone(table.source)
        labels = table.labels
        yield Images(
            table.name if len(tables) > 1 else None,
            absolute_source(f"{table.source}:{first.source}" if of_first else table.source, folder),
            table.n_images,
            str(_absolute(labels, folder)) if isinstance(labels, str) and is_label_file(labels) else labels,
            None if table.classes is None else str(_absolute(table.classes, folder)),
        )


def pixels_of(table: ImagesTable, mistakes: list[str]) -> Preprocessing:
    """Return how images become pixels, and note where the numbers are wrong."""
    try:
        return table.preprocessing()
    except LayercritError as error:
        mistakes.append(f"[images] {error}")
        return STANDARD


def absolute_source(source: str, folder: Path) -> str:
    """Make the path in an image source absolute; that of a kind of images with a name is its option ``root``."""
    before, source = plain_source(source)
    if named_kind(source) is not None and not _absolute(source, folder).exists():
        return before + re.sub(r"(?<=[?&]root=)[^&]*", lambda found: str(_absolute(found[0], folder)), source)
    return before + str(_absolute(source, folder))


def _absolute(path: str, folder: Path) -> Path:
    return folder / Path(path).expanduser()
