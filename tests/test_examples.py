"""The study files that come with layercrit, and the family that one of them describes."""

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from forked import forked_workers
from layercrit.cli.study import study as group
from layercrit.demo import EPOCHS_RUN, copy_family, example_study, run_demo, small_resnet
from layercrit.errors import CheckpointError
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.file_source import epochs_of
from layercrit.models.references import open_model
from layercrit.models.zoo.fetching import ZOO
from layercrit.seeds import seed_of
from layercrit.study.file import read_study_file
from layercrit.study.planning import plan_study
from layercrit.study.tables import load_study
from layercrit.training import get_method
from layercrit.training.methods import CATEGORIES
from layercrit.training.runs import RunFolder
from small_studies import N_LAYERS

NAMES = ("paper", "fashion")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return copy_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("name", NAMES)
def test_example__prints_the_file(name):
    result = CliRunner().invoke(group, ["example", name])
    assert result.exit_code == 0
    assert result.stdout == example_study(name)
    assert result.stdout.startswith("# ")


def test_example_study__the_paper_s(tmp_path):
    (tmp_path / "paper.toml").write_text(example_study("paper"), encoding="utf-8")
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    study = read_study_file(tmp_path / "paper.toml")
    assert {entry.reference for entry in study.models} == {f"zoo:{name}" for name in ZOO}
    assert study.baseline in {entry.name for entry in study.models}
    assert study.leave_out == ("freezing",)
    assert (study.protocol.trials, study.n_images, study.resets) == (3, 10000, ("rerandomize",))
    plan = plan_study(study)
    assert set(plan.models["mistake"]) == {""}
    assert set(plan.models["n_layers"]) == {54}
    assert plan.to_dict()["n_cells"] == 51 * 54 * 3


def test_example_study__the_family_s(family):
    study = read_study_file(family)
    assert study.untrained() == []
    plan = plan_study(study)
    assert set(plan.models["mistake"]) == {""}
    assert plan.to_dict()["n_cells"] == len(study.models) * N_LAYERS * 5


def test_family__is_of_all_categories_and_small(family):
    study = read_study_file(family)
    methods = {run.method for run in study.training.runs}
    assert len(methods) >= 10
    assert {get_method(name).category for name in methods} == set(CATEGORIES)
    assert sorted(run.seed for run in study.training.runs if run.method == "baseline") == [0, 1]
    files = [path for path in family.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 6e6
    assert 100_000 <= sum(p.numel() for p in small_resnet().parameters()) <= 300_000


def test_family__records_are_those_of_the_study_file(family):
    study = read_study_file(family)
    hashes, data = set(), set()
    for run in study.training.runs:
        record = json.loads((run.folder / "model.json").read_text(encoding="utf-8"))
        method = get_method(run.method, {**run.settings, "epochs": run.epochs})
        assert (record["method"], record["settings"]) == (run.method, vars(method)), run.name
        assert (record["seed"], record["precision"], record["weights_dtype"]) == (run.seed, "bf16", "float16")
        assert record["category"] == method.category
        data.add(record["data"]["sha256"])
        hashes.add((record["seed"], record["initial_sha256"]))
    assert len(data) == 1, "the models were trained on unlike data"
    assert len(hashes) == 2, "models of one seed began with unlike weights"


def test_family__frozen_filters_are_the_initial_ones(family):
    frozen = load_file(family.parent / "models" / "frozen" / "model.safetensors")
    seed = seed_of("training", 0, "initial weights")
    initial = open_model(f"py:layercrit.demo:small_resnet?pretrained=false&seed={seed}").network.state_dict()
    kept = [name for name in initial if initial[name].dim() == 4 and initial[name].shape[2] == 3]
    assert len(kept) == 7
    assert all(torch.equal(frozen[name], initial[name].half()) for name in kept)
    assert not torch.equal(frozen["layer1.0.conv1.weight"], initial["layer1.0.conv1.weight"].half())


def test_family__one_run_has_its_epochs(family):
    """Epoch 0 is what the seed gives, to the last bit where the processor draws as the one that trained."""
    run = family.parent / "models" / EPOCHS_RUN
    record = json.loads((run / "model.json").read_text(encoding="utf-8"))
    assert list(record["kept_sha256"].items()) == list(RunFolder(run).kept_hashes().items())
    kept = {epoch: load_file(path) for epoch, path in sorted(epochs_of(run).items())}
    assert list(kept) == [0, 1, 2, 4, 6]
    final = load_file(run / "model.safetensors")
    assert all(torch.equal(kept[record["epochs"]][name], value) for name, value in final.items())
    baseline = json.loads((run.parent / "baseline" / "model.json").read_text(encoding="utf-8"))
    assert record["settings"] == baseline["settings"]
    assert record["data"] == baseline["data"]
    fresh = seed_of("training", record["seed"], "initial weights")
    initial = open_model(f"{record['arch']}&pretrained=false&seed={fresh}").network.state_dict()
    for name, value in initial.items():
        torch.testing.assert_close(kept[0][name].to(value.dtype), value, rtol=1e-3, atol=1e-6)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert hash_tensors(initial) == record["initial_sha256"]
        assert all(torch.equal(kept[0][name], value.to(kept[0][name].dtype)) for name, value in initial.items())


def test_family__epoch_with_another_weight_is_refused(family, tmp_path):
    run = shutil.copytree(family.parent / "models" / EPOCHS_RUN, tmp_path / "run")
    assert open_model(f"file:{run}@epoch=2").network is not None
    changed = load_file(run / "epochs" / "epoch-0002.safetensors")
    changed["bn1.bias"][0] += 1e-6
    save_file(changed, run / "epochs" / "epoch-0002.safetensors")
    with pytest.raises(CheckpointError, match="not the file that its training run kept"):
        open_model(f"file:{run}@epoch=2")


def test_copy_family__keeps_what_is_there(family):
    weights = family.parent / "models" / "baseline" / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(b"trained anew")
        copy_family(family.parent)
        assert weights.read_bytes() == b"trained anew"
    finally:
        weights.write_bytes(before)


@pytest.mark.slow
def test_run_demo__leaves_study_figures_tables_and_findings(tmp_path, monkeypatch):
    head, *models = example_study("fashion").replace("trials = 5", "trials = 2").split("[[models]]")
    few = ("baseline", "baseline-seed1", "tv2", "l2-eps1.5", "linf-eps12", "simclr")
    kept = [text for text in models if re.search(r'name = "([^"]+)"', text)[1] in few]
    small = "[[models]]".join([head.replace("n_images = 250", "n_images = 40"), *kept])
    monkeypatch.setattr("layercrit.demo.example_study", lambda name: small)
    monkeypatch.setattr("layercrit.demo._N_IMAGES", 40)
    said = []
    with forked_workers():
        result = run_demo(tmp_path / "demo", said.append)
    study = load_study(tmp_path / "demo" / "study")
    n_models = len(study.models)
    assert len(study.cells) == n_models * N_LAYERS * 2
    assert set(study.cells["status"]) == {"ok"}
    assert result.comparison.baseline == "baseline"
    assert (result.comparison.models["accuracy"] > 0.6).all()
    assert f"{n_models} models of one architecture, {N_LAYERS} layers." in result.findings
    for claim in ("Improved recipes", "Self-supervised", "Adversarial training (l2)", "Adversarial training (linf)"):
        assert claim in result.findings
    assert (tmp_path / "demo" / "findings.txt").read_text(encoding="utf-8") == result.findings + "\n"
    grid = result.epochs.grid()
    assert list(grid.index) == ["fresh draw", *(f"epoch {n}" for n in (0, 1, 2, 4, 6))]
    assert (grid.loc["epoch 6"] == 0).all(), "the last epoch is the final network"
    assert grid.loc["fresh draw"].mean() > grid.loc["epoch 0"].mean() > grid.loc["epoch 4"].mean() > 0
    written = pd.read_csv(tmp_path / "demo" / "epochs.csv")
    assert list(written["layer"].unique()) == list(grid.columns)
    for name in ("criticality", "ranking", "accuracy", "budget", "epochs"):
        assert (tmp_path / "demo" / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "Fashion-MNIST" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
