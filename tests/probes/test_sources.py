import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layercrit.errors import ProbeError
from layercrit.probes.classes import integer_label
from layercrit.probes.sources import ArraySource, FolderSource, ImageSource
from packed_images import n_classes_of, origin_of
from photographs import encoded, piece, pieces

rng = np.random.default_rng


def make_folder(root: Path, names: Iterable[str]) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(piece(number)))
    return root


def all_of(source: ImageSource, use_labels: bool = True) -> list[tuple[str, int | None]]:
    items = list(source.read(range(len(source))))
    assert [item.index for item in items] == list(range(len(source)))
    labels = source.labels() if use_labels else None
    return [(source.name(item.index), None if labels is None else labels.numbers[item.index]) for item in items]


# Folders


def test_folder_source__flat_has_no_labels(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, ["b.jpg", "a.JPEG", "c.png", "a10.webp", "a2.tif"]))
    assert all_of(source) == [(name, None) for name in ["a.JPEG", "a10.webp", "a2.tif", "b.jpg", "c.png"]]
    assert (origin_of(source), n_classes_of(source)) == (None, None)


def test_folder_source__class_folders_in_sorted_order(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, ["owl/1.jpg", "cat/2.jpg", "cat/deep/er/3.jpg", "Zebra/1.jpg"]))
    assert all_of(source) == [("Zebra/1.jpg", 0), ("cat/2.jpg", 1), ("cat/deep/er/3.jpg", 1), ("owl/1.jpg", 2)]
    assert origin_of(source) == "positions of the sorted class folders"
    assert n_classes_of(source) == 3
    assert {label for _, label in all_of(source, use_labels=False)} == {None}


def test_folder_source__labels_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    make_folder(tmp_path, ["class2/x.jpg", "class10/y.jpg", "class10/a/z.jpg", "Class1/w.jpg"])
    expected = [(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in ImageFolder(tmp_path).samples]
    assert sorted(expected) == all_of(FolderSource(tmp_path))


def test_folder_source__an_empty_class_folder_counts(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a/1.jpg", "c/1.jpg"])
    (tmp_path / "b").mkdir()
    source = FolderSource(tmp_path)
    assert [label for _, label in all_of(source)] == [0, 2]
    assert n_classes_of(source) == 3


def test_folder_source__wordnet_ids_are_numbers_of_imagenet(tmp_path: Path) -> None:
    # First, second and last class of ImageNet-1k, and the Egyptian cat.
    source = FolderSource(
        make_folder(tmp_path, [f"{n}/1.JPEG" for n in ["n15075141", "n01440764", "n02124075", "n01443537"]])
    )
    assert [label for _, label in all_of(source)] == [0, 1, 285, 999]
    assert origin_of(source) == "ImageNet-1k's numbers of the class folders"
    assert n_classes_of(source) is None


def test_folder_source__other_wordnet_ids_are_positions(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, ["n01440764/1.jpg", "n00000001/1.jpg"]))
    assert all_of(source) == [("n00000001/1.jpg", 0), ("n01440764/1.jpg", 1)]
    assert n_classes_of(source) == 2


def test_folder_source__integers_are_themselves(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, ["10/1.jpg", "2/1.jpg", "007/1.jpg"]))
    assert all_of(source) == [("007/1.jpg", 7), ("10/1.jpg", 10), ("2/1.jpg", 2)]
    assert origin_of(source) == "the integers that name the class folders"
    assert n_classes_of(source) is None


@pytest.mark.parametrize("names", [["a/1.jpg", "b/1.jpg", "1.jpg"], ["images/1.jpg", "images/2.jpg"]])
def test_folder_source__mixed_or_single_folder_has_no_labels(names: list[str], tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, names))
    assert {label for _, label in all_of(source)} == {None}
    assert origin_of(source) is None


def test_folder_source__leaves_out_hidden_and_other_files(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a.jpg", ".b.jpg", ".git/c.jpg", "._a.jpg"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    assert [name for name, _ in all_of(FolderSource(tmp_path))] == ["a.jpg"]


def test_folder_source__follows_links_but_not_in_circles(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "to_b").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "b" / "to_a").symlink_to(tmp_path / "data" / "a")
    make_folder(tmp_path / "elsewhere", ["3.jpg"])
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    names = [name for name, _ in all_of(FolderSource(tmp_path / "data"))]
    assert names == ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg", "c/3.jpg"]


def test_folder_source__missing_folder(tmp_path: Path) -> None:
    make_folder(tmp_path, ["pictures/1.jpg"])
    with pytest.raises(ProbeError, match=r"No such file or folder: '.*picturse'. Did you mean 'pictures'"):
        FolderSource(tmp_path / "picturse")
    with pytest.raises(ProbeError, match=r"The folder '.*nowhere' does not exist either"):
        FolderSource(tmp_path / "nowhere" / "else")


def test_folder_source__no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ProbeError, match=r"no images in the folder '.*'.*suffixes \.bmp.*Accepted: a folder of images"):
        FolderSource(tmp_path)


def test_folder_source__a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"Cannot list the folder '.*1.jpg' \(Not a directory"):
        FolderSource(make_folder(tmp_path, ["1.jpg"]) / "1.jpg")


# Arrays


def pixels_of(source: ImageSource) -> list[np.ndarray]:
    return [np.asarray(item.content) for item in source.read(range(len(source)))]


def test_array_source__axes() -> None:
    images = pieces(4, 16)  # (n_images, height, width, channels)
    grey = images[..., 0]
    for given, expected in [
        (images, images),
        (images.transpose(0, 3, 1, 2), images),
        (images.transpose(0, 3, 1, 2)[:, :, :1], images[:, :1]),  # of height 1
        (grey, grey),
        (grey[..., None], grey),
        (grey[:, None], grey),
        (torch.from_numpy(images).permute(0, 3, 1, 2), images),
    ]:
        assert np.array_equal(pixels_of(ArraySource(given)), expected), given.shape


@pytest.mark.parametrize("shape", [(), (9,), (5, 5), (16, 16, 3), (4, 16, 16, 4), (4, 3, 16, 3), (2, 4, 16, 16, 3)])
def test_array_source__refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ProbeError, match=rf"have the shape {re.escape(str(shape))}; expected \(n_images, height, width\)"
    ):
        ArraySource(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(0, 16, 16, 3), (4, 0, 16)])
def test_array_source__refuses_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProbeError, match="no images in 'array"):
        ArraySource(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint16", "complex64"])
def test_array_source__refuses_types(dtype: str) -> None:
    with pytest.raises(ProbeError, match=rf"pixels of 'array \(2, 8, 8\)' are {dtype}; expected uint8 from 0 to 255"):
        ArraySource(np.zeros((2, 8, 8), dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("how", ["divided", "multiplied"])
def test_array_source__floats_without_loss(dtype: str, how: str) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    floats = levels.astype(dtype)
    floats = floats / floats.dtype.type(255) if how == "divided" else floats * floats.dtype.type(1 / 255)
    assert floats.dtype == dtype
    assert np.array_equal(pixels_of(ArraySource(floats)), levels)
    assert np.array_equal(pixels_of(ArraySource(torch.from_numpy(floats))), levels)


@pytest.mark.parametrize(
    "floats",
    [
        rng(0).random((1, 8, 8)),
        rng(0).standard_normal((1, 8, 8)).astype(np.float32),
        np.full((1, 8, 8), 200.0),
        np.full((1, 8, 8), -1 / 255),
        np.full((1, 8, 8), 256 / 255),
        torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16(),
    ],
    ids=["uniform", "normalised", "0 to 255", "negative", "too large", "bfloat16"],
)
def test_array_source__floats_with_loss(floats: np.ndarray) -> None:
    with pytest.raises(ProbeError, match=r"not multiples of 1/255 from 0 to 1.*Give uint8 from 0 to 255"):
        pixels_of(ArraySource(floats))


@pytest.mark.parametrize(
    ("bad", "text"), [([np.nan], "1 value of the pixels of .* is NaN"), ([np.nan, np.inf], "2 values .* are NaN")]
)
def test_array_source__pixels_that_are_not_finite(bad: list[float], text: str) -> None:
    floats = np.full((1, 8, 8), 0.2)
    floats[0, 3, : len(bad)] = bad
    with pytest.raises(ProbeError, match=text):
        pixels_of(ArraySource(floats))


@pytest.mark.parametrize("image_key", ["images", "x", "arr_0"])
@pytest.mark.parametrize("label_key", ["labels", "y", None])
def test_array_source__keys_of_npz(image_key: str, label_key: str | None, tmp_path: Path) -> None:
    content: dict[str, Any] = {image_key: pieces(3), "other": np.zeros(1)}
    if label_key is not None:
        content[label_key] = np.array([7, 5, 6])
    np.savez_compressed(tmp_path / "x.npz", **content)
    source = ArraySource(tmp_path / "x.npz")
    assert np.array_equal(pixels_of(source), content[image_key])
    expected = [None] * 3 if label_key is None else [7, 5, 6]
    assert all_of(source) == [(f"x.npz[{i}]", label) for i, label in enumerate(expected)]
    assert origin_of(source) == (None if label_key is None else "the array with the images")


def test_array_source__npy_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pieces(3))
    source = ArraySource(str(tmp_path / "x.npy"), labels=[3, 2, 1])
    assert np.array_equal(pixels_of(source), pieces(3))
    assert [label for _, label in all_of(source)] == [3, 2, 1]
    assert isinstance(source._images, np.memmap)


def test_array_source__given_labels_replace_those_of_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pieces(2), labels=[0, 0])
    assert [label for _, label in all_of(ArraySource(tmp_path / "x.npz", torch.tensor([4, 5])))] == [4, 5]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a", "b"], r"no images in '.*': it has 'a', 'b'; expected one of 'images', 'x', 'arr_0'"),
        (["images", "x"], "more than one name for images or labels in .* has 'images', 'x'"),
        (["x", "y", "labels"], "more than one name for images or labels in .* has 'x', 'y', 'labels'"),
    ],
)
def test_array_source__npz_of_unclear_keys(keys: list[str], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{key: pieces(2) for key in keys})
    with pytest.raises(ProbeError, match=message):
        ArraySource(tmp_path / "x.npz")


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_array_source__pickles_are_refused(suffix: str, tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "mark")], object)
    path = tmp_path / f"x{suffix}"
    np.save(path, trap, allow_pickle=True) if suffix == ".npy" else np.savez(path, images=trap)
    with pytest.raises(ProbeError, match=r"Cannot read '.*x\.np.'.*Pickled objects are refused.*plain uint8 arrays"):
        ArraySource(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 20, 300])
def test_array_source__damaged_file(suffix: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    np.save(path, pieces(3)) if suffix == ".npy" else np.savez_compressed(path, images=pieces(3))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ProbeError, match=r"Cannot read '.*x\.np"):
        ArraySource(path)


def test_array_source__damage_inside_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=pieces(9))
    content = bytearray(path.read_bytes())
    content[500:600] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ProbeError, match=r"Cannot read '.*x\.npz'"):
        ArraySource(path)


def test_array_source__missing_file(tmp_path: Path) -> None:
    np.save(tmp_path / "probes.npy", pieces(3))
    with pytest.raises(ProbeError, match=r"No such file or folder: .*Did you mean 'probes.npy'"):
        ArraySource(tmp_path / "probe.npy")


@pytest.mark.parametrize("labels", [[1, 2], [[1, 2], [3, 4], [5, 6]], 5])
def test_array_source__labels_of_wrong_shape(labels: Any) -> None:
    source = ArraySource(pieces(3), labels)
    with pytest.raises(
        ProbeError, match=r"labels of '.*' have the shape \(.*\); expected \(3,\), one per image.*--labels none"
    ):
        all_of(source)
    assert [label for _, label in all_of(source, use_labels=False)] == [None] * 3


# Labels


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), torch.tensor(3), np.array(3)])
def test_integer_label__integers(value: object) -> None:
    label = integer_label(value, "x")
    assert (label, type(label)) == (3, int)


@pytest.mark.parametrize("value", [3.0, "3", None, True, np.bool_(True), np.float32(3), 2**63, np.array([3, 4]), b"3"])
def test_integer_label__others(value: object) -> None:
    with pytest.raises(ProbeError, match=r"Labels must be integers.* that of 'cat.jpg' is .*labels='none'"):
        integer_label(value, "cat.jpg")
