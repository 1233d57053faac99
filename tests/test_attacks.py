import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layercrit import attacks
from layercrit.attacks import Pgd, attack, attacked, split_attack
from layercrit.errors import LayercritError, ModelError, ProbeError
from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.seeds import probe_set_seed
from photographs import pieces

SIZE = Preprocessing(3, 16, 16, 16)
LINF = "pgd(norm=linf, eps=4/255, steps=10)"


class Linear(nn.Module):
    """Two classes, told apart by a weighted sum of pixels: the loss rises fastest along the weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weights = nn.Linear(3 * 16 * 16, 2, bias=False)
        nn.init.normal_(self.weights.weight, std=0.02, generator=torch.Generator().manual_seed(seed))

    def forward(self, images):
        return self.weights(images.flatten(1))

    def away_from(self, labels) -> torch.Tensor:
        """The direction ``(n_images, 3, 16, 16)`` in which the loss of each label rises."""
        weight = self.weights.weight.detach()
        return torch.stack([weight[1 - label] - weight[label] for label in labels.tolist()]).view(-1, 3, 16, 16)


def convolutional(seed: int = 0, n_classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes),
        ).eval()  # fmt: skip


def probe_set_of(n_images: int = 20, n_classes: int = 2, labels: bool = True) -> ProbeSet:
    given_labels = np.arange(n_images) % n_classes if labels else None
    return ProbeSet.from_array(pieces(n_images), SIZE, labels=given_labels)


def away(changed: ProbeSet, clean: ProbeSet) -> np.ndarray:
    return changed.images.astype(float) - clean.images


# Known answers


@pytest.mark.parametrize("start", ["", ", random_start=false", ", seed=3"])
def test_attacked__of_a_linear_network_is_the_sign_of_its_gradient(start):
    network, clean = Linear(), probe_set_of()
    found = attacked(clean, network, f"pgd(norm=linf, eps=4/255, steps=20{start})")
    sign = network.away_from(torch.from_numpy(clean.labels)).sign().numpy()
    assert np.array_equal(found.images, np.clip(clean.images + 4 * sign, 0, 255))


def test_attacked__of_a_linear_network_is_along_its_gradient_in_l2():
    network = Linear()
    clean = ProbeSet.from_array(pieces(8) // 2 + 64, SIZE, labels=np.arange(8) % 2)  # no value reaches 0 or 255
    found = away(attacked(clean, network, "pgd(norm=l2, eps=0.5, steps=20, random_start=false)"), clean)
    direction = network.away_from(torch.from_numpy(clean.labels)).numpy()
    lengths = np.sqrt((found**2).sum((1, 2, 3)))
    cosines = (found * direction).sum((1, 2, 3)) / lengths / np.sqrt((direction**2).sum((1, 2, 3)))
    assert (lengths <= 0.5 * 255).all()
    assert (lengths > 0.49 * 255).all()
    assert (cosines > 0.99).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack__goes_to_the_clean_image_with_eps(norm):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1])
    for eps in (1e-2, 1e-4, 0.0):
        found = attack(Linear(), images, labels, norm, eps, 5, eps, True)
        assert float((found - images).abs().max()) <= eps * 1.001 + 1e-7


def test_attacked__with_the_mean_and_deviation_that_the_model_declares():
    """One channel is scaled up by the normalisation: nearly all of an L2 perturbation goes there."""
    model = open_model(Linear(), mean=(0.5, 0.5, 0.5), std=(1.0, 0.01, 1.0), input_size=(3, 16, 16))
    clean = probe_set_of(6)
    moved = (away(attacked(clean, model, "pgd(norm=l2, eps=2, steps=5, random_start=false)"), clean) ** 2).sum(
        (0, 2, 3)
    )
    assert moved[1] > 100 * (moved[0] + moved[2])


def test_attacked__more_steps_raise_the_loss_more():
    network, clean = convolutional(), probe_set_of(16, 3)
    model = open_model(network, input_size=(3, 16, 16))

    def loss(probe_set):
        with torch.no_grad():
            logits = model.classifier(probe_set.batch(0, 16))
        return float(nn.functional.cross_entropy(logits, torch.from_numpy(clean.labels)))

    losses = [loss(clean), *(loss(attacked(clean, model, Pgd(norm="l2", eps=1.0, steps=n))) for n in (1, 20))]
    assert losses[0] < losses[1] <= losses[2] + 1e-3


# Eight bits


def slow_twin(clean: np.ndarray, found: np.ndarray, norm: str, eps: float) -> np.ndarray:
    """One image, as it is defined."""
    moved, limit = (found * 255.0 - clean).ravel(), eps * 255 * (1 + 1e-9)
    if norm == "linf":
        most = math.floor(eps * 255 + 1e-6)
        levels = [max(-most, min(most, round(one))) for one in moved]
    else:  # levels change where a value crosses the middle between two of them
        bends = sorted({(level + 0.5) / abs(one) for one in moved if one for level in range(int(limit) + 2)})
        factors = [(low + high) / 2 for low, high in itertools.pairwise([0.0, *bends])]
        within = [factor for factor in factors if math.hypot(*(round(factor * one) for one in moved)) <= limit]
        levels = [round(max(within) * one) for one in moved]
    return np.clip(clean.ravel() + np.array(levels), 0, 255).reshape(clean.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["linf", "l2"]), st.floats(1 / 255, 0.12))
def test_in_8_bits__stays_within_the_ball(seed, norm, eps):
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, 256, (3, 3, 5, 4), dtype=np.uint8)
    clean[0] = rng.choice([0, 255], clean[0].shape)
    moved = rng.normal(size=clean.shape) * rng.choice([1e-3, 0.1, 1.0])
    length = (
        np.abs(moved).max((1, 2, 3), keepdims=True)
        if norm == "linf"
        else (moved**2).sum((1, 2, 3), keepdims=True) ** 0.5
    )
    found = np.clip(clean / 255 + moved * np.minimum(1, eps / length), 0, 1)
    result = (
        attacks._in_8_bits(torch.from_numpy(clean), torch.from_numpy(found), norm, eps).numpy().astype(float) - clean
    )
    limit = eps * 255 * (1 + 1e-8)
    assert (np.abs(result).max((1, 2, 3)) <= limit + 1e-6).all()
    if norm == "l2":
        assert (np.sqrt((result**2).sum((1, 2, 3))) <= limit).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [4 / 255, 0.05, 1 / 255])
def test_in_8_bits__equals_its_slow_twin(norm, eps):
    rng = np.random.default_rng(5)
    clean = rng.integers(20, 230, (4, 3, 4, 4), dtype=np.uint8)
    found = clean / 255 + rng.uniform(-eps, eps, clean.shape) * (1 if norm == "linf" else 0.2)
    result = attacks._in_8_bits(torch.from_numpy(clean), torch.from_numpy(found), norm, eps).numpy()
    for one, start, end in zip(result, clean, found, strict=True):
        assert np.array_equal(one, slow_twin(start, end, norm, eps))


@pytest.mark.parametrize(
    "text", ["pgd(norm=linf, eps=1/255)", "pgd(norm=linf, eps=8/255, steps=3)", "pgd(norm=l2, eps=0.25)"]
)
def test_attacked__stays_within_eps(text):
    clean = probe_set_of(20, 3)
    how, found = Pgd.from_text(text), away(attacked(clean, convolutional(), text), clean)
    per_image = found.reshape(20, -1) / 255
    order = np.inf if how.norm == "linf" else 2
    lengths = np.linalg.norm(per_image, ord=order, axis=1)
    assert (lengths <= how.eps * (1 + 1e-9)).all()
    assert (lengths > 0.9 * how.eps).all(), "the budget is hardly used"


# What an image depends on


@pytest.mark.parametrize("text", [LINF, "pgd(norm=l2, eps=0.5, steps=3)"])
def test_attacked__fewer_images_are_the_beginning_of_more(text):
    network, clean = convolutional(), probe_set_of(40, 3)
    whole = attacked(clean, network, text)
    for n in (1, 15, 16, 17, 39):
        assert attacked(clean.first(n), network, text).sha256 == whole.first(n).sha256


def test_attacked__random_starts_are_those_of_the_seed():
    network, clean = convolutional(), probe_set_of(8, 3)
    first, again, other = (attacked(clean, network, f"{LINF[:-1]}, seed={seed})") for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.sha256 == attacked(clean, network, LINF).sha256


_PRINT_HASH = """
from test_attacks import LINF, attacked, convolutional, probe_set_of
print(attacked(probe_set_of(20, 3), convolutional(), LINF).sha256)
"""


def test_attacked__is_the_same_in_another_process():
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", _PRINT_HASH], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert found.stdout.strip() == attacked(probe_set_of(20, 3), convolutional(), LINF).sha256


def test_attacked__leaves_the_model_and_random_generators_alone():
    network = convolutional().train()
    network[3].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, state = [one.training for one in network.modules()], torch.get_rng_state()
    attacked(probe_set_of(8, 3), network, LINF)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [one.training for one in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_attacked__is_in_evaluation_mode():
    training, evaluating = convolutional().train(), convolutional()
    training[1].num_batches_tracked.zero_()
    clean = probe_set_of(8, 3)
    assert attacked(clean, training, LINF).sha256 == attacked(clean, evaluating, LINF).sha256


# Labels


def test_attacked__without_labels_moves_away_from_its_own_predictions():
    network, clean = Linear(), probe_set_of(12, labels=False)
    with torch.no_grad():
        predicted = network(torch.from_numpy(clean.images / 255).float()).argmax(1)
    found = attacked(clean, network, "pgd(norm=linf, eps=3/255, steps=20)")
    assert np.array_equal(found.images, np.clip(clean.images + 3 * network.away_from(predicted).sign().numpy(), 0, 255))
    assert "the model's own predictions" in found.notes[-1]
    assert "share of the model's predictions that stay 100.0% before" in found.notes[-1]


def test_attacked__says_the_accuracy_before_and_after():
    network, clean = convolutional(), probe_set_of(30, 3)
    found = attacked(clean, network, LINF)

    def accuracy(probe_set):
        with torch.no_grad():
            predicted = network(torch.from_numpy(probe_set.images / np.float32(255))).argmax(1)
        return float((predicted.numpy() == clean.labels).mean())

    text = f"top-1 accuracy {accuracy(clean):.1%} before and {accuracy(found):.1%} after the attack"
    assert found.notes[-1].endswith(text)
    assert "to raise the loss with labels" in found.notes[-1]
    assert np.array_equal(found.labels, clean.labels)
    assert found.names == clean.names


def test_attacked__labels_that_the_model_does_not_have_are_refused():
    with pytest.raises(ProbeError, match="labels"):
        attacked(probe_set_of(8, 5), convolutional(), LINF)
    assert "own predictions" in attacked(probe_set_of(8, 5), convolutional(), LINF, use_labels=False).notes[-1]


# Kept images


def test_attacked__kept_images_are_not_made_again(tmp_path, monkeypatch):
    network, clean = convolutional(), probe_set_of(8, 3)
    first = attacked(clean, network, LINF, folder=tmp_path / "kept")
    n_calls = []
    original = attacks.attack
    monkeypatch.setattr(attacks, "attack", lambda *given: n_calls.append(1) or original(*given))
    again = attacked(clean, network, LINF, folder=tmp_path / "kept")
    assert not n_calls
    assert (again.sha256, again.notes, again.source, again.names) == (
        first.sha256,
        first.notes,
        first.source,
        first.names,
    )


@pytest.mark.parametrize("what", ["attack", "images", "model", "labels", "damage", "garbage"])
def test_attacked__kept_images_of_another_kind_are_made_anew(what, tmp_path):
    network, clean, text, options = convolutional(), probe_set_of(8, 3), LINF, {}
    attacked(clean, network, text, folder=tmp_path)
    match what:
        case "attack":
            text = "pgd(norm=linf, eps=2/255)"
        case "images":
            clean = clean.first(7)
        case "model":
            network = convolutional(seed=1)
        case "labels":
            options = {"use_labels": False}
        case "damage":
            content = bytearray((tmp_path / "images.npy").read_bytes())
            content[-5] ^= 1
            (tmp_path / "images.npy").write_bytes(content)
        case "garbage":
            (tmp_path / "attack.json").write_text('{"asked": [')
    expected = attacked(clean, network, text, **options)
    assert attacked(clean, network, text, folder=tmp_path, **options).sha256 == expected.sha256
    assert ProbeSet.load(tmp_path).sha256 == expected.sha256


# In a measurement


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", images=pieces(24), labels=np.arange(24) % 3)
    return tmp_path / "images.npz"


def test_measure__uses_the_attacked_images_for_the_reference_and_all_resets(archive):
    network = convolutional()
    found = measure(network, f"attack:{LINF}:{archive}", trials=2, progress=False, dtype="reference")
    clean = measure(network, str(archive), trials=2, progress=False, dtype="reference")
    model = open_model(network, input_size=(3, 16, 16))
    drawn = ProbeSet.from_source(archive, SIZE, seed=probe_set_seed(0))
    expected = measure(network, attacked(drawn, model, LINF), trials=2, progress=False, dtype="reference")
    assert found.record["probe_set"]["sha256"] == expected.record["probe_set"]["sha256"]
    for name, values in expected.per_image.items():
        assert np.array_equal(found.per_image[name], values, equal_nan=True), name
    assert found.record["predictions"] == expected.record["predictions"]
    assert found.record["probe_set"]["source"] == f"attack:{LINF}:{archive}"
    assert found.record["predictions"]["loss"] > clean.record["predictions"]["loss"]
    assert any(note.startswith("the images are adversarial") for note in found.summary()["notes"])


def test_measure__attacks_corrupted_images(archive):
    network = convolutional()
    found = measure(network, f"attack:{LINF}:corrupt:contrast@2:{archive}", trials=1, progress=False)
    clean = measure(network, f"corrupt:contrast@2:{archive}", trials=1, progress=False)
    assert found.record["probe_set"]["source"] == f"attack:{LINF}:corrupt:contrast@2:{archive}"
    assert found.record["probe_set"]["sha256"] != clean.record["probe_set"]["sha256"]


def test_measure__one_that_goes_on_does_not_attack_again(archive, tmp_path, monkeypatch):
    network, images = convolutional(), f"attack:{LINF}:{archive}"
    whole = measure(network, images, trials=3, progress=False)
    first = measure(network, images, trials=1, progress=False, keep_images=tmp_path / "kept")
    first.save(tmp_path / "first")
    monkeypatch.setattr(attacks, "attack", None)
    found = measure(
        network, images, trials=3, progress=False, keep_images=tmp_path / "kept",
        resume=Measurement.load(tmp_path / "first"),
    )  # fmt: skip
    assert found.to_pandas()["criticality"].tolist() == whole.to_pandas()["criticality"].tolist()


def test_measure__a_mistake_in_the_attack_shows_before_the_model_is_opened(archive):
    with pytest.raises(ProbeError, match="steps must be a whole number"):
        measure("timm:no_such_model", f"attack:pgd(norm=linf, eps=4/255, steps=0):{archive}")


# Mistakes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pgd(norm=linf, eps=0)", r"eps must be at least 1/255.*got 0\. .*leave the attack out"),
        ("pgd(norm=linf, eps=0.5/255)", "at least 1/255"),
        ("pgd(norm=l2, eps=-1)", "at least 1/255"),
        ("pgd(norm=linf, eps=4)", r"write eps=4/255"),
        ("pgd(norm=linf, eps=nan)", "eps must be a finite number"),
        ("pgd(norm=linf, eps=1e999)", "eps must be a finite number"),
        ("pgd(norm=linf, eps=4/255, steps=0)", "whole number of at least 1; got 0"),
        ("pgd(norm=linf, eps=4/255, steps=2.5)", "whole number"),
        ("pgd(norm=linf, eps=4/255, step_size=0)", "step_size must be positive"),
        ("pgd(norm=l1, eps=4/255)", "norm must be one of linf, l2; got 'l1'"),
        ("pgd(eps=4/255)", "needs the option 'norm'"),
        ("pgd(norm=linf)", "needs the option 'eps'"),
        ("pgd", "needs the option 'norm'"),
        ("pgd(norm=linf, epsilon=4/255)", r"no option 'epsilon'\. Did you mean .*'eps'"),
        ("pgd(norm=linf, eps=4/0)", "not written as"),
        ("fgsm(eps=4/255)", r"no attack 'fgsm'.*One step without a random start is FGSM"),
    ],
)
def test_split_attack__mistakes_are_named(text, match, archive):
    with pytest.raises(ProbeError, match=match):
        split_attack(f"attack:{text}:{archive}")


@pytest.mark.parametrize(
    "text", ["attack:pgd(norm=linf, eps=4/255)", "attack:", "attack:pgd(norm=linf:images", "attack:x:"]
)
def test_split_attack__what_is_not_written_as_one(text):
    with pytest.raises(ProbeError, match=r"not written as attack:pgd\(\.\.\.\):SOURCE"):
        split_attack(text)


def test_split_attack__two_attacks_are_refused():
    with pytest.raises(ProbeError, match="several attacks"):
        split_attack(f"attack:{LINF}:attack:{LINF}:x")


@pytest.mark.parametrize("text", [f"attack:{LINF}:", f"corrupt:contrast@3:attack:{LINF}:"])
def test_probe_set__adversarial_images_need_a_model_and_come_last(text, archive):
    with pytest.raises(ProbeError, match=r"made on a model.*with corruptions, if any, behind the attack"):
        ProbeSet.from_source(f"{text}{archive}", SIZE)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("pgd( eps = 8/255,norm=linf )", "pgd(norm=linf, eps=8/255, steps=10)"),
        ("pgd(norm='l2', eps=0.5, steps=20, seed=0)", "pgd(norm=l2, eps=0.5, steps=20)"),
        ("pgd(norm=l2, eps=0.5, random_start=False, step_size=2/255)",
         "pgd(norm=l2, eps=0.5, steps=10, step_size=2/255, random_start=false)"),
        ("pgd(norm=l2, eps=2)", "pgd(norm=l2, eps=2, steps=10)"),
    ],
)  # fmt: skip
def test_pgd__is_written_as_it_can_be_read(text, written):
    how, source = split_attack(f"attack:{text}:a:b")
    assert (str(how), source) == (written, "a:b")
    assert Pgd.from_text(str(how)) == how


class Spoiled(nn.Module):
    def __init__(self, spoil) -> None:
        super().__init__()
        self.inner, self.spoil = convolutional(), spoil

    def forward(self, images):
        return self.inner(self.spoil(images))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda x: x.detach(), "no gradient of its loss reaches the images"),
        (lambda x: torch.from_numpy(x.detach().numpy().copy()), "no gradient of its loss reaches the images"),
        (lambda x: (x * 4).round() / 4, "it is 0 everywhere on the first images"),
        (lambda x: x * (x - x).sqrt().add(1), r"is not a number for '.*\[\d+\]'"),
    ],
    ids=["detached", "numpy", "rounded", "nan"],
)
def test_attacked__networks_without_a_gradient(spoil, match, tmp_path):
    with pytest.raises(ModelError, match=match):
        attacked(probe_set_of(8, 3), Spoiled(spoil), LINF, folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_attacked__images_of_another_size_than_the_model_takes():
    model = open_model(convolutional(), input_size=(3, 20, 20))
    with pytest.raises(LayercritError, match="20, 20"):
        attacked(probe_set_of(4, 3), model, LINF)


def test_attacked__less_memory_takes_fewer_images_at_once(monkeypatch):
    network, clean, n_given = convolutional(), probe_set_of(20, 3), []
    original = attacks.attack

    def scarce(logits, images, *given):
        n_given.append(len(images))
        if len(images) > 5:
            raise RuntimeError("CUDA out of memory")
        return original(logits, images, *given)

    monkeypatch.setattr(attacks, "attack", scarce)
    found = attacked(clean, network, LINF)
    assert n_given[:4] == [16, 8, 4, 4]
    assert found.n_images == 20
    assert "top-1 accuracy" in found.notes[-1]
