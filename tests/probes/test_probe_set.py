import errno
import gc
import hashlib
import inspect
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from layercrit.errors import ProbeError
from layercrit.probes.images import Preprocessing, open_image
from layercrit.probes.probe_set import ProbeOptions, ProbeSet
from layercrit.probes.sources import FolderSource, ImageSource, Item
from photographs import encoded, piece, pieces, write_fashion_mnist

SMALL = Preprocessing(3, 24, 24, 28)
TAKEN = Preprocessing(3, 16, 16, 20)  # for arrays of this size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 40 images in 4 classes, of all kinds of files."""
    root = tmp_path / "folder"
    kinds = ["JPEG", "PNG", "WEBP", "BMP"]
    for number in range(40):
        kind = kinds[number % 4]
        path = root / "dcab"[number % 4] / f"{number}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(piece(number), kind))
    return root


def cut_off(folder: Path, name: str) -> str:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    return name


def twin_hash(probe_set: ProbeSet) -> str:
    """The identity as it is defined, all at once."""
    images, labels = np.array(probe_set.images), probe_set.labels
    text = json.dumps({"shape": list(images.shape), "labels": labels is not None})
    return hashlib.sha256(
        text.encode() + images.tobytes() + (b"" if labels is None else labels.astype("<i8").tobytes())
    ).hexdigest()


def assert_begins_like(short: ProbeSet, long: ProbeSet) -> None:
    n = short.n_images
    assert np.array_equal(short.images, long.images[:n])
    assert short.names == long.names[:n]
    assert (short.labels is None) == (long.labels is None)
    if short.labels is not None and long.labels is not None:
        assert np.array_equal(short.labels, long.labels[:n])


# The draw


def test_probe_set__images_are_the_preprocessed_files(folder: Path) -> None:
    probe_set = ProbeSet.from_folder(folder, SMALL, n_images=None)
    assert probe_set.n_images == 40
    assert (probe_set.images.shape, probe_set.images.dtype) == ((40, 3, 24, 24), np.uint8)
    assert sorted(probe_set.names) == FolderSource(folder)._names
    assert probe_set.labels is not None
    assert probe_set.labels.dtype == np.int64
    for pixels, name, label in zip(probe_set.images, probe_set.names, probe_set.labels, strict=True):
        assert np.array_equal(pixels, SMALL(open_image(folder / name)))
        assert label == "abcd".index(name[0])
    assert probe_set.skipped == ()
    assert probe_set.source == str(folder)
    assert probe_set.classes is not None
    assert probe_set.classes.n_classes == 4


def test_probe_set__fewer_images_are_the_beginning_of_more(folder: Path) -> None:
    whole = ProbeSet.from_folder(folder, SMALL, n_images=None, seed=3)
    for n_images in (1, 2, 17, 39, 40, 41, 10_000):
        part = ProbeSet.from_folder(folder, SMALL, n_images=n_images, seed=3)
        assert part.n_images == min(n_images, 40)
        assert_begins_like(part, whole)


def test_probe_set__the_beginning_also_where_images_are_unreadable(folder: Path) -> None:
    order = ProbeSet.from_folder(folder, SMALL, n_images=None).names
    broken = [cut_off(folder, order[position]) for position in (0, 1, 5, 10, 11, 25, 39)]
    readable = [name for name in order if name not in broken]
    whole = ProbeSet.from_folder(folder, SMALL, n_images=None, max_unreadable=1)
    assert list(whole.names) == readable
    assert [line.partition(": ")[0] for line in whole.skipped] == broken
    for n_images in (1, 5, 6, 9, 20, 32, 33, 34):
        part = ProbeSet.from_folder(folder, SMALL, n_images=n_images, max_unreadable=1)
        assert part.n_images == min(n_images, 33)
        assert_begins_like(part, whole)
        assert part.skipped == whole.skipped[: len(part.skipped)]
        for pixels, name in zip(part.images, part.names, strict=True):
            assert np.array_equal(pixels, SMALL(open_image(folder / name)))


def test_probe_set__same_seed_same_bits_other_seed_other_order(folder: Path) -> None:
    first, again, other = (ProbeSet.from_folder(folder, SMALL, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images)
    assert first.sha256 == again.sha256
    assert first.names == again.names
    assert first.names != other.names
    assert sorted(first.names) == sorted(other.names)
    assert first.sha256 != other.sha256


def test_probe_set__order_is_a_fixed_function_of_number_and_seed() -> None:
    names = ProbeSet.from_array(pieces(8), TAKEN, seed=0).names
    # Written down when this was made: published probe sets depend on it.
    assert [int(name[-2]) for name in names] == [4, 5, 6, 0, 7, 3, 2, 1]
    word = int.from_bytes(hashlib.sha256(b'["probe set", 0]').digest()[:8], "big")
    words = np.random.PCG64(word).random_raw(8).tolist()
    assert sorted(range(8), key=lambda index: words[index]) == [4, 5, 6, 0, 7, 3, 2, 1]


def test_probe_set__every_position_is_equally_likely() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((5, 2, 2), np.uint8)
    model = Preprocessing(1, 2, 2, None)
    counts = np.zeros((5, 5))  # (position, image)
    for seed in range(1000):
        drawn = ProbeSet.from_array(images, model, seed=seed, n_threads=1).images[:, 0, 0, 0]
        counts[np.arange(5), drawn] += 1
    # 200 expected in each cell, with a standard deviation of 12.6.
    assert np.abs(counts - 200).max() < 5 * 12.6


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8, None])
def test_probe_set__independent_of_threads(n_threads: int | None, folder: Path) -> None:
    for name in ("d/0.jpeg", "a/1.png"):
        if (folder / name).exists():
            cut_off(folder, name)
    one = ProbeSet.from_folder(folder, SMALL, n_images=30, n_threads=1, max_unreadable=1)
    other = ProbeSet.from_folder(folder, SMALL, n_images=30, n_threads=n_threads, max_unreadable=1)
    assert one.sha256 == other.sha256
    assert (one.names, one.skipped) == (other.names, other.skipped)


def test_probe_set__independent_of_where_it_lies(folder: Path, tmp_path: Path) -> None:
    in_memory = ProbeSet.from_folder(folder, SMALL)
    folder.rename(tmp_path / "elsewhere")
    in_file = ProbeSet.from_folder(tmp_path / "elsewhere", SMALL, memory_limit=0)
    assert in_memory.sha256 == in_file.sha256
    assert in_memory.names == in_file.names


def test_probe_set__leaves_random_generators_and_threads_as_found(folder: Path) -> None:
    threads = threading.active_count()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    ProbeSet.from_folder(folder, SMALL)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after
    assert threading.active_count() == threads


def test_probe_set__progress(folder: Path) -> None:
    order = ProbeSet.from_folder(folder, SMALL, n_images=None).names
    for position in (0, 7):
        cut_off(folder, order[position])
    calls: list[tuple[int, int]] = []
    here = threading.get_ident()

    def progress(done: int, wanted: int) -> None:
        assert threading.get_ident() == here
        calls.append((done, wanted))

    ProbeSet.from_folder(folder, SMALL, n_images=20, max_unreadable=0.5, progress=progress)
    assert calls == [(done, 20) for done in range(1, 21)]


def test_probe_set__an_exception_in_progress_ends_the_draw(folder: Path) -> None:
    def stop(done: int, wanted: int) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        ProbeSet.from_folder(folder, SMALL, progress=stop, memory_limit=0)
    gc.collect()
    assert threading.active_count() == threads


@pytest.mark.parametrize("n_images", [0, -1])
def test_probe_set__number_of_images(n_images: int, folder: Path) -> None:
    with pytest.raises(ProbeError, match=f"n_images must be a positive number, or None for all images; got {n_images}"):
        ProbeSet.from_folder(folder, SMALL, n_images=n_images)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_probe_set__share(share: float, folder: Path) -> None:
    with pytest.raises(ProbeError, match=r"max_unreadable must be a share in \[0, 1\]; got"):
        ProbeSet.from_folder(folder, SMALL, max_unreadable=share)


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_probe_set__copies(memory_limit: int) -> None:
    """Of two images in three hundred nothing is said, of four as much as there is to say."""
    images = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), np.uint8)
    images[[5, 17]] = images[40]
    assert not ProbeSet.from_source(images, TAKEN, memory_limit=memory_limit).notes
    images[[70, 71]] = images[[5, 80]]
    (note,) = ProbeSet.from_source(images, TAKEN, memory_limit=memory_limit).notes
    assert note.startswith("4 of the 300 images are copies of others, pixel by pixel")


def test_probe_set__number_of_threads(folder: Path) -> None:
    with pytest.raises(ProbeError, match="n_threads must be a positive number, or None; got 0"):
        ProbeSet.from_folder(folder, SMALL, n_threads=0)


def test_probe_set__options_are_those_of_from_source() -> None:
    parameters = inspect.signature(ProbeSet.from_source).parameters
    keywords = [name for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY]
    assert {*keywords} == ProbeOptions.__required_keys__ | ProbeOptions.__optional_keys__


# Unreadable images


def test_probe_set__too_many_unreadable(folder: Path) -> None:
    order = ProbeSet.from_folder(folder, SMALL, n_images=None).names
    broken = [cut_off(folder, name) for name in order[:4]]
    for n_images, tried in [(None, 40), (36, 40), (10, 14)]:
        with pytest.raises(ProbeError) as caught:
            ProbeSet.from_folder(folder, SMALL, n_images=n_images)
        text = str(caught.value)
        assert f"4 of {tried} images of '{folder}' are unreadable, more than max_unreadable=0.05 allows" in text
        assert [name in text for name in broken] == [True, True, True, False]
        assert "and 1 more. Repair or remove them" in text
    assert ProbeSet.from_folder(folder, SMALL, max_unreadable=4 / 40).n_images == 36
    with pytest.raises(ProbeError, match=r"max_unreadable=0.099"):
        ProbeSet.from_folder(folder, SMALL, max_unreadable=0.099)
    with pytest.raises(ProbeError, match="max_unreadable=0 allows"):
        ProbeSet.from_folder(folder, SMALL, max_unreadable=0)


def test_probe_set__stops_early_when_all_is_unreadable(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.jpg").write_bytes(b"damaged")
    read: list[int] = []

    class Counted(FolderSource):
        def read(self, indices: Any) -> Any:
            read.extend(indices)
            return super().read(indices)

    with pytest.raises(
        ProbeError, match=r"10 of 20 images .* are unreadable.*: not an image in one of the formats BMP"
    ):
        ProbeSet.from_source(Counted(tmp_path), SMALL, n_images=10)
    assert len(read) == 10


def test_probe_set__no_readable_image(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"damaged")
    with pytest.raises(ProbeError, match=r"No image in '.*' can be read: 1.jpg: not an image"):
        ProbeSet.from_folder(tmp_path, SMALL, max_unreadable=1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to(path.parent / "nothing"), "No such file"),
        (lambda path: path.write_bytes(b""), "not an image in one of the formats"),
        (lambda path: path.write_bytes(encoded(Image.new("F", (9, 9)), "TIFF")), "its pixels are floats"),
        (lambda path: path.write_bytes(encoded(Image.new("L", (99999, 1)), "PNG")), "would be resized to 28 x 2799972"),
        (lambda path: path.write_bytes(bomb()), "decompression bomb"),
    ],
    ids=["broken link", "empty", "floats", "thin", "bomb"],
)
def test_probe_set__reasons(
    make: Callable[[Path], Any], reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    make(folder / "x.jpg")
    probe_set = ProbeSet.from_folder(folder, SMALL)
    assert probe_set.n_images == 40
    (line,) = probe_set.skipped
    assert line.startswith("x.jpg: ")
    assert reason in line


def bomb() -> bytes:
    content = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    content[18:26] = (2000).to_bytes(4, "little") * 2  # width and height in the header
    return bytes(content)


def test_probe_set__lack_of_memory_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(MemoryError):
        ProbeSet.from_folder(folder, SMALL, max_unreadable=1)


# Arrays


def test_probe_set__arrays_at_the_models_size_are_taken_as_they_are() -> None:
    images = pieces(6)  # (n_images, height, width, channels)
    for given in (images, images.transpose(0, 3, 1, 2), (images / np.float32(255)), torch.from_numpy(images)):
        probe_set = ProbeSet.from_array(given, TAKEN)
        order = [int(name.partition("[")[2][:-1]) for name in probe_set.names]
        assert np.array_equal(probe_set.images, images.transpose(0, 3, 1, 2)[order])


def test_probe_set__arrays_of_another_size_go_through_the_preprocessing() -> None:
    images = pieces(3, 30)
    probe_set = ProbeSet.from_array(images, SMALL)
    for pixels, name in zip(probe_set.images, probe_set.names, strict=True):
        assert np.array_equal(pixels, SMALL(Image.fromarray(images[int(name[-2])])))


def test_probe_set__arrays_change_their_channels() -> None:
    images = pieces(3)
    grey = ProbeSet.from_array(images[..., 0], TAKEN)
    assert grey.images.shape == (3, 3, 16, 16)
    assert np.array_equal(grey.images[:, 0], grey.images[:, 2])
    assert np.array_equal(np.sort(grey.images[:, 1], axis=0), np.sort(images[..., 0], axis=0))
    colour = ProbeSet.from_array(images, Preprocessing(1, 16, 16, 20))
    for pixels, name in zip(colour.images, colour.names, strict=True):
        assert np.array_equal(pixels[0], np.asarray(Image.fromarray(images[int(name[-2])]).convert("L")))


def test_probe_set__arrays_with_labels(tmp_path: Path) -> None:
    labels = np.arange(6, dtype=np.int16) * 10
    np.savez(tmp_path / "x.npz", images=pieces(6), labels=labels)
    for probe_set in (
        ProbeSet.from_array(pieces(6), TAKEN, labels),
        ProbeSet.from_array(tmp_path / "x.npz", TAKEN),
        ProbeSet.from_source(tmp_path / "x.npz", TAKEN),
    ):
        assert probe_set.labels is not None
        assert probe_set.labels.tolist() == [int(name[-2]) * 10 for name in probe_set.names]
    assert ProbeSet.from_array(pieces(6), TAKEN, "none").labels is None


def test_probe_set__is_not_changed_with_its_array() -> None:
    images, labels = pieces(6), np.arange(6)
    probe_set = ProbeSet.from_array(images, TAKEN, labels)
    before = probe_set.images.copy()
    images[:], labels[:] = 0, 0
    assert np.array_equal(probe_set.images, before)
    assert probe_set.sha256 == twin_hash(probe_set)


# Other sources: the same images and labels, however they are packed


def test_probe_set__same_images_from_every_source(tmp_path: Path) -> None:
    files = [encoded(piece(number), "PNG") for number in range(12)]
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, content in enumerate(files):
            (tmp_path / "folder" / str(number)).mkdir()
            (tmp_path / "folder" / str(number) / "x.png").write_bytes(content)
            for suffix, data in [("png", content), ("cls", str(number).encode())]:
                member = tarfile.TarInfo(f"{number:02}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    rows = [{"bytes": content, "path": None} for content in files]
    pq.write_table(pa.table({"image": rows, "label": range(12)}), tmp_path / "x.parquet", row_group_size=5)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": rows, "label": range(12)}, features).save_to_disk(tmp_path / "hf")
    stacked = np.stack([np.asarray(piece(number)) for number in range(12)])
    sets = [
        ProbeSet.from_array(stacked, SMALL, range(12)),
        ProbeSet.from_tar(tmp_path / "x.tar", SMALL),
        ProbeSet.from_parquet(tmp_path / "x.parquet", SMALL),
        ProbeSet.from_huggingface(tmp_path / "hf", SMALL),
        *(ProbeSet.from_source(tmp_path / name, SMALL) for name in ("x.tar", "x.parquet", "hf")),
    ]
    assert len({probe_set.sha256 for probe_set in sets}) == 1
    assert all(probe_set.labels is not None for probe_set in sets)
    # Folders are sorted by name, so the same images come in another order.
    by_label = ProbeSet.from_source(tmp_path / "folder", SMALL)
    assert by_label.labels is not None
    assert sets[0].labels is not None
    assert np.array_equal(by_label.images[by_label.labels.argsort()], sets[0].images[sets[0].labels.argsort()])


def test_probe_set__fashion_mnist_of_torchvision(tmp_path: Path) -> None:
    images, labels = write_fashion_mnist(tmp_path)
    model = Preprocessing(1, 28, 28, None)
    by_name = ProbeSet.from_torchvision("FashionMNIST", tmp_path, model, "test")
    by_text = ProbeSet.from_source(f"torchvision:FashionMNIST?root={tmp_path}&split=test", model)
    assert by_name.sha256 == by_text.sha256
    order = [int(name[-2]) for name in by_name.names]
    assert np.array_equal(by_name.images[:, 0], images[order])
    assert by_name.labels is not None
    assert by_name.labels.tolist() == [labels[index] for index in order]


def test_probe_set__damaged_image_in_a_shard(tmp_path: Path) -> None:
    files = [encoded(piece(number)) for number in range(30)]
    files[7] = files[7][:300]
    pq.write_table(pa.table({"image": files}), tmp_path / "x.parquet", row_group_size=4)
    probe_set = ProbeSet.from_source(tmp_path / "x.parquet", SMALL)
    assert probe_set.n_images == 29
    assert probe_set.skipped[0].startswith("x.parquet[group 1, row 3]: ")


def test_probe_set__own_source() -> None:
    class Grey(ImageSource):
        description = "levels of grey"

        def __len__(self) -> int:
            return 5

        def name(self, index: int) -> str:
            return f"level {index}"

        def read(self, indices: Any) -> Any:
            assert list(indices) == sorted(indices)
            for index in indices:
                yield Item(index, Image.new("L", (8, 8), index))

    probe_set = ProbeSet.from_source(Grey(), Preprocessing(1, 8, 8, None))
    assert [f"level {level}" for level in probe_set.images[:, 0, 0, 0]] == list(probe_set.names)


# A probe set as a source


def test_from_source__probe_set_is_returned_as_it_is(folder: Path) -> None:
    probe_set = ProbeSet.from_folder(folder, SMALL)
    assert ProbeSet.from_source(probe_set, Preprocessing(3, 24, 24, 24)) is probe_set
    with pytest.raises(ProbeError, match=r"has images of \(3, 24, 24\) .*, but \(3, 224, 224\) are asked for"):
        ProbeSet.from_source(probe_set)


# Identity


def test_sha256__is_the_hash_of_shape_pixels_and_labels(folder: Path) -> None:
    for options in ({}, {"memory_limit": 0}, {"labels": "none"}):
        probe_set = ProbeSet.from_folder(folder, SMALL, **options)
        assert probe_set.sha256 == twin_hash(probe_set)


def test_sha256__of_more_than_one_block() -> None:
    images = np.random.default_rng(0).integers(0, 256, (700, 160, 160), np.uint8)  # 17 MiB
    probe_set = ProbeSet.from_array(images, Preprocessing(1, 160, 160, None), memory_limit=0)
    assert probe_set.sha256 == twin_hash(probe_set)


def test_sha256__tells_apart() -> None:
    images, labels = pieces(4), [1, 2, 3, 4]
    wide = Preprocessing(3, 8, 32, None)
    changed = images.copy()
    changed[2, 3, 4, 1] ^= 1
    hashes = [
        ProbeSet.from_array(images, TAKEN).sha256,
        ProbeSet.from_array(images, TAKEN, labels).sha256,
        ProbeSet.from_array(images, TAKEN, [1, 2, 3, 5]).sha256,
        ProbeSet.from_array(changed, TAKEN).sha256,
        ProbeSet.from_array(images, TAKEN, n_images=3).sha256,
        ProbeSet.from_array(images.reshape(4, 8, 32, 3), wide).sha256,
    ]
    assert len(set(hashes)) == len(hashes)


# Batches, memory and files


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_batch__copies(memory_limit: int, folder: Path) -> None:
    probe_set = ProbeSet.from_folder(folder, SMALL, memory_limit=memory_limit)
    whole = np.array(probe_set.images)
    for start, stop in [(0, 1), (0, 40), (5, 17), (39, 40), (32, 48)]:
        batch = probe_set.batch(start, stop)
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous()
        assert np.array_equal(batch.numpy(), whole[start:stop])
        batch.zero_()
    assert np.array_equal(probe_set.images, whole)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3), (40, 50)])
def test_batch__out_of_range(start: int, stop: int, folder: Path) -> None:
    with pytest.raises(ProbeError, match=f"no images {start} to {stop} in a probe set of 40 images"):
        ProbeSet.from_folder(folder, SMALL).batch(start, stop)


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_probe_set__is_read_only(memory_limit: int, folder: Path) -> None:
    probe_set = ProbeSet.from_folder(folder, SMALL, memory_limit=memory_limit)
    assert probe_set.labels is not None
    for array in (probe_set.images, probe_set.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        probe_set.seed = 1  # type: ignore[misc]
    assert "array" not in repr(probe_set)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def test_probe_set__file_goes_with_it(temporary: Path) -> None:
    size = 6 * 3 * 16 * 16
    assert isinstance(ProbeSet.from_array(pieces(6), TAKEN, memory_limit=size).images, np.ndarray)
    assert list(temporary.iterdir()) == []
    probe_set = ProbeSet.from_array(pieces(6), TAKEN, memory_limit=size - 1)
    assert isinstance(probe_set.images, np.memmap)
    assert [path.stat().st_size for path in temporary.iterdir()] == [size]
    del probe_set
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_probe_set__file_goes_after_an_error(temporary: Path, folder: Path) -> None:
    cut_off(folder, "d/0.jpeg")
    with pytest.raises(ProbeError, match="unreadable"):
        ProbeSet.from_folder(folder, SMALL, memory_limit=0, max_unreadable=0)
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_probe_set__file_goes_with_the_process_but_not_with_a_fork(temporary: Path) -> None:
    code = f"""
import os, sys, tempfile
import numpy as np
from layercrit.probes import Preprocessing, ProbeSet
tempfile.tempdir = {str(temporary)!r}
probe_set = ProbeSet.from_array(np.ones((6, 8, 8), np.uint8), Preprocessing(1, 8, 8, None), memory_limit=0)
if os.fork() == 0:
    del probe_set
    sys.exit()
os.wait()
print(len(os.listdir({str(temporary)!r})), probe_set.batch(0, 6).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", str(6 * 64)]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_probe_set__survives_pickling(memory_limit: int, temporary: Path) -> None:
    probe_set = ProbeSet.from_array(pieces(6), TAKEN, range(6), memory_limit=memory_limit)
    copy = pickle.loads(pickle.dumps(probe_set))
    assert torch.equal(copy.batch(0, 6), probe_set.batch(0, 6))
    assert copy.sha256 == twin_hash(copy) == probe_set.sha256
    del copy
    gc.collect()
    assert probe_set.batch(0, 6).shape[0] == 6


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_batch__a_sweep_does_not_fill_memory() -> None:
    images = np.broadcast_to(np.arange(200 * 1024, dtype=np.uint8).reshape(200, 1024)[:, :, None], (200, 1024, 1024))
    model = Preprocessing(1, 1024, 1024, None)
    before = resident_mib()
    probe_set = ProbeSet.from_array(images, model, memory_limit=0, n_threads=1)  # 200 MiB
    for start in range(0, 200, 4):
        probe_set.batch(start, start + 4)
    assert resident_mib() - before < 80
    mapped = probe_set.images
    assert mapped[::, ::64, ::64].any()
    assert resident_mib() - before > 100, "the measure would not notice a sweep that fills memory"


def test_probe_set__disk_too_small(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(4607))
    with pytest.raises(
        ProbeError, match=r"not enough space in '.*temporary' for 6 images, which need 4.29e-06 GiB. Use fewer images"
    ):
        ProbeSet.from_array(pieces(6), TAKEN, memory_limit=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(4608))
    assert ProbeSet.from_array(pieces(6), TAKEN, memory_limit=0).n_images == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_probe_set__disk_full_while_writing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = temporary / "full"  # a link, since the file is removed in the end
    link.symlink_to("/dev/full")
    monkeypatch.setattr(tempfile, "mkstemp", lambda prefix: (os.open(link, os.O_RDWR), str(link)))
    with pytest.raises(ProbeError, match=r"not enough space in '.*' for 6 images") as caught:
        ProbeSet.from_array(pieces(6), TAKEN, memory_limit=0)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_probe_set__other_errors_of_the_disk_pass(temporary: Path) -> None:
    def remove(done: int, wanted: int) -> None:
        for path in temporary.iterdir():
            path.unlink()

    with pytest.raises(FileNotFoundError):
        ProbeSet.from_array(pieces(6), TAKEN, memory_limit=0, progress=remove)


# Labels


def test_labels_for__in_range() -> None:
    probe_set = ProbeSet.from_array(pieces(3), TAKEN, [0, 4, 2])
    probe_set.labels_for(5)
    probe_set.labels_for(1000)
    with pytest.raises(
        ProbeError, match=r"do not match the model's classes: label 4 of 'array.*\[1\]' is not in 0 to 3"
    ):
        probe_set.labels_for(4)


def test_labels_for__negative() -> None:
    with pytest.raises(ProbeError, match=r"label -1 of .* is not in 0 to 9.*labels='none' \(--labels none;"):
        ProbeSet.from_array(pieces(2), TAKEN, [0, -1]).labels_for(10)


def test_labels_for__none() -> None:
    ProbeSet.from_array(pieces(2), TAKEN).labels_for(1)


def test_labels_for__class_folders_unlike_the_model(folder: Path) -> None:
    probe_set = ProbeSet.from_folder(folder, SMALL)
    probe_set.labels_for(4)
    message = (
        r"labels of '.*folder' do not match the model's classes: the source has 4 classes, the model 1000. "
        r"The labels are positions of the sorted class folders. Name the classes in a file.*named by these integers"
    )
    with pytest.raises(ProbeError, match=message):
        probe_set.labels_for(1000)
    ProbeSet.from_folder(folder, SMALL, labels="none").labels_for(1000)


@pytest.mark.parametrize("names", [["n01440764", "n02124075"], ["3", "285"]])
def test_labels_for__absolute_class_folders(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(piece(0), "PNG"))
    probe_set = ProbeSet.from_folder(tmp_path, SMALL)
    probe_set.labels_for(1000)
    with pytest.raises(ProbeError, match=r"label 285 of .* is not in 0 to 199"):
        probe_set.labels_for(200)


def test_probe_set__labels_for_some_images_only(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(piece(number)) for number in range(4)], "label": [1, None, 2, None]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ProbeError, match=r"2 of 4 images of '.*' have no label, such as 'x.parquet.*labels='none'"):
        ProbeSet.from_parquet(tmp_path / "x.parquet", SMALL)
    assert ProbeSet.from_parquet(tmp_path / "x.parquet", SMALL, labels="none").labels is None


def test_from_source__labels_none_may_mean_either():
    with pytest.raises(
        ProbeError, match=r"labels is None; expected 'none' to use none, 'auto' for those of the images"
    ):
        ProbeSet.from_source(np.zeros((4, 8, 8, 3), np.uint8), Preprocessing(3, 8, 8), labels=None)


def test_probe_set__without_labels_has_no_origin_of_labels(folder: Path) -> None:
    probe_set = ProbeSet.from_folder(folder, SMALL, labels="none")
    assert (probe_set.labels, probe_set.classes) == (None, None)


# Saved and loaded


def saved(tmp_path: Path, n_images: int = 6, labels: Any = None, **settings: Any) -> Path:
    return ProbeSet.from_array(pieces(n_images), TAKEN, labels, **settings).save(tmp_path / "kept")


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_load__what_was_saved(memory_limit: int, folder: Path, tmp_path: Path) -> None:
    cut_off(folder, "d/0.jpeg")
    cut_off(folder, "c/1.png")
    probe_set = ProbeSet.from_folder(folder, SMALL, seed=4, max_unreadable=0.1, memory_limit=memory_limit)
    kept = probe_set.save(tmp_path / "deep" / "kept")
    loaded = ProbeSet.load(kept)
    assert np.array_equal(loaded.images, probe_set.images)
    assert np.array_equal(loaded.labels, probe_set.labels)
    for field in inspect.signature(ProbeSet).parameters:
        if field not in ("labels", "_pixels"):
            assert getattr(loaded, field) == getattr(probe_set, field), field
    assert len(loaded.skipped) == 2
    assert loaded.to_dict() == probe_set.to_dict()
    assert torch.equal(loaded.batch(3, 17), probe_set.batch(3, 17))
    assert torch.equal(loaded.batch(30, 99), probe_set.batch(30, 99))
    assert loaded.sha256 == twin_hash(loaded)


@pytest.mark.parametrize(
    "model",
    [
        TAKEN,
        Preprocessing(3, 16, 16, None),
        Preprocessing(3, 16, 16, (16, 16)),
        Preprocessing(3, 16, 16, 20, crop_offset="rounded down"),
    ],
)
def test_load__without_labels_and_every_preprocessing(model: Preprocessing, tmp_path: Path) -> None:
    probe_set = ProbeSet.from_array(pieces(3), model)
    loaded = ProbeSet.load(probe_set.save(tmp_path))
    assert (loaded.preprocessing, loaded.labels, loaded.classes) == (model, None, None)
    assert ("crop_offset" in probe_set.to_dict()["preprocessing"]) == (model.crop_offset != "rounded")
    assert ProbeSet.load(loaded.save(tmp_path / "again")).sha256 == probe_set.sha256


def test_load__what_was_saved_before_labels_were_judged_as_a_whole(folder: Path, tmp_path: Path) -> None:
    kept = ProbeSet.from_folder(folder, SMALL).save(tmp_path / "kept")
    about = json.loads((kept / "probe_set.json").read_text())
    del about["classes"], about["notes"]
    former = about | {"label_origin": "positions of the sorted class folders", "n_classes": 4}
    (kept / "probe_set.json").write_text(json.dumps(former))
    loaded = ProbeSet.load(kept)
    assert np.array_equal(loaded.labels_for(4)[0], loaded.labels)
    with pytest.raises(ProbeError, match="the source has 4 classes, the model 5"):
        loaded.labels_for(5)
    (kept / "probe_set.json").write_text(json.dumps(former | {"labels": None, "label_origin": None}))
    assert ProbeSet.load(kept, verify=False).labels_for(5) == (None, [])


def test_load__is_a_probe_set_like_any_other(tmp_path: Path) -> None:
    loaded = ProbeSet.load(saved(tmp_path, labels=range(6)))
    assert ProbeSet.from_source(loaded, TAKEN) is loaded
    with pytest.raises(ProbeError, match="Make a probe set with the model's preprocessing"):
        ProbeSet.from_source(loaded, SMALL)
    copy = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(copy.batch(0, 6), loaded.batch(0, 6))
    assert loaded.labels is not None
    for array in (loaded.images, loaded.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_load__copies_a_batch(tmp_path: Path) -> None:
    loaded = ProbeSet.load(saved(tmp_path))
    loaded.batch(0, 6).zero_()
    assert ProbeSet.load(tmp_path / "kept").batch(0, 6).any()


def test_save__images_are_an_ordinary_array(tmp_path: Path) -> None:
    probe_set = ProbeSet.from_array(np.arange(600 * 4, dtype=np.uint8).reshape(600, 2, 2), Preprocessing(1, 2, 2, None))
    images = np.load(probe_set.save(tmp_path) / "images.npy")
    assert images.dtype == np.uint8
    assert np.array_equal(images, probe_set.images), "more images than are written at once"
    assert {path.name for path in tmp_path.iterdir()} == {"images.npy", "probe_set.json"}


def test_save__replaces_another(tmp_path: Path) -> None:
    saved(tmp_path, 6, labels=range(6))
    other = ProbeSet.load(saved(tmp_path, 3))
    assert (other.n_images, other.labels) == (3, None)


def test_save__in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ProbeSet.from_array(pieces(3), TAKEN).save("~/kept")
    assert ProbeSet.load("~/kept").n_images == ProbeSet.load(tmp_path / "kept").n_images == 3


def test_save__interrupted_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    probe_set = ProbeSet.from_array(pieces(5), TAKEN)

    def interrupt(start: int, stop: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_set._pixels, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe_set.save(tmp_path / "kept")
    with pytest.raises(ProbeError, match="no complete probe set in"):
        ProbeSet.load(tmp_path / "kept")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_save__disk_full(tmp_path: Path) -> None:
    (tmp_path / ".images.npy.new").symlink_to("/dev/full")
    with pytest.raises(
        ProbeError, match=rf"images cannot be written to {tmp_path} \(No space left on device\). Free some space"
    ):
        ProbeSet.from_array(pieces(6), TAKEN).save(tmp_path)
    assert not (tmp_path / "probe_set.json").exists()


def test_save__where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match=r"cannot be written to .*file/x \(Not a directory"):
        ProbeSet.from_array(pieces(6), TAKEN).save(tmp_path / "file" / "x")


def test_load__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=rf"no complete probe set in {tmp_path} \(.*Delete the folder"):
        ProbeSet.load(tmp_path)


def change_record(kept: Path, **changes: Any) -> None:
    path = kept / "probe_set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [0, 1, 2, 3, 4, 4]},
        {"labels": None},
        {"labels": [0, 1, 2]},
        {"names": ["x"] * 5},
        {"names": ["x"] * 7},
        {"sha256": "0" * 64},
        {"preprocessing": {}},
        {"preprocessing": 3},
        {"names": 3},
        {"labels": ["x"]},
    ],
    ids=str,
)
def test_load__changed_record(changes: dict[str, Any], tmp_path: Path) -> None:
    kept = saved(tmp_path, labels=range(6))
    change_record(kept, **changes)
    with pytest.raises(ProbeError, match=r"in .*kept .*Delete the folder to have (it|them) (made|decoded) again"):
        ProbeSet.load(kept)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "{}"])
def test_load__no_record(text: str, tmp_path: Path) -> None:
    kept = saved(tmp_path)
    (kept / "probe_set.json").write_text(text)
    with pytest.raises(ProbeError, match="no complete probe set in"):
        ProbeSet.load(kept)


@pytest.mark.parametrize("damage", ["gone", "cut off", "changed", "pickled", "wider", "flat"])
def test_load__damaged_images(damage: str, tmp_path: Path) -> None:
    kept = saved(tmp_path)
    path = kept / "images.npy"
    content = path.read_bytes()
    images = np.load(path)
    if damage == "gone":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "pickled":
        np.save(path, np.array([{"x": 1}], object), allow_pickle=True)
    else:
        np.save(path, images.astype(np.int16) if damage == "wider" else images.reshape(6, -1))
    with pytest.raises(ProbeError, match=r"kept.*Delete .*again"):
        ProbeSet.load(kept)


def test_load__unverified(tmp_path: Path) -> None:
    kept = saved(tmp_path)
    change_record(kept, sha256="0" * 64)
    assert ProbeSet.load(kept, verify=False).sha256 == "0" * 64


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_load__a_sweep_does_not_fill_memory(tmp_path: Path) -> None:
    images = np.broadcast_to(np.arange(200 * 1024, dtype=np.uint8).reshape(200, 1024)[:, :, None], (200, 1024, 1024))
    ProbeSet.from_array(images, Preprocessing(1, 1024, 1024, None), memory_limit=0, n_threads=1).save(tmp_path)
    before = resident_mib()
    loaded = ProbeSet.load(tmp_path)  # 200 MiB
    for start in range(0, 200, 4):
        loaded.batch(start, start + 4)
    assert resident_mib() - before < 80
