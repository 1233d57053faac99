"""The front door: what `layercrit` offers, to programs, to editors, to type checkers, and on the page of reference."""

import ast
import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest

import layercrit
from forked import forked_workers
from layercrit.demo import STUDY_FILE, copy_family
from layercrit.distances import DISTANCES
from layercrit.models.sources import MODEL_SOURCES
from layercrit.probes.corruptions import CORRUPTIONS
from layercrit.probes.kinds import IMAGE_SOURCES
from layercrit.reporting.exports import FORMATS
from layercrit.reporting.study_figures import FIGURES
from layercrit.resets import RESETS
from layercrit.study.executors import EXECUTORS
from layercrit.trackers import TRACKERS
from layercrit.training.methods import METHODS
from small_family import measure_small_family

ROOT = Path(__file__).parents[1]
FRONT = Path(layercrit.__file__)


def for_type_checkers():
    """Name -> module, of the imports that only type checkers and editors see."""
    blocks = [node for node in ast.parse(FRONT.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    (block,) = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING"]
    return {alias.name: str(node.module) for node in block.body for alias in node.names}


def test_names__are_the_same_to_programs_and_type_checkers():
    assert for_type_checkers() == {name: f"layercrit.{home}" for name, home in layercrit._HOME.items()}
    assert list(layercrit._HOME) == layercrit.__all__ == sorted(layercrit.__all__) == dir(layercrit)
    assert (FRONT.parent / "py.typed").is_file()


@pytest.mark.parametrize("name", layercrit.__all__)
def test_name__is_that_of_its_module_and_hides_no_module(name):
    module = importlib.import_module(f"layercrit.{layercrit._HOME[name]}")
    assert getattr(layercrit, name) is getattr(module, name)
    assert name in module.__all__
    assert not (FRONT.parent / name).exists()
    assert not (FRONT.parent / f"{name}.py").exists()


def test_names__an_unknown_one():
    with pytest.raises(AttributeError, match="has no attribute 'meassure'"):
        layercrit.meassure  # noqa: B018


def test_names__are_completed_by_editors():
    jedi = pytest.importorskip("jedi")  # IPython's, and that of many editors
    completed = {one.name for one in jedi.Script("from layercrit import ").complete()}
    assert set(layercrit.__all__) <= completed
    (signature,) = jedi.Script("import layercrit\nlayercrit.list_layers(").get_signatures()
    assert [one.name for one in signature.params] == ["model", "layers", "types", "group", "sets"]


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def as_a_reader(tmp_path_factory):
    """In a folder in which the demo was run, of fewer models on fewer images."""
    folder = tmp_path_factory.mktemp("reader")
    with contextlib.chdir(folder), forked_workers():
        copy_family(folder / "layercrit-demo")
        measure_small_family(folder / "layercrit-demo", STUDY_FILE)
        yield folder


@contextlib.contextmanager
def registered_for_now():
    """Afterwards, nothing is registered that was not before."""
    registries = (
        RESETS, DISTANCES, MODEL_SOURCES, IMAGE_SOURCES, METHODS, TRACKERS, CORRUPTIONS, FIGURES, EXECUTORS, FORMATS
    )  # fmt: skip
    before = [dict(registry) for registry in registries]
    yield
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)


def wrong_in(*examples):
    """What examples print that is not what they show."""
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        with registered_for_now():
            runner.run(example, out=said.write)
    return said.getvalue()


def example_of(name):
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(getattr(layercrit, name), name, module=False, globs={})
    return found


@pytest.mark.slow
def test_examples__of_all_names_do_what_they_show(as_a_reader):
    assert not wrong_in(*map(example_of, layercrit.__all__))


@pytest.mark.parametrize("name", layercrit.__all__)
def test_example__is_there_and_short(name):
    found = example_of(name)
    assert found.examples[0].source == "import layercrit\n"
    assert any(f"layercrit.{name}" in one.source for one in found.examples) or name in ("Model", "Study")
    assert len(found.examples) <= 5
    skipped = [one for one in found.examples if doctest.SKIP in one.options]
    assert not skipped or name == "run_demo", "only the demo takes minutes"


EXAMPLES = [
    (module, test)
    for path in sorted(FRONT.parent.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
    for module in [importlib.import_module(".".join(path.relative_to(FRONT.parents[1]).with_suffix("").parts))]
    for test in doctest.DocTestFinder().find(module)
    if test.examples and test.examples[0].source != "import layercrit\n"
]


@pytest.mark.parametrize("found", [test for _, test in EXAMPLES], ids=[test.name for _, test in EXAMPLES])
def test_example__of_what_is_inside(found):
    assert not wrong_in(found)


# --- the reference ----------------------------------------------------------------------------------------------------


def test_reference__has_every_name_once():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: layercrit\.(\w+)$", text, re.MULTILINE)) == layercrit.__all__
