import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layercrit.attacks import attack
from layercrit.errors import TrainingError
from layercrit.training import get_method
from layercrit.training.adversarial import AttackedLearner
from layercrit.training.methods import Inputs, Supervised
from training_inputs import COLOUR, GREY, batch, tiny_network

NORMS = {"l2": 0.8, "linf": 8 / 255}


def attacked(network, images, labels, norm, steps=3, step_size=None, random_start=False, eps=None):
    eps = NORMS[norm] if eps is None else eps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return attack(network, images, labels, norm, eps, steps, step_size or 2 * eps / steps, random_start)


def norms(perturbations, norm):
    return perturbations.flatten(1).norm(dim=1, p=2 if norm == "l2" else float("inf"))


@pytest.fixture(params=[GREY, COLOUR], ids=["grey", "colour"])
def case(request):
    images, labels = batch(request.param)
    return tiny_network(request.param).eval(), images, labels


# The attack


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_attack__stays_within_the_ball_and_the_range(case, norm, random_start):
    network, images, labels = case
    for steps, step_size in ((1, None), (5, None), (3, 100.0)):
        result = attacked(network, images, labels, norm, steps, step_size, random_start)
        assert result.shape == images.shape
        assert not result.requires_grad
        assert result.min() >= 0
        assert result.max() <= 1
        lengths = norms(result - images, norm)
        assert (lengths <= NORMS[norm] * (1 + 1e-5)).all()
        assert (lengths > 0.5 * NORMS[norm]).all(), "an image was hardly changed"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_attack__raises_the_loss_of_every_image(case, norm, random_start):
    network, images, labels = case
    result = attacked(network, images, labels, norm, random_start=random_start)
    with torch.no_grad():
        clean = F.cross_entropy(network(images), labels, reduction="none")
        fooled = F.cross_entropy(network(result), labels, reduction="none")
    assert (fooled > clean).all()


def test_attack__is_the_formula_of_a_linear_network_l2():
    """The loss's gradient with respect to an image is W^T (p - y); two steps by hand, float64."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    images = 0.3 + 0.4 * torch.rand(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1])
    result = attack(lambda x: x.flatten(1) @ weight.T, images, labels, "l2", 0.2, 2, 0.15, False)
    for image, label, found in zip(images.flatten(1), labels, result.flatten(1), strict=True):
        x = image.clone()
        for _ in range(2):
            p = torch.exp(weight @ x) / torch.exp(weight @ x).sum()
            p[label] -= 1
            gradient = weight.T @ p
            x = x + 0.15 * gradient / (gradient**2).sum().sqrt()
            away = x - image
            length = (away**2).sum().sqrt()
            if length > 0.2:
                x = image + away * 0.2 / length
        assert torch.allclose(found, x.clamp(0, 1), rtol=0, atol=1e-12)
        assert not torch.equal(x, image)


def test_attack__is_the_formula_of_a_linear_network_linf():
    """As above with signs; pixels near 0 and 1 are cut in each step."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    images = torch.rand(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1])
    result = attack(lambda x: x.flatten(1) @ weight.T, images, labels, "linf", 0.1, 3, 0.06, False)
    for image, label, found in zip(images.flatten(1), labels, result.flatten(1), strict=True):
        x = image.clone()
        for _ in range(3):
            p = torch.exp(weight @ x) / torch.exp(weight @ x).sum()
            p[label] -= 1
            gradient = weight.T @ p
            for pixel in range(12):
                moved = x[pixel] + 0.06 * (1 if gradient[pixel] > 0 else -1)
                moved = min(max(moved, image[pixel] - 0.1), image[pixel] + 0.1)
                x[pixel] = min(max(moved, 0.0), 1.0)
        assert torch.allclose(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_attack__starts_uniformly_in_the_ball(norm):
    images = torch.full((4000, 1, 2, 1), 0.5)
    labels = torch.zeros(4000, dtype=torch.long)
    away = attacked(None, images, labels, norm, steps=0, step_size=1.0, random_start=True, eps=0.25) - images
    radii = norms(away, norm) / 0.25
    # In two dimensions the share of a ball within radius r is r^2, whatever the norm.
    assert abs((radii < 0.5).float().mean() - 0.25) < 0.03
    assert abs(away.mean()) < 0.01
    assert radii.max() > 0.99


@pytest.mark.parametrize("norm", NORMS)
def test_attack__a_flat_loss_changes_nothing(norm):
    images, labels = batch(GREY)
    result = attacked(lambda x: x.flatten(1)[:, :10] * 0, images, labels, norm)
    assert torch.equal(result, images)


def test_attack__works_without_gradients_around_it(case):
    network, images, labels = case
    with torch.no_grad():
        assert torch.equal(attacked(network, images, labels, "l2"), attacked(network, images, labels, "l2"))


def test_attack__unknown_norm():
    images, labels = batch(GREY)
    with pytest.raises(TrainingError, match=r"no attack in the norm 'l1'\. Did you mean 'l2'"):
        attack(lambda x: x, images, labels, "l1", 1.0, 1, 1.0, False)


# The learner


@pytest.mark.parametrize("name", ["robust_l2", "robust_linf"])
def test_learner__leaves_modes_gradients_and_statistics(name):
    network = tiny_network(GREY).train()
    network[4].eval()
    modes = [module.training for module in network.modules()]
    statistics = {key: value.clone() for key, value in network.named_buffers()}
    images, labels = batch(GREY)
    learner = get_method(name).learner(network, GREY)
    seen = []
    network.register_forward_hook(lambda module, args, output: seen.append([m.training for m in module.modules()]))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    learner.attacked(images, labels)
    assert len(seen) == 3
    assert not any(map(any, seen)), "the attack ran in training mode"
    assert [module.training for module in network.modules()] == modes
    assert all((parameter.grad == 7).all() for parameter in network.parameters())
    assert all(torch.equal(value, statistics[key]) for key, value in network.named_buffers())


def test_learner__restores_modes_after_an_exception():
    class Fails(nn.Module):
        def forward(self, images):
            raise RuntimeError("broken network")

    network = nn.Sequential(nn.Dropout(), Fails()).train()
    network[0].eval()
    learner = get_method("robust_linf").learner(network, GREY)
    with pytest.raises(RuntimeError, match="broken network"):
        learner([batch(GREY)[0]], batch(GREY)[1], 0.0)
    assert network.training
    assert not network[0].training
    assert network[1].training


@pytest.mark.parametrize(("name", "eps", "radius"), [("robust_l2", 0.7, 0.7), ("robust_linf", 8, 8 / 255)])
@pytest.mark.parametrize("random_start", [False, True])
def test_learner__units_and_steps_are_those_of_the_settings(name, eps, radius, random_start):
    """The normalisation is part of what is attacked, the perturbation is in pixels before it."""
    images, labels = batch(COLOUR)
    settings = {"eps": eps, "steps": 4, "step_size": 0.3 * eps, "random_start": random_start}
    learner = get_method(name, settings).learner(tiny_network(COLOUR).eval(), COLOUR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = learner.attacked(images, labels)
    norm = name.removeprefix("robust_")
    expected = attacked(learner.logits, images, labels, norm, 4, 0.3 * radius, random_start, radius)
    assert torch.equal(found, expected)
    loss = F.cross_entropy(learner.network(learner.normalise(expected)), labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.equal(learner([images], labels, 0.0), loss)


def test_learner__step_size_without_a_word_is_two_eps_over_steps():
    images, labels = batch(GREY)
    network = tiny_network(GREY).eval()
    plain, told = (
        get_method("robust_l2", {"eps": 1.5, "steps": 3, "random_start": False, **more}).learner(network, GREY)
        for more in ({}, {"step_size": 1.0})
    )
    assert torch.equal(plain.attacked(images, labels), told.attacked(images, labels))


@pytest.mark.parametrize("name", ["robust_l2", "robust_linf"])
def test_learner__eps_0_is_plain_training_bit_for_bit(name):
    images, labels = batch(GREY)
    learners = [
        get_method(name, {"eps": 0}).learner(tiny_network(GREY), GREY),
        get_method("baseline").learner(tiny_network(GREY), GREY),
    ]
    assert not isinstance(learners[0], AttackedLearner)
    assert type(learners[0]) is Supervised
    for learner in learners:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            learner([images], labels, 0.0).backward()
    gradients = [[parameter.grad for parameter in learner.parameters()] for learner in learners]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_learner__training_makes_a_network_robust():
    """One pixel tells the class far apart and mostly, all others tell it always and by less than the attack takes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    signs = (2.0 * labels - 1).view(-1, 1, 1, 1)
    images = 0.5 + 0.02 * signs + 0.02 * torch.randn(400, 1, 4, 4, generator=generator)
    mostly = torch.where(torch.rand(400, generator=generator) < 0.9, 1.0, -1.0)
    images[:, 0, 0, 0] = 0.5 + 0.2 * signs.flatten() * mostly
    inputs = Inputs(1, 4, 4, 2, (0.5,), (0.1,), same_size=True)
    accuracy = {}
    for eps in (0.0, 8.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            learner = get_method("robust_linf", {"eps": eps}).learner(
                nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), inputs
            )
            optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
            for _ in range(100):
                optimizer.zero_grad()
                learner([images], labels, 0.0).backward()
                optimizer.step()
        fooling = attacked(learner.logits, images, labels, "linf")
        accuracy[eps] = [float((learner.logits(x).argmax(1) == labels).float().mean()) for x in (images, fooling)]
    assert accuracy[0.0][0] > 0.95 > accuracy[8.0][0] > 0.85
    assert accuracy[0.0][1] < 0.6 < 0.85 < accuracy[8.0][1]
