"""What `layercrit doctor` finds, and what it says of what is broken."""

import getpass
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from layercrit import diagnosis, locks
from layercrit.cli.root import main
from layercrit.diagnosis import EXTRAS, Finding, anonymous, diagnose
from layercrit.engine import onednn, opening
from layercrit.engine.replay import PlainReplay
from layercrit.probes.probe_set import ProbeSet
from layercrit.toml import tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found():
    return list(diagnose())


def only(findings, name):
    (finding,) = [one for one in findings if one.name == name]
    return finding


def doctor(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["layercrit", "doctor", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_diagnose__this_installation_works(found):
    assert [one for one in found if one.state == "problem"] == []
    assert only(found, "torch").found == torch.__version__.partition("+")[0]
    assert only(found, "torch.export").state == "ok"


def test_diagnose__the_documented_example_has_the_same_lines(found):
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- doctor -->\n```text\n(.*?)```", page, re.DOTALL)[1]
    lines = re.findall(r"^(\w+)$|^  (?:ok|note|problem) +(\S+(?: \S+)*)  ", shown, re.MULTILINE)
    topics, names = ([line[part] for line in lines if line[part]] for part in (0, 1))
    assert topics == list(dict.fromkeys(one.topic for one in found))
    here = [one.name for one in found if not one.name.startswith("cuda")]
    of_machine = {"GPU", "oneDNN", "cuDNN", "network", "MPS", "plug-in", "plug-ins"}
    assert [name for name in names if name not in of_machine] == [name for name in here if name not in of_machine]


# --- software ---------------------------------------------------------------------------------------------------------


def test_extras__all_are_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS) | {"test"} == set(project["optional-dependencies"])


def test_packages__missing_or_too_old(monkeypatch):
    asked = ["numpy>=99", "layercrit-nothing>=1", 'also-nothing; python_version < "3"', 'timm>=99; extra == "hf"']
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda name: asked)
    _, numpy, nothing = diagnosis._packages()
    assert (numpy.state, numpy.advice) == ("problem", "pip install 'numpy>=99'")
    assert re.fullmatch(r"numpy is [\d.]+, expected >=99", numpy.found)
    assert (nothing.state, nothing.found) == ("problem", "layercrit-nothing is not installed")
    without = only(diagnosis._extras(), "[ray]")
    assert (without.state, without.found.partition(", which")[0]) == ("note", "without studies on a Ray cluster")
    extra = only(diagnosis._extras(), "[hf]")
    assert extra.state == "note"
    assert "timm is" in extra.found
    assert extra.advice == "pip install 'layercrit[hf]'"


def test_extras__what_is_missing_is_listed_once(monkeypatch):
    asked = [f'{name}; extra == "track"' for name in ("no-such-a>=1", "no-such-b", "timm>=99")]
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda name: asked)
    found = only(diagnosis._extras(), "[track]").found
    assert re.search(r"; not installed: no-such-a, no-such-b; timm is [\d.]+, expected >=99$", found)


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm"])
def test_imports__what_is_broken_is_told(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    problem = only(diagnose() if package == "torch" else diagnosis._imports(), f"import {package}")
    assert problem.state == "problem"
    assert "ModuleNotFoundError" in problem.found


@pytest.mark.parametrize(
    ("code", "state"),
    [("", "ok"), ("raise RuntimeError('no such luck')", "problem"), ("raise SystemExit('no such luck')", "problem")],
)
def test_plug_ins__are_imported(code, state, tmp_path, monkeypatch):
    module = f"diagnosed_{state}"
    (tmp_path / f"{module}.py").write_text(code)
    about = tmp_path / "our_plug_in-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: our-plug-in\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[layercrit.resets]\nanything = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = only(diagnosis._plug_ins(), "plug-in")
    assert finding.state == state
    assert f"{module} of our-plug-in 1.2 (layercrit.resets)" in finding.found
    assert ("no such luck" in finding.found) == (state == "problem")


# --- machine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "threads", "variable", "advice"),
    [(4, 4, None, ""), (4, 8, None, "set OMP_NUM_THREADS=4"), (4, 1, "1", "OMP_NUM_THREADS is 1"), (8, 4, None, "")],
)
def test_machine__cores_and_threads(cores, threads, variable, advice, monkeypatch):
    monkeypatch.setattr(diagnosis, "_n_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("OMP_NUM_THREADS", variable) if variable else monkeypatch.delenv("OMP_NUM_THREADS", False)
    finding = only(diagnosis._machine(), "cores")
    assert finding.state == ("note" if advice else "ok")
    assert advice in finding.advice


def test_machine__cores_of_a_container(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(diagnosis, "_QUOTA", quota)
    n_cores = diagnosis._n_cores()
    quota.write_text("max 100000\n")
    assert diagnosis._n_cores() == n_cores
    quota.write_text("120000 100000\n")
    assert diagnosis._n_cores() == 1


def test_machine__little_memory(monkeypatch):
    monkeypatch.setattr("layercrit.machine.available_memory", lambda: 1_500_000_000)
    finding = only(diagnosis._machine(), "memory")
    assert (finding.state, finding.found) == ("note", "1.5 GB available")


def test_devices__a_gpu_that_torch_does_not_find(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert diagnosis._no_gpu().state == "problem"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (diagnosis._no_gpu().state, diagnosis._no_gpu().advice) == ("note", "Unset it to use the GPU.")


def test_devices__a_torch_that_cannot_tell_of_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    finding = only(diagnosis._devices(), "bfloat16")
    assert (finding.state, finding.found) == ("note", "torch 2.4.1 cannot tell; --dtype auto takes float32")


# --- engine -----------------------------------------------------------------------------------------------------------


def test_engine__wrong_logits_are_a_problem(monkeypatch):
    logits = PlainReplay.logits
    monkeypatch.setattr(PlainReplay, "logits", lambda self, images: 1.01 * logits(self, images))
    finding = only(diagnosis._engine(), "torch.export")
    assert finding.state == "problem"
    assert re.fullmatch(r"logits differ by 0\.01 of the largest", finding.found)


def test_engine__a_network_that_cannot_be_exported_is_a_note(monkeypatch):
    def fail(*given, **options):
        raise NotImplementedError("no exporter")

    monkeypatch.setattr(opening, "graph_of", fail)
    finding = only(diagnosis._engine(), "torch.export")
    assert finding.state == "note"
    assert "the network cannot be exported (NotImplementedError: no exporter)" in finding.found


def test_engine__without_fused_operators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(onednn, "linears_work", lambda dtype: False)
    finding = only(diagnosis._engine(), "oneDNN")
    assert (finding.state, finding.found) == ("note", "no fused linear layers: measuring is slower")


def test_engine__leaves_random_numbers_as_they_were():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(diagnosis._engine())
    assert torch.equal(torch.get_rng_state(), before)


def test_measuring__leaves_random_numbers_as_they_were():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    (finding,) = diagnosis._measuring()
    assert (finding.state, finding.found) == ("ok", "the 2 layers of a small network are measured")
    assert torch.equal(torch.get_rng_state(), before)


def test_diagnose__what_every_measurement_does_is_done(monkeypatch):
    def fail(*given, **options):
        raise AttributeError("module 'numpy' has no attribute 'trapz'")

    monkeypatch.setattr(ProbeSet, "from_source", fail)
    monkeypatch.setattr(diagnosis, "_packages", lambda: iter(()))
    monkeypatch.setattr(diagnosis, "_places", lambda: iter(()))
    (finding,) = [one for one in diagnose() if one.state == "problem"]
    assert finding.name == "measure"
    assert finding.found == "a small network fails (AttributeError: module 'numpy' has no attribute 'trapz')"


# --- folders ----------------------------------------------------------------------------------------------------------


def test_places__a_folder_that_is_not_there_yet(tmp_path):
    finding = diagnosis._place("cache", tmp_path / "a" / "b", "", size=True)
    assert finding.state != "problem"
    assert "not there yet" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_places__size(tmp_path):
    (tmp_path / "weights").write_bytes(b"")
    with (tmp_path / "weights").open("r+b") as file:
        file.truncate(3_000_000_000)  # a hole
    assert "3.0 GB in it" in diagnosis._place("cache", tmp_path, "", size=True).found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_places__that_cannot_be_written():
    finding = diagnosis._place("cache", Path("/proc/self"), "Set X to another.")
    assert (finding.state, finding.advice) == ("problem", "Set X to another.")
    assert "cannot be written" in finding.found


def test_places__without_locks(tmp_path, monkeypatch):
    def refuse(self, *given, **options):
        raise NotImplementedError

    assert locks.has_locks(tmp_path)
    monkeypatch.setattr("layercrit.locks.FileLock.acquire", refuse)
    assert not locks.has_locks(tmp_path)
    finding = diagnosis._place("cache", tmp_path, "")
    assert (finding.state, finding.found.endswith("no file locks")) == ("note", True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "state"), [(6e9, "ok"), (1e9, "note"), (1e7, "problem")])
def test_places__little_space(free, state, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert diagnosis._place("cache", tmp_path, "Elsewhere.").state == state


# --- the command ------------------------------------------------------------------------------------------------------


def test_doctor__a_problem_is_exit_code_1(monkeypatch, capsys):
    findings = [Finding("software", "torch", "ok", "2.9"), Finding("folders", "cache", "problem", "\x1b[31m", "Do it.")]
    monkeypatch.setattr(diagnosis, "diagnose", lambda: iter(findings[:1]))
    assert doctor(monkeypatch) == 0
    assert capsys.readouterr().out == "software\n  ok       torch           2.9\n1 ok, 0 notes, 0 problems\n"
    monkeypatch.setattr(diagnosis, "diagnose", lambda: iter(findings))
    assert doctor(monkeypatch) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "folders", r"  problem  cache           \x1b[31m", "                           Do it.",
        "1 ok, 0 notes, 1 problem",
    ]  # fmt: skip


def test_doctor__json_is_without_names(monkeypatch, capsys, tmp_path):
    home = tmp_path / "home" / "ada"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    findings = [Finding("folders", "cache", "note", f"{home}/x, /scratch/ada-1/y", f"See {home}."),
                Finding("folders", "data", "ok", f"{home}2/x, /adamant")]  # fmt: skip
    monkeypatch.setattr(diagnosis, "diagnose", lambda: iter(findings))
    assert doctor(monkeypatch, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["counts"] == {"ok": 1, "note": 1, "problem": 0}
    about = {"topic": "folders", "name": "cache", "state": "note"}
    assert printed["findings"][0] == about | {"found": "~/x, /scratch/USER-1/y", "advice": "See ~."}
    assert printed["findings"][1]["found"].endswith("/ada2/x, /adamant"), "another's folder"


def test_anonymous__of_a_home_behind_a_link(monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert anonymous(f"{tmp_path}/disk/x and {tmp_path}/home/x") == "~/x and ~/x"
