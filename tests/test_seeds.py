import hashlib

import pytest
import torch
from torch import nn

from layercrit.models.sources import open_reference
from layercrit.seeds import Undrawn, image_order_seed, layer_seed, probe_set_seed, seed_of, trial_seed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((0, "timm:resnet50", "rerandomize", 2), '[0,"timm:resnet50","rerandomize",2]'),
        (("é",), '["\\u00e9"]'),
        ((1, "2"), '[1,"2"]'),
        (("1", 2), '["1",2]'),
    ],
)
def test_seed_of__is_the_first_eight_bytes_of_sha256(words, text):
    assert seed_of(*words) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def test_seed_of__known_values_stay_what_they_are():
    """Golden: a change of these would change every measurement's draws."""
    assert seed_of(0, "timm:resnet50", "rerandomize", 0) == 2272363814629139741
    assert seed_of(0, "probe set") == 15457008853551747119


def test_seed_of__does_not_collide_as_sums_do():
    assert len({seed_of(study, "a", trial) for study in range(30) for trial in range(30)}) == 900


def test_seeds__known_values_stay_what_they_are():
    """Other values would choose other images and weights than all measurements so far."""
    assert trial_seed(0, "timm:resnet50", "rerandomize", 0) == 2272363814629139741
    assert layer_seed(3, "fc") == seed_of(3, "fc")
    assert [probe_set_seed(seed) for seed in (0, 1, 5)] == [1443172399, 1553202260, 1410376913]
    for seed in (0, 7, -1):
        text = f'["probe set", {seed}]'
        assert image_order_seed(seed) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def test_image_order_seed__a_seed_is_a_whole_number():
    with pytest.raises(TypeError):
        image_order_seed(1.0)


def test_undrawn__draws_nothing_into_parameters_and_all_else():
    weight, tensor = nn.Parameter(torch.zeros(2, 3)), torch.zeros(2, 3)
    with Undrawn(), torch.no_grad():
        for draw in (nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_):
            assert draw(weight) is weight
            assert draw(tensor.zero_()).any()
        assert weight.normal_() is weight.uniform_()
        assert nn.init.ones_(tensor).all()
    assert not weight.any()


@pytest.mark.parametrize("reference", ["timm:resnet18", "torchvision:resnet18"])
def test_undrawn__a_librarys_network_takes_no_random_numbers(reference):
    with torch.random.fork_rng(devices=[]), Undrawn():
        before = torch.manual_seed(0).get_state()
        network = open_reference(reference, {"pretrained": False}).build()
        assert torch.equal(torch.random.get_rng_state(), before)
    assert network.bn1.weight.eq(1).all()
