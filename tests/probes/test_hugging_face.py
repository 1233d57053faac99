import sys
from pathlib import Path

import datasets
import pytest

from layercrit.errors import ProbeError
from layercrit.probes.hugging_face import HuggingFaceSource
from packed_images import IMAGES, items_of, n_classes_of, origin_of, save_dataset


def test_hugging_face_source__images_and_labels(tmp_path: Path) -> None:
    source = HuggingFaceSource(save_dataset(tmp_path / "cats"))
    assert items_of(source) == [(IMAGES[number], number % 3) for number in range(5)]
    assert items_of(source, [1, 4], use_labels=False) == [(IMAGES[1], None), (IMAGES[4], None)]
    assert (n_classes_of(source), origin_of(source), source.name(2)) == (3, "column 'label'", "cats[2]")


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
    assert n_classes_of(source) is None


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
    try:
        empty = save_dataset(tmp_path / "empty", 0)
    except ZeroDivisionError:  # older versions of datasets cannot write such a one
        empty = None
    if empty is not None:
        with pytest.raises(ProbeError, match=r"Cannot read the data set '.*empty'"):
            HuggingFaceSource(empty)
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
    source = HuggingFaceSource(save_dataset(tmp_path / "x", 1, datasets.Value("float32"), image=rows, label=[1.5]))
    with pytest.raises(ProbeError, match=r"Labels must be integers.*'x\[0\]' is 1.5"):
        items_of(source)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "3", "{}", '{"_data_files": 3}', '{"features": [1]}', "[" * 10**5],
    ids=lambda text: text[:20],
)
def test_open__files_of_other_content_are_no_bug(tmp_path, file, content):
    folder = save_dataset(tmp_path / "x")
    (folder / file).write_text(content)
    try:
        source = HuggingFaceSource(folder)
    except ProbeError as error:
        assert "Save it again" in str(error) or "columns" in str(error)  # noqa: PT017
    else:
        assert items_of(source, [1])[0][0] == IMAGES[1]
