import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision import datasets

from layercrit.errors import ProbeError, TrainingError
from layercrit.training import data as module
from layercrit.training import open_training_data
from training_images import stripes, write_images

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def idx(values):
    array = np.asarray(values, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder):
    folder.mkdir()
    for part, n_images in (("train", 30), ("t10k", 12)):
        images, labels = stripes(n_images, seed=n_images)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def colours(n_images, seed=0, size=(10, 14)):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n_images, *size, 3), dtype=np.uint8), np.arange(n_images) % 3


def write_pngs(folder, images, labels, names="abc"):
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return folder


def pixels_of(split):
    return [np.asarray(split.image(i)) for i in range(len(split))]


def same_images(split, images):
    return len(split) == len(images) and all(map(np.array_equal, pixels_of(split), images))


def mean_and_std(images):
    """By numpy, for each channel, of pixels in [0, 1]."""
    flat = np.concatenate([np.asarray(image).reshape(-1, 1 if image.ndim == 2 else 3) for image in images]) / 255
    return flat.mean(axis=0), flat.std(axis=0)


def check_statistics(data):
    mean, std = mean_and_std(pixels_of(data.train))
    np.testing.assert_allclose(data.inputs.mean, mean, atol=6e-5)
    np.testing.assert_allclose(data.inputs.std, std, atol=6e-5)


# --- kinds of sources -----------------------------------------------------------------------------------------------


def test_open_training_data__npz_with_a_part_for_tests(tmp_path):
    path = write_images(tmp_path / "stripes.npz", n_train=30, n_test=12)
    data = open_training_data(path)
    (images, labels), (test_images, test_labels) = stripes(30), stripes(12, seed=1)
    assert same_images(data.train, images)
    assert same_images(data.test, test_images)
    assert data.train.labels.tolist() == labels.tolist()
    assert data.test.labels.tolist() == test_labels.tolist()
    inputs = data.inputs
    assert (inputs.channels, inputs.height, inputs.width, inputs.n_classes, inputs.same_size) == (1, 12, 12, 3, True)
    check_statistics(data)
    described = {key: value for key, value in data.to_dict().items() if key != "sha256"}
    assert described == {
        "source": str(path), "n_train": 30, "n_test": 12, "n_classes": 3,
        "test_origin": "its arrays 'test_images' and 'test_labels'",
    }  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")],
)
def test_open_training_data__npz_with_parts_named_otherwise(tmp_path, keys):
    (images, labels), (test_images, test_labels) = stripes(30), stripes(12, seed=1)
    arrays = (images, labels[:, None], test_images, test_labels[:, None])
    np.savez(tmp_path / "x.npz", **dict(zip(keys, arrays, strict=True)))
    write_images(tmp_path / "same.npz", n_train=30, n_test=12)
    data = open_training_data(tmp_path / "x.npz")
    assert same_images(data.train, images)
    assert same_images(data.test, test_images)
    assert data.test.labels.tolist() == test_labels.tolist()
    assert data.sha256 == open_training_data(tmp_path / "same.npz").sha256


def test_open_training_data__one_part_of_a_file_is_divided(tmp_path):
    path = write_images(tmp_path / "stripes.npz", n_train=30, n_test=20)
    data = open_training_data(f"{path}?split=test")
    assert (len(data.train), len(data.test)) == (18, 2)


def held_out_of(path, n_images):
    """Open a source whose images are all unlike, and return which of them are held out."""
    data = open_training_data(path)
    assert data.test_origin == f"a tenth of {path}, held out"
    parts = [{image.tobytes() for image in pixels_of(split)} for split in (data.train, data.test)]
    assert len(parts[0] & parts[1]) == 0
    assert len(parts[0] | parts[1]) == n_images
    assert len(parts[1]) == len(data.test) == max(1, round(n_images / 10))
    return parts[1]


def test_open_training_data__a_tenth_is_held_out_once_and_for_all(tmp_path):
    images, labels = colours(50)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    tenth = held_out_of(tmp_path / "x.npz", 50)
    assert tenth == held_out_of(tmp_path / "x.npz", 50)
    np.savez(tmp_path / "few.npz", images=images[:4], labels=labels[:4])
    held_out_of(tmp_path / "few.npz", 4)
    folder = write_pngs(tmp_path / "folder", images, labels)
    tenth = held_out_of(folder, 50)
    shutil.copytree(folder, tmp_path / "copy")
    assert tenth == held_out_of(tmp_path / "copy", 50)


@pytest.mark.parametrize("test_part", ["val", "valid", "validation", "test"])
def test_open_training_data__folders_with_images_of_unlike_sizes(tmp_path, test_part):
    sizes = [(10, 14), (9, 20), (30, 11)]
    images = [colours(1, seed, sizes[seed % 3])[0][0] for seed in range(9)]
    write_pngs(tmp_path / "train", images, [seed % 3 for seed in range(9)])
    write_pngs(tmp_path / test_part, images[:3], [0, 1, 2])
    (tmp_path / test_part / ".thumbnails").mkdir()
    data = open_training_data(tmp_path)
    assert data.test_origin == f"its folder '{test_part}'"
    assert same_images(data.train, [images[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)])
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert same_images(data.test, images[:3])
    inputs = data.inputs
    assert (inputs.channels, inputs.height, inputs.width, inputs.same_size) == (3, 224, 224, False)
    check_statistics(data)


def test_open_training_data__folders_with_images_of_one_size(tmp_path):
    images, labels = stripes(9)
    write_pngs(tmp_path / "train", images, labels)
    write_pngs(tmp_path / "val", images[:3], labels[:3])
    inputs = open_training_data(tmp_path).inputs
    assert (inputs.channels, inputs.height, inputs.width, inputs.same_size) == (1, 12, 12, True)
    write_pngs(tmp_path / "val", [np.zeros((12, 13), np.uint8)], [0])
    assert not open_training_data(tmp_path).inputs.same_size


def test_open_training_data__a_folder_train_alone(tmp_path):
    images, labels = colours(20)
    write_pngs(tmp_path / "train", images, labels)
    held_out_of(tmp_path, 20)


def test_open_training_data__a_class_called_train(tmp_path):
    images, labels = colours(12)
    write_pngs(tmp_path, images, labels, names=("bus", "plane", "train"))
    data = open_training_data(tmp_path)
    assert data.inputs.n_classes == 3
    assert len(data.train) + len(data.test) == 12


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_open_training_data__images_come_in_the_channels_asked_for(tmp_path, channels, mode):
    generator = np.random.default_rng(0)
    wide = Image.fromarray(generator.integers(0, 2**16, (8, 8), dtype=np.uint16))
    images = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)), wide]
    images += [images[0].convert(mode) for mode in ("L", "LA", "RGBA", "P")]
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        for number, image in enumerate(images):
            image.save(tmp_path / str(label) / f"{number}.png")
    data = open_training_data(tmp_path, input_size=(channels, 8, 8))
    assert {data.train.image(i).mode for i in range(len(data.train))} == {mode}
    assert data.inputs.same_size
    check_statistics(data)
    high_bytes = (np.asarray(wide) >> 8).astype(np.uint8)
    assert any(
        np.array_equal(np.asarray(image).reshape(8, 8, -1)[..., 0], high_bytes) for image in pixels_of(data.train)
    )


def test_open_training_data__idx_folder(tmp_path):
    data = open_training_data(write_idx(tmp_path / "mnist"))
    assert data.test_origin == "its part 't10k'"
    assert same_images(data.train, stripes(30, seed=30)[0])
    assert same_images(data.test, stripes(12, seed=12)[0])
    assert data.test.labels.tolist() == stripes(12)[1].tolist()
    assert (data.inputs.channels, data.inputs.n_classes) == (1, 3)
    check_statistics(data)


def fashion(name, offset):
    return np.frombuffer(gzip.decompress((DEBIAN / name).read_bytes()), np.uint8, offset=offset)


@needs_fashion
@pytest.mark.parametrize("kind", ["idx", "torchvision"])
def test_open_training_data__fashion_mnist(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module.Split, "sample", lambda self: map(self.image, range(0, 60000, 20)))  # all takes seconds
    source = str(DEBIAN)
    if kind == "torchvision":
        source = f"torchvision:FashionMNIST?root={tmp_path}"
        (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
        for path in DEBIAN.glob("*.gz"):
            (tmp_path / "FashionMNIST" / "raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    data = open_training_data(source)
    pixels = fashion("train-images-idx3-ubyte.gz", 16).reshape(60000, 28, 28)
    assert (len(data.train), len(data.test), data.inputs.n_classes) == (60000, 10000, 10)
    assert data.test_origin == ("its part 'test'" if kind == "torchvision" else "its part 't10k'")
    assert all(np.array_equal(np.asarray(data.train.image(i)), pixels[i]) for i in range(0, 60000, 997))
    assert np.array_equal(data.train.labels, fashion("train-labels-idx1-ubyte.gz", 8))
    assert np.array_equal(data.test.labels, fashion("t10k-labels-idx1-ubyte.gz", 8))
    assert data.inputs.mean == pytest.approx((0.2860,), abs=2e-3)  # of all, as is well known
    assert data.inputs.std == pytest.approx((0.3530,), abs=2e-3)
    # what opens it does not change the data
    assert data.sha256 == "145f5c87f1b295d2fb1790e12c7726f7c61749f42f525f71c99b276c988c72d5"


def write_shards(folder, kind, images, labels):
    folder.mkdir()
    encoded = [png(pixels) for pixels in images]
    if kind == "parquet":
        table = pa.table({"image": [{"bytes": one} for one in encoded], "label": [int(label) for label in labels]})
        pq.write_table(table, folder / "all.parquet", row_group_size=7)
        return folder
    with tarfile.open(folder / "all.tar", "w") as tar:
        for number, (one, label) in enumerate(zip(encoded, labels, strict=True)):
            for name, content in ((f"{number:03}.png", one), (f"{number:03}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("kept", [2**31, 1000, 0], ids=["in memory", "in part", "read again"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_open_training_data__shards(tmp_path, monkeypatch, kind, kept):
    monkeypatch.setattr(module, "_KEPT", kept)
    images, labels = colours(40)
    write_shards(tmp_path / "x", kind, images, labels)
    held_out_of(tmp_path / "x", 40)
    data = open_training_data(tmp_path / "x")
    by_pixels = {pixels.tobytes(): label for pixels, label in zip(images, labels, strict=True)}
    assert [by_pixels[pixels.tobytes()] for pixels in pixels_of(data.train)] == data.train.labels.tolist()
    assert (data.inputs.height, data.inputs.width) == (10, 14)
    check_statistics(data)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_open_training_data__shards_in_two_folders(tmp_path, kind):
    images, labels = colours(12)
    write_shards(tmp_path / "train", kind, images, labels)
    write_shards(tmp_path / "test", kind, images[::-1], labels[::-1])
    data = open_training_data(tmp_path)
    assert same_images(data.train, images)
    assert same_images(data.test, images[::-1])


@pytest.mark.parametrize("test_part", ["test", "validation"])
def test_open_training_data__shards_named_after_parts(tmp_path, test_part):
    images, labels = colours(12)
    for part, chosen in (("train", slice(None, 9)), (test_part, slice(9, None))):
        folder = write_shards(tmp_path / part, "parquet", images[chosen], labels[chosen])
        (folder / "all.parquet").rename(tmp_path / f"{part}-00000-of-00001.parquet")
        folder.rmdir()
    data = open_training_data(tmp_path)
    assert same_images(data.train, images[:9])
    assert same_images(data.test, images[9:])
    assert data.test.labels.tolist() == labels[9:].tolist()


# --- torchvision ----------------------------------------------------------------------------------------------------


def test_open_training_data__torchvision_without_parts(tmp_path):
    images, labels = colours(20)
    write_pngs(tmp_path, images, labels)
    held_out_of(f"torchvision:ImageFolder?root={tmp_path}", 20)


class Fake(datasets.VisionDataset):
    """Images that are drawn where they were fetched; its parts have names of their own."""

    fetched: list = []  # noqa: RUF012
    splits = ("trainval", "val")

    def __init__(self, root, split="trainval", download=False):
        super().__init__(root)
        if split not in self.splits:
            raise ValueError(f"Unknown value '{split}' for argument split.")
        if download:
            self.fetched.append((root, split))
            (Path(root) / split).touch()
        if not (Path(root) / split).exists():
            raise RuntimeError("Dataset not found.")
        self.images, self.labels = colours(8, seed=len(split))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), int(self.labels[index])


class FakeDigits(Fake):
    def __init__(self, root, train=True, download=False):
        super().__init__(root, "trainval" if train else "val", download)


class FakeWhole(Fake):
    def __init__(self, root, download=False):
        super().__init__(root, "trainval", download)


FAKES = {"Fake": Fake, "FakeDigits": FakeDigits, "FakeWhole": FakeWhole}


@pytest.fixture
def fakes(monkeypatch):
    """Add the fakes to torchvision's data sets; return what was fetched."""
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, *FAKES))
    for name, cls in FAKES.items():
        monkeypatch.setattr(datasets, name, cls, raising=False)
    monkeypatch.setattr(Fake, "fetched", [])
    return Fake.fetched


@pytest.mark.parametrize("name", FAKES)
def test_open_training_data__downloads_only_when_asked(tmp_path, fakes, name):
    source = f"torchvision:{name}?root={tmp_path}"
    with pytest.raises(
        ProbeError, match=r"cannot open Fake\w* in '.*' \(Dataset not found.*Images are never downloaded"
    ):
        open_training_data(source)
    assert fakes == []
    data = open_training_data(source, download=True)
    whole = name == "FakeWhole"
    assert fakes == [(str(tmp_path), "trainval"), (str(tmp_path), "val")][: 1 if whole else 2]
    assert data.test_origin == {
        "Fake": "its part 'val'", "FakeDigits": "its part 'test'", "FakeWhole": f"a tenth of {source}, held out"
    }[name]  # fmt: skip
    if not whole:
        assert same_images(data.train, colours(8, seed=8)[0])
        assert same_images(data.test, colours(8, seed=3)[0])
    assert open_training_data(source).sha256 == data.sha256


def test_open_training_data__one_part_of_torchvision(tmp_path, fakes):
    source = f"torchvision:Fake?root={tmp_path}&split=val"
    data = open_training_data(source, download=True)
    assert fakes == [(str(tmp_path), "val")]
    assert (len(data.train), len(data.test)) == (7, 1)


def test_open_training_data__torchvision_cannot_fetch(tmp_path, fakes, monkeypatch):
    def refused(self, *_, **__):
        raise OSError("Connection refused")

    monkeypatch.setattr(Fake, "__init__", refused)
    with pytest.raises(TrainingError, match=r"could not download FakeWhole to .* \(Connection refused\)"):
        open_training_data(f"torchvision:FakeWhole?root={tmp_path}", download=True)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("torchvision:FashionMINST?root={}", "Did you mean 'FashionMNIST'"),
        ("torchvision:CIFAR10", "expected 'torchvision:NAME.root=PATH'"),
        ("torchvision:CIFAR10?root={}", "cannot open CIFAR10 in '.*' \\(Dataset not found"),
        ("torchvision:Flowers102?root={}", "cannot open Flowers102 in '.*' \\(Dataset not found"),
        ("torchvision:Fake?root={}&split=tset", "Unknown value 'tset' for argument split"),
    ],
)
def test_open_training_data__torchvision_mistakes(tmp_path, fakes, source, text):
    with pytest.raises(ProbeError, match=text):
        open_training_data(source.format(tmp_path))


# --- the digest -----------------------------------------------------------------------------------------------------


def digest_of(kind, folder, images, labels):
    if kind == "npz":
        folder.mkdir()
        np.savez(folder / "x.npz", images=images, labels=labels)
        return open_training_data(folder / "x.npz").sha256
    path = write_pngs(folder, images, labels) if kind == "folder" else write_shards(folder, kind, images, labels)
    return open_training_data(path).sha256


@pytest.mark.parametrize("kind", ["npz", "folder", "parquet", "tar"])
def test_open_training_data__the_digest_is_that_of_the_data(tmp_path, monkeypatch, kind):
    images, labels = colours(20)
    first = digest_of(kind, tmp_path / "0", images, labels)
    assert first == digest_of(kind, tmp_path / "1", images, labels), "the place of the data changes their digest"
    other_labels = labels.copy()
    other_labels[4] = (labels[4] + 1) % 3
    assert first != digest_of(kind, tmp_path / "2", images, other_labels)
    other_images = images.copy()
    other_images[4, 2, 3, 1] ^= 1
    if kind != "folder":  # whose files are known by names and sizes
        assert first != digest_of(kind, tmp_path / "3", other_images, labels)
        monkeypatch.setattr(module, "_KEPT", 0)
        assert first == digest_of(kind, tmp_path / "4", images, labels), "memory changes the digest"
    other_images[4] = 0
    assert first != digest_of(kind, tmp_path / "5", other_images, labels)


# --- bad data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": [1] * 20}, r"training images of .* are all of class 1; expected at least two"),
        ({"labels": None}, r"The image x\.npz\[\d+\] has no label; training needs labels"),
        ({"labels": [0, 4] * 10}, r"has 2 classes with labels up to 4\. Number them from 0 without gaps"),
        ({"labels": [0, 1, 2, -5] * 5}, r"must be 0 or larger; got -5"),
        ({"test_labels": [0, -2]}, r"must be 0 or larger; got -2"),
        ({"test_labels": [0, 4]}, r"has test images but no training images of 1 class, such as 4"),
    ],
)
def test_open_training_data__labels_that_make_no_sense(tmp_path, change, text):
    images, _ = colours(20)
    arrays = {"images": images, "labels": [0, 1, 2, 3] * 5, "test_images": images[:2], "test_labels": [0, 1]} | change
    if "labels" in change:
        del arrays["test_images"], arrays["test_labels"]
    np.savez(tmp_path / "x.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(TrainingError, match=text):
        open_training_data(tmp_path / "x.npz")


def test_open_training_data__folders_with_other_classes(tmp_path):
    images, labels = colours(6)
    write_pngs(tmp_path / "train", images, labels)
    write_pngs(tmp_path / "val", images, labels, names="abd")
    with pytest.raises(TrainingError, match=r"must contain the same folders.*2 are in only one of them.*'c'"):
        open_training_data(tmp_path)


@pytest.mark.parametrize("content", ["no image", "cut off"])
@pytest.mark.parametrize("number", [0, 12])
def test_open_training_data__unreadable_file(tmp_path, monkeypatch, content, number):
    monkeypatch.setattr(module, "_SAMPLE", 1)  # of the images of a large folder not all are looked at
    images, labels = colours(30)
    write_pngs(tmp_path, [*images[:-1], images[-1, :5]], labels)  # of unlike sizes: only the first are opened
    path = tmp_path / "a" / f"{number}.png"
    path.write_bytes(b"no image" if content == "no image" else path.read_bytes()[:60])
    with pytest.raises(TrainingError, match=rf"The image a/{number}\.png.* cannot be read: "):  # noqa: PT012
        data = open_training_data(tmp_path)
        pixels_of(data.train), pixels_of(data.test)


def test_split__a_file_that_went_away(tmp_path):
    data = open_training_data(write_pngs(tmp_path / "x", *colours(30)))
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(TrainingError, match=r"The image a/\d+\.png of .*x cannot be read: .*No such file"):
        data.train.image(0)


def test_split__too_large_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 1000)
    with pytest.raises(TrainingError, match=r"take more than 0 GiB when decoded\. Provide them as image files"):
        open_training_data(write_images(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stripse.npz", r"No such file or folder.*Did you mean 'stripes\.npz'"),
        ("empty", r"no images in the folder"),
        ("broken.npz", r"Cannot read '.*broken\.npz'"),
        ("array.npz", r"labels|no label"),
        ("mnist", r"no file train-images-idx3-ubyte"),
        ("text.txt", r"unknown file type"),
    ],
)
def test_open_training_data__nothing_to_train_on(tmp_path, name, text):
    write_images(tmp_path / "stripes.npz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes((tmp_path / "stripes.npz").read_bytes()[:-100])
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, stripes(3)[0])
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").write_bytes(idx(stripes(3)[0]))
    (tmp_path / "text.txt").write_text(json.dumps({}))
    with pytest.raises((ProbeError, TrainingError), match=text):
        open_training_data(tmp_path / name)


@pytest.mark.parametrize("size", [(2, 8, 8), (3, 0, 8), (1, 8, -1)])
def test_open_training_data__input_size_that_makes_no_sense(tmp_path, size):
    with pytest.raises(TrainingError, match=r"input_size must be channels \(1 or 3\), height and width; got"):
        open_training_data(write_images(tmp_path / "x.npz"), input_size=size)
