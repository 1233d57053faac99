"""The study files that come with layercrit."""

import pytest
from click.testing import CliRunner

from layercrit._cli_study import study as group
from layercrit.comparison import compare
from layercrit.demo import example_study, run_demo
from layercrit.planning import plan_study
from layercrit.running import run_study
from layercrit.study import load_study
from layercrit.studyfile import read_study_file
from layercrit.zoo import ZOO
from running_jobs import Inline
from small_studies import N_LAYERS, write_images, write_weights

NAMES = ("paper", "digits")
NETWORKS = ("digits", "digits-smoothing", "digits-frozen")


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


def test_example_study__the_demo_s(tmp_path):
    (tmp_path / "digits.toml").write_text(example_study("digits"), encoding="utf-8")
    for seed, name in enumerate(NETWORKS):
        write_weights(tmp_path / f"{name}.safetensors", seed)
    write_images(tmp_path / "digits.npz", 20)
    study = read_study_file(tmp_path / "digits.toml")
    assert [entry.name for entry in study.models] == ["plain", "smoothing", "frozen"]
    plan = plan_study(study)
    assert set(plan.models["mistake"]) == {""}
    assert plan.to_dict()["n_cells"] == 3 * N_LAYERS * 5


@pytest.mark.slow
def test_run_demo__its_study_runs(tmp_path):
    said = []
    measurement, commands = run_demo(tmp_path / "demo", said.append)
    assert commands[1] == f"layercrit study run {tmp_path / 'demo' / 'digits.toml'} --out {tmp_path / 'demo' / 'study'}"
    text = (tmp_path / "demo" / "digits.toml").read_text(encoding="utf-8")
    assert text == example_study("digits")
    small = text.replace("trials = 5", "trials = 2").replace("[images]", "[images]\nn_images = 40")
    (tmp_path / "demo" / "small.toml").write_text(small, encoding="utf-8")
    study = read_study_file(tmp_path / "demo" / "small.toml")
    report = run_study(study, tmp_path / "study", executor=Inline(), progress=False)
    assert (report.n_measured, report.failures) == (3 * N_LAYERS * 2, [])
    comparison = compare(load_study(tmp_path / "study"))
    assert comparison.baseline == "plain"
    assert comparison.models["n_layers"].to_list() == [N_LAYERS] * 3
    assert (comparison.models["accuracy"] > 0.8).all()  # all three learned to read
    plain = comparison.models.loc["plain", "criticality"]
    assert plain == pytest.approx(measurement.summary()["criticality"]["mean"], abs=0.15)
