import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from layercrit.distances import DISTANCES, distance, get_distance, label_scores, measure_distances
from layercrit.errors import ProtocolError

# Slow twins: the formulas as they are written in the papers, one image at a time, in float64.


def twin_cosine(p: np.ndarray, q: np.ndarray) -> float:
    return 1 - p @ q / math.sqrt((p @ p) * (q @ q))


def twin_l1(p: np.ndarray, q: np.ndarray) -> float:
    return np.abs(p - q).sum()


def twin_l2(p: np.ndarray, q: np.ndarray) -> float:
    return math.sqrt(((p - q) ** 2).sum())


def kullback_leibler(p: np.ndarray, m: np.ndarray) -> float:
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / m[seen])).sum())


def twin_js(p: np.ndarray, q: np.ndarray) -> float:
    m = (p + q) / 2
    return 0.5 * kullback_leibler(p, m) + 0.5 * kullback_leibler(q, m)


def twin_top1(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.argmax(p) != np.argmax(q))


TWINS = {"cosine": twin_cosine, "l1": twin_l1, "l2": twin_l2, "js": twin_js, "top1": twin_top1}


@pytest.fixture
def registry() -> Iterator[None]:
    """Take what a test registers back out."""
    before = dict(DISTANCES)
    yield
    for name in DISTANCES.keys() - before.keys():
        del DISTANCES[name]


def softmax(n_images: int, n_classes: int, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_images, n_classes, generator=generator) * scale).softmax(dim=1)


def one_hot(n_images: int, n_classes: int, shift: int) -> Tensor:
    return torch.eye(n_classes)[(torch.arange(n_images) + shift) % n_classes]


def ties(n_images: int, n_classes: int, seed: int) -> Tensor:
    p = (softmax(n_images, n_classes, 1.0, seed) * n_classes).round() + 1
    return p / p.sum(dim=1, keepdim=True)


PAIRS = {
    "random, 10 classes": (softmax(40, 10, 2.0, 0), softmax(40, 10, 2.0, 1)),
    "random, 1000 classes": (softmax(40, 1000, 3.0, 2), softmax(40, 1000, 3.0, 3)),
    "random, 2 classes": (softmax(40, 2, 2.0, 4), softmax(40, 2, 2.0, 5)),
    "nearly one-hot": (softmax(40, 10, 200.0, 6), softmax(40, 10, 200.0, 7)),
    "peaked against flat": (softmax(40, 1000, 100.0, 8), softmax(40, 1000, 0.01, 9)),
    "one-hot, other class": (one_hot(12, 10, 0), one_hot(12, 10, 1)),
    "one-hot, same class": (one_hot(12, 10, 0), one_hot(12, 10, 0)),
    "one-hot against uniform": (one_hot(12, 1000, 0), torch.full((12, 1000), 1e-3)),
    "uniform, 1000 classes": (torch.full((3, 1000), 1e-3), torch.full((3, 1000), 1e-3)),
    "ties": (ties(40, 10, 10), ties(40, 10, 11)),
    "one class": (torch.ones(4, 1), torch.ones(4, 1)),
    "no image": (torch.empty(0, 10), torch.empty(0, 10)),
}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_measure_distances__equals_the_formula_in_float64(name: str, pair: str) -> None:
    p, q = PAIRS[pair]
    got = measure_distances(p, q, [name])[name]
    expected = [TWINS[name](a, b) for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)]
    assert got.dtype == torch.float32
    assert got.shape == (len(p),)
    np.testing.assert_allclose(got.double(), np.array(expected), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "l1", "l2", "js"])
@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-4])
def test_measure_distances__small_distances_keep_their_digits(name: str, step: float) -> None:
    p = softmax(20, 50, 2.0, 0)
    q = (p.log() + step * torch.randn(20, 50, generator=torch.Generator().manual_seed(1))).softmax(dim=1)
    got = measure_distances(p, q, [name])[name].double().numpy()
    # The rows are rounded to float32; the twin takes the rounded ones, in extended precision for its own cancellation.
    wide = zip(p.numpy().astype(np.longdouble), q.numpy().astype(np.longdouble), strict=True)
    pairs = [(a / a.sum(), b / b.sum()) for a, b in wide]
    tolerance = 3e-6 / step  # one rounding of p or q, 6e-8, against a difference of `step`
    np.testing.assert_allclose(got, np.array([float(TWINS[name](a, b)) for a, b in pairs]), rtol=tolerance)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_measure_distances__same_prediction_gives_exactly_zero(name: str, pair: str) -> None:
    p = PAIRS[pair][0]
    assert (measure_distances(p, p.clone(), [name])[name] == 0).all()


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_measure_distances__symmetric_and_in_range(name: str, pair: str) -> None:
    p, q = PAIRS[pair]
    there, back = (measure_distances(*both, [name])[name] for both in ((p, q), (q, p)))
    torch.testing.assert_close(there, back, rtol=1e-6, atol=0.0)
    assert (there >= 0).all()
    assert (there <= torch.tensor(DISTANCES[name].upper)).all()


@pytest.mark.parametrize("name", ["cosine", "l1", "l2", "js", "top1"])
def test_measure_distances__disjoint_predictions_reach_the_upper_value(name: str) -> None:
    p = torch.cat([softmax(30, 500, 1.0, 0), torch.zeros(30, 500)], dim=1)
    got = measure_distances(p, p.flip(1), [name])[name]
    if name == "l2":  # only one-hot predictions are sqrt 2 apart
        got = measure_distances(one_hot(5, 9, 0), one_hot(5, 9, 4), [name])[name]
    torch.testing.assert_close(got, torch.full_like(got, DISTANCES[name].upper), rtol=1e-6, atol=0.0)
    assert (got <= torch.tensor(DISTANCES[name].upper)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, 3.0], ids=str)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", DISTANCES)
def test_measure_distances__a_row_that_is_no_distribution_is_nan(name: str, side: int, bad: float) -> None:
    pair = [softmax(5, 10, 1.0, 0), softmax(5, 10, 1.0, 1)]
    clean = measure_distances(*pair, [name])[name]
    pair[side][2, 4] = bad
    got = measure_distances(*pair, [name])[name]
    assert got.isnan().tolist() == [False, False, True, False, False]
    kept = [0, 1, 3, 4]
    assert torch.equal(got[kept], clean[kept])


def test_measure_distances__a_row_of_nan_on_both_sides_is_nan() -> None:
    p = torch.full((2, 4), math.nan)
    assert all(values.isnan().all() for values in measure_distances(p, p, DISTANCES).values())


def test_measure_distances__logits_are_nan_not_a_number() -> None:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 3
    logits += (1 - logits.sum(dim=1, keepdim=True)) / 10  # the sum alone would not give them away
    assert measure_distances(logits, logits.flip(1), ["cosine"])["cosine"].isnan().all()


def test_measure_distances__batches_and_order_of_images_do_not_matter() -> None:
    p, q = PAIRS["random, 1000 classes"]
    whole = measure_distances(p, q, DISTANCES)
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(0))
    for name, values in whole.items():
        parts = [measure_distances(p[i : i + 7], q[i : i + 7], [name])[name] for i in range(0, len(p), 7)]
        torch.testing.assert_close(torch.cat(parts), values, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(measure_distances(p[order], q[order], [name])[name], values[order])


def test_measure_distances__inputs_keep_their_values_and_float64_is_taken() -> None:
    p, q = (pair.double() for pair in PAIRS["random, 10 classes"])
    before = p.clone(), q.clone()
    got = measure_distances(p, q, DISTANCES)
    assert list(got) == list(DISTANCES)
    assert all(values.dtype == torch.float32 for values in got.values())
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (torch.ones(3, 1), torch.ones(2, 1)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)),
    ],
    ids=["other length", "one axis", "whole numbers"],
)
def test_measure_distances__wrong_shape_or_type_is_an_error(p: Tensor, q: Tensor) -> None:
    with pytest.raises(ProtocolError, match=r"The predictions have the shapes .* expected two tensors of prob"):
        measure_distances(p, q, ["cosine"])


def test_get_distance__unknown_name_offers_near_ones() -> None:
    assert get_distance("js") is DISTANCES["js"]
    with pytest.raises(ProtocolError, match=r"There is no distance 'cosin'\. Did you mean 'cosine'"):
        get_distance("cosin")
    with pytest.raises(ProtocolError, match="There is no distance 'zzz'"):
        measure_distances(torch.ones(1, 1), torch.ones(1, 1), ["zzz"])


@pytest.mark.usefixtures("registry")
def test_distance__registers_a_users_function() -> None:
    @distance("largest_change", upper=1.0)
    def largest_change(p: Tensor, q: Tensor) -> Tensor:
        """Largest change of any class.

        More.
        """
        return (p - q).abs().amax(dim=1)

    assert DISTANCES["largest_change"].summary == "Largest change of any class."
    p, q = PAIRS["random, 10 classes"]
    assert torch.equal(measure_distances(p, q, ["largest_change"])["largest_change"], largest_change(p, q))


@pytest.mark.usefixtures("registry")
def test_distance__without_a_limit_and_without_a_docstring() -> None:
    distance("odds", upper=math.inf)(lambda p, q: (p[:, 0] / q[:, 0]).log().abs())
    assert DISTANCES["odds"].summary == ""
    got = measure_distances(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), ["odds"])["odds"]
    assert got.item() == math.inf


@pytest.mark.parametrize("name", ["", "Cosine", "2nd", "a-b", "_x", "a b", "l1\n"])
def test_distance__bad_name_is_an_error(name: str) -> None:
    with pytest.raises(ProtocolError, match=r"(cannot name a column|cannot be named .*): expected"):
        distance(name, upper=1.0)(lambda p, q: p[:, 0])


@pytest.mark.parametrize("name", ["status", "loss", "cosine_matched", "js_per_image"])
def test_distance__another_columns_name_is_an_error(name: str) -> None:
    with pytest.raises(ProtocolError, match=f"'{name}' has the name of another column"):
        distance(name, upper=1.0)(lambda p, q: p[:, 0])


def test_distance__taken_name_is_an_error() -> None:
    with pytest.raises(ProtocolError, match=r"'l1' exists already \(Sum of absolute.*Choose another name"):
        distance("l1", upper=1.0)(lambda p, q: p[:, 0])


@pytest.mark.parametrize("upper", [0.0, -1.0, math.nan])
def test_distance__upper_must_be_above_zero(upper: float) -> None:
    with pytest.raises(ProtocolError, match="expected the largest value that it can take"):
        distance("fresh", upper=upper)


@pytest.mark.usefixtures("registry")
def test_measure_distances__wrong_shape_of_a_users_distance_is_an_error() -> None:
    distance("not_reduced", upper=1.0)(lambda p, q: (p - q).abs())
    with pytest.raises(ProtocolError, match=r"'not_reduced' returned the shape \(40, 10\): .* \(40,\)"):
        measure_distances(*PAIRS["random, 10 classes"], ["not_reduced"])


@pytest.mark.usefixtures("registry")
def test_measure_distances__out_of_range_is_nan_but_for_rounding() -> None:
    """A distance that breaks its promise gives NaN: 1.000001 is rounding, 1.1 and -0.1 are errors of the distance."""
    distance("too_large", upper=1.0)(lambda p, q: torch.tensor([1.000001, 1.1, -0.1, 0.0, 1.0]))
    got = measure_distances(torch.ones(5, 1), torch.ones(5, 1), ["too_large"])["too_large"]
    torch.testing.assert_close(got, torch.tensor([1.0, math.nan, math.nan, 0.0, 1.0]), rtol=0, atol=0, equal_nan=True)


def twin_label_scores(logits: np.ndarray, label: int) -> tuple[float, float, float]:
    shifted = logits - logits.max()
    loss = -(shifted[label] - np.log(np.exp(shifted).sum()))
    order = np.argsort(-logits, kind="stable").tolist()
    return loss, float(label in order[:1]), float(label in order[:5])


@pytest.mark.parametrize("n_classes", [1, 2, 4, 5, 6, 1000])
def test_label_scores__equal_the_formula(n_classes: int) -> None:
    generator = torch.Generator().manual_seed(n_classes)
    logits = (torch.randn(60, n_classes, generator=generator) * 4).round()  # rounded, so that there are ties
    labels = torch.randint(n_classes, (60,), generator=generator)
    labels[::2] = logits[::2].argmax(dim=1)
    got = label_scores(logits, labels)
    expected = [twin_label_scores(row, y) for row, y in zip(logits.double().numpy(), labels.tolist(), strict=True)]
    assert list(got) == ["loss", "top1", "top5"]
    assert all(values.dtype == torch.float32 for values in got.values())
    for values, twin in zip(got.values(), np.array(expected).T, strict=True):
        np.testing.assert_allclose(values.double(), twin, rtol=1e-6, atol=1e-6)


def test_label_scores__top5_of_few_classes_is_always_right() -> None:
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert (label_scores(logits, torch.arange(8) % 3)["top5"] == 1).all()


def test_label_scores__confidently_wrong_keeps_its_loss() -> None:
    """The loss comes from the logits, so that it does not end at -ln of the smallest float32."""
    assert label_scores(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))["loss"].item() == 500.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_label_scores__non_finite_logits_are_nan(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    for values in label_scores(logits, torch.tensor([0, 0, 0])).values():
        assert values.isnan().tolist() == [False, True, False]


def test_label_scores__label_that_is_no_class_is_nan() -> None:
    for values in label_scores(torch.zeros(3, 4), torch.tensor([-1, 3, 4])).values():
        assert values.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(torch.zeros(3, 4), torch.tensor([0, 1])), (torch.zeros(3), torch.zeros(3).long()), (torch.zeros(3, 4),) * 2],
    ids=["other length", "one axis", "not whole"],
)
def test_label_scores__wrong_shape_is_an_error(logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(ProtocolError, match=r"expected \(n_images, n_classes\) and one whole number per image"):
        label_scores(logits, labels)
