from itertools import product

import numpy as np
import pytest

from layercrit.advice.actions import ACTIONS
from layercrit.advice.budgets import bits_within, chosen_within
from layercrit.errors import AdviceError


@pytest.mark.parametrize(("budget", "n_chosen"), [(0.09, 1), (0.1, 1), (0.11, 2), (0.3, 2), (0.31, 3), (1.0, 4)])
def test_chosen_within__as_many_as_it_takes(budget, n_chosen):
    assert chosen_within([10, 20, 30, 40], ACTIONS["freeze"], budget, 100).sum() == n_chosen


def test_chosen_within__removes_the_ratio_of_each():
    found = chosen_within([10, 20, 30, 40], ACTIONS["prune"], 0.15, 100, ratio=0.5)

    assert found.tolist() == [True, True, False, False]


def test_chosen_within__at_most_takes_each_that_still_fits():
    assert chosen_within([60, 20, 50, 10], ACTIONS["finetune"], 0.3, 100).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("action", "budget", "ratio", "way_out"),
    [("freeze", 0.9, 1.0, "80%"), ("prune", 0.5, 0.5, "40%"), ("finetune", 0.05, 1.0, "10%")],
)
def test_chosen_within__a_budget_that_cannot_be_met(action, budget, ratio, way_out):
    """20 of 100 parameters are of layers that were not measured; the smallest layer that was has 10."""
    with pytest.raises(AdviceError, match=way_out):
        chosen_within([10, 30, 40], ACTIONS[action], budget, 100, ratio)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_unmeasured", [0, 40])
def test_bits_within__is_the_best_of_all_choices_of_its_size(seed, n_unmeasured):
    """The slow twin tries every choice of bits; and a step less would not do."""
    generator = np.random.default_rng(seed)
    criticality, sizes = generator.uniform(0, 1, 5), generator.integers(1, 100, 5)
    bits, budget = [2, 4, 8], float(generator.uniform(5, 7.9))
    total = sizes.sum() + n_unmeasured

    found = bits_within(criticality, sizes, bits, budget, n_unmeasured)

    def score(choice):
        return sum(c * 4.0**-b for c, b in zip(criticality, choice, strict=True))

    size = np.dot(found, sizes) + 8 * n_unmeasured
    assert size <= budget * total + 1e-6
    others = [choice for choice in product(bits, repeat=5) if np.dot(choice, sizes) + 8 * n_unmeasured <= size + 1e-9]
    assert score(found) == pytest.approx(min(map(score, others)), rel=1e-9)
    more = [
        np.where(np.arange(5) == place, np.where(found == 2, 4, 8), found) for place in range(5) if found[place] < 8
    ]
    assert any(np.dot(choice, sizes) + 8 * n_unmeasured > budget * total for choice in more)


def test_bits_within__a_budget_that_cannot_be_met():
    """Half of the parameters were not measured and keep 8 bits, so that 6 in the mean are the fewest."""
    with pytest.raises(AdviceError, match="it is 6"):
        bits_within([0.1, 0.2], [10, 10], [4, 8], 5.9, 20)
    assert bits_within([0.1, 0.2], [10, 10], [4, 8], 6.0, 20).tolist() == [4, 4]
