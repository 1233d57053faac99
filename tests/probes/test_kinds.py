"""Kinds of images with a name: how they are registered, written and opened."""

import numpy as np
import pytest

from layercrit.errors import ProbeError
from layercrit.probes import ArraySource, image_source
from layercrit.probes.kinds import IMAGE_SOURCES, kind_of, named_kind, without_split
from layercrit.probes.opening import open_source
from layercrit.probes.parts import NoSuchPartError


@pytest.fixture(autouse=True)
def noise():
    """A kind of random images, with parts."""

    @image_source("noise")
    def open_noise(rest, options):
        """Random images."""
        n = int(rest) + (options.pop("split", "train") == "test")
        return ArraySource(np.random.default_rng(0).integers(0, 256, (n, 4, 4), np.uint8))

    @image_source("plain")
    def open_plain(rest, options):
        """Black images."""
        return ArraySource(np.zeros((int(rest), 4, 4), np.uint8)) if rest.isdigit() else rest

    yield
    del IMAGE_SOURCES["noise"], IMAGE_SOURCES["plain"]


@pytest.mark.parametrize(
    ("text", "split", "n_images", "description"),
    [
        ("noise:5", None, 5, "noise:5"),
        ("noise:5?split=test", None, 6, "noise:5?split=test"),
        ("noise:5", "test", 6, "noise:5?split=test"),
        ("corrupt:brightness@1:noise:5", None, 5, "corrupt:brightness@1:noise:5"),
    ],
)
def test_open_source__of_a_kind(text, split, n_images, description):
    source = open_source(text, split=split)
    assert (len(source), source.description) == (n_images, description)


def test_open_source__a_file_of_this_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "noise:5.npy", np.zeros((2, 4, 4), np.uint8))
    assert (kind_of("noise:5.npy"), kind_of("noise:5")) == (None, "noise")
    assert len(open_source("noise:5.npy")) == 2


def test_kind_of__texts_that_no_file_can_be_named():
    for rest in ("x" * 300, "a\0b"):
        assert kind_of(f"noise:{rest}") == "noise"
        assert without_split(f"{rest}?split=test") == (rest, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise:5?seed=3", "the kind of images 'noise' has no option 'seed'"),
        ("plain:x", "the kind of images 'plain' returned str; expected an ImageSource"),
        ("nosie:5", "neither a file nor a folder, and there is no kind of images 'nosie'. Did you mean 'noise'"),
        ("https://x.org/a.npz", "No such file or folder: .* Images are never downloaded"),
    ],
)
def test_open_source__what_is_wrong(text, message):
    with pytest.raises(ProbeError, match=message):
        open_source(text)


def test_open_source__parts_of_a_kind_without_any():
    """So that training holds out some images in place of a part."""
    with pytest.raises(NoSuchPartError, match="has no option 'split'"):
        open_source("plain:5", split="train")


@pytest.mark.parametrize("name", ["corrupt", "attack", "c"])
def test_image_source__names_that_mean_something_else(name):
    with pytest.raises(ProbeError, match="cannot be named"):
        image_source(name)(len)


def test_named_kind__of_texts():
    assert [named_kind(one) for one in ("lab:x", "lab:/x", "http://x", "a/b:c", "C:/x", "x")] == [
        "lab", "lab", None, None, None, None
    ]  # fmt: skip


def test_without_split__of_a_kind_stays():
    assert without_split("noise:5?n=2&split=test") == ("noise:5?n=2&split=test", "test")
    assert without_split("noise:5") == ("noise:5", None)
    assert without_split("x.npz?split=test") == ("x.npz", "test")
