import gzip
import json
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from layercrit.errors import ProbeError
from layercrit.probes.tar import TarSource
from packed_images import IMAGES, items_of, origin_of, write_tar
from photographs import encoded, piece


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
    assert origin_of(source) == "the members *.cls and *.json"


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
        ("0.cls", b"\xff", "b'\\xff'"),
        ("0.cls", b"1.5", "'1.5'"),
        ("0.json", b'{"label": 1.5}', "1.5"),
        ("0.json", b"{", "b'{'"),
    ],
)
def test_tar_source__labels_that_are_no_integers(name: str, content: bytes, shown: str, tmp_path: Path) -> None:
    source = TarSource(write_tar(tmp_path / "x.tar", {"0.jpg": IMAGES[0], name: content}))
    with pytest.raises(ProbeError, match=rf"Labels must be integers.*'x.tar\[0.jpg\]' is {re.escape(shown)}"):
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
