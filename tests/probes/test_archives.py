import gzip
import io
import json
import re
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from layercrit.errors import ProbeError
from layercrit.probes.archives import (
    HuggingFaceSource,
    ParquetSource,
    TarSource,
    TorchvisionSource,
)
from layercrit.probes.opening import open_source
from layercrit.probes.sources import ArraySource, FolderSource, ImageSource
from photographs import encoded, piece, pieces, write_fashion_mnist

IMAGES = [encoded(piece(number)) for number in range(10)]


def items_of(
    source: ImageSource, indices: list[int] | None = None, use_labels: bool = True
) -> list[tuple[Any, int | None]]:
    wanted = list(range(len(source))) if indices is None else indices
    items = list(source.read(wanted, use_labels))
    assert [item.index for item in items] == wanted
    return [(item.content, item.label) for item in items]


# Parquet


def write_parquet(
    path: Path, first: int = 0, n_images: int = 10, struct_column: bool = True, row_group_size: int = 3, **columns: Any
) -> Path:
    images: list[Any] = IMAGES[first : first + n_images]
    if struct_column:
        images = [{"bytes": image, "path": f"../../{number}.jpg"} for number, image in enumerate(images)]
    columns = columns or {"image": images, "label": list(range(first, first + n_images))}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("struct_column", [True, False])
def test_parquet_source__all_rows(struct_column: bool, tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", struct_column=struct_column))
    assert items_of(source) == [(image, number) for number, image in enumerate(IMAGES)]
    assert items_of(source, use_labels=False) == [(image, None) for image in IMAGES]
    assert source.name(4) == "x.parquet[group 1, row 1]"
    assert source.label_origin == "column 'label'"


@pytest.mark.parametrize("row_group_size", [1, 2, 7, 10])
@pytest.mark.parametrize("indices", [[0], [9], [0, 9], [2, 3], [1, 4, 5, 8], []])
def test_parquet_source__some_rows(indices: list[int], row_group_size: int, tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", row_group_size=row_group_size))
    assert items_of(source, indices) == [(IMAGES[index], index) for index in indices]


def test_parquet_source__rows_of_several_batches_of_one_group(tmp_path: Path) -> None:
    numbers = [f"{number}".encode() for number in range(1000)]
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", row_group_size=1000, image=numbers))
    wanted = [0, 63, 64, 65, 200, 999]
    assert items_of(source, wanted) == [(numbers[index], None) for index in wanted]
    assert source.label_origin is None


def test_parquet_source__only_needed_row_groups_are_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", row_group_size=5)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    first = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
    content[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    source = ParquetSource(path)
    assert items_of(source, [6, 9]) == [(IMAGES[6], 6), (IMAGES[9], 9)]
    with pytest.raises(ProbeError, match=r"Cannot read row group 0 of '.*x.parquet'"):
        items_of(source, [1])


@pytest.mark.parametrize(
    "pattern", ["", "*.parquet", "part-{0..2}.parquet", "part-[0-2].parquet", "{part-0,part-1,part-2}.parquet"]
)
def test_parquet_source__shards(pattern: str, tmp_path: Path) -> None:
    for number, (first, n_images) in enumerate([(0, 4), (4, 1), (5, 5)]):
        write_parquet(tmp_path / f"part-{number}.parquet", first, n_images)
    write_parquet(tmp_path / ".hidden.parquet")
    source = ParquetSource(tmp_path / pattern)
    assert items_of(source) == [(image, number) for number, image in enumerate(IMAGES)]
    assert source.name(5) == "part-2.parquet[group 0, row 0]"


def test_parquet_source__pattern_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_parquet(tmp_path / "deep" / "er" / "x.parquet")
    monkeypatch.chdir(tmp_path / "deep")
    for pattern in ["er/*.parquet", "./**/*.parquet", "../*/er/x.parquet", "er/x.parquet", "er"]:
        assert len(ParquetSource(pattern)) == 10, pattern


def test_parquet_source__a_row_without_bytes_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(IMAGES[0])
    rows = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}, {"bytes": IMAGES[1], "path": None}, None]
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", image=rows))
    (without, _), (content, _), (missing, _) = items_of(source)
    assert content == IMAGES[1]
    assert isinstance(without, ValueError)
    assert isinstance(missing, ValueError)
    assert "holds no bytes" in str(without)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"1"]}, r"no images in '.*x.parquet': it has 'picture'; expected one of 'image', 'img'"),
        ({"image": [b"1"], "img": [b"1"]}, "more than one name for images or labels"),
        ({"image": pa.array([], pa.binary())}, "no images in '.*x.parquet': it has no rows"),
    ],
)
def test_parquet_source__unusable_columns(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=message):
        ParquetSource(write_parquet(tmp_path / "x.parquet", **columns))


def test_parquet_source__labels_that_are_no_integers(tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", image=IMAGES[:2], label=["cat", "dog"]))
    with pytest.raises(ProbeError, match=r"Labels must be integers.*x.parquet\[group 0, row 0\]' is 'cat'"):
        items_of(source)
    assert len(items_of(source, use_labels=False)) == 2


def test_parquet_source__shards_that_differ(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet")
    write_parquet(tmp_path / "2.parquet", image=IMAGES)
    with pytest.raises(ProbeError, match=r"shards of '.*' differ in their columns: .*'image', 'label'.*'image', None"):
        ParquetSource(tmp_path)


def test_parquet_source__no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"hello" * 9)
    with pytest.raises(ProbeError, match=r"Cannot read '.*x.parquet' as Parquet"):
        ParquetSource(tmp_path / "x.parquet")
    with pytest.raises(ProbeError, match=r"No such file or folder: .*y.parquet'. Did you mean 'x.parquet'"):
        ParquetSource(tmp_path / "y.parquet")
    with pytest.raises(ProbeError, match=r"no images: no .parquet file matches '.*y\*.parquet'. Accepted"):
        ParquetSource(tmp_path / "y*.parquet")


# Tar


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_tar_source__labels_in_cls_and_json(tmp_path: Path) -> None:
    members = {
        "a.jpg": IMAGES[0],
        "a.cls": b"07\n",
        "b.json": json.dumps({"label": 3, "width": 5}).encode(),
        "b.JPEG": IMAGES[1],
        "dir/c.png": encoded(piece(2), "PNG"),
        "dir/c.cls": b"-1",
        "dir/c.json": b'{"label": 9}',
        "d.v2.webp": encoded(piece(3), "WEBP"),
        "d.v2.cls": b"12",
        "c.cls": b"99",
        "notes.txt": b"no image",
        "._a.jpg": b"no image",
    }
    source = TarSource(write_tar(tmp_path / "x.tar", members))
    names = ["a.jpg", "b.JPEG", "dir/c.png", "d.v2.webp"]
    assert [source.name(i) for i in range(4)] == [f"x.tar[{name}]" for name in names]
    assert items_of(source) == [(members[name], label) for name, label in zip(names, [7, 3, -1, 12], strict=True)]
    assert {label for _, label in items_of(source, use_labels=False)} == {None}
    assert source.label_origin == "the members *.cls and *.json"


def test_tar_source__long_and_escaping_names_are_only_names(tmp_path: Path) -> None:
    members = {"../../evil.jpg": IMAGES[0], "/etc/evil.jpg": IMAGES[1], f"{'long' * 60}/x.jpg": IMAGES[2]}
    (tmp_path / "in").mkdir()
    source = TarSource(write_tar(tmp_path / "in" / "x.tar", members))
    assert [content for content, _ in items_of(source)] == IMAGES[:3]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_tar_source__links_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind, name in [(tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.DIRTYPE, "dir.jpg")]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with pytest.raises(ProbeError, match=r"no images in '.*x.tar': no member has one of the suffixes .bmp"):
        TarSource(tmp_path / "x.tar")


@pytest.mark.parametrize("pattern", ["", "*.tar", "shard-{008..010}.tar", "shard-{008,009,010}.ta{r}"])
def test_tar_source__shards(pattern: str, tmp_path: Path) -> None:
    for number in range(8, 11):
        # The same keys in each, as some tools write them.
        write_tar(tmp_path / f"shard-{number:03}.tar", {"0.jpg": IMAGES[number - 8], "0.cls": str(number).encode()})
    assert items_of(TarSource(tmp_path / pattern)) == [(IMAGES[i], i + 8) for i in range(3)]


def test_tar_source__a_missing_shard_of_a_range(tmp_path: Path) -> None:
    write_tar(tmp_path / "shard-0.tar", {"0.jpg": IMAGES[0]})
    with pytest.raises(ProbeError, match=r"No such file or folder: '.*shard-1.tar'. Did you mean 'shard-0.tar'"):
        TarSource(tmp_path / "shard-{0..1}.tar")


def test_tar_source__many_members_in_order_of_the_file(tmp_path: Path) -> None:
    members = {f"{(number * 7) % 500:04}.jpg": f"{number}".encode() * number for number in range(500)}
    source = TarSource(write_tar(tmp_path / "x.tar", members))
    assert [content for content, _ in items_of(source)] == list(members.values())
    assert items_of(source, [3, 77]) == [(b"333", None), (b"77" * 77, None)]


def test_tar_source__index_takes_little_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{number}.txt": b"" for number in range(3000)} | {"x.jpg": IMAGES[0]})
    tracemalloc.start()
    try:
        assert len(TarSource(path)) == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500_000, "more than 160 bytes for each member that is no image"


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("0.cls", b"cat", "b'cat'"),
        ("0.cls", b"1.5", "b'1.5'"),
        ("0.json", b'{"label": "cat"}', "'cat'"),
        ("0.json", b"{", "b'{'"),
    ],
)
def test_tar_source__labels_that_are_no_integers(name: str, content: bytes, shown: str, tmp_path: Path) -> None:
    source = TarSource(write_tar(tmp_path / "x.tar", {"0.jpg": IMAGES[0], name: content}))
    with pytest.raises(ProbeError, match=rf"Labels must be integers.*'x.tar\[{name}\]' is {re.escape(shown)}"):
        items_of(source)
    assert items_of(source, use_labels=False) == [(IMAGES[0], None)]


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"label": null}'])
def test_tar_source__json_without_label(content: bytes, tmp_path: Path) -> None:
    source = TarSource(write_tar(tmp_path / "x.tar", {"0.jpg": IMAGES[0], "0.json": content}))
    assert items_of(source) == [(IMAGES[0], None)]


def test_tar_source__compressed_or_damaged(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", {f"{i}.jpg": IMAGES[i] for i in range(10)}).read_bytes()
    (tmp_path / "gz.tar").write_bytes(gzip.compress(whole))
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    for name in ("gz.tar", "cut.tar"):
        with pytest.raises(ProbeError, match=rf"Cannot read '.*{name}' as an uncompressed tar file.*decompress a"):
            TarSource(tmp_path / name)


# Data sets of the datasets library


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


def test_hugging_face_source__images_and_labels(tmp_path: Path) -> None:
    source = HuggingFaceSource(save_dataset(tmp_path / "cats"))
    assert items_of(source) == [(IMAGES[number], number % 3) for number in range(5)]
    assert items_of(source, [1, 4], use_labels=False) == [(IMAGES[1], None), (IMAGES[4], None)]
    assert (source.n_classes, source.label_origin, source.name(2)) == (3, "column 'label'", "cats[2]")


def test_hugging_face_source__columns_by_type(tmp_path: Path) -> None:
    rows = [{"bytes": image, "path": None} for image in IMAGES[:3]]
    path = save_dataset(tmp_path / "x", image_left=rows, image_right=rows)
    with pytest.raises(ProbeError, match=r"no images in the columns of '.*x'"):
        HuggingFaceSource(path)
    source = HuggingFaceSource(save_dataset(tmp_path / "y", imago=rows, breed=[2, 1, 0]))
    assert items_of(source) == [(IMAGES[0], 2), (IMAGES[1], 1), (IMAGES[2], 0)]


def test_hugging_face_source__encoded_bytes_without_image_type(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"img": IMAGES[:2], "labels": [5, 6]}).save_to_disk(tmp_path / "x")
    source = HuggingFaceSource(tmp_path / "x")
    assert items_of(source) == [(IMAGES[0], 5), (IMAGES[1], 6)]
    assert source.n_classes is None


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_hugging_face_source__format_of_the_saved_set_does_not_matter(kind: str, tmp_path: Path) -> None:
    datasets.load_from_disk(save_dataset(tmp_path / "x")).with_format(kind).save_to_disk(tmp_path / "y")
    assert items_of(HuggingFaceSource(tmp_path / "y")) == items_of(HuggingFaceSource(tmp_path / "x"))


def test_hugging_face_source__splits(tmp_path: Path) -> None:
    one = datasets.load_from_disk(save_dataset(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    with pytest.raises(ProbeError, match=r"contains several splits; give one of them: .*two/test, .*two/train"):
        HuggingFaceSource(tmp_path / "two")
    assert len(HuggingFaceSource(tmp_path / "two" / "test")) == 5


def test_hugging_face_source__not_on_disk(tmp_path: Path) -> None:
    with pytest.raises(
        ProbeError, match=r"'.*' is not a data set that the datasets library wrote.*Nothing is downloaded"
    ):
        HuggingFaceSource(tmp_path)
    with pytest.raises(ProbeError, match=r"No such file or folder: 'uoft-cs/cifar10'. .*Images are never downloaded"):
        HuggingFaceSource("uoft-cs/cifar10")


def test_hugging_face_source__damaged_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"Cannot read the data set '.*empty'"):
        HuggingFaceSource(save_dataset(tmp_path / "empty", 0))
    path = save_dataset(tmp_path / "x")
    for file in path.glob("*.arrow"):
        file.write_bytes(b"hello")
    with pytest.raises(ProbeError, match=r"Cannot read the data set '.*x'"):
        HuggingFaceSource(path)


def test_hugging_face_source__without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_dataset(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ProbeError, match=r"requires the datasets library.*pip install 'layercrit\[hf\]'"):
        HuggingFaceSource(path)


def test_hugging_face_source__labels_that_are_no_integers(tmp_path: Path) -> None:
    rows = [{"bytes": IMAGES[0], "path": None}]
    source = HuggingFaceSource(save_dataset(tmp_path / "x", 1, datasets.Value("string"), image=rows, label=["cat"]))
    with pytest.raises(ProbeError, match=r"Labels must be integers.*'x\[0\]' is 'cat'"):
        items_of(source)


# Data sets of torchvision


def test_torchvision_source__fashion_mnist(tmp_path: Path) -> None:
    images, labels = write_fashion_mnist(tmp_path)
    for source in [
        TorchvisionSource("FashionMNIST", tmp_path),
        TorchvisionSource.from_text(f"torchvision:FashionMNIST?root={tmp_path}&split=test"),
        TorchvisionSource.from_text(f"torchvision:FashionMNIST?root={tmp_path}"),
    ]:
        assert [np.asarray(image).tolist() for image, _ in items_of(source)] == images.tolist()
        assert [label for _, label in items_of(source)] == labels
        assert [label for _, label in items_of(source, use_labels=False)] == [None] * 6
        assert (source.n_classes, source.label_origin) == (10, "the targets of torchvision's FashionMNIST")
    train = TorchvisionSource("FashionMNIST", tmp_path, "train")
    assert [label for _, label in items_of(train)] == [0, 1, 2, 3, 4, 5]
    assert train.name(3) == "FashionMNIST/train[3]"


def test_torchvision_source__a_damaged_image_is_given_as_its_error(tmp_path: Path) -> None:
    root = tmp_path / "SUN397"
    for number, name in enumerate(("abbey", "airport")):
        (root / "a" / name).mkdir(parents=True)
        (root / "a" / name / "sun_x.jpg").write_bytes(IMAGES[number][: 500 if number else None])
    (root / "ClassName.txt").write_text("/a/abbey\n/a/airport\n")
    items = items_of(TorchvisionSource("SUN397", tmp_path))
    assert sorted((isinstance(content, OSError), label) for content, label in items) == [(False, 0), (True, None)]


def test_torchvision_source__files_are_not_decoded(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(IMAGES[number])
        (tmp_path / name / "y.jpg").write_bytes(b"no image")
    source = TorchvisionSource("ImageFolder", tmp_path)
    files = [tmp_path / name / file for name in ("cat", "dog") for file in ("x.jpg", "y.jpg")]
    assert items_of(source) == list(zip(files, [0, 0, 1, 1], strict=True))
    assert items_of(source, use_labels=False) == [(file, None) for file in files]
    assert [(item.index, item.content) for item in source.read([1, 2], True)] == [(1, files[1]), (2, files[2])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:FashionMINST?root={}", "torchvision has no data set 'FashionMINST'.*Did you mean 'FashionMNIST'"),
        ("torchvision:FakeData?root={}", "torchvision has no data set 'FakeData' that reads a folder"),
        (
            "torchvision:MNIST",
            "Cannot read 'torchvision:MNIST': expected 'torchvision:NAME.root=PATH', optionally with '&split",
        ),
        ("torchvision:MNIST?root={}&download=1", "Cannot read .*: expected 'torchvision:NAME"),
        ("torchvision:MNIST?root={}", "cannot open MNIST in '.*Dataset not found.*never downloaded"),
        ("torchvision:MNIST?root={}/none", "No such file or folder: '.*none'"),
        ("torchvision:MNIST?root={}&split=val", "MNIST has no split 'val': it has 'train' and 'test'"),
        ("torchvision:STL10?root={}&split=val", "cannot open STL10 .*Unknown value 'val' for argument split"),
        ("torchvision:SUN397?root={}&split=test", "SUN397 has no split 'test': it has no splits"),
        ("torchvision:DatasetFolder?root={}", "cannot open DatasetFolder .*loader"),
    ],
)
def test_torchvision_source__not_there(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=message):
        TorchvisionSource.from_text(text.format(tmp_path))


def test_torchvision_source__never_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a download was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("CIFAR10", "MNIST", "SVHN", "STL10", "Food101", "Flowers102", "OxfordIIITPet"):
        with pytest.raises(ProbeError, match=f"cannot open {name} in"):
            TorchvisionSource(name, tmp_path)


def test_torchvision_source__no_classification(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for name, content in [
        ("JPEGImages/1.jpg", IMAGES[0]),
        ("Annotations/1.xml", b"<annotation><object><name>cat</name></object></annotation>"),
        ("ImageSets/Main/train.txt", b"1"),
    ]:
        (voc / name).parent.mkdir(parents=True)
        (voc / name).write_bytes(content)
    source = TorchvisionSource("VOCDetection", tmp_path)
    assert len(items_of(source, use_labels=False)) == 1
    with pytest.raises(ProbeError, match=r"Labels must be integers.*VOCDetection\[0\]"):
        items_of(source)


def test_torchvision_source__no_images(tmp_path: Path) -> None:
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 2, 64, 64), np.uint8))
    with pytest.raises(ProbeError, match=r"MovingMNIST.*' does not return pairs of image and label"):
        items_of(TorchvisionSource("MovingMNIST", tmp_path))


# What a source is


def test_open_source__by_content(tmp_path: Path) -> None:
    for name in ("flat", "classes/a", "classes/b", "parquet", "tar"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("flat/1.jpg", "classes/a/1.jpg", "classes/b/1.jpg"):
        (tmp_path / name).write_bytes(IMAGES[0])
    write_parquet(tmp_path / "parquet" / "x.parquet")
    write_tar(tmp_path / "tar" / "x.tar", {"1.jpg": IMAGES[0]})
    write_tar(tmp_path / "classes" / "original.tar", {"1.jpg": IMAGES[0]})
    np.save(tmp_path / "x.npy", pieces(2))
    np.savez(tmp_path / "x.npz", x=pieces(2))
    save_dataset(tmp_path / "hf")
    write_fashion_mnist(tmp_path)
    for given, kind in [
        ("flat", FolderSource),
        ("classes", FolderSource),
        ("parquet", ParquetSource),
        ("parquet/x.parquet", ParquetSource),
        ("parquet/*.parquet", ParquetSource),
        ("tar", TarSource),
        ("tar/{x,x}.tar", TarSource),
        ("x.npy", ArraySource),
        ("x.npz", ArraySource),
        ("hf", HuggingFaceSource),
    ]:
        for path in (tmp_path / given, str(tmp_path / given)):
            source = open_source(path)
            assert type(source) is kind, given
            assert source.description == str(path)
    assert type(open_source(f"torchvision:FashionMNIST?root={tmp_path}")) is TorchvisionSource
    assert type(open_source(pieces(2))) is ArraySource
    assert type(open_source(torch.zeros(2, 3, 8, 8))) is ArraySource


def test_open_source__home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", pieces(2))
    write_parquet(tmp_path / "x.parquet")
    assert len(open_source("~/x.npy")) == 2
    assert len(open_source("~/*.parquet")) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", r"Cannot read images from '.*x.txt': unknown file type. Accepted: a folder of images.*\.npz"),
        ("x.jpg", "unknown file type.*For a single image, give its folder"),
        ("x.tar.gz", "unknown file type.*decompress it first"),
        ("x.tgz", "unknown file type.*decompress it first"),
        ("x.text", "No such file or folder: .*Did you mean 'x.txt'"),
        ("*.jpg", r"No such file or folder: '.*\*.jpg'"),
    ],
)
def test_open_source__unknown(name: str, message: str, tmp_path: Path) -> None:
    for file in ("x.txt", "x.jpg", "x.tar.gz", "x.tgz"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ProbeError, match=message):
        open_source(tmp_path / name)


def test_open_source__no_path() -> None:
    with pytest.raises(ProbeError, match="Cannot read images from an object of type list"):
        open_source([1, 2])


def test_open_source__two_kinds_of_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    write_tar(tmp_path / "x.tar", {})
    with pytest.raises(ProbeError, match=r"contains both .parquet and .tar files.*such as '.*/\*.tar'"):
        open_source(tmp_path)


def test_open_source__several_splits(tmp_path: Path) -> None:
    one = datasets.load_from_disk(save_dataset(tmp_path / "one"))
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "two")
    with pytest.raises(ProbeError, match=r"give one of them: .*two/train"):
        open_source(tmp_path / "two")


def test_open_source__empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no images in the folder"):
        open_source(tmp_path)
