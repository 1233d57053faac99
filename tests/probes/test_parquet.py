from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layercrit.errors import ProbeError
from layercrit.probes.parquet import ParquetSource
from packed_images import IMAGES, items_of, origin_of, write_parquet


@pytest.mark.parametrize("struct_column", [True, False])
def test_parquet_source__all_rows(struct_column: bool, tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", struct_column=struct_column))
    assert items_of(source) == [(image, number) for number, image in enumerate(IMAGES)]
    assert items_of(source, use_labels=False) == [(image, None) for image in IMAGES]
    assert source.name(4) == "x.parquet[group 1, row 1]"
    assert origin_of(source) == "column 'label'"


@pytest.mark.parametrize("row_group_size", [1, 2, 7, 10])
@pytest.mark.parametrize("indices", [[0], [9], [0, 9], [2, 3], [1, 4, 5, 8], []])
def test_parquet_source__some_rows(indices: list[int], row_group_size: int, tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", row_group_size=row_group_size))
    assert items_of(source, indices) == [(IMAGES[index], index) for index in indices]


def test_parquet_source__rows_of_several_batches_of_one_group(tmp_path: Path) -> None:
    numbers = [f"{number}".encode() for number in range(1000)]
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", row_group_size=1000, image=numbers))
    wanted = [0, 63, 64, 65, 200, 999]
    assert items_of(source, wanted) == [(numbers[index], None) for index in wanted]
    assert origin_of(source) is None


def test_parquet_source__only_needed_row_groups_are_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", row_group_size=5)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    first = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
    content[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    source = ParquetSource(path)
    assert items_of(source, [6, 9]) == [(IMAGES[6], 6), (IMAGES[9], 9)]
    with pytest.raises(ProbeError, match=r"Cannot read row group 0 of '.*x.parquet'"):
        items_of(source, [1])


@pytest.mark.parametrize(
    "pattern", ["", "*.parquet", "part-{0..2}.parquet", "part-[0-2].parquet", "{part-0,part-1,part-2}.parquet"]
)
def test_parquet_source__shards(pattern: str, tmp_path: Path) -> None:
    for number, (first, n_images) in enumerate([(0, 4), (4, 1), (5, 5)]):
        write_parquet(tmp_path / f"part-{number}.parquet", first, n_images)
    write_parquet(tmp_path / ".hidden.parquet")
    source = ParquetSource(tmp_path / pattern)
    assert items_of(source) == [(image, number) for number, image in enumerate(IMAGES)]
    assert source.name(5) == "part-2.parquet[group 0, row 0]"


def test_parquet_source__pattern_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_parquet(tmp_path / "deep" / "er" / "x.parquet")
    monkeypatch.chdir(tmp_path / "deep")
    for pattern in ["er/*.parquet", "./**/*.parquet", "../*/er/x.parquet", "er/x.parquet", "er"]:
        assert len(ParquetSource(pattern)) == 10, pattern


def test_parquet_source__a_row_without_bytes_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(IMAGES[0])
    rows = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}, {"bytes": IMAGES[1], "path": None}, None]
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", image=rows))
    (without, _), (content, _), (missing, _) = items_of(source)
    assert content == IMAGES[1]
    assert isinstance(without, ValueError)
    assert isinstance(missing, ValueError)
    assert "holds no bytes" in str(without)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"1"]}, r"no images in '.*x.parquet': it has 'picture'; expected one of 'image', 'img'"),
        ({"image": [b"1"], "img": [b"1"]}, "more than one name for images or labels"),
        ({"image": pa.array([], pa.binary())}, "no images in '.*x.parquet': it has no rows"),
    ],
)
def test_parquet_source__unusable_columns(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=message):
        ParquetSource(write_parquet(tmp_path / "x.parquet", **columns))


def test_parquet_source__labels_that_are_no_integers(tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "x.parquet", image=IMAGES[:2], label=["1.5", "2"]))
    with pytest.raises(ProbeError, match=r"Labels must be integers.*x.parquet\[group 0, row 0\]' is '1.5'"):
        items_of(source)
    assert len(items_of(source, use_labels=False)) == 2


def test_parquet_source__shards_that_differ(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet")
    write_parquet(tmp_path / "2.parquet", image=IMAGES)
    with pytest.raises(ProbeError, match=r"shards of '.*' differ in their columns: .*'image', 'label'.*'image', None"):
        ParquetSource(tmp_path)


def test_parquet_source__no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"hello" * 9)
    with pytest.raises(ProbeError, match=r"Cannot read '.*x.parquet' as Parquet"):
        ParquetSource(tmp_path / "x.parquet")
    with pytest.raises(ProbeError, match=r"No such file or folder: .*y.parquet'. Did you mean 'x.parquet'"):
        ParquetSource(tmp_path / "y.parquet")
    with pytest.raises(ProbeError, match=r"no images: no .parquet file matches '.*y\*.parquet'. Accepted"):
        ParquetSource(tmp_path / "y*.parquet")
