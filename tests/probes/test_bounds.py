"""Files that attack: whatever they promise, images are right, or left out with a reason, or the source is refused."""

import socket
import struct
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import layercrit.probes.decoding
from hostile_files import (
    image_folder,
    images_of,
    nested,
    no_more_memory_than,
    nobody_waits,
    npy,
    npz,
    pipe,
    png,
    sparse,
    tar_member,
    whole,
    zip_that_promises,
)
from layercrit.errors import ProbeError, TrainingError
from layercrit.machine import available_memory
from layercrit.probes.bounds import LARGEST_IMAGE
from layercrit.probes.images import Preprocessing
from layercrit.probes.opening import open_source
from layercrit.probes.parquet import BATCH_ROWS
from layercrit.probes.probe_set import ProbeSet
from layercrit.training.data import open_training_data
from packed_images import items_of, save_dataset
from photographs import encoded, piece, pieces

SMALL = Preprocessing(height=8, width=8, resize=None)
unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")


def opened(source: Any, **options: Any) -> ProbeSet:
    return ProbeSet.from_source(source, SMALL, **options)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercrit.probes.bounds.available_memory", lambda: 4 * 2**20)


# Special files


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as endless:
        endless.bind(str(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": pipe,
    "a link to a pipe": lambda path: path.symlink_to(pipe(path.with_name("pipe"))),
    "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a socket": bound_socket,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing.png"),
}


@unix
@pytest.mark.parametrize("kind", SPECIAL)
def test_folder__a_special_file_is_left_out(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "images")
    plain = images_of(opened(folder))
    monkeypatch.chdir(folder)  # names of sockets are short
    SPECIAL[kind](Path("special.png"))
    with nobody_waits(Path("special.png").absolute()), no_more_memory_than(2**24):
        probe_set = opened(folder)
    assert images_of(probe_set) == plain
    assert [skipped.partition(":")[0] for skipped in probe_set.skipped] == ["special.png"]
    with pytest.raises(ProbeError, match=r"special\.png"):
        opened(folder, max_unreadable=0)


@unix
@pytest.mark.parametrize("kind", ["a pipe", "a link to a device without end"])
def test_training__a_special_file_is_refused(kind: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image_folder(tmp_path / name, 4)
    SPECIAL[kind](tmp_path / "cat" / "special.png")
    with nobody_waits(tmp_path / "cat" / "special.png"), pytest.raises(TrainingError, match=r"special\.png"):
        open_training_data(tmp_path)


@unix
@pytest.mark.parametrize("link", [False, True], ids=["itself", "behind a link"])
@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.tar", "x.parquet", "t10k-images-idx3-ubyte.gz", "images"])
def test_source__a_pipe_is_refused(name: str, link: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    if link:
        path.symlink_to(pipe(tmp_path / "pipe"))
    else:
        pipe(path)
    with nobody_waits(path), pytest.raises(ProbeError, match="is a named pipe"):
        opened(path)


@unix
@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_source__a_pipe_among_shards_is_refused(name: str, tmp_path: Path) -> None:
    pipe(tmp_path / name)
    for source in (tmp_path, tmp_path / f"*{Path(name).suffix}"):
        with nobody_waits(tmp_path / name), pytest.raises(ProbeError, match="is a named pipe"):
            opened(source)


@unix
def test_source__a_device_is_refused() -> None:
    with pytest.raises(ProbeError, match="is a device"):
        opened("/dev/zero")


@unix
def test_source__a_pipe_in_a_saved_dataset_is_refused(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved")
    data = next((tmp_path / "saved").glob("*.arrow"))
    data.unlink()
    pipe(data)
    with nobody_waits(data), pytest.raises(ProbeError, match="named pipe"):
        opened(tmp_path / "saved")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b.npz", "~nobody-of-this-name/x.npz", "loop.npz", "x" * 5000 + ".tar"]
)
def test_source__a_name_that_cannot_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.npz").symlink_to("loop.npz")
    with pytest.raises(ProbeError):
        opened(name)


def test_source__a_question_mark_after_a_path_that_exists(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pieces(4, 8))
    with pytest.raises(ProbeError, match=r"'.*x\.npy' exists"):
        opened(f"{tmp_path}/x.npy?")
    np.save(tmp_path / "x.npy?.npy", pieces(4, 8))
    assert opened(f"{tmp_path}/x.npy?.npy").n_images == 4


def test_folder__files_of_systems_are_no_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image_folder(tmp_path / name, 4)
    plain = images_of(opened(tmp_path))
    assert {label for _, label in plain.values()} == {0, 1}
    for name in (".DS_Store", "._.DS_Store", "Thumbs.db", "desktop.ini", "cat/Thumbs.db", "dog/._00.png", "cat/.x.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert images_of(opened(tmp_path, max_unreadable=0)) == plain


# Arrays


HEADERS = {
    "a shape of 730 GiB": npy((730 * 2**30 // 48, 4, 4, 3), bytes(48)),
    "a shape beyond 64 bits": npy((2**62, 4, 4, 3), bytes(48)),
    "a negative length": npy((-1, 4, 4, 3), bytes(480)),
    "nine thousand signs": b"\x93NUMPY\1\0" + struct.pack("<H", 9001) + b"-" * 9000 + b"1",
    "parentheses": b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000,
    "a header of gigabytes": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b" " * 100,
}


@pytest.mark.parametrize("header", HEADERS)
def test_arrays__a_header_that_lies(header: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(HEADERS[header])
    images = npy((4, 8, 8, 3), bytes(4 * 8 * 8 * 3))
    npz(tmp_path / "x.npz", images=HEADERS[header])
    npz(tmp_path / "labelled.npz", images=images, labels=HEADERS[header])
    for name in ("x.npy", "x.npz", "labelled.npz"):
        with no_more_memory_than(2**24), pytest.raises(ProbeError, match=name):
            opened(tmp_path / name)


def test_arrays__a_zip_file_that_promises_more_than_it_can_contain(tmp_path: Path) -> None:
    with no_more_memory_than(2**24), pytest.raises(ProbeError, match="cannot contain"):
        opened(zip_that_promises(tmp_path / "x.npz", 2**28 - 2**28 % 48))


def test_arrays__zeros_beyond_the_memory_are_refused_before_they_are_unpacked(
    tmp_path: Path, little_memory: None
) -> None:
    images = np.zeros((20_000, 8, 8, 3), np.uint8)
    np.savez_compressed(tmp_path / "large.npz", images=images)
    np.savez_compressed(tmp_path / "small.npz", images=images[:1000])
    np.savez_compressed(
        tmp_path / "parts.npz", images=images[:9], labels=np.zeros(9), test_images=images, test_labels=0
    )
    np.save(tmp_path / "large.npy", images)
    with no_more_memory_than(2**20), pytest.raises(ProbeError, match=r"would take 0\.00358 GiB .* 0\.00391 GiB avail"):
        opened(tmp_path / "large.npz")
    with pytest.raises(ProbeError, match="would take"):
        open_training_data(tmp_path / "parts.npz")
    assert opened(tmp_path / "small.npz", n_images=None).sha256 == opened(images[:1000], n_images=None).sha256
    assert opened(tmp_path / "large.npy", n_images=9).sha256 == opened(images, n_images=9).sha256


def test_idx__zeros_beyond_the_memory_are_refused_before_they_are_unpacked(tmp_path: Path, little_memory: None) -> None:
    import gzip

    for n_images, name in ((60_000, "large"), (1000, "small")):
        header = struct.pack(">IIII", 0x803, n_images, 8, 8)
        path = tmp_path / f"{name}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(header + bytes(n_images * 64)))
    with no_more_memory_than(2**20), pytest.raises(ProbeError, match="would take"):
        opened(tmp_path / "large-images-idx3-ubyte.gz")
    assert opened(tmp_path / "small-images-idx3-ubyte.gz").n_images == 1000


def test_source__more_images_than_can_be_put_in_order(little_memory: None) -> None:
    with pytest.raises(ProbeError, match="The order of the 100,000 images"):
        opened(np.zeros((100_000, 2, 2), np.uint8))


# Tar files


def tar(path: Path, *members: bytes) -> Path:
    path.write_bytes(b"".join(members) + bytes(1024))
    return path


@pytest.fixture
def image() -> bytes:
    return encoded(piece(0, 8, 8), "PNG")


@pytest.mark.parametrize(
    "member",
    [
        tar_member("b.png", 8 * 2**30),
        tar_member("b.png", -512),
        tar_member("b.png", -100),
        tar_member("b.png", 2**80),
        tar_member("x", 2**60, kind=tarfile.XHDTYPE),
        tar_member("x", 2**60, kind=tarfile.GNUTYPE_LONGNAME),
        tar_member("x", -1024, kind=tarfile.CONTTYPE),
        tar_member("x", -1024, kind=b"?"),
    ],
    ids=["more than there is", "backwards", "less than nothing", "beyond 64 bits", "extended header", "long name",
         "contiguous", "of unknown kind"],
)  # fmt: skip
def test_tar__a_member_that_lies(member: bytes, image: bytes, tmp_path: Path) -> None:
    with no_more_memory_than(2**24), pytest.raises(ProbeError, match=r"x\.tar"):
        opened(tar(tmp_path / "x.tar", whole("a.png", image), member))


def test_tar__an_extended_header_of_gigabytes(image: bytes, tmp_path: Path) -> None:
    beginning = whole("a.png", image) + tar_member("x", 2**31, kind=tarfile.XHDTYPE)
    with no_more_memory_than(2**24), pytest.raises(ProbeError, match=r"x\.tar"):
        opened(sparse(tmp_path / "x.tar", 2**32, beginning))


def test_tar__an_image_of_gigabytes_is_left_out(image: bytes, tmp_path: Path) -> None:
    beginning = whole("a.png", image) + tar_member("b.png", 2 * LARGEST_IMAGE)
    with no_more_memory_than(2**24):
        probe_set = opened(sparse(tmp_path / "x.tar", 3 * LARGEST_IMAGE, beginning), max_unreadable=0.5)
    assert probe_set.names == ("x.tar[a.png]",)
    assert len(probe_set.skipped) == 1


def test_tar__a_label_of_gigabytes_is_refused(image: bytes, tmp_path: Path) -> None:
    beginning = whole("a.png", image) + tar_member("a.cls", 2 * LARGEST_IMAGE)
    with no_more_memory_than(2**24), pytest.raises(ProbeError, match=r"a\.cls|a\.png"):
        opened(sparse(tmp_path / "x.tar", 3 * LARGEST_IMAGE, beginning))


@pytest.mark.parametrize(
    ("suffix", "label"),
    [
        ("cls", b"9" * 5000),
        ("cls", b"-" + b"9" * 5000),
        ("json", b'{"label": ' + b"9" * 5000 + b"}"),
        ("json", b'{"label": 99999999999999999999}'),
        ("json", nested().encode()),
        ("json", b'{"label": ' * 10**5),
    ],
    ids=["digits", "negative", "digits in JSON", "beyond 64 bits", "lists in lists", "mappings in mappings"],
)
def test_tar__a_label_that_is_none(suffix: str, label: bytes, image: bytes, tmp_path: Path) -> None:
    source = tar(tmp_path / "x.tar", whole("a.png", image), whole(f"a.{suffix}", label))
    with pytest.raises(ProbeError) as refused:
        opened(source)
    assert len(str(refused.value)) < 600


def test_tar__names_are_no_paths(image: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(encoded(piece(9, 8, 8), "PNG"))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere.png")
    members = [whole("../elsewhere.png", image), whole(str(tmp_path / "elsewhere.png"), image), link.tobuf()]
    probe_set = opened(tar(tmp_path / "x.tar", *members))
    assert probe_set.n_images == 2
    assert len({pixels for pixels, _ in images_of(probe_set).values()}) == 1
    assert (tmp_path / "elsewhere.png").read_bytes() != image


# Parquet


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and bytes of all batches read from now on."""
    seen: list[tuple[int, int]] = []
    plain = pq.ParquetFile.iter_batches

    def spied(self: Any, *arguments: Any, **options: Any) -> Any:
        for batch in plain(self, *arguments, **options):
            seen.append((batch.num_rows, batch.nbytes))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spied)
    return seen


@pytest.mark.parametrize("repeated", [True, False], ids=["one value for all rows", "values of zeros"])
def test_parquet__large_values_come_in_small_batches(
    repeated: bool, image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layercrit.probes.parquet.BATCH_BYTES", 2**20)
    value = image + bytes(2**19)
    images = pa.array([value] * 200, pa.binary())
    pq.write_table(
        pa.table({"image": images}),
        tmp_path / "x.parquet",
        use_dictionary=repeated,
        compression="zstd",
        row_group_size=100,
    )
    seen = batch_sizes(monkeypatch)
    probe_set = opened(tmp_path / "x.parquet")
    assert {pixels for pixels, _ in images_of(probe_set).values()} == {opened(piece_array()).images[0].tobytes()}
    assert max(n_bytes for _, n_bytes in seen) <= 2**20


def piece_array() -> np.ndarray:
    return np.asarray(piece(0, 8, 8))[None]


def test_parquet__a_row_group_that_memory_cannot_hold_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layercrit.probes.parquet.BATCH_BYTES", 2**20)
    pq.write_table(pa.table({"image": [bytes(2**22)] * 4}), tmp_path / "x.parquet", use_dictionary=False)
    monkeypatch.setattr("layercrit.probes.bounds.available_memory", lambda: 2**24)
    with pytest.raises(ProbeError, match="smaller row groups"):
        opened(tmp_path / "x.parquet")


def test_parquet__ordinary_images_come_in_large_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(piece(number, 64, 64), "PNG") for number in range(300)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", use_dictionary=False)
    monkeypatch.setattr("layercrit.probes.parquet.BATCH_BYTES", 7 * sum(map(len, images)))
    seen = batch_sizes(monkeypatch)
    assert [content for content, _ in items_of(open_source(tmp_path / "x.parquet"))] == images
    assert max(n_rows for n_rows, _ in seen) == BATCH_ROWS


# Single images


LARGE_IMAGES = {
    "a header of 60,000 x 60,000 pixels": lambda: png(60_000, 60_000),
    "a header of 2**31 pixels": lambda: png(2**31 - 1, 1),
    "a colour profile of gigabytes": lambda: png(8, 8, (b"iCCP", b"k\0\0" + zeros(2**30))),
    "a text of gigabytes": lambda: png(8, 8, (b"zTXt", b"k\0\0" + zeros(2**30))),
    "another text of gigabytes": lambda: png(8, 8, (b"iTXt", b"k\0\1\0\0\0" + zeros(2**30))),
}


@cache
def zeros(n_bytes: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(n_bytes // 2**20)), packer.flush()])


@pytest.mark.parametrize("limit", ["Pillow's limit", "no limit"])
@pytest.mark.parametrize("kind", LARGE_IMAGES)
def test_images__one_that_would_fill_the_memory_is_left_out(
    kind: str, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "no limit":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    before = Image.MAX_IMAGE_PIXELS
    folder = image_folder(tmp_path / "images")
    plain = images_of(opened(folder))
    (folder / "x.png").write_bytes(LARGE_IMAGES[kind]())
    with no_more_memory_than(2**27):
        probe_set = opened(folder)
    assert images_of(probe_set) == plain
    assert len(probe_set.skipped) == 1
    assert before == Image.MAX_IMAGE_PIXELS


def test_images__a_file_of_gigabytes_is_left_out(tmp_path: Path, image: bytes) -> None:
    folder = image_folder(tmp_path / "images")
    plain = images_of(opened(folder))
    sparse(folder / "x.png", LARGEST_IMAGE + 1, image)
    with no_more_memory_than(2**24):
        probe_set = opened(folder)
    assert images_of(probe_set) == plain
    assert len(probe_set.skipped) == 1


def test_images__a_thin_one_does_not_grow_without_end_where_pillow_has_no_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="would be resized to"):
        Preprocessing(height=256, width=256, resize=256)(Image.new("RGB", (1, 100_000)))


@pytest.mark.parametrize("limit", [1, 2**28], ids=["large images", "small images"])
def test_images__large_ones_are_decoded_one_at_a_time(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(tmp_path / "images")
    plain = opened(folder).sha256
    monkeypatch.setattr(layercrit.probes.decoding, "_LARGE", limit)
    at_once, together, lock = 0, [], threading.Lock()
    decoded = layercrit.probes.decoding.decoded

    def counted(image: Image.Image) -> Image.Image:
        nonlocal at_once
        with lock:
            at_once += 1
            together.append(at_once)
        threading.Event().wait(0.01)
        image = decoded(image)
        with lock:
            at_once -= 1
        return image

    monkeypatch.setattr(layercrit.probes.decoding, "decoded", counted)
    assert opened(folder, n_threads=4).sha256 == plain
    assert (max(together) == 1) == (limit == 1)


def test_images__only_some_bytes_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(piece(number, 8, 8), "BMP") for number in range(40)]
    source = open_source(tar(tmp_path / "x.tar", *(whole(f"{n:02d}.bmp", image) for n, image in enumerate(images))))
    read, n_ahead = 0, []
    plain = source.read

    def counted(*arguments: Any) -> Any:
        nonlocal read
        for item in plain(*arguments):
            read += 1
            yield item

    monkeypatch.setattr(source, "read", counted)
    monkeypatch.setattr(layercrit.probes.decoding, "_LARGE", 3 * len(images[0]))
    probe_set = opened(source, n_threads=4, progress=lambda done, _: n_ahead.append(read - done))
    assert probe_set.n_images == 40
    assert max(n_ahead) <= 3


# Saved data sets


STATES = {
    "a number for the files": '{"_data_files": 3, "_fingerprint": "a"}',
    "no mapping": "[1]",
    "deeply nested": nested(),
    "an integer of 5,000 digits": '{"_data_files": [], "_split": ' + "9" * 5000 + "}",
    "a file elsewhere": '{"_data_files": [{"filename": "../elsewhere.arrow"}]}',
    "a file by its absolute path": '{"_data_files": [{"filename": "/dev/zero"}]}',
    "a name that is a list": '{"_data_files": [{"filename": [1]}]}',
}


@pytest.mark.parametrize(
    ("file", "state"),
    [*(("state.json", state) for state in STATES), *(("dataset_info.json", state) for state in list(STATES)[1:4])],
)
def test_saved_dataset__odd_json(file: str, state: str, tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved")
    (tmp_path / "saved" / file).write_text(STATES[state])
    with pytest.raises(ProbeError, match="Cannot read the data set"):
        opened(tmp_path / "saved")


def test_available_memory__is_that_of_this_machine() -> None:
    available = available_memory()
    assert available is None or 2**20 < available < 2**50


def test_labels__an_integer_of_5000_digits_in_an_array() -> None:
    with pytest.raises(ProbeError):
        ProbeSet.from_array(pieces(2, 8), SMALL, [10**5000, 1])


@unix
def test_source__where_the_current_folder_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "images", 3)
    plain = images_of(opened(folder))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert images_of(opened(folder)) == plain
    for source in (".", "images", "x.npz", "*.tar"):
        with pytest.raises(ProbeError):
            opened(source)


@pytest.mark.parametrize("pattern", ["x-{0..99999999999}.tar", "x-{0..%s}.tar" % ("9" * 5000)])
def test_shards__a_range_without_end(pattern: str, tmp_path: Path) -> None:
    with no_more_memory_than(2**24), pytest.raises(ProbeError):
        opened(tmp_path / pattern)


def test_saved_dataset__reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved")
    data = next((tmp_path / "saved").glob("*.arrow"))
    data.rename(tmp_path / "elsewhere.arrow")
    state = tmp_path / "saved" / "state.json"
    for name in ("../elsewhere.arrow", str(tmp_path / "elsewhere.arrow")):
        state.write_text(state.read_text().replace(data.name, name))
        with pytest.raises(ProbeError, match="not in its folder"):
            opened(tmp_path / "saved")
        state.write_text(state.read_text().replace(name, data.name))
