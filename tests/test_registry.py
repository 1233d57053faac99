"""Registries: names, reloading, and plug-ins."""

import functools
import importlib
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest

from layercrit.cli import main
from layercrit.errors import ProtocolError, StudyError
from layercrit.registry import _READ, Registry, plug_in_that_raised, summary_of
from layercrit.training.methods import METHODS


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
        _READ.pop(name, None)


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


def test_plug_in__what_a_broken_one_added_before_it_failed_is_undone(site, monkeypatch):
    registry, others = (Registry(what, ProtocolError, f"layercrit.{what}s") for what in ("thing", "other"))
    monkeypatch.setattr(sys.modules[__name__], "shared", (registry, others), raising=False)
    start = f"import sys\nthings, others = sys.modules[{__name__!r}].shared\n"
    code = f"{start}list(others)\nthings['first'] = len\nothers['second'] = len\nthings['draw'] = len\n"
    install(site, "lab-broken", "lab_broken", ["layercrit.things"], code)
    install(site, "lab-things", "lab_things", ["layercrit.others"], f"{start}others['mine'] = things['mine'] = len\n")
    registry["draw"] = draw
    with pytest.warns(UserWarning, match=r"lab_broken .*The thing 'draw' exists already"):
        assert list(registry) == ["draw", "mine"]
    assert registry["draw"] is draw
    assert list(others) == ["mine"]


def test_plug_in__one_that_wants_to_end_the_process_is_broken(site):
    install(site, "lab-broken", "lab_broken", ["layercrit.things"], "raise SystemExit('no licence')\n")
    with pytest.warns(UserWarning, match=r"lab_broken .*could not be imported \(SystemExit: no licence\)"):
        assert list(Registry("thing", ProtocolError, "layercrit.things")) == []


@pytest.mark.parametrize("use", [list, lambda registry: "x" in registry, lambda registry: registry.find("draw")])
def test_plug_in__the_warning_is_shown_where_the_registry_is_used(site, use):
    install(site, "lab-broken", "lab_broken", ["layercrit.things"], "raise RuntimeError('too old')\n")
    registry = Registry("thing", ProtocolError, "layercrit.things")
    registry["draw"] = draw
    with pytest.warns(UserWarning, match="too old") as warned:
        use(registry)
    assert warned[0].filename == __file__


def test_plug_in__the_command_line_prints_the_warning_plainly(site, monkeypatch, capsys):
    install(site, "lab-broken", "lab_broken", ["layercrit.methods"], "raise RuntimeError('too \\x1b[1m old')\n")
    monkeypatch.setattr(METHODS, "_unread_group", "layercrit.methods")
    monkeypatch.setattr(METHODS, "_broken", [])
    monkeypatch.setattr(sys, "argv", ["layercrit", "methods", "--json"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            main()
    said = [line for line in capsys.readouterr().err.splitlines() if "lab_broken" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "Warning: The plug-in lab_broken of the package lab-broken 1.2 could not be imported (Runti"
    )
    assert "\x1b" not in said[0]


def test_package_of__an_entry_of_any_module_of_the_package(site, monkeypatch):
    registry = Registry("thing", ProtocolError, "layercrit.things")
    monkeypatch.setattr(sys.modules[__name__], "shared", registry, raising=False)
    code = f"import sys\nthings = sys.modules[{__name__!r}].shared\ndef mine(): pass\nthings['mine'] = mine\n"
    install(site, "lab-things", "lab_things", ["layercrit.things"], code)
    registry["draw"] = draw
    assert registry.package_of("mine") == {"lab-things": "1.2"}
    assert registry.in_words("mine") == "thing 'mine' of the package lab-things 1.2"
    assert registry.package_of("draw") == registry.package_of("none") == {}
    assert registry.in_words("draw") == "thing 'draw'"


def test_plug_in_that_raised__is_found_by_its_code(site):
    code = "def call(function):\n    return function()\ndef fail():\n    return 1 / 0\n"
    install(site, "lab-things", "lab_things", ["layercrit.things"], code)
    list(Registry("thing", ProtocolError, "layercrit.things"))
    lab_things = sys.modules["lab_things"]
    within = "lab_things of the package lab-things 1.2"
    for function, said in (
        (lab_things.fail, within),
        (lambda: lab_things.call(lambda: 1 / 0), within),
        (lambda: 1 / 0, None),
    ):
        with pytest.raises(ZeroDivisionError) as raised:
            function()
        assert plug_in_that_raised(raised.value) == said
