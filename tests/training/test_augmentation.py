import math

import numpy as np
import pytest
import torch
from torch import nn

from layercrit.training import get_method
from layercrit.training.augmentation import consistency, mix_images
from layercrit.training.mixing_set import mixing_set
from training_inputs import COLOUR, GREY, batch, photograph, seeded_views, tiny_network

PLAIN = {"crop": "shift", "flip": 0.0}


def drawn(seed, function, *arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return function(*arguments)


# Policies


@pytest.mark.parametrize("name", ["autoaugment", "randaugment", "trivialaugment", "pixmix"])
@pytest.mark.parametrize("inputs", [GREY, COLOUR], ids=["grey", "colour"])
def test_views__change_more_than_crops_and_flips_do(name, inputs):
    image = photograph(inputs)
    method, baseline = get_method(name).views(inputs), get_method("baseline").views(inputs)
    changed = [
        not torch.equal(seeded_views(method, image, seed)[0], seeded_views(baseline, image, seed)[0])
        for seed in range(20)
    ]
    assert sum(changed) >= 10


@pytest.mark.parametrize(
    ("name", "weak", "strong"),
    [
        ("randaugment", {"magnitude": 1}, {"magnitude": 25}),
        ("randaugment", {"n_operations": 1}, {"n_operations": 6}),
        ("autoaugment", {"policy": "imagenet"}, {"policy": "svhn"}),
        ("augmix", {"severity": 1}, {"severity": 10}),
        ("pixmix", {"rounds": 0}, {"rounds": 6}),
        ("pixmix", {"beta": 50}, {"beta": 1}),
    ],
)
def test_views__settings_change_how_much(name, weak, strong):
    image = photograph(COLOUR)
    baseline = get_method("baseline").views(COLOUR)
    distances = []
    for settings in (weak, strong):
        views = get_method(name, settings).views(COLOUR)
        pairs = [(seeded_views(views, image, s)[-1], seeded_views(baseline, image, s)[0]) for s in range(60)]
        distances.append(np.mean([(a.float() - b.float()).abs().mean() for a, b in pairs]))
    if name == "autoaugment":
        assert distances[0] != distances[1]
    else:
        assert distances[0] < 0.9 * distances[1]


# AugMix


@pytest.mark.parametrize("inputs", [GREY, COLOUR], ids=["grey", "colour"])
def test_augmix__three_views_of_one_crop(inputs):
    image = photograph(inputs)
    clean, *mixtures = seeded_views(get_method("augmix").views(inputs), image, 5)
    assert torch.equal(clean, seeded_views(get_method("baseline").views(inputs), image, 5)[0])
    assert len(mixtures) == 2
    assert not torch.equal(*mixtures)
    assert not any(torch.equal(clean, mixture) for mixture in mixtures)


def jensen_shannon(logits):
    """Equation 3 of the paper in numpy: the mean over views of KL(p_i || M), M the mean of the p_i."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mean = p.mean(0)
    return np.mean([(one * np.log(one / mean)).sum(-1).mean() for one in p])


def test_consistency__is_the_formula():
    logits = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(consistency(logits)) == pytest.approx(jensen_shannon(logits.numpy()), rel=1e-12)


def test_consistency__bounds():
    assert float(consistency(torch.ones(3, 4, 5))) == pytest.approx(0, abs=1e-6)
    disjoint = torch.full((3, 1, 3), -2000.0)
    disjoint[range(3), 0, range(3)] = 2000.0
    disjoint.requires_grad_()
    value = consistency(disjoint)
    value.backward()
    assert value.item() == pytest.approx(math.log(3))
    assert disjoint.grad.isfinite().all(), "probabilities that underflow must not spoil the gradient"


@pytest.mark.parametrize("weight", [0.0, 12.0])
def test_augmix__loss_is_cross_entropy_of_the_clean_view_plus_divergence(weight):
    views = [batch(GREY, seed=seed)[0] for seed in range(3)]
    labels = batch(GREY)[1]
    network = tiny_network(GREY).eval()
    learner = get_method("augmix", {"consistency": weight}).learner(network, GREY)
    with torch.no_grad():
        logits = np.stack([network((view - 0.29) / 0.35).double().numpy() for view in views])
        loss = float(learner(views, labels, 0.0))
    log_p = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    expected = -log_p[range(6), labels].mean() + weight * jensen_shannon(logits)
    assert loss == pytest.approx(expected, rel=1e-4)


# PixMix


def test_mix_images__is_one_of_four_formulas():
    first, second = (batch(COLOUR, 1, seed)[0][0].double() for seed in (0, 1))
    kinds = set()
    for seed in range(40):
        mixed = drawn(seed, mix_images, first, second, 4.0)
        assert mixed.shape == first.shape
        assert mixed.min() >= 0
        assert mixed.max() <= 1
        # Weights from two pixels that were not cut, by hand: both kinds are linear, one of them in logarithms.
        inner = ((mixed > 1e-4) & (mixed < 1 - 1e-4)).flatten()
        x, y, z = (image.flatten()[inner].numpy() for image in (first, second, mixed))
        for kind, scale in (("added", lambda v: 2 * v - 1), ("multiplied", lambda v: np.log(2 * v))):
            columns = np.stack([scale(x), scale(y)], -1)
            (a, b), *_ = np.linalg.lstsq(columns, scale(z), rcond=None)
            if np.allclose(columns @ [a, b], scale(z), atol=1e-6):
                kinds.add((kind, bool(b > 0)))
                assert 0 <= a <= 1 if b > 0 else 1 <= a <= 2
                assert -1 <= b <= 1
                break
        else:
            pytest.fail("the mixture is neither a weighted sum nor a weighted product")
    assert len(kinds) == 4


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_mix_images__weights_follow_the_beta_distribution(beta):
    """A sum with black, where b is beta-distributed with mean 1 / (1 + beta): pixels become (a - b) x."""
    one, zero = torch.full((1,), 0.5, dtype=torch.float64), torch.full((1,), 0.55, dtype=torch.float64)
    shares = []
    for seed in range(3000):
        mixed = float(drawn(seed, mix_images, one, zero, beta)[0])
        shares.append(abs(mixed - 0.5) / 0.05)  # of a sum, b; of a product, nearly so
    assert np.mean(shares) == pytest.approx(1 / (1 + beta), rel=0.08)


def test_pixmix__black_and_white_stay_finite():
    for first, second in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        images = torch.full((1, 2, 2), first), torch.full((1, 2, 2), second)
        for seed in range(50):
            mixed = drawn(seed, mix_images, *images, 1.0)
            assert mixed.isfinite().all()


def test_pixmix__without_rounds_an_operation_at_most():
    image = photograph(GREY)
    views = get_method("pixmix", {**PLAIN, "rounds": 0, "magnitude": 0}).views(GREY)
    plain = get_method("baseline", PLAIN).views(GREY)
    same = [torch.equal(seeded_views(views, image, s)[0], seeded_views(plain, image, s)[0]) for s in range(40)]
    assert sum(same) >= 15, "half of the images, and the others at strength 0, keep their pixels"


@pytest.mark.parametrize("channels", [1, 3])
def test_mixing_set__are_varied_and_always_the_same(channels):
    images = mixing_set(12, channels, 40, 60)
    assert images.shape == (12, channels, 40, 60)
    assert images.dtype == torch.uint8
    assert torch.equal(images, mixing_set(12, channels, 40, 60))
    assert not torch.equal(images, mixing_set(12, channels, 40, 60, seed=1))
    assert (images.float().flatten(1).std(dim=1) > 20).all()
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_mixing_set__leave_the_global_generator():
    state = torch.get_rng_state()
    mixing_set(3, 3, 8, 8)
    assert torch.equal(torch.get_rng_state(), state)


# Diffusion noise


class Identity(nn.Module):
    def forward(self, images):
        return images.flatten(1)


@pytest.mark.parametrize("largest", [0.3, 0.8, 1.0])
def test_diffusionnoise__is_the_formula(largest):
    """x_t = sqrt(abar) x + sqrt(1 - abar) noise, with abar = cos(angle)^2 and angles uniform up to asin(largest)."""
    images, _ = batch(COLOUR, 500)
    learner = get_method("diffusionnoise", {"largest_noise": largest}).learner(Identity(), COLOUR)
    noisy = drawn(3, learner.normalise, images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (COLOUR.mean, COLOUR.std))
    clean = (images - mean) / std
    signal = ((noisy * clean).flatten(1).sum(1) / clean.square().flatten(1).sum(1)).clamp(-1, 1)
    rest = noisy - signal.view(-1, 1, 1, 1) * clean
    levels = rest.flatten(1).std(dim=1)
    assert torch.allclose(signal**2 + levels**2, torch.ones(500), atol=0.1)
    assert levels.max() < largest * 1.05
    angles = levels.clamp_max(1).asin() / math.asin(largest)
    assert float(angles.mean()) == pytest.approx(0.5, abs=0.05)
    assert abs(rest.mean()) < 0.01


def test_diffusionnoise__none_is_plain_training():
    images, labels = batch(GREY)
    network = tiny_network(GREY).eval()
    learner = get_method("diffusionnoise", {"largest_noise": 0}).learner(network, GREY)
    assert torch.equal(
        learner([images], labels, 0.0), get_method("baseline").learner(network, GREY)([images], labels, 0)
    )
