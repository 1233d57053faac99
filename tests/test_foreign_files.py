import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile_files import nested, no_more_memory_than, nobody_waits, pipe, sparse
from layercrit.errors import LayercritError, ModelError, ProbeError, TrainingError
from layercrit.foreign_files import open_regular, parse_json, read_json, read_regular
from layercrit.measurement import Measurement
from layercrit.models.references import open_model
from layercrit.probes.probe_set import ProbeSet
from layercrit.study.packing import unpack
from layercrit.training.runs import RunFolder
from photographs import pieces

unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")


def test_open_regular__reads_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"


@unix
def test_open_regular__waits_for_nobody(tmp_path: Path) -> None:
    with nobody_waits(pipe(tmp_path / "pipe")):
        for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
            with pytest.raises(OSError):  # noqa: PT011 - of one kind or another
                open_regular(path)


def test_read_regular__up_to_a_number_of_bytes(tmp_path: Path) -> None:
    assert read_regular(sparse(tmp_path / "file", 1000), 1000) == bytes(1000)
    with pytest.raises(ValueError, match=r"1,000 bytes, more than 999"):
        read_regular(tmp_path / "file", 999)
    with no_more_memory_than(2**20), pytest.raises(ValueError, match="bytes"):
        read_json(sparse(tmp_path / "large.json", 2**40))


@pytest.mark.parametrize("text", [nested(), '{"a":' * 10**5, "9" * 5000, '{"a": 1', "", "\0"])
def test_parse_json__what_cannot_be_read_is_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of the JSON module or ours
        parse_json(text)


def test_parse_json__what_can_be_read() -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": json.loads("[" * 100 + "]" * 100)}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


def load_probe_set(folder: Path, text: str) -> None:
    ProbeSet.from_array(pieces(2, 224)).save(folder)
    (folder / "probe_set.json").write_text(text)
    ProbeSet.load(folder)


def load_measurement(folder: Path, text: str) -> None:
    (folder / "measurement.json").write_text(text)
    Measurement.load(folder)


def load_run(folder: Path, text: str) -> None:
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_text(text)
    RunFolder(folder).finished()


def load_model(folder: Path, text: str) -> None:
    import torch

    torch.save({"weight": torch.zeros(2)}, folder / "weights.pth")
    (folder / "weights.json").write_text(text)
    open_model(f"file:{folder}/weights.pth")


READERS: dict[type[LayercritError], Callable[[Path, str], Any]] = {
    ProbeError: load_probe_set,
    LayercritError: load_measurement,
    TrainingError: load_run,
    ModelError: load_model,
}


@pytest.mark.parametrize("text", [nested(), '{"format": ' + "9" * 5000 + "}", "[]", "7"],
                         ids=["nested", "digits", "a list", "a number"])  # fmt: skip
@pytest.mark.parametrize("error", READERS)
def test_json__of_each_kind_of_file(error: type[LayercritError], text: str, tmp_path: Path) -> None:
    with pytest.raises(error):
        READERS[error](tmp_path, text)


def test_unpack__deeply_nested_header() -> None:
    header = nested().encode()
    with pytest.raises(ValueError, match="nested"):
        unpack(len(header).to_bytes(4, "little") + header)
