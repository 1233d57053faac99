import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision

from layercrit.errors import ProbeError
from layercrit.probes.opening import open_source
from layercrit.probes.probe_set import ProbeSet
from layercrit.probes.torchvision import TorchvisionSource
from packed_images import IMAGES, items_of, n_classes_of, origin_of
from photographs import write_fashion_mnist


def test_torchvision_source__fashion_mnist(tmp_path: Path) -> None:
    images, labels = write_fashion_mnist(tmp_path)
    for source in [
        TorchvisionSource("FashionMNIST", tmp_path),
        open_source(f"torchvision:FashionMNIST?root={tmp_path}&split=test"),
        open_source(f"torchvision:FashionMNIST?root={tmp_path}"),
    ]:
        assert [np.asarray(image).tolist() for image, _ in items_of(source)] == images.tolist()
        assert [label for _, label in items_of(source)] == labels
        assert [label for _, label in items_of(source, use_labels=False)] == [None] * 6
        assert (n_classes_of(source), origin_of(source)) == (10, "the targets of torchvision's FashionMNIST")
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
    assert sorted((isinstance(content, OSError), label) for content, label in items) == [(False, 0), (True, 1)]


def test_torchvision_source__a_damaged_image_costs_no_other_its_label(tmp_path: Path, monkeypatch) -> None:
    """Where the class keeps no list of labels, they come with the images."""
    monkeypatch.setattr("layercrit.probes.torchvision._LISTS", ())
    root = tmp_path / "SUN397"
    for number, name in enumerate(("abbey", "airport")):
        (root / "a" / name).mkdir(parents=True)
        (root / "a" / name / "sun_x.jpg").write_bytes(IMAGES[number][: 500 if number == 0 else None])
    (root / "ClassName.txt").write_text("/a/abbey\n/a/airport\n")
    probe_set = ProbeSet.from_source(TorchvisionSource("SUN397", tmp_path), max_unreadable=0.5)
    assert (probe_set.labels.tolist(), len(probe_set.skipped)) == ([1], 1)


def test_torchvision_source__files_are_not_decoded(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(IMAGES[number])
        (tmp_path / name / "y.jpg").write_bytes(b"no image")
    source = TorchvisionSource("ImageFolder", tmp_path)
    files = [tmp_path / name / file for name in ("cat", "dog") for file in ("x.jpg", "y.jpg")]
    assert items_of(source) == list(zip(files, [0, 0, 1, 1], strict=True))
    assert items_of(source, use_labels=False) == [(file, None) for file in files]
    assert [(item.index, item.content) for item in source.read([1, 2])] == [(1, files[1]), (2, files[2])]


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
        open_source(text.format(tmp_path))


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
    if "MovingMNIST" not in torchvision.datasets.__all__:
        pytest.skip("this torchvision does not list MovingMNIST")
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 2, 64, 64), np.uint8))
    with pytest.raises(ProbeError, match=r"MovingMNIST.*' does not return pairs of image and label"):
        items_of(TorchvisionSource("MovingMNIST", tmp_path))


# Parts that torchvision's classes name in their own way


def test_torchvision_source__emnist_is_its_test_part(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n_images in (("test", 6), ("train", 9)):
        images = np.full((n_images, 28, 28), n_images, np.uint8)
        labels = bytes(number % 5 + 1 for number in range(n_images))
        for name, axes, content in (
            ("images-idx3", images.shape, images.tobytes()),
            ("labels-idx1", (n_images,), labels),
        ):
            header = struct.pack(f">{len(axes) + 1}I", 0x800 + len(axes), *axes)
            (raw / f"emnist-letters-{part}-{name}-ubyte").write_bytes(header + content)
    for split, n_images in (("letters", 6), ("letters-test", 6), ("letters-train", 9)):
        source = TorchvisionSource("EMNIST", tmp_path, split)
        labels = source.labels()
        assert len(source) == n_images
        assert np.asarray(items_of(source)[0][0])[0, 0] == n_images
        assert labels is not None
        assert labels.numbers == [number % 5 + 1 for number in range(n_images)]
    with pytest.raises(ProbeError, match="has no part 'val': it has 'test', 'train'"):
        TorchvisionSource("EMNIST", tmp_path, "letters-val")
    with pytest.raises(ProbeError, match=r"Valid values are .*'letters'"):
        TorchvisionSource("EMNIST", tmp_path)


def test_torchvision_source__inaturalist_is_not_its_training_part(tmp_path: Path) -> None:
    for part, n_images in (("2021_valid", 2), ("2021_train", 3)):
        for number in range(n_images):
            folder = tmp_path / part / f"{number:05}_Animalia_Chordata_Aves_Piciformes_Picidae_Picus_{number}"
            folder.mkdir(parents=True)
            (folder / "x.jpg").write_bytes(IMAGES[number])
    for split, n_images in ((None, 2), ("2021_valid", 2), ("2021_train", 3)):
        source = TorchvisionSource("INaturalist", tmp_path, split)
        assert [label for _, label in items_of(source)] == list(range(n_images))


def test_torchvision_source__labels_need_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path)
    source = TorchvisionSource("FashionMNIST", tmp_path)
    monkeypatch.setattr(type(source._dataset), "__getitem__", lambda *_: pytest.fail("an image was decoded"))
    labels = source.labels()
    assert labels is not None
    assert labels.numbers == [6, 7, 8, 9, 0, 1]
    assert labels.names[9] == "Ankle boot"
