"""The benchmark of regrets: what it does to layers, what it keeps, and what it makes of it."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from layercrit.models.references import open_model
from layercrit.seeds import drawing

ROOT = Path(__file__).parents[1]
LAYERS = ["0", "2", "6"]


@pytest.fixture(scope="module")
def regret():
    spec = importlib.util.spec_from_file_location("regret", ROOT / "benchmarks" / "regret.py")
    found = sys.modules["regret"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def subject(regret):
    """A small network on images by whose number the actions are known from each other."""
    with drawing(0):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip
        pixels, labels = torch.randn(60, 3, 8, 8), torch.randint(0, 3, (60,))
    table = pd.DataFrame({"layer": LAYERS, "n_parameters": [224, 584, 27], "depth": range(3), "status": "ok"})
    model = open_model(network.eval(), input_size=(3, 8, 8))
    found = regret.Subject(model, "", regret.Sizes(20, 20, 60, 1), table, dict(zip(LAYERS, LAYERS, strict=True)), ["6"])
    found.clean = found.shifted = regret.Images(pixels, labels)
    return found


def changed(subject, network):
    """The layers whose parameters are not those of the untouched network."""
    return [
        name
        for name in LAYERS
        if not all(map(torch.equal, network.get_submodule(name).parameters(),
                       subject.model.network.get_submodule(name).parameters()))
    ]  # fmt: skip


def test_subject__each_action_is_done_to_the_layers_and_to_no_others(subject):
    assert changed(subject, subject.after("quantise", ["0"])) == ["0"]
    assert changed(subject, subject.after("prune-weights", ["2"])) == ["2"]
    assert changed(subject, subject.after("finetune", ["2"])) == ["2"]
    assert changed(subject, subject.after("freeze", ["2"])) == ["0", "6"]
    assert changed(subject, subject.after("freeze", [])) == LAYERS
    for still in ({"rate": 0.0}, {"steps": 0}):
        untouched = replace(subject, sizes=replace(subject.sizes, **still))
        untouched.clean = untouched.shifted = subject.clean
        assert changed(subject, untouched.after("freeze", [])) == []
    pruned, trained = (subject.after(action, ["0"]) for action in ("prune-channels", "prune-train"))
    assert pruned.get_submodule("0").out_channels == trained.get_submodule("0").out_channels == 4
    assert not torch.equal(pruned.get_submodule("6").weight, trained.get_submodule("6").weight)
    assert torch.equal(pruned.get_submodule("6").weight, subject.model.network.get_submodule("6").weight)


def test_measure_orders__goes_on_where_it_was_and_measures_a_choice_once(regret, subject, tmp_path, monkeypatch):
    table = pd.DataFrame({"layer": LAYERS, "criticality": [0.5, 0.2, 0.9]})
    exact = type("Exact", (), {"to_pandas": lambda self: table})()
    monkeypatch.setattr(regret, "subject_of", lambda *_: (replace(subject), exact, {}))
    for name in ("clean", "shifted"):
        monkeypatch.setattr(regret.Subject, name, getattr(subject, name))
    plain, done = regret.Subject.after, []

    def counted(self, action, layers):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(tuple(layers))
        return plain(self, action, layers)

    monkeypatch.setattr(regret.Subject, "after", counted)
    stop = 4  # the oracle tries three layers, and then one choice is followed
    with pytest.raises(KeyboardInterrupt):
        regret.measure_orders(tmp_path, "small", ["quantise"], print)
    kept = regret.Kept(tmp_path, "small")
    assert kept.rows()["order"].iloc[0] == "oracle"
    assert "nothing done" not in set(kept.rows()["order"])
    assert list(kept.added("quantise")) == LAYERS
    assert regret.whole([kept.rows()]).empty
    stop = -1
    regret.measure_orders(tmp_path, "small", ["quantise"], print)
    rows = kept.rows()
    assert not rows["order"].duplicated().any()
    assert set(rows["order"]) >= {"oracle", "criticality", "last first", "random 0", "random 19", "nothing done"}
    assert len(set(done[4:])) == len(done[4:])
    before = len(done)
    regret.measure_orders(tmp_path, "small", ["quantise"], print)
    assert len(done) == before
    assert regret.whole([rows])["order"].tolist().count("random") == 1


def test_kept__is_of_one_set_of_settings(regret, tmp_path):
    kept = regret.Kept(tmp_path, "small")
    kept.check(regret.Sizes(20, 20, 60, 1))
    kept.add("accuracies.csv", {"action": "quantise", "order": "oracle", "accuracy": 0.5})
    kept.check(regret.Sizes(20, 20, 60, 1))
    with pytest.raises(SystemExit, match=r"other settings.*'select': 20.*'select': 30"):
        kept.check(regret.Sizes(30, 20, 60, 1))
    (kept.folder / "settings.json").unlink()
    with pytest.raises(SystemExit, match="unknown ones"):
        kept.check(regret.Sizes(20, 20, 60, 1))


def test_summary__regret_is_the_oracle_minus_the_order_and_former_networks_stay(regret):
    def rows(model, oracle, other):
        found = {"oracle": oracle, "largest first": other, "random 0": 0.4, "random 1": 0.6, "nothing done": 1.0}
        return pd.DataFrame({"action": "quantise", "order": list(found), "accuracy": found.values(), "model": model})

    first = regret.summary(regret.whole([rows("a", 0.9, 0.8)]))
    found = regret.beside({"rows": first}, regret.whole([rows("b", 0.7, 0.7)]))
    row = {one["order"]: one for one in regret.summary(found)}["largest first"]
    assert row["accuracies"] == {"a": 0.8, "b": 0.7}
    assert row["regret"] == pytest.approx(0.05)
    assert row["over_random"] == pytest.approx(0.25)
    assert np.isfinite([row["low"], row["high"]]).all()
    anew = regret.beside({"rows": first}, regret.whole([rows("a", 0.9, 0.5)]))
    assert {one["order"]: one["accuracies"] for one in regret.summary(anew)}["largest first"] == {"a": 0.5}
