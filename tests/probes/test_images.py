import math
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import center_crop

from layercrit.errors import ProbeError
from layercrit.probes.images import FORMATS, STANDARD, SUFFIXES, CropOffset, Preprocessing, open_image
from photographs import FOLDER, NAMES, encoded, photograph, piece

# (width, height); the last ones are smaller than most crops, or have odd differences to them.
SIZES = [(451, 300), (37, 300), (300, 37), (224, 224), (223, 225), (256, 257), (50, 41), (3, 40)]


def cut(width: int, height: int) -> Image.Image:
    return photograph(NAMES[1]).resize((max(451, width), max(300, height))).crop((0, 0, width, height))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (96, 0.95), (33, 1.0)])
def test_preprocessing__bits_of_timm(interpolation: str, size: int, crop_pct: float) -> None:
    reference = create_transform(
        (3, size, size), is_training=False, interpolation=interpolation, crop_pct=crop_pct, use_prefetcher=True
    )
    ours = Preprocessing(3, size, size, math.floor(size / crop_pct), interpolation)
    for width, height in SIZES:
        image = cut(width, height)
        assert np.array_equal(ours(image), np.asarray(reference(image))), (width, height)


@pytest.mark.parametrize(("height", "width", "crop_pct"), [(96, 96, 0.9), (96, 64, 1.0), (64, 96, 0.875)])
def test_preprocessing__bits_of_timm_squash(height: int, width: int, crop_pct: float) -> None:
    reference = create_transform(
        (3, height, width),
        is_training=False,
        interpolation="bicubic",
        crop_pct=crop_pct,
        crop_mode="squash",
        use_prefetcher=True,
    )
    resize = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    ours = Preprocessing(3, height, width, resize, "bicubic")
    for size in SIZES:
        assert np.array_equal(ours(cut(*size)), np.asarray(reference(cut(*size)))), size


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (232, 224), (39, 32), (40, 57)])
def test_preprocessing__bits_of_torchvision(interpolation: str, resize: int, size: int) -> None:
    reference = ImageClassification(
        crop_size=size,
        resize_size=resize,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=InterpolationMode(interpolation),
    )
    ours = Preprocessing(3, size, size, resize, interpolation)
    for width, height in SIZES:
        image = cut(width, height)
        assert torch.equal(torch.from_numpy(ours(image)).float().div(255), reference(image)), (width, height)


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing__bits_of_torchvision_on_whole_photographs(name: str) -> None:
    reference = ImageClassification(crop_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    image = open_image(FOLDER / name)
    expected = reference(image.convert("RGB"))
    assert torch.equal(torch.from_numpy(STANDARD(image)).float().div(255), expected)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 60), (60, 31), (299, 299), (40, 3)])
def test_preprocessing__crops_and_pads_without_resize_as_torchvision(height: int, width: int) -> None:
    for size in SIZES:
        expected = np.asarray(center_crop(cut(*size), [height, width])).transpose(2, 0, 1)
        assert np.array_equal(Preprocessing(3, height, width, None)(cut(*size)), expected), size


def test_preprocessing__grey_before_resizing_as_timm() -> None:
    reference = create_transform((1, 64, 64), is_training=False, interpolation="bilinear", use_prefetcher=True)
    image = cut(451, 300)
    pixels = Preprocessing(1, 64, 64, 73)(image)
    assert pixels.shape == (1, 64, 64)
    assert np.array_equal(pixels, np.asarray(reference(image.convert("L"))))


def test_preprocessing__result_is_contiguous_uint8() -> None:
    pixels = STANDARD(cut(300, 37))
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 224, 224), np.uint8, True)


def test_preprocessing__at_size_does_not_resize() -> None:
    image = cut(64, 64)
    ours = Preprocessing(3, 64, 64, 73)
    assert np.array_equal(ours.at_size(image), np.asarray(image).transpose(2, 0, 1))
    assert not np.array_equal(ours.at_size(image), ours(image))


@pytest.mark.parametrize(
    ("preprocessing", "size", "kept"),
    [
        (Preprocessing(1, 28, 28, 28), (28, 28), True),
        (Preprocessing(3, 28, 28, None), (28, 28), True),
        (Preprocessing(3, 20, 30, (20, 30)), (20, 30), True),
        (Preprocessing(3, 20, 30, 20), (20, 30), True),
        (Preprocessing(3, 28, 28, 32), (28, 28), False),
        (Preprocessing(3, 28, 28, None), (32, 32), False),
        (Preprocessing(3, 28, 28, 28), (28, 56), False),
        (Preprocessing(3, 20, 30, 30), (20, 30), False),
    ],
)
def test_preprocessing__keeps_says_whether_pixels_stay(
    preprocessing: Preprocessing, size: tuple[int, int], kept: bool
) -> None:
    image = cut(size[1], size[0]).convert("L" if preprocessing.channels == 1 else "RGB")
    before = np.asarray(image).reshape(*size, preprocessing.channels).transpose(2, 0, 1)
    assert (preprocessing.keeps(*size), np.array_equal(preprocessing(image), before)) == (kept, kept)


def test_preprocessing__offsets_of_a_half() -> None:
    """Python and torchvision round half to even."""
    image = Image.fromarray(np.arange(40, dtype=np.uint8)[None])  # of one row

    def first(width: int, offset: CropOffset) -> int:
        return int(Preprocessing(1, 1, width, None, crop_offset=offset)(image).flat[0])

    assert [first(width, "rounded") for width in (36, 37, 38, 39)] == [2, 2, 1, 0]
    assert [first(width, "rounded down") for width in (36, 37, 38, 39)] == [2, 1, 1, 0]


def test_preprocessing__is_written_as_before_there_were_two_offsets() -> None:
    """Studies compare this text with the one of the images that they have decoded."""
    before = "Preprocessing(channels=3, height=224, width=224, resize=256, interpolation='bilinear', crop=True"
    assert str(Preprocessing()) == f"{before})"
    assert str(Preprocessing(crop_offset="rounded down")) == f"{before}, crop_offset='rounded down')"


def test_preprocessing__without_crop() -> None:
    image = cut(64, 64)
    expected = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(Preprocessing(3, 64, 64, None, crop=False)(image), expected)
    squashed = Preprocessing(3, 30, 20, (30, 20), crop=False)(image)
    assert np.array_equal(squashed, np.asarray(image.resize((20, 30), Image.Resampling.BILINEAR)).transpose(2, 0, 1))
    with pytest.raises(ValueError, match="64 x 64 pixels, not 30 x 30"):
        Preprocessing(3, 30, 30, None, crop=False)(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_preprocessing__modes_convert_as_pillow_does(mode: str, channels: int) -> None:
    image = photograph(NAMES[0]).resize((32, 32)).convert(mode)
    expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(32, 32, channels)
    assert np.array_equal(Preprocessing(channels, 32, 32, None)(image), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_preprocessing__16_bit_grey_keeps_its_high_byte(kind: str) -> None:
    grey = np.asarray(cut(32, 32).convert("L"))
    # 8 bits stretched to 16, as converters write it: x * 257.
    try:
        written = encoded(Image.fromarray(grey.astype(np.uint16) * 257), kind)
    except OSError:
        pytest.skip(f"this version of Pillow does not write 16 bits as {kind}")
    image = open_image(written)
    assert image.mode in ("I;16", "I;16B", "I")
    assert np.array_equal(Preprocessing(1, 32, 32, None)(image)[0], grey)
    assert np.array_equal(Preprocessing(3, 32, 32, None)(image), np.stack([grey] * 3))


@pytest.mark.parametrize(
    ("pixels", "what"),
    [
        (np.full((8, 8), 0.5, np.float32), "floats"),
        (np.full((8, 8), 70000, np.int32), "32-bit"),
        (np.full((8, 8), -1, np.int32), "32-bit"),
    ],
)
def test_preprocessing__refuses_pixels_without_a_range(pixels: np.ndarray, what: str) -> None:
    with pytest.raises(ValueError, match=rf"{what}.*whose range no image format defines"):
        STANDARD(Image.fromarray(pixels))


def test_preprocessing__refuses_to_grow_a_thin_image_without_end() -> None:
    with pytest.raises(ValueError, match="1 x 9999999 pixels would be resized to 256 x 2559999744"):
        STANDARD(Image.new("L", (9_999_999, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 4}, "channels must be 3 .RGB. or 1 .grey.; got 4"),
        ({"height": 0}, "sizes must be positive; got height 0"),
        ({"width": -1}, "sizes must be positive.*width -1"),
        ({"resize": 0}, "sizes must be positive.*resize 0"),
        ({"resize": (0, 4)}, "sizes must be positive.*resize .0, 4."),
        ({"interpolation": "bicubik"}, "Unknown interpolation 'bicubik'. Did you mean 'bicubic'"),
        ({"crop": False}, r"Without a crop, resize=256 does not give 224 x 224 pixels. Use resize=\(224, 224\)"),
        ({"crop": False, "resize": (1, 2)}, r"Without a crop, resize=\(1, 2\)"),
        ({"crop_offset": "rounded up"}, "Unknown crop_offset 'rounded up'. Did you mean 'rounded'"),
    ],
)
def test_preprocessing__refuses_settings(settings: dict, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Preprocessing(**settings)


@pytest.mark.parametrize("kind", FORMATS)
def test_open_image__every_format(kind: str, tmp_path: Path) -> None:
    content = encoded(piece(0), kind)
    (tmp_path / "file").write_bytes(content)
    for image in (open_image(content), open_image(tmp_path / "file")):
        assert image.size == (40, 30)
        assert np.abs(STANDARD(image).astype(int) - STANDARD(piece(0))).mean() < 30


def test_open_image__suffixes_are_those_of_the_formats() -> None:
    of_formats = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert set(SUFFIXES) <= of_formats


def test_open_image__photograph_of_two_frames_from_a_camera() -> None:
    content = encoded(piece(0), "MPO", save_all=True, append_images=[piece(1)])
    assert np.abs(STANDARD(open_image(content)).astype(int) - STANDARD(piece(0))).mean() < 10


def test_open_image__orientation_is_left_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image = open_image(encoded(piece(0), "PNG", exif=exif))
    assert image.getexif()[0x0112] == 6
    assert np.array_equal(STANDARD(image), STANDARD(piece(0)))


def test_open_image__transparent_palette_without_a_warning() -> None:
    palette = piece(0).convert("P")
    image = encoded(palette, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(STANDARD(open_image(image)), STANDARD(palette))


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "PNG", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_open_image__cut_off(kind: str, share: float) -> None:
    content = encoded(piece(0, 200, 150), kind)
    with pytest.raises((OSError, SyntaxError, ValueError), match=r"(?i)truncated|not an image|create decoder"):
        open_image(content[: int(len(content) * share)])


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_open_image__no_image(content: bytes) -> None:
    with pytest.raises(ValueError, match=re.escape("not an image in one of the formats BMP, GIF, JPEG")):
        open_image(content)


def test_open_image__decompression_bomb() -> None:
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    bomb[18:26] = struct.pack("<ii", 20_000, 20_000)  # width and height in the header
    with pytest.raises(Image.DecompressionBombError, match="decompression bomb"):
        open_image(bytes(bomb))
