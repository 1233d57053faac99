"""Encoded images in the files that others pack them in, and what a source reads from them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from layercrit.probes.sources import ImageSource
from photographs import encoded, piece

IMAGES = [encoded(piece(number)) for number in range(10)]


def items_of(
    source: ImageSource, indices: list[int] | None = None, use_labels: bool = True
) -> list[tuple[Any, int | None]]:
    wanted = list(range(len(source))) if indices is None else indices
    items = list(source.read(wanted))
    assert [item.index for item in items] == wanted
    labels = source.labels() if use_labels else None
    return [(item.content, None if labels is None else labels.numbers[item.index]) for item in items]


def origin_of(source: ImageSource) -> str | None:
    labels = source.labels()
    return None if labels is None else labels.classes.origin


def n_classes_of(source: ImageSource) -> int | None:
    labels = source.labels()
    return None if labels is None else labels.classes.n_classes


def write_parquet(
    path: Path, first: int = 0, n_images: int = 10, struct_column: bool = True, row_group_size: int = 3, **columns: Any
) -> Path:
    images: list[Any] = IMAGES[first : first + n_images]
    if struct_column:
        images = [{"bytes": image, "path": f"../../{number}.jpg"} for number, image in enumerate(images)]
    columns = columns or {"image": images, "label": list(range(first, first + n_images))}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def save_dataset(path: Path, n_images: int = 5, label_type: Any = None, **columns: Any) -> Path:
    columns = columns or {
        "image": [{"bytes": image, "path": None} for image in IMAGES[:n_images]],
        "label": [number % 3 for number in range(n_images)],
    }
    features = datasets.Features(
        {
            name: datasets.Image() if "im" in name else label_type or datasets.ClassLabel(names=["a", "b", "c"])
            for name in columns
        }
    )
    datasets.Dataset.from_dict(columns, features).save_to_disk(path)
    return path
