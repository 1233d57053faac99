import gzip
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from layercrit.errors import ProbeError
from layercrit.probes.idx import IdxSource
from layercrit.probes.images import Preprocessing
from layercrit.probes.opening import open_source
from layercrit.probes.probe_set import ProbeSet
from layercrit.probes.sources import FolderSource
from packed_images import n_classes_of

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(values: npt.ArrayLike) -> bytes:
    """The bytes of an IDX file, after its description on Y. LeCun's page of MNIST."""
    array = np.asarray(values, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def pixels(n_images: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n_images, 5, 4), dtype=np.uint8)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed_images", ["", ".gz"])
@pytest.mark.parametrize("packed_labels", ["", ".gz"])
def test_idx_source__images_and_labels(packed_images: str, packed_labels: str, tmp_path: Path) -> None:
    images = pixels(6)
    path = write(tmp_path / (IMAGES + packed_images), idx(images))
    write(tmp_path / (LABELS + packed_labels), idx([3, 1, 4, 1, 5, 255]))
    source = IdxSource(path)
    items, labels = list(source.read([0, 2, 5])), source.labels()
    assert (len(source), source.description, n_classes_of(source)) == (6, str(path), None)
    assert labels is not None
    assert labels.classes.origin == f"the file {LABELS}{packed_labels}"
    assert [item.index for item in items] == [0, 2, 5]
    assert labels.numbers == [3, 1, 4, 1, 5, 255]
    assert all(type(label) is int for label in labels.numbers)
    for item in items:
        assert np.array_equal(item.content, images[item.index])
    assert source.name(5) == f"{path.name}[5]"


def test_idx_source__without_labels(tmp_path: Path) -> None:
    write(tmp_path / LABELS, idx([1, 2, 3]))  # those of another file
    source = IdxSource(write(tmp_path / "mine-images-idx3-ubyte", idx(pixels(3))))
    assert source.labels() is None


def test_idx_source__parts_of_a_folder(tmp_path: Path) -> None:
    for part, n_images in (("t10k", 2), ("train", 3)):
        write(tmp_path / f"{part}-images-idx3-ubyte.gz", idx(pixels(n_images)))
        write(tmp_path / f"{part}-labels-idx1-ubyte.gz", idx(range(n_images)))
    assert [len(IdxSource(tmp_path, split)) for split in (None, "test", "train")] == [2, 2, 3]
    write(tmp_path / IMAGES, idx(pixels(1)))
    assert IdxSource(tmp_path).name(0) == f"{IMAGES}[0]", "the unpacked file goes first"


def test_open_source__idx_files(tmp_path: Path) -> None:
    path = write(tmp_path / "mnist" / f"{IMAGES}.gz", idx(pixels(2)))
    write(tmp_path / "mnist" / "train-images-idx3-ubyte", idx(pixels(3)))
    (tmp_path / "mnist" / "README").touch()
    for given in (path, str(path), path.parent):
        source = open_source(given)
        assert type(source) is IdxSource
        assert (len(source), source.description) == (2, str(given))
    assert len(open_source(path.parent / "train-images-idx3-ubyte")) == 3


def test_open_source__images_beside_idx_files_go_first(tmp_path: Path) -> None:
    from photographs import encoded, piece

    write(tmp_path / IMAGES, idx(pixels(2)))
    (tmp_path / "1.jpg").write_bytes(encoded(piece(0)))
    assert type(open_source(tmp_path)) is FolderSource


def test_probe_set__of_idx_files_is_that_of_the_array(tmp_path: Path) -> None:
    images, labels = pixels(20), np.arange(20) % 10
    write(tmp_path / IMAGES, idx(images))
    write(tmp_path / LABELS, idx(labels))
    size = Preprocessing(1, 5, 4, None)
    drawn = ProbeSet.from_source(tmp_path, size, n_images=12, seed=3)
    assert drawn.sha256 == ProbeSet.from_array(images, size, labels, n_images=12, seed=3).sha256
    assert drawn.labels is not None


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_idx_source__fashion_mnist_of_debian() -> None:
    test, train = IdxSource(DEBIAN), IdxSource(DEBIAN, "train")
    assert (len(test), len(train)) == (10_000, 60_000)
    for source, per_class in ((test, 1_000), (train, 6_000)):
        items = list(source.read(range(len(source))))
        assert np.bincount(source.labels().numbers).tolist() == [per_class] * 10
        assert {item.content.shape for item in items} == {(28, 28)}
    values = np.stack([item.content for item in train.read(range(60_000))])
    # The mean and standard deviation by which Fashion-MNIST is normalised everywhere.
    assert (values.mean() / 255, values.std() / 255) == pytest.approx((0.2860, 0.3530), abs=1e-4)


# --- what is refused ------------------------------------------------------------------------------------------------


def lying(*lengths: int) -> bytes:
    """A header that promises other lengths than the 40 bytes that follow."""
    return bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in lengths) + bytes(40)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not an IDX file of images: it begins with nothing; expected 00 00 08 03"),
        (
            b"\x00\x00\x08\x03\x00\x00",
            r"is not an IDX file of images: it begins with 00 00 08 03; expected .* and the len",
        ),
        (idx([1, 2, 3, 4] * 9), r"not an IDX file of images: it begins with 00 00 08 01; expected 00 00 08 03"),
        (b"<html>no such page</html>", r"is not an IDX file of images: it begins with 3c 68 74 6d"),
        (
            lying(3, 5, 4),
            r"is damaged: its header promises 3 x 5 x 4 = 60 bytes, but it has only 40\. Download it again",
        ),
        (lying(1, 5, 4), r"is damaged: its header promises 1 x 5 x 4 = 20 bytes, but it has more"),
        (lying(2, 5, 4) + b"\n", r"promises 2 x 5 x 4 = 40 bytes, but it has more"),
        (
            lying(2**32 - 1, 2**32 - 1, 2**32 - 1),
            r"promises 4294967295 x .* bytes, but it cannot have more than [\d,]+\.",
        ),
        (lying(0, 5, 4)[:-40], r"no images in '.*': its shape is \(0, 5, 4\)"),
        (lying(7, 0, 4)[:-40], r"no images in '.*': its shape is \(7, 0, 4\)"),
    ],
)
def test_idx_source__no_images(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=message):
        IdxSource(write(tmp_path / (IMAGES + suffix), content))


def test_idx_source__damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(idx(pixels(50) // 32), mtime=0)  # compressible: random bytes would be stored as they are
    path = tmp_path / f"{IMAGES}.gz"
    generator = random.Random(0)
    for length in [5, 18, *generator.sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ProbeError, match=re.escape(str(path))):
            IdxSource(path)
    for position in [0, 1, len(whole) - 6, *generator.sample(range(20, len(whole) - 8), 20)]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(ProbeError, match=re.escape(str(path))):
            IdxSource(path)
    path.write_bytes(idx(pixels(50)))
    with pytest.raises(ProbeError, match=r"Cannot read '.*gz' \(Not a gzipped file.*Download it again"):
        IdxSource(path)


@pytest.mark.parametrize("promised", [2, 2**32 - 1])
def test_idx_source__a_header_that_lies_takes_no_memory(promised: int, tmp_path: Path) -> None:
    n_bytes = 2**25 if promised == 2 else 40  # 32 MB of zeros behind a promise of 40 bytes, and the other way round
    path = write(tmp_path / f"{IMAGES}.gz", lying(promised, 5, 4)[:-40] + bytes(n_bytes))
    tracemalloc.start()
    try:
        with pytest.raises(ProbeError, match="is damaged"):
            IdxSource(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            idx([1, 2]),
            r"t10k-labels-idx1-ubyte' has 2 labels for the 3 images of 't10k-images-idx3-ubyte'.*--labels none",
        ),
        (idx([1, 2, 3, 4]), r"has 4 labels for the 3 images"),
        (idx(pixels(3)), r"is not an IDX file of labels: it begins with 00 00 08 03; expected 00 00 08 01"),
        (idx([1, 2, 3])[:-1], r"its header promises 3 = 3 bytes, but it has only 2"),
    ],
)
def test_idx_source__wrong_labels(labels: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / IMAGES, idx(pixels(3)))
    write(tmp_path / LABELS, labels)
    with pytest.raises(ProbeError, match=message):
        IdxSource(path).labels()
    assert len(list(IdxSource(path).read(range(3)))) == 3


def test_idx_source__no_such_part(tmp_path: Path) -> None:
    path = write(tmp_path / "train-images-idx3-ubyte.gz", idx(pixels(3)))
    with pytest.raises(
        ProbeError, match=r"has no file t10k-images-idx3-ubyte or .*in it: train-images-idx3-ubyte.gz\."
    ):
        open_source(tmp_path)
    with pytest.raises(ProbeError, match="has no part 'val': it has 'test' and 'train'"):
        IdxSource(tmp_path, "val")
    with pytest.raises(ProbeError, match="is a single file, so it has no part 'train'"):
        IdxSource(path, "train")
    with pytest.raises(ProbeError, match=r"No such file or folder: .*Did you mean 'train-images"):
        IdxSource(tmp_path / "train-image-idx3-ubyte.gz")


# --- several data sets in one folder --------------------------------------------------------------------------------


def write_emnist(folder: Path) -> Path:
    """Files as EMNIST's archive has them, with other numbers of images in each; its letters are numbered from 1."""
    for data, n_classes in (("letters", 26), ("digits", 10)):
        for part, n_images in (("test", n_classes), ("train", 2 * n_classes)):
            labels = np.arange(n_images) % n_classes + (data == "letters")
            write(folder / f"emnist-{data}-{part}-images-idx3-ubyte.gz", idx(pixels(n_images)))
            write(folder / f"emnist-{data}-{part}-labels-idx1-ubyte.gz", idx(labels))
    return folder


@pytest.mark.parametrize(
    ("split", "n_images"),
    [("letters", 26), ("letters-train", 52), ("emnist-digits-test", 10), ("digits", 10), ("train-digits", 20)],
)
def test_idx_source__one_data_set_of_several(split: str, n_images: int, tmp_path: Path) -> None:
    source = open_source(f"{write_emnist(tmp_path)}?split={split}")
    labels = source.labels()
    assert len(source) == n_images
    assert labels is not None
    assert labels.classes.values == tuple(range(1, 27) if "letters" in split else range(10))


def test_idx_source__the_test_part_of_the_only_data_set(tmp_path: Path) -> None:
    for path in write_emnist(tmp_path).glob("*letters*"):
        path.unlink()
    assert len(open_source(tmp_path)) == 10


def test_idx_source__several_data_sets_and_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"has several data sets: .*\?split=emnist-digits-test'"):
        open_source(write_emnist(tmp_path))
    with pytest.raises(ProbeError, match=r"has no part 'bymerge'.*emnist-letters-test-images-idx3-ubyte\.gz"):
        open_source(f"{tmp_path}?split=bymerge")


def test_idx_source__letters_numbered_from_one(tmp_path: Path) -> None:
    size = Preprocessing(1, 5, 4, None)
    letters = f"{write_emnist(tmp_path)}?split=letters"
    with pytest.raises(ProbeError, match=r"label 26 of .* is not in 0 to 25"):
        ProbeSet.from_source(letters, size, n_images=3).labels_for(26)
    right = ProbeSet.from_source(letters, size, classes=[str(number) for number in range(1, 27)])
    labels, _ = right.labels_for(26)
    assert labels is not None
    assert labels.tolist() == [int(name[:-1].rpartition("[")[2]) for name in right.names]
