from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from layercrit.errors import ProbeError
from layercrit.probes.hugging_face import HuggingFaceSource
from layercrit.probes.opening import open_source
from layercrit.probes.parquet import ParquetSource
from layercrit.probes.sources import ArraySource, FolderSource
from layercrit.probes.tar import TarSource
from layercrit.probes.torchvision import TorchvisionSource
from packed_images import IMAGES, save_dataset, write_parquet, write_tar
from photographs import pieces, write_fashion_mnist


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
