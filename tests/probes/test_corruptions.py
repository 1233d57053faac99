import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("kornia", reason="kornia 0.9 needs Python 3.11")

from cifar_networks import IMAGES, MEAN, STD, WEIGHTS, needs_real_files
from layercrit.errors import ProbeError, TrainingError
from layercrit.models.references import open_model
from layercrit.probes import corruptions
from layercrit.probes.changes import is_change_alone, plain_source
from layercrit.probes.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, Corruption, corruption
from layercrit.probes.images import Preprocessing
from layercrit.probes.opening import open_source
from layercrit.probes.probe_set import ProbeSet
from layercrit.seeds import probe_set_seed
from layercrit.study.file import read_study_file
from layercrit.study.images import draw_images
from layercrit.study.store import Store
from layercrit.training.data import open_training_data
from photographs import piece, pieces
from small_studies import write_images, write_study

AS_THEY_ARE = Preprocessing(3, 32, 32, 32)


def photograph(height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    pixels = np.asarray(piece(0, width, height))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[:channels])


def grey_level(level: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((3, height, width), level, np.uint8)


@pytest.fixture
def registered():
    before = dict(CORRUPTIONS)
    yield
    CORRUPTIONS.clear()
    CORRUPTIONS.update(before)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", images=pieces(12, 32), labels=np.arange(12) % 3)
    return tmp_path / "images.npz"


# What each kind does


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_corruption__changes_a_photograph_more_with_severity(kind, channels):
    pixels = photograph(64, 48, channels)
    results = [Corruption(kind, severity)(pixels, 0, "a") for severity in SEVERITIES]
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in results)
    moved = [float(np.abs(one.astype(int) - pixels).mean()) for one in results]
    assert moved[0] > 0
    assert moved[4] > 1.3 * moved[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 1), (1, 2, 3), (3, 5, 2), (1, 28, 28), (3, 9, 200)])
def test_corruption__takes_images_of_any_size(kind, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for severity in (1, 5):
        result = Corruption(kind, severity)(pixels, 0, "a")
        assert (result.shape, result.dtype) == (shape, np.uint8)


@pytest.mark.parametrize(
    "kind", ["gaussian_blur", "motion_blur", "zoom_blur", "elastic_transform", "contrast", "pixelate"]
)
def test_corruption__a_plain_image_stays_as_it_is(kind):
    pixels = grey_level(77, 40, 56)
    for severity in SEVERITIES:
        assert np.array_equal(Corruption(kind, severity)(pixels, 0, "a"), pixels)


def test_brightness__adds_what_the_table_says():
    pixels = photograph()
    for severity, added in enumerate((0.05, 0.1, 0.15, 0.2, 0.3), 1):
        expected = np.rint(np.clip(pixels / 255 + added, 0, 1) * 255)
        assert np.array_equal(Corruption("brightness", severity)(pixels, 0, "a"), expected)


def test_contrast__is_its_formula():
    pixels = photograph()
    mean = pixels.astype(np.float64).mean((1, 2), keepdims=True)
    expected = np.rint(mean + 0.15 * (pixels - mean))
    assert np.array_equal(Corruption("contrast", 5)(pixels, 0, "a"), expected)


def test_gaussian_noise__has_its_standard_deviation():
    pixels = grey_level(128, 224, 224)
    for severity, deviation in enumerate((0.08, 0.12), 1):  # little is clipped
        away = (Corruption("gaussian_noise", severity)(pixels, 0, "a").astype(float) - 128) / 255
        assert away.std() == pytest.approx(deviation, rel=0.01)
        assert abs(away.mean()) < 3 * deviation / math.sqrt(away.size)


def test_shot_noise__has_the_variance_of_counts():
    pixels = grey_level(102, 224, 224)  # 0.4: 24 of 60 photons
    values = Corruption("shot_noise", 1)(pixels, 0, "a") / 255
    assert values.mean() == pytest.approx(0.4, rel=0.01)
    assert values.var() == pytest.approx(0.4 / 60, rel=0.02)


def test_impulse_noise__sets_its_share_to_black_and_white():
    values = Corruption("impulse_noise", 4)(grey_level(100, 224, 224), 0, "a")
    assert set(np.unique(values)) == {0, 100, 255}
    assert (values == 0).mean() == pytest.approx(0.085, abs=0.004)
    assert (values == 255).mean() == pytest.approx(0.085, abs=0.004)


def test_gaussian_blur__has_its_standard_deviation():
    pixels = np.zeros((1, 101, 101), np.uint8)
    pixels[0, 48:53, 48:53] = 255  # 5 x 5, of variance 2 along each side
    kind = CORRUPTIONS["gaussian_blur"]
    for severity in (3, 5):
        values = Corruption("gaussian_blur", severity)(pixels, 0, "a")[0].astype(float)
        variance = (values.sum(1) * (np.arange(101) - 50) ** 2).sum() / values.sum()
        assert variance == pytest.approx(2 + kind.strength(severity, 101, 101) ** 2, rel=0.03)


def test_motion_blur__makes_a_point_a_line_of_its_length():
    pixels = np.zeros((1, 224, 224), np.uint8)
    pixels[0, 112, 112] = 255
    for severity, length in ((1, 7), (5, 23)):
        values = Corruption("motion_blur", severity)(pixels, 0, "a")[0].astype(float)
        rows, columns = values.nonzero()
        reach = math.hypot(np.ptp(rows), np.ptp(columns)) + 1
        assert reach == pytest.approx(length, abs=2)
        assert np.ptp(columns) >= np.ptp(rows), "the angle is above 45 degrees"
        assert values.sum() == pytest.approx(255, rel=0.1)


def test_motion_blur__lengths_between_whole_pixels_lie_between():
    pixels = photograph()
    moved = []
    for length in (3.0, 3.5, 4.0, 4.5, 5.0):
        image = torch.from_numpy(pixels / 255)
        moved.append(float((corruptions._streaked(image, length, 20.0) - image).abs().mean()))
    assert moved == sorted(moved)
    assert moved[2] == pytest.approx((moved[0] + moved[4]) / 2, rel=0.1)


def test_pixelate__has_blocks():
    values = Corruption("pixelate", 5)(photograph(224, 224), 0, "a")
    blocks = values.reshape(3, 56, 4, 56, 4)  # a quarter of 224
    assert (blocks == blocks[:, :, :1, :, :1]).all()


def test_jpeg_compression__is_what_pillow_stores():
    pixels = photograph(224, 224)
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=7)
    assert np.array_equal(
        Corruption("jpeg_compression", 5)(pixels, 0, "a"), np.asarray(Image.open(file)).transpose(2, 0, 1)
    )


def test_zoom_blur__keeps_the_centre_and_moves_the_border():
    pixels = np.zeros((1, 101, 101), np.uint8)
    pixels[0, 50, 50] = pixels[0, 50, 90] = 255
    values = Corruption("zoom_blur", 5)(pixels, 0, "a")[0].astype(float)
    assert values[50, 50] > 150
    assert values[50, 90] < 100
    assert values[50, 91:].max() > 0, "nothing moved outwards"
    assert values[50, 60:85].max() == 0, "something moved inwards"


def test_elastic_transform__moves_pixels_as_far_as_the_table_says():
    """A ramp that rises by 1 with each pixel shows how far its pixels were moved."""
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8), (1, 224, 224)).copy()
    moved = np.concatenate([
        (Corruption("elastic_transform", 5)(ramp, seed, "a").astype(float) - ramp)[0, 30:-30, 30:-30].ravel()
        for seed in range(4)
    ])  # fmt: skip
    assert math.sqrt((moved**2).mean()) == pytest.approx(3, rel=0.15)


def test_fog__is_brighter_and_has_less_contrast():
    pixels = photograph(224, 224)
    fogged = [Corruption("fog", severity)(pixels, 0, "a").astype(float) for severity in (1, 5)]
    dark = pixels.max(0) < 40
    assert dark.any()
    for values in fogged:
        assert values[:, dark].mean() > pixels[:, dark].mean() + 20
    assert np.corrcoef(fogged[1].ravel(), pixels.ravel())[0, 1] < np.corrcoef(fogged[0].ravel(), pixels.ravel())[0, 1]


# Strengths


@pytest.mark.parametrize("kind", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_strength__between_and_beyond_the_sizes_of_the_table(kind):
    assert kind.family in FAMILIES
    for severity in SEVERITIES:
        small, large = kind.small[severity - 1], kind.large[severity - 1]
        assert kind.strength(severity, 32, 500) == pytest.approx(small)
        assert kind.strength(severity, 224, 224) == pytest.approx(large)
        between = kind.strength(severity, 64, 98)  # 64 * 98 = 32 * 196, and by twin:
        twin = math.exp(np.interp(math.log(64), [math.log(32), math.log(224)], [math.log(small), math.log(large)]))
        assert between == pytest.approx(twin)
        factors = (0.5, 2) if kind.in_pixels else (1, 1)
        assert kind.strength(severity, 16, 16) == pytest.approx(small * factors[0])
        assert kind.strength(severity, 448, 448) == pytest.approx(large * factors[1])


# What an image's corruption depends on


def draw(source, **options) -> ProbeSet:
    return ProbeSet.from_source(source, AS_THEY_ARE, **options)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted__fewer_images_are_the_beginning_of_more(kind, archive):
    source = f"corrupt:{kind}@2:{archive}"
    whole = draw(source, seed=3)
    assert whole.sha256 == draw(source, seed=3, n_threads=1).sha256 == draw(source, seed=3, n_threads=5).sha256
    assert whole.first(5).sha256 == draw(source, seed=3, n_images=5).sha256
    later = draw(archive, seed=3).corrupted(kind, 2)
    assert (later.sha256, later.source, later.notes) == (whole.sha256, whole.source, whole.notes)
    assert whole.sha256 != draw(archive, seed=3).sha256


def test_corrupted__random_numbers_depend_on_image_kind_severity_and_seed():
    pixels = grey_level(128)
    found = [
        Corruption(kind, severity)(pixels, seed, name)
        for kind, severity, seed, name in (
            ("impulse_noise", 1, 0, "a"), ("impulse_noise", 1, 0, "b"), ("impulse_noise", 1, 1, "a"),
            ("impulse_noise", 2, 0, "a"),
        )
    ]  # fmt: skip
    for one in found[1:]:
        both = (found[0] != 128) & (one != 128)
        assert both.mean() < 0.002, "the same pixels were chosen"
    assert np.array_equal(found[0], Corruption("impulse_noise", 1)(pixels, 0, "a"))


_PRINT_HASHES = """
import sys, torch
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.probes.corruptions import CORRUPTIONS
torch.set_num_threads(3)
probe_set = ProbeSet.from_source(sys.argv[1], Preprocessing(3, 224, 224, 224), n_images=2)
print(*(probe_set.corrupted(kind, 3).sha256 for kind in CORRUPTIONS))
"""


def test_corrupted__is_the_same_in_another_process_and_with_another_number_of_threads(archive):
    other = subprocess.run(
        [sys.executable, "-c", _PRINT_HASHES, str(archive)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "3"},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert torch.get_num_threads() != 3
    probe_set = ProbeSet.from_source(archive, Preprocessing(3, 224, 224, 224), n_images=2)
    assert other == [probe_set.corrupted(kind, 3).sha256 for kind in CORRUPTIONS]
    assert len({*other}) == len(CORRUPTIONS)


def test_corrupted__leaves_random_generators_alone(archive):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    probe_set = draw(archive)
    for kind in CORRUPTIONS:
        probe_set.corrupted(kind, 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


# As a source


def test_source__keeps_labels_and_names_and_says_what_was_done(archive):
    plain, corrupted = draw(archive), draw(f"corrupt:contrast@5:{archive}")
    assert corrupted.names == plain.names
    assert np.array_equal(corrupted.labels, plain.labels)
    assert corrupted.source == f"corrupt:contrast@5:{archive}"
    assert corrupted.notes == ("the images are corrupted at the size of 32 x 32 pixels: contrast at severity 5",)
    assert np.array_equal(corrupted.images[3], Corruption("contrast", 5)(plain.images[3], 0, plain.names[3]))


def test_source__is_corrupted_at_the_size_of_the_model(archive):
    larger = Preprocessing(3, 48, 48, 48)
    clean = ProbeSet.from_source(archive, larger)
    corrupted = ProbeSet.from_source(f"corrupt:pixelate@4:{archive}", larger)
    assert np.array_equal(corrupted.images[0], Corruption("pixelate", 4)(clean.images[0], 0, clean.names[0]))


def test_source__several_corruptions_begin_with_the_innermost(archive):
    both = draw(f"corrupt:contrast@3:corrupt:impulse_noise@5:{archive}")
    assert both.sha256 == draw(archive).corrupted("impulse_noise", 5).corrupted("contrast", 3).sha256
    assert both.sha256 != draw(f"corrupt:impulse_noise@5:corrupt:contrast@3:{archive}").sha256
    assert both.images.max() < 255, "the noise came last"


def test_source__with_a_part_of_the_inner_one(tmp_path):
    rng = np.random.default_rng(0)
    both = {name: rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8) for name in ("x_train", "x_test")}
    np.savez(tmp_path / "both.npz", **both)
    found = draw(f"corrupt:brightness@1:{tmp_path / 'both.npz'}?split=test")
    order = [int(name.partition("[")[2].rstrip("]")) for name in found.names]
    expected = Corruption("brightness", 1)(both["x_test"][order[0]].transpose(2, 0, 1), 0, "any")
    assert np.array_equal(found.images[0], expected)


def test_source__images_that_a_corruption_leaves_are_counted():
    images = np.stack([photograph().transpose(1, 2, 0), grey_level(9).transpose(1, 2, 0)])
    probe_set = draw(images).corrupted("contrast", 1)
    assert probe_set.notes[-1].endswith("contrast at severity 1; 1 of them came out unchanged")


def test_source__says_which_version_of_which_library(archive):
    import kornia

    assert f"fog at severity 1 (kornia {kornia.__version__})" in draw(f"corrupt:fog@1:{archive}").notes[0]


def test_source__a_folder_of_such_a_name_is_still_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "corrupt:fog@3:x"
    folder.mkdir()
    piece(1).save(folder / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_source("corrupt:fog@3:x").corruptions == ()
    assert plain_source("corrupt:fog@3:x") == ("", "corrupt:fog@3:x")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("", "a/b")),
        ("corrupt:fog@3:a/b", ("corrupt:fog@3:", "a/b")),
        ("corrupt:fog@3:corrupt:snow@1:torchvision:X?root=", ("corrupt:fog@3:corrupt:snow@1:", "torchvision:X?root=")),
        ("attack:pgd(norm=linf, eps=4/255):corrupt:fog@3:a", ("attack:pgd(norm=linf, eps=4/255):corrupt:fog@3:", "a")),
    ],
)  # fmt: skip
def test_plain_source__what_stands_before_it(text, parts):
    assert plain_source(text) == parts


def test_study__corrupted_images_are_drawn_anew_where_the_source_changes(tmp_path):
    path = write_study(tmp_path, n_models=1, trials=1, images={"source": "corrupt:impulse_noise@5:images.npz"})
    study = read_study_file(path)

    def images() -> ProbeSet:
        with Store(tmp_path / "study", create=True) as store:
            return draw_images(
                study, study.images[0], tmp_path / "study", 24, store, shared=False, progress=lambda n, of: None
            )

    first = images()
    expected = ProbeSet.from_source(study.source, study.preprocessing, n_images=24, seed=probe_set_seed(0))
    assert first.sha256 == expected.sha256 == images().sha256
    assert first.source == f"corrupt:impulse_noise@5:{tmp_path / 'images.npz'}"
    write_images(tmp_path / "images.npz", 24, seed=1)
    assert images().sha256 != first.sha256


# Mistakes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fogg@3", r"no corruption 'fogg'\. Did you mean 'fog'\?"),
        ("gaussiannoise@3", r"Did you mean 'gaussian_noise'"),
        ("rain@3", r"Known: 'gaussian_noise', .* 'jpeg_compression'\."),
        ("@3", r"no corruption ''"),
        ("fog@0", r"from 1 \(weak\) to 5 \(strong\); got 0 for 'fog'.*leave the corruption out"),
        ("fog@6", r"got 6 for 'fog'"),
        ("fog@2.5", r"got '2\.5' for 'fog'"),
        ("fog@-1", r"got '-1' for 'fog'"),
        ("fog", r"not written as corrupt:KIND@SEVERITY:SOURCE"),
        ("fog@", r"got '' for 'fog'"),
    ],
)
def test_source__mistakes_are_named(text, match, archive):
    with pytest.raises(ProbeError, match=match):
        draw(f"corrupt:{text}:{archive}")


@pytest.mark.parametrize("severity", [0, 6, True, 2.5, "3"])
def test_corrupted__refuses_other_severities(severity, archive):
    with pytest.raises(ProbeError, match="whole number from 1"):
        draw(archive).corrupted("brightness", severity)


def test_source__nothing_behind_the_corruption():
    with pytest.raises(ProbeError, match="not written as"):
        draw("corrupt:fog@3:")


def test_source__a_missing_library_is_named_before_any_image_is_read(archive, monkeypatch):
    monkeypatch.setattr(corruptions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProbeError, match=r"requires the library kornia.*pip install 'layercrit\[corrupt\]'"):
        open_source(f"corrupt:fog@3:{archive}")
    assert draw(f"corrupt:gaussian_noise@3:{archive}").n_images == 12, "noise needs no further library"


def test_source__unreadable_images_are_skipped_as_ever(tmp_path):
    for number in range(4):
        piece(1).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"nothing")
    found = draw(f"corrupt:shot_noise@2:{tmp_path}", max_unreadable=0.5)
    assert found.n_images == 3
    assert found.skipped[0].startswith("2.png")


@pytest.mark.parametrize(
    "function",
    [
        lambda image, strength, generator: image[:, :1],
        lambda image, strength, generator: image / 0,
        lambda image, strength, generator: image.nothing,
    ],
    ids=["shape", "numbers", "exception"],
)
def test_own_corruption__whose_function_fails_is_no_unreadable_image(function, archive, registered):
    corruption("mine", "noise", (1, 2, 3, 4, 5), unit="nothing")(function)
    with pytest.raises(ProbeError, match=r"corruption 'mine@2' fails on 'images\.npz\[\d+\]' of \(3, 32, 32\)"):
        draw(f"corrupt:mine@2:{archive}")


def test_own_corruption__is_used_and_clipped(archive, registered):
    @corruption("darker", "weather", (0.1, 0.2, 0.3, 0.4, 0.5), unit="what is taken away")
    def darker(image, strength, generator):
        """Less of everything."""
        return image - strength

    plain = draw(archive)
    expected = np.rint(np.clip(plain.images / 255 - 0.3, 0, 1) * 255)
    assert np.array_equal(plain.corrupted("darker", 3).images, expected)


@pytest.mark.parametrize(
    ("family", "strengths", "match"),
    [
        ("noises", (1, 2, 3, 4, 5), r"no family of corruptions 'noises'\. Did you mean 'noise'"),
        ("noise", (1, 2, 3), "five|5 positive strengths"),
        ("noise", (0, 1, 2, 3, 4), "5 positive strengths"),
    ],
)
def test_own_corruption__mistakes(family, strengths, match, registered):
    with pytest.raises(ProbeError, match=match):
        corruption("mine", family, strengths, unit="nothing")


@pytest.mark.parametrize("before", ["corrupt:fog@3:", "attack:pgd(norm=linf, eps=4/255):"])
def test_training__on_changed_images_is_refused(before, archive):
    with pytest.raises(TrainingError, match="are for measurements"):
        open_training_data(f"{before}{archive}")


# Real images


@needs_real_files
def test_corrupted__a_published_network_names_fewer_images_with_severity():
    model = open_model(f"file:{WEIGHTS}?arch=py:cifar_networks:ResNet20", mean=MEAN, std=STD, input_size=(3, 32, 32))
    clean = ProbeSet.from_source(IMAGES, model.preprocessing, n_images=100)

    def accuracy(probe_set: ProbeSet) -> float:
        with torch.inference_mode():
            predicted = model.classifier(probe_set.batch(0, 100)).argmax(1).numpy()
        return float((predicted == probe_set.labels).mean())

    assert accuracy(clean) > 0.75
    strongest = {kind: accuracy(clean.corrupted(kind, 5)) for kind in CORRUPTIONS}
    assert max(strongest.values()) < accuracy(clean) - 0.03, strongest
    assert accuracy(clean.corrupted("gaussian_noise", 1)) > strongest["gaussian_noise"] + 0.2


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("corrupt:fog@3", True),
        ("attack:pgd(norm=l2, eps=0.5)", True),
        ("attack:pgd", True),
        ("corrupt:", False),
        ("attack:", False),
        ("corrupt:fog@3:x", False),
        ("attack:pgd(eps=4/255):corrupt:fog@3", False),
        ("val", False),
    ],
)
def test_is_change_alone(text, alone):
    assert is_change_alone(text) is alone
