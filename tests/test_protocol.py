import inspect
import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction

import numpy as np
import pytest
import torch

from layercrit.engine.replay import MODES
from layercrit.errors import ProtocolError
from layercrit.measuring import measure
from layercrit.protocol import DEFAULTS, DTYPES, Protocol


def test_defaults__are_those_of_measure():
    """One place for the defaults: the arguments of `measure` that name a setting take theirs from `Protocol`."""
    arguments = inspect.signature(measure).parameters
    for setting in fields(Protocol):
        assert arguments[setting.name].default == getattr(DEFAULTS, setting.name), setting.name
        assert arguments[setting.name].kind is inspect.Parameter.KEYWORD_ONLY


def test_defaults__are_the_published_protocol():
    """Gavrikov et al. 2024: 3 trials, 10,000 images, convolutions and linear layers, one at a time, drawn anew."""
    assert (DEFAULTS.trials, DEFAULTS.n_images, DEFAULTS.types) == (3, 10_000, "conv,linear")
    assert (DEFAULTS.layers, DEFAULTS.group, DEFAULTS.reset) == ("*", "layer", "rerandomize")


def test_dtypes__are_those_of_the_replays_and_auto():
    assert ("auto", *MODES) == DTYPES


def test_protocol__cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        DEFAULTS.trials = 5  # type: ignore[misc]


def test_to_dict__is_plain_data():
    protocol = Protocol(trials=np.int64(5), n_images=np.uint16(7), seed=np.int32(-3), batch_size=np.int64(2))
    plain = protocol.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["trials"], plain["n_images"], plain["seed"], plain["batch_size"]) == (5, 7, -3, 2)
    assert plain.keys() == {setting.name for setting in fields(Protocol)}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"trials": 0}, "trials must be a whole number of at least 1; got 0"),
        ({"trials": 2.0}, r"trials must be .* got 2\.0"),
        ({"trials": "3"}, "trials must be .* got '3'"),
        ({"n_images": 0}, "n_images must be a whole number of at least 1; got 0"),
        ({"n_images": None}, "n_images must be .* got None"),
        ({"batch_size": 0}, "batch_size must be 'auto' or a whole number of at least 1; got 0"),
        ({"batch_size": "16"}, "batch_size must be 'auto' or .* got '16'"),
        ({"seed": 0.5}, r"seed must be a whole number; got 0\.5"),
        ({"dtype": "float16"}, "Unknown dtype 'float16'. Did you mean .*'bfloat16'"),
        ({"dtype": torch.bfloat16}, "Unknown dtype 'torch.bfloat16'. Did you mean 'bfloat16'"),
        ({"level": 1}, "level must be between 0 and 1, such as 0.95; got 1"),
        ({"level": 95}, "level must .* got 95"),
        ({"level": math.nan}, "level must .* got nan"),
        ({"level": "0.9"}, "level must .* got '0.9'"),
    ],
    ids=str,
)
def test_protocol__a_setting_that_makes_no_sense_is_refused(settings, text):
    with pytest.raises(ProtocolError, match=text):
        Protocol(**settings)


@pytest.mark.parametrize("level", [Fraction(1, 2), np.float32(0.5)], ids=["fraction", "NumPy"])
def test_protocol__a_level_of_any_real_type_becomes_a_float(level):
    assert type(Protocol(level=level).level) is float
    assert Protocol(level=level).level == 0.5


def test_protocol__a_truth_value_is_no_number():
    with pytest.raises(ProtocolError, match="trials must be a whole number of at least 1; got True"):
        Protocol(trials=True)


def test_command_line__answers_help_without_what_is_slow_to_import():
    code = "import sys, layercrit.cli; print(sorted({'torch', 'pydantic', 'pandas'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
