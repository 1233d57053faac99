"""Criticality by class, by image and by correctness, against plain loops over the distances of single images."""

import math
from statistics import fmean, stdev

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student
from torch import nn

import layercrit
from layercrit.errors import LayerError, ProbeError, ProtocolError
from layercrit.image_groups import difference_of_groups, estimate_groups
from layercrit.measurement import Measurement
from layercrit.shown_images import ShownImages, pack_classes, unpack_classes
from layercrit.statistics import estimate
from small_subjects import PIXELS, QUIET, fresh, two_layers

LABELS = [0, 1, 2, 0, 1, 0]  # in the order of PIXELS


@pytest.fixture(scope="module")
def measured():
    return layercrit.measure(two_layers(), PIXELS, labels=LABELS, trials=3, distances=[], **QUIET)


def labels_in_order(measurement):
    """The label of each image of the probe set, found by its name, such as 'array (6, 3, 2, 2)[4]'."""
    return [LABELS[int(name.rpartition("[")[2][:-1])] for name in measurement.images.names]


def pictures(n_images, n_trials, seed=0):
    """Distances with effects of trials, images and both, ``(n_trials, n_images)``, and classes of very unlike sizes."""
    generator = np.random.default_rng(seed)
    values = 0.4 + 0.1 * generator.normal(size=(n_trials, 1)) + 0.1 * generator.normal(size=n_images)
    values += 0.05 * generator.normal(size=(n_trials, n_images))
    codes = np.minimum(generator.geometric(0.4, n_images) - 1, 3)
    codes[:5] = range(5)  # the last has one image only
    return values.clip(0, 1).astype(np.float32), codes


# --- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["t", "betting"])
@pytest.mark.parametrize(("n_trials", "random"), [(4, True), (2, True), (1, True), (1, False), (3, False)])
def test_estimate_groups__is_the_estimate_of_each_group_alone(n_trials, random, interval):
    if interval == "betting" and not random:
        pytest.skip("there is nothing to bet on")
    values, codes = pictures(40, n_trials)
    found = estimate_groups(values, codes, level=0.9, random_trials=random, interval=interval)
    for group in range(5):
        own = estimate(values[:, codes == group], level=0.9, random_trials=random, interval=interval)
        assert found["criticality"][group] == pytest.approx(own.mean, abs=1e-12)
        if own.covers == "trials" and interval == "t":  # one image: the estimate is for new trials on that image
            assert math.isnan(found["low"][group])
            assert found["covers"][group] == "nothing"
            continue
        np.testing.assert_allclose(found["low"][group], own.low, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found["high"][group], own.high, rtol=0, atol=1e-12)
        assert found["covers"][group] == own.covers


def test_estimate_groups__groups_that_do_not_vary_have_an_interval_without_width():
    values = np.full((3, 6), 0.3, np.float32)
    found = estimate_groups(values, np.array([0, 0, 0, 1, 1, 1]))
    assert found["low"].tolist() == found["high"].tolist() == found["criticality"].tolist() == [np.float32(0.3)] * 2


def test_estimate_groups__order_of_images_does_not_matter():
    values, codes = pictures(60, 3)
    order = np.random.default_rng(1).permutation(60)
    one, other = estimate_groups(values, codes), estimate_groups(values[:, order], codes[order])
    for name in ("criticality", "low", "high"):
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-12)


def test_estimate_groups__covers_the_true_mean_of_new_trials_and_images():
    """Of 95 % intervals at least 94 % do: normal effects of trials, images and rest, known means."""
    generator, hits = np.random.default_rng(2), []
    codes = np.repeat([0, 1], [12, 40])
    for _ in range(400):
        effects = 0.05 * generator.normal(size=(5, 1)) + 0.08 * generator.normal(size=52)
        values = np.array([0.3, 0.5])[codes] + effects + 0.04 * generator.normal(size=(5, 52))
        found = estimate_groups(values, codes)
        hits.append((found["low"] <= [0.3, 0.5]) & (found["high"] >= [0.3, 0.5]))
    assert np.mean(hits, axis=0).min() >= 0.94


# --- differences ------------------------------------------------------------------------------------------------------


def slow_difference(first, second, level):
    """The difference of two groups' means with its interval, written out with sums over single values."""
    n_trials = len(first)
    parts = []
    of_rest = 0.0
    for group in (first, second):
        n = len(group[0])
        grand = fmean(value for row in group for value in row)
        rows, columns = [fmean(row) for row in group], [fmean(column) for column in zip(*group, strict=True)]
        rest = sum((group[r][x] - rows[r] - columns[x] + grand) ** 2 for r in range(n_trials) for x in range(n))
        ms_rest = rest / ((n_trials - 1) * (n - 1))
        ms_images = n_trials * sum((column - grand) ** 2 for column in columns) / (n - 1)
        parts += [(max(ms_images - ms_rest, 0) / (n_trials * n), n - 1)]
        parts += [(ms_rest / (n_trials * n), min(n_trials - 1, n - 1))]
        of_rest += ms_rest / n
    apart = [fmean(one) - fmean(other) for one, other in zip(first, second, strict=True)]
    parts.append((max(stdev(apart) ** 2 - of_rest, 0) / n_trials, n_trials - 1))
    total = sum(variance for variance, _ in parts)
    reach = sum(variance * student.ppf(0.5 + level / 2, df) for variance, df in parts) / math.sqrt(total)
    return fmean(apart), reach


def test_difference_of_groups__is_that_of_plain_sums():
    values, _ = pictures(30, 4)
    first, second = values[:, :9].astype(float), values[:, 9:].astype(float)
    found = difference_of_groups(first, second, level=0.9)
    difference, reach = slow_difference(first.tolist(), second.tolist(), 0.9)
    assert found["difference"] == pytest.approx(difference, abs=1e-12)
    assert found["low"] == pytest.approx(difference - reach, abs=1e-12)
    assert found["high"] == pytest.approx(difference + reach, abs=1e-12)


def test_difference_of_groups__effects_of_draws_on_all_images_cancel():
    values, _ = pictures(30, 4)
    moved = values / 2 + np.array([0.0, 0.1, 0.3, 0.5])[:, None]
    one, other = (difference_of_groups(some[:, :9], some[:, 9:]) for some in (values / 2, moved))
    for name in ("difference", "low", "high"):
        assert one[name] == pytest.approx(other[name], abs=1e-7)


@pytest.mark.parametrize(("random", "trials"), [(True, 5), (False, 1)])
def test_difference_of_groups__covers_the_true_difference(random, trials):
    generator, hits = np.random.default_rng(4), []
    for _ in range(400):
        of_trials = 0.05 * generator.normal(size=(trials, 1)) * random
        draws = [
            mean + of_trials + 0.03 * generator.normal(size=(trials, 1)) * random + 0.08 * generator.normal(size=n)
            + 0.04 * generator.normal(size=(trials, n))
            for mean, n in ((0.3, 25), (0.5, 10))
        ]  # fmt: skip
        found = difference_of_groups(*draws, random_trials=random)
        hits.append(found["low"] <= -0.2 <= found["high"])
    assert np.mean(hits) >= 0.94


@pytest.mark.parametrize(
    ("sizes", "n_trials", "random"), [((1, 5), 3, True), ((5, 1), 3, False), ((5, 5), 1, True), ((0, 5), 3, True)]
)
def test_difference_of_groups__has_no_interval_where_it_cannot_be_known(sizes, n_trials, random):
    values, _ = pictures(sum(sizes) + 5, n_trials)
    first, second = values[:, : sizes[0]], values[:, sizes[0] : sum(sizes)]
    found = difference_of_groups(first, second, random_trials=random)
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])
    assert math.isnan(found["difference"]) == (0 in sizes)


# --- of a measurement -------------------------------------------------------------------------------------------------


def test_by_class__weighted_mean_over_classes_is_the_criticality_of_the_layer(measured):
    for of in ("label", "prediction", list("abcabc")):
        table = measured.by_class(of)
        weighted = (table["criticality"] * table["n_images"]).groupby(table["layer"], observed=True).sum() / 6
        assert weighted.to_numpy() == pytest.approx(measured.to_pandas()["criticality"].to_numpy(), abs=1e-12)


def test_by_class__is_the_mean_of_the_images_with_this_label(measured):
    labels = labels_in_order(measured)
    table = measured.by_class().set_index(["layer", "class"])
    for number, layer in enumerate(measured.record["layers"]):
        for label in (0, 1, 2):
            values = [
                float(measured.per_image["cosine"][number, trial, image])
                for trial in range(3)
                for image in range(6)
                if labels[image] == label
            ]
            row = table.loc[(layer, str(label))]
            assert (row["number"], row["n_images"], row["n_trials"]) == (label, len(values) // 3, 3)
            assert row["criticality"] == pytest.approx(fmean(values), abs=1e-9)


def test_by_class__class_of_one_image_has_no_interval(measured):
    table = measured.by_class()
    alone = table["n_images"] == 1
    assert alone.sum() == 2  # label 2, in two layers
    assert table.loc[alone, ["low", "high"]].isna().all(axis=None)
    assert table.loc[~alone, ["low", "high"]].notna().all(axis=None)


def test_by_class__one_draw_has_no_interval():
    table = layercrit.measure(two_layers(), PIXELS, labels=LABELS, trials=1, **QUIET).by_class()
    assert table[["low", "high"]].isna().all(axis=None)
    assert set(table["covers"]) == {"nothing"}
    assert table["criticality"].notna().all()


def test_by_class__reset_that_is_not_random_has_intervals_for_new_images():
    table = layercrit.measure(two_layers(), PIXELS, labels=LABELS, reset="zero", **QUIET).by_class()
    assert set(table["covers"]) == {"images", "nothing"}
    assert (table["low"].notna() == (table["n_images"] > 1)).all()


class Halves(nn.Module):
    """Reads one half of the pixels with each of two layers, which have no bias: a half that is black adds nothing."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        flat = x.flatten(1)
        return 30 * (self.left(flat[:, :6]) + self.right(flat[:, 6:]))


def test_by_class__layer_that_only_images_of_one_class_need():
    """Known answer: images of class 0 are black on the right, those of class 1 on the left."""
    pixels = torch.randint(60, 256, (20, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:12, 6:], pixels[12:, :6] = 0, 0
    labels = [0] * 12 + [1] * 8
    measurement = layercrit.measure(
        fresh(Halves, 0).eval(), pixels.view(20, 3, 2, 2), labels=labels, trials=4, dtype="reference", **QUIET
    )
    found = measurement.by_class().set_index(["layer", "class"])["criticality"]
    assert found["left", "1"] == found["right", "0"] == 0
    assert found["left", "0"] > 0.1
    assert found["right", "1"] > 0.1
    moved = measurement.extreme_images("left", 3)
    assert set(moved.loc[moved["moved"] == "most", "label"]) == {"0"}
    assert set(moved.loc[moved["moved"] == "least", "label"]) == {"1"}
    assert (moved.loc[moved["moved"] == "least", "criticality"] == 0).all()


def test_by_class__without_labels_names_the_predictions():
    measurement = layercrit.measure(two_layers(), PIXELS, trials=2, **QUIET)
    with pytest.raises(ProbeError, match="of='prediction'"):
        measurement.by_class()
    with pytest.raises(ProbeError, match="labels"):
        measurement.by_correctness()
    with torch.no_grad():
        expected = two_layers()(PIXELS / 255).argmax(dim=1).bincount(minlength=3)
    table = measurement.by_class("prediction").drop_duplicates("number").set_index("number")["n_images"]
    assert table.reindex(range(3), fill_value=0).tolist() == expected.tolist()


@pytest.mark.parametrize("of", ["labels", "class", ""])
def test_by_class__unknown_way(measured, of):
    with pytest.raises(ProbeError, match="a value for each image"):
        measured.by_class(of)


@pytest.mark.parametrize("of", [[0, 1], list(range(7)), [[0] * 6], [0.0, 1.0, math.nan, 0.0, 0.0, 0.0]])
def test_by_class__groups_that_are_not_one_for_each_image(measured, of):
    with pytest.raises(ProbeError, match="one value for each image"):
        measured.by_class(of)


def test_by_class__groups_of_any_values(measured):
    table = measured.by_class(["day", "night", "day", None, "night", "day"])
    assert list(table["class"][:3]) == ["None", "day", "night"]
    assert table["n_images"][:3].tolist() == [1, 3, 2]
    assert table["number"].isna().all()


def test_by_class__names_of_classes_are_those_of_the_images(tmp_path):
    from PIL import Image

    for number, image in enumerate(PIXELS):
        folder = tmp_path / ("dog", "ant", "cat")[LABELS[number]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    measurement = layercrit.measure(two_layers(), tmp_path, trials=2, **QUIET)
    assert list(measurement.by_class()["class"][:3]) == ["ant", "cat", "dog"]  # sorted, as the model's outputs are
    assert measurement.by_class()["n_images"][:3].tolist() == [2, 1, 3]
    (tmp_path / "classes.txt").write_text("dog\nant\ncat\n")
    listed = layercrit.measure(two_layers(), tmp_path, classes=tmp_path / "classes.txt", trials=2, **QUIET)
    assert list(listed.by_class()["class"][:3]) == ["dog", "ant", "cat"]
    assert listed.by_class()["number"][:3].tolist() == [0, 1, 2]
    image = listed.by_image().iloc[0]
    assert image["image"].partition("/")[0] == image["label"]


def test_by_image__is_mean_and_spread_over_trials(measured):
    table, values = measured.by_image(), measured.per_image["cosine"].astype(float)
    assert len(table) == 2 * 6
    labels = labels_in_order(measured)
    for row in table.to_dict("records"):
        of_image = values[list(measured.record["layers"]).index(row["layer"]), :, row["position"]].tolist()
        assert row["criticality"] == pytest.approx(fmean(of_image), abs=1e-12)
        assert row["sd_trials"] == pytest.approx(stdev(of_image), abs=1e-12)
        assert row["label"] == str(labels[row["position"]])
        assert row["correct"] == (row["label"] == row["prediction"])
    assert table["correct"][:6].mean() == pytest.approx(measured.summary()["top1_accuracy"])


def test_by_correctness__are_the_means_of_both_kinds_of_images(measured):
    images = measured.by_image()
    for row in measured.by_correctness().to_dict("records"):
        own = images[images["layer"] == row["layer"]]
        right, wrong = (own.loc[own["correct"] == correct, "criticality"] for correct in (True, False))
        assert (row["n_correct"], row["n_wrong"]) == (len(right), len(wrong))
        assert row["correct"] == pytest.approx(right.mean(), abs=1e-12)
        assert row["wrong"] == pytest.approx(wrong.mean(), abs=1e-12)
        assert row["difference"] == pytest.approx(row["correct"] - row["wrong"], abs=1e-12)


def test_extreme_images__are_the_ends_of_the_sorted_images(measured):
    images = measured.by_image().query("layer == '3'").sort_values("criticality", ascending=False)
    found = measured.extreme_images("3", 2)
    assert found["position"].tolist() == images["position"].iloc[[0, 1, 4, 5]].tolist()
    assert list(found["moved"]) == ["most"] * 2 + ["least"] * 2
    everything = measured.extreme_images("3", 100)
    assert sorted(everything["position"]) == list(range(6))  # none is both


def test_extreme_images__unknown_layer_and_number(measured):
    with pytest.raises(LayerError, match="Known"):
        measured.extreme_images("4")
    with pytest.raises(ProtocolError, match="expected 1 or more"):
        measured.extreme_images("3", 0)


def test_layer_without_a_trial_that_is_ok__is_nan(measured):
    cells = measured.cells.assign(status=np.where(measured.cells["layer"] == "1", "unchanged", "ok"))
    broken = Measurement(cells, measured.per_image, measured.record, measured.images)
    for table in (broken.by_class(), broken.by_image()):
        assert table.loc[table["layer"] == "1", "criticality"].isna().all()
        assert table.loc[table["layer"] == "3", "criticality"].notna().all()
    assert math.isnan(broken.by_correctness()["difference"][0])
    with pytest.raises(ProtocolError, match="No trial of the layer"):
        broken.extreme_images("1")


# --- files ------------------------------------------------------------------------------------------------------------


def test_save__keeps_labels_predictions_and_names(measured, tmp_path):
    loaded = Measurement.load(measured.save(tmp_path))
    for name in ("by_class", "by_correctness", "by_image"):
        pd.testing.assert_frame_equal(getattr(loaded, name)(), getattr(measured, name)())


def test_load__measurement_of_an_earlier_version(measured, tmp_path):
    measured.save(tmp_path)
    (tmp_path / "images.parquet").unlink()  # which it did not have
    old = Measurement.load(tmp_path)
    assert old.images is None
    for of in ("label", "prediction"):
        with pytest.raises(ProbeError, match=r"earlier version.*Measure it again.*of="):
            old.by_class(of)
    assert old.by_class(labels_in_order(measured))["criticality"].to_list() == pytest.approx(
        measured.by_class()["criticality"].to_list()
    )
    assert old.by_image()["criticality"].equals(measured.by_image()["criticality"])
    assert old.by_image()[["label", "prediction", "correct"]].isna().all(axis=None)


def test_save__leaves_no_images_of_the_measurement_that_it_replaces(measured, tmp_path):
    measured.save(tmp_path)
    Measurement(measured.cells, measured.per_image, measured.record).save(tmp_path)
    assert Measurement.load(tmp_path).images is None


def test_load__images_of_another_measurement(measured, tmp_path):
    measured.save(tmp_path)
    ShownImages(("one",), None, np.array([1])).write(tmp_path / "images.parquet")
    with pytest.raises(layercrit.LayercritError, match="damaged"):
        Measurement.load(tmp_path)


def test_measure__that_goes_on_keeps_predictions(measured):
    more = layercrit.measure(two_layers(), PIXELS, labels=LABELS, trials=5, distances=[], resume=measured, **QUIET)
    assert more.images.predictions.tolist() == measured.images.predictions.tolist()
    assert more.by_class()["n_trials"].unique().tolist() == [5]


def test_pack_classes__come_back():
    classes = np.random.default_rng(0).integers(0, 1000, 10_000)
    text = pack_classes(classes)
    assert unpack_classes(text).tolist() == classes.tolist()
    assert len(text) < 24_000  # bytes in the record of a model
    with pytest.raises(ValueError, match="damaged"):
        unpack_classes(text[:-8])
