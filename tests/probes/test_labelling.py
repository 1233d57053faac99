"""Labels and parts from the images to the accuracy: right labels give about 91 %, labels of another order far less."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from labelled_images import (
    BASELINE,
    LABELS,
    N_IMAGES,
    NAMES,
    PIXELS,
    accuracy,
    found_in,
    notes_of,
    png,
    write_classes,
    write_pngs,
)
from layercrit.errors import ProbeError
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.probes.classes import labels_of
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from packed_images import write_tar

RIGHT = pytest.approx(accuracy(PIXELS, labels=LABELS), abs=1e-9)
SIZE = Preprocessing(1, 28, 28, None)
IMAGENETTE = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)  # ten of ImageNet's classes, in the order of their numbers


def test_the_network_knows_these_images() -> None:
    assert accuracy(PIXELS, labels=LABELS) > 0.85
    assert accuracy(PIXELS, labels=(LABELS + 1) % 10) < 0.2
    assert accuracy(PIXELS) is None


def refused(source: Any, match: str, **options: Any) -> None:
    with pytest.raises(ProbeError, match=match):
        found_in(source, **options)


# Class folders


@pytest.mark.parametrize("n_images", [5, N_IMAGES])
def test_folders__numbered_from_one(n_images: int, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "dev", "{one}/{number}.png", one=range(1, 11))
    refused(
        folder, "begin at 1, and end at 10, while the model's 10 outputs count from 0.*--classes", n_images=n_images
    )
    assert accuracy(folder, n_images=n_images, labels="none") is None
    classes = write_classes(tmp_path / "classes.txt", range(1, 11))
    assert accuracy(folder, classes=classes) == RIGHT
    assert accuracy(folder, classes=list(map(str, range(1, 11)))) == RIGHT


def test_folders__numbered_from_one_for_more_outputs(tmp_path: Path) -> None:
    few = [number for number in range(N_IMAGES) if LABELS[number] < 5]
    for number in few:
        write_pngs(tmp_path, "{one}/{number}.png", range(number, number + 1), one=range(1, 11))
    refused(tmp_path, "begin at 1, and end at 5, while the model's 10 outputs count from 0")


def test_folders__numbered_from_zero_as_the_model_numbers_them(tmp_path: Path) -> None:
    assert accuracy(write_pngs(tmp_path, "{label}/{number}.png")) == RIGHT


def test_folders__a_class_beyond_the_outputs_that_was_not_drawn(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path, "{label}/{number}.png")
    (folder / "10").mkdir()
    (folder / "10" / "x.png").write_bytes(png(0))
    drawn = [ProbeSet.from_folder(folder, SIZE, n_images=4, seed=seed) for seed in range(20)]
    unlucky = next(seed for seed, found in enumerate(drawn) if found.labels is not None and found.labels.max() < 10)
    with pytest.raises(ProbeError, match="label 10 of the source is not in 0 to 9"):
        drawn[unlucky].labels_for(10)


def test_folders__names_in_another_order_than_the_outputs(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", "{name}/{number}.png")
    sorted_names = accuracy(folder)
    assert sorted_names is not None
    assert sorted_names < 0.5
    assert accuracy(folder, classes=write_classes(tmp_path / "classes.txt")) == RIGHT
    refused(folder, "lists 9 classes, but not 'boot' of the images", classes=NAMES[:9])
    refused(folder, "'bag' is there twice", classes=[*NAMES, "bag"])
    refused(folder, "the source has 11 classes, the model 10", classes=[*NAMES, "hat"])
    refused(folder, r"'.*none\.txt' cannot be read", classes=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(NAMES), r"it is JSON"),
        (json.dumps(dict(enumerate(NAMES)), indent=1), r"it is JSON"),
        ("".join(f"{place},{name}\n" for place, name in enumerate(NAMES)), "lists 10 classes, but not"),
    ],
)
def test_folders__classes_that_are_no_plain_names(content: str, reason: str, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", "{name}/{number}.png")
    (tmp_path / "classes.txt").write_text(content)
    way_out = "plain names, one per line, in the order of the model's outputs .no JSON, no numbers before the names."
    refused(folder, f"{reason}.*{way_out}", classes=tmp_path / "classes.txt")


def test_folders__an_empty_one_more(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path, "c{label}/{number}.png")
    (folder / "another" / "deeper").mkdir(parents=True)
    assert accuracy(folder) == RIGHT
    assert "without images" in notes_of(folder)
    assert "'another'" in notes_of(folder)


def test_folders__an_empty_one_that_the_model_has(tmp_path: Path) -> None:
    for number in range(N_IMAGES):
        if LABELS[number] != 3:
            write_pngs(tmp_path, "c{label}/{number}.png", range(number, number + 1))
    (tmp_path / "c3").mkdir()
    found = accuracy(tmp_path)
    assert found is not None
    assert found > 0.8
    assert "'c3'" in notes_of(tmp_path)
    (tmp_path / "c31").mkdir()
    refused(tmp_path, "the source has 11 classes, the model 10")


def test_folders__ten_wordnet_ids_for_ten_outputs(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path, "{wordnet}/{number}.png", wordnet=IMAGENETTE)
    assert accuracy(folder) == RIGHT
    assert "10 classes" in notes_of(folder)


@pytest.mark.parametrize(("n_outputs", "used"), [(1000, True), (1001, False), (21843, False)])
def test_folders__wordnet_ids_for_imagenets_outputs_only(n_outputs: int, used: bool, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path, "{wordnet}/{number}.png", range(9), wordnet=IMAGENETTE)
    probe_set = ProbeSet.from_folder(folder, SIZE)
    labels, notes = probe_set.labels_for(n_outputs)
    numbers = dict(zip(IMAGENETTE, [0, 217, 482, 491, 497, 566, 569, 571, 574, 701], strict=True))
    if used:
        assert labels is not None
        assert labels.tolist() == [numbers[name.partition("/")[0]] for name in probe_set.names]
        assert notes == []
    else:
        assert labels is None
        assert str(n_outputs) in notes[0]


@pytest.mark.parametrize("n_outputs", [3, 999])
def test_folders__wordnet_ids_for_fewer_outputs_are_refused(n_outputs: int, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path, "{wordnet}/{number}.png", wordnet=IMAGENETTE)
    with pytest.raises(ProbeError, match="do not match the model's classes"):
        ProbeSet.from_folder(folder, SIZE).labels_for(n_outputs)


def test_folders__wordnet_ids_beside_an_empty_folder(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path, "{wordnet}/{number}.png", wordnet=IMAGENETTE)
    (folder / "n00000000").mkdir()
    labels, _ = ProbeSet.from_folder(folder, SIZE).labels_for(1000)
    assert labels is not None
    assert set(labels) <= {0, 217, 482, 491, 497, 566, 569, 571, 574, 701}


@pytest.mark.parametrize("pattern", ["images/c{label}/{number}.png", "data/all/c{label}/{number}.png"])
def test_folders__further_down_are_named(pattern: str, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", pattern)
    assert accuracy(folder) is None
    below = folder / pattern.partition("/c{")[0]
    assert f"give '{below}'" in notes_of(folder)
    assert accuracy(below) == RIGHT


def test_folders__with_images_beside_them_are_named(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", "c{label}/{number}.png")
    (folder / "thumbnail.png").write_bytes(png(0))
    assert accuracy(folder) is None
    assert "'thumbnail.png'" in notes_of(folder)


# Parts


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation"), ("dev", "test"), ("train", "eval")])
def test_parts__of_a_folder_are_no_classes(names: tuple[str, str], tmp_path: Path) -> None:
    for name, numbers in zip(names, (range(20), range(20, N_IMAGES)), strict=True):
        write_pngs(tmp_path, f"{name}/c{{label}}/{{number}}.png", numbers)
    refused(tmp_path, f"has several parts: .*'{names[1]}'")
    refused(tmp_path, "has several parts", labels="none")
    found = found_in(f"{tmp_path}?split={names[1]}")
    assert found.n_images == 40
    assert found.accuracy == accuracy(tmp_path / names[1])
    assert found.accuracy > 0.8
    refused(f"{tmp_path}?split=tset", "has no part 'tset'")


def test_parts__in_each_class_folder(tmp_path: Path) -> None:
    write_pngs(tmp_path, "c{label}/train/{number}.png", range(30))
    write_pngs(tmp_path, "c{label}/test/{number}.png", range(30, N_IMAGES))
    refused(tmp_path, "has several parts: 'test', 'train'")
    found = found_in(f"{tmp_path}?split=test")
    assert found.n_images == 30
    assert found.accuracy > 0.8


def test_parts__one_alone_by_its_name(tmp_path: Path) -> None:
    write_pngs(tmp_path, "val/c{label}/{number}.png")
    assert f"give '{tmp_path / 'val'}'" in notes_of(tmp_path)
    assert accuracy(f"{tmp_path}?split=val") == RIGHT


def test_parts__a_class_named_train_is_a_class(tmp_path: Path) -> None:
    classes = ["bus", "car", "cat", "dog", "eel", "fox", "test tube", "train", "van", "yak"]
    assert accuracy(write_pngs(tmp_path, "{vehicle}/{number}.png", vehicle=classes)) == RIGHT


def write_parquet(path: Path, numbers: range = range(N_IMAGES), **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(number), "path": None} for number in numbers]
    chosen = {name: [values[number] for number in numbers] for name, values in columns.items()}
    pq.write_table(pa.table({"img": images, **chosen}), path, row_group_size=7)
    return path


@pytest.mark.parametrize("pattern", ["", "*.parquet"])
def test_parts__of_shards_are_not_mixed(pattern: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(20), label=LABELS.tolist())
    write_parquet(tmp_path / "test-00000-of-00002.parquet", range(20, 40), label=LABELS.tolist())
    write_parquet(tmp_path / "test-00001-of-00002.parquet", range(40, 60), label=LABELS.tolist())
    refused(tmp_path / pattern, "has several parts: 'test', 'train'")
    found = found_in(f"{tmp_path / pattern}?split=test")
    assert found.n_images == 40
    assert found.accuracy == accuracy(tmp_path / "test-*.parquet")
    refused(f"{tmp_path / pattern}?split=validation", "has no part 'validation': it has 'test', 'train'")


def test_parts__of_tar_shards_and_inside_them(tmp_path: Path) -> None:
    for part, numbers in (("train", range(20)), ("val", range(20, N_IMAGES))):
        members = {f"{n}.png": png(n) for n in numbers} | {f"{n}.cls": str(LABELS[n]).encode() for n in numbers}
        write_tar(tmp_path / f"images-{part}-000.tar", members)
    refused(tmp_path, "has several parts: 'train', 'val'")
    assert found_in(f"{tmp_path}?split=val").n_images == 40
    assert accuracy(f"{tmp_path}?split=val") > 0.8
    inside = {f"set/{'val' if n % 3 else 'train'}/c{LABELS[n]}/{n}.png": png(n) for n in range(N_IMAGES)}
    (tmp_path / "whole").mkdir()
    path = write_tar(tmp_path / "whole" / "all.tar", inside)
    refused(path, "has several parts: 'train', 'val'")
    found = found_in(f"{path}?split=val", labels="folders")
    assert found.n_images == 40
    assert found.accuracy > 0.8


def test_parts__in_folders_of_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train" / "0.parquet", range(20), label=LABELS.tolist())
    write_parquet(tmp_path / "test" / "0.parquet", range(20, N_IMAGES), label=LABELS.tolist())
    assert found_in(f"{tmp_path}?split=test").n_images == 40
    assert accuracy(f"{tmp_path}?split=test") > 0.8


def test_parts__of_a_saved_data_set(tmp_path: Path) -> None:
    parts = {
        part: datasets.Dataset.from_dict({"img": [png(n) for n in numbers], "label": LABELS[numbers].tolist()})
        for part, numbers in (("train", range(20)), ("test", range(20, N_IMAGES)))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "hf")
    assert found_in(f"{tmp_path / 'hf'}?split=test").n_images == 40
    assert accuracy(f"{tmp_path / 'hf'}?split=test") > 0.8
    refused(f"{tmp_path / 'hf'}?split=val", "has no part 'val': it has 'test', 'train'")


KEYS = [
    ("test_images", "test_labels", "train_images", "train_labels"),
    ("x_test", "y_test", "x_train", "y_train"),
    ("X_val", "Y_val", "X_train", "Y_train"),
]


@pytest.mark.parametrize("keys", KEYS)
def test_parts__of_an_npz_file(keys: tuple[str, ...], tmp_path: Path) -> None:
    arrays = dict(zip(keys, (PIXELS[20:], LABELS[20:, None], PIXELS[:20], LABELS[:20, None]), strict=True))
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", "has several parts")
    part = re.split("_", keys[0])[1 if keys[0].lower().startswith("x") else 0]
    found = found_in(f"{tmp_path / 'x.npz'}?split={part}")
    assert found.n_images == 40
    assert found.accuracy > 0.8
    np.savez(tmp_path / "one.npz", **{key: arrays[key] for key in keys[:2]})
    assert found_in(tmp_path / "one.npz") == found


def test_parts__test_images_beside_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=PIXELS[:20], labels=LABELS[:20], test_images=PIXELS[20:], test_labels=LABELS[20:])
    assert "?split=test" in notes_of(path)
    counts = [found_in(f"{path}{part}").n_images for part in ("", "?split=train", "?split=test")]
    assert counts == [20, 20, 40]
    assert accuracy(f"{path}?split=test") > 0.8


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "folder", "x.parquet", "x.tar"])
def test_parts__of_a_source_without_any(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=LABELS)
    np.save(tmp_path / "x.npy", PIXELS)
    write_pngs(tmp_path / "folder")
    write_parquet(tmp_path / "x.parquet")
    write_tar(tmp_path / "x.tar", {"0.png": png(0)})
    refused(f"{tmp_path / name}?split=test", "has no part 'test': it has no parts")


def test_parts__another_option(tmp_path: Path) -> None:
    refused(f"{write_pngs(tmp_path)}?part=test", "Unknown option 'part'")


# Shapes of arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_arrays__a_column_of_labels(dtype: type, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=LABELS[:, None].astype(dtype))
    assert accuracy(tmp_path / "x.npz") == RIGHT
    assert accuracy(PIXELS, labels=torch.tensor(LABELS)[:, None]) == RIGHT


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_arrays__one_hot(dtype: type) -> None:
    one_hot = np.eye(10)[LABELS].astype(dtype)
    assert accuracy(PIXELS, labels=one_hot) == RIGHT
    refused(PIXELS, "the source has 11 classes, the model 10", labels=np.eye(11)[LABELS])
    refused(PIXELS, r"have the shape \(60, 10\)", labels=one_hot * np.arange(10))


def test_arrays__a_label_beyond_the_outputs_that_was_not_drawn() -> None:
    labels = LABELS.copy()
    drawn = ProbeSet.from_array(PIXELS, SIZE, np.arange(N_IMAGES), n_images=5).labels
    assert drawn is not None
    labels[next(number for number in range(N_IMAGES) if number not in drawn)] = 10
    refused(PIXELS, "label 10 of the source is not in 0 to 9", labels=labels, n_images=5)


# Tables


@pytest.mark.parametrize("column", ["fine_label", "target", "label_idx", "class", "cls", "Targets"])
def test_parquet__columns_that_look_like_labels(column: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", **{column: LABELS.tolist(), "width": LABELS.tolist()})
    assert accuracy(path) is None
    assert f"--labels {column}" in notes_of(path)
    assert accuracy(path, labels=column) == RIGHT
    assert notes_of(path, labels="none") == ""
    refused(path, f"no labels 'fine_lable' in .*'{column}'", labels="fine_lable")


def test_parquet__names_of_classes(tmp_path: Path) -> None:
    names = [NAMES[label] for label in LABELS]
    path = write_parquet(tmp_path / "x.parquet", label=names)
    assert accuracy(path, classes=NAMES) == RIGHT
    numbered = [f"{label}-{NAMES[label]}" for label in LABELS]
    assert accuracy(write_parquet(tmp_path / "y.parquet", label=numbered)) == RIGHT
    few = write_parquet(tmp_path / "z.parquet", range(6), label=numbered)
    refused(few, "the source has . classes, the model 10")


@pytest.mark.parametrize("value", [10, -1, None])
def test_parquet__a_wrong_label_that_was_not_drawn(value: int | None, tmp_path: Path) -> None:
    numbers = ProbeSet.from_parquet(write_parquet(tmp_path / "x.parquet", label=list(range(60))), SIZE, n_images=5)
    assert numbers.labels is not None
    labels: list[int | None] = LABELS.tolist()
    labels[next(number for number in range(N_IMAGES) if number not in numbers.labels)] = value
    path = write_parquet(tmp_path / "x.parquet", label=labels)
    refused(path, "1 of 60 images" if value is None else f"label {value} of the source", n_images=5)


def test_hugging_face__two_columns_of_class_labels(tmp_path: Path) -> None:
    fine = datasets.ClassLabel(names=NAMES)
    coarse = datasets.ClassLabel(names=["top", "other"])
    columns = {
        "img": [{"bytes": png(n), "path": None} for n in range(N_IMAGES)],
        "fine_label": LABELS.tolist(), "coarse_label": (LABELS > 4).astype(int).tolist(),
    }  # fmt: skip
    features = datasets.Features({"img": datasets.Image(), "fine_label": fine, "coarse_label": coarse})
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "x")
    assert accuracy(tmp_path / "x") is None
    assert "--labels fine_label" in notes_of(tmp_path / "x")
    assert accuracy(tmp_path / "x", labels="fine_label") == RIGHT
    refused(tmp_path / "x", "the source has 2 classes, the model 10", labels="coarse_label")
    reordered = [NAMES[(label + 3) % 10] for label in range(10)]
    found = accuracy(tmp_path / "x", labels="fine_label", classes=reordered)
    assert found is not None
    assert found < 0.3, "classes are looked up by the names that the data set has for its numbers"


def test_npz__another_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, targets=LABELS)
    assert accuracy(tmp_path / "x.npz") is None
    assert "--labels targets" in notes_of(tmp_path / "x.npz")
    assert accuracy(tmp_path / "x.npz", labels="targets") == RIGHT


# Archives


def members(labels: Any, image: str, label: str) -> dict[str, bytes]:
    found = {}
    for number in range(N_IMAGES):
        found[f"{number:03}.{image}"] = png(number)
        found[f"{number:03}.{label}"] = labels(int(LABELS[number])).encode()
    return found


@pytest.mark.parametrize(
    ("image", "suffix", "column", "label"),
    [
        ("input.png", "output.cls", "output.cls", str),
        ("png", "txt", "txt", str),
        ("jpg.png", "txt", "txt", lambda label: f"{label}-{NAMES[label]}\n"),
        ("png", "json", "label_idx", lambda label: json.dumps({"label_idx": label, "width": 28})),
        ("png", "json", "class", lambda label: json.dumps({"class": f"{label} {NAMES[label]}"})),
    ],
)
def test_tar__members_that_look_like_labels(image: str, suffix: str, column: str, label: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(label, image, suffix))
    assert accuracy(path) is None
    assert f"--labels {column}" in notes_of(path)
    assert accuracy(path, labels=column) == RIGHT
    refused(path, "no labels 'clz' in", labels="clz")


@pytest.mark.parametrize("prefix", ["", "./", "set/images/"])
def test_tar__class_folders(prefix: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{prefix}c{LABELS[n]}/{n}.png": png(n) for n in range(N_IMAGES)})
    assert accuracy(path) is None
    assert "--labels folders" in notes_of(path)
    assert accuracy(path, labels="folders") == RIGHT


def test_tar__names_in_cls(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(lambda label: NAMES[label], "png", "cls"))
    assert accuracy(path, classes=NAMES) == RIGHT


# Files of labels


def table(header: list[str] | None, rows: list[list[Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([*([header] if header else []), *rows])
    return text.getvalue()


def rows_of(name: str, label: str = "{label}") -> list[list[Any]]:
    return [
        [name.format(number=n), label.format(label=LABELS[n], name=NAMES[LABELS[n]], wordnet=IMAGENETTE[LABELS[n]])]
        for n in reversed(range(N_IMAGES))
    ]


def lines(rows: list[list[Any]]) -> str:
    return "".join(f"{name} {label}\n" for name, label in rows)


LISTS = {
    "val.txt": lines(rows_of("{number:03}.png")),
    "LOC_val_solution.csv": table(
        ["ImageId", "PredictionString"], rows_of("{number:03}", "{wordnet} 10 2 30 40 n02124075 1 1 9 9 ")
    ),
    "metadata.csv": table(["file_name", "width", "label"], [[n, 28, k] for n, k in rows_of("{number:03}.png")]),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": n, "label": int(k)}) + "\n" for n, k in rows_of("{number:03}.png")
    ),
    "labels.json": json.dumps(dict(rows_of("val/{number:03}.png", "{label}"))),
    "dataset_labels.json": json.dumps({"labels": [[n, int(k)] for n, k in rows_of("00/{number:03}.png")]}),
    "annotations.csv": table(None, rows_of("./{number:03}.png")),
    "annotations.tsv": table(["Image", "class_id"], rows_of("{number:03}.png"), "\t"),
    "ground_truth.txt": "".join(f"{label}\n" for label in LABELS),
}


@pytest.mark.parametrize("name", LISTS)
def test_files__beside_the_images(name: str, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    (folder / name).write_text(LISTS[name])
    assert accuracy(folder) is None
    assert f"--labels {folder / name}" in notes_of(folder)
    assert accuracy(folder, labels=folder / name) == RIGHT
    assert accuracy(folder, labels=str(folder / name)) == RIGHT


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None].astype(np.uint8)])
def test_files__an_array(labels: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "images.npy", PIXELS)
    for source in (folder, tmp_path / "images.npy"):
        assert f"--labels {tmp_path / 'labels.npy'}" in notes_of(source)
        assert accuracy(source, labels=tmp_path / "labels.npy") == RIGHT
    np.save(tmp_path / "labels.npy", labels[:-1])
    refused(folder, r"has 59 labels without names for 60 images", labels=tmp_path / "labels.npy")


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool])
def test_files__a_one_hot_array(dtype: type, tmp_path: Path) -> None:
    folder, path = write_pngs(tmp_path / "images"), tmp_path / "labels.npy"
    np.save(path, np.eye(10, dtype=dtype)[LABELS])
    assert accuracy(folder, labels=path) == RIGHT
    np.save(path, np.eye(11, dtype=dtype)[LABELS])
    refused(folder, "the source has 11 classes, the model 10", labels=path)
    np.save(path, np.eye(10, dtype=dtype)[LABELS[:-1]])
    refused(folder, "has 59 labels without names for 60 images", labels=path)


def test_files__arrays_that_are_no_labels(tmp_path: Path) -> None:
    folder, path = write_pngs(tmp_path / "images"), tmp_path / "labels.npy"
    np.save(path, np.full((N_IMAGES, 10), 0.1))
    refused(folder, r"have the shape \(60, 10\); expected \(60,\), one per image", labels=path)
    np.save(path, np.array(3))
    refused(folder, r"labels\.npy' has a single value\. Expected", labels=path)


def test_files__an_image_whose_label_is_empty(tmp_path: Path) -> None:
    """It has none, and the others keep theirs: here they say so, as the images of the file are the only ones there."""
    folder = write_pngs(tmp_path / "images")
    rows = rows_of("{number:03}.png")
    (tmp_path / "x.csv").write_text(table(None, [["other.png", ""], ["another.png", " "], *rows]))
    assert accuracy(folder, labels=tmp_path / "x.csv") == RIGHT
    rows[7][1] = ""
    (tmp_path / "x.csv").write_text(table(None, rows))
    refused(folder, rf"no label for 1 of the 60 images here, such as '{rows[7][0]}'", labels=tmp_path / "x.csv")


def test_parquet__an_empty_text_is_no_label(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", label=[*map(str, LABELS[:-1]), " "])
    refused(path, "1 of 60 images .* have no label", labels="label")


@pytest.mark.parametrize("other", ["3", "?"])
def test_files__a_negative_number_among_class_numbers(other: str, tmp_path: Path) -> None:
    """As names, all labels would be places in sorted order."""
    folder = write_pngs(tmp_path / "images")
    rows = rows_of("{number:03}.png")
    rows[7][1], rows[9][1] = " -1", other
    (tmp_path / "x.csv").write_text(table(None, rows))
    refused(
        folder,
        rf"the label of '{rows[7][0]}' is '-1', which is negative.*remove the image.*--labels none",
        labels=tmp_path / "x.csv",
    )


@pytest.mark.parametrize("mark", ["N/A", "none", " ? "])
def test_files__a_mark_of_no_label_among_class_numbers(mark: str, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    rows = rows_of("{number:03}.png")
    rows[7][1] = mark
    (tmp_path / "x.csv").write_text(table(None, rows))
    refused(
        folder,
        rf"the label of '{rows[7][0]}' is '{re.escape(mark.strip())}', which is no number\. Correct it, remove the "
        "image.*'class 0'",
        labels=tmp_path / "x.csv",
    )


def test_files__whole_floats(tmp_path: Path) -> None:
    """As pandas writes integers where one is missing; here that is of no image here."""
    folder = write_pngs(tmp_path / "images")
    for missing in ("", "nan"):
        rows = [["other.png", missing], *rows_of("{number:03}.png", "{label}.0")]
        (tmp_path / "x.csv").write_text(table(None, rows))
        assert accuracy(folder, labels=tmp_path / "x.csv") == RIGHT
    parquet = write_parquet(tmp_path / "x.parquet", label=[float(label) for label in LABELS])
    assert accuracy(parquet, labels="label") == RIGHT


@pytest.mark.parametrize("missing", [np.nan, None])
def test_labels_of__whole_floats_and_a_missing_one(missing: float | None) -> None:
    found = labels_of(np.array([9.0, 0.0, missing], dtype=None if missing else object), "an array", str)
    assert list(found.numbers) == [9, 0, None]
    assert found.classes.kind == "numbers"


@pytest.mark.parametrize("wrong", [1.5, "1.5", math.inf, "inf", 1e300])
def test_labels_of__floats_that_are_not_whole(wrong: object) -> None:
    with pytest.raises(ProbeError, match=rf"Labels must be integers.* that of '1' is {re.escape(repr(wrong))}\."):
        labels_of([0.0 if isinstance(wrong, float) else "0", wrong], "a list", str)


@pytest.mark.parametrize("names", [["cat", "none"], ["20", "30", "stop"], ["0", "?", "A"]])
def test_labels_of__names_beside_numbers(names: list[str]) -> None:
    found = labels_of(names, "a list", str)
    assert [found.names[number] for number in found.numbers if number is not None] == names


@pytest.mark.parametrize("names", [["-1", "1"], ["-1"], ["-2", "-1"], ["-1", "cat"]])
def test_labels_of__negative_numbers_that_are_names(names: list[str]) -> None:
    found = labels_of(names, "a list", str)
    assert found.classes.kind == "positions"
    assert [found.names[number] for number in found.numbers if number is not None] == names


def test_folders__named_by_integers_of_both_signs(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", "{sign}/{number}.png", sign=["-1", "0", "1", *"23456789"])
    packed = write_tar(tmp_path / "x.tar", {f"{LABELS[n] - 1}/{n}.png": png(n) for n in range(N_IMAGES)})
    assert accuracy(folder) == RIGHT
    assert accuracy(packed, labels="folders") == RIGHT


def test_files__beside_the_folder(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "val")
    (tmp_path / "val.txt").write_text(LISTS["val.txt"])
    (tmp_path / "notes.txt").write_text("nothing of interest")
    assert f"--labels {tmp_path / 'val.txt'}" in notes_of(folder)
    assert accuracy(folder, labels=tmp_path / "val.txt") == RIGHT


def test_files__names_of_classes(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    (tmp_path / "x.csv").write_text(table(["id", "breed"], rows_of("{number:03}", "{name}")))
    assert accuracy(folder, labels=tmp_path / "x.csv", classes=NAMES) == RIGHT
    (tmp_path / "y.csv").write_text(table(["id", "breed"], rows_of("{number:03}", "{label}-{name}")))
    assert accuracy(folder, labels=tmp_path / "y.csv") == RIGHT


def test_files__choose_a_column(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    rows = [[name, 0, label] for name, label in rows_of("{number:03}.png")]
    (tmp_path / "x.csv").write_text(table(["file", "coarse_label", "fine_label"], rows))
    refused(folder, "has several columns of labels: its columns are 'file', 'coarse_label'", labels=tmp_path / "x.csv")
    assert accuracy(folder, labels=f"{tmp_path / 'x.csv'}?column=fine_label") == RIGHT
    refused(folder, "has no column of labels", labels=f"{tmp_path / 'x.csv'}?column=fine")


def test_files__take_the_place_of_class_folders(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", "{name}/{number:03}.png")
    (tmp_path / "x.csv").write_text(table(None, rows_of("{number:03}.png")))
    assert accuracy(folder, labels=tmp_path / "x.csv") == RIGHT


def test_files__names_numbered_from_one_are_refused(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    (tmp_path / "x.csv").write_text(table(None, [[n, int(k) + 1] for n, k in rows_of("{number:03}.png")]))
    refused(folder, "begin at 1, and end at 10", labels=tmp_path / "x.csv", n_images=5)
    assert accuracy(folder, labels=tmp_path / "x.csv", classes=list(map(str, range(1, 11)))) == RIGHT


def test_files__same_names_in_two_folders_need_their_paths(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for number in range(N_IMAGES):
        path = folder / f"{number % 2}" / f"{number // 2:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    pairs = [[f"{n % 2}/{n // 2:03}.png", LABELS[n]] for n in range(N_IMAGES)]
    (tmp_path / "paths.csv").write_text(table(None, pairs))
    assert accuracy(folder, labels=tmp_path / "paths.csv") == RIGHT
    (tmp_path / "names.csv").write_text(table(None, [[name.partition("/")[2], label] for name, label in pairs]))
    refused(folder, "Give paths within the folder", labels=tmp_path / "names.csv")
    one_folder = [[name.partition("/")[2], label] for name, label in pairs[::2]]
    (tmp_path / "one.csv").write_text(table(None, one_folder))
    refused(folder, "Give paths within the folder", labels=tmp_path / "one.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", table(None, rows_of("{number:03}.png")[1:]), r"no label for 1 of the 60 images.*'059\.png'"),
        (
            "x.csv",
            table(None, [*rows_of("{number:03}.png"), ["003.png", 77]]),
            r"several labels for 1 of the 60 images.*'003\.png'\.",
        ),
        (
            "x.csv",
            table(["id", "label"], [["003.png", 77], *rows_of("{number:03}.png")]),
            r"labels for 1 .*'003\.png'\.",
        ),
        ("x.csv", table(None, [["003.png", " "], *rows_of("{number:03}.png")[:-4]]), r"no label for 4 .*'000\.png'"),
        ("x.csv", table(None, rows_of("{number:03}.png", " ")), r"no label for 60 of the 60 images here.*'000\.png'"),
        ("x.json", json.dumps(["", *map(str, LABELS[1:])]), r"1 of 60 images.*have no label, such as '000\.png'"),
        ("x.csv", table(None, rows_of("other-{number}.png")), r"none of the 60 images here"),
        ("x.csv", "", r"Cannot read the labels in .*\(it is empty\)\. Expected"),
        ("x.tsv", " \n", r"\(it is empty\)"),
        ("x.txt", "\n", r"\(it is empty\)"),
        ("x.json", "", r"\(it is empty\)"),
        ("x.csv", table(["a", "b", "c"], [[1, 2, 3]]), r"has no column of file names: its columns are 'a', 'b', 'c'"),
        ("x.json", "{", r"Cannot read the labels in"),
        ("x.json", "3", r"neither a mapping nor a list"),
        ("x.npy", "no array", r"Cannot read"),
        ("x.txt", "1\n2\n", r"has 2 labels without names for 60 images"),
        ("x.csv", table(None, rows_of("{number:03}.png", "{label}.5")), r"Labels must be integers"),
    ],
)
def test_files__that_do_not_fit(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    (tmp_path / name).write_text(content)
    refused(folder, message, labels=tmp_path / name)
    assert accuracy(folder, labels="none") is None


def test_files__missing(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images")
    (tmp_path / "labels.csv").write_text(LISTS["annotations.csv"])
    refused(
        folder, r"No such file of labels: '.*lables.csv'. Did you mean 'labels.csv'", labels=tmp_path / "lables.csv"
    )
    refused(folder, "neither a file.* nor", labels="label")
    refused(PIXELS, "neither a file.* nor", labels="label")


def test_a_probe_set_has_its_labels() -> None:
    probe_set = ProbeSet.from_array(PIXELS, SIZE, LABELS)
    assert accuracy(probe_set) == RIGHT
    refused(probe_set, "has its labels", labels=LABELS)
    refused(probe_set, "has its labels", classes=NAMES)
    refused(PIXELS, "there are no labels", classes=NAMES)


def test_keys_of_what_was_right_stay(tmp_path: Path) -> None:
    """The hash of a probe set is a part of the key of each cell of a study."""
    same = [
        ProbeSet.from_array(PIXELS, SIZE, LABELS),
        ProbeSet.from_array(PIXELS, SIZE, LABELS[:, None]),
        ProbeSet.from_array(PIXELS, SIZE, np.eye(10)[LABELS]),
    ]
    assert {one.sha256 for one in same} == {same[0].sha256}
    folder = write_pngs(tmp_path / "x", "{number:03}.png")
    (folder / "labels.csv").write_text(LISTS["annotations.csv"])
    assert ProbeSet.from_folder(folder, SIZE).sha256 == ProbeSet.from_array(PIXELS, SIZE).sha256
    assert ProbeSet.from_folder(folder, SIZE, labels=folder / "labels.csv").sha256 == same[0].sha256
    assert notes_of(PIXELS) == notes_of(PIXELS, labels=LABELS) == ""


def test_measure__labels_depend_on_the_outputs(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "x", "{wordnet}/{number}.png", wordnet=IMAGENETTE)
    settings: dict[str, Any] = {"layers": "fc", "trials": 1, "dtype": "float32", "progress": False}
    found = measure(BASELINE, folder, **settings)
    assert found.record["predictions"]["top1_accuracy"] > 0.85
    assert any("in sorted order" in note for note in found.record["notes"])
    assert found.record["probe_set"]["labels"]
    other = "timm:test_resnet?pretrained=false&num_classes=1001&input_size=(3,32,32)"
    unlabelled = measure(other, folder, **settings)
    assert unlabelled.record["predictions"]["top1_accuracy"] is None
    assert any("1001 outputs" in note for note in unlabelled.record["notes"])
    assert not unlabelled.record["probe_set"]["labels"]
    probe_set = ProbeSet.from_folder(folder, open_model(BASELINE).preprocessing)
    assert measure(BASELINE, probe_set, labels="none", **settings).record["predictions"]["top1_accuracy"] is None


def test_arrays__integers_are_places_in_a_list_of_names() -> None:
    """Names of classes beside labels that are class numbers already: the labels stay, and the classes have names."""
    pixels = np.zeros((6, 4, 4, 3), np.uint8)
    labels = np.array([0, 9, 3, 3, 1, 0])
    plain = ProbeSet.from_array(pixels, SIZE, labels)
    named = ProbeSet.from_array(pixels, SIZE, labels, classes=NAMES)
    assert named.sha256 == plain.sha256
    assert named.labels is not None
    assert plain.labels is not None
    assert named.labels.tolist() == plain.labels.tolist()
    assert named.names_of_labels == dict(enumerate(NAMES))
    assert plain.names_of_labels == {}
    with pytest.raises(ProbeError, match="the source has 11 classes, the model 10"):
        ProbeSet.from_array(pixels, SIZE, labels, classes=[*NAMES, "hat"]).labels_for(10)


@pytest.mark.parametrize("wrong", [10, -1])
def test_arrays__integers_beyond_a_list_of_names(wrong: int) -> None:
    with pytest.raises(ProbeError, match=f"lists 10 classes, but not '{wrong}'"):
        ProbeSet.from_array(np.zeros((2, 4, 4, 3), np.uint8), SIZE, np.array([0, wrong]), classes=NAMES)


def test_arrays__integers_that_are_listed_are_looked_up() -> None:
    found = ProbeSet.from_array(np.zeros((3, 4, 4, 3), np.uint8), SIZE, np.array([0, 1, 2]), classes=["2", "1", "0"])
    plain = ProbeSet.from_array(np.zeros((3, 4, 4, 3), np.uint8), SIZE, np.array([0, 1, 2]))
    assert found.labels is not None
    assert plain.labels is not None
    assert found.labels.tolist() == [2 - label for label in plain.labels]
