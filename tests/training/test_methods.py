import re
from dataclasses import dataclass, fields

import pytest
import torch

from layercrit.errors import TrainingError
from layercrit.seeds import drawing
from layercrit.training import METHODS, Method, get_method, method, setting
from layercrit.training.methods import CATEGORIES, Supervised
from training_inputs import COLOUR, GREY, batch, photograph, seeded_views, tiny_network

INPUTS = {"grey": GREY, "colour": COLOUR}


# The registry


def test_methods__each_says_what_it_is():
    assert {cls.category for cls in METHODS.values()} == set(CATEGORIES)
    for name, cls in METHODS.items():
        assert cls.name == name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert cls.changes
        assert cls.paper
        assert cls.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_methods__each_setting_has_a_text_and_a_default_within_its_range(name):
    for field in fields(METHODS[name]):
        assert field.metadata["text"]
        given = get_method(name, {field.name: field.default})
        assert getattr(given, field.name) == field.default
        told = get_method(name, {field.name: str(field.default)})
        assert told == given, "a text, as from a command line, means the same"


@pytest.mark.parametrize("name", METHODS)
def test_methods__optimizers_are_timms(name):
    import timm.optim

    names = timm.optim.list_optimizers()
    assert all(phase.optimisation.optimizer in names for phase in get_method(name).phases())


@pytest.mark.parametrize("name", METHODS)
def test_phases__end_with_learning_from_labels(name):
    phases = get_method(name).phases()
    assert phases[-1].labelled
    assert len({phase.name for phase in phases}) == len(phases)


def test_method__registers_own_methods():
    @method("mine", category="augmentation", changes="everything", paper="none")
    @dataclass(frozen=True)
    class Mine(Method):
        strength: float = setting(0.5, "of it", low=0, high=1)

    try:
        assert get_method("mine", {"strength": "0.25", "epochs": 3}) == Mine(strength=0.25, epochs=3)
        assert Mine.category == "augmentation"
        assert get_method("mine").changed()["strength"] == 0.5
    finally:
        METHODS.pop("mine")


# Settings


def test_get_method__defaults_and_changes():
    plain = get_method("baseline")
    assert plain.changed()["lr"] == 0.1
    changed = get_method("baseline", {"lr": "3e-2", "epochs": 7, "optimizer": "adamw"})
    assert (changed.lr, changed.epochs, changed.optimizer) == (0.03, 7, "adamw")
    assert changed.optimisation().lr == 0.03
    assert changed.phases()[0].epochs == 7
    assert get_method("baseline", {"epochs": 7.0}).epochs == 7
    assert isinstance(get_method("baseline", {"epochs": 7.0}).epochs, int)
    assert isinstance(get_method("baseline", {"lr": 1}).lr, float)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), (True, True)])
def test_get_method__true_and_false(text, value):
    assert get_method("robust_l2", {"random_start": text}).random_start is value


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("augmxi", {}, r"There is no training method 'augmxi'\. Did you mean 'augmix'"),
        ("zzz", {}, r"There is no training method 'zzz'\. Known: .* more\."),
        ("baseline", {"epoch": 3}, r"The method baseline has no setting 'epoch'\. Did you mean 'epochs'"),
        ("baseline", {"epochs": 0}, r"baseline: epochs must be a whole number from 1; got 0\."),
        ("baseline", {"epochs": 2.5}, r"epochs must be a whole number from 1; got 2\.5"),
        ("baseline", {"epochs": "many"}, r"epochs must be a whole number from 1; got 'many'"),
        ("baseline", {"epochs": True}, r"epochs must be a whole number from 1; got True"),
        ("baseline", {"lr": -1}, r"lr must be a number from 0; got -1"),
        ("baseline", {"lr": "nan"}, r"lr must be a number from 0; got 'nan'"),
        ("baseline", {"lr": float("inf")}, r"lr must be a number from 0; got inf"),
        ("baseline", {"lr": None}, r"lr must be a number from 0; got None"),
        ("baseline", {"momentum": 1.5}, r"momentum must be a number from 0 to 1; got 1\.5"),
        ("baseline", {"optimizer": 3}, r"optimizer must be text; got 3"),
        (
            "baseline",
            {"schedule": "cosin"},
            r"schedule must be one of cosine, step; got 'cosin'\. Did you mean 'cosine'",
        ),
        ("robust_l2", {"random_start": "maybe"}, r"random_start must be true or false; got 'maybe'"),
        ("augmix", {"severity": 11}, r"severity must be a whole number from 1 to 10; got 11"),
        ("a1", {"loss": "mse"}, r"loss must be one of cross_entropy, bce; got 'mse'"),
        ("a1", {"repeats": 0}, r"a1: repeats must be a whole number from 1; got 0"),
    ],
)
def test_get_method__errors(name, settings, message):
    with pytest.raises(TrainingError, match=message):
        get_method(name, settings)


# Views and learners of every method

PHASES = [(name, i) for name, cls in METHODS.items() for i in range(len(cls().phases()))]


@pytest.mark.parametrize(("name", "i"), PHASES, ids=[f"{name}-{i}" for name, i in PHASES])
@pytest.mark.parametrize("kind", INPUTS)
def test_views__shape_type_and_seeds(name, i, kind):
    inputs = INPUTS[kind]
    image = photograph(inputs)
    views = get_method(name).phases()[i].views(inputs)
    first, again, *others = (seeded_views(views, image, seed) for seed in (7, 7, *range(8, 18)))
    assert len(first) >= 1
    for view in first:
        assert view.dtype == torch.uint8
        assert view.shape[0] == inputs.channels
        assert view.shape[1] <= inputs.height
        assert view.shape[2] <= inputs.width
    assert first[0].shape[1:] == (inputs.height, inputs.width)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the same seed gave other views"
    assert [view.shape for view in others[0]] == [view.shape for view in first]
    assert any(not torch.equal(first[0], other[0]) for other in others), "all seeds gave the same view"


@pytest.mark.parametrize("name", METHODS)
def test_views__images_of_other_sizes_become_the_networks(name):
    image = photograph(COLOUR).resize((90, 61))
    inputs = type(COLOUR)(3, 48, 48, 10, COLOUR.mean, COLOUR.std, same_size=False)
    for phase in get_method(name).phases():
        assert seeded_views(phase.views(inputs), image, 0)[0].shape == (3, 48, 48)


SUPERVISED = [name for name, cls in METHODS.items() if len(cls().phases()) == 1]


@pytest.mark.parametrize("name", SUPERVISED)
@pytest.mark.parametrize("kind", INPUTS)
def test_learner__finite_scalar_loss_with_gradients(name, kind):
    inputs = INPUTS[kind]
    chosen = get_method(name)
    (phase,) = chosen.phases()
    views = phase.views(inputs)
    per_image = [seeded_views(views, photograph(inputs, seed), seed) for seed in range(6)]
    batches = [torch.stack(list(view)).float() / 255 for view in zip(*per_image, strict=True)]
    labels = batch(inputs)[1]
    losses = []
    for seed in (0, 0):
        network = tiny_network(inputs).train()
        learner = phase.learner(network, inputs)
        assert learner.network is network
        with drawing(seed):
            loss = learner(batches, labels, 0.0)
        assert loss.shape == ()
        assert loss.isfinite()
        loss.backward()
        learner.after_step(0.0)
        losses.append(loss.item())
    assert losses[0] == losses[1], "the same seed gave another loss"
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert learning
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learning)
    assert all(parameter.grad.abs().sum() > 0 for parameter in learning if parameter.ndim > 1)


def test_supervised__takes_another_loss():
    images, labels = batch(GREY)
    learner = Supervised(tiny_network(GREY), GREY, loss=lambda logits, classes: logits.sum() * 0 + classes.sum())
    assert learner([images], labels, 0.0).item() == float(labels.sum())


# The baseline's crops


@pytest.mark.parametrize(("settings", "kept"), [({}, 0.5), ({"flip": 0}, 1.0), ({"flip": 1}, 0.0)])
def test_crops__flips(settings, kept):
    """Left of the edge is darker than right of it, unless mirrored."""
    image = photograph(GREY).point(lambda value: 0)
    image.paste(255, (14, 0, 28, 28))
    views = get_method("baseline", settings).views(GREY)
    whole = [seeded_views(views, image, seed)[0].float() for seed in range(60)]
    share = sum(float(view[..., 20:].mean()) > float(view[..., :8].mean()) for view in whole) / 60
    assert share == pytest.approx(kept, abs=0.2 if 0 < kept < 1 else 0)


def test_crops__shift_for_small_images_of_the_networks_size_and_resized_otherwise():
    def kind(inputs, **settings):
        return type(get_method("baseline", settings).crops(inputs)[0]).__name__

    large = type(COLOUR)(3, 224, 224, 10, COLOUR.mean, COLOUR.std, same_size=True)
    mixed = type(COLOUR)(3, 32, 32, 10, COLOUR.mean, COLOUR.std, same_size=False)
    assert [kind(inputs) for inputs in (GREY, COLOUR, large, mixed)] == [
        "RandomCrop",
        "RandomCrop",
        "RandomResizedCrop",
        "RandomResizedCrop",
    ]
    assert kind(large, crop="shift") == "RandomCrop"
    assert kind(GREY, crop="resized") == "RandomResizedCrop"
