"""Registries: names, reloading, and plug-ins that are installed as distributions of their own."""

import functools
import importlib
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from layercrit.errors import ProtocolError, StudyError
from layercrit.registry import Registry, summary_of


def draw():
    """Draws.

    More.
    """


def other():
    """Does something else."""


@pytest.fixture
def registry():
    found = Registry("thing", ProtocolError)
    found["draw"] = draw
    return found


def install(folder, package, module, groups, code):
    """Write a module and the metadata of an installed distribution that registers what it has."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    about = folder / f"{package.replace('-', '_')}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("".join(f"[{group}]\nanything = {module}\n" for group in groups))


# names


def test_registry__is_a_mapping_in_the_order_of_registration(registry):
    registry["other"] = other
    assert dict(registry) == {"draw": draw, "other": other}
    assert (len(registry), registry["other"], "none" in registry, registry.get("none")) == (2, other, False, None)
    assert repr(registry) == "<Registry (thing): draw, other>"
    assert registry.pop("draw") is draw
    assert list(registry) == ["other"]
    with pytest.raises(KeyError):
        registry["draw"]


def test_find__unknown_name_offers_near_ones(registry):
    assert registry.find("draw") is draw
    for name, hint in (("drow", "Did you mean 'draw'?"), ("zzz", "Known: 'draw'."), (3, "Known: 'draw'.")):
        with pytest.raises(ProtocolError) as refused:
            registry.find(name)
        assert str(refused.value) == f"There is no thing {name!r}. {hint}"


@pytest.mark.parametrize("name", ["", "2nd", "a b", "a.b", "a,b", "a:b", "_a", "-a", "a\n", "é"])
def test_register__a_name_that_is_none(registry, name):
    with pytest.raises(ProtocolError, match=r"The thing cannot be named .*: expected letters"):
        registry[name] = other
    assert list(registry) == ["draw"]


def test_register__a_name_that_the_registry_refuses():
    def refuse(name):
        if name == "status":
            raise StudyError("a column")

    registry = Registry("thing", ProtocolError, check=refuse)
    registry["state"] = other
    with pytest.raises(StudyError, match="a column"):
        registry["status"] = other


def test_register__a_taken_name(registry):
    with pytest.raises(ProtocolError, match=r"^The thing 'draw' exists already \(Draws\)\. Choose another name\.$"):
        registry["draw"] = other
    assert registry["draw"] is draw


def test_register__the_same_function_again_takes_its_place(registry):
    again = {}
    exec("def draw():\n    '''Draws anew.'''", {"__name__": __name__}, again)
    registry["draw"] = again["draw"]
    assert registry.summaries() == {"draw": "Draws anew."}
    exec("def draw():\n    '''Draws.'''", {"__name__": "another_module"}, again)
    with pytest.raises(ProtocolError, match="exists already"):
        registry["draw"] = again["draw"]


class Kind:
    """A kind."""


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (SimpleNamespace(function=draw), SimpleNamespace(function=draw), True),
        (SimpleNamespace(function=draw), SimpleNamespace(function=other), False),
        (Kind(), Kind(), True),
        (Kind, Kind, True),
        (Kind(), SimpleNamespace(), False),
        (lambda: 1, lambda: 1, False),
        (functools.partial(draw), functools.partial(draw), False),
    ],
    ids=["entries of a function", "of two", "objects of a class", "a class", "of two classes", "lambdas", "partials"],
)
def test_register__what_is_the_same(first, second, same):
    registry = Registry("thing", ProtocolError, summary=lambda entry: "It")
    registry["it"] = first
    if same:
        registry["it"] = second
    else:
        with pytest.raises(ProtocolError, match=r"exists already \(It\)"):
            registry["it"] = second
    assert registry["it"] is (second if same else first)


def test_reset__a_module_can_be_reloaded(tmp_path, monkeypatch):
    from layercrit.resets import RESETS

    code = "import layercrit\n@layercrit.reset('halve', random=False)\ndef halve(draw):\n    '''{}'''\n"
    (tmp_path / "my_reset_module.py").write_text(code.format("Half."))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        module = importlib.import_module("my_reset_module")
        (tmp_path / "my_reset_module.py").write_text(code.format("Half of each value."))
        importlib.reload(module)
        assert RESETS["halve"].summary == "Half of each value."
        assert RESETS["halve"].function is module.halve
    finally:
        del RESETS["halve"]
        del sys.modules["my_reset_module"]


@pytest.mark.parametrize("entry", [SimpleNamespace(__doc__=None), SimpleNamespace(__doc__="")])
def test_summary_of__no_docstring(entry):
    assert summary_of(entry) == ""
    assert summary_of(draw) == "Draws."


# plug-ins


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder for installed distributions; their modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in ("lab_things", "lab_broken"):
        sys.modules.pop(name, None)


def test_plug_in__is_imported_when_the_registry_is_first_read(site, monkeypatch):
    registry = Registry("thing", ProtocolError, "layercrit.things")
    monkeypatch.setattr(sys.modules[__name__], "shared", registry, raising=False)
    code = f"import sys\nthings = sys.modules[{__name__!r}].shared\nassert list(things) == ['draw']\n"
    install(site, "lab-things", "lab_things", ["layercrit.things"], f"{code}things['mine'] = len\n")
    registry["draw"] = draw
    assert "lab_things" not in sys.modules
    assert list(registry) == ["draw", "mine"]
    assert list(Registry("thing", ProtocolError)) == []


def test_plug_in__one_that_cannot_be_imported_is_left_out_and_named(site):
    install(site, "lab-broken", "lab_broken", ["layercrit.things"], "raise RuntimeError('too old')\n")
    registry = Registry("thing", ProtocolError, "layercrit.things")
    registry["draw"] = draw
    with pytest.warns(UserWarning, match=r"lab_broken of the package lab-broken 1\.2 .*too old\)") as warned:
        assert list(registry) == ["draw"]
    assert len(warned) == 1
    with pytest.raises(ProtocolError, match=r"There is no thing 'min'\. Known: 'draw'\. The plug-in lab_broken of"):
        registry.find("min")


PLUG_IN = '''
    from dataclasses import replace

    import torch

    import layercrit
    from layercrit.models import model_source, open_model
    from layercrit.trackers import Tracker, metric_of, tracker
    from layercrit.training import Method, method


    @layercrit.reset("lab_halve", random=False)
    def halve(draw):
        """Half of each value."""
        return {name: value / 2 for name, value in draw.trained.items()}


    @layercrit.distance("lab_largest", upper=1.0)
    def largest(p, q):
        """Largest change of any class."""
        return (p - q).abs().amax(dim=1)


    @model_source("lab")
    def open_lab(rest, options):
        """A linear network of N classes."""
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, int(rest)))
        return open_model(network.eval(), input_size=(3, 2, 2))


    @tracker("lab_tracker")
    class Lines(Tracker):
        """Writes a line a cell."""

        def begin(self, name, config, folder):
            self.file = folder / "lines.txt"

        def cell(self, row):
            with self.file.open("a") as file:
                print(metric_of(row), row["cosine"], file=file)

        def end(self, ok):
            pass


    @method("lab_method", category="augmentation", changes="nothing at all", paper="none")
    class Lab(Method):
        """As the baseline."""
'''


COMMANDS = {
    "help": ["measure", "--help"],
    "methods": ["methods", "--json"],
    "measure": ["measure", "lab:5", "--images", "images.npy", "--reset", "lab_halve", "--distances", "lab_largest",
                "--track", "lab_tracker", "--out", "measured", "--json"],
    "unknown": ["measure", "lab:5", "--images", "images.npy", "--reset", "lab_broken", "--out", "unknown"],
}  # fmt: skip
PROGRAM = """
import importlib, json, pkgutil, sys
from click.testing import CliRunner
import layercrit

for found in pkgutil.walk_packages(layercrit.__path__, "layercrit."):
    if found.name != "layercrit.__main__":
        importlib.import_module(found.name)
said = {"imported": sorted({"layercrit_lab", "lab_broken"} & set(sys.modules))}
from layercrit.cli.root import cli

for name, command in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(cli, command)
    said[name] = [result.exit_code, result.stdout, result.stderr + str(result.exception or "")]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """Where a plug-in is installed, and another one that is broken."""
    return tmp_path_factory.mktemp("laboratory")


@pytest.fixture(scope="module")
def said(laboratory):
    """What layercrit prints there."""
    folder = laboratory
    groups = [f"layercrit.{name}" for name in ("resets", "distances", "model_sources", "methods", "trackers")]
    install(folder / "site", "layercrit-lab", "layercrit_lab", groups, PLUG_IN)
    install(folder / "site", "lab-broken", "lab_broken", groups[:1], "import a_package_that_is_missing\n")
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), np.uint8))
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)]
    result = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_plug_in__importing_layercrit_imports_none(said):
    """Otherwise one would be imported while the modules that it needs are half imported."""
    assert said["imported"] == []


def test_plug_in__is_in_the_help_beside_a_broken_one(said):
    code, printed, complaints = said["help"]
    assert code == 0, complaints
    text = " ".join(printed.split())
    for line in (
        "lab_halve: Half of each value.",
        "lab_largest: Largest change of any class.",
        "lab_tracker: Writes a line a cell.",
        "lab:NAME A linear network of N classes.",
    ):
        assert line in text
    assert "lab_broken of the package lab-broken 1.2 could not be imported" in complaints
    assert "layercrit_lab" not in complaints


def test_plug_in__can_be_used(said):
    code, printed, complaints = said["measure"]
    assert code == 0, complaints
    (layer,) = json.loads(printed)["layers"]
    assert layer["status"] == "ok"
    assert 0 < layer["lab_largest"] < 1
    assert "l1" not in layer


def test_plug_in__a_tracker_is_passed_the_cells(said, laboratory):
    (layer,) = json.loads(said["measure"][1])["layers"]
    (line,) = (laboratory / "measured" / "tracking" / "lines.txt").read_text().splitlines()
    name, value = line.split()
    assert name == f"criticality/lab:5/{layer['layer']}/lab_halve"
    assert float(value) == pytest.approx(layer["criticality"], rel=1e-14)


def test_plug_in__adds_a_training_method(said):
    changes = {method["name"]: method["changes"] for method in json.loads(said["methods"][1])}
    assert changes["lab_method"] == "nothing at all"


def test_plug_in__an_unknown_name_tells_of_the_broken_one(said):
    code, _, complaints = said["unknown"]
    assert code == 1
    assert "There is no reset 'lab_broken'." in complaints
    assert "ModuleNotFoundError: No module named 'a_package_that_is_missing'" in complaints
