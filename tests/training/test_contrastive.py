"""Self-supervised methods: losses against slow twins, what learns and what rests, views, and what is kept."""

import copy
import math
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from layercrit.errors import TrainingError
from layercrit.training.contrastive import (
    MomentumContrast,
    Prototypes,
    SelfDistillation,
    teacher_momentum,
)
from layercrit.training.methods import METHODS, Inputs, Learner, get_method
from layercrit.training.self_supervised import LinearHead, find_classifier, local_size

pytest.importorskip("lightly")

NAMES = ("simclr", "moco_v3", "dino", "swav", "barlow_twins", "vicreg")
SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"hidden_dim": 16, "output_dim": 8},
    "moco_v3": {"hidden_dim": 16, "output_dim": 8, "teacher_momentum": 0.9},
    "dino": {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 24, "n_local_views": 2, "teacher_momentum": 0.9},
    "swav": {"hidden_dim": 16, "output_dim": 8, "n_prototypes": 6, "n_local_views": 2},
    "barlow_twins": {"hidden_dim": 16, "output_dim": 8},
    "vicreg": {"hidden_dim": 16, "output_dim": 8},
}
GREY = Inputs(1, 28, 28, 10, (0.3,), (0.3,), True)
COLOUR = Inputs(3, 64, 48, 10, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), False)


def plain_network(channels: int = 1) -> nn.Sequential:
    """Features of 12 numbers, BatchNorm among them, then a classifier of 10 classes."""
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def timm_network() -> nn.Module:
    import timm

    return timm.create_model("test_resnet", num_classes=10, in_chans=1)


def views_of(name: str, inputs: Inputs = GREY, n_images: int = 8, seed: int = 0) -> list[Tensor]:
    """A batch of noise of the shapes that the method's views have, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(inputs.height, inputs.width)] * 2 + [local_size(inputs)] * SMALL[name].get("n_local_views", 0)
    return [torch.rand(n_images, inputs.channels, *size, generator=generator) for size in sizes]


def learner_of(name: str, network: nn.Module | None = None, **settings: Any) -> Learner:
    torch.manual_seed(1)
    network = plain_network() if network is None else network
    return get_method(name, {**SMALL[name], **settings}).learner(network, GREY).train()


def step(learner: Learner, views: list[Tensor], progress: float = 0.5) -> float:
    """One step of gradient descent on all parameters that learn, as a training loop does it."""
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.1)
    loss = learner(views, torch.zeros(len(views[0]), dtype=torch.long), progress)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    learner.after_step(progress)
    return float(loss.detach())


def states(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- losses ---------------------------------------------------------------------------------------------------------


def outputs_of(learner: Any, views: list[Tensor]) -> list[Tensor]:
    """What the head makes of the plain network's features, computed without hooks."""
    network = learner.network
    return [learner.head(network[:-1]((view - 0.3) / 0.3)).double() for view in views]


def slow_nt_xent(one: Tensor, two: Tensor, temperature: float) -> float:
    """Chen et al. 2020, equation 1: every view against all others but itself, one by one."""
    z = [*one, *two]
    n = len(one)

    def similarity(i: int, j: int) -> float:
        return float(z[i] @ z[j] / (z[i].norm() * z[j].norm()))

    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = sum(math.exp(similarity(i, k) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(similarity(i, partner) / temperature) / others)
    return total / (2 * n)


def slow_barlow_twins(one: Tensor, two: Tensor, weight: float) -> float:
    """Zbontar et al. 2021, equations 1 and 2."""
    a = (one - one.mean(0)) / one.std(0, unbiased=False)
    b = (two - two.mean(0)) / two.std(0, unbiased=False)
    total = 0.0
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            correlation = float((a[:, i] * b[:, j]).mean())
            total += (1 - correlation) ** 2 if i == j else weight * correlation**2
    return total


def slow_vicreg(one: Tensor, two: Tensor) -> float:
    """Bardes et al. 2022, equations 1 to 6, with the authors' halves: variance is a mean over both views."""
    n, d = one.shape

    def variance(z: Tensor) -> float:
        return sum(max(0.0, 1 - math.sqrt(float(z[:, j].var()) + 1e-4)) for j in range(d)) / d

    def covariance(z: Tensor) -> float:
        c = z - z.mean(0)
        pairs = [(i, j) for i in range(d) for j in range(d) if i != j]
        return sum(float((c[:, i] * c[:, j]).sum() / (n - 1)) ** 2 for i, j in pairs) / d

    distance = sum(float(((one[i] - two[i]) ** 2).sum()) for i in range(n)) / (n * d)
    return 25 * distance + 25 * (variance(one) + variance(two)) / 2 + covariance(one) + covariance(two)


@pytest.mark.parametrize("name", ["simclr", "barlow_twins", "vicreg"])
def test_loss__is_that_of_the_paper(name: str) -> None:
    learner, views = learner_of(name), views_of(name)
    loss = float(learner(views, torch.zeros(8), 0.0).detach())
    with torch.no_grad():
        one, two = outputs_of(learner, views)
    twins = {
        "simclr": lambda: slow_nt_xent(one, two, 0.1),
        "barlow_twins": lambda: slow_barlow_twins(one, two, 0.005),
        "vicreg": lambda: slow_vicreg(one, two),
    }
    assert loss == pytest.approx(twins[name](), rel=1e-4)


def test_loss__moco_v3_finds_the_teachers_output_among_all() -> None:
    learner: Any = learner_of("moco_v3", temperature=0.5)
    views = views_of("moco_v3")
    with torch.no_grad():
        keys = [learner.teacher_head(learner.teacher[:-1]((view - 0.3) / 0.3)).double() for view in views]
        queries = [learner.predictor(out.float()).double() for out in outputs_of(learner, views)]
    expected = 0.0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for i in range(8):
            scores = [math.exp(float(q[i] @ k[j] / (q[i].norm() * k[j].norm())) / 0.5) for j in range(8)]
            expected -= 2 * 0.5 * math.log(scores[i] / sum(scores)) / 8
    assert float(learner(views, torch.zeros(8), 0.0).detach()) == pytest.approx(expected, rel=1e-4)


def test_loss__dino_is_the_cross_entropy_with_the_teachers_other_views() -> None:
    learner: Any = learner_of("dino", teacher_warmup_epochs=400, epochs=800)
    learner.loss.center.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    center, views = learner.loss.center[0, 0].double(), views_of("dino")
    with torch.no_grad():
        normal = [(view - 0.3) / 0.3 for view in views]
        targets = learner.teacher_head(learner.network[:-1](torch.cat(normal[:2])), True).double().chunk(2)
        large = learner.student[:-1](torch.cat(normal[:2])).chunk(2)
        small = learner.student[:-1](torch.cat(normal[2:])).chunk(2)
        student = learner.head(torch.cat([*large, *small]), True).double().chunk(4)
    terms = []
    for t, target in enumerate(targets):  # temperature: half way from 0.04 to 0.07
        soft = ((target - center) / 0.055).softmax(1)
        terms += [float(-(soft * (out / 0.1).log_softmax(1)).sum(1).mean()) for s, out in enumerate(student) if s != t]
    loss = float(learner(views, torch.zeros(8), 0.25).detach())
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_loss__swav_predicts_clusters_that_are_filled_evenly() -> None:
    learner: Any = learner_of("swav")
    views = views_of("swav")
    with torch.no_grad():
        normal = [(view - 0.3) / 0.3 for view in views]
        features = torch.cat([learner.network[:-1](torch.cat(normal[k : k + 2])) for k in (0, 2)])
        z = nn.functional.normalize(learner.head(features).double())
        scores = (z @ nn.functional.normalize(learner.prototypes.weight.double()).T).chunk(4)
    total = 0.0
    for i in (0, 1):
        q = (scores[i] / 0.05).exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)  # every prototype gets the same share of images
            q = q / q.sum(1, keepdim=True)
        total += sum(float(-(q * (scores[v] / 0.1).log_softmax(1)).sum(1).mean()) for v in range(4) if v != i) / 3
    assert float(learner(views, torch.zeros(8), 0.5).detach()) == pytest.approx(total / 2, rel=1e-4)


# --- what learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain_network, timm_network], ids=["plain", "timm"])
@pytest.mark.parametrize("name", NAMES)
def test_learner__backbone_learns_and_classifier_and_teacher_rest(name: str, make: Any) -> None:
    torch.manual_seed(0)
    network = make()
    keys, classifier = list(network.state_dict()), find_classifier(network, 10)
    learner: Any = learner_of(name, network)
    loss = learner(views_of(name), torch.zeros(8), 0.5)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    learning = learner.student if isinstance(learner, SelfDistillation) else learner.network
    assert learner.network is network
    assert list(network.state_dict()) == keys
    for parameter in learner.parameters():  # what wants a gradient gets one: processes wait for it
        assert (parameter.grad is not None) == parameter.requires_grad
    for key, parameter in learning.named_parameters():
        assert parameter.requires_grad != key.startswith(f"{classifier}.")
    assert any(p.grad.abs().max() > 0 for p in learning.parameters() if p.grad is not None)
    assert not list(network.get_submodule(classifier)._forward_pre_hooks)


@pytest.mark.parametrize("name", NAMES)
def test_learner__the_loss_falls(name: str) -> None:
    # DINO's target moves by itself; held still, it is approached.
    still = {"teacher_momentum": 1, "center_momentum": 1} if name == "dino" else {}
    learner, views = learner_of(name, **still), views_of(name)
    losses = [step(learner, views) for _ in range(12)]
    assert losses[-1] < losses[1]


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("moco_v3", [("network", "teacher"), ("head", "teacher_head")]),
        ("dino", [("student", "network"), ("head", "teacher_head")]),
    ],
)
def test_after_step__teacher_moves_by_the_formula(name: str, pairs: list[tuple[str, str]]) -> None:
    learner = learner_of(name)
    step(learner, views_of(name))
    before = copy.deepcopy(learner)
    learner.after_step(0.25)
    kept = 1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2
    for learning, following in pairs:
        moved = dict(learner.get_submodule(following).named_parameters())
        old = dict(before.get_submodule(following).named_parameters())
        target = dict(learner.get_submodule(learning).named_parameters())
        assert any(not torch.equal(moved[key], old[key]) for key in moved)
        for key, value in moved.items():
            torch.testing.assert_close(value, kept * old[key] + (1 - kept) * target[key])


def test_teacher_momentum__rises_to_one() -> None:
    assert teacher_momentum(0.9, 0.0) == pytest.approx(0.9)
    assert teacher_momentum(0.9, 0.5) == pytest.approx(0.95)
    assert teacher_momentum(0.9, 1.0) == 1.0


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_prototypes__do_not_learn_at_first_but_get_a_gradient(name: str) -> None:
    learner: Any = learner_of(name, epochs=10, frozen_epochs=2)
    prototypes: Prototypes = learner.prototypes if name == "swav" else learner.head.prototypes
    learner(views_of(name), torch.zeros(8), 0.1).backward()
    assert torch.equal(prototypes.weight.grad, torch.zeros_like(prototypes.weight))
    learner(views_of(name), torch.zeros(8), 0.2).backward()
    assert prototypes.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_learner__goes_on_from_its_state_bit_for_bit(name: str) -> None:
    learner = learner_of(name)
    for seed in range(2):
        step(learner, views_of(name, seed=seed))
    torch.manual_seed(77)
    fresh = get_method(name, SMALL[name]).learner(plain_network(), GREY).train()
    fresh.load_state_dict(learner.state_dict())
    views = views_of(name, seed=5)
    assert step(learner, views) == step(fresh, views)
    assert step(learner, views, 0.75) == step(fresh, views, 0.75)


@pytest.mark.parametrize("name", NAMES)
def test_learner__trying_sizes_leaves_no_trace(name: str) -> None:
    torch.manual_seed(3)
    network = plain_network()
    before = states(network)
    get_method(name, SMALL[name]).learner(network, GREY)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert network.training


# --- the linear head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain_network, timm_network], ids=["plain", "timm"])
def test_linear_head__changes_the_classifier_alone(make: Any) -> None:
    torch.manual_seed(0)
    network = make()
    learner = learner_of("simclr", network)
    step(learner, views_of("simclr"))
    before, classifier = states(network), find_classifier(network, 10)
    head = get_method("simclr").phases()[1].learner(network, GREY).train()
    assert isinstance(head, LinearHead)
    images, labels = views_of("simclr")[0], torch.arange(8)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(5):
        loss = head([images], labels, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]) != key.startswith(f"{classifier}."), key


def test_phases__pretraining_without_labels_then_plain_head() -> None:
    method = get_method("simclr", {"epochs": 3, "head_epochs": 2, "head_lr": 0.7, "lr": 0.2, "flip": 0.0})
    first, second = method.phases()
    assert (first.name, first.epochs, first.labelled) == ("pretraining", 3, False)
    assert (first.optimisation.optimizer, first.optimisation.lr) == ("lars", 0.2)
    assert (second.name, second.epochs, second.labelled) == ("linear head", 2, True)
    assert (second.optimisation.optimizer, second.optimisation.lr) == ("sgd", 0.7)
    assert second.optimisation.weight_decay == 0
    image = Image.fromarray(np.full((28, 28), 200, dtype=np.uint8))
    (view,) = second.views(GREY)(image)
    assert set(view.unique().tolist()) <= {0, 200}  # moved at most: nothing is recoloured


# --- views ----------------------------------------------------------------------------------------------------------


def noise_image(mode: str, height: int, width: int) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("inputs", "image", "large", "small"),
    [
        (GREY, noise_image("L", 28, 28), (1, 28, 28), (1, 16, 16)),
        (COLOUR, noise_image("RGB", 90, 80), (3, 64, 48), (3, 27, 21)),
    ],
    ids=["grey", "colour"],
)
@pytest.mark.parametrize("blur", ["auto", "on"])
def test_views__shapes(name: str, inputs: Inputs, image: Any, large: Any, small: Any, blur: str) -> None:
    make = get_method(name, {**SMALL[name], "blur": blur}).views(inputs)
    for _ in range(10):
        views = make(image)
        assert all(view.dtype == torch.uint8 for view in views)
        assert [tuple(view.shape) for view in views] == [large] * 2 + [small] * SMALL[name].get("n_local_views", 0)
        assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize("name", ["dino", "barlow_twins"])
def test_views__draw_from_the_global_generators(name: str) -> None:
    make = get_method(name, SMALL[name]).views(Inputs(3, 96, 96, 10, (0.5,) * 3, (0.2,) * 3, False))
    image = noise_image("RGB", 100, 100)

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        return list(make(image))

    assert all(torch.equal(one, two) for one, two in zip(drawn(1), drawn(1), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(drawn(1), drawn(2), strict=True))


def sharpness(method: str, inputs: Inputs, **settings: Any) -> float:
    """Mean difference between neighbouring pixels of views of noise, without changes of colour."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    make = get_method(method, {"jitter": 0, "min_scale": 1, **settings}).views(inputs)
    views = [make(noise_image("L", inputs.height, inputs.width))[0].float() for _ in range(20)]
    return float(torch.stack(views).diff(dim=-1).abs().mean())


def test_views__small_images_are_not_blurred_unless_told() -> None:
    large = Inputs(1, 96, 96, 10, (0.3,), (0.3,), True)
    assert sharpness("barlow_twins", GREY) > 1.3 * sharpness("barlow_twins", GREY, blur="on")
    assert sharpness("barlow_twins", large, blur="off") > 1.3 * sharpness("barlow_twins", large)


def test_views__show_more_of_small_images() -> None:
    large = Inputs(1, 96, 96, 10, (0.3,), (0.3,), True)
    shares = [get_method(name).smallest_share(inputs) for name in ("simclr", "dino") for inputs in (GREY, large)]  # type: ignore[attr-defined]
    assert shares == [0.2, 0.08, 0.3, 0.14]
    assert get_method("simclr", {"min_scale": 0.5}).smallest_share(GREY) == 0.5  # type: ignore[attr-defined]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_find_classifier__last_linear_layer_with_as_many_outputs() -> None:
    network = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 7))
    assert find_classifier(network, 10) == "1"
    assert find_classifier(timm_network(), 10) == "fc"


def test_find_classifier__none() -> None:
    network = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 7))
    with pytest.raises(TrainingError, match=r"no linear layer with 10 outputs.*outputs: 3 \(7\)"):
        get_method("simclr", SMALL["simclr"]).learner(network, GREY)


def test_learner__features_that_are_no_vectors() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(26 * 26, 10))
    with pytest.raises(TrainingError, match=r"must have the shape \(n_images, n_features\); got \(1, 4, 676\)"):
        get_method("simclr", SMALL["simclr"]).learner(network, GREY)


def test_learner__network_of_one_size_takes_no_small_views() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 12), nn.Linear(12, 10))
    with pytest.raises(TrainingError, match=r"does not take views of 16 x 16 pixels.*n_local_views=0"):
        get_method("dino", SMALL["dino"]).learner(network, GREY)
    learner = get_method("dino", {**SMALL["dino"], "n_local_views": 0}).learner(network, GREY)
    assert torch.isfinite(learner(views_of("dino")[:2], torch.zeros(8), 0.0))


def test_views__small_views_larger_than_large_ones() -> None:
    with pytest.raises(
        TrainingError, match=r"swav: local_min_scale must not be larger than min_scale; got 0\.5 and 0\.3"
    ):
        get_method("swav", {"local_min_scale": 0.5}).views(GREY)


def test_lightly_missing__says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    for name in NAMES:
        with pytest.raises(TrainingError, match=r"pip install 'layercrit\[train\]'"):
            get_method(name, SMALL[name]).learner(plain_network(), GREY)
        with pytest.raises(TrainingError, match=r"pip install 'layercrit\[train\]'"):
            get_method(name, SMALL[name]).views(GREY)


def test_registry__all_six_are_contrastive() -> None:
    assert {name for name, one in METHODS.items() if one.category == "contrastive"} >= set(NAMES)
    assert all("arXiv" in METHODS[name].paper for name in NAMES)
    assert isinstance(learner_of("moco_v3"), MomentumContrast)
