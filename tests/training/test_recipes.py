import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layercrit.seeds import drawing
from layercrit.training import METHODS, get_method
from layercrit.training.recipes import Recipe, binary_cross_entropy
from training_inputs import COLOUR, GREY, batch, photograph, seeded_views, tiny_network

RECIPES = sorted(name for name, method in METHODS.items() if method.category == "training_recipes")
PLAIN = {"crop": "shift", "flip": 0.0}
NOTHING = {"mixup": 0, "cutmix": 0, "label_smoothing": 0, "loss": "cross_entropy", "policy": "none"}


def mixed(name, settings, seed, n_images=6):
    images, labels = batch(COLOUR, n_images)
    learner = get_method(name, settings).learner(nn.Identity(), COLOUR)
    with drawing(seed):
        return images, labels, *learner.mixed(images, labels)


def test_recipes__names():
    assert RECIPES == ["a1", "a2", "a3", "b1k", "c1", "d", "tv2"]
    assert all(issubclass(METHODS[name], Recipe) for name in RECIPES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a1", (600, 2048, "lamb", 5e-3, 0.01, 0.1, 0.2, 1.0, "bce", 7, 3, 0.0, 0.0)),
        ("a2", (300, 2048, "lamb", 5e-3, 0.02, 0.0, 0.1, 1.0, "bce", 7, 3, 0.0, 0.0)),
        ("a3", (100, 2048, "lamb", 8e-3, 0.02, 0.0, 0.1, 1.0, "bce", 6, 1, 0.0, 0.0)),
        ("tv2", (600, 1024, "momentum", 0.5, 2e-5, 0.1, 0.2, 1.0, "cross_entropy", 7, 4, 0.99997, 0.1)),
    ],
)
def test_recipes__published_values(name, expected):
    """Table 2 of Wightman et al. 2021; the command in torchvision's classification references."""
    names = "epochs batch_size optimizer lr weight_decay label_smoothing mixup cutmix loss magnitude repeats"
    recipe = get_method(name)
    assert tuple(getattr(recipe, key) for key in f"{names} ema_decay random_erasing".split()) == expected
    assert recipe.schedule == "cosine"
    assert recipe.warmup_epochs == 5


def test_recipes__optimisers_losses_and_averages_of_the_others():
    assert [get_method(name).optimizer for name in ("b1k", "c1", "d")] == ["rmsproptf", "sgd", "adamw"]
    assert [get_method(name).loss for name in ("b1k", "c1", "d")] == ["cross_entropy", "cross_entropy", "bce"]
    assert get_method("b1k").ema_decay > 0
    assert get_method("c1").clip_norm > 0


# Mixing


@pytest.mark.parametrize("name", RECIPES)
def test_mixed__shares_sum_to_one_and_name_the_images_mixed(name):
    for seed in range(20):
        images, labels, pictures, shares = mixed(name, {}, seed)
        assert pictures.shape == images.shape
        assert shares.shape == (6, 10)
        assert torch.allclose(shares.sum(dim=1), torch.ones(6), atol=1e-6)
        assert (shares >= 0).all()
        present = torch.stack([labels, labels.roll(1)], dim=1)
        assert torch.allclose(
            shares.gather(1, present).sum(dim=1),
            1 + shares.gather(1, present[:, :1])[:, 0] * (present[:, 0] == present[:, 1]),
            atol=1e-6,
        )


def test_mixed__mixup_is_the_weighted_average():
    """Each image is averaged with the one before it; the shares of labels are those of the pixels."""
    images, labels, pictures, shares = mixed("a1", {"mixup": 1.0, "cutmix": 0}, seed=2)
    expected = torch.zeros(6, 10)
    share = float(((pictures - images.roll(1, 0)) / (images - images.roll(1, 0))).median())
    for i in range(6):
        expected[i, labels[i]] += share
        expected[i, labels[i - 1]] += 1 - share
    assert 0 < share < 1
    assert torch.allclose(pictures, share * images + (1 - share) * images.roll(1, 0), atol=1e-5)
    assert torch.allclose(shares, expected, atol=1e-5)


def test_mixed__cutmix_is_a_rectangle_of_another_image():
    images, labels, pictures, shares = mixed("a1", {"mixup": 0, "cutmix": 1.0}, seed=4)
    other = (pictures == images.roll(1, 0)).all(dim=1)
    kept = (pictures == images).all(dim=1)
    assert (other ^ kept).all()
    rows, columns = other[0].any(1).nonzero().flatten(), other[0].any(0).nonzero().flatten()
    assert other[0].sum() == len(rows) * len(columns)
    for i in range(6):
        if labels[i] != labels[i - 1]:
            assert float(shares[i, labels[i - 1]]) == pytest.approx(float(other[i].float().mean()), abs=1e-6)


def test_mixed__both_ways_take_turns():
    cuts = []
    for seed in range(60):
        images, _, pictures, _ = mixed("a1", {"mixup": 1.0, "cutmix": 1.0}, seed)
        cuts.append(bool(((pictures == images) | (pictures == images.roll(1, 0))).all()))
    assert 15 < sum(cuts) < 45


def test_mixed__nothing_to_mix():
    images, labels, pictures, shares = mixed("a1", NOTHING, seed=0)
    assert torch.equal(pictures, images)
    assert torch.equal(shares, F.one_hot(labels, 10).float())


# Losses


def slow_binary(logits, shares, smoothing):
    """Every class of every image is a question of its own, present or not."""
    n_images, n_classes = shares.shape
    total = 0.0
    for i in range(n_images):
        for k in range(n_classes):
            target = (1 - smoothing if shares[i, k] > 0.2 else 0.0) + smoothing / n_classes
            p = 1 / (1 + np.exp(-logits[i, k]))
            total -= target * np.log(p) + (1 - target) * np.log(1 - p)
    return total / (n_images * n_classes)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy__is_the_formula(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    shares = torch.tensor(
        [[1, 0, 0, 0, 0], [0.7, 0.3, 0, 0, 0], [0, 0, 0.1, 0.9, 0], [0, 0, 0, 0.5, 0.5]], dtype=torch.float64
    )
    expected = slow_binary(logits.numpy(), shares.numpy(), smoothing)
    assert float(binary_cross_entropy(logits, shares, smoothing)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_learner__cross_entropy_of_mixed_and_smoothed_labels(smoothing):
    settings = {"mixup": 0.4, "cutmix": 0, "label_smoothing": smoothing}
    learner = get_method("c1", settings).learner(tiny_network(COLOUR).eval(), COLOUR)
    images, labels, pictures, shares = mixed("c1", settings, seed=1)
    with drawing(1), torch.no_grad():
        loss = learner([images], labels, 0.0)
        log_p = learner.logits(pictures).double().log_softmax(1).numpy()
    targets = (1 - smoothing) * shares.double().numpy() + smoothing / 10
    assert float(loss) == pytest.approx(-(targets * log_p).sum(1).mean(), rel=1e-5)


def test_learner__binary_loss_of_mixed_images():
    learner = get_method("a1").learner(tiny_network(COLOUR).eval(), COLOUR)
    images, labels, pictures, shares = mixed("a1", {}, seed=3)
    with drawing(3), torch.no_grad():
        loss = learner([images], labels, 0.0)
        logits = learner.logits(pictures).double().numpy()
    assert float(loss) == pytest.approx(slow_binary(logits, shares.numpy(), 0.1), rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_learner__without_its_changes_a_recipe_is_plain_training(name):
    images, labels = batch(GREY)
    network = tiny_network(GREY).eval()
    loss = get_method(name, NOTHING).learner(network, GREY)([images], labels, 0.0)
    plain = get_method("baseline").learner(network, GREY)([images], labels, 0.0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


# Views


@pytest.mark.parametrize("inputs", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_views__erased_rectangles_have_the_mean_colour(inputs, share):
    image = photograph(inputs)
    views = get_method("tv2", {**PLAIN, "policy": "none", "random_erasing": share}).views(inputs)
    plain = get_method("baseline", PLAIN).views(inputs)
    mean = torch.tensor([round(255 * value) for value in inputs.mean], dtype=torch.uint8).view(-1, 1, 1)
    n_erased = 0
    for seed in range(40):
        view, whole = (seeded_views(one, image, seed)[0] for one in (views, plain))
        erased = (view != whole).any(dim=0)
        n_erased += bool(erased.any())
        assert (view == mean)[:, erased].all()
        assert erased.float().mean() < 0.35
    assert n_erased == 40 * share if share != 0.5 else 10 < n_erased < 30


@pytest.mark.parametrize("policy", ["rand", "trivial"])
@pytest.mark.parametrize("inputs", [GREY, COLOUR], ids=["grey", "colour"])
def test_views__policies_change_images(policy, inputs):
    image = photograph(inputs)
    views = get_method("a1", {**PLAIN, "policy": policy}).views(inputs)
    plain = get_method("a1", {**PLAIN, "policy": "none"}).views(inputs)
    n_changed = sum(
        not torch.equal(seeded_views(views, image, seed)[0], seeded_views(plain, image, seed)[0]) for seed in range(40)
    )
    assert n_changed > 25


@pytest.mark.parametrize("magnitude", [0, 9, 10])
def test_views__every_magnitude_works_for_every_operation(magnitude):
    views = get_method("b1k", {"magnitude": magnitude}).views(GREY)
    image = photograph(GREY)
    with drawing(0):
        assert all(views(image)[0].shape == (1, 28, 28) for _ in range(2000))


def test_views__magnitude_is_the_strength():
    image = photograph(COLOUR)
    plain = get_method("a1", {**PLAIN, "policy": "none"}).views(COLOUR)
    distances = []
    for magnitude in (0, 10):
        views = get_method("a1", {**PLAIN, "magnitude": magnitude}).views(COLOUR)
        pairs = [(seeded_views(views, image, s)[0], seeded_views(plain, image, s)[0]) for s in range(60)]
        distances.append(np.mean([(a.float() - b.float()).abs().mean() for a, b in pairs]))
    assert distances[0] < 0.8 * distances[1]
