from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from layercrit.cli.root import cli
from layercrit.comparison import compare
from layercrit.errors import LayercritError
from layercrit.measuring import measure
from layercrit.pitfalls import PITFALLS, pitfall, pitfalls_of_comparison, pitfalls_of_measurement
from layercrit.probes import Preprocessing, ProbeSet
from layercrit.study.store import ModelRow
from published_results import RELEASED, measured, released
from small_subjects import PIXELS, two_layers

AS_THEY_ARE = Preprocessing(height=2, width=2, resize=None)
PAGE = (Path(__file__).parents[1] / "docs" / "pitfalls.md").read_text(encoding="utf-8")
HARMLESS = {"a": 0.2, "b": 0.5, "c": 0.3}  # criticality by layer; the first is not the largest
BASELINES = {"one": 0.0, "two": 0.01, "other": 0.1}  # by model, how much is added to each layer


def names_of(
    folder, *, layers=None, spread=0.01, matched=0.0, chance=0.1, n_trials=5, baselines=2, models=BASELINES, random=True
):
    """Names of the pitfalls of a made-up study that has none if nothing is said."""
    rows = [
        ModelRow(name, f"py:{name}", "baseline" if number < baselines else "others", name, 0.5,
                 {"random_trials": {"rerandomize": random}, "predictions": {"chance": chance}})
        for number, name in enumerate(models)
    ]  # fmt: skip
    cells = [
        {"model": model, "layer": layer, "trial": trial, "cosine": value + more + spread * (trial - (n_trials - 1) / 2),
         "cosine_matched": value + more + matched}
        for model, more in models.items()
        for layer, value in (layers or {}).get(model, HARMLESS).items()
        for trial in range(n_trials)
    ]  # fmt: skip
    study = measured(folder, cells, models=rows)
    return [one.name for one in pitfalls_of_comparison(study, compare(study))]


def test_comparison__without_pitfalls(tmp_path):
    assert names_of(tmp_path / "s") == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param({"matched": 0.06}, ["confidence"], id="the matched mean is another"),
        pytest.param({"matched": float("nan")}, ["confidence"], id="no matched values"),
        pytest.param({"chance": 0.4}, ["chance-level"], id="a layer as far off as unrelated predictions"),
        pytest.param({"spread": 0.06}, ["few-trials"], id="wide intervals"),
        pytest.param({"n_trials": 1}, ["few-trials"], id="no intervals"),
        pytest.param({"n_trials": 1, "random": False}, [], id="a reset without randomness"),
        pytest.param({"baselines": 1}, ["training-seed"], id="one baseline"),
        pytest.param({"models": BASELINES | {"two": 0.2}}, ["training-seed"], id="within seed noise"),
        pytest.param({"layers": {name: HARMLESS | {"a": 0.6} for name in BASELINES}}, ["first-layers"], id="first"),
        pytest.param({"spread": 0.0}, ["donor"], id="all draws are alike"),
        pytest.param({"layers": {"two": {"a": 0.2, "b": 0.5}}}, ["architectures"], id="other layers"),
    ],
)
def test_comparison__one_pitfall(tmp_path, changed, expected):
    assert names_of(tmp_path / "s", **changed) == expected


def made_up(
    *,
    values=(0.2, 0.5, 0.3),
    half_width=0.05,
    spread=0.01,
    matched=0.0,
    chance=0.1,
    random=True,
    chosen="*",
    sets="each",
):
    """What `pitfalls_of_measurement` reads of a measurement; without pitfalls if nothing is said."""
    values = np.array(values)
    layers = pd.DataFrame({"layer": list("abc"), "status": "ok", "criticality": values,
                           "half_width": half_width})  # fmt: skip
    cells = [
        {"layer": layer, "status": "ok", "cosine": value + sign * spread}
        for layer, value in zip("abc", values, strict=True)
        for sign in (-1, 0, 1)
    ]
    mean = float(values.mean())
    summary = {"criticality": {"mean": mean}, "criticality_matched": {"mean": mean + matched}, "chance": chance,
               "covers": "trials"}  # fmt: skip
    record = {"random_trials": random, "protocol": {"layers": chosen, "sets": sets}}
    return SimpleNamespace(summary=lambda: summary, to_pandas=lambda: layers, cells=pd.DataFrame(cells), record=record)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param({}, [], id="none"),
        pytest.param({"matched": -0.06}, ["confidence"], id="the matched mean is another"),
        pytest.param({"chance": 0.5}, ["chance-level"], id="a layer as far off as unrelated predictions"),
        pytest.param({"chance": None}, [], id="no chance level"),
        pytest.param({"half_width": 0.11}, ["few-trials"], id="wide intervals"),
        pytest.param({"half_width": float("nan")}, ["few-trials"], id="no intervals"),
        pytest.param({"half_width": 0.11, "random": False}, [], id="a reset without randomness"),
        pytest.param({"values": (0.6, 0.5, 0.3), "chosen": "a,b,c"}, [], id="first of those that were chosen"),
        pytest.param({"values": (0.6, 0.5, 0.3), "sets": "cascade-down"}, [], id="first of sets"),
        pytest.param({"values": (0.6, 0.5, 0.3)}, ["first-layers"], id="first"),
        pytest.param({"spread": 0.0}, ["donor"], id="all draws are alike"),
        pytest.param({"spread": 0.0, "random": False}, [], id="they should be"),
    ],
)
def test_measurement__each_pitfall(changed, expected):
    assert [one.name for one in pitfalls_of_measurement(made_up(**changed))] == expected


def test_measurement__a_real_one():
    found = measure(two_layers(), ProbeSet.from_array(PIXELS.numpy(), AS_THEY_ARE), trials=2)
    assert "few-trials" in [one.name for one in pitfalls_of_measurement(found)]


def test_pitfall__a_name_that_there_is_not():
    with pytest.raises(LayercritError, match=r"no pitfall 'few-trial'\. Did you mean 'few-trials'"):
        pitfall("few-trial")


@pytest.mark.parametrize("one", PITFALLS.values(), ids=list(PITFALLS))
def test_page__says_what_the_command_says(one):
    plain = " ".join(PAGE.split())
    assert f"## {one.title} {one.text} *Applies*" in plain


def test_command__all_or_those_named():
    everything = CliRunner().invoke(cli, ["pitfalls"]).output
    assert all(f"{one.name}: {one.title}" in everything for one in PITFALLS.values())
    two = CliRunner().invoke(cli, ["pitfalls", "donor", "confidence"]).output
    assert [line.split(":")[0] for line in two.splitlines() if line[:1].strip()] == ["donor", "confidence"]


@released
def test_page__figures_of_the_published_results():
    cells = pd.read_csv(RELEASED / "results.csv")
    values = 1 - cells.pivot_table(index="model_id", columns="layer", values="pred_cos_sim")
    first = values["model.conv1"]
    text = " ".join(PAGE.split())
    assert f"is {first.mean():.2f} on average over {len(values)} ResNet-50s and {first.min():.2f} at least" in text
    assert f"mean over all layers is {values.to_numpy().mean():.2f}." in text
